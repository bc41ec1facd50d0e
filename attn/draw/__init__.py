"""Pictures of masks, plans and attention maps: queries down, keys to the right.

    draw.mask(masks.causal() & (masks.window(7) | masks.sink(2)), 64).save('mask.png')
    draw.mask(masks.disc(3), layout=layouts.grid(16, 16))       # and what two of the queries see on the grid
    draw.compare({'a': a, 'b': b}, 64)                          # side by side, differences marked
    draw.plan(plan.of(mask, 4096, block_q=128, block_kv=128))
    draw.attention(q=q, k=k, is_causal=True)                    # or of weights [B, H, T, S]

Each gives a Picture: `.save('x.png')`, `.save('x.svg')`, `.svg()` for a page; a notebook shows the last value of a
cell. Any length can be drawn: a picture has at most 512 cells a side, and says how many pairs are in one.
"""

from collections.abc import Mapping

import numpy as np

from attn import masks, plan as plans
from attn.draw import cells, grid_picture, picture
from attn.draw.picture import BLUE, GREEN, INK, ORANGE, UNSEEN, Picture, percent
from attn.layouts import Layout
from attn.masks import text as mask_text
from attn.masks.spatial import Placed

__all__ = ['Picture', 'attention', 'check_path', 'compare', 'mask', 'plan', 'readings']

MOST_LINES = 256
PALEST = 0.35  # of cells of which hardly any pair is allowed
MAYBE = 0.25  # of cells of which nobody knows


def mask(
  mask: masks.Mask, T: int | None = None, S: int | None = None, *, layout: Layout | None = None,
  kv_layout: Layout | None = None, query=None, tiles=None, batch=1, heads=1, at=(0, 0), positions=None,
  kv_positions=None, title: str | None = None,
) -> Picture:  # fmt: skip
  """Which queries may see which keys.

  Args:
    mask: any mask, its arrays not traced.
    T: number of queries; None is as many as the layout has.
    S: number of keys; None is as many as kv_layout has, else T.
    layout: where the tokens stand, as `masks.placed` takes it; beside the T x S picture is then drawn what some
      queries see in space: pictures as they are, videos frame by frame.
    kv_layout: of the keys; None means `layout`.
    query: the index, or indices, of queries to draw in space; None is the first and the middle one.
    tiles: (block_q, block_kv), to draw the borders of tiles.
    batch: B, for masks that depend on the row of the batch.
    heads: H, for masks that depend on the head.
    at: (row of the batch, head) to draw.
    positions: int [T] or [B, T], as in `softmax.attend`: a negative one is padding, which sees nothing.
    kv_positions: int [S] or [B, S]; a negative one is an empty slot, which is not seen; None means
      `positions` if T == S.
    title: above all; None is the mask's expression.

  Raises:
    ValueError: neither T nor a layout, more than 256 lines of tiles, `query` out of range or without a layout, or as
      `masks.dense`.
    ImportError: matplotlib is not installed.
  """
  title = mask_text.write(mask) if title is None else title
  mask, layout, kv_layout = _placed(mask, layout, kv_layout)
  T, S = _lengths(T, S, layout, kv_layout)
  mask, positions, kv_positions = _occupied(mask, positions, kv_positions, T, S)
  look = cells.Look(mask, (T, S), (batch, heads), at, (positions, kv_positions))
  found, queries = cells.of_look(look), grid_picture.queries(query, layout, T)
  words, facts = _said(found, T, S)
  if layout is None:
    width, height = picture.size((T, S))
    figure = picture.figure(width, height, f'{title}\n{words}')
    axes = figure.subplots()
  else:
    figure, axes = grid_picture.draw(look, layout, kv_layout, queries, f'{title}\n{words}')
  _mask_panel(axes, found, (T, S))
  _tile_lines(axes, tiles, T, S)
  if queries:
    picture.lines(axes, [t + 0.5 for t in queries], [], (T, S), edgecolor=ORANGE, linewidth=1)
  picture.legend(figure, _key(found) + ([(ORANGE, 'the query itself')] if queries else []))
  return picture.finished(figure, f'{title}: {words}', facts)


def compare(
  panels: Mapping[str, masks.Mask], T: int, S: int | None = None, *, batch=1, heads=1, at=(0, 0), title: str = ''
) -> Picture:
  """Masks side by side; of two, the pairs are marked that one allows and the other does not.

  Args:
    panels: title -> mask, one to four.
    T: number of queries.
    S: number of keys; None means T.
    batch, heads, at: as in `mask`.
    title: above all.

  Raises:
    ValueError: no masks or more than four, or as `masks.dense`.
    ImportError: matplotlib is not installed.
  """
  if not 1 <= len(panels) <= 4:
    raise ValueError(f'panels has {len(panels)} masks, expected one to four')
  S = T if S is None else S
  where = {'batch': batch, 'heads': heads, 'at': at}
  found = {name: cells.of(mask, T, S, **where) for name, mask in panels.items()}
  width, height = picture.size((T, S), 4.2 if len(panels) <= 2 else 3.2)
  only = _differences(list(panels.values()), T, S, where)
  facts, key, spoken = {'differ': any(x.any() for x in only)} if only else {}, [], []
  if only and not facts['differ']:
    title = f'{title}\nboth allow the same pairs here'.strip()
  figure = picture.figure(width * len(panels), height + 0.5, title or ' ')
  for n, (axes, (name, one)) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False).flat, found.items())):
    words, facts[name] = _said(one, T, S)
    _mask_panel(axes, one, (T, S), only[n] if only else None)
    lines = picture.broken(name, int(width / picture.CHARACTER) - 8) + picture.broken(words, int(width * 12))
    axes.set_title('\n'.join(lines), loc='left', fontsize=picture.LABEL_SIZE, color=INK, parse_math=False)
    axes.set_ylabel('query' if n == 0 else '')
    key += [x for x in _key(one) if x not in key]
    spoken.append(f'{name}: {words}')
  if only:
    key += [(GREEN, 'seen here and not beside')] if facts['differ'] else []
  picture.legend(figure, key)
  return picture.finished(figure, '. '.join([title, *spoken] if title else spoken), facts)


def readings(text: str, T: int, S: int | None = None, *, title: str = '') -> Picture:
  """A mask that is written as text; if `&` and `|` meet in it without brackets, also what was perhaps meant.

      causal() & window(3) | sink(1)   is   (causal() & window(3)) | sink(1)
                                  and not   causal() & (window(3) | sink(1))

  Raises:
    ValueError: as `mask_text.parse`.
    ImportError: matplotlib is not installed.
  """
  found, other = mask_text.parse(text), mask_text.rebracketed(text)
  if other is None:
    return mask(found, T, S, title=f'{title}\n{mask_text.write(found)}' if title else None)
  words = f'{" ".join(text.split())}   without brackets: & binds tighter than |'
  title = f'{title}\n{words}' if title else words
  panels = {f'as read: {mask_text.write(found)}': found, f'perhaps meant: {other}': mask_text.parse(other)}
  return compare(panels, T, S, title=title)


def plan(plan: plans.Plan, *, at=(0, 0), order: bool = False, title: str | None = None) -> Picture:
  """Which tiles a plan visits, and which of them whole.

  Args:
    plan: a Plan, not traced.
    at: (row of the batch, head) to draw; 0 where the plan does not tell them apart.
    order: whether to join the tiles by a line in the order of the list.
    title: above all; None is the size of the plan.

  Raises:
    ValueError: a traced plan; `at` out of range.
    ImportError: matplotlib is not installed.
  """
  from attn.draw import plan_picture

  return plan_picture.draw(plan, at, order, title)


def attention(
  weights=None, *, q=None, k=None, b: int = 0, scale='linear', labels=None, kv_labels=None, title: str = '', **options
) -> Picture:
  """Attention maps, one for each head.

  Args:
    weights: [T, S], [H, T, S] or [B, H, T, S] probabilities. None computes them from q and k.
    q: [B, T, H, D] queries.
    k: [B, S, K, D] keys.
    b: row of the batch to draw.
    scale: 'linear' or 'log': what colours go by. Weights of zero are left empty.
    labels: T words, to be written beside the queries; kv_labels: S words, None means labels if T == S.
    kv_labels: see labels.
    title: above all.
    **options: of `softmax.attend`, with q and k: mask, bias, score, sinks, soft_cap and the others.

  Raises:
    ValueError: neither weights nor q and k, or both; shapes or an option that do not fit; more than 64 heads.
    ImportError: matplotlib is not installed.
  """
  from attn.draw import attention_picture

  if (weights is None) == (q is None or k is None) or (weights is not None and options):
    raise ValueError('expected either weights alone, or q and k with options of softmax.attend')
  if weights is None:
    maps = attention_picture.from_queries(q, k, b, options)
  else:
    maps = attention_picture.from_weights(weights, b)
  return attention_picture.draw(maps, scale, labels, kv_labels, title)


check_path = picture.check_path


def _placed(mask, layout, kv_layout):
  """The mask with its layouts, and these; a placed mask brings its own."""
  if isinstance(mask, Placed):
    if layout is not None:
      raise ValueError('layout is given, and the mask has one already (masks.placed): expected one of them')
    return mask, mask.q_layout, mask.kv_layout
  if layout is None:
    if kv_layout is not None:
      raise ValueError('kv_layout is given without layout')
    return mask, None, None
  kv_layout = layout if kv_layout is None else kv_layout
  return masks.placed(mask, layout, kv_layout), layout, kv_layout


def _lengths(T, S, layout, kv_layout):
  if T is None and layout is None:
    raise ValueError('T=None without a layout, expected the number of queries')
  T = len(layout) if T is None else T
  return T, (S if S is not None else T if kv_layout is None else len(kv_layout))


def _occupied(mask, positions, kv_positions, T, S):
  """The mask without padding, which softmax.attend hides; positions of the keys by its rule."""
  if kv_positions is None and T == S:
    kv_positions = positions
  hides = positions is not None or kv_positions is not None
  return (mask & masks.Occupied() if hides else mask), positions, kv_positions


def _said(found, T, S):
  """The numbers of a mask in words, and by name."""
  q, kv = found.size
  words = [
    f'T = {T:,}' + (f', S = {S:,}' if T != S else ''),
    f'{percent(found.total, found.is_exact)} of the pairs seen',
  ]
  if found.empty_rows:
    words.append(f'{found.empty_rows:,} {"queries see" if found.empty_rows > 1 else "query sees"} nothing')
  if (q, kv) != (1, 1):
    words.append(f'a cell is {q:,} x {kv:,} pairs' + ('' if found.is_exact else ', 16 of them looked at'))
  facts = {'share': found.total, 'empty_rows': found.empty_rows, 'cell': (q, kv), 'is_exact': found.is_exact}
  return ';  '.join(words), facts


def _mask_panel(axes, found, lengths, only=None):
  """The cells: empty, allowed in part or whole; rows that see nothing; cells that are allowed in `only` this panel."""
  share = found.share
  colors = np.where((share > 0)[..., None], picture.rgba(BLUE, PALEST + (1 - PALEST) * share), picture.rgba(UNSEEN))
  colors = np.where(found.is_maybe[..., None], picture.rgba(BLUE, MAYBE), colors)
  if only is not None:
    colors = np.where((only > 0)[..., None], picture.rgba(GREEN, PALEST + (1 - PALEST) * only), colors)
  colors = np.where(found.empty[:, None, None], picture.rgba(ORANGE, 0.4), colors)
  picture.paint(axes, colors, lengths)
  picture.cell_lines(axes, share.shape, lengths)


def _key(found):
  """The legend of a mask: what is in the picture and no more."""
  entries = [(BLUE, 'seen')] if (found.share > 0).any() else []
  if ((found.share > 0) & (found.share < 1)).any():
    entries.append((picture.rgba(BLUE, 0.5), 'some pairs seen'))
  if found.is_maybe.any():
    entries.append((picture.rgba(BLUE, MAYBE), 'few or none'))
  if found.empty.any():
    entries.append((picture.rgba(ORANGE, 0.4), 'queries that see nothing'))
  return entries


def _differences(panels, T, S, where):
  """For two masks, the share of each cell that only the one, and only the other, allows."""
  if len(panels) != 2:
    return None
  a, b = panels
  return [cells.of(x, T, S, **where).share for x in (a & ~b, b & ~a)]


def _tile_lines(axes, tiles, T, S):
  if tiles is None:
    return
  block_q, block_kv = tiles
  for name, block, n in (('block_q', block_q, T), ('block_kv', block_kv, S)):
    if block < 1 or n / block > MOST_LINES:
      raise ValueError(f'{name}={block} of tiles makes {n / max(block, 1):.0f} lines, expected at most {MOST_LINES}')
  picture.lines(axes, range(0, T + 1, block_q), range(0, S + 1, block_kv), (T, S), alpha=0.6, linewidth=0.7)
