"""attn.cost.cascade: passes counted in the graph, operations, and the same numbers from every cascade."""

import math

import numpy as np
import pytest

from attn.cost import cascade
from attn.cost.cascade import einsum, passes
from tests.attn import tiler

SIZES = {'e': 4, 'f': 5, 'p': 3, 'm': 12, 'm1': 3, 'm0': 4}


def arrays(seed=0, tiles=3):
  r = np.random.default_rng(seed)
  q, k, v = (4 * r.normal(size=shape) for shape in ((4, 3), (4, 12), (5, 12)))
  whole = {'Q': q, 'K': k, 'V': v}
  return whole, {'Q': q, 'BK': k.reshape(4, tiles, -1), 'BV': v.reshape(5, tiles, -1)}


def oracle(q, k, v):
  """[f, p], one query at a time."""
  out = []
  for query in q.T:
    s = query @ k
    p = np.exp(s - s.max())
    out.append(v @ (p / p.sum()))
  return np.array(out).T


@pytest.mark.parametrize(
  'which, want',
  [
    (cascade.THREE_PASS, 3),
    (cascade.TWO_PASS, 2),
    (cascade.ONE_PASS, 1),
    (cascade.DEFERRED_DIVISION, 2),
    (cascade.BIASED, 3),
    (cascade.TOP_K, 2),
    *((cascade.local_linear(n), n + 2) for n in (0, 1, 3, 7)),
  ],
  ids=['3', '2', '1', 'deferred', 'biased', 'top k', 'local linear 0', '1 step', '3 steps', '7 steps'],
)
def test_passes(which, want):
  assert passes(which, 'm') == want


def test_an_elementwise_mask_adds_no_pass_to_one_pass():
  masked = [
    einsum('BQK2[m1,m0,p]', 'Q[e,p]', 'BK[e,m1,m0]', f=lambda a, b: a * b, reduce='sum'),
    einsum('BQK[m1,m0,p]', 'BQK2[m1,m0,p]', 'B[m1,m0,p]', f=lambda s, b: s + b),
    *cascade.ONE_PASS[1:],
  ]
  assert passes(tuple(masked), 'm') == 1


def test_a_statistic_of_all_keys_used_in_every_tile_adds_a_pass():
  total = einsum('Z[p]', 'BQK[m1,m0,p]', f=float, reduce='sum')
  uses = einsum('LM[m1,p]', 'BQK[m1,m0,p]', 'Z[p]', f=lambda s, z: s - z, reduce='max')
  assert passes((cascade.ONE_PASS[0], total, uses, *cascade.ONE_PASS[2:]), 'm') == 2


B = einsum('B[m1,m0]', 'X[m1,m0]', f=float)
L = einsum('L[m1]', 'B[m1,m0]', f=float, reduce='max')
USE = lambda name: einsum('A[m1,m0]', 'B[m1,m0]', f'{name}[m1]', f=lambda a, b: a - b)
# A maximum of whole rows for tiles of the same keys: passes cannot be counted by names.
MIXED = (*cascade.THREE_PASS[:2], einsum('BSN[m1,m0,p]', 'BQK[m1,m0,p]', 'GM[p]', f=lambda a, b: a - b))
FORWARD = einsum('R[m1+1]', 'R[m1]', 'L[m1]', f=max, first=0.0)


def test_a_running_value_adds_no_pass_but_its_end_does():
  assert passes((B, L, FORWARD, USE('R')), 'm') == 1
  end = einsum('W[m1]', 'L[m1]', 'R[m1=end]', f=lambda a, b: a - b)
  assert passes((B, L, FORWARD, end, USE('W')), 'm') == 2


def test_a_value_that_runs_backwards_is_there_after_the_pass():
  assert passes((B, L, einsum('R[m1]', 'R[m1+1]', 'L[m1]', f=max), USE('R')), 'm') == 2
  # The same in two steps, in either order.
  two = [einsum('R[m1]', 'Q[m1]', 'L[m1]', f=max), einsum('Q[m1]', 'R[m1+1]', f=float)]
  assert passes((B, L, *two, USE('R')), 'm') == passes((B, L, *two[::-1], USE('R')), 'm') == 2
  # To look one tile ahead is no running: that tile is waited for.
  assert passes((B, L, einsum('R[m1]', 'L[m1+1]', f=float), USE('R')), 'm') == 1


def test_passes_over_other_ranks():
  assert passes(cascade.THREE_PASS, 'e') == 1
  assert passes(cascade.THREE_PASS, 'p') == 1
  with pytest.raises(ValueError, match='z'):
    passes(cascade.THREE_PASS, 'z')


@pytest.mark.parametrize('tiles', [1, 3, 12])
def test_the_cascades_are_equal(tiles):
  whole, tiled = arrays(tiles, tiles)
  want = oracle(**{x.lower(): y for x, y in whole.items()})
  for which, inputs in (
    (cascade.THREE_PASS, whole),
    (cascade.DEFERRED_DIVISION, whole),
    (cascade.BIASED, whole | {'B': np.zeros((12, 3))}),
    (cascade.TWO_PASS, tiled),
    (cascade.ONE_PASS, tiled),
  ):
    np.testing.assert_allclose(cascade.evaluate(which, inputs, 'AV'), want, rtol=1e-12, atol=1e-13)


def test_the_running_maximum_runs():
  _, tiled = arrays()
  scores = tiled['Q'].T @ tiled['BK'].reshape(4, 12)
  running = cascade.evaluate(cascade.ONE_PASS, tiled, 'RM')  # [m1 + 1, p]
  assert running.shape == (4, 3) and np.all(np.isneginf(running[0]))
  np.testing.assert_allclose(running[1:], [scores[:, :n].max(1) for n in (4, 8, 12)], rtol=1e-12)


def test_top_k_with_every_key_is_dense_and_with_one_the_best_value():
  whole, _ = arrays()
  want = oracle(**{x.lower(): y for x, y in whole.items()})
  np.testing.assert_allclose(cascade.evaluate(cascade.TOP_K, whole, 'AV', k=12), want, rtol=1e-12)
  best = (whole['Q'].T @ whole['K']).argmax(1)
  np.testing.assert_allclose(cascade.evaluate(cascade.TOP_K, whole, 'AV', k=1), whole['V'][:, best], rtol=1e-12)


def test_hand_example():
  """Scores [0, ln 3], values [0, 4]: output 3, also in tiles of one key."""
  q, k, v = [[1.0]], [[0.0, math.log(3)]], [[0.0, 4.0]]
  assert cascade.evaluate(cascade.THREE_PASS, {'Q': q, 'K': k, 'V': v}, 'AV')[0, 0] == pytest.approx(3)
  tiled = {'Q': q, 'BK': np.reshape(k, (1, 2, 1)), 'BV': np.reshape(v, (1, 2, 1))}
  assert cascade.evaluate(cascade.ONE_PASS, tiled, 'AV')[0, 0] == pytest.approx(3)
  assert cascade.evaluate(cascade.ONE_PASS, tiled, 'RD')[2, 0] == pytest.approx(4 / 3)


def test_flops_by_hand():
  got = cascade.flops(cascade.THREE_PASS, SIZES)
  assert got['QK'] == 2 * 4 * 12 * 3 and got['AV'] == 2 * 5 * 12 * 3
  assert got['GM'] == got['SN'] == got['SD'] == got['A'] == 12 * 3
  assert cascade.flops(cascade.DEFERRED_DIVISION, SIZES)['AV'] == 5 * 3
  assert cascade.exps(cascade.THREE_PASS, SIZES) == 12 * 3
  assert cascade.exps(cascade.ONE_PASS, SIZES) == 12 * 3 + 3 * 3  # every score, and a correction a tile and query


@pytest.mark.parametrize('room, times', [(10**6, 1), (12 * (4 + 5) * 2, 1), (12 * (4 + 5) * 2 - 1, 3)])
def test_minimal_bytes(room, times):
  assert cascade.minimal_bytes(cascade.THREE_PASS, 'm', SIZES, 2, room) == times * 12 * (4 + 5) * 2
  assert cascade.minimal_bytes(cascade.ONE_PASS, 'm', SIZES, 2, 0) == 12 * (4 + 5) * 2


def test_passes_are_the_sweeps_of_a_tiler():
  r = np.random.default_rng(0)
  q, k, v = r.normal(size=(7, 4)), r.normal(size=(10, 4)), r.normal(size=(10, 3))
  *_, one, _ = tiler.attend(q, k, v, 7, 4)
  out, three = tiler.three_passes(q, k, v, 7, 4)
  assert one.loads['k'] == passes(cascade.ONE_PASS, 'm') * k.size
  assert three.loads['k'] == passes(cascade.THREE_PASS, 'm') * k.size
  np.testing.assert_allclose(out, oracle(q.T / 2, k.T, v.T).T, rtol=1e-12)


@pytest.mark.parametrize(
  'build, words',
  [
    (lambda: einsum('A[m', 'B[m]', f=float), 'must look like'),
    (lambda: einsum('A[m+2]', 'B[m]', f=float), 'must look like'),
    (lambda: einsum('A[p]', 'B[m,p]', f=float), 'that the output lacks'),
    (lambda: einsum('A[m,z]', 'B[m]', f=float), 'a rank that no input has'),
    (lambda: passes(MIXED, 'm'), r"rank='m' is whole .* \(m, m0, m1\)"),
    (lambda: cascade.minimal_bytes(MIXED, 'm', SIZES, 2, 0), "rank='m' is whole"),
    (lambda: passes((einsum('A[m1]', 'X[m1]', f=float), einsum('C[m0]', 'Y[m0]', f=float)), 'm'), 'no einsum goes'),
    (lambda: passes((*cascade.THREE_PASS, cascade.THREE_PASS[1]), 'm'), 'makes GM twice'),
    (lambda: cascade.flops((*cascade.THREE_PASS, cascade.THREE_PASS[1]), SIZES), 'makes GM twice'),
    (lambda: cascade.evaluate((*cascade.THREE_PASS, cascade.THREE_PASS[1]), arrays()[0], 'AV'), 'makes GM twice'),
    (lambda: cascade.evaluate(cascade.TOP_K, arrays()[0], 'AV', k=0), 'k=0 must be in 1..12'),
    (lambda: cascade.evaluate(cascade.TOP_K, arrays()[0], 'AV', k=13), 'k=13 must be in 1..12'),
    (lambda: cascade.evaluate(cascade.TOP_K, arrays()[0], 'AV', k=-1), 'k=-1 must be in 1..12'),
    (lambda: cascade.evaluate(cascade.THREE_PASS, {}, 'AV'), 'inputs have no Q'),
    (lambda: cascade.evaluate(cascade.THREE_PASS, arrays()[0], 'AW'), 'AW'),
    (lambda: cascade.evaluate(cascade.THREE_PASS, arrays()[0] | {'K': np.zeros((9, 12))}, 'AV'), 'length 9 along e'),
  ],
)
def test_rejects(build, words):
  with pytest.raises(ValueError, match=words):
    build()
