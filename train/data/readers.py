"""Documents of text files, JSONL, Parquet and arrays of token ids, one after the other.

A file is never held whole, except for a text file, which is one document. What is wrong with a document or a file is
told in its place, as a Document with a `problem`; trouble of the machine (a disk that fails, a package that is not
installed) is a UserError, as no file is to be left out for it. Nothing is unpickled.
"""

import codecs
import contextlib
import errno
import gzip
import json
import os
import stat
import zlib
from typing import Any, NamedTuple

import numpy as np

from train.checks import FORMATS
from train.config import UserError

TEXT, JSONL, PARQUET, TOKENS = FORMATS[1:]
ENDINGS = {
  '.jsonl': JSONL, '.ndjson': JSONL, '.jsonl.gz': JSONL, '.ndjson.gz': JSONL, '.parquet': PARQUET, '.npy': TOKENS,
}  # fmt: skip
# Names that do not tell what a document is, or tell that it is nothing that is read here.
UNCLEAR = ('.json', '.csv', '.tsv', '.gz', '.zst', '.bz2', '.xz', '.zip', '.tar', '.npz', '.arrow', '.feather')
ROWS, ROWS_BYTES = 1024, 8 << 20  # of Parquet that are decoded at a time: rows, and bytes of them, about
BUFFER = 1 << 20  # bytes of a Parquet file that are read at a time
# What an error of the system says on a file itself; all others are trouble of the machine.
_OF_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
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
  """The format that the name of a file tells, in upper or lower case; 'text' if none.

  Raises:
    UserError: the name is one of several formats, or of none that can be read.
  """
  name = os.path.basename(path).lower()
  kind = next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), TEXT)
  if kind == TEXT and name.endswith(UNCLEAR):
    raise UserError(
      f'{path}: expected a name that tells the format of its documents; set data.format (of a part of a mixture: its '
      f'format) to one of {", ".join(FORMATS[1:])}, or name the files to read with a glob'
    )
  return kind


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

  Raises:
    UserError: the machine cannot read the file, or a package that it needs is not installed.
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
    yield Document(0, end, problem=unreadable(path, error, f' after row {row:,}' if row else ''))


def file_problem(path):
  """Why a path is not a file to read, or ''; opening a pipe would wait for ever."""
  try:
    return '' if stat.S_ISREG(os.stat(path).st_mode) else 'not a regular file'
  except OSError as error:
    return unreadable(path, error)


def unreadable(path, error, where=''):
  """'unreadable (...)' for an error that a file itself is the reason of.

  Raises:
    UserError: the machine is the reason: a disk that fails, too many open files, a right that is there and not given.
  """
  number, reason = getattr(error, 'errno', None), getattr(error, 'strerror', '') or error
  is_of_file = number is None or number in _OF_FILE
  if number in (errno.EACCES, errno.EPERM):
    with contextlib.suppress(OSError):  # nor can its folder be read
      is_of_file = not os.stat(path).st_mode & stat.S_IROTH
  if not is_of_file:
    raise UserError(f'{path}: cannot be read{where} ({reason}); start again when the machine can read it') from error
  return f'unreadable{where} ({reason})'


def read_text(path):
  """(bytes, '') of a UTF-8 text file, or (b'', what is wrong with it)."""
  try:
    with open(path, 'rb') as file:
      text = file.read()
  except OSError as error:
    return b'', unreadable(path, error)
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
    lines = gzip.GzipFile(fileobj=raw) if path.lower().endswith('.gz') else raw
    for number, line in enumerate(lines, 1):
      if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
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
    return f'no field {field!r}, it has {", ".join(map(repr, list(record)[:5])) or "none"}; data.field names the field'
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
    raise UserError(
      f'{path}: reading Parquet needs the package pyarrow, which is not installed: pip install pyarrow'
    ) from error
  size = os.path.getsize(path)
  try:
    # So the pages of a column are read one after the other, not all of a row group at once.
    with pa.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
      if field not in file.schema_arrow.names:
        names = ', '.join(map(repr, file.schema_arrow.names[:5])) or 'none'
        raise Damaged(f'no column {field!r}, it has {names}; data.field names the column')
      row, rows = 0, max(file.metadata.num_rows, 1)
      for group in range(file.num_row_groups):
        at_once = _rows_at_once(file.metadata.row_group(group), field)
        for batch in file.iter_batches(at_once, row_groups=[group], columns=[field]):
          for value in _column_values(pa, batch.column(0), field):
            row += 1
            yield row, size * row // rows, value
  except pa.ArrowMemoryError as error:
    raise UserError(f'{path}: memory does not hold what is decoded at a time ({error})') from error
  except (pa.ArrowException, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise Damaged(f'not a whole Parquet file ({error})') from error


def _rows_at_once(group, field):
  """How many rows of a row group are decoded at a time, so that they are about ROWS_BYTES at most."""
  chunks = [group.column(i) for i in range(group.num_columns)]
  size = sum(chunk.total_uncompressed_size for chunk in chunks if f'{chunk.path_in_schema}.'.startswith(f'{field}.'))
  return max(1, min(ROWS, ROWS_BYTES * group.num_rows // max(size, 1)))


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
  # uint64 may go beyond int64. A number that is missing becomes one that no vocabulary has.
  item, missing_id = (pa.uint64(), 2**64 - 1) if pa.types.is_uint64(kind.value_type) else (pa.int64(), -1)
  column = column.cast(pa.large_list(item))
  offsets, is_known = column.offsets.to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)
  ids = column.values.fill_null(missing_id).to_numpy()
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
  last = np.concatenate(begun)[1:]
  if len(last) or not row:  # a separator at the end begins no document
    yield row + 1, size, last
