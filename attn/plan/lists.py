"""From rows of chosen key blocks to the work lists of a plan: in numpy where values are known, else at fixed shapes.

Rows come as a rectangle, [Bm, Hm, nq, C] key blocks of which `keep` says which are meant: C chosen blocks in any order,
or all of them in their order. One row of the batch and one head is worked on at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FIRST, LAST, PARTIAL, VALID = 1, 2, 4, 8


class Lists(NamedTuple):
  """The arrays of a plan: both orders of the same entries. [Bm, Hm, n] or [Bm, Hm], or without those two axes."""

  q_id: Any
  kv_id: Any
  flags: Any
  nnz: Any
  t_q_id: Any
  t_kv_id: Any
  t_flags: Any
  t_nnz: Any
  dropped: Any


def is_traced(*arrays):
  return any(isinstance(x, jax.core.Tracer) for x in arrays)


def known(x):
  """A jax array whose values can be read as numpy; anything else as it is."""
  readable = isinstance(x, jax.Array) and not is_traced(x) and x.is_fully_addressable
  return np.asarray(x) if readable else x


def build(kv_id, keep, partial, nk, capacity) -> Lists:
  """Both lists of each row of the batch and head.

  Args:
    kv_id: int32 [Bm, Hm, nq, C] key blocks, in range where keep is True, ascending there and each once.
    keep: bool [Bm, Hm, nq, C].
    partial: bool [Bm, Hm, nq, C].
    nk: number of key blocks.
    capacity: entries of the first list; the second has nk more. None, with numpy arrays: as many as are needed.
  """
  if keep.shape[-1] == 0:  # room for the entry that says that a row is empty
    kv_id, keep, partial = (np.zeros((*keep.shape[:-1], 1), dtype) for dtype in (np.int32, bool, bool))
  if is_traced(kv_id, keep, partial):
    one = lambda kv_id, keep, partial: _lists(kv_id, keep, partial, nk, capacity, jnp)
    return jax.vmap(jax.vmap(one))(*(jnp.asarray(x) for x in (kv_id, keep, partial)))
  Bm, Hm = keep.shape[:2]
  need = np.maximum(keep.sum(-1), 1).sum(-1)
  if capacity is not None and need.max() > capacity:
    b, h = np.argwhere(need > capacity)[0]
    raise ValueError(
      f'capacity={capacity} is too small: batch row {b}, head {h} has {need[b, h]} entries (an empty row counts as one)'
    )
  size = int(need.max()) if capacity is None else capacity
  lists = [[_lists(kv_id[b, h], keep[b, h], partial[b, h], nk, size, np) for h in range(Hm)] for b in range(Bm)]
  result = Lists(*(np.stack([np.stack([getattr(x, name) for x in row]) for row in lists]) for name in Lists._fields))
  if capacity is None:
    t_size = int(result.t_nnz.max())
    result = result._replace(**{name: getattr(result, name)[..., :t_size] for name in ('t_q_id', 't_kv_id', 't_flags')})
  return result


def _lists(kv_id, keep, partial, nk, size, xp) -> Lists:
  """The lists of one head, from [nq, C] arrays."""
  C = keep.shape[1]
  wanted = keep.sum(dtype=np.int32)
  if xp is jnp and size < keep.size:
    keep = _within(keep, size)
  # A row that chose nothing has one entry all the same: its output has to be written by somebody.
  idle = ~keep.any(-1)[:, None] & (np.arange(C) == 0)
  used = (keep | idle).reshape(-1)
  # jnp.nonzero under vmap makes a list of fixed size in time linear in nq * C, which a sort would not.
  source = np.flatnonzero(used) if xp is np else jnp.nonzero(used, size=size, fill_value=0)[0]
  q_id, valid = (source // C).astype(np.int32), keep.reshape(-1)[source]
  kv_id = xp.where(valid, kv_id.reshape(-1)[source], 0).astype(np.int32)
  flags = xp.where(valid, VALID | xp.where(partial.reshape(-1)[source], PARTIAL, 0), 0).astype(np.int32)
  nnz = used.sum(dtype=np.int32)
  q_id, kv_id, flags = _finished(q_id, kv_id, flags, nnz, size, xp)
  t_kv_id, t_q_id, t_flags, t_nnz = _turned(q_id, kv_id, flags, nk, xp)
  return Lists(q_id, kv_id, flags, nnz, t_q_id, t_kv_id, t_flags, t_nnz, wanted - keep.sum(dtype=np.int32))


def _turned(q_id, kv_id, flags, nk, xp):
  """The valid entries by key block, then query block, with an idle one for each key block that nobody chose."""
  valid = flags & VALID > 0
  last = xp.full((), nk, np.int32)  # behind all: not in use
  column = xp.where(valid, kv_id, last)
  count = np.bincount(column, minlength=nk + 1) if xp is np else jnp.bincount(column, length=nk + 1)
  column = xp.concatenate([column, xp.where(count[:nk] > 0, last, np.arange(nk, dtype=np.int32))])
  # numpy sorts 16 bits in linear time.
  order = np.argsort(column.astype(np.min_scalar_type(nk)), kind='stable') if xp is np else jnp.argsort(column)
  nothing = np.zeros(nk, np.int32)
  q_id, flags = (xp.concatenate([x, nothing])[order] for x in (q_id, flags & (VALID | PARTIAL)))
  nnz = (column < nk).sum(dtype=np.int32)
  return *_finished(column[order], q_id, flags, nnz, len(column), xp), nnz


def _finished(major, minor, flags, nnz, size, xp):
  """The first nnz entries with FIRST and LAST of each run of `major`; then the last one again, without flags."""
  n = np.arange(size, dtype=np.int32)
  at = xp.minimum(n, nnz - 1)
  major, minor, flags = major[at], minor[at], flags[at]
  changes, end = major[1:] != major[:-1], np.ones(1, bool)
  first = xp.concatenate([end, changes])
  last = xp.concatenate([changes, end]) | (n == nnz - 1)
  return major, minor, xp.where(n < nnz, flags | FIRST * first | LAST * last, 0).astype(np.int32)


def _within(keep, size):
  """keep [nq, C] cut to `size` entries, of which each row has at least one: the longest rows lose their last ones."""
  C = keep.shape[1]
  need = jnp.maximum(keep.sum(-1, dtype=np.int32), 1)
  # total[r]: entries if no row has more than r + 1.
  total = jnp.cumsum((need[:, None] > np.arange(C)).sum(0, dtype=np.int32))
  level = (total <= size).sum(dtype=np.int32)
  longer = need > level
  limit = level + (longer & (jnp.cumsum(longer) <= size - total[level - 1]))
  return keep & (jnp.cumsum(keep, -1, dtype=np.int32) <= limit[:, None])


def once(kv_id, keep, partial, nk):
  """Lists in any order, blocks named twice, as `build` wants them: ascending and each once; PARTIAL if any says so."""
  xp = jnp if is_traced(kv_id, keep, partial) else np
  key = xp.where(keep, 2 * kv_id + ~partial, 2 * nk).astype(np.int32)
  key = xp.sort(key, axis=-1)
  kv_id = key >> 1
  is_new = xp.concatenate([xp.ones_like(kv_id[..., :1], bool), kv_id[..., 1:] != kv_id[..., :-1]], axis=-1)
  return kv_id, is_new & (kv_id < nk), key & 1 == 0


def pack(choice):
  """bool [..., n] as uint32 [..., ceil(n / 32)]: bit j % 32 of word j // 32 is choice[..., j]."""
  xp = np if isinstance(choice, np.ndarray) else jnp
  n = choice.shape[-1]
  padded = xp.concatenate([choice, xp.zeros((*choice.shape[:-1], -n % 32), bool)], axis=-1)
  words = padded.reshape(*choice.shape[:-1], -1, 32).astype(np.uint32)
  return (words << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def unpack(bits, n):
  """`pack` undone: uint32 [..., ceil(n / 32)] as bool [..., n]."""
  words = bits[..., :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
  return words.reshape(*bits.shape[:-1], -1)[..., :n].astype(bool)
