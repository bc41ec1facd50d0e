"""What a mask says of its pairs: densely, of whole tiles, of rows; and whether it fits."""

import jax
import jax.numpy as jnp
import numpy as np

from attn.arguments import integer
from attn.masks.predicates import Boxes, Mask, Tokens, Verdict, signed
from attn.masks.spatial import Placed


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
  check(mask, batch, heads, T, S, is_default=(positions is None, kv_positions is None))
  _check_positions(positions, kv_positions, batch, T, S)
  q, k = tokens(T, positions), tokens(S, kv_positions)
  seen = mask.tile(q, k, batch, heads)
  return jnp.broadcast_to(seen, (*seen.shape[:2], T, S))


def verdicts(
  mask: Mask, T: int, S: int | None = None, *, block_q, block_kv, batch=1, heads=1, positions=None, kv_positions=None,
  is_static=False,
) -> Verdict:  # fmt: skip
  """What is certain of every tile of block_q queries and block_kv keys, from bounding boxes: nothing O(TS).

  Args:
    mask: any mask.
    T: number of queries.
    S: number of keys; None means T.
    block_q: queries in a tile; the last may have fewer.
    block_kv: keys in a tile.
    batch: B.
    heads: H.
    positions: int [T] or [B, T] query positions; None means 0..T-1.
    kv_positions: int [S] or [B, S].
    is_static: leave what jax arrays say unknown, so that the result is numpy whatever is traced.

  Returns:
    Verdict of bool arrays [1 or B, 1 or H, nq, nk]: `some` False where a tile is empty, `every` True where it is
    full. They are numpy where all that the mask depends on is; a tile may be neither and yet empty or full.

  Raises:
    ValueError: as `dense`; a block below 1.
  """
  S = T if S is None else S
  block_q, block_kv = integer('block_q', block_q, 1), integer('block_kv', block_kv, 1)
  _check_positions(positions, kv_positions, batch, T, S)
  check(mask, batch, heads, T, S, is_default=(positions is None, kv_positions is None))
  q, k = (Boxes(_all(n, x), b, is_static) for n, x, b in ((T, positions, block_q), (S, kv_positions, block_kv)))
  some, every = mask.boxes(q, k)
  shape = (*np.broadcast_shapes(some.shape, every.shape)[:2], -(-T // block_q), -(-S // block_kv))
  xp = np if isinstance(some, np.ndarray) and isinstance(every, np.ndarray) else jnp
  return Verdict(xp.broadcast_to(some, shape), xp.broadcast_to(every, shape))


def tokens(length: int, positions=None) -> Tokens:
  """All `length` tokens of an array, at the given positions [t] or [B, t] (None: their indices)."""
  index = jnp.arange(length, dtype=jnp.int32)[None, None]
  return Tokens(index, index if positions is None else jnp.atleast_2d(signed(jnp.asarray(positions)))[:, None])


def check(mask: Mask, B: int, H: int, T: int, S: int, *, is_default=(False, False)) -> None:
  """Raises ValueError unless every array inside `mask` fits B, H, T and S.

  Args:
    mask: any mask.
    B, H, T, S: batch, query heads, queries and keys.
    is_default: whether positions of queries, and of keys, are their indices: then layouts must have T and S tokens.
  """
  if not isinstance(mask, Mask):
    raise ValueError(f'mask is {type(mask).__name__}, expected a mask of attn.masks (of bools: masks.array)')
  for name, size in (('B', B), ('H', H), ('T', T), ('S', S)):
    integer(name, size, 0)
  mask.check(B, H, T, S)
  for part in jax.tree.leaves(mask, is_leaf=lambda x: isinstance(x, Placed)):
    if isinstance(part, Placed):
      part.check_lengths(*(n if plain else None for n, plain in zip((T, S), is_default)))


def empty_rows(
  mask: Mask, T: int, S: int | None = None, *, batch=1, heads=1, positions=None, kv_positions=None, block=128
) -> np.ndarray:
  """Which queries see no key at all, so that attention gives them zeros: numpy bool [1 or B, 1 or H, T].

  Looks at pairs only in tiles that are neither empty nor full, and only of rows that have no full tile.

  Args:
    mask: any mask; its arrays, and the positions, not traced.
    T, S, batch, heads, positions, kv_positions: as `dense`.
    block: side of the tiles looked at.

  Raises:
    ValueError: as `dense`; a block below 1.
  """
  S = T if S is None else S
  some, every = verdicts(
    mask, T, S, block_q=block, block_kv=block, batch=batch, heads=heads, positions=positions, kv_positions=kv_positions
  )
  q, k = tokens(T, positions), tokens(S, kv_positions)
  todo = np.argwhere(np.asarray((some & ~every.any(-1, keepdims=True)).any((0, 1))))

  def sees(tile):
    """[1 or B, 1 or H, block]: whether queries of a tile see any of its keys."""
    rows, columns = tile[:, None] * block + jnp.arange(block)
    # Beyond the end the last token is looked at again, which adds nothing.
    cut = lambda side, at: jax.tree.map(lambda x: jnp.take(x, at, axis=2, mode='clip'), side)
    return mask.tile(cut(q, rows), cut(k, columns), batch, heads).any(-1)

  found = np.repeat(np.asarray(every.any(-1)), block, axis=2)
  if len(todo):
    seen = np.asarray(jax.jit(lambda tiles: jax.lax.map(sees, tiles))(todo))
    found = np.array(np.broadcast_to(found, np.broadcast_shapes(found.shape, (*seen.shape[1:3], found.shape[2]))))
    for (i, _), one in zip(todo, seen):
      found[:, :, i * block : (i + 1) * block] |= one
  return ~found[:, :, :T]


def _all(length, positions):
  """`tokens` with numpy arrays where positions are not jax arrays."""
  index = np.arange(length, dtype=np.int32)[None, None]
  if positions is None:
    return Tokens(index, index)
  xp = jnp if isinstance(positions, jax.Array) else np
  return Tokens(index, xp.atleast_2d(signed(xp.asarray(positions)))[:, None])


def _check_positions(positions, kv_positions, batch, T, S):
  for name, x, n in (('positions', positions, T), ('kv_positions', kv_positions, S)):
    if x is None:
      continue
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.shape not in ((n,), (1, n), (batch, n)) or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(f'{name} have shape {x.shape} and dtype {x.dtype}, expected integers [{n}] or [{batch}, {n}]')
