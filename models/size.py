"""How large a decoder is and what a token costs, without making it."""

import numpy as np
from flax import nnx

from models.decoder import Decoder


def parameters(config):
  """Number of parameters, the embedding table counted once."""
  return sum(size for _, size in _shapes(config))


def flops_per_token(config, T):
  """Floating point operations of the forward pass per token of a text of T tokens.

      2 (weights of all matrix products, the output projection included) + sum over layers of 4 H D pairs / T

  A multiplication and an addition count as two. Attention counts the (query, key) pairs that the layer's mask shows;
  an implementation that computes hidden pairs does more. Norms, rotation, softmax and activations are left out.
  Forward and backward together are three times this.
  """
  weights = sum(size for path, size in _shapes(config) if path[-1] == 'kernel')
  weights += config.vocab * config.width if config.tied_embeddings else 0
  pairs = sum(visible_pairs(config.spec(i), T) for i in range(config.depth))
  return 2 * weights + 4 * config.heads * config.D * pairs / T


def visible_pairs(spec, T):
  """(query, key) pairs that a layer's mask shows in a text of T tokens; the sum of `decoder.layer_masks`."""
  t = np.arange(T)
  seen = t + 1
  if spec.window:
    seen = np.minimum(seen, spec.window)
  if spec.chunk:
    seen = np.minimum(seen, t % spec.chunk + 1)
  return int(seen.sum())


def _shapes(config):
  """[(path, size)] of all parameters; nothing is computed."""
  params = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)
  return [(path, int(np.prod(leaf.get_value().shape))) for path, leaf in nnx.to_flat_state(params)]
