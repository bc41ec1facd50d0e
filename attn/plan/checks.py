"""Is a plan what `attn.plan` says a plan is? Lists of numpy are read whole, once, in time linear in their length."""

import numpy as np

from attn.plan.lists import FIRST, LAST, PARTIAL, VALID


def shapes(plan, B, H, K, T, S) -> None:
  """Raises ValueError unless shapes and dtypes fit attention of H query heads on K key heads."""
  if (plan.T, plan.S) != (T, S):
    raise ValueError(f'the plan is of T={plan.T}, S={plan.S}, but queries and keys have T={T}, S={S}')
  lead = plan.q_id.shape[:2]
  if plan.q_id.ndim != 3 or lead[0] not in (1, B) or lead[1] not in (1, K, H):
    raise ValueError(f'the plan has shape {plan.q_id.shape}, expected [1 or B={B}, 1 or K={K} or H={H}, NZ]')
  NZ, NZT = plan.q_id.shape[2], plan.t_q_id.shape[-1]
  wanted = dict.fromkeys(('q_id', 'kv_id', 'flags'), (*lead, NZ)) | dict.fromkeys(('nnz', 't_nnz', 'dropped'), lead)
  wanted |= dict.fromkeys(('t_q_id', 't_kv_id', 't_flags'), (*lead, NZT))
  if plan.row_bits is not None:
    wanted['row_bits'] = (*lead, T, -(-plan.nk // 32))
  for name, shape in wanted.items():
    x, want = getattr(plan, name), np.uint32 if name == 'row_bits' else np.int32
    if x.shape != shape or x.dtype != want:
      raise ValueError(f'plan.{name} has shape {x.shape} and dtype {x.dtype}, expected {np.dtype(want)} {shape}')


def lists(plan) -> None:
  """Raises ValueError unless both lists of numpy arrays hold the same tiles, each once, in order, with right flags."""
  for name, end in (('q_id', plan.nq), ('kv_id', plan.nk), ('t_q_id', plan.nq), ('t_kv_id', plan.nk)):
    _refuse(f'plan.{name}', getattr(plan, name), 0, end - 1)
  for prefix, (major, minor, n) in {'': ('q_id', 'kv_id', plan.nq), 't_': ('kv_id', 'q_id', plan.nk)}.items():
    major, minor, flags, nnz = (getattr(plan, f'{prefix}{name}') for name in (major, minor, 'flags', 'nnz'))
    _refuse(f'plan.{prefix}nnz', nnz, n, major.shape[-1])
    used = np.arange(major.shape[-1]) < nnz[..., None]
    step = np.diff(major, prepend=-1)
    ascends = (step == 1) | (step == 0) & (np.diff(minor, prepend=-1) > 0)
    _require(ascends | ~used, f'plan.{prefix}q_id and {prefix}kv_id', 'out of order, a block left out, or a tile twice')
    at_end = np.take_along_axis(major, nnz[..., None] - 1, axis=2) == n - 1
    _require(at_end, f'plan.{prefix}nnz', 'the list ends before the last block')
    opens = (step == 1) & used
    closes = np.append(opens[..., 1:] | ~used[..., 1:], np.ones_like(used[..., :1]), axis=-1) & used
    _require((flags & FIRST > 0) == opens, f'plan.{prefix}flags', 'FIRST is not where a block begins')
    _require((flags & LAST > 0) == closes, f'plan.{prefix}flags', 'LAST is not where a block ends')
    _require((flags == 0) | used, f'plan.{prefix}flags', 'an entry beyond nnz has flags')
  is_valid, is_partial = plan.flags & VALID > 0, plan.flags & PARTIAL > 0
  ragged = ((plan.q_id + 1) * plan.block_q > plan.T) | ((plan.kv_id + 1) * plan.block_kv > plan.S)
  _require(is_partial | ~ragged | ~is_valid, 'plan.flags', 'a tile that ends beyond the arrays is not PARTIAL')
  for b, h in np.ndindex(plan.nnz.shape):
    one, other = (
      np.sort(_numbered(plan, getattr(plan, f'{t}q_id')[b, h], getattr(plan, f'{t}kv_id')[b, h], flags[b, h]))
      for t, flags in (('', plan.flags), ('t_', plan.t_flags))
    )
    if not np.array_equal(one, other):
      raise ValueError(f'plan.t_q_id, t_kv_id and t_flags are not the tiles of q_id, kv_id and flags at [{b}, {h}]')


def _numbered(plan, q_id, kv_id, flags):
  """A number for each VALID tile that tells it, and whether it is PARTIAL, from all others."""
  valid = flags & VALID > 0
  return ((q_id[valid].astype(np.int64) * plan.nk + kv_id[valid]) * 2) + (flags[valid] & PARTIAL > 0)


def _refuse(name, x, low, high):
  if ((x < low) | (x > high)).any():
    at = tuple(int(i) for i in np.argwhere((x < low) | (x > high))[0])
    raise ValueError(f'{name}[{", ".join(map(str, at))}] is {x[at]}, expected {low} to {high}')


def _require(holds, name, otherwise):
  if not holds.all():
    at = ', '.join(str(int(i)) for i in np.argwhere(~holds)[0])
    raise ValueError(f'{name}: {otherwise}, at [{at}]')
