"""The cache of a whole model: the states of its layers and the length of every row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

NEVER = 2**30  # a position no text reaches
LOST = 2 * NEVER - 1  # the reach of a row that lost entries, for good


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pending:
  """Tokens that were looked at and not stored, a pytree; made by `Decoder.look`, stored by `ModelCache.accept`.

  Attributes:
    layers: what each layer would store of them.
    positions: [B, m] int32.
  """

  layers: list[Any]
  positions: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
  """States of all layers, a pytree; made by `Decoder.init_cache`, changed by `Decoder.extend`.

  Attributes:
    layers: the mixers' states, one per layer; of a scanned decoder one per layer of the pattern, repeats on axis 0.
    length: [B] tokens held in each row.
    reach: [B] longest length each row has had.
    capacity: tokens a row may hold (static).
    slack: tokens that may be rolled back (static); layers that keep everything need none.
    is_local: whether some layer keeps only the newest entries (static).
    is_scanned: whether `layers` have the repeat axis (static).
  """

  layers: list[Any]
  length: jax.Array
  reach: jax.Array
  capacity: int = dataclasses.field(metadata={'static': True})
  slack: int = dataclasses.field(metadata={'static': True})
  is_local: bool = dataclasses.field(metadata={'static': True})
  is_scanned: bool = dataclasses.field(metadata={'static': True})

  def rollback(self, n):
    """Forgets the last n tokens of every row (all of a shorter row), as if they had never come.

    Args:
      n: tokens, static.

    Raises:
      ValueError: n < 0, or a layer keeps a ring of entries and n > slack. Rolling back several times in a row beyond
        the slack cannot be seen here: such rows give NaN from then on.
    """
    if n < 0:
      raise ValueError(f'n={n} must be 0 or more')
    if self.is_local and n > self.slack:
      raise ValueError(f'n={n} is more than slack={self.slack}: init_cache(..., slack={n}) keeps what it takes')
    length = jnp.maximum(self.length - n, 0)
    forget = lambda state: state.rollback(length)
    layers = [jax.vmap(forget)(state) if self.is_scanned else forget(state) for state in self.layers]
    return dataclasses.replace(self, layers=layers, length=length)

  def fork(self, copies):
    """Every row `copies` times, next to each other: row b becomes rows b * copies, ..., (b + 1) * copies - 1."""
    if copies < 1:
      raise ValueError(f'copies={copies} must be at least 1')
    return self.take(jnp.repeat(jnp.arange(len(self.length)), copies))

  def take(self, rows):
    """The cache whose row i is row rows[i] of this one; rows [R] int, in any order and as often as wanted.

    Raises:
      ValueError: rows are not integers [R].
    """
    rows = jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
      raise ValueError(f'rows are {rows.dtype} {rows.shape}, expected integers [R]')
    take = lambda axis: lambda x: jnp.take(x, rows, axis=axis)
    return dataclasses.replace(
      self,
      layers=jax.tree.map(take(1 if self.is_scanned else 0), self.layers),
      length=take(0)(self.length),
      reach=take(0)(self.reach),
    )

  def accept(self, pending, index, positions):
    """Stores some of the tokens that `Decoder.look` has looked at.

    Args:
      pending: Pending of m tokens.
      index: [B, r] int, which of them: 0 .. m - 1. Attention has seen them from `pending.positions`: keep those.
      positions: [B, r] int, distinct within a row; negative ones are not stored.

    Returns:
      ModelCache, as if these tokens alone had come. Rows with a position beyond the capacity of a layer that keeps
      everything give NaN from then on.
    """
    index, positions = jnp.asarray(index), jnp.asarray(positions, jnp.int32)
    if index.shape != positions.shape or index.ndim != 2 or len(index) != len(self.length):
      raise ValueError(f'index has shape {index.shape} and positions {positions.shape}, expected both [B, r]')
    pick = lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    def store(state, entries):
      return state.accept(jax.tree.map(pick, entries), positions)

    store = jax.vmap(store) if self.is_scanned else store
    layers = [store(state, entries) for state, entries in zip(self.layers, pending.layers)]
    cache, _ = self.advance(layers, positions)
    if all(getattr(state, 'is_ring', False) for state in self.layers):
      return cache
    is_over = jnp.any(positions >= self.capacity, axis=1)
    return dataclasses.replace(cache, reach=jnp.where(is_over, LOST, cache.reach))

  def can_see(self, positions):
    """[B] bool: whether rows hold all that tokens at `positions` [B, n] may see, as far as rings have not lost it."""
    first = jnp.min(jnp.where(positions >= 0, positions, NEVER), axis=1)
    is_whole = self.reach != LOST
    return is_whole & (first >= self.reach - self.slack) if self.is_local else is_whole

  def advance(self, layers, positions):
    """The cache after tokens at `positions` [B, n] went through the layers, and which rows can be trusted.

    Returns:
      (ModelCache, [B] bool: False where a ring had already lost entries that these tokens should have seen)
    """
    length = jnp.maximum(self.length, jnp.max(positions, axis=1) + 1).astype(jnp.int32)
    good = self.can_see(positions)
    reach = jnp.where(good, jnp.maximum(self.reach, length), LOST)
    return dataclasses.replace(self, layers=layers, length=length, reach=reach), good
