"""Growing arrays in the files of a folder, written shard by shard, and their SHA-256.

A shard is what has been added to all files between two commits. A commit brings it on disk, then adds a line to
journal.jsonl, so that work that was killed goes on behind the last commit; what a file holds beyond it is cut off.
Each line has a SHA-256 of itself and of the lines before it.
"""

import hashlib
import json
import os

import numpy as np

from train import workdir as workdirs
from train.config import UserError

JOURNAL = 'journal.jsonl'
CHUNK = 1 << 22


class Writer:
  """Appends to the files of a folder.

  Args:
    folder: absolute path, which exists.
    dtypes: {file name: numpy type}.
    plan: text that says what is written; what was begun with another plan is thrown away.
    say: called with a line for a person, if what was begun is damaged.

  Attributes:
    dtypes: as given.
    shards: committed so far, as `verify` takes them: {'ranges': {file name: [bytes of the file after it, SHA-256]}, and
      the values given to `commit`}.
    pending: bytes added since the last commit.
  """

  def __init__(self, folder, dtypes, plan, say=print):
    self.folder, self.dtypes, self.pending = folder, dtypes, 0
    self.shards: list[dict] = []
    self._added: dict[str, list] = {name: [] for name in dtypes}
    self._journal = _Journal(folder / JOURNAL)
    try:
      begun, *done = self._journal.read() or [{}]
      if begun == {'plan': plan}:
        verify(folder, done, list(dtypes))
        self.shards = done
    except UserError as error:
      say(f'{error}. Nothing of it has been used yet: it is written again from the start')
    if not self.shards:
      self._journal.begin({'plan': plan})
    for name in dtypes:
      with open(folder / name, 'ab') as file:
        file.truncate(self._size(name))

  def length(self, name):
    """Entries of a file, those not committed yet among them."""
    return self._size(name) // self.dtypes[name].itemsize + sum(map(len, self._added[name]))

  def add(self, name, values):
    """Appends an array to a file."""
    values = np.ascontiguousarray(values, self.dtypes[name])
    self._added[name].append(values)
    self.pending += values.nbytes

  def commit(self, **values):
    """Ends a shard. It is on disk when this returns."""
    ranges = {}
    for name, added in self._added.items():
      digest, size = hashlib.sha256(), self._size(name)
      with open(self.folder / name, 'ab') as file:
        for part in added:
          digest.update(part.data)
          size += file.write(part.data)
        file.flush()
        os.fsync(file.fileno())
      ranges[name] = [size, digest.hexdigest()]
    self.shards.append({'ranges': ranges, **values})
    self._added, self.pending = {name: [] for name in self.dtypes}, 0
    self._journal.add(self.shards[-1])

  def _size(self, name):
    return self.shards[-1]['ranges'][name][0] if self.shards else 0


class _Journal:
  """Lines of JSON in a file that grows, each with the SHA-256 of the one before it and its own values."""

  def __init__(self, path):
    self.path, self._last = path, ''

  def read(self):
    """The values of all lines. A last line without an end was being written when the process was killed: it is cut off.

    Raises:
      UserError: another line is not what was written.
    """
    if not self.path.exists():
      return []
    lines = self.path.read_bytes().split(b'\n')
    found: list[dict] = []
    for line in lines[:-1]:
      try:
        record = json.loads(line)
        values, seal = record['values'], record['sha256']
      except (ValueError, TypeError, KeyError, RecursionError):
        values = seal = None
      if seal is None or seal != workdirs.seal([self._last, values]):
        raise UserError(f'{self.path}: damaged, line {len(found) + 1} is not what was written')
      found.append(values)
      self._last = seal
    if lines[-1]:
      os.truncate(self.path, sum(len(line) + 1 for line in lines[:-1]))
    return found

  def begin(self, values):
    """Throws all lines away, and writes the first."""
    self._last = ''
    self._write(values, 'wb')

  def add(self, values):
    """Adds a line. It is on disk when this returns."""
    self._write(values, 'ab')

  def _write(self, values, mode):
    self._last = workdirs.seal([self._last, values])
    with open(self.path, mode) as file:
      file.write(json.dumps({'sha256': self._last, 'values': values}).encode() + b'\n')
      file.flush()
      os.fsync(file.fileno())


def write_sealed(path, values):
  """Writes a JSON file that tells when it is damaged."""
  workdirs.write_json(path, {'sha256': workdirs.seal(values), 'values': values})


def read_sealed(path):
  """The values that `write_sealed` wrote; UserError if the file is damaged."""
  found = workdirs.read_json(path)
  if not isinstance(found, dict) or 'values' not in found or found.get('sha256') != workdirs.seal(found['values']):
    raise UserError(f'{path}: damaged, it is not what was written')
  return found['values']


def digest(shards, names):
  """A SHA-256 that stands for the contents of some files."""
  return workdirs.seal([[name, shard['ranges'][name]] for name in names for shard in shards])


def total(shards, names):
  """Bytes of some files."""
  return sum(shards[-1]['ranges'][name][0] for name in names) if shards else 0


def verify(folder, shards, names, done=lambda count: None):
  """Compares files with their SHA-256.

  Args:
    folder: absolute path.
    shards: of a Writer.
    names: of the files to look at. Those may be longer than the shards say only while they are written.
    done: called with the bytes read so far.

  Raises:
    UserError: a file is missing, too short, or not what was written; it is named.
  """
  count = 0
  for name in names:
    start = 0
    try:
      with open(folder / name, 'rb') as file:
        for shard in shards:
          end, wanted = shard['ranges'][name]
          digest = hashlib.sha256()
          for at in range(start, end, CHUNK):
            chunk = file.read(min(CHUNK, end - at))
            digest.update(chunk)
            count += len(chunk)
            done(count)
          if digest.hexdigest() != wanted:
            raise UserError(f'{folder / name}: damaged, bytes {start:,} to {end:,} are not what was written')
          start = end
    except OSError as error:
      raise UserError(f'{folder / name}: damaged, it cannot be read ({error.strerror or error})') from error


def check_sizes(folder, shards, names):
  """UserError if a file is missing or of another length than was written."""
  for name in names:
    wanted = total(shards, [name])
    size = os.path.getsize(folder / name) if (folder / name).is_file() else -1
    if size != wanted:
      found = 'it is missing' if size < 0 else f'it has {size:,} bytes, {wanted:,} were written'
      raise UserError(f'{folder / name}: damaged, {found}')


def mapped(folder, name, dtype):
  """The array in a file, not read until it is used."""
  path = folder / name
  return np.memmap(path, dtype, mode='r') if os.path.getsize(path) else np.empty(0, dtype)
