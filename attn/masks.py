"""Attention masks as an algebra: small predicates on token positions, combined by `&`, `|` and `~`.

A mask is True where attention is allowed. Each predicate can be evaluated on a tile of queries and keys (what the
implementations do), densely (`dense`, for tests and pictures), and on boxes of positions (`boxes`: is the tile empty,
full or partial?), so that work which a mask hides is skipped and never computed:

    mask = causal() & (window(1024) | sink(4))   # mind the brackets: & binds tighter than |

Predicates see *positions*: the place of a token in its text. They default to the index in the array; with a cache they
are what the cache says. `document` and `array` are read by index, since they come as arrays. Masks are pytrees:
numbers are static, arrays are leaves, so a mask passes through `jax.jit` and `jax.vmap` as any argument does.
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attn.predicates import (
  EMPTY,
  FULL,
  PARTIAL,
  And,
  Array,
  Causal,
  Chunked,
  Dilated,
  Document,
  Everything,
  Function,
  Lengths,
  Mask,
  Not,
  Occupied,
  Or,
  Prefix,
  Tokens,
  Window,
)

__all__ = [
  'EMPTY',
  'FULL',
  'PARTIAL',
  'Lengths',
  'Mask',
  'Occupied',
  'Tokens',
  'array',
  'causal',
  'check',
  'chunked',
  'dense',
  'dilated',
  'document',
  'everything',
  'function',
  'prefix',
  'sink',
  'tokens',
  'window',
]


def everything() -> Mask:
  """Every query sees every key."""
  return Everything()


def causal(offset=0) -> Mask:
  """Keys up to the query: key <= query + offset.

  Args:
    offset: an integer, or an int array [] or [B]: how many positions the queries stand further on than their own
      say. With T queries at the end of S keys and default positions, `causal(S - T)` aligns them bottom-right.
  """
  return Causal(*_integers('offset', offset))


def window(left: int | None, right: int | None = 0) -> Mask:
  """Keys near the query: query - left <= key <= query + right.

  Args:
    left: tokens a query sees before itself; None is all. The query itself is not counted, as in jax.nn's
      `local_window_size`: a sliding window of w tokens, the query included, is `causal() & window(w - 1)`.
    right: tokens a query sees after itself; None is all.
  """
  return Window(None if left is None else _size('left', left, 0), None if right is None else _size('right', right, 0))


def chunked(size: int) -> Mask:
  """Keys in the query's own chunk of `size` positions: key // size == query // size."""
  return Chunked(_size('size', size, 1))


def prefix(length) -> Mask:
  """Keys of the prefix: key < length, an integer or an int array [B]. A prefix LM is `causal() | prefix(n)`."""
  return Prefix(*_integers('length', length))


def sink(n: int) -> Mask:
  """The first n keys, whatever the query: key < n."""
  return Prefix(_size('n', n, 0), None)


def dilated(step: int) -> Mask:
  """Every step-th key, counted from the query: (query - key) % step == 0."""
  return Dilated(_size('step', step, 1))


def document(q_ids, kv_ids=None) -> Mask:
  """Pairs within one document: q_ids[t] == kv_ids[s].

  Args:
    q_ids: int [T] or [B, T], the document of each query, by index.
    kv_ids: int [S] or [B, S]; None means the same as q_ids (T == S).
  """
  q_ids = _ids('q_ids', q_ids)
  return Document(q_ids, q_ids if kv_ids is None else _ids('kv_ids', kv_ids))


def function(f: Callable, *arrays) -> Mask:
  """Any predicate f(b, h, i, j, *arrays) -> bool on batch, query head, query position and key position.

  f gets broadcastable index arrays ([B,1,1,1], [1,H,1,1], [1 or B,1,t,1], [1 or B,1,1,s]) and must be elementwise in
  them. Arrays that f reads and that may be traced are passed as `arrays`, not closed over.
  """
  if not callable(f):
    raise ValueError(f'f={f!r} is not callable, expected a function f(b, h, i, j, *arrays)')
  return Function(tuple(jnp.asarray(x) for x in arrays), f)


def array(values) -> Mask:
  """A bool array, True where attention is allowed, that broadcasts to [B, H, T, S]; by index."""
  values = jnp.asarray(values)
  if values.dtype != bool:
    raise ValueError(f'mask array has dtype {values.dtype}, expected bool (an additive mask is a `bias`)')
  if values.ndim > 4:
    raise ValueError(f'mask array has shape {values.shape}, expected at most 4 axes [B, H, T, S]')
  return Array(values.reshape((1,) * (4 - values.ndim) + values.shape))


def dense(mask: Mask, T: int, S: int | None = None, *, batch=1, heads=1, positions=None, kv_positions=None):
  """The mask as an array [1 or B, 1 or H, T, S] of bool, for tests and pictures: O(TS) memory.

  Args:
    mask: any mask.
    T: number of queries.
    S: number of keys; None means T.
    batch: B, for masks that depend on the row of the batch.
    heads: H, for masks that depend on the head.
    positions: int [T] or [B, T] query positions; None means 0..T-1.
    kv_positions: int [S] or [B, S]; None means 0..S-1.

  Raises:
    ValueError: positions or an array inside the mask do not fit T, S, batch or heads.
  """
  S = T if S is None else S
  for name, x, n in (('positions', positions, T), ('kv_positions', kv_positions, S)):
    if x is not None and (
      np.shape(x) not in ((n,), (1, n), (batch, n)) or not jnp.issubdtype(jnp.result_type(x), jnp.integer)
    ):
      raise ValueError(
        f'{name} have shape {np.shape(x)} and dtype {jnp.result_type(x)}, expected integers [{n}] or [{batch}, {n}]'
      )
  check(mask, batch, heads, T, S)
  q, k = tokens(T, positions), tokens(S, kv_positions)
  seen = mask.tile(q, k, batch, heads)
  return jnp.broadcast_to(seen, (*seen.shape[:2], T, S))


def tokens(length: int, positions=None) -> Tokens:
  """All `length` tokens of an array, at the given positions [t] or [B, t] (None: their indices)."""
  index = jnp.arange(length, dtype=jnp.int32)
  return Tokens(index, jnp.atleast_2d(index if positions is None else jnp.asarray(positions)))


def check(mask: Mask, B: int, H: int, T: int, S: int) -> None:
  """Raises ValueError unless every array inside `mask` fits B, H, T and S."""
  for part in jax.tree.leaves(mask, is_leaf=lambda x: isinstance(x, Mask) and not isinstance(x, And | Or | Not)):
    if isinstance(part, Array):
      for axis, got, want in zip('BHTS', part.values.shape, (B, H, T, S)):
        if got not in (1, want):
          raise ValueError(f'mask array has {got} on axis {axis} (shape {part.values.shape}), expected 1 or {want}')
    elif isinstance(part, Document):
      for name, ids, n in (('q_ids', part.q_ids, T), ('kv_ids', part.kv_ids, S)):
        if ids.shape[-1] != n or (ids.ndim == 2 and ids.shape[0] not in (1, B)):
          raise ValueError(f'document {name} have shape {ids.shape}, expected [{n}] or [{B}, {n}]')
    elif isinstance(part, Causal | Prefix):
      name, x = ('offset', part.offset) if isinstance(part, Causal) else ('length', part.length)
      if x is not None and np.ndim(x) and np.shape(x)[0] not in (1, B):
        raise ValueError(f'{name} has shape {np.shape(x)}, expected [] or [{B}]')


def _size(name, value, minimum):
  try:
    value = operator.index(value)
  except TypeError:
    raise ValueError(f'{name}={value!r} is not an integer') from None
  if not minimum <= value < 2**31:
    raise ValueError(f'{name}={value} must be at least {minimum} and below 2**31')
  return value


def _integers(name, value):
  """(integer, None) or (None, int array [] or [B])."""
  if isinstance(value, int | np.integer) and not isinstance(value, bool):
    return int(value), None
  value = value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.integer) or value.ndim > 1:
    raise ValueError(f'{name} has dtype {value.dtype} and shape {value.shape}, expected an integer or an int array [B]')
  return None, value


def _ids(name, ids):
  ids = jnp.asarray(ids)
  if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim not in (1, 2):
    raise ValueError(f'{name} have dtype {ids.dtype} and shape {ids.shape}, expected integers [t] or [B, t]')
  return ids
