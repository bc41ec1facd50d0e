"""The files that a run reads, and which part of them is held out.

Text files are split by top-level package (the first folder or the file below the root), so that a held-out file has no
neighbour among the training files. Lines and rows of other files are split by a hash of their content, so that equal
ones fall on one side.
"""

import dataclasses
import fnmatch
import functools
import glob
import hashlib
import itertools
import os
import pathlib
import sysconfig

import numpy as np

from train.config import DataConfig, SourceConfig, UserError
from train.data import readers
from train.workdir import DATA

TRAIN, HELD_OUT = SIDES = 'train', 'held_out'
_SKIPPED_FOLDERS = {'site-packages', 'dist-packages', '__pycache__'}
# A held-out package larger than this share of what is asked for would decide the figure alone.
_LARGEST_SHARE = 1 / 3
_FEW = 8  # packages or documents, below which one held out is enough


@dataclasses.dataclass(frozen=True)
class Source:
  """One file of a corpus: number of its part, name (posix, unique in the part), path, format, and field of a text."""

  part: int
  name: str
  path: str
  kind: str
  field: str
  is_held_out: bool = False  # named by data.held_out

  @property
  def package(self):
    """The first part of its name."""
    return self.name.split('/')[0]

  @property
  def top(self):
    """The path of its package."""
    path = os.path.abspath(self.path)
    for _ in range(self.name.count('/')):
      path = os.path.dirname(path)
    return path


def entries(config: DataConfig):
  """[(name of the setting, SourceConfig)] of the parts of a mixture, or of the one source there is."""
  if config.mixture:
    return [(f'data.mixture[{i}].source', entry) for i, entry in enumerate(config.mixture)]
  return [('data.source', SourceConfig(source=config.source, format=config.format, field=config.field))]


def sources(config: DataConfig):
  """All files of a corpus, by part and name; files of data.held_out stand in the first part, as 'held_out/...'
  ('held_out:/...' where that is a package of the first part).

  Raises:
    UserError: nothing found, a path that does not exist, a name that does not tell the format.
  """
  found = []
  for part, (setting, entry) in enumerate(entries(config)):
    for name, path in find(entry.source, setting).items():
      found.append(Source(part, name, path, entry.format or readers.format_of(path), entry.field))
  if config.held_out:
    label, taken = HELD_OUT, {source.package for source in found if source.part == 0}
    while label in taken:
      label += ':'
    for name, path in find(config.held_out, 'data.held_out').items():
      kind = config.format or readers.format_of(path)
      found.append(Source(0, f'{label}/{name}', path, kind, config.field, is_held_out=True))
  return sorted(found, key=lambda source: (source.part, source.name))


def packages(found):
  """What text files are split by: the name of each Source's package, the same in all parts that read of it.

  A package that lies within one of another part counts as that. Names do not tell where the packages are.
  """
  real = functools.cache(os.path.realpath)
  tops = [real(source.top) for source in found]
  own, taken = set(tops), set()
  names: dict[str, str] = {}

  @functools.cache
  def outermost(top):
    return next((str(path) for path in reversed(pathlib.Path(top).parents) if str(path) in own), top)

  for source, top in zip(found, tops, strict=True):
    if top == outermost(top) and top not in names:
      names[top] = f'[{source.part}] {source.package}' if source.package in taken else source.package
      taken.add(source.package)
  return [names[outermost(top)] for top in tops]


def check_outside(config: DataConfig, workdir):
  """UserError if files of the text can stand in the folder of the run ('' if there is none) or of prepared tokens: what
  is written there would change the text."""
  written = {f'workdir {workdir}': [workdir, os.path.join(workdir, DATA)]} if workdir else {}
  if config.prepared:
    written[f'data.prepared={config.prepared!r}'] = [os.path.expanduser(config.prepared)]
  named = [(setting, entry.source) for setting, entry in entries(config)] + [('data.held_out', config.held_out)]
  for setting, source in named:
    for part in _parts(source):
      for what, folders in written.items():
        if any(_can_hold(part, pathlib.Path(os.path.realpath(folder))) for folder in folders):
          raise UserError(f'{what}: expected a folder outside of the text {setting}={part!r}')


def _can_hold(part, folder):
  """Whether a folder or glob of text has files below a folder."""
  if os.path.isdir(part):
    return folder.is_relative_to(os.path.realpath(part))
  if not _is_glob(part):
    return False
  root = os.path.realpath(_root(part))
  pattern = os.path.relpath(os.path.abspath(part), os.path.abspath(_root(part)))
  return _reaches([*pathlib.Path(root).parts, *pathlib.Path(pattern).parts], folder.parts)


def _reaches(pattern, folder):
  """Whether the parts of a glob match a path below the one of these parts."""
  if not pattern or not folder:
    return bool(pattern)
  if pattern[0] == '**':
    return _reaches(pattern[1:], folder) or _reaches(pattern, folder[1:])
  is_same = pattern[0] == folder[0] or fnmatch.fnmatchcase(folder[0], pattern[0])
  return is_same and _reaches(pattern[1:], folder[1:])


def find(source, field):
  """The files of a source.

  Args:
    source: 'python_stdlib', or paths, folders and globs separated by commas. A folder means all files below it, also
      those that links to folders lead to, but none that is hidden or below __pycache__, site-packages, dist-packages
      or a hidden folder. A file that is reached twice counts once.
    field: what the source is called in messages.

  Returns:
    {name: path}, sorted by name. A name is relative to its folder, or to the part of a glob before its first wildcard;
    where two sources have packages of one name, those of the second begin with 'FOLDER:'.

  Raises:
    UserError: a path that does not exist, a folder that cannot be listed, or nothing found.
  """
  found: dict[str, str] = {}
  taken: set[str] = set()  # paths of all files found
  tops: dict[str, str] = {}  # the path of each package
  expanded = [_expand(part, field) for part in _parts(source)]
  # A folder comes before those within it, so that its packages stay whole.
  for root, paths in sorted(expanded, key=lambda item: os.path.abspath(item[0]).count('/')):
    paths = [path for path in paths if os.path.abspath(path) not in taken]
    taken |= {os.path.abspath(path) for path in paths}
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
    raise UserError(f"{field}={source!r}: expected 'python_stdlib' or paths of files, separated by commas")
  return dict(sorted(found.items()))


def absolute(source):
  """A source with the paths that it means from any folder."""
  stdlib = sysconfig.get_paths()['stdlib']
  return ','.join(stdlib + '/**/*.py' if part == 'python_stdlib' else os.path.abspath(part) for part in _parts(source))


def _parts(source):
  """The parts of a source; ~ is the home folder."""
  return [os.path.expanduser(part.strip()) for part in source.split(',') if part.strip()]


def _expand(part, field):
  """(root, paths) of 'python_stdlib', or of one path, folder or glob."""
  if part == 'python_stdlib':
    root = sysconfig.get_paths()['stdlib']
    paths = [path for path in _walk(root, field, is_followed=False) if path.endswith('.py')]
  elif _is_glob(part):
    root, paths = _root(part), sorted(path for path in glob.glob(part, recursive=True) if not os.path.isdir(path))
  elif os.path.isdir(part):
    root, paths = part, _walk(part, field)
  elif os.path.lexists(part):
    root, paths = os.path.dirname(part) or '.', [part]
  else:
    raise UserError(f'{field}={part!r}: expected a file, a folder or a glob, found nothing at this path')
  if not paths:
    raise UserError(f'{field}={part!r}: expected at least one file, found none')
  return root, paths


def _is_glob(part):
  return glob.has_magic(part) and not os.path.exists(part)


def _root(part):
  """The folder that a glob begins with."""
  return os.path.dirname(part[: min(part.index(c) for c in '*?[' if c in part)]) or '.'


def _walk(root, field, is_followed=True):
  """Paths of all files below a folder."""

  def fail(error):
    raise UserError(f'{field}={root!r}: the folder {error.filename} cannot be listed ({error.strerror})')

  paths, seen = [], set()
  for folder, folders, names in os.walk(root, onerror=fail, followlinks=is_followed):
    real = os.path.realpath(folder)
    if real in seen:  # links may lead in circles
      folders.clear()
      continue
    seen.add(real)
    folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith('.'))
    paths += [os.path.join(folder, name) for name in sorted(names) if not name.startswith('.')]
  return paths


def split_packages(sizes, percent, seed):
  """Which packages are held out: those that come first in an order given by a hash of the seed and their name.

  Packages are taken until `percent` of all bytes is reached. One that is larger than a third of this, or that would go
  beyond one and a half times of it, is passed over. At least two are taken (one, where there are fewer than 8), the
  smallest if need be.

  Args:
    sizes: {package: bytes}.
    percent: share of the bytes to hold out.
    seed: another seed gives another choice.

  Returns:
    Set of package names.

  Raises:
    UserError: fewer than two packages.
  """
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
  at_least = 2 if len(sizes) >= _FEW else 1
  for package in sorted(order, key=lambda package: sizes[package]):
    if len(held) < at_least:
      held.add(package)
  return held


def split_rows(digests, percent, seed):
  """Whether each row is held out: a share of all contents, chosen by a hash of the seed and the content.

  At least two contents are held out (one, where there are fewer than 8), but never all.

  Args:
    digests: uint64 [N, 2] of the contents.
    percent: share of the contents to hold out, about.
    seed: another seed gives another choice.

  Returns:
    bool [N].
  """
  # The digests are of SHA-256 already: the seed only has to give another order, by the mixing of SplitMix64.
  salts = np.frombuffer(hashlib.sha256(f'{seed}:'.encode()).digest()[:16], '<u8')
  keys = _mixed(_mixed(digests[:, 0] ^ salts[0]) ^ digests[:, 1] ^ salts[1])
  distinct = np.unique(keys)
  at_least = min(2 if len(distinct) >= _FEW else 1, len(distinct) - 1)
  threshold = min(np.uint64(int(percent / 100 * 2**64)), distinct[-1])  # what is largest is never held out
  return (keys < threshold) | (keys <= distinct[at_least - 1] if at_least > 0 else False)


def _mixed(keys):
  """uint64 [N] in which each bit depends on all bits of the one given.

  Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators (the variant 13 of its finalizer).
  """
  keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return keys ^ (keys >> np.uint64(31))
