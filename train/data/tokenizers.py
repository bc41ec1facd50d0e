"""Text to token ids for training: bytes, the tokenizer of a tokenizer.json, or none where data are tokens already.

Bytes and FromFile have `encode_texts(texts)`, `text_of(ids)` and `decode(ids)`; all have `count_bytes(documents)` and

    separator    id that stands before each document
    vocab        one more than the highest id that data may hold
    least_vocab  ids that a model has to have at least
    unit         what bits are counted per: 'byte', or 'token' where no text is known
    fingerprint  'bytes', 'none', or the SHA-256 of the file
    path         of the file, or ''
"""

import hashlib
import json
import os

import numpy as np

from models.hf import tokenizers as hf_tokenizers
from train.config import SEPARATOR, UserError

MOST_IDS = 2**32  # ids are stored as uint32 at most
CONFIGS = ('tokenizer_config.json', 'config.json', 'generation_config.json')


def load(config):
  """The tokenizer that a config names.

  Args:
    config: train.config.DataConfig; tokenizer and separator are used.

  Returns:
    Bytes, FromFile or NoText.

  Raises:
    UserError: no such file, or not a tokenizer; a separator that it does not have, or none where one must be named.
  """
  if config.tokenizer == 'bytes':
    if config.separator not in ('', str(SEPARATOR)):
      raise UserError(f"data.separator={config.separator!r}: expected '' or {SEPARATOR} for data.tokenizer='bytes'")
    return Bytes()
  if config.tokenizer == 'none':
    if not _is_number(config.separator) or int(config.separator) >= MOST_IDS:
      raise UserError(
        f'data.separator={config.separator!r}: expected the id of the token that stands between documents, as '
        "data.tokenizer='none' knows no text"
      )
    return NoText(int(config.separator))
  path = os.path.abspath(os.path.expanduser(config.tokenizer))
  path = os.path.join(path, hf_tokenizers.FILE) if os.path.isdir(path) else path
  if not config.tokenizer or not os.path.isfile(path):
    raise UserError(
      f"data.tokenizer={config.tokenizer!r}: expected 'bytes', 'none', a {hf_tokenizers.FILE} or a folder with one, "
      f'found nothing at {path}'
    )
  try:
    return FromFile(path, config.separator)
  except (ImportError, ValueError) as error:
    raise error if isinstance(error, UserError) else UserError(f'data.tokenizer: {error}') from error


class Bytes(hf_tokenizers.ByteTokenizer):
  """UTF-8 bytes as ids 0 .. 255; the separator is 256."""

  separator, least_vocab, unit, fingerprint, path = SEPARATOR, SEPARATOR + 1, 'byte', 'bytes', ''

  def encode_texts(self, texts):
    """[uint8 ids] of some texts, each bytes."""
    return [np.frombuffer(text, np.uint8) for text in texts]

  def text_of(self, ids):
    """The bytes that an array of ids is."""
    return ids.astype(np.uint8).tobytes()

  def count_bytes(self, documents):
    """[int] bytes of text that some lists of ids are."""
    return [len(ids) for ids in documents]


class NoText:
  """For data that are token ids already, of a tokenizer that is not at hand."""

  unit, fingerprint, path, vocab = 'token', 'none', '', MOST_IDS

  def __init__(self, separator):
    self.separator, self.least_vocab = separator, separator + 1

  def count_bytes(self, documents):
    """[int] ids of each document: there is no text to count bytes of."""
    return [len(ids) for ids in documents]


class FromFile(hf_tokenizers.FileTokenizer):
  """The tokenizer of a tokenizer.json. Text that looks like one of its special tokens is encoded as any other text.

  Args:
    path: of the file.
    separator: the text of one of its tokens, or an id; '' takes the end-of-text token that a config file beside names.
  """

  unit = 'byte'

  def __init__(self, path, separator):
    super().__init__(path)
    self._tokenizer.encode_special_tokens = True
    with open(path, 'rb') as file:
      self.fingerprint = hashlib.file_digest(file, 'sha256').hexdigest()
    self.separator = self._separator(separator)
    pieces = self._tokenizer.get_vocab(with_added_tokens=False).values()
    self.least_vocab = max(self.separator, *pieces) + 1
    self.vocab = max(self.vocab, self.least_vocab)

  def encode_texts(self, texts):
    """[uint32 ids] of some texts, each bytes in UTF-8, on all cores; nothing is put before or behind them."""
    found = self._tokenizer.encode_batch_fast([text.decode('utf-8') for text in texts], add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in found]

  def text_of(self, ids):
    """The text of an array of ids in UTF-8, without special tokens."""
    return self.decode(ids).encode('utf-8')

  def count_bytes(self, documents):
    """[int] bytes of the texts that some lists of ids decode to."""
    texts = self._tokenizer.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=True)
    return [len(text.encode('utf-8')) for text in texts]

  def _separator(self, wanted):
    """The id of the separator."""
    if _is_number(wanted):
      if int(wanted) >= MOST_IDS:
        raise UserError(f'data.separator={wanted}: expected an id below {MOST_IDS}')
      return int(wanted)
    name = wanted or _end_of_text(os.path.dirname(self.path))
    found = name if isinstance(name, int) else self._tokenizer.token_to_id(name) if name else None
    if found is None:
      known = self._tokenizer.get_added_tokens_decoder()
      shown = ', '.join(f'{token.content!r} ({i})' for i, token in list(known.items())[:20]) or 'none'
      missing = f'{self.path} has no such token' if name else 'no config file beside the tokenizer names one'
      raise UserError(
        f'data.separator={wanted!r}: expected the token that stands between documents, but {missing}; '
        f'its special tokens are {shown}'
      )
    return found


def _is_number(text):
  return text.isascii() and text.isdecimal()


def _end_of_text(folder):
  """The end-of-text token that a config file in a folder names: its text, its id, or None."""
  for name in CONFIGS:
    try:
      with open(os.path.join(folder, name), encoding='utf-8') as file:
        values = json.load(file)
    except FileNotFoundError:
      continue
    except (OSError, ValueError) as error:
      raise UserError(f'{os.path.join(folder, name)}: expected JSON ({error}); or name data.separator') from error
    if not isinstance(values, dict):
      continue
    token = values.get('eos_token')
    token = token.get('content') if isinstance(token, dict) else token
    if isinstance(token, str) and token:
      return token
    ids = values.get('eos_token_id')
    first = ids[0] if isinstance(ids, list) and ids else ids
    if isinstance(first, int) and not isinstance(first, bool) and first >= 0:
      return first
  return None


def check_vocab(needed, vocab, what):
  """UserError if a model of `vocab` ids is too small for ids 0 .. needed - 1 of `what`."""
  if needed > vocab:
    raise UserError(f'model.vocab={vocab}: expected at least {needed}, for the ids of {what}')
