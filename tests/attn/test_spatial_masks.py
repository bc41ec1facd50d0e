"""Masks of coordinates against predicates in plain Python, and the laws of the methods they come from."""

import functools
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from attn import layouts, masks, softmax
from tests.attn import oracle, spatial_cases as cases
from tests.attn.spatial_cases import CASES, COMPOSED, HEADS, SHAPE, evaluate as dense

DRAWN = settings(max_examples=25, deadline=None, derandomize=True, database=None)
ALL = CASES | COMPOSED
GRID = layouts.grid(*SHAPE)
LAYOUTS = {
  'grid': GRID,
  'tiled': GRID.tiled((2, 2, 2)),
  'tiled in groups': GRID.tiled((2, 3, 2), (1, 2, 2)),
  'padded': GRID.tiled((2, 4, 4), is_padded=True),
  'with text': layouts.concat(layouts.line(7), GRID.tiled((2, 5, 3)), layouts.line(3)),
  'shuffled': layouts.concat(layouts.line(6), GRID, layouts.grid(2, 2)).shuffled(1),
}


@functools.cache
def wanted(name, layout):
  return cases.dense(ALL[name][1], LAYOUTS[layout])


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', ALL)
def test_matches_predicate(name, layout):
  evaluate = masks.dense if layout == 'with text' else dense
  got = evaluate(masks.placed(ALL[name][0], LAYOUTS[layout]), len(LAYOUTS[layout]), heads=HEADS)
  np.testing.assert_array_equal(np.broadcast_to(got, wanted(name, layout).shape), wanted(name, layout))


@pytest.mark.parametrize('name', ALL)
def test_boxes_keep_their_promises(name):
  for layout in LAYOUTS:
    n, seen = len(LAYOUTS[layout]), wanted(name, layout)
    for block_q, block_kv in ((8, 8), (7, 16), (12, 5), (1, 1), (n, n)):
      verdict = masks.verdicts(
        masks.placed(ALL[name][0], LAYOUTS[layout]), n, block_q=block_q, block_kv=block_kv, heads=HEADS
      )
      assert isinstance(verdict.some, np.ndarray) and isinstance(verdict.every, np.ndarray)
      some, every = cases.tiles(seen, block_q, block_kv)
      assert not (some & ~verdict.some).any(), (layout, block_q, block_kv)
      assert not (verdict.every & ~every).any(), (layout, block_q, block_kv)
      if block_q == block_kv == 1 and name in CASES:
        np.testing.assert_array_equal(np.broadcast_to(verdict.some, some.shape), some)
        np.testing.assert_array_equal(np.broadcast_to(verdict.every, every.shape), every)


@DRAWN
@given(st.sampled_from(sorted(ALL)), st.integers(0, 99), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_boxes_keep_their_promises_on_random_layouts(name, seed, block_q, block_kv, is_static):
  """Any tokens in any order, other keys than queries, and positions that leave the layout."""
  mask, pair = ALL[name]
  rng = np.random.default_rng(seed)
  whole = LAYOUTS['shuffled']
  n = len(whole)
  if seed % 2:
    whole = whole.tiled(tuple(rng.integers(1, 4, 3)), tuple(rng.integers(1, 3, 3)))
  kv = whole.permuted(rng.permutation(n))
  q_at, k_at = np.sort(rng.integers(-2, n + 2, 20)), rng.integers(-2, n + 2, 24)
  tokens, kv_tokens = cases.rows(whole), cases.rows(kv)
  pick = lambda all, i: all[i] if 0 <= i < n else None
  seen = np.zeros((1, HEADS, 20, 24), bool)
  for h, t, s in np.ndindex(*seen.shape[1:]):
    q, k = pick(tokens, q_at[t]), pick(kv_tokens, k_at[s])
    seen[0, h, t, s] = q is not None and k is not None and pair(q, k, h)
  options = {'heads': HEADS, 'positions': q_at, 'kv_positions': k_at}
  placed = masks.placed(mask, whole, kv)
  np.testing.assert_array_equal(np.broadcast_to(dense(placed, 20, 24, **options), seen.shape), seen)
  verdict = masks.verdicts(placed, 20, 24, block_q=block_q, block_kv=block_kv, is_static=is_static, **options)
  some, every = cases.tiles(seen, block_q, block_kv)
  assert not (some & ~verdict.some).any() and not (verdict.every & ~every).any()


@pytest.mark.parametrize('name', ALL)
def test_boxes_of_arrays_say_the_same_as_those_of_numpy(name):
  mask = masks.placed(ALL[name][0], LAYOUTS['with text'])
  n = len(LAYOUTS['with text'])
  options = {'block_q': 16, 'block_kv': 8, 'heads': HEADS}
  want = masks.verdicts(mask, n, **options)
  traced = masks.verdicts(mask, n, positions=jnp.arange(n), kv_positions=jnp.arange(n), **options)
  assert isinstance(traced.some, jax.Array)
  np.testing.assert_array_equal(*np.broadcast_arrays(traced.kind, want.kind))
  static = masks.verdicts(mask, n, positions=jnp.arange(n), is_static=True, **options)
  assert isinstance(static.some, np.ndarray)


def loss(name, layout, block_q, block_kv):
  """The share of tiles that are empty or full and said to be neither."""
  n = len(LAYOUTS[layout])
  verdict = masks.verdicts(
    masks.placed(ALL[name][0], LAYOUTS[layout]), n, block_q=block_q, block_kv=block_kv, heads=HEADS
  )
  some, every = cases.tiles(wanted(name, layout), block_q, block_kv)
  return float(((verdict.some & ~some) | (every & ~verdict.every)).mean())


@pytest.mark.parametrize('name', CASES)
def test_boxes_are_exact_where_runs_are_boxes(name):
  """Runs of 3 are rows of the grid, of 15 whole frames, so every verdict is the truth."""
  for block_q, block_kv in ((3, 3), (15, 3), (15, 15), (3, 15)):
    if name not in ('neighborhood dilated', 'neighborhood causal'):  # rows hold both groups of a dilation: see below
      assert loss(name, 'grid', block_q, block_kv) == 0, (block_q, block_kv)


@pytest.mark.parametrize('is_causal', [(False,) * 3, (True, False, True)])
@pytest.mark.parametrize(
  'window, stride', [((2, 3, 2), 1), ((2, 2, 1), 1), ((1, 3, 2), (1, 3, 2)), ((2, 3, 2), (1, 2, 2))]
)
def test_boxes_of_tiles_in_dilation_groups_are_exact(window, stride, is_causal):
  """4 x 6 x 4 in tiles of 2 x 3 x 1 and groups 2, 2, 2: no tile holds tokens of two groups."""
  shape = (4, 6, 4)
  mask = masks.neighborhood(shape, window, stride, 2, is_causal)
  pair = cases.neighbors(mask.window, mask.stride, mask.dilation, mask.is_causal, shape)
  layout = layouts.grid(*shape).tiled((2, 3, 1), 2)
  verdict = masks.verdicts(masks.placed(mask, layout), 96, block_q=6, block_kv=6)
  some, every = cases.tiles(cases.dense(pair, layout)[:, :1], 6, 6)
  np.testing.assert_array_equal(verdict.some, some)
  np.testing.assert_array_equal(verdict.every, every)


def test_what_boxes_lose():
  """What is known to be lost, so that it does not grow: runs that straddle tiles, frames or segments; combinations."""
  assert 0 < loss('neighborhood', 'grid', 8, 8) < 0.35
  assert loss('radial', 'grid', 8, 8) < 0.2
  assert loss('disc', 'with text', 15, 15) < 0.2
  assert loss('text and neighborhood', 'with text', 10, 10) < 0.1
  assert loss('shifted groups', 'grid', 8, 8) < 0.01


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_a_permuted_run_equals_one_in_order(implementation):
  layout = layouts.concat(layouts.line(3), layouts.grid(3, 4).tiled((2, 2), is_padded=True))
  plain = layouts.concat(layouts.line(3), layouts.grid(3, 4))
  mask = (masks.neighborhood((3, 4), 3) & masks.segments(1, 1) & masks.causal()) | masks.segments(None, 0)
  seen = dense(masks.placed(mask, plain), 15)
  rng = np.random.default_rng(0)
  q, k, v, d_out = (rng.standard_normal((1, 15, 2, 3)).astype(np.float32) for _ in range(4))

  def run(q, k, v):
    moved = (layout.permute(x) for x in (q, k, v))
    options = {} if implementation == 'reference' else {'blocks': softmax.Blocks(8, 4)}
    return layout.restore(
      softmax.attend(*moved, mask=masks.placed(mask, layout), implementation=implementation, **options)
    )

  got, pull = jax.vjp(jax.jit(run), q, k, v)
  oracle.assert_close(got, oracle.attend(q, k, v, mask=seen)[0], 'float32')
  want = oracle.gradients(q, k, v, d_out, np.zeros((1, 15, 2)), mask=seen)
  for name, grad in zip('qkv', pull(jnp.asarray(d_out))):
    oracle.assert_close(grad, want[name], 'float32', name)


EMPTIES = {
  'behind': (masks.causal(-2), 14),
  'by head': (masks.causal(-1) & masks.grouped(4, np.array([0, 3])), 14),
  'by row': (masks.causal(np.array([-3, 1])), 14),
  'documents': (masks.document(np.array([[0, 1, 1, 2, 2, 2, 3] * 2, [4] * 14]), np.array([1, 4] * 7)), 14),
  'everything': (masks.everything(), 14),
  'contradiction': (masks.causal(-1) & ~masks.causal(), 14),
  'holes': (masks.placed(masks.disc(1), layouts.grid(3, 3).tiled(2, is_padded=True)), 16),
}


@pytest.mark.parametrize('name', EMPTIES)
def test_rows_that_see_nothing(name):
  mask, T = EMPTIES[name]
  want = ~np.asarray(masks.dense(mask, T, batch=2, heads=2)).any(-1)
  for block in (4, 5)[: 1 + (name == 'by head')]:
    got = masks.empty_rows(mask, T, batch=2, heads=2, block=block)
    np.testing.assert_array_equal(np.broadcast_to(got, (2, 2, T)), np.broadcast_to(want, (2, 2, T)))
  assert want.any() == (name != 'everything')


def test_rows_that_see_nothing_give_zeros():
  contradiction = masks.causal(-1) & ~masks.causal()
  q = np.ones((1, 5, 1, 2), np.float32)
  out, lse = softmax.attend(q, q, q, mask=contradiction, return_residual=True, implementation='reference')
  assert not np.asarray(out).any() and np.isneginf(lse).all()
  got = masks.empty_rows(masks.causal(), 3, 2, positions=[4, -1, 1], kv_positions=[2, 3])
  assert got[0, 0].tolist() == [False, True, True]


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda: masks.neighborhood(8, 3), 'shape=8 is not a sequence'),
    (lambda: masks.neighborhood((8, 0), 3), 'shape=0'),
    (lambda: masks.neighborhood((8, 8), (3, 0)), 'window=0 must be at least 1'),
    (lambda: masks.neighborhood((8, 8), (3, 9)), r'window=9 times dilation=1 .* 8 tokens of axis 1'),
    (lambda: masks.neighborhood((8, 8), 3, 1, (1, 3)), 'window=3 times dilation=3'),
    (lambda: masks.neighborhood((8, 8), 3, (1, 4)), 'stride=4 must be at most window=3 on axis 1'),
    (lambda: masks.neighborhood((8, 8), 3, 0), 'stride=0'),
    (lambda: masks.neighborhood((8, 8), 3, 1, 0), 'dilation=0'),
    (lambda: masks.neighborhood((8, 8), (3, 3, 3)), r'window=\(3, 3, 3\) has 3 numbers, expected 2'),
    (lambda: masks.neighborhood((8, 8), 3, is_causal=(True,)), r'is_causal=\(True,\), expected True or False, or 2'),
    (lambda: masks.band(-1, 0, 1), 'axis=-1'),
    (lambda: masks.band(0, 2, 1), 'low=2 must be at most high=1'),
    (lambda: masks.disc(0), 'radius=0'),
    (lambda: masks.disc(2**14), 'radius=16384'),
    (lambda: masks.disc('3'), "radius='3'"),
    (lambda: masks.disc(3, ()), r'axes=\(\)'),
    (lambda: masks.radial((5,), 0.2), 'one axis'),
    (lambda: masks.radial((5, 4), -0.2), 'decay=-0.2'),
    (lambda: masks.radial((5, 4), float('nan')), 'decay=nan'),
    (lambda: masks.radial((5, 4), 0.2, block=0), 'block=0'),
    (lambda: masks.grouped(0), 'size=0'),
    (lambda: masks.grouped(4, np.zeros((2, 2), int)), r'shift.*\(2, 2\).*\[H\]'),
    (lambda: masks.grouped(4, 0.5), 'shift.*float'),
    (lambda: masks.segments(-1, None), 'q_set=-1'),
    (lambda: masks.segments(0, ()), r'k_set=\(\)'),
    (lambda: masks.segment_graph(np.ones((2, 3), bool)), r'matrix.*\(2, 3\)'),
    (lambda: masks.segment_graph(np.ones((2, 2))), 'matrix.*float'),
    (lambda: masks.recent(0), 'n=0'),
    (lambda: masks.random_blocks(0, 5, 2, 8), 'r=5 must be at least 0 and below 5'),
    (lambda: masks.random_blocks(0, 1, 0, 8), 'block=0'),
    (lambda: masks.dense(masks.band(1, 0, 0), 4), 'reads axis 1.*masks.placed'),
    (lambda: masks.dense(masks.placed(masks.disc(2, (0, 3)), GRID), 60), 'reads axis 3.*layout has 3'),
    (lambda: masks.dense(masks.placed(masks.neighborhood((12, 10), 2), GRID), 60), r'grid \(12, 10\).*3 axes'),
    (lambda: masks.dense(masks.grouped(2, np.array([0, 1, 2])), 4, heads=2), r'shift has shape \(3,\).*\[2\]'),
  ],
)
def test_rejects(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_a_million_tokens():
  """Verdicts of 2048 x 2048 tiles from runs alone: never anything of the size of pairs."""
  n, block = 2**20, 512
  ids = np.repeat(np.arange(16), n // 16)
  mask = masks.causal() & (masks.window(4095) | masks.sink(512)) & masks.document(ids)
  begin = time.perf_counter()
  verdict = masks.verdicts(mask, n, block_q=block, block_kv=block)
  seconds = time.perf_counter() - begin
  # A document is 128 tiles; a query tile sees itself and 8 tiles back in its document, and document 0 its sink.
  back = sum(min(i, 8) + 1 for i in range(128))
  assert verdict.some.sum() == 16 * back + (128 - 9)
  assert seconds < 2
  tracemalloc.start()
  masks.verdicts(mask, n, block_q=block, block_kv=block)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 200 * 2**20
