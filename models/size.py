"""How large a decoder is and what a token costs, without making it."""

import math
import re
from typing import NamedTuple

import numpy as np
from flax import nnx

from models import state
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
  return sum(part.flops for part in _parts(config, T, ()))


def step_flops_per_token(config, T, trained=None):
  """Floating point operations of the forward and backward pass per token, nothing computed twice.

  To the forward pass a matrix that is trained adds as much for its own gradient, and all that reads what trained
  parameters give adds as much (attention twice) for the gradient that goes back to them. All trained, that is three
  times the forward pass.

  Args:
    config: DecoderConfig.
    T: tokens of a text.
    trained: paths of the trained parameters; None means all.
  """
  parts = _parts(config, T, trained)
  return sum(part.flops for part in parts) + _backward(parts)


def layers_flops_per_token(config, T, layers):
  """The part of `flops_per_token` that is inside layers of these numbers, from 0."""
  return sum(part.flops for part in _parts(config, T, ()) if part.place[0] in layers)


def mixer_flops_per_token(config, T, layers, trained=None):
  """As `step_flops_per_token`, of the mixers of some layers, each of which has an input of its own.

  Args:
    config: DecoderConfig.
    T: tokens of a text.
    layers: their numbers, from 0.
    trained: paths of the trained parameters; None means all.
  """
  parts = [part for part in _parts(config, T, trained) if part.is_mixer]
  mine = [[part for part in parts if part.place[0] == layer] for layer in layers]
  return sum(sum(part.flops for part in layer) + _backward(layer) for layer in mine)


class _Part(NamedTuple):
  """A parameter, or the attention of a layer.

  Attributes:
    place: (layer, stage), in the order in which one reads what another gives.
    flops: of the forward pass, per token.
    is_trained: whether it is a trained parameter.
    is_mixer: whether it is inside a mixer.
    back: what the gradient of its input costs, as a multiple of flops.
  """

  place: tuple
  flops: float
  is_trained: bool
  is_mixer: bool
  back: int = 1


# Parts of a layer; those of a stage do not read each other.
STAGES = (
  r'mixer_norm\..*',
  r'mixer\..*',  # but for those below
  r'mixer\.(q_norm|k_norm|sinks).*',
  'attention itself',
  r'mixer\.o\..*',
  r'mixer_out_norm\..*',
  r'mlp_norm\..*',
  r'mlp\.(experts\.)?(gate|up)\..*',
  r'mlp\.(experts\.)?down\..*',
  r'mlp\.router\..*',  # its weights meet what the experts give
  r'mlp_out_norm\..*',
)


def _backward(parts):
  """FLOPs of the backward pass."""
  first = min((part.place for part in parts if part.is_trained), default=(math.inf,))
  return sum(part.flops * (part.is_trained + part.back * (part.place > first)) for part in parts)


def _parts(config, T, trained):
  """[_Part] of a decoder."""
  found = []
  for names, size in _shapes(config):
    path = '.'.join(map(str, names))
    is_trained = trained is None or path in trained
    is_product = names[-1] in ('kernel', 'lora_a', 'lora_b')
    used = size * config.experts_per_token / config.experts if 'experts' in names else size
    layers = [layer for _, layer in state.apart(path, config)]
    for layer in layers:
      place, is_mixer = _place(layer, config.depth)
      found.append(_Part(place, 2 * used / len(layers) * is_product, is_trained, is_mixer))
    if path == 'embed.table' and config.tied_embeddings:  # read at the start, multiplied with at the end
      found.append(_Part((config.depth, 1), 2 * size, is_trained, False))
  for i in range(config.depth):
    pairs = visible_pairs(config.spec(i), T)
    place = i, STAGES.index('attention itself')
    found.append(_Part(place, 4 * config.heads * config.D * pairs / T, False, True, back=2))
  return found


def _place(path, depth):
  """(the place of a parameter of the unscanned model, whether it is inside a mixer)."""
  first, _, rest = path.partition('.')
  if first != 'blocks':
    return {'embed': (-1, 0), 'norm': (depth, 0), 'head': (depth, 1)}[first], False
  layer, _, rest = rest.partition('.')
  stage = max(i for i, names in enumerate(STAGES) if re.fullmatch(names, rest))
  half = 0.5 if rest.endswith('.lora_b') else 0  # B of an adapter reads what A gives
  return (int(layer), stage + half), rest.startswith('mixer.')


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
