"""'xla': softmax attention over tiles of queries and keys, in O(T + S) memory, forward and backward.

A flat list of tiles (query block, key block) is fixed before anything runs: tiles that the mask leaves empty are not
in it, tiles that it leaves whole skip the mask. The forward keeps a running maximum m, sum l and output o per query;
the backward computes the probabilities of each tile again from the log-sum-exp. Axes: P = G * bq rows of a tile.

Source: arXiv:2205.14135, arXiv:2307.08691.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from attn import dropout, masks


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static part of a call: tile sizes and the tiles to visit, as bytes so that equal plans are equal."""

  bq: int
  bk: int
  whole: bytes  # int32 [n, 2] of tiles that the mask leaves full
  partial: bytes

  def tiles(self):
    """(list [n, 2], is the mask needed) for each of the two lists that is not empty."""
    for packed, is_masked in ((self.whole, False), (self.partial, True)):
      if packed:
        yield np.frombuffer(packed, np.int32).reshape(-1, 2), is_masked


def attend(call, blocks=None):
  """`softmax.attend` for a checked Call: (out [B, T, H, V], lse [B, T, H]). Memory O(T + S), work by the mask."""
  (B, T, H, _), (S, V) = call.q.shape, call.v.shape[1::2]
  if 0 in (B, T, S):  # nothing to see, or nobody to see it
    return jnp.zeros((B, T, H, V), call.q.dtype), jnp.full((B, T, H), -jnp.inf, call.accumulator)
  plan = _planned(call, blocks.q, blocks.kv) if blocks else _best_plan(call)
  try:
    out, lse = _attend(plan, _varying(call))
  except TypeError as error:
    if 'forward-mode' not in str(error):
      raise
    raise NotImplementedError(_FIRST_ORDER) from error
  return out, lse


def _varying(call):
  """The call with every array varying over the mesh axes over which any does: loops in jax.shard_map ask for it."""
  of = lambda x: frozenset(jax.typeof(x).manual_axis_type.varying)
  axes = frozenset().union(*(of(x) for x in jax.tree.leaves(call)))
  spread = lambda x: jax.lax.pcast(x, tuple(axes - of(x)), to='varying') if axes - of(x) else x
  return jax.tree.map(spread, call) if axes else call


_FIRST_ORDER = "implementation='xla' has first-order reverse mode only, use implementation='reference'"


def _best_plan(call):
  """The plan that should be fastest, of square tiles that keep the scores of a tile in the caches of a CPU."""
  (B, T, H, _), S = call.q.shape, call.k.shape[1]
  # Beside its scores a tile costs its share of slices and updates of q, k, v and out. Constants: fitted to times of
  # forward and backward on two CPU cores, T = 256 to 8192, full and windowed.
  tiles = lambda plan: sum(len(part) for part, _ in plan.tiles())
  cost = lambda plan: tiles(plan) * (plan.bq * plan.bk + 12 * (plan.bq + plan.bk) + 512)
  in_cache = [size for size in (64, 128, 256) if B * H * size**2 <= 2**20] or [64]
  sizes = [size for size in in_cache if (T // size) * (S // size) <= 2**22] or [512]  # a list of bearable length
  return min((_planned(call, size, size) for size in sizes), key=cost)


def _planned(call, bq, bk):
  """The plan of a call with tiles of bq queries and bk keys, or of all there are."""
  T, S = call.q.shape[1], call.k.shape[1]
  # Query tiles are whole vectors: jaxlib 0.10.2 for CPU miscompiles the update of the running maximum in float64 for
  # tiles of 5 queries (batch 2, 4 heads; elements are taken from the neighbouring row). Multiples of 8 are sound.
  bq, bk = -(-max(1, min(bq, T)) // 8) * 8, max(1, min(bk, S))
  if call.positions is None and call.kv_positions is None:
    verdict = _verdicts(call.mask, T, S, bq, bk)
  else:  # positions are known at run time only
    verdict = np.full((-(-T // bq), -(-S // bk)), masks.PARTIAL)
  whole, partial = (np.argwhere(verdict == kind).astype(np.int32).tobytes() for kind in (masks.FULL, masks.PARTIAL))
  return _Plan(bq, bk, whole, partial)


def _verdicts(mask, T, S, bq, bk):
  """masks.EMPTY, PARTIAL or FULL for every tile, with positions equal to indices: [query blocks, key blocks]."""
  q_low, k_low = np.arange(0, T, bq)[:, None], np.arange(0, S, bk)[None, :]
  verdict = mask.boxes(q_low, np.minimum(q_low + bq, T) - 1, k_low, np.minimum(k_low + bk, S) - 1)
  # A tile that ends beyond the array holds padding, so it is never whole.
  ragged = (q_low + bq > T) | (k_low + bk > S)
  return np.where(ragged, np.minimum(verdict, masks.PARTIAL), verdict)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, call):
  return _forward(plan, call)


def _attend_fwd(plan, call):
  out, lse = _forward(plan, call)
  out, lse = checkpoint_name(out, 'attn_out'), checkpoint_name(lse, 'attn_lse')
  return (out, lse), (call, out, lse)


def _attend_bwd(plan, residuals, cotangents):
  call, out, lse = residuals
  return (_once(plan, call, out, lse, *cotangents),)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once(plan, call, out, lse, d_out, d_lse):
  """The backward, wrapped so that differentiating it a second time says what to use instead."""
  return _backward(plan, call, out, lse, d_out, d_lse)


@_once.defjvp
def _once_jvp(plan, primals, tangents):
  raise NotImplementedError(_FIRST_ORDER)


_attend.defvjp(_attend_fwd, _attend_bwd)


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """Inputs of a call laid out for slicing: padded to whole tiles, heads before tokens, groups beside query rows."""

  call: Any
  plan: _Plan
  q: jax.Array  # [B, K, G, T', D]
  k: jax.Array  # [B, K, S', D]
  v: jax.Array  # [B, K, S', V]
  bias: jax.Array | None  # [1 or B, 1 or H, 1 or T', 1 or S']
  logit_bias: jax.Array | None  # [B, K, S']

  @classmethod
  def of(cls, plan, call):
    bias = call.bias
    if bias is not None:
      bias = _padded(bias, 2, plan.bq) if bias.shape[2] > 1 else bias
      bias = _padded(bias, 3, plan.bk) if bias.shape[3] > 1 else bias
    logit_bias = None if call.logit_bias is None else _padded(call.logit_bias, 1, plan.bk).transpose(0, 2, 1)
    q, k, v = (_padded(x, 1, block) for x, block in ((call.q, plan.bq), (call.k, plan.bk), (call.v, plan.bk)))
    q, k, v = _grouped(q, call.k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return cls(call, plan, q, k, v, bias, logit_bias)

  def q_rows(self, x, i):
    """Rows of query tile i of x [B, K, G, T', ...] as [B, K, P, ...]."""
    x = _block(x, i, self.plan.bq, 3)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])

  def ungrouped(self, x):
    """[B, K, P, ...] of one tile back to [B, K, G, bq, ...]."""
    return x.reshape(*x.shape[:2], -1, self.plan.bq, *x.shape[3:])

  def kv_rows(self, x, j):
    return _block(x, j, self.plan.bk, 2)

  def logits(self, i, j, is_masked):
    """(logits, slope of the soft cap or None) of a tile: [B, K, P, bk]."""
    call, acc = self.call, self.call.accumulator
    q, k = self.q_rows(self.q, i), self.kv_rows(self.k, j)
    s = jnp.einsum('bkpd,bksd->bkps', q, k, precision=call.precision, preferred_element_type=acc) * call.scale
    slope = None
    if call.soft_cap is not None:
      t = jnp.tanh(s / call.soft_cap)
      s, slope = call.soft_cap * t, 1 - t * t
    if self.bias is not None:
      s += self.by_kv_head(self.bias_tile(self.bias, i, j).astype(acc))
    if self.logit_bias is not None:
      s += self.kv_rows(self.logit_bias, j)[:, :, None, :].astype(acc)
    if is_masked:
      s = jnp.where(self.by_kv_head(self.seen(i, j)), s, -jnp.inf)
    return s, slope

  def bias_tile(self, bias, i, j):
    bias = _block(bias, i, self.plan.bq, 2) if bias.shape[2] > 1 else bias
    return _block(bias, j, self.plan.bk, 3) if bias.shape[3] > 1 else bias

  def by_kv_head(self, x):
    """[1 or B, 1 or H, 1 or bq, 1 or bk] as something that broadcasts to [B, K, P, bk]."""
    b, h, t, s = x.shape
    G = self.q.shape[2]
    if t == 1:
      x = jnp.broadcast_to(x, (b, h, self.plan.bq, s)) if h > 1 or G > 1 else x
      t = x.shape[2]
    if h == 1:
      x = jnp.broadcast_to(x[:, :, None], (b, 1, G, t, s)) if t > 1 else x[:, :, None]
    return x.reshape(b, h if h == 1 else h // G, -1, s)

  def seen(self, i, j):
    call, (bq, bk) = self.call, (self.plan.bq, self.plan.bk)
    q, k = _tokens(i, bq, call.q.shape[1], call.positions), _tokens(j, bk, call.k.shape[1], call.kv_positions)
    seen = call.mask.tile(q, k, call.q.shape[0], call.q.shape[2])
    if call.q.shape[1] % bq:
      seen &= (i * bq + jnp.arange(bq) < call.q.shape[1])[:, None]
    if call.k.shape[1] % bk:
      seen &= j * bk + jnp.arange(bk) < call.k.shape[1]
    return seen

  def keep(self, i, j):
    """Dropout's factor for a tile, [B, K, P, bk]."""
    call, (B, T, H, _) = self.call, self.call.q.shape
    rows, columns = i * self.plan.bq + jnp.arange(self.plan.bq), j * self.plan.bk + jnp.arange(self.plan.bk)
    factor = dropout.keep_factor(call.seed, call.dropout_rate, B, H, T, rows, columns, call.accumulator)
    return self.by_kv_head(factor)

  def sweep(self, step, carry):
    """Runs step(i, j, is_masked, carry) -> carry over the tiles of the plan."""
    for tiles, is_masked in self.plan.tiles():
      tiles = jnp.asarray(tiles)
      carry = jax.lax.fori_loop(0, len(tiles), lambda n, c, t=tiles, m=is_masked: step(t[n, 0], t[n, 1], m, c), carry)
    return carry


def _forward(plan, call):
  x = _Tiles.of(plan, call)
  (B, K, G, Tp, _), V, acc = x.q.shape, x.v.shape[-1], call.accumulator

  def step(i, j, is_masked, carry):
    m, l, o = carry
    s, _ = x.logits(i, j, is_masked)
    m_old, l_old, o_old = (x.q_rows(y, i) for y in carry)
    m_new = jnp.maximum(m_old, s.max(-1))
    safe = jnp.where(jnp.isneginf(m_new), 0, m_new)  # nothing seen yet: exp(-inf - 0) = 0
    p = jnp.exp(s - safe[..., None])
    shrink = jnp.exp(m_old - safe)
    l_new = shrink * l_old + p.sum(-1)
    if call.dropout_rate:
      p *= x.keep(i, j)
    v = x.kv_rows(x.v, j)
    p = p.astype(call.product_dtype)
    pv = jnp.einsum('bkps,bksv->bkpv', p, v, precision=call.precision, preferred_element_type=acc)
    o_new = shrink[..., None] * o_old + pv
    return tuple(_put(y, x.ungrouped(new), i, plan.bq, 3) for y, new in ((m, m_new), (l, l_new), (o, o_new)))

  # Made from q, so that they are placed as q is in a mesh with explicit axes and vary as it does in jax.shard_map.
  row = x.q[..., 0]
  start = (
    jnp.full_like(row, -jnp.inf, acc),
    jnp.zeros_like(row, acc),
    jnp.broadcast_to(jnp.zeros_like(row, acc)[..., None], (B, K, G, Tp, V)),
  )
  m, l, o = x.sweep(step, start)
  some = l != 0  # NaN counts as something, so that it is seen
  safe = jnp.where(some, l, 1)
  lse = jnp.where(some, jnp.where(jnp.isneginf(m), 0, m) + jnp.log(safe), -jnp.inf)
  return _flat(o / safe[..., None], call.q).astype(call.q.dtype), _flat(lse, call.q)


def _backward(plan, call, out, lse, d_out, d_lse):
  """Gradients of sum(out * d_out) + sum(lse * d_lse): a Call-shaped cotangent.

  dp = d_out v', ds = p * (dp - rowsum(d_out * out) + d_lse), dq = scale ds k, dk = scale ds' q, dv = p' d_out.
  """
  x, acc, K = _Tiles.of(plan, call), call.accumulator, call.k.shape[2]
  none = jnp.isneginf(lse)  # what a row that sees nothing is asked for may be NaN, and must not meet the keys
  d_out, d_lse, safe = jnp.where(none[..., None], 0, d_out), jnp.where(none, 0, d_lse), jnp.where(none, 0, lse)
  delta = jnp.sum(d_out.astype(acc) * out.astype(acc), -1) - d_lse
  rows = [_grouped(_padded(y, 1, plan.bq), K) for y in (d_out, delta, safe)]
  dot = functools.partial(jnp.einsum, precision=call.precision, preferred_element_type=acc)

  def step(i, j, is_masked, grads):
    q, k, v = x.q_rows(x.q, i), x.kv_rows(x.k, j), x.kv_rows(x.v, j)
    do, delta, safe = (x.q_rows(y, i) for y in rows)
    s, slope = x.logits(i, j, is_masked)
    p = jnp.exp(s - safe[..., None])
    dp = dot('bkpv,bksv->bkps', do, v)
    kept = p
    if call.dropout_rate:
      keep = x.keep(i, j)
      kept, dp = p * keep, dp * keep
    ds = p * (dp - delta[..., None])
    d_logits = ds
    ds = (ds if slope is None else ds * slope) * call.scale
    ds, kept = ds.astype(call.product_dtype), kept.astype(call.product_dtype)
    return grads | {
      'q': _add(grads['q'], x.ungrouped(dot('bkps,bksd->bkpd', ds, k)), i, plan.bq, 3),
      'k': _add(grads['k'], dot('bkps,bkpd->bksd', ds, q), j, plan.bk, 2),
      'v': _add(grads['v'], dot('bkps,bkpv->bksv', kept, do), j, plan.bk, 2),
      **_bias_grads(x, grads, d_logits, i, j),
    }

  named = {'q': x.q, 'k': x.k, 'v': x.v, 'bias': x.bias, 'logit_bias': x.logit_bias}
  zeros = {name: jnp.zeros_like(y, acc) for name, y in named.items() if y is not None}
  grads = x.sweep(step, zeros)
  grads['q'] = _flat(grads['q'], call.q)
  for name in ('k', 'v'):
    grads[name] = grads[name].transpose(0, 2, 1, 3)[:, : call.k.shape[1]]
  if call.bias is not None:
    grads['bias'] = grads['bias'][:, :, : call.bias.shape[2], : call.bias.shape[3]]
  if call.logit_bias is not None:
    grads['logit_bias'] = grads['logit_bias'].transpose(0, 2, 1)[:, : call.k.shape[1]]
  typed = {name: grad.astype(getattr(call, name).dtype) for name, grad in grads.items()}
  return dataclasses.replace(call, **typed, **_no_gradient(call))


def _bias_grads(x, grads, d_logits, i, j):
  """The sums of one tile's logit gradients that belong to bias and logit_bias."""
  new = {}
  if x.bias is not None:
    G = x.q.shape[2]
    d = x.ungrouped(d_logits)
    d = d.reshape(d.shape[0], -1, *d.shape[3:])  # [B, H, bq, bk]
    assert d.shape[1] == x.q.shape[1] * G
    d = d.sum(axis=[axis for axis in range(4) if x.bias.shape[axis] == 1 and d.shape[axis] > 1], keepdims=True)
    old = grads['bias']
    zero = jnp.zeros_like(i)  # of the type of i and j, whatever jax_enable_x64 says
    at = (zero, zero, i * x.plan.bq if old.shape[2] > 1 else zero, j * x.plan.bk if old.shape[3] > 1 else zero)
    new['bias'] = jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice(old, at, d.shape) + d, at)
  if x.logit_bias is not None:
    new['logit_bias'] = _add(grads['logit_bias'], d_logits.sum(2), j, x.plan.bk, 2)
  return new


def _no_gradient(call):
  """Cotangents of what has none: masks, positions, seed."""
  zero = lambda y: np.zeros(np.shape(y), jax.dtypes.float0) if not _is_float(y) else jnp.zeros_like(y)
  return {name: jax.tree.map(zero, getattr(call, name)) for name in ('mask', 'positions', 'kv_positions', 'seed')}


def _is_float(x):
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _tokens(i, block, length, positions):
  index = jnp.minimum(i * block + jnp.arange(block, dtype=jnp.int32), length - 1)
  position = index[None] if positions is None else jnp.take(positions, index, axis=1)
  return masks.Tokens(index, position)


def _padded(x, axis, block):
  extra = -x.shape[axis] % block
  return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


def _grouped(x, K):
  """[B, T, H, ...] -> [B, K, G, T, ...]."""
  x = x.reshape(*x.shape[:2], K, -1, *x.shape[3:])
  return jnp.moveaxis(x, 1, 3)


def _flat(x, q):
  """[B, K, G, T', ...] -> [B, T, H, ...]."""
  x = jnp.moveaxis(x, 3, 1)[:, : q.shape[1]]
  return x.reshape(*x.shape[:2], q.shape[2], *x.shape[4:])


def _block(x, i, size, axis):
  return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _put(x, new, i, size, axis):
  return jax.lax.dynamic_update_slice_in_dim(x, new, i * size, axis)


def _add(x, more, i, size, axis):
  return _put(x, _block(x, i, size, axis) + more, i, size, axis)
