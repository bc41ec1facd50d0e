"""Radial attention: the farther two frames are apart, the nearer in space a key must be; as pairs, and as whole tiles.

With dt frames between query and key, P tokens a frame, N = 2^bitlength(P) and g = bitlength(dt), a pair is dx tokens
apart in the flattened frame and allowed where

    dt <= 1,  or  dx <= max(decay * N / 2^g, block)  and  (N / 2^g >= block  or  dt % floor(block / (N / 2^g)) == 0)

The published code runs whole tiles and no pairs, so it must round: `tiles` does that; see there for the rules.

Source: arXiv:2506.19852; its code, radial_attn/attn_mask.py.
"""

import math

import numpy as np

from attn.arguments import integer
from attn.masks.predicates import UNKNOWN, Mask, Verdict, column, register, row, static
from attn.masks.spatial import apart, both, bounds, can_read, on_grid, product, take

RULES = ('exact', 'any', 'majority')


@register
class Radial(Mask):
  shape: tuple = static()
  decay: float = static()
  block: int = static()
  has_sink: bool = static()

  def reach(self):
    """The largest dx allowed at every dt, int64 [F]; -1 where no pair is."""
    frames, tokens = self._sizes()
    size, reach = 2 ** tokens.bit_length(), np.full(frames, tokens)
    for dt in range(2, frames):
      length = size / 2 ** dt.bit_length()
      is_kept = length >= self.block or dt % int(self.block / length) == 0
      reach[dt] = min(tokens, max(self.decay * length, self.block)) if is_kept else -1
    return reach

  def tile(self, q, k, batch, heads):
    (q_frame, q_space, q_there), (k_frame, k_space, k_there) = self._place(q), self._place(k)
    dt, dx = abs(column(k_frame) - row(q_frame)), abs(column(k_space) - row(q_space))
    seen = dx <= take(self.reach().astype(np.int32), dt)
    if self.has_sink:
      seen |= column(k_frame) == 0
    return seen & q_there[..., :, None] & k_there[..., None, :]

  def boxes(self, q, k):
    if not can_read(q, k):
      return UNKNOWN
    (q_frame, q_space, q_there), (k_frame, k_space, k_there) = self._place(q.tokens), self._place(k.tokens)
    frames = bounds(q, q_frame, k, k_frame)
    dt_low, dt_high = apart(*frames)
    dx_low, dx_high = apart(*bounds(q, q_space, k, k_space))
    least, most = self._over_ranges()
    between = dt_low * self.shape[0] + dt_high
    some, every = dx_low <= take(most, between), dx_high <= take(least, between)
    if self.has_sink:
      some, every = some | (frames[2] == 0), every | (frames[3] == 0)
    return both(Verdict(some, every), product(q, q_there, k, k_there))

  def density(self):
    """Allowed pairs as a fraction of all, from counting pairs of frames."""
    frames, tokens = self._sizes()
    pairs = lambda reach: sum((2 - (dx == 0)) * (tokens - dx) for dx in range(min(reach, tokens - 1) + 1))
    counts = {reach: pairs(reach) for reach in self.reach().tolist()}
    total = 0
    for dt, reach in enumerate(self.reach().tolist()):
      couples = (frames - dt) * (2 if dt else 1)
      sunk = min(couples, 1) if self.has_sink else 0  # the couple whose key is in frame 0
      total += (couples - sunk) * counts[reach] + sunk * tokens**2
    return total / (frames * tokens) ** 2

  def tiles(self, size: int, rule: str = 'exact'):
    """Whole tiles of size x size pairs of tokens in (frame, place) order, as plan.from_blocks takes them.

    Args:
      size: tokens of a tile.
      rule: 'exact' visits every tile with an allowed pair, and the mask is evaluated where not all are. The others
        visit whole tiles and evaluate nothing: 'any' those with an allowed pair, a superset of the mask; 'majority',
        as published, those where of the key columns with an allowed pair more than 60 % have more than size / 3,
        judged apart for every two frames: neither a superset nor a subset. (There, tokens of a frame that begins
        late in a tile may fall off the end; here none do.)

    Returns:
      (chosen, partial): bool [n, n] each, the tiles to visit and those that need the mask.

    Raises:
      ValueError: size below 1, or an unknown rule.
    """
    size = integer('size', size, 1)
    if rule not in RULES:
      raise ValueError(f'rule={rule!r}, expected one of {", ".join(RULES)}')
    frames, tokens = self._sizes()
    n = -(-frames * tokens // size)
    reach, counted = self.reach().tolist(), {}
    chosen, inside = np.zeros((n, n), bool), np.zeros((n, n), np.int64)
    for i, j in np.ndindex(frames, frames):
      width = tokens if self.has_sink and j == 0 else reach[abs(i - j)]
      key = width, i * tokens % size, j * tokens % size
      if key not in counted:
        counted[key] = _count(*key, tokens, size)
      pairs, is_dense = counted[key]
      top, left = i * tokens // size, j * tokens // size
      at = slice(top, top + pairs.shape[0]), slice(left, left + pairs.shape[1])
      inside[at] += pairs
      chosen[at] |= is_dense if rule == 'majority' else pairs > 0
    ends = np.minimum(np.arange(1, n + 1) * size, frames * tokens)
    whole = np.diff(ends, prepend=0)
    partial = chosen & (inside < whole[:, None] * whole) if rule == 'exact' else np.zeros_like(chosen)
    return chosen, partial

  def _sizes(self):
    """(frames, tokens of a frame)."""
    return self.shape[0], math.prod(self.shape[1:])

  def _place(self, tokens):
    """(frame, place in the frame, whether the token is in the video)."""
    (frame, *space), there = on_grid(tokens, self.shape)
    place = space[0]
    for x, n in zip(space[1:], self.shape[2:]):
      place = place * n + x
    return frame, place, there

  def _over_ranges(self):
    """Least and largest reach over all dt of low..high, flat [F * F] at low * F + high."""
    reach, frames = self.reach(), self.shape[0]
    least, most = np.zeros((2, frames, frames), np.int32)
    for low in range(frames):
      least[low, low:] = np.minimum.accumulate(reach[low:])
      most[low, low:] = np.maximum.accumulate(reach[low:])
    return least.ravel(), most.ravel()


def _count(reach, top, left, tokens, size):
  """Of two frames that begin `top` and `left` into their first tiles: (allowed pairs, is it dense) of every tile."""
  rows, columns = (np.clip(np.arange(-(-(skip + tokens) // size) + 1) * size - skip, 0, tokens) for skip in (top, left))
  x = np.arange(tokens)
  # For each tile of queries and each key, the queries within reach.
  low, high = np.maximum(rows[:-1, None], x - reach), np.minimum(rows[1:, None], x + reach + 1)
  seen = np.clip(high - low, 0, None) if reach >= 0 else np.zeros_like(low)
  total = lambda values: np.add.reduceat(values.astype(np.int64), columns[:-1], axis=1)
  return total(seen), 10 * total(3 * seen > size) > 6 * total(seen > 0)
