"""Products of wide numbers by sums of products of narrow ones: hi + lo + lo2, in columns of their own.

Matrix units multiply bfloat16, whose 8 bits lose positions beyond 256; three parts carry 24 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np


def columns(f, g, parts, dtype):
  """f, g with sum_r f g as before, but in numbers that a narrow type holds, a column for each product of two parts.

  Args:
    f: [..., R]; numpy arrays are known when a program is compiled, so that columns of zeros are left out.
    g: [..., R].
    parts: how many numbers a number is split into, 1 to 4; each carries 8 bits in bfloat16, 11 in float16.
    dtype: of the result. The parts are of this type too, or of bfloat16 if that is narrower.

  Returns:
    (f', g') [..., at most R parts (parts + 1) / 2].

  Raises:
    ValueError: parts out of range, or values beyond that of the type.
  """
  if not isinstance(parts, int) or not 1 <= parts <= 4:
    raise ValueError(f'parts={parts!r} must be an integer in 1..4')
  kind = dtype if jnp.finfo(dtype).bits < 32 else jnp.bfloat16
  for name, x in (('f / scale', f), ('g', g)):
    largest = 0 if isinstance(x, jax.core.Tracer) else np.abs(np.asarray(x)).max(initial=0)
    if largest > float(jnp.finfo(kind).max):
      raise ValueError(f'factor {name} has values up to {largest:.3g}, beyond the range of {jnp.dtype(kind).name}')
  f_parts, g_parts = _split(f, parts, kind), _split(g, parts, kind)
  # A product of parts a and b is of the size 2^(-8 (a + b)) in bfloat16: beyond `parts` it is below what is kept.
  pairs = [(a, b) for a in range(parts) for b in range(parts - a)]
  found = [(f_parts[a][..., r], g_parts[b][..., r]) for a, b in pairs for r in range(f.shape[-1])]
  found = [(x, y) for x, y in found if not (_is_zero(x) or _is_zero(y))]
  if not found:
    return f[..., :0].astype(dtype), g[..., :0].astype(dtype)
  return tuple(jnp.stack(side, axis=-1).astype(dtype) for side in zip(*found))


def _split(x, parts, narrow):
  """`parts` arrays of narrow numbers that sum to x as nearly as they can."""
  info = jnp.finfo(narrow)

  def rounded(x):
    if isinstance(x, np.ndarray):
      return x.astype(narrow).astype(x.dtype)
    # Not a cast there and back, which the compiler may remove as excess precision.
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)

  split, rest = [], x
  for _ in range(parts):
    split.append(rounded(rest))
    rest = rest - split[-1]
  return split


def _is_zero(x):
  return not isinstance(x, jax.core.Tracer) and not np.asarray(x).any()
