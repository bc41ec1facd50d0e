"""Rotary positions in config.json: rope_theta and rope_scaling of old, rope_parameters of newer ones."""

import dataclasses
import math
from typing import Any

from models.config import LayerSpec

FULL, LOCAL = 'full_attention', 'sliding_attention'

# What an entry of rope_scaling or rope_parameters may hold besides rope_type (once `type`) and the base.
KEYS = {
  'default': (),
  'linear': ('factor',),
  'yarn': ('factor', 'beta_fast', 'beta_slow', 'attention_factor', 'mscale', 'mscale_all_dim', 'truncate'),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
  'longrope': ('factor', 'attention_factor', 'short_factor', 'long_factor'),
}
HARMLESS = ('rope_type', 'type', 'rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings', 'finetuned')
FIELDS = tuple(field.name for field in dataclasses.fields(LayerSpec) if field.name.startswith('rope_'))
TURNS = {'yarn': (1.0, 32.0), 'llama3': (1.0, 4.0)}  # what 0 means for rope_slow_turns and rope_fast_turns


@dataclasses.dataclass(frozen=True)
class Rope:
  """What a family does with rotary positions.

  Attributes:
    base: where config.json names none.
    local_base: the same for layers with a window, where these have positions of their own (Gemma 3); 0: all alike.
    max_length: max_position_embeddings where config.json names none.
    types: names of scalings the published class takes.
    aliases: other names for them.
    original_length: original_max_position_embeddings beside the rotary entries, where config.json names none; 0: it
      then follows from the rotary entries.
    is_partial: whether part of a head may be left unrotated.
    default: rotary entries where config.json has none.
  """

  base: float = 10000.0
  local_base: float = 0.0
  max_length: int = 2048
  types: tuple = tuple(KEYS)
  aliases: dict = dataclasses.field(default_factory=dict)
  original_length: int = 0
  is_partial: bool = False
  default: dict = dataclasses.field(default_factory=dict)

  @property
  def keys(self):
    """Entries of config.json that are read here and that LayerSpec holds."""
    keys: tuple[str, ...] = ('rope_theta', 'rope_scaling', 'rope_parameters', 'partial_rotary_factor')
    keys += ('original_max_position_embeddings',) if self.original_length else ()
    return keys + (('rope_local_base_freq',) if self.local_base else ())

  def read(self, reader, width: int, length: int | None) -> dict[str, dict]:
    """{layer type: LayerSpec fields} for heads of this width."""
    return {kind: self._fields(reader, entries, width, length) for kind, entries in self.sections(reader).items()}

  def sections(self, reader) -> dict[str, dict]:
    """{layer type: rotary entries, the base among them}."""
    new = reader.get('rope_parameters', None, dict, None) or {}
    old = reader.get('rope_scaling', None, dict, None) or {}
    if new and old and new != old:
      reader.problem(f'rope_parameters={new!r} beside rope_scaling={old!r} (expected one of them)')
    base = reader.get('rope_theta', self.base, float)
    fraction = reader.get('partial_rotary_factor', 1.0, float, None)
    common = {'partial_rotary_factor': 1.0 if fraction is None else fraction}
    nested = {key: value for key, value in new.items() if key in (FULL, LOCAL)}
    if not self.local_base:
      if nested:
        reader.problem(f'rope_parameters={new!r} (expected the same for all layers)')
        return {FULL: {}, LOCAL: {}}
      entries = {'rope_theta': base, **common, **(old or new or self.default)}
      return {FULL: entries, LOCAL: entries}
    if new and len(nested) < len(new):
      reader.problem(f'rope_parameters={new!r} (expected {FULL!r} and {LOCAL!r})')
    local_base = reader.get('rope_local_base_freq', self.local_base, float)
    full = {'rope_theta': base, **common, **(nested.get(FULL) or {}), **old}
    return {FULL: full, LOCAL: {'rope_theta': local_base, **common, **(nested.get(LOCAL) or {})}}

  def _fields(self, reader, entries: dict, width: int, length: int | None) -> dict[str, Any]:
    kind = entries.get('rope_type', entries.get('type', 'default'))
    kind = self.aliases.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in self.types:
      reader.problem(f'rope_type={kind!r} (expected one of {", ".join(map(repr, self.types))})')
      return {}
    for key, value in entries.items():
      if value is not None and key not in (*KEYS[kind], *HARMLESS):
        reader.problem(f'{key}={value!r} of rope_type {kind!r} (expected none)')
    number = lambda key, default: reader.typed(key, entries.get(key, default), default, float)
    fields = {'rope_base': float(number('rope_theta', self.base)), 'rope_scaling': '' if kind == 'default' else kind}
    fraction = number('partial_rotary_factor', 1.0)
    if fraction != 1 and not self.is_partial:
      reader.problem(f'partial_rotary_factor={fraction!r} (expected 1.0)')
    fields['rope_fraction'] = rotated(fraction, width)
    if kind == 'default':
      return fields
    return {**fields, **self._scaling(reader, kind, entries, length)}

  def _scaling(self, reader, kind: str, entries: dict, length: int | None) -> dict[str, Any]:
    number = lambda key, *default: reader.typed(key, entries.get(key, *default), 1.0, float)
    positive = lambda key: reader.typed(key, entries.get(key), None, float, None)
    reach = reader.get('max_position_embeddings', self.max_length, int)
    original = reader.get('original_max_position_embeddings', self.original_length or None, int, None)
    original = original or reader.typed(
      'original_max_position_embeddings', entries.get('original_max_position_embeddings', reach), reach, int
    )
    if kind == 'linear':
      return {'rope_factor': float(number('factor'))}
    fields: dict[str, Any] = {'rope_original_length': original}
    factor = positive('factor') if kind != 'llama3' else number('factor')
    factor = max(reach / original, 1.0) if factor is None and original > 0 else factor
    if factor is not None and factor < 1:
      reader.problem(f'factor={factor!r} (expected 1 or more)')
      factor = 1.0
    fields['rope_factor'] = float(factor or 1.0)
    if kind == 'llama3':
      fields['rope_slow_turns'] = float(number('low_freq_factor'))
      fields['rope_fast_turns'] = float(number('high_freq_factor'))
      return fields
    attention = positive('attention_factor')
    if attention is not None and attention <= 0:
      reader.problem(f'attention_factor={attention!r} (expected more than 0)')
    if kind == 'longrope':
      name = 'long_factor' if (reach if length is None else length) > original else 'short_factor'
      other = 'short_factor' if name == 'long_factor' else 'long_factor'
      fields['rope_factors'] = _numbers(reader, name, entries.get(name))
      _numbers(reader, other, entries.get(other))
    else:
      slow, fast = TURNS['yarn']
      fields['rope_slow_turns'] = float(positive('beta_slow') or slow)
      fields['rope_fast_turns'] = float(positive('beta_fast') or fast)
      fields['rope_truncate'] = reader.typed('truncate', entries.get('truncate', True), True, bool)
      m, m_all = positive('mscale'), positive('mscale_all_dim')
      if attention is None and m and m_all:
        magnitude = lambda m: 0.1 * m * math.log(fields['rope_factor']) + 1.0
        attention = magnitude(m) / magnitude(m_all)
    fields['rope_attention_factor'] = float(attention or 0.0)
    return fields

  def write(self, specs: list[LayerSpec], width: int, problems: list[str]) -> dict[str, Any]:
    """Entries in the older style, which newer readers take too; what cannot be written is added to `problems`."""
    if not self.local_base:
      return self._write(one(specs, problems), width, problems)
    local = [spec for spec in specs if spec.window]
    record = self._write(one([spec for spec in specs if not spec.window] or local, problems), width, problems)
    spec = one(local, problems) if local else LayerSpec(rope_base=self.local_base)
    if spec.rope_scaling:
      problems.append(f'layers: rope_scaling={spec.rope_scaling!r} of a layer with a window')
    return {**record, 'rope_local_base_freq': spec.rope_base}

  def _write(self, spec: LayerSpec, width: int, problems: list[str]) -> dict[str, Any]:
    kind = spec.rope_scaling or 'default'
    record: dict[str, Any] = {'rope_theta': spec.rope_base, 'rope_scaling': None}
    if kind not in self.types:
      problems.append(f'layers: rope_scaling={spec.rope_scaling!r}')
      return record
    if spec.rope_fraction == 0 or (spec.rope_fraction != 1 and not self.is_partial):
      problems.append(f'layers: rope_fraction={spec.rope_fraction}')
    elif self.is_partial:
      record['partial_rotary_factor'] = fraction_for(spec.rope_fraction, width)
    if self.original_length:
      record['original_max_position_embeddings'] = spec.rope_original_length or self.original_length
    if kind == 'default':  # null would mean the default of the class
      return {**record, 'rope_scaling': {'rope_type': kind}} if self.default else record
    factor, original = spec.rope_factor, spec.rope_original_length
    if kind == 'linear':  # the oldest readers know `type` alone; that of Gemma 3, a later one, `rope_type`
      scaling: dict[str, Any] = {'rope_type' if self.local_base else 'type': kind, 'factor': factor}
    elif kind == 'llama3':
      scaling = {'low_freq_factor': spec.rope_slow_turns, 'high_freq_factor': spec.rope_fast_turns}
      scaling = {'rope_type': kind, 'factor': factor, **scaling, 'original_max_position_embeddings': original}
    elif kind == 'yarn':
      scaling = {'beta_fast': spec.rope_fast_turns, 'beta_slow': spec.rope_slow_turns, 'truncate': spec.rope_truncate}
      scaling = {'rope_type': kind, 'factor': factor, **scaling, 'original_max_position_embeddings': original}
    else:
      scaling = {'type': kind, 'short_factor': list(spec.rope_factors), 'long_factor': list(spec.rope_factors)}
      reach = round(factor * original)
      if self.original_length and reach / original == factor:  # as published; older readers take no further entry
        record['max_position_embeddings'] = reach
      else:
        scaling |= {'factor': factor, 'original_max_position_embeddings': original}
    if spec.rope_attention_factor:
      scaling['attention_factor'] = spec.rope_attention_factor
    return {**record, 'rope_scaling': scaling}


def one(specs: list[LayerSpec], problems: list[str]) -> LayerSpec:
  """The first spec; a problem for every rotary field in which another one differs."""
  for field in FIELDS:
    values = [getattr(spec, field) for spec in specs]
    different = [value for value in values if value != values[0]]
    if different:
      problems.append(f'layers: {field}={values[0]!r} and {different[0]!r}')
  return specs[0]


def normal(spec: LayerSpec, width: int) -> LayerSpec:
  """The spec with numbers in place of 0s that stand for them, and without a length that has no effect."""
  changes: dict[str, Any] = {'rope_fraction': round(spec.rope_fraction * width) / width}
  if spec.rope_scaling in TURNS:
    slow, fast = TURNS[spec.rope_scaling]
    changes |= {'rope_slow_turns': spec.rope_slow_turns or slow, 'rope_fast_turns': spec.rope_fast_turns or fast}
  elif spec.rope_scaling != 'longrope':
    changes |= {'rope_original_length': 0}
  return dataclasses.replace(spec, **changes)


def rotated(fraction: float, width: int) -> float:
  """The share of a head that is rotated: published classes take int(fraction * width) channels."""
  return int(fraction * width) / max(width, 1)


def fraction_for(share: float, width: int) -> float:
  """The inverse of `rotated`: the share, or the next number above that is not cut to a channel less."""
  return share if int(share * width) == round(share * width) else math.nextafter(share, 1)


def _numbers(reader, key: str, value) -> list[float]:
  if isinstance(value, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
    return [float(x) for x in value]
  reader.problem(f'{key}={value!r} (expected a list of numbers)')
  return []
