"""AdamW and Muon with parameter groups, a learning rate schedule, global-norm clipping, and decay on matrices only."""

import re
from typing import NamedTuple

import optax
from optax import contrib

from train import masters
from train.config import UserError

# Regular expressions of whole paths. Scanned layers stack scales into matrices, so the number of axes cannot tell.
DECAYED = r'(.*\.)?(kernel|table)'
MATRICES = r'(.*\.)?(kernel|table|lora_[ab])'  # what Muon can be asked for
ADAPTERS = r'(.*\.)?lora_[ab]'
# What Muon takes by itself: maps from hidden states to hidden states. Embedding and head are maps from and to tokens,
# each of which has its own row or column. A factor of an adapter is not the map it is added to: that all singular
# values of its step are equal says nothing about those of the step of the product.
HIDDEN = r'blocks\..*\.kernel'


class Plan(NamedTuple):
  """How one parameter is optimized: 'adamw' or 'muon', and the factors on learning rate and weight decay."""

  method: str
  rate: float
  decay: float


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


def trainable(config, model_config, paths):
  """The paths of the parameters that are trained; the rest is frozen.

  Args:
    config: OptimizerConfig. Its `trainable` is a regular expression of whole paths; '' means all, or with adapters only
      these.
    model_config: DecoderConfig.
    paths: of all parameters.

  Returns:
    List, in the order of `paths`.

  Raises:
    UserError: the expression is none, or matches no path.
  """
  paths = list(paths)
  if config.trainable:
    found = _matching('optimizer.trainable', config.trainable, paths)
    if not found:
      raise UserError(
        f'optimizer.trainable={config.trainable!r} matches no parameter: expected a regular expression that whole '
        f'paths match, such as {paths[0]}'
      )
    return found
  return [path for path in paths if re.fullmatch(ADAPTERS, path)] if model_config.adapter_rank else paths


def plans(config, params):
  """How each parameter is optimized.

  The first group that matches a path counts. Where it names no method, and where no group matches, optimizer.method
  does; 'muon' then means Muon for the kernels inside layers and AdamW for embeddings, head, scales, biases, sinks and
  adapters. A group that says 'muon' itself gets Muon for all it matches. Kernels and tables decay.

  Args:
    config: OptimizerConfig.
    params: {path: array or ShapeDtypeStruct} of the trainable parameters.

  Returns:
    {path: Plan}, in the order of `params`.

  Raises:
    UserError: a group whose expression is none, or matches no parameter that an earlier group leaves; 'muon' for a
      parameter that is no matrix.
  """
  left, of = list(params), {}
  for i, group in enumerate(config.groups):
    name = f'optimizer.groups[{i}]'
    found = _matching(f'{name}.match', group.match, left)
    if not found:
      is_late = bool(_matching(name, group.match, params))
      raise UserError(
        f'{name}.match={group.match!r} matches no trainable parameter{" that an earlier group leaves" * is_late}: '
        f'expected a regular expression that whole paths match, such as {next(iter(left or params))}'
      )
    if group.method == 'muon':
      for path in found:
        if not re.fullmatch(MATRICES, path) or len(params[path].shape) < 2:
          raise UserError(
            f"{name}.method='muon': {path} {tuple(params[path].shape)} is no matrix, expected a match={group.match!r} "
            "of kernels alone, or method=''"
          )
    of.update({path: _plan(path, group.method, config.method, group.rate, group.decay) for path in found})
    left = [path for path in left if path not in of]
  of.update({path: _plan(path, '', config.method, 1.0, 1.0) for path in left})
  return {path: of[path] for path in params}


def _plan(path, asked, default, rate, decay):
  usual = 'muon' if default == 'muon' and re.fullmatch(HIDDEN, path) else 'adamw'
  return Plan(asked or usual, rate, decay if re.fullmatch(DECAYED, path) else 0.0)


def _matching(name, expression, paths):
  """The paths that an expression matches as a whole; UserError with the field's name if it is none."""
  try:
    pattern = re.compile(expression)
  except re.error as error:
    raise UserError(f'{name}={expression!r}: expected a regular expression ({error})') from error
  return [path for path in paths if pattern.fullmatch(path)]


def make(config, steps, params):
  """The optax transformation of an OptimizerConfig.

      g <- g min(1, clip_norm / |g|)                                  |g| over all trainable parameters
      p <- p - lr(n) rate (u(g) + weight_decay decay p)               decay 0 but for kernels and tables

  With method 'adamw', u is m' / (sqrt(v') + eps), the means of g and g^2 without their bias. With 'muon' it is
  0.2 sqrt(max(in, out)) NS(m'), with m' Nesterov's momentum and NS five Newton-Schulz iterations, which bring all
  singular values near 1. Each matrix of a stack (repeats of scanned layers, experts) is taken by itself. The factor
  gives the update the root mean square that AdamW's usually has, so that learning rate and weight decay carry over.

  A parameter narrower than float32 is the rounding of a float32 copy in the state: see train.masters.

  Args:
    config: OptimizerConfig.
    steps: of the whole run.
    params: {path: array or ShapeDtypeStruct} of the trainable parameters.

  Returns:
    optax.GradientTransformation for dictionaries with these paths. All of its state that is as large as parameters is
    in dictionaries keyed by their paths.

  Raises:
    UserError: see `plans`.

  Source: AdamW arXiv:1711.05101; Muon https://kellerjordan.github.io/posts/muon/, its scale arXiv:2502.16982.
  """
  plan = plans(config, params)
  methods = {'adamw': lambda _: optax.scale_by_adam(config.b1, config.b2, config.eps), 'muon': _muon(config.momentum)}
  parts = [_by_method(methods, plan), _decayed(config.weight_decay, plan)]
  parts += [optax.scale_by_learning_rate(schedule(config, steps)), _rated(plan)]
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  return masters.keep(optax.chain(*clip, *parts), params)


def _muon(momentum):
  """A function of paths that gives the transformation of their gradients."""
  matrix = contrib.MuonDimensionNumbers(-2, -1)

  def scaled(updates, _):
    return {path: 0.2 * max(x.shape[-2:]) ** 0.5 * x for path, x in updates.items()}

  return lambda paths: optax.chain(
    contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dict.fromkeys(paths, matrix)), optax.stateless(scaled)
  )


def _by_method(methods, plan):
  """Hands each parameter to the transformation of its method. The state is {method: state for its parameters}.

  In place of optax.partition, whose states hold a mark for each parameter of another method: dictionaries here have the
  paths of what they hold and no others.
  """
  paths = {method: [path for path, x in plan.items() if x.method == method] for method in methods}
  txs = {method: methods[method](mine) for method, mine in paths.items() if mine}
  pick = lambda tree, method: {path: tree[path] for path in paths[method]}

  def init(params):
    return {method: tx.init(pick(params, method)) for method, tx in txs.items()}

  def update(updates, state, params):
    done = {name: tx.update(pick(updates, name), state[name], pick(params, name)) for name, tx in txs.items()}
    new = {path: x for mine, _ in done.values() for path, x in mine.items()}
    return new, {name: after for name, (_, after) in done.items()}

  return optax.GradientTransformation(init, update)


def _decayed(weight_decay, plan):
  """Adds weight_decay decay p."""
  factors = {path: weight_decay * x.decay for path, x in plan.items()}

  def add(updates, params):
    return {path: u + factors[path] * params[path] if factors[path] else u for path, u in updates.items()}

  return optax.stateless(add)


def _rated(plan):
  """Multiplies by the rates of the groups."""
  return optax.stateless(
    lambda updates, _: {path: u if plan[path].rate == 1 else plan[path].rate * u for path, u in updates.items()}
  )
