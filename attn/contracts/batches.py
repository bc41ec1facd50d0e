"""Contracts on batches and states: rows, padding, prefill and decode, refused input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from attn.contracts.registry import Broken, contract
from attn.contracts.trial import all_close, close, compiled, trial


@contract(lambda method: method.inputs[next(iter(method.inputs))].axes[0] == 'B')
def rows_alone(method):
  """Each row of a batch gives what it gives beside any other rows."""
  t = trial(method)
  inputs = t.inputs(seed=14)
  together = t.run(inputs)
  for row in range(t.sizes['B']):
    copies = t.along('B', lambda x, axis, row=row: np.repeat(x[row : row + 1], x.shape[0], axis=0), inputs)
    alone = t.run(copies)
    all_close({n: x[row] for n, x in together.items()}, {n: x[row] for n, x in alone.items()}, f'of row {row}')


@contract(lambda method: method.lengths is not None)
def padding(method):
  """A padded row gives what its tokens give alone; padding gives zeros, takes no gradient, and may be NaN."""
  t = trial(method)
  T, n = t.sizes['T'], t.sizes['T'] - 5
  inputs = t.inputs(seed=15)
  with jax.enable_x64(True):
    extra = method.lengths(jnp.asarray([T] * (t.sizes['B'] - 1) + [n], jnp.int32), T)
  alone = t.cut(t.along('B', lambda x, axis: x[-1:], inputs), 0, n)
  want = t.run(alone)
  cotangents = None
  for junk, name in ((None, 'numbers'), (1e6, 'huge numbers'), (np.nan, 'NaN'), (np.inf, 'infinities')):
    padded = inputs if junk is None else _filled(t, inputs, n, junk)
    got = t.run(padded, extra)
    valid = {key: x[-1:, :n] for key, x in got.items()}
    all_close(valid, want, f'of a row of {n} tokens with {name} as padding')
    close(got['out'][-1, n:], 0 * inputs['v'][-1, n:, :1].repeat(t.sizes['H'], 1), f'out at padding of {name}')
    cotangents = cotangents or t.cotangents(got)
    for key, grad in t.gradients(padded, cotangents, extra).items():
      if not np.isfinite(grad).all():
        raise Broken(f'the gradient by {key} is not finite with {name} as padding')
      if t.has('TS', key) and t.cut({key: grad[-1:]}, n, T)[key].any():
        raise Broken(f'padding of {name} has a gradient by {key}')


@contract(lambda method: method.state is not None)
def prefill_then_decode(method):
  """A text in pieces, the state handed over, gives what it gives in one pass."""
  t = trial(method)
  T, B = t.sizes['T'], t.sizes['B']
  inputs = t.inputs(seed=16)
  want = t.run(inputs)['out']
  extend = compiled(functools.partial(method.state.extend, **method.settings))
  for storage, capacity in method.state.capacities.items():
    for pieces in ((5, 5, 1, 1), (1, 5, 1, 5)):
      assert sum(pieces) == T
      with jax.enable_x64(True):
        state = method.state.init(B, capacity or T, t.sizes, np.float64)
        done, outs = 0, []
        for n in pieces:
          positions = np.broadcast_to(np.arange(done, done + n, dtype=np.int32), (B, n))
          out, state = extend(**t.cut(inputs, done, done + n), state=state, positions=positions)
          outs.append(np.asarray(out))
          done += n
      close(np.concatenate(outs, axis=1), want, f'out in pieces of {pieces} with storage {storage!r}')


@contract()
def bad_input(method):
  """Arrays that do not fit are refused by a ValueError that names one of them."""
  t = trial(method)
  inputs, first = t.inputs(seed=17, dtype=np.float32), next(iter(method.inputs))
  shapes = {name: x.axes for name, x in method.inputs.items()}
  for name, axes in shapes.items():
    _refused(t, {**inputs, name: inputs[name][..., 0]}, name, f'{name} with an axis missing')
    for axis, letter in enumerate(axes):
      others = [other for other in shapes if other != name and letter in shapes[other]]
      if name != first and others:
        longer = np.concatenate([inputs[name], inputs[name].take([0], axis)], axis)
        _refused(t, {**inputs, name: longer}, name, f'{name} with {longer.shape[axis]} on axis {letter}')
  if any('K' in axes for axes in shapes.values()) and 'K' not in method.sizes:
    _refused(t, t.inputs(dtype=np.float32, K=3), 'K', f'K=3 key heads for H={t.sizes["H"]} query heads')


def _refused(t, inputs, name, what):
  try:
    jax.eval_shape(t.call, inputs)
  except ValueError as error:
    if not re.search(rf'\b{name}\b', str(error)):
      raise Broken(f'{what} is refused without naming {name}: {error}') from error
  except Exception as error:
    raise Broken(f'{what} raises {type(error).__name__} in place of ValueError: {error}') from error
  else:
    raise Broken(f'{what} is not refused')


def _filled(t, inputs, n, junk):
  """inputs with `junk` in the last row from token n on."""
  out = {}
  for name, x in inputs.items():
    axes = t.method.inputs[name].axes
    if name in t.floating and t.has('TS', name) and axes[0] == 'B':
      x = np.moveaxis(x.copy(), axes.index('T') if 'T' in axes else axes.index('S'), 1)
      x[-1, n:] = junk
      x = np.moveaxis(x, 1, axes.index('T') if 'T' in axes else axes.index('S'))
    out[name] = x
  return out
