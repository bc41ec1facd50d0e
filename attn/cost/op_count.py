"""How many operations an elementwise function does for each element, counted in its trace."""

import jax
import jax.numpy as jnp
import numpy as np

# Of a tile of scores: nothing else in a trace has these last two axes by accident.
_TILE = (13, 17)
_EXPS = {
  'exp', 'exp2', 'expm1', 'log', 'log1p', 'logistic', 'tanh', 'sinh', 'cosh', 'asinh', 'acosh', 'atanh', 'sin', 'cos',
  'tan', 'asin', 'acos', 'atan', 'atan2', 'erf', 'erfc', 'erf_inv', 'sqrt', 'rsqrt', 'cbrt', 'pow', 'lgamma', 'digamma',
}  # fmt: skip
_FREE = {'broadcast_in_dim', 'convert_element_type', 'reshape', 'squeeze', 'copy', 'stop_gradient'}


def of_score(score, heads: int) -> tuple[int, int]:
  """Counts what a score of attn.bias does for each logit.

  Operations on a row, a column or a table alone are left out: a tile does them once. Of branches the most of
  each kind counts, and the body of a loop as often as it runs.

  Args:
    score: f(s, b, h, i, j, *arrays) and its arrays; None does nothing.
    heads: H.

  Returns:
    (vector operations, exponentials and what else goes through the special unit: roots, powers, tanh).

  Raises:
    NotImplementedError: a loop that runs until a condition fails, so that nobody knows how often.
  """
  if score is None:
    return 0, 0

  def tile(s, *arrays):
    b, h = jnp.zeros((1, 1, 1, 1), jnp.int32), jnp.arange(heads)[None, :, None, None]
    i, j = jnp.arange(_TILE[0])[None, None, :, None], jnp.arange(_TILE[1])[None, None, None, :]
    return score.f(s, b, h, i, j, *arrays)

  shapes = [jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in score.arrays]
  return _count(jax.make_jaxpr(tile)(jax.ShapeDtypeStruct((1, heads, *_TILE), jnp.float32), *shapes).jaxpr)


def _count(jaxpr) -> tuple[int, int]:
  ops = exps = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'while':
      raise NotImplementedError('the score has a while loop: how often it runs, and what it costs, is not known')
    if name == 'cond':
      most = [max(x) for x in zip(*(_count(x.jaxpr) for x in params['branches']))]
      ops, exps = ops + most[0], exps + most[1]
      continue
    inner = params.get('jaxpr', params.get('call_jaxpr'))
    if inner is not None:
      more, times = _count(getattr(inner, 'jaxpr', inner)), params['length'] if name == 'scan' else 1
      ops, exps = ops + times * more[0], exps + times * more[1]
    elif equation.outvars[0].aval.shape[-2:] == _TILE:
      exps += name in _EXPS
      ops += name not in _EXPS | _FREE
  return ops, exps
