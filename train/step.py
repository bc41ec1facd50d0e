"""The arithmetic of one optimizer step and of one evaluation batch: pure functions, jitted by the loop."""

import jax
import jax.numpy as jnp
import optax

from models import state as model_state
from train import loss, state as states


def trainer(graph, tx, schedule, *, accumulate=1, loss_chunk=0):
  """The function of one optimizer step.

  Args:
    graph: of models.state.graph.
    tx: optax transformation.
    schedule: learning rate as a function of steps done, reported only.
    accumulate: parts of the batch that gradients are summed over, one after the other.
    loss_chunk: see train.loss.of_model.

  Returns:
    step(State, batch) -> (State, sums): sums of train.loss.cross_entropy over the batch, `grad_norm` before
    clipping, and `learning_rate`. The gradient is that of nll / tokens over the whole batch, whatever accumulate is.
  """

  def nll(params, batch):
    sums = loss.of_model(model_state.merge(graph, params), batch, loss_chunk)
    return sums['nll'], sums

  def add(total, part):
    return jax.tree.map(jnp.add, total, part), None

  def summed(params, batch):
    grads, sums = jax.grad(nll, has_aux=True)(params, batch)
    return grads, sums

  def step(state, batch):
    if accumulate == 1:
      grads, sums = summed(state.params, batch)
    else:
      # Part a takes rows a, a + accumulate, ...: each device keeps the rows it has.
      parts = {name: x.reshape(-1, accumulate, x.shape[1]).swapaxes(0, 1) for name, x in batch.items()}
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
        jax.eval_shape(summed, state.params, {name: x[0] for name, x in parts.items()}),
      )
      (grads, sums), _ = jax.lax.scan(lambda total, part: add(total, summed(state.params, part)), zeros, parts)
    tokens = jnp.maximum(sums['tokens'], 1)
    grads = jax.tree.map(lambda g, p: (g / tokens).astype(p.dtype), grads, state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    reported = {'grad_norm': optax.tree.norm(grads), 'learning_rate': jnp.asarray(schedule(state.step), jnp.float32)}
    return states.State(state.step + 1, params, opt_state), {**sums, **reported}

  return step


def evaluator(graph, *, loss_chunk=0):
  """evaluate(params, batch) -> sums of train.loss.cross_entropy."""
  return lambda params, batch: loss.of_model(model_state.merge(graph, params), batch, loss_chunk)


def is_finite(params):
  """Whether no parameter is infinite or NaN: a bool scalar."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in params.values()]))
