"""Documents of text files, JSONL, Parquet and arrays of token ids, one after the other.

A file is never held whole, except for a text file, which is one document. What is wrong with a document or a file is
told in its place, as a Document with a `problem`. Nothing is unpickled.
"""

import gzip
import json
import os
import stat
import zlib
from typing import Any, NamedTuple

import numpy as np

TEXT, JSONL, PARQUET, TOKENS = FORMATS = 'text', 'jsonl', 'parquet', 'tokens'
ENDINGS = {'.jsonl': JSONL, '.jsonl.gz': JSONL, '.parquet': PARQUET, '.npy': TOKENS}
ROWS = 1024  # of Parquet that are decoded at a time
IDS = 1 << 20  # of an array that are looked at at a time


class Document(NamedTuple):
  """What stands in one place of a file.

  Attributes:
    row: line or row, from 1; 0 is the file as a whole.
    end: bytes of the file that have been read when it has, about.
    text: its UTF-8, or None if it is given as ids.
    ids: int64 array, or None.
    problem: what is wrong with it, or ''.
  """

  row: int
  end: int
  text: bytes | None = None
  ids: Any = None
  problem: str = ''


class Damaged(Exception):
  """A file that cannot be read on from here."""


def format_of(path):
  """The format that the name of a file tells; 'text' if none."""
  return next((kind for ending, kind in ENDINGS.items() if path.endswith(ending)), TEXT)


def documents(path, kind, field, separator, vocab):
  """The documents of a file, bad ones with their `problem`.

  Args:
    path: of the file.
    kind: 'text', 'jsonl', 'parquet' or 'tokens'.
    field: key or column that holds a text or a list of ids.
    separator: id that stands before each document of a 1-D array, and in none.
    vocab: ids have to be below it.

  Yields:
    Document.
  """
  if problem := file_problem(path):
    yield Document(0, 0, problem=problem)
    return
  if kind == TEXT:
    text, problem = read_text(path)
    yield Document(0, len(text), text, problem=problem)
    return
  values = {JSONL: lambda: _jsonl(path, field), PARQUET: lambda: _parquet(path, field),
            TOKENS: lambda: _array(path, separator)}[kind]  # fmt: skip
  row = end = 0
  try:
    for row, end, value in values():
      yield _document(row, end, value, separator, vocab)
  except Damaged as error:
    yield Document(0, end, problem=str(error) + (f' (after {row:,} rows)' if row else ''))
  except (OSError, EOFError, zlib.error) as error:
    where = f' after row {row:,}' if row else ''
    yield Document(0, end, problem=f'unreadable{where} ({getattr(error, "strerror", "") or error})')


def file_problem(path):
  """Why a path is not a file to read, or ''; opening a pipe would wait for ever."""
  try:
    return '' if stat.S_ISREG(os.stat(path).st_mode) else 'not a regular file'
  except OSError as error:
    return f'unreadable ({error.strerror or error})'


def read_text(path):
  """(bytes, '') of a UTF-8 text file, or (b'', what is wrong with it)."""
  try:
    with open(path, 'rb') as file:
      text = file.read()
  except OSError as error:
    return b'', f'unreadable ({error.strerror or error})'
  problem = _text_problem(text)
  return (b'', problem) if problem else (text, '')


def _text_problem(text):
  if not text:
    return 'empty'
  if b'\0' in text:
    return f'binary (NUL byte at {text.index(0)})'
  try:
    text.decode('utf-8')
  except UnicodeDecodeError as error:
    return f'badly encoded (not UTF-8 at byte {error.start})'
  return ''


def _document(row, end, value, separator, vocab):
  """The Document of a value: bytes, an array of ids, or a str that says what is wrong."""
  if isinstance(value, bytes):
    problem = _text_problem(value)
    return Document(row, end, None if problem else value, problem=problem)
  if isinstance(value, str):
    return Document(row, end, problem=value)
  # A separator before or behind is not part of the document.
  inner = np.flatnonzero(value != separator)
  ids = value[inner[0] : inner[-1] + 1] if len(inner) else value[:0]
  problem = ''
  if not len(ids):
    problem = 'empty'
  elif len(wrong := ids[(ids < 0) | (ids >= vocab)]):
    problem = f'id {wrong[0]}, expected 0 .. {vocab - 1}'
  elif len(inner) < len(ids):
    at = int(np.flatnonzero(ids == separator)[0])
    problem = f'the separator {separator} at place {at}, expected one document'
  return Document(row, end, ids=None if problem else ids.astype(np.int64), problem=problem)


def _jsonl(path, field):
  """(line, end, value) of the lines of a JSONL file that are not blank."""
  with open(path, 'rb') as raw:
    lines = gzip.GzipFile(fileobj=raw) if path.endswith('.gz') else raw
    for number, line in enumerate(lines, 1):
      if line.strip():
        yield number, raw.tell(), _json_value(line, field)


def _json_value(line, field):
  try:
    record = json.loads(line.decode('utf-8'))
  except UnicodeDecodeError as error:
    return f'badly encoded (not UTF-8 at byte {error.start} of the line)'
  except (ValueError, RecursionError) as error:
    return f'broken JSON ({error})'
  if not isinstance(record, dict):
    return f'a {type(record).__name__}, expected a JSON object'
  if field not in record:
    return f'no field {field!r}, it has {", ".join(map(repr, list(record)[:5])) or "none"}'
  value = record[field]
  if isinstance(value, str):
    try:
      return value.encode('utf-8')
    except UnicodeEncodeError as error:
      return f'badly encoded (half of a surrogate pair at character {error.start})'
  if isinstance(value, list) and all(type(item) is int for item in value):
    if value and not -(2**63) <= min(value) <= max(value) < 2**63:
      return f'id {max(value, key=abs)}, expected 64 bits at most'
    return np.array(value, np.int64)
  return f'{field!r} is a {type(value).__name__}, expected a text or a list of token ids'


def _parquet(path, field):
  """(row, end, value) of one column of a Parquet file, by row groups."""
  try:
    import pyarrow as pa
    import pyarrow.parquet
  except ImportError as error:
    raise Damaged('reading Parquet needs the package pyarrow, which is not installed: pip install pyarrow') from error
  size = os.path.getsize(path)
  try:
    with pa.parquet.ParquetFile(path) as file:
      if field not in file.schema_arrow.names:
        names = ', '.join(map(repr, file.schema_arrow.names[:5])) or 'none'
        raise Damaged(f'no column {field!r}, it has {names}')
      row, rows = 0, max(file.metadata.num_rows, 1)
      for group in range(file.num_row_groups):
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=[field]):
          for value in _column_values(pa, batch.column(0), field):
            row += 1
            yield row, size * row // rows, value
  except (pa.ArrowException, ValueError) as error:
    raise Damaged(f'not a whole Parquet file ({error})') from error


def _column_values(pa, column, field):
  """The value of each row of a column of texts or of lists of whole numbers."""
  kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
  missing = f'{field!r} has no value'
  if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
    column = column.cast(kind).cast(pa.large_binary())
    return [missing if value is None else value for value in column.to_pylist()]
  is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
  if not is_list or not pa.types.is_integer(kind.value_type):
    raise Damaged(f'column {field!r} is {column.type}, expected a text or a list of whole numbers')
  column = column.cast(pa.large_list(pa.int64()))
  offsets, is_known = column.offsets.to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)
  # A number that is missing becomes one that no vocabulary has.
  ids = column.values.fill_null(-1).to_numpy()
  return [ids[offsets[i] : offsets[i + 1]] if is_known[i] else missing for i in range(len(column))]


def _array(path, separator):
  """(row, end, ids) of a .npy file: rows of a 2-D array, or what stands between separators in a 1-D one."""
  size = os.path.getsize(path)
  try:
    array = np.lib.format.open_memmap(path, mode='r')  # refuses an array of objects, which would be pickled
  except (ValueError, EOFError, SyntaxError) as error:
    raise Damaged(f'not a .npy array of numbers ({error})') from error
  if array.dtype.kind not in 'iu' or array.ndim not in (1, 2):
    raise Damaged(f'an array of {array.dtype} {list(array.shape)}, expected whole numbers in 1 or 2 dimensions')
  if array.ndim == 2:
    for row, ids in enumerate(array, 1):
      yield row, size * row // len(array), np.asarray(ids)
  elif not len(array):
    raise Damaged('empty')
  elif array[0] != separator:
    raise Damaged(f'it begins with id {array[0]}, expected the separator {separator}, which begins each document')
  else:
    yield from _between(array, separator, size)


def _between(array, separator, size):
  """(document from 1, end, ids) of a 1-D array whose documents each begin with the separator."""
  row = 0
  begun: list[np.ndarray] = []  # the pieces of a document that goes on
  for at in range(0, len(array), IDS):
    block = np.asarray(array[at : at + IDS])
    cuts = np.flatnonzero(block == separator)
    for piece in np.split(block, cuts):
      if len(piece) and piece[0] == separator and begun:
        row += 1
        yield row, size * at // len(array), np.concatenate(begun)[1:]
        begun = []
      if len(piece):
        begun.append(piece)
  yield row + 1, size, np.concatenate(begun)[1:]
