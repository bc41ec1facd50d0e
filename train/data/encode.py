"""A second look through all files of a corpus: each document as token ids, written into the files of a folder.

    PART.SIDE.tokens    the stream: ids, a separator before each document
    PART.SIDE.starts    int64, where in the stream each document's separator stands
    PART.SIDE.bytes     int64, bytes of text of each document (its ids, where no text is known)
    PART.SIDE.sources   int32, number of each document's file
    PART.SIDE.rows      int64, line or row in it, from 1; 0 for a text file

PART counts the parts of a mixture from 0; SIDE is train or held_out.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from typing import Any, NamedTuple

import numpy as np

from train.config import UserError
from train.data import corpus, readers, scan, shards
from train.meter import Meter

VERSION = 2  # of the files
INDEX, LOCK = 'index.json', '.lock'
COLUMNS = ('tokens', 'starts', 'bytes', 'sources', 'rows')
BATCH, MOST = 4 << 20, 16_000  # bytes of text and documents, at most, that are encoded at a time
SHARD = 64 << 20  # bytes of tokens, about, between two commits


class Written(NamedTuple):
  """What `write` has made.

  Attributes:
    hash: of names, contents and sides.
    highest: the highest id; -1 if there is none.
    skipped: bad documents, those of the scan among them.
    shards: of shards.Writer.
  """

  hash: str
  highest: int
  skipped: scan.LeftOut
  shards: list


@contextlib.contextmanager
def locked(folder, say):
  """Context: makes the folder and has it for this process; waits for another that has it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, 'a+', encoding='utf-8')  # noqa: SIM115 - closed below
  except OSError as error:
    raise UserError(f'{folder}: prepared tokens cannot be written there ({error.strerror})') from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      say(f'{folder}: process {file.read().strip() or "unknown"} prepares these tokens; waiting for it')
      fcntl.flock(file, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):  # only told to others; a full disk is found in what follows
      os.ftruncate(file.fileno(), 0)
      os.write(file.fileno(), f'{os.getpid()}\n'.encode())
    yield


def prepare(folder, found, config, tokenizer, settings, say):
  """Reads all sources and writes the files of a folder, the index last."""
  total = sum(max(0, scan.state(source.path)[0]) for source in found)
  with Meter(total, 'looking through the data', say) as meter:
    seen = scan.look(found, config, tokenizer, meter)
  least = 0 if seen.has_text and tokenizer.unit == 'byte' else max(seen.highest, tokenizer.separator) + 1
  dtype = dtype_for(least or tokenizer.vocab)
  try:
    with Meter(total, 'preparing tokens', say) as meter:
      written = write(folder, found, seen, config, tokenizer, dtype, meter, say)
    names = dtypes(len(corpus.entries(config)), dtype)
    index = {
      'settings': settings,
      'hash': written.hash,
      'tokens': shards.digest(written.shards, [name for name in names if name.endswith(('.tokens', '.bytes'))]),
      'vocab': max(tokenizer.least_vocab, written.highest + 1),
      'skipped': written.skipped.named,
      'skipped_count': written.skipped.count,
      'duplicates': list(seen.duplicates.named),
      'duplicate_count': seen.duplicates.count,
      'sources': [[source.part, source.name, source.path, source.kind, *facts]
                  for source, facts in zip(found, seen.files, strict=True)],
      'dtypes': {name: dtype.str for name, dtype in names.items()},
      'shards': [{'ranges': shard['ranges']} for shard in written.shards],
    }  # fmt: skip
    shards.write_sealed(folder / INDEX, index)
    (folder / shards.JOURNAL).unlink()
  except OSError as error:
    free = shutil.disk_usage(folder).free
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(
        f'{folder}: the disk is full ({free:,} bytes free) while {total:,} bytes of data are prepared. What is written '
        'stays: free some space, or name a folder on another disk with data.prepared; the same command goes on'
      ) from error
    raise UserError(f'{folder}: prepared tokens cannot be written there ({error.strerror or error})') from error


def dtype_for(vocab):
  """The type that ids 0 .. vocab - 1 are stored as."""
  return np.dtype('<u2' if vocab <= 2**16 else '<u4')


def dtypes(parts, tokens):
  """{file name: numpy type} of all parts and sides; `tokens` is the type of ids."""
  kinds = [tokens, *(np.dtype(kind) for kind in ('<i8', '<i8', '<i4', '<i8'))]
  columns = list(zip(COLUMNS, kinds, strict=True))
  return {
    f'{part}.{split}.{column}': kind for part in range(parts) for split in corpus.SIDES for column, kind in columns
  }


def write(folder, found, seen, config, tokenizer, dtype, meter, say):
  """Encodes all documents that are left after a scan; goes on behind the last shard that is there.

  Args:
    folder: absolute path, which exists.
    found: [corpus.Source].
    seen: scan.Scan of them.
    config: train.config.DataConfig; bad_files is used.
    tokenizer: of train.data.tokenizers.
    dtype: of ids.
    meter: Meter of the bytes of all files.
    say: called with lines for a person.

  Returns:
    Written.

  Raises:
    UserError: a file has changed since the scan; under bad_files='error', a document that the tokenizer gives no ids
      for, or the separator.
    OSError: the files cannot be written.
  """
  parts = found[-1].part + 1
  writer = shards.Writer(folder, dtypes(parts, dtype), _plan(seen, tokenizer, dtype), say)
  encoder = _Encoder(writer, found, config, tokenizer)
  hashes = [hashlib.sha256() for _ in range(parts)]
  number = -1
  for number, (i, document) in enumerate(_good(found, tokenizer, meter)):
    digest = scan.content_digest(document)[:16]
    if number == len(seen.side) or seen.source[number] != i or seen.digest[number].tobytes() != digest:
      raise _changed(found[i])
    if seen.side[number] == scan.LEFT_OUT:
      continue
    split = corpus.SIDES[seen.side[number]]
    source, size = found[i], seen.size[number]
    hashes[source.part].update(f'{split}\0{scan.place(source.name, document.row)}\0{size}\0'.encode())
    hashes[source.part].update(document.text if source.kind == readers.TEXT else digest)
    encoder.add(number, i, split, document)
  encoder.end(number)
  if number + 1 != len(seen.side):
    raise _changed(found[seen.source[number + 1]])
  for source, facts in zip(found, seen.files, strict=True):
    size, dates, _ = scan.state(source.path)
    if (size, dates[0]) != (facts[0], facts[1][0]):
      raise _changed(source)
  _check_count(folder, seen, encoder, parts)
  digests = [part.hexdigest() for part in hashes]
  joined = digests[0] if parts == 1 else hashlib.sha256(' '.join(digests).encode()).hexdigest()
  encoder.skipped.named = {**seen.skipped.named, **encoder.skipped.named}
  encoder.skipped.count += seen.skipped.count
  return Written(joined, encoder.highest, encoder.skipped, encoder.writer.shards)


def _check_count(folder, seen, encoder, parts):
  """UserError unless the files hold all documents that the scan chose, but those left out while they were encoded."""
  wanted = int((seen.side != scan.LEFT_OUT).sum()) - encoder.skipped.count
  there = sum(encoder.writer.length(f'{part}.{split}.rows') for part in range(parts) for split in corpus.SIDES)
  if there != wanted:
    (folder / shards.JOURNAL).unlink()
    raise UserError(
      f'{folder}: {there:,} documents were written, {wanted:,} are in the text; start again, and all are written anew'
    )


def _good(found, tokenizer, meter):
  """(number of its file, Document) of all documents that are not bad."""
  before = 0
  for i, source in enumerate(found):
    end = 0
    for document in readers.documents(source.path, source.kind, source.field, tokenizer.separator, tokenizer.vocab):
      end = document.end
      meter.to(before + end)
      if not document.problem:
        yield i, document
    before += end


def _plan(seen, tokenizer, dtype):
  """A text that says which documents are encoded, and how."""
  digest = hashlib.sha256(json.dumps([facts[2] for facts in seen.files]).encode())
  for array in (seen.source, seen.row, seen.digest, seen.side):
    digest.update(array.tobytes())
  return f'{digest.hexdigest()} {tokenizer.fingerprint} {tokenizer.separator} {dtype} {BATCH} {MOST} {SHARD}'


def _changed(source):
  return UserError(f'{source.path}: the file has changed while it was read; start again when it does not change')


class _Encoder:
  """Collects documents, encodes many at a time, and commits shards."""

  def __init__(self, writer, found, config, tokenizer):
    self.writer, self._found, self._config, self._tokenizer = writer, found, config, tokenizer
    last: dict[str, Any] = (
      writer.shards[-1] if writer.shards else {'documents': 0, 'highest': -1, 'skipped': {}, 'skipped_count': 0}
    )
    self._done, self.highest = last['documents'], last['highest']
    self.skipped = scan.LeftOut(dict(last['skipped']), last['skipped_count'])
    self._batch, self._size = [], 0

  def add(self, number, i, split, document):
    """Takes a document, unless a shard has it."""
    if number < self._done:
      return
    self._batch.append((i, split, document))
    self._size += len(document.text) if document.ids is None else 8 * len(document.ids)
    if self._size >= BATCH or len(self._batch) >= MOST:
      self._encode()
      if self.writer.pending >= SHARD:
        self._commit(number)

  def end(self, number):
    """Encodes and commits what is left."""
    self._encode()
    if self.writer.pending or not self.writer.shards:
      self._commit(number)

  def _commit(self, number):
    self.writer.commit(documents=number + 1, highest=self.highest, skipped=self.skipped.named,
                       skipped_count=self.skipped.count)  # fmt: skip

  def _encode(self):
    """Turns the batch into ids and adds them to the files."""
    texts = [document.text for _, _, document in self._batch if document.ids is None]
    given = [document.ids for _, _, document in self._batch if document.ids is not None]
    encoded = iter(self._tokenizer.encode_texts(texts) if texts else [])
    counts = iter(self._tokenizer.count_bytes(given) if given else [])
    columns: dict[str, list] = {}
    for i, split, document in self._batch:
      is_text = document.ids is None
      ids, size = (next(encoded), len(document.text)) if is_text else (document.ids, next(counts))
      source, row = self._found[i], document.row
      if is_text and (problem := self._problem(ids)):
        scan.bad(source, row, problem, self._config.bad_files, self.skipped)
        continue
      self.highest = max(self.highest, int(ids.max()))
      columns.setdefault(f'{source.part}.{split}', []).append((ids, size, i, row))
    for name, rows in columns.items():
      self._write(name, rows)
    self._batch, self._size = [], 0

  def _problem(self, ids):
    if not len(ids):
      return 'the tokenizer gives no ids for it'
    separator = self._tokenizer.separator
    if (ids == separator).any():
      return f'it holds the token {separator}, which is data.separator; choose a token that no text holds'
    return ''

  def _write(self, name, rows):
    """Adds documents to the five files of a side."""
    ids, sizes, sources, numbers = zip(*rows, strict=True)
    lengths = np.array([len(part) + 1 for part in ids])
    starts = self.writer.length(f'{name}.tokens') + np.cumsum(lengths) - lengths
    separator = np.array([self._tokenizer.separator])
    pieces = [piece for part in ids for piece in (separator, part)]
    stream = np.concatenate(pieces, dtype=self.writer.dtypes[f'{name}.tokens'], casting='unsafe')
    values = {'tokens': stream, 'starts': starts, 'bytes': sizes, 'sources': sources, 'rows': numbers}
    for column, value in values.items():
      self.writer.add(f'{name}.{column}', value)
