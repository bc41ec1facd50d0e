"""Cross entropy of next tokens, as sums and counts, so that any batch can be cut into parts and added up."""

import jax
import jax.numpy as jnp

from train.config import SEPARATOR


def cross_entropy(logits, targets, weights):
  """Sums over a batch of the negative log-likelihood of its targets.

      nll = sum_bt weights[b, t] (log sum_v exp logits[b, t, v] - logits[b, t, targets[b, t]])

  Args:
    logits: [B, T, vocab].
    targets: [B, T] int.
    weights: [B, T] float32, 0 where a target does not count.

  Returns:
    Dictionary of float32 scalars: `nll` and `tokens` (sum of weights), and `byte_nll` and `bytes`, the same over
    targets that are bytes. In nats.
  """
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nll = jnp.where(weights > 0, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0) * weights
  is_byte = targets < SEPARATOR
  return {
    'nll': nll.sum(),
    'tokens': weights.sum(),
    'byte_nll': jnp.where(is_byte, nll, 0.0).sum(),
    'bytes': jnp.where(is_byte, weights, 0.0).sum(),
  }


def of_model(model, batch, chunk=0):
  """Cross entropy of a model on a batch of train.data.Rows.

  Args:
    model: with `hidden` and `logits`, as models.decoder.Decoder.
    batch: dictionary of tokens, targets, segment_ids, weights and, if tokens are not in their order, positions, each
      [B, T].
    chunk: positions whose logits are held at a time, a divisor of T, computed again in the backward pass; 0 means T.

  Returns:
    As `cross_entropy`.
  """
  hidden = model.hidden(batch['tokens'], batch.get('positions'), batch['segment_ids'])
  B, T = hidden.shape[:2]
  if not chunk or chunk == T:
    return cross_entropy(model.logits(hidden), batch['targets'], batch['weights'])
  if T % chunk:
    raise ValueError(f'chunk={chunk} must divide T={T}')

  @jax.checkpoint
  def of_chunk(sums, part):
    part_sums = cross_entropy(model.logits(part[0]), part[1], part[2])
    return jax.tree.map(jnp.add, sums, part_sums), None

  # Part a takes tokens a, a + T / chunk, ...: each device keeps the tokens it has.
  cut = lambda x: jnp.moveaxis(x.reshape(B, chunk, T // chunk, *x.shape[2:]), 2, 0)
  zeros = {name: jnp.zeros((), jnp.float32) for name in ('nll', 'tokens', 'byte_nll', 'bytes')}
  return jax.lax.scan(of_chunk, zeros, (cut(hidden), cut(batch['targets']), cut(batch['weights'])))[0]
