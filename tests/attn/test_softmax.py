"""attn.softmax.attend and its gradients against loops in numpy float64, over shapes, options and tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings, strategies as st

from attn import masks, softmax
from tests.attn import oracle
from tests.attn.softmax_cases import BLOCKS, OPTIONS, SHAPE, attend, case, check, expected, inputs

IMPLEMENTATIONS = softmax.IMPLEMENTATIONS
SHAPES = [  # T = S and not, one, prime, one past a tile (blocks of 8 and 3), V wider and narrower than D, groups
  'B1T1S1H1K1D1V1',
  'B2T5S10H4K2D8V3',
  'B1T13S13H6K1D3V4',
  'B3T4S3H2K2D2V2',
  'B1T1S17H4K4D4V6',
  'B2T9S1H3K3D1V5',
]


def test_there_are_two_implementations():
  assert IMPLEMENTATIONS == ('reference', 'xla')


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_shapes(shape, implementation):
  qkv = inputs(shape)

  for is_causal in (False, True):
    with jax.enable_x64(True):
      out = attend(*qkv, is_causal=is_causal, implementation=implementation, blocks=BLOCKS)
    np.testing.assert_allclose(out, oracle.attend(*qkv, is_causal=is_causal)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_every_option_alone(name, implementation):
  check(case(SHAPE, name), implementation)


# Each example compiles, so a failing one is shown as it is and not made smaller.
DRAWN = settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
COMBINATIONS = st.sets(st.sampled_from(sorted(set(OPTIONS) - {'plain', 'nothing allowed'})), min_size=3, max_size=7)
LENGTH, TILE = st.sampled_from([1, 2, 5, 11]), st.sampled_from([1, 2, 3, 8, 16])
GROUPS = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)])


def check_drawn(implementation, names, T, S, groups, tile, kv_tile, seed):
  one = case(f'B2T{T}S{S}H{groups[0]}K{groups[1]}D3V2', *sorted(names), seed=seed)
  check(one, implementation, softmax.Blocks(q=tile, kv=kv_tile))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@DRAWN
@given(names=COMBINATIONS, T=LENGTH, S=LENGTH, groups=GROUPS, tile=TILE, kv_tile=TILE, seed=st.integers(0, 99))
def test_drawn_combinations(implementation, names, T, S, groups, tile, kv_tile, seed):
  check_drawn(implementation, names, T, S, groups, tile, kv_tile, seed)


@pytest.mark.long
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@settings(DRAWN, max_examples=60)
@given(names=COMBINATIONS, T=LENGTH, S=LENGTH, groups=GROUPS, tile=TILE, kv_tile=TILE, seed=st.integers(0, 99))
def test_many_drawn_combinations(implementation, names, T, S, groups, tile, kv_tile, seed):
  check_drawn(implementation, names, T, S, groups, tile, kv_tile, seed)


def test_options_of_every_kind_at_once():
  names = 'causal, scale, soft cap, array mask, bias, logit bias per head, sinks, segments, key lengths'
  one = case(SHAPE, *names.split(', '), seed=3)
  want = expected(one)
  assert np.isfinite(want['lse']).all() and np.abs(want['out']).max() > 0.1
  for implementation in IMPLEMENTATIONS:
    check(one, implementation)


@pytest.mark.parametrize('blocks', [(1, 1), (8, 16), (16, 1), (5, 2), (13, 11), None])
def test_tiles_change_nothing(blocks):
  one = case(SHAPE, 'streaming mask', 'bias', 'segments')
  check(one, 'xla', blocks and softmax.Blocks(*blocks), compiler_options=None)


@pytest.mark.parametrize('blocks', [(5, 16), (8, 2), (13, 7), (24, 16)])
def test_tiles_of_a_longer_call_change_nothing(blocks):
  """Optimized code for tiles of 5 queries in float64 was once wrong, at this shape and not at smaller ones."""
  check(case('B2T50S50H4K4D2V2', 'causal'), 'xla', softmax.Blocks(*blocks), compiler_options=None)


def test_the_default_is_one_of_the_two():
  for T in (1, 40):  # decoding and not
    qkv = inputs(f'B1T{T}S40H2K1D4V4')
    with jax.enable_x64(True):
      got = attend(*qkv)
    np.testing.assert_allclose(got, oracle.attend(*qkv)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_worked_example(implementation):
  """Scores [0, ln 3], values [0, 4]: weights [1/4, 3/4], output 3, log-sum-exp ln 4; one tile or two."""
  q, k = np.ones((1, 1, 1, 1)), np.log([1.0, 3.0]).reshape(1, 2, 1, 1)
  v = np.array([0.0, 4.0]).reshape(1, 2, 1, 1)
  with jax.enable_x64(True):
    for blocks in (softmax.Blocks(q=1, kv=1), softmax.Blocks(q=1, kv=2)):
      kwargs = {'implementation': implementation, 'return_residual': True, 'blocks': blocks}
      out, lse = attend(q, k, v, scale=1.0, **kwargs)
      np.testing.assert_allclose(out.item(), 3, rtol=1e-14)
      np.testing.assert_allclose(lse.item(), np.log(4), rtol=1e-14)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_window_of_one_returns_own_value(implementation):
  q, k, v = inputs('B1T8S8H2K2D8V8', np.float32)
  for mask in (masks.causal() & masks.window(0), masks.chunked(1), np.eye(8, dtype=bool)):
    out = attend(q, k, v, mask=mask, implementation=implementation, blocks=BLOCKS)
    np.testing.assert_array_equal(out, v)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_limit_cases_exact(implementation):
  q, k, v = inputs('B2T5S5H4K2D4V4', np.float32)
  one = functools.partial(attend, q, k, v, implementation=implementation, blocks=BLOCKS)
  plain, causal = one(), one(is_causal=True)
  np.testing.assert_array_equal(one(mask=masks.window(5, 5)), plain)
  np.testing.assert_array_equal(one(mask=masks.causal() & masks.window(4)), causal)
  np.testing.assert_array_equal(one(mask=masks.causal()), causal)
  np.testing.assert_array_equal(one(sinks=np.full(4, -np.inf, np.float32)), plain)
  np.testing.assert_array_equal(one(positions=np.arange(5) + 9, is_causal=True), causal)
  np.testing.assert_array_equal(one(bias=np.zeros(1, np.float32), logit_bias=np.zeros((2, 5), np.float32)), plain)
  # The first query sees one key, the value of which it returns; query heads 2h and 2h + 1 read key head h.
  np.testing.assert_array_equal(causal[:, 0], v[:, 0, [0, 0, 1, 1]])


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_row_of_the_batch_stands_alone(implementation):
  one = case('B3T5S7H2K1D3V3', 'causal', 'bias', 'logit bias', 'key lengths', 'segments')
  one_row = functools.partial(attend, **one.static, implementation=implementation, blocks=BLOCKS)
  with jax.enable_x64(True):
    whole = np.asarray(one_row(**one.arrays))
    for b in range(3):
      np.testing.assert_allclose(one_row(**{n: x[b : b + 1] for n, x in one.arrays.items()})[0], whole[b], rtol=1e-12)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_order_of_keys_is_irrelevant(implementation):
  one = case(SHAPE, 'array mask', 'bias', 'logit bias', 'segments')
  order = np.random.default_rng(5).permutation(11)
  axes = {'k': 1, 'v': 1, 'logit_bias': 1, 'kv_segment_ids': 1, 'bias': 3}
  moved = {name: np.take(x, order, axes[name]) if name in axes else x for name, x in one.arrays.items()}
  with jax.enable_x64(True):
    kwargs = {'implementation': implementation, 'blocks': BLOCKS}
    got = attend(**moved, mask=one.seen[..., order], **kwargs)
    want = attend(**one.arrays, mask=one.seen, **kwargs)
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_constant_shifts_the_log_sum_exp_alone(implementation):
  one = case(SHAPE, 'bias', 'logit bias')
  with jax.enable_x64(True):
    kwargs = {'implementation': implementation, 'blocks': BLOCKS, 'return_residual': True}
    out, lse = attend(**one.arrays, **kwargs)
    for name in ('bias', 'logit_bias'):
      moved_out, moved_lse = attend(**one.arrays | {name: one.arrays[name] + 37.5}, **kwargs)
      np.testing.assert_allclose(moved_out, out, rtol=1e-10, atol=1e-12)
      np.testing.assert_allclose(moved_lse, lse + 37.5, rtol=1e-12)


def test_masks_and_arrays_are_interchangeable():
  q, k, v = inputs('B2T5S5H2K2D3V3', np.float32)
  mask = masks.causal() & masks.window(2)
  want = attend(q, k, v, mask=mask, implementation='reference')
  dense = masks.dense(mask, 5)
  for array in (dense, dense[0, 0], np.asarray(dense), jnp.broadcast_to(dense, (2, 2, 5, 5))):
    np.testing.assert_array_equal(attend(q, k, v, mask=array, implementation='reference'), want)
