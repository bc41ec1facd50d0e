"""The arithmetic of one optimizer step and of one evaluation batch: pure functions, jitted by train/program.py."""

import jax
import jax.numpy as jnp
import optax

from models import state as model_state
from train import ema as averages, loss, masters, state as states


def trainer(sums_of, tx, schedule, *, trainable=None, accumulate=1, ema_decay=0.0, may_skip=False):
  """The function of one optimizer step.

  Args:
    sums_of: (params, batch, *extra) -> dictionary of sums over the batch, as train.loss.cross_entropy gives them.
    tx: optax transformation of the trained parameters.
    schedule: learning rate as a function of steps done, reported only.
    trainable: paths of the trained parameters; None means all. Of the others no gradient is computed.
    accumulate: parts of the batch that gradients are summed over, one after the other.
    ema_decay: see train.ema.update; 0 means none.
    may_skip: whether a step changes nothing but the two counters of the State if its loss, its gradient or what the
      optimizer makes of it is not finite.

  Returns:
    step(State, batch, *extra) -> (State, sums): those of `sums_of`, `grad_norm` before clipping, `learning_rate`,
    `is_finite` (of loss and gradient; with may_skip also of the new parameters) and `skipped`, the steps left out so
    far. The gradient is that of objective / tokens over the whole batch, whatever accumulate is.
  """

  def objective(trained, frozen, batch, extra):
    sums = sums_of({**frozen, **trained}, batch, *extra)
    return sums['objective'], sums

  def add(total, part):
    return jax.tree.map(jnp.add, total, part), None

  def step(state, batch, *extra):
    paths = list(state.params) if trainable is None else trainable
    trained = {path: state.params[path] for path in paths}
    frozen = {path: x for path, x in state.params.items() if path not in trained}

    def summed(batch):
      return jax.grad(objective, has_aux=True)(trained, frozen, batch, extra)

    if accumulate == 1:
      grads, sums = summed(batch)
    else:
      # Part a takes rows a, a + accumulate, ...: each device keeps the rows it has.
      parts = {name: x.reshape(-1, accumulate, x.shape[1]).swapaxes(0, 1) for name, x in batch.items()}
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
        jax.eval_shape(summed, {name: x[0] for name, x in parts.items()}),
      )
      (grads, sums), _ = jax.lax.scan(lambda total, part: add(total, summed(part)), zeros, parts)
    tokens = jnp.maximum(sums['tokens'], 1)
    # Not narrower than float32: optimizers keep their own copy of narrow parameters (train/masters.py).
    grads = jax.tree.map(lambda g: (g / tokens).astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
    norm, done = optax.tree.norm(grads), state.step - state.skipped
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    new = optax.apply_updates(trained, updates)
    ema = averages.update(state.ema, masters.of(opt_state, new), done, ema_decay) if ema_decay else state.ema
    is_good, skipped = jnp.isfinite(sums['objective']) & jnp.isfinite(norm), state.skipped
    if may_skip:
      is_good &= is_finite(new)
      kept = lambda new, old: jax.tree.map(lambda x, y: jnp.where(is_good, x, y), new, old)
      new, opt_state, ema = kept(new, trained), kept(opt_state, state.opt_state), kept(ema, state.ema)
      skipped += ~is_good
    rate = jnp.asarray(schedule(done), jnp.float32)
    reported = {'grad_norm': norm, 'learning_rate': rate, 'is_finite': is_good, 'skipped': skipped}
    state = states.State(state.step + 1, {**frozen, **new}, opt_state, ema, skipped)
    return state, {**sums, **reported}

  return step


def evaluator(graph, *, loss_chunk=0):
  """evaluate(params, batch) -> sums of train.loss.cross_entropy."""
  return lambda params, batch: loss.of_model(model_state.merge(graph, params), batch, loss_chunk)


def is_finite(params):
  """Whether no parameter is infinite or NaN: a bool scalar."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in params.values()]))
