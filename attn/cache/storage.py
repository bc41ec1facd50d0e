"""Key and value entries of one layer in slots addressed by position: slot = position % capacity.

Two kinds. *Full*: the capacity is the longest text, and position p stays in slot p. *Ring*: the newest `capacity`
positions stay and older ones are overwritten; attention whose mask looks back at most w - 1 tokens needs a capacity of
w - 1, and w - 1 + n if the last n tokens may be rolled back. Rows of a batch have lengths of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attn import masks, softmax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """The stored entries of a layer, a pytree.

  Attributes:
    k: [B, C, K, D] keys, positions already applied.
    v: [B, C, K, V] values.
    positions: [B, C] int32 position of each entry; -1 is an empty slot.
    is_ring: whether new entries overwrite old ones (static).
  """

  k: jax.Array
  v: jax.Array
  positions: jax.Array
  is_ring: bool = dataclasses.field(default=False, metadata={'static': True})

  def rollback(self, length):
    """See `storage.rollback`."""
    return rollback(self, length)

  def accept(self, entries, positions):
    """Stores entries (k, v) that `storage.peek` has seen; see `storage.append`."""
    k, v = entries
    return append(self, k, v, positions)


def init(batch, capacity, kv_heads, key_width, value_width=None, dtype=jnp.float32, *, is_ring=False):
  """Empty slots.

  Args:
    batch: B, rows.
    capacity: C, slots per row.
    kv_heads: K.
    key_width: D.
    value_width: V; None means D.
    dtype: of keys and values.
    is_ring: overwrite the oldest entries when full.

  Returns:
    Slots.

  Raises:
    ValueError: a size below 1, or a dtype that is not floating point.
  """
  value_width = key_width if value_width is None else value_width
  names = ('batch', 'capacity', 'kv_heads', 'key_width', 'value_width')
  for name, size in zip(names, (batch, capacity, kv_heads, key_width, value_width)):
    if size < 1:
      raise ValueError(f'{name}={size} must be at least 1')
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'dtype={jnp.dtype(dtype)} must be floating point: integers would keep nothing after the point')
  return Slots(
    k=jnp.zeros((batch, capacity, kv_heads, key_width), dtype),
    v=jnp.zeros((batch, capacity, kv_heads, value_width), dtype),
    positions=jnp.full((batch, capacity), -1, jnp.int32),
    is_ring=is_ring,
  )


def append(slots, k, v, positions):
  """Writes entries into their slots.

  Args:
    slots: Slots.
    k: [B, n, K, D] keys, positions already applied.
    v: [B, n, K, V] values.
    positions: [B, n] int, distinct within a row; negative ones are padding and are not written. An entry of the same
      position is replaced.

  Returns:
    Slots. A full storage has no slot for positions >= capacity and does not write them: see `attend`. A ring keeps
    the newest, also when n > capacity, and never lets an old entry replace a newer one.

  Raises:
    ValueError: shapes that do not fit the slots.
  """
  k, v, positions = (jnp.asarray(x) for x in (k, v, positions))
  check(slots, k, v, positions)
  C = slots.positions.shape[1]
  positions = positions.astype(jnp.int32)
  slot = positions % C
  written = positions >= 0
  if slots.is_ring:
    newest = jnp.max(positions, axis=1, keepdims=True)
    written &= (positions > newest - C) & (positions >= jnp.take_along_axis(slots.positions, slot, axis=1))
  else:
    written &= positions < C
  slot = jnp.where(written, slot, C)  # out of bounds: dropped
  row = jnp.arange(slot.shape[0])[:, None]
  put = lambda old, new: old.at[row, slot].set(new.astype(old.dtype), mode='drop')
  return dataclasses.replace(slots, k=put(slots.k, k), v=put(slots.v, v), positions=put(slots.positions, positions))


def rollback(slots, length):
  """Empties the slots of positions >= length.

  Args:
    slots: Slots.
    length: [B] int, tokens that stay.

  Returns:
    Slots. What a ring has overwritten does not come back: it serves n tokens of rollback if its capacity exceeds the
    look-back of the mask by n.

  Raises:
    ValueError: length is not [B] integers.
  """
  length = jnp.asarray(length)
  if length.shape != slots.positions.shape[:1] or not jnp.issubdtype(length.dtype, jnp.integer):
    raise ValueError(f'length has shape {length.shape} and dtype {length.dtype}, expected [B] integers')
  positions = jnp.where(slots.positions < length[:, None], slots.positions, -1)
  return dataclasses.replace(slots, positions=positions)


def bytes_in_use(slots):
  """[B] bytes of the entries that are filled, positions included (the arrays themselves are `capacity` long)."""
  entry = sum(x.dtype.itemsize * x[0, 0].size for x in (slots.k, slots.v, slots.positions))
  return entry * jnp.sum(slots.positions >= 0, axis=1)


def attend(q, k, v, slots, positions, **options):
  """Attention over stored and new entries, which are then stored.

      out[t] = softmax.attend(q[t], stored + new)   over the entries that the mask allows by their positions

  An entry that was stored at the position of a new one is replaced first. A ring is read before it is written, so n
  may be any number and no query misses what the new entries overwrite.

  Args:
    q: [B, n, H, D] queries.
    k: [B, n, K, D] keys, positions already applied.
    v: [B, n, K, V] values.
    slots: Slots.
    positions: [B, n] int positions of the new tokens; negative ones are padding: zeros out, nothing stored.
    **options: keywords of softmax.attend; `mask` and `is_causal` see positions. Give a ring a mask that looks back no
      further than its capacity allows: it cannot know what it has lost.

  Returns:
    (out [B, n, H, V], Slots); with return_residual, ((out, lse), Slots). Overflow is never silent: queries whose
    position has no slot in a full storage give NaN.

  Raises:
    ValueError: as `append` and softmax.attend.
  """
  q, k, v, positions = (jnp.asarray(x) for x in (q, k, v, positions))
  stored = append(slots, k, v, positions)
  if slots.is_ring:
    k, v = (jnp.concatenate([old, new.astype(old.dtype)], axis=1) for old, new in ((slots.k, k), (slots.v, v)))
    kv_positions = jnp.concatenate([_without(slots.positions, positions), positions], axis=1)
  else:
    k, v, kv_positions = stored.k, stored.v, stored.positions
  got = softmax.attend(
    q, k.astype(q.dtype), v.astype(q.dtype), positions=positions, kv_positions=kv_positions, **options
  )
  if not slots.is_ring:
    lost = positions >= slots.positions.shape[1]
    got = jax.tree.map(lambda x: jnp.where(lost.reshape(lost.shape + (1,) * (x.ndim - 2)), jnp.nan, x), got)
  return got, stored


def peek(q, k, v, slots, positions, *, among=None, mask=None, sinks=None, return_residual=False, **options):
  """Attention over stored entries and new ones, of which none is stored, as a merge of two parts.

  Args:
    q: [B, n, H, D] queries.
    k: [B, m + n, K, D] keys of m earlier new tokens and of the n queries' own, positions already applied.
    v: [B, m + n, K, V] values.
    slots: Slots.
    positions: [B, m + n] int, none of which is stored; several tokens may stand at one. Negative ones are padding.
    among: bool, broadcasts to [B, H, n, m + n], which new tokens a query may see (itself included); None means all.
      A tree of drafts is such a mask: every node sees its ancestors.
    mask: of attn.masks, by positions; it holds for stored and new entries alike.
    sinks: [H], see softmax.attend.
    return_residual: also return the log-sum-exp.
    **options: further keywords of softmax.attend.

  Returns:
    out [B, n, H, V], and the log-sum-exp if asked for. Not seen here: entries that a ring has lost.

  Raises:
    ValueError: as `append` and softmax.attend.
  """
  q, k, v, positions = (jnp.asarray(x) for x in (q, k, v, positions))
  check(slots, k, v, positions)
  options = dict(options, positions=positions[:, k.shape[1] - q.shape[1] :], return_residual=True)
  stored = (slots.k.astype(q.dtype), slots.v.astype(q.dtype))
  here = masks.everything() if mask is None else mask
  both = here if among is None else here & masks.array(jnp.asarray(among))
  parts = [
    softmax.attend(q, *stored, mask=mask, kv_positions=slots.positions, **options),
    softmax.attend(q, k, v, mask=both, kv_positions=positions, **options),
  ]
  out, lse = softmax.merge(parts)
  if sinks is not None:
    out, lse = softmax.add_sinks(out, lse, sinks)
  return (out, lse) if return_residual else out


def _without(old, new):
  """Stored positions [B, C] with those that also occur in new [B, n] emptied; slot = position % C in both."""
  C = old.shape[1]
  slot = new % C
  again = (new >= 0) & (jnp.take_along_axis(old, slot, axis=1) == new)
  return old.at[jnp.arange(len(old))[:, None], jnp.where(again, slot, C)].set(-1, mode='drop')


def check(slots, k, v, positions):
  """The input rules of `append` and `attend`."""
  B, _, K, D = slots.k.shape
  n = k.shape[1] if k.ndim > 1 else 0
  for name, x, want in (
    ('k', k, (B, n, K, D)),
    ('v', v, (B, n, K, slots.v.shape[-1])),
    ('positions', positions, (B, n)),
  ):
    if x.shape != want:
      raise ValueError(f'{name} has shape {x.shape}, expected {want} for slots with k {slots.k.shape}')
  if not jnp.issubdtype(positions.dtype, jnp.signedinteger):
    raise ValueError(f'positions has dtype {positions.dtype}, expected signed integers')
