"""What a config must be before anything is computed: types, ranges, and settings that fit each other."""

import dataclasses
import math
import re
import typing

from models.config import at_least, one_of
from train.config import TOKENS, Config, UserError

SCHEDULES = ('constant', 'cosine', 'wsd')
METHODS = ('adamw', 'muon')
FORMATS = ('', 'text', 'jsonl', 'parquet', 'tokens')
PACKINGS = ('stream', 'documents', 'single')
DIVERGENCES = ('forward', 'reverse', 'jensen')


def check(config):
  """UserError that names the field, its value and what was expected."""
  if not isinstance(config, Config):
    raise UserError(f'config is a {type(config).__name__}, expected train.config.Config')
  check_types(config)
  try:
    _check_numbers(config)
    config.model.validate('model')
  except ValueError as error:
    raise UserError(str(error)) from error
  _check_fit(config)


def check_types(record, name=''):
  """UserError for a field, at any depth, that is not declared, or whose value is of another type or not finite."""
  hints = typing.get_type_hints(type(record))
  if unknown := [key for key in vars(record) if key not in hints]:  # set by a config file: Python lets it pass
    raise UserError(f'{name}{unknown[0]}: {type(record).__name__} has no such field; it has {", ".join(hints)}')
  for field in dataclasses.fields(record):
    value, kind, path = getattr(record, field.name), hints[field.name], f'{name}{field.name}'
    if dataclasses.is_dataclass(kind):
      if type(value) is not kind:
        raise UserError(f'{path}={value!r}: expected a {hints[field.name].__name__}')
      check_types(value, f'{path}.')
    elif typing.get_origin(kind) is list:
      item_kind = typing.get_args(kind)[0]
      if not isinstance(value, list) or not all(_is_a(item, item_kind) for item in value):
        raise UserError(f'{path}={value!r}: expected a list of {item_kind.__name__}')
      for i, item in enumerate(value):
        if dataclasses.is_dataclass(item):
          check_types(item, f'{path}[{i}].')
    else:
      if not _is_a(value, kind):
        raise UserError(f'{path}={value!r}: expected {kind.__name__}, got {type(value).__name__}')
      if kind is float and not math.isfinite(value):
        raise UserError(f'{path}={value!r}: expected a finite number')


def _is_a(value, kind):
  """Whether a value may stand in a field of this type: an integer may stand for a float, a bool for nothing else."""
  return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _check_numbers(config):
  data, optimizer, mesh, distill = config.data, config.optimizer, config.mesh, config.distill
  at_least(data, 'data', {'seq_len': 1, 'batch': 1})
  at_least(optimizer, 'optimizer', {'warmup_steps': 0})
  least = {'steps': 1, 'accumulate': 1, 'loss_chunk': 0, 'profile_steps': 0, 'skip_nonfinite': 0}
  at_least(config.train, 'train', least)
  at_least(mesh, 'mesh', {'fsdp': 1, 'context': 1, 'tensor': 1})
  at_least(config.eval, 'eval', {'every': 0, 'bytes': 0, 'batch': 0, 'stride': 0})
  at_least(config.checkpoint, 'checkpoint', {'every': 0, 'keep': 1})
  at_least(config.log, 'log', {'every': 1})
  one_of(data, 'data', {'bad_files': ('error', 'skip'), 'format': FORMATS, 'packing': PACKINGS})
  one_of(optimizer, 'optimizer', {'schedule': SCHEDULES, 'method': METHODS})
  one_of(distill, 'distill', {'divergence': DIVERGENCES})
  if mesh.data != -1 and mesh.data < 1:
    raise UserError(f'mesh.data={mesh.data}: expected -1 (what is left) or at least 1')
  infinity, share = math.inf, math.nextafter(1, 0)
  within = [
    ('config.seed', config.seed, 0, 2**32 - 1),
    ('data.held_out_percent', data.held_out_percent, 0.1, 50),
    ('optimizer.learning_rate', optimizer.learning_rate, 0, infinity),
    ('optimizer.decay_fraction', optimizer.decay_fraction, 0, 1),
    ('optimizer.final_fraction', optimizer.final_fraction, 0, 1),
    ('optimizer.b1', optimizer.b1, 0, share),
    ('optimizer.b2', optimizer.b2, 0, share),
    ('optimizer.momentum', optimizer.momentum, 0, share),
    ('optimizer.eps', optimizer.eps, math.nextafter(0, 1), infinity),
    ('optimizer.weight_decay', optimizer.weight_decay, 0, infinity),
    ('optimizer.clip_norm', optimizer.clip_norm, 0, infinity),
    ('train.peak_flops', config.train.peak_flops, 0, infinity),
    ('train.z_loss', config.train.z_loss, 0, infinity),
    ('train.ema_decay', config.train.ema_decay, 0, share),
    ('distill.temperature', distill.temperature, 1e-3, infinity),
    ('checkpoint.seconds', config.checkpoint.seconds, 0, infinity),
    ('log.plain_seconds', config.log.plain_seconds, 0, infinity),
  ]
  within += [(f'distill.{x}', getattr(distill, x), 0, infinity) for x in ('labels', 'outputs', 'features', 'attention')]
  for i, group in enumerate(optimizer.groups):
    one_of(group, f'optimizer.groups[{i}]', {'method': ('', *METHODS)})
    within += [(f'optimizer.groups[{i}].{x}', getattr(group, x), 0, infinity) for x in ('rate', 'decay')]
  for i, part in enumerate(data.mixture):
    one_of(part, f'data.mixture[{i}]', {'format': FORMATS})
    within.append((f'data.mixture[{i}].weight', part.weight, 0, infinity))
  for path, value, low, high in within:
    if not low <= value <= high:
      above = 'above 0' if 0 < low < 1e-300 else f'from {low}'
      below = ', below 1' if high == share else f' to {high:g}'
      raise UserError(f'{path}={value}: expected a number {above}{below}')


def _check_fit(config):
  """Settings of different sections against each other."""
  model, data = config.model, config.data
  if data.tokenizer == 'bytes' and model.vocab < TOKENS:
    raise UserError(f'model.vocab={model.vocab}: expected at least {TOKENS}, for 256 bytes and the separator')
  for i, spec in enumerate(model.layers):
    for field in ('window', 'chunk'):
      if getattr(spec, field) > data.seq_len:
        raise UserError(
          f'model.layers[{i}].{field}={getattr(spec, field)}: expected at most data.seq_len={data.seq_len}, or 0 (all)'
        )
  if config.train.loss_chunk and data.seq_len % config.train.loss_chunk:
    raise UserError(f'train.loss_chunk={config.train.loss_chunk}: expected a divisor of data.seq_len={data.seq_len}')
  if data.batch % config.train.accumulate:
    raise UserError(f'train.accumulate={config.train.accumulate}: expected a divisor of data.batch={data.batch}')
  if config.eval.stride > data.seq_len:
    raise UserError(f'eval.stride={config.eval.stride}: expected at most data.seq_len={data.seq_len}')
  for i, part in enumerate(data.mixture):
    if not part.source.strip() or not part.weight:
      wrong = f'source={part.source!r}' if not part.source.strip() else f'weight={part.weight}'
      raise UserError(f'data.mixture[{i}].{wrong}: expected paths, and a weight above 0')
  _check_expressions(config.optimizer)
  distill = config.distill
  if distill.teacher and not any((distill.labels, distill.outputs, distill.features, distill.attention)):
    raise UserError(f'distill.teacher={distill.teacher!r}: expected a weight above 0 for some loss')
  for layer in distill.layers:
    if not 0 <= layer < model.depth:
      raise UserError(f'distill.layers={distill.layers}: expected layers of the student, 0 .. {model.depth - 1}')


def _check_expressions(optimizer):
  """UserError for what is no regular expression. Whether one matches anything is seen where the paths are known."""
  found = [('trainable', optimizer.trainable)]
  found += [(f'groups[{i}].match', group.match) for i, group in enumerate(optimizer.groups)]
  for field, expression in found:
    try:
      re.compile(expression)
    except re.error as error:
      raise UserError(f'optimizer.{field}={expression!r}: expected a regular expression ({error})') from error
    if not expression and field != 'trainable':
      raise UserError(f"optimizer.{field}='': expected a regular expression of parameter paths")
