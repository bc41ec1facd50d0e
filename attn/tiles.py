"""What attention over tiles is made of: the list of tiles to visit, and the inputs of a call laid out for slicing.

Axes: P = G * bq rows of a tile, of the G query heads that share a key head; n tiles of a list.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn import dropout, masks
from attn.masks import sequence
from attn.masks.predicates import column, register, row, static


@register
class Run:
  """Some tiles, one after the other.

  Attributes:
    q_id: int32 [n] query tile, or [Bm, Hm, n] where rows of the batch or heads have lists of their own.
    kv_id: key tile, as q_id.
    count: how many of them count, an int32 scalar known at run time only; None means all.
    flags: None, or for lists of their own two bools a tile [Bm, Hm, n, 2]: does it count, does it need Work's mask.
    is_masked: whether anything must be evaluated to know what is seen in them.
  """

  q_id: Any
  kv_id: Any
  count: Any
  flags: Any
  is_masked: bool = static()


@register
class Work:
  """The tiles of a call: no tile is in it twice for the same row of the batch and head.

  Attributes:
    runs: tuple of Run.
    mask: what holds beside the call's own mask, where a tile needs it; None is everything.
    row_bits: uint32 [Bm, Hm, T, ceil(nk / 32)], which key tiles a query sees (bit j % 32 of word j // 32), or None.
    bq: queries in a tile.
    bk: keys in a tile.
  """

  runs: tuple
  mask: masks.Mask | None
  row_bits: Any
  bq: int = static()
  bk: int = static()

  @property
  def lists(self):
    """(Bm, Hm) of the lists; (1, 1) where all share one."""
    return next((run.q_id.shape[:2] for run in self.runs if run.q_id.ndim == 3), (1, 1))

  def sweep(self, step, carry):
    """Runs step(visit, carry) -> carry over all tiles."""
    for run in self.runs:
      q_id, kv_id, flags = jnp.asarray(run.q_id), jnp.asarray(run.kv_id), run.flags
      flags = None if flags is None else jnp.asarray(flags)

      def body(n, carry, q_id=q_id, kv_id=kv_id, flags=flags, is_masked=run.is_masked):
        return step(Visit(_entry(q_id, n), _entry(kv_id, n), _entry(flags, n), is_masked), carry)

      carry = jax.lax.fori_loop(0, q_id.shape[-1] if run.count is None else run.count, body, carry)
    return carry


class Visit(NamedTuple):
  """One tile, or one for each list: ids are scalars, or [Bm, Hm] with flags [Bm, Hm, 2]."""

  q_id: Any
  kv_id: Any
  flags: Any
  is_masked: bool


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Inputs of a call laid out for slicing: padded to whole tiles, heads before tokens, groups beside query rows.

  Where every query head has a list of its own, keys and values are repeated for it: then K here is H, and G is 1.
  """

  call: Any
  work: Work
  q: jax.Array  # [B, K, G, T', D]
  k: jax.Array  # [B, K, S', D]
  v: jax.Array  # [B, K, S', V]
  bias: jax.Array | None  # [1 or B, 1 or H, 1 or T', 1 or S']
  logit_bias: jax.Array | None  # [B, K, S']

  @classmethod
  def of(cls, work, call):
    bias = call.bias
    if bias is not None:
      bias = padded(bias, 2, work.bq) if bias.shape[2] > 1 else bias
      bias = padded(bias, 3, work.bk) if bias.shape[3] > 1 else bias
    K = max(call.k.shape[2], work.lists[1])
    by_head = lambda x: jnp.repeat(x, K // x.shape[2], axis=2) if x.shape[2] < K else x
    laid = lambda x: jnp.moveaxis(padded(by_head(x), 1, work.bk), 2, 1)
    logit_bias = None if call.logit_bias is None else laid(call.logit_bias)
    return cls(call, work, grouped(padded(call.q, 1, work.bq), K), laid(call.k), laid(call.v), bias, logit_bias)

  def q_rows(self, x, visit):
    """Rows of the query tile of x [B, K, G, T', ...] as [B, K, P, ...]."""
    x = _block(x, visit.q_id, self.work.bq, 3)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])

  def put_q(self, x, rows, visit):
    """x [B, K, G, T', ...] with its query tile replaced by rows [B, K, P, ...]."""
    return _put(x, self.ungrouped(rows), visit.q_id, self.work.bq, 3)

  def add_q(self, x, rows, visit):
    return self.put_q(x, self.q_rows(x, visit) + rows, visit)

  def kv_rows(self, x, visit):
    """Rows of the key tile of x [B, K, S', ...] as [B, K, bk, ...]."""
    return _block(x, visit.kv_id, self.work.bk, 2)

  def counted(self, rows, visit):
    """Rows [B, K, n, ...] of a tile, zero where the visit does not count: 0 * NaN is NaN."""
    if visit.flags is None:
      return rows
    counts = jnp.broadcast_to(visit.flags[..., 0], rows.shape[:2])
    return jnp.where(counts.reshape(*counts.shape, *(1,) * (rows.ndim - 2)), rows, 0)

  def add_kv(self, x, rows, visit):
    return _put(x, self.kv_rows(x, visit) + rows, visit.kv_id, self.work.bk, 2)

  def ungrouped(self, x):
    """[B, K, P, ...] of one tile as [B, K, G, bq, ...]."""
    return x.reshape(*x.shape[:2], -1, self.work.bq, *x.shape[3:])

  def by_head(self, x):
    """[B, K, P, bk] as [B, H, bq, bk]."""
    return x.reshape(x.shape[0], -1, self.work.bq, x.shape[3])

  def logits(self, visit):
    """(logits [B, K, P, bk], undo) of a tile; undo takes their gradients to those of q . k and of score's arrays."""
    call, acc = self.call, self.call.accumulator
    q, k = (self.counted(x, visit) for x in (self.q_rows(self.q, visit), self.kv_rows(self.k, visit)))
    s = jnp.einsum('bkpd,bksd->bkps', q, k, precision=call.precision, preferred_element_type=acc) * call.scale
    slope = scored = None
    if call.soft_cap is not None:
      t = jnp.tanh(s / call.soft_cap)
      s, slope = call.soft_cap * t, 1 - t * t
    if call.score is not None:
      # Kept as a function: the forward never asks for its derivative.
      scored = functools.partial(jax.vjp, self._scored(visit), s, call.score)
      s = self._scored(visit)(s, call.score)
    if self.bias is not None:
      s += self.by_kv_head(self._bias_tile(self.bias, visit).astype(acc))
    if self.logit_bias is not None:
      s += self.kv_rows(self.logit_bias, visit)[:, :, None, :].astype(acc)
    if visit.is_masked:
      s = jnp.where(self.by_kv_head(self.seen(visit)), s, -jnp.inf)

    def undo(ds):
      ds, d_score = (ds, None) if scored is None else scored()[1](ds)
      return (ds if slope is None else ds * slope) * call.scale, d_score

    return s, undo

  def _scored(self, visit):
    tokens = self.tokens(visit)
    return lambda s, score: score.tile(self.by_head(s), *tokens).reshape(s.shape).astype(s.dtype)

  def _bias_tile(self, bias, visit):
    if visit.q_id.ndim:
      return bias[self._bias_at(bias, visit)]
    bias = _block(bias, visit.q_id, self.work.bq, 2) if bias.shape[2] > 1 else bias
    return _block(bias, visit.kv_id, self.work.bk, 3) if bias.shape[3] > 1 else bias

  def _bias_at(self, bias, visit):
    """The place of a tile in the bias, as index arrays that broadcast to [B, H, bq, bk]."""
    b, h, t, s = bias.shape
    rows, columns = self.places(visit)
    b, h = jnp.arange(b)[:, None, None, None], jnp.arange(h)[:, None, None]
    return b, h, row(rows) if t > 1 else 0, column(columns) if s > 1 else 0

  def add_bias(self, x, d_logits, visit):
    """x, shaped as the bias, with the logit gradients [B, K, P, bk] of a tile added at their place."""
    d = self.by_head(d_logits)
    if visit.q_id.ndim:
      return x.at[tuple(jnp.broadcast_to(at, d.shape) for at in self._bias_at(x, visit))].add(d)
    d = d.sum(axis=[axis for axis in range(4) if x.shape[axis] == 1 and d.shape[axis] > 1], keepdims=True)
    zero = jnp.zeros_like(visit.q_id)  # of the type of the ids, whatever jax_enable_x64 says
    rows = visit.q_id * self.work.bq if x.shape[2] > 1 else zero
    at = (zero, zero, rows, visit.kv_id * self.work.bk if x.shape[3] > 1 else zero)
    return jax.lax.dynamic_update_slice(x, jax.lax.dynamic_slice(x, at, d.shape) + d, at)

  def by_kv_head(self, x):
    """[1 or B, 1 or H, 1 or bq, 1 or bk] as something that broadcasts to [B, K, P, bk]."""
    b, h, t, s = x.shape
    G = self.q.shape[2]
    if t == 1:
      x = jnp.broadcast_to(x, (b, h, self.work.bq, s)) if h > 1 or G > 1 else x
      t = x.shape[2]
    if h == 1:
      x = jnp.broadcast_to(x[:, :, None], (b, 1, G, t, s)) if t > 1 else x[:, :, None]
    return x.reshape(b, h if h == 1 else h // G, -1, s)

  def places(self, visit):
    """Indices of the tile's queries and of its keys, padding included: int32 [1 or Bm, 1 or H, bq] and [.., bk]."""
    every = lambda ids: self._every_head(ids) if ids.ndim else ids[None, None]
    sides = (visit.q_id, self.work.bq), (visit.kv_id, self.work.bk)
    return tuple(every(ids)[..., None] * size + jnp.arange(size, dtype=jnp.int32) for ids, size in sides)

  def tokens(self, visit):
    """(queries, keys) of the tile as masks see them; padding repeats the last one."""
    sides = (self.call.q, self.call.positions), (self.call.k, self.call.kv_positions)
    found = []
    for places, (x, positions) in zip(self.places(visit), sides):
      index = jnp.minimum(places, x.shape[1] - 1)
      found.append(masks.Tokens(index, index if positions is None else sequence.at(positions, index)))
    return tuple(found)

  def _every_head(self, x):
    """[Bm, Hm, ...] as [Bm, 1 or H, ...]."""
    return jnp.repeat(x, self.call.q.shape[2] // x.shape[1], axis=1) if x.shape[1] > 1 else x

  def seen(self, visit):
    """What may be seen in a tile: [1 or B, 1 or H, bq, 1 or bk]."""
    call, shape = self.call, (self.call.q.shape[0], self.call.q.shape[2])
    q, k = self.tokens(visit)
    seen = call.mask.tile(q, k, *shape)
    counts, needs_mask = (None, None) if visit.flags is None else (
      self._every_head(visit.flags[..., n])[..., None, None] for n in range(2)
    )  # fmt: skip
    if self.work.mask is not None:
      more = self.work.mask.tile(q, k, *shape)
      seen &= more if needs_mask is None else more | ~needs_mask
    if counts is not None:
      seen &= counts
    if self.work.row_bits is not None:
      seen &= self._every_head(self._chosen(visit))[..., None]
    for side, places, x in zip((row, column), self.places(visit), (call.q, call.k)):
      if x.shape[1] % places.shape[-1]:
        seen &= side(places) < x.shape[1]
    return seen

  def _chosen(self, visit):
    """Whether each query of the tile chose the key tile: bool [Bm, Hm, bq]."""
    bits = jnp.asarray(self.work.row_bits)
    index = jnp.minimum(visit.q_id[..., None] * self.work.bq + jnp.arange(self.work.bq), bits.shape[2] - 1)
    b, h = jnp.arange(bits.shape[0])[:, None, None], jnp.arange(bits.shape[1])[:, None]
    words = bits[b, h, index, visit.kv_id[..., None] // 32]
    return (words >> (visit.kv_id[..., None] % 32).astype(jnp.uint32)) & 1 == 1

  def keep(self, visit):
    """Dropout's factor for a tile, [B, K, P, bk]."""
    call, (B, T, H, _) = self.call, self.call.q.shape
    rows, columns = self.places(visit)
    factor = dropout.keep_factor(call.seed, call.dropout_rate, B, H, T, rows, columns, call.accumulator)
    return self.by_kv_head(factor)


def _entry(x, n):
  """Entry n of a list, or of each list."""
  return None if x is None else x[n] if x.ndim == 1 else x[:, :, n]


def padded(x, axis, block):
  """x with zeros up to a whole number of blocks."""
  extra = -x.shape[axis] % block
  return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


def grouped(x, K):
  """[B, T, H, ...] -> [B, K, G, T, ...]."""
  x = x.reshape(*x.shape[:2], K, -1, *x.shape[3:])
  return jnp.moveaxis(x, 1, 3)


def flat(x, q):
  """[B, K, G, T', ...] -> [B, T, H, ...]."""
  x = jnp.moveaxis(x, 3, 1)[:, : q.shape[1]]
  return x.reshape(*x.shape[:2], q.shape[2], *x.shape[4:])


def _block(x, i, size, axis):
  """Block i of an axis; i [Bm, Hm] for x [B, K, ...] takes a block for each of its own."""
  if i.ndim == 0:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)
  one = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis - 2)
  return jax.vmap(jax.vmap(one))(x, jnp.broadcast_to(i, x.shape[:2]))


def _put(x, new, i, size, axis):
  if i.ndim == 0:
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * size, axis)
  one = lambda x, new, i: jax.lax.dynamic_update_slice_in_dim(x, new, i * size, axis - 2)
  return jax.vmap(jax.vmap(one))(x, new, jnp.broadcast_to(i, x.shape[:2]))
