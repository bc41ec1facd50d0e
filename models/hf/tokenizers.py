"""Text to token ids and back: the tokenizer of a published checkpoint, or the bytes that train/ learns from.

tokenizer = tokenizer('runs/tiny')
ids = tokenizer.encode('Hello')
assert tokenizer.decode(ids) == 'Hello'
"""

import json
import pathlib
import re

SEPARATOR = 256  # id of the byte tokenizer that stands before every text; ids below are bytes
FILE, CONFIG = 'tokenizer.json', 'config.json'
INSTALL = 'pip install -e .[hf]'


class ByteTokenizer:
  """UTF-8 bytes as ids 0 .. 255, and 256 before and between texts.

  Attributes:
    vocab: 257, one more than the highest id.
  """

  vocab = SEPARATOR + 1

  def encode(self, text, add_special=True):
    """[int] ids of a text; with add_special, the separator first, as every text of the training data has it."""
    return [SEPARATOR] * add_special + list(text.encode('utf-8'))

  def decode(self, ids):
    """The text of some ids. Bytes that are no UTF-8 give U+FFFD; ids that are no bytes give nothing."""
    return bytes(i for i in ids if i < SEPARATOR).decode('utf-8', errors='replace')


class FileTokenizer:
  """The tokenizer of a tokenizer.json, without its truncation and padding.

  Args:
    path: of the file.
    limit: ids of the model lie below it; 0 means not known.

  Attributes:
    vocab: one more than the highest id.

  Raises:
    ImportError: the library `tokenizers` is not installed.
    ValueError: the file is not a tokenizer, or has ids for its pieces of text that the model does not have. An added
      token beyond the model's ids is an error when a text holds it.
  """

  def __init__(self, path, limit=0):
    try:
      import tokenizers
    except ImportError as error:
      raise ImportError(
        f'{path}: reading it needs the package tokenizers, which is not installed: {INSTALL}'
      ) from error
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
      raise ValueError(f'{path}: expected a tokenizer that the package tokenizers can read ({error})') from error
    # A file may ask for both; a prompt must not be cut or filled up in silence.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    highest = lambda with_added: max(self._tokenizer.get_vocab(with_added).values(), default=-1)
    self.path, self.limit, self.vocab = path, limit, highest(True) + 1
    if limit and highest(False) >= limit:
      raise ValueError(f'{path}: its highest id is {highest(False)}, the model has ids 0 .. {limit - 1}')
    self._open = self._runs() if 'ByteFallback' in repr(self._tokenizer.decoder) else frozenset()

  def _runs(self):
    """Ids of single bytes, and of what decode() leaves out, so that the bytes on both sides are one run."""
    is_byte = re.compile('<0x[0-9A-F]{2}>').fullmatch
    found = {i for piece, i in self._tokenizer.get_vocab(False).items() if is_byte(piece)}
    return frozenset(found | {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special})

  def encode(self, text, add_special=True):
    """[int] ids of a text; with add_special, with what the tokenizer puts before and behind one."""
    ids = self._tokenizer.encode(text, add_special_tokens=add_special).ids
    beyond = next((i for i in ids if self.limit and i >= self.limit), None)
    if beyond is not None:
      piece = self._tokenizer.id_to_token(beyond)
      raise ValueError(f'{self.path}: the text holds {piece!r}, id {beyond}; the model has ids 0 .. {self.limit - 1}')
    return ids

  def decode(self, ids):
    """The text of some ids, without special tokens. Bytes that are no UTF-8 give U+FFFD; unknown ids give nothing."""
    return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

  def is_open(self, token):
    """Whether `token` is a single byte of a tokenizer that decodes a run of them as a whole: the text of a run is
    known when it has ended."""
    return token in self._open or (bool(self._open) and self._tokenizer.id_to_token(token) is None)


def tokenizer(folder):
  """The tokenizer of a checkpoint's folder.

  Args:
    folder: with a tokenizer.json, or with a config.json that says "tokenizer": "bytes".

  Returns:
    FileTokenizer or ByteTokenizer: `.encode(text, add_special=True)`, `.decode(ids)`, `.vocab`.

  Raises:
    ImportError: the library `tokenizers` is needed and not installed.
    ValueError: neither is there, both are, the file is damaged, or its ids are not those of the model.
  """
  folder = pathlib.Path(folder).expanduser()
  if not folder.is_dir():
    raise ValueError(f'{folder}: expected the folder of a checkpoint')
  config = _read(folder / CONFIG) if (folder / CONFIG).exists() else {}
  named, path = config.get('tokenizer'), folder / FILE
  if named not in (None, 'bytes'):
    raise ValueError(f'{folder / CONFIG}: tokenizer={named!r}, expected "bytes" or no such entry')
  if named and path.exists():
    raise ValueError(f'{folder}: expected one tokenizer, found {FILE} and "tokenizer": "bytes" in {CONFIG}')
  try:
    limit = _vocab(config)
  except ValueError as error:
    raise ValueError(f'{folder / CONFIG}: {error}') from None
  if named:
    if limit and limit < ByteTokenizer.vocab:
      raise ValueError(f'{folder / CONFIG}: "tokenizer": "bytes" has ids 0 .. {SEPARATOR}, the model 0 .. {limit - 1}')
    return ByteTokenizer()
  if not path.exists():
    others = [name for name in ('tokenizer.model', 'vocab.json', 'spiece.model') if (folder / name).exists()]
    found = f'; {others[0]} is another form of it, which is not read' if others else ''
    raise ValueError(f'{folder}: expected {FILE}, or "tokenizer": "bytes" in {CONFIG}, found neither{found}')
  return FileTokenizer(path, limit)


def _vocab(config):
  """Ids of the model that a config.json describes; 0 if it does not say.

  Raises:
    ValueError: an entry that would say it is of another type, or below 1.
  """
  found = 0
  for outer, inner in (('decoder', 'vocab'), ('', 'vocab_size'), ('text_config', 'vocab_size')):
    place = config.get(outer, {}) if outer else config
    if not isinstance(place, dict):
      raise ValueError(f'{outer}={place!r}, expected a JSON object or no such entry')
    value = place.get(inner)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
      name = f'{outer}.{inner}' if outer else inner
      raise ValueError(f'{name}={value!r}, expected a whole number of 1 or more')
    found = found or value or 0
  return found


def _read(path):
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(f'{path}: expected JSON ({error})') from error
  if not isinstance(found, dict):
    raise ValueError(f'{path}: expected a JSON object, found {type(found).__name__}')
  return found
