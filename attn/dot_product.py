"""`dot_product_attention`: jax.nn's function, name for name, over this project's exact attention."""

import numbers

import jax.numpy as jnp

from attn import masks, softmax


def dot_product_attention(
  query,
  key,
  value,
  bias=None,
  mask=None,
  *,
  scale=None,
  is_causal=False,
  query_seq_lengths=None,
  key_value_seq_lengths=None,
  local_window_size=None,
  implementation=None,
  return_residual=False,
  **more,
):
  """Drop-in for jax.nn.dot_product_attention, in O(T + S) memory, with every option of `attn.softmax.attend`.

  What differs from jax.nn: a query that may see nothing gives zeros, not a mean of the values; the residual is
  float32 and differentiable; the value width may differ from the key width; mask objects are welcome as masks.

  Args:
    query: [B, T, H, D], or [T, H, D] without a batch.
    key: [B, S, K, D] or [S, K, D].
    value: [B, S, K, V] or [S, K, V].
    bias: added to the logits; broadcasts to [B, H, T, S].
    mask: bool array that broadcasts to [B, H, T, S], or a mask of attn.masks.
    scale: factor on the products; None means D ** -0.5.
    is_causal: hide keys after the query, aligned at the first token.
    query_seq_lengths: int [B].
    key_value_seq_lengths: int [B].
    local_window_size: (left, right) tokens around the query, itself not counted; an int means both.
    implementation: None, 'reference' or 'xla'.
    return_residual: also return the log-sum-exp [B, T, H] or [T, H].
    **more: keywords of `attn.softmax.attend`: logit_bias, sinks, soft_cap, segment_ids, kv_segment_ids, positions,
      kv_positions, dropout_rate, dropout_key, precision, blocks.

  Returns:
    [B, T, H, V] or [T, H, V] in query's dtype; with return_residual also the log-sum-exp.

  Raises:
    ValueError: as `attn.softmax.attend`; implementation='cudnn', which is jax.nn's own.

  Source: arXiv:1706.03762.
  """
  arrays = {name: jnp.asarray(x) for name, x in (('query', query), ('key', key), ('value', value))}
  ranks = {x.ndim for x in arrays.values()}
  if ranks not in ({3}, {4}):
    shapes = ', '.join(f'{name} {x.shape}' for name, x in arrays.items())
    raise ValueError(f'{shapes}: expected 4 axes each, or 3 each (without a batch)')
  q, k, v = (x[None] if x.ndim == 3 else x for x in arrays.values())
  if local_window_size is not None:
    near = _window(local_window_size)
    mask = near if mask is None else near & (mask if isinstance(mask, masks.Mask) else masks.array(jnp.asarray(mask)))
  out, lse = softmax.attend(
    q,
    k,
    v,
    bias=bias,
    mask=mask,
    scale=scale,
    is_causal=is_causal,
    query_seq_lengths=query_seq_lengths,
    key_value_seq_lengths=key_value_seq_lengths,
    implementation=implementation,
    return_residual=True,
    **more,
  )
  if ranks == {3}:
    out, lse = out[0], lse[0]
  return (out, lse) if return_residual else out


def _window(size):
  """The mask of an int or a pair (left, right)."""
  pair = (size, size) if isinstance(size, numbers.Integral) else size
  if not isinstance(pair, tuple | list) or len(pair) != 2:
    raise ValueError(f'local_window_size={size!r} must be an int or a pair (left, right)')
  try:
    return masks.window(*pair)
  except ValueError as error:
    raise ValueError(f'local_window_size={size!r} does not fit: {error}') from None
