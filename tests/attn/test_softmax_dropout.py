"""Dropout of attention probabilities: the same bits everywhere, the right mean, the right gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import softmax
from tests.attn import oracle
from tests.attn.softmax_cases import BLOCKS, QUICK, SHAPE, attend, case, inputs

IMPLEMENTATIONS = softmax.IMPLEMENTATIONS
RATE = 0.3
KEY = jax.random.key(7)


@functools.cache
def kept(B, T, S, H, rate=RATE, seed=7, implementation='reference', blocks=BLOCKS):
  """What dropout leaves, as a bool array [B, H, T, S]: equal scores, and values that name their key."""
  q, k = jnp.zeros((B, T, H, 1)), jnp.zeros((B, S, 1, 1))
  v = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, 1, S))
  settings = {'dropout_rate': rate, 'implementation': implementation, 'blocks': blocks}
  out = attend(q, k, v, dropout_key=jax.random.key(seed), **settings)
  return np.asarray(out).transpose(0, 2, 1, 3) > 0


@pytest.mark.parametrize('blocks', [(8, 3), (1, 1), (13, 2), (16, 16), None])
def test_any_tile_drops_the_same(blocks):
  got = kept(2, 13, 11, 4, implementation='xla', blocks=blocks and softmax.Blocks(*blocks))
  np.testing.assert_array_equal(got, kept(2, 13, 11, 4))


def test_share_and_independence():
  """The share is RATE over everything, every row, head and column; neighbours are independent (5 standard errors)."""
  keep = kept(4, 64, 64, 8)
  for axes in [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]:
    n = np.prod([keep.shape[a] for a in axes])
    assert np.abs(keep.mean(axes) - (1 - RATE)).max() < 5 * np.sqrt(RATE * (1 - RATE) / n)
  for axis in range(4):
    both = (keep & np.roll(keep, 1, axis)).mean()
    assert abs(both - (1 - RATE) ** 2) < 5 * 0.5 / np.sqrt(keep.size)


def test_keys_decide():
  np.testing.assert_array_equal(kept(1, 8, 8, 2), kept.__wrapped__(1, 8, 8, 2))
  assert (kept(1, 8, 8, 2) != kept(1, 8, 8, 2, seed=8)).any()


@pytest.mark.parametrize('names', [(), ('causal', 'sinks', 'bias', 'key lengths')])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_values_and_gradients(implementation, names):
  one = case(SHAPE, *names)
  floats = {n: x for n, x in one.arrays.items() if np.issubdtype(x.dtype, np.floating)}
  rest = {n: x for n, x in one.arrays.items() if n not in floats}
  settings = {**one.oracle_arguments(), 'keep': kept(2, 13, 11, 4), 'dropout_rate': RATE}

  @functools.partial(jax.jit, compiler_options=QUICK)
  def forward_and_backward(floats, key):
    def f(floats):
      kwargs = {'implementation': implementation, 'blocks': BLOCKS, 'return_residual': True}
      return softmax.attend(**floats, **rest, **one.static, dropout_rate=RATE, dropout_key=key, **kwargs)

    (out, lse), vjp = jax.vjp(f, floats)
    return out, lse, vjp((one.d_out, one.d_lse))[0]

  with jax.enable_x64(True):
    out, lse, grads = forward_and_backward(floats, KEY)
  want_out, want_lse = oracle.attend(**settings)
  np.testing.assert_allclose(out, want_out, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-10, atol=1e-12)  # as without dropout
  want = oracle.gradients(**settings, d_out=one.d_out, d_lse=one.d_lse)
  for name in floats:
    np.testing.assert_allclose(grads[name], want[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_mean_over_keys_is_without_dropout(implementation):
  q, k, v = inputs('B1T3S6H2K1D4V2', np.float32)
  kwargs = {'implementation': implementation, 'blocks': BLOCKS}
  one = lambda key: softmax.attend(q, k, v, dropout_rate=0.5, dropout_key=key, **kwargs)
  n = 4096
  outs = np.asarray(jax.jit(jax.vmap(one), compiler_options=QUICK)(jax.random.split(jax.random.key(0), n)))
  want = np.asarray(attend(q, k, v, **kwargs))
  assert (np.abs(outs.mean(0) - want) < 5 * outs.std(0) / np.sqrt(n)).all()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_rate_zero_is_none(implementation):
  q, k, v = inputs('B1T5S6H2K1D4V2', np.float32)
  kwargs = {'implementation': implementation, 'blocks': BLOCKS}
  want = attend(q, k, v, **kwargs)
  np.testing.assert_array_equal(attend(q, k, v, dropout_rate=0.0, dropout_key=KEY, **kwargs), want)


def test_a_traced_key_needs_no_new_compilation():
  q, k, v = inputs('B1T5S6H2K1D4V2', np.float32)
  one = jax.jit(lambda key: softmax.attend(q, k, v, dropout_rate=0.5, dropout_key=key, implementation='xla'))
  first, second = one(jax.random.key(0)), one(jax.random.key(1))
  assert one._cache_size() == 1 and (first != second).any()


def test_keys_of_the_old_kind_and_of_other_generators():
  q, k, v = inputs('B1T5S6H2K1D4V2', np.float32)
  dropped = [
    attend(q, k, v, dropout_rate=0.5, dropout_key=key, implementation='xla')
    for key in (jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3, impl='rbg'))
  ]
  np.testing.assert_array_equal(dropped[0], dropped[1])
  assert (dropped[0] != dropped[2]).any()


@pytest.mark.parametrize('rate', [0.01, 0.99])
def test_extreme_rates(rate):
  keep = kept(2, 32, 32, 4, rate=rate)
  assert abs(keep.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / keep.size)
