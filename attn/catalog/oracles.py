"""The families' definitions as loops in numpy float64: slow, obvious, and sharing no code with attn."""

import math

import numpy as np


def softmax(
  q, k, v, sinks=None, segment_ids=None, *, allowed=lambda i, j: True, soft_cap=None, bias=lambda h, i, j: 0.0
):
  """Softmax attention, one query at a time.

  Args:
    q: [B, T, H, D].
    k: [B, S, K, D].
    v: [B, S, K, V].
    sinks: [H] or None.
    segment_ids: [B, T] or None; T == S.
    allowed: allowed(i, j): may query i see key j?
    soft_cap: or None.
    bias: bias(h, i, j), added to a logit.

  Returns:
    {'out': [B, T, H, V], 'lse': [B, T, H]}.
  """
  (B, T, H, D), (_, S, K, V) = q.shape, v.shape
  out, lse = np.zeros((B, T, H, V)), np.full((B, T, H), -np.inf)
  for b, i, h in np.ndindex(B, T, H):
    logits, values = [], []
    for j in range(S):
      if allowed(i, j) and (segment_ids is None or segment_ids[b, i] == segment_ids[b, j]):
        x = float(np.dot(q[b, i, h], k[b, j, h * K // H])) / math.sqrt(D)
        x = x if soft_cap is None else soft_cap * math.tanh(x / soft_cap)
        logits.append(x + bias(h, i, j))
        values.append(v[b, j, h * K // H])
    if sinks is not None:
      logits.append(float(sinks[h]))
      values.append(np.zeros(V))
    if logits:
      top = max(logits)
      weights = [math.exp(x - top) for x in logits]
      out[b, i, h] = sum(w * value for w, value in zip(weights, values)) / sum(weights)
      lse[b, i, h] = top + math.log(sum(weights))
  return {'out': out, 'lse': lse}


def rotary(x, positions, *, angles, rotary_width=None, factor=1.0):
  """Pairs of channels turned as complex numbers.

  Args:
    x: [B, T, H, D].
    positions: [B, T].
    angles: angles(i) -> radians per position of pair i.
    rotary_width: channels that turn; None means all.
    factor: on the channels that turn.

  Returns:
    {'out': [B, T, H, D]}.
  """
  half = (rotary_width or x.shape[-1]) // 2
  out = np.array(x, np.float64)
  for b, t, h, i in np.ndindex(*x.shape[:3], half):
    turn = complex(math.cos(positions[b, t] * angles(i)), math.sin(positions[b, t] * angles(i)))
    z = factor * turn * complex(x[b, t, h, i], x[b, t, h, i + half])
    out[b, t, h, i], out[b, t, h, i + half] = z.real, z.imag
  return {'out': out}
