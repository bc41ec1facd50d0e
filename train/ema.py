"""A moving average of parameters over the steps of a run, which often evaluates better than the last parameters."""

import jax.numpy as jnp


def init(params):
  """The average before the first step: the parameters themselves, in float32.

  Args:
    params: {path: array}, the trainable ones.

  Returns:
    {path: float32 array}, copies: a jitted step may donate parameters and average.
  """
  return {path: jnp.array(x, jnp.float32, copy=True) for path, x in params.items()}


def update(ema, params, step, decay):
  """The average after one more optimizer step.

      ema <- d ema + (1 - d) params,    d = min(decay, (1 + n) / (10 + n))

  The rising d lets the average reach back over a part of the run at any time, so that it soon forgets the initial
  parameters, whatever `decay` is.

  Args:
    ema: {path: float32 array}.
    params: {path: array} after the step, the float32 copies of narrow ones (train.masters.of): an average of roundings
      has their error. Those of other paths are not read.
    step: n, optimizer steps done before this one; int32 scalar.
    decay: the d of a long run, below 1.

  Returns:
    {path: float32 array}.

  Source: d is that of tf.train.ExponentialMovingAverage with num_updates.
  """
  n = jnp.asarray(step, jnp.float32)
  rest = 1 - jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))
  return {path: mean + rest * (params[path].astype(jnp.float32) - mean) for path, mean in ema.items()}
