"""train.sharding: the rule table, and that eight devices compute what one computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models.config import DecoderConfig, LayerSpec
from tests.train import tiny
from train import data, program, sharding
from train.config import SEPARATOR, Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig, UserError
from train.data import store

FULL = DecoderConfig(
  vocab=264, width=16, depth=2, heads=4, kv_heads=2, layers=[LayerSpec(window=5), LayerSpec()], qk_norm='head',
  sinks=True, attn_bias='qkvo', mlp_bias=True, tied_embeddings=False,
)  # fmt: skip


def shapes(**sizes):
  return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in sizes.items()}


@pytest.mark.parametrize(
  'sizes, want',
  [
    ({}, (8, 1, 1, 1)),
    ({'fsdp': 2, 'tensor': 2}, (2, 2, 1, 2)),
    ({'data': 1}, (1, 1, 1, 1)),
    ({'data': 2, 'context': 3}, (2, 1, 3, 1)),
  ],
)
def test_mesh_sizes(sizes, want):
  assert tuple(sharding.make_mesh(MeshConfig(**sizes)).shape.values()) == want


def test_mesh_rejects():
  with pytest.raises(UserError, match=r'mesh.data=1, mesh.fsdp=16.*at most 8 devices, got 16'):
    sharding.make_mesh(MeshConfig(fsdp=16))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'data': {'batch': 6}}, 'data.batch=6: expected a multiple of .* = 4'),
    ({'train': {'accumulate': 4}}, 'data.batch=8: expected a multiple of .* = 16'),
    ({'eval': {'batch': 2}}, 'eval.batch=2: expected a multiple of .* = 4'),
    ({'data': {'seq_len': 15}}, 'data.seq_len=15: expected a multiple of mesh.context=2'),
  ],
)
def test_batch_rejects(changes, words):
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, context=2))
  sharding.check_batch(tiny.config('text'), mesh)
  with pytest.raises(UserError, match=words):
    sharding.check_batch(tiny.config('text', **changes), mesh)


def test_first_rule_wins_and_leading_axes_stay_whole():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
  rules = [(r'a\.b', P('fsdp')), (r'a\.d', P(('tensor', 'fsdp', 'expert'), 'expert')), (r'a\..*', P('tensor', 'fsdp'))]
  got = sharding.params_sharding(shapes(**{'a.b': (4,), 'a.c': (3, 4, 4), 'a.d': (4, 3)}), mesh, rules)
  assert got['a.d'].spec == P(('tensor', 'fsdp'), None)  # of axes that the mesh lacks nothing is cut
  assert got['a.b'].spec == P('fsdp')
  assert got['a.c'].spec == P(None, 'tensor', 'fsdp')


@pytest.mark.parametrize(
  'path, shape, words',
  [
    ('blocks.0.mixer.gate.kernel', (4, 4), r"parameter 'blocks.0.mixer.gate.kernel' \(4, 4\) matches no rule"),
    ('xembed.table', (4, 4), 'matches no rule'),
    ('embed.table', (257, 4), r"mesh.tensor=2: expected a divisor of axis 0 of parameter 'embed.table' .*model.vocab"),
    ('embed.table', (4,), 'places 2 axes, more than there are'),
  ],
)
def test_rules_reject(path, shape, words):
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
  with pytest.raises(UserError, match=words):
    sharding.params_sharding(shapes(**{path: shape}), mesh)


@pytest.mark.parametrize('scan, method', [(False, 'muon'), (True, 'adamw'), (True, 'muon')])
def test_every_parameter_of_a_decoder_has_a_rule(scan, method):
  config = DecoderConfig(**{**vars(FULL), 'depth': 4, 'scan': scan})
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
  settings = Config(model=config, optimizer=OptimizerConfig(method=method), train=TrainConfig(ema_decay=0.5))
  made = program.make(settings, mesh)
  abstract, placed = made.abstract, made.placed
  for path, array in abstract.params.items():
    is_cut = path.endswith(('kernel', 'table', 'q.bias', 'k.bias', 'v.bias', 'up.bias', 'gate.bias'))
    assert (placed.params[path].shard_shape(array.shape) != array.shape) == is_cut, path
  assert placed.ema == placed.params
  assert placed.step.spec == placed.skipped.spec == P()
  # Whatever an optimizer keeps of a parameter, in its shape, lies as the parameter does; counts are everywhere.
  kept = jax.tree_util.tree_leaves_with_path(placed.opt_state)
  shapes = jax.tree.leaves(abstract.opt_state)
  assert len(kept) > len(placed.params)
  for (where, sharding_), leaf in zip(kept, shapes, strict=True):
    path = next((key.key for key in where if getattr(key, 'key', None) in placed.params), None)
    assert sharding_.spec == (placed.params[path].spec if path else P())
    assert leaf.shape == abstract.params[path].shape if path else leaf.ndim <= 1


TEXTS = [bytes(range(40 + i, 90 + 3 * i)) for i in range(12)]
TOKENS = store.in_memory([(f'f{i}', text) for i, text in enumerate(TEXTS)])


def three_steps(config, sizes, accumulate=1):
  """Losses of three steps, and the parameters after them."""
  mesh = sharding.make_mesh(MeshConfig(**sizes))
  made = program.make(
    Config(
      model=config,
      data=DataConfig(seq_len=16, batch=8),
      optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule='constant', eps=1e-3),
      train=TrainConfig(accumulate=accumulate),
    ),
    mesh,
  )
  with jax.set_mesh(mesh):
    state = made.first_state()
    batches = data.batches(data.Rows(TOKENS, 16, separator=SEPARATOR), 8, made.by_rows, 0)
    losses = []
    for _ in range(3):
      _, local, arrays = next(batches)
      state, sums = made.train_step(state, data.to_global(local, arrays, 8, made.by_rows))
      losses.append(float(sums['nll'] / sums['tokens']))
  return losses, jax.device_get(state.params)


@pytest.fixture(scope='module')
def one_device():
  return three_steps(FULL, {'data': 1})


@pytest.mark.parametrize(
  'sizes, accumulate',
  [
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 1),
    ({'data': 2, 'context': 2, 'tensor': 2}, 1),
    ({'data': 2, 'fsdp': 2, 'context': 2}, 2),
  ],
)
def test_eight_devices_equal_one(one_device, sizes, accumulate):
  # Only the order of sums differs: 1e-5 of the loss, and 1e-3 of the learning rate's 1e-2 a step for parameters.
  want_losses, want = one_device
  losses, params = three_steps(FULL, sizes, accumulate)
  assert want_losses[2] < want_losses[0] - 0.1
  np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
  for path in want:
    np.testing.assert_allclose(params[path], want[path], rtol=1e-4, atol=3e-5, err_msg=path)
