"""'xla': softmax attention over tiles of queries and keys, in O(T + S) memory, forward and backward.

A list of tiles (query block, key block) is made before the arithmetic: tiles that the mask leaves empty are not in it,
tiles that it leaves whole skip the mask. It is fixed at trace time where the mask is made of numbers and numpy arrays,
and an array of its own where positions are data. The forward keeps a running maximum m, sum l and output o per query;
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

from attn import masks, tiles
from attn.tiles import Run, Tiles, Work


def attend(call, blocks=None):
  """`softmax.attend` for a checked Call: (out [B, T, H, V], lse [B, T, H]). Memory O(T + S), work by the mask."""
  return visit(work(call, blocks), call)


def visit(todo, call):
  """(out, lse) of a checked Call over the tiles of a Work."""
  (B, T, H, _), (S, V) = call.q.shape, call.v.shape[1::2]
  if 0 in (B, T, S):  # nothing to see, or nobody to see it
    return jnp.zeros((B, T, H, V), call.q.dtype), jnp.full((B, T, H), -jnp.inf, call.accumulator)
  try:
    return _results(*_varying((todo, call)))
  except TypeError as error:
    if 'forward-mode' not in str(error):
      raise
    raise NotImplementedError(_FIRST_ORDER) from error


def gradients(call, out, lse, d_out, d_lse, blocks=None):
  """What sum(d_out * out) + sum(d_lse * lse) gives to the arrays of a Call.

  `out` and `lse` may be those over more keys than the call holds: then the gradients are what these keys contribute,
  and those of k and v are exact. That is how a ring of devices goes backward.

  Args:
    call: a checked Call.
    out: [B, T, H, V].
    lse: [B, T, H].
    d_out: [B, T, H, V], cotangent of out.
    d_lse: [B, T, H], cotangent of lse.
    blocks: as `attend`.

  Returns:
    A Call of gradients, in at least float32: a sum of many parts is rounded once.
  """
  call, out, lse, d_out, d_lse, todo = _varying((call, out, lse, d_out, d_lse, work(call, blocks)))
  return _gradients(todo, call, out, lse, d_out, d_lse)


def _varying(tree):
  """The tree with every array varying over the mesh axes over which any does: loops in jax.shard_map ask for it."""
  of = lambda x: frozenset(jax.typeof(x).manual_axis_type.varying)
  axes = frozenset().union(*(of(x) for x in jax.tree.leaves(tree)))
  spread = lambda x: jax.lax.pcast(x, tuple(axes - of(x)), to='varying') if axes - of(x) else x
  return jax.tree.map(spread, tree) if axes else tree


_FIRST_ORDER = (
  "attention over tiles has first-order reverse mode only, use softmax.attend(..., implementation='reference')"
)


def work(call, blocks=None):
  """The tiles of a Call that its mask does not leave empty, one list for all rows of the batch and heads.

  Args:
    call: a checked Call.
    blocks: softmax.Blocks; None means square tiles that keep the scores of a tile in the caches of a CPU.
  """
  (B, T, H, _), S = call.q.shape, call.k.shape[1]
  if 0 in (B, T, S):
    return Work((), None, None, 1, 1)
  if blocks is not None:
    return _work(call, blocks.q, blocks.kv)
  # Beside its scores a tile costs its share of slices and updates of q, k, v and out. Constants: fitted to times of
  # forward and backward on two CPU cores, T = 256 to 8192, full and windowed.
  count = lambda todo: sum(run.q_id.shape[-1] for run in todo.runs if run.count is None or not run.is_masked)
  cost = lambda todo: count(todo) * (todo.bq * todo.bk + 12 * (todo.bq + todo.bk) + 512)
  in_cache = [size for size in (64, 128, 256) if B * H * size**2 <= 2**20] or [64]
  sizes = [size for size in in_cache if (T // size) * (S // size) <= 2**22] or [512]  # a list of bearable length
  return min((_work(call, size, size) for size in sizes), key=cost)


def _work(call, bq, bk):
  """The tiles of bq queries and bk keys, or of all there are."""
  (B, T, H, _), S = call.q.shape, call.k.shape[1]
  # Query tiles are whole vectors: jaxlib 0.10.2 for CPU miscompiles the update of the running maximum in float64 for
  # tiles of 5 queries (batch 2, 4 heads; elements are taken from the neighbouring row). Multiples of 8 are sound.
  bq, bk = -(-max(1, min(bq, T)) // 8) * 8, max(1, min(bk, S))
  is_static = call.positions is None and call.kv_positions is None
  some, every = masks.verdicts(
    call.mask, T, S, block_q=bq, block_kv=bk, batch=B, heads=H, is_static=is_static,
    positions=call.positions, kv_positions=call.kv_positions,
  )  # fmt: skip
  # A tile that ends beyond the array holds padding, so it is never whole.
  whole = (np.arange(0, T, bq)[:, None] + bq <= T) & (np.arange(0, S, bk) + bk <= S)
  whole = every.all((0, 1)) & whole
  return Work(runs(whole, some.any((0, 1)) & ~whole), None, None, bq, bk)


def runs(whole, partial):
  """Runs over the tiles that are True in whole [nq, nk], without the mask, and in partial, with it."""
  found = []
  for chosen, is_masked in ((whole, False), (partial, True)):
    if isinstance(chosen, np.ndarray):
      ids: Any = np.argwhere(chosen).astype(np.int32)
      count = None
    else:
      ids = jnp.stack(jnp.nonzero(chosen, size=chosen.size, fill_value=0), axis=1).astype(jnp.int32)
      count = chosen.sum(dtype=jnp.int32)
    if len(ids):
      found.append(Run(ids[:, 0], ids[:, 1], count, None, is_masked))
  return tuple(found)


@jax.custom_vjp
def _attend(todo, call):
  return _forward(todo, call)


def _attend_fwd(todo, call):
  out, lse = _forward(todo, call)
  out, lse = checkpoint_name(out, 'attn_out'), checkpoint_name(lse, 'attn_lse')
  return (out, lse), (todo, call, out, lse)


def _attend_bwd(residuals, cotangents):
  todo, call, out, lse = residuals
  grads = _gradients(todo, call, out, lse, *cotangents)
  typed = jax.tree.map(lambda x, grad: grad.astype(x.dtype) if _is_float(x) else grad, call, grads)
  return jax.tree.map(_zero, todo), typed


@jax.custom_jvp
def _once(todo, call, out, lse, d_out, d_lse):
  """The backward, wrapped so that differentiating it a second time says what to use instead."""
  return _backward(todo, call, out, lse, d_out, d_lse)


@_once.defjvp
def _once_jvp(primals, tangents):
  raise NotImplementedError(_FIRST_ORDER)


_attend.defvjp(_attend_fwd, _attend_bwd)
# Outside of jax.jit, too, loops are compiled once and not for every call.
_results, _gradients = (jax.jit(f, inline=True) for f in (_attend, _once))


def _forward(todo, call):
  x = Tiles.of(todo, call)
  (B, K, G, Tp, _), V, acc = x.q.shape, x.v.shape[-1], call.accumulator

  def step(visit, carry):
    s, _ = x.logits(visit)
    m_old, l_old, o_old = (x.q_rows(y, visit) for y in carry)
    m_new = jnp.maximum(m_old, s.max(-1))
    safe = jnp.where(jnp.isneginf(m_new), 0, m_new)  # nothing seen yet: exp(-inf - 0) = 0
    p = jnp.exp(s - safe[..., None])
    shrink = jnp.exp(m_old - safe)
    l_new = shrink * l_old + p.sum(-1)
    if call.dropout_rate:
      p *= x.keep(visit)
    v = x.counted(x.kv_rows(x.v, visit), visit)
    p = p.astype(call.product_dtype)
    pv = jnp.einsum('bkps,bksv->bkpv', p, v, precision=call.precision, preferred_element_type=acc)
    o_new = shrink[..., None] * o_old + pv
    return tuple(x.put_q(y, new, visit) for y, new in zip(carry, (m_new, l_new, o_new)))

  # Made from q, so that they are placed as q is in a mesh with explicit axes and vary as it does in jax.shard_map.
  row = x.q[..., 0]
  start = (
    jnp.full_like(row, -jnp.inf, acc),
    jnp.zeros_like(row, acc),
    jnp.broadcast_to(jnp.zeros_like(row, acc)[..., None], (B, K, G, Tp, V)),
  )
  m, l, o = todo.sweep(step, start)
  some = l != 0  # NaN counts as something, so that it is seen
  safe = jnp.where(some, l, 1)
  lse = jnp.where(some, jnp.where(jnp.isneginf(m), 0, m) + jnp.log(safe), -jnp.inf)
  return tiles.flat(o / safe[..., None], call.q).astype(call.q.dtype), tiles.flat(lse, call.q)


def _backward(todo, call, out, lse, d_out, d_lse):
  """Gradients of sum(out * d_out) + sum(lse * d_lse): a Call-shaped cotangent.

  dp = d_out v', ds = p * (dp - rowsum(d_out * out) + d_lse), dq = scale ds k, dk = scale ds' q, dv = p' d_out.
  """
  x, acc = Tiles.of(todo, call), call.accumulator
  none = jnp.isneginf(lse)  # what a row that sees nothing is asked for may be NaN, and must not meet the keys
  d_out, d_lse, safe = jnp.where(none[..., None], 0, d_out), jnp.where(none, 0, d_lse), jnp.where(none, 0, lse)
  delta = jnp.sum(d_out.astype(acc) * out.astype(acc), -1) - d_lse
  rows = [tiles.grouped(tiles.padded(y, 1, todo.bq), x.k.shape[1]) for y in (d_out, delta, safe)]
  dot = functools.partial(jnp.einsum, precision=call.precision, preferred_element_type=acc)

  def step(visit, grads):
    q, do, delta, safe = (x.counted(x.q_rows(y, visit), visit) for y in (x.q, *rows))
    k, v = (x.counted(x.kv_rows(y, visit), visit) for y in (x.k, x.v))
    s, undo = x.logits(visit)
    p = jnp.exp(s - safe[..., None])
    dp = dot('bkpv,bksv->bkps', do, v)
    kept = p
    if call.dropout_rate:
      keep = x.keep(visit)
      kept, dp = p * keep, dp * keep
    d_logits = p * (dp - delta[..., None])
    ds, d_score = undo(d_logits)
    ds, kept = ds.astype(call.product_dtype), kept.astype(call.product_dtype)
    new = {
      'q': x.add_q(grads['q'], dot('bkps,bksd->bkpd', ds, k), visit),
      'k': x.add_kv(grads['k'], dot('bkps,bkpd->bksd', ds, q), visit),
      'v': x.add_kv(grads['v'], dot('bkps,bkpv->bksv', kept, do), visit),
    }
    if x.bias is not None:
      new['bias'] = x.add_bias(grads['bias'], d_logits, visit)
    if x.logit_bias is not None:
      new['logit_bias'] = x.add_kv(grads['logit_bias'], d_logits.sum(2), visit)
    if call.score is not None:
      new['score'] = [old + more for old, more in zip(grads['score'], _floats(d_score))]
    return new

  named = {'q': x.q, 'k': x.k, 'v': x.v, 'bias': x.bias, 'logit_bias': x.logit_bias}
  zeros: dict = {name: jnp.zeros_like(y, acc) for name, y in named.items() if y is not None}
  if call.score is not None:
    zeros['score'] = [jnp.zeros_like(y, acc) for y in _floats(call.score)]
  return _as_call(call, todo.sweep(step, zeros))


def _as_call(call, grads):
  """Gradients by name, in the layout of Tiles, as a Call."""
  K, S = call.k.shape[2], call.k.shape[1]
  grads['q'] = tiles.flat(grads['q'], call.q)
  for name in ('k', 'v', 'logit_bias'):
    if name in grads:  # [B, H or K, S', ...]: what was repeated for the heads is summed
      grad = grads[name].reshape(grads[name].shape[0], K, -1, *grads[name].shape[2:]).sum(2)
      grads[name] = jnp.moveaxis(grad, 2, 1)[:, :S]
  if call.bias is not None:
    grads['bias'] = grads['bias'][:, :, : call.bias.shape[2], : call.bias.shape[3]]
  score = iter(grads.pop('score', ()))
  grads['score'] = jax.tree.map(lambda y: next(score) if _is_float(y) else _zero(y), call.score)
  none = {name: jax.tree.map(_zero, getattr(call, name)) for name in ('mask', 'positions', 'kv_positions', 'seed')}
  return dataclasses.replace(call, **grads, **none)


def _floats(tree):
  return [y for y in jax.tree.leaves(tree) if _is_float(y)]


def _zero(x):
  """The cotangent of what has none: masks, positions, seed, lists."""
  return jnp.zeros_like(x) if _is_float(x) else np.zeros(np.shape(x), jax.dtypes.float0)


def _is_float(x):
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
