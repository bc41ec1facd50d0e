"""AdamW and Muon with parameter groups, a learning rate schedule, global-norm clipping, and decay on matrices only."""

import re
from typing import NamedTuple

import optax
from optax import contrib

from models import state as model_state
from train import masters
from train.config import UserError

# Regular expressions of whole paths. Scanned layers stack scales into matrices, so the number of axes cannot tell.
MATRICES = r'(.*\.)?(kernel|table|lora_[ab])'  # what decays, and what Muon can be asked for
ADAPTERS = r'(.*\.)?lora_[ab]'
# What Muon takes by itself: maps from hidden states to hidden states. Embedding and head are maps from and to tokens,
# each of which has its own row or column, and routers are maps to experts. A factor of an adapter is not the map it is
# added to: that all singular values of its step are equal says nothing about those of the step of the product.
HIDDEN = r'blocks\.(?!.*\.router\.).*\.kernel'


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
    config: OptimizerConfig. Its `trainable` is a regular expression of whole paths of the unscanned model; '' means
      all, or with adapters only these.
    model_config: DecoderConfig.
    paths: of all parameters.

  Returns:
    List, in the order of `paths`.

  Raises:
    UserError: the expression is none, matches no path, tells layers apart that are stacked, or leaves all adapters out.
  """
  paths = list(paths)
  adapters = [path for path in paths if re.fullmatch(ADAPTERS, path)] if model_config.adapter_rank else []
  if not config.trainable:
    return adapters or paths
  name = 'optimizer.trainable'
  found = _matching(name, config.trainable, paths, model_config)
  if not found:
    raise UserError(
      f'{name}={config.trainable!r} matches no parameter: expected a regular expression that whole paths match, such '
      f'as {_unscanned(paths[0], model_config)[0]}'
    )
  if adapters and not {*found} & {*adapters}:
    raise UserError(
      f'{name}={config.trainable!r} matches no adapter, such as {_unscanned(adapters[0], model_config)[0]}: expected '
      f'some of them to be trained with model.adapter_rank={model_config.adapter_rank}, or model.adapter_rank=0'
    )
  return found


def plans(config, params, model_config=None):
  """How each parameter is optimized.

  The first group that matches a path counts. Where it names no method, and where no group matches, optimizer.method
  does; 'muon' then means Muon for the kernels inside layers and AdamW for embeddings, head, scales, biases, sinks,
  routers and adapters. A group that says 'muon' itself gets Muon for all it matches. Matrices decay: kernels, tables
  and adapters.

  Args:
    config: OptimizerConfig.
    params: {path: array or ShapeDtypeStruct} of the trainable parameters.
    model_config: DecoderConfig; expressions are matched with the paths of its unscanned form. None means that `params`
      are of an unscanned model.

  Returns:
    {path: Plan}, in the order of `params`.

  Raises:
    UserError: a group whose expression is none, matches no parameter that an earlier group leaves, or tells layers
      apart that are stacked; 'muon' for a parameter that is no matrix; a factor on the decay of what never decays.
  """
  left, of = list(params), {}
  for i, group in enumerate(config.groups):
    name = f'optimizer.groups[{i}]'
    found = _matching(f'{name}.match', group.match, left, model_config)
    if not found:
      is_late = bool(_matching(f'{name}.match', group.match, params, model_config))
      raise UserError(
        f'{name}.match={group.match!r} matches no trainable parameter{" that an earlier group leaves" * is_late}: '
        'expected a regular expression that whole paths match, such as '
        f'{_unscanned(next(iter(left or params)), model_config)[0]}'
      )
    if group.decay != 1 and not any(re.fullmatch(MATRICES, path) for path in found):
      raise UserError(
        f'{name}.decay={group.decay} has no effect on {_unscanned(found[0], model_config)[0]}: only matrices decay; '
        f'expected a match={group.match!r} of some matrices, or decay=1'
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
  return Plan(asked or usual, rate, decay if re.fullmatch(MATRICES, path) else 0.0)


def _matching(name, expression, paths, model_config):
  """The paths that an expression matches, each as a whole and as it is in the unscanned model.

  Raises:
    UserError: it is none, or matches some layers of a stack and not others; names the field.
  """
  try:
    pattern = re.compile(expression)
  except re.error as error:
    raise UserError(f'{name}={expression!r}: expected a regular expression ({error})') from error
  found = []
  for path in paths:
    layers = _unscanned(path, model_config)
    matched = [layer for layer in layers if pattern.fullmatch(layer)]
    if matched and len(matched) < len(layers):
      other = next(layer for layer in layers if layer not in matched)
      raise UserError(
        f'{name}={expression!r} matches {matched[0]} and not {other}: expected both or neither with model.scan=True, '
        'which stacks them, or model.scan=False'
      )
    if matched:
      found.append(path)
  return found


def _unscanned(path, model_config):
  """The paths of a parameter in the unscanned model: one, or those of all layers that are stacked."""
  return [layer for _, layer in model_state.apart(path, model_config)] if model_config else [path]


def make(config, steps, params, model_config=None):
  """The optax transformation of an OptimizerConfig.

      g <- g min(1, clip_norm / |g|)                                  |g| over all trainable parameters
      p <- p - lr(n) rate (u(g) + weight_decay decay p)               decay 0 but for matrices

  With method 'adamw', u is m' / (sqrt(v') + eps), the means of g and g^2 without their bias. With 'muon' it is
  0.2 sqrt(max(in, out)) NS(m'), with m' Nesterov's momentum without its bias (optax corrects it as that of Adam) and NS
  five Newton-Schulz iterations, which bring all singular values near 1. Each matrix of a stack (repeats of scanned
  layers, experts) is taken by itself. The factor gives the update the root mean square that AdamW's usually has, so
  that learning rate and weight decay carry over.

  A parameter narrower than float32 is the rounding of a float32 copy in the state: see train.masters.

  Args:
    config: OptimizerConfig.
    steps: of the whole run.
    params: {path: array or ShapeDtypeStruct} of the trainable parameters.
    model_config: see `plans`.

  Returns:
    optax.GradientTransformation for dictionaries with these paths. All of its state that is as large as parameters is
    in dictionaries keyed by their paths.

  Raises:
    UserError: see `plans`.

  Source: AdamW arXiv:1711.05101; Muon https://kellerjordan.github.io/posts/muon/, its scale arXiv:2502.16982.
  """
  plan = plans(config, params, model_config)
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
