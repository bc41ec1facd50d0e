"""Low-rank factors by gradient descent: of one bias, or by two networks that make them from tokens.

The second is for a bias that changes with its input, such as the pair bias of AlphaFold 3: train the networks on
examples once, then attend without the [T, S] array.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import arguments, low_rank
from attn.low_rank import Factors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Networks:
  """Two token-wise networks; called on tokens they give Factors. A pytree, to be trained further with a model.

  Attributes:
    query: layers of (weights, bias) with tanh between; the last weights are [width, H, R].
    key: likewise, [width, K, R].
  """

  query: list[Any]
  key: list[Any]

  def __call__(self, x, y) -> Factors:
    """Factors f [B, H, T, R], g [B, K, S, R] of tokens x [B, T, n] and y [B, S, m]."""
    return Factors(_network(self.query, x), _network(self.key, y))


def factors(key, bias, rank: int, *, steps=500, learning_rate=0.05) -> tuple[Factors, jax.Array]:
  """Factors of a given bias, all of their entries trained.

  Args:
    key: a random key, for the start.
    bias: [..., T, S].
    rank: R, at least 1.
    steps: of Adam on the mean squared error, the learning rate falling to zero as a cosine.
    learning_rate: the first one.

  Returns:
    (Factors, error): the error is the norm of what is left over the norm of the bias, 0 for a bias of zeros, which is
    met exactly. `low_rank.svd` does better on
    one static bias; this one can be had where a loss is added, or entries are hidden.

  Raises:
    ValueError: rank < 1, or a bias that `low_rank.svd` refuses.

  Source: arXiv:2505.12044 section 3.2.
  """
  bias = _checked(bias, rank, steps)
  size = jnp.sqrt(jnp.sqrt(jnp.mean(bias**2) / rank))
  lead = bias.shape[:-2]
  first, second = (
    size * jax.random.normal(k, (*lead, n, rank), bias.dtype) for k, n in zip(jax.random.split(key), bias.shape[-2:])
  )
  trained = _descend(lambda x: _error(x, bias), Factors(first, second), steps, learning_rate)
  return trained, _relative(trained, bias)


def networks(
  key, bias, rank: int, x, y=None, *, hidden=(64, 64), kv_heads=None, steps=1000, learning_rate=0.01
) -> tuple[Networks, jax.Array]:
  """Two token-wise networks phi_q, phi_k with phi_q(x[t]) . phi_k(y[s]) near bias[t, s].

  Args:
    key: a random key, for the start.
    bias: [B, H, T, S], over examples B.
    rank: R.
    x: [B, T, n] what the networks see of a query.
    y: [B, S, m] of a key; None means x.
    hidden: widths of the layers between.
    kv_heads: K, for attention with grouped heads; None means H.
    steps: of Adam on the mean squared error over all examples at once.
    learning_rate: the first one; it falls to zero as a cosine.

  Returns:
    (Networks, error): the error as in `factors`, on these examples.

  Raises:
    ValueError: shapes that do not fit, rank < 1, a bias that `low_rank.svd` refuses, x or y of NaN or infinities.

  Source: arXiv:2505.12044 section 3.2, the neural version.
  """
  bias, x = _checked(bias, rank, steps), jnp.asarray(x)
  y = x if y is None else jnp.asarray(y)
  heads = bias.shape[1] if bias.ndim == 4 else 0
  kv_heads = heads if kv_heads is None else kv_heads
  want = (*x.shape[:2], *y.shape[:2])
  if bias.ndim != 4 or x.ndim != 3 or y.ndim != 3 or (len(bias), bias.shape[2], len(bias), bias.shape[3]) != want:
    raise ValueError(f'bias {bias.shape}, x {x.shape} and y {y.shape}: expected [B, H, T, S], [B, T, n] and [B, S, m]')
  if kv_heads < 1 or heads % kv_heads:
    raise ValueError(f'kv_heads={kv_heads} must divide H={heads}, the heads of the bias')
  for name, tokens in (('x', x), ('y', y)):
    if not isinstance(tokens, jax.core.Tracer) and not np.isfinite(np.asarray(tokens)).all():
      raise ValueError(f'{name} has NaN or infinities, expected finite numbers')
  keys = jax.random.split(key)
  start = Networks(
    _start(keys[0], (x.shape[-1], *hidden), heads, rank, bias.dtype),
    _start(keys[1], (y.shape[-1], *hidden), kv_heads, rank, bias.dtype),
  )
  trained = _descend(lambda nets: _error(nets(x, y), bias), start, steps, learning_rate)
  return trained, _relative(trained(x, y), bias)


def _checked(bias, rank, steps):
  arguments.integer('rank', rank, 1)
  arguments.integer('steps', steps, 0)
  return low_rank.checked_bias(bias)


def _start(key, widths, heads, rank, dtype):
  keys = jax.random.split(key, len(widths))
  shapes = [*itertools.pairwise(widths), (widths[-1], heads, rank)]
  return [
    (jax.random.normal(k, s, dtype) * s[0] ** -0.5, jnp.zeros(s[1:], dtype)) for k, s in zip(keys, shapes, strict=True)
  ]


def _network(layers, x):
  """x [B, N, n] -> [B, heads, N, R]."""
  *inner, (w, c) = layers
  for weights, shift in inner:
    x = jnp.tanh(x @ weights + shift)
  return jnp.einsum('bnw,whr->bhnr', x, w) + c[:, None]


def _error(x: Factors, bias):
  return jnp.mean((x.dense().reshape(bias.shape) - bias) ** 2)


def _relative(x: Factors, bias):
  left, size = _error(x, bias), jnp.mean(bias**2)
  return jnp.sqrt(jnp.where(left == 0, 0, left / size))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _descend(loss, start, steps, learning_rate):
  """Adam from `start` down loss(parameters), the learning rate falling as half a cosine."""
  mean, square = (jax.tree.map(jnp.zeros_like, start) for _ in range(2))

  def step(carry, n):
    parameters, mean, square = carry
    grads = jax.grad(loss)(parameters)
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grads)
    rate = learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * n / steps))
    down = lambda p, m, v: p - rate * (m / (1 - 0.9 ** (n + 1))) / (jnp.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
    return (jax.tree.map(down, parameters, mean, square), mean, square), None

  (parameters, _, _), _ = jax.lax.scan(step, (start, mean, square), jnp.arange(steps, dtype=jnp.float32))
  return parameters
