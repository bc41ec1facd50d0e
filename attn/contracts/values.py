"""Contracts on values and derivatives: the oracle, forms, limit cases, finite differences."""

import jax
import numpy as np

from attn import catalog
from attn.contracts.registry import Broken, contract
from attn.contracts.trial import all_close, close, trial

STEP = 1e-5  # of central differences in float64: errors of 1e-10 by the step, 1e-11 by rounding


@contract()
def oracle(method):
  """Every form equals the float64 oracle, log-sum-exp included."""
  t = trial(method)
  inputs = t.inputs()
  want = method.oracle(**inputs)
  for form in t.forms:
    got = t.run(inputs, form=form)
    if missing := got.keys() - want.keys():
      raise Broken(f'the oracle says nothing of {", ".join(sorted(missing))}')
    all_close(got, {name: want[name] for name in want if name in got}, f'of form {form!r}')


@contract(lambda method: len(method.forms) > 1)
def forms_agree(method):
  """All forms give the same results and the same gradients."""
  t = trial(method)
  inputs = t.inputs(seed=3)
  want = t.run(inputs, form=t.forms[0])
  cotangents = t.cotangents(want)
  want_grads = t.gradients(inputs, cotangents, form=t.forms[0])
  for form in t.forms[1:]:
    what = f'of form {form!r} against {t.forms[0]!r}'
    all_close(t.run(inputs, form=form), want, what)
    all_close(t.gradients(inputs, cotangents, form=form), want_grads, f'gradient {what}', times=10)


@contract(lambda method: bool(method.limits))
def limits(method):
  """In its limit cases the method is exactly the other one."""
  t = trial(method)
  for statement, limit in method.limits.items():
    inputs = t.inputs(seed=4, **limit.sizes)
    inputs = {name: np.asarray(limit.inputs.get(name, lambda x: x)(x)) for name, x in inputs.items()}
    got = t.run_with(inputs, limit.settings)
    if callable(limit.equals):
      with jax.enable_x64(True):
        want = {'out': np.asarray(limit.equals(*inputs.values()))}
    else:
      other = trial(catalog.get(limit.equals))
      want = other.run_with({name: inputs[name] for name in other.method.inputs}, limit.equal_settings)
    all_close(got, {name: want[name] for name in want if name in got}, f'in the limit case {statement!r}')


@contract()
def gradients(method):
  """The gradient by every floating input equals a finite difference."""
  t = trial(method)
  inputs = t.inputs(seed=5)
  results = t.run(inputs)
  cotangents = {name: np.zeros_like(x) for name, x in results.items()} | t.cotangents({'out': results['out']})
  grads = t.gradients(inputs, cotangents)
  value = lambda inputs: np.sum(cotangents['out'] * t.run(inputs)['out'])
  _differences(t, inputs, grads, value, 'the output')


@contract(lambda method: method.has_lse)
def log_sum_exp(method):
  """The log-sum-exp equals the oracle's, and so do its derivatives."""
  t = trial(method)
  inputs = t.inputs(seed=6)
  results = t.run(inputs)
  want = method.oracle(**inputs)['lse']
  close(results['lse'], want, 'lse')
  cotangents = t.cotangents(results, seed=7)
  cotangents = {'out': 0 * cotangents['out'], 'lse': np.where(np.isfinite(want), cotangents['lse'], 0)}
  value = lambda inputs: np.sum(cotangents['lse'] * np.where(np.isfinite(want), method.oracle(**inputs)['lse'], 0))
  _differences(t, inputs, t.gradients(inputs, cotangents), value, 'the log-sum-exp')


@contract(lambda method: method.is_causal)
def causality(method):
  """No output and no gradient depends on a later token, not by a bit."""
  t = trial(method)
  inputs, other = t.inputs(seed=8), t.inputs(seed=9)
  results = t.run(inputs)
  cotangents = t.cotangents(results)
  T = t.sizes['T']
  for now in range(T - 1):
    past = {name: x * (np.arange(T) <= now).reshape((1, T) + (1,) * (x.ndim - 2)) for name, x in cotangents.items()}
    grads = t.gradients(inputs, past)
    for name in t.floating:
      if t.has('TS', name):
        later = t.cut({name: grads[name]}, now + 1, T)[name]
        if later.any():
          raise Broken(f'the gradient of outputs up to token {now} by {name} of later tokens is {_largest(later):.3g}')
    mixed = {name: x if name in t.floating and t.has('TS', name) else inputs[name] for name, x in other.items()}
    head, tail = t.cut(inputs, 0, now + 1), t.cut(mixed, now + 1, T)
    both = {n: _join(t, n, head[n], tail[n]) if t.has('TS', n) else inputs[n] for n in inputs}
    for name, x in t.run(both).items():
      if not np.array_equal(x[:, : now + 1], results[name][:, : now + 1]):
        raise Broken(f'{name} up to token {now} changes with later tokens')


@contract(lambda method: method.reach is not None)
def window_reach(method):
  """A query sees every token within its reach, and none beyond."""
  t = trial(method)
  inputs = t.inputs(seed=10)
  out = t.run(inputs)
  T, S = t.sizes['T'], t.sizes['S']
  back, ahead = (S if x is None else x for x in method.reach)
  for i in range(T):
    cotangents = {name: np.zeros_like(x) for name, x in out.items()}
    cotangents['out'][:, i] = t.cotangents(out)['out'][:, i]
    grad = t.gradients(inputs, cotangents)['v']
    for j in range(S):
      seen, expected = bool(grad[:, j].any()), -back <= j - i <= ahead
      if seen != expected:
        raise Broken(f'query {i} {"sees" if seen else "does not see"} key {j}, its reach is {back} back, {ahead} ahead')


def _differences(t, inputs, grads, value, what):
  """Raises Broken unless grads give the slope of value(inputs) along random directions of every floating input."""
  rng = np.random.default_rng(11)
  for name in t.floating:
    for _ in range(2):
      direction = rng.standard_normal(inputs[name].shape)
      up, down = (value({**inputs, name: inputs[name] + sign * STEP * direction}) for sign in (1, -1))
      want, got = (up - down) / (2 * STEP), np.sum(grads[name] * direction)
      if not abs(got - want) <= 1e-6 * (1 + abs(want)):
        raise Broken(f'the derivative of {what} by {name} is {got:.8g} along a direction, expected {want:.8g}')


def _join(t, name, head, tail):
  axes = t.method.inputs[name].axes
  return np.concatenate([head, tail], axis=axes.index('T') if 'T' in axes else axes.index('S'))


def _largest(x):
  return np.abs(x).max()
