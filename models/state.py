"""The parameters of a model as a dictionary from dotted paths to arrays."""

import jax
from flax import nnx

from models.decoder import Decoder


def split(model):
  """(graph, {path: array}) of a model; `merge` is the inverse. The paths are 'blocks.0.mixer.q.kernel' and the like."""
  graph, variables = nnx.split(model, nnx.Param)
  return graph, {'.'.join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(variables)}


def merge(graph, params):
  """The model of a graph, with its parameters."""
  part = lambda name: int(name) if name.isdigit() else name
  flat = [(tuple(map(part, path.split('.'))), nnx.Param(array)) for path, array in params.items()]
  return nnx.merge(graph, nnx.from_flat_state(sorted(flat)))


def graph(config):
  """The graph of a DecoderConfig's model, computed without making arrays."""
  return split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]


def abstract_params(config):
  """{path: shape and dtype} of a DecoderConfig's parameters."""
  return jax.eval_shape(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])
