"""Predicates of where tokens stand in a layout: coordinates, segments, order; made by attn/masks/.

Intervals are computed for every token and then bounded over runs, so that the verdict on a pair of runs is exact
wherever both are boxes of the layout and axes do not depend on each other.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from attn.layouts import Layout
from attn.masks.predicates import UNKNOWN, Boxes, Mask, Tokens, Verdict, column, equal, register, row, static


@register
class Placed(Mask):
  """A mask that sees coordinates, segment and order of layouts, looked up by position."""

  a: Mask
  q_layout: Layout
  kv_layout: Layout

  def tile(self, q, k, batch, heads):
    q, q_there = _look_up(q, self.q_layout)
    k, k_there = _look_up(k, self.kv_layout)
    return self.a.tile(q, k, batch, heads) & q_there[..., :, None] & k_there[..., None, :]

  def boxes(self, q, k):
    layouts = [x for y in (self.q_layout, self.kv_layout) for x in (y.coords, y.segment, y.order)]
    if not q.can_read(q.tokens.position, k.tokens.position, *layouts):
      return UNKNOWN
    q_tokens, q_there = _look_up(q.tokens, self.q_layout)
    k_tokens, k_there = _look_up(k.tokens, self.kv_layout)
    q, k = dataclasses.replace(q, tokens=q_tokens), dataclasses.replace(k, tokens=k_tokens)
    return both(self.a.boxes(q, k), product(q, q_there, k, k_there))

  def check(self, B, H, T, S):
    self.a.check(B, H, T, S)

  def check_lengths(self, T: int | None, S: int | None):
    """Raises ValueError unless the layouts have T and S tokens; None where positions say which are meant."""
    for name, n, layout in (('layout', T, self.q_layout), ('kv_layout', S, self.kv_layout)):
      if n not in (None, len(layout)):
        raise ValueError(f'{name} has {len(layout)} tokens for {n} of the array, and no positions say which they are')


@register
class Neighborhood(Mask):
  shape: tuple = static()
  window: tuple = static()
  stride: tuple = static()
  dilation: tuple = static()
  is_causal: tuple = static()

  def tile(self, q, k, batch, heads):
    (q_coords, q_there), (k_coords, k_there) = on_grid(q, self.shape), on_grid(k, self.shape)
    seen = q_there[..., :, None] & k_there[..., None, :]
    for axis, d in enumerate(self.dilation):
      start, end = self.reach(q_coords[axis], axis)
      place = column(k_coords[axis] // d)
      seen = seen & (row(start) <= place) & (place < row(end))
      if d > 1:
        seen = seen & (row(q_coords[axis] % d) == column(k_coords[axis] % d))
    return seen

  def boxes(self, q, k):
    if not can_read(q, k):
      return UNKNOWN
    (q_coords, q_there), (k_coords, k_there) = on_grid(q.tokens, self.shape), on_grid(k.tokens, self.shape)
    verdict = product(q, q_there, k, k_there)
    for axis, d in enumerate(self.dilation):
      start, end = (tuple(row(x) for x in q.bounds(y)) for y in self.reach(q_coords[axis], axis))
      low, high = (column(x) for x in k.bounds(k_coords[axis] // d))
      some, every = (start[0] <= high) & (low < end[1]), (start[1] <= low) & (high < end[0])
      verdict = both(verdict, Verdict(some, every))
      if d > 1:
        verdict = both(verdict, equal(*bounds(q, q_coords[axis] % d, k, k_coords[axis] % d)))
    return verdict

  def reach(self, x, axis):
    """[start, end) of the keys of a query at coordinate x, both counted in its dilation group."""
    w, stride, d = self.window[axis], self.stride[axis], self.dilation[axis]
    place, length = x // d, (self.shape[axis] - x % d + d - 1) // d
    if self.is_causal[axis]:
      leader = (place // stride * stride + stride - 1).clip(0, length - 1)
      return (leader - w + 1).clip(0, None), place + 1
    leader = (place // stride * stride + stride // 2).clip(0, length - 1)
    # An even window leans left; at a border the window moves inward and keeps its size.
    start = leader.clip(w // 2, length - w + w // 2) - w // 2
    return start, start + w


@register
class Band(Mask):
  axis: int = static()
  low: int | None = static()
  high: int | None = static()

  def tile(self, q, k, batch, heads):
    ahead = column(on_axis(k, self.axis)) - row(on_axis(q, self.axis))
    return self._within(ahead, ahead)

  def boxes(self, q, k):
    if not can_read(q, k):
      return UNKNOWN
    q_low, q_high, k_low, k_high = bounds(q, on_axis(q.tokens, self.axis), k, on_axis(k.tokens, self.axis))
    nearest, farthest = k_low - q_high, k_high - q_low  # the range of key - query
    return Verdict(self._within(farthest, nearest), self._within(nearest, farthest))

  def _within(self, smallest, largest):
    """smallest >= low and largest <= high."""
    above = smallest == smallest if self.low is None else smallest >= self.low
    return above if self.high is None else above & (largest <= self.high)


@register
class Disc(Mask):
  square: int = static()  # the least square of a distance that is outside
  axes: tuple | None = static()

  def tile(self, q, k, batch, heads):
    return self._inside(abs(column(on_axis(k, a)) - row(on_axis(q, a))) for a in self._axes(q))

  def boxes(self, q, k):
    if not can_read(q, k):
      return UNKNOWN
    nearest, farthest = [], []
    for axis in self._axes(q.tokens):
      low, high = apart(*bounds(q, on_axis(q.tokens, axis), k, on_axis(k.tokens, axis)))
      nearest.append(low)
      farthest.append(high)
    return Verdict(self._inside(nearest), self._inside(farthest))

  def _axes(self, tokens):
    return range(max(1, len(tokens.coords))) if self.axes is None else self.axes

  def _inside(self, distances):
    # What is too far on one axis is too far: clipped, so that the squares cannot overflow.
    reach = math.isqrt(self.square - 1) + 1
    return sum(x.clip(0, reach) ** 2 for x in distances) < self.square


@register
class Grouped(Mask):
  size: int = static()
  axis: int | None = static()
  fixed: int | None = static()  # the shift as a number, or
  shift: Any  # as an array [H]

  def tile(self, q, k, batch, heads):
    return self._group(row(self._of(q))) == self._group(column(self._of(k)))

  def boxes(self, q, k):
    if not (can_read(q, k) and q.can_read(self.shift)):
      return UNKNOWN
    return equal(*(self._group(x) for x in bounds(q, self._of(q.tokens), k, self._of(k.tokens))))

  def check(self, B, H, T, S):
    if self.shift is not None and np.ndim(self.shift) and np.shape(self.shift)[0] not in (1, H):
      raise ValueError(f'shift has shape {np.shape(self.shift)}, expected an integer or [{H}], one for each query head')

  def _of(self, tokens):
    return tokens.position if self.axis is None else on_axis(tokens, self.axis)

  def _group(self, x):
    shift: Any = self.shift if self.fixed is None else self.fixed
    return (x + (shift[:, None, None] if np.ndim(shift) else shift)) // self.size


@register
class RandomBlocks(Mask):
  chosen: Any  # int32 [n, r], key blocks of each query block
  block: int = static()
  length: int = static()

  def tile(self, q, k, batch, heads):
    (q_block, q_there), (k_block, k_there) = self._block(q), self._block(k)
    chosen = take(self.chosen, q_block)  # [..., t, r]
    seen = (chosen[..., :, None, :] == k_block[..., None, :, None]).any(-1)
    return seen & q_there[..., :, None] & k_there[..., None, :]

  def boxes(self, q, k):
    if not (can_read(q, k) and isinstance(self.chosen, np.ndarray)):
      return UNKNOWN
    (q_block, q_there), (k_block, k_there) = self._block(q.tokens), self._block(k.tokens)
    is_there = product(q, q_there, k, k_there)
    if not (isinstance(q_block, np.ndarray) and isinstance(k_block, np.ndarray)):
      # Positions are data: a table of all blocks is read, unless it would be large.
      return both(self._from_table(*bounds(q, q_block, k, k_block)), is_there) if len(self.chosen) <= 4096 else UNKNOWN
    (top, bottom), (left, right) = q.bounds(q_block), k.bounds(k_block)
    lead = np.broadcast_shapes(top.shape[:2], left.shape[:2])
    top, bottom, left, right = (np.broadcast_to(x, (*lead, x.shape[2])) for x in (top, bottom, left, right))
    some = np.zeros((*lead, top.shape[2], left.shape[2]), bool)
    every = some.copy()
    for b, h, i in np.ndindex(top.shape):
      # What the query blocks of a run chose, in order: two searches count those within each run of keys.
      chosen = np.sort(self.chosen[top[b, h, i] : bottom[b, h, i] + 1].ravel())
      count = np.searchsorted(chosen, right[b, h], 'right') - np.searchsorted(chosen, left[b, h])
      some[b, h, i] = count > 0
      every[b, h, i] = count == (bottom[b, h, i] + 1 - top[b, h, i]) * (right[b, h] + 1 - left[b, h])
    return both(Verdict(some, every), is_there)

  def _from_table(self, top, bottom, left, right):
    """The verdict on rectangles of blocks, bounds included."""
    n = len(self.chosen)
    allowed = np.zeros((n, n), np.int32)
    np.put_along_axis(allowed, self.chosen, 1, axis=1)
    # before[a, b] counts what rows before a choose of columns before b: four reads count a rectangle of blocks.
    before = np.pad(allowed.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32), ((1, 0), (1, 0))).ravel()
    read = lambda a, b: take(before, a * (n + 1) + b)
    bottom, right = bottom + 1, right + 1
    count = read(bottom, right) - read(top, right) - read(bottom, left) + read(top, left)
    return Verdict(count > 0, count == (bottom - top) * (right - left))

  def _block(self, tokens):
    there = (tokens.position >= 0) & (tokens.position < self.length)
    return tokens.position.clip(0, self.length - 1) // self.block, there


def on_axis(tokens: Tokens, axis: int):
  """Coordinates on an axis of the layout; without a layout, positions are axis 0.

  Raises:
    ValueError: there is no such axis.
  """
  if not tokens.coords and axis == 0:
    return tokens.position
  if not axis < len(tokens.coords):
    what = f'the layout has {len(tokens.coords)}' if tokens.coords else 'tokens have no layout: see masks.placed'
    raise ValueError(f'the mask reads axis {axis}, and {what}')
  return tokens.coords[axis]


def on_grid(tokens: Tokens, shape):
  """(coordinates on the axes of a grid, clipped to it; whether the token is in the grid).

  Without a layout, positions are numbers of cells in row-major order.

  Raises:
    ValueError: the layout has another number of axes.
  """
  if tokens.coords:
    if len(tokens.coords) != len(shape):
      raise ValueError(f'the mask is of a grid {shape}, and the layout has {len(tokens.coords)} axes')
    coords = tokens.coords
    there = (coords[0] >= 0) & (coords[0] < shape[0])
    for x, n in zip(coords[1:], shape[1:]):
      there = there & (x >= 0) & (x < n)
    return [x.clip(0, n - 1) for x, n in zip(coords, shape)], there
  size = math.prod(shape)
  there = (tokens.position >= 0) & (tokens.position < size)
  rest, found = tokens.position.clip(0, size - 1), []
  for n in shape[::-1]:
    found.append(rest % n)
    rest = rest // n
  return found[::-1], there


def bounds(q: Boxes, q_values, k: Boxes, k_values):
  """Bounds of values of queries, as rows, and of keys, as columns: q_low, q_high, k_low, k_high."""
  return *(row(x) for x in q.bounds(q_values)), *(column(x) for x in k.bounds(k_values))


def apart(q_low, q_high, k_low, k_high):
  """The least and the largest distance of a query and a key, from the bounds of both."""
  return (k_low - q_high).clip(0, None) + (q_low - k_high).clip(0, None), abs(k_high - q_low).clip(q_high - k_low, None)


def both(a: Verdict, b: Verdict) -> Verdict:
  """The verdict of `a and b`."""
  return Verdict(a.some & b.some, a.every & b.every)


def product(q, q_is, k, k_is):
  """The verdict of `q_is[query] and k_is[key]`, which is exact."""
  (q_all, q_any), (k_all, k_any) = q.bounds(q_is), k.bounds(k_is)
  return Verdict(q_any[..., :, None] & k_any[..., None, :], q_all[..., :, None] & k_all[..., None, :])


def can_read(q, k):
  return q.can_read(*(x for y in (q.tokens, k.tokens) for x in (y.position, *y.coords, y.segment)))


def _look_up(tokens, layout):
  """(tokens as the layout has them, whether it has them)."""
  n = len(layout)
  place = tokens.position.clip(0, max(n - 1, 0))
  if n == 0:
    return tokens, tokens.position != tokens.position
  order = take(layout.order, place)
  there = (tokens.position >= 0) & (tokens.position < n) & (order >= 0)
  coords = tuple(take(layout.coords[:, axis], place) for axis in range(layout.coords.shape[1]))
  return Tokens(tokens.index, order, coords, take(layout.segment, place)), there


def take(values, index):
  """values[index]; numpy where both are."""
  return (values if isinstance(index, np.ndarray) else jnp.asarray(values))[index]
