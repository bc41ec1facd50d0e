"""attn.simulate against tables, hand examples, and tiles counted in dense masks."""

import itertools
import math

import jax
import numpy as np
import pytest

from attn import layouts, masks, plan, simulate

# layout, window, stride, q_tile, kv_tile; ratios of FLOPs, tiles on average, tiles where most are visited; share full
TABLE = [
  ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), None, 11.11, 5.44, 3.60, 17),
  ((30, 48, 80), (18, 24, 24), (2, 8, 8), (2, 8, 8), None, 11.11, 11.11, 11.11, 100),
  ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 4, 16), 11.11, 8.33, 8.33, 50),
  ((16, 44, 80), (16, 32, 48), 1, (2, 4, 16), None, 2.29, 1.75, 1.22, 54),
  ((16, 44, 80), (16, 32, 48), (1, 4, 16), (2, 4, 16), None, 2.29, 2.22, 2.04, 93),
  ((16, 44, 80), (16, 32, 48), (1, 16, 16), (2, 4, 16), None, 2.29, 2.29, 2.29, 100),
  ((256, 256), (80, 80), 1, (16, 8), None, 10.24, 7.51, 6.65, 50),
  ((256, 256), (80, 80), 16, (16, 8), None, 10.24, 10.24, 10.24, 100),
  ((64, 64), (17, 17), 1, (8, 16), None, 14.17, 4.27, 3.56, 0),
  ((64, 64), (17, 17), 1, 128, None, 14.17, 3.56, 3.56, 0),
  ((16,), (8,), 8, (8,), None, 2.0, 2.0, 2.0, 100),
  ((16,), (8,), 1, (8,), None, 2.0, 1.0, 1.0, 0),
]


@pytest.mark.parametrize('shape, window, stride, q_tile, kv_tile, flops, mean, worst, full', TABLE)
def test_table(shape, window, stride, q_tile, kv_tile, flops, mean, worst, full):
  report = simulate.neighborhood(shape, window, stride, q_tile=q_tile, kv_tile=kv_tile)
  got = (round(report.flop_ratio, 2), round(report.mean, 2), round(report.worst, 2), round(100 * report.full_share))
  assert got == (flops, mean, worst, full)
  assert report.tiles == -(-math.prod(shape) // math.prod(np.atleast_1d(kv_tile or q_tile)))


def sees(i, j, length, w, stride, d, is_causal):
  """Whether query i sees key j on one axis, as the published definition says it."""
  if i % d != j % d:
    return False
  length, i, j = len(range(i % d, length, d)), i // d, j // d
  if is_causal:
    leader = min(i // stride * stride + stride - 1, length - 1)
    return max(leader - w + 1, 0) <= j <= i
  leader = min(i // stride * stride + stride // 2, length - 1)
  start = min(max(leader - w // 2, 0), length - w)
  return start <= j < start + w


def tiles_of(length, tile, d):
  """Tokens of each tile of one axis, one dilation group after the other."""
  groups = [list(range(group, length, d)) for group in range(d)]
  return [group[a : a + tile] for group in groups for a in range(0, len(group), tile)]


def random_axis(rng):
  d = int(rng.integers(1, 4))
  w = int(rng.integers(1, 7))
  length = w * d + int(rng.integers(0, 9))
  return length, w, int(rng.integers(1, w + 1)), d, bool(rng.integers(2)), *(int(x) for x in rng.integers(1, 6, 2))


def by_loops(axes):
  """(visits, full, tiles, pairs) from every pair of coordinates of every pair of tiles."""
  counts = []
  for length, w, stride, d, is_causal, q_tile, kv_tile in axes:
    q_tiles, kv_tiles = tiles_of(length, q_tile, d), tiles_of(length, kv_tile, d)
    see = np.array([[sees(i, j, length, w, stride, d, is_causal) for j in range(length)] for i in range(length)])
    some = np.array([[see[np.ix_(a, b)].any() for b in kv_tiles] for a in q_tiles])
    whole = np.array([[see[np.ix_(a, b)].sum() == q_tile * kv_tile for b in kv_tiles] for a in q_tiles])
    counts.append((some, whole, see.sum()))
  some, whole, pairs = counts[0]
  for more_some, more_whole, more_pairs in counts[1:]:
    some, whole, pairs = np.kron(some, more_some), np.kron(whole, more_whole), pairs * more_pairs
  return some.sum(1), whole.sum(1), some.shape[1], pairs


@pytest.mark.parametrize('seed', range(60))
def test_counts_every_tile(seed):
  rng = np.random.default_rng(seed)
  axes = [random_axis(rng) for _ in range(1 + seed % 2)]
  shape, window, stride, dilation, is_causal, q_tile, kv_tile = zip(*axes)
  report = simulate.neighborhood(shape, window, stride, dilation, is_causal, q_tile=q_tile, kv_tile=kv_tile)
  visits, full, tiles, pairs = by_loops(axes)
  np.testing.assert_array_equal(report.visits, visits)
  np.testing.assert_array_equal(report.full, full)
  assert report.tiles == tiles
  assert report.flop_ratio == pytest.approx(math.prod(shape) ** 2 / pairs)
  assert report.visits.min() >= 1 and report.worst <= report.mean


def test_aligned_means_that_every_tile_is_full():
  found = 0
  for length, q_tile, kv_tile in itertools.product(range(1, 33), (1, 2, 4, 8), (1, 2, 4, 8)):
    for stride, w in itertools.combinations_with_replacement(range(1, length + 1), 2):  # stride <= w
      if simulate.is_aligned(length, w, stride, q_tile, kv_tile):
        found += 1
        report = simulate.neighborhood((length,), w, stride, q_tile=(q_tile,), kv_tile=(kv_tile,))
        assert report.full_share == 1 and report.mean == report.worst == report.flop_ratio
  assert found > 1000


def test_a_stride_that_key_tiles_do_not_divide_is_not_aligned():
  report = simulate.neighborhood((6,), 4, 1, q_tile=(1,), kv_tile=(2,))
  assert not simulate.is_aligned(6, 4, 1, 1, 2)  # 0 = 2 modulo 2, and yet query 3 sees keys 1 to 4
  np.testing.assert_array_equal(report.visits, [2, 2, 2, 3, 2, 2])


def test_alignment_needs_the_middle_of_the_window():
  report = simulate.neighborhood((80,), 24, 16, q_tile=(8,))
  assert not simulate.is_aligned(80, 24, 16, 8, 8)
  middle = slice(4, 6)  # away from the borders
  np.testing.assert_array_equal(report.visits[middle], 4)
  np.testing.assert_array_equal(report.full[middle], 2)


@pytest.mark.parametrize(
  'shape, window, stride, tile',
  [((12, 16), (4, 8), 1, (4, 4)), ((8, 8, 4), (4, 3, 2), 2, (2, 4, 2))],
)  # fmt: skip
def test_plans_of_neighborhoods_agree(shape, window, stride, tile):
  """The count by axes is that of the plan of the mask on a permuted layout: two paths to the same tiles."""
  want = simulate.neighborhood(shape, window, stride, q_tile=tile)
  mask = masks.placed(masks.neighborhood(shape, window, stride), layouts.grid(*shape).tiled(tile))
  N, block = math.prod(shape), math.prod(tile)
  got = simulate.mask(mask, N, block_q=block, block_kv=block)
  np.testing.assert_array_equal(got.visits, want.visits)
  np.testing.assert_array_equal(got.full, want.full)
  assert (got.mean, got.worst, got.tiles) == (want.mean, want.worst, want.tiles)
  assert got.flop_ratio == pytest.approx(want.flop_ratio)


def test_causal():
  report = simulate.mask(masks.causal(), 32, block_q=8, block_kv=4)
  np.testing.assert_array_equal(report.visits, [2, 4, 6, 8])
  np.testing.assert_array_equal(report.full, [0, 2, 4, 6])
  assert report.mean == 32 / 20 and report.worst == 1
  assert report.flop_ratio == pytest.approx(32 * 32 / (32 * 33 / 2))
  assert simulate.mask(masks.causal(), 32, block_q=8, block_kv=4, is_counted=False).flop_ratio is None


def test_pairs():
  assert simulate.pairs(masks.causal(), 37, 20) == sum(min(i + 1, 20) for i in range(37))
  rows = masks.causal() & masks.document(np.array([[0, 0, 0, 1], [0, 1, 2, 3]]))
  assert simulate.pairs(rows, 4, batch=2) == (7 + 4) / 2
  assert simulate.pairs(masks.causal(), 2, 4, positions=np.array([1, 3])) == 2 + 4
  heads = masks.function(lambda b, h, i, j: j < h)
  assert simulate.pairs(heads, 5, heads=3) == 5 * (0 + 1 + 2) / 3


def test_nothing_is_infinitely_fast():
  report = simulate.mask(masks.sink(0), 16, block_q=8, block_kv=8)
  assert report.mean == report.worst == report.flop_ratio == report.speedup(2) == math.inf
  assert report.full_share == 1


def test_workers():
  report = simulate.mask(masks.causal(), 32, block_q=8, block_kv=4)  # 2, 4, 6, 8 of 8
  assert report.speedup(1) == report.mean
  assert report.speedup(4) == report.speedup(9) == report.worst
  # Two workers: 2 then 6; 4 then 8. Full attention takes 16.
  assert report.speedup(2) == 16 / 12
  assert report.speedup(2, copies=2) == 32 / 22  # 2, 6, 2, 4, 8 and 4, 8, 6
  assert report.speedup(1, partial_cost=0.5) == 32 / (20 + 0.5 * 8)


def test_a_report_is_one_line():
  report = simulate.neighborhood((30, 48, 80), (18, 24, 24), q_tile=(2, 8, 8))
  assert str(report) == (
    '11.1x fewer pairs, 5.44x fewer tiles (3.6x where most are visited), 17% of them full; '
    '165.4 of 900 key tiles per query tile'
  )


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda: simulate.neighborhood((16,), 8, q_tile=0), 'q_tile=0 must be at least 1'),
    (lambda: simulate.neighborhood((16, 16), 8, q_tile=(4,)), 'q_tile=.* has 1 numbers, expected 2'),
    (lambda: simulate.neighborhood((16, 16), 8, q_tile=(4, 4), kv_tile=(4, 0)), 'kv_tile=0 must be at least 1'),
    (lambda: simulate.neighborhood((16, 16), 8, q_tile=24), 'q_tile=24 tokens in a row are no boxes'),
    (lambda: simulate.neighborhood((16, 16), 8, q_tile=16, kv_tile=12), 'kv_tile=12 tokens in a row are no boxes'),
    (lambda: simulate.neighborhood((16, 16), 4, 1, 2, q_tile=16), 'with dilation'),
    (lambda: simulate.neighborhood((16,), 17, q_tile=4), 'window=17'),
    (lambda: simulate.neighborhood((16,), 8, q_tile=8).speedup(0), 'workers=0 must be at least 1'),
    (lambda: simulate.neighborhood((16,), 8, q_tile=8).speedup(1, partial_cost=-1), 'partial_cost=-1 must be'),
    (lambda: simulate.mask(masks.document(np.zeros(5, int)), 4, block_q=2, block_kv=2), 'q_ids have shape'),
  ],
)
def test_refuses(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_refuses_a_traced_plan():
  made = plan.of(masks.causal(), 16, block_q=8, block_kv=8)
  with pytest.raises(ValueError, match='is traced, expected known arrays'):
    jax.eval_shape(simulate.plan, made)
