"""Which pieces of which documents stand in a row together: whole documents by best fit, or one document a row.

A document of n tokens needs n + 1 places: its separator and all tokens are inputs, all tokens and the separator after
it are targets. One that needs more than a row has is cut into pieces of a whole row and a rest. The first target of a
later piece is predicted from the one token before it, the last target of the piece before; so every token is a target
once. A plan is a few arrays of numbers; no text is read to make it.
"""

import bisect
import collections
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
  """Pieces in the order of the rows they stand in.

  Attributes:
    begin: int64 [pieces], index in the stream of each piece's first input.
    length: int32 [pieces], places of each piece.
    first: int64 [rows + 1], the pieces of row r are first[r] to first[r + 1] - 1.
  """

  begin: np.ndarray
  length: np.ndarray
  first: np.ndarray

  @property
  def rows(self):
    """How many rows there are."""
    return len(self.first) - 1

  def pieces(self, rows):
    """The pieces of some rows, of none beyond the last: (begin [pieces], length [pieces], number [rows]), all int64."""
    first = self.first[np.minimum(rows, self.rows)]
    counts = self.first[np.minimum(rows + 1, self.rows)] - first
    pieces = ranges(counts) + np.repeat(first, counts)
    return self.begin[pieces], self.length[pieces].astype(np.int64), counts


def single(starts, end, seq_len):
  """One piece a row, in the order of the stream.

  Args:
    starts: int64 [documents], index in the stream of each document's separator.
    end: length of the stream.
    seq_len: T, places a row has.

  Returns:
    Plan.
  """
  begin, length = _pieces(starts, end, seq_len)
  return Plan(begin, length, np.arange(len(begin) + 1))


def documents(starts, end, seq_len):
  """Whole documents, and the rests of longer ones, put together into few rows by `best_fit`; arguments as `single`."""
  begin, length = _pieces(starts, end, seq_len)
  order, first = best_fit(length, seq_len)
  return Plan(begin[order], length[order], first)


def _pieces(starts, end, seq_len):
  """(begin, length) of all pieces in the order of the stream."""
  starts = np.asarray(starts, np.int64)
  places = np.diff(starts, append=end)
  counts = -(-places // seq_len)
  done = seq_len * ranges(counts)
  return np.repeat(starts, counts) + done, np.minimum(np.repeat(places, counts) - done, seq_len).astype(np.int32)


def ranges(counts):
  """0 .. counts[0] - 1, 0 .. counts[1] - 1, ... in one int64 array."""
  ends = np.cumsum(counts)
  return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def best_fit(lengths, seq_len):
  """Puts pieces into rows: the longest first, each where it leaves the least room, in a new row if it fits nowhere.

  All pieces of one length are placed together, and rows with equal room are kept as ranges of row numbers, so that the
  work in Python is by lengths and ranges, at most by pieces, each with a search among the rooms there are.

  Args:
    lengths: int [pieces], each 1 to seq_len.
    seq_len: T, places a row has.

  Returns:
    (order int64 [pieces], the pieces by row and, within a row, as they were placed; first int64 [rows + 1]).

  Source: best fit decreasing, Johnson 1973, Near-optimal bin packing algorithms, chapter 2; packing of documents so
    that few are cut: arXiv:2404.10830.
  """
  placing = np.argsort(-np.asarray(lengths, np.int64), kind='stable')
  row = np.empty(len(placing), np.int64)
  counts = np.bincount(lengths, minlength=seq_len + 1)
  rooms: list[int] = []  # sorted; those that some row has
  ranges_of: dict[int, collections.deque] = collections.defaultdict(collections.deque)  # {room: (row, row after)}
  rows = at = 0

  def open_range(start, stop, room):
    if start < stop and room:
      if not ranges_of[room]:
        bisect.insort(rooms, room)
      ranges_of[room].append((start, stop))

  for length in np.flatnonzero(counts)[::-1].tolist():
    left = int(counts[length])
    while left:
      i = bisect.bisect_left(rooms, length)
      if i == len(rooms):
        new = -(-left // (seq_len // length))
        open_range(rows, rows + new, seq_len)
        rows += new
        i = len(rooms) - 1
      room = rooms[i]
      start, stop = ranges_of[room].popleft()
      if not ranges_of[room]:
        del rooms[i]
      # A row that got a piece has less room than its like: it is the best fit again until it has none.
      per_row = room // length
      placed = min(left, per_row * (stop - start))
      full, rest = divmod(placed, per_row)
      row[at : at + placed] = start + np.arange(placed) // per_row
      open_range(start, start + full, room - per_row * length)
      if rest:
        open_range(start + full, start + full + 1, room - rest * length)
      open_range(start + full + bool(rest), stop, room)
      at, left = at + placed, left - placed
  by_row = np.argsort(row, kind='stable')
  return placing[by_row], np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
