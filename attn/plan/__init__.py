"""The work list of block-sparse attention: which tiles of queries and keys are visited, in which order, and how.

A plan is made from a mask (`of`), from chosen blocks (`from_blocks`, `from_lists`) or from choices of single queries
(`from_rows`), and serves one function, attn/block_sparse.py, and its kernels. It is a flat list and not a rectangle of
so many key blocks per query block: its transpose, which the gradients of keys and values go by, would not be one (every
row chooses the first block), and rows of different lengths waste nothing.

Where values are known (numpy arrays, and jax arrays outside of transformations) a plan is made of numpy arrays as long
as is needed. Inside jax.jit and jax.vmap it is made of traced arrays of a fixed `capacity`. Both are pytrees with the
axes [Bm, Hm] in front of every leaf, so a plan passes through jax.jit as an argument and can be sharded as batch and
heads are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import masks
from attn.arguments import integer
from attn.masks.predicates import static
from attn.plan import checks, lists as plan_lists
from attn.plan.lists import FIRST, LAST, PARTIAL, VALID

__all__ = [
  'FIRST',
  'LAST',
  'PARTIAL',
  'VALID',
  'Plan',
  'blocks',
  'check',
  'concat',
  'from_blocks',
  'from_lists',
  'from_rows',
  'of',
  'select',
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Tiles of block_q queries and block_kv keys to visit, for 1 or B rows of the batch and 1, K or H heads.

  An entry's flags are a sum of FIRST and LAST (of its row; in the transposed list of its column), PARTIAL (ask the
  mask; without it the whole tile is allowed and lies inside the arrays) and VALID. Every query block has an entry:
  where it sees nothing, one without VALID, at key block 0. So has every key block in the transposed list, at query
  block 0. After `nnz` entries the last one is repeated with flags 0, so that going on to the end does nothing.

  Attributes:
    q_id, kv_id, flags: int32 [Bm, Hm, NZ], by query block, then key block.
    nnz: int32 [Bm, Hm], entries in use.
    t_q_id, t_kv_id, t_flags: int32 [Bm, Hm, NZT], the VALID entries by key block, then query block; NZT <= NZ + nk.
    t_nnz: int32 [Bm, Hm], entries in use of these.
    dropped: int32 [Bm, Hm], blocks that were asked for and are not in the plan: beyond the capacity, or no blocks at
      all. Only traced plans drop; 0 means that the plan is what was asked for.
    row_bits: uint32 [Bm, Hm, T, ceil(nk / 32)] or None. A query sees key block j of its tile's entries if bit j % 32 of
      its word j // 32 is set.
    block_q, block_kv, T, S: static; queries and keys in a tile, and in all.
    needs_mask: static; whether it was made from a mask that hides a part of some tiles.
    has_positions: static; whether it was made from a mask and positions; None if it was made from chosen blocks.
  """

  q_id: Any
  kv_id: Any
  flags: Any
  nnz: Any
  t_q_id: Any
  t_kv_id: Any
  t_flags: Any
  t_nnz: Any
  dropped: Any
  row_bits: Any
  block_q: int = static()
  block_kv: int = static()
  T: int = static()
  S: int = static()
  needs_mask: bool = static(default=False)
  has_positions: bool | None = static(default=None)

  @property
  def nq(self) -> int:
    """Query blocks."""
    return -(-self.T // self.block_q)

  @property
  def nk(self) -> int:
    """Key blocks."""
    return -(-self.S // self.block_kv)

  @property
  def row_ptr(self):
    """int32 [Bm, Hm, nq + 1]: the entries of query block i are row_ptr[i] : row_ptr[i + 1]."""
    return _pointers(self.q_id, self.nnz, self.nq)

  @property
  def col_ptr(self):
    """int32 [Bm, Hm, nk + 1]: the transposed entries of key block j are col_ptr[j] : col_ptr[j + 1]."""
    return _pointers(self.t_kv_id, self.t_nnz, self.nk)

  @property
  def density(self):
    """Share of the tiles that are visited, mean over Bm and Hm."""
    return (self.flags & VALID > 0).sum(-1).mean() / (self.nq * self.nk)

  def __repr__(self):
    if np.ndim(self.q_id) != 3 or plan_lists.is_traced(*jax.tree.leaves(self)):
      return f'Plan({self.T}x{self.S} in {self.block_q}x{self.block_kv}, {type(self.q_id).__name__})'
    (Bm, Hm, NZ), bits = self.q_id.shape, '' if self.row_bits is None else ', row bits'
    return f'Plan({self.T}x{self.S} in {self.block_q}x{self.block_kv}, Bm={Bm}, Hm={Hm}, NZ={NZ}{bits})'


def of(
  mask: masks.Mask, T: int, S: int | None = None, *, block_q, block_kv, batch=1, heads=1, kv_heads=None,
  positions=None, kv_positions=None, capacity=None,
) -> Plan:  # fmt: skip
  """The plan of a mask: tiles that are certainly empty are left out, tiles that are certainly full are not PARTIAL.

  Made from bounding boxes, so a tile may be visited in vain and is never missed; nothing is O(TS). Without B or H in
  what the mask says of tiles, Bm or Hm is 1.

  Args:
    mask: any mask; pass the same one to `block_sparse.attend`, for the tiles that are PARTIAL.
    T: number of queries.
    S: number of keys; None means T.
    block_q: queries in a tile; the last may have fewer.
    block_kv: keys in a tile.
    batch: B.
    heads: H.
    kv_heads: K, to make one list for each group of H // K query heads: the union of theirs, PARTIAL where they differ.
      None makes one for each head where the mask differs between heads.
    positions: int [T] or [B, T] query positions; None means 0..T-1.
    kv_positions: int [S] or [B, S].
    capacity: entries of the list (NZ). None is as many as there are; where the mask or positions are traced, as many as
      there can be by what is not. A function that gets plans of changing data as an argument is compiled once if all
      have one capacity.

  Raises:
    ValueError: as `masks.dense`; a block below 1; kv_heads does not divide heads; more entries than capacity.
  """
  block_q, block_kv, T, S = _sizes(block_q, block_kv, T, S)
  if not isinstance(mask, masks.Mask):
    raise ValueError(f'mask is {type(mask).__name__}, expected a Mask: wrap a bool array in masks.array(...)')
  if kv_heads is not None and (integer('kv_heads', kv_heads, 1) > heads or heads % kv_heads):
    raise ValueError(f'kv_heads={kv_heads} must divide heads={heads}')
  mask, positions, kv_positions = jax.tree.map(plan_lists.known, (mask, positions, kv_positions))
  verdicts = lambda is_static: masks.verdicts(
    mask, T, S, block_q=block_q, block_kv=block_kv, batch=batch, heads=heads,
    positions=positions, kv_positions=kv_positions, is_static=is_static,
  )  # fmt: skip
  some, every = (_by_group(x, heads, kv_heads, reduce) for x, reduce in zip(verdicts(False), ('any', 'all')))
  if plan_lists.is_traced(some, every):
    bound = _by_group(verdicts(True).some, heads, kv_heads, 'any')
    some = some & bound
    capacity = int(np.maximum(bound.sum(-1), 1).sum(-1).max()) if capacity is None else capacity
  made = from_blocks(some, T=T, S=S, block_q=block_q, block_kv=block_kv, partial=~every, capacity=capacity)
  needs_mask = plan_lists.is_traced(some, every) or bool((some & ~every).any())
  has_positions = positions is not None or kv_positions is not None
  return dataclasses.replace(made, needs_mask=needs_mask, has_positions=has_positions)


def from_blocks(chosen, *, T, S, block_q, block_kv, partial=None, capacity=None) -> Plan:
  """The plan of chosen tiles.

  Args:
    chosen: bool [Bm, Hm, nq, nk], True where a tile is visited; nq = ceil(T / block_q), nk = ceil(S / block_kv).
    T: number of queries.
    S: number of keys.
    block_q: queries in a tile.
    block_kv: keys in a tile.
    partial: bool, or broadcasts to `chosen`: where the mask is asked. None is everywhere. Tiles that end beyond the
      arrays are always partial.
    capacity: entries of the list (NZ), at least nq. None is as many as there are, or nq * nk where `chosen` is traced.
      If more are chosen, known values raise; traced values lose the last blocks of the longest rows, and `dropped`
      counts them.

  Raises:
    ValueError: shapes or dtypes do not fit; a block below 1; more entries than capacity.
  """
  block_q, block_kv, T, S = _sizes(block_q, block_kv, T, S)
  chosen = _bools('chosen', chosen, (-(-T // block_q), -(-S // block_kv)), '[Bm, Hm, nq, nk]')
  kv_id = np.broadcast_to(np.arange(chosen.shape[-1], dtype=np.int32), chosen.shape)
  partial = _partial(partial, chosen.shape)
  return _plan(kv_id, chosen, partial, 0, (block_q, block_kv, T, S), capacity)


def from_lists(kv_id, count, *, T, S, block_q, block_kv, partial=None, capacity=None) -> Plan:
  """The plan of key blocks listed for each query block, in any order. A block listed twice is visited once.

  Args:
    kv_id: int [Bm, Hm, nq, C] key blocks.
    count: int [Bm, Hm, nq], how many of them are meant: the first ones. The others may be anything, -1 for instance.
    T: number of queries.
    S: number of keys.
    block_q: queries in a tile.
    block_kv: keys in a tile.
    partial: bool, or broadcasts to `kv_id`: as in `from_blocks`, for each block of the list.
    capacity: as in `from_blocks`; None is nq * C where anything is traced.

  Raises:
    ValueError: shapes or dtypes do not fit; a block below 1; a listed block or a count out of range, unless traced:
      then it is left out and counted in `dropped`; more entries than capacity.
  """
  block_q, block_kv, T, S = _sizes(block_q, block_kv, T, S)
  nq, nk = -(-T // block_q), -(-S // block_kv)
  kv_id, count = (_integers(name, x) for name, x in (('kv_id', kv_id), ('count', count)))
  if kv_id.ndim != 4 or kv_id.shape[2] != nq or count.shape != kv_id.shape[:3]:
    raise ValueError(
      f'kv_id has shape {kv_id.shape} and count {count.shape}, expected [Bm, Hm, nq={nq}, C] and [Bm, Hm, nq={nq}]'
    )
  C = kv_id.shape[3]
  _refuse(count, (count >= 0) & (count <= C), f'count[{{}}] is {{}}, expected 0 to C={C}')
  listed = np.arange(C) < count[..., None]
  inside = (kv_id >= 0) & (kv_id < nk)
  _refuse(kv_id, inside | ~listed, f'kv_id[{{}}] is {{}}, expected a key block, 0 to {nk - 1}')
  too_many = abs(count - count.clip(0, C)).sum(-1)
  dropped = ((listed & ~inside).sum((-1, -2)) + too_many).astype(np.int32)
  kv_id, keep, partial = plan_lists.once(kv_id.astype(np.int32), listed & inside, _partial(partial, kv_id.shape), nk)
  return _plan(kv_id, keep, partial, dropped, (block_q, block_kv, T, S), capacity)


def from_rows(choice, *, T, S, block_q, block_kv, partial=None, capacity=None) -> Plan:
  """The plan of key blocks chosen by each query alone: a tile visits what any of its queries chose, and knows which.

  Args:
    choice: bool [Bm, Hm, T, nk], True where a query chose a key block.
    T: number of queries.
    S: number of keys.
    block_q: queries in a tile.
    block_kv: keys in a tile, and in a block of `choice`.
    partial: bool, or broadcasts to [Bm, Hm, nq, nk]: as in `from_blocks`, of the mask alone.
    capacity: as in `from_blocks`.

  Raises:
    ValueError: as `from_blocks`.
  """
  block_q, block_kv, T, S = _sizes(block_q, block_kv, T, S)
  choice = _bools('choice', choice, (T, -(-S // block_kv)), '[Bm, Hm, T, nk]')
  Bm, Hm, _, nk = choice.shape
  xp = np if isinstance(choice, np.ndarray) else jnp
  whole = xp.concatenate([choice, xp.zeros((Bm, Hm, -T % block_q, nk), bool)], axis=2)
  chosen = whole.reshape(Bm, Hm, -1, block_q, nk).any(3)
  made = from_blocks(chosen, T=T, S=S, block_q=block_q, block_kv=block_kv, partial=partial, capacity=capacity)
  return dataclasses.replace(made, row_bits=plan_lists.pack(choice))


def blocks(plan: Plan):
  """The kind of each tile, row bits aside: int8 [Bm, Hm, nq, nk] of masks.EMPTY (not visited), PARTIAL and FULL."""
  xp = np if _is_numpy(plan) else jnp
  kind = xp.where(plan.flags & PARTIAL > 0, masks.PARTIAL, masks.FULL)
  kind = xp.where(plan.flags & VALID > 0, kind, masks.EMPTY).astype(np.int8)
  b, h = (np.arange(n) for n in plan.nnz.shape)
  at = (b[:, None, None], h[:, None], plan.q_id, plan.kv_id)
  out = xp.zeros((*plan.nnz.shape, plan.nq, plan.nk), np.int8)
  if xp is jnp:
    return jnp.asarray(out).at[at].max(kind)
  np.maximum.at(out, at, kind)
  return out


def check(plan: Plan, B: int, H: int, K: int, T: int, S: int) -> None:
  """Raises ValueError unless a plan fits attention of H query heads on K key heads; numpy lists are read, too."""
  if not isinstance(plan, Plan):
    raise ValueError(f'plan is {type(plan).__name__}, expected a Plan: make one with plan.of(mask, T, S, ...)')
  checks.shapes(plan, B, H, K, T, S)
  if _is_numpy(plan):
    checks.lists(plan)


def select(plan: Plan, batch=slice(None), heads=slice(None)) -> Plan:
  """The plan of some rows of the batch and some heads: slices or int arrays of its Bm and Hm.

  Raises:
    ValueError: an index that is neither, out of range, or takes none.
  """
  for name, index, n in (('batch', batch, plan.nnz.shape[0]), ('heads', heads, plan.nnz.shape[1])):
    try:
      taken = np.arange(n)[index]
    except IndexError as error:
      raise ValueError(f'{name}={index!r} does not fit the {n} of the plan: {error}') from None
    if taken.ndim != 1 or not taken.size:
      raise ValueError(f'{name}={index!r} takes {taken} of the {n} of the plan, expected a slice or int array of some')
  return jax.tree.map(lambda x: x[batch][:, heads], plan)


def concat(plans, axis: int) -> Plan:
  """Plans of equal blocks and lengths joined along the batch (axis 0) or the heads (axis 1), padded to equal NZ.

  Raises:
    ValueError: they differ in T, S, a block size, row bits, or the other axis.
  """
  plans = list(plans)
  form = lambda x: (x.T, x.S, x.block_q, x.block_kv, x.has_positions, x.nnz.shape[1 - axis], x.row_bits is None)
  if axis not in (0, 1) or not plans or len({form(x) for x in plans}) > 1:
    raise ValueError(
      f'axis={axis} and plans {plans}: expected axis 0 or 1, plans of equal T, S, blocks, row bits and other axis'
    )
  xp = np if all(_is_numpy(x) for x in plans) else jnp

  arrays = {}
  for name in (*plan_lists.Lists._fields, 'row_bits'):
    parts = [getattr(x, name) for x in plans]
    if name.endswith(('id', 'flags')):
      last = [x[..., -1:] * name.endswith('id') for x in parts]
      at = np.arange(max(x.shape[-1] for x in parts))
      parts = [xp.where(at < x.shape[-1], x[..., at.clip(max=x.shape[-1] - 1)], end) for x, end in zip(parts, last)]
    arrays[name] = None if parts[0] is None else xp.concatenate(parts, axis)
  return dataclasses.replace(plans[0], **arrays, needs_mask=any(x.needs_mask for x in plans))


def _plan(kv_id, keep, partial, dropped, sizes, capacity) -> Plan:
  """The plan of rows as `plan_lists.build` takes them, after whatever was `dropped` before."""
  block_q, block_kv, T, S = sizes
  nq, nk = -(-T // block_q), -(-S // block_kv)
  if capacity is not None and integer('capacity', capacity, 1) < nq:
    raise ValueError(f'capacity={capacity} must be at least the number of query blocks, {nq}: each has an entry')
  if capacity is None and plan_lists.is_traced(kv_id, keep, partial):
    capacity = nq * max(1, keep.shape[-1])
  ragged = (kv_id == nk - 1) & (S % block_kv > 0) | (np.arange(nq)[:, None] == nq - 1) & (T % block_q > 0)
  lists = plan_lists.build(kv_id, keep, partial | ragged, nk, capacity)
  lists = lists._replace(dropped=lists.dropped + dropped)
  return Plan(*lists, None, block_q, block_kv, T, S)


def _pointers(major, nnz, n):
  """Where the run of each of n blocks begins among the first nnz entries of an ascending list, and nnz."""
  if isinstance(major, np.ndarray):
    starts = [[np.searchsorted(row, np.arange(n)) for row in rows] for rows in major]
    return np.concatenate([np.array(starts, np.int32), nnz[..., None]], axis=-1)
  find = lambda row: jnp.searchsorted(row, jnp.arange(n, dtype=np.int32)).astype(np.int32)
  return jnp.concatenate([jax.vmap(jax.vmap(find))(major), nnz[..., None]], axis=-1)


def _by_group(x, heads, kv_heads, reduce):
  """[.., H, nq, nk] reduced over the query heads of each group; as it is if it does not tell heads apart."""
  if kv_heads is None or x.shape[1] == 1 or kv_heads == heads:
    return x
  return getattr(x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]), reduce)(2)


def _is_numpy(plan):
  return all(isinstance(x, np.ndarray) for x in jax.tree.leaves(plan))


def _partial(partial, shape):
  """`partial` as bool of the given shape."""
  partial = plan_lists.known(True if partial is None else partial)
  partial = partial if isinstance(partial, jax.Array) else np.asarray(partial)
  xp = np if isinstance(partial, np.ndarray) else jnp
  try:
    if partial.dtype == bool:
      return xp.broadcast_to(partial, shape)
  except ValueError:
    pass
  got = f'shape {partial.shape} and dtype {partial.dtype}'
  raise ValueError(f'partial has {got}, expected bool that broadcasts to {shape}')


def _bools(name, x, end, axes):
  """A bool array [Bm, Hm, *end]."""
  x = plan_lists.known(x)
  x = x if isinstance(x, jax.Array) else np.asarray(x)
  if x.dtype != bool or x.ndim != 4 or x.shape[2:] != end or 0 in x.shape:
    raise ValueError(f'{name} has shape {x.shape} and dtype {x.dtype}, expected bool {axes} ending in {end}')
  return x


def _integers(name, x):
  x = plan_lists.known(x)
  x = x if isinstance(x, jax.Array) else np.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f'{name} has dtype {x.dtype}, expected integers')
  return x.astype(np.int32) if x.dtype.itemsize < 4 else x  # 8 bits may not hold what they are compared with


def _refuse(x, is_right, words):
  """ValueError naming the first place where is_right, known beforehand, is False."""
  if not plan_lists.is_traced(is_right) and not is_right.all():
    at = tuple(int(i) for i in np.argwhere(~is_right)[0])
    raise ValueError(words.format(', '.join(map(str, at)), x[at] if not plan_lists.is_traced(x) else 'out of range'))


def _sizes(block_q, block_kv, T, S):
  S = T if S is None else S
  return tuple(integer(*x, 1) for x in (('block_q', block_q), ('block_kv', block_kv), ('T', T), ('S', S)))
