"""attn.layouts: permutations written out by hand and in loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from attn import layouts, masks, simulate, softmax

DRAWN = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def test_line_and_grid():
  line = layouts.line(4)
  assert len(line) == 4 and line.coords.tolist() == [[0], [1], [2], [3]]
  grid = layouts.grid(2, 3)
  assert grid.coords.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
  for layout in (line, grid, layouts.concat(line, grid), grid.tiled(2), grid.numbered()):
    assert all(x.dtype == np.int32 and isinstance(x, np.ndarray) for x in jax.tree.leaves(layout))
    assert not layout.segment.any() or len(layout) == 10


def test_concat_numbers_segments_and_order_on():
  layout = layouts.concat(layouts.line(2), layouts.grid(2, 2).permuted([3, 0, 1, 2]), layouts.grid(1, 1, 2))
  assert layout.coords.tolist() == [
    [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1],
  ]  # fmt: skip
  assert layout.segment.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
  assert layout.order.tolist() == [0, 1, 5, 2, 3, 4, 6, 7]
  nested = layouts.concat(layout, layouts.line(1))
  assert nested.segment.tolist()[-1] == 3 and nested.order.tolist()[-1] == 8


def test_tiled_by_hand():
  # Rows of 0 1 2 3 / 4 5 6 7 in tiles of 2 x 2, and in groups of every other column.
  assert layouts.grid(2, 4).tiled(2).order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
  assert layouts.grid(2, 4).tiled((2, 1), (1, 2)).order.tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
  # Tiles that do not divide: the border tiles are smaller.
  assert layouts.line(5).tiled(2, 2).order.tolist() == [0, 2, 4, 1, 3]
  assert layouts.grid(3, 3).tiled(2).order.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


def loops(shape, tile, dilation):
  """Tokens of a grid as [groups][tiles][inside] in Python loops, -1 where a tile sticks out."""
  extent = [-(-n // (t * d)) for n, t, d in zip(shape, tile, dilation)]
  found = []
  for group in np.ndindex(*dilation):
    for far in np.ndindex(*extent):
      for near in np.ndindex(*tile):
        x = [(a * t + b) * d + c for a, b, c, t, d in zip(far, near, group, tile, dilation)]
        inside = all(i < n for i, n in zip(x, shape))
        found.append(int(np.ravel_multi_index(x, shape)) if inside else -1)
  return found


GRIDS = st.integers(1, 3).flatmap(
  lambda axes: st.tuples(*(st.tuples(*[st.integers(1, top)] * axes) for top in (6, 4, 3)))
)


@DRAWN
@given(GRIDS)
def test_tiled_matches_loops(drawn):
  shape, tile, dilation = drawn
  want = loops(*drawn)
  layout = layouts.grid(*shape).tiled(tile, dilation)
  assert layout.order.tolist() == [n for n in want if n >= 0]
  padded = layouts.grid(*shape).tiled(tile, dilation, is_padded=True)
  assert padded.order.tolist() == want
  for x in (layout, padded):
    there = x.order >= 0
    np.testing.assert_array_equal(x.coords[there], layouts.grid(*shape).coords[x.order[there]])
    assert (x.coords < shape).all()


def layout_of(shape, tile, dilation, seed, is_padded):
  grid = layouts.grid(*shape).tiled(tile, dilation, is_padded=is_padded)
  return layouts.concat(layouts.line(3), grid, layouts.line(2)).shuffled(seed)


@DRAWN
@given(GRIDS, st.integers(0, 9), st.booleans())
def test_restore_undoes_permute(drawn, seed, is_padded):
  layout = layout_of(*drawn, seed, is_padded)
  n = int((layout.order >= 0).sum())
  for axis, shape in ((0, (n, 2)), (1, (2, n, 3)), (-1, (2, n)), (1, (2, n))):
    x = 1 + np.arange(np.prod(shape)).reshape(shape)
    there = layout.permute(x, axis)
    assert there.shape[axis] == len(layout)
    np.testing.assert_array_equal(layout.restore(there, axis), x)
    assert (np.moveaxis(there, axis, 0)[layout.order < 0] == 0).all()
  assert (layout.permute(np.arange(n), 0)[layout.order >= 0] == layout.order[layout.order >= 0]).all()


def test_permute_is_differentiable_and_keeps_types():
  layout = layouts.grid(3, 3).tiled(2, is_padded=True)
  x = jnp.arange(9, dtype=jnp.bfloat16)[None]
  assert layout.permute(x).dtype == layout.restore(layout.permute(x)).dtype == jnp.bfloat16
  np.testing.assert_array_equal(layout.permute(x), layout.permute(np.asarray(x)))
  gradient = jax.grad(lambda x: (layout.permute(x) * jnp.arange(16.0)).sum())(jnp.zeros((1, 9)))
  np.testing.assert_array_equal(gradient[0], [layout.order.tolist().index(n) for n in range(9)])


def test_permutations_compose():
  rng = np.random.default_rng(0)
  one, two = rng.permutation(12), rng.permutation(12)
  layout = layouts.grid(3, 4)
  np.testing.assert_array_equal(layout.permuted(one).permuted(two).order, np.arange(12)[one][two])
  np.testing.assert_array_equal(layout.permuted(one).permuted(np.argsort(one)).coords, layout.coords)
  np.testing.assert_array_equal(layout.shuffled(3).order, layout.shuffled(3).order)
  assert (layout.shuffled(3).order != layout.shuffled(4).order).any()
  assert layout.shuffled(3).numbered().coords[:, 0].tolist() == list(range(12))
  np.testing.assert_array_equal(layout.shuffled(3).numbered().order, layout.shuffled(3).order)


def test_is_a_pytree_that_passes_through_jit():
  layout = layouts.grid(2, 4).tiled(2)
  mask = masks.placed(masks.causal() & masks.band(1, -1, 1), layout)
  got = jax.jit(lambda mask: masks.dense(mask, 8))(mask)
  np.testing.assert_array_equal(got, masks.dense(mask, 8))
  unknown = masks.verdicts(jax.tree.map(jnp.asarray, mask), 8, block_q=4, block_kv=4, is_static=True)
  assert isinstance(unknown.some, np.ndarray) and (unknown.kind == masks.PARTIAL).all()


def test_an_empty_layout():
  layout = layouts.line(0)
  assert len(layouts.concat(layout, layouts.grid(2, 0), layouts.line(1))) == 1
  seen = masks.dense(masks.placed(masks.everything(), layout), 2, 3, positions=[0, 1], kv_positions=[0, 0, 0])
  assert not np.asarray(seen).any()


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda: layouts.grid(), 'shape'),
    (lambda: layouts.grid(2, -1), 'shape=-1'),
    (lambda: layouts.grid(2, 1.5), r'shape=1\.5'),
    (lambda: layouts.line('4'), "n='4'"),
    (lambda: layouts.concat(), 'no layouts'),
    (lambda: layouts.grid(2, 4).tiled((2, 2, 2)), r'tile=\(2, 2, 2\) has 3 numbers, expected 2'),
    (lambda: layouts.grid(2, 4).tiled((2, 0)), 'tile=0'),
    (lambda: layouts.grid(2, 4).tiled(2, -1), 'dilation=-1'),
    (lambda: layouts.concat(layouts.line(3), layouts.grid(2, 2)).tiled(2, is_padded=True), 'tile before concat'),
    (lambda: layouts.line(3).permuted([0, 1]), r'shape \(2,\).*0\.\.2'),
    (lambda: layouts.line(3).permuted([0, 1, 1]), r'not a permutation'),
    (lambda: layouts.line(3).shuffled(-1), 'seed=-1'),
    (lambda: layouts.line(3).permute(np.zeros((1, 4))), r'\(1, 4\).*3 tokens on axis 1'),
    (lambda: layouts.line(3).restore(np.zeros((1, 3)), 2), r'\(1, 3\).*axis 2'),
    (lambda: masks.placed(masks.causal(), None), 'layout is a NoneType, expected a Layout'),
    (lambda: masks.placed(layouts.line(3), layouts.line(3)), 'mask is a Layout, expected a Mask'),
    (lambda: masks.placed(masks.causal(), layouts.line(3), 4), 'kv_layout is a int'),
  ],
)
def test_rejects(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_layouts_that_do_not_fit_are_refused():
  mask = masks.causal() & ~masks.placed(masks.everything(), layouts.line(5), layouts.line(6))
  masks.dense(mask, 5, 6)
  for T, S, words in ((4, 6, 'layout has 5 tokens for 4'), (5, 7, 'kv_layout has 6 tokens for 7')):
    for call in (masks.dense, lambda *a: masks.verdicts(*a, block_q=2, block_kv=2), masks.empty_rows):
      with pytest.raises(ValueError, match=words):
        call(mask, T, S)
  # Positions say which tokens of the layout are meant, so any number of them is right.
  masks.dense(mask, 2, 3, positions=[3, 4], kv_positions=[0, 5, 9])
  q = np.zeros((1, 4, 1, 2), np.float32)
  with pytest.raises(ValueError, match='layout has 5 tokens for 4'):
    softmax.attend(q, q, q, mask=mask, implementation='xla')


def test_tokens_are_looked_up_by_position():
  layout = layouts.grid(2, 4).tiled(2)  # order 0 1 4 5 2 3 6 7
  mask = masks.placed(masks.causal() & masks.band(1, 0, 0), layout)
  positions, kv_positions = [2, 7, -1, 8], [0, 2, 6, -3, 9]
  got = masks.dense(mask, 4, 5, positions=positions, kv_positions=kv_positions)
  # Position 2 is token 4 at (1, 0); 7 is token 7 at (1, 3); keys are tokens 0 at (0, 0), 4 at (1, 0), 6 at (1, 2).
  np.testing.assert_array_equal(got[0, 0], np.array([[1, 1, 0, 0, 0], [0] * 5, [0] * 5, [0] * 5], bool))
  outside = masks.dense(~mask, 4, 5, positions=positions, kv_positions=kv_positions)
  np.testing.assert_array_equal(outside, ~np.asarray(got))


def test_order_is_the_position_that_inner_predicates_see():
  layout = layouts.line(6).permuted([4, 0, 5, 2, 1, 3])
  for mask in (masks.causal(), masks.window(2), masks.sink(2), masks.function(lambda b, h, i, j: i < j)):
    plain = np.asarray(masks.dense(mask, 6))[0, 0]
    got = np.asarray(masks.dense(masks.placed(mask, layout), 6))[0, 0]
    np.testing.assert_array_equal(got, plain[np.ix_(layout.order, layout.order)])


def test_holes_see_nothing_and_are_not_seen():
  layout = layouts.grid(3, 3).tiled(2, is_padded=True)
  seen = np.asarray(masks.dense(masks.placed(masks.everything(), layout), len(layout)))[0, 0]
  np.testing.assert_array_equal(seen, (layout.order >= 0)[:, None] & (layout.order >= 0))
  kind = masks.verdicts(masks.placed(masks.everything(), layout), 16, block_q=4, block_kv=4).kind[0, 0]
  assert kind[0, 0] == masks.FULL and (kind[3] == masks.PARTIAL).all()


def test_text_before_tiles_shifts_them():
  """What the module's example says: runs of a tile's length are boxes if the text stands behind, or is padded."""
  video, text = layouts.grid(4, 16, 16).tiled((2, 8, 8)), layouts.line(16)
  near = masks.neighborhood((4, 16, 16), (2, 8, 8), stride=(2, 8, 8))
  shares = []
  for parts, segment in (((text, video), 1), ((video, text), 0), ((text.tiled(128, is_padded=True), video), 1)):
    layout = layouts.concat(*parts)
    mask = masks.placed(near & masks.segments(segment, segment) | masks.segments(1 - segment, None)
                        | masks.segments(None, 1 - segment), layout)  # fmt: skip
    shares.append(simulate.mask(mask, len(layout), block_q=128, block_kv=128).mean)
  assert shares[0] < 0.75 * shares[1] and shares[0] < 0.75 * shares[2]


def test_a_traced_layout_does_not_permute():
  layout = layouts.grid(2, 2)
  with pytest.raises(ValueError, match='the layout is traced'):
    jax.jit(lambda layout: layout.permute(jnp.ones((1, 4))))(layout)
  assert repr(layout) == 'Layout(4 tokens, 2 axes)'
