"""Cross entropy of next tokens, as sums and counts, so that any batch can be cut into parts and added up."""

import jax
import jax.numpy as jnp


def cross_entropy(logits, targets, weights, byte_counts, *, z_loss=0.0):
  """Sums over a batch of the negative log-likelihood of its targets, and of what keeps log-partitions near 0.

      lse[b, t] = log sum_v exp logits[b, t, v]
      nll       = sum_bt weights[b, t] (lse[b, t] - logits[b, t, targets[b, t]])
      z         = sum_bt weights[b, t] lse[b, t]^2
      objective = nll + z_loss z

  Args:
    logits: [B, T, vocab].
    targets: [B, T] int.
    weights: [B, T] float32, 0 where a target does not count: its logits then change no sum, whatever they are. Its
      gradient is 0 only if they are finite: to replace others first would hold one more array of this shape.
    byte_counts: [B, T] float32, bytes of text that a target stands for; 0 for separators.
    z_loss: factor on z; 0 means none. PaLM has 1e-4.

  Returns:
    Dictionary of float32 scalars: `objective`, what training differentiates; `nll`; `tokens` (sum of weights);
    `byte_nll` and `bytes`, nll and weighted bytes of the targets that stand for text; `z`. In nats.

  Source: z-loss arXiv:2204.02311 section 5.
  """
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  lse = jax.nn.logsumexp(logits, axis=-1)
  counts = weights > 0
  nll = jnp.where(counts, lse - chosen, 0.0) * weights
  total, z = nll.sum(), (jnp.where(counts, jnp.square(lse), 0.0) * weights).sum()
  return {
    'objective': total + z_loss * z if z_loss else total,
    'nll': total,
    'tokens': weights.sum(),
    'byte_nll': jnp.where(byte_counts > 0, nll, 0.0).sum(),
    'bytes': (byte_counts * weights).sum(),
    'z': z,
  }


def of_model(model, batch, chunk=0, *, z_loss=0.0):
  """Cross entropy of a model on a batch of train.data.Rows.

  Args:
    model: with `hidden` and `logits`, as models.decoder.Decoder.
    batch: dictionary of tokens, targets, segment_ids, weights, bytes and, if tokens are not in their order, positions,
      each [B, T].
    chunk: positions whose logits are held at a time, a divisor of T, computed again in the backward pass; 0 means T.
    z_loss: see `cross_entropy`.

  Returns:
    As `cross_entropy`.
  """
  hidden = model.hidden(batch['tokens'], batch.get('positions'), batch['segment_ids'])

  def of(hidden, targets, weights, byte_counts):
    return cross_entropy(model.logits(hidden), targets, weights, byte_counts, z_loss=z_loss)

  return in_chunks(of, (hidden, batch['targets'], batch['weights'], batch['bytes']), chunk)


def in_chunks(of, arrays, chunk):
  """The sums of a function over parts of the tokens, one part after the other.

  Args:
    of: (parts of arrays, each [B, chunk, ...]) -> dictionary of sums; computed again in the backward pass.
    arrays: tuple of [B, T, ...].
    chunk: positions of a part, a divisor of T; 0 means T, and nothing is computed twice.

  Returns:
    Dictionary of the sums over all parts.

  Raises:
    ValueError: chunk does not divide T.
  """
  B, T = arrays[0].shape[:2]
  if not chunk or chunk == T:
    return of(*arrays)
  if T % chunk:
    raise ValueError(f'chunk={chunk} must divide T={T}')

  @jax.checkpoint
  def add(sums, parts):
    return jax.tree.map(jnp.add, sums, of(*parts)), None

  # Part a takes tokens a, a + T / chunk, ...: each device keeps the tokens it has.
  parts = tuple(jnp.moveaxis(x.reshape(B, chunk, T // chunk, *x.shape[2:]), 2, 0) for x in arrays)
  shapes = jax.eval_shape(lambda parts: of(*(x[0] for x in parts)), parts)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, parts)[0]
