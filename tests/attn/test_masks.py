"""attn.masks against predicates in plain Python, pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from attn import masks
from tests.attn import oracle

SIZES = [(1, 1), (4, 5), (4, 9), (9, 4), (1, 7)]
B, H = 2, 3

# name -> (mask of positions, the same as a predicate of batch, head, query position, key position)
POSITIONAL = {
  'everything': (masks.everything(), lambda b, h, i, j: True),
  'causal': (masks.causal(), lambda b, h, i, j: j <= i),
  'causal ahead': (masks.causal(3), lambda b, h, i, j: j <= i + 3),
  'causal behind': (masks.causal(-2), lambda b, h, i, j: j <= i - 2),
  'causal per row': (masks.causal(np.array([2, -1])), lambda b, h, i, j: j <= i + (2, -1)[b]),
  'window none': (masks.window(0), lambda b, h, i, j: i == j),
  'window left': (masks.window(2), lambda b, h, i, j: i - 2 <= j <= i),
  'window both': (masks.window(1, 2), lambda b, h, i, j: i - 1 <= j <= i + 2),
  'window unbounded left': (masks.window(None, 1), lambda b, h, i, j: j <= i + 1),
  'window unbounded right': (masks.window(3, None), lambda b, h, i, j: j >= i - 3),
  'window unbounded': (masks.window(None, None), lambda b, h, i, j: True),
  'chunked': (masks.chunked(3), lambda b, h, i, j: i // 3 == j // 3),
  'chunked one': (masks.chunked(1), lambda b, h, i, j: i == j),
  'prefix': (masks.prefix(3), lambda b, h, i, j: j < 3),
  'prefix empty': (masks.prefix(0), lambda b, h, i, j: j < 0),
  'prefix per row': (masks.prefix(np.array([4, 1])), lambda b, h, i, j: j < (4, 1)[b]),
  'sink': (masks.sink(2), lambda b, h, i, j: j < 2),
  'dilated': (masks.dilated(3), lambda b, h, i, j: (i - j) % 3 == 0),
  'dilated one': (masks.dilated(1), lambda b, h, i, j: True),
  'function': (
    masks.function(lambda b, h, i, j: (i + 2 * j + b + h) % 3 == 0),
    lambda b, h, i, j: (i + 2 * j + b + h) % 3 == 0,
  ),
  'function of an array': (
    masks.function(lambda b, h, i, j, reach: i - j <= reach[h], np.array([0, 2, 5])),
    lambda b, h, i, j: i - j <= (0, 2, 5)[h],
  ),
  'streaming': (
    masks.causal() & (masks.window(2) | masks.sink(1)),
    lambda b, h, i, j: j <= i and (j >= i - 2 or j < 1),
  ),
  'dilated window': (
    masks.causal() & masks.window(6) & masks.dilated(2) | masks.prefix(1),
    lambda b, h, i, j: (j <= i and j >= i - 6 and (i - j) % 2 == 0) or j < 1,
  ),
  'all but a band': (~(masks.window(1, 1) | ~masks.causal(1)), lambda b, h, i, j: not (abs(i - j) <= 1 or j > i + 1)),
}  # fmt: skip


def evaluate(mask, T, S, **kwargs):
  """masks.dense as numpy at its full shape; the axes that may be 1 are checked."""
  got = np.asarray(masks.dense(mask, T, S, batch=B, heads=H, **kwargs))
  assert got.dtype == bool
  assert got.shape[0] in (1, B) and got.shape[1] in (1, H) and got.shape[2:] == (T, S)
  return np.broadcast_to(got, (B, H, T, S))


@pytest.mark.parametrize('name', POSITIONAL)
def test_matches_predicate(name):
  mask, pair = POSITIONAL[name]
  for T, S in SIZES:
    want = oracle.dense(lambda b, h, i, j, t, s: pair(b, h, i, j), T, S, batch=B, heads=H)
    np.testing.assert_array_equal(evaluate(mask, T, S), want)


@pytest.mark.parametrize('name', POSITIONAL)
def test_sees_positions(name):
  mask, pair = POSITIONAL[name]
  positions, kv_positions = np.array([[5, 6, 7, 11], [0, 3, 3, 20]]), np.array([6, 1, 0, 9, 12])
  want = oracle.dense(
    lambda b, h, i, j, t, s: pair(b, h, i, j), 4, 5, batch=B, heads=H, positions=positions, kv_positions=kv_positions
  )
  np.testing.assert_array_equal(evaluate(mask, 4, 5, positions=positions, kv_positions=kv_positions), want)


def test_a_row_of_the_batch_stands_alone():
  for name, (mask, _) in POSITIONAL.items():
    if not name.endswith('per row'):
      alone = np.asarray(masks.dense(mask, 4, 5, batch=1, heads=H))
      np.testing.assert_array_equal(np.broadcast_to(alone, (1, H, 4, 5)), evaluate(mask, 4, 5)[:1])


Q_IDS, KV_IDS = np.array([[0, 0, 1, 1, 1], [2, 3, 3, 3, 0]]), np.array([[0, 1, 1, 2], [3, 3, 2, 0]])


@pytest.mark.parametrize('ids, kv_ids', [(Q_IDS, None), (Q_IDS, KV_IDS), (Q_IDS[0], KV_IDS[1]), (Q_IDS, KV_IDS[0])])
def test_document(ids, kv_ids):
  keys = ids if kv_ids is None else kv_ids
  rows, columns = np.broadcast_to(ids, (B, 5)), np.broadcast_to(keys, (B, keys.shape[-1]))
  want = oracle.dense(lambda b, h, i, j, t, s: rows[b, t] == columns[b, s], 5, keys.shape[-1], batch=B, heads=H)
  mask = masks.document(ids, kv_ids)
  np.testing.assert_array_equal(evaluate(mask, 5, keys.shape[-1]), want)
  # Read by index: where the tokens stand in their text changes nothing.
  np.testing.assert_array_equal(evaluate(mask, 5, keys.shape[-1], positions=np.arange(5)[::-1] + 7), want)


@pytest.mark.parametrize('shape', [(), (6,), (5, 1), (5, 6), (3, 5, 6), (2, 1, 5, 6), (2, 3, 5, 6), (2, 3, 1, 1)])
def test_array(shape):
  values = np.random.default_rng(0).random(shape) < 0.5
  got = evaluate(masks.array(values), 5, 6, positions=np.arange(5) + 100)
  np.testing.assert_array_equal(got, np.broadcast_to(values, (B, H, 5, 6)))


def atoms():
  """Masks drawn with their settings, beside their predicates of (b, i, j)."""
  n = st.integers(0, 6)
  return st.one_of(
    st.just((masks.everything(), lambda b, i, j: True)),
    st.integers(-5, 5).map(lambda o: (masks.causal(o), lambda b, i, j: j <= i + o)),
    st.tuples(st.integers(-5, 5), st.integers(-5, 5)).map(
      lambda o: (masks.causal(np.array(o)), lambda b, i, j: j <= i + o[b])
    ),
    st.tuples(n | st.none(), n | st.none()).map(
      lambda w: (masks.window(*w), lambda b, i, j: (w[0] is None or j >= i - w[0]) and (w[1] is None or j <= i + w[1]))
    ),
    st.integers(1, 6).map(lambda c: (masks.chunked(c), lambda b, i, j: i // c == j // c)),
    st.integers(0, 12).map(lambda p: (masks.prefix(p), lambda b, i, j: j < p)),
    st.tuples(n, n).map(lambda p: (masks.prefix(np.array(p)), lambda b, i, j: j < p[b])),
    n.map(lambda p: (masks.sink(p), lambda b, i, j: j < p)),
    st.integers(1, 5).map(lambda d: (masks.dilated(d), lambda b, i, j: (i - j) % d == 0)),
    st.just((masks.function(lambda b, h, i, j: (i * j + b) % 2 == 0), lambda b, i, j: (i * j + b) % 2 == 0)),
  )


def combinations():
  """Formulas of masks by & | ~, beside the same formulas of predicates."""

  def extend(parts):
    return st.one_of(
      st.tuples(parts, parts).map(lambda p: (p[0][0] & p[1][0], lambda b, i, j: p[0][1](b, i, j) and p[1][1](b, i, j))),
      st.tuples(parts, parts).map(lambda p: (p[0][0] | p[1][0], lambda b, i, j: p[0][1](b, i, j) or p[1][1](b, i, j))),
      parts.map(lambda p: (~p[0], lambda b, i, j: not p[1](b, i, j))),
    )

  return st.recursive(atoms(), extend, max_leaves=5)


DRAWN = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@DRAWN
@given(combinations())
def test_combinations_match_predicates(drawn):
  mask, pair = drawn
  want = oracle.dense(lambda b, h, i, j, t, s: pair(b, i, j), 4, 9, batch=B, heads=H)
  np.testing.assert_array_equal(evaluate(mask, 4, 9), want)


@DRAWN
@given(combinations(), combinations())
def test_de_morgan(one, other):
  a, b = one[0], other[0]
  np.testing.assert_array_equal(evaluate(~(a & b), 4, 9), evaluate(~a | ~b, 4, 9))
  np.testing.assert_array_equal(evaluate(~(a | b), 4, 9), evaluate(~a & ~b, 4, 9))
  np.testing.assert_array_equal(evaluate(~~a, 4, 9), evaluate(a, 4, 9))


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


def test_goes_through_jit_as_an_argument():
  ids = np.array([[0, 0, 1, 1, 1], [2, 2, 2, 3, 3]])
  allowed = np.random.default_rng(1).random((1, 3, 5, 5)) < 0.7
  mask = masks.causal(np.array([0, 1])) & masks.document(ids) | masks.array(allowed) & ~masks.prefix(np.array([1, 2]))
  mask = jax.tree.map(jnp.asarray, mask)
  compiled = jax.jit(lambda m: masks.dense(m, 5, batch=B, heads=H))
  np.testing.assert_array_equal(compiled(mask), evaluate(mask, 5, 5))
  moved = jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, mask)
  np.testing.assert_array_equal(compiled(moved), evaluate(moved, 5, 5))
  assert compiled._cache_size() == 1, 'new values in the arrays of a mask compiled it again'


def test_vmap_over_the_arrays_of_a_mask():
  offsets = np.array([-1, 0, 2])
  got = jax.vmap(lambda o: masks.dense(masks.causal(o), 4, 5))(offsets)
  for offset, one in zip(offsets, got):
    np.testing.assert_array_equal(one, masks.dense(masks.causal(int(offset)), 4, 5))


@pytest.mark.parametrize('name', POSITIONAL)
def test_is_an_immutable_pytree(name):
  mask, _ = POSITIONAL[name]
  leaves, tree = jax.tree.flatten(mask)
  again = jax.tree.unflatten(tree, leaves)
  np.testing.assert_array_equal(evaluate(again, 4, 5), evaluate(mask, 4, 5))
  field = next(iter(vars(mask)), 'anything')
  with pytest.raises(AttributeError):
    setattr(mask, field, 0)


def test_has_no_truth_value():
  with pytest.raises(TypeError, match=r'& \| ~.*bracket'):
    bool(masks.causal())
  with pytest.raises(TypeError, match=r'& \| ~'):
    masks.causal() and masks.window(3)
  with pytest.raises(TypeError, match=r'& \| ~'):
    not masks.causal()


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda: masks.window(-1), 'left=-1'),
    (lambda: masks.window(2, -3), 'right=-3'),
    (lambda: masks.window(1.5), r'left=1\.5'),
    (lambda: masks.chunked(0), 'size=0'),
    (lambda: masks.chunked(-4), 'size=-4'),
    (lambda: masks.chunked('8'), "size='8'"),
    (lambda: masks.sink(-1), 'n=-1'),
    (lambda: masks.dilated(0), 'step=0'),
    (lambda: masks.dilated(None), 'step=None'),
    (lambda: masks.causal(0.5), 'offset'),
    (lambda: masks.causal(np.zeros(2)), 'offset.*float'),
    (lambda: masks.causal(np.zeros((2, 2), int)), r'offset.*\(2, 2\)'),
    (lambda: masks.prefix(np.array([1.0, 2.0])), 'length.*float'),
    (lambda: masks.prefix(True), 'length'),
    (lambda: masks.document(np.zeros((2, 4))), 'q_ids.*float'),
    (lambda: masks.document(np.zeros((2, 4), int), np.zeros((2, 4))), 'kv_ids.*float'),
    (lambda: masks.document(np.zeros((1, 2, 4), int)), r'q_ids.*\(1, 2, 4\)'),
    (lambda: masks.array(np.zeros((4, 4))), 'float.*bool'),
    (lambda: masks.array(np.zeros((1,) * 5, bool)), r'\(1, 1, 1, 1, 1\)'),
    (lambda: masks.function(3), 'f=3'),
    (lambda: masks.causal() & np.ones((4, 4), bool), 'masks.array'),
    (lambda: masks.causal() | True, 'masks.array'),
  ],
)
def test_rejects(make, words):
  with pytest.raises(ValueError, match=words):
    make()


@pytest.mark.parametrize(
  'mask, kwargs, words',
  [
    (masks.document(np.zeros((2, 4), int)), {}, r'q_ids.*\(2, 4\)'),
    (masks.document(np.zeros((2, 5), int), np.zeros((2, 5), int)), {}, r'kv_ids.*\(2, 5\)'),
    (masks.document(np.zeros((3, 5), int), np.zeros(6, int)), {}, r'q_ids.*\(3, 5\)'),
    (masks.array(np.zeros((4, 6), bool)), {}, r'mask.*\(1, 1, 4, 6\)'),
    (masks.array(np.zeros((5, 5), bool)), {}, 'mask.*axis S'),
    (masks.array(np.zeros((2, 4, 5, 6), bool)), {}, 'mask.*axis H'),
    (masks.causal() & ~masks.array(np.zeros((4, 6), bool)), {}, r'mask.*\(1, 1, 4, 6\)'),
    (masks.causal(np.zeros(3, int)), {}, r'offset.*\(3,\)'),
    (masks.prefix(np.zeros(3, int)), {}, r'length.*\(3,\)'),
    (masks.function(lambda b, h, i, j: i - j), {}, 'int.*bool'),
    (masks.causal(), {'positions': np.arange(4)}, r'positions.*\(4,\)'),
    (masks.causal(), {'kv_positions': np.zeros((3, 6), int)}, r'kv_positions.*\(3, 6\)'),
    (masks.causal(), {'positions': np.arange(5.0)}, 'positions.*float'),
  ],
)
def test_dense_rejects_what_does_not_fit(mask, kwargs, words):
  with pytest.raises(ValueError, match=words):
    masks.dense(mask, 5, 6, batch=B, heads=H, **kwargs)


def test_a_shifted_mask_would_be_noticed():
  """The predicates above bite: the nearest wrong masks all differ from them on the sizes in use."""
  for wrong, name in [
    (masks.causal(1), 'causal'), (masks.window(3), 'window left'), (masks.window(1), 'window left'),
    (masks.sink(3), 'sink'), (masks.chunked(4), 'chunked'), (masks.dilated(2), 'dilated'),
  ]:  # fmt: skip
    pair = POSITIONAL[name][1]
    want = oracle.dense(lambda b, h, i, j, t, s, pair=pair: pair(b, h, i, j), 5, 5, batch=B, heads=H)
    assert (evaluate(wrong, 5, 5) != want).any()
