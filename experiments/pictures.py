"""The pictures of a report, as SVG that stands inside an HTML page and takes its text colour from it."""

import io
import re

import numpy as np
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

# Replaced by `currentColor`, so that one picture serves light and dark pages.
INK = '#0a0b0c'
BLUE, ORANGE, GREEN, GREY = '#3b82c4', '#e07b39', '#3f9c6b', '#8a8f98'
COMPRESSOR_COLORS = ('#b0679b', '#8f7ac9', '#6b8e9f')
GLYPHS = {ord('\n'): '↵', ord(' '): '·', ord('\t'): '→', ord('\r'): '←'}


def curves(train, held_out, lines, *, title='', x_label='step'):
  """Bits per byte against steps: the training loss, held-out points, and horizontal lines to compare with.

  Args:
    train: [(step, bits per byte), ...]; drawn pale as it is and strong as a running mean.
    held_out: [(step, bits per byte), ...]; may be empty.
    lines: dict from label to bits per byte.
    title: above the axes.
    x_label: what the first numbers of the points are.

  Returns:
    SVG text.
  """
  figure = Figure(figsize=(8.2, 4.0), layout='constrained')
  axes = figure.subplots()
  _axes_style(axes)
  if train:
    x, y = np.asarray(train, float).T
    axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=1)
    axes.plot(x, _running_mean(y), color=BLUE, linewidth=1.8, label='training (running mean)')
  if held_out:
    x, y = np.asarray(held_out, float).T
    axes.plot(x, y, color=ORANGE, linewidth=1.8, marker='o', markersize=4, label='held out')
  axes.set_ylim(*_vertical_range([y for _, y in [*train, *held_out]], lines.values()))
  _level_lines(axes, lines)
  axes.set_xlim(left=0)
  axes.set_xlabel(x_label)
  axes.set_ylabel('bits per byte')
  axes.set_title(title, loc='left', fontsize=11)
  if train or held_out:
    axes.legend(frameon=False, fontsize=9, loc='upper right', labelcolor=INK)
  return svg(figure, 'curves' + title)


def longer_run(runs, lines):
  """Held-out bits per byte of several runs against the bytes trained on, on a logarithmic axis.

  Args:
    runs: dict from label to [(bytes trained on, bits per byte), ...].
    lines: dict from label to bits per byte.

  Returns:
    SVG text.
  """
  figure = Figure(figsize=(8.2, 3.8), layout='constrained')
  axes = figure.subplots()
  _axes_style(axes)
  values = []
  for (label, points), color in zip(runs.items(), (ORANGE, GREEN, BLUE, GREY), strict=False):
    x, y = np.asarray([p for p in points if p[0] > 0], float).reshape(-1, 2).T
    axes.plot(x, y, color=color, linewidth=1.8, marker='o', markersize=4, label=label)
    values += list(y)
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(EngFormatter(sep=' '))
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.set_ylim(*_vertical_range(values, lines.values()))
  _level_lines(axes, lines)
  axes.set_xlabel('bytes trained on')
  axes.set_ylabel('held-out bits per byte')
  axes.legend(frameon=False, fontsize=9, loc='upper right', labelcolor=INK)
  return svg(figure, 'longer run')


def layer_masks(masks, titles):
  """What each query may see: one square per mask, allowed entries filled.

  Args:
    masks: [bool [T, T], ...].
    titles: one per mask.

  Returns:
    SVG text.
  """
  columns = min(4, len(masks))
  rows = -(-len(masks) // columns)
  figure = Figure(figsize=(0.6 + 2.5 * columns, 0.3 + 2.6 * rows), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False)
  colors = ListedColormap(['#80858c24', BLUE])
  for axes, mask, title in zip(grid.flat, masks, titles, strict=False):
    T, S = mask.shape
    axes.imshow(mask, cmap=colors, vmin=0, vmax=1, interpolation='nearest', extent=(0, S, T, 0))
    _axes_style(axes, grid=False)
    axes.set_xticks([0, S // 2, S])
    axes.set_yticks([0, T // 2, T])
    axes.set_title(title, fontsize=10)
  for axes in grid.flat[len(masks) :]:
    axes.set_axis_off()
  for axes in grid[:, 0]:
    axes.set_ylabel('query')
  for axes in grid[-1]:
    axes.set_xlabel('key')
  return svg(figure, 'masks')


def attention_map(weights, text):
  """Attention weights of one head, with the bytes of the text beside rows and columns.

  Args:
    weights: [T, T] probabilities, row = query; entries at zero are left empty.
    text: T byte values, 256 and above special tokens; or T texts of tokens.

  Returns:
    SVG text.
  """
  T = len(text)
  weights = np.where(np.asarray(weights) > 0, weights, np.nan)
  figure = Figure(figsize=(8.2, 8.2), layout='constrained')
  axes = figure.subplots()
  picture = axes.imshow(weights, cmap='viridis', norm=PowerNorm(0.5, 0, np.nanmax(weights)), interpolation='nearest')
  labels = [''.join(map(glyph, token.encode())) if isinstance(token, str) else glyph(token) for token in text]
  unit = 'token' if isinstance(text[0], str) else 'byte'
  size = min(9.0, 500 / T)
  axes.set_xticks(range(T), labels, fontfamily='monospace', fontsize=size)
  axes.set_yticks(range(T), labels, fontfamily='monospace', fontsize=size)
  _axes_style(axes, grid=False)
  axes.tick_params(length=0, labelsize=size, labeltop=True, labelbottom=True, pad=2)
  axes.set_xlabel(f'key: the {unit} looked at')
  axes.set_ylabel(f'query: the {unit} that looks')
  # A causal map leaves its upper right empty.
  bar = figure.colorbar(picture, cax=axes.inset_axes((0.93, 0.45, 0.025, 0.45)))
  bar.ax.yaxis.set_ticks_position('left')
  bar.ax.yaxis.set_label_position('left')
  bar.set_label('attention weight (colours by square root)', color=INK, fontsize=9)
  bar.ax.tick_params(colors=INK, labelsize=8)
  bar.outline.set_visible(False)
  return svg(figure, 'attention')


def glyph(token):
  """One visible sign for a byte: itself, a sign for white space, two hexadecimal digits, or ∅ for a special token."""
  if token in GLYPHS:
    return GLYPHS[token]
  if token > 255:
    return '∅'
  # A lone dollar sign is plain text to matplotlib, an even number of them would be a formula.
  return chr(token) if 32 < token < 127 else f'{token:02x}'


def svg(figure, name):
  """The figure as SVG text to be put into HTML; `name` keeps its identifiers apart from those of other pictures."""
  import matplotlib

  buffer = io.StringIO()
  empty = dict.fromkeys(['Date', 'Creator', 'Format', 'Type'])
  with matplotlib.rc_context({'svg.hashsalt': name, 'svg.fonttype': 'path'}):
    figure.savefig(buffer, format='svg', transparent=True, metadata=empty)
  text = buffer.getvalue()
  text = text[text.index('<svg') :].replace(INK, 'currentColor')
  text = re.sub(r'\s*<metadata>.*?</metadata>', '', text, flags=re.S)
  # HTML knows these name spaces; width and height in points would stop the picture from shrinking with the page.
  head, body = text.split('>', 1)
  head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', '', head)
  return f'{head} role="img" style="width: 100%; max-width: {figure.get_figwidth():.1f}in">{body}'


def _running_mean(y):
  """Mean over a twentieth of the points to each side, narrower at the ends."""
  reach = max(1, len(y) // 40)
  return np.array([y[max(0, i - reach) : i + reach + 1].mean() for i in range(len(y))])


def _vertical_range(curve, levels):
  """All levels and all of a curve but its highest tenth: the first steps start near 8 bits."""
  ordered = sorted(curve) or [0.0, 8.0]
  low, high = min([*ordered, *levels]), max([ordered[int(0.9 * (len(ordered) - 1))], *levels])
  room = 0.08 * max(high - low, 0.1)
  return low - room, high + room


def _level_lines(axes, lines):
  """Horizontal lines, each named at the right edge outside the axes. Set the vertical range first."""
  ordered = sorted(lines.items(), key=lambda item: item[1])
  low, high = axes.get_ylim()
  places = _apart([y for _, y in ordered], 0.058 * (high - low))
  for (label, y), place, color in zip(ordered, places, COMPRESSOR_COLORS * 3, strict=False):
    axes.axhline(y, color=color, linewidth=1.4, linestyle=(0, (5, 3)))
    name = f'{label}  {y:.2f}'
    axes.text(1.01, place, name, transform=axes.get_yaxis_transform(), color=color, va='center', fontsize=9)


def _apart(values, gap):
  """Ascending values moved as little as needed to lie at least `gap` apart: touching ones spread about their mean."""
  groups = []
  for value in values:
    groups.append([value])
    while len(groups) > 1 and np.mean(groups[-1]) - np.mean(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2:
      last = groups.pop()
      groups[-1] += last
  return [np.mean(group) + gap * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def _axes_style(axes, grid=True):
  axes.tick_params(colors=INK, labelsize=9)
  for spine in axes.spines.values():
    spine.set_visible(False)
  for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
    label.set_color(INK)
    label.set_fontsize(10)
  if grid:
    axes.grid(axis='y', color=GREY, alpha=0.25, linewidth=0.8)
    axes.spines['bottom'].set(visible=True, color=GREY)
