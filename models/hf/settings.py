"""config.json and its neighbours: what a checkpoint says of itself. No code of a checkpoint is ever run."""

import dataclasses
import json
import pathlib

from models.config import DTYPES
from models.hf import architectures, safetensors
from models.hf.tokenizers import ByteTokenizer

CONFIG, GENERATION = 'config.json', 'generation_config.json'
TOKENIZER = 'tokenizer.json'
TOKENIZER_FILES = (
  TOKENIZER,
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'tokenizer.model',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
)
_STOPS = 'eos_token_id'
# Entries that are no settings: config.dtype holds the first two, and code of a checkpoint is not used.
_DTYPE_NAMES, _CODE = ('dtype', 'torch_dtype'), 'auto_map'


def read_config(folder, *, length=None):
  """What a checkpoint is, without opening its tensors.

  Args:
    folder: path.
    length: tokens of the longest text to be used; None means the longest that the model knows. Models with two sets of
      rotary frequencies take those for it.

  Returns:
    (DecoderConfig, settings): settings are the entries of config.json that DecoderConfig does not have; `eos_token_id`,
    the ids that end a text, also has those of generation_config.json.

  Raises:
    ValueError: no config.json, not JSON, an unknown architecture, or what ours cannot do, all named.
  """
  return read(folder, length)[1:]


def read(folder, length=None):
  """(architectures.Architecture, DecoderConfig, settings); see `read_config`."""
  folder = pathlib.Path(folder).expanduser()
  path = folder / CONFIG
  record = read_json(path)
  try:
    architecture = architectures.of(record)
    _check_code(record, architecture.name)
    config = architectures.read_config(record, length)
    dtype = next((record[key] for key in _DTYPE_NAMES if record.get(key) is not None), config.dtype)
    if dtype not in DTYPES:
      raise ValueError(f'dtype={dtype!r}: expected one of {", ".join(DTYPES)}')
  except ValueError as error:
    code = f'; the Python files that {_CODE} names are never run' if _CODE in record else ''
    raise ValueError(f'{path}: {error}{code}') from error
  settings = {key: value for key, value in architecture.settings(record).items() if key not in (*_DTYPE_NAMES, _CODE)}
  stops = _stops(folder, record)
  if stops != _ids(path, record.get(_STOPS)):
    settings[_STOPS] = list(stops)
  return architecture, dataclasses.replace(config, dtype=dtype), settings


def stop_tokens(checkpoint):
  """The ids that end a text: those of config.json, then those that only generation_config.json has.

  Args:
    checkpoint: path of a folder, or what `load` returned.

  Returns:
    Tuple of ints, each once; empty where neither file names one.
  """
  if hasattr(checkpoint, 'settings'):
    return _ids('settings', checkpoint.settings.get(_STOPS))
  folder = pathlib.Path(checkpoint).expanduser()
  return _stops(folder, read_json(folder / CONFIG))


def read_json(path):
  """The object in a JSON file; ValueError if there is none."""
  if not path.parent.is_dir():
    raise ValueError(f'{path.parent}: expected a folder')
  if not path.is_file():
    raise ValueError(f'{path}: expected a file, found none')
  return safetensors.parse_json(path.read_bytes(), path)


def files(architecture, config, settings, tokenizer):
  """{name: bytes} of what stands beside the tensors.

  Args:
    architecture: architectures.Architecture.
    config: DecoderConfig.
    settings: as `read_config` returns them, or None.
    tokenizer: folder to copy the tokenizer from; 'bytes' for the byte tokenizer; None for neither.

  Raises:
    ValueError: the architecture cannot express the config, settings that JSON cannot hold, or no tokenizer there.
  """
  settings = dict(settings or {})
  copies = {}
  if tokenizer == 'bytes':
    settings['tokenizer'] = 'bytes'
    if config.vocab < ByteTokenizer.vocab:
      raise ValueError(f"tokenizer='bytes' has {ByteTokenizer.vocab} ids, the model vocab={config.vocab}")
  elif tokenizer is not None:
    settings.pop('tokenizer', None)
    folder = pathlib.Path(tokenizer).expanduser()
    if not (folder / TOKENIZER).is_file():
      raise ValueError(f"tokenizer={str(tokenizer)!r}: expected 'bytes' or a folder with {TOKENIZER}")
    copies = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
  record = architectures.config_json(architecture, config, settings)
  if architecture is not architectures.NATIVE:  # which has it among the fields of the decoder
    record['dtype'] = config.dtype
  try:
    text = json.dumps(record, indent=2, allow_nan=False)
  except (TypeError, ValueError) as error:
    raise ValueError(f'settings: expected what JSON can hold ({error})') from error
  return {CONFIG: f'{text}\n'.encode(), **copies}


def other_tokenizer(folder, settings, tokenizer, overwrite):
  """Names of files to remove from a folder so that it has one tokenizer; ValueError if it would have two."""
  folder = pathlib.Path(folder).expanduser()
  has_bytes = 'bytes' in (tokenizer, (settings or {}).get('tokenizer') if tokenizer is None else None)
  if has_bytes and not overwrite and (folder / TOKENIZER).exists():
    raise ValueError(f'{folder} holds {TOKENIZER} beside the byte tokenizer: expected a folder without it')
  return TOKENIZER_FILES if has_bytes or tokenizer is not None else ()


def _check_code(record, name):
  """ValueError if the checkpoint brings a model class of its own that is not the one we know by name."""
  code = record.get(_CODE, {})
  model = code.get('AutoModelForCausalLM', name) if isinstance(code, dict) else code
  if not isinstance(model, str) or model.rpartition('.')[2] != name:
    raise ValueError(f'{_CODE} has {model!r} for the model, expected the known class {name}')


def _stops(folder, record):
  """Stop tokens of a config.json and of the generation_config.json beside it."""
  found = _ids(folder / CONFIG, record.get(_STOPS))
  path = folder / GENERATION
  more = _ids(path, read_json(path).get(_STOPS)) if path.exists() else ()
  return tuple(dict.fromkeys((*found, *more)))


def _ids(where, value):
  """A token id, a list of them or None, as a tuple."""
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if not all(type(i) is int and i >= 0 for i in ids):
    raise ValueError(f'{where}: {_STOPS}={value!r}, expected a token id or a list of them')
  return tuple(ids)
