"""Float32 copies of parameters that are stored in fewer bits, so that no update is lost in their rounding.

bfloat16 has 8 bits for the digits of a number: near 1 it cannot hold a step below 2^-8, and learning rates are smaller.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax


class State(NamedTuple):
  """{path: float32 array} of the parameters narrower than that, and the state of the optimizer that moves them."""

  masters: dict
  inner: Any


def keep(tx, params):
  """A transformation that moves float32 copies as `tx` says, and gives updates that lead to their rounding.

      masters <- masters + tx(float32(gradient), masters)
      update  =  masters - params,    so that optax.apply_updates gives round(masters)

  The difference of a number and its rounding is exact in float32, and so is the sum that undoes it. Updates of narrow
  parameters are float32, and so is all that `tx` keeps of them. The state must be made from the parameters that
  training starts with: with others, the first update would bring back those it was made from.

  Args:
    tx: optax.GradientTransformation for {path: array}.
    params: {path: array or ShapeDtypeStruct}.

  Returns:
    optax.GradientTransformation with the state `State`; `tx` itself if no parameter is narrower than float32.

  Source: arXiv:1710.03740 section 3.1.
  """
  narrow = [path for path, x in params.items() if jnp.finfo(x.dtype).bits < 32]
  if not narrow:
    return tx

  def widened(tree):
    return {path: x.astype(jnp.float32) if path in narrow else x for path, x in tree.items()}

  def init(params):
    wide = widened(params)
    return State({path: wide[path] for path in narrow}, tx.init(wide))

  def update(updates, state, params):
    wide = widened(params)
    updates, inner = tx.update(widened(updates), state.inner, wide | state.masters)
    masters = {path: x + updates[path].astype(jnp.float32) for path, x in state.masters.items()}
    steps = {path: x - wide[path] for path, x in masters.items()}
    return updates | steps, State(masters, inner)

  return optax.GradientTransformation(init, update)


def of(state, params):
  """The parameters that an optimizer moves, none of them rounded.

  Args:
    state: of the transformation that `keep` gave, after a step.
    params: {path: array}, the trained ones after the same step.

  Returns:
    {path: array}: float32 copies where `state` has them, else the parameters themselves.
  """
  return {**params, **state.masters} if isinstance(state, State) else params
