"""Text files as one training and one held-out text: finding, checking, splitting, hashing.

A corpus is read whole into memory. It is split by top-level package (the first folder or the file below the root), so
that a held-out file has no neighbour among the training files.
"""

import dataclasses
import glob
import hashlib
import itertools
import os
import pathlib
import stat
import sysconfig

from tqdm import tqdm

from train.config import DataConfig, UserError

TRAIN, HELD_OUT = 'train', 'held_out'
_SKIPPED_FOLDERS = {'site-packages', 'dist-packages', '__pycache__'}
# A held-out package larger than this share of what is asked for would decide the figure alone.
_LARGEST_SHARE = 1 / 3
_FEW_PACKAGES = 8


@dataclasses.dataclass(frozen=True)
class File:
  """One text file: `name` below its root (posix, unique), `package` (first part of the name), bytes, and its side."""

  name: str
  package: str
  text: bytes
  split: str = TRAIN


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Files in the order of their names, what was left out and why, and a hash over names, contents and sides."""

  files: list[File]
  skipped: dict[str, str]
  duplicates: list[str]
  hash: str

  def side(self, split):
    """The files of one side, 'train' or 'held_out'."""
    return [file for file in self.files if file.split == split]

  def size(self, split):
    """Bytes of one side."""
    return sum(len(file.text) for file in self.side(split))

  def record(self):
    """What corpus.json holds: hash, counts, and name, side, bytes and short hash of every file."""
    sides = {}
    for split in (TRAIN, HELD_OUT):
      files = self.side(split)
      packages = {file.package for file in files}
      sides[split] = {'files': len(files), 'packages': len(packages), 'bytes': self.size(split)}
    return {
      'hash': self.hash,
      **sides,
      'held_out_packages': sorted({file.package for file in self.side(HELD_OUT)}),
      'skipped': self.skipped,
      'duplicates': self.duplicates,
      'files': [
        [file.name, file.split, len(file.text), hashlib.sha256(file.text).hexdigest()[:16]] for file in self.files
      ],
    }


def load(config: DataConfig):
  """Reads, checks and splits the corpus that a config names.

  Args:
    config: source, held_out, bad_files, held_out_percent and split_seed are used.

  Returns:
    Corpus.

  Raises:
    UserError: nothing found, a path that does not exist, a bad file under bad_files='error', too little to split.
  """
  skipped: dict[str, str] = {}
  files = _read(find(config.source, 'data.source'), config.bad_files, skipped)
  if config.held_out:
    held = _read(find(config.held_out, 'data.held_out'), config.bad_files, skipped, prefix='held_out/')
    files = files + [dataclasses.replace(file, split=HELD_OUT) for file in held]
  else:
    held_packages = split_packages(files, config.held_out_percent, config.split_seed)
    files = [dataclasses.replace(file, split=HELD_OUT) if file.package in held_packages else file for file in files]
  files, duplicates = _without_duplicates(files)
  for split in (TRAIN, HELD_OUT):
    if not any(file.split == split for file in files):
      raise UserError(
        f'data.source={config.source!r}: no file is left for {split!r} after {len(skipped)} bad files and '
        f'{len(duplicates)} duplicates were left out'
      )
  return Corpus(files, skipped, duplicates, _hash(files))


def check_outside(config: DataConfig, workdir):
  """UserError if a folder of text holds the folder of the run: what a run writes would change its own text."""
  for field in ('source', 'held_out'):
    for part in _parts(getattr(config, field)):
      if os.path.isdir(part) and pathlib.Path(os.path.realpath(workdir)).is_relative_to(os.path.realpath(part)):
        raise UserError(f'workdir {workdir}: expected a folder outside of the text data.{field}={part!r}')


def find(source, field):
  """The files of a source.

  Args:
    source: 'python_stdlib', or paths, folders and globs separated by commas. A folder means all files below it,
      hidden ones excepted.
    field: what the source is called in messages.

  Returns:
    {name: path}, sorted by name. A name is relative to its folder, or to the part of a glob before its first wildcard;
    where two sources have packages of one name, those of the second begin with 'FOLDER:'.

  Raises:
    UserError: a path that does not exist, or nothing found.
  """
  found: dict[str, str] = {}
  tops: dict[str, str] = {}  # the path of each package
  for part in _parts(source):
    if part == 'python_stdlib':
      root = sysconfig.get_paths()['stdlib']
      paths = [path for path in _walk(root) if path.endswith('.py')]
    else:
      root, paths = _expand(part, field)
    if not paths:
      raise UserError(f'{field}={part!r}: expected at least one file, found none')
    # A name on disk need not be UTF-8.
    names = {path: os.fsencode(os.path.relpath(path, root)).decode(errors='backslashreplace') for path in paths}
    own = {name.split('/')[0]: '' for name in names.values()}
    own = {top: os.path.join(os.path.abspath(root), top) for top in own}
    # Two sources with packages of the same name: all names of the second begin with its folder's, so that none of its
    # packages is torn apart.
    label = prefix = ''
    for i in itertools.count(2):
      if all(tops.get(prefix + top, path) == path for top, path in own.items()):
        break
      label = label or os.path.basename(os.path.abspath(root))
      prefix = f'{label}:' if i == 2 else f'{label}{i - 1}:'
    tops |= {prefix + top: path for top, path in own.items()}
    found |= {prefix + name: path for path, name in names.items()}
  if not found:
    raise UserError(f"{field}={source!r}: expected 'python_stdlib' or paths of text files, separated by commas")
  return dict(sorted(found.items()))


def _parts(source):
  """The parts of a source; ~ is the home folder."""
  return [os.path.expanduser(part.strip()) for part in source.split(',') if part.strip()]


def _expand(part, field):
  """(root, paths) of one path, folder or glob."""
  if glob.has_magic(part) and not os.path.exists(part):
    fixed = part[: min(part.index(c) for c in '*?[' if c in part)]
    root = os.path.dirname(fixed) or '.'
    return root, sorted(path for path in glob.glob(part, recursive=True) if not os.path.isdir(path))
  if os.path.isdir(part):
    return part, _walk(part)
  if not os.path.lexists(part):
    raise UserError(f'{field}={part!r}: expected a file, a folder or a glob, found nothing at this path')
  return os.path.dirname(part) or '.', [part]


def _walk(root):
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith('.'))
    paths += [os.path.join(folder, name) for name in sorted(names) if not name.startswith('.')]
  return paths


def _read(found, bad_files, skipped, prefix=''):
  """The files that are text; bad ones raise, or are written into `skipped` with the reason."""
  files = []
  for name, path in tqdm(found.items(), desc='reading text', unit=' files', delay=1.0, leave=False):
    text, problem = read_text(path)
    if problem and bad_files == 'error':
      raise UserError(f'{path}: {problem}; remove it, or set data.bad_files=skip to leave such files out')
    if problem:
      skipped[prefix + name] = problem
    else:
      files.append(File(prefix + name, name.split('/')[0], text))
  return files


def read_text(path):
  """(bytes, '') of a UTF-8 text file, or (b'', what is wrong with it)."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      return b'', 'not a regular file'
    with open(path, 'rb') as file:
      text = file.read()
  except OSError as error:
    return b'', f'unreadable ({error.strerror or error})'
  if not text:
    return b'', 'empty'
  if b'\0' in text:
    return b'', f'binary (NUL byte at {text.index(0)})'
  try:
    text.decode('utf-8')
  except UnicodeDecodeError as error:
    return b'', f'badly encoded (not UTF-8 at byte {error.start})'
  return text, ''


def split_packages(files, percent, seed):
  """Which packages are held out: those that come first in an order given by a hash of the seed and their name.

  Packages are taken until `percent` of all bytes is reached. One that is larger than a third of this, or that would go
  beyond one and a half times of it, is passed over. At least two are taken (one, where there are fewer than 8), the
  smallest if need be.

  Args:
    files: [File].
    percent: share of the bytes to hold out.
    seed: another seed gives another choice.

  Returns:
    Set of package names.

  Raises:
    UserError: fewer than two packages.
  """
  sizes: dict[str, int] = {}
  for file in files:
    sizes[file.package] = sizes.get(file.package, 0) + len(file.text)
  if len(sizes) < 2:
    raise UserError(
      f'data.source: expected at least 2 top-level folders or files, so that some can be held out, found {len(sizes)}; '
      'or name held-out files with data.held_out'
    )
  wanted = sum(sizes.values()) * percent / 100
  order = sorted(sizes, key=lambda package: hashlib.sha256(f'{seed}:{package}'.encode()).digest())
  held: set[str] = set()
  total = 0
  for package in order:
    if total < wanted and sizes[package] <= _LARGEST_SHARE * wanted and total + sizes[package] <= 1.5 * wanted:
      held.add(package)
      total += sizes[package]
  at_least = 2 if len(sizes) >= _FEW_PACKAGES else 1
  for package in sorted(order, key=lambda package: sizes[package]):
    if len(held) < at_least:
      held.add(package)
  return held


def _without_duplicates(files):
  """One file of each content. Held-out copies stay, so that no training text is held out too."""
  seen: set[bytes] = set()
  kept, duplicates = [], []
  for file in sorted(files, key=lambda file: (file.split != HELD_OUT, file.name)):
    digest = hashlib.sha256(file.text).digest()
    if digest in seen:
      duplicates.append(file.name)
    else:
      seen.add(digest)
      kept.append(file)
  return sorted(kept, key=lambda file: file.name), sorted(duplicates)


def _hash(files):
  digest = hashlib.sha256()
  for file in files:
    digest.update(f'{file.split}\0{file.name}\0{len(file.text)}\0'.encode())
    digest.update(file.text)
  return digest.hexdigest()
