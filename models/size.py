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
  Of experts those count that a token goes through.
  """
  return 2 * sum(_products(config).values()) + _pair_flops(config, T)


def step_flops_per_token(config, T, trained=None):
  """Floating point operations of the forward and backward pass per token, nothing computed twice.

  Three times the forward pass; a matrix that is not trained has no gradient of its own, and costs it twice. The
  backward pass is taken to reach the first layer.

  Args:
    config: DecoderConfig.
    T: tokens of a text.
    trained: paths of the trained parameters; None means all.
  """
  passes = lambda path: 3 if trained is None or path in trained else 2
  products = sum(passes(path) * count for path, count in _products(config).items())
  return 2 * products + 3 * _pair_flops(config, T)


def _pair_flops(config, T):
  """4 H D for each (query, key) pair that a layer shows, per token."""
  pairs = sum(visible_pairs(config.spec(i), T) for i in range(config.depth))
  return 4 * config.heads * config.D * pairs / T


def _products(config):
  """{path: numbers a token is multiplied with} of all weights of matrix products."""
  used = {}
  for path, size in _shapes(config):
    is_output = path == ('embed', 'table') and config.tied_embeddings
    if path[-1] in ('kernel', 'lora_a', 'lora_b') or is_output:
      used['.'.join(map(str, path))] = size * config.experts_per_token // config.experts if 'experts' in path else size
  return used


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
