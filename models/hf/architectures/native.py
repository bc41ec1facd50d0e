"""Our own form of checkpoints, which takes any DecoderConfig: its fields in config.json, tensors by our paths."""

import dataclasses
import types
import typing
from typing import Any

from models import state
from models.config import DecoderConfig, LayerSpec
from models.hf.architectures.record import Architecture, Reader, Source, fits

NAME, MODEL_TYPE = 'AttnloomForCausalLM', 'attnloom'


def read(record: dict, length: int | None = None) -> DecoderConfig:
  """The DecoderConfig of {"decoder": {field: value, ..., "layers": [{field: value, ...}, ...]}}.

  Fields that are left out have their default. `length` changes nothing.

  Raises:
    ValueError: fields that a DecoderConfig or LayerSpec does not have, or values of another type, all of them named.
  """
  reader = Reader(NAME, record)
  if not isinstance(record.get('decoder'), dict):
    reader.problem(f'decoder={record.get("decoder")!r} (expected the fields of a DecoderConfig)')
    reader.check()
  fields = _fields(reader, 'decoder', DecoderConfig, {**record['decoder']})
  if fields.get('adapter_rank'):
    reader.problem(f'decoder.adapter_rank={fields["adapter_rank"]} (expected 0: a checkpoint has its adapters merged)')
  reader.check()
  return DecoderConfig(**fields).validate('decoder')


def write(config: DecoderConfig) -> dict[str, Any]:
  """config.json of a DecoderConfig, every field of it."""
  decoder = dataclasses.asdict(config.validate())
  return {'architectures': [NAME], 'model_type': MODEL_TYPE, 'decoder': decoder}


def _fields(reader: Reader, name: str, kind, record: dict) -> dict[str, Any]:
  """The fields of a dataclass from a dictionary; what does not fit is a problem."""
  hints, fields = typing.get_type_hints(kind), {}
  for key, value in record.items():
    expected = hints.get(key)
    if expected is None:
      reader.problem(f'{name}.{key}={value!r} (unknown)')
    elif key == 'layers':
      if isinstance(value, list) and all(isinstance(layer, dict) for layer in value):
        fields[key] = [LayerSpec(**_fields(reader, f'{name}.{key}[{i}]', LayerSpec, x)) for i, x in enumerate(value)]
      else:
        reader.problem(f'{name}.{key}={value!r} (expected a list of layers)')
    elif isinstance(expected, types.GenericAlias):
      (item,) = typing.get_args(expected)
      if isinstance(value, list) and all(fits(x, (item,)) for x in value):
        fields[key] = [item(x) for x in value]
      else:
        reader.problem(f'{name}.{key}={value!r} (expected a list of {item.__name__})')
    elif fits(value, (expected,)):
      fields[key] = expected(value)
    else:
      reader.problem(f'{name}.{key}={value!r} (expected {expected.__name__})')
  return fields


def sources(config: DecoderConfig) -> dict[str, Source]:
  """Every parameter is the tensor of its path."""
  return {path: Source(path) for path in state.abstract_params(dataclasses.replace(config, scan=False))}


NATIVE = Architecture(
  name=NAME,
  model_type=MODEL_TYPE,
  read_config=read,
  write_config=write,
  sources=sources,
  ignored=lambda tensor, config: False,
  tied='',
  settings=lambda record: {key: value for key, value in record.items() if key != 'decoder'},
)
