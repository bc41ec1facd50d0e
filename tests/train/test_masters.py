"""Training in bfloat16: float32 masters, in the parameters themselves or beside them; what is computed in which."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend import core

from models import state as model_state
from models.config import DecoderConfig
from models.decoder import Decoder
from train import ema, loss, masters, optimizer
from train.config import OptimizerConfig

SHAPES = {'a': (3, 5), 'b': (4,)}


def params_of(dtype):
  rng = np.random.default_rng(0)
  return {path: jnp.asarray(rng.normal(size=shape), dtype) for path, shape in SHAPES.items()}


def gradients(steps):
  rng = np.random.default_rng(1)
  return [{path: np.float32(rng.normal(size=shape) - 1) for path, shape in SHAPES.items()} for _ in range(steps)]


def run(tx, params, state, grads):
  """(params, state) after jitted steps, with the parameters after each asserted to be the masters' rounding."""

  @jax.jit
  def step(g, state, params):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  for g in grads:
    params, state = step(g, state, params)
    for path, master in state.masters.items():
      np.testing.assert_array_equal(params[path], np.asarray(master).astype(params[path].dtype), err_msg=path)
  return params, state


@pytest.mark.parametrize(
  'dtype, rate, decay',
  [(jnp.bfloat16, 1e-4, 0.0), (jnp.bfloat16, 3.0, 0.0), (jnp.bfloat16, 0.1, 1.0), (jnp.float16, 1e-5, 0.0)],
)
def test_matches_oracle(dtype, rate, decay):
  """Steps far below the resolution of the parameters add up, steps far above it lose nothing, and masters decay."""
  start, grads = params_of(dtype), gradients(50)
  tx = masters.keep(optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate)), start)
  _, state = run(tx, start, tx.init(start), grads)
  for path, x in start.items():
    want = np.asarray(x, np.float64)
    for g in grads:
      want = want - rate * (g[path] + decay * want)
    assert state.masters[path].dtype == jnp.float32
    np.testing.assert_allclose(state.masters[path], want, rtol=1e-5, atol=1e-6, err_msg=path)


def test_without_masters_small_updates_are_lost():
  """What `keep` is for: the same steps, added to bfloat16 parameters, leave most of them where they were."""
  start, tx = params_of(jnp.bfloat16), optax.sgd(1e-4)
  params = start
  for g in gradients(50):
    params = optax.apply_updates(params, tx.update(g, tx.init(params), params)[0])
  assert np.mean(np.asarray(params['a']) == np.asarray(start['a'])) > 0.5


def test_wide_parameters_are_left_alone():
  wide, mixed = params_of(jnp.float32), params_of(jnp.float32) | {'b': jnp.ones(4, jnp.bfloat16)}
  tx = optax.adamw(1e-3)
  assert masters.keep(tx, wide) is tx
  kept, g = masters.keep(tx, mixed), gradients(1)[0]
  state = kept.init(mixed)
  assert list(state.masters) == ['b'] and {x.dtype for x in state.inner[0].mu.values()} == {jnp.dtype('float32')}
  got, want = kept.update(g, state, mixed)[0], tx.update(g, tx.init(wide), wide)[0]
  np.testing.assert_array_equal(got['a'], want['a'])


def test_resumes_to_the_bit():
  start, grads = params_of(jnp.bfloat16), gradients(8)
  tx = masters.keep(optax.adamw(1e-4), start)
  straight = run(tx, start, tx.init(start), grads)
  half = run(tx, start, tx.init(start), grads[:4])
  again = run(tx, *jax.tree.map(lambda x: jnp.asarray(np.asarray(x).copy()), half), grads[4:])
  jax.tree.map(np.testing.assert_array_equal, again, straight)


# A small language model that learns to count.

BATCH = {
  'tokens': (np.arange(4 * 16).reshape(4, 16) * 3) % 61,
  'targets': (np.arange(4 * 16).reshape(4, 16) * 3 + 3) % 61,
  'segment_ids': np.zeros((4, 16), np.int32),
  'weights': np.ones((4, 16), np.float32),
  'bytes': np.ones((4, 16), np.float32),
}


@functools.cache
def model_of(dtype, param_dtype):
  """(graph, params). In both param_dtypes the same random numbers, which a draw in bfloat16 would not be."""
  config = DecoderConfig(
    vocab=61, width=32, depth=1, heads=2, mlp_width=64, mlp='relu2', dtype=dtype, tied_embeddings=False,
    implementation='xla',
  )  # fmt: skip
  graph, params = model_state.split(jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))())
  return graph, {path: x.astype(param_dtype) for path, x in params.items()}


def objective(graph, params):
  return loss.of_model(model_state.merge(graph, params), BATCH, z_loss=1e-4)['objective'] / 64


@functools.cache
def trained(dtype, param_dtype, steps=30):
  """(losses, params, optimizer state, average) of some steps at a rate far below the resolution of bfloat16."""
  graph, params = model_of(dtype, param_dtype)
  config = OptimizerConfig(learning_rate=2e-3, warmup_steps=0, schedule='constant')
  tx = optimizer.make(config, steps, params)

  @jax.jit
  def step(n, params, state, mean):
    value, grads = jax.value_and_grad(functools.partial(objective, graph))(params)
    assert {g.dtype for g in grads.values()} == {jnp.dtype(param_dtype)}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return value, params, state, ema.update(mean, params, n, 0.9)

  state, mean, losses = tx.init(params), ema.init(params), []
  for n in range(steps):
    value, params, state, mean = step(n, params, state, mean)
    losses.append(float(value))
  return np.array(losses), params, state, mean


@pytest.mark.parametrize('param_dtype', [pytest.param('float32', marks=pytest.mark.long), 'bfloat16'])
def test_bfloat16_learns_as_float32_does(param_dtype):
  want, got = trained('float32', 'float32'), trained('bfloat16', param_dtype)
  assert want[0][-1] < 0.5 * want[0][0]
  np.testing.assert_allclose(got[0], want[0], rtol=0.03)
  assert {x.dtype for x in got[1].values()} == {jnp.dtype(param_dtype)}
  assert {x.dtype for x in got[3].values()} == {jnp.dtype('float32')}
  assert {x.dtype for x in jax.tree.leaves(got[2])} == {jnp.dtype('float32'), jnp.dtype('int32')}


def products(jaxpr):
  """(dtypes of the operands, shapes of operands and result) of each matrix product, at any depth."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield [x.aval.dtype.name for x in eqn.invars], [x.aval.shape for x in (*eqn.invars, *eqn.outvars)]
  for sub in core.subjaxprs(jaxpr):
    yield from products(sub)


def test_matrix_products_run_in_bfloat16():
  """All but two: the logits are float32, hence so is their gradient, which meets the head and the hidden state."""
  graph, params = model_of('bfloat16', 'float32')
  found = list(products(jax.make_jaxpr(jax.grad(functools.partial(objective, graph)))(params).jaxpr))
  wide = [(dtypes, shapes) for dtypes, shapes in found if 'float32' in dtypes]
  assert len(found) > 20
  assert len(wide) == 2 and all((64, 61) in shapes and 'bfloat16' in dtypes for dtypes, shapes in wide), wide
  graph, params = model_of('float32', 'float32')
  found = products(jax.make_jaxpr(jax.grad(functools.partial(objective, graph)))(params).jaxpr)
  assert {name for dtypes, _ in found for name in dtypes} == {'float32'}
