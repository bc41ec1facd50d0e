"""What a step changes: parameters, optimizer state and their average, as dictionaries from dotted paths to arrays."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from models.decoder import Decoder
from models.state import split
from train import ema as averages, sharding


class State(NamedTuple):
  """All that a run computes on the devices.

  Attributes:
    step: batches read, int32 scalar.
    params: {path: array}, frozen ones too.
    opt_state: the optimizer's, of the trained parameters.
    ema: {path: float32 array}, moving averages of the trained parameters; {} without.
    skipped: steps left out because something was not finite, int32 scalar.
  """

  step: Any
  params: dict
  opt_state: Any
  ema: dict
  skipped: Any

  @property
  def averaged(self):
    """The parameters to evaluate and to keep: averages where there are any."""
    return {**self.params, **self.ema}


def initializer(config, tx, seed, trainable, *, has_ema=False):
  """A function that makes the first State; for jax.eval_shape and jax.jit.

  Args:
    config: DecoderConfig.
    tx: optax transformation of the trained parameters.
    seed: of random parameters.
    trainable: paths of the trained parameters.
    has_ema: whether the State has averages.

  Returns:
    init(params={}) -> State. Parameters that `params` does not hold are random; none else are made.
  """

  def init(given=None):
    _, made = split(Decoder(config, rngs=nnx.Rngs(seed)))
    params = {path: (given or {}).get(path, x) for path, x in made.items()}
    trained = {path: params[path] for path in trainable}
    zero = lambda: jnp.zeros((), jnp.int32)
    return State(zero(), params, tx.init(trained), averages.init(trained) if has_ema else {}, zero())

  return init


def shardings(abstract, mesh):
  """State of placements for an abstract State (of jax.eval_shape)."""
  params = sharding.params_sharding(abstract.params, mesh)
  return State(*(sharding.like_params(tree, params, mesh) for tree in abstract))
