"""What share of its pairs a mask allows, on a grid coarse enough to be looked at, whatever the length.

A picture has so many cells a side and no more. Up to 16 million pairs are counted one by one. Beyond, cells that the
mask is certain of (attn/masks/: `verdicts`) are what it says, and of the others 16 pairs each are looked at.
"""

import dataclasses
from typing import Any

import numpy as np

from attn import masks
from attn.masks.predicates import Mask, Tokens

MOST_CELLS = 512  # on a side of a picture
MOST_PAIRS = 2**24  # counted one by one
AT_ONCE = 2**22  # pairs evaluated together
LOOKS = 4  # queries, and keys, of a cell that are looked at where not all are


@dataclasses.dataclass(frozen=True)
class Cells:
  """Queries down, keys to the right, in cells of `size` queries and keys (those at the end may have fewer).

  Attributes:
    share: float32 [n, m], allowed pairs over all pairs of a cell; 0 and 1 where that is known to be exact.
    is_maybe: bool [n, m], cells of share 0 of which not all pairs were looked at.
    empty: bool [n], cells all of whose queries are known to see nothing.
    total: allowed pairs over all pairs.
    empty_rows: queries that see nothing; None where not counted.
    size: (queries, keys) of a cell.
    is_exact: whether all pairs were looked at.
  """

  share: np.ndarray
  is_maybe: np.ndarray
  empty: np.ndarray
  total: float
  empty_rows: int | None
  size: tuple[int, int]
  is_exact: bool


def of(
  mask: Mask, T: int, S: int | None = None, *, batch=1, heads=1, at=(0, 0), positions=None, kv_positions=None,
  most=MOST_CELLS,
) -> Cells:  # fmt: skip
  """The cells of one row of the batch and one head.

  Args:
    mask: any mask, its arrays not traced.
    T: number of queries.
    S: number of keys; None means T.
    batch: B, for masks that depend on the row of the batch.
    heads: H, for masks that depend on the head.
    at: (row of the batch, head).
    positions: int [T] or [B, T]; None means 0..T-1.
    kv_positions: int [S] or [B, S].
    most: cells on a side.

  Raises:
    ValueError: as `masks.dense`; `at` out of range; T or S below 1.
  """
  return of_look(Look(mask, (T, T if S is None else S), (batch, heads), at, (positions, kv_positions)), most)


@dataclasses.dataclass(frozen=True)
class Look:
  """A mask and all that its pairs depend on."""

  mask: Mask
  lengths: tuple[int, int]
  counts: tuple[int, int]
  at: tuple[int, int]
  positions: tuple[Any, Any]

  def seen(self, queries, keys):
    """bool [t, s] of some queries and some keys, given by index, in rows few enough at a time."""
    rows = max(1, AT_ONCE // (len(keys) * self.counts[0] * self.counts[1]))
    k = self._tokens(keys, self.positions[1])
    parts = []
    for i in range(0, len(queries), rows):
      part = queries[i : i + rows]
      # Of numpy, so that most masks are evaluated without compiling anything.
      tile = self.mask.tile(self._tokens(part, self.positions[0]), k, *self.counts)
      parts.append(np.broadcast_to(np.asarray(_one(tile, self.at)), (len(part), len(keys))))
    return np.concatenate(parts)

  def _tokens(self, index, positions):
    index = index[None, None]
    if positions is None:
      return Tokens(index, index)
    return Tokens(index, np.atleast_2d(np.asarray(positions))[:, index[0, 0]][:, None])


def of_look(look: Look, most=MOST_CELLS) -> Cells:
  """`of`, of its arguments in one."""
  (T, S), (batch, heads), at, positions = look.lengths, look.counts, look.at, look.positions
  for name, n in (('T', T), ('S', S)):
    if n < 1:
      raise ValueError(f'{name}={n}, expected at least 1')
  for name, n, count in (('row of the batch', at[0], batch), ('head', at[1], heads)):
    if not 0 <= n < count:
      raise ValueError(f'{name}={n}, expected 0 to {count - 1}')
  size = -(-T // most), -(-S // most)
  verdict = masks.verdicts(
    look.mask, T, S, block_q=size[0], block_kv=size[1], batch=batch, heads=heads, positions=positions[0],
    kv_positions=positions[1],
  )  # fmt: skip
  some, every = (np.asarray(_one(x, at)) for x in verdict)
  return _counted(look, size) if T * S <= MOST_PAIRS else _sampled(look, size, some, every)


def pooled(x, size):
  """Sums of x [t, s] over cells of size[0] x size[1]: float64 [n, m]."""
  for axis, n in enumerate(size):
    if n > 1:
      x = np.add.reduceat(x, np.arange(0, x.shape[axis], n), axis=axis, dtype=np.float64)
  return x.astype(np.float64)


def areas(lengths, size):
  """Pairs in each cell: int64 [n, m]."""
  rows, columns = (np.minimum(n, n_all - np.arange(0, n_all, n)) for n_all, n in zip(lengths, size))
  return rows[:, None] * columns


def _counted(look, size):
  (T, S), keys = look.lengths, np.arange(look.lengths[1], dtype=np.int32)
  step = max(1, AT_ONCE // S // size[0]) * size[0]
  counts, rows = [], []
  for i in range(0, T, step):
    seen = look.seen(np.arange(i, min(T, i + step), dtype=np.int32), keys)
    counts.append(pooled(seen, size))
    rows.append(seen.any(1))
  count, sees = np.concatenate(counts), np.concatenate(rows)
  share, empty = count / areas((T, S), size), count.sum(1) == 0
  total = float(count.sum() / (T * S))
  return Cells(share.astype(np.float32), np.zeros(share.shape, bool), empty, total, int((~sees).sum()), size, True)


def _sampled(look, size, some, every):
  rng = np.random.default_rng(0)  # the same picture each time
  (queries, n), (keys, m) = (_chosen(rng, length, b) for length, b in zip(look.lengths, size))
  share = pooled(look.seen(queries, keys), (n, m)) / (n * m)
  share = np.where(every, 1, np.where(some, share, 0))
  total = float((share * areas(look.lengths, size)).sum() / (look.lengths[0] * look.lengths[1]))
  return Cells(share.astype(np.float32), some & (share == 0), ~some.any(1), total, None, size, False)


def _chosen(rng, length, size):
  """For each cell of `size` tokens so many of them, at random in equal parts of it; and how many."""
  looks, begin = min(LOOKS, size), np.arange(0, length, size)
  # The last cell may be shorter, and then names some tokens twice.
  width = np.minimum(size, length - begin)[:, None]
  part = np.arange(looks) + rng.random((len(begin), looks))
  return (begin[:, None] + (part * width / looks).astype(np.int64)).reshape(-1).astype(np.int32), looks


def _one(x, at):
  """Of [1 or B, 1 or H, ...] the row and head `at`."""
  return x[at[0] if x.shape[0] > 1 else 0, at[1] if x.shape[1] > 1 else 0]
