"""What a decoder is made of, as plain dataclasses that a command line can set field by field."""

import dataclasses
import math
import re

import jax

from attn import positions, softmax

MLPS = ('swiglu', 'geglu', 'swiglu_clipped', 'gelu', 'relu2')
NORMS = ('pre', 'post', 'both')
QK_NORMS = ('', 'head', 'all')
ATTN_BIASES = ('', 'qkv', 'qkvo')
REMATS = ('none', 'full', 'attention', 'dots')
ROPE_SCALINGS = ('', 'linear', 'ntk', 'yarn', 'llama3', 'longrope')
ADAPTED = r'.*\.mixer\.[qkvo]'  # linear maps that have an adapter if nothing else is said
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


@dataclasses.dataclass
class LayerSpec:
  """The mixer of one layer and its settings. 0 and '' mean off.

  Attributes:
    mixer: a name in models.mixers.MIXERS.
    window: tokens a query may look back, itself included; 0 means all.
    chunk: a query sees only keys of its own chunk of this many positions; 0 means no chunks.
    rope_base: base of the rotary frequencies.
    rope_fraction: share of the head's width that is rotated, from its front; 0 means no positions.
    rope_scaling: '', 'linear', 'ntk', 'yarn', 'llama3' or 'longrope', see attn/positions.py.
    rope_factor: how many times longer than rope_original_length the scaled positions reach.
    rope_original_length: length in tokens before scaling; 'yarn', 'llama3' and 'longrope' need it.
    rope_slow_turns: pairs that make this many turns over the original length, or fewer, are interpolated; 0 means 1.
      This and the next are for 'yarn' (beta_slow, beta_fast) and 'llama3' (its low and high frequency factors).
    rope_fast_turns: pairs that make this many, or more, are kept; 0 means 32 for 'yarn' and 4 for 'llama3'.
    rope_truncate: 'yarn' rounds the ends of its ramp to whole pairs.
    rope_attention_factor: of 'yarn' and 'longrope', on rotated channels; 0 means what their papers say.
    rope_factors: of 'longrope', what divides the frequency of each pair.
    remat: as the model's, for this layer; '' means model.remat.
  """

  mixer: str = 'attention'
  window: int = 0
  chunk: int = 0
  rope_base: float = 10000.0
  rope_fraction: float = 1.0
  rope_scaling: str = ''
  rope_factor: float = 1.0
  rope_original_length: int = 0
  rope_slow_turns: float = 0.0
  rope_fast_turns: float = 0.0
  rope_truncate: bool = True
  rope_attention_factor: float = 0.0
  rope_factors: list[float] = dataclasses.field(default_factory=list)
  remat: str = ''

  def validate(self, name='layer'):
    """Raises ValueError that names the field, its value and what was expected."""
    at_least(self, name, {'window': 0, 'chunk': 0, 'rope_original_length': 0})
    one_of(self, name, {'rope_scaling': ROPE_SCALINGS, 'remat': ('', *REMATS)})
    if not 1 < self.rope_base < math.inf:
      raise ValueError(f'{name}.rope_base={self.rope_base} must be a finite number above 1')
    if not 0 <= self.rope_fraction <= 1:
      raise ValueError(f'{name}.rope_fraction={self.rope_fraction} must lie in [0, 1]')
    if not 1 <= self.rope_factor < math.inf:
      raise ValueError(f'{name}.rope_factor={self.rope_factor} must be a finite number, 1 or more')
    if self.rope_factor != 1 and not self.rope_scaling:
      raise ValueError(f"{name}.rope_factor={self.rope_factor} has no effect with rope_scaling=''")
    if self.rope_scaling in ('yarn', 'llama3', 'longrope') and self.rope_original_length < 8:
      raise ValueError(
        f'{name}.rope_original_length={self.rope_original_length} must be at least 8 '
        f'with rope_scaling={self.rope_scaling!r}'
      )
    self._validate_ramp(name)

  def _validate_ramp(self, name):
    """ValueError for a setting that is out of range or has no effect with this scaling."""
    users = {
      'rope_slow_turns': ('yarn', 'llama3'),
      'rope_fast_turns': ('yarn', 'llama3'),
      'rope_attention_factor': ('yarn', 'longrope'),
      'rope_factors': ('longrope',),
    }
    for field, scalings in users.items():
      value = getattr(self, field)
      if value and self.rope_scaling not in scalings:
        raise ValueError(f'{name}.{field}={value} has no effect with rope_scaling={self.rope_scaling!r}')
      if not isinstance(value, list) and not 0 <= value < math.inf:
        raise ValueError(f'{name}.{field}={value} must be a finite number, 0 (the default) or above')
    if not self.rope_truncate and self.rope_scaling != 'yarn':
      raise ValueError(f'{name}.rope_truncate=False has no effect with rope_scaling={self.rope_scaling!r}')
    slow, fast = self._turns()
    if self.rope_scaling in ('yarn', 'llama3') and not slow < fast:
      raise ValueError(f'{name}.rope_slow_turns={slow} must be less than rope_fast_turns={fast}')
    if self.rope_scaling == 'longrope' and not all(0 < x < math.inf for x in self.rope_factors):
      raise ValueError(f'{name}.rope_factors={self.rope_factors} must be finite numbers above 0')

  def _turns(self):
    """Ends of the ramp in turns over the original length."""
    return self.rope_slow_turns or 1.0, self.rope_fast_turns or (4.0 if self.rope_scaling == 'llama3' else 32.0)

  def rotary(self):
    """The rotary positions of the layer, or None where it has none."""
    if not self.rope_fraction:
      return None
    (slow, fast), factor, length = self._turns(), self.rope_factor, self.rope_original_length
    scaling = {
      '': lambda: None,
      'linear': lambda: positions.Linear(factor),
      'ntk': lambda: positions.NTKAware(factor),
      'yarn': lambda: positions.YaRN(
        factor, length, fast, slow, self.rope_attention_factor, truncate=self.rope_truncate
      ),
      'llama3': lambda: positions.Llama3(factor, slow, fast, length),
      'longrope': lambda: positions.LongRope(tuple(self.rope_factors), factor, length, self.rope_attention_factor),
    }[self.rope_scaling]()
    return positions.Rotary(self.rope_base, self.rope_fraction, scaling)


@dataclasses.dataclass
class DecoderConfig:
  """A decoder-only language model. 0 and '' mean off, or the default named below.

  Attributes:
    vocab: number of token ids.
    width: E, width of the residual stream.
    depth: number of layers.
    heads: H, query heads.
    kv_heads: K, key heads, a divisor of heads; 0 means heads.
    head_dim: D, width of a head; 0 means width / heads.
    mlp_width: width inside the MLP; 0 means 4 width for a plain MLP and 8/3 width, rounded up to 64, for a gated one.
    mlp: 'swiglu', 'geglu', 'swiglu_clipped' (gated), 'gelu' or 'relu2' (plain), see models/layers.py.
    experts: N, MLPs of which a router chooses some for each token, see models/experts.py; 0 means one MLP for all.
    experts_per_token: how many it chooses.
    layers: pattern of layers, repeated up to depth, which must be a multiple of its length.
    norms: where a layer's RMSNorms stand: 'pre': x + f(norm(x)); 'post': x + norm(f(x)); 'both': x + norm(f(norm(x))).
    norm_plus_one: RMSNorms multiply by 1 + scale in place of scale (which then starts at 0).
    qk_norm: RMSNorm with a learned scale on q and k, before rotation: '' none, 'head' each head by itself, 'all' all
      heads together.
    attn_scale: factor on q . k; 0 means D ** -0.5.
    attn_soft_cap: c of c tanh(s / c) on attention scores; 0 means none.
    logit_soft_cap: the same on the output logits.
    sinks: one learned logit per head that takes probability and gives no value.
    attn_bias: which projections of attention have biases: '' none, 'qkv', or 'qkvo' with the output.
    mlp_bias: biases in the MLP.
    tied_embeddings: the embedding table is also the output projection.
    embed_scale: factor on the rows of the embedding table; 0 means sqrt(width) / 4. The table starts at a standard
      deviation of width ** -0.5, so that logits start near 1, which alone is little beside what layers add.
    norm_eps: added to the mean square in RMSNorm.
    adapter_rank: inner width of low-rank adapters beside linear maps, see models/layers.py; 0 means none.
    adapter_alpha: what they add is multiplied by adapter_alpha / adapter_rank; 0 means adapter_rank.
    adapter_match: which linear maps have one: regular expression that a whole path, as 'blocks.0.mixer.q', must match;
      '' means those of all mixers that are named q, k, v or o.
    remat: what the backward pass computes again: 'none'; 'full' (all inside a layer); 'attention' (all but the results
      of attention); 'dots' (all but these and the results of the projections). From least to most memory: 'full',
      'attention', 'dots', 'none'.
    scan: run the repeats of the pattern as one jax.lax.scan, so that compile time does not grow with depth.
    dtype: of activations and matrix products. Statistics and logits are at least float32.
    param_dtype: of parameters.
    implementation: of attention, a name in attn.softmax.IMPLEMENTATIONS; '' lets attn choose.
  """

  vocab: int = 256
  width: int = 256
  depth: int = 4
  heads: int = 4
  kv_heads: int = 0
  head_dim: int = 0
  mlp_width: int = 0
  mlp: str = 'swiglu'
  experts: int = 0
  experts_per_token: int = 0
  layers: list[LayerSpec] = dataclasses.field(default_factory=lambda: [LayerSpec()])
  norms: str = 'pre'
  norm_plus_one: bool = False
  qk_norm: str = ''
  attn_scale: float = 0.0
  attn_soft_cap: float = 0.0
  logit_soft_cap: float = 0.0
  sinks: bool = False
  attn_bias: str = ''
  mlp_bias: bool = False
  tied_embeddings: bool = True
  embed_scale: float = 0.0
  norm_eps: float = 1e-6
  adapter_rank: int = 0
  adapter_alpha: float = 0.0
  adapter_match: str = ''
  remat: str = 'none'
  scan: bool = False
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  implementation: str = ''

  @property
  def K(self):
    """Key heads."""
    return self.kv_heads or self.heads

  @property
  def D(self):
    """Width of a head."""
    return self.head_dim or self.width // self.heads

  @property
  def F(self):
    """Width inside the MLP."""
    if self.mlp_width:
      return self.mlp_width
    return -(-8 * self.width // (3 * 64)) * 64 if self.is_gated else 4 * self.width

  @property
  def input_scale(self):
    """Factor on the rows of the embedding table."""
    return self.embed_scale or self.width**0.5 / 4

  @property
  def is_gated(self):
    """Whether the MLP multiplies two projections."""
    return self.mlp in ('swiglu', 'geglu', 'swiglu_clipped')

  def has_adapter(self, path):
    """Whether the linear map at a path, as 'blocks.0.mixer.q', has a low-rank adapter."""
    return self.adapter_rank > 0 and bool(re.fullmatch(self.adapter_match or ADAPTED, path))

  def spec(self, layer):
    """The LayerSpec of layer 0, 1, ... depth - 1."""
    return self.layers[layer % len(self.layers)]

  def validate(self, name='model'):
    """Raises ValueError that names the field, its value and what was expected; returns self."""
    from models import mixers  # which imports flax: a config can be read without it

    at_least(self, name, {'vocab': 1, 'width': 1, 'depth': 1, 'heads': 1, 'kv_heads': 0, 'head_dim': 0, 'mlp_width': 0})
    at_least(self, name, {'experts': 0, 'experts_per_token': 0})
    one_of(self, name, {'mlp': MLPS, 'norms': NORMS, 'qk_norm': QK_NORMS, 'attn_bias': ATTN_BIASES, 'remat': REMATS})
    one_of(self, name, {'dtype': DTYPES, 'param_dtype': DTYPES, 'implementation': ('', *softmax.IMPLEMENTATIONS)})
    if (self.experts > 0) != (self.experts_per_token > 0) or self.experts_per_token > self.experts:
      raise ValueError(
        f'{name}.experts_per_token={self.experts_per_token} must lie in 1 .. experts={self.experts}, or both be 0'
      )
    if self.experts and not self.is_gated:
      raise ValueError(f'{name}.mlp={self.mlp!r} with experts={self.experts}: expected a gated MLP')
    for field in ('dtype', 'param_dtype'):
      if getattr(self, field) == 'float64' and not jax.config.read('jax_enable_x64'):
        raise ValueError(f"{name}.{field}='float64' needs JAX_ENABLE_X64=1: without it, jax computes in float32")
    if not self.layers:
      raise ValueError(f'{name}.layers=[] must name at least one layer')
    if self.depth % len(self.layers):
      raise ValueError(f'{name}.depth={self.depth} must be a multiple of len(layers)={len(self.layers)}')
    if self.heads % self.K:
      raise ValueError(f'{name}.kv_heads={self.kv_heads} must divide heads={self.heads}')
    if not self.head_dim and self.width % self.heads:
      raise ValueError(f'{name}.heads={self.heads} must divide width={self.width}, or give head_dim')
    for field in ('attn_soft_cap', 'attn_scale', 'logit_soft_cap', 'embed_scale'):
      if not 0 <= getattr(self, field) < math.inf:
        raise ValueError(f'{name}.{field}={getattr(self, field)} must be a finite number, 0 (off) or above')
    if not 0 < self.norm_eps < 1:
      raise ValueError(f'{name}.norm_eps={self.norm_eps} must lie between 0 and 1')
    self._validate_adapters(name)
    for i, spec in enumerate(self.layers):
      spec.validate(f'{name}.layers[{i}]')
      one_of(spec, f'{name}.layers[{i}]', {'mixer': tuple(mixers.MIXERS)})
      if spec.rope_fraction:
        try:
          positions.frequencies(spec.rotary(), self.D)
        except ValueError as e:
          raise ValueError(f'{name}.layers[{i}].rope_fraction={spec.rope_fraction}: {e}') from e
    return self

  def _validate_adapters(self, name):
    """ValueError for settings of adapters that are out of range or have no effect."""
    at_least(self, name, {'adapter_rank': 0})
    if not 0 <= self.adapter_alpha < math.inf:
      raise ValueError(f'{name}.adapter_alpha={self.adapter_alpha} must be a finite number, 0 (adapter_rank) or above')
    for field in ('adapter_alpha', 'adapter_match'):
      if getattr(self, field) and not self.adapter_rank:
        raise ValueError(f'{name}.{field}={getattr(self, field)!r} has no effect with adapter_rank=0')
    try:
      re.compile(self.adapter_match)
    except re.error as e:
      raise ValueError(f'{name}.adapter_match={self.adapter_match!r} must be a regular expression: {e}') from e


def at_least(record, name, least):
  """ValueError unless the integer fields of `record` reach the values of `least`."""
  for field, low in least.items():
    value = getattr(record, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
      raise ValueError(f'{name}.{field}={value!r} must be an integer, {low} or more')


def one_of(record, name, known):
  """ValueError unless the fields of `record` have one of the values in `known`."""
  for field, names in known.items():
    value = getattr(record, field)
    if value not in names:
      raise ValueError(f'{name}.{field}={value!r} must be one of {", ".join(map(repr, names))}')
