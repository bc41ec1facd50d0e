"""The files that a run reads, and which part of them is held out.

Text files are split by top-level package (the first folder or the file below the root), so that a held-out file has no
neighbour among the training files. Lines and rows of other files are split by a hash of their content, so that equal
ones fall on one side.
"""

import dataclasses
import glob
import hashlib
import itertools
import os
import pathlib
import sysconfig

import numpy as np

from train.config import DataConfig, SourceConfig, UserError
from train.data import readers

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


def entries(config: DataConfig):
  """[(name of the setting, SourceConfig)] of the parts of a mixture, or of the one source there is."""
  if config.mixture:
    return [(f'data.mixture[{i}].source', entry) for i, entry in enumerate(config.mixture)]
  return [('data.source', SourceConfig(source=config.source, format=config.format, field=config.field))]


def sources(config: DataConfig):
  """All files of a corpus, by part and name; files of data.held_out stand in the first part, as 'held_out/...'.

  Raises:
    UserError: nothing found, or a path that does not exist.
  """
  found = []
  for part, (setting, entry) in enumerate(entries(config)):
    for name, path in find(entry.source, setting).items():
      found.append(Source(part, name, path, entry.format or readers.format_of(path), entry.field))
  if config.held_out:
    for name, path in find(config.held_out, 'data.held_out').items():
      kind = config.format or readers.format_of(path)
      found.append(Source(0, f'held_out/{name}', path, kind, config.field, is_held_out=True))
  return sorted(found, key=lambda source: (source.part, source.name))


def check_outside(config: DataConfig, workdir):
  """UserError if a folder of text holds that of the run ('' if there is none) or of prepared tokens: what is written
  there would change the text."""
  written = {f'workdir {workdir}': workdir} if workdir else {}
  if config.prepared:
    written[f'data.prepared={config.prepared!r}'] = os.path.expanduser(config.prepared)
  named = [(setting, entry.source) for setting, entry in entries(config)] + [('data.held_out', config.held_out)]
  for setting, source in named:
    for part in _parts(source):
      for what, folder in written.items():
        if os.path.isdir(part) and pathlib.Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(part)):
          raise UserError(f'{what}: expected a folder outside of the text {setting}={part!r}')


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
  prefix = f'{seed}:'.encode()
  key = lambda digest: int.from_bytes(hashlib.sha256(prefix + digest.tobytes()).digest()[:8], 'little')
  keys = np.array([key(digest) for digest in digests], np.uint64)
  distinct = np.unique(keys)
  at_least = min(2 if len(distinct) >= _FEW else 1, len(distinct) - 1)
  threshold = min(np.uint64(int(percent / 100 * 2**64)), distinct[-1])  # what is largest is never held out
  return (keys < threshold) | (keys <= distinct[at_least - 1] if at_least > 0 else False)
