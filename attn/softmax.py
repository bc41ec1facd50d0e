"""Exact softmax attention: the definition, its options, and the merging of partial results.

`attend` is the front door. 'reference' is the definition, plain jnp with O(TS) memory and derivatives of any order;
'xla' (attn/tiled.py) is the same function over tiles of queries and keys with O(T + S) memory.
"""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from attn import bias as biases, dropout, masks
from attn.arguments import int32
from attn.masks.predicates import signed

IMPLEMENTATIONS = ('reference', 'xla')


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tile sizes of 'xla' in tokens (q rounded up to a multiple of 8). They change speed, never the result."""

  q: int
  kv: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
  """One checked call, in the form that every implementation takes: arrays as leaves, options static."""

  q: jax.Array  # [B, T, H, D]
  k: jax.Array  # [B, S, K, D]
  v: jax.Array  # [B, S, K, V]
  bias: jax.Array | None  # [1 or B, 1 or H, 1 or T, 1 or S]
  logit_bias: jax.Array | None  # [B, S, K]
  score: biases.Score | None
  mask: masks.Mask
  positions: jax.Array | None  # [1 or B, T]; None is 0..T-1
  kv_positions: jax.Array | None  # [1 or B, S]
  seed: jax.Array | None  # uint32 [2], of dropout
  scale: float = dataclasses.field(metadata={'static': True})
  soft_cap: float | None = dataclasses.field(metadata={'static': True})
  dropout_rate: float = dataclasses.field(metadata={'static': True})
  precision: Any = dataclasses.field(metadata={'static': True})

  @property
  def product_dtype(self):
    """What probabilities are rounded to before they meet values."""
    return jnp.result_type(self.q, self.k, self.v)

  @property
  def accumulator(self):
    """Of scores, statistics and sums."""
    return jnp.promote_types(self.product_dtype, jnp.float32)


def attend(
  q,
  k,
  v,
  *,
  mask=None,
  bias=None,
  logit_bias=None,
  score=None,
  sinks=None,
  scale=None,
  soft_cap=None,
  is_causal=False,
  segment_ids=None,
  kv_segment_ids=None,
  query_seq_lengths=None,
  key_value_seq_lengths=None,
  positions=None,
  kv_positions=None,
  dropout_rate=0.0,
  dropout_key=None,
  precision=None,
  implementation=None,
  return_residual=False,
  is_padding_finite=False,
  blocks=None,
):
  """Softmax attention with grouped query heads.

      logit[t, s] = score(cap(scale * q[t] . k[s])) + bias[t, s] + logit_bias[s]
      cap(x) = soft_cap * tanh(x / soft_cap)
      out[t] = sum_s exp(logit[t, s]) v[s] / (exp(sink) + sum_s exp(logit[t, s]))    over the s that t may see

  A query that may see nothing gives zeros, a log-sum-exp of -inf and zero gradients. What lies beyond
  `key_value_seq_lengths` or in a slot of negative position reaches neither the result nor a gradient, NaN included.

  Args:
    q: [B, T, H, D] queries; query head h reads key head h // (H // K).
    k: [B, S, K, D] keys.
    v: [B, S, K, V] values.
    mask: a mask of attn.masks, or a bool array that broadcasts to [B, H, T, S]; True where attention is allowed. An
      array is data, looked at in every tile; `masks.array` of a numpy array is known beforehand, and tiles are skipped.
    bias: added to the logits; broadcasts to [B, H, T, S]; its gradient has its own shape.
    logit_bias: [B, S] or [B, S, K], added to the logits of an entry for every query (log of a count, for instance).
    score: f(s, b, h, i, j) -> logit, or a score of attn.bias (which may hold arrays that are differentiated); s are
      logits [B, H, t, s], the others broadcastable indices of batch, query head, query and key positions.
    sinks: [H], one more logit per head that takes probability and gives no value; counted in the log-sum-exp.
    scale: factor on q . k; None means D ** -0.5.
    soft_cap: bound on |scale * q . k|; None means none.
    is_causal: hide keys after the query: key position <= query position (aligned at the first token, as in jax.nn).
    segment_ids: int [B, T]; attention stays within equal ids.
    kv_segment_ids: int [B, S]; None means segment_ids.
    query_seq_lengths: int [B]; queries from there on give zeros.
    key_value_seq_lengths: int [B]; keys from there on are not seen.
    positions: int [T] or [B, T], what masks and is_causal see of a query; negative is padding; None means 0..T-1.
    kv_positions: int [S] or [B, S], of the keys; negative is an empty slot; None means `positions` if given (T == S).
    dropout_rate: share of the probabilities set to zero, the rest scaled up; the log-sum-exp is that without dropout.
    dropout_key: a random key, needed when dropout_rate > 0. Equal bits in every implementation.
    precision: of every matrix product, as in jax.lax.dot_general.
    implementation: 'reference', 'xla', or None to choose: plain for few queries (decoding), else tiled.
    return_residual: also return the log-sum-exp.
    is_padding_finite: the caller's word that keys and values in hidden places are finite, which saves a pass over k and
      v: that of a cache, in decoding.
    blocks: Blocks, the tile sizes of 'xla'; None means the fastest known.

  Returns:
    [B, T, H, V] in q.dtype; logits and sums are at least float32. With return_residual also the log-sum-exp
    [B, T, H], natural, float32 (float64 for float64 inputs), differentiable.

  Raises:
    ValueError: shapes, dtypes or options that do not fit, by name.
    NotImplementedError: second order or forward mode through 'xla'; 'reference' has both. (Forward mode of a function
      that was jitted or linearized before is refused by JAX itself, with a TypeError.)

  Source: arXiv:1706.03762 section 3.2.1; grouped heads arXiv:2305.13245; tiles arXiv:2205.14135, arXiv:2307.08691;
  soft cap arXiv:2408.00118; sinks arXiv:2508.10925.
  """
  call, sinks = checked(
    q, k, v, mask=mask, bias=bias, logit_bias=logit_bias, score=score, sinks=sinks, scale=scale, soft_cap=soft_cap,
    is_causal=is_causal, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, query_seq_lengths=query_seq_lengths,
    key_value_seq_lengths=key_value_seq_lengths, positions=positions, kv_positions=kv_positions,
    dropout_rate=dropout_rate, dropout_key=dropout_key, precision=precision, is_padding_finite=is_padding_finite,
  )  # fmt: skip
  if blocks is not None:
    check_blocks(blocks)
  if implementation is None:
    # With few queries the scores are about as large as the keys, and one product beats a loop.
    implementation = 'reference' if call.q.shape[1] <= 16 else 'xla'
  if implementation == 'xla':
    from attn import tiled

    out, lse = tiled.attend(call, blocks)
  elif implementation == 'reference':
    out, lse = _reference(call)
  else:
    raise ValueError(f'implementation={implementation!r} is unknown, expected None or one of {IMPLEMENTATIONS}')
  if sinks is not None:
    out, lse = add_sinks(out, lse, sinks)
  return (out, lse) if return_residual else out


def merge(parts):
  """Attention over the union of disjoint sets of keys, from the attention over each.

      lse = log sum_i exp(lse_i),    out = sum_i exp(lse_i - lse) out_i

  Args:
    parts: a sequence of (out [..., V], lse [...]) as `attend` returns them; a part with lse -inf weighs nothing.

  Returns:
    (out, lse): out in the dtype of the first part, lse at least float32. Exact, differentiable in both; associative
    and commutative up to rounding.

  Raises:
    ValueError: no parts, or shapes that differ.

  Source: arXiv:2205.14135 section 3.1; arXiv:2307.08691.
  """
  parts = [(jnp.asarray(out), jnp.asarray(lse)) for out, lse in parts]
  if not parts:
    raise ValueError('parts is empty, expected at least one (out, lse)')
  for out, lse in parts:
    if out.shape[:-1] != lse.shape or out.shape != parts[0][0].shape:
      raise ValueError(f'parts differ: out {out.shape}, lse {lse.shape}, expected {parts[0][0].shape} and all but V')
  acc = jnp.promote_types(jnp.result_type(*(lse for _, lse in parts)), jnp.float32)
  lses = [lse.astype(acc) for _, lse in parts]
  top = jax.lax.stop_gradient(jnp.max(jnp.stack(lses), axis=0))
  top = jnp.where(jnp.isneginf(top), 0, top)
  weights = [jnp.exp(lse - top) for lse in lses]
  total = jnp.sum(jnp.stack(weights), axis=0)
  some = total != 0  # NaN counts as something, so that it is seen
  safe = jnp.where(some, total, 1)
  out = jnp.zeros(parts[0][0].shape, acc)
  for w, (o, _) in zip(weights, parts):
    out += jnp.where((w != 0)[..., None], o.astype(acc), 0) * (w / safe)[..., None]
  return out.astype(parts[0][0].dtype), jnp.where(some, top + jnp.log(safe), -jnp.inf)


def add_sinks(out, lse, sinks):
  """Merges attention with a sink per head: a logit that takes probability and gives no value.

  Args:
    out: [B, T, H, V].
    lse: [B, T, H].
    sinks: [H] logits; -inf is no sink.

  Returns:
    (out, lse), scaled and with the sink counted.

  Raises:
    ValueError: sinks are not [H] of floating point.

  Source: arXiv:2508.10925 section 2 (gpt-oss).
  """
  out, lse, sinks = jnp.asarray(out), jnp.asarray(lse), _floating('sinks', sinks)
  if sinks.shape != lse.shape[-1:]:
    raise ValueError(f'sinks have shape {sinks.shape}, expected [{lse.shape[-1]}], one per query head')
  sink = jnp.zeros_like(lse) + sinks.astype(lse.dtype)  # placed as lse is, in a mesh with explicit axes
  return merge([(out, lse), (jnp.zeros_like(out), sink)])


def _reference(call: Call):
  (B, T, H, D), (_, S, K, V) = call.q.shape, call.v.shape
  acc = call.accumulator
  q_BTKGD = call.q.reshape(B, T, K, H // K, D)
  s_BKGTS = jnp.einsum('btkgd,bskd->bkgts', q_BTKGD, call.k, precision=call.precision, preferred_element_type=acc)
  s_BHTS = call.scale * s_BKGTS.reshape(B, H, T, S)
  if call.soft_cap is not None:
    s_BHTS = call.soft_cap * jnp.tanh(s_BHTS / call.soft_cap)
  q_tokens, k_tokens = masks.tokens(T, call.positions), masks.tokens(S, call.kv_positions)
  if call.score is not None:
    s_BHTS = call.score.tile(s_BHTS, q_tokens, k_tokens)
  if call.bias is not None:
    s_BHTS += call.bias.astype(acc)
  if call.logit_bias is not None:
    s_BHTS += jnp.repeat(call.logit_bias.astype(acc), H // K, axis=2).transpose(0, 2, 1)[:, :, None, :]
  s_BHTS = jnp.where(call.mask.tile(q_tokens, k_tokens, B, H), s_BHTS, -jnp.inf)

  m_BHT1 = jax.lax.stop_gradient(jnp.max(s_BHTS, axis=-1, keepdims=True, initial=-jnp.inf))
  m_BHT1 = jnp.where(jnp.isneginf(m_BHT1), 0, m_BHT1)  # a row that sees nothing: exp(-inf - 0) = 0
  p_BHTS = jnp.exp(s_BHTS - m_BHT1)
  l_BHT1 = jnp.sum(p_BHTS, axis=-1, keepdims=True)
  some = l_BHT1 != 0  # NaN counts as something, so that it is seen
  safe = jnp.where(some, l_BHT1, 1)
  p_BHTS /= safe
  lse_BHT = jnp.where(some, m_BHT1 + jnp.log(safe), -jnp.inf)[..., 0]
  if call.dropout_rate:
    p_BHTS *= dropout.keep_factor(call.seed, call.dropout_rate, B, H, T, q_tokens.index, k_tokens.index, acc)
  p_BKGTS = p_BHTS.reshape(B, K, H // K, T, S)
  # The order in which the product comes out: asked for another, XLA on CPU copies v transposed where B and T are 1.
  out_BKGTV = jnp.einsum('bkgts,bskv->bkgtv', p_BKGTS, call.v, precision=call.precision, preferred_element_type=acc)
  out = out_BKGTV.transpose(0, 3, 1, 2, 4)
  out = checkpoint_name(out.reshape(B, T, H, V).astype(call.q.dtype), 'attn_out')
  return out, checkpoint_name(lse_BHT.transpose(0, 2, 1), 'attn_lse')


def checked(
  q, k, v, *, mask=None, bias=None, logit_bias=None, score=None, sinks=None, scale=None, soft_cap=None,
  is_causal=False, segment_ids=None, kv_segment_ids=None, query_seq_lengths=None, key_value_seq_lengths=None,
  positions=None, kv_positions=None, dropout_rate=0.0, dropout_key=None, precision=None, is_padding_finite=False,
):  # fmt: skip
  """The input rules of `attend`, for every implementation: returns (Call, sinks)."""
  q, k, v = (jnp.asarray(x) for x in (q, k, v))
  check_qkv(q, k, v)
  (B, T, H, D), (_, S, K, _) = q.shape, k.shape
  scale = D**-0.5 if scale is None else _number('scale', scale)
  if soft_cap is not None and _number('soft_cap', soft_cap) <= 0:
    raise ValueError(f'soft_cap={soft_cap} must be positive, or None for no cap')
  if not 0 <= _number('dropout_rate', dropout_rate) < 1:
    raise ValueError(f'dropout_rate={dropout_rate} must be in [0, 1)')
  if dropout_rate and not _is_key(dropout_key):
    raise ValueError(f'dropout_rate={dropout_rate} needs a dropout_key of jax.random.key, got {dropout_key!r}')
  if bias is not None:
    bias = _floating('bias', bias)
    if bias.ndim > 4 or any(n not in (1, want) for n, want in zip(bias.shape[::-1], (S, T, H, B))):
      raise ValueError(f'bias has shape {bias.shape}, expected one that broadcasts to {(B, H, T, S)} [B, H, T, S]')
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
  if logit_bias is not None:
    logit_bias = _floating('logit_bias', logit_bias)
    if logit_bias.shape not in ((B, S), (B, S, K)):
      raise ValueError(f'logit_bias has shape {logit_bias.shape}, expected {(B, S)} or {(B, S, K)}')
    logit_bias = jnp.broadcast_to(logit_bias.reshape(B, S, -1), (B, S, K))
  score = None if score is None else biases.as_score(score)
  if sinks is not None:
    sinks = _floating('sinks', sinks)
    if sinks.shape != (H,):
      raise ValueError(f'sinks have shape {sinks.shape}, expected [{H}], one per query head')

  positions = _integers('positions', positions, (T,), (1, T), (B, T))
  kv_positions = _integers('kv_positions', kv_positions, (S,), (1, S), (B, S))
  if positions is not None and kv_positions is None:
    if T != S:
      raise ValueError(f'positions came without kv_positions, and T={T} queries are not S={S} keys')
    kv_positions = positions
  lengths = masks.Lengths(
    _integers('query_seq_lengths', query_seq_lengths, (B,)),
    _integers('key_value_seq_lengths', key_value_seq_lengths, (B,)),
  )
  whole = _whole_mask(mask, is_causal, segment_ids, kv_segment_ids, lengths, positions, kv_positions, (B, H, T, S))
  q = _emptied(q, lengths.q_lengths, positions)
  if not is_padding_finite:
    k, v = (_emptied(x, lengths.kv_lengths, kv_positions) for x in (k, v))
  positions, kv_positions = (None if x is None else jnp.atleast_2d(x) for x in (positions, kv_positions))
  seed = dropout.seed_of(dropout_key) if dropout_rate else None
  call = Call(
    q, k, v, bias, logit_bias, score, whole, positions, kv_positions, seed,
    scale, soft_cap, float(dropout_rate), precision,
  )  # fmt: skip
  return call, sinks


def _whole_mask(mask, is_causal, segment_ids, kv_segment_ids, lengths, positions, kv_positions, shape):
  """One mask from the mask and everything else that hides keys."""
  B, H, T, S = shape
  mask = masks.everything() if mask is None else mask
  whole = mask if isinstance(mask, masks.Mask) else masks.array(jnp.asarray(mask))
  masks.check(whole, B, H, T, S, is_default=(positions is None, kv_positions is None))
  if is_causal:
    whole = masks.causal() & whole
  if kv_segment_ids is not None and segment_ids is None:
    raise ValueError('kv_segment_ids came without segment_ids')
  segment_ids = _integers('segment_ids', segment_ids, (T,), (1, T), (B, T))
  if segment_ids is not None:
    if kv_segment_ids is None and T != S:
      raise ValueError(f'segment_ids came without kv_segment_ids, and T={T} queries are not S={S} keys')
    kv_segment_ids = _integers('kv_segment_ids', kv_segment_ids, (S,), (1, S), (B, S))
    whole &= masks.document(segment_ids, kv_segment_ids)
  if lengths.q_lengths is not None or lengths.kv_lengths is not None:
    whole &= lengths
  if positions is not None or kv_positions is not None:
    whole &= masks.Occupied()
  return whole


def check_blocks(blocks):
  """ValueError unless `blocks` is a Blocks of positive integers."""
  if not isinstance(blocks, Blocks) or any(not isinstance(n, int) or n < 1 for n in (blocks.q, blocks.kv)):
    raise ValueError(f'blocks={blocks!r} must be softmax.Blocks of integers, each at least 1')


def check_qkv(q, k, v):
  """ValueError unless q [B, T, H, D], k [B, S, K, D] and v [B, S, K, V] are floating and K divides H."""
  for name, x in (('q', q), ('k', k), ('v', v)):
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f'{name} has shape {x.shape} and dtype {x.dtype}, expected 4 axes of floating point')
  if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
    raise ValueError(
      f'q {q.shape}, k {k.shape} and v {v.shape} do not fit, expected [B, T, H, D], [B, S, K, D] and [B, S, K, V]'
    )
  H, K, D = q.shape[2], k.shape[2], q.shape[3]
  if K == 0 or H == 0 or H % K:
    raise ValueError(f'K={K} key heads must divide H={H} query heads')
  if D == 0 or v.shape[3] == 0:
    raise ValueError(f'q {q.shape} and v {v.shape}: expected a key width D and a value width V of at least 1')


def _emptied(x, lengths, positions):
  """x with zeros where no token is, so that 0 * NaN cannot reach a sum."""
  index = jnp.arange(x.shape[1])
  there = None if lengths is None else index < jnp.asarray(lengths)[:, None]
  if positions is not None:
    occupied = jnp.atleast_2d(positions) >= 0
    there = occupied if there is None else there & occupied
  return x if there is None else jnp.where(there[..., None, None], x, 0)


def _number(name, x):
  if isinstance(x, bool) or not isinstance(x, numbers.Real) or not math.isfinite(x):
    raise ValueError(f'{name}={x!r} is not a finite Python number')
  return float(x)


def _is_key(x):
  """A random key, of the new kind or of the old (uint32 words)."""
  dtype = getattr(x, 'dtype', None)
  return dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == jnp.uint32 and x.ndim == 1))


def _floating(name, x):
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    raise ValueError(f'{name} has dtype {jnp.result_type(x)}, expected floating point')
  return jnp.asarray(x)


def _integers(name, x, *shapes):
  if x is None:
    return None
  x = x if isinstance(x, jax.Array) else np.asarray(x)
  if x.shape not in shapes or not jnp.issubdtype(x.dtype, jnp.integer):
    expected = ' or '.join(str(s) for s in dict.fromkeys(shapes))
    raise ValueError(f'{name} has shape {x.shape} and dtype {x.dtype}, expected integers of shape {expected}')
  return signed(jnp.asarray(int32(name, x)))
