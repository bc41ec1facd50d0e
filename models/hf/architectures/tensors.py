"""Names of published tensors, and which parameter lies in each."""

from models.hf.architectures.record import Source

# The places of norms in a layer: ours and the published name. OLMo 2 and Gemma name the norm after attention as others
# name the one before the MLP.
BEFORE = {'mixer_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
AFTER = {'mixer_out_norm': 'post_attention_layernorm', 'mlp_out_norm': 'post_feedforward_layernorm'}
NORMS = {
  'pre': BEFORE,
  'post': AFTER,
  'both': {'mixer_norm': 'input_layernorm', 'mlp_norm': 'pre_feedforward_layernorm', **AFTER},
}


def separate(config, prefix='model.'):
  """{path: Source} where every projection is a tensor of its own (Llama and most others)."""
  table = _outside(config, prefix)
  for i in range(config.depth):
    ours, theirs = f'blocks.{i}.', f'{prefix}layers.{i}.'
    table |= _around(config, ours, theirs)
    for name in 'qkvo':
      has_bias = name in config.attn_bias
      table |= _linear(f'{ours}mixer.{name}', f'{theirs}self_attn.{name}_proj', has_bias)
    if config.experts:
      table |= _experts(config, f'{ours}mlp.', f'{theirs}mlp.')
      continue
    for name in ('gate', 'up', 'down'):
      table |= _linear(f'{ours}mlp.{name}', f'{theirs}mlp.{name}_proj', config.mlp_bias)
  return table


def fused(config, prefix='model.'):
  """{path: Source} where q, k, v are rows of one tensor, and gate and up of another (Phi-3)."""
  table = _outside(config, prefix)
  q, k = config.heads * config.D, config.K * config.D
  cuts = {'q': slice(0, q), 'k': slice(q, q + k), 'v': slice(q + k, q + 2 * k)}
  halves = {'gate': slice(0, config.F), 'up': slice(config.F, 2 * config.F)}
  for i in range(config.depth):
    ours, theirs = f'blocks.{i}.', f'{prefix}layers.{i}.'
    table |= _around(config, ours, theirs)
    for name, rows in cuts.items():
      table[f'{ours}mixer.{name}.kernel'] = Source(f'{theirs}self_attn.qkv_proj.weight', (rows,), transpose=True)
    for name, rows in halves.items():
      table[f'{ours}mlp.{name}.kernel'] = Source(f'{theirs}mlp.gate_up_proj.weight', (rows,), transpose=True)
    table |= _linear(f'{ours}mixer.o', f'{theirs}self_attn.o_proj', False)
    table |= _linear(f'{ours}mlp.down', f'{theirs}mlp.down_proj', False)
  return table


def _outside(config, prefix):
  """Embedding, last norm and output projection."""
  table = {'embed.table': Source(f'{prefix}embed_tokens.weight'), 'norm.scale': Source(f'{prefix}norm.weight')}
  if not config.tied_embeddings:
    table |= _linear('head', f'{prefix.removesuffix("model.")}lm_head', False)
  return table


def _around(config, ours, theirs):
  """The norms and sinks of a layer."""
  table = {f'{ours}{name}.scale': Source(f'{theirs}{other}.weight') for name, other in NORMS[config.norms].items()}
  if config.qk_norm:
    table |= {f'{ours}mixer.{name}.scale': Source(f'{theirs}self_attn.{name}.weight') for name in ('q_norm', 'k_norm')}
  if config.sinks:
    table[f'{ours}mixer.sinks'] = Source(f'{theirs}self_attn.sinks')
  return table


def _linear(ours, theirs, has_bias):
  table = {f'{ours}.kernel': Source(f'{theirs}.weight', transpose=True)}
  return {**table, f'{ours}.bias': Source(f'{theirs}.bias')} if has_bias else table


def _experts(config, ours, theirs):
  """Router and experts (gpt-oss): kernels are [expert, in, out]; gate and up take turns in the columns of one."""
  table = _linear(f'{ours}router', f'{theirs}router', config.mlp_bias)
  for name, start in (('gate', 0), ('up', 1)):
    turns = slice(start, None, 2)
    kernel = Source(f'{theirs}experts.gate_up_proj', (slice(None), slice(None), turns), packed='mxfp4')
    table[f'{ours}experts.{name}.kernel'] = kernel
    table[f'{ours}experts.{name}.bias'] = Source(f'{theirs}experts.gate_up_proj_bias', (slice(None), turns))
  table[f'{ours}experts.down.kernel'] = Source(f'{theirs}experts.down_proj', packed='mxfp4')
  table[f'{ours}experts.down.bias'] = Source(f'{theirs}experts.down_proj_bias')
  return table
