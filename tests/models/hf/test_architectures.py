"""models.hf.architectures: what config.json entries mean, both ways, and everything that is refused."""

import dataclasses
import json
import math

import pytest

from models import size
from models.config import DecoderConfig, LayerSpec
from models.hf import architectures
from models.hf.architectures import family as families
from models.hf.architectures.families import FAMILIES
from models.hf.architectures.record import Source
from tests.models.hf import published

WRITTEN = [family.name for family in FAMILIES]
DEFAULTS = {
  'LlamaForCausalLM': 6_738_415_616,  # Llama 2 7B
  'MistralForCausalLM': 7_241_732_096,  # 7B
  'Gemma2ForCausalLM': 2_614_341_888,  # 2B
  'Phi3ForCausalLM': 3_821_079_552,  # mini 4k
  'GptOssForCausalLM': 116_829_156_672,  # 120b
}
SMALL = {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 4,
  'vocab_size': 11,
}
LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}
LONG = {'short_factor': [1.0, 1.5], 'long_factor': [2.0, 4.0]}
FULL, LOCAL = 'full_attention', 'sliding_attention'


def read(name, length=None, **entries):
  """The DecoderConfig of a small config.json with these entries."""
  return architectures.read_config({'architectures': [name], **SMALL, **entries}, length)


def small(name, *specs, **changes):
  """A DecoderConfig that the architecture can express, changed."""
  config = read(name)
  return dataclasses.replace(config, **({'layers': list(specs)} if specs else {}), **changes)


def again(name, config):
  """What is read of what is written, through JSON."""
  return architectures.read_config(json.loads(json.dumps(architectures.find(name).write_config(config))))


UNREPEATED = ('gemma-3-1b', 'gemma-3-4b')  # whose 26 and 34 layers are no shorter pattern


@pytest.mark.parametrize(
  'name', [pytest.param(x, marks=[pytest.mark.long] * (x in UNREPEATED)) for x in published.CHECKPOINTS]
)
def test_published_checkpoint(name):
  record, parameters = published.CHECKPOINTS[name]
  config = architectures.read_config(record)
  assert size.parameters(dataclasses.replace(config, scan=True)) == parameters
  assert (config.dtype, config.param_dtype, config.scan) == ('float32', 'float32', False)
  if name != 'gemma-3-4b':
    assert again(record['architectures'][0], config) == config


@pytest.mark.parametrize('name', DEFAULTS)
def test_entries_that_are_left_out(name):
  config = architectures.read_config({'architectures': [name]})
  assert size.parameters(dataclasses.replace(config, scan=True)) == DEFAULTS[name]


def test_layers_of_published_checkpoints():
  layers = {name: architectures.read_config(record).layers for name, (record, _) in published.CHECKPOINTS.items()}
  local, full = LayerSpec(window=512), LayerSpec(rope_base=1e6)
  assert layers['gemma-3-1b'] == ([local] * 5 + [full]) * 4 + [local] * 2
  assert layers['gemma-3-4b'][5] == LayerSpec(rope_base=1e6, rope_scaling='linear', rope_factor=8.0)
  assert layers['gemma-3-4b'][4] == LayerSpec(window=1024)
  assert layers['gemma-2-2b'] == [LayerSpec(window=4096), LayerSpec()]
  assert layers['Qwen2.5-7B'] == [LayerSpec(rope_base=1e6)]
  assert layers['Mistral-7B-v0.1'] == [LayerSpec(window=4096)]
  (llama,) = layers['Llama-3.1-8B']
  turns = {'rope_slow_turns': 1.0, 'rope_fast_turns': 4.0}
  assert llama == LayerSpec(rope_base=5e5, rope_scaling='llama3', rope_factor=8.0, rope_original_length=8192, **turns)
  assert [spec.window for spec in layers['gpt-oss-20b']] == [128, 0]
  assert not layers['gpt-oss-20b'][0].rope_truncate


@pytest.mark.parametrize('name', WRITTEN)
def test_every_field_has_one_origin(name):
  (family,) = (family for family in FAMILIES if family.name == name)
  filled = [entry.field for entry in family.entries if entry.field]
  constants = list(family.constants({'width': 16}))
  fields = [field.name for field in dataclasses.fields(DecoderConfig)]
  assert sorted([*filled, *constants, *families.RUN, 'layers']) == sorted(fields)


OLD_AND_NEW = [
  (
    'LlamaForCausalLM',
    {'rope_theta': 500.0, 'rope_scaling': {'rope_type': 'llama3', **LLAMA3}},
    {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 500.0, **LLAMA3}},
  ),
  (
    'LlamaForCausalLM',
    {'rope_theta': 500, 'rope_scaling': {'type': 'linear', 'factor': 2}},
    {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 2.0}},
  ),
  ('MistralForCausalLM', {'sliding_window': 3}, {'sliding_window': 3, 'layer_types': [LOCAL] * 4}),
  (
    'Qwen2ForCausalLM',
    {'use_sliding_window': True, 'sliding_window': 3, 'max_window_layers': 2},
    {'use_sliding_window': True, 'sliding_window': 3, 'layer_types': [FULL, FULL, LOCAL, LOCAL]},
  ),
  ('Qwen3ForCausalLM', {'sliding_window': 3}, {'sliding_window': None, 'layer_types': [FULL] * 4}),
  ('Gemma2ForCausalLM', {'sliding_window': 3}, {'sliding_window': 3, 'layer_types': [LOCAL, FULL] * 2}),
  (
    'Gemma3ForCausalLM',
    {
      'sliding_window_pattern': 4,
      'rope_theta': 1000.0,
      'rope_local_base_freq': 100.0,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    },
    {
      'layer_types': [LOCAL, LOCAL, LOCAL, FULL],
      'rope_parameters': {
        FULL: {'rope_type': 'linear', 'rope_theta': 1000.0, 'factor': 8.0},
        LOCAL: {'rope_type': 'default', 'rope_theta': 100.0},
      },
    },
  ),
  (
    'Phi3ForCausalLM',
    {'partial_rotary_factor': 0.5, 'rope_theta': 500.0},
    {'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5, 'rope_theta': 500.0}},
  ),
  (
    'Phi3ForCausalLM',
    {'original_max_position_embeddings': 8, 'max_position_embeddings': 64, 'rope_scaling': {'type': 'su', **LONG}},
    {
      'original_max_position_embeddings': 8,
      'max_position_embeddings': 64,
      'rope_parameters': {'rope_type': 'longrope', 'original_max_position_embeddings': 8, **LONG},
    },
  ),
  (
    'GptOssForCausalLM',
    {'rope_theta': 150000, 'rope_scaling': None},
    {
      'rope_parameters': {
        'rope_type': 'yarn',
        'rope_theta': 150000.0,
        'factor': 32.0,
        'truncate': False,
        'original_max_position_embeddings': 4096,
      }
    },
  ),
]


@pytest.mark.parametrize('name, old, new', OLD_AND_NEW)
def test_old_and_new_style_are_the_same_model(name, old, new):
  assert read(name, **old) == read(name, **new) != read(name, vocab_size=12)


@pytest.mark.parametrize('name, old, new', OLD_AND_NEW)
def test_round_trip(name, old, new):
  config = read(name, **new)
  assert again(name, config) == config


def yarn(**entries):
  scaling = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64, **entries}
  (spec,) = read('LlamaForCausalLM', rope_scaling=scaling).layers
  assert again('LlamaForCausalLM', small('LlamaForCausalLM', spec)).layers == [spec]
  return spec


def test_yarn():
  assert yarn() == yarn(beta_fast=32, beta_slow=None, truncate=True)
  assert yarn().rotary().scaling.beta_fast == 32 and yarn().rope_attention_factor == 0
  assert yarn(beta_fast=8, beta_slow=0.5).rope_fast_turns == 8
  assert yarn(truncate=False).rope_truncate is False
  assert yarn(attention_factor=1.25).rope_attention_factor == 1.25
  magnitude = lambda m: 0.1 * m * math.log(4) + 1
  assert yarn(mscale=0.7, mscale_all_dim=2.0).rope_attention_factor == pytest.approx(magnitude(0.7) / magnitude(2.0))
  assert yarn(mscale=0.7).rope_attention_factor == 0  # by itself it says nothing
  assert yarn(factor=None, original_max_position_embeddings=512).rope_factor == 4  # max_position_embeddings / 512


def test_longrope_takes_the_list_of_the_length():
  entries = {'original_max_position_embeddings': 8, 'max_position_embeddings': 64}
  of = lambda length: read('Phi3ForCausalLM', length, rope_scaling={'type': 'longrope', **LONG}, **entries).layers[0]
  assert [of(length).rope_factors for length in (None, 64, 9, 8, 1)] == [[2.0, 4.0]] * 3 + [[1.0, 1.5]] * 2
  assert of(8).rope_factor == 8 and of(8).rope_original_length == 8 and of(8).rope_attention_factor == 0


@pytest.mark.parametrize('length', [None, 8])
def test_longrope_keeps_both_lists_in_settings(length):
  record = {'architectures': ['Phi3ForCausalLM'], **SMALL, 'original_max_position_embeddings': 8}
  record |= {'max_position_embeddings': 64, 'rope_scaling': {'type': 'longrope', **LONG}}
  form = architectures.find('Phi3ForCausalLM')
  config, settings = architectures.read_config(record, length), form.settings(record)
  written = architectures.config_json(form, config, settings)
  assert written['rope_scaling'] == record['rope_scaling'] and written['max_position_embeddings'] == 64
  native = architectures.config_json(architectures.find('AttnloomForCausalLM'), config, settings)
  assert native['longrope'] == LONG
  settings['longrope'] = {'short_factor': [1.0, 1.0], 'long_factor': [1.0, 1.0]}
  with pytest.raises(ValueError, match='expected rope_factors='):
    architectures.config_json(form, config, settings)


@pytest.mark.parametrize('length', [None, 8])
@pytest.mark.parametrize('factor', [1.0, 9.0])
def test_longrope_with_a_factor_of_its_own_keeps_the_lengths(factor, length):
  """A factor that is not the quotient of the lengths is written, and neither length is made to fit it."""
  record = {'architectures': ['Phi3ForCausalLM'], **SMALL, 'original_max_position_embeddings': 8}
  record |= {'max_position_embeddings': 64, 'rope_scaling': {'type': 'longrope', **LONG, 'factor': factor}}
  form = architectures.find('Phi3ForCausalLM')
  config = architectures.read_config(record, length)
  written = architectures.config_json(form, config, form.settings(record))
  assert written['max_position_embeddings'] == 64 and written['rope_scaling']['factor'] == factor
  assert architectures.read_config(written, length) == config


def test_settings_are_what_the_config_does_not_hold():
  form = architectures.find('LlamaForCausalLM')
  settings = form.settings(published.LLAMA31_8B)
  assert settings['eos_token_id'] == 128001 and settings['max_position_embeddings'] == 131072
  assert not {'rope_theta', 'rope_scaling', 'hidden_size', 'mlp_bias'} & set(settings)
  written = architectures.config_json(form, architectures.read_config(published.LLAMA31_8B), settings)
  assert {key: written[key] for key in published.LLAMA31_8B} == published.LLAMA31_8B
  gpt_oss = architectures.find('GptOssForCausalLM').settings(published.GPT_OSS_20B)
  assert 'quantization_config' not in gpt_oss
  both = architectures.find('Gemma3ForConditionalGeneration').settings(published.GEMMA3_4B)
  assert both['eos_token_id'] == [1, 106] and not {'text_config', 'vision_config'} & set(both)


def test_settings_that_change_the_config_are_refused():
  form = architectures.find('LlamaForCausalLM')
  settings = {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 2.0}}
  with pytest.raises(ValueError, match='settings change layers of the config'):
    architectures.config_json(form, small('LlamaForCausalLM'), settings)


EXPRESSIBLE = [
  ('LlamaForCausalLM', small('LlamaForCausalLM', kv_heads=0, head_dim=0, mlp_width=0, mlp='geglu', attn_bias='qkvo')),
  ('LlamaForCausalLM', small('LlamaForCausalLM', embed_scale=0, attn_scale=0.5, layers=[LayerSpec()] * 2)),
  (
    'LlamaForCausalLM',
    small('LlamaForCausalLM', LayerSpec(rope_scaling='yarn', rope_factor=3.0, rope_original_length=32)),
  ),
  (
    'LlamaForCausalLM',
    small(
      'LlamaForCausalLM',
      LayerSpec(rope_scaling='longrope', rope_factor=2.5, rope_original_length=31, rope_factors=[1.0, 3.0]),
    ),
  ),
  ('MistralForCausalLM', small('MistralForCausalLM', LayerSpec(), head_dim=6)),
  ('Qwen2ForCausalLM', small('Qwen2ForCausalLM', LayerSpec(window=5), LayerSpec())),
  ('Qwen3ForCausalLM', small('Qwen3ForCausalLM', LayerSpec(window=1), attn_bias='qkvo')),
  ('Gemma2ForCausalLM', small('Gemma2ForCausalLM', LayerSpec(), attn_scale=144**-0.5, attn_soft_cap=0.0)),
  ('Gemma2ForCausalLM', small('Gemma2ForCausalLM', LayerSpec(window=9), LayerSpec(), LayerSpec(), LayerSpec(window=9))),
  ('Gemma3ForCausalLM', small('Gemma3ForCausalLM', LayerSpec(window=9, rope_base=50.0))),
  ('Gemma3ForCausalLM', small('Gemma3ForCausalLM', LayerSpec(rope_base=50.0, rope_scaling='linear', rope_factor=2.0))),
  ('Gemma3ForCausalLM', small('Gemma3ForCausalLM', LayerSpec(window=3), LayerSpec(rope_base=50.0), logit_soft_cap=9.0)),
  (
    'Phi3ForCausalLM',
    small('Phi3ForCausalLM', LayerSpec(rope_fraction=0.6, window=3), width=40, head_dim=10),
  ),
  (
    'Phi3ForCausalLM',
    small(
      'Phi3ForCausalLM',
      LayerSpec(
        rope_scaling='longrope',
        rope_factor=math.pi,
        rope_original_length=16,
        rope_factors=[1.0, 2.0],
        rope_attention_factor=1.5,
      ),
    ),
  ),
  ('Olmo2ForCausalLM', small('Olmo2ForCausalLM', tied_embeddings=True, norm_eps=1e-3)),
  ('GptOssForCausalLM', small('GptOssForCausalLM', LayerSpec(window=2), attn_bias='', experts=3, experts_per_token=3)),
]


@pytest.mark.parametrize('name, config', EXPRESSIBLE)
def test_written_configs_are_read_as_they_were(name, config):
  """Up to spelling: 0s that mean a number become that number, patterns of layers the shortest."""
  assert again(name, config) == architectures.normal(config)
  run = dataclasses.replace(config, scan=True, remat='full', dtype='bfloat16', param_dtype='bfloat16')
  assert again(name, run) == architectures.normal(config)


@pytest.mark.parametrize('width', range(2, 200, 2))
def test_every_share_of_a_head_comes_back(width):
  for channels in range(2, width + 1, 2):
    config = small('Phi3ForCausalLM', LayerSpec(rope_fraction=channels / width), width=4 * width, head_dim=width)
    share = architectures.find('Phi3ForCausalLM').write_config(config)['partial_rotary_factor']
    assert int(share * width) == channels  # the channels that the published class rotates
    if channels in (2, width // 2, width):
      assert again('Phi3ForCausalLM', config).layers[0].rope_fraction == channels / width


def test_normal_spelling_is_the_same_model():
  config = DecoderConfig(width=64, heads=4, layers=[LayerSpec(), LayerSpec(window=4)] * 2, attn_scale=0.25)
  normal = architectures.normal(config)
  assert normal.layers == [LayerSpec(), LayerSpec(window=4)] and normal.attn_scale == 0
  assert (normal.kv_heads, normal.head_dim, normal.mlp_width, normal.embed_scale) == (4, 16, 192, 2.0)
  assert architectures.normal(normal) == normal


NATIVE = DecoderConfig(
  layers=[LayerSpec(chunk=8), LayerSpec(rope_scaling='ntk', rope_factor=2.0)],
  width=64,
  sinks=True,
  qk_norm='all',
  scan=True,
  dtype='bfloat16',
)


def test_native_form_takes_any_config():
  assert again('AttnloomForCausalLM', NATIVE) == NATIVE
  sources = architectures.find('AttnloomForCausalLM').sources(NATIVE)
  assert sources['blocks.3.mixer.sinks'] == Source('blocks.3.mixer.sinks')
  assert architectures.shapes(architectures.find('AttnloomForCausalLM'), NATIVE)['embed.table'] == (256, 64)


def test_gemma3_with_images():
  form = architectures.find('Gemma3ForConditionalGeneration')
  config = form.read_config(published.GEMMA3_4B, None)
  assert form.sources(config)['norm.scale'] == Source('language_model.model.norm.weight')
  assert form.ignored('vision_tower.vision_model.head.probe', config)
  assert form.ignored('multi_modal_projector.mm_soft_emb_norm.weight', config)
  assert not form.ignored('language_model.model.norm.weight', config)
  with pytest.raises(ValueError, match='expected Gemma3ForCausalLM'):
    form.write_config(config)
  with pytest.raises(ValueError, match='tie_word_embeddings=False'):
    form.read_config({**published.GEMMA3_4B, 'tie_word_embeddings': False}, None)


def test_tensors_that_hold_nothing():
  form, config = architectures.find('LlamaForCausalLM'), small('LlamaForCausalLM')
  assert form.ignored('model.layers.0.self_attn.rotary_emb.inv_freq', config)
  assert form.ignored('model.rotary_emb.inv_freq', config)
  assert not form.ignored('model.layers.0.self_attn.q_proj.weight', config)
