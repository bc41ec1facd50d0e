"""train.initial: runs that start from other runs and from checkpoints, and what they refuse."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from models import adapters, hf, sharding, state as model_state
from models.config import LayerSpec
from tests.models import small
from tests.train import tiny
from train import checkpoint, distill, initial, loop, program as programs, sharding as train_sharding
from train.config import DistillConfig, UserError

BASE = {'vocab': 260, 'depth': 4, 'kv_heads': 4, 'tied_embeddings': False, 'implementation': ''}


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A checkpoint in a published form, and its parameters in the unscanned model."""
  folder = tmp_path_factory.mktemp('published') / 'model'
  model = small.model(3, **BASE)
  hf.save(folder, model, small.config(**BASE), architecture='LlamaForCausalLM')
  return folder, small.paths(model)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run of a scanned model with adapters that kept averages."""
  folder = tmp_path_factory.mktemp('run')
  source, train = tiny.write_corpus(folder / 'text'), {'steps': 3, 'ema_decay': 0.5}
  optimizer = {'trainable': r'.*\.lora_[ab]|norm\.scale'}
  config = tiny.config(source, train=train, optimizer=optimizer, model={'depth': 2, 'scan': True, 'adapter_rank': 2})
  loop.run(config, str(folder / 'run'))
  return folder / 'run', config


def mesh_of(fsdp=1, tensor=1):
  devices = jax.devices()[: fsdp * tensor]
  return jax.make_mesh((fsdp, tensor), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2, devices=devices)


def places(config, mesh):
  return sharding.params_sharding(model_state.abstract_params(config), mesh)


def check_equal(got, want, config):
  """Parameters of a model of `config` against those of the unscanned model, adapters left out."""
  seen = set()
  for path, x in got.items():
    for slot, name in model_state.apart(path, config):
      np.testing.assert_array_equal(x if slot is None else x[slot], want[name], err_msg=path)
      seen.add(name)
  assert seen == set(want)


@pytest.mark.parametrize('scan', [False, True])
def test_from_a_checkpoint_into_its_places(published, scan):
  folder, want = published
  # Two specs that are the same: the checkpoint is read with a pattern of one.
  config = small.config(**BASE, scan=scan, layers=[LayerSpec(), LayerSpec()], remat='full', adapter_rank=2)
  placed = places(config, mesh_of(2, 2))
  got = initial.params(folder, config, placed)
  check_equal(got, want, config)
  assert {path for path in placed if path not in got} == {path for path in placed if path.endswith(adapters.NAMES)}
  for path, x in got.items():
    assert x.sharding == placed[path] and x.dtype == np.float32, path


def test_parameters_have_the_dtype_of_the_new_run(published):
  folder, want = published
  config = small.config(**BASE, param_dtype='bfloat16', dtype='bfloat16')
  got = initial.params(folder, config, places(config, mesh_of()))
  check_equal(got, {path: np.asarray(x.astype('bfloat16')) for path, x in want.items()}, config)


@pytest.mark.parametrize('scan', [pytest.param(False, marks=pytest.mark.long), True])
def test_from_a_run(run, scan):
  """The averages, adapters included; from a scanned run into either form."""
  folder, config = run
  averages, raw = (checkpoint.load_params(folder, weights=weights)[1] for weights in ('ema', 'raw'))
  want = {}
  for path, x in averages.items():
    want |= {name: x if i is None else x[i] for i, name in model_state.apart(path, config.model)}
  model = dataclasses.replace(config.model, scan=scan)
  placed = places(model, mesh_of(2))
  got = initial.params(folder, model, placed)
  check_equal(got, want, model)
  assert all(x.sharding == placed[path] for path, x in got.items())
  changed = [path for path, x in raw.items() if np.any(np.asarray(x) != averages[path])]
  assert len(changed) > 1 and all(path.endswith((*adapters.NAMES, 'norm.scale')) for path in changed)


def test_adapters_of_a_run(run):
  """Where they are not asked for they are named; a teacher's are merged."""
  folder, config = run
  plain = dataclasses.replace(config.model, adapter_rank=0)
  with pytest.raises(UserError) as caught:
    initial.check(folder, plain)
  for words in ('adapter_rank=2, expected 0', 'train.export', 'blocks.I.mixer.q.lora_a (16, 2), expected none'):
    assert words in str(caught.value)
  teacher = distill.load_teacher(DistillConfig(teacher=str(folder)), plain, train_sharding.make_mesh(config.mesh))
  assert teacher.config == plain
  mine = model_state.merge(model_state.graph(config.model), checkpoint.load_params(folder)[1])
  want = small.paths(adapters.merged(mine, config.model)[0])
  assert teacher.params.keys() == want.keys()
  for path, x in want.items():
    np.testing.assert_array_equal(teacher.params[path], x, err_msg=path)


def test_all_that_differs_is_named(published):
  folder, _ = published
  other = {**BASE, 'layers': [LayerSpec(window=4), LayerSpec()], 'qk_norm': 'head', 'mlp_width': 32}
  config = small.config(**{**other, 'tied_embeddings': True})
  with pytest.raises(UserError) as caught:
    initial.check(folder, config)
  said = str(caught.value)
  assert said.startswith(f'train.init_from={str(folder)!r} is not the model of this run:')
  for words in (
    'mlp_width=24, expected 32',
    "qk_norm='', expected 'head'",
    'tied_embeddings=False, expected True',
    'layers[0].window=0, expected 4',
    'blocks.I.mixer.k_norm.scale is missing, expected (4,)',
    'head.kernel (16, 260), expected none',
    'blocks.I.mlp.up.kernel (16, 24), expected (16, 32)',
  ):
    assert words in said, words
  assert 'layers[1]' not in said and 'implementation' not in said
  with pytest.raises(UserError, match='depth=4, expected 2'):
    initial.check(folder, small.config(**{**BASE, 'depth': 2}))


def test_what_differs_in_how_it_runs_may(published):
  folder, _ = published
  changes = {'dtype': 'bfloat16', 'remat': 'dots', 'scan': True, 'head_dim': 4, 'embed_scale': 1.0}
  with pytest.raises(UserError, match=r'embed_scale=1\.0, expected 2\.0'):
    initial.check(folder, small.config(**{**BASE, **changes, 'embed_scale': 2.0}))
  assert initial.check(folder, small.config(**{**BASE, **changes})).depth == 4


@pytest.mark.parametrize(
  'text, words',
  [
    (None, 'expected the folder of a run or of a checkpoint, found no '),
    ('{', 'cannot read it'),
    ('[]', 'its config.json is of something else'),
    ('{"architectures": ["BertModel"]}', 'BertModel'),
    ('{"config": {"wings": 2}}', "Config has no field 'wings'"),
    ('{"config": {"model": 3}}', 'DecoderConfig: expected its fields, got 3'),
    ('{"config": {"model": {"layers": 3}}}', 'DecoderConfig.layers=3: expected a list'),
    ('{"config": {"model": {"width": "16"}}}', "model.width='16': expected int, got str"),
    ('{"config": {"model": {"width": 0}}}', 'model.width=0 must be an integer, 1 or more'),
  ],
)
def test_a_folder_without_a_model(text, words, tmp_path):
  if text is not None:
    (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=r'^train\.init_from=') as caught:
    initial.check(tmp_path, small.config())
  assert words in str(caught.value)


def test_a_damaged_checkpoint(published, tmp_path):
  folder, _ = published
  (tmp_path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
  (tmp_path / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-8])
  config = small.config(**BASE)
  with pytest.raises(UserError, match=r'^train\.init_from=.*model.safetensors'):
    initial.params(tmp_path, config, places(config, mesh_of()))


def rows(program):
  """A training batch of random tokens."""
  rng = np.random.default_rng(0)
  made = {}
  for name, x in program.batch_shapes().items():
    if name in ('tokens', 'targets'):
      made[name] = rng.integers(0, 8, x.shape).astype(x.dtype)
    else:
      made[name] = np.full(x.shape, name != 'segment_ids', x.dtype)
  return made


def test_fine_tuning_with_adapters_changes_only_them(published):
  """From a published checkpoint, through the program that the loop runs."""
  folder, _ = published
  config = tiny.config('', optimizer={'learning_rate': 2e-2, 'warmup_steps': 0}, train={'init_from': str(folder)})
  config.model = dataclasses.replace(hf.read_config(folder)[0], adapter_rank=4)
  program = programs.make(config, train_sharding.make_mesh(config.mesh))
  assert all(path.endswith(adapters.NAMES) for path in program.trainable)
  given = initial.params(folder, config.model, program.placed.params)
  state = program.first_state(given)
  before, batch, losses = jax.device_get(state.params), rows(program), []
  for _ in range(20):
    state, sums = program.train_step(state, batch)
    losses.append(float(sums['nll'] / sums['tokens']))
  assert losses[-1] < 0.8 * losses[0]
  changed = {path for path, x in state.params.items() if np.any(np.asarray(x) != before[path])}
  assert changed == {path for path in before if path.endswith(adapters.NAMES)}
  check_equal({path: x for path, x in before.items() if path not in changed}, published[1], config.model)


@pytest.mark.long
def test_distillation_through_the_program(published):
  """A student of half the depth comes nearer to a published checkpoint."""
  folder, _ = published
  config = tiny.config('', optimizer={'learning_rate': 1e-2, 'warmup_steps': 0})
  config.model = dataclasses.replace(hf.read_config(folder)[0], depth=2)
  config.distill = DistillConfig(teacher=str(folder), labels=0.0, outputs=1.0, features=0.5)
  mesh = train_sharding.make_mesh(config.mesh)
  teacher = distill.load_teacher(config.distill, config.model, mesh)
  program = programs.make(config, mesh, teacher)
  state, batch, found = program.first_state(), rows(program), []
  for _ in range(20):
    state, sums = program.train_step(state, batch, teacher.params)
    found.append({name: float(sums[name]) for name in ('distill_outputs', 'distill_features')})
  for name, value in found[-1].items():
    assert value < 0.8 * found[0][name], name


def test_a_teacher_that_does_not_fit(published):
  config, settings = small.config(**{**BASE, 'vocab': 300}), DistillConfig(teacher=str(published[0]))
  with pytest.raises(UserError, match=r'has vocab=260: expected model\.vocab=300'):
    distill.check_folder(settings, config)
  config = small.config(**BASE)
  assert distill.check_folder(settings, config, mesh_of(4)).vocab == 260
  devices = jax.devices()[:3]
  mesh = jax.make_mesh((1, 3), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2, devices=devices)
  with pytest.raises(UserError, match=r'^distill\.teacher=.*: mesh\.tensor=3: expected a divisor of axis 1'):
    distill.check_folder(settings, config, mesh)
  with pytest.raises(UserError, match=r'^distill\.teacher=.*: mesh\.tensor=3'):
    initial.model(published[0], mesh)


def test_identity_of_a_checkpoint(published, tmp_path, monkeypatch):
  """The same for a copy, another if any piece that is read differs; what cannot be read is refused."""
  folder = tmp_path / 'copy'
  shutil.copytree(published[0], folder)
  found = initial.identity(folder)
  assert found == initial.identity(published[0]) == json.loads(json.dumps(found))
  tensors = folder / 'model.safetensors'
  whole = bytearray(tensors.read_bytes())
  for place in (len(whole) // 2, len(whole) - 1):
    whole[place] ^= 1
    tensors.write_bytes(whole)
    assert initial.identity(folder) != found
    whole[place] ^= 1
  tensors.write_bytes(whole)
  assert initial.identity(folder) == found
  monkeypatch.setattr(initial, 'PIECE', 64)  # as of a large file: pieces, first to last
  monkeypatch.setattr(initial, 'SAMPLES', 8)
  sampled = initial.identity(folder)
  assert sampled != found
  half = len(whole) // 2
  tensors.write_bytes(whole[:half] + bytes(len(whole) - half))
  assert initial.identity(folder) != sampled
  tensors.write_bytes(whole[:-8])
  with pytest.raises(UserError, match=r"^distill\.teacher='.*model.safetensors"):
    initial.identity(folder, name='distill.teacher')


def test_identity_of_a_run(run, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(run[0], folder)
  found = initial.identity(folder)
  assert found == initial.identity(run[0]) == json.loads(json.dumps(found))
  assert (found['step'], found['averages']) == (3, True)
  damaged = max((folder / 'checkpoints/3/ema').rglob('*'), key=lambda path: path.is_file() and path.stat().st_size)
  damaged.write_bytes(b'x' + damaged.read_bytes()[1:])
  with pytest.raises(UserError, match=r'^train\.init_from=.*: expected a whole checkpoint; ema/.*SHA-256 differs'):
    initial.identity(folder)
  shutil.rmtree(folder / 'checkpoints')
  with pytest.raises(UserError, match=r'^train\.init_from=.*: expected a run with a checkpoint, found none'):
    initial.identity(folder)
