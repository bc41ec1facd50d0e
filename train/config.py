"""What a training run is, as plain dataclasses that a command line can set field by field.

In every field 0 and '' mean off, or the default that the field's description names. `load` checks a config once, at the
start of a run; nothing changes it afterwards.
"""

import copy
import dataclasses
import re
import typing

from models.config import DecoderConfig

SEPARATOR = 256  # token id of the document separator; ids below are bytes
TOKENS = 257  # ids the byte tokenizer uses
MESH_AXES = ('data', 'fsdp', 'context', 'tensor')


class UserError(ValueError):
  """A setting, file or folder that the person who started the run must change. Shown as one line, no traceback."""


@dataclasses.dataclass
class SourceConfig:
  """One part of a mixture.

  Attributes:
    source: as data.source.
    weight: rows of this part are drawn in proportion to it.
    format: as data.format.
    field: as data.field.
  """

  source: str = ''
  weight: float = 1.0
  format: str = ''
  field: str = 'text'


@dataclasses.dataclass
class DataConfig:
  """Which text, and how it is cut into batches. See docs/data.md.

  Attributes:
    source: 'python_stdlib' (the .py files of the running Python's library), or paths, folders and globs of files,
      separated by commas.
    format: of these files: 'text' (a document a file), 'jsonl' (a document a line), 'parquet' (a document a row),
      'tokens' (.npy arrays of token ids); '' goes by their names.
    field: what holds the document in a line of JSONL or a row of Parquet: a text, or a list of token ids.
    mixture: parts that rows are drawn from by weight; where there are any, source is not read, and format and field
      are those of held_out.
    tokenizer: 'bytes'; a tokenizer.json, or a folder with one; 'none' where the data is token ids already.
    separator: token before each document: its text or its number; '' means 256 for bytes and the end-of-text token
      that the tokenizer's folder names.
    packing: 'stream' cuts rows from all documents one after the other; 'documents' puts whole ones together in a row
      as they fit; 'single' has one a row.
    prepared: folder where runs share prepared tokens; '' keeps them in WORKDIR/data.
    held_out: paths of files to evaluate on; '' holds out a part of source: of text files by top-level folder or file,
      of the rest by document.
    held_out_percent: share of source that is held out, when held_out is ''.
    split_seed: another seed holds out other packages.
    bad_files: 'error' stops at an unreadable, empty, binary or badly encoded file or document and names it; 'skip'
      leaves them out and counts them.
    seq_len: tokens a row.
    batch: rows a step, over all devices.
  """

  source: str = 'python_stdlib'
  format: str = ''
  field: str = 'text'
  mixture: list[SourceConfig] = dataclasses.field(default_factory=list)
  tokenizer: str = 'bytes'
  separator: str = ''
  packing: str = 'stream'
  prepared: str = ''
  held_out: str = ''
  held_out_percent: float = 3.0
  split_seed: int = 0
  bad_files: str = 'error'
  seq_len: int = 256
  batch: int = 16


@dataclasses.dataclass
class GroupConfig:
  """Parameters that are optimized in another way. The first group that matches a parameter counts.

  Attributes:
    match: regular expression that a whole path, such as blocks.0.mixer.q.kernel, must match. The number counts layers,
      also with model.scan.
    method: 'adamw' or 'muon'; '' means optimizer.method.
    rate: factor on the learning rate.
    decay: factor on the weight decay, which only matrices have.
  """

  match: str = ''
  method: str = ''
  rate: float = 1.0
  decay: float = 1.0


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW or Muon, and the learning rate.

  Attributes:
    method: 'adamw'; 'muon' (of the matrices inside layers; AdamW has the rest).
    learning_rate: the highest one.
    schedule: 'constant'; 'cosine' (falls over the whole run); 'wsd' (warmup, stable, then falls in a straight line).
    warmup_steps: steps in which the rate rises from 0; 0 means none.
    decay_fraction: share of the run's steps in which 'wsd' falls.
    final_fraction: last learning rate as a share of the highest.
    b1: decay of the mean of gradients.
    b2: decay of the mean of squared gradients.
    eps: added to the root of the latter; above 0.
    momentum: of Muon.
    weight_decay: on matrices, adapters too; scales and biases have none.
    clip_norm: gradients with a larger global norm are scaled down to it; 0 means never.
    trainable: regular expression that a whole path must match to be trained; the rest is frozen. '' means all, or,
      with adapters, the adapters only.
    groups: of parameters that are optimized in another way.
  """

  method: str = 'adamw'
  learning_rate: float = 1e-3
  schedule: str = 'wsd'
  warmup_steps: int = 100
  decay_fraction: float = 0.2
  final_fraction: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  momentum: float = 0.95
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  trainable: str = ''
  groups: list[GroupConfig] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class TrainConfig:
  """Length of the run, and how a step is computed.

  Attributes:
    steps: optimizer steps of the whole run.
    accumulate: parts a batch is computed in, one after the other, to save memory; the result is the same.
    loss_chunk: positions whose logits are held at a time; 0 means all of a row.
    z_loss: factor on the squared log of the sum of exponentials of the logits, which keeps it near 0; 0 means none.
    ema_decay: of an average of the parameters, which is evaluated and exported in their place; 0 means none.
    skip_nonfinite: steps of the run, at most, whose loss or gradient may be infinite or NaN and which are then left
      out; 0 stops at the first.
    init_from: folder of a run, or of a checkpoint that models.hf reads, whose parameters are the first ones; '' makes
      random ones.
    profile_steps: steps to record a profile of, from the 10th after the start, in WORKDIR/profile; 0 means none.
    peak_flops: FLOP/s of one device (of the whole machine on CPU), for model FLOPs use; 0 means from a table, or
      measured on CPU.
  """

  steps: int = 1000
  accumulate: int = 1
  loss_chunk: int = 0
  z_loss: float = 0.0
  ema_decay: float = 0.0
  skip_nonfinite: int = 0
  init_from: str = ''
  profile_steps: int = 0
  peak_flops: float = 0.0


@dataclasses.dataclass
class DistillConfig:
  """Learning from a teacher beside the text. See train/distill.py for the formulas.

  Attributes:
    teacher: folder of a run, or of a checkpoint that models.hf reads; '' means none, and the rest is not read.
    labels: weight of the cross entropy with the text.
    outputs: weight of the divergence from the teacher's distribution.
    temperature: of both distributions in it.
    divergence: 'forward', 'reverse' or 'jensen'.
    features: weight of the distance between hidden states.
    attention: weight of the distance between the outputs of attention.
    layers: of the student that the last two compare; [] means all.
  """

  teacher: str = ''
  labels: float = 0.5
  outputs: float = 0.5
  temperature: float = 1.0
  divergence: str = 'forward'
  features: float = 0.0
  attention: float = 0.0
  layers: list[int] = dataclasses.field(default_factory=list)


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
    model: see models/config.py; model.vocab must hold the ids of the tokenizer, 257 for bytes.
    data: see DataConfig.
    optimizer: see OptimizerConfig.
    train: see TrainConfig.
    distill: see DistillConfig.
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
  distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)


# A run may go on after a change of these: they do not say what is computed (up to rounding: a run may move to another
# machine), or, as the number of steps, are meant to be changed.
CHANGEABLE = re.compile(
  r'train\.(steps|profile_steps|peak_flops|skip_nonfinite|accumulate|loss_chunk)|data\.prepared'
  r'|model\.(remat|implementation|layers\[\d+\]\.remat)|(mesh|eval|checkpoint|log)\..*'
)
# A run may go on after a change of these where the text and its tokens stay what they were.
PATHS = re.compile(r'data\.(source|tokenizer|held_out|mixture\[\d+\]\.source)')


def load(config):
  """A checked copy of a config, which later changes of `config` do not reach.

  Raises:
    UserError: names the field, its value and what was expected.
  """
  from train import checks  # which reads this module

  config = copy.deepcopy(config)
  checks.check(config)
  return config


def to_dict(config):
  """Nested dictionaries of plain values, as config.json holds them."""
  return dataclasses.asdict(config)


def from_dict(kind, values):
  """The dataclass `kind` with the nested `values` that `to_dict` gave. Single values are not checked.

  Raises:
    UserError: a field that `kind` does not have, or no dictionary or list where one belongs.
  """
  if not isinstance(values, dict):
    raise UserError(f'{kind.__name__}: expected its fields, got {values!r}')
  hints = typing.get_type_hints(kind)
  made = {}
  for name, value in values.items():
    if name not in hints:
      raise UserError(f'{kind.__name__} has no field {name!r}: the run was written by another version')
    if dataclasses.is_dataclass(hints[name]):
      value = from_dict(hints[name], value)
    elif typing.get_origin(hints[name]) is list:
      if not isinstance(value, list):
        raise UserError(f'{kind.__name__}.{name}={value!r}: expected a list')
      item_kind = typing.get_args(hints[name])[0]
      value = [from_dict(item_kind, item) if dataclasses.is_dataclass(item_kind) else item for item in value]
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
  """Lines 'field: old -> new' for the settings of two `to_dict` results that make them different runs.

  A field that `old` does not have yet counts as its default.
  """
  old, new = flat(to_dict(from_dict(Config, old))), flat(new)
  return [
    f'{path}: {old.get(path, "(none)")!r} -> {new.get(path, "(none)")!r}'
    for path in dict.fromkeys([*old, *new])
    if old.get(path) != new.get(path) and not CHANGEABLE.fullmatch(path) and not PATHS.fullmatch(path)
  ]


def moved(old, new):
  """Whether a path of the text is another one in two `to_dict` results."""
  old, new = flat(to_dict(from_dict(Config, old))), flat(new)
  return any(old.get(path) != new.get(path) for path in {*old, *new} if PATHS.fullmatch(path))
