"""How much faster a sparse pattern can be at a given tile size, counted from the tiles that are visited.

Skipped pairs save time only where a whole tile of them is skipped, so the ratio of FLOPs is an upper bound that few
patterns reach. The count is exact and needs no device:

    print(simulate.neighborhood((30, 48, 80), (18, 24, 24), q_tile=(2, 8, 8)))

Source: arXiv:2504.16922 (generalized neighborhood attention; its own simulator is not public).
"""

import dataclasses
import functools
import heapq
import math

import jax
import jax.numpy as jnp
import numpy as np

from attn import masks, plan as plans
from attn.arguments import integer, integers
from attn.masks import spatial


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
  """The tiles that a pattern visits, beside those of full attention. Ratios are of full attention to the pattern.

  Attributes:
    visits: int [n], key tiles that each query tile visits, of all query tiles (and rows of the batch, and heads).
    full: int [n], how many of these need no mask: every pair is allowed, and the tile lies inside the arrays.
    tiles: key tiles in all.
    flop_ratio: all pairs to allowed pairs, which no tile size can beat; None where pairs were not counted.
  """

  visits: np.ndarray
  full: np.ndarray
  tiles: int
  flop_ratio: float | None = None

  @property
  def mean(self) -> float:
    """All tiles to visited tiles: the speed-up of a device that is busy to the end."""
    total = int(self.visits.sum())
    return self.visits.size * self.tiles / total if total else math.inf

  @property
  def worst(self) -> float:
    """The same for the query tile that visits most: the speed-up where all query tiles run at once."""
    most = int(self.visits.max())
    return self.tiles / most if most else math.inf

  @property
  def full_share(self) -> float:
    """Visited tiles that need no mask, as a share."""
    total = int(self.visits.sum())
    return int(self.full.sum()) / total if total else 1.0

  def speedup(self, workers: int, *, partial_cost: float = 0.0, copies: int = 1) -> float:
    """`mean` with one worker, `worst` with one for each query tile. Who is done with one takes the next.

    Args:
      workers: cores that work side by side, each on one query tile.
      partial_cost: time that the mask adds to a tile, as a fraction of the time of a full tile.
      copies: how often the pattern is worked through in one call: rows of the batch times heads.

    Raises:
      ValueError: workers or copies below 1, partial_cost below 0.
    """
    workers, copies = integer('workers', workers, 1), integer('copies', copies, 1)
    if not partial_cost >= 0:
      raise ValueError(f'partial_cost={partial_cost} must be at least 0')
    times = np.tile(self.visits + partial_cost * (self.visits - self.full), copies)
    free = [0.0] * min(workers, times.size)  # when each worker is done
    for time in times:
      heapq.heapreplace(free, free[0] + float(time))
    last = max(free)
    return -(-times.size // workers) * self.tiles / last if last else math.inf

  def __str__(self):
    pairs = '' if self.flop_ratio is None else f'{_times(self.flop_ratio)} fewer pairs, '
    return (
      f'{pairs}{_times(self.mean)} fewer tiles ({_times(self.worst)} where most are visited), '
      f'{self.full_share:.0%} of them full; {self.visits.mean():.1f} of {self.tiles} key tiles per query tile'
    )


def neighborhood(shape, window, stride=1, dilation=1, is_causal=False, *, q_tile, kv_tile=None) -> Report:
  """The report of `masks.neighborhood` on a grid whose tokens are permuted so that tiles are boxes.

  On each axis a query tile [a, b) visits the key tiles from the least start to the greatest end of its windows, and
  fills those that lie between the greatest start and the least end; axes multiply. With dilation, tiles hold tokens of
  one dilation group, as those of `Layout.tiled` do.

  Args:
    shape: tokens on each axis.
    window: as `masks.neighborhood`, like stride, dilation and is_causal.
    stride: queries that share a window.
    dilation: distance of neighbors.
    is_causal: which axes only look back.
    q_tile: tokens of a query tile on each axis; or an integer, for that many tokens in the order of the grid, without
      any permutation.
    kv_tile: the same for keys; None means q_tile.

  Raises:
    ValueError: as `masks.neighborhood`; a tile below 1 or not one for each axis; an integer tile that does not cut the
      grid into boxes, or with dilation.
  """
  mask = masks.neighborhood(shape, window, stride, dilation, is_causal)
  assert isinstance(mask, spatial.Neighborhood)
  q_tile = _tile('q_tile', q_tile, mask)
  kv_tile = q_tile if kv_tile is None else _tile('kv_tile', kv_tile, mask)
  axes = [_axis(mask, axis, q_tile[axis], kv_tile[axis]) for axis in range(len(mask.shape))]
  visits, full = (functools.reduce(np.multiply.outer, x).reshape(-1) for x in list(zip(*axes))[:2])
  tiles, pairs = (math.prod(x) for x in list(zip(*axes))[2:])
  return Report(visits, full, tiles, math.prod(mask.shape) ** 2 / pairs)


def plan(plan: plans.Plan, pairs: float | None = None) -> Report:
  """The report of a plan.

  Args:
    plan: its arrays must be known: not traced.
    pairs: allowed pairs of a query and a key, for the ratio of FLOPs; see `pairs`.

  Raises:
    ValueError: the plan is traced.
  """
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(plan)):
    raise ValueError(f'{plan} is traced, expected known arrays: make the report outside of jax.jit')
  kind = np.asarray(plans.blocks(plan))
  visits, full = ((kind >= least).sum(-1).reshape(-1) for least in (masks.PARTIAL, masks.FULL))
  return Report(visits, full, plan.nk, None if pairs is None else plan.T * plan.S / pairs if pairs else math.inf)


def mask(
  mask: masks.Mask, T: int, S: int | None = None, *, block_q, block_kv, batch=1, heads=1, positions=None,
  kv_positions=None, is_counted=None,
) -> Report:  # fmt: skip
  """The report of any mask, from the plan that it makes (`plan.of`, which takes the same arguments).

  Args:
    is_counted: whether allowed pairs are counted, which takes O(TS) time; else flop_ratio is None. None counts up to
      2**28 pairs.
  """
  where = {'batch': batch, 'heads': heads, 'positions': positions, 'kv_positions': kv_positions}
  made = plans.of(mask, T, S, block_q=block_q, block_kv=block_kv, **where)
  is_counted = T * (T if S is None else S) <= 2**28 if is_counted is None else is_counted
  return plan(made, pairs(mask, T, S, **where) if is_counted else None)


def pairs(
  mask: masks.Mask, T: int, S: int | None = None, *, batch=1, heads=1, positions=None, kv_positions=None
) -> float:
  """Allowed pairs of a query and a key, mean over the batch and heads: O(TS) time and O(S) memory."""
  S = T if S is None else S
  masks.check(mask, batch, heads, T, S, is_default=(positions is None, kv_positions is None))
  q, k = masks.tokens(T, positions), masks.tokens(S, kv_positions)
  rows = max(1, 2**22 // max(1, S * batch * heads))

  @jax.jit
  def count(mask, q, k):
    seen = mask.tile(q, k, batch, heads)
    return jnp.broadcast_to(seen, (*seen.shape[:2], q.index.shape[-1], S)).sum((-1, -2), dtype=np.int32).mean()

  cut = lambda start: jax.tree.map(lambda x: x[..., start : start + rows], q)
  return sum(float(count(mask, cut(start), k)) for start in range(0, T, rows))


def is_aligned(length: int, window: int, stride: int, q_tile: int, kv_tile: int) -> bool:
  """Whether, on an axis of this length, every visited tile is known to be full, so that nothing of the ratio is lost.

  Sufficient, not necessary, for windows that are neither causal nor dilated: stride is a multiple of both tiles,
  length of the query tile, window and length - window of the key tile, and stride // 2 = window // 2 modulo the key
  tile. Without the last one only windows at the borders are aligned.
  """
  if stride % q_tile or length % q_tile or stride % kv_tile or window % kv_tile or length % kv_tile:
    return False
  return (stride // 2 - window // 2) % kv_tile == 0


def _axis(mask, axis, q_tile, kv_tile):
  """(visits [n], full [n], key tiles, pairs) of the query tiles of one axis, one dilation group after the other."""
  visits, full, tiles, pairs = [], [], 0, 0
  for group in range(mask.dilation[axis]):
    start, end = mask.reach(np.arange(group, mask.shape[axis], mask.dilation[axis]), axis)
    cuts = np.arange(0, len(start), q_tile)
    (first, last), (early, late) = ([f.reduceat(x, cuts) for f in (np.minimum, np.maximum)] for x in (start, end))
    visits.append(-(-late // kv_tile) - first // kv_tile)
    inside = np.maximum(early // kv_tile - -(-last // kv_tile), 0)
    inside[-1] *= len(start) % q_tile == 0  # a tile that ends beyond the array needs a mask
    full.append(inside)
    tiles += -(-len(start) // kv_tile)
    pairs += int((end - start).sum())
  return np.concatenate(visits), np.concatenate(full), tiles, pairs


def _tile(name, tile, mask):
  """A tile as numbers of tokens on each axis, from that or from a number of tokens in row-major order."""
  shape = mask.shape
  if not isinstance(tile, int | np.integer):
    return integers(name, tile, 1, len(shape))
  rest, sides = integer(name, tile, 1), []
  for n in shape[::-1]:
    sides.append(min(rest, n))
    is_whole = rest % n == 0 if rest > n else n % rest == 0 or len(sides) == len(shape)
    rest = max(1, rest // n)
    if not is_whole:
      break
  if not is_whole or rest > 1 or max(mask.dilation) > 1:
    raise ValueError(
      f'{name}={tile} tokens in a row are no boxes of the grid {shape} with dilation {mask.dilation}: '
      'expected tokens on each axis; simulate.mask takes runs of any number'
    )
  return tuple(sides[::-1])


def _times(x):
  return f'{x:.3g}x'
