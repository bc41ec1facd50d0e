"""Context parallelism: exact attention over sequences that are cut over the devices of a mesh axis.

    with jax.set_mesh(mesh):                              # with an axis 'context' of n devices
      out = distributed.ring(q, k, v, is_causal=True)     # global arrays in and out, differentiable

Three ways to the result of `softmax.attend` on one device:

  `ring`             every device keeps its queries, while keys and values travel around all devices. O(T / n) memory
                     per device, forward and backward. Any number of heads.
  `all_to_all`       heads and sequence change places: every device attends to whole sequences with H / n heads. A few
                     exchanges in place of n hops, but n must divide H.
  `split_kv_decode`  few queries, which every device has; keys stay where they are, partial results are summed.

Tokens may stand in any order, as masks go by positions. In that of attn/distributed/zigzag.py, causal work is the same
on every device. Batch and heads may be cut over other axes of the mesh.

Inside a jax.shard_map over other axes all three take what that has cut as the whole. For gradients there all but
`ring` over tiles compute the forward a second time.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attn import softmax
from attn.distributed import shards

BATCH_AXES, HEAD_AXES = ('data', 'fsdp'), ('tensor',)


def parts(axis='context'):
  """Parts that the current mesh (of jax.set_mesh) cuts sequences into.

  1 without a mesh, without such an axis, and where an outer jax.shard_map has cut by it: there arrays are parts.
  """
  return shards.parts(axis)


def ring(
  q, k, v, *, mesh=None, axis='context', batch_axes=BATCH_AXES, head_axes=HEAD_AXES, sinks=None,
  return_residual=False, **options,
):  # fmt: skip
  """Softmax attention whose keys and values travel around a ring of devices.

      out = sum_i exp(lse_i - lse) out_i,   lse = log sum_i exp(lse_i),   (out_i, lse_i) over the keys of device i

  In each hop a device attends to the keys it holds, and meanwhile hands them on. The backward goes around once more,
  computes the probabilities again from the log-sum-exp, and sends the sums of key gradients after their keys. So no
  device ever holds more than a few times its own part. Keys that the mask hides from every query of a device travel
  there all the same: a window shortens the work, not the way. With implementation 'reference' the loop is
  differentiated as it stands, to any order, and keeps the keys of every hop.

  Args:
    q: [B, T, H, D] queries; query head h reads key head h // (H // K).
    k: [B, S, K, D] keys.
    v: [B, S, K, V] values.
    mesh: jax.sharding.Mesh; None means that of jax.set_mesh.
    axis: the mesh axis, of n devices, that T and S are cut over.
    batch_axes: names of the mesh axes that the batch is cut over, or one name. Those that the mesh lacks do not count,
      nor those over which an outer jax.shard_map has cut the arrays.
    head_axes: the same for heads. Key heads are repeated if these axes need more than there are.
    sinks: [H] logits that take probability, merged once, last.
    return_residual: also return the log-sum-exp.
    **options: of `softmax.attend`: mask (of predicates on positions), is_causal, positions, kv_positions, segment_ids,
      kv_segment_ids, scale, soft_cap, precision, implementation, blocks.

  Returns:
    [B, T, H, V] in q.dtype, and the log-sum-exp [B, T, H] if asked for; differentiable in both.

  Raises:
    ValueError: no such axis, an axis named twice, or `axis` cut by an outer jax.shard_map; B, H, T or S that do not
      divide among devices; a mask or an option by index (arrays, documents, lengths, bias); or as `softmax.attend`.
    NotImplementedError: second order, but with implementation 'reference'.

  Source: arXiv:2310.01889; the backward arXiv:2307.08691 section 3.1.
  """
  call = shards.call(q, k, v, mesh=mesh, axis=axis, batch_axes=batch_axes, head_axes=head_axes, **options)
  of_device = _around if options.get('implementation') == 'reference' else _ring
  return _finished(call, of_device, sinks, return_residual)


def all_to_all(
  q, k, v, *, mesh=None, axis='context', batch_axes=BATCH_AXES, head_axes=HEAD_AXES, sinks=None,
  return_residual=False, **options,
):  # fmt: skip
  """Softmax attention on whole sequences, each device with a part of the heads (Ulysses).

  An exchange turns the part [B, T / n, H, D] of a device into [B, T, H / n, D], and the result back. Key heads are
  repeated, if need be, until n divides them.

  Args and returns: as `ring`.

  Raises:
    ValueError: as `ring`; or n does not divide the query heads of a device.

  Source: arXiv:2309.14509.
  """
  call = shards.call(q, k, v, mesh=mesh, axis=axis, batch_axes=batch_axes, head_axes=head_axes, **options)
  n, heads = call.shard.n, call.q.shape[2] // call.head_parts
  if heads % n:
    raise ValueError(f'H={heads} query heads a device: expected a multiple of mesh axis {axis}={n} (`ring` needs none)')
  return _finished(call, _exchanged, sinks, return_residual)


def split_kv_decode(
  q, k, v, *, mesh=None, axis='context', batch_axes=BATCH_AXES, head_axes=HEAD_AXES, sinks=None,
  return_residual=False, **options,
):  # fmt: skip
  """Softmax attention of few queries, which every device of the axis has, to keys that are cut over it.

      out = sum_i exp(lse_i - lse) out_i,   lse = log sum_i exp(lse_i)     the sums over devices

  Keys and values stay where they are; what travels is of the size of q.

  Args and returns: as `ring`, but T is not cut. positions None is 0..T-1: a decoder says where its queries stand.

  Source: Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference",
  https://pytorch.org/blog/flash-decoding/; the merge arXiv:2205.14135 section 3.1.
  """
  where = {'mesh': mesh, 'axis': axis, 'batch_axes': batch_axes, 'head_axes': head_axes}
  call = shards.call(q, k, v, **where, is_query_cut=False, **options)
  return _finished(call, _summed, sinks, return_residual)


def _finished(call, of_device, sinks, return_residual):
  H = call.q.shape[2]
  if sinks is not None and jnp.shape(sinks) != (H,):
    raise ValueError(f'sinks have shape {jnp.shape(sinks)}, expected [{H}], one per query head')
  out, lse = call.run(of_device)
  if sinks is not None:
    out, lse = softmax.add_sinks(out, lse, sinks)
  return (out, lse) if return_residual else out


def _around(shard, q, k, v, q_tokens, kv_tokens, mask):
  """(out, lse) of the queries of a device over the keys of all."""
  mask = shard.mask(mask, q.shape[0], q.shape[2])

  def attend(keys, results):
    k, v, kv_tokens = keys
    return softmax.merge([results, shard.attend(q, k, v, q_tokens, kv_tokens, mask)])

  def hop(_, carry):
    keys, results = carry
    following = shard.hand_on(keys)  # needs nothing of this hop: it may travel meanwhile
    return following, attend(keys, results)

  acc = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
  row = jnp.zeros_like(q[..., 0], acc)  # made from q: it varies over devices as q does
  nothing = jnp.broadcast_to(row[..., None], (*row.shape, v.shape[-1])), row - jnp.inf
  keys, results = jax.lax.fori_loop(0, shard.n - 1, hop, ((k, v, kv_tokens), nothing))
  out, lse = attend(keys, results)
  return out.astype(q.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(shard, q, k, v, q_tokens, kv_tokens, mask):
  return _around(shard, q, k, v, q_tokens, kv_tokens, mask)


def _ring_fwd(shard, q, k, v, q_tokens, kv_tokens, mask):
  out, lse = _around(shard, q, k, v, q_tokens, kv_tokens, mask)
  out, lse = checkpoint_name(out, 'attn_out'), checkpoint_name(lse, 'attn_lse')
  return (out, lse), (q, k, v, q_tokens, kv_tokens, mask, out, lse)


def _ring_bwd(shard, residuals, cotangents):
  """Around once more. The sums of dk and dv follow their keys one hop behind, so that they too travel meanwhile."""
  q, k, v, q_tokens, kv_tokens, mask, *results = residuals
  mask = shard.mask(mask, q.shape[0], q.shape[2])

  def add(keys, sums):
    k, v, kv_tokens = keys
    more = shard.gradients(q, k, v, q_tokens, kv_tokens, mask, *results, *cotangents)
    return tuple(a + b for a, b in zip(sums, more))

  def hop(_, carry):
    keys, (dq, *sums) = carry
    following, sums = shard.hand_on((keys, sums))
    return following, add(keys, (dq, *sums))

  acc = results[1].dtype
  nothing = tuple(jnp.zeros_like(x, acc) for x in (q, k, v))
  keys, (dq, *sums) = jax.lax.fori_loop(0, shard.n - 1, hop, ((k, v, kv_tokens), nothing))
  dq, *sums = add(keys, (dq, *shard.hand_on(sums)))
  dk, dv = shard.hand_on(sums)  # home
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _exchanged(shard, q, k, v, q_tokens, kv_tokens, mask):
  to_heads = lambda x: jax.lax.all_to_all(x, shard.axis, split_axis=2, concat_axis=1, tiled=True)
  to_tokens = lambda x: jax.lax.all_to_all(x, shard.axis, split_axis=1, concat_axis=2, tiled=True)
  k, v = (shards.repeat_heads(x, shard.n) for x in (k, v))
  q, k, v = (to_heads(x) for x in (q, k, v))
  whole = lambda x: jax.lax.all_gather(x, shard.axis, axis=1, tiled=True)
  q_tokens, kv_tokens = jax.tree.map(whole, (q_tokens, kv_tokens))
  mask = shard.mask(mask, q.shape[0], q.shape[2], (*shard.heads, shard.axis))
  out, lse = shard.attend(q, k, v, q_tokens, kv_tokens, mask)
  return to_tokens(out), to_tokens(lse)


def _summed(shard, q, k, v, q_tokens, kv_tokens, mask):
  out, lse = shard.attend(q, k, v, q_tokens, kv_tokens, shard.mask(mask, q.shape[0], q.shape[2]))
  top = jax.lax.pmax(jax.lax.stop_gradient(lse), shard.axis)
  top = jnp.where(jnp.isneginf(top), 0, top)
  weight = jnp.exp(lse - top)
  total = jax.lax.psum(weight, shard.axis)
  some = total != 0  # NaN counts as something, so that it is seen
  safe = jnp.where(some, total, 1)
  part = jnp.where((weight != 0)[..., None], out.astype(lse.dtype), 0) * (weight / safe)[..., None]
  out = jax.lax.psum(part, shard.axis).astype(out.dtype)
  return out, jnp.where(some, top + jnp.log(safe), -jnp.inf)
