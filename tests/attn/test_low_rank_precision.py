"""attn.low_rank: what is left of positions, scales and queries in types that cannot hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import low_rank, softmax
from attn.low_rank import Factors
from tests.attn import oracle


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def worst_error(factors, slope, N):
  """The largest error of a causal ALiBi bias over pairs with 200 queries, the first and last ones among them."""
  f, g = (np.asarray(x, np.float64).reshape(N, -1) for x in (factors.f, factors.g))
  i, j = np.unique([*range(8), *range(N - 8, N), *np.random.default_rng(0).integers(0, N, 184)])[:, None], np.arange(N)
  return np.abs(np.where(i >= j, f[i[:, 0]] @ g.T + slope * (i - j), 0)).max()


def in_parts(slope, N, parts, is_traced=False):
  zero = np.zeros((1, N, 1, 1), jnp.bfloat16)
  factors = low_rank.alibi(np.array([slope]), N)
  run = lambda factors: low_rank.augment(zero, zero, factors, parts=parts)[:2]
  q, k = jax.jit(run)(factors) if is_traced else run(factors)
  assert q.dtype == k.dtype == jnp.bfloat16
  return Factors(q[0, :, 0, 1:], k[0, :, 0, 1:])


@pytest.mark.parametrize('N, off', [(256, 0.0), (2048, 4.0), (8192, 16.0), (32768, 64.0)])
def test_positions_in_bfloat16_are_wrong_by_whole_units(N, off):
  """One bfloat16 number a factor: the error grows with the position; the worst pair, near the end, is off by this."""
  naive = in_parts(0.5, N, 1)
  assert naive.rank == 2
  error = worst_error(naive, 0.5, N)
  assert 0.7 * off <= error <= off
  f, g = (np.asarray(x, np.float64) for x in (naive.f, naive.g))
  beside = np.abs(np.sum(f[1:] * g[:-1], axis=-1) + 0.5).max()  # pairs of neighbours
  assert beside >= 0.7 * off


@pytest.mark.parametrize('slope', [0.5, 2**-0.5, 2**-7.5])
@pytest.mark.parametrize('N', [256, 2048, 8192, 32768])
def test_parts_carry_positions(N, slope):
  known, traced = in_parts(slope, N, 3), in_parts(slope, N, 3, is_traced=True)
  assert traced.rank == 12 and known.rank <= 9
  for factors in (known, traced):
    assert worst_error(factors, slope, N) <= 4e-7 * slope * N
  if slope == 0.5:
    assert known.rank == (2 if N <= 256 else 4)
    assert worst_error(known, slope, N) == 0
    assert worst_error(in_parts(slope, N, 2), slope, N) == 0


def test_bfloat16_attention_far_from_the_start():
  """Causal, slope 1/2, positions 30000 to 30015: as near as bfloat16 allows in parts, lost in one bfloat16 number."""
  N, start = 16, 30000
  q, k, v = (normal(seed, 1, N, 2, 8).astype(jnp.bfloat16) for seed in (1, 2, 3))
  at = start + np.arange(N)
  factors = low_rank.alibi(np.array([0.5, 0.5]), N, positions=at, kv_positions=at)
  dense = -0.5 * (at[:, None] - at).astype(float)
  want = oracle.attend(*(np.asarray(x, np.float64) for x in (q, k, v)), bias=dense, is_causal=True)[0]
  run = lambda **how: jax.jit(lambda f: low_rank.attend(q, k, v, f, is_causal=True, **how))(factors)
  got = run()
  assert got.dtype == jnp.bfloat16
  assert oracle.relative_error(got, want) < 2e-2
  assert oracle.relative_error(run(parts=1), want) > 0.3


def test_float16_runs_out_of_range_by_name():
  q = np.zeros((1, 3, 1, 4), np.float16)
  far = low_rank.distance(np.array([[0.0], [1.0], [300.0]]))
  with pytest.raises(ValueError, match=r'factor f / scale has values up to 1.8e\+05, beyond the range of float16'):
    low_rank.augment(q, q, far, parts=2)


def test_wider_factors_make_wider_queries():
  q, k, v = (normal(seed, 1, 3, 1, 4).astype(jnp.bfloat16) for seed in (1, 2, 3))
  factors = low_rank.alibi(np.array([0.5], np.float32), 3)
  assert [x.dtype for x in low_rank.augment(q, k, factors)[:2]] == [np.float32] * 2
  assert [x.dtype for x in low_rank.augment(q, k, factors, parts=1)[:2]] == [jnp.bfloat16] * 2
  with jax.enable_x64(True):
    doubled = low_rank.alibi(np.array([0.5]), 3)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    assert low_rank.attend(q, k, v, doubled).dtype == np.float32


def logits(q, k, f, g, scale):
  """scale q . k + f . g in float64, of one row and one head."""
  q, k, f, g = (np.asarray(x, np.float64) for x in (q[0, :, 0], k[0, :, 0], f, g))
  return scale * q @ k.T + f @ g.T


@pytest.mark.parametrize('scale', [None, 0.3, -2.7, 0.0])
@pytest.mark.parametrize('D', [16, 32])  # scales of 1/4 and 2^-2.5
def test_the_scale_rounds_no_query(D, scale):
  """Logits of up to about 60 in bfloat16: scale * q in that type would be off by 0.1."""
  q, k = ((5 * normal(seed, 1, 24, 1, D)).astype(jnp.bfloat16) for seed in (1, 2))
  f, g = (normal(seed, 24, 3) for seed in (3, 4))
  want = logits(q, k, f, g, D**-0.5 if scale is None else scale)
  run = lambda f, g: low_rank.augment(q, k, Factors(f, g), scale, parts=3)
  for q2, k2, after in (run(f, g), jax.jit(run)(f, g)):
    assert q2.dtype == k2.dtype == jnp.bfloat16
    got = float(after) * logits(q2, k2, np.zeros((24, 1)), np.zeros((24, 1)), 1.0)
    assert np.abs(want).max() > (1 if scale == 0 else 30)
    np.testing.assert_allclose(got, want, atol=2e-6)  # of f . g alone: 2^-24 of what is split, and what is dropped


def test_a_wider_factor_keeps_the_query_before_it_is_scaled():
  q, k = ((5 * normal(seed, 1, 24, 1, 32)).astype(jnp.bfloat16) for seed in (1, 2))
  f, g = (normal(seed, 24, 3).astype(np.float32) for seed in (3, 4))
  q2, k2, after = low_rank.augment(q, k, Factors(f, g))
  assert (q2.dtype, k2.dtype, after) == (np.float32, np.float32, 1.0)
  np.testing.assert_array_equal(q2[..., 32:], f[None, :, None])
  got = logits(q2, k2, np.zeros((24, 1)), np.zeros((24, 1)), 1.0)
  np.testing.assert_allclose(got, logits(q, k, f, g, 32**-0.5), atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('scale', [None, 0.3])
def test_no_channels_are_plain_attention_to_the_bit(dtype, scale):
  q, k, v = (normal(seed, 2, 9, 2, 6).astype(dtype) for seed in (1, 2, 3))
  got = low_rank.attend(q, k, v, Factors(np.zeros((9, 0)), np.zeros((9, 0))), scale=scale)
  np.testing.assert_array_equal(got, softmax.attend(q, k, v, scale=scale, precision='highest'))
