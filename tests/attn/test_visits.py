"""attn.cost.visits: tiles of masks counted large ones first, tiles of plans, keys and rows counted once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import layouts, masks, plan as plans, simulate
from attn.cost import Attention, Sizes, visits
from attn.softmax import Blocks
from tests.attn import tiler


def sizes(T, S=None, B=1, H=1, K=None, D=4, V=4):
  return Sizes(B=B, T=T, S=S or T, H=H, K=K or H, D=D, V=V)


MASKS = {
  'everything': masks.everything(),
  'causal': masks.causal(),
  'window': masks.causal() & masks.window(9),
  'sink': masks.causal() & (masks.window(5) | masks.sink(3)),
  'not': ~masks.window(20, 20),
  'chunked': masks.chunked(13),
  'dilated': masks.dilated(16) & masks.window(40, 3),
  'documents': masks.causal() & masks.document(np.arange(90) // 17, np.arange(75) // 17),
  'rows of the batch': masks.causal(np.array([0, 30])),
  'groups of heads': masks.grouped(16, np.array([0, 8, 0, 8])),
  'both': masks.grouped(16, np.array([0, 8, 0, 8])) & masks.causal(np.array([0, 30])),
}


@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)
@pytest.mark.parametrize('blocks', [Blocks(4, 2), Blocks(3, 8), Blocks(1, 1)], ids=str)
@pytest.mark.parametrize('at_once', [3, 40])
def test_large_tiles_first_is_exact(mask, blocks, at_once, monkeypatch):
  s = sizes(90, 75, B=2, H=4, K=2)
  want = visits.of_mask(s, mask, blocks)
  monkeypatch.setattr(visits, '_AT_ONCE', at_once)
  got = visits.of_mask(s, mask, blocks)
  assert got == want and not got.is_bound


def test_large_tiles_first_on_a_layout(monkeypatch):
  mask = masks.placed(masks.neighborhood((6, 20), (3, 7)), layouts.grid(6, 20).tiled((2, 5)))
  want = visits.of_mask(sizes(120), mask, Blocks(10, 10))
  monkeypatch.setattr(visits, '_AT_ONCE', 9)
  assert visits.of_mask(sizes(120), mask, Blocks(10, 10)) == want and want.share < 1


def test_a_million_tokens_by_formula():
  n, b = 2**14, 64  # 2**28 tiles, of which the triangle counts
  got = visits.of_mask(sizes(n * b), masks.causal(), Blocks(b, b))
  tiles = n * (n + 1) // 2
  assert (got.tiles, got.elements, got.partial) == (tiles, tiles * b * b, n * b * b) and not got.is_bound
  assert got.rows == got.columns == tiles * b and got.distinct_rows == got.distinct_columns == n * b


@pytest.mark.parametrize(
  'mask', [masks.causal() & masks.window(64), masks.array(np.tri(512, dtype=bool))], ids=['too many', 'an array']
)
def test_what_cannot_be_looked_into_is_bounded_from_above(mask, monkeypatch):
  exact = visits.of_mask(sizes(512), mask, Blocks(8, 16))
  monkeypatch.setattr(visits, '_AT_ONCE', 2**8)
  monkeypatch.setattr(visits, '_BEARABLE', 2**7)
  bound = visits.of_mask(sizes(512), mask, Blocks(8, 16))
  assert bound.is_bound and not exact.is_bound
  for name in ('tiles', 'elements', 'partial', 'rows', 'columns', 'distinct_rows', 'distinct_columns'):
    assert getattr(exact, name) <= getattr(bound, name) < 5 * getattr(exact, name), name
  assert bound.tiles > exact.tiles


def brute(seen, bq, bk):
  """(tiles, elements, rows, columns, distinct rows, distinct columns) of a mask [T, S]."""
  at = [(r, c) for r in tiler.runs(seen.shape[0], bq) for c in tiler.runs(seen.shape[1], bk) if seen[r, c].any()]
  indices = lambda n, runs: len({i for x in runs for i in range(n)[x]})
  shapes = [seen[x].shape for x in at]
  distinct = [indices(seen.shape[axis], [x[axis] for x in at]) for axis in (0, 1)]
  return len(at), sum(a * b for a, b in shapes), sum(a for a, _ in shapes), sum(b for _, b in shapes), *distinct


def figures(v):
  return v.tiles, v.elements, v.rows, v.columns, v.distinct_rows, v.distinct_columns


@pytest.mark.parametrize('T, S, shift', [(1, 50, 0), (1, 50, 49), (7, 50, 43), (50, 7, 0), (20, 30, -12)])
def test_shifted_queries_by_brute_force(T, S, shift):
  seen = np.array([[0 <= i + shift - j <= 11 for j in range(S)] for i in range(T)])
  mask = masks.causal() & masks.window(11)
  got = Attention(sizes(T, S), mask=mask, shift=shift).visits(Blocks(4, 8))
  assert figures(got) == brute(seen, 4, 8)


def test_rows_and_keys_of_all_heads_are_counted_once():
  seen = np.stack([np.arange(20) < 5, np.arange(20) >= 18])[:, None] & np.ones((20, 1), bool)
  alone = [brute(x, 4, 4) for x in seen]
  s = sizes(20, B=3, H=2, K=2)
  got = visits.of_mask(s, masks.array(seen[None]), Blocks(4, 4))
  assert figures(got) == tuple(3 * sum(x) for x in zip(*alone))
  shared = visits.of_mask(sizes(20, B=3, H=2, K=1), masks.array(seen[None]), Blocks(4, 4))
  tiles, elements, rows, columns, all_rows, all_columns = brute(seen.any(0), 4, 4)
  assert figures(shared) == (3 * tiles, 6 * elements, 6 * rows, 3 * columns, 6 * all_rows, 3 * all_columns)


CHOSEN = np.random.default_rng(0).random((2, 4, 5, 6)) < 0.3
CHOSEN[:, :, 2] = CHOSEN[:, :, :, 3] = False  # rows and columns without a tile have an entry that does not count


@pytest.mark.parametrize('Bm', [1, 2])
@pytest.mark.parametrize('Hm', [1, 2, 4])
def test_plans(Bm, Hm):
  s, chosen = sizes(37, 22, B=2, H=4, K=2), CHOSEN[:Bm, :Hm]
  plan = plans.from_blocks(chosen, T=37, S=22, block_q=8, block_kv=4, partial=chosen & (np.arange(6) < 2))
  seen = np.repeat(np.repeat(chosen, 8, 2)[:, :, :37], 4, 3)[..., :22]
  alone = np.array([[brute(x, 8, 4) for x in row] for row in seen])  # [Bm, Hm, 6]
  G = 1 if Hm == 4 else 2
  total = alone.sum((0, 1)) * (2 // Bm) * (4 // G // Hm) * np.array([1, G, G, 1, G, 1])
  got = visits.of_plan(s, plan)
  if Hm == 4:  # keys that two heads share, each with its own list
    union = seen.reshape(Bm * 2, 2, 37, 22).any(1)
    total[5] = 2 // Bm * sum(brute(x, 8, 4)[5] for x in union)
  assert figures(got) == tuple(total) and got.share == got.elements / (2 * 4 * 37 * 22)
  report = simulate.plan(plan)
  assert got.tiles == report.visits.sum() * (2 // Bm) * (4 // G // Hm)
  kind = np.asarray(plans.blocks(plan))
  rows, keys = (np.minimum(b, n - np.arange(0, n, b)) for b, n in ((8, 37), (4, 22)))
  partial = ((kind == masks.PARTIAL) * rows[:, None] * keys).sum() * (2 // Bm) * (4 // Hm)
  assert got.partial == partial


@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)
def test_the_plan_of_a_mask_visits_what_the_mask_leaves(mask):
  s, blocks = sizes(90, 75, B=2, H=4, K=2), Blocks(8, 4)
  plan = plans.of(mask, 90, 75, block_q=8, block_kv=4, batch=2, heads=4, kv_heads=2)
  assert visits.of_plan(s, plan) == visits.of_mask(s, mask, blocks)
  assert Attention(s, mask=mask, plan=plan).visits(blocks) == Attention(s, mask=mask).visits(blocks)
  report = simulate.mask(mask, 90, 75, block_q=8, block_kv=4, batch=2, heads=4, is_counted=False)
  if report.visits.size == 12:  # one list for all
    assert visits.of_plan(s, plan).tiles == 2 * 2 * report.visits.sum()


def test_rows_that_choose_need_a_mask():
  choice = np.random.default_rng(0).random((1, 1, 32, 8)) < 0.2
  plan = plans.from_rows(choice, T=32, S=32, block_q=8, block_kv=4, partial=False)
  got = visits.of_plan(sizes(32), plan)
  assert got.partial == got.elements > 0


def test_rejects():
  plan = plans.of(masks.causal(), 32, block_q=8, block_kv=8)
  call = Attention(sizes(32), plan=plan)
  with pytest.raises(ValueError, match='tiles of the plan are 8 x 8'):
    call.visits(Blocks(8, 16))
  with pytest.raises(ValueError, match='T=32'):
    Attention(sizes(33), plan=plan)
  with pytest.raises(ValueError, match=r'shift=0\.5'):
    Attention(sizes(32), shift=0.5)
  with pytest.raises(ValueError, match='traced'):
    jax.jit(lambda x: visits.of_plan(sizes(32), x).tiles)(jax.tree.map(jnp.asarray, plan))
