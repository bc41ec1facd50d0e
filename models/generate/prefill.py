"""Prompts: their checks, and the cache that holds them, read chunk by chunk by programs that other prompts share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.generate import placing

LEAST_CAPACITY, LEAST_CHUNK = 64, 16  # below, one program serves all lengths


class Opened(NamedTuple):
  """A model in parts: its graph, its parameters on the mesh (None: one device), and the number of tokens it knows."""

  graph: Any
  params: Any
  mesh: Any
  vocab: int


def open_model(model):
  """Opened of a Decoder, or of any module with its `init_cache`, `extend_hidden` and `logits`."""
  graph, params = nnx.split(model)
  mesh = placing.mesh_of(params)
  return Opened(graph, placing.spread(params, mesh), mesh, jax.eval_shape(_one_token, graph, params).shape[-1])


def read_prompts(prompts, lengths, vocab):
  """Prompts as a list of int32 arrays.

  Args:
    prompts: a list of B sequences of ints, or an integer array [B, T].
    lengths: [B] int in 1 .. T with an array, of which row b is then the first lengths[b]; None means T.
    vocab: number of tokens.

  Raises:
    ValueError: a prompt without tokens, a token outside 0 .. vocab - 1, lengths that do not fit.
  """
  if hasattr(prompts, 'ndim'):
    prompts = np.asarray(prompts)
    if prompts.ndim != 2 or not prompts.size or not np.issubdtype(prompts.dtype, np.integer):
      raise ValueError(
        f'prompts are {prompts.dtype} {prompts.shape}, expected integers [B, T], one token or more, or a list of lists'
      )
    (B, T), lengths = prompts.shape, np.asarray([prompts.shape[1]] * len(prompts) if lengths is None else lengths)
    if lengths.shape != (B,) or not np.issubdtype(lengths.dtype, np.integer):
      raise ValueError(f'lengths are {lengths.dtype} {lengths.shape}, expected integers [{B}]')
    if lengths.min() < 1 or lengths.max() > T:
      raise ValueError(f'lengths={lengths.tolist()} must lie in 1 .. {T}, the width of prompts')
    rows = [row[:n] for row, n in zip(prompts, lengths)]
  elif lengths is not None:
    raise ValueError('lengths belong to prompts as an array, expected None with a list')
  else:
    rows = [np.asarray(row) for row in prompts]
  if not rows:
    raise ValueError('prompts=[]: expected one prompt or more')
  for b, row in enumerate(rows):
    if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
      raise ValueError(f'prompts[{b}] is {row.dtype} {row.shape}, expected one token (an integer) or more')
    wrong = row[(row < 0) | (row >= vocab)]
    if wrong.size:
      raise ValueError(f'prompts[{b}] holds token {wrong[0]}, expected 0 .. {vocab - 1}')
  return [row.astype(np.int32) for row in rows]


def whole(name, value, low, high=None):
  """The integer argument `name`, or ValueError unless it lies in low .. high."""
  limits = f'in {low} .. {high}' if high is not None else f'of {low} or more'
  is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not is_whole or value < low or (high is not None and value > high):
    raise ValueError(f'{name}={value!r} must be an integer {limits}')
  return int(value)


def padded_stops(stop_tokens, vocab):
  """Stop tokens as an int32 array of 8, 16, 32 ... entries, -1 behind them: their number compiles nothing."""
  stops = [whole('stop_tokens: token', token, 0, vocab - 1) for token in stop_tokens]
  return np.array(stops + [-1] * (power_of_two(len(stops), 8) - len(stops)), np.int32)


def capacity_for(length):
  """The capacity of a cache for `length` tokens: 64, 128, ... 1024, from there in steps of a quarter (1280, 1536, ...).

  Texts of many lengths so share their programs, and a cache is at most twice as long as needed, a long one 1.25 times.
  """
  power = power_of_two(length, LEAST_CAPACITY)
  step = power if power <= 1024 else power // 8
  return -(-length // step) * step


def chunks(length, size):
  """[(start, width)] of the chunks that `length` tokens are read in: of `size`, the last one less, a power of two."""
  rest = length % size
  last = [(length - rest, min(size, power_of_two(rest, LEAST_CHUNK)))] if rest else []
  return [(start, size) for start in range(0, length - rest, size)] + last


def prefill(opened, prompts, room, size, copies=1):
  """The cache of prompts without their last tokens, which are left to the first step of decoding.

  Args:
    opened: Opened.
    prompts: B int32 arrays.
    room: tokens to come.
    size: tokens per chunk.
    copies: rows per prompt, next to each other.

  Returns:
    (ModelCache of R rows, last tokens [R] int32, their positions [R] int32, -1 in idle rows): R is B * copies and
    rows that make a mesh divide it, which are idle.
  """
  graph, params, mesh, _ = opened
  B = placing.padded(len(prompts), mesh)
  prompts = [*prompts, *[np.zeros(0, np.int32)] * (B - len(prompts))]
  lengths = np.array([len(row) for row in prompts], np.int32)
  held = int(lengths.max()) - 1
  with placing.current(mesh):
    cache = _empty(graph, params, B, capacity_for(held + room))
    for start, width in chunks(held, size):
      index = np.arange(start, start + width, dtype=np.int32)
      positions = np.where(index < lengths[:, None] - 1, index, -1)
      tokens = np.zeros((B, width), np.int32)
      for b, row in enumerate(prompts):
        part = row[start : min(start + width, len(row) - 1)]
        tokens[b, : len(part)] = part
      cache = _read(graph, params, tokens, positions, cache)
    cache = _fork(cache, copies) if copies > 1 else cache
  last = np.array([row[-1] if len(row) else 0 for row in prompts], np.int32)
  return cache, np.repeat(last, copies), np.repeat(lengths - 1, copies)


def power_of_two(n, least):
  """The least power of two of `least` (one too) or more that n does not exceed."""
  return max(least, 1 << (n - 1).bit_length()) if n else least


@functools.partial(jax.jit, static_argnames='graph')
def _one_token(graph, params):
  model = nnx.merge(graph, params)
  hidden, _ = model.extend_hidden(jnp.zeros((1, 1), jnp.int32), None, model.init_cache(1, 1))
  return model.logits(hidden)


@functools.partial(jax.jit, static_argnames=('graph', 'batch', 'capacity'))
def _empty(graph, params, batch, capacity):
  return placing.by_heads(nnx.merge(graph, params).init_cache(batch, capacity))


@functools.partial(jax.jit, static_argnames='graph', donate_argnames='cache')
def _read(graph, params, tokens, positions, cache):
  tokens, positions = placing.by_rows((tokens, positions))
  return placing.by_heads(nnx.merge(graph, params).extend_hidden(tokens, positions, cache)[1])


@functools.partial(jax.jit, static_argnames='copies')
def _fork(cache, copies):
  return placing.by_heads(cache.fork(copies))
