"""Score functions: any elementwise change of the logits, and the additive biases of published models as such functions.

    out = softmax.attend(q, k, v, is_causal=True, score=bias.alibi(bias.alibi_slopes(H)))
    out = softmax.attend(q, k, v, score=bias.score(lambda s, b, h, i, j, gain: s * gain[h], gain))

A bias as a function costs no [H, T, S] array: each implementation evaluates it on the tile at hand, forward and
backward. Biases of low rank can also ride in the heads' width (attn/low_rank.py).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import masks
from attn.masks.predicates import Tokens, column, row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score:
  """A function f(s, b, h, i, j, *arrays) of logits; made by `score` and the functions below. A pytree.

  Attributes:
    arrays: what f reads, differentiable.
    f: static, so functions that are to be one for `jax.jit` must be equal.
  """

  arrays: tuple[Any, ...]
  f: Callable = dataclasses.field(metadata={'static': True})

  def tile(self, s: jax.Array, q: Tokens, k: Tokens) -> jax.Array:
    """f on a tile.

    Args:
      s: [B, H, t, s] logits.
      q: the t queries.
      k: the s keys.

    Returns:
      [B, H, t, s] in s.dtype.

    Raises:
      ValueError: f returns another shape or no floating point, or reads a traced array that is not in `arrays`.
    """
    B, H = s.shape[:2]
    b, h = jnp.arange(B)[:, None, None, None], jnp.arange(H)[None, :, None, None]
    places = (b, h, jnp.asarray(row(q.position)), jnp.asarray(column(k.position)))
    self._refuse_hidden_arrays(s, *places)
    out = jnp.asarray(self.f(s, *places, *self.arrays))
    if not jnp.issubdtype(out.dtype, jnp.floating):
      raise ValueError(f'the score function {_name(self.f)} returned {out.dtype}, expected floating point (a logit)')
    if out.ndim > 4 or any(n not in (1, want) for n, want in zip(out.shape[::-1], s.shape[::-1])):
      raise ValueError(
        f'the score function {_name(self.f)} returned shape {out.shape}, expected {s.shape}: it must be elementwise'
      )
    return jnp.broadcast_to(out, s.shape).astype(s.dtype)

  def _refuse_hidden_arrays(self, *args):
    # An array that is being differentiated, batched or compiled and that f closes over would get no gradient in the
    # implementations that have a backward of their own. What f does not get as an argument is a constant of its trace.
    constants = jax.make_jaxpr(self.f)(*args, *self.arrays).consts
    hidden = [jnp.shape(x) for x in constants if isinstance(x, jax.core.Tracer)]
    if hidden:
      shapes = ', '.join(str(x) for x in hidden)
      raise ValueError(
        f'the score function {_name(self.f)} closes over traced arrays of shape {shapes}: '
        'declare them, as in bias.score(f, *arrays) with f(s, b, h, i, j, *arrays)'
      )


def score(f: Callable, *arrays) -> Score:
  """The logits s become f(s, b, h, i, j, *arrays), before the mask.

      logit[b, h, t, s] = f(cap(scale * q[b, t, h] . k[b, s]), b, h, i[t], j[s], *arrays)

  Args:
    f: elementwise in all it gets: s [B, H, t, s], the batch row b [B, 1, 1, 1], the query head h [1, H, 1, 1] and the
      positions, as masks see them, of queries i [1 or B, 1 or H, t, 1] and keys j [1 or B, 1 or H, 1, s]. It sees
      tiles, hidden pairs and padding (position -1) among them, and must be finite there, so that gradients are.
    *arrays: all arrays that f reads and that may be traced; f gets them whole, and they get gradients.

  Raises:
    ValueError: f is not callable.

  Source: the interface follows FlexAttention, arXiv:2412.05496.
  """
  if not callable(f):
    raise ValueError(f'f={f!r} is not callable, expected a function f(s, b, h, i, j, *arrays)')
  return Score(tuple(jnp.asarray(x) for x in arrays), f)


def as_score(x) -> Score:
  """A Score as it is; a plain function as a Score without arrays."""
  return x if isinstance(x, Score) else score(x)


def dense(x, T: int, S: int | None = None, *, batch=1, heads=1, positions=None, kv_positions=None, dtype=jnp.float32):
  """What a score makes of logits of zero, [batch, heads, T, S]: the bias, if it adds one. O(TS) memory, for tests.

  Args:
    x: a Score, or a function f(s, b, h, i, j).
    T: number of queries.
    S: number of keys; None means T.
    batch: B.
    heads: H.
    positions: int [T] or [B, T]; None means 0..T-1.
    kv_positions: int [S] or [B, S]; None means 0..S-1.
    dtype: of the logits.
  """
  S = T if S is None else S
  zeros = jnp.zeros((batch, heads, T, S), dtype)
  return as_score(x).tile(zeros, masks.tokens(T, positions), masks.tokens(S, kv_positions))


def alibi_slopes(H: int) -> np.ndarray:
  """Slopes [H] of ALiBi in float64: 2^(-8 (h + 1) / H) for H a power of two.

  Else those of the next lower power of two P, and then every second one of 2 P, as the authors' code has it.

  Raises:
    ValueError: H < 1.

  Source: arXiv:2108.12409 section 3, and `get_slopes` in https://github.com/ofirpress/attention_with_linear_biases.
  """
  if H < 1:
    raise ValueError(f'H={H} must be at least 1')
  power = 2 ** int(math.log2(H))
  whole = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
  between = [2.0 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * (H - power), 2)]
  return np.array(whole + between)


def alibi(slopes) -> Score:
  """A penalty on distance: s - slopes[h] |i - j|.

  Args:
    slopes: [H], positive to favour what is near; `alibi_slopes(H)` in the paper.

  Raises:
    ValueError: slopes are not [H] of floating point.

  Source: arXiv:2108.12409 section 3, which is causal; two-sided as here in its authors' notes on encoders.
  """
  return score(_alibi, _floating('slopes', slopes, 1))


def _alibi(s, b, h, i, j, slopes):
  _check_heads('slopes', slopes.shape[0], h, 'one per query head')
  return s - slopes.astype(s.dtype)[h] * jnp.abs(i - j).astype(s.dtype)


def table(values) -> Score:
  """A learned bias per clipped offset: s + values[h, clip(j - i, -R, R) + R].

  Args:
    values: [H, 2 R + 1], or [1, 2 R + 1] for all heads; entry R is the token itself, larger ones are later keys.

  Raises:
    ValueError: values have another shape or no floating point.

  Source: the clipping of arXiv:1803.02155 section 3.2.
  """
  values = _floating('values', values, 2)
  if values.shape[1] % 2 == 0:
    raise ValueError(f'values have shape {values.shape}, expected [H or 1, 2 R + 1]: an odd number of offsets')
  return score(_table, values)


def _table(s, b, h, i, j, values):
  R = values.shape[1] // 2
  return s + _read('values', values, h, jnp.clip(j - i, -R, R) + R).astype(s.dtype)


def t5_buckets(offsets, *, buckets=32, max_distance=128, is_bidirectional=True) -> np.ndarray:
  """The bucket of each offset key - query, as in T5: one each for near ones, then logarithmically wider.

      n = buckets, d = max(-offset, 0)                                     if causal
      n = buckets / 2, d = |offset|, and later keys n further on           if bidirectional
      bucket = d                                                           for d < m = n // 2
      bucket = min(n - 1, m + floor((n - m) ln(d / m) / ln(max_distance / m)))    else

  Computed in integers, so that no rounding of a logarithm moves a boundary.

  Args:
    offsets: int array, key position - query position.
    buckets: in all; even if bidirectional.
    max_distance: from here on everything is in the last bucket.
    is_bidirectional: later keys have buckets of their own; else they share bucket 0 with the token itself.

  Returns:
    int32, in the shape of offsets.

  Raises:
    ValueError: too few buckets, or a max_distance within the near ones.

  Source: arXiv:1910.10683 section 2.1; `_relative_position_bucket` in mesh_tensorflow's transformer_layers.py.
  """
  n = buckets // 2 if is_bidirectional else buckets
  near = n // 2
  if n < 2 or (is_bidirectional and buckets % 2):
    raise ValueError(f'buckets={buckets} must be at least 2, or even and at least 4 with is_bidirectional')
  if max_distance <= near:
    raise ValueError(f'max_distance={max_distance} must be above {near}, the number of buckets of a single distance')
  offsets = np.asarray(offsets)
  distance = np.abs(offsets) if is_bidirectional else np.maximum(-offsets, 0)
  bucket = np.minimum(distance, near).astype(np.int32)
  wide = n - near
  for step in range(1, wide):
    # The first d with wide ln(d / near) >= step ln(max_distance / near), the logarithms taken off.
    first = next(d for d in range(near, max_distance + 1) if d**wide * near**step >= max_distance**step * near**wide)
    bucket += distance >= first
  return bucket + (n * (offsets > 0)).astype(np.int32) if is_bidirectional else bucket


def t5_relative(values, *, is_bidirectional=True, max_distance=128) -> Score:
  """The relative bias of T5: s + values[bucket(j - i), h], with the buckets of `t5_buckets`.

  Args:
    values: [buckets, H], learned; 32 buckets in T5.
    is_bidirectional: True in encoders, False in decoders.
    max_distance: tokens; everything from there on shares the last bucket.

  Raises:
    ValueError: values are not [buckets, H], or as `t5_buckets`.

  Source: arXiv:1910.10683 section 2.1.
  """
  values = _floating('values', values, 2)
  f = _T5(int(max_distance), bool(is_bidirectional))
  f.buckets(values.shape[0])  # refuses what does not fit
  return score(f, values)


@dataclasses.dataclass(frozen=True)
class _T5:
  max_distance: int
  is_bidirectional: bool

  def buckets(self, n):
    return _t5_buckets_of_clipped(n, self.max_distance, self.is_bidirectional)

  def __call__(self, s, b, h, i, j, values):
    # The buckets no longer change beyond max_distance, so this is a clipped table whose entries are shared.
    return _table(s, b, h, i, j, values.T[:, self.buckets(values.shape[0])])


@functools.lru_cache(maxsize=64)
def _t5_buckets_of_clipped(buckets, max_distance, is_bidirectional):
  offsets = np.arange(-max_distance, max_distance + 1)
  return t5_buckets(offsets, buckets=buckets, max_distance=max_distance, is_bidirectional=is_bidirectional)


def grid_table(values, grid) -> Score:
  """A learned bias per offset on a grid of patches, as in Swin: s + values[index(y_i - y_j, x_i - x_j), h].

      index(dy, dx) = (dy + height - 1) (2 width - 1) + dx + width - 1

  and likewise for other numbers of axes. Position p stands at y = p // width, x = p % width (row-major); a pair in
  which a position is not on the grid (a class token at its end, say) gets no bias.

  Args:
    values: [prod(2 n - 1 for n in grid), H], learned.
    grid: lengths of the axes, (height, width) for images.

  Raises:
    ValueError: values do not fit the grid.

  Source: arXiv:2103.14030 section 3.2.
  """
  grid = tuple(int(n) for n in grid)
  values = _floating('values', values, 2)
  want = math.prod(2 * n - 1 for n in grid)
  if not grid or min(grid) < 1 or values.shape[0] != want:
    raise ValueError(f'values have shape {values.shape}, expected [{want}, H] for grid={grid}')
  return score(_Grid(grid), values)


@dataclasses.dataclass(frozen=True)
class _Grid:
  grid: tuple[int, ...]

  def __call__(self, s, b, h, i, j, values):
    index, stride = 0, math.prod(self.grid)
    for n in self.grid:
      stride //= n
      offset = (i // stride) % n - (j // stride) % n
      index = index * (2 * n - 1) + offset + n - 1
    on_grid = (i >= 0) & (i < math.prod(self.grid)) & (j >= 0) & (j < math.prod(self.grid))
    bias = _read('values', values.T, h, index)
    return s + jnp.where(on_grid, bias, 0).astype(s.dtype)


def _read(name, values, h, index):
  """values[h, index] for values [H or 1, N]."""
  if values.shape[0] == 1:
    return values[0][index]
  _check_heads(name, values.shape[0], h, 'one per query head, or a single one for all')
  return values[h, index]


def _check_heads(name, got, h, words):
  # An index beyond the end of an array reads its last entry in JAX, without complaint.
  if got != h.size:
    raise ValueError(f'{name} have {got} heads, expected {h.size}: {words}')


def _floating(name, x, axes):
  x = jnp.asarray(x)
  if x.ndim != axes or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{name} have shape {x.shape} and dtype {x.dtype}, expected {axes} axes of floating point')
  return x


def _name(f):
  return getattr(f, '__qualname__', type(f).__qualname__)
