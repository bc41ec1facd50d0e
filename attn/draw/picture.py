"""A picture and its look: figures that save as PNG and as SVG which stands inside HTML, light or dark.

Needs matplotlib (`pip install -e .[draw]`), which nothing else of `attn` does; it is imported at the first picture.
"""

import dataclasses
import html
import io
import os
import pathlib
import re
from typing import Any

import numpy as np

# Replaced by `currentColor` in SVG, so that one picture serves light and dark pages.
INK = '#0a0b0c'
BLUE, ORANGE, GREEN, GREY = '#3b82c4', '#e07b39', '#3f9c6b', '#8a8f98'
UNSEEN = '#80858c24'
SUFFIXES = ('.png', '.svg')
MOST_LINES = 8  # of a title
RESOLUTION = 150  # of a PNG, per inch
TITLE_SIZE, LABEL_SIZE = 9.5, 9
CHARACTER = 0.6 * TITLE_SIZE / 72  # inches that one of a title's takes: monospaced letters are 0.6 of their height


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
  """A drawn figure; a notebook shows it as the last value of a cell.

  Attributes:
    figure: of matplotlib.
    title: what it shows, in words; for those who cannot see it.
    facts: the numbers in the title, by name.
  """

  figure: Any
  title: str
  facts: dict

  def save(self, path) -> None:
    """Writes a file, PNG or SVG by its suffix, over what was there.

    Raises:
      ValueError: as `check_path`.
      OSError: the file cannot be written.
    """
    path = check_path(path)
    if path.suffix.lower() == '.png':
      path.write_bytes(self.png())
      return
    # A file has no page to take its text colour from; an image in a page does see whether the reader prefers dark.
    colors = 'svg{color:#1b1d20}@media(prefers-color-scheme:dark){svg{color:#e4e7eb}}'
    head, body = self.svg().split('>', 1)
    path.write_text(f'{head}><style>{colors}</style>{body}\n', encoding='utf-8')

  def png(self) -> bytes:
    """The picture as a PNG file, on white."""
    buffer = io.BytesIO()
    self.figure.savefig(buffer, format='png', dpi=RESOLUTION, facecolor='white', metadata={'Software': None})
    return buffer.getvalue()

  def svg(self) -> str:
    """The picture as SVG to be put into HTML: no XML header, no identifiers, text in the colour of the page."""
    import matplotlib

    buffer = io.StringIO()
    empty = dict.fromkeys(['Date', 'Creator', 'Format', 'Type'])
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'attn'}):
      self.figure.savefig(buffer, format='svg', transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index('<svg') :].strip().replace(INK, 'currentColor')
    text = re.sub(r'\s*<(metadata|style|defs)\b[^>]*?(/>|>.*?</\1>)|\s*<!--.*?-->', '', text, flags=re.S)
    text = re.sub(r'\s+id="[^"]*"', '', text).replace('xlink:href="data:', 'href="data:')
    head, body = text.split('>', 1)
    # Width and height in points would stop the picture from shrinking with the page.
    head = re.sub(r'\s(xmlns:\w+|width|height|version)="[^"]*"', '', head)
    label = html.escape(self.title, quote=True)
    style = f'width: 100%; max-width: {self.figure.get_figwidth():.1f}in'
    return f'{head} role="img" aria-label="{label}" style="{style}">{body}'

  _repr_png_ = png


def check_path(path) -> pathlib.Path:
  """The path of a picture that can be written, for all that can be known before.

  Raises:
    ValueError: a suffix that is none of SUFFIXES, a folder that is not there or cannot be written to.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() not in SUFFIXES:
    raise ValueError(f'{str(path)!r} ends in {path.suffix or "no suffix"!r}, expected {" or ".join(SUFFIXES)}')
  if not path.parent.is_dir():
    raise ValueError(f'{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}')
  if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
    raise ValueError(f'{str(path)!r} cannot be written: {"it is a folder" if path.is_dir() else "permission denied"}')
  return path


def figure(width: float, height: float, title: str):
  """An empty figure with a title at its upper left, of inches; text that is too long for a line is broken.

  Raises:
    ImportError: matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError('drawing needs matplotlib, in the extra `draw`: pip install -e .[draw]') from error
  lines = [line for part in title.split('\n') for line in broken(part, int(width / CHARACTER) - 3)]
  made = Figure(figsize=(width, height + (TITLE_SIZE * 1.4 / 72) * len(lines)), layout='constrained')
  made.suptitle(
    '\n'.join(lines), x=0.01, ha='left', fontsize=TITLE_SIZE, color=INK, family='monospace', parse_math=False
  )
  return made


def broken(text: str, width: int) -> list[str]:
  """Text in at most eight lines of so many characters; lines after the first are indented.

  Broken at blanks, and behind a comma only where a word and its arguments are longer than a line.
  """
  words = re.split(r'(?<!,) ', text)
  words = [part for word in words for part in (word.split(' ') if len(word) > width - 2 else [word])]
  lines = ['']
  for word in words:
    if lines[-1].strip() and len(lines[-1]) + 1 + len(word) > width:
      lines.append('  ' + word)
    else:
      lines[-1] += (' ' if lines[-1] else '') + word
  return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], '  ...']


def finished(figure, title: str, facts: dict) -> Picture:
  """The picture of a figure to which nothing is added."""
  # Axes of fixed aspect move their titles when they are moved: the layout settles at the third time.
  for _ in range(2):
    figure.draw_without_rendering()
  return Picture(figure, ' '.join(title.split()), facts)


def paint(axes, colors, lengths, labels=('query', 'key')):
  """An image [n, m, 4] of 0..1 over queries 0..T downwards and keys 0..S to the right."""
  T, S = lengths
  # 'none' leaves a cell a pixel in SVG, which browsers are told to enlarge without blurring.
  image = axes.imshow(colors, interpolation='none', extent=(0, S, T, 0), aspect=_aspect(T, S))
  image.set_clip_on(False)  # a clip path is an identifier in SVG
  # A side that is drawn shorter than the other has room for fewer numbers.
  for axis, n, other, label in ((axes.yaxis, T, S, labels[0]), (axes.xaxis, S, T, labels[1])):
    places = ticks(n, max(3, round(16 * max(0.25, min(1, n / other)))))
    axis.set_ticks([x + 0.5 for x in places], [number(x) for x in places])
    axis.set_label_text(label)
  style(axes)
  return image


def style(axes):
  axes.tick_params(colors=INK, labelsize=LABEL_SIZE, length=0)
  for spine in axes.spines.values():
    spine.set_visible(False)
  for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
    label.set(color=INK, fontsize=LABEL_SIZE)


def lines(axes, rows, columns, lengths, **options):
  """Horizontal lines at `rows` and vertical ones at `columns`, as one path."""
  from matplotlib.patches import PathPatch
  from matplotlib.path import Path

  T, S = lengths
  points = [p for y in rows for p in ((0, y), (S, y))] + [p for x in columns for p in ((x, 0), (x, T))]
  if points:
    path = Path(points, [Path.MOVETO, Path.LINETO] * (len(points) // 2))
    axes.add_patch(PathPatch(path, fill=False, clip_on=False, **{'edgecolor': INK, 'linewidth': 0.6, **options}))


def cell_lines(axes, shape, lengths):
  """Faint lines between cells, where there are few."""
  (n, m), (T, S) = shape, lengths
  if max(n, m) <= 40:
    lines(axes, np.linspace(0, T, n + 1), np.linspace(0, S, m + 1), lengths, alpha=0.15)


def legend(figure, entries):
  """Coloured squares with words below the picture: [(colour, words), ...]."""
  from matplotlib.patches import Patch

  if entries:
    handles = [Patch(facecolor=color, label=words) for color, words in entries]
    # As many columns as fit: a square takes as much room as six letters.
    longest = max(len(words) for _, words in entries) + 6
    columns = max(1, min(len(entries), int(figure.get_figwidth() / (0.55 * LABEL_SIZE / 72 * longest))))
    figure.legend(
      handles=handles, loc='outside lower left', ncols=columns, frameon=False, fontsize=LABEL_SIZE, labelcolor=INK,
      handlelength=1, handleheight=1, columnspacing=1.5,
    )  # fmt: skip


def rgba(color, alpha: Any = 1.0):
  """A colour with its own transparency times alpha [...], as [..., 4]."""
  from matplotlib.colors import to_rgba

  *rgb, own = to_rgba(color)
  alpha = np.asarray(alpha, float)
  return np.concatenate([np.broadcast_to(rgb, (*alpha.shape, 3)), own * alpha[..., None]], axis=-1)


def ticks(n: int, most: int = 16) -> list[int]:
  """All numbers from 0 to below n, or round ones, nine at most, where there is no room for all."""
  if n <= most:
    return list(range(n))
  if n <= 4096 and n % 32 == 0:
    steps = (2**i for i in range(64))
  else:
    steps = (a * 10**i for i in range(20) for a in (1, 2, 5))
  step = next(x for x in steps if n <= min(8.5, most) * x)
  return list(range(0, n, step))


def number(x: int) -> str:
  """Digits; from 10,000 on in thousands or millions if they are whole."""
  for unit, letter in ((10**6, 'M'), (10**3, 'k')):
    if x >= 10_000 and (x % unit == 0 or (unit == 10**6 and x >= unit and x % 100_000 == 0)):
      return f'{x / unit:g}{letter}'
  return f'{x:,}'


def percent(share: float, is_exact=True) -> str:
  """'12.3 %', with 'about' if it is not exact."""
  digits = f'{100 * share:.3g}' if share < 0.9995 or share == 1 else f'{100 * share:.6g}'
  return f'{"" if is_exact else "about "}{digits}\u00a0%'


def size(lengths, inches=4.6):
  """Width and height of an image of lengths [T, S] and its labels."""
  T, S = lengths
  ratio = T / S if _aspect(T, S) == 'equal' else (0.25 if T < S else 4)
  return min(inches, inches / ratio) + 0.8, min(inches, inches * ratio) + 0.6


def _aspect(T, S):
  return 'equal' if 0.25 <= T / S <= 4 else 'auto'
