"""Predicates on the places of tokens, in a text (positions) and in arrays (indices); made by attn/masks/."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.masks.predicates import UNKNOWN, Mask, Verdict, column, equal, register, row, signed, static


@register
class Causal(Mask):
  fixed: int | None = static()  # the offset as a number, or
  offset: Any  # as an array

  def tile(self, q, k, batch, heads):
    return column(k.position) - row(q.position) <= _either(self.fixed, self.offset)

  def boxes(self, q, k):
    if not q.can_read(q.tokens.position, k.tokens.position, self.offset):
      return UNKNOWN
    q_low, q_high, k_low, k_high = _bounds(q, k)
    offset = _either(self.fixed, self.offset)
    return Verdict(k_low - q_high <= offset, k_high - q_low <= offset)

  def check(self, B, H, T, S):
    _check_setting('offset', self.offset, B)


@register
class Window(Mask):
  left: int | None = static()
  right: int | None = static()

  def tile(self, q, k, batch, heads):
    ahead = column(k.position) - row(q.position)
    return self._within(ahead, ahead)

  def boxes(self, q, k):
    if not q.can_read(q.tokens.position, k.tokens.position):
      return UNKNOWN
    q_low, q_high, k_low, k_high = _bounds(q, k)
    nearest, farthest = k_low - q_high, k_high - q_low  # the range of key - query
    return Verdict(self._within(farthest, nearest), self._within(nearest, farthest))

  def _within(self, low, high):
    """low >= -left and high <= right."""
    if self.left is None:
      return high == high if self.right is None else high <= self.right
    return low >= -self.left if self.right is None else (low >= -self.left) & (high <= self.right)


@register
class Chunked(Mask):
  size: int = static()

  def tile(self, q, k, batch, heads):
    return row(q.position) // self.size == column(k.position) // self.size

  def boxes(self, q, k):
    if not q.can_read(q.tokens.position, k.tokens.position):
      return UNKNOWN
    return equal(*(x // self.size for x in _bounds(q, k)))


@register
class Prefix(Mask):
  fixed: int | None = static()  # the length as a number, or
  length: Any  # as an array

  def tile(self, q, k, batch, heads):
    return column(k.position) < _either(self.fixed, self.length)

  def boxes(self, q, k):
    if not q.can_read(k.tokens.position, self.length):
      return UNKNOWN
    low, high = (column(x) for x in k.bounds(k.tokens.position))
    length = _either(self.fixed, self.length)
    return Verdict(low < length, high < length)

  def check(self, B, H, T, S):
    _check_setting('length', self.length, B)


@register
class Dilated(Mask):
  step: int = static()

  def tile(self, q, k, batch, heads):
    return (row(q.position) - column(k.position)) % self.step == 0

  def boxes(self, q, k):
    if not q.can_read(q.tokens.position, k.tokens.position):
      return UNKNOWN
    q_low, q_high, k_low, k_high = _bounds(q, k)
    low, high = q_low - k_high, q_high - k_low
    multiple = -(-low // self.step) * self.step  # the first multiple of step at or above low
    return Verdict(multiple <= high, (low == high) & (multiple == low) | (self.step == 1))


@register
class Document(Mask):
  q_ids: Any
  kv_ids: Any

  def tile(self, q, k, batch, heads):
    return row(at(self.q_ids, q.index)) == column(at(self.kv_ids, k.index))

  def boxes(self, q, k):
    if not q.can_read(self.q_ids, self.kv_ids):
      return UNKNOWN
    # Made signed before they are bounded: unsigned ids change their order then, and equality alone survives.
    q_low, q_high = (row(x) for x in q.bounds(signed(at(self.q_ids, q.tokens.index))))
    k_low, k_high = (column(x) for x in k.bounds(signed(at(self.kv_ids, k.tokens.index))))
    return equal(q_low, q_high, k_low, k_high)

  def check(self, B, H, T, S):
    for name, ids, n in (('q_ids', self.q_ids, T), ('kv_ids', self.kv_ids, S)):
      if ids.shape[-1] != n or (ids.ndim == 2 and ids.shape[0] not in (1, B)):
        raise ValueError(f'document {name} have shape {ids.shape}, expected [{n}] or [{B}, {n}]')


@register
class Lengths(Mask):
  """The first `q_lengths` [B] queries and `kv_lengths` [B] keys, by index; None is all."""

  q_lengths: jax.Array | None
  kv_lengths: jax.Array | None

  def tile(self, q, k, batch, heads):
    seen = jnp.ones((1, 1, 1, 1), bool)
    if self.q_lengths is not None:
      seen &= row(q.index) < per_batch(self.q_lengths)
    if self.kv_lengths is not None:
      seen &= column(k.index) < per_batch(self.kv_lengths)
    return seen

  def boxes(self, q, k):
    if not q.can_read(self.q_lengths, self.kv_lengths):
      return UNKNOWN
    some = every = UNKNOWN.some
    for lengths, boxes, side in ((self.q_lengths, q, row), (self.kv_lengths, k, column)):
      if lengths is not None:
        low, high = (side(x) for x in boxes.bounds(boxes.tokens.index))
        some, every = some & (low < per_batch(lengths)), every & (high < per_batch(lengths))
    return Verdict(some, every)


@register
class Occupied(Mask):
  """Pairs of tokens that exist: a negative position is padding or an empty cache slot."""

  def tile(self, q, k, batch, heads):
    return (row(q.position) >= 0) & (column(k.position) >= 0)

  def boxes(self, q, k):
    if not q.can_read(q.tokens.position, k.tokens.position):
      return UNKNOWN
    q_low, q_high, k_low, k_high = _bounds(q, k)
    return Verdict((q_high >= 0) & (k_high >= 0), (q_low >= 0) & (k_low >= 0))


@register
class Function(Mask):
  arrays: tuple
  f: Callable = static()

  def tile(self, q, k, batch, heads):
    b = jnp.arange(batch)[:, None, None, None]
    h = jnp.arange(heads)[None, :, None, None]
    seen = jnp.asarray(self.f(b, h, row(q.position), column(k.position), *self.arrays))
    if seen.dtype != bool:
      raise ValueError(f'the mask function returned {seen.dtype}, expected bool (True where attention is allowed)')
    return seen.reshape((1,) * (4 - seen.ndim) + seen.shape)


@register
class Array(Mask):
  values: Any  # [1 or B, 1 or H, 1 or T, 1 or S]

  def tile(self, q, k, batch, heads):
    values, (_, _, t, s) = jnp.asarray(self.values), self.values.shape
    if q.index.shape[:2] == k.index.shape[:2] == (1, 1):
      values = values if t == 1 else jnp.take(values, q.index[0, 0], axis=2)
      return values if s == 1 else jnp.take(values, k.index[0, 0], axis=3)
    # Every row of the batch, or head, has a tile of its own.
    b, h = (np.arange(n) for n in values.shape[:2])
    rows, columns = row(q.index) if t > 1 else 0, column(k.index) if s > 1 else 0
    return values[b[:, None, None, None], h[:, None, None], rows, columns]

  def boxes(self, q, k):
    if not q.can_read(self.values):
      return UNKNOWN
    low = high = self.values
    for boxes, axis in ((q, 2), (k, 3)):
      if self.values.shape[axis] > 1:
        low = boxes.bounds(low.swapaxes(axis, 3))[0].swapaxes(axis, 3)
        high = boxes.bounds(high.swapaxes(axis, 3))[1].swapaxes(axis, 3)
    return Verdict(high, low)

  def check(self, B, H, T, S):
    for axis, got, want in zip('BHTS', self.values.shape, (B, H, T, S)):
      if got not in (1, want):
        raise ValueError(f'mask array has {got} on axis {axis} (shape {self.values.shape}), expected 1 or {want}')


def at(values, index):
  """values [N] or [B, N] at an index [1 or B, 1 or H, t]; numpy where both are."""
  xp = np if isinstance(values, np.ndarray) and isinstance(index, np.ndarray) else jnp
  values = values[None] if values.ndim == 1 else values
  if index.shape[:2] == (1, 1):
    return xp.take(values, index[0, 0], axis=1)[:, None]
  return xp.take_along_axis(values[:, None], index, axis=2)


def per_batch(x):
  """A scalar as it is; [B] as [B, 1, 1, 1]."""
  return x if np.ndim(x) == 0 else x[:, None, None, None]


def _bounds(q, k):
  """Bounds of the positions of queries, as rows, and of keys, as columns."""
  q_low, q_high = q.bounds(q.tokens.position)
  k_low, k_high = k.bounds(k.tokens.position)
  return row(q_low), row(q_high), column(k_low), column(k_high)


def _either(fixed, x):
  return per_batch(x) if fixed is None else fixed


def _check_setting(name, x, B):
  if x is not None and np.ndim(x) and np.shape(x)[0] not in (1, B):
    raise ValueError(f'{name} has shape {np.shape(x)}, expected [] or [{B}]')
