"""Softmax attention over runs of keys that are merged at the end, as in Flash-Decoding."""

import itertools

import jax.numpy as jnp
import numpy as np

from attn import softmax


def attend(q, k, v, *, splits, kv_positions=None, positions=None, sinks=None, return_residual=False, **options):
  """Softmax attention as a merge of `splits` partial results, exactly.

      out = sum_n exp(lse_n - lse) out_n,   lse = log sum_n exp(lse_n),   (out_n, lse_n) over the n-th run of keys

  With few queries, as in decoding, the runs are what can be computed at the same time.

  Args:
    q: [B, T, H, D] queries.
    k: [B, S, K, D] keys.
    v: [B, S, K, V] values.
    splits: number of runs, 1 <= splits <= S; they differ in length by one at most.
    kv_positions: int [S] or [B, S]; None means `positions` if given, else 0..S-1.
    positions: int [T] or [B, T] of the queries; None means 0..T-1.
    sinks: [H] logits that take probability, merged once, last.
    return_residual: also return the log-sum-exp [B, T, H].
    **options: scale, soft_cap, score, is_causal, mask (of predicates on positions), precision and implementation of
      `softmax.attend`.

  Returns:
    [B, T, H, V] in q.dtype, and the log-sum-exp if asked for.

  Raises:
    ValueError: splits out of range, an option by index (bias, lengths, segments), or as `softmax.attend`.

  Source: Dao, Haziza, Massa, Sizov 2023, "Flash-Decoding for long-context inference",
  https://pytorch.org/blog/flash-decoding/; the merge arXiv:2205.14135 section 3.1.
  """
  known = ('scale', 'soft_cap', 'score', 'is_causal', 'mask', 'precision', 'implementation', 'blocks')
  for name in options:
    if name not in known:
      raise ValueError(f'{name} is not an option of split_kv.attend, expected one of {", ".join(known)}')
  if k.ndim != 4 or v.ndim != 4 or k.shape[1] != v.shape[1]:
    raise ValueError(f'k has shape {k.shape} and v {v.shape}, expected [B, S, K, D] and [B, S, K, V]')
  S = k.shape[1]
  if not 1 <= splits <= S:
    raise ValueError(f'splits={splits} must be in 1..{S}, the number of keys')
  if kv_positions is None:
    kv_positions = np.arange(S) if positions is None else positions
  if np.shape(kv_positions)[-1] != S:
    raise ValueError(f'kv_positions has shape {np.shape(kv_positions)}, expected {S} on the last axis')
  positions = np.arange(q.shape[1]) if positions is None else positions
  ends = [n * S // splits for n in range(splits + 1)]
  parts = []
  for start, end in itertools.pairwise(ends):
    here = jnp.asarray(kv_positions)[..., start:end]
    run = dict(options, positions=positions, kv_positions=here, return_residual=True)
    parts.append(softmax.attend(q, k[:, start:end], v[:, start:end], **run))
  out, lse = softmax.merge(parts)
  if sinks is not None:
    out, lse = softmax.add_sinks(out, lse, sinks)
  return (out, lse) if return_residual else out
