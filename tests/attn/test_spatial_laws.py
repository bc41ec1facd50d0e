"""The laws of the methods that masks of coordinates come from: limits, counts and figures of their papers."""

import numpy as np
import pytest

from attn import layouts, masks
from tests.attn import spatial_cases as cases
from tests.attn.spatial_cases import SHAPE, evaluate as dense

GRID = layouts.grid(*SHAPE)

# Generalized neighborhood attention.


def visits(shape, window, stride, tile, block):
  """(all tiles / mean visited, all tiles / most visited, share of the visited that are full)."""
  layout = layouts.grid(*shape) if tile is None else layouts.grid(*shape).tiled(tile)
  mask = masks.placed(masks.neighborhood(shape, window, stride), layout)
  some, every = masks.verdicts(mask, len(layout), block_q=block, block_kv=block)
  visited = some[0, 0].sum(1)
  return visited.size / visited.mean(), visited.size / visited.max(), every.sum() / some.sum()


@pytest.mark.parametrize(
  'shape, window, stride, tile, want',
  [
    ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), (5.44, 3.60, 0.17)),
    ((30, 48, 80), (18, 24, 24), (2, 8, 8), (2, 8, 8), (11.11, 11.11, 1.00)),
    ((16, 44, 80), (16, 32, 48), 1, (2, 4, 16), (1.75, 1.22, 0.54)),
    ((16, 44, 80), (16, 32, 48), (1, 4, 16), (2, 4, 16), (2.22, 2.04, 0.93)),
    ((16, 44, 80), (16, 32, 48), (1, 16, 16), (2, 4, 16), (2.29, 2.29, 1.00)),
    ((256, 256), (80, 80), 1, (16, 8), (7.51, 6.65, 0.50)),
    ((256, 256), (80, 80), 16, (16, 8), (10.24, 10.24, 1.00)),
    ((64, 64), (17, 17), 1, (8, 16), (4.27, 3.56, 0.00)),
    ((64, 64), (17, 17), 1, None, (3.56, None, None)),
  ],
)
def test_tiles_visited_on_real_layouts(shape, window, stride, tile, want):
  got = visits(shape, window, stride, tile, 128)
  for one, other in zip(got, want):
    assert other is None or abs(one - other) < 0.0051, (got, want)


@pytest.mark.parametrize('w, stride, d', [(3, 1, 1), (4, 3, 1), (4, 4, 1), (2, 1, 4), (5, 2, 2), (13, 1, 1), (1, 1, 1)])
def test_every_query_sees_the_whole_window(w, stride, d):
  assert (dense(masks.neighborhood((13,), w, stride, d), 13).sum(-1) == w).all()
  seen = dense(masks.neighborhood((13, 6), (w, 2), (stride, 2), (d, 3)), 78)
  assert (seen.sum(-1) == 2 * w).all()


def test_limits_of_neighborhood():
  blocked = dense(masks.neighborhood((6, 8), (3, 4), (3, 4)), 48)[0, 0].reshape(6, 8, 6, 8)
  for y, x, v, u in np.ndindex(6, 8, 6, 8):
    assert blocked[y, x, v, u] == (y // 3 == v // 3 and x // 4 == u // 4)
  assert dense(masks.neighborhood((3, 5), (3, 5), (2, 5)), 15).all()
  assert np.flatnonzero(dense(masks.neighborhood((13,), 4, 4), 13)[0, 0, 12]).tolist() == [9, 10, 11, 12]
  causal = dense(masks.neighborhood((12,), 4, 2, is_causal=True), 12)[0, 0]
  assert causal.sum(1).tolist() == [1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 3, 4]
  np.testing.assert_array_equal(
    dense(masks.neighborhood((9,), 3, is_causal=True), 9), dense(masks.causal() & masks.window(2), 9)
  )


@pytest.mark.parametrize('is_causal', [False, True])
def test_a_dilation_is_as_many_problems_of_their_own(is_causal):
  """Groups of 5, 4 and 4 tokens."""
  seen = dense(masks.neighborhood((13,), 4, 2, 3, is_causal), 13)[0, 0]
  for a, b in np.ndindex(3, 3):
    part = seen[a::3, b::3]
    alone = dense(masks.neighborhood((len(part),), 4, 2, 1, is_causal), len(part))[0, 0] if a == b else False
    np.testing.assert_array_equal(part, np.broadcast_to(alone, part.shape))


@pytest.mark.parametrize('n', [7, 9, 20])
@pytest.mark.parametrize('half', [1, 2, 3])
def test_inward_windows_are_a_neighborhood(n, half):
  """FreeSwim: the far side of a window grows by what the near side loses at the border."""
  want = np.zeros((n, n), bool)
  for i in range(n):
    low, high = i - half, i + half
    far_low, far_high = low - max(0, high - (n - 1)), high + max(0, -low)
    want[i, max(0, far_low) : min(n - 1, far_high) + 1] = True
  np.testing.assert_array_equal(dense(masks.neighborhood((2, n), (2, 2 * half + 1)), 2 * n)[0, 0, :n, :n], want)


def test_without_a_layout_positions_number_the_grid():
  mask = masks.neighborhood(SHAPE, (3, 4, 2), 2)
  np.testing.assert_array_equal(dense(mask, 60), dense(masks.placed(mask, GRID), 60))
  mask = masks.radial(SHAPE, 0.3, block=4)
  np.testing.assert_array_equal(dense(mask, 60), dense(masks.placed(mask, GRID), 60))
  for mask in (masks.neighborhood((2, 3), 1), masks.radial((2, 3), 1.0), masks.random_blocks(0, 3, 2, 6)):
    seen = dense(mask, 4, 4, positions=np.array([0, -1, 6, 5]), kv_positions=np.array([0, -1, 6, 5]))[0, 0]
    assert seen[0, 0] and seen[3, 3] and not seen[1:3].any() and not seen[:, 1:3].any()


# Radial attention.


@pytest.mark.parametrize(
  'frames, tokens, decay, want',
  [(21, 3600, 0.2, 0.205), (81, 3600, 0.2, 0.093), (33, 3600, 0.95, 0.253), (117, 3600, 0.95, 0.104)],
)
def test_density_of_radial(frames, tokens, decay, want):
  assert abs(masks.radial((frames, tokens), decay).density() - want) < 0.0005


@pytest.mark.parametrize('has_sink', [False, True])
@pytest.mark.parametrize('block', [2, 8, 20])
def test_radial_by_counting(block, has_sink):
  mask = masks.radial((9, 11), 0.4, block=block, has_sink=has_sink)
  seen = dense(mask, 99)[0, 0]
  np.testing.assert_array_equal(
    seen, cases.dense(cases.radial(9, 11, 0.4, block, has_sink), layouts.grid(9, 11))[0, 0]
  )
  assert mask.density() == pytest.approx(seen.mean(), abs=1e-15)
  if not has_sink:
    np.testing.assert_array_equal(seen, seen.T)
  for size in (4, 8, 11, 16, 99, 120):
    some, every = cases.tiles(seen[None, None], size, size)
    chosen, partial = mask.tiles(size)
    np.testing.assert_array_equal(chosen, some[0, 0])
    np.testing.assert_array_equal(partial, some[0, 0] & ~every[0, 0])
    chosen_any, none = mask.tiles(size, 'any')
    np.testing.assert_array_equal(chosen_any, chosen)
    assert not none.any() and not (mask.tiles(size, 'majority')[0] & ~chosen).any()


def test_radial_rounds_by_majority_as_published():
  """Every two frames apart, padded to whole tiles; a tile stays if most of its columns in use are a third full."""
  frames = 5
  shares, lost, added = set(), 0, 0
  for block, size in [*((block, 8) for block in range(1, 9)), (6, 9), (7, 9)]:
    tokens = 3 * size  # frames begin at the start of a tile
    mask = masks.radial((frames, tokens), 0.3, block=block)
    seen = dense(mask, frames * tokens)[0, 0]
    want = np.zeros((15, 15), bool)
    for a, b in np.ndindex(15, 15):
      density = seen[a * size : (a + 1) * size, b * size : (b + 1) * size].mean(0)
      share = (density > 1 / 3).sum() / ((density > 0).sum() + 1e-9)
      shares.add(round(share, 2))
      want[a, b] = share > 0.6
    got = mask.tiles(size, 'majority')[0]
    np.testing.assert_array_equal(got, want)
    some, every = cases.tiles(seen[None, None], size, size)
    lost, added = lost + (some[0, 0] & ~got).sum(), added + (got & ~every[0, 0]).sum()
  assert {0.6, 0.67} <= shares, 'no tile is near the limit'
  assert lost and added, 'neither a superset nor a subset of the mask'


def test_limits_of_radial():
  assert dense(masks.radial((6, 8), 1e9, block=1), 48).all()
  assert dense(masks.radial((6, 8), float('inf'), block=2), 48).all()
  assert not dense(masks.radial((6, 8), float('inf'), block=16), 48).all(), 'frames are skipped'
  with pytest.raises(ValueError, match="rule='most', expected one of exact, any, majority"):
    masks.radial((6, 8), 1.0).tiles(4, 'most')


# The others.


def test_disc_of_radius_one_is_the_token_alone():
  layout = layouts.concat(layouts.line(2), layouts.grid(3, 4))
  mask = masks.disc(1) & masks.segments(1, 1) | masks.segments(0, None) | masks.segments(None, 0)
  seen = dense(masks.placed(mask, layout), 14)[0, 0]
  assert seen[:2].all() and seen[:, :2].all()
  np.testing.assert_array_equal(seen[2:, 2:], np.eye(12, dtype=bool))
  assert dense(masks.placed(masks.disc(3.7), layouts.grid(3, 4)), 12).all()  # the diagonal is sqrt(13) = 3.61
  assert not dense(masks.placed(masks.disc(13**0.5), layouts.grid(3, 4)), 12).all()
  far = layouts.Layout(np.array([[0, 0], [2**31 - 1, 2**31 - 2]], np.int32), *np.zeros((1, 2), np.int32), np.arange(2))
  np.testing.assert_array_equal(dense(masks.placed(masks.disc(16383), far), 2)[0, 0], np.eye(2, dtype=bool))


def test_shifted_groups_look_at_no_key_ahead():
  T, g = 16, 4
  seen = dense(masks.causal() & masks.grouped(g, np.repeat([0, g // 2], 2)), T, heads=4)[0]
  assert not np.triu(seen, 1).any()
  for h in (0, 1):
    np.testing.assert_array_equal(seen[h], np.kron(np.eye(4), np.tril(np.ones((4, 4)))).astype(bool))
  for h in (2, 3):
    assert seen[h].sum(1).tolist() == [1, 2, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
  np.testing.assert_array_equal(dense(masks.causal() & masks.grouped(T), T), dense(masks.causal(), T))


def test_a_window_of_frames():
  """Chunks of 2 frames that see themselves and L frames back: all frames back is causal by chunks."""
  layout = layouts.grid(6, 3)
  frame = np.arange(18) // 3
  mask = masks.grouped(2, axis=0) | masks.band(0, -6, 0)
  np.testing.assert_array_equal(dense(masks.placed(mask, layout), 18)[0, 0], frame // 2 <= (frame // 2)[:, None])


def test_random_blocks():
  mask = masks.random_blocks(1, 3, 4, 30)
  seen = dense(mask, 30)[0, 0]
  blocks = np.pad(seen, ((0, 2), (0, 2))).reshape(8, 4, 8, 4)
  np.testing.assert_array_equal(blocks.any((1, 3)).sum(1), 3)
  np.testing.assert_array_equal(seen, np.kron(blocks.any((1, 3)), np.ones((4, 4), bool))[:30, :30])
  np.testing.assert_array_equal(seen, dense(masks.random_blocks(1, 3, 4, 30), 30)[0, 0])
  assert (seen != dense(masks.random_blocks(2, 3, 4, 30), 30)[0, 0]).any()
  assert dense(masks.random_blocks(1, 8, 4, 30), 30).all() and not dense(masks.random_blocks(1, 0, 4, 30), 30).any()


def test_recent_counts_the_token_itself():
  assert dense(masks.recent(2), 4)[0, 0].sum(1).tolist() == [1, 2, 2, 2]
  shape_a = masks.causal() & (masks.recent(2) | masks.sink(1))
  assert [np.flatnonzero(x).tolist() for x in dense(shape_a, 4)[0, 0]] == [[0], [0, 1], [0, 1, 2], [0, 2, 3]]
  np.testing.assert_array_equal(dense(masks.causal() & (masks.recent(9) | masks.sink(1)), 9), dense(masks.causal(), 9))


def test_a_window_in_a_random_order():
  """Stochastic attention: on permuted tokens, and in place with the permuted place as a coordinate."""
  n, w = 40, 3
  layout = layouts.line(n).shuffled(2).numbered()
  mask = masks.band(0, -w, w) & masks.causal()
  place = np.argsort(layout.order)
  want = (abs(place[:, None] - place) <= w) & np.tri(n, dtype=bool)
  moved = dense(masks.placed(mask, layout), n)[0, 0]
  np.testing.assert_array_equal(moved[np.ix_(place, place)], want)
  np.testing.assert_array_equal(dense(masks.placed(mask, layout.permuted(place)), n)[0, 0], want)
  ordered = masks.placed(mask, layouts.line(n).numbered())
  np.testing.assert_array_equal(dense(ordered, n), dense(masks.causal() & masks.window(w), n))
  wide = masks.placed(masks.band(0, -n, n) & masks.causal(), layout.permuted(place))
  np.testing.assert_array_equal(dense(wide, n), dense(masks.causal(), n))


def test_a_random_order_reaches_all_in_few_layers():
  """1024 tokens, 4 to each side: 256 layers in order; in a random order of each layer, 6 at most."""
  reached = np.arange(1024) == 0
  for seed in range(6):
    layout = layouts.line(1024).shuffled(seed)
    seen = dense(masks.placed(masks.band(0, -4, 4), layout.numbered().permuted(np.argsort(layout.order))), 1024)[0, 0]
    reached = seen[reached].any(0)
  assert reached.all()
