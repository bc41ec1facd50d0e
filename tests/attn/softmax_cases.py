"""Inputs of softmax attention by name, run through attn.softmax and through the oracle."""

import dataclasses
import functools
import re

import jax
import numpy as np

from attn import masks, softmax
from tests.attn import oracle

SHAPE = 'B2T13S11H4K2D5V3'  # no tile below divides T or S, and there are several of each
BLOCKS = softmax.Blocks(q=8, kv=3)
# These tests compile much and run little. Without optimization a program compiles four times as fast. The tests of
# tile sizes, padding, sharding and memory, and the comparison with jax.nn, use the compiler as it comes.
QUICK = {'xla_backend_optimization_level': 0, 'xla_cpu_use_fusion_emitters': False}
STATIC = ('scale', 'soft_cap', 'is_causal', 'dropout_rate', 'precision', 'implementation', 'return_residual', 'blocks')
# Compiled once per shapes and options, over all tests. Without jit every operation would be compiled by itself.
attend = jax.jit(softmax.attend, static_argnames=STATIC, compiler_options=QUICK)
FLOATS = ('q', 'k', 'v', 'bias', 'logit_bias', 'sinks')


@dataclasses.dataclass
class Case:
  """Keyword arguments of softmax.attend: arrays to trace, static ones, and the mask in two forms."""

  arrays: dict
  static: dict
  mask: masks.Mask | None = None
  seen: np.ndarray | None = None  # the mask as the oracle evaluates it, [B, H, T, S]
  d_out: np.ndarray | None = None
  d_lse: np.ndarray | None = None

  def oracle_arguments(self):
    return {**self.arrays, **self.static, **({} if self.mask is None else {'mask': self.seen})}


def sizes(shape):
  """'B2T5S9H4K2D8V3' -> {'B': 2, ...}."""
  return {name: int(n) for name, n in re.findall(r'([A-Z])(\d+)', shape)}


def inputs(shape, dtype=np.float64, seed=0):
  """Random q, k, v of a shape."""
  n, rng = sizes(shape), np.random.default_rng(seed)
  return [rng.normal(size=[n[a] for a in axes]).astype(dtype) for axes in ('BTHD', 'BSKD', 'BSKV')]


def case(shape, *names, seed=0):
  """Random inputs of a shape, with the named options."""
  n, rng = sizes(shape), np.random.default_rng(seed + 1)
  whole = Case(dict(zip('qkv', inputs(shape, seed=seed))), {})
  drawn_masks = []
  for name in names:
    for key, value in OPTIONS[name](rng, **n).items():
      if key == 'mask':
        drawn_masks.append(value)
      else:
        (whole.arrays if isinstance(value, np.ndarray) else whole.static)[key] = value
  for mask, pair in drawn_masks:
    where = {name: whole.arrays.get(name) for name in ('positions', 'kv_positions')}
    seen = oracle.dense(pair, n['T'], n['S'], batch=n['B'], heads=n['H'], **where)
    whole.mask, whole.seen = (mask, seen) if whole.mask is None else (whole.mask & mask, whole.seen & seen)
  whole.d_out = rng.normal(size=(n['B'], n['T'], n['H'], n['V']))
  whole.d_lse = rng.normal(size=(n['B'], n['T'], n['H']))
  return whole


def run(one, implementation, blocks=BLOCKS, compiler_options=QUICK):
  """{'out', 'lse', and the gradient of every floating input} of a case, in float64, compiled once."""
  names = [name for name in FLOATS if name in one.arrays]

  @functools.partial(jax.jit, compiler_options=compiler_options)
  def forward_and_backward(arrays, mask, cotangents):
    def f(floats):
      rest = {name: x for name, x in arrays.items() if name not in names}
      settings = {'implementation': implementation, 'blocks': blocks, 'return_residual': True}
      return softmax.attend(**floats, **rest, **one.static, **settings, mask=mask)

    (out, lse), vjp = jax.vjp(f, {name: arrays[name] for name in names})
    return {'out': out, 'lse': lse, **vjp(cotangents)[0]}

  with jax.enable_x64(True):
    got = forward_and_backward(one.arrays, one.mask, (one.d_out, one.d_lse))
    return jax.tree.map(np.asarray, got)


def expected(one):
  """The same by the oracle."""
  settings = one.oracle_arguments()
  out, lse = oracle.attend(**settings)
  return {'out': out, 'lse': lse, **oracle.gradients(**settings, d_out=one.d_out, d_lse=one.d_lse)}


def check(one, implementation, blocks=BLOCKS, compiler_options=QUICK):
  """Output, log-sum-exp and all gradients of a case are the oracle's, to 10 digits."""
  got, want = run(one, implementation, blocks, compiler_options), expected(one)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=1e-12, err_msg=f'{implementation}: {name}')


def _some(rng, *shape):
  """A bool array in which every other row is sparse, and some rows are empty."""
  return rng.random(shape) < np.where(np.arange(shape[-2]) % 3 == 1, 0.1, 0.7)[:, None]


def _ids(rng, B, n):
  """Runs of equal numbers."""
  return np.sort(rng.integers(0, 3, (B, n)), axis=1)


def _positions(rng, B, n):
  """Increasing positions with gaps, in which one slot of five is empty."""
  return np.where(rng.random((B, n)) < 0.2, -1, np.cumsum(rng.integers(1, 4, (B, n)), axis=1) - 1)


def _array_mask(rng, *shape):
  seen = _some(rng, *shape)
  return masks.array(seen), lambda b, h, i, j, t, s: seen[b, h, t, s] if seen.ndim == 4 else seen[t, s]


def _document_mask(rng, B, T, S):
  ids, kv_ids = _ids(rng, B, T), _ids(rng, B, S)
  return masks.document(ids, kv_ids), lambda b, h, i, j, t, s: ids[b, t] == kv_ids[b, s]


def _offset_mask(rng, B):
  offset = rng.integers(-3, 3, B)
  return masks.causal(offset), lambda b, h, i, j, t, s: j <= i + offset[b]


def _infinite_bias(rng, B, H, T, S):
  bias = np.where(_some(rng, B, H, T, S), rng.normal(size=(B, H, T, S)), -np.inf)
  bias[0, 0, 0] = -np.inf
  return bias


STREAMING = masks.causal() & (masks.window(2) | masks.sink(1))
PER_HEAD = masks.function(lambda b, h, i, j: (i + j + h) % 3 > 0)

# name -> f(rng, **sizes) -> keyword arguments of attend; a mask comes with its predicate.
OPTIONS = {
  'plain': lambda rng, **n: {},
  'causal': lambda rng, **n: {'is_causal': True},
  'scale': lambda rng, **n: {'scale': -0.7},
  'soft cap': lambda rng, **n: {'soft_cap': 0.8},
  'array mask': lambda rng, B, H, T, S, **n: {'mask': _array_mask(rng, B, H, T, S)},
  'shared array mask': lambda rng, T, S, **n: {'mask': _array_mask(rng, T, S)},
  'streaming mask': lambda rng, **n: {'mask': (STREAMING, lambda b, h, i, j, t, s: j <= i and (j >= i - 2 or j < 1))},
  'chunked mask': lambda rng, **n: {'mask': (masks.chunked(3), lambda b, h, i, j, t, s: i // 3 == j // 3)},
  'mask per head': lambda rng, **n: {'mask': (PER_HEAD, lambda b, h, i, j, t, s: (i + j + h) % 3 > 0)},
  'document mask': lambda rng, B, T, S, **n: {'mask': _document_mask(rng, B, T, S)},
  'offset mask': lambda rng, B, **n: {'mask': _offset_mask(rng, B)},
  'nothing allowed': lambda rng, **n: {'mask': (~masks.everything(), lambda *pair: False)},
  'bias': lambda rng, B, H, T, S, **n: {'bias': rng.normal(size=(B, H, T, S))},
  'infinite bias': lambda rng, B, H, T, S, **n: {'bias': _infinite_bias(rng, B, H, T, S)},
  'logit bias': lambda rng, B, S, **n: {'logit_bias': rng.normal(size=(B, S))},
  'logit bias per head': lambda rng, B, S, K, **n: {'logit_bias': rng.normal(size=(B, S, K))},
  'sinks': lambda rng, H, **n: {'sinks': rng.normal(size=H)},
  'segments': lambda rng, B, T, S, **n: {'segment_ids': _ids(rng, B, T), 'kv_segment_ids': _ids(rng, B, S)},
  'query lengths': lambda rng, B, T, **n: {'query_seq_lengths': rng.integers(0, T + 1, B)},
  'key lengths': lambda rng, B, S, **n: {'key_value_seq_lengths': rng.integers(0, S + 1, B)},
  'positions': lambda rng, B, T, S, **n: {
    'positions': _positions(rng, B, T),
    'kv_positions': _positions(rng, B, S),
    'is_causal': True,
  },
  'key positions': lambda rng, B, S, **n: {'kv_positions': _positions(rng, 1, S)[0]},
}
