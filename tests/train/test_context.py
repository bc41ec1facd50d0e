"""Training on a mesh that cuts rows along their length: ring attention, with tokens in zigzag order."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from attn.distributed import zigzag
from models import decoder, state as model_state
from models.config import LayerSpec
from models.generate import generate
from tests.models import small
from tests.train.test_sharding import FULL, TOKENS, three_steps
from train import data, loss, sharding
from train.config import SEPARATOR, MeshConfig

# Beside the window that tests/train/test_sharding.py has on such meshes: a chunk, and a layer without rotation.
HYBRID = dataclasses.replace(FULL, layers=[LayerSpec(chunk=6), LayerSpec(rope_fraction=0.0)], remat='dots')
T, B = 16, 8


@functools.cache
def batch(mesh):
  """A batch as the loop gives it, on a mesh."""
  by_rows = NamedSharding(mesh, sharding.ROWS)
  _, local, arrays = next(data.batches(data.Rows(TOKENS, T, separator=SEPARATOR), B, by_rows, 0))
  return arrays, data.to_global(local, arrays, B, by_rows)


def test_rows_are_in_zigzag_order():
  arrays, placed = batch(sharding.make_mesh(MeshConfig(data=2, context=4)))
  want = arrays | {'positions': np.asarray(decoder.restart(jnp.asarray(arrays['segment_ids'])))}
  assert (want['positions'] == 0).sum() > B, 'some row has more than one document'
  assert set(placed) == set(want)
  for name, array in placed.items():
    assert array.sharding.shard_shape(array.shape) == (4, 4)
    np.testing.assert_array_equal(zigzag.restore(np.asarray(array), 4), want[name], err_msg=name)
  assert set(batch(sharding.make_mesh(MeshConfig(data=2)))[1]) == set(arrays)


@pytest.fixture(scope='module')
def one_device():
  return three_steps(HYBRID, {'data': 1})


@pytest.mark.parametrize(
  'changes, sizes, accumulate',
  [
    ({}, {'data': 2, 'context': 4}, 2),
    pytest.param({}, {'data': 1, 'context': 8}, 1, marks=pytest.mark.long),
    pytest.param({'remat': 'none', 'scan': True}, {'context': 2, 'tensor': 4}, 1, marks=pytest.mark.long),
  ],
)
def test_training_equals_one_device(one_device, changes, sizes, accumulate):
  # Only the order of sums differs: 1e-5 of the loss, and 1e-3 of the learning rate's 1e-2 a step for parameters.
  losses, params = three_steps(dataclasses.replace(HYBRID, **changes), sizes, accumulate)
  np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
  for path, want in one_device[1].items():  # with `scan`, layers have an axis of one repeat before the others
    np.testing.assert_allclose(params[path].reshape(want.shape), want, rtol=1e-4, atol=3e-5, err_msg=path)


@functools.cache
def gradient(remat, context, chunk=0):
  """The compiled gradient of the loss of a two-layer model, rows of 64 tokens."""
  config = dataclasses.replace(FULL, remat=remat)
  graph, mesh = model_state.graph(config), sharding.make_mesh(MeshConfig(data=1, context=context))
  by_rows = NamedSharding(mesh, sharding.ROWS)
  given = lambda dtype: jax.ShapeDtypeStruct((4, 64), dtype, sharding=by_rows)
  arrays = {name: given(jnp.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
  arrays |= {name: given(jnp.float32) for name in ('weights', 'bytes')}
  nll = lambda params, arrays: loss.of_model(model_state.merge(graph, params), arrays, chunk)['nll']
  with jax.set_mesh(mesh):
    made = jax.jit(jax.grad(nll)).lower(model_state.abstract_params(config), arrays)
    return made.compile().as_text()


@pytest.mark.parametrize('remat, chunk', [('dots', 16), pytest.param('none', 0, marks=pytest.mark.long)])
def test_keys_travel_and_are_never_gathered(remat, chunk):
  text = gradient(remat, 4, chunk)
  assert not re.search(r'all-gather|all-to-all', text)
  # Of each layer: keys and values forward, keys and values backward with their gradients, these twice more. Integers
  # (positions, segments) aside. So 'dots' does not go around again for what it keeps.
  hops = re.findall(r' = f32\[([\d,]+)\]\S* collective-permute(?:-start)?\(', text)
  assert hops == ['4,16,2,4'] * 20


def test_rows_must_divide():
  mesh, model = sharding.make_mesh(MeshConfig(data=1, context=4)), small.model()
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=r'T=13: expected a multiple of 4, .*context=4'):
    small.forward(model, small.tokens())


def test_generation_is_unaffected():
  model, prompt = small.model(depth=1, layers=[LayerSpec(window=4)]), small.tokens(batch=1, length=5)
  want = generate(model, prompt, 4)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, context=4))):
    got = generate(model, prompt, 4)
  assert got.tokens == want.tokens


@pytest.mark.parametrize('scan', [False, pytest.param(True, marks=pytest.mark.long)])
def test_attention_maps_are_those_of_one_device(scan):
  """One row of 5 tokens: nothing that the mesh could cut evenly. The second layer's map needs the first layer."""
  model = small.model(layers=[LayerSpec(window=4)], scan=scan)
  tokens = small.tokens(batch=1, length=5)
  want = model.attention_map(tokens, 1)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, context=4))):
    np.testing.assert_array_equal(model.attention_map(tokens, 1), want)
    graph, state = nnx.split(model)
    got = jax.jit(lambda state: nnx.merge(graph, state).attention_map(tokens, 1))(state)
  np.testing.assert_allclose(got, want, rtol=1e-5)
