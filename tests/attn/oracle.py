"""Softmax attention in numpy loops, one query at a time: slow, obvious, and sharing no code with attn.

Complex inputs go through, so that a derivative can be had exactly by a complex step: f'(x) = Im f(x + ih) / h.
"""

import numpy as np

# A result may be off by this fraction of its largest value. The inputs are rounded to the type first, so that only the
# rounding of the result, of the probabilities and of the sums counts. float64 is for formulas.
TOLERANCE = {'float64': 1e-11, 'float32': 2e-6, 'float16': 2e-3, 'bfloat16': 1.2e-2}


def relative_error(got, want):
  """The largest difference as a fraction of the largest expected value."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, f'shape {got.shape}, expected {want.shape}'
  finite = np.isfinite(want)
  np.testing.assert_array_equal(got[~finite], want[~finite])
  largest = np.abs(want[finite]).max(initial=0)
  error = np.abs(got[finite] - want[finite]).max(initial=0)
  return error / largest if largest else error


def assert_close(got, want, dtype='float64', name='result'):
  """`got` differs from `want` by no more than the tolerance of its type."""
  error = relative_error(got, want)
  assert error <= TOLERANCE[dtype], f'{name} is off by {error:.1e} of its largest value'


def dense(predicate, T, S=None, *, batch=1, heads=1, positions=None, kv_positions=None):
  """A bool array [batch, heads, T, S] from predicate(b, h, i, j, t, s): positions i, j and indices t, s of the pair."""
  S = T if S is None else S
  i = np.broadcast_to(np.arange(T) if positions is None else positions, (batch, T))
  j = np.broadcast_to(np.arange(S) if kv_positions is None else kv_positions, (batch, S))
  out = np.zeros((batch, heads, T, S), bool)
  for b, h, t, s in np.ndindex(*out.shape):
    out[b, h, t, s] = predicate(b, h, int(i[b, t]), int(j[b, s]), t, s)
  return out


def allowed(
  B, H, T, S, *, mask=None, is_causal=False, segment_ids=None, kv_segment_ids=None, query_seq_lengths=None,
  key_value_seq_lengths=None, positions=None, kv_positions=None,
):  # fmt: skip
  """Which pairs may attend, as a bool array [B, H, T, S], from all options that forbid."""
  kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
  if kv_positions is None and positions is not None:
    kv_positions = positions

  def allow(b, h, i, j, t, s):
    return (
      (mask is None or bool(mask[b, h, t, s]))
      and (not is_causal or j <= i)
      and (segment_ids is None or segment_ids[b, t] == kv_segment_ids[b, s])
      and (query_seq_lengths is None or t < query_seq_lengths[b])
      and (key_value_seq_lengths is None or s < key_value_seq_lengths[b])
      and i >= 0
      and j >= 0
    )

  mask = None if mask is None else np.broadcast_to(mask, (B, H, T, S))
  return dense(allow, T, S, batch=B, heads=H, positions=positions, kv_positions=kv_positions)


def attend(
  q, k, v, *, bias=None, logit_bias=None, sinks=None, scale=None, soft_cap=None, keep=None, dropout_rate=0.0, **forbid
):  # fmt: skip
  """Output [B, T, H, V] and log-sum-exp [B, T, H]; `keep` [B, H, T, S] tells what dropout leaves."""
  (B, T, H), (_, S, K, V) = q.shape[:3], v.shape
  may = allowed(B, H, T, S, **forbid)
  kind = np.result_type(q, k, v, *(x for x in (bias, logit_bias, sinks) if x is not None), np.float64)
  out, lse = np.zeros((B, T, H, V), kind), np.full((B, T, H), -np.inf, kind)
  for b, t, h in np.ndindex(B, T, H):
    p, lse[b, t, h], _ = _row(b, t, h, q, k, bias, logit_bias, sinks, scale, soft_cap, may)
    for s in np.flatnonzero(may[b, h, t]):
      kept = 1.0 if keep is None else keep[b, h, t, s] / (1 - dropout_rate)
      out[b, t, h] += p[s] * kept * v[b, s, h // (H // K)]
  return out, lse


def gradients(
  q, k, v, d_out, d_lse, *, bias=None, logit_bias=None, sinks=None, scale=None, soft_cap=None, keep=None,
  dropout_rate=0.0, **forbid,
):  # fmt: skip
  """The gradient of sum(d_out * out) + sum(d_lse * lse) for every floating input, by name; lse -inf counts nothing."""
  (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
  may = allowed(B, H, T, S, **forbid)
  factor = D**-0.5 if scale is None else scale
  grads = {'q': np.zeros(q.shape), 'k': np.zeros(k.shape), 'v': np.zeros(v.shape)}
  d_logits, d_sinks = np.zeros((B, H, T, S)), np.zeros(H)
  for b, t, h in np.ndindex(B, T, H):
    g = h // (H // K)
    p, lse, slope = _row(b, t, h, q, k, bias, logit_bias, sinks, scale, soft_cap, may)
    if not np.isfinite(lse):
      continue
    seen = np.flatnonzero(may[b, h, t])
    kept = np.ones(S) if keep is None else keep[b, h, t] / (1 - dropout_rate)
    d_p = {s: kept[s] * (v[b, s, g] @ d_out[b, t, h]) for s in seen}
    mean = sum(p[s] * d_p[s] for s in seen)
    for s in seen:
      d_logit = p[s] * (d_p[s] - mean + d_lse[b, t, h])
      d_logits[b, h, t, s] = d_logit
      grads['v'][b, s, g] += p[s] * kept[s] * d_out[b, t, h]
      grads['q'][b, t, h] += d_logit * slope[s] * factor * k[b, s, g]
      grads['k'][b, s, g] += d_logit * slope[s] * factor * q[b, t, h]
    if sinks is not None:
      d_sinks[h] += np.exp(sinks[h] - lse) * (d_lse[b, t, h] - mean)
  if sinks is not None:
    grads['sinks'] = d_sinks
  if bias is not None:
    grads['bias'] = _sum_to(d_logits, bias.shape)
  if logit_bias is not None:
    d_BSK = d_logits.reshape(B, K, H // K, T, S).sum((2, 3)).transpose(0, 2, 1)
    grads['logit_bias'] = d_BSK if logit_bias.ndim == 3 else d_BSK.sum(2)
  return grads


def _row(b, t, h, q, k, bias, logit_bias, sinks, scale, soft_cap, may):
  """Probabilities, log-sum-exp, and the slope of the soft cap, over the keys of one query."""
  (B, T, H, D), (_, S, K, _) = q.shape, k.shape
  g = h // (H // K)
  logits, slope = {}, np.ones(S)
  for s in np.flatnonzero(may[b, h, t]):
    x = sum(q[b, t, h, d] * k[b, s, g, d] for d in range(D)) * (D**-0.5 if scale is None else scale)
    if soft_cap is not None:
      slope[s] = 1 - np.real(np.tanh(x / soft_cap)) ** 2
      x = soft_cap * np.tanh(x / soft_cap)
    if bias is not None:
      x = x + np.broadcast_to(bias, (B, H, T, S))[b, h, t, s]
    if logit_bias is not None:
      x = x + (logit_bias[b, s, g] if logit_bias.ndim == 3 else logit_bias[b, s])
    logits[s] = x
  terms = list(logits.values()) + ([] if sinks is None else [sinks[h]])
  top = max((np.real(x) for x in terms), default=-np.inf)
  p = np.zeros(S, np.result_type(*terms, np.float64) if terms else np.float64)
  if top == -np.inf:
    return p, -np.inf, slope
  total = sum(np.exp(x - top) for x in terms)
  for s, x in logits.items():
    p[s] = np.exp(x - top) / total
  return p, top + np.log(total), slope


def _sum_to(x, shape):
  """The sum of x over the axes that broadcasting from `shape` made."""
  x = x.sum(tuple(range(x.ndim - len(shape))))
  return x.sum(tuple(a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1), keepdims=True)
