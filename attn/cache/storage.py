"""Key and value entries of one layer in slots addressed by position: slot = position % capacity.

Two kinds. *Full*: the capacity is the longest text, and position p stays in slot p. *Ring*: the newest `capacity`
positions stay and older ones are overwritten; attention whose mask looks back at most w - 1 tokens needs a capacity of
w - 1, w - 1 + n if the last n tokens may be rolled back, and one more to be updated in place (`has_spare`). Rows of a
batch have lengths of their own.

The entries of a head lie next to each other, [B, K, C, D], as the products of decoding read them: on CPU they take a
tenth of the time that [B, C, K, D] needs. Arguments and results have the usual layout.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attn import masks, softmax

# Options of softmax.attend that mean the same for a part of the keys as for all.
BY_POSITION = {'mask', 'is_causal', 'scale', 'soft_cap', 'score', 'sinks', 'precision', 'implementation'}
BY_POSITION |= {'return_residual'}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """The stored entries of a layer, a pytree.

  Attributes:
    k: [B, K, C, D] keys, positions already applied.
    v: [B, K, C, V] values.
    positions: [B, C] int32 position of each entry; -1 is an empty slot, whose key and value are zeros.
    is_ring: whether new entries overwrite old ones (static).
    has_spare: whether a ring has a slot more than its mask looks back to, so that a single new entry may be written
      before the others are read (static).
  """

  k: jax.Array
  v: jax.Array
  positions: jax.Array
  is_ring: bool = dataclasses.field(default=False, metadata={'static': True})
  has_spare: bool = dataclasses.field(default=False, metadata={'static': True})

  def rollback(self, length):
    """See `storage.rollback`."""
    return rollback(self, length)

  def accept(self, entries, positions):
    """Stores entries (k, v) that `storage.peek` has seen; see `storage.append`."""
    k, v = entries
    return append(self, k, v, positions)


def init(batch, capacity, kv_heads, key_width, value_width=None, dtype=jnp.float32, *, is_ring=False, has_spare=False):
  """Empty slots.

  Args:
    batch: B, rows.
    capacity: C, slots per row.
    kv_heads: K.
    key_width: D.
    value_width: V; None means D.
    dtype: of keys and values.
    is_ring: overwrite the oldest entries when full.
    has_spare: the caller's word that no mask looks back to the oldest of `capacity` entries.

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
    k=jnp.zeros((batch, kv_heads, capacity, key_width), dtype),
    v=jnp.zeros((batch, kv_heads, capacity, value_width), dtype),
    positions=jnp.full((batch, capacity), -1, jnp.int32),
    is_ring=is_ring,
    has_spare=has_spare,
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
  if slot.size == 1:
    # One entry that is dropped: a scatter of a single entry XLA turns into a slice update, which on CPU it computes
    # again inside all that reads the result, and then copies the cache at every step of decoding.
    k, v, positions, slot = (jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)) for x in (k, v, positions, slot))
    slot = slot.at[:, 1].set(C)
  row = jnp.arange(slot.shape[0])[:, None]
  put = lambda old, new: old.at[row, :, slot].set(new.astype(old.dtype), mode='drop')
  at = slots.positions.at[row, slot].set(positions, mode='drop')
  return dataclasses.replace(slots, k=put(slots.k, k), v=put(slots.v, v), positions=at)


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
  stays = slots.positions < length[:, None]
  k, v = (jnp.where(stays[:, None, :, None], x, 0) for x in (slots.k, slots.v))
  return dataclasses.replace(slots, k=k, v=v, positions=jnp.where(stays, slots.positions, -1))


def bytes_in_use(slots):
  """[B] bytes of the entries that are filled, positions included (the arrays themselves are `capacity` long)."""
  entry = slots.positions.dtype.itemsize + sum(x.dtype.itemsize * x[0, :, 0].size for x in (slots.k, slots.v))
  return entry * jnp.sum(slots.positions >= 0, axis=1)


def attend(q, k, v, slots, positions, **options):
  """Attention over stored and new entries, which are then stored.

      out[t] = softmax.attend(q[t], stored + new)   over the entries that the mask allows by their positions

  An entry that was stored at the position of a new one is replaced first. A ring is read before it is written (but for
  a single new entry that has a spare slot), so n may be any number and no query misses what the new entries overwrite.

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
  if not slots.is_ring or (slots.has_spare and k.shape[1] == 1):
    options = dict(options, positions=positions, kv_positions=stored.positions, is_padding_finite=True)
    got = softmax.attend(q, *_entries(stored, q.dtype), **options)
    if slots.is_ring:
      return got, stored
    lost = positions >= slots.positions.shape[1]
    return jax.tree.map(lambda x: jnp.where(lost.reshape(lost.shape + (1,) * (x.ndim - 2)), jnp.nan, x), got), stored
  slots = dataclasses.replace(slots, positions=_without(slots.positions, positions))
  k, v = k.astype(slots.k.dtype).astype(q.dtype), v.astype(slots.v.dtype).astype(q.dtype)
  k, v = (jnp.concatenate([old, new], axis=1) for old, new in zip(_entries(slots, q.dtype), (k, v)))
  options = dict(options, positions=positions, kv_positions=jnp.concatenate([slots.positions, positions], axis=1))
  return softmax.attend(q, k, v, **options), stored


def peek(q, k, v, slots, positions, *, among=None, **options):
  """Attention over stored entries and new ones, of which none is stored: two parts, merged, and neither is copied.

  Args:
    q: [B, n, H, D] queries.
    k: [B, m + n, K, D] keys of m earlier new tokens and of the n queries' own, positions already applied.
    v: [B, m + n, K, V] values.
    slots: Slots.
    positions: [B, m + n] int, none of which is stored; several tokens may stand at one. Negative ones are padding.
    among: bool, broadcasts to [B, H, n, m + n], which new tokens a query may see (itself included); None means all.
      A tree of drafts is such a mask: every node sees its ancestors.
    **options: keywords of softmax.attend that see positions or scores: those of BY_POSITION.

  Returns:
    out [B, n, H, V], and the log-sum-exp if asked for. Not seen here: entries that a ring has lost.

  Raises:
    ValueError: as `append` and softmax.attend.
  """
  q, k, v, positions = (jnp.asarray(x) for x in (q, k, v, positions))
  check(slots, k, v, positions)
  if unknown := options.keys() - BY_POSITION:
    raise ValueError(f'{min(unknown)} is not an option of peek, expected one of {", ".join(sorted(BY_POSITION))}')
  mask, sinks, return_residual = (options.pop(name, None) for name in ('mask', 'sinks', 'return_residual'))
  options = dict(options, positions=positions[:, k.shape[1] - q.shape[1] :], return_residual=True)
  here = masks.everything() if mask is None else mask
  both = here if among is None else here & masks.array(jnp.asarray(among))
  out, lse = softmax.merge(
    [
      softmax.attend(
        q, *_entries(slots, q.dtype), mask=mask, kv_positions=slots.positions, is_padding_finite=True, **options
      ),
      softmax.attend(q, k, v, mask=both, kv_positions=positions, **options),
    ]
  )
  if sinks is not None:
    out, lse = softmax.add_sinks(out, lse, sinks)
  return (out, lse) if return_residual else out


def _entries(slots, dtype):
  """Keys and values [B, C, K, D] of slots; a product that follows reads them as they lie."""
  return slots.k.swapaxes(1, 2).astype(dtype), slots.v.swapaxes(1, 2).astype(dtype)


def _without(old, new):
  """Stored positions [B, C] with those that also occur in new [B, n] emptied; slot = position % C in both."""
  C = old.shape[1]
  slot = new % C
  again = (new >= 0) & (jnp.take_along_axis(old, slot, axis=1) == new)
  return old.at[jnp.arange(len(old))[:, None], jnp.where(again, slot, C)].set(-1, mode='drop')


def check(slots, k, v, positions):
  """The input rules of `append` and `attend`."""
  B, K, _, D = slots.k.shape
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
