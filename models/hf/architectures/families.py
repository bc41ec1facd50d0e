"""The families of transformers that can be read and written.

Defaults are those of the configuration classes of transformers 5.23: a config.json leaves out what equals them.
"""

from models.hf.architectures import tensors
from models.hf.architectures.family import (
  Entry,
  Family,
  NoWindows,
  SameWindow,
  TypedWindows,
  cap,
  choice,
  flag,
  head_dim,
  only,
  sizes,
  whole,
)
from models.hf.architectures.rope import Rope

GATES = {'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu'}
BIASES = {False: '', True: 'qkvo'}
GEMMA = {
  'norms': 'both',
  'norm_plus_one': True,
  'embed_scale': lambda fields: fields['width'] ** 0.5,
}


def activation(key='hidden_act', default='silu'):
  return choice(key, 'mlp', default, GATES)


def attention_bias(default=False):
  return choice('attention_bias', 'attn_bias', default, BIASES)


def attention_scale():
  """query_pre_attn_scalar, a whole number n: scores are multiplied by n ** -0.5."""

  def read(value, fields):
    if value < 1:
      raise ValueError('expected 1 or more')
    return value**-0.5

  def write(value, config):
    n = round((value or config.D**-0.5) ** -2)
    if value and n**-0.5 != value:
      raise ValueError('expected n ** -0.5 of a whole n')
    return n

  return Entry('query_pre_attn_scalar', 256, 'attn_scale', (int,), read, write)


LLAMA = Family(
  name='LlamaForCausalLM',
  model_type='llama',
  entries=(
    *sizes(32000, 4096, 11008, 32, 32, None, head_dim(rule='divides'), 1e-6),
    activation(),
    attention_bias(),
    flag('mlp_bias', 'mlp_bias', False),
  ),
  fixed={},
  rope=Rope(),
  windows=NoWindows(),
  tensors=tensors.separate,
)

MISTRAL = Family(
  name='MistralForCausalLM',
  model_type='mistral',
  entries=(*sizes(32000, 4096, 14336, 32, 32, 8, head_dim(), 1e-6), activation()),
  fixed={},
  rope=Rope(max_length=131072),
  windows=SameWindow(4096),
  tensors=tensors.separate,
)

QWEN2 = Family(
  name='Qwen2ForCausalLM',
  model_type='qwen2',
  entries=(*sizes(151936, 4096, 22016, 32, 32, 32, head_dim(), 1e-6), activation()),
  fixed={'attn_bias': 'qkv'},
  rope=Rope(max_length=32768),
  windows=TypedWindows(4096, is_optional=True),
  tensors=tensors.separate,
)

QWEN3 = Family(
  name='Qwen3ForCausalLM',
  model_type='qwen3',
  entries=(*sizes(151936, 4096, 22016, 32, 32, 32, head_dim(128), 1e-6), activation(), attention_bias()),
  fixed={'qk_norm': 'head'},
  rope=Rope(max_length=32768),
  windows=TypedWindows(4096, is_optional=True),
  tensors=tensors.separate,
)

GEMMA2 = Family(
  name='Gemma2ForCausalLM',
  model_type='gemma2',
  entries=(
    *sizes(256000, 2304, 9216, 26, 8, 4, head_dim(256, 'divides'), 1e-6, tied=True),
    activation('hidden_activation', 'gelu_pytorch_tanh'),
    attention_bias(),
    attention_scale(),
    cap('attn_logit_softcapping', 'attn_soft_cap', 50.0),
    cap('final_logit_softcapping', 'logit_soft_cap', 30.0),
    only('use_bidirectional_attention', None, False),
  ),
  fixed=GEMMA,
  rope=Rope(max_length=8192),
  windows=TypedWindows(4096, period=2),
  tensors=tensors.separate,
)

GEMMA3 = Family(
  name='Gemma3ForCausalLM',
  model_type='gemma3_text',
  entries=(
    *sizes(262208, 2304, 9216, 26, 8, 4, head_dim(256, 'divides'), 1e-6, tied=True),
    activation('hidden_activation', 'gelu_pytorch_tanh'),
    attention_bias(),
    attention_scale(),
    only('attn_logit_softcapping', None),
    cap('final_logit_softcapping', 'logit_soft_cap', None),
    only('use_bidirectional_attention', False, None),
  ),
  fixed={**GEMMA, 'qk_norm': 'head'},
  rope=Rope(base=1e6, local_base=1e4, max_length=131072),
  windows=TypedWindows(4096, period=6, period_key='sliding_window_pattern'),
  tensors=tensors.separate,
)

PHI3 = Family(
  name='Phi3ForCausalLM',
  model_type='phi3',
  entries=(*sizes(32064, 3072, 8192, 32, 32, None, head_dim(rule='equals'), 1e-5), activation()),
  fixed={},
  rope=Rope(
    max_length=4096,
    types=('default', 'longrope'),
    aliases={'su': 'longrope', 'yarn': 'longrope'},
    original_length=4096,
    is_partial=True,
  ),
  windows=SameWindow(None),
  tensors=tensors.fused,
)

OLMO2 = Family(
  name='Olmo2ForCausalLM',
  model_type='olmo2',
  entries=(*sizes(50304, 4096, 11008, 32, 32, None, head_dim(), 1e-5), activation(), attention_bias()),
  fixed={'norms': 'post', 'qk_norm': 'all'},
  rope=Rope(),
  windows=NoWindows(),
  tensors=tensors.separate,
)

GPT_OSS = Family(
  name='GptOssForCausalLM',
  model_type='gpt_oss',
  entries=(
    *sizes(201088, 2880, 2880, 36, 64, 8, head_dim(64), 1e-5),
    attention_bias(True),
    whole('num_local_experts', 'experts', 128),
    whole('num_experts_per_tok', 'experts_per_token', 4),
    only('swiglu_alpha', 1.702),
    only('swiglu_limit', 7.0),
    only('hidden_act', 'silu'),
  ),
  fixed={'mlp': 'swiglu_clipped', 'mlp_bias': True, 'sinks': True},
  rope=Rope(
    base=150000.0,
    max_length=131072,
    default={
      'rope_type': 'yarn',
      'factor': 32.0,
      'beta_fast': 32.0,
      'beta_slow': 1.0,
      'truncate': False,
      'original_max_position_embeddings': 4096,
    },
  ),
  windows=TypedWindows(128, period=2),
  tensors=tensors.separate,
  quantized=('mxfp4',),
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, GPT_OSS)
