"""models.hf.architectures: everything in a config.json or a DecoderConfig that is refused, and in what words."""

import dataclasses
import re

import pytest

from models.config import DecoderConfig, LayerSpec
from models.hf import architectures
from tests.models.hf.test_architectures import FULL, LOCAL, LONG, read, small

UNREADABLE = [
  ('LlamaForCausalLM', {'hidden_act': 'gelu'}, "hidden_act='gelu' (expected 'silu'"),
  ('LlamaForCausalLM', {'hidden_size': '16'}, "hidden_size='16' (expected int)"),
  ('LlamaForCausalLM', {'hidden_size': True}, 'hidden_size=True (expected int)'),
  ('LlamaForCausalLM', {'rms_norm_eps': None}, 'rms_norm_eps=None (expected float)'),
  ('LlamaForCausalLM', {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_type='dynamic' (expected one of"),
  ('LlamaForCausalLM', {'rope_scaling': {'rope_type': 'mrope'}}, "rope_type='mrope'"),
  ('LlamaForCausalLM', {'rope_scaling': {'rope_type': 'linear'}}, 'factor=None (expected float)'),
  ('LlamaForCausalLM', {'rope_scaling': [2.0]}, 'rope_scaling=[2.0] (expected dict or null)'),
  (
    'LlamaForCausalLM',
    {'rope_scaling': {'type': 'linear', 'factor': 2.0, 'alpha': 3}},
    "alpha=3 of rope_type 'linear'",
  ),
  ('LlamaForCausalLM', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'low_freq_factor=None'),
  ('LlamaForCausalLM', {'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'attention_factor': 0}}, 'attention_factor=0'),
  (
    'LlamaForCausalLM',
    {'rope_scaling': {'type': 'linear', 'factor': 2.0}, 'rope_parameters': {'rope_type': 'linear', 'factor': 3.0}},
    'beside rope_scaling=',
  ),
  ('LlamaForCausalLM', {'rope_scaling': {'rope_type': ['x']}}, "rope_type=['x'] (expected one of"),
  ('LlamaForCausalLM', {'rope_theta': 10**400}, '(expected float)'),
  ('LlamaForCausalLM', {'rope_scaling': {'type': 'yarn', 'factor': -3, 'mscale': 1, 'mscale_all_dim': 2}}, 'factor=-3'),
  ('LlamaForCausalLM', {'model_type': 'mistral', 'sliding_window': 4}, "model_type='mistral': expected 'llama'"),
  ('LlamaForCausalLM', {'num_hidden_layers': 10**8}, 'num_hidden_layers=100000000, expected at most 1024'),
  ('LlamaForCausalLM', {'head_dim': 2 * 10**9}, 'head_dim=2000000000, expected at most 65536'),
  ('Qwen2ForCausalLM', {'layer_types': [{}] * 4}, 'layer_types=[{}, {}'),
  (
    'Gemma3ForConditionalGeneration',
    {'text_config': {'final_logit_softcapping': 3.0}},
    'final_logit_softcapping=3.0 in text_config (expected null)',
  ),
  ('LlamaForCausalLM', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 (expected 1.0)'),
  ('LlamaForCausalLM', {'quantization_config': {'quant_method': 'gptq'}}, "quant_method='gptq' (expected none)"),
  ('LlamaForCausalLM', {'per_layer_config': {'0': {'hidden_size': 2}}}, 'per_layer_config='),
  ('LlamaForCausalLM', {'is_causal': False}, 'is_causal=False'),
  ('LlamaForCausalLM', {'num_hidden_layers': 0}, 'depth=0'),
  ('LlamaForCausalLM', {'num_key_value_heads': 3}, 'kv_heads=3'),
  ('MistralForCausalLM', {'sliding_window': 0}, 'sliding_window=0 (expected 1 or more'),
  ('MistralForCausalLM', {'sliding_window': 3, 'layer_types': [LOCAL, FULL] * 2}, 'layer_types=['),
  ('Qwen2ForCausalLM', {'layer_types': [LOCAL] * 4}, 'sliding_window=None with layer_types'),
  ('Qwen2ForCausalLM', {'layer_types': [FULL] * 3}, 'layer_types=['),
  ('Qwen3ForCausalLM', {'head_dim': None}, 'head_dim=None (expected int)'),
  ('Gemma2ForCausalLM', {'use_bidirectional_attention': True}, 'use_bidirectional_attention=True'),
  ('Gemma2ForCausalLM', {'query_pre_attn_scalar': 2.5}, 'query_pre_attn_scalar=2.5 (expected int)'),
  ('Gemma2ForCausalLM', {'query_pre_attn_scalar': 0}, 'query_pre_attn_scalar=0 (expected 1 or more)'),
  ('Gemma2ForCausalLM', {'layer_types': ['chunked_attention'] * 4}, "layer_types=['chunked_attention'"),
  ('Gemma2ForCausalLM', {'rope_parameters': {FULL: {'rope_theta': 1.0}}}, 'expected the same for all layers'),
  ('Gemma3ForCausalLM', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0'),
  ('Gemma3ForCausalLM', {'rope_parameters': {'rope_type': 'default'}}, "expected 'full_attention' and"),
  ('Phi3ForCausalLM', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_type='linear'"),
  ('Phi3ForCausalLM', {'rope_scaling': {'type': 'longrope', 'short_factor': [1.0, 1.0]}}, 'long_factor=None'),
  ('Phi3ForCausalLM', {'rope_scaling': {'type': 'su', **LONG, 'long_factor': [1, 'a']}}, "long_factor=[1, 'a']"),
  ('Phi3ForCausalLM', {'rope_scaling': {'type': 'su', **LONG, 'long_mscale': 1.2}}, 'long_mscale=1.2'),
  ('GptOssForCausalLM', {'swiglu_limit': 6.0}, 'swiglu_limit=6.0 (expected 7.0)'),
  ('GptOssForCausalLM', {'swiglu_alpha': 1.0}, 'swiglu_alpha=1.0 (expected 1.702)'),
  ('GptOssForCausalLM', {'quantization_config': {'quant_method': 'fp8'}}, "quant_method='fp8' (expected 'mxfp4')"),
]


@pytest.mark.parametrize('name, entries, words', UNREADABLE)
def test_entries_that_cannot_be_honoured(name, entries, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    read(name, **entries)


def test_all_that_cannot_be_honoured_is_named_at_once():
  with pytest.raises(ValueError) as caught:
    read(
      'LlamaForCausalLM', hidden_act='relu', rope_scaling={'type': 'dynamic'}, quantization_config={'quant_method': 'q'}
    )
  assert str(caught.value).startswith('config.json of LlamaForCausalLM cannot be honoured: ')
  assert all(words in str(caught.value) for words in ("hidden_act='relu'", "rope_type='dynamic'", "quant_method='q'"))


UNWRITABLE = [
  ('LlamaForCausalLM', small('LlamaForCausalLM', LayerSpec(chunk=4)), 'layers: chunk=4'),
  ('LlamaForCausalLM', small('LlamaForCausalLM', LayerSpec(window=4)), 'layers: window=4'),
  ('LlamaForCausalLM', small('LlamaForCausalLM', LayerSpec(rope_scaling='ntk', rope_factor=2.0)), "rope_scaling='ntk'"),
  ('LlamaForCausalLM', small('LlamaForCausalLM', LayerSpec(rope_fraction=0.5)), 'rope_fraction=0.5'),
  ('LlamaForCausalLM', small('LlamaForCausalLM', LayerSpec(rope_fraction=0)), 'rope_fraction=0'),
  (
    'LlamaForCausalLM',
    small('LlamaForCausalLM', LayerSpec(), LayerSpec(rope_base=99.0)),
    'layers: rope_base=10000.0 and 99.0',
  ),
  ('LlamaForCausalLM', small('LlamaForCausalLM', mlp='gelu'), "mlp='gelu' (expected 'swiglu'"),
  ('LlamaForCausalLM', small('LlamaForCausalLM', attn_bias='qkv'), "attn_bias='qkv' (expected '' or 'qkvo')"),
  ('LlamaForCausalLM', small('LlamaForCausalLM', width=18), 'width=18 to be a multiple of heads=4'),
  ('LlamaForCausalLM', small('LlamaForCausalLM', embed_scale=2.0), 'embed_scale=2.0 (expected 1.0)'),
  ('LlamaForCausalLM', small('LlamaForCausalLM', sinks=True), 'sinks=True (expected False)'),
  ('LlamaForCausalLM', small('LlamaForCausalLM', norms='post'), "norms='post' (expected 'pre')"),
  ('LlamaForCausalLM', small('LlamaForCausalLM', attn_scale=0.3), 'attn_scale=0.3'),
  ('LlamaForCausalLM', small('LlamaForCausalLM', experts=2, experts_per_token=1), 'experts=2'),
  (
    'MistralForCausalLM',
    small('MistralForCausalLM', LayerSpec(window=4), LayerSpec()),
    'layers: window=[0, 4] (expected the same',
  ),
  ('MistralForCausalLM', small('MistralForCausalLM', mlp_bias=True), 'mlp_bias=True'),
  (
    'Qwen2ForCausalLM',
    small('Qwen2ForCausalLM', LayerSpec(window=4), LayerSpec(window=5)),
    'layers: window=[4, 5] (expected one size',
  ),
  ('Qwen3ForCausalLM', small('Qwen3ForCausalLM', qk_norm='all'), "qk_norm='all' (expected 'head')"),
  ('Gemma2ForCausalLM', small('Gemma2ForCausalLM', attn_scale=0.3), 'attn_scale=0.3 (expected n ** -0.5'),
  ('Gemma2ForCausalLM', small('Gemma2ForCausalLM', norm_plus_one=False), 'norm_plus_one=False'),
  (
    'Gemma3ForCausalLM',
    small('Gemma3ForCausalLM', LayerSpec(window=4, rope_scaling='linear', rope_factor=2.0), LayerSpec()),
    "rope_scaling='linear' of a layer with a window",
  ),
  ('Phi3ForCausalLM', small('Phi3ForCausalLM', head_dim=6), 'head_dim=6 (expected width=16 / heads=4)'),
  (
    'Phi3ForCausalLM',
    small('Phi3ForCausalLM', LayerSpec(rope_scaling='linear', rope_factor=2.0)),
    "rope_scaling='linear'",
  ),
  ('GptOssForCausalLM', small('GptOssForCausalLM', mlp='swiglu'), "mlp='swiglu' (expected 'swiglu_clipped')"),
]


@pytest.mark.parametrize('name, config, words', UNWRITABLE)
def test_fields_that_cannot_be_expressed(name, config, words):
  with pytest.raises(ValueError, match=f'{name} cannot express .*{re.escape(words)}'):
    architectures.find(name).write_config(config)


def test_all_that_cannot_be_expressed_is_named_at_once():
  config = DecoderConfig(layers=[LayerSpec(window=4, chunk=8)], sinks=True, qk_norm='head')
  with pytest.raises(ValueError) as caught:
    architectures.find('LlamaForCausalLM').write_config(config)
  expected = ('embed_scale=4.0', "qk_norm='head'", 'sinks=True', 'layers: chunk=8', 'layers: window=4')
  assert all(words in str(caught.value) for words in expected)


@pytest.mark.parametrize(
  'decoder, words',
  [
    (None, 'decoder=None (expected the fields'),
    ({'widht': 64}, 'decoder.widht=64 (unknown)'),
    ({'width': 64.0}, 'decoder.width=64.0 (expected int)'),
    ({'width': None}, 'decoder.width=None (expected int)'),
    ({'sinks': 1}, 'decoder.sinks=1 (expected bool)'),
    ({'mlp': 3}, 'decoder.mlp=3 (expected str)'),
    ({'mlp': 'tanh'}, "decoder.mlp='tanh' must be one of"),
    ({'layers': {}}, 'decoder.layers={} (expected a list of layers)'),
    ({'layers': [{'window': '4'}]}, "decoder.layers[0].window='4' (expected int)"),
    ({'layers': [{}, {'windows': 4}]}, 'decoder.layers[1].windows=4 (unknown)'),
    ({'layers': [{'rope_factors': [1, None]}]}, 'rope_factors=[1, None] (expected a list of float)'),
  ],
)
def test_native_form_refuses(decoder, words):
  record = {'architectures': ['AttnloomForCausalLM'], **({} if decoder is None else {'decoder': decoder})}
  with pytest.raises(ValueError, match=re.escape(words)):
    architectures.read_config(record)


def test_native_form_names_all_that_is_wrong():
  record = {'architectures': ['AttnloomForCausalLM'], 'decoder': {'a': 1, 'width': 'b', 'layers': [{'c': 2}]}}
  with pytest.raises(ValueError, match=r"decoder.a=1 .*decoder.width='b' .*decoder.layers\[0\].c=2"):
    architectures.read_config(record)


@pytest.mark.parametrize(
  'names, words',
  [
    (['LlamaForCausalLm'], "nearest is 'LlamaForCausalLM'"),
    (['Qwen3MoeForCausalLM'], "nearest is 'Qwen3ForCausalLM' of LlamaForCausalLM, MistralForCausalLM"),
    (None, 'architectures=None, expected one of'),
    ([], r'architectures=\[\]'),
    ([{}], r'architectures=\[{}\]'),
    (['LlamaForCausalLM', 'MistralForCausalLM'], 'expected one of'),
  ],
)
def test_unknown_architectures(names, words):
  with pytest.raises(ValueError, match=words):
    architectures.read_config({'architectures': names})


def test_length_must_be_positive():
  with pytest.raises(ValueError, match='length=0 must be a whole number of at least 1'):
    read('LlamaForCausalLM', 0)


@pytest.mark.parametrize(
  'index, words',
  [
    ((slice(8, 16),), 'its parts do not make up 32'),  # rows of q
    ((slice(16, 32),), 'has not the 8 rows'),
    ((), 'has not the 8 rows'),
  ],
)
def test_parts_must_make_up_their_tensor(index, words):
  form, config = architectures.find('Phi3ForCausalLM'), small('Phi3ForCausalLM')
  path = 'blocks.1.mixer.k.kernel'

  def sources(config):
    table = form.sources(config)
    return {**table, path: dataclasses.replace(table[path], index=index)}

  assert architectures.shapes(form, config)['model.layers.1.self_attn.qkv_proj.weight'] == (32, 16)
  with pytest.raises(ValueError, match=words):
    architectures.shapes(dataclasses.replace(form, sources=sources), config)
