"""train.ema against the same recursion in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import ema, masters


def run(decay, steps, dtype=jnp.float32):
  """(average after the steps, the parameters before and after each step)."""
  rng = np.random.default_rng(0)
  params = [{'a': jnp.asarray(rng.normal(size=(2, 3)), dtype), 'b': jnp.zeros(4, dtype) + i} for i in range(steps + 1)]
  update = jax.jit(ema.update, static_argnums=3)
  mean = ema.init(params[0])
  for n in range(steps):
    mean = update(mean, params[n + 1], jnp.int32(n), decay)
  return mean, params


@pytest.mark.parametrize('decay', [0.3, 0.999])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_matches_oracle(decay, dtype):
  got, params = run(decay, 40, dtype)
  for path, mean in got.items():
    want = np.asarray(params[0][path], np.float64)
    for n, after in enumerate(params[1:]):
      d = min(decay, (1 + n) / (10 + n))
      want = d * want + (1 - d) * np.asarray(after[path], np.float64)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-6)


def test_limits():
  params = {'a': jnp.float32([1, 2])}
  start = ema.init({'a': jnp.float32([5, 5])})
  np.testing.assert_allclose(ema.update(start, params, 0, 0.9)['a'], 0.1 * 5 + 0.9 * params['a'], rtol=1e-6)
  np.testing.assert_allclose(ema.update(start, params, 10**6, 0.9)['a'], 0.9 * 5 + 0.1 * params['a'], rtol=1e-6)
  np.testing.assert_array_equal(ema.update(start, params, 7, 0.0)['a'], params['a'])


def test_steps_below_the_resolution_of_bfloat16_are_kept():
  """At 1, bfloat16 has steps of 2^-8: an average in it would not move."""
  mean = ema.init({'a': jnp.ones(1, jnp.bfloat16)})
  for _ in range(10):
    mean = ema.update(mean, {'a': jnp.full(1, 1 + 2**-7, jnp.bfloat16)}, 10**6, 0.99)
  np.testing.assert_allclose(mean['a'], 1 + 2**-7 * (1 - 0.99**10), rtol=1e-6)


def test_averages_of_narrow_parameters_are_those_of_their_copies():
  """Steps that the rounding hides reach the average."""
  tx = masters.keep(optax.sgd(1.0), params := {'a': jnp.ones(1, jnp.bfloat16), 'b': jnp.ones(1)})
  state, mean = tx.init(params), ema.init(params)
  for _ in range(5):
    updates, state = tx.update({'a': jnp.full(1, 2.0**-12), 'b': jnp.full(1, 2.0**-12)}, state, params)
    params = optax.apply_updates(params, updates)
    mean = ema.update(mean, masters.of(state, params), 10**6, 0.5)
  assert params['a'] == 1 > mean['a'] == mean['b']
  wide = {'b': jnp.ones(1)}
  assert masters.of(optax.sgd(1.0).init(wide), wide) is wide


def test_init_is_a_copy_that_a_step_may_donate_with_the_parameters():
  step = jax.jit(lambda params, mean: (params, mean), donate_argnums=(0, 1))
  params = {'a': jnp.arange(3.0)}
  mean = ema.init(params)
  jax.block_until_ready(step(params, mean))
  jax.block_until_ready(step(*jax.jit(lambda: (x := {'a': jnp.arange(3.0) + 1}, ema.init(x)))()))


def test_only_paths_of_the_average_are_read():
  assert list(ema.update({'a': jnp.zeros(1)}, {'b': None, 'a': jnp.ones(1)}, 0, 0.5)) == ['a']
