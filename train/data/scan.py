"""A first look through all files of a corpus: which documents there are, which are bad, on which side each stands."""

import array
import dataclasses
import hashlib
import os

import numpy as np

from train.config import DataConfig, UserError
from train.data import corpus, readers

LEFT_OUT = 2  # as a number of a side: a duplicate
MOST_NAMED = 1000  # documents left out that are named one by one; the rest is counted


@dataclasses.dataclass
class LeftOut:
  """Names of documents that were left out, with the reason; the first MOST_NAMED of them, and how many there are."""

  named: dict[str, str] = dataclasses.field(default_factory=dict)
  count: int = 0

  def add(self, name, reason):
    """One more."""
    self.count += 1
    if len(self.named) < MOST_NAMED:
      self.named[name] = reason


@dataclasses.dataclass
class Scan:
  """What a first look through all files has found, one entry for each good document in the order of the files.

  Attributes:
    source: int32, number of its file.
    row: int64, line or row from 1; 0 for a text file.
    size: int64, bytes of text, or number of ids.
    digest: uint64 [N, 2], the first half of the SHA-256 of the content.
    alike: uint64 [N, 2], the same of what sides and duplicates go by, see `alike_digest`.
    side: int8, 0 to train on, 1 held out, 2 left out.
    files: `fingerprint` of each file.
    skipped: bad documents and files.
    duplicates: documents left out since another has the same content.
    highest: the highest id in documents that are ids; -1 if none are.
    has_text: whether some are text.
  """

  source: np.ndarray
  row: np.ndarray
  size: np.ndarray
  digest: np.ndarray
  alike: np.ndarray
  side: np.ndarray
  files: list
  skipped: LeftOut
  duplicates: LeftOut
  highest: int
  has_text: bool


def look(found, config: DataConfig, tokenizer, meter):
  """Looks through all files: which documents there are, which are bad, and on which side each stands.

  Args:
    found: [corpus.Source] of corpus.sources.
    config: held_out_percent, split_seed and bad_files are used.
    tokenizer: of train.data.tokenizers.
    meter: Meter of the bytes of all files.

  Returns:
    Scan.

  Raises:
    UserError: a bad document or file under bad_files='error', text for data.tokenizer='none', too little to split.
  """
  source, row, size = array.array('i'), array.array('q'), array.array('q')
  digests, alike = bytearray(), bytearray()
  files, skipped, highest, has_text, before = [], LeftOut(), -1, False, 0
  for i, item in enumerate(found):
    facts = fingerprint(item.path) if item.kind != readers.TEXT else state(item.path)
    for document in readers.documents(item.path, item.kind, item.field, tokenizer.separator, tokenizer.vocab):
      meter.to(before + document.end)
      if document.problem:
        bad(item, document.row, document.problem, config.bad_files, skipped)
        continue
      if document.text is not None and tokenizer.unit == 'token':
        raise UserError(f"{place(item.path, document.row)}: a text, expected token ids for data.tokenizer='none'")
      digest = content_digest(document)
      digests += digest[:16]
      alike += alike_digest(document, tokenizer)[:16]
      source.append(i)
      row.append(document.row)
      size.append(len(document.text if document.ids is None else document.ids))
      has_text |= document.ids is None
      highest = highest if document.ids is None else max(highest, int(document.ids.max()))
      if item.kind == readers.TEXT:
        facts = [*facts[:2], digest.hex()]
    if not facts[2]:
      facts = fingerprint(item.path)  # of a bad text file
    files.append(facts)
    before += facts[0]
  made = Scan(
    np.array(source, np.int32), np.array(row, np.int64), np.array(size, np.int64),
    np.frombuffer(digests, '<u8').reshape(-1, 2), np.frombuffer(alike, '<u8').reshape(-1, 2),
    np.zeros(len(row), np.int8), files, skipped, LeftOut(), highest, has_text,
  )  # fmt: skip
  _choose_sides(found, made, config)
  _leave_out_duplicates(found, made)
  _check_left(found, made, config)
  return made


def _check_left(found, made, config):
  """UserError if a part has nothing to train on, or no part has anything held out."""
  parts = np.array([item.part for item in found])[made.source]
  for part, (setting, entry) in enumerate(corpus.entries(config)):
    has_train, has_held_out = ((made.side == 0) & (parts == part)).any(), (made.side == 1).any()
    if not (has_train and has_held_out):
      raise UserError(
        f'{setting}={entry.source!r}: no document is left for {corpus.HELD_OUT if has_train else corpus.TRAIN!r} after '
        f'{made.skipped.count} bad ones and {made.duplicates.count} duplicates were left out'
        + ''.join(f'; the first bad one is {name}: {reason}' for name, reason in list(made.skipped.named.items())[:1])
      )


def content_digest(document):
  """32 bytes that tell the content of a readers.Document: the SHA-256 of a text, or of ids as int64."""
  if document.ids is None:
    return hashlib.sha256(document.text).digest()
  return hashlib.sha256(b'ids\0' + document.ids.astype('<i8').tobytes()).digest()


def alike_digest(document, tokenizer):
  """32 bytes that are the same for documents of one text, which stand on one side and are used once: also where one is
  text and the other ids, where white space differs at the ends, or lines end in another way."""
  text = document.text
  if text is None and tokenizer.unit == 'byte':
    text = tokenizer.text_of(document.ids)
  if not text:  # ids without a text, or special tokens only
    return content_digest(document)
  return hashlib.sha256(text.replace(b'\r\n', b'\n').strip()).digest()


def state(path):
  """[size, [mtime_ns, ctime_ns, inode], ''] of a file; size -1 if there is none."""
  try:
    found = os.stat(path)
  except OSError as error:
    readers.unreadable(path, error)
    return [-1, [0, 0, 0], '']
  return [found.st_size, [found.st_mtime_ns, found.st_ctime_ns, found.st_ino], '']


def fingerprint(path):
  """`state` of a file with the SHA-256 of its content in the end, which stays '' if the file cannot be read."""
  found = state(path)
  if not readers.file_problem(path):
    try:
      with open(path, 'rb') as file:
        found[2] = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
      readers.unreadable(path, error)  # the reader says what is wrong
  return found


def place(path, row):
  """'data/more.jsonl:12'; a text file has no rows."""
  return f'{path}:{row}' if row else path


def bad(source, row, problem, bad_files, skipped):
  """Counts a bad document, or raises if bad_files is 'error'."""
  if bad_files == 'error':
    advice = 'remove it, or set data.bad_files=skip to leave such files and documents out'
    raise UserError(f'{place(source.path, row)}: {problem}; {advice}')
  skipped.add(place(source.name, row), problem)


def _choose_sides(found, made, config):
  """Sets the side of each document, before duplicates are looked for."""
  if config.held_out:
    made.side[:] = np.array([item.is_held_out for item in found])[made.source]
    return
  is_text = _is_text(found, made)
  if is_text.any():
    # Once over all parts, which may share packages.
    names = corpus.packages(found)
    sizes: dict[str, int] = {}
    texts = np.flatnonzero(is_text)
    own = [names[i] for i in made.source[texts].tolist()]
    for name, size in zip(own, made.size[texts].tolist(), strict=True):
      sizes[name] = sizes.get(name, 0) + size
    held = corpus.split_packages(sizes, config.held_out_percent, config.split_seed)
    made.side[texts] = [name in held for name in own]
  parts = np.array([item.part for item in found])[made.source]
  for part in np.unique(parts[~is_text]):
    rows = np.flatnonzero(~is_text & (parts == part))
    made.side[rows] = corpus.split_rows(made.alike[rows], config.held_out_percent, config.split_seed)


def _is_text(found, made):
  """bool, whether each document is a text file."""
  return np.array([item.kind == readers.TEXT for item in found])[made.source]


def _same(found, made):
  """uint64 [N, 2] that is equal for the documents of which one is used: those that are alike; text files that are
  alike to no line or row count by all their bytes."""
  order = np.lexsort(made.alike.T)
  alike = made.alike[order]
  group = np.cumsum(np.append(True, (alike[1:] != alike[:-1]).any(axis=1))[: len(order)]) - 1
  has_rows = np.bincount(group, ~_is_text(found, made)[order]) > 0
  same = made.digest.copy()
  same[order[has_rows[group]]] = alike[has_rows[group]]
  return same


def _leave_out_duplicates(found, made):
  """Keeps one document of each content on the held-out side of all parts, or else one on the training side of each
  part, so that no part trains on what another holds out."""
  if not len(made.source):
    return
  part, is_train, same = np.array([item.part for item in found])[made.source], made.side == 0, _same(found, made)
  order = np.lexsort((np.arange(len(part)), part, is_train, same[:, 1], same[:, 0]))
  same, part, is_train = same[order], part[order], is_train[order]
  is_first = np.append(True, (same[1:] != same[:-1]).any(axis=1))
  # Where the first of a content is held out, all others go; else each part keeps its first.
  group = np.cumsum(is_first) - 1
  is_held = ~is_train[is_first][group]
  is_other_part = np.append(True, part[1:] != part[:-1])
  left_out = order[~(is_first | (~is_held & is_other_part))]
  made.side[left_out] = LEFT_OUT
  for i in sorted(left_out):
    made.duplicates.add(place(found[made.source[i]].name, made.row[i]), '')
