"""AdamW with a learning rate schedule, global-norm clipping, and weight decay on matrices only."""

import re

import optax

# Paths of what decays. A scanned layer stacks its scales into matrices, so the number of axes cannot tell.
DECAYED = r'(.*\.)?(kernel|table)'


def schedule(config, steps):
  """The learning rate as a function of the number of steps done.

      warmup:   lr (n + 1) / warmup_steps                        n < warmup_steps
      constant: lr
      cosine:   from lr to final_fraction lr, half a cosine, over the steps after warmup
      wsd:      lr, then a straight line to final_fraction lr over the last decay_fraction of all steps

  The lowest rate is reached at n = steps, which is never used: the last step still learns.

  Args:
    config: OptimizerConfig.
    steps: of the whole run.
  """
  lr, warmup = config.learning_rate, config.warmup_steps
  after = max(1, steps - warmup)
  if config.schedule == 'cosine':
    main = optax.cosine_decay_schedule(lr, after, alpha=config.final_fraction)
  elif config.schedule == 'wsd':
    fall = min(round(config.decay_fraction * steps), after)
    falling = optax.linear_schedule(lr, config.final_fraction * lr, max(1, fall))
    main = optax.join_schedules([optax.constant_schedule(lr), falling], [after - fall]) if fall else None
    main = main or optax.constant_schedule(lr)
  else:
    main = optax.constant_schedule(lr)
  if not warmup:
    return main
  rising = optax.linear_schedule(lr / warmup, lr + lr / warmup, warmup)
  return optax.join_schedules([rising, main], [warmup])


def make(config, steps):
  """The optax transformation of an OptimizerConfig, for parameters {path: array}."""
  adamw = optax.adamw(
    schedule(config, steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=lambda params: {path: bool(re.fullmatch(DECAYED, path)) for path in params},
  )
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
