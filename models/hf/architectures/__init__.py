"""The forms in which decoders are published: what their config.json means and how their tensors are named.

config = read_config(json.load(file))                      # DecoderConfig
table = find('LlamaForCausalLM').sources(config)           # {path of our parameter: Source}
"""

import dataclasses
import difflib
from typing import Any

from models.hf.architectures.families import FAMILIES
from models.hf.architectures.family import normal
from models.hf.architectures.native import NATIVE
from models.hf.architectures.record import Architecture, Source, shapes
from models.hf.architectures.with_images import GEMMA3_WITH_IMAGES

ARCHITECTURES: dict[str, Architecture] = {
  form.name: form for form in (*(family.architecture() for family in FAMILIES), GEMMA3_WITH_IMAGES, NATIVE)
}
# Far beyond any model; what is made of the sizes before the tensors are looked at must stay small.
MOST = {'num_hidden_layers': 1024, 'depth': 1024, 'head_dim': 2**16, 'hidden_size': 2**24, 'width': 2**24}

__all__ = ['ARCHITECTURES', 'Architecture', 'Source', 'config_json', 'find', 'normal', 'of', 'read_config', 'shapes']


def find(name: str) -> Architecture:
  """The architecture of this name; ValueError with the nearest known name, and all of them."""
  if name in ARCHITECTURES:
    return ARCHITECTURES[name]
  near = difflib.get_close_matches(str(name), ARCHITECTURES, 1, 0.0)
  nearest = f'the nearest is {near[0]!r} of ' if near else ''
  raise ValueError(f'architecture={name!r} is unknown: {nearest}{", ".join(ARCHITECTURES)}')


def of(record: dict[str, Any]) -> Architecture:
  """The architecture that a config.json names; ValueError if it names none, several or an unknown one."""
  names = record.get('architectures')
  if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
    raise ValueError(f'config.json has architectures={names!r}, expected one of {", ".join(ARCHITECTURES)}')
  return find(names[0])


def read_config(record: dict[str, Any], length: int | None = None):
  """The DecoderConfig of a config.json; see Architecture.read_config."""
  if length is not None and (not isinstance(length, int) or length < 1):
    raise ValueError(f'length={length!r} must be a whole number of at least 1, or None')
  architecture = of(record)
  kind = record.get('model_type', architecture.model_type)
  if kind != architecture.model_type:  # other programs go by it, and would build another model
    raise ValueError(f'model_type={kind!r}: expected {architecture.model_type!r} with {architecture.name}')
  _check_sizes('config.json', record)
  for part in ('decoder', 'text_config'):
    if isinstance(record.get(part), dict):
      _check_sizes(part, record[part])
  return architecture.read_config(record, length)


def _check_sizes(where, record):
  """ValueError for sizes at which reading the config alone would take minutes or gigabytes."""
  for key, most in MOST.items():
    value = record.get(key, 0)
    if isinstance(value, int) and value > most:
      raise ValueError(f'{where} has {key}={value}, expected at most {most}')


def config_json(architecture: Architecture, config, settings: dict[str, Any]) -> dict[str, Any]:
  """The whole config.json: what the config says, and the settings that it does not have.

  Raises:
    ValueError: as Architecture.write_config; or settings that would change the config, or have both lists of divisors
      of a longrope of which neither is that of the config.
  """
  record = {**settings, **architecture.write_config(config)}
  scaling = record.get('rope_scaling') or {}
  reach = settings.get('max_position_embeddings')
  if 'long_factor' in scaling and reach not in (None, record.get('max_position_embeddings')):
    # The factor was not the quotient of the lengths: it is written, and the length stays.
    spec = config.spec(0)
    lengths = {'factor': spec.rope_factor, 'original_max_position_embeddings': spec.rope_original_length}
    scaling = {**scaling, **lengths}
    record |= {'max_position_embeddings': reach, 'rope_scaling': scaling}
  lists = settings.get('longrope')
  if architecture is not NATIVE and lists:
    del record['longrope']
    factors = scaling.get('long_factor', lists.get('long_factor'))
    if factors not in lists.values():
      raise ValueError(f'settings have longrope={lists!r}, expected rope_factors={factors!r} of the config as one list')
    if 'long_factor' in scaling:
      record['rope_scaling'] = {**scaling, **lists}
  said = [architecture.read_config(record, length) for length in (None, 1)]  # long and short divisors, if there are two
  meant = architecture.read_config(architecture.write_config(config), None)
  if meant not in said:
    fields = [field.name for field in dataclasses.fields(meant)]
    changed = [name for name in fields if getattr(meant, name) != getattr(said[0], name)]
    raise ValueError(f'settings change {", ".join(changed)} of the config: {settings!r}')
  return record
