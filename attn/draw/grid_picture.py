"""What single queries see, drawn where the keys stand: lines of a text, a picture, or the frames of a video."""

import operator
from typing import NamedTuple

import numpy as np

from attn.draw import picture
from attn.draw.picture import BLUE, INK, ORANGE, UNSEEN

MOST_QUERIES = 12
MOST_PIXELS = 2**20  # of the frames that are drawn for a query
TEXT_WIDTH = 64  # tokens of a text on a line
BETWEEN = -2  # a place of a sheet where no token can be; -1 is a hole in a frame


class Sheet(NamedTuple):
  """Frames laid out on a page.

  Attributes:
    keys: int [height, width], the index of the key that stands there; -1 and BETWEEN are none.
    labels: ((words, x, y), ...) above upper left corners of frames.
  """

  keys: np.ndarray
  labels: tuple


def queries(query, layout, T) -> list[int]:
  """The queries to draw, as indices; by default one in the middle of the largest segment, and its first one.

  Raises:
    ValueError: a query without a layout, out of range, or too many.
  """
  if layout is None:
    if query is not None:
      raise ValueError(f'query={query!r} without a layout, expected None: rows of the picture are the queries')
    return []
  if query is None:
    there = np.flatnonzero(layout.order[:T] >= 0)
    segment = layout.segment[there]
    there = there[segment == np.bincount(segment).argmax()]
    coords = layout.coords[there]
    far = np.abs(coords - (coords.max(0) + 1) // 2).sum(1)
    return list(dict.fromkeys(int(there[i]) for i in (far.argmin(), coords.sum(1).argmin())))
  found = [operator.index(x) for x in (query if np.ndim(query) else [query])]
  if not 1 <= len(found) <= MOST_QUERIES or any(not 0 <= x < T for x in found):
    raise ValueError(f'query={query!r}, expected 1 to {MOST_QUERIES} indices from 0 to {T - 1}')
  return found


def draw(look, layout, kv_layout, found, title):
  """A figure of what the queries see, with empty axes for the T x S picture on the left: (figure, axes)."""
  columns = 1 if len(found) <= 3 else 2 if len(found) <= 8 else 3
  rows = -(-len(found) // columns)
  most = (5.2 / columns**0.5, max(4.4 / rows, 1.3))  # inches of a panel
  near = [layout.coords[min(t, len(layout) - 1)] for t in found]
  inches = most[0]
  for _ in range(3):  # labels need room by how wide a sheet is, and that depends on its height, labels included
    sheets = [sheet(kv_layout, look.lengths[1], x, inches, most) for x in near]
    scale = min(min(most[0] / s.keys.shape[1], most[1] / s.keys.shape[0]) for s in sheets)
    inches = scale * max(s.keys.shape[1] for s in sheets)
  width = max(2.9, inches) + 0.15
  height = scale * max(s.keys.shape[0] for s in sheets) + 0.45
  left = picture.size(look.lengths, 4.2)
  figure = picture.figure(left[0] + columns * width, max(left[1], rows * height) + 0.4, title)
  grid = figure.add_gridspec(rows, columns + 1, width_ratios=[left[0], *[width] * columns])
  for n, (t, one) in enumerate(zip(found, sheets)):
    _panel(figure.add_subplot(grid[n // columns, 1 + n % columns]), look, (layout, kv_layout), t, one)
  return figure, figure.add_subplot(grid[:, 0])


def sheet(layout, S, near, inches, box) -> Sheet:
  """The keys of a layout where they stand, segments below each other.

  Args:
    layout: of the keys.
    S: keys in the array.
    near: coordinates: of a video with too many frames those next to near[0] are taken.
    inches: how wide the sheet will be, so that labels have room.
    box: width and height in inches that frames are spread for.

  Raises:
    ValueError: more than three axes, or a frame too large.
  """
  there = (layout.order >= 0) & (np.arange(len(layout)) < S)
  segments, parts = np.unique(layout.segment[there]), []
  for segment in segments:
    index = _index(layout, np.flatnonzero(there & (layout.segment == segment)))
    name = f'segment {segment}' if len(segments) > 1 else ''
    if index.ndim == 3:
      parts.append(_video(index, name, near, box))
    else:
      parts.append([[(index if index.ndim == 2 else _wrapped(index), name)]])
  shelves = [shelf for part in parts for shelf in part]
  width = max(sum(x.shape[1] for x, _ in shelf) for shelf in shelves)
  # Room for letters of 0.11 inches above a frame, and for a border between frames.
  up, side = (max(1, int(np.ceil(room * width / inches))) for room in (0.2, 0.06))
  rows: list[np.ndarray] = []
  labels, y = [], 0
  for shelf in shelves:
    up_here = up if any(name for _, name in shelf) else int(len(rows) > 0)
    height, x, row = max(x.shape[0] for x, _ in shelf), 0, []
    for index, name in shelf:
      labels.append((name, x, y + up_here))
      row.append(np.pad(index, ((up_here, height - len(index)), (0, side)), constant_values=BETWEEN))
      x += index.shape[1] + side
    rows.append(np.concatenate(row, axis=1))
    y += up_here + height
  widest = max(x.shape[1] for x in rows)
  keys = np.concatenate([np.pad(x, ((0, 0), (0, widest - x.shape[1])), constant_values=BETWEEN) for x in rows])
  return Sheet(keys[:, : widest - side], tuple(x for x in labels if x[0]))


def _index(layout, keys):
  """Indices of the keys by their coordinates, in as many axes as they use."""
  coords = layout.coords[keys]
  while coords.shape[1] > 1 and not coords[:, -1].any():
    coords = coords[:, :-1]  # an axis of the other segments
  shape = tuple(coords.max(0) + 1)
  if len(shape) > 3 or np.prod(shape[-2:]) > MOST_PIXELS:
    raise ValueError(f'a segment of the layout has shape {shape}, expected 1 to 3 axes and frames of 2**20 tokens')
  index = np.full(shape, -1)
  index[tuple(coords.T)] = keys
  return index


def _video(index, name, near, box):
  """Shelves of frames: [[(indices, words), ...], ...]."""
  frames, h, w = index.shape
  most = max(1, MOST_PIXELS // (h * w))
  first = int(np.clip(near[0] - most // 2, 0, max(0, frames - most)))
  chosen = range(first, min(frames, first + most))
  # Labels make a frame higher; one of eight letters needs some half an inch.
  aspect = 1.25 * box[0] / box[1]
  columns = int(np.clip(round((aspect * len(chosen) * h / w) ** 0.5), 1, min(len(chosen), box[0] / 0.5)))
  labels = [(name or f'frame {i}') if i == first else str(i) for i in chosen]
  return [
    [(index[i], labels[i - first]) for i in chosen[a : a + columns]] for a in range(0, len(chosen), columns)
  ]  # fmt: skip


def _wrapped(index):
  """A text in lines."""
  width = min(len(index), TEXT_WIDTH)
  return np.pad(index, (0, -len(index) % width), constant_values=-1).reshape(-1, width)


def _panel(axes, look, layouts, t, one):
  layout, kv_layout = layouts
  seen = look.seen(np.array([t], np.int32), np.arange(look.lengths[1], dtype=np.int32))[0]
  colors = np.where(seen[one.keys][..., None], picture.rgba(BLUE), picture.rgba(UNSEEN))
  colors = np.where((one.keys >= 0)[..., None], colors, 0)
  h, w = one.keys.shape
  picture.paint(axes, colors, (h, w), ('', ''))
  axes.set_aspect('equal')
  axes.set(xticks=[], yticks=[])
  for words, x, y in one.labels:
    offset = {'xytext': (0, 1.5), 'textcoords': 'offset points'}
    axes.annotate(words, (x, y), **offset, fontsize=7, color=INK, va='bottom', ha='left', annotation_clip=False)
  if not one.labels:
    picture.cell_lines(axes, (h, w), (h, w))
  if kv_layout is layout:
    _mark(axes, one.keys, t)
  place = tuple(layout.coords[t].tolist()) if t < len(layout) else '?'
  place = f'{place[0]}' if len(place) == 1 else place
  words = f'query {t:,} at {place} sees {int(seen.sum()):,} keys'
  axes.set_title(words, loc='left', fontsize=picture.LABEL_SIZE, color=INK)


def _mark(axes, keys, t):
  """A frame about the query's own place, large enough to be seen."""
  from matplotlib.patches import Rectangle

  for y, x in np.argwhere(keys == t):
    side = max(1.0, keys.shape[1] / 50)
    corner = (x + 0.5 - side / 2, y + 0.5 - side / 2)
    axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=ORANGE, linewidth=1.6, clip_on=False))
