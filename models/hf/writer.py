"""Writes a checkpoint in the safetensors format, one tensor at a time, so that it is there whole or not at all."""

import contextlib
import json
import math
import os
import pathlib

import numpy as np

from models.hf import safetensors

PARTIAL = '.partial'  # ending of files that are being written
_NAMES = {dtype: name for name, dtype in safetensors.DTYPES.items()}
# What makes up a checkpoint, besides the tokenizer.
_OWN = ('model.safetensors', 'model-*-of-*.safetensors', safetensors.INDEX, 'config.json', 'generation_config.json')
_OTHERS = ('pytorch_model*.bin',)


def check(folder, overwrite=False):
  """ValueError if `folder` is not a folder, or holds a checkpoint and overwrite is False; it need not exist."""
  folder = pathlib.Path(folder).expanduser()
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'{folder}: expected a folder, found a file')
  found = sorted(path.name for path in _matching(folder, _OWN + _OTHERS))
  if found and not overwrite:
    raise ValueError(
      f'{folder} holds {", ".join(found[:3])}: expected a folder without a checkpoint, or overwrite=True'
    )


def write(folder, shapes, get, *, max_shard_bytes=5e9, files=None, overwrite=False, obsolete=()):
  """Writes tensors, and small files beside them.

  All is first written under names that end in '.partial', then renamed; model.safetensors, or the index where there are
  several files, comes last. Whoever stops in between leaves a folder that does not open, or, before the renaming, the
  checkpoint that was there before.

  Args:
    folder: path; made if it is missing.
    shapes: {name: array or ShapeDtypeStruct}, in the order of the model.
    get: function of a name that returns its numpy array; called once for each, in the order of the files.
    max_shard_bytes: bytes of tensors in a file, unless one tensor alone is larger.
    files: {name: bytes} of files that belong to the checkpoint, such as config.json.
    overwrite: replace a checkpoint that is there: its tensors, config.json and generation_config.json.
    obsolete: names of further files to remove with them.

  Raises:
    ValueError: `folder` holds a checkpoint and overwrite is False; an argument is not as described.
    OSError: the disk is full, or another fault of the system. What was written is removed, but for a fault while files
      are renamed.
  """
  if not max_shard_bytes > 0:
    raise ValueError(f'max_shard_bytes={max_shard_bytes}: expected a positive number')
  folder = pathlib.Path(folder).expanduser()
  check(folder, overwrite)
  for name, shape in shapes.items():
    if np.dtype(shape.dtype) not in _NAMES or name == '__metadata__':
      raise ValueError(f'tensor {name!r} of dtype {shape.dtype}: expected one of {", ".join(map(str, _NAMES))}')
  shards = _shards(shapes, max_shard_bytes)
  folder.mkdir(parents=True, exist_ok=True)
  for stale in _matching(folder, [name + PARTIAL for name in (*_OWN, *(files or {}))]):
    stale.unlink()
  names = []  # in the order of renaming
  try:
    for name, data in (files or {}).items():
      names.append(name)
      with _new(folder, name) as file:
        file.write(data)
    for name, tensors in shards.items():
      names.append(name)
      with _new(folder, name) as file:
        _write_file(file, {tensor: shapes[tensor] for tensor in tensors}, get)
    if len(shards) > 1:
      names.append(safetensors.INDEX)
      with _new(folder, safetensors.INDEX) as file:
        file.write(_index(shards, shapes))
  except BaseException:
    for name in names:
      (folder / (name + PARTIAL)).unlink(missing_ok=True)
    raise
  _rename(folder, names, obsolete if overwrite else ())


def _rename(folder, names, obsolete):
  # The last name is what opens a checkpoint: an old one goes first, a new one comes last.
  for old in sorted(
    _matching(folder, (*_OWN, *obsolete)), key=lambda path: path.name not in (safetensors.SINGLE, safetensors.INDEX)
  ):
    old.unlink()
  _flush(folder)
  for name in names[:-1]:
    os.replace(folder / (name + PARTIAL), folder / name)
  _flush(folder)
  os.replace(folder / (names[-1] + PARTIAL), folder / names[-1])
  _flush(folder)


@contextlib.contextmanager
def _new(folder, name):
  """A file to be written under a partial name, on the disk when the context ends."""
  with open(folder / (name + PARTIAL), 'wb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())


def _flush(folder):
  """Waits until the names in a folder are on the disk."""
  fd = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def _shards(shapes, max_bytes):
  """{file name: tensor names}; within a file larger items come first, so that each tensor is aligned to its own."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, shape in shapes.items():
    nbytes = _nbytes(shape)
    if shards[-1] and size + nbytes > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += nbytes
  shards = [sorted(names, key=lambda name: -np.dtype(shapes[name].dtype).itemsize) for names in shards]
  if len(shards) == 1:
    return {safetensors.SINGLE: shards[0]}
  return {f'model-{i:05}-of-{len(shards):05}.safetensors': names for i, names in enumerate(shards, 1)}


def _write_file(file, shapes, get):
  entries, end = {}, 0
  for name, shape in shapes.items():
    start, end = end, end + _nbytes(shape)
    entries[name] = {
      'dtype': _NAMES[np.dtype(shape.dtype)],
      'shape': [int(n) for n in shape.shape],
      'data_offsets': [start, end],
    }
  # transformers opens only files that name a framework.
  header = json.dumps({'__metadata__': {'format': 'pt'}, **entries}, separators=(',', ':')).encode()
  header += b' ' * (-len(header) % 8)
  if len(header) > safetensors.MAX_HEADER:
    raise ValueError(f'header of {len(header)} bytes, expected at most {safetensors.MAX_HEADER}: fewer tensors a file')
  file.write(len(header).to_bytes(8, 'little') + header)
  for name, shape in shapes.items():
    array = get(name)
    if array.shape != tuple(shape.shape) or array.dtype != shape.dtype:
      raise ValueError(f'tensor {name!r} is {array.dtype} {array.shape}, expected {shape.dtype} {tuple(shape.shape)}')
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    del array  # before the next one is made


def _index(shards, shapes):
  total = sum(_nbytes(shape) for shape in shapes.values())
  weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
  return json.dumps({'metadata': {'total_size': total}, 'weight_map': weight_map}, indent=2).encode()


def _nbytes(shape):
  return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize


def _matching(folder, patterns):
  return [path for pattern in patterns for path in folder.glob(pattern)] if folder.exists() else []
