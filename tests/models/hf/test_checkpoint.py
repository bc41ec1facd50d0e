"""models.hf.checkpoint: every bit of every tensor, in and out, on one device and on eight."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as library
from flax import nnx
from jax.sharding import AxisType

from models import hf, sharding, state
from models.config import LayerSpec
from models.decoder import Decoder
from models.hf import architectures, arrays, safetensors, settings, writer
from tests.models import small

ROOT = pathlib.Path(__file__).parents[3]
LAYERS = [LayerSpec(window=4), LayerSpec()]
NATIVE = {'vocab': 24, 'depth': 4, 'layers': LAYERS, 'qk_norm': 'head', 'attn_bias': 'qkv', 'sinks': True}
LLAMA = {'vocab': 24, 'depth': 2, 'embed_scale': 1.0, 'tied_embeddings': False, 'norm_eps': 1e-5}


@functools.cache
def mesh():
  return jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)


def random(shape, dtype, seed):
  """Any bits: NaN with and without a message, infinities, denormals."""
  dtype = np.dtype(dtype)
  return np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def model(config, dtype='float32'):
  """A decoder whose parameters are any bits."""
  graph, shapes = state.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  return state.merge(
    graph, {path: jax.device_put(random(x.shape, dtype, i)) for i, (path, x) in enumerate(sorted(shapes.items()))}
  )


def bits(module):
  """{path of the unscanned model: (dtype, shape, bytes)}."""
  found = {}
  for path, x in small.paths(module).items():
    first, _, rest = path.partition('.')
    x = np.asarray(x)
    if first == 'blocks' and module.scan:
      i, _, rest = rest.partition('.')
      for j, part in enumerate(x):
        found[f'blocks.{j * len(LAYERS) + int(i)}.{rest}'] = (part.dtype, part.shape, part.tobytes())
    else:
      found[path] = (x.dtype, x.shape, x.tobytes())
  return found


OPTIONS = ['plain', 'scan', 'mesh', 'both']
CASES = [('float32', 1e9, 'plain'), ('float16', 3000, 'scan'), ('bfloat16', 1e9, 'both'), ('bfloat16', 3000, 'mesh')]
ALL = itertools.product(['float32', 'float16', 'bfloat16'], [1e9, 3000], OPTIONS)


@pytest.mark.parametrize(
  'dtype, max_shard_bytes, how', [pytest.param(*c, marks=[] if c in CASES else pytest.mark.long) for c in ALL]
)
def test_native_form_keeps_every_bit(tmp_path, dtype, max_shard_bytes, how):
  options = {'scan': how in ('scan', 'both'), 'mesh': mesh() if how in ('mesh', 'both') else None}
  config = small.config(**NATIVE, dtype=dtype, param_dtype=dtype)
  before, more = model(config, dtype), {'eos_token_id': [3, 5], 'note': {'a': [1.5, None]}}
  hf.save(tmp_path / 'a', before, config, settings=more, max_shard_bytes=max_shard_bytes)
  assert (tmp_path / 'a' / safetensors.INDEX).exists() == (max_shard_bytes == 3000)
  loaded = hf.load(tmp_path / 'a', **options)
  assert bits(loaded.model) == bits(before)
  assert loaded.config == dataclasses.replace(config, scan=options['scan'])
  assert loaded.model.scan == options['scan']
  assert {key: loaded.settings[key] for key in more} == more
  hf.save(tmp_path / 'b', loaded.model, loaded.config, settings=loaded.settings, max_shard_bytes=max_shard_bytes)
  again = hf.load(tmp_path / 'b', **options)
  assert bits(again.model) == bits(before)
  assert (again.config, again.settings) == (loaded.config, loaded.settings)
  one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in 'ab')
  assert {**one, 'config.json': None} == {**other, 'config.json': None}
  assert hf.stop_tokens(loaded) == hf.stop_tokens(tmp_path / 'a') == (3, 5)


def test_placements(tmp_path):
  config = small.config(**NATIVE)
  hf.save(tmp_path, model(config), config)
  for scan in (False, True):
    loaded = hf.load(tmp_path, mesh=mesh(), scan=scan)
    params = small.paths(loaded.model)
    assert {path: x.sharding for path, x in params.items()} == sharding.params_sharding(params, mesh())
    assert 'fsdp' in str(params['blocks.0.mixer.q.kernel'].sharding)
  rules = [(r'.*', jax.sharding.PartitionSpec())]
  loaded = hf.load(tmp_path, mesh=mesh(), rules=rules)
  assert all(x.is_fully_replicated for x in small.paths(loaded.model).values())
  alone = small.paths(hf.load(tmp_path).model)  # mixes with arrays on a mesh
  assert not any(x.committed for x in alone.values())


def test_devices_read_their_part_of_the_file(tmp_path, monkeypatch):
  read = {}
  inner = safetensors.File.read_parts

  def read_parts(file, name, indexes):
    parts = inner(file, name, indexes)
    read[name] = sorted(x.shape for x in parts)
    return parts

  monkeypatch.setattr(safetensors.File, 'read_parts', read_parts)
  hf.load(llama_folder(tmp_path), mesh=mesh())
  layer = 'model.layers.1.'
  assert read['model.embed_tokens.weight'] == [(12, 8)] * 4  # each once, not for each of the two copies of the model
  assert read[f'{layer}self_attn.k_proj.weight'] == [(4, 8)] * 4
  assert read[f'{layer}mlp.up_proj.weight'] == [(12, 8)] * 4
  assert read[f'{layer}mlp.down_proj.weight'] == [(8, 12)] * 4
  assert read[f'{layer}input_layernorm.weight'] == [(16,)]


def published(config):
  """A Llama checkpoint written out tensor by tensor, with torch's [out, in], and what our parameters must be."""
  E, D, F = config.width, config.D, config.F
  shapes = {'model.embed_tokens.weight': (24, E), 'model.norm.weight': (E,), 'lm_head.weight': (24, E)}
  ours = {
    'embed.table': 'model.embed_tokens.weight',
    'norm.scale': 'model.norm.weight',
    'head.kernel': 'lm_head.weight',
  }
  for i in range(config.depth):
    layer = f'model.layers.{i}.'
    for name, out in (('q', config.heads * D), ('k', config.K * D), ('v', config.K * D)):
      shapes[f'{layer}self_attn.{name}_proj.weight'] = (out, E)
      ours[f'blocks.{i}.mixer.{name}.kernel'] = f'{layer}self_attn.{name}_proj.weight'
    shapes[f'{layer}self_attn.o_proj.weight'] = (E, config.heads * D)
    ours[f'blocks.{i}.mixer.o.kernel'] = f'{layer}self_attn.o_proj.weight'
    for name, shape in (('gate', (F, E)), ('up', (F, E)), ('down', (E, F))):
      shapes[f'{layer}mlp.{name}_proj.weight'] = shape
      ours[f'blocks.{i}.mlp.{name}.kernel'] = f'{layer}mlp.{name}_proj.weight'
    for name, other in (('mixer_norm', 'input_layernorm'), ('mlp_norm', 'post_attention_layernorm')):
      shapes[f'{layer}{other}.weight'] = (E,)
      ours[f'blocks.{i}.{name}.scale'] = f'{layer}{other}.weight'
  tensors = {name: random(shape, np.float32, i) for i, (name, shape) in enumerate(shapes.items())}
  kernel = lambda path, name: tensors[name].T if path.endswith('kernel') else tensors[name]
  return tensors, {path: kernel(path, name) for path, name in ours.items()}


def llama_folder(folder, tensors=None, changes=None, **config_changes):
  """A folder as it is published, written by the library; `changes` to its config.json."""
  config = small.config(**{**LLAMA, **config_changes})
  record = architectures.find('LlamaForCausalLM').write_config(config)
  record |= {'torch_dtype': 'float32', 'eos_token_id': 2, 'max_position_embeddings': 64, **(changes or {})}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({key: x for key, x in record.items() if x is not ...}))
  library.save_file(published(config)[0] if tensors is None else tensors, folder / safetensors.SINGLE)
  return folder


@pytest.mark.parametrize('options', [{}, {'mesh': True}, {'mesh': True, 'scan': True}], ids=['one', 'mesh', 'scan'])
def test_published_tensors_are_ours_turned(tmp_path, options):
  options = {**options, 'mesh': mesh()} if 'mesh' in options else options
  loaded = hf.load(llama_folder(tmp_path / 'a'), **options)
  want = published(small.config(**LLAMA))[1]
  for path, x in small.paths(loaded.model).items():
    first, _, rest = path.partition('.')
    parts = (
      np.stack([want[f'blocks.{i}.{rest[2:]}'] for i in range(2)])
      if loaded.model.scan and first == 'blocks'
      else want[path]
    )
    assert np.asarray(x).tobytes() == parts.tobytes(), path
  assert loaded.settings['max_position_embeddings'] == 64 and loaded.settings['eos_token_id'] == 2
  hf.save(tmp_path / 'b', loaded.model, loaded.config, architecture='LlamaForCausalLM', settings=loaded.settings)
  one, other = (library.load_file(tmp_path / name / safetensors.SINGLE) for name in 'ab')
  assert {name: x.tobytes() for name, x in one.items()} == {name: x.tobytes() for name, x in other.items()}
  assert hf.read_config(tmp_path / 'a') == hf.read_config(tmp_path / 'b')


def test_rows_of_a_tensor_and_columns_in_turns(tmp_path):
  """Phi-3 keeps q, k, v in one tensor; the experts of gpt-oss have gate and up in alternate columns."""
  config = small.config(**{**LLAMA, 'depth': 1})
  hf.save(tmp_path / 'phi', model(config), config, architecture='Phi3ForCausalLM')
  tensors = library.load_file(tmp_path / 'phi' / safetensors.SINGLE)
  loaded = small.paths(hf.load(tmp_path / 'phi', mesh=mesh()).model)
  rows = [np.asarray(loaded[f'blocks.0.mixer.{name}.kernel']).T for name in 'qkv']
  assert np.concatenate(rows).tobytes() == tensors['model.layers.0.self_attn.qkv_proj.weight'].tobytes()
  halves = [np.asarray(loaded[f'blocks.0.mlp.{name}.kernel']).T for name in ('gate', 'up')]
  assert np.concatenate(halves).tobytes() == tensors['model.layers.0.mlp.gate_up_proj.weight'].tobytes()


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def unpacked(blocks, scales):
  """[N, in, out] of an MXFP4 tensor, value by value."""
  N, out, groups, _ = blocks.shape
  x = np.zeros((N, 32 * groups, out), np.float64)
  for n, o, g in np.ndindex(N, out, groups):
    for i, byte in enumerate(blocks[n, o, g]):
      for half, code in enumerate((byte % 16, byte // 16)):
        x[n, 32 * g + 2 * i + half, o] = E2M1[code] * 2.0 ** (int(scales[n, o, g]) - 127)
  return x.astype(ml_dtypes.bfloat16)


GPT_OSS = {
  'vocab': 24,
  'width': 64,
  'depth': 2,
  'mlp_width': 32,
  'mlp': 'swiglu_clipped',
  'mlp_bias': True,
  'attn_bias': 'qkvo',
  'sinks': True,
  'experts': 4,
  'experts_per_token': 2,
  'embed_scale': 1.0,
  'tied_embeddings': False,
  'norm_eps': 1e-5,
}


@pytest.mark.parametrize('options', [{}, {'mesh': True, 'scan': True}], ids=['one', 'mesh'])
def test_mxfp4(tmp_path, options):
  options = {**options, 'mesh': mesh()} if 'mesh' in options else options
  yarn = LayerSpec(rope_scaling='yarn', rope_factor=2.0, rope_original_length=64, rope_base=150000.0)
  layers = [dataclasses.replace(yarn, window=8), yarn]
  config = small.config(**GPT_OSS, layers=layers, param_dtype='bfloat16')
  form = architectures.find('GptOssForCausalLM')
  shapes = {}
  for name, shape in architectures.shapes(form, config).items():
    if name.endswith(('gate_up_proj', 'down_proj')):
      N, inside, out = shape
      shapes |= {
        f'{name}_blocks': ((N, out, inside // 32, 16), np.uint8),
        f'{name}_scales': ((N, out, inside // 32), np.uint8),
      }
    else:
      shapes[name] = (shape, ml_dtypes.bfloat16)
  tensors = {name: random(*x, i) for i, (name, x) in enumerate(shapes.items())}
  tensors |= {name: 100 + x % 50 for name, x in tensors.items() if name.endswith('_scales')}
  record = {**form.write_config(config), 'quantization_config': {'quant_method': 'mxfp4'}, 'torch_dtype': 'bfloat16'}
  writer.write(tmp_path, tensors, tensors.__getitem__, files={'config.json': json.dumps(record).encode()})
  loaded = hf.load(tmp_path, **options)
  assert loaded.config.param_dtype == 'bfloat16'
  got = bits(loaded.model)
  for i in range(2):
    experts = f'model.layers.{i}.mlp.experts.'
    both = unpacked(tensors[f'{experts}gate_up_proj_blocks'], tensors[f'{experts}gate_up_proj_scales'])
    down = unpacked(tensors[f'{experts}down_proj_blocks'], tensors[f'{experts}down_proj_scales'])
    for name, want in (('gate', both[..., ::2]), ('up', both[..., 1::2]), ('down', down)):
      assert got[f'blocks.{i}.mlp.experts.{name}.kernel'] == (want.dtype, want.shape, want.tobytes())
    bias = tensors[f'{experts}gate_up_proj_bias'][:, 1::2]
    assert got[f'blocks.{i}.mlp.experts.up.bias'] == (bias.dtype, bias.shape, bias.tobytes())
  hf.save(tmp_path / 'b', loaded.model, loaded.config, architecture=form.name, settings=loaded.settings)
  assert 'quantization_config' not in json.loads((tmp_path / 'b' / 'config.json').read_text())
  with safetensors.Folder(tmp_path / 'b') as plain:
    assert plain.read('model.layers.1.mlp.experts.gate_up_proj').tobytes() == both.tobytes()
  assert bits(hf.load(tmp_path / 'b').model) == got


def test_unpacked_extremes():
  blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)
  codes = np.stack([np.arange(256) % 16, np.arange(256) // 16], axis=1).reshape(16, 32)
  for scale in (2, 127, 252):  # from where all halves are normal numbers to where none is infinite
    got = np.asarray(arrays.unpack(blocks[:, None], np.full((16, 1), scale, np.uint8)), np.float64)
    np.testing.assert_array_equal(got, np.array(E2M1)[codes] * 2.0 ** (scale - 127))
    np.testing.assert_array_equal(np.signbit(got), codes >= 8)


def test_everything_that_does_not_fit_is_named_before_anything_is_read(tmp_path, monkeypatch):
  tensors, _ = published(small.config(**LLAMA))
  layer = 'model.layers.1.'
  del tensors[f'{layer}mlp.up_proj.weight'], tensors['model.norm.weight']
  tensors[f'{layer}mlp.down_proj.weight'] = tensors[f'{layer}mlp.down_proj.weight'].T.copy()
  tensors[f'{layer}input_layernorm.weight'] = np.zeros(16, np.int32)
  tensors['model.layers.2.mlp.up_proj.weight'] = np.zeros((24, 16), np.float32)
  tensors[f'{layer}self_attn.rotary_emb.inv_freq'] = np.zeros(2, np.float32)  # holds nothing
  monkeypatch.setattr(safetensors.File, 'read_parts', None)
  with pytest.raises(ValueError) as caught:
    hf.load(llama_folder(tmp_path, tensors))
  assert str(caught.value).split('\n') == [
    f'{tmp_path}: 5 tensors are not those of LlamaForCausalLM:',
    '  model.norm.weight is missing, expected [16]',
    f'  {layer}input_layernorm.weight is int32, expected float32 or bfloat16 or float16 or float64',
    f'  {layer}mlp.up_proj.weight is missing, expected [24, 16]',
    f'  {layer}mlp.down_proj.weight has shape [24, 16], expected [16, 24]',
    '  model.layers.2.mlp.up_proj.weight [24, 16] is not in the model',
  ]


def test_float64_needs_x64(tmp_path):
  tensors, _ = published(small.config(**LLAMA))
  tensors['model.norm.weight'] = np.ones(16)
  with pytest.raises(ValueError, match=r'model.norm.weight is float64, which needs JAX_ENABLE_X64=1'):
    hf.load(llama_folder(tmp_path, tensors), param_dtype='float32')


def test_dtypes(tmp_path):
  tensors = {name: np.ones(x.shape, np.float16) for name, x in published(small.config(**LLAMA))[0].items()}
  tensors['model.norm.weight'] = np.full(16, 1 + 2**-20, np.float32)
  llama_folder(tmp_path, tensors, {'torch_dtype': 'bfloat16'})
  loaded = hf.load(tmp_path)
  assert (loaded.config.dtype, loaded.config.param_dtype) == ('bfloat16', 'float16')
  params = small.paths(loaded.model)
  assert params['norm.scale'].dtype == np.float32 and params['norm.scale'][0] == 1 + 2**-20
  assert params['embed.table'].dtype == np.float16
  loaded = hf.load(tmp_path, dtype='float32', param_dtype=jax.numpy.bfloat16)
  assert (loaded.config.dtype, loaded.config.param_dtype) == ('float32', 'bfloat16')
  assert {x.dtype.name for x in small.paths(loaded.model).values()} == {'bfloat16'}
  tensors['model.layers.0.input_layernorm.weight'] = np.ones(16, np.float32)
  llama_folder(tmp_path, tensors)
  with pytest.raises(
    ValueError, match=r'layers.1.input_layernorm.weight is float16, other layers float32.*param_dtype'
  ):
    hf.load(tmp_path, scan=True)
  assert hf.load(tmp_path, scan=True, param_dtype='float32').config.param_dtype == 'float32'
  with pytest.raises(ValueError, match="param_dtype='int8': expected one of float32"):
    hf.load(tmp_path, param_dtype='int8')


def test_a_tied_model_with_an_output_projection(tmp_path):
  tensors, _ = published(small.config(**LLAMA))
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  folder = llama_folder(tmp_path / 'a', tensors, tied_embeddings=True)
  assert 'head.kernel' not in small.paths(hf.load(folder).model)
  tensors['lm_head.weight'][23, 15] += 1
  for wrong in (tensors['lm_head.weight'], tensors['lm_head.weight'][:5]):
    llama_folder(tmp_path / 'a', {**tensors, 'lm_head.weight': wrong}, tied_embeddings=True)
    with pytest.raises(ValueError, match=r'ties the embeddings, but lm_head.weight differs from model.embed_tokens'):
      hf.load(folder)


def test_progress(tmp_path, capsys):
  seen = []
  hf.load(llama_folder(tmp_path), progress=lambda *report: seen.append(report))
  with safetensors.Folder(tmp_path) as tensors:
    total = sum(x.nbytes for x in tensors.tensors.values())
    assert [name for *_, name in seen] == list(tensors.tensors)  # in the order of the file
  assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
  assert seen[-1][:2] == (total, total)
  hf.load(tmp_path)
  assert capsys.readouterr().err == ''  # no terminal, no bar


def test_a_mesh_that_does_not_divide(tmp_path):
  config = small.config(**{**NATIVE, 'vocab': 23})
  hf.save(tmp_path, model(config), config)
  with pytest.raises(ValueError, match=r"mesh.tensor=2: expected a divisor of axis 0 of parameter 'embed.table'"):
    hf.load(tmp_path, mesh=mesh())


MEMORY = """
import resource, sys
import jax
from models import hf, state
hf.load(sys.argv[3], scan=sys.argv[2] == 'scan')  # what is loaded with the code does not count
before = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
loaded = hf.load(sys.argv[1], scan=sys.argv[2] == 'scan')
sizes = [x.nbytes for x in state.split(loaded.model)[1].values()]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, sum(sizes))
"""


@pytest.mark.long
@pytest.mark.parametrize('how', ['plain', 'scan'])
def test_memory_is_the_model_and_its_largest_tensor(tmp_path, how):
  tiny = llama_folder(tmp_path / 'tiny')
  config = small.config(vocab=49152, width=1024, depth=6, head_dim=64, mlp_width=4096, tied_embeddings=False)
  form = architectures.find('LlamaForCausalLM')
  config = dataclasses.replace(config, embed_scale=1.0, layers=[LayerSpec()])
  shapes = {name: jax.ShapeDtypeStruct(x, np.float32) for name, x in architectures.shapes(form, config).items()}
  # The largest last, when the rest is there.
  shapes = dict(sorted(shapes.items(), key=lambda item: np.prod(item[1].shape)))
  ones = lambda name: np.ones(shapes[name].shape, np.float32)
  writer.write(tmp_path, shapes, ones, files=settings.files(form, config, {}, None))
  # Freed blocks go back to the system at once: what is held counts, not what malloc keeps for later.
  environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '1000000'}
  done = subprocess.run(
    [sys.executable, '-c', MEMORY, str(tmp_path), how, str(tiny)],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  grown, size = map(int, done.stdout.split())
  largest = 49152 * 1024 * 4
  assert size > 700_000_000
  assert grown <= size + 1.3 * largest, f'{(grown - size) / largest:.2f} of the largest tensor beside the model'
