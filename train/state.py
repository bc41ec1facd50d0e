"""What a step changes: parameters and optimizer state, as dictionaries from dotted paths to arrays."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from models.decoder import Decoder
from models.state import split
from train import sharding


class State(NamedTuple):
  """Steps done (int32 scalar), {path: parameter}, and the optimizer's state."""

  step: Any
  params: dict
  opt_state: Any


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
