"""Small decoders for the tests, and one compiled forward pass per config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import DecoderConfig, LayerSpec
from models.decoder import Decoder

VOCAB, T = 23, 13
HYBRID = [LayerSpec(window=4), LayerSpec()]


def config(**changes):
  base = DecoderConfig(vocab=VOCAB, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, implementation='reference')
  return dataclasses.replace(base, **changes)


def model(seed=0, **changes):
  """A decoder whose parameters are all random: also those that start at zero or one. Made in numpy: no compilation."""
  graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config(**changes), rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(seed)
  fill = lambda path, x: jnp.asarray(0.3 * rng.normal(size=x.shape) + ('scale' in jax.tree_util.keystr(path)), x.dtype)
  return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def tokens(batch=2, length=T, seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)


def paths(module):
  """{dotted path: array} of the parameters."""
  return {'.'.join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(nnx.state(module, nnx.Param))}


@jax.jit
def forward(module, *args):
  return module(*args)


@jax.jit
def extend(module, *args):
  return module.extend(*args)
