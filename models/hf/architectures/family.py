"""A family of published models: which entry of config.json fills which field of DecoderConfig, both ways."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from models.config import DecoderConfig, LayerSpec
from models.hf.architectures import rope as rotary
from models.hf.architectures.record import Architecture, Reader
from models.hf.architectures.rope import FULL, LOCAL, Rope

RUN = ('dtype', 'param_dtype', 'remat', 'scan', 'implementation')  # how a model is run: no part of a checkpoint

# What families do not have, unless they say otherwise.
ABSENT = {
  'mlp_bias': False,
  'experts': 0,
  'experts_per_token': 0,
  'norms': 'pre',
  'norm_plus_one': False,
  'qk_norm': '',
  'attn_scale': 0.0,
  'attn_soft_cap': 0.0,
  'logit_soft_cap': 0.0,
  'sinks': False,
  'attn_bias': '',
  'embed_scale': 1.0,
  'adapter_rank': 0,
  'adapter_alpha': 0.0,
  'adapter_match': '',
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One entry of config.json and the field that it fills.

  Attributes:
    key: of config.json.
    default: where config.json has no such entry, as the published configuration class has it.
    field: of DecoderConfig; '' fills none: the entry is checked and written as its default.
    kinds: types of its values; None: may be null.
    read: (value, fields so far) -> value of the field; ValueError says what was expected.
    write: (value of the field, normal DecoderConfig) -> value; the same.
  """

  key: str
  default: Any
  field: str
  kinds: tuple
  read: Callable = lambda value, fields: value
  write: Callable = lambda value, config: value


def whole(key, field, default):
  return Entry(key, default, field, (int,))


def flag(key, field, default):
  return Entry(key, default, field, (bool,))


def number(key, field, default):
  return Entry(key, default, field, (float,), lambda value, fields: float(value))


def choice(key, field, default, values):
  """An entry with few values: {value of the entry: value of the field}; the first that fits is written."""

  def read(value, fields):
    if value not in values:
      raise ValueError(f'expected {" or ".join(map(repr, values))}')
    return values[value]

  def write(value, config):
    if value not in values.values():
      raise ValueError(f'expected {" or ".join(map(repr, values.values()))}')
    return next(key for key, x in values.items() if x == value)

  return Entry(key, default, field, tuple({type(x) if x is not None else None for x in values}), read, write)


def only(key, *values):
  """An entry that fills no field and must have one of the values, of which the first is that of the class."""
  entry = choice(key, '', values[0], dict.fromkeys(values))
  kinds = tuple({*entry.kinds, float} if int in entry.kinds else entry.kinds)
  return dataclasses.replace(entry, kinds=kinds)


def cap(key, field, default):
  """A bound on logits: null is 0, none."""
  read = lambda value, fields: float(value or 0)
  return Entry(key, default, field, (float, None), read, lambda value, config: value or None)


def head_dim(default=None, rule=''):
  """The width of a head.

  Args:
    default: of the class; None means hidden_size / num_attention_heads, and config.json may say so by null.
    rule: what the class demands of it: '', 'divides' (heads divide the width all the same), 'equals' (width / heads).
  """
  read = lambda value, fields: value or fields['width'] // max(fields['heads'], 1)

  def write(value, config):
    if rule == 'divides' and config.width % config.heads:
      raise ValueError(f'expected width={config.width} to be a multiple of heads={config.heads}')
    if rule == 'equals' and value * config.heads != config.width:
      raise ValueError(f'expected width={config.width} / heads={config.heads}')
    return value

  return Entry('head_dim', default, 'head_dim', (int, None) if default is None else (int,), read, write)


def sizes(vocab, width, mlp_width, depth, heads, kv_heads, head, norm_eps, *, tied=False):
  """The entries that all families have, with the values of a configuration class; `head` is an Entry."""
  return (
    whole('vocab_size', 'vocab', vocab),
    whole('hidden_size', 'width', width),
    whole('intermediate_size', 'mlp_width', mlp_width),
    whole('num_hidden_layers', 'depth', depth),
    whole('num_attention_heads', 'heads', heads),
    Entry('num_key_value_heads', kv_heads, 'kv_heads', (int, None), lambda value, fields: value or fields['heads']),
    head,
    number('rms_norm_eps', 'norm_eps', norm_eps),
    flag('tie_word_embeddings', 'tied_embeddings', tied),
  )


class NoWindows:
  """A family whose layers all see the whole text."""

  keys: tuple = ()

  def read(self, reader: Reader, depth: int) -> list[int]:
    """The window of every layer, 0 for all tokens."""
    return [0] * depth

  def write(self, windows: list[int], problems: list[str]) -> dict[str, Any]:
    """Entries of config.json; what cannot be written is added to `problems`."""
    if any(windows):
      problems.append(f'layers: window={max(windows)}')
    return {}


@dataclasses.dataclass(frozen=True)
class SameWindow:
  """A family with the same window in all layers, which counts the token itself, or none."""

  default: int | None
  keys: tuple = ('sliding_window', 'layer_types')

  def read(self, reader, depth):
    window = window_of(reader, reader.get('sliding_window', self.default, int, None))
    types = reader.get('layer_types', None, list, None)
    if types is not None and types != [LOCAL if window else FULL] * depth:
      reader.problem(f'layer_types={types!r} (expected the same for all {depth} layers, as sliding_window={window})')
    return [window] * depth

  def write(self, windows, problems):
    if len(set(windows)) > 1:
      problems.append(f'layers: window={sorted(set(windows))} (expected the same in all layers)')
    return {'sliding_window': windows[0] or None}


@dataclasses.dataclass(frozen=True)
class TypedWindows:
  """A family whose layers see all, or a window of one size; `layer_types` says which.

  Attributes:
    default: sliding_window where config.json has none.
    period: without layer_types, every layer but each `period`-th has the window.
    period_key: entry that overrides the period.
    is_optional: use_sliding_window switches windows on, and without layer_types those from max_window_layers on have
      them (Qwen).
  """

  default: int
  period: int = 0
  period_key: str = ''
  is_optional: bool = False

  @property
  def keys(self):
    more = ('use_sliding_window', 'max_window_layers') if self.is_optional else ()
    return ('sliding_window', 'layer_types', *more, *([self.period_key] if self.period_key else []))

  def read(self, reader, depth):
    window = reader.get('sliding_window', self.default, int, None)
    if self.is_optional and not reader.get('use_sliding_window', False, bool):
      window = None
    first = reader.get('max_window_layers', 28, int) if self.is_optional else 0
    period = reader.get(self.period_key, self.period, int) if self.period_key else self.period
    types = reader.get('layer_types', None, list, None)
    if types is None and self.is_optional:
      types = [LOCAL if window is not None and i >= first else FULL for i in range(depth)]
    elif types is None:
      types = [LOCAL if period < 1 or (i + 1) % period else FULL for i in range(depth)]
    if len(types) != depth or not all(kind in (FULL, LOCAL) for kind in types):
      reader.problem(f'layer_types={types!r} (expected {depth} of {FULL!r} and {LOCAL!r})')
      return [0] * depth
    if LOCAL not in types:
      return [0] * depth
    if window is None:
      reader.problem(f'sliding_window=None with layer_types {LOCAL!r} (expected a number of tokens)')
    return [window_of(reader, window) if kind == LOCAL else 0 for kind in types]

  def write(self, windows, problems):
    local = sorted(set(windows) - {0})
    if len(local) > 1:
      problems.append(f'layers: window={local} (expected one size, or 0)')
    record: dict[str, Any] = {'layer_types': [LOCAL if window else FULL for window in windows]}
    if self.is_optional:
      first = next((i for i, window in enumerate(windows) if window), len(windows))
      record |= {'use_sliding_window': bool(local), 'max_window_layers': first}
      return {**record, 'sliding_window': local[0] if local else None}
    if self.period_key:
      full = [i + 1 for i, window in enumerate(windows) if not window]
      period = full[0] if full else len(windows) + 1
      if full == [i for i in range(1, len(windows) + 1) if i % period == 0]:  # else layer_types alone can say it
        record[self.period_key] = period
    return {**record, 'sliding_window': local[0] if local else self.default}


def window_of(reader: Reader, value) -> int:
  """sliding_window counts the token itself, as LayerSpec.window does (key > query - window); null is 0."""
  if value is not None and value < 1:
    reader.problem(f'sliding_window={value} (expected 1 or more, or null)')
  return value or 0


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture of transformers.

  Attributes:
    name, model_type: as in config.json.
    entries: in the order in which they are read.
    fixed: {field: value, or a function of the fields read} of the fields that no entry fills; ABSENT for the rest.
    rope: its rotary positions.
    windows: its windows.
    tensors: DecoderConfig -> {path: Source}.
    quantized: values of quant_method in quantization_config whose tensors can be read.
  """

  name: str
  model_type: str
  entries: tuple[Entry, ...]
  fixed: dict[str, Any]
  rope: Rope
  windows: Any
  tensors: Callable
  quantized: tuple[str, ...] = ()

  def architecture(self) -> Architecture:
    return Architecture(
      name=self.name,
      model_type=self.model_type,
      read_config=self.read,
      write_config=self.write,
      sources=self.tensors,
      ignored=lambda tensor, config: bool(re.fullmatch(r'(.*\.)?rotary_emb\.inv_freq', tensor)),
      tied='lm_head.weight',
      settings=self.settings,
    )

  def constants(self, fields: dict) -> dict:
    """The fields that no entry fills."""
    filled = {entry.field for entry in self.entries}
    constants = {field: value for field, value in {**ABSENT, **self.fixed}.items() if field not in filled}
    return {field: value(fields) if callable(value) else value for field, value in constants.items()}

  def read(self, record: dict, length: int | None = None) -> DecoderConfig:
    """See Architecture.read_config."""
    reader = Reader(self.name, record)
    fields: dict[str, Any] = {}
    refuse_strangers(reader, self.quantized)
    for entry in self.entries:
      value = reader.get(entry.key, entry.default, *entry.kinds)
      try:
        filled = entry.read(value, fields)
      except ValueError as e:
        reader.problem(f'{entry.key}={value!r} ({e})')
        filled = entry.read(entry.default, fields)
      if entry.field:
        fields[entry.field] = filled
    turns = self.rope.read(reader, fields['head_dim'], length)
    windows = self.windows.read(reader, fields['depth'])
    reader.check()
    specs = [LayerSpec(window=window, **turns[LOCAL if window else FULL]) for window in windows]
    return normal(DecoderConfig(layers=specs, **fields, **self.constants(fields)).validate('config.json'))

  def write(self, config: DecoderConfig) -> dict[str, Any]:
    """See Architecture.write_config."""
    config, problems = normal(config.validate()), []
    record: dict[str, Any] = {'architectures': [self.name], 'model_type': self.model_type}
    for entry in self.entries:
      value = getattr(config, entry.field) if entry.field else None
      try:
        record[entry.key] = entry.write(value, config) if entry.field else entry.default
      except ValueError as e:
        problems.append(f'{entry.field}={value!r} ({e})')
    for field, expected in self.constants(vars(config)).items():
      if getattr(config, field) != expected:
        problems.append(f'{field}={getattr(config, field)!r} (expected {expected!r})')
    specs = [config.spec(i) for i in range(config.depth)]
    for field, expected in (('mixer', 'attention'), ('chunk', 0)):
      problems += {f'layers: {field}={getattr(spec, field)!r}' for spec in specs if getattr(spec, field) != expected}
    record |= self.rope.write(specs, config.head_dim, problems)
    record |= self.windows.write([spec.window for spec in specs], problems)
    if problems:
      raise ValueError(f'{self.name} cannot express ' + '; '.join(problems))
    return record

  def settings(self, record: dict) -> dict[str, Any]:
    """See Architecture.settings. Both lists of longrope are kept, of which a DecoderConfig has one."""
    held = {entry.key for entry in self.entries if entry.field} | {*self.rope.keys, *self.windows.keys}
    rest = {key: value for key, value in record.items() if key not in {*held, 'quantization_config'}}
    entries = record.get('rope_scaling') or record.get('rope_parameters') or {}
    if isinstance(entries, dict) and 'long_factor' in entries:
      rest['longrope'] = {key: entries[key] for key in ('short_factor', 'long_factor') if key in entries}
    return rest


def refuse_strangers(reader: Reader, quantized: tuple[str, ...]) -> None:
  """Problems for entries of any family that change what is computed, or how tensors are stored."""
  method = (reader.get('quantization_config', None, dict, None) or {}).get('quant_method')
  if reader.record.get('quantization_config') and method not in quantized:
    expected = ' or '.join(map(repr, quantized)) or 'none'
    reader.problem(f'quantization_config with quant_method={method!r} (expected {expected})')
  if reader.record.get('per_layer_config'):
    reader.problem(f'per_layer_config={reader.record["per_layer_config"]!r} (expected none)')
  if reader.record.get('is_causal', True) is not True:
    reader.problem(f'is_causal={reader.record["is_causal"]!r} (expected true)')


def normal(config: DecoderConfig) -> DecoderConfig:
  """The same model in its one spelling: numbers for 0s that stand for them, the shortest pattern of layers.

  `attn_scale` is the exception: D ** -0.5 is spelled 0.
  """
  specs = [rotary.normal(config.spec(i), config.D) for i in range(config.depth)]
  period = next(n for n in range(1, len(specs) + 1) if len(specs) % n == 0 and specs == specs[:n] * (len(specs) // n))
  return dataclasses.replace(
    config,
    kv_heads=config.K,
    head_dim=config.D,
    mlp_width=config.F,
    embed_scale=config.input_scale,
    attn_scale=0.0 if config.attn_scale == config.D**-0.5 else config.attn_scale,
    layers=specs[:period],
  )
