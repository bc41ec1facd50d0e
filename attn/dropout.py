"""Dropout whose bits depend on the random key and the place (batch, head, query, key) in a call, not on the tiles."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32


def seed_of(key: jax.Array) -> jax.Array:
  """Two uint32 words from a random key of any implementation."""
  return jax.random.bits(key, (2,), jnp.uint32)


def keep_factor(seed, rate: float, batch: int, heads: int, length: int, rows, columns, dtype) -> jax.Array:
  """What probabilities are multiplied by: 0 with probability `rate`, else 1 / (1 - rate).

  The bits of entry (b, h, i, j) are Threefry-2x32 at the counter ((b * heads + h) * length + i, j).

  Args:
    seed: uint32 [2].
    rate: probability of a zero, in [0, 1).
    batch: B.
    heads: H.
    length: T, the number of queries of the whole call.
    rows: int [1 or B, 1 or H, t] query indices of the tile.
    columns: int [1 or B, 1 or H, s] key indices of the tile.
    dtype: of the result.

  Returns:
    [B, H, t, s].

  Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
  """
  shape = (batch, heads, rows.shape[-1], columns.shape[-1])
  row = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1) * length + rows.astype(jnp.uint32)
  counters = [jnp.broadcast_to(x, shape).ravel() for x in (row[..., None], columns.astype(jnp.uint32)[..., None, :])]
  bits = threefry_2x32(seed, jnp.concatenate(counters))[: counters[0].size].reshape(shape)
  dropped = bits < jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  return jnp.where(dropped, 0, 1 / (1 - rate)).astype(dtype)
