"""The picture of a plan: its tiles, empty, asked and whole; rows and columns without any; the order of its list."""

import numpy as np

from attn import plan as plans
from attn.draw import cells, picture
from attn.draw.picture import BLUE, GREEN, INK, ORANGE, UNSEEN, percent
from attn.plan import lists as plan_lists

MOST_STEPS = 4096  # of the list, joined by a line


def draw(plan, at, order, title) -> picture.Picture:
  """See attn/draw/."""
  if not isinstance(plan, plans.Plan) or plan_lists.is_traced(*(x for x in vars(plan).values())):
    raise ValueError('the plan is traced or none at all, expected a Plan of known arrays')
  b, h = (_index(name, x, n) for name, x, n in zip(('row of the batch', 'head'), at, plan.nnz.shape))
  q_id, kv_id, flags = (np.asarray(x)[b, h] for x in (plan.q_id, plan.kv_id, plan.flags))
  q_id, kv_id, flags = (x[flags & plans.VALID > 0] for x in (q_id, kv_id, flags))
  visited, whole = _counts(plan, q_id, kv_id), _counts(plan, *(x[flags & plans.PARTIAL == 0] for x in (q_id, kv_id)))
  size = tuple(-(-n // cells.MOST_CELLS) for n in (plan.nq, plan.nk))
  area = cells.areas((plan.nq, plan.nk), size)
  empty = [np.bincount(x, minlength=n) == 0 for x, n in ((q_id, plan.nq), (kv_id, plan.nk))]
  tiles = plan.nq * plan.nk
  facts = {
    'visited': len(q_id) / tiles, 'full': whole.sum() / tiles, 'empty_rows': int(empty[0].sum()),
    'unused_columns': int(empty[1].sum()), 'entries': len(q_id),
  }  # fmt: skip
  words = f'{title or "plan"}: {_words(plan, facts, size)}'
  lengths = (plan.nq, plan.nk)
  width, height = picture.size(lengths)
  figure = picture.figure(max(width, 5.0), height + 0.5, words)
  axes = figure.subplots()
  colors = _colors(visited / area, whole / area)
  empty = [np.logical_and.reduceat(x, np.arange(0, len(x), n)) for x, n in zip(empty, size)]
  colors = np.where((empty[0][:, None] | empty[1])[..., None], picture.rgba(ORANGE, 0.4), colors)
  picture.paint(axes, colors, lengths, ('query block', 'key block'))
  picture.cell_lines(axes, visited.shape, lengths)
  if order:
    _path(axes, q_id, kv_id)
  picture.legend(figure, _key(visited, whole, empty))
  return picture.finished(figure, words, facts)


def _words(plan, facts, size):
  parts = [
    f'{plan.T:,} x {plan.S:,} in tiles of {plan.block_q} x {plan.block_kv}',
    f'{percent(facts["visited"])} of {plan.nq * plan.nk:,} tiles visited',
    f'{percent(facts["full"])} whole',
  ]
  for name, what in (('empty_rows', 'query block'), ('unused_columns', 'key block')):
    if facts[name]:
      parts.append(f'{facts[name]:,} {what}{"s" if facts[name] > 1 else ""} without a tile')
  if plan.row_bits is not None:
    parts.append('queries of a tile choose key blocks each for themselves')
  if size != (1, 1):
    parts.append(f'a cell is {size[0]} x {size[1]} tiles')
  return ';  '.join(parts)


def _counts(plan, q_id, kv_id):
  """Entries in each cell of the picture: [n, m]."""
  size = tuple(-(-n // cells.MOST_CELLS) for n in (plan.nq, plan.nk))
  shape = tuple(-(-n // step) for n, step in zip((plan.nq, plan.nk), size))
  place = (q_id // size[0]).astype(np.int64) * shape[1] + kv_id // size[1]
  return np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)


def _colors(visited, whole):
  """Whole tiles strong, tiles where the mask is asked pale; in cells of several tiles by their shares."""
  strength = np.where(visited > 0, 0.45 + 0.1 * visited + 0.45 * whole, 0)
  return np.where((visited > 0)[..., None], picture.rgba(BLUE, strength), picture.rgba(UNSEEN))


def _key(visited, whole, empty):
  asked = visited - whole
  entries = [(BLUE, 'visited, whole')] if whole.any() else []
  entries += [(picture.rgba(BLUE, 0.55), 'visited, the mask is asked')] if asked.any() else []
  entries += [(picture.rgba(UNSEEN), 'not visited')]
  if empty[0].any() or empty[1].any():
    entries.append((picture.rgba(ORANGE, 0.4), 'nothing in this row or column'))
  return entries


def _path(axes, q_id, kv_id):
  """A line through the tiles in the order of the list, a dot at its begin."""
  if len(q_id) > MOST_STEPS:
    raise ValueError(f'order=True for a list of {len(q_id)} tiles, expected at most {MOST_STEPS}')
  from matplotlib.patches import Circle

  axes.plot(kv_id + 0.5, q_id + 0.5, color=GREEN, linewidth=1, clip_on=False)
  if len(q_id):
    side = max(axes.get_xlim()[1], axes.get_ylim()[0])
    axes.add_patch(Circle((kv_id[0] + 0.5, q_id[0] + 0.5), 0.01 * side, color=INK, clip_on=False))


def _index(name, x, n):
  if n == 1:
    return 0
  if not 0 <= x < n:
    raise ValueError(f'{name}={x}, expected 0 to {n - 1}')
  return x
