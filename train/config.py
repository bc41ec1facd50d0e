"""What a training run is, as plain dataclasses that a command line can set field by field.

In every field 0 and '' mean off, or the default that the field's description names. `load` checks a config once, at the
start of a run; nothing changes it afterwards.
"""

import copy
import dataclasses
import math
import typing

from models.config import DecoderConfig, at_least, one_of

SEPARATOR = 256  # token id of the document separator; ids below are bytes
TOKENS = 257  # ids the byte tokenizer uses
SCHEDULES = ('constant', 'cosine', 'wsd')
MESH_AXES = ('data', 'fsdp', 'context', 'tensor')


class UserError(ValueError):
  """A setting, file or folder that the person who started the run must change. Shown as one line, no traceback."""


@dataclasses.dataclass
class DataConfig:
  """Which text, and how it is cut into batches.

  Attributes:
    source: 'python_stdlib' (the .py files of the running Python's library), or paths, folders and globs of text files,
      separated by commas.
    held_out: paths of text files to evaluate on; '' holds out a part of source, split by top-level folder or file.
    held_out_percent: share of the bytes of source that is held out, when held_out is ''.
    split_seed: another seed holds out other packages.
    bad_files: 'error' stops at an unreadable, empty, binary or badly encoded file and names it; 'skip' leaves such
      files out and counts them.
    seq_len: tokens a row; a token is a byte or the separator between files.
    batch: rows a step, over all devices.
  """

  source: str = 'python_stdlib'
  held_out: str = ''
  held_out_percent: float = 3.0
  split_seed: int = 0
  bad_files: str = 'error'
  seq_len: int = 256
  batch: int = 16


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW and its learning rate.

  Attributes:
    learning_rate: the highest one.
    schedule: 'constant'; 'cosine' (falls over the whole run); 'wsd' (warmup, stable, then falls in a straight line).
    warmup_steps: steps in which the rate rises from 0; 0 means none.
    decay_fraction: share of the run's steps in which 'wsd' falls.
    final_fraction: last learning rate as a share of the highest.
    b1: decay of the mean of gradients.
    b2: decay of the mean of squared gradients.
    eps: added to the root of the latter.
    weight_decay: on matrices; scales and biases have none.
    clip_norm: gradients with a larger global norm are scaled down to it; 0 means never.
  """

  learning_rate: float = 1e-3
  schedule: str = 'wsd'
  warmup_steps: int = 100
  decay_fraction: float = 0.2
  final_fraction: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0


@dataclasses.dataclass
class TrainConfig:
  """Length of the run, and how a step is computed.

  Attributes:
    steps: optimizer steps of the whole run.
    accumulate: parts a batch is computed in, one after the other, to save memory; the result is the same.
    loss_chunk: positions whose logits are held at a time; 0 means all of a row.
    profile_steps: steps to record a profile of, from the 10th after the start, in WORKDIR/profile; 0 means none.
    peak_flops: FLOP/s of one device (of the whole machine on CPU), for model FLOPs use; 0 means from a table, or
      measured on CPU.
  """

  steps: int = 1000
  accumulate: int = 1
  loss_chunk: int = 0
  profile_steps: int = 0
  peak_flops: float = 0.0


@dataclasses.dataclass
class MeshConfig:
  """How many parts each axis of the device mesh has. The product may be less than the devices there are.

  Attributes:
    data: copies of the model, each with its own rows; -1 means what the other axes leave.
    fsdp: parts that parameters and rows are both cut into.
    context: parts a row is cut into; attention then goes around a ring of devices (attn/distributed/).
    tensor: parts that heads and the inside of MLPs are cut into.
  """

  data: int = -1
  fsdp: int = 1
  context: int = 1
  tensor: int = 1


@dataclasses.dataclass
class EvalConfig:
  """Evaluation on held-out text. The end of a run always evaluates on all of it.

  Attributes:
    every: steps between evaluations; 0 means only at the end.
    bytes: held-out bytes, about, that the evaluations on the way read, evenly spread; 0 means all.
    batch: rows at a time; 0 means data.batch.
    stride: new tokens a row; each is predicted from at least seq_len - stride before it in the text; 0 means seq_len.
  """

  every: int = 0
  bytes: int = 65536
  batch: int = 0
  stride: int = 0


@dataclasses.dataclass
class CheckpointConfig:
  """When to save. A run that is stopped by Ctrl-C or SIGTERM, or that ends, saves in any case.

  Attributes:
    every: steps between checkpoints; 0 means none by steps.
    seconds: seconds between checkpoints; 0 means none by time.
    keep: checkpoints kept, the newest ones.
  """

  every: int = 0
  seconds: float = 120.0
  keep: int = 2


@dataclasses.dataclass
class LogConfig:
  """What is written on the way.

  Attributes:
    every: steps a line of metrics.jsonl sums up.
    tensorboard: also write WORKDIR/tb.
    plain_seconds: seconds, at least, between lines where there is no terminal to draw a progress bar on.
  """

  every: int = 10
  tensorboard: bool = True
  plain_seconds: float = 10.0


@dataclasses.dataclass
class Config:
  """A training run.

  Attributes:
    seed: of initial parameters and the order of rows.
    model: see models/config.py; model.vocab must hold the 257 ids of the tokenizer.
    data: see DataConfig.
    optimizer: see OptimizerConfig.
    train: see TrainConfig.
    mesh: see MeshConfig.
    eval: see EvalConfig.
    checkpoint: see CheckpointConfig.
    log: see LogConfig.
  """

  seed: int = 0
  model: DecoderConfig = dataclasses.field(default_factory=lambda: DecoderConfig(vocab=TOKENS))
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)


# A run may go on after a change of these: they do not say what is computed (mesh: up to rounding), or, as the number of
# steps, are meant to be changed.
CHANGEABLE = ('train.steps', 'train.profile_steps', 'train.peak_flops', 'mesh.', 'eval.', 'checkpoint.', 'log.')


def load(config):
  """A checked copy of a config, which later changes of `config` do not reach.

  Raises:
    UserError: names the field, its value and what was expected.
  """
  config = copy.deepcopy(config)
  if not isinstance(config, Config):
    raise UserError(f'config is a {type(config).__name__}, expected train.config.Config')
  check_types(config)
  try:
    _check_numbers(config)
    config.model.validate('model')
  except ValueError as error:
    raise UserError(str(error)) from error
  _check_fit(config)
  return config


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
      if not isinstance(value, list) or not all(isinstance(item, item_kind) for item in value):
        raise UserError(f'{path}={value!r}: expected a list of {item_kind.__name__}')
      for i, item in enumerate(value):
        check_types(item, f'{path}[{i}].')
    else:
      kinds = (int, float) if kind is float else (kind,)
      if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f'{path}={value!r}: expected {kind.__name__}, got {type(value).__name__}')
      if kind is float and not math.isfinite(value):
        raise UserError(f'{path}={value!r}: expected a finite number')


def _check_numbers(config):
  data, optimizer, mesh = config.data, config.optimizer, config.mesh
  at_least(data, 'data', {'seq_len': 1, 'batch': 1})
  at_least(optimizer, 'optimizer', {'warmup_steps': 0})
  at_least(config.train, 'train', {'steps': 1, 'accumulate': 1, 'loss_chunk': 0, 'profile_steps': 0})
  at_least(mesh, 'mesh', {'fsdp': 1, 'context': 1, 'tensor': 1})
  at_least(config.eval, 'eval', {'every': 0, 'bytes': 0, 'batch': 0, 'stride': 0})
  at_least(config.checkpoint, 'checkpoint', {'every': 0, 'keep': 1})
  at_least(config.log, 'log', {'every': 1})
  one_of(data, 'data', {'bad_files': ('error', 'skip')})
  one_of(optimizer, 'optimizer', {'schedule': SCHEDULES})
  if mesh.data != -1 and mesh.data < 1:
    raise UserError(f'mesh.data={mesh.data}: expected -1 (what is left) or at least 1')
  within = [
    ('config.seed', config.seed, 0, 2**32 - 1),
    ('data.held_out_percent', data.held_out_percent, 0.1, 50),
    ('optimizer.learning_rate', optimizer.learning_rate, 0, math.inf),
    ('optimizer.decay_fraction', optimizer.decay_fraction, 0, 1),
    ('optimizer.final_fraction', optimizer.final_fraction, 0, 1),
    ('optimizer.b1', optimizer.b1, 0, 1 - 1e-9),
    ('optimizer.b2', optimizer.b2, 0, 1 - 1e-9),
    ('optimizer.eps', optimizer.eps, 0, math.inf),
    ('optimizer.weight_decay', optimizer.weight_decay, 0, math.inf),
    ('optimizer.clip_norm', optimizer.clip_norm, 0, math.inf),
    ('train.peak_flops', config.train.peak_flops, 0, math.inf),
    ('checkpoint.seconds', config.checkpoint.seconds, 0, math.inf),
    ('log.plain_seconds', config.log.plain_seconds, 0, math.inf),
  ]
  for path, value, low, high in within:
    if not low <= value <= high:
      raise UserError(f'{path}={value}: expected a number from {low} to {high:g}')


def _check_fit(config):
  """Settings of different sections against each other."""
  model, data = config.model, config.data
  if model.vocab < TOKENS:
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


def to_dict(config):
  """Nested dictionaries of plain values, as config.json holds them."""
  return dataclasses.asdict(config)


def from_dict(kind, values):
  """The dataclass `kind` with the nested `values` that `to_dict` gave.

  Raises:
    UserError: a field that `kind` does not have.
  """
  hints = typing.get_type_hints(kind)
  made = {}
  for name, value in values.items():
    if name not in hints:
      raise UserError(f'{kind.__name__} has no field {name!r}: the run was written by another version')
    if dataclasses.is_dataclass(hints[name]):
      value = from_dict(hints[name], value)
    elif typing.get_origin(hints[name]) is list:
      value = [from_dict(typing.get_args(hints[name])[0], item) for item in value]
    made[name] = value
  return kind(**made)


def flat(values, prefix=''):
  """{'model.layers[0].window': 64, ...} of nested dictionaries and lists."""
  items = values.items() if isinstance(values, dict) else ((f'[{i}]', value) for i, value in enumerate(values))
  out: dict = {}
  for key, value in items:
    path = prefix + key if not prefix or key.startswith('[') else f'{prefix}.{key}'
    out.update(flat(value, path) if isinstance(value, dict | list) else {path: value})
  return out


def differences(old, new):
  """Lines 'field: old -> new' for the settings of two `to_dict` results that make them different runs."""
  old, new = flat(old), flat(new)
  return [
    f'{path}: {old.get(path, "(none)")!r} -> {new.get(path, "(none)")!r}'
    for path in dict.fromkeys([*old, *new])
    if old.get(path) != new.get(path) and not path.startswith(CHANGEABLE)
  ]
