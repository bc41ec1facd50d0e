"""Prepared tokens: documents as streams of token ids, in memory, or in a folder and mapped from there.

    PREPARED/FINGERPRINT/index.json    what is there, from which files, with the SHA-256 of all of them; written last
    PREPARED/FINGERPRINT/0.train.*     the documents themselves, see train.data.encode

PREPARED is data.prepared, or WORKDIR/data; FINGERPRINT stands for the settings and the tokenizer.
"""

import collections.abc
import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np

from train import workdir as workdirs
from train.config import SEPARATOR, UserError
from train.data import corpus as corpora, encode, readers, scan, shards, tokenizers
from train.data.corpus import HELD_OUT, SIDES, TRAIN
from train.meter import Meter


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Documents as one stream of token ids, in which a separator stands before each.

  Attributes:
    stream: uint16 or uint32 [N] separators and ids, in memory or a map of a file.
    starts: int64 [documents], index in the stream of each document's separator.
    byte_counts: int64 [documents], bytes of text of each document; its number of ids where bits are counted per token.
    names: a sequence of [documents] str, such as 'email/parser.py' and 'more.jsonl:1234' (a line or row from 1).
  """

  stream: np.ndarray
  starts: np.ndarray
  byte_counts: np.ndarray
  names: collections.abc.Sequence[str]

  def __len__(self):
    return len(self.starts)

  def name(self, i):
    """What document i is called in messages."""
    return self.names[i]

  def document(self, i):
    """The ids of document i, without its separator."""
    end = self.starts[i + 1] if i + 1 < len(self.starts) else len(self.stream)
    return self.stream[self.starts[i] + 1 : end]


@dataclasses.dataclass(frozen=True)
class Part:
  """The documents of one source of a mixture: its name, its weight, and both of its sides."""

  name: str
  weight: float
  train: Tokens
  held_out: Tokens


class Names(collections.abc.Sequence):
  """The names of documents, made when they are asked for.

  Attributes:
    files: [str] names of all files of the part, by number.
    sources: int32 [documents], number of each document's file.
    rows: int64 [documents], line or row from 1; 0 for a text file.
  """

  def __init__(self, files, sources, rows):
    self.files, self.sources, self.rows = files, sources, rows

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    return scan.place(self.files[self.sources[i]], int(self.rows[i]))


def in_memory(documents, separator=SEPARATOR):
  """Tokens of a few documents that need no files.

  Args:
    documents: [(name, ids or bytes)].
    separator: id that stands before each.

  Returns:
    Tokens; the bytes of a document given as ids are its number of ids.
  """
  parts = [np.frombuffer(ids, np.uint8) if isinstance(ids, bytes) else np.asarray(ids, int) for _, ids in documents]
  dtype = encode.dtype_for(max([separator, *(int(part.max()) for part in parts if len(part))]) + 1)
  stream = np.concatenate([np.empty(0, dtype), *(np.append(separator, part).astype(dtype) for part in parts)])
  counts = np.array([len(part) for part in parts], np.int64)
  starts = np.cumsum(counts + 1) - counts - 1
  return Tokens(stream, starts, counts, [name for name, _ in documents])


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents of all sources as tokens, and where they are from.

  Attributes:
    hash: of names, contents and sides, and of the tokenizer where it is not bytes.
    unit: what bits are counted per: 'byte', or 'token' where no text is known.
    vocab: one more than the highest id, the separator among them.
    separator: id that stands before each document.
    tokenizer: of train.data.tokenizers.
    parts: [Part], one for each entry of the mixture; one if there is no mixture.
    folder: of the prepared tokens.
    index: contents of the index.
    is_new: whether they were prepared just now, so that nothing else uses them yet.
  """

  hash: str
  unit: str
  vocab: int
  separator: int
  tokenizer: Any
  parts: list[Part]
  folder: Any
  index: dict
  is_new: bool = False

  @property
  def tokens(self):
    """A SHA-256 that stands for the tokens and bytes of all documents, which another version of a tokenizer changes."""
    return self.index['tokens']

  def side(self, split):
    """[Tokens] of one side, 'train' or 'held_out', of all parts."""
    return [getattr(part, split) for part in self.parts]

  def documents(self, split):
    """Number of documents of one side."""
    return sum(map(len, self.side(split)))

  def size(self, split):
    """Bytes of text of one side; tokens where bits are counted per token."""
    return sum(int(tokens.byte_counts.sum()) for tokens in self.side(split))

  def record(self):
    """What corpus.json holds: hashes, counts, what was left out, and name, side, bytes and short hash of every file.

    A text file stands on one side; of a file with documents on both it says 'rows'.
    """
    files, texts = [], {split: self._texts(split) for split in SIDES}
    side_of = {i: split for split in SIDES for i in texts[split]}
    for i, (part, name, _, kind, size, _, digest) in enumerate(self.index['sources']):
      if i in side_of or (digest and kind != readers.TEXT):
        files.append([_label(self.parts, part) + name, side_of.get(i, 'rows'), size, digest[:16]])
    if path := self.tokenizer.path:
      files.append([path, 'tokenizer', os.path.getsize(path), self.tokenizer.fingerprint[:16]])
    sides = {}
    for split in SIDES:
      used = {int(i) for tokens in self.side(split) for i in np.unique(tokens.names.sources)}
      sides[split] = {
        'files': len(used),
        'packages': len(set(texts[split].values())),
        'documents': self.documents(split),
        'tokens': sum(len(tokens.stream) for tokens in self.side(split)),
        'bytes': self.size(split),
      }
    names = ('skipped', 'skipped_count', 'duplicates', 'duplicate_count')
    return {
      'hash': self.hash,
      'tokens': self.tokens,
      'unit': self.unit,
      **sides,
      'held_out_packages': sorted(set(texts[HELD_OUT].values())),
      **{name: self.index[name] for name in names},
      'files': files,
    }

  def _texts(self, split):
    """{number of a text file: package} of one side."""
    sources = self.index['sources']
    used = [int(i) for tokens in self.side(split) for i in np.unique(tokens.names.sources)]
    return {
      i: _label(self.parts, sources[i][0]) + sources[i][1].split('/')[0] for i in used if sources[i][3] == readers.TEXT
    }


def _label(parts, part):
  """What tells names of one part from those of another."""
  return f'[{part}] ' if len(parts) > 1 else ''


def open_or_prepare(config, workdir, *, vocab=0, is_writer=True, say=print):
  """The corpus that a config names, from prepared tokens; they are made if they are not there.

  Args:
    config: train.config.DataConfig.
    workdir: folder of the run; prepared tokens are kept in it unless data.prepared names another.
    vocab: ids that the model has, which those of the corpus must be among; 0 means any.
    is_writer: False for the processes of a run that leave all this to another, and only open what it has made.
    say: called with lines for a person.

  Returns:
    Corpus.

  Raises:
    UserError: a setting that does not fit; text that is bad or has changed since it was prepared; prepared tokens that
      are damaged; a folder that cannot be written to or a full disk.
  """
  tokenizer = tokenizers.load(config)
  if vocab:
    tokenizers.check_vocab(tokenizer.least_vocab, vocab, f'data.tokenizer={config.tokenizer!r}')
  settings = _settings(config, tokenizer)
  folder = place(config, workdir) / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
  if is_writer:
    found, is_new = corpora.sources(config), False
    if not (folder / encode.INDEX).exists():
      _check_begun(config, workdir, found)
      with encode.locked(folder, say):
        if not (folder / encode.INDEX).exists():  # another process may have made it meanwhile
          encode.prepare(folder, found, config, tokenizer, settings, say)
          is_new = True
    if not is_new:
      _check_sources(folder, _index(folder), found)
  index = _index(folder)
  names = list(index['dtypes'])
  _with_advice(folder, lambda: shards.check_sizes(folder, index['shards'], names))
  if is_writer and not is_new:
    with Meter(shards.total(index['shards'], names), 'checking prepared tokens', say) as meter:
      _with_advice(folder, lambda: shards.verify(folder, index['shards'], names, meter.to))
  found_corpus = _opened(folder, index, config, tokenizer, is_writer and is_new)
  if vocab:
    check_vocab(found_corpus, vocab)
  return found_corpus


def place(config, workdir):
  """The folder of prepared tokens of any settings."""
  return workdirs.expand(config.prepared) if config.prepared else workdirs.expand(workdir) / workdirs.DATA


def check_vocab(corpus, vocab):
  """UserError if a model of `vocab` ids is too small for a corpus."""
  tokenizers.check_vocab(corpus.vocab, vocab, 'the prepared tokens')


def texts(config, corpus, split):
  """(name, bytes) of each document of one side, read from its file again: tokens do not tell every text.

  Args:
    config: train.config.DataConfig of the corpus.
    corpus: Corpus.
    split: 'train' or 'held_out'.

  Raises:
    UserError: the documents are token ids without a tokenizer; nothing knows their text.
  """
  if corpus.unit == 'token':
    raise UserError("data.tokenizer='none': expected documents with a text, these are token ids")
  wanted = [set(zip(tokens.names.sources.tolist(), tokens.names.rows.tolist(), strict=True))
            for tokens in corpus.side(split)]  # fmt: skip
  for i, source in enumerate(corpora.sources(config)):
    if not any(file == i for file, _ in wanted[source.part]):
      continue
    for item in readers.documents(source.path, source.kind, source.field, corpus.separator, corpus.tokenizer.vocab):
      if (i, item.row) in wanted[source.part]:
        text = corpus.tokenizer.decode(item.ids).encode() if item.ids is not None else item.text
        yield _label(corpus.parts, source.part) + scan.place(source.name, item.row), text


def _settings(config, tokenizer):
  """All that decides what is prepared, as plain values."""
  return {
    'version': encode.VERSION,
    'sources': [[corpora.absolute(entry.source), entry.format, entry.field] for _, entry in corpora.entries(config)],
    'held_out': [corpora.absolute(config.held_out), config.format, config.field] if config.held_out else [],
    'held_out_percent': config.held_out_percent,
    'split_seed': config.split_seed,
    'bad_files': config.bad_files,
    'tokenizer': tokenizer.fingerprint,
    'separator': tokenizer.separator,
  }


def _index(folder):
  """The contents of the index of a folder."""
  path = folder / encode.INDEX
  if not path.exists():
    raise UserError(f'{folder}: expected prepared tokens, found none')
  return _with_advice(folder, lambda: shards.read_sealed(path))


def _with_advice(folder, check):
  """The result of a check; an error also says what to do."""
  try:
    return check()
  except UserError as error:
    raise UserError(f'{error}. Remove {folder}, and its tokens are prepared again') from error


def _check_sources(folder, index, found):
  """UserError if a file has changed, has gone or has been added since the tokens were prepared."""
  now = {(source.part, source.name): source for source in found}
  before = {(part, name): facts for part, name, _, _, *facts in index['sources']}
  different = []
  for part, name in sorted({*now, *before}):
    if (part, name) not in now:
      different.append(f'{name} (gone)')
    elif (part, name) not in before:
      different.append(f'{name} (new)')
    else:
      path, facts = now[part, name].path, before[part, name]
      # What could not be read then may be readable now, with all dates as they were.
      is_other = not facts[2] or scan.state(path)[:2] != facts[:2]
      if is_other and scan.fingerprint(path)[2] != facts[2]:
        different.append(f'{name} (gone)' if scan.state(path)[0] < 0 else name)
  if different:
    shown = ', '.join(different[:5]) + (f' and {len(different) - 5} more' if len(different) > 5 else '')
    raise UserError(
      f'{folder}: the text has changed since its tokens were prepared: {shown}. Going on would mix two corpora: '
      'restore the files, and the same command goes on; or, for a new run on what is there now, remove '
      f'{folder} or set another data.prepared'
    )


def _check_begun(config, workdir, found):
  """UserError if a file that a run in `workdir` began with is gone or another one: before its text is prepared anew."""
  path = workdirs.expand(workdir) / workdirs.CORPUS if str(workdir) else None
  if path is None or not path.exists():
    return
  now = {_label(corpora.entries(config), source.part) + source.name: source.path for source in found}
  different = []
  for name, side, size, digest in workdirs.read_json(path, ('files',))['files']:
    if side != 'tokenizer' and name not in now:
      different.append(f'{name} (gone)')
    elif side != 'tokenizer' and (scan.state(now[name])[0] != size or scan.fingerprint(now[name])[2][:16] != digest):
      different.append(name)
  if different:
    raise workdirs.other_text(path.parent, different)


def _opened(folder, index, config, tokenizer, is_new):
  """The Corpus of a folder."""
  files = [name for _, name, *_ in index['sources']]
  parts = []
  for part, (_, entry) in enumerate(corpora.entries(config)):
    sides = {}
    for split in SIDES:
      names = [f'{part}.{split}.{column}' for column in encode.COLUMNS]
      stream, *columns = [shards.mapped(folder, name, index['dtypes'][name]) for name in names]
      starts, byte_counts, sources, rows = columns
      sides[split] = Tokens(stream, starts, byte_counts, Names(files, sources, rows))
    parts.append(Part(entry.source, entry.weight, sides[TRAIN], sides[HELD_OUT]))
  is_bytes = tokenizer.fingerprint == 'bytes'
  text = f'{index["hash"]} {tokenizer.fingerprint} {tokenizer.separator}'
  hash = index['hash'] if is_bytes else hashlib.sha256(text.encode()).hexdigest()
  return Corpus(hash, tokenizer.unit, index['vocab'], tokenizer.separator, tokenizer, parts, folder, index,
                is_new)  # fmt: skip
