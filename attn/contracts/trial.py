"""A method with small random inputs and its compiled functions, shared by the contracts that look at it."""

import functools

import jax
import numpy as np

from attn.catalog import Method
from attn.contracts.registry import Broken

SIZES = {'B': 2, 'T': 12, 'S': 12, 'H': 4, 'K': 2, 'D': 8, 'V': 6}

# A result may be off by this fraction of its largest value, by dtype and backend. float64 is for formulas; a float32
# product is one bfloat16 pass on a TPU and may be tf32 on a GPU.
TOLERANCE = {
  ('float64', 'cpu'): 1e-10,
  ('float32', 'cpu'): 5e-6,
  ('bfloat16', 'cpu'): 2e-2,
  ('float64', 'gpu'): 1e-10,
  ('float32', 'gpu'): 2e-3,
  ('bfloat16', 'gpu'): 2e-2,
  ('float32', 'tpu'): 1e-2,
  ('bfloat16', 'tpu'): 2e-2,
}


def _ids(rng, shape):
  return np.cumsum(rng.random(shape) < 0.3, axis=-1).astype(np.int32)


def _positions(rng, shape):
  return np.cumsum(rng.integers(1, 4, shape), axis=-1).astype(np.int32)


KINDS = {
  'normal': lambda rng, shape: rng.standard_normal(shape),
  'log_decay': lambda rng, shape: -rng.exponential(0.5, shape),
  'gate': lambda rng, shape: 1 / (1 + np.exp(-rng.standard_normal(shape))),
  'ids': _ids,
  'positions': _positions,
}


class Trial:
  """One method on small inputs. float64 inputs are computed in float64.

  The first form of the method is the one that contracts use where they look at one form. Compilation is most of the
  cost: results and gradients at the usual sizes come from one program, at the compiler's lowest level (the contract
  `jit` looks at the usual level).
  """

  def __init__(self, method: Method):
    self.method = method
    self.function = method.function()
    self.sizes = {**SIZES, **method.sizes}
    self.forms = tuple(method.forms)
    self.floating = tuple(name for name, x in method.inputs.items() if x.kind not in ('ids', 'positions'))
    self._forward = functools.cache(lambda form: compiled(functools.partial(self.call, form=form)))
    self._both = functools.cache(lambda form: compiled(functools.partial(self._results_and_gradients, form=form)))

  def inputs(self, seed=0, dtype=np.float64, **sizes) -> dict:
    """Random inputs by name."""
    rng, sizes, out = np.random.default_rng(seed), {**self.sizes, **sizes}, {}
    for name, x in self.method.inputs.items():
      value = KINDS[x.kind](rng, tuple(sizes[a] for a in x.axes))
      out[name] = value.astype(dtype) if name in self.floating else value
    return out

  def call(self, inputs, extra=None, form=None, settings=None) -> dict:
    """{'out': ...} and 'lse' where the method has one, not compiled."""
    keywords = {**self.method.settings, **self.method.forms[form or self.forms[0]], **(extra or {}), **(settings or {})}
    if self.method.has_lse:
      out, lse = self.function(**inputs, **keywords, return_residual=True)
      return {'out': out, 'lse': lse}
    return {'out': self.function(**inputs, **keywords)}

  def run(self, inputs, extra=None, form=None) -> dict:
    """`call`, compiled; results as numpy."""
    form, extra = form or self.forms[0], extra or {}
    usual = all(x.shape == tuple(self.sizes[a] for a in self.method.inputs[n].axes) for n, x in inputs.items())
    with jax.enable_x64(_is_double(inputs)):
      if not usual or not _is_double(inputs):
        return _numpy(self._forward(form)(inputs, extra))
      shapes = jax.eval_shape(functools.partial(self.call, form=form), inputs, extra)
      zeros = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
      return _numpy(self._both(form)(inputs, zeros, extra)[0])

  def run_with(self, inputs, settings) -> dict:
    """`call` with other settings, compiled; results as numpy."""
    with jax.enable_x64(_is_double(inputs)):
      return _numpy(compiled(functools.partial(self.call, settings=settings))(inputs))

  def both(self, inputs, cotangents, extra=None, form=None) -> tuple[dict, dict]:
    """(results, gradients of sum(cotangents * results) by every floating input), compiled."""
    with jax.enable_x64(_is_double(inputs)):
      return _numpy(self._both(form or self.forms[0])(inputs, cotangents, extra or {}))

  def gradients(self, inputs, cotangents, extra=None, form=None) -> dict:
    """The gradients alone."""
    return self.both(inputs, cotangents, extra, form)[1]

  def _results_and_gradients(self, inputs, cotangents, extra, form):
    fixed = {name: x for name, x in inputs.items() if name not in self.floating}
    function = lambda moving: self.call({**{n: moving.get(n, fixed.get(n)) for n in inputs}}, extra, form)
    results, back = jax.vjp(function, {name: inputs[name] for name in self.floating})
    return results, back(cotangents)[0]

  def cotangents(self, results, seed=1) -> dict:
    """Random cotangents that suit the results."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(x.shape).astype(x.dtype) for name, x in results.items()}

  def along(self, axes: str, change, inputs) -> dict:
    """inputs with `change(array, axis)` applied on each axis that is named in `axes`."""
    out = {}
    for name, x in inputs.items():
      for axis, letter in enumerate(self.method.inputs[name].axes):
        x = change(x, axis) if letter in axes else x
      out[name] = x
    return out

  def cut(self, inputs, start, stop) -> dict:
    """Tokens start .. stop - 1 of every input."""
    return self.along('TS', lambda x, axis: np.take(x, np.arange(start, stop), axis=axis), inputs)

  def has(self, axes: str, name: str) -> bool:
    """Does the input have one of these axes?"""
    return any(x in self.method.inputs[name].axes for x in axes)


def compiled(function):
  """jax.jit for functions that run a few times on small arrays."""
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else {}
  return jax.jit(function, compiler_options=options)


@functools.lru_cache(maxsize=4)
def trial(method: Method) -> Trial:
  """The method's Trial; contracts that run in turn share it."""
  return Trial(method)


def close(got, want, what: str, dtype='float64', times=1.0) -> None:
  """Raises Broken unless two arrays agree within the tolerance of dtype."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  if got.shape != want.shape:
    raise Broken(f'{what} has shape {got.shape}, expected {want.shape}')
  finite = np.isfinite(want)
  if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
    raise Broken(f'{what} is {got[~finite].flat[0]} where {want[~finite].flat[0]} is expected')
  if not np.isfinite(got[finite]).all():
    place = np.argwhere(finite & ~np.isfinite(got))[0]
    raise Broken(f'{what}{index(place)} is {got[tuple(place)]}, expected {want[tuple(place)]:.6g}')
  error, size = np.where(finite, np.abs(np.where(finite, got - np.where(finite, want, 0), 0)), 0), 1e-30
  size = max(size, np.abs(want[finite]).max(initial=0))
  if error.max(initial=0) > times * TOLERANCE[dtype, jax.default_backend()] * size:
    place = tuple(np.unravel_index(error.argmax(), error.shape))
    raise Broken(f'{what}{index(place)} is {got[place]:.6g}, expected {want[place]:.6g}')


def index(place) -> str:
  """[1, 2, 3] as text."""
  return str([int(i) for i in place])


def all_close(got: dict, want: dict, what: str, **options) -> None:
  """`close` for every result of the same name."""
  for name in want:
    close(got[name], want[name], f'{name} {what}', **options)


def _is_double(inputs) -> bool:
  return any(x.dtype == np.float64 for x in inputs.values())


def _numpy(results):
  return jax.tree.map(np.asarray, results)


