"""Which tiles a call computes, counted from a mask or from a plan, without O(TS) memory."""

import dataclasses
import math

import jax
import numpy as np

from attn import masks, plan as plans, softmax
from attn.masks import sequence

_AT_ONCE = 2**22  # tiles that are looked at together
_BEARABLE = 2**28  # tiles that are looked at one by one


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Axis lengths of a call: batch, queries, keys, query heads, key heads, key width, value width."""

  B: int
  T: int
  S: int
  H: int
  K: int
  D: int
  V: int

  def __post_init__(self):
    for name, n in dataclasses.asdict(self).items():
      if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f'{name}={n!r} must be an integer, at least 1')
    if self.H % self.K:
      raise ValueError(f'K={self.K} key heads must divide H={self.H} query heads')

  @property
  def G(self) -> int:
    """Query heads that share a key head."""
    return self.H // self.K


@dataclasses.dataclass(frozen=True)
class Visits:
  """Tiles that are computed, summed over the batch and the key heads.

  Attributes:
    tiles: how many.
    elements: scores in them, of every query head; what lies beyond the arrays is not counted.
    partial: scores in those tiles that need the mask.
    rows: query rows in them, of every query head.
    columns: keys in them, of every key head.
    distinct_rows: the same with each row counted once, however many tiles hold it.
    distinct_columns: the same with each key counted once.
    share: elements / all scores.
    is_bound: whether these are upper bounds: the list of tiles was too long, and larger tiles were looked at.
  """

  tiles: int
  elements: int
  partial: int
  rows: int
  columns: int
  distinct_rows: int
  distinct_columns: int
  share: float
  is_bound: bool = False


def of_mask(s: Sizes, mask: masks.Mask, blocks: softmax.Blocks, shift: int = 0) -> Visits:
  """The tiles of a mask that may hold a pair, for all query heads that share a key head together.

  Where there are too many tiles to look at, larger ones are looked at first. What is certain of a large tile is certain
  of all in it; only the others are looked into. If these are too many, too, or the mask holds an array, large tiles are
  counted as they are, which is an upper bound.

  Args:
    s: axis lengths.
    mask: what hides keys.
    blocks: tile sizes, no larger than the arrays.
    shift: query t stands at position t + shift.
  """
  look = _Look(s, mask, shift)
  lead = look.tiles(softmax.Blocks(q=s.T, kv=s.S))[0].shape[:2]
  m = n = 1  # tiles in a large tile, down and across
  count = lambda: (-(-s.T // (m * blocks.q)), -(-s.S // (n * blocks.kv)))
  while math.prod((*count(), *lead)) > _AT_ONCE and count() != (1, 1):
    m, n = (2 * m, n) if count()[0] > count()[1] else (m, 2 * n)
  some, every = look.tiles(softmax.Blocks(q=m * blocks.q, kv=n * blocks.kv))
  rows, keys = _lengths(s.T, m * blocks.q), _lengths(s.S, n * blocks.kv)
  is_whole = (rows % blocks.q == 0)[:, None] & (keys % blocks.kv == 0)  # else it holds padding and needs a mask
  partial = some & ~(every & is_whole)
  is_open = partial.any((0, 1))  # [large rows, large columns]
  is_bound = m * n > 1 and (look.is_array or int(is_open.sum()) * m * n * lead[0] * lead[1] > _BEARABLE)
  refine = m * n > 1 and not is_bound
  if refine:
    some, partial = some & ~is_open, np.zeros_like(some)
  total = _Total(s, blocks, lead)
  total.add(some, partial, rows, keys)
  for i in np.flatnonzero(is_open.any(1)) if refine else ():
    columns = np.flatnonzero(is_open[i])
    parts = -(-columns.size * m * n * lead[0] * lead[1] // _AT_ONCE)
    for part in np.array_split(columns, min(parts, columns.size)):
      total.look_into(look, i, part, m, n)
  return total.visits(is_bound)


def of_plan(s: Sizes, plan: plans.Plan) -> Visits:
  """The tiles in the list of a plan; row bits do not make a tile smaller, but mean that it needs a mask.

  A plan with a list for each query head computes the tiles of each head apart.

  Raises:
    ValueError: a plan of other sizes, or a traced one.
  """
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(plan)):
    raise ValueError(f'{plan} is traced, expected known arrays: count it outside of jax.jit')
  plans.check(plan, s.B, s.H, s.K, s.T, s.S)
  q_id, kv_id, flags = (np.asarray(x) for x in (plan.q_id, plan.kv_id, plan.flags))
  Bm, Hm, _ = q_id.shape
  G = group(s, plan)
  times = s.B // Bm * (s.H // G // Hm)
  is_valid = flags & plans.VALID > 0
  is_partial = is_valid if plan.row_bits is not None else is_valid & (flags & plans.PARTIAL > 0)
  rows, keys = _lengths(plan.T, plan.block_q), _lengths(plan.S, plan.block_kv)
  count = lambda weights, where=is_valid: times * int((weights * where).sum())
  elements = G * count(rows[q_id] * keys[kv_id])
  row, column = (np.zeros((Bm, Hm, lengths.size), bool) for lengths in (rows, keys))  # which some tile holds
  for seen, ids in ((row, q_id), (column, kv_id)):
    np.logical_or.at(seen, (np.arange(Bm)[:, None, None], np.arange(Hm)[:, None], ids), is_valid)
  if G < s.G:  # heads with lists of their own share keys nevertheless
    column = np.asarray(column.reshape(Bm, s.K, s.G, -1).any(2))
  columns = s.B // Bm * (s.K // column.shape[1]) * int((column * keys).sum())
  return Visits(
    tiles=count(1), elements=elements, partial=G * count(rows[q_id] * keys[kv_id], is_partial),
    rows=G * count(rows[q_id]), columns=count(keys[kv_id]), distinct_rows=G * count(rows, row),
    distinct_columns=columns, share=elements / (s.B * s.H * s.T * s.S),
  )  # fmt: skip


def group(s: Sizes, plan: plans.Plan | None) -> int:
  """Query heads whose rows are in one tile: all that share a key head, unless a plan has a list for each."""
  return 1 if plan is not None and plan.q_id.shape[1] == s.H else s.G


def arrays_of(mask: masks.Mask) -> list:
  """The bool arrays [1 or B, 1 or H, 1 or T, 1 or S] inside a mask."""
  if isinstance(mask, sequence.Array):
    return [mask.values]
  parts: list = [getattr(mask, x.name) for x in dataclasses.fields(mask)] if dataclasses.is_dataclass(mask) else []
  return [array for part in parts if isinstance(part, masks.Mask) for array in arrays_of(part)]


class _Look:
  """What a mask says of tiles of some queries and some keys."""

  def __init__(self, s, mask, shift):
    self.s, self.mask = s, mask
    at = [np.arange(n, dtype=np.int32)[None, None] for n in (s.T, s.S)]
    self.q, self.k = masks.Tokens(at[0], at[0] + np.int32(shift) if shift else at[0]), masks.Tokens(at[1], at[1])
    self.is_array = bool(arrays_of(mask))  # which are cut by their shape and not by index

  def tiles(self, blocks, rows=slice(None), keys=slice(None)):
    """(some, every), bool [1 or B, 1 or K, nq, nk], of the queries and keys at these places."""
    s, cut = self.s, lambda x, at: masks.Tokens(x.index[..., at], x.position[..., at])
    q = masks.Boxes(cut(self.q, rows), blocks.q, False)
    k = masks.Boxes(cut(self.k, keys), blocks.kv, False)
    found = [np.asarray(x) for x in self.mask.boxes(q, k)]
    lead = np.broadcast_shapes(*(x.shape for x in found))[:2]
    shape = (*lead, *(-(-x.tokens.index.shape[-1] // x.size) for x in (q, k)))
    some, every = (np.broadcast_to(x, shape) for x in found)
    if lead[1] == 1:
      return some, every
    by_key_head = (lead[0], s.K, s.G, *shape[2:])  # a tile holds the rows of all heads that share a key head
    return some.reshape(by_key_head).any(2), every.reshape(by_key_head).all(2)


class _Total:
  """Sums over tiles [b, k, r, c]; rows and keys of tiles are equal but for the last."""

  def __init__(self, s, blocks, lead):
    self.s, self.blocks, self.times = s, blocks, s.B // lead[0] * (s.K // lead[1])
    self.sums = [0] * 5  # tiles, elements, partial elements, rows, columns
    self.rows = np.zeros((*lead, -(-s.T // blocks.q)), bool)  # which some tile holds
    self.columns = np.zeros((*lead, -(-s.S // blocks.kv)), bool)

  def add(self, some, partial, rows, keys):
    """Tiles of rows [r] and keys [c], from the first to the last of the arrays, and larger than blocks perhaps."""
    self._add(some, partial, rows, keys)
    for seen, found, lengths, size in (
      (self.rows, some.any(-1), rows, self.blocks.q), (self.columns, some.any(-2), keys, self.blocks.kv),
    ):  # fmt: skip
      seen |= np.repeat(found, -(-lengths // size), axis=-1)

  def look_into(self, look, i, columns, m, n):
    """The tiles in some large tiles of row i, each of m x n."""
    s, (bq, bk) = self.s, (self.blocks.q, self.blocks.kv)
    ids = (columns[:, None] * n + np.arange(n)).ravel()
    ids = ids[ids * bk < s.S]
    at = (ids[:, None] * bk + np.arange(bk)).ravel()
    start, end = i * m * bq, min((i + 1) * m * bq, s.T)
    some, every = look.tiles(self.blocks, slice(start, end), at[at < s.S])
    rows, keys = _lengths(end - start, bq), np.minimum(bk, s.S - ids * bk)
    partial = some & ~(every & (rows == bq)[:, None] & (keys == bk))
    self._add(some, partial, rows, keys)
    self.rows[..., i * m : i * m + rows.size] |= some.any(-1)
    self.columns[..., ids] |= some.any(-2)

  def _add(self, some, partial, rows, keys):
    down, across = -(-rows // self.blocks.q), -(-keys // self.blocks.kv)
    # All weights are equal but the last.
    dot = lambda x, w: x.sum(-1) * w[0] - x[..., -1] * (w[0] - w[-1])
    wide, tiles = dot(some, keys), dot(some, across)
    found = ((tiles, down), (wide, rows), (dot(partial, keys), rows), (tiles, rows), (wide, down))
    self.sums = [x + int((y * z).sum()) for x, (y, z) in zip(self.sums, found)]

  def visits(self, is_bound):
    s, (tiles, elements, partial, rows, columns) = self.s, (self.times * x for x in self.sums)
    held = [
      self.times * int((seen * _lengths(n, size)).sum())
      for seen, n, size in ((self.rows, s.T, self.blocks.q), (self.columns, s.S, self.blocks.kv))
    ]
    share = s.G * elements / (s.B * s.H * s.T * s.S)
    return Visits(tiles, s.G * elements, s.G * partial, s.G * rows, columns, s.G * held[0], held[1], share, is_bound)


def _lengths(n, size):
  """Tokens in each run of `size`; the last may have fewer."""
  return np.minimum(size, n - np.arange(0, n, size))
