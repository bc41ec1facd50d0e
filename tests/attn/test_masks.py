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


@pytest.mark.parametrize('offset', [2**31 - 1, -(2**31), 2**31 - 5])
def test_offsets_at_the_limits(offset):
  mask = masks.causal(offset)
  want = np.arange(40) - np.arange(40)[:, None] <= offset
  np.testing.assert_array_equal(masks.dense(mask, 40)[0, 0], want)
  some, every = masks.verdicts(mask, 40, block_q=8, block_kv=8)
  assert some.all() == every.all() == want.all()


@pytest.mark.parametrize('make', [masks.causal, masks.prefix, lambda x: masks.grouped(4, x)])
def test_numbers_beyond_int32_are_refused(make):
  with pytest.raises(ValueError, match='10000000000'):
    make(10**10)
  with pytest.raises(ValueError, match='expected what int32 holds'):
    make(np.array([10**10]))


def test_unsigned_ids_keep_their_documents():
  ids = np.repeat(np.array([5, 2**31 + 5], np.uint32), 10)
  want = ids[:, None] == ids
  with pytest.raises(ValueError, match='expected what int32 holds'):
    masks.document(ids)  # numpy
  with pytest.raises(ValueError, match='expected what int32 holds'):
    masks.document(np.array([1, 2**40]))
  mask = masks.document(jnp.asarray(ids))
  np.testing.assert_array_equal(masks.dense(mask, 20)[0, 0], want)
  some, every = (np.asarray(x)[0, 0] for x in masks.verdicts(mask, 20, block_q=4, block_kv=4))
  tiles = want.reshape(5, 4, 5, 4).transpose(0, 2, 1, 3)
  assert (some >= tiles.any((2, 3))).all() and (every <= tiles.all((2, 3))).all()


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int16, np.uint32])
def test_narrow_positions(dtype):
  for mask in (masks.neighborhood((20, 20), 3), masks.radial((4, 100), 0.5), masks.causal(), masks.window(3)):
    positions = np.arange(100, 104).astype(dtype)
    want = masks.dense(mask, 4, positions=positions.astype(np.int32), kv_positions=positions.astype(np.int32))
    for form in (np.asarray, jnp.asarray):
      got = masks.dense(mask, 4, positions=form(positions), kv_positions=form(positions))
      np.testing.assert_array_equal(got, want)


def test_one_shift_as_an_array():
  want = masks.dense(masks.grouped(4, 2), 12)
  np.testing.assert_array_equal(masks.dense(masks.grouped(4, jnp.asarray(2)), 12), want)


def test_arrays_on_the_left_are_told_what_to_do():
  for array in (np.ones((3, 3), bool), jnp.ones((3, 3), bool), True):
    for combine in (lambda a, b: a & b, lambda a, b: a | b):
      with pytest.raises(ValueError, match='wrap a bool array in'):
        combine(array, masks.causal())


def test_equality_and_text():
  ids = np.array([0, 0, 1])
  assert masks.document(ids) == masks.document(ids.copy()) != masks.document(ids + 1)
  assert masks.causal() & masks.window(3) == masks.causal() & masks.window(3)
  assert hash(masks.causal() & masks.window(3)) == hash(masks.causal() & masks.window(3))
  assert masks.causal() != masks.causal(1) and masks.causal() != 3
  assert repr(masks.causal() & (masks.window(3) | masks.sink(1))) == 'causal() & (window(3) | sink(1))'


@pytest.mark.parametrize('T, words', [(-1, 'T=-1'), (2.5, 'T=2.5')])
def test_lengths_are_checked(T, words):
  for f in (masks.dense, lambda *a: masks.verdicts(*a, block_q=2, block_kv=2)):
    with pytest.raises(ValueError, match=words):
      f(masks.causal(), T)
  with pytest.raises(ValueError, match='mask is ndarray, expected a mask'):
    masks.dense(np.ones((3, 3), bool), 3)
