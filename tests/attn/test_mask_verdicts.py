"""What masks say of whole tiles, against predicates in plain Python: never wrong, and tight where work is saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from attn import masks
from tests.attn import oracle
from tests.attn.test_masks import DRAWN, KV_IDS, POSITIONAL, Q_IDS, B, H, combinations


def places(n):
  """Positions [B, n] of hypothesis: in any order, repeated, negative."""
  return st.lists(st.integers(-4, 16), min_size=B * n, max_size=B * n).map(lambda x: np.array(x).reshape(B, n))


def keeps_promises(verdict, seen, block_q, block_kv):
  """Whether nothing is seen where `some` is False, and everything where `every` is True; seen [B, H, T, S]."""
  T, S = seen.shape[2:]
  some, every = (np.broadcast_to(x, (B, H, -(-T // block_q), -(-S // block_kv))) for x in verdict)
  for i, j in np.ndindex(some.shape[2:]):
    tile = seen[:, :, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
    if (tile.any((2, 3)) & ~some[:, :, i, j]).any() or (~tile.all((2, 3)) & every[:, :, i, j]).any():
      return False
  return True


@settings(DRAWN, max_examples=100)
@given(combinations(), places(7), places(9), st.integers(1, 8), st.integers(1, 10))
def test_boxes_keep_their_promises(drawn, q_places, k_places, block_q, block_kv):
  mask, pair = drawn
  options = {'batch': B, 'heads': H, 'positions': q_places, 'kv_positions': k_places}
  seen = oracle.dense(lambda b, h, i, j, t, s: pair(b, i, j), 7, 9, **options)
  verdict = masks.verdicts(mask, 7, 9, block_q=block_q, block_kv=block_kv, **options)
  assert keeps_promises(verdict, seen, block_q, block_kv)
  assert not (verdict.every & ~verdict.some).any(), 'a tile is both empty and full'


@settings(DRAWN, max_examples=20)
@given(combinations(), places(5), places(6))
def test_boxes_of_arrays_say_the_same_as_those_of_numpy(drawn, q_places, k_places):
  options = {'block_q': 2, 'block_kv': 4, 'batch': B, 'heads': H}
  want = masks.verdicts(drawn[0], 5, 6, positions=q_places, kv_positions=k_places, **options)
  mask = jax.tree.map(jnp.asarray, drawn[0])
  got = masks.verdicts(mask, 5, 6, positions=jnp.asarray(q_places), kv_positions=jnp.asarray(k_places), **options)
  for one, other in zip(got, want):
    np.testing.assert_array_equal(*np.broadcast_arrays(one, other))


# Verdicts of these leave nothing to be found out; those of a combination, or a function of pairs, may.
TIGHT = set(POSITIONAL) - {'function', 'function of an array', 'streaming', 'dilated window', 'all but a band'}


def boxes_at_every_place():
  """Boxes with each position and length of a small range as one of their runs, and (low, more) of each."""
  low, more = (x.ravel() for x in np.meshgrid(np.arange(-3, 12), np.arange(4), indexing='ij'))
  position = np.minimum(low[:, None] + np.arange(4), (low + more)[:, None]).reshape(1, 1, -1)
  index = np.arange(position.shape[-1])[None, None]
  return masks.Boxes(masks.Tokens(index, position), 4), low, more


@pytest.mark.parametrize('name', POSITIONAL)
def test_boxes_at_every_place_keep_their_promises(name):
  """Every small box against every small box: those that touch a border by one position are among them."""
  mask, pair = POSITIONAL[name]
  boxes, low, more = boxes_at_every_place()
  seen = oracle.dense(
    lambda b, h, i, j, t, s: pair(b, h, i, j), 18, batch=B, heads=H,
    positions=np.arange(-3, 15), kv_positions=np.arange(-3, 15),
  )  # fmt: skip
  # allowed[i, j] counts the pairs before row i and column j, so that four reads count those of a box.
  allowed = np.pad(seen.cumsum(2).cumsum(3), ((0, 0), (0, 0), (1, 0), (1, 0)))
  top, bottom, left, right = (low + 3)[:, None], (low + more + 4)[:, None], low + 3, low + more + 4
  read = lambda i, j: allowed[:, :, i, j]
  inside = read(bottom, right) - read(top, right) - read(bottom, left) + read(top, left)
  some, every = (np.broadcast_to(x, inside.shape) for x in mask.boxes(boxes, boxes))
  assert (inside[~some] == 0).all()
  assert (inside == (more + 1)[:, None] * (more + 1))[every].all()
  if name in TIGHT:
    np.testing.assert_array_equal(some, inside > 0)
    np.testing.assert_array_equal(every, inside == (more + 1)[:, None] * (more + 1))


def kinds(mask, T, block, **kwargs):
  """EMPTY, PARTIAL or FULL of every tile by looking at all pairs."""
  dense = np.asarray(masks.dense(mask, T, **kwargs))
  *lead, n = *dense.shape[:2], T // block
  tiles = dense.reshape(*lead, n, block, n, block)
  return tiles.any((3, 5)).astype(int) + tiles.all((3, 5))


def test_boxes_are_tight_where_work_is_saved():
  causal, ids = masks.causal(), np.repeat([[0, 1, 2, 3], [0, 0, 5, 5]], 16, axis=1)
  for mask in (
    causal, causal & masks.window(15), masks.chunked(16), causal & masks.prefix(8), masks.document(ids),
    causal & masks.document(ids), masks.array(np.asarray(masks.dense(causal & masks.chunked(12), 64))),
  ):  # fmt: skip
    got = masks.verdicts(mask, 64, block_q=8, block_kv=8, batch=B).kind
    np.testing.assert_array_equal(got, kinds(mask, 64, 8, batch=B))


def test_a_shorter_last_tile():
  """Five tokens in tiles of two: the last tile is judged by the one token in it."""
  verdict = masks.verdicts(masks.causal() & masks.window(1), 5, block_q=2, block_kv=2)
  np.testing.assert_array_equal(verdict.kind[0, 0], [[1, 0, 0], [1, 1, 0], [0, 1, 2]])


STATIC = {
  'causal': (masks.causal(np.array([0, 3])), lambda b, h, i, j: j <= i + (0, 3)[b]),
  'prefix': (masks.prefix(np.array([2, 5])), lambda b, h, i, j: j < (2, 5)[b]),
  'document': (masks.document(Q_IDS[:, :4], KV_IDS), lambda b, h, i, j: Q_IDS[b, i] == KV_IDS[b, j]),
  'array': (masks.array(np.arange(16).reshape(4, 4) % 5 < 3), lambda b, h, i, j: (4 * i + j) % 5 < 3),
}  # fmt: skip


@pytest.mark.parametrize('name', STATIC)
def test_static_verdicts_are_numpy_and_never_of_arrays(name):
  mask, pair = STATIC[name]
  options = {'block_q': 2, 'block_kv': 1, 'batch': B, 'heads': H}
  seen = oracle.dense(lambda b, h, i, j, t, s: pair(b, h, i, j), 4, batch=B, heads=H)

  static = masks.verdicts(mask, 4, is_static=True, **options)
  assert isinstance(static.some, np.ndarray) and isinstance(static.every, np.ndarray)
  assert keeps_promises(static, seen, 2, 1)
  assert not static.some.all(), 'numpy arrays were not read'

  as_arrays = jax.tree.map(jnp.asarray, mask)
  unknown = masks.verdicts(as_arrays, 4, is_static=True, **options)
  assert isinstance(unknown.some, np.ndarray) and unknown.some.all() and not unknown.every.any()
  data = masks.verdicts(as_arrays, 4, **options)
  assert isinstance(data.some, jax.Array)
  np.testing.assert_array_equal(data.kind, static.kind)


def test_boxes_of_traced_arrays():
  """Traced values are read where that is asked for, and are as good as numbers; static verdicts leave them alone."""

  def verdict(offset, **kwargs):
    return masks.verdicts(masks.causal(offset), 8, block_q=4, block_kv=4, **kwargs)

  static = []
  read = jax.jit(lambda offset: (static.append(verdict(offset, is_static=True)), verdict(offset))[1])
  for offset in (-8, -3, 0, 4):
    np.testing.assert_array_equal(read(offset).kind, verdict(offset).kind)
  assert len(static) == 1 and (static[0].kind == masks.PARTIAL).all()


@pytest.mark.parametrize('name', [*POSITIONAL, 'document', 'array'])
def test_tokens_of_their_own_for_every_row_and_head(name):
  """Tiles that differ by row of the batch and by head, as a work list of each has them."""
  rng = np.random.default_rng(3)
  allowed = rng.random((B, 1, 9, 9)) < 0.5
  if name == 'document':
    mask, pair = masks.document(rng.integers(0, 3, (B, 9))), None
    pair = lambda b, h, i, j, t, s: mask.q_ids[b, t] == mask.q_ids[b, s]
  elif name == 'array':
    mask, pair = masks.array(allowed), lambda b, h, i, j, t, s: allowed[b, 0, t, s]
  else:
    mask, of_places = POSITIONAL[name]
    pair = lambda b, h, i, j, t, s: of_places(b, h, i, j)
  index, k_index = rng.integers(0, 9, (2, B, H, 4))
  q, k = masks.Tokens(index, 2 * index - 3), masks.Tokens(k_index, k_index + 1)
  want = np.zeros((B, H, 4, 4), bool)
  for b, h, t, s in np.ndindex(*want.shape):
    want[b, h, t, s] = pair(b, h, *(int(x[b, h, at]) for x, at in ((q.position, t), (k.position, s))),
                            int(index[b, h, t]), int(k_index[b, h, s]))  # fmt: skip
  got = mask.tile(*(jax.tree.map(jnp.asarray, x) for x in (q, k)), B, H)
  np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
  if name != 'array':  # boxes of an array are runs of all of it
    assert keeps_promises(mask.boxes(masks.Boxes(q, 2), masks.Boxes(k, 3)), want, 2, 3)


@pytest.mark.parametrize(
  'kwargs, words',
  [
    ({'block_q': 0}, 'block_q=0'),
    ({'block_kv': 2.5}, r'block_kv=2\.5'),
    ({'positions': np.arange(4)}, r'positions.*\(4,\)'),
    ({'kv_positions': np.zeros((3, 6), int)}, r'kv_positions.*\(3, 6\)'),
    ({'mask': masks.document(np.zeros(4, int))}, r'q_ids.*\(4,\)'),
  ],
)
def test_verdicts_reject(kwargs, words):
  mask, kwargs = kwargs.get('mask', masks.causal()), {k: v for k, v in kwargs.items() if k != 'mask'}
  with pytest.raises(ValueError, match=words):
    masks.verdicts(mask, 5, 6, batch=B, heads=H, **{'block_q': 2, 'block_kv': 2, **kwargs})
