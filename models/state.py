"""The parameters of a model as a dictionary from dotted paths to arrays."""

import dataclasses

import jax
from flax import nnx

from models.decoder import Decoder


def split(model):
  """(graph, {path: array}) of a model; `merge` is the inverse. The paths are 'blocks.0.mixer.q.kernel' and the like."""
  graph, variables = nnx.split(model, nnx.Param)
  return graph, {'.'.join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(variables)}


def merge(graph, params):
  """The model of a graph, with its parameters."""
  flat = [(_parts(path), nnx.Param(array)) for path, array in params.items()]
  return nnx.merge(graph, nnx.from_flat_state(sorted(flat)))


def _parts(path):
  """The path as nnx has it: ('blocks', 0, 'mixer', 'q', 'kernel')."""
  return tuple(int(name) if name.isdigit() else name for name in path.split('.'))


def graph(config):
  """The graph of a DecoderConfig's model, computed without making arrays."""
  return split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]


def unscanned(model, config):
  """A model of scanned layers with its layers apart, as generation wants it: scanned layers copy caches at every token.

  Args:
    model: Decoder of `config`.
    config: DecoderConfig.

  Returns:
    (Decoder, DecoderConfig with scan=False). Parameters of stacked layers are copied; an unscanned model is returned.
  """
  if not config.scan:
    return model, config
  scanned, config = config, dataclasses.replace(config, scan=False)
  params = {}
  for path, array in split(model)[1].items():
    for i, name in apart(path, scanned):
      params[name] = array if i is None else array[i]
  return merge(graph(config), params), config


def apart(path, config):
  """[(index in a stack, or None; path in the unscanned model)] of a parameter of a DecoderConfig's model."""
  first, _, rest = path.partition('.')
  if first != 'blocks' or not config.scan:
    return [(None, path)]
  block, _, rest = rest.partition('.')
  places = range(int(block), config.depth, len(config.layers))
  return [(i, f'blocks.{place}.{rest}') for i, place in enumerate(places)]


def abstract_params(config):
  """{path: shape and dtype} of a DecoderConfig's parameters."""
  if config.adapter_match and not config.scan:  # which may tell layers apart that a scan would stack
    return jax.eval_shape(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])
  # Of the scanned form, which is traced once per layer of the pattern and not once per layer.
  scanned = dataclasses.replace(config, scan=True)
  params = jax.eval_shape(lambda: split(Decoder(scanned, rngs=nnx.Rngs(0)))[1])
  if config.scan:
    return params
  found = {}
  for path, leaf in params.items():
    for i, name in apart(path, scanned):
      found[name] = leaf if i is None else jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  return dict(sorted(found.items()))
