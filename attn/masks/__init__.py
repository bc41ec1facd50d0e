"""Attention masks as an algebra: small predicates on token positions, combined by `&`, `|` and `~`.

A mask is True where attention is allowed. Each predicate can be evaluated on a tile of queries and keys (what the
implementations do), densely (`dense`, for tests and pictures), and on bounding boxes of tokens (`verdicts`: is the tile
empty, full or partial?), so that work which a mask hides is skipped and never computed:

    mask = causal() & (window(1024) | sink(4))

Mind the brackets: `a & b | c` is `(a & b) | c`. Without them `causal() & window(1024) | sink(4)` lets every query see
the first 4 keys, also those that come after it: query 0 sees keys 1, 2 and 3. Masks refuse `and`, `or`, `not`.

Predicates see *positions*: the place of a token in its text. They default to the index in the array; with a cache they
are what the cache says. `document` and `array` are read by index, since they come as arrays. Pictures and videos have
coordinates on several axes, and texts beside them segments: `placed` gives a mask a layout (attn/layouts.py) to look
them up in.

Masks are pytrees: numbers are static, arrays are leaves, so a mask passes through `jax.jit` and `jax.vmap` as any
argument does. Work is planned from numbers and numpy arrays before anything runs; jax arrays are data, and are read
where that pays.
"""

import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attn.arguments import booleans, int32, integer, integers
from attn.layouts import Layout
from attn.masks.evaluate import check, dense, empty_rows, tokens, verdicts
from attn.masks.predicates import EMPTY, FULL, PARTIAL, Boxes, Everything, Mask, Tokens, Verdict
from attn.masks.radial_bands import Radial
from attn.masks.segment_graphs import SameSegment, SegmentGraph, Segments
from attn.masks.sequence import (
  Array,
  Causal,
  Chunked,
  Dilated,
  Document,
  Function,
  Lengths,
  Occupied,
  Prefix,
  Window,
)
from attn.masks.spatial import Band, Disc, Grouped, Neighborhood, Placed, RandomBlocks

__all__ = [
  'EMPTY',
  'FULL',
  'PARTIAL',
  'Boxes',
  'Everything',
  'Lengths',
  'Mask',
  'Occupied',
  'Tokens',
  'Verdict',
  'array',
  'band',
  'causal',
  'check',
  'chunked',
  'dense',
  'dilated',
  'disc',
  'document',
  'empty_rows',
  'everything',
  'function',
  'grouped',
  'neighborhood',
  'placed',
  'prefix',
  'radial',
  'random_blocks',
  'recent',
  'same_segment',
  'segment_graph',
  'segments',
  'sink',
  'tokens',
  'verdicts',
  'window',
]


def everything() -> Mask:
  """Every query sees every key."""
  return Everything()


def causal(offset=0) -> Mask:
  """Keys up to the query: key <= query + offset.

  Args:
    offset: an integer, or an int array [] or [B]: how many positions the queries stand further on than their own
      say. With T queries at the end of S keys and default positions, `causal(S - T)` aligns them bottom-right.
  """
  return Causal(*_integers('offset', offset))


def window(left: int | None, right: int | None = 0) -> Mask:
  """Keys near the query: query - left <= key <= query + right.

  Args:
    left: tokens a query sees before itself; None is all. The query itself is not counted, as in jax.nn's
      `local_window_size`: a sliding window of w tokens, the query included, is `causal() & window(w - 1)`.
    right: tokens a query sees after itself; None is all.
  """
  left, right = (None if x is None else integer(name, x, 0) for name, x in (('left', left), ('right', right)))
  return Window(left, right)


def chunked(size: int) -> Mask:
  """Keys in the query's own chunk of `size` positions: key // size == query // size."""
  return Chunked(integer('size', size, 1))


def prefix(length) -> Mask:
  """Keys of the prefix: key < length, an integer or an int array [B]. A prefix LM is `causal() | prefix(n)`."""
  return Prefix(*_integers('length', length))


def sink(n: int) -> Mask:
  """The first n keys, whatever the query: key < n."""
  return Prefix(integer('n', n, 0), None)


def dilated(step: int) -> Mask:
  """Every step-th key, counted from the query: (query - key) % step == 0."""
  return Dilated(integer('step', step, 1))


def document(q_ids, kv_ids=None) -> Mask:
  """Pairs within one document: q_ids[t] == kv_ids[s].

  Args:
    q_ids: int [T] or [B, T], the document of each query, by index.
    kv_ids: int [S] or [B, S]; None means the same as q_ids (T == S).
  """
  q_ids = _ids('q_ids', q_ids)
  return Document(q_ids, q_ids if kv_ids is None else _ids('kv_ids', kv_ids))


def function(f: Callable, *arrays) -> Mask:
  """Any predicate f(b, h, i, j, *arrays) -> bool on batch, query head, query position and key position.

  f gets broadcastable index arrays ([B,1,1,1], [1,H,1,1], [1 or B,1,t,1], [1 or B,1,1,s]) and must be elementwise in
  them. Arrays that f reads and that may be traced are passed as `arrays`, not closed over.
  """
  if not callable(f):
    raise ValueError(f'f={f!r} is not callable, expected a function f(b, h, i, j, *arrays)')
  return Function(tuple(jnp.asarray(x) for x in arrays), f)


def array(values) -> Mask:
  """A bool array, True where attention is allowed, that broadcasts to [B, H, T, S]; by index."""
  values = values if isinstance(values, jax.Array) else np.asarray(values)
  if values.dtype != bool:
    raise ValueError(f'mask array has dtype {values.dtype}, expected bool (an additive mask is a `bias`)')
  if values.ndim > 4:
    raise ValueError(f'mask array has shape {values.shape}, expected at most 4 axes [B, H, T, S]')
  return Array(values.reshape((1,) * (4 - values.ndim) + values.shape))


def recent(n: int) -> Mask:
  """The n latest keys, the query's own included: query - n < key <= query. `recent(n) | sink(m)` is an A-shape."""
  return Window(integer('n', n, 1) - 1, 0)


def grouped(size: int, shift=0, *, axis: int | None = None) -> Mask:
  """Pairs of one group: (key + shift) // size == (query + shift) // size.

  Shifted sparse attention (LongLoRA, arXiv:2309.12307) is `causal() & grouped(g, shifts)` with shifts
  [0, .., 0, g // 2, .., g // 2]: in half of the heads groups begin half a group earlier; the first and the last are
  shorter there, and none wraps around.

  Args:
    size: positions in a group.
    shift: an integer, or an int array [H], one for each query head.
    axis: of a layout, to group by a coordinate (frames in chunks, say); None groups positions.
  """
  fixed, shift = _integers('shift', shift, 'H')
  return Grouped(integer('size', size, 1), None if axis is None else integer('axis', axis, 0), fixed, shift)


def random_blocks(seed: int, r: int, block: int, length: int) -> Mask:
  """For each `block` queries, r blocks of as many keys, drawn once by the seed without repetition (BigBird).

  Args:
    seed: of the draw, which is the same wherever the mask is made.
    r: key blocks a query sees.
    block: positions in a block.
    length: positions in all; those beyond see nothing and are not seen.

  Source: arXiv:2007.14062.
  """
  block, length = integer('block', block, 1), integer('length', length, 1)
  n = -(-length // block)
  r, rng = integer('r', r, 0, n + 1), np.random.default_rng(integer('seed', seed, 0))
  chosen = np.array([rng.choice(n, r, replace=False) for _ in range(n)], np.int32).reshape(n, r)
  return RandomBlocks(chosen, block, length)


def band(axis: int, low: int | None, high: int | None) -> Mask:
  """Keys near the query on one axis of a layout: low <= key - query <= high; None is no bound.

  Frame windows are made of it. A chunk of C frames that sees itself and L frames back, and a reference picture:
  `grouped(C, axis=0) | band(0, -L, 0) | segments(None, REFERENCE)`.
  """
  low, high = (None if x is None else integer(n, x, -(2**31)) for n, x in (('low', low), ('high', high)))
  if low is not None and high is not None and low > high:
    raise ValueError(f'low={low} must be at most high={high}')
  return Band(integer('axis', axis, 0), low, high)


def disc(radius, axes=None) -> Mask:
  """Keys nearer than a radius: the sum over axes of (key - query)**2 < radius**2, strictly (CLEAR).

  Args:
    radius: a positive number below 2**14. 1 is the query's own place alone.
    axes: which axes of the layout count, a tuple; None is all.

  Source: arXiv:2412.16112.
  """
  if not 0 < _number('radius', radius) < 2**14:
    raise ValueError(f'radius={radius!r} must be a positive number below 2**14')
  return Disc(math.ceil(float(radius) ** 2), None if axes is None else integers('axes', axes, 0))


def neighborhood(shape, window, stride=1, dilation=1, is_causal=False) -> Mask:
  """Generalized neighborhood attention on a grid: each query sees window[a] keys around it on every axis a.

  Windows move inward at borders, so every query sees prod(window) keys. With a stride, that many queries in a row share
  the window of the one in their middle; stride == window is blocked attention. With a dilation d, the tokens whose
  coordinates are equal modulo d see only each other. On a causal axis the window ends at the last of its stride, and
  keys after the query are hidden. Without a layout, positions number the grid in row-major order.

  Args:
    shape: tokens of the grid on each axis. What stands outside sees nothing and is not seen.
    window: keys on each axis; an even window has one more before the query than after it.
    stride: from 1 to the window.
    dilation: at least 1; window * dilation <= shape.
    is_causal: True or False for each axis. All but `shape` may be one value for all axes.

  Raises:
    ValueError: what is out of these ranges, or not one for each axis.

  Source: arXiv:2504.16922.
  """
  shape = integers('shape', shape, 1)
  window, stride, dilation = (
    integers(name, x, 1, len(shape)) for name, x in (('window', window), ('stride', stride), ('dilation', dilation))
  )
  for axis, (n, w, s, d) in enumerate(zip(shape, window, stride, dilation)):
    if w * d > n:
      raise ValueError(f'window={w} times dilation={d} must be at most the {n} tokens of axis {axis}')
    if s > w:
      raise ValueError(f'stride={s} must be at most window={w} on axis {axis}')
  return Neighborhood(shape, window, stride, dilation, booleans('is_causal', is_causal, len(shape)))


def radial(shape, decay: float, *, block: int = 128, has_sink: bool = False) -> Mask:
  """Radial attention: the farther apart two frames are, the nearer a key must be; see attn/masks/radial_bands.py.

  Args:
    shape: (frames, tokens of a frame) or (frames, height, width).
    decay: factor on the width of the band, at least 0; published: 0.2 to 0.95.
    block: tokens below which a band is not narrowed but frames are skipped; upstream 128 whatever the tile.
    has_sink: whether everybody sees frame 0.

  Source: arXiv:2506.19852.
  """
  shape = integers('shape', shape, 1)
  if len(shape) < 2:
    raise ValueError(f'shape={shape!r} has one axis, expected frames and at least one axis of space')
  if not _number('decay', decay) >= 0:
    raise ValueError(f'decay={decay!r} must be at least 0')
  return Radial(shape, float(decay), integer('block', block, 1), bool(has_sink))


def same_segment() -> Mask:
  """Pairs within one segment of a layout; all pairs without one."""
  return SameSegment()


def segments(q_set, k_set) -> Mask:
  """Queries of some segments of a layout and keys of some: each an integer, integers, or None for all.

  Text that sees all and is seen by all, in segment 0: `... | segments(0, None) | segments(None, 0)`.
  """
  return Segments(
    *(None if x is None else integers(name, x, 0, 1 if np.ndim(x) == 0 else None)
      for name, x in (('q_set', q_set), ('k_set', k_set)))
  )  # fmt: skip


def segment_graph(matrix) -> Mask:
  """Pairs of segments by a bool matrix [segments, segments]: that of the row may see that of the column."""
  matrix = matrix if isinstance(matrix, jax.Array) else np.asarray(matrix)
  if matrix.dtype != bool or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
    raise ValueError(f'matrix has shape {matrix.shape} and dtype {matrix.dtype}, expected bool [segments, segments]')
  return SegmentGraph(matrix)


def placed(mask: Mask, layout: Layout, kv_layout: Layout | None = None) -> Mask:
  """The mask, seeing tokens as a layout has them: coordinates, segment, and order as the position.

  A token's place in the layout is its position, by default its index. Positions outside 0..N-1 see nothing and are not
  seen. What is read by index (`document`, `array`) stays so. Windows of a random order, causal by the true one
  (Stochastic Attention): `placed(band(0, -w, w) & causal(), layout.numbered())`, `layout = line(N).shuffled(seed)`.

  Args:
    mask: any mask.
    layout: of the queries, and of the keys unless they have their own.
    kv_layout: of the keys.
  """
  kv_layout = layout if kv_layout is None else kv_layout
  for name, x, kind in (('mask', mask, Mask), ('layout', layout, Layout), ('kv_layout', kv_layout, Layout)):
    if not isinstance(x, kind):
      raise ValueError(f'{name} is a {type(x).__name__}, expected a {kind.__name__}')
  return Placed(mask, layout, kv_layout)


def _integers(name, value, axis='B'):
  """(integer, None) or (None, int array [] or [B])."""
  if isinstance(value, int | np.integer) and not isinstance(value, bool):
    return integer(name, value, -(2**31)), None
  value = value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.integer) or value.ndim > 1:
    raise ValueError(
      f'{name} has dtype {value.dtype} and shape {value.shape}, expected an integer or an int array [{axis}]'
    )
  return None, int32(name, value)


def _number(name, value) -> float:
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(f'{name}={value!r} is not a number')
  return float(value)


def _ids(name, ids):
  ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
  if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim not in (1, 2):
    raise ValueError(f'{name} have dtype {ids.dtype} and shape {ids.shape}, expected integers [t] or [B, t]')
  return int32(name, ids)
