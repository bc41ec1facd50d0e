"""The predicates that masks are made of, each evaluated on tiles and on boxes of positions; made by attn/masks.py."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2  # what `boxes` says; the order makes `&` a minimum and `|` a maximum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """A run of t tokens as masks see them: `index` [t] in its array, `position` [1 or B, t] in its text."""

  index: jax.Array
  position: jax.Array


class Mask:
  """A predicate on (query, key) pairs. Combine with `&`, `|`, `~`; read with `dense`, `tile` and `boxes`."""

  def tile(self, q: Tokens, k: Tokens, batch: int, heads: int) -> jax.Array:
    """Evaluates on every pair of q and k: bool [1 or B, 1 or H, t, s]."""
    raise NotImplementedError

  def boxes(self, q_low, q_high, k_low, k_high):
    """EMPTY, PARTIAL or FULL for boxes of positions (inclusive integer bounds, numpy, broadcast together).

    PARTIAL is always allowed; EMPTY and FULL are promises. An empty box is never computed.
    """
    return np.full(np.broadcast_shapes(*(np.shape(x) for x in (q_low, q_high, k_low, k_high))), PARTIAL, np.int8)

  def __and__(self, other):
    return And(self, _mask(other))

  def __or__(self, other):
    return Or(self, _mask(other))

  def __invert__(self):
    return Not(self)

  def __bool__(self):
    raise TypeError(
      'a mask has no single truth value: combine masks with & | ~ instead of `and` `or` `not`, '
      'and bracket them, as in causal() & (window(64) | sink(4))'
    )


def _static(**kwargs):
  return dataclasses.field(metadata={'static': True}, **kwargs)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(_static,))
def _register(cls):
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_register
class And(Mask):
  a: Mask
  b: Mask

  def tile(self, q, k, batch, heads):
    return self.a.tile(q, k, batch, heads) & self.b.tile(q, k, batch, heads)

  def boxes(self, *box):
    return np.minimum(self.a.boxes(*box), self.b.boxes(*box))


@_register
class Or(Mask):
  a: Mask
  b: Mask

  def tile(self, q, k, batch, heads):
    return self.a.tile(q, k, batch, heads) | self.b.tile(q, k, batch, heads)

  def boxes(self, *box):
    return np.maximum(self.a.boxes(*box), self.b.boxes(*box))


@_register
class Not(Mask):
  a: Mask

  def tile(self, q, k, batch, heads):
    return ~self.a.tile(q, k, batch, heads)

  def boxes(self, *box):
    return (FULL - self.a.boxes(*box)).astype(np.int8)


@_register
class Everything(Mask):
  def tile(self, q, k, batch, heads):
    return jnp.ones((1, 1, 1, 1), bool)

  def boxes(self, *box):
    return np.full_like(super().boxes(*box), FULL)


@_register
class Causal(Mask):
  fixed: int | None = _static()  # the offset as a number, or
  offset: Any  # as an array

  def tile(self, q, k, batch, heads):
    return _column(k) <= _row(q) + _either(self.fixed, self.offset)

  def boxes(self, q_low, q_high, k_low, k_high):
    known = _range(self.fixed, self.offset)
    if known is None:
      return super().boxes(q_low, q_high, k_low, k_high)
    return _verdict(k_low > q_high + known[1], k_high <= q_low + known[0])


@_register
class Window(Mask):
  left: int | None = _static()
  right: int | None = _static()

  def tile(self, q, k, batch, heads):
    ahead = _column(k) - _row(q)
    seen = jnp.ones_like(ahead, bool)
    if self.left is not None:
      seen &= ahead >= -self.left
    if self.right is not None:
      seen &= ahead <= self.right
    return seen

  def boxes(self, q_low, q_high, k_low, k_high):
    nearest, farthest = k_low - q_high, k_high - q_low  # the range of key - query
    low = -np.inf if self.left is None else -self.left
    high = np.inf if self.right is None else self.right
    return _verdict((farthest < low) | (nearest > high), (nearest >= low) & (farthest <= high))


@_register
class Chunked(Mask):
  size: int = _static()

  def tile(self, q, k, batch, heads):
    return _row(q) // self.size == _column(k) // self.size

  def boxes(self, q_low, q_high, k_low, k_high):
    q_low, q_high, k_low, k_high = (x // self.size for x in (q_low, q_high, k_low, k_high))
    return _verdict((q_high < k_low) | (q_low > k_high), (q_low == q_high) & (k_low == k_high) & (q_low == k_low))


@_register
class Prefix(Mask):
  fixed: int | None = _static()  # the length as a number, or
  length: Any  # as an array

  def tile(self, q, k, batch, heads):
    return _column(k) < _either(self.fixed, self.length)

  def boxes(self, q_low, q_high, k_low, k_high):
    known = _range(self.fixed, self.length)
    if known is None:
      return super().boxes(q_low, q_high, k_low, k_high)
    verdict = _verdict(k_low >= known[1], k_high < known[0])
    return np.broadcast_to(verdict, np.broadcast_shapes(verdict.shape, np.shape(q_low), np.shape(q_high)))


@_register
class Dilated(Mask):
  step: int = _static()

  def tile(self, q, k, batch, heads):
    return (_row(q) - _column(k)) % self.step == 0

  def boxes(self, q_low, q_high, k_low, k_high):
    low, high = q_low - k_high, q_high - k_low
    multiple = -(-low // self.step) * self.step  # the first multiple of step at or above low
    return _verdict(multiple > high, (low == high) & (multiple == low) | (self.step == 1))


@_register
class Document(Mask):
  q_ids: jax.Array
  kv_ids: jax.Array

  def tile(self, q, k, batch, heads):
    q_ids, k_ids = (jnp.take(jnp.atleast_2d(x), i, axis=1) for x, i in ((self.q_ids, q.index), (self.kv_ids, k.index)))
    return q_ids[:, None, :, None] == k_ids[:, None, None, :]


@_register
class Lengths(Mask):
  """The first `q_lengths` [B] queries and `kv_lengths` [B] keys, by index; None is all."""

  q_lengths: jax.Array | None
  kv_lengths: jax.Array | None

  def tile(self, q, k, batch, heads):
    seen = jnp.ones((1, 1, 1, 1), bool)
    if self.q_lengths is not None:
      seen &= q.index[:, None] < _per_batch(self.q_lengths)
    if self.kv_lengths is not None:
      seen &= k.index[None, :] < _per_batch(self.kv_lengths)
    return seen


@_register
class Occupied(Mask):
  """Pairs of tokens that exist: a negative position is padding or an empty cache slot."""

  def tile(self, q, k, batch, heads):
    return (_row(q) >= 0) & (_column(k) >= 0)


@_register
class Function(Mask):
  arrays: tuple
  f: Callable = _static()

  def tile(self, q, k, batch, heads):
    b = jnp.arange(batch)[:, None, None, None]
    h = jnp.arange(heads)[None, :, None, None]
    seen = jnp.asarray(self.f(b, h, _row(q), _column(k), *self.arrays))
    if seen.dtype != bool:
      raise ValueError(f'the mask function returned {seen.dtype}, expected bool (True where attention is allowed)')
    return seen.reshape((1,) * (4 - seen.ndim) + seen.shape)


@_register
class Array(Mask):
  values: jax.Array  # [1 or B, 1 or H, 1 or T, 1 or S]

  def tile(self, q, k, batch, heads):
    rows = self.values if self.values.shape[2] == 1 else jnp.take(self.values, q.index, axis=2)
    return rows if rows.shape[3] == 1 else jnp.take(rows, k.index, axis=3)


def _row(q: Tokens):
  return _signed(q.position)[:, None, :, None]


def _column(k: Tokens):
  return _signed(k.position)[:, None, None, :]


def _signed(x):
  """Positions as int32 or int64: differences of narrow or unsigned integers wrap around."""
  return x.astype(jnp.int64 if x.dtype.itemsize == 8 else jnp.int32)


def _per_batch(x):
  """A scalar as it is; [B] as [B, 1, 1, 1]."""
  return x if np.ndim(x) == 0 else x[:, None, None, None]


def _either(fixed, x):
  return _per_batch(x) if fixed is None else fixed


def _range(fixed, x):
  """Smallest and largest value of a setting, or None where they are known only at run time."""
  if fixed is not None:
    return fixed, fixed
  if isinstance(x, jax.core.Tracer) or np.size(x) == 0:
    return None
  return int(np.min(x)), int(np.max(x))


def _verdict(empty, full):
  return np.where(empty, EMPTY, np.where(full, FULL, PARTIAL)).astype(np.int8)


def _mask(x):
  if not isinstance(x, Mask):
    raise ValueError(f'cannot combine a mask with {type(x).__name__}: wrap a bool array in masks.array(...)')
  return x
