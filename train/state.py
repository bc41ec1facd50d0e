"""What a step changes: parameters and optimizer state, as dictionaries from dotted paths to arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.decoder import Decoder
from train import sharding


class State(NamedTuple):
  """Steps done (int32 scalar), {path: parameter}, and the optimizer's state."""

  step: Any
  params: dict
  opt_state: Any


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


def initializer(config, tx, seed):
  """A function without arguments that makes the first State; for jax.eval_shape and jax.jit."""

  def init():
    _, params = split(Decoder(config, rngs=nnx.Rngs(seed)))
    return State(jnp.zeros((), jnp.int32), params, tx.init(params))

  return init


def shardings(abstract, mesh):
  """State of placements for an abstract State (of jax.eval_shape)."""
  params = sharding.params_sharding(abstract.params, mesh)
  return State(*(sharding.like_params(tree, params, mesh) for tree in abstract))


def abstract_params(config):
  """{path: shape and dtype} of a DecoderConfig's parameters."""
  return jax.eval_shape(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])
