"""Prompts: their checks, and the cache that holds them, read chunk by chunk by programs that other prompts share."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.generate import placing

LEAST_CAPACITY, LEAST_CHUNK = 64, 16  # below, one program serves all lengths


METHODS = ('init_cache', 'extend_hidden', 'logits')


class BrokenLogits(FloatingPointError):
  """Logits that cannot be used.

  Args:
    prompt: index of the prompt that they follow, also an attribute.
    what: what is wrong with what.
  """

  def __init__(self, prompt, what='the logits were NaN, +inf or all -inf, the parameters are broken'):
    super().__init__(f'prompts[{prompt}]: {what}')
    self.prompt = prompt


class Opened(NamedTuple):
  """A model in parts: its graph, its parameters on the mesh (None: one device), and the number of tokens it knows."""

  graph: Any
  params: Any
  mesh: Any
  vocab: int


def open_model(model, name='model', also=()):
  """Opened of a Decoder, or of any module with its METHODS and those of `also`; ValueError naming what it lacks."""
  methods = (*METHODS, *also)
  missing = [method for method in methods if not callable(getattr(model, method, None))]
  if missing:
    kind, lacks = type(model).__name__, ', '.join(missing)
    raise ValueError(f'{name} is a {kind} without {lacks}: expected a Decoder, or a module with {", ".join(methods)}')
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
    B, T = prompts.shape
    lengths = _array('lengths', [T] * B if lengths is None else lengths)
    if lengths.shape != (B,) or not np.issubdtype(lengths.dtype, np.integer):
      raise ValueError(f'lengths are {lengths.dtype} {lengths.shape}, expected integers [{B}]')
    if lengths.min() < 1 or lengths.max() > T:
      raise ValueError(f'lengths={lengths.tolist()} must lie in 1 .. {T}, the width of prompts')
    rows = [row[:n] for row, n in zip(prompts, lengths)]
  elif lengths is not None:
    raise ValueError('lengths belong to prompts as an array, expected None with a list')
  else:
    rows = [_array(f'prompts[{b}]', row) for b, row in enumerate(listed('prompts', prompts, 'lists of tokens'))]
  if not rows:
    raise ValueError('prompts=[]: expected one prompt or more')
  for b, row in enumerate(rows):
    if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
      raise ValueError(f'prompts[{b}] is {row.dtype} {row.shape}, expected one token (an integer) or more')
    wrong = row[(row < 0) | (row >= vocab)]
    if wrong.size:
      raise ValueError(f'prompts[{b}] holds token {wrong[0]}, expected 0 .. {vocab - 1}')
  return [row.astype(np.int32) for row in rows]


def _array(name, value):
  """The argument as a numpy array, whatever it holds."""
  try:
    return np.asarray(value)
  except (TypeError, ValueError):
    raise ValueError(f'{name} is not even: expected integers, not lists among them, got {value!r:.80}') from None


def listed(name, value, expected):
  """The argument `name` as a list, or ValueError unless it can be gone through."""
  try:
    return list(value)
  except TypeError:
    raise ValueError(f'{name}={value!r}: expected {expected}') from None


def whole(name, value, low, high=None):
  """The integer argument `name`, or ValueError unless it lies in low .. high."""
  limits = f'in {low} .. {high}' if high is not None else f'of {low} or more'
  is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not is_whole or value < low or (high is not None and value > high):
    raise ValueError(f'{name}={value!r} must be an integer {limits}')
  return int(value)


def padded_stops(stop_tokens, vocab):
  """Stop tokens as an int32 array of 8, 16, 32 ... entries, -1 behind them: their number compiles nothing."""
  tokens = listed('stop_tokens', stop_tokens, 'a list of tokens')
  stops = [whole('stop_tokens: token', token, 0, vocab - 1) for token in tokens]
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
    prompts: B int32 arrays; an empty one makes idle rows.
    room: tokens to come.
    size: tokens per chunk.
    copies: rows per prompt, next to each other.

  Returns:
    (ModelCache of R rows, last tokens [R] int32, their positions [R] int32, -1 in idle rows): R is B * copies and
    idle rows behind them that make a mesh divide it. A prompt whose copies lie on several devices is read by each.
  """
  graph, params, mesh, _ = opened
  held_by, rows, of_row = _layout(len(prompts), copies, placing.padded(1, mesh))
  everything = [*prompts, np.zeros(0, np.int32)]  # the last one is no prompt
  prompts = [everything[b] for b in held_by.flat]
  B, lengths = len(prompts), np.array([len(row) for row in prompts], np.int32)
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
    cache = _fork(cache, rows) if copies > 1 else cache
  last = np.array([row[-1] if len(row) else 0 for row in everything], np.int32)
  position = np.array([len(row) - 1 for row in everything], np.int32)
  return cache, last[of_row], position[of_row]


def _layout(prompts, copies, parts):
  """Which prompts the parts of a mesh read, and which of these each of its rows continues.

  Row r, of prompt r // copies, lies in part r // n, n rows each. A part reads the prompts of its rows, so that no cache
  moves between devices.

  Returns:
    (held_by [parts, K]: prompts; rows [parts, n]: places among the K of the part; of_row [R]: prompts), where `prompts`
    stands for none.
  """
  n = -(-prompts * copies // parts)
  of_row = np.minimum(np.arange(parts * n) // copies, prompts).reshape(parts, n)
  first = of_row[:, :1]
  rows = np.where(of_row < prompts, of_row - first, 0)
  return np.minimum(first + np.arange(rows.max() + 1), prompts), rows, of_row.ravel()


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


@jax.jit
def _fork(cache, rows):
  """The cache of the rows [parts, n] of each part."""
  parts, _ = rows.shape

  def take(axis):
    pick = jax.vmap(functools.partial(jnp.take, axis=axis), (axis, 0), axis)

    def of(x):
      picked = pick(x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :]), rows)
      return picked.reshape(*x.shape[:axis], rows.size, *x.shape[axis + 1 :])

    return of

  return placing.by_heads(
    dataclasses.replace(
      cache,
      layers=jax.tree.map(take(1 if cache.is_scanned else 0), cache.layers),
      length=take(0)(cache.length),
      reach=take(0)(cache.reach),
    )
  )
