"""FlashBias: a bias of rank R as R more channels of queries and keys.

    softmax(scale q k' + F G') = softmax([scale q, F] [k, G]')        F [T, R], G [S, R]

so no [T, S] array is read, whatever computes the attention. Exact factors of published biases, factors by singular
values, and the product; trained factors are in attn/low_rank_fit.py.

    out = low_rank.attend(q, k, v, low_rank.alibi(bias.alibi_slopes(H), T), is_causal=True)
"""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import arguments, narrow, softmax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
  """A bias as a product of factors: bias[b, h, t, s] = sum_r f[b, h, t, r] g[b, h, s, r]. Add two to add the biases.

  Those of numpy arrays are known when a program is compiled, so that parts of them which are zero can be left out.

  Attributes:
    f: [1 or B, 1 or H, T, R], leading axes may be left out.
    g: [1 or B, 1 or H, S, R], likewise; or one row per key head K. Attention with grouped heads shares keys, so within
      a group g must not differ: put what belongs to a query head (slopes) into f.
  """

  f: Any
  g: Any

  @property
  def rank(self) -> int:
    """R, the channels that it adds."""
    return self.f.shape[-1]

  def dense(self) -> jax.Array:
    """The bias itself, [..., T, S]: O(TS) memory."""
    f, g = _checked(self)
    if f.shape[1] > g.shape[1] > 1 and f.shape[1] % g.shape[1] == 0:
      g = jnp.repeat(g, f.shape[1] // g.shape[1], axis=1)
    return jnp.einsum('bhtr,bhsr->bhts', f, g, precision='highest')

  def __add__(self, other: 'Factors') -> 'Factors':
    (f, g), (f2, g2) = _checked(self), _checked(other)
    return Factors(_side_by_side(f, f2), _side_by_side(g, g2))


def attend(q, k, v, factors: Factors, *, scale=None, parts=None, expand_heads=False, precision=None, **options):
  """Softmax attention with a low-rank bias.

      logit[t, s] = scale * q[t] . k[s] + sum_r f[t, r] g[s, r]

  Args:
    q: [B, T, H, D] queries; query head h reads key head h // (H // K).
    k: [B, S, K, D] keys.
    v: [B, S, K, V] values.
    factors: of the bias.
    scale: factor on q . k alone; None means D ** -0.5.
    parts: as in `augment`; None means as many as the type of q needs: the factors as they are for float32 and wider,
      3 parts for narrower types.
    expand_heads: repeat k and v for every query head, so that g may differ within a group.
    precision: of the matrix products; None means the highest, since raw positions in one bfloat16 pass, the default
      of float32 on TPUs, are wrong by whole units.
    **options: keywords of softmax.attend; not soft_cap, score or bias.

  Returns:
    As softmax.attend.

  Raises:
    ValueError: soft_cap or score (they would act on the bias too), bias (add its factors), factors that do not fit, or
      as softmax.attend.

  Source: arXiv:2505.12044.
  """
  for name, why in (
    ('soft_cap', 'the cap would bend the bias too'),
    ('score', 'it would act on the bias too'),
    ('bias', 'one of them is enough; factors add up, and so do dense biases'),
  ):
    if options.get(name) is not None:
      raise ValueError(f'{name} and low-rank factors exclude each other: {why}')
  q, k, v = (jnp.asarray(x) for x in (q, k, v))
  softmax.check_qkv(q, k, v)
  if parts is None and jnp.finfo(q.dtype).bits < 32:
    parts = 3
  if parts is None:
    factors = Factors(*(jnp.asarray(x, q.dtype) for x in _checked(factors)))  # the result has q's type
  if expand_heads:
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
  q, k, scale = augment(q, k, factors, scale, parts=parts, expand_heads=expand_heads)
  return softmax.attend(q, k, v, scale=scale, precision='highest' if precision is None else precision, **options)


def augment(q, k, factors: Factors, scale=None, *, parts=None, expand_heads=False, multiple_of=1):
  """Queries and keys that carry the bias: scale q . k + f . g = scale' q' . k'.

  Queries of less than 32 bits would lose by a factor, so they stay as they are, f is divided by the scale instead, and
  scale' = scale. Wider ones take the scale, and scale' = 1: then the bias is that of the factors to the last bit.

  Precision: factors hold raw positions. Rounded to bfloat16 they are exact below 256; with a slope of 1/2 the bias is
  wrong by up to 4 at 2048 tokens, 16 at 8192, 64 at 32768, next to the diagonal as well. So a factor that is wider
  than q makes the result as wide, or is split into `parts` numbers of q's type, hi + lo + lo2, in columns of their
  own: two parts carry 16 bits, three 24. Sums of products are float32 in either case, which leaves an error of
  2^-24 times the largest single product: 0.004 for positions up to 65536.

  Args:
    q: [B, T, H, D].
    k: [B, S, K, D].
    factors: of the bias.
    scale: on q . k, a finite number; None means D ** -0.5.
    parts: None: the factors as they are, and the wider type wins. n: every factor as n numbers of q's type (bfloat16
      if that is wider), R n (n + 1) / 2 columns, fewer where the values are known and a part is zero: ALiBi to 65536
      tokens with slopes that are powers of two needs 4, if the scale is one too.
    expand_heads: repeat k for every query head, so that g may differ within a group. The caller repeats v.
    multiple_of: pad the width with zeros to a multiple of this.

  Returns:
    (q' [B, T, H, D + R'], k' [B, S, K, D + R'] (H heads with expand_heads), scale'). Without factors, R = 0, all three
    are those that came.

  Raises:
    ValueError: factors that do not fit q and k, g that differs within a group of query heads, or a scale that is no
      finite number.

  Source: arXiv:2505.12044 section 3.1.
  """
  q, k = jnp.asarray(q), jnp.asarray(k)
  (B, T, H, D), (_, S, K, _) = q.shape, k.shape
  if multiple_of < 1:
    raise ValueError(f'multiple_of={multiple_of} must be at least 1')
  f, g = _checked(factors, B, H, T, S, K)
  if expand_heads:
    k = jnp.repeat(k, H // K, axis=2)
    g = _module(g).repeat(g, H // K, axis=1) if g.shape[1] == K else g
  else:
    g = _per_key_head(g, H, K)
  scale = D**-0.5 if scale is None else scale
  if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
    raise ValueError(f'scale={scale!r} is not a finite Python number')
  wide = q.dtype if parts is not None else jnp.result_type(q, f, g)
  if f.shape[-1] and (jnp.finfo(wide).bits >= 32 or scale == 0):
    q, scale = q.astype(wide) * scale, 1.0
  elif f.shape[-1]:
    f = f.astype(jnp.promote_types(f.dtype, jnp.float32)) / scale
  if parts is not None:
    f, g = narrow.columns(f, g, parts, q.dtype)
  q, k = (_with_columns(x, factor.astype(wide), multiple_of) for x, factor in ((q, f), (k, g)))
  return q, k, scale


def alibi(slopes, T: int, S: int | None = None, *, positions=None, kv_positions=None, is_causal=True) -> Factors:
  """ALiBi as factors, R = 2: bias = -slopes[h] (i - j) with f = [-m i, m] and g = [1, j].

  It is -m |i - j| where j <= i alone, so the attention must be causal. (The published example of FlashBias has the
  opposite sign, and favours what is far.)

  Args:
    slopes: [H].
    T: number of queries.
    S: number of keys; None means T.
    positions: int [T] or [B, T]; None means 0..T-1.
    kv_positions: int [S] or [B, S]; None means 0..S-1.
    is_causal: a statement of the caller; False is refused.

  Raises:
    ValueError: is_causal=False: |i - j| has full rank; or slopes that are not [H].

  Source: arXiv:2108.12409 section 3; arXiv:2505.12044 table 1.
  """
  if not is_causal:
    raise ValueError('is_causal=False: -slope |i - j| on both sides has full rank, no factors give it; use bias.alibi')
  xp = _module(slopes, positions, kv_positions)
  slopes = xp.asarray(slopes)
  if slopes.ndim != 1 or not jnp.issubdtype(slopes.dtype, jnp.floating):
    raise ValueError(f'slopes have shape {slopes.shape} and dtype {slopes.dtype}, expected floating point [H]')
  i = _places('positions', positions, T, slopes.dtype, xp)
  j = _places('kv_positions', kv_positions, T if S is None else S, slopes.dtype, xp)
  m = slopes[:, None]
  f = xp.stack([-m * i, xp.broadcast_to(m, (i.shape[0], len(slopes), T))], axis=-1)
  return Factors(f, xp.stack([xp.ones_like(j), j], axis=-1))


def distance(x, y=None, *, query_factor=1.0, key_factor=1.0, power=2) -> Factors:
  """Squared distances of points as factors, R = n + 2: query_factor[t] key_factor[s] |x[t] - y[s]|^2.

      f = query_factor [|x|^2, 1, -2 x],    g = key_factor [1, |y|^2, y]

  With positions [T, 1] it is (i - j)^2, R = 3. The terms cancel: expect an error of 2^-24 of the largest |x|^2, so
  points are best centred.

  Args:
    x: [..., T, n] points of the queries, leading axes as in Factors.
    y: [..., S, n] points of the keys; None means x.
    query_factor: a number or [..., T]; -1 favours what is near.
    key_factor: a number or [..., S].
    power: 2; the distance itself has full rank.

  Raises:
    ValueError: a power other than 2, or points of different dimensions.

  Source: arXiv:2505.12044 table 1.
  """
  if power != 2:
    raise ValueError(f'power={power}: only the squared distance has a low rank, the distance itself has full rank')
  y = x if y is None else y
  xp = _module(x, y, query_factor, key_factor)
  x, y = xp.asarray(x), xp.asarray(y)
  if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
    raise ValueError(f'x has shape {x.shape} and y {y.shape}, expected [..., T, n] and [..., S, n]')
  a, c = (xp.sum(p * p, axis=-1, keepdims=True) for p in (x, y))
  f = xp.concatenate([a, xp.ones_like(a), -2 * x], axis=-1) * xp.asarray(query_factor, x.dtype)[..., None]
  g = xp.concatenate([xp.ones_like(c), c, y], axis=-1) * xp.asarray(key_factor, y.dtype)[..., None]
  return Factors(f, g)


def cosine(frequency, T: int, S: int | None = None, *, positions=None, kv_positions=None) -> Factors:
  """cos(frequency[h] (i - j)), R = 2: f = [cos w i, sin w i], g = [cos w j, sin w j].

  Args:
    frequency: a number, or [H] in radians per position; heads of a group cannot differ (`expand_heads`).
    T: number of queries.
    S: number of keys; None means T.
    positions: int [T] or [B, T]; None means 0..T-1.
    kv_positions: int [S] or [B, S]; None means 0..S-1.

  Source: arXiv:2505.12044 section 3.
  """
  xp = _module(frequency, positions, kv_positions)
  w = xp.atleast_1d(xp.asarray(frequency))
  w = w.astype(jnp.promote_types(w.dtype, jnp.float32))[:, None]
  i = _places('positions', positions, T, w.dtype, xp)
  j = _places('kv_positions', kv_positions, T if S is None else S, w.dtype, xp)
  return Factors(*(xp.stack([xp.cos(w * p), xp.sin(w * p)], axis=-1) for p in (i, j)))


def separable(a, b) -> Factors:
  """a[t] + b[s], R = 2: f = [a, 1], g = [1, b]. Args: a [..., T], b [..., S]."""
  xp = _module(a, b)
  a, b = xp.asarray(a), xp.asarray(b)
  return Factors(xp.stack([a, xp.ones_like(a)], axis=-1), xp.stack([xp.ones_like(b), b], axis=-1))


def box_rpb(x_table, y_table) -> Factors:
  """Box-to-pixel relative position bias, R = width + height: x_table[t, x] + y_table[t, y] at pixel y width + x.

  Args:
    x_table: [..., T, width], what the layer of an axis makes of the distances of box t to column x.
    y_table: [..., T, height].

  Source: arXiv:2308.01904 section 4.1 (plain DETR).
  """
  xp = _module(x_table, y_table)
  x_table, y_table = xp.asarray(x_table), xp.asarray(y_table)
  width, height = x_table.shape[-1], y_table.shape[-1]
  columns = np.tile(np.eye(width), (height, 1))
  rows = np.repeat(np.eye(height), width, axis=0)
  g = np.concatenate([columns, rows], axis=1).astype(jnp.result_type(x_table, y_table))
  return Factors(xp.concatenate([x_table, y_table], axis=-1), g)


def energy(bias) -> jax.Array:
  """Share of the sum of squares that the best factors of rank 1, 2, ... hold: [..., min(T, S)], rising to 1."""
  squares = jnp.linalg.svd(checked_bias(bias), compute_uv=False) ** 2
  total = jnp.sum(squares, axis=-1, keepdims=True)
  return jnp.where(total > 0, jnp.cumsum(squares, axis=-1) / jnp.where(total > 0, total, 1), 1)


def svd(bias, rank: int | None = None, *, share=0.995) -> Factors:
  """The best factors of a given bias by singular values; for a table that no longer changes, computed once.

  Args:
    bias: [..., T, S] of finite numbers.
    rank: R; None means the smallest that holds `share` of the energy in every head.
    share: of the sum of squares, in (0, 1]; 0.995 in the paper.

  Returns:
    Factors of rank R, at least float32; the singular values are shared out by their square roots. Without a rank it
    cannot be traced.

  Raises:
    ValueError: rank or share out of range; a bias that is no floating [..., T, S], is empty, or has NaN or infinities.

  Source: arXiv:2505.12044 section 3.2.
  """
  bias = checked_bias(bias)
  most = min(bias.shape[-2:])
  if rank is None:
    if not 0 < share <= 1:
      raise ValueError(f'share={share} must be in (0, 1]')
    if isinstance(bias, jax.core.Tracer):
      raise ValueError('rank=None: expected a number where the bias is traced, since shapes do not follow from values')
    # The last of the sums may be 1 - 1e-7 by rounding.
    rank = 1 + int(np.max(np.sum(np.asarray(energy(bias))[..., :-1] < share, axis=-1)))
  rank = arguments.integer('rank', rank, 0)
  if rank > most:
    raise ValueError(f'rank={rank} must be in 0..{most}, for a bias of shape {bias.shape}')
  u, s, vt = jnp.linalg.svd(bias, full_matrices=False)
  root = jnp.sqrt(s[..., None, :rank])
  return Factors(u[..., :rank] * root, jnp.swapaxes(vt[..., :rank, :], -1, -2) * root)


def checked_bias(bias) -> jax.Array:
  """A bias to be taken apart, at least float32.

  Raises:
    ValueError: it is no floating [..., T, S], is empty, or (if its values are known) has NaN or infinities.
  """
  bias = jnp.asarray(bias)
  if bias.ndim < 2 or 0 in bias.shape or not jnp.issubdtype(bias.dtype, jnp.floating):
    raise ValueError(f'bias has shape {bias.shape} and dtype {bias.dtype}, expected floating [..., T, S], not empty')
  if not isinstance(bias, jax.core.Tracer) and not np.isfinite(np.asarray(bias)).all():
    raise ValueError('bias has NaN or infinities, expected finite numbers (what is hidden belongs into a mask)')
  return bias.astype(jnp.promote_types(bias.dtype, jnp.float32))


def _checked(factors, B=None, H=None, T=None, S=None, K=None):
  """(f, g) with four axes each; ValueError unless they fit each other, and q and k where those are given."""
  f, g = (x if isinstance(x, np.ndarray) else jnp.asarray(x) for x in (factors.f, factors.g))
  for name, x in (('f', f), ('g', g)):
    if not 2 <= x.ndim <= 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f'factor {name} has shape {x.shape} and dtype {x.dtype}, expected floating [.., tokens, R]')
  if f.shape[-1] != g.shape[-1]:
    raise ValueError(f'factors f {f.shape} and g {g.shape} differ in the last axis, the rank R')
  f, g = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (f, g))
  if B is not None:
    for name, x, heads, tokens in (('f', f, {1, H}, T), ('g', g, {1, K, H}, S)):
      if x.shape[0] not in (1, B) or x.shape[1] not in heads or x.shape[2] != tokens:
        expected = ' or '.join(str(n) for n in sorted(heads))
        raise ValueError(f'factor {name} has shape {x.shape}, expected [1 or {B}, {expected}, {tokens}, R]')
  return f, g


def _side_by_side(a, b):
  if a.shape[2] != b.shape[2] or any(m != n and 1 not in (m, n) for m, n in zip(a.shape[:2], b.shape[:2])):
    raise ValueError(f'factors of shapes {a.shape} and {b.shape} do not fit each other')
  lead, xp = np.broadcast_shapes(a.shape[:2], b.shape[:2]), _module(a, b)
  return xp.concatenate([xp.broadcast_to(x, (*lead, *x.shape[2:])) for x in (a, b)], axis=-1)


def _per_key_head(g, H, K):
  """g [.., 1 or K, S, R] from g [.., 1 or K or H, S, R]."""
  if g.shape[1] in (1, K):
    return g
  G = H // K
  first = g[:, ::G]
  if isinstance(g, jax.core.Tracer) or not np.array_equal(np.asarray(g), np.repeat(np.asarray(first), G, axis=1)):
    raise ValueError(
      f'factor g has shape {g.shape}, a row for each of {H} query heads, and {K} key heads are shared by {G} each: '
      'within a group g must not differ. Give it per key head, put what belongs to query heads into f, '
      'or set expand_heads=True'
    )
  return first


def _with_columns(x, factor, multiple_of):
  """x [B, N, H, D] beside factor [1 or B, 1 or H, N, R] and zeros up to a multiple, [B, N, H, D']."""
  (B, N, H, D), factor = x.shape, jnp.asarray(factor)
  factor = jnp.broadcast_to(factor.transpose(0, 2, 1, 3), (B, N, H, factor.shape[-1]))
  dtype = jnp.promote_types(x.dtype, factor.dtype)
  fill = jnp.zeros((B, N, H, -(D + factor.shape[-1]) % multiple_of), dtype)
  return jnp.concatenate([x.astype(dtype), factor.astype(dtype), fill], axis=-1)


def _module(*xs):
  """numpy for what is known when a program is compiled, else jax.numpy."""
  return jnp if any(isinstance(x, jax.Array) for x in xs) else np


def _places(name, positions, n, dtype, xp):
  """Positions as [1 or B, 1, n] of floating point."""
  x = xp.arange(n) if positions is None else xp.asarray(positions)
  if x.ndim > 2 or x.shape[-1:] != (n,):
    raise ValueError(f'{name} have shape {x.shape}, expected [{n}] or [B, {n}]')
  return xp.atleast_2d(x)[:, None, :].astype(dtype)
