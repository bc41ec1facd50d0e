"""The small modules of a decoder: linear maps, RMSNorm, embedding, MLPs.

Parameters are kept in `param_dtype` and products computed in `dtype`.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
  """y = x W + b, computed in `dtype`; with an adapter y = x W + b + (alpha / rank) (x A) B.

  A is [in, rank], B [rank, out]. They are parameters `lora_a` and `lora_b` beside `kernel`, kept in at least float32.
  Source of the adapter: arXiv:2106.09685 (LoRA).

  Args:
    width_in: channels of x.
    width_out: channels of y.
    has_bias: whether there is a b, zero at the start.
    std: standard deviation of W at the start; None means width_in ** -0.5.
    dtype: of the product.
    param_dtype: of W and b.
  """

  def __init__(self, width_in, width_out, *, has_bias=False, std=None, dtype, param_dtype, rngs):
    std = width_in**-0.5 if std is None else std
    self.dtype = dtype
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (width_in, width_out), param_dtype))
    self.bias = nnx.Param(jnp.zeros(width_out, param_dtype)) if has_bias else None
    self.adapter_scale, self.lora_a, self.lora_b = 0.0, None, None

  def add_adapter(self, rank, alpha, key):
    """Adds an adapter of this rank that changes nothing yet: A is random, of standard deviation in ** -0.5, B zero."""
    width_in, width_out = self.kernel.shape
    dtype = jnp.promote_types(self.kernel.dtype, jnp.float32)
    self.adapter_scale = alpha / rank
    self.lora_a = nnx.data(nnx.Param(width_in**-0.5 * jax.random.normal(key, (width_in, rank), dtype)))
    self.lora_b = nnx.data(nnx.Param(jnp.zeros((rank, width_out), dtype)))

  def drop_adapter(self):
    """Takes the adapter away."""
    self.adapter_scale, self.lora_a, self.lora_b = 0.0, nnx.static(None), nnx.static(None)

  def __call__(self, x, *, at_least_float32=False):
    """[..., in] -> [..., out] in dtype, or with sums kept and returned in at least float32."""
    out = jnp.promote_types(self.dtype, jnp.float32) if at_least_float32 else self.dtype
    x = x.astype(self.dtype)
    y = self._product(x, self.kernel, out)
    if self.lora_a is not None:
      y += self.adapter_scale * self._product(self._product(x, self.lora_a, self.dtype), self.lora_b, out)
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)

  def _product(self, x, matrix, out):
    matrix = matrix[...].astype(self.dtype)
    if not is_partitioned():
      # One token axis: on CPU the weight's gradient is then a plain product, and a training step takes 0.85 of the
      # time. Not on a mesh: an axis made of two that may both be cut cannot be cut the same way.
      return jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, preferred_element_type=out).reshape(*x.shape[:-1], -1)
    return jnp.matmul(x, matrix, preferred_element_type=out)


def is_partitioned():
  """Whether the current mesh (jax.set_mesh) has more than one device."""
  return any(size > 1 for size in jax.sharding.get_abstract_mesh().shape.values())


class Keys:
  """Random keys fold_in(key, 0), fold_in(key, 1), ...: those of nnx.Rngs(params=key), whose counter is a variable and
  takes most of the time of tracing a deep model."""

  def __init__(self, key):
    self.key, self.count = key, 0

  def params(self):
    """The next key."""
    self.count += 1
    return jax.random.fold_in(self.key, self.count - 1)


class RMSNorm(nnx.Module):
  """y = g x / sqrt(mean(x^2) + eps) over the last axis; the mean is at least float32. Source: arXiv:1910.07467.

  g is the parameter `scale`, or 1 + scale with `plus_one` (Gemma), which weight decay then draws to 1.
  """

  def __init__(self, width, *, eps, param_dtype, plus_one=False):
    self.eps, self.plus_one = eps, plus_one
    self.scale = nnx.Param(jnp.full(width, 0 if plus_one else 1, param_dtype))

  def __call__(self, x):
    acc = jnp.promote_types(x.dtype, jnp.float32)
    x_acc = x.astype(acc)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_acc), axis=-1, keepdims=True) + self.eps)
    scale = self.scale[...].astype(acc)
    return (x_acc * inverse * (1 + scale if self.plus_one else scale)).astype(x.dtype)


def norm(width, config):
  """The RMSNorm of a DecoderConfig."""
  return RMSNorm(width, eps=config.norm_eps, param_dtype=config.param_dtype, plus_one=config.norm_plus_one)


class Embed(nnx.Module):
  """Rows of a table times `scale`, and the same table (not scaled) as an output projection."""

  def __init__(self, vocab, width, *, scale, std, dtype, param_dtype, rngs):
    self.scale, self.dtype = scale, dtype
    self.table = nnx.Param(std * jax.random.normal(rngs.params(), (vocab, width), param_dtype))

  def __call__(self, tokens):
    """[B, T] ids -> [B, T, E]. An id outside the vocabulary gives NaN: nothing can be raised under jit."""
    # Rows are converted, not the table: gradients of a frequent token are then added up in param_dtype.
    rows = self.table[...].at[tokens].get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)
    return self.scale * rows.astype(self.dtype)

  def attend(self, x):
    """[B, T, E] -> [B, T, vocab] products with every row, at least float32."""
    acc = jnp.promote_types(self.dtype, jnp.float32)
    table = self.table[...].astype(self.dtype)
    return jnp.einsum('...e,ve->...v', x.astype(self.dtype), table, preferred_element_type=acc)


def clipped_swiglu(gate, up, limit=7.0, sharpness=1.702):
  """g sigmoid(1.702 g) (u + 1) with g = min(gate, 7) and u = clip(up, -7, 7). Source: arXiv:2508.10925 (gpt-oss)."""
  gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return gate * jax.nn.sigmoid(sharpness * gate) * (up + 1)


# down(f(gate(x), up(x))), arXiv:2002.05202
GATES = {
  'swiglu': lambda gate, up: jax.nn.silu(gate) * up,
  'geglu': lambda gate, up: jax.nn.gelu(gate) * up,
  'swiglu_clipped': clipped_swiglu,
}
PLAIN = {'gelu': jax.nn.gelu, 'relu2': lambda x: jnp.square(jax.nn.relu(x))}  # down(f(up(x)))


class MLP(nnx.Module):
  """The per-token part of a layer, gated or plain by its kind: a name in GATES or PLAIN."""

  def __init__(self, kind, width, hidden_width, *, has_bias, out_std, dtype, param_dtype, rngs):
    common = {'has_bias': has_bias, 'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    self.kind = kind
    self.gate = Linear(width, hidden_width, **common) if kind in GATES else None
    self.up = Linear(width, hidden_width, **common)
    self.down = Linear(hidden_width, width, std=out_std * hidden_width**-0.5, **common)

  def __call__(self, x):
    if self.gate is None:
      return self.down(PLAIN[self.kind](self.up(x)))
    return self.down(GATES[self.kind](self.gate(x), self.up(x)))
