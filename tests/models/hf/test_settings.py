"""models.hf.settings and the refusals of load and save: what a folder says, and what is written beside tensors."""

import dataclasses
import json

import numpy as np
import pytest

from models import hf
from models.hf import architectures, safetensors, settings
from tests.models import small

LLAMA = {'embed_scale': 1.0, 'tied_embeddings': False}


def folder(path, generation=None, **changes):
  """A folder with the config.json of a Llama; `changes` to it, ... for an entry that is left out."""
  record = architectures.find('LlamaForCausalLM').write_config(small.config(**LLAMA))
  record |= {'eos_token_id': 2, 'bos_token_id': 1, 'torch_dtype': 'bfloat16', **changes}
  path.mkdir(exist_ok=True)
  (path / 'config.json').write_text(json.dumps({key: x for key, x in record.items() if x is not ...}))
  if generation is not None:
    (path / 'generation_config.json').write_text(json.dumps(generation))
  return path


def test_read_config(tmp_path):
  config, rest = hf.read_config(folder(tmp_path, transformers_version='5.0'))
  assert config.dtype == 'bfloat16'
  assert dataclasses.replace(config, dtype='float32') == architectures.normal(
    dataclasses.replace(small.config(**LLAMA), implementation='')
  )
  assert rest['bos_token_id'] == 1 and rest['transformers_version'] == '5.0'
  assert not {'hidden_size', 'rope_theta', 'torch_dtype', 'dtype'} & {*rest}
  assert hf.read_config(folder(tmp_path, torch_dtype=...))[0].dtype == 'float32'
  assert hf.read_config(folder(tmp_path, torch_dtype=..., dtype='float16'))[0].dtype == 'float16'


@pytest.mark.parametrize(
  'eos, generation, stops, setting',
  [
    (2, None, (2,), 2),
    ([2, 3], None, (2, 3), [2, 3]),
    (2, {'eos_token_id': 2}, (2,), 2),
    (2, {'eos_token_id': [7, 2, 5]}, (2, 7, 5), [2, 7, 5]),
    (..., {'eos_token_id': 4}, (4,), [4]),
    (None, {}, (), None),
  ],
)
def test_stop_tokens(tmp_path, eos, generation, stops, setting):
  path = folder(tmp_path, generation, eos_token_id=eos)
  assert hf.stop_tokens(path) == stops
  _, rest = hf.read_config(path)
  assert rest['eos_token_id'] == setting
  assert hf.stop_tokens(hf.Loaded(None, None, rest)) == stops


@pytest.mark.parametrize('eos', [-1, '2', [2, None], True, 2.0])
def test_stop_tokens_rejects(tmp_path, eos):
  words = 'eos_token_id=.*, expected a token id or a list of them'
  with pytest.raises(ValueError, match=f'config.json: {words}'):
    hf.stop_tokens(folder(tmp_path, eos_token_id=eos))
  with pytest.raises(ValueError, match=f'generation_config.json: {words}'):
    hf.read_config(folder(tmp_path, {'eos_token_id': eos}))


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      {'architectures': ['LlamaForCausallm']},
      "architecture='LlamaForCausallm' is unknown: the nearest is 'LlamaForCausalLM'",
    ),
    ({'architectures': ...}, 'architectures=None'),
    (
      {'architectures': ['MambaForCausalLM'], 'auto_map': {'AutoModelForCausalLM': 'modeling.MambaForCausalLM'}},
      'is unknown.*; the Python files that auto_map names are never run',
    ),
    ({'auto_map': {'AutoModelForCausalLM': 'modeling.OtherForCausalLM'}}, "auto_map has 'modeling.OtherForCausalLM'"),
    ({'auto_map': {'AutoModelForCausalLM': ['modeling.LlamaForCausalLM']}}, 'auto_map has .*never run'),
    ({'torch_dtype': 'float8_e4m3fn'}, "dtype='float8_e4m3fn': expected one of float32"),
    ({'dtype': 7}, 'dtype=7: expected'),
    ({'dtype': []}, r'dtype=\[\]: expected'),
    ({'hidden_act': 'relu'}, 'hidden_act'),
  ],
)
def test_config_rejects(tmp_path, changes, words):
  with pytest.raises(ValueError, match=words) as caught:
    hf.load(folder(tmp_path, **changes))
  assert str(tmp_path / 'config.json') in str(caught.value)


def test_code_of_a_known_architecture_is_left_alone(tmp_path):
  """As in Phi-3: the class is known by name, the file beside it is not opened."""
  auto = {'AutoConfig': 'configuration_llama.LlamaConfig', 'AutoModelForCausalLM': 'modeling_llama.LlamaForCausalLM'}
  _, rest = hf.read_config(folder(tmp_path, auto_map=auto))
  assert 'auto_map' not in rest


@pytest.mark.parametrize(
  'text, words',
  [(None, 'expected a file, found none'), ('{', 'expected JSON'), ('[]', 'object'), ('{"a":1,"a":2}', 'twice')],
)
def test_config_json_rejects(tmp_path, text, words):
  if text is not None:
    (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=f'config.json: .*{words}'):
    hf.load(tmp_path)
  with pytest.raises(ValueError, match='nowhere: expected a folder'):
    hf.load(tmp_path / 'nowhere')


def test_pickled_files_are_never_opened(tmp_path):
  (folder(tmp_path) / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=r'pytorch_model.bin: pickled files can run code and are never opened'):
    hf.load(tmp_path)


def test_save_rejects(tmp_path):
  model, config = small.model(), small.config()
  reject = lambda words: pytest.raises(ValueError, match=words)
  new = tmp_path / 'new'
  with reject("architecture='Llama' is unknown: the nearest is 'LlamaForCausalLM'"):
    hf.save(new, model, config, architecture='Llama')
  with reject('LlamaForCausalLM cannot express .*embed_scale'):
    hf.save(new, model, dataclasses.replace(config, embed_scale=2.0), architecture='LlamaForCausalLM')
  with reject(
    r'parameters are not those of config:\n(.*\n)*  blocks.0.mlp.gate.kernel \(16, 24\), expected \(16, 32\)'
  ):
    hf.save(new, model, dataclasses.replace(config, mlp_width=32))
  with reject('settings: expected what JSON can hold'):
    hf.save(new, model, config, settings={'x': np.zeros(3)})
  with reject('settings: expected what JSON can hold'):
    hf.save(new, model, config, settings={'x': float('inf')})
  with reject("tokenizer='nowhere': expected 'bytes' or a folder with tokenizer.json"):
    hf.save(new, model, config, tokenizer='nowhere')
  with reject("tokenizer='bytes' has 257 ids, the model vocab=23"):
    hf.save(new, model, config, tokenizer='bytes')
  assert not new.exists()
  hf.save(new, model, config)
  with reject('holds config.json, model.safetensors: expected a folder without a checkpoint, or overwrite=True'):
    hf.save(new, model, config)


def test_overwriting(tmp_path):
  config = small.config(vocab=257, depth=1)
  model = small.model(vocab=257, depth=1)
  tokens = tmp_path / 'tokens'
  tokens.mkdir()
  for name in ('tokenizer.json', 'tokenizer_config.json', 'README.md'):
    (tokens / name).write_text(name)
  names = lambda: {path.name for path in (tmp_path / 'new').iterdir()}
  own = {'config.json', safetensors.SINGLE}
  hf.save(tmp_path / 'new', model, config, tokenizer=tokens)
  assert names() == own | {'tokenizer.json', 'tokenizer_config.json'}
  (tmp_path / 'new' / 'generation_config.json').write_text('{"eos_token_id": 3}')  # of the model before
  hf.save(tmp_path / 'new', model, config, overwrite=True)
  assert names() == own | {'tokenizer.json', 'tokenizer_config.json'}
  assert hf.stop_tokens(tmp_path / 'new') == ()
  hf.save(tmp_path / 'new', model, config, overwrite=True, tokenizer='bytes')
  assert names() == own
  assert hf.tokenizer(tmp_path / 'new').vocab == 257
  (tmp_path / 'new' / 'tokenizer.json').write_text('')
  loaded = hf.load(tmp_path / 'new')
  hf.save(tmp_path / 'new', loaded.model, loaded.config, settings=loaded.settings, overwrite=True)
  assert names() == own  # of two tokenizers, the settings name one
  with pytest.raises(ValueError, match=r'tokens holds tokenizer.json beside the byte tokenizer'):
    hf.save(tokens, model, config, tokenizer='bytes')
  hf.save(tmp_path / 'new', loaded.model, loaded.config, settings=loaded.settings, tokenizer=tokens, overwrite=True)
  assert names() == own | {'tokenizer.json', 'tokenizer_config.json'}
  assert 'tokenizer' not in hf.load(tmp_path / 'new').settings


def test_length_chooses_the_frequencies_and_both_are_written(tmp_path):
  lists = {'short_factor': [1.0, 1.5], 'long_factor': [2.0, 4.0]}
  rope = {'rope_type': 'longrope', **lists}
  form = architectures.find('Phi3ForCausalLM')
  record = form.write_config(small.config(**LLAMA))
  record |= {'rope_scaling': rope, 'original_max_position_embeddings': 32, 'max_position_embeddings': 128}
  (tmp_path / 'config.json').write_text(json.dumps(record))
  short, long = (hf.read_config(tmp_path, length=length) for length in (32, 33))
  assert short[0].spec(0).rope_factors == [1.0, 1.5] and long[0].spec(0).rope_factors == [2.0, 4.0]
  assert hf.read_config(tmp_path) == long and short[1] == long[1]
  with pytest.raises(ValueError, match='length=0'):
    hf.read_config(tmp_path, length=0)
  for config, rest in (short, long):
    again = settings.files(form, config, rest, None)['config.json']
    (tmp_path / 'config.json').write_bytes(again)
    assert hf.read_config(tmp_path, length=32) == short and hf.read_config(tmp_path, length=33) == long
