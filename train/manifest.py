"""Which files a checkpoint has, with their SHA-256, and what is wrong with one: neither a file system nor Orbax would
say that a bit has flipped.

A manifest is a JSON file {step, files: {path: [bytes, SHA-256]}, sha256}, where `sha256` is that of the rest of it. It
is written after the checkpoint, so a checkpoint with a manifest is a finished one.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import threading

from tqdm import tqdm

from train import workdir as workdirs

THREADS = 8  # that read a checkpoint; SHA-256 of 1 GB takes one about a second
CHUNK = 1 << 20  # bytes read at a time
SHOWN = 3  # files that are named
LEFT = '.nfs'  # how the names begin that NFS gives to files which are deleted while open
PATIENCE = 1.0  # seconds before a progress bar appears


def write(folder, path, step):
  """Writes the manifest of a checkpoint. When it is there, it and all that it names are on the disk.

  Args:
    folder: pathlib.Path of the checkpoint, whose files no longer change.
    path: of the manifest; its folder exists.
    step: of the checkpoint.
  """
  found = _files(folder)
  with _pool(THREADS) as pool:
    digests = pool.map(lambda name: digest(folder / name, is_synced=True), found)
    files = {name: [size, value] for (name, size), value in zip(found.items(), digests, strict=True)}
  for inner in {folder, folder.parent, *((folder / name).parent for name in files)}:
    _sync_folder(inner)
  record = {'step': step, 'files': files}
  workdirs.write_json(path, {**record, 'sha256': workdirs.seal(record)})
  _sync_folder(path.parent)


def problems(folder, path, step, *, items=(), threads=THREADS):
  """What is wrong with a checkpoint: [] if every file is as it was when the manifest was written.

  Args:
    folder: pathlib.Path of the checkpoint.
    path: of its manifest.
    step: of the checkpoint.
    items: folders of the checkpoint to look at, and files beside them; () means all.
    threads: that read files.

  Returns:
    List of 'file: what is wrong', none of which says more than another: missing or further files and other sizes; if
    there are none of these, files with another digest. Or one line on the manifest or the folder itself.
  """
  if not folder.is_dir():
    return ['the folder is missing']
  record = read(path, step)
  if isinstance(record, str):
    return [record]
  is_wanted = lambda name: not items or '/' not in name or name.split('/')[0] in items
  want = {name: values for name, values in record['files'].items() if is_wanted(name)}
  try:
    have = {name: size for name, size in _files(folder).items() if is_wanted(name)}
  except OSError as error:
    return [f'{error.filename}: cannot be read ({error.strerror})']
  found = [f'{name}: missing' for name in want if name not in have]
  found += [f'{name}: is not in the manifest' for name in have if name not in want]
  for name, (size, _) in want.items():
    if name in have and have[name] != size:
      found.append(f'{name}: {have[name]:,} bytes, expected {size:,}' + (', truncated' if have[name] < size else ''))
  return found or _differing(folder, want, f'verifying checkpoint {step}', threads)


def read(path, step):
  """The contents of a manifest, or a string that says what is wrong with it."""
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
    seal = record.pop('sha256')
    files = {str(name): (int(size), str(value)) for name, (size, value) in record['files'].items()}
    if seal != workdirs.seal(record):
      return f'{path}: its own SHA-256 differs'
    if record['step'] != step:
      return f'{path}: it is the manifest of step {record["step"]}, expected {step}'
  except FileNotFoundError:
    return f'{path}: missing'
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    return f'{path}: expected a manifest, cannot read it ({error})'
  return {'step': step, 'files': files}


def summary(found):
  """The list of `problems` in one line."""
  return '; '.join(found[:SHOWN]) + (f' and {len(found) - SHOWN} more files' if len(found) > SHOWN else '')


def digest(path, *, is_synced=False, done=None):
  """SHA-256 of a file in hexadecimal.

  Args:
    path: of the file.
    is_synced: also wait until the disk has it.
    done: called with the bytes of each piece.
  """
  value, buffer = hashlib.sha256(), bytearray(CHUNK)
  view = memoryview(buffer)
  with open(path, 'rb', buffering=0) as file:
    while count := file.readinto(buffer):
      value.update(view[:count])
      if done:
        done(count)
    if is_synced:
      os.fsync(file.fileno())
  return value.hexdigest()


def _differing(folder, want, title, threads):
  """'file: what is wrong' of the files whose digest is not the wanted one, in the order of `want`."""
  lock = threading.Lock()
  total = sum(size for size, _ in want.values())
  with contextlib.ExitStack() as at_end:
    # None switches the bar off where there is no terminal.
    bar = tqdm(total=total, unit='B', unit_scale=True, desc=title, delay=PATIENCE, leave=False, disable=None)
    at_end.callback(bar.close)
    pool = at_end.enter_context(_pool(threads))

    def done(count):
      with lock:
        bar.update(count)

    def wrong(name):
      try:
        is_same = digest(folder / name, done=done) == want[name][1]
      except OSError as error:
        return f'{name}: cannot be read ({error.strerror})'
      return '' if is_same else f'{name}: its SHA-256 differs'

    return [text for text in pool.map(wrong, want) if text]


def _pool(threads):
  return concurrent.futures.ThreadPoolExecutor(min(threads, os.cpu_count() or 1))


def _files(folder):
  """{path within a folder: bytes} of all files, sorted."""
  found = {}
  for parent, _, names in os.walk(folder):
    for name in names:
      if name.startswith(LEFT):
        continue
      path = os.path.join(parent, name)
      found[os.path.relpath(path, folder).replace(os.sep, '/')] = os.lstat(path).st_size
  return dict(sorted(found.items()))


def _sync_folder(folder):
  """Waits until the disk has the names in a folder."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
