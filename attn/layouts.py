"""Layouts: where every token of an array stands, on how many axes, in which segment and in which order.

A video of 30 x 48 x 80 tokens, cut so that 128 tokens in a row are a box of 2 x 8 x 8, and 16 tokens of text behind
it (in front of it they would shift every run of 128 across two boxes; `line(16).tiled(128, is_padded=True)` may be):

    layout = concat(grid(30, 48, 80).tiled((2, 8, 8)), line(16))
    x = layout.permute(x)                                        # [B, T, ...], the text behind the video
    mask = masks.placed(masks.neighborhood((30, 48, 80), (18, 24, 24)) & masks.segments(0, 0)
                        | masks.segments(1, None) | masks.segments(None, 1), layout)
    out = layout.restore(softmax.attend(q, k, v, mask=mask))

Every method gives a new layout. Masks that follow coordinates gain from tiles, since a mask skips runs of tokens, and
what is near in space is then near in the array; the result is the same.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attn.arguments import integer, integers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layout:
  """The tokens of an array, one after the other. Numpy, so that work can be planned from it.

  Attributes:
    coords: int32 [N, axes], place on each axis.
    segment: int32 [N], number of the part, from 0.
    order: int32 [N], place before any permutation: what causality goes by. -1 is a hole, which no mask lets anybody
      see; otherwise no two are equal.
  """

  coords: np.ndarray
  segment: np.ndarray
  order: np.ndarray

  def __len__(self):
    return self.order.shape[0]

  def __repr__(self):
    return f'Layout({len(self)} tokens, {self.coords.shape[1]} axes)'

  def tiled(self, tile, dilation=1, *, is_padded=False):
    """Tokens in the order [dilation groups][tiles][inside a tile], each in row-major order; segments stay apart.

    On an axis with dilation d, tokens whose coordinates are equal modulo d are a group; a tile is t of them in a row.
    Where tiles divide every group, each prod(tile) tokens in a row are a tile. Where they do not, the tiles at the
    far border are smaller and runs of prod(tile) tokens straddle tiles: right, but with less to skip. `is_padded`
    fills them up with holes.

    Args:
      tile: tokens of a tile on each axis; an integer is for all axes.
      dilation: an integer, or one for each axis.
      is_padded: whether every tile is made whole by holes; the layout must be a whole grid.

    Raises:
      ValueError: a tile or dilation below 1, or not one for each axis; `is_padded` for what is not a grid.
    """
    tile = np.array(integers('tile', tile, 1, self.coords.shape[1]))
    dilation = np.array(integers('dilation', dilation, 1, self.coords.shape[1]))
    layout = self._padded(tile * dilation) if is_padded else self
    place, group = layout.coords // dilation, layout.coords % dilation
    # The last key of lexsort is the first to be looked at.
    keys = np.concatenate([layout.segment[:, None], group, place // tile, place % tile], axis=1)
    layout = layout.permuted(np.lexsort(keys.T[::-1]))
    # A hole takes a place at the border, so that it does not widen the box of its tile.
    return dataclasses.replace(layout, coords=np.minimum(layout.coords, self.coords.max(0, initial=0)))

  def permuted(self, permutation):
    """Token n is what token permutation[n] was.

    Raises:
      ValueError: permutation is not one of 0..N-1.
    """
    permutation = np.asarray(permutation)
    if permutation.shape != (len(self),) or not np.array_equal(np.sort(permutation), np.arange(len(self))):
      raise ValueError(f'permutation of shape {permutation.shape} is not a permutation of 0..{len(self) - 1}')
    return Layout(self.coords[permutation], self.segment[permutation], self.order[permutation])

  def shuffled(self, seed: int):
    """Tokens in a random order, the same for the same seed."""
    return self.permuted(np.random.default_rng(integer('seed', seed, 0)).permutation(len(self)))

  def numbered(self):
    """The same tokens with one coordinate: their place in this layout, 0..N-1."""
    return dataclasses.replace(self, coords=np.arange(len(self), dtype=np.int32)[:, None])

  def permute(self, x, axis=1):
    """x with its axis taken from the order before any permutation to that of the layout; holes are zero.

    Raises:
      ValueError: the axis does not have as many tokens as the layout has, holes aside; the layout is traced.
    """
    self._check_known()
    _check_axis(x, axis, int((self.order >= 0).sum()))
    taken = _take(x, np.maximum(self.order, 0), axis)
    if (self.order >= 0).all():
      return taken
    there = (self.order >= 0).reshape(-1, *(1,) * (taken.ndim - 1 - axis % taken.ndim))
    return np.where(there, taken, np.zeros((), x.dtype)) if isinstance(x, np.ndarray) else jnp.where(there, taken, 0)

  def restore(self, x, axis=1):
    """The inverse of `permute`: from the order of the layout to that before any permutation, without holes.

    Raises:
      ValueError: the axis does not have as many tokens as the layout; the layout is traced.
    """
    self._check_known()
    _check_axis(x, axis, len(self))
    return _take(x, np.argsort(self.order, kind='stable')[(self.order < 0).sum() :], axis)

  def _check_known(self):
    if isinstance(self.order, jax.core.Tracer):
      raise ValueError('the layout is traced, expected numpy arrays: close over it, do not pass it through jax.jit')

  def _padded(self, multiple):
    """Holes up to a multiple of so many tokens on each axis."""
    extent = self.coords.max(0, initial=-1) + 1
    if len(np.unique(self.segment)) > 1 or math.prod(extent.tolist()) != len(self):
      raise ValueError(f'is_padded: {len(self)} tokens do not fill a grid {tuple(extent.tolist())}: tile before concat')
    whole = grid(*(-(-extent // multiple) * multiple).tolist())
    order = np.full(len(whole), -1, np.int32)
    order[np.ravel_multi_index(self.coords.T, (whole.coords[-1] + 1).tolist())] = self.order
    return Layout(whole.coords, np.full_like(whole.segment, self.segment[0] if len(self) else 0), order)


def line(n: int) -> Layout:
  """n tokens in a row, as in a text."""
  return grid(integer('n', n, 0))


def grid(*shape: int) -> Layout:
  """Tokens of a picture [y, x] or a video [t, y, x], in row-major order."""
  shape = integers('shape', shape, 0)
  coords = np.indices(shape, np.int32).reshape(len(shape), -1).T
  n = np.arange(len(coords), dtype=np.int32)
  return Layout(np.ascontiguousarray(coords), np.zeros_like(n), n)


def concat(*layouts: Layout) -> Layout:
  """One layout after the other. Segments are numbered on, and so is the order; missing axes are 0 behind the others.

  Raises:
    ValueError: no layouts.
  """
  if not layouts:
    raise ValueError('concat got no layouts, expected at least one')
  axes = max(layout.coords.shape[1] for layout in layouts)
  coords, segments, orders, segment, order = [], [], [], 0, 0
  for layout in layouts:
    coords.append(np.pad(layout.coords, ((0, 0), (0, axes - layout.coords.shape[1]))))
    segments.append(layout.segment + segment)
    orders.append(np.where(layout.order < 0, -1, layout.order + order))
    segment += layout.segment.max(initial=0) + 1
    order += (layout.order >= 0).sum()
  return Layout(*(np.concatenate(x).astype(np.int32) for x in (coords, segments, orders)))


def _check_axis(x, axis, n):
  shape = np.shape(x)
  if not -len(shape) <= axis < len(shape) or shape[axis] != n:
    raise ValueError(f'x has shape {shape}, expected {n} tokens on axis {axis}')


def _take(x, index, axis):
  return np.take(x, index, axis) if isinstance(x, np.ndarray) else jnp.take(x, index, axis)
