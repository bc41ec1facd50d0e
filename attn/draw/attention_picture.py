"""Attention maps: where each query's weight goes, head by head."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn import softmax
from attn.draw import cells, picture
from attn.draw.picture import INK, ORANGE, UNSEEN

SCALES = ('linear', 'log')
MOST_HEADS = 64
DECADES = 4  # below the largest weight, on a logarithmic scale
COLORS = 'viridis'


class Maps(NamedTuple):
  """The maps of the heads of one row of the batch.

  Attributes:
    weights: float [H, n, m]: of each cell the weight that goes to its keys, mean over its queries.
    lengths: T and S.
    size: (queries, keys) of a cell.
  """

  weights: np.ndarray
  lengths: tuple[int, int]
  size: tuple[int, int]


def from_weights(weights, b) -> Maps:
  """Maps of weights [T, S], [H, T, S] or [B, H, T, S]."""
  weights = np.asarray(weights, np.float32)
  if weights.ndim not in (2, 3, 4) or 0 in weights.shape:
    raise ValueError(f'weights have shape {weights.shape}, expected [T, S], [H, T, S] or [B, H, T, S]')
  weights = weights[_row(b, len(weights))] if weights.ndim == 4 else weights.reshape(-1, *weights.shape[-2:])
  lengths = weights.shape[1:]
  size = tuple(-(-n // _most(len(weights))) for n in lengths)
  rows = cells.areas((lengths[0], 1), (size[0], 1))
  pooled = np.stack([cells.pooled(x, size) / rows for x in weights])
  return Maps(pooled, lengths, size)


def from_queries(q, k, b, options) -> Maps:
  """Maps of softmax.attend's weights: the values are the cells, so no T x S array is held unless it is drawn."""
  q, k = jnp.asarray(q), jnp.asarray(k)
  if q.ndim != 4 or k.ndim != 4:
    raise ValueError(f'q and k have shapes {q.shape} and {k.shape}, expected [B, T, H, D] and [B, S, K, D]')
  for name in ('return_residual', 'implementation'):
    if name in options:
      raise ValueError(f'{name} is not an option of a picture')
  (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
  size = tuple(-(-n // _most(H)) for n in (T, S))
  columns = -(-S // size[1])
  # Key s has weight on cell s // size alone.
  v = jax.nn.one_hot(jnp.arange(S) // size[1], columns, dtype=jnp.result_type(q, jnp.float32))
  weights = softmax.attend(q, k, jnp.broadcast_to(v[None, :, None], (B, S, K, columns)), **options)
  weights = np.asarray(weights[_row(b, B)].astype(jnp.float32)).swapaxes(0, 1)  # [H, T, m]
  rows = cells.areas((T, 1), (size[0], 1))
  return Maps(np.stack([cells.pooled(x, (size[0], 1)) / rows for x in weights]), (T, S), size)


def draw(maps, scale, labels, kv_labels, title) -> picture.Picture:
  """See attn/draw/."""
  if scale not in SCALES:
    raise ValueError(f'scale={scale!r}, expected one of {", ".join(SCALES)}')
  (H, _, _), (T, S), size = maps.weights.shape, maps.lengths, maps.size
  if H > MOST_HEADS:
    raise ValueError(f'weights of {H} heads, expected at most {MOST_HEADS}: draw some of them')
  labels = _labels('labels', labels, T)
  kv_labels = _labels('kv_labels', labels if kv_labels is None and T == S else kv_labels, S)
  columns = min(H, 1 if H == 1 else max(2, math.ceil(math.sqrt(1.5 * H))))
  rows = -(-H // columns)
  inches = {1: 4.6, 2: 3.4, 3: 2.6}.get(columns, 2.0)
  if labels or kv_labels:
    inches = max(inches, 0.14 * max(T, S))
  width, height = picture.size((T, S), inches)
  words = _words(maps, scale)
  heading = '\n'.join(x for x in (title, words) if x)
  figure = picture.figure(columns * width + 0.9, rows * (height + 0.15) + 0.2, heading)
  grid = figure.subplots(rows, columns, squeeze=False)
  low, high = _range(maps.weights, scale)
  for h, axes in enumerate(grid.flat):
    if h >= H:
      axes.set_axis_off()
      continue
    picture.paint(axes, _colors(maps.weights[h], low, high, scale), (T, S))
    axes.set_title(f'head {h}' if H > 1 else '', fontsize=picture.LABEL_SIZE, color=INK)
    axes.set(ylabel='query' if h % columns == 0 else '', xlabel='key' if h + columns >= H else '')
    _write_labels(axes, labels, kv_labels)
  _bar(figure, grid, low, high, scale)
  facts = {'largest': float(np.nanmax(maps.weights, initial=0)), 'cell': size}
  return picture.finished(figure, '. '.join(x for x in (title, words) if x), facts)


def _words(maps, scale):
  H, _, _ = maps.weights.shape
  (T, S), size = maps.lengths, maps.size
  words = f'attention weights of {H} head{"s" if H > 1 else ""}, T = {T:,}' + (f', S = {S:,}' if S != T else '')
  if size != (1, 1):
    words += f';  a cell: the sum over {size[1]} keys, the mean of {size[0]} queries'
  return words + (';  logarithmic scale' if scale == 'log' else '')


def _range(weights, scale):
  """The smallest and the largest weight of the colours."""
  known = weights[np.isfinite(weights) & (weights > 0)]
  high = float(known.max()) if known.size else 1.0
  return (max(high * 10.0**-DECADES, float(known.min()) if known.size else 0) if scale == 'log' else 0.0), high


def _colors(weights, low, high, scale):
  """Zeros faint, what is no number orange, the rest by the colour map."""
  import matplotlib

  with np.errstate(divide='ignore', invalid='ignore'):
    place = np.log(weights / low) / max(np.log(high / low), 1e-9) if scale == 'log' else weights / high
  colors = matplotlib.colormaps[COLORS](np.clip(np.nan_to_num(place), 0, 1))
  colors = np.where((weights > 0)[..., None], colors, picture.rgba(UNSEEN))
  return np.where(np.isfinite(weights)[..., None], colors, picture.rgba(ORANGE))


def _bar(figure, grid, low, high, scale):
  """The colours and their weights, to the right of all maps."""
  import matplotlib

  axes = figure.colorbar(
    matplotlib.cm.ScalarMappable(cmap=COLORS), ax=grid, aspect=28, fraction=0.04, pad=0.02, ticks=[]
  ).ax  # for its place; the colours as one image, which SVG holds better than a mesh
  axes.clear()
  colors = matplotlib.colormaps[COLORS](np.linspace(1, 0, 256))[:, None]
  axes.imshow(colors, extent=(0, 1, 0, 1), aspect='auto', interpolation='none').set_clip_on(False)
  axes.set_xticks([])
  picture.style(axes)
  axes.yaxis.tick_right()
  if scale == 'log':
    places = [float(x) for x in range(-40, 2) if low * 0.999 <= 10.0**x <= high * 1.001] or [math.log10(high)]
    at = [(x - math.log10(low)) / max(math.log10(high / low), 1e-9) for x in places]
    axes.set_yticks(at, [f'{10.0**x:.3g}' for x in places])
  else:
    axes.set_yticks([0, 0.5, 1], [f'{x * high:.3g}' for x in (0, 0.5, 1)])
  axes.set_title('weight', fontsize=picture.LABEL_SIZE, color=INK)


def _write_labels(axes, labels, kv_labels):
  """Words beside rows and below columns."""
  for axis, words in ((axes.yaxis, labels), (axes.xaxis, kv_labels)):
    if words:
      axis.set_ticks([i + 0.5 for i in range(len(words))], words, fontsize=7, parse_math=False)
  if any(len(x) > 2 for x in kv_labels or []):
    axes.tick_params(axis='x', rotation=90)


def _labels(name, labels, n):
  if labels is None:
    return None
  labels = [str(x) for x in labels]
  if len(labels) != n or n > 128:
    raise ValueError(f'{name} has {len(labels)} words, expected {n}, at most 128')
  return labels


def _most(heads):
  """Cells on a side of a map: fewer where there are many maps."""
  return max(64, cells.MOST_CELLS // math.ceil(math.sqrt(heads)))


def _row(b, B):
  if not 0 <= b < B:
    raise ValueError(f'b={b}, expected a row of the batch, 0 to {B - 1}')
  return b
