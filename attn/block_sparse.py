"""Softmax attention over the tiles of a plan: the definition that block-sparse kernels are held to.

    mask = masks.causal() & (masks.window(1023) | masks.sink(4))
    out = block_sparse.attend(q, k, v, plan.of(mask, T, block_q=128, block_kv=128), mask=mask)

Tiles that are not in the plan are never computed, forward or backward. Rows of the batch and heads may have lists of
their own, and the lists may be arrays that an estimator made under `jax.jit`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from attn import masks, plan as plans, softmax, tiled
from attn.tiles import Run, Work

OPTIONS = (
  'bias', 'logit_bias', 'score', 'scale', 'soft_cap', 'segment_ids', 'kv_segment_ids', 'query_seq_lengths',
  'key_value_seq_lengths', 'positions', 'kv_positions', 'dropout_rate', 'dropout_key', 'precision',
)  # fmt: skip


def attend(q, k, v, plan, *, mask=None, sinks=None, return_residual=False, **options):
  """Softmax attention over the tiles of a plan, exactly, in O(T + S + length of the plan) memory.

      out[t] = sum_s softmax_s(logit[t, s]) v[s]   over the s whose tile is in the plan, whose tile t has chosen
                                                   (row bits), and which the mask allows where the tile is PARTIAL

  A query that may see nothing gives zeros, a log-sum-exp of -inf and zero gradients. Reverse mode, first order.

  Args:
    q: [B, T, H, D] queries; query head h reads key head h // (H // K).
    k: [B, S, K, D] keys.
    v: [B, S, K, V] values.
    plan: a Plan of attn.plan for T queries and S keys, with block_q a multiple of 8; lists [Bm, Hm, n] with Bm 1 or
      B and Hm 1, K or H.
    mask: a mask of attn.masks, evaluated on the tiles that the plan calls PARTIAL alone; None sees whole tiles, and
      is refused for a plan that was made from a mask which hides a part of some.
    sinks: [H] logits that take probability, merged once, last.
    return_residual: also return the log-sum-exp.
    **options: bias, logit_bias, score, scale, soft_cap, segment_ids, kv_segment_ids, query_seq_lengths,
      key_value_seq_lengths, positions, kv_positions, dropout_rate, dropout_key and precision of `softmax.attend`.
      What they hide is hidden in every tile.

  Returns:
    [B, T, H, V] in q.dtype; with return_residual also the log-sum-exp [B, T, H], natural, at least float32,
    differentiable.

  Raises:
    ValueError: a plan that does not fit or points outside, is_causal (give it as the mask that the plan was made
      from), or as `softmax.attend`.
    NotImplementedError: second order or forward mode.

  Source: arXiv:2205.14135 section 3.3.
  """
  if options.pop('is_causal', False):
    raise ValueError('is_causal=True with a plan: expected mask=masks.causal(), as the plan was made from it')
  for name in options:
    if name not in OPTIONS:
      why = 'the plan decides' if name in ('implementation', 'blocks') else f'expected one of {", ".join(OPTIONS)}'
      raise ValueError(f'{name} is not an option of block_sparse.attend: {why}')
  call, sinks = softmax.checked(q, k, v, sinks=sinks, **options)
  (B, T, H, _), (S, K) = call.q.shape, call.k.shape[1:3]
  plans.check(plan, B, H, K, T, S)
  _check_use(plan, mask, call)
  if mask is not None:
    mask = mask if isinstance(mask, masks.Mask) else masks.array(jnp.asarray(mask))
    masks.check(mask, B, H, T, S, is_default=(call.positions is None, call.kv_positions is None))
  out, lse = tiled.visit(work(plan, mask, is_open=isinstance(call.mask, masks.Everything)), call)
  if sinks is not None:
    out, lse = softmax.add_sinks(out, lse, sinks)
  return (out, lse) if return_residual else out


def _check_use(plan, mask, call):
  """Raises ValueError where a plan would not mean what it was made for."""
  if plan.block_q % 8:
    raise ValueError(f'plan.block_q={plan.block_q} must be a multiple of 8')
  if plan.needs_mask and mask is None:
    raise ValueError(
      'mask=None, and some tiles of the plan are partly hidden by the mask it was made from: expected the same mask '
      '(masks.everything() to see whole tiles)'
    )
  has_positions = call.positions is not None or call.kv_positions is not None
  if plan.has_positions is not None and plan.has_positions != has_positions:
    given = 'with' if plan.has_positions else 'without'
    raise ValueError(f'the plan was made {given} positions: expected the same positions and kv_positions here')
  if plan.q_id.shape[:2] != (1, 1) and any(_is_cut(x) for x in (call.q, call.k, call.v)):
    raise ValueError(
      f'the plan has lists for {plan.q_id.shape[:2]} rows of the batch and heads, and q, k or v is cut over Explicit '
      'mesh axes: expected a call inside jax.shard_map, or Auto axes'
    )


def _is_cut(x):
  """Whether an array is cut over an axis of a mesh with Explicit axes."""
  sharding = jax.typeof(x).sharding
  return AxisType.Explicit in sharding.mesh.axis_types and any(axis is not None for axis in sharding.spec)


def work(plan, mask, is_open):
  """The tiles of a plan in the form that the loops take.

  Args:
    plan: a Plan.
    mask: of its PARTIAL tiles, or None.
    is_open: whether nothing else hides keys. Then tiles that one static list calls full need not be looked at.
  """
  bits = plan.row_bits
  if not isinstance(plan.q_id, np.ndarray):  # a traced list: as many steps as the longest has entries
    run = Run(plan.q_id, plan.kv_id, jnp.max(plan.nnz), _flags(plan.flags), True)
    return Work((run,), mask, bits, plan.block_q, plan.block_kv)
  steps = int(plan.nnz.max(initial=0))
  q_id, kv_id, flags = (x[:, :, :steps] for x in (plan.q_id, plan.kv_id, plan.flags))
  if q_id.shape[:2] != (1, 1) or bits is not None or not is_open:
    return Work((Run(q_id, kv_id, None, _flags(flags), True),), mask, bits, plan.block_q, plan.block_kv)
  q_id, kv_id, flags = q_id[0, 0], kv_id[0, 0], flags[0, 0]
  is_valid, is_partial = flags & plans.VALID > 0, flags & plans.PARTIAL > 0
  runs = [
    Run(q_id[chosen], kv_id[chosen], None, None, is_masked)
    for chosen, is_masked in ((is_valid & ~is_partial, False), (is_valid & is_partial, True))
  ]
  return Work(tuple(run for run in runs if run.q_id.size), mask, None, plan.block_q, plan.block_kv)


def _flags(flags):
  """What the loops want to know of a tile: [..., 2], does it count, does it need the mask."""
  xp = np if isinstance(flags, np.ndarray) else jnp
  return xp.stack([flags & plans.VALID > 0, flags & plans.PARTIAL > 0], axis=-1)
