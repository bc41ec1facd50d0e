"""Mixture of experts: a router picks a few of N MLPs for every token.

    y = sum_{n in top} w_n MLP_n(x),    top = the k largest of x R + b,    w = softmax over those k alone

Only the chosen experts are computed, and in decoding only their weights are read: the rows (token, choice) are put in
the order of their experts, and each expert multiplies its own run of them (`grouped_dot`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers


def mlp(config, *, rngs):
  """The per-token part of a layer of a DecoderConfig: one MLP, or experts."""
  if config.experts:
    return Experts(config, rngs=rngs)
  return layers.MLP(
    config.mlp,
    config.width,
    config.F,
    has_bias=config.mlp_bias,
    out_std=(2 * config.depth) ** -0.5,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    rngs=rngs,
  )


class Stack(nnx.Module):
  """N linear maps: kernel [N, in, out] and, if it has one, bias [N, out]."""

  def __init__(self, experts, width_in, width_out, *, has_bias, std=1.0, param_dtype, rngs):
    shape = (experts, width_in, width_out)
    self.kernel = nnx.Param(std * width_in**-0.5 * jax.random.normal(rngs.params(), shape, param_dtype))
    self.bias = nnx.Param(jnp.zeros((experts, width_out), param_dtype)) if has_bias else None


class Experts(nnx.Module):
  """A router and N gated MLPs of the kind config.mlp; see the module's docstring.

  The router's logits, their softmax and the sum over experts are at least float32.

  Source: arXiv:1701.06538; the softmax over the chosen k: Mixtral, arXiv:2401.04088, and gpt-oss, arXiv:2508.10925.
  """

  def __init__(self, config, *, rngs):
    N, E, F = config.experts, config.width, config.F
    common = {'param_dtype': config.param_dtype, 'rngs': rngs}
    self.kind, self.dtype, self.chosen = config.mlp, config.dtype, config.experts_per_token
    self.router = layers.Linear(E, N, has_bias=config.mlp_bias, dtype=config.dtype, **common)
    stack = lambda *shape, std=1.0: Stack(N, *shape, has_bias=config.mlp_bias, std=std, **common)
    self.experts = nnx.Dict(gate=stack(E, F), up=stack(E, F), down=stack(F, E, std=(2 * config.depth) ** -0.5))

  def __call__(self, x):
    """[B, T, E] -> [B, T, E]."""
    rows = x.reshape(-1, x.shape[-1])
    weights, experts = self.route(rows)
    (n, k), N = experts.shape, self.router.kernel.shape[1]
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=N).astype(jnp.int32)

    def linear(name, x):
      stack = self.experts[name]
      y = grouped_dot(x, stack.kernel[...].astype(self.dtype), sizes)
      return y if stack.bias is None else y + stack.bias[...][flat[order]].astype(self.dtype)

    mine = rows[order // k].astype(self.dtype)
    out = linear('down', layers.GATES[self.kind](linear('gate', mine), linear('up', mine)))
    out = out[jnp.argsort(order)].reshape(n, k, -1).astype(weights.dtype)
    return jnp.einsum('nke,nk->ne', out, weights).reshape(x.shape).astype(x.dtype)

  def route(self, rows):
    """[n, E] -> (weights [n, k], at least float32; experts [n, k] int32, largest first, ties to the lower index)."""
    logits, experts = jax.lax.top_k(self.router(rows, at_least_float32=True), self.chosen)
    return jax.nn.softmax(logits, axis=-1), experts


def grouped_dot(x, kernels, sizes):
  """Runs of rows times a matrix each: y[i] = x[i] kernels[n] for the rows i of run n.

  Args:
    x: [R, in], rows in the order of their runs.
    kernels: [N, in, out], in the dtype of x.
    sizes: [N] int32, lengths of the runs, which sum to R.

  Returns:
    [R, out]. On CPU, where `jax.lax.ragged_dot` multiplies all rows by all matrices, it is computed tile by tile.
  """
  x, kernels, sizes = jnp.asarray(x), jnp.asarray(kernels), jnp.asarray(sizes, jnp.int32)
  return jax.lax.platform_dependent(x, kernels, sizes, cpu=_tiled_dot, default=jax.lax.ragged_dot)


@jax.custom_vjp
def _tiled_dot(x, kernels, sizes):
  width = kernels.shape[2]

  def step(out, start, run, rows, is_mine):
    # The rows of a tile that belong to the next run are written again by the next tile.
    return jax.lax.dynamic_update_slice_in_dim(out, rows @ kernels[run], start, axis=0)

  tile = _tile(len(x), len(sizes))
  out = _over_tiles(step, jnp.zeros((len(x) + tile, width), x.dtype), x, sizes)
  return out[: len(x)]


def _backward(saved, dy):
  x, kernels, sizes = saved
  both = jnp.concatenate([x, dy.astype(x.dtype)], axis=1)

  def step(dkernels, start, run, rows, is_mine):
    rows = jnp.where(is_mine[:, None], rows, 0)
    return dkernels.at[run].add(rows[:, : x.shape[1]].T @ rows[:, x.shape[1] :])

  return _tiled_dot(dy, kernels.swapaxes(1, 2), sizes), _over_tiles(step, jnp.zeros_like(kernels), both, sizes), None


_tiled_dot.defvjp(lambda x, kernels, sizes: (_tiled_dot(x, kernels, sizes), (x, kernels, sizes)), _backward)


def _over_tiles(step, carry, x, sizes):
  """Runs `carry = step(carry, first row, run, rows [tile, in], which of them are of the run)` for all tiles, in order.

  Every run is cut into tiles of its own, so that none is read for a matrix it does not meet; empty runs have none.
  """
  tile = _tile(len(x), len(sizes))
  padded = jnp.pad(x, ((0, tile), (0, 0)))
  tiles = -(-sizes // tile)
  last_tile, last_row = jnp.cumsum(tiles), jnp.cumsum(sizes)

  def body(i, carry):
    run = jnp.searchsorted(last_tile, i, side='right')
    start = last_row[run] - sizes[run] + (i - last_tile[run] + tiles[run]) * tile
    rows = jax.lax.dynamic_slice_in_dim(padded, start, tile, axis=0)
    return step(carry, start, run, rows, start + jnp.arange(tile) < last_row[run])

  return jax.lax.fori_loop(0, last_tile[-1], body, carry)


def _tile(rows, runs):
  """Rows a tile: about as many as a run has, from 8 (one vector) to 128, where products are at full speed."""
  return min(128, max(8, 1 << (-(-rows // runs) - 1).bit_length()))
