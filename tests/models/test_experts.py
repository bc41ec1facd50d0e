"""models.experts: products of runs against a loop, gradients, sharding, and what is really computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from models import experts, sharding
from models.config import LayerSpec
from models.state import merge, split
from tests.models import small

MIXTURE = {'experts': 5, 'experts_per_token': 2, 'mlp_bias': True}
SIZES = {
  'even': [4, 4, 4],
  'ragged': [0, 7, 1, 0, 20, 3],
  'one': [0, 0, 1],
  'all in the last': [0, 0, 300],
  'past a tile': [129, 0, 128, 127],
  'none': [0, 0],
}


def case(sizes, dtype=np.float64):
  rng = np.random.default_rng(0)
  x, kernels = rng.normal(size=(sum(sizes), 6)), rng.normal(size=(len(sizes), 6, 9))
  return x.astype(dtype), kernels.astype(dtype), np.array(sizes, np.int32)


@pytest.mark.parametrize('name', SIZES)
def test_grouped_dot_matches_a_loop(name):
  x, kernels, sizes = case(SIZES[name])
  want = np.zeros((len(x), 9))
  for i, n in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
    want[i] = x[i] @ kernels[n]
  with jax.enable_x64(True):
    np.testing.assert_allclose(experts.grouped_dot(x, kernels, sizes), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', ['ragged', 'past a tile'])
def test_gradients(name):
  x, kernels, sizes = case(SIZES[name])
  with jax.enable_x64(True):
    check_grads(lambda x, kernels: experts.grouped_dot(x, kernels, sizes), (x, kernels), order=1, modes=['rev'])


def test_batches_of_runs():
  x, kernels, sizes = case([3, 0, 5])
  other = np.array([1, 7, 0], np.int32)
  with jax.enable_x64(True):
    got = jax.vmap(experts.grouped_dot, (None, None, 0))(x, kernels, np.stack([sizes, other]))
    np.testing.assert_allclose(got[1], experts.grouped_dot(x, kernels, other), rtol=1e-12)


def test_only_the_chosen_experts_are_read():
  """A broken expert harms nobody who did not choose it."""
  model = small.model(depth=1, **MIXTURE)
  mlp = model.blocks[0].mlp
  x = np.random.default_rng(1).normal(size=(1, 3, 16)).astype(np.float32)
  _, chosen = mlp.route(x[0])
  (spared, *_) = sorted(set(range(5)) - set(np.unique(chosen).tolist())) or [None]
  assert spared is not None
  want = mlp(x)
  kernel = mlp.experts['up'].kernel
  kernel[...] = kernel[...].at[spared].set(jnp.nan)
  np.testing.assert_array_equal(mlp(x), want)


def test_tiles_follow_the_rows():
  """As many tiles as the runs need: their number is no multiple of the number of experts."""
  counted = []

  def step(carry, start, run, rows, is_mine):
    jax.debug.callback(lambda run: counted.append(int(run)), run)
    return carry + is_mine.sum()

  x, _, sizes = case([0, 9, 0, 0, 1, 0, 0, 0])
  assert experts._over_tiles(step, jnp.zeros((), int), x, jnp.asarray(sizes)) == 10
  assert sorted(counted) == [1, 1, 4]


SCANNED = {'layers': small.HYBRID, 'scan': True, 'remat': 'full', 'depth': 4}


@pytest.mark.parametrize('changes', [{}, pytest.param(SCANNED, marks=pytest.mark.long)])
def test_gradients_are_the_same_on_a_mesh(changes):
  model = small.model(**MIXTURE, **changes, vocab=24)
  tokens = small.tokens(batch=4)
  loss = lambda model, tokens: jnp.mean(jnp.square(model(tokens)))
  want = small.paths(jax.jit(jax.grad(loss))(model, tokens))
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  graph, params = split(model)
  placed = jax.device_put(params, sharding.params_sharding(params, mesh))
  with jax.set_mesh(mesh):
    got = jax.jit(jax.grad(lambda params, tokens: loss(merge(graph, params), tokens)))(placed, tokens)
  for path, x in want.items():
    np.testing.assert_allclose(got[path], x, atol=1e-5 * np.abs(x).max() + 1e-9, err_msg=path)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'experts': 4}, 'experts_per_token=0 must lie in 1 .. experts=4'),
    ({'experts': 4, 'experts_per_token': 5}, 'experts_per_token=5 must lie in 1 .. experts=4'),
    ({'experts_per_token': 1}, 'experts_per_token=1 must lie in 1 .. experts=0'),
    ({'experts': 4, 'experts_per_token': 2, 'mlp': 'gelu'}, "mlp='gelu' with experts=4"),
    ({'experts': -1}, 'experts=-1'),
    ({'norms': 'none'}, "norms='none'"),
    ({'qk_norm': True}, 'qk_norm=True'),
    ({'attn_bias': False}, 'attn_bias=False'),
    ({'attn_scale': -1.0}, 'attn_scale=-1.0'),
    ({'layers': [LayerSpec(rope_factors=[1.0])]}, r"rope_factors=\[1.0\] has no effect with rope_scaling=''"),
    ({'layers': [LayerSpec(rope_slow_turns=2.0)]}, 'rope_slow_turns=2.0 has no effect'),
    ({'layers': [LayerSpec(rope_truncate=False)]}, 'rope_truncate=False has no effect'),
    (
      {'layers': [LayerSpec(rope_scaling='llama3', rope_original_length=16, rope_slow_turns=5.0)]},
      'rope_slow_turns=5.0 must be less than rope_fast_turns=4.0',
    ),
    (
      {'layers': [LayerSpec(rope_scaling='longrope', rope_original_length=16, rope_factors=[1.0])]},
      'factors has 1 entries, expected 2',
    ),
  ],
)
def test_rejects(changes, words):
  with pytest.raises(ValueError, match=words):
    small.config(**changes).validate()
