"""How many operations an elementwise function does for each element, counted in its trace."""

import jax
import jax.numpy as jnp
import numpy as np

# Of a tile of 2 x 3 scores; nothing else in a trace has these last two axes by accident.
_TILE = (2, 3)
_EXPS = {'exp', 'exp2', 'expm1', 'log', 'log1p', 'tanh', 'logistic', 'sin', 'cos', 'tan', 'erf'}
_FREE = {'broadcast_in_dim', 'convert_element_type', 'reshape', 'squeeze', 'copy', 'stop_gradient'}


def of_score(score, heads: int) -> tuple[int, int]:
  """Counts what a score of attn.bias does for each logit.

  Operations on a row, a column or a table alone are left out: a tile does them once.

  Args:
    score: f(s, b, h, i, j, *arrays) and its arrays; None does nothing.
    heads: H.

  Returns:
    (vector operations, exponentials and the like).
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
    inner = equation.params.get('jaxpr', equation.params.get('call_jaxpr'))
    if inner is not None:
      more = _count(getattr(inner, 'jaxpr', inner))
      ops, exps = ops + more[0], exps + more[1]
    elif equation.outvars[0].aval.shape[-2:] == _TILE:
      exps += equation.primitive.name in _EXPS
      ops += equation.primitive.name not in _EXPS | _FREE
  return ops, exps
