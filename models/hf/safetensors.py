"""The safetensors file format: a reader of parts of tensors, and a writer that holds one tensor at a time.

    8 bytes: N, little-endian | N bytes: JSON {name: {dtype, shape, data_offsets}} | the tensors, without gaps

The library of that name has no bfloat16 in its numpy form, and its writer needs the whole model in memory.
Source: the format's description in the repository huggingface/safetensors.
"""

import collections
import concurrent.futures
import json
import math
import os
import pathlib
import stat
import typing

import ml_dtypes
import numpy as np

DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U64': np.dtype(np.uint64),
  'U32': np.dtype(np.uint32),
  'U16': np.dtype(np.uint16),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
MAX_HEADER = 100_000_000  # bytes; the library's limit
_MAX_AXES = 32
_ALIGNMENT = 64  # bytes; an array that begins at a multiple is used by jax on CPU without a copy
_BLOCK = 16 << 20  # bytes read at once
_AHEAD = 256 << 20  # bytes that the system is asked to read before they are needed
_THREADS = 4  # that read a large part: one alone does not keep a fast disk busy


class Tensor(typing.NamedTuple):
  """What a header says of a tensor: its numpy dtype, its shape, and where in the file it begins."""

  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self):
    """Size in bytes."""
    return self.dtype.itemsize * math.prod(self.shape)


def parse_json(data, where):
  """The object in UTF-8 `data`; a ValueError that begins with `where` if it is anything else or repeats a name."""

  def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
      counts = collections.Counter(name for name, _ in pairs)
      raise ValueError(f'the name {counts.most_common(1)[0][0]!r} stands there twice')
    return found

  def constant(name):
    raise ValueError(f'{name} is no JSON number')

  try:
    text = data.decode('utf-8')
    parsed = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    json.dumps(parsed, ensure_ascii=False).encode('utf-8')  # an escaped half of a surrogate pair is no text
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: expected JSON ({str(error)[:200]})') from error
  if not isinstance(parsed, dict):
    raise ValueError(f'{where}: expected a JSON object, got {str(parsed)[:40]!r}')
  return parsed


class File:
  """One file, open for reading. Its header is checked whole before anything else.

  Attributes:
    path: pathlib.Path.
    tensors: {name: Tensor} in the order of their bytes.
    metadata: {str: str} that the header holds besides.

  Raises:
    ValueError: it is not a safetensors file, or its header does not agree with itself or with the file's length.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path).expanduser()
    self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for ever
    self._expected = 0
    try:
      self._stat = os.fstat(self._fd)
      if not stat.S_ISREG(self._stat.st_mode):
        raise ValueError(f'{self.path}: expected a file')
      self.tensors, self.metadata = self._header(self._stat.st_size)
    except BaseException:
      self.close()
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Closes the file; what was read stays."""
    if self._fd >= 0:
      os.close(self._fd)
    self._fd = -1

  def expect(self, start):
    """Asks the system, which may not know how, to read on from byte `start` while the program does other things."""
    stop = min(start + _AHEAD, self._stat.st_size)
    if hasattr(os, 'posix_fadvise') and stop > self._expected:
      begin = max(start, self._expected)
      os.posix_fadvise(self._fd, begin, stop - begin, os.POSIX_FADV_WILLNEED)
      self._expected = stop

  def read(self, name, index=()):
    """A tensor, or the part `tensor[index]` of it, in fresh memory; see `read_parts`."""
    return self.read_parts(name, [index])[0]

  def read_parts(self, name, indexes):
    """Parts of one tensor, each in memory of its own; rows (axis 0) that several parts need are read once.

    Besides the result, no more than 16 MiB is held.

    Args:
      name: of the tensor.
      indexes: list of tuples of slices with positive steps, at most one Ellipsis in each; () is the whole tensor.

    Returns:
      List of numpy arrays, aligned to 64 bytes.

    Raises:
      ValueError: no such tensor, or the file has changed since it was opened.
    """
    if name not in self.tensors:
      raise ValueError(f'{self.path}: no tensor {name!r}')
    tensor = self.tensors[name]
    parts = [index_ranges(index, tensor.shape) for index in indexes]
    # Copied as integers of the same size: numpy copies extension dtypes one by one.
    plain = np.dtype(f'u{tensor.dtype.itemsize}')
    arrays = [_empty([len(r) for r in ranges], plain) for ranges in parts]
    if tensor.shape:
      jobs = list(zip(parts, arrays))
    else:
      jobs = [([range(1)], array.reshape(1)) for array in arrays]
    jobs = [job for job in jobs if job[1].size]
    if jobs:
      self._fill(name, tensor.offset, tensor.shape or (1,), jobs)
    now = os.fstat(self._fd)
    if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
      raise ValueError(f'{self.path}: changed while {name!r} was read, expected a file that nobody writes to')
    return [array.view(tensor.dtype) for array in arrays]

  def _fill(self, name, offset, shape, jobs):
    """Reads into each (ranges, array) of `jobs`, none empty, its part of an array of `shape` at `offset`."""
    is_whole = lambda ranges: ranges[0].step == 1 and all(r == range(n) for r, n in zip(ranges[1:], shape[1:]))
    row = math.prod(shape[1:]) * jobs[0][1].itemsize
    for ranges, array in jobs:
      if is_whole(ranges):
        self._read_into(name, offset + ranges[0].start * row, array.reshape(-1).view(np.uint8))
    jobs = [job for job in jobs if not is_whole(job[0])]
    if row > _BLOCK:
      for i in sorted({i for ranges, _ in jobs for i in ranges[0]}):
        inner = [(ranges[1:], array[ranges[0].index(i)]) for ranges, array in jobs if i in ranges[0]]
        self._fill(name, offset + i * row, shape[1:], inner)
    elif jobs:
      self._fill_rows(name, offset, row, shape, jobs)

  def _fill_rows(self, name, offset, row, shape, jobs):
    """The same, some rows of `row` bytes at a time, from which each job takes what is its own."""
    rows = min(_BLOCK // row, shape[0])
    block = np.empty((rows, *shape[1:]), jobs[0][1].dtype)
    for start in range(0, shape[0], rows):
      wanted = []  # (array to fill, rows and part of them)
      for ranges, array in jobs:
        a, b = (_below(ranges[0], edge) for edge in (start, start + rows))
        if a < b:
          wanted.append((array[a:b], ranges[0][a:b], ranges[1:]))
      if not wanted:
        continue
      low, high = min(r[0] for _, r, _ in wanted), max(r[-1] for _, r, _ in wanted) + 1
      self._read_into(name, offset + low * row, block[: high - low].reshape(-1).view(np.uint8))
      for array, taken, inner in wanted:
        parts = (range(taken[0] - low, taken[-1] - low + 1, taken.step), *inner)
        array[...] = block[tuple(slice(r.start, r.stop, r.step) for r in parts)]

  def _read_into(self, name, offset, out):
    """Fills uint8 `out` from `offset`."""
    view = memoryview(out)

    def read(start):
      stop = min(start + _BLOCK, len(view))
      while start < stop:
        count = os.preadv(self._fd, [view[start:stop]], offset + start)
        if not count:
          raise ValueError(
            f'{self.path}: ends at byte {offset + start} in tensor {name!r}, expected {offset + len(view)} or more'
          )
        start += count

    starts = range(0, len(view), _BLOCK)
    if len(starts) < _THREADS:
      for start in starts:
        read(start)
    else:
      with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(read, starts))

  def _header(self, size):
    where = f'{self.path}: header'
    length = int.from_bytes(os.pread(self._fd, 8, 0), 'little')
    if size < 8 or length > min(MAX_HEADER, size - 8):
      most = max(0, min(MAX_HEADER, size - 8))
      raise ValueError(f'{where} of {length} bytes in a file of {size}, expected at most {most}')
    data = np.empty(length, np.uint8)
    self._read_into('header', 8, data)
    if data[:1].tobytes() != b'{':
      raise ValueError(f"{where} begins with {data[:8].tobytes()!r}, expected '{{'")
    entries = parse_json(data.tobytes(), where)
    metadata = entries.pop('__metadata__', {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
      raise ValueError(f'{where}: __metadata__ is {str(metadata)[:80]}, expected names with texts')
    found = {name: _entry(f'{self.path}: tensor {name!r}', entry) for name, entry in entries.items()}
    tensors, end = {}, 0
    for name, (dtype, shape, start, stop) in sorted(found.items(), key=lambda item: item[1][2:]):
      if start != end:
        raise ValueError(
          f'{self.path}: tensor {name!r} begins at byte {start} of the data, expected {end}, the end of the one before'
        )
      tensors[name], end = Tensor(dtype, shape, 8 + length + start), stop
    if size != 8 + length + end:
      raise ValueError(f'{self.path}: {size} bytes, expected {8 + length + end}: 8, header {length}, tensors {end}')
    return tensors, metadata


def _entry(where, entry):
  """(dtype, shape, start, stop) of one tensor of a header."""
  if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
    raise ValueError(f'{where}: {str(entry)[:80]}, expected dtype, shape and data_offsets')
  dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise ValueError(f'{where}: dtype {str(dtype)[:40]!r}, expected one of {", ".join(DTYPES)}')
  for field, values in (('shape', shape), ('data_offsets', offsets)):
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**63 for n in values):
      raise ValueError(f'{where}: {field} {str(values)[:80]}, expected a list of integers from 0 to 2^63 - 1')
  if len(shape) > _MAX_AXES or len(offsets) != 2:
    raise ValueError(f'{where}: {len(shape)} axes, offsets {offsets[:3]}; expected at most {_MAX_AXES}, and two')
  if math.prod(n for n in shape if n) >= 2**56:  # a size that no file has, even if another axis is 0
    raise ValueError(f'{where}: shape {shape} is too large')
  nbytes = DTYPES[dtype].itemsize * math.prod(shape)
  if offsets[1] - offsets[0] != nbytes:
    raise ValueError(f'{where}: data_offsets {offsets}, expected {nbytes} bytes for {dtype} {shape}')
  return DTYPES[dtype], tuple(shape), *offsets


def _empty(shape, dtype):
  """An uninitialised array whose first byte has an address that jax takes over."""
  nbytes = math.prod(shape) * dtype.itemsize
  data = np.empty(nbytes + _ALIGNMENT, np.uint8)
  skip = -data.ctypes.data % _ALIGNMENT
  return data[skip : skip + nbytes].view(dtype).reshape(shape)


def index_ranges(index, shape):
  """A tuple of slices as one range for each axis."""
  index = index if isinstance(index, tuple) else (index,)
  if Ellipsis in index:
    at = index.index(Ellipsis)
    index = (*index[:at], *[slice(None)] * (len(shape) - len(index) + 1), *index[at + 1 :])
  if len(index) > len(shape) or not all(isinstance(part, slice) and (part.step or 1) > 0 for part in index):
    raise ValueError(f'index={index}: expected at most {len(shape)} slices with positive steps for shape {shape}')
  index += (slice(None),) * (len(shape) - len(index))
  return [range(*part.indices(n)) for part, n in zip(index, shape)]


def _below(numbers, edge):
  """How many of a range's numbers are below `edge`."""
  return len(range(numbers.start, min(numbers.stop, edge), numbers.step))


class Folder:
  """The tensors of a folder: of model.safetensors, or of the files that model.safetensors.index.json names.

  Attributes:
    path: pathlib.Path.
    tensors: {name: Tensor}, in the order of the files and of their bytes.

  Raises:
    ValueError: no such files, an index that disagrees with them, or a damaged file.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path).expanduser()
    self._files: list[File] = []
    try:
      index = self._index()
      for name in sorted(set(index.values())) if index else [SINGLE]:
        self._files.append(File(self.path / name))
      self._owner = {tensor: file for file in self._files for tensor in file.tensors}
      if index:
        self._compare(index)
    except BaseException:
      self.close()
      raise
    self.tensors = {name: file.tensors[name] for name, file in self._owner.items()}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Closes the files; what was read stays."""
    for file in self._files:
      file.close()

  def expect(self, name):
    """Asks the system to read on behind a tensor while the program does other things."""
    tensor = self.tensors[name]
    self._owner[name].expect(tensor.offset + tensor.nbytes)

  def read(self, name, index=()):
    """A tensor, or the part `tensor[index]` of it, in fresh memory; see File.read_parts."""
    return self.read_parts(name, [index])[0]

  def read_parts(self, name, indexes):
    """Parts of one tensor; see File.read_parts."""
    if name not in self._owner:
      raise ValueError(f'{self.path}: no tensor {name!r}')
    return self._owner[name].read_parts(name, indexes)

  def _index(self):
    """{tensor: file name} of the index, or None where there is a single file."""
    if not self.path.is_dir():
      raise ValueError(f'{self.path}: expected a folder')
    path = self.path / INDEX
    if not path.exists():
      if not (self.path / SINGLE).is_file():
        raise ValueError(_nothing(self.path))
      return None
    weight_map = parse_json(path.read_bytes(), path).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(f'{path}: weight_map is {str(weight_map)[:40]}, expected tensors with the names of their files')
    for tensor, name in weight_map.items():
      # A name with a separator could lead out of the folder.
      if not isinstance(name, str) or not name.endswith('.safetensors') or {*'/\\\0'} & {*name}:
        raise ValueError(f'{path}: {tensor!r} lies in {name!r}, expected the plain name of a .safetensors file')
      if not (self.path / name).is_file():
        raise ValueError(f'{path}: {tensor!r} lies in {name!r}, which is missing')
    if (self.path / SINGLE).exists() and SINGLE not in weight_map.values():
      raise ValueError(f'{self.path}: expected {SINGLE} or {INDEX}, found both, which may be two models')
    return weight_map

  def _compare(self, index):
    """ValueError unless the index names each tensor of the files once, where it is."""
    for tensor, name in index.items():
      if tensor not in self._owner or tensor not in next(f for f in self._files if f.path.name == name).tensors:
        raise ValueError(f'{self.path / INDEX}: {tensor!r} lies in {name!r}, which does not have it')
    for file in self._files:
      for tensor in file.tensors:
        if index.get(tensor) != file.path.name:
          raise ValueError(f'{file.path}: tensor {tensor!r} is not in {INDEX} with this file')


def _nothing(folder):
  """Why a folder holds nothing to read."""
  pickled = sorted(p.name for p in folder.iterdir() if p.suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl'))
  if not pickled:
    return f'{folder}: expected {SINGLE} or {INDEX}, found neither'
  return (
    f'{folder}: expected {SINGLE}, found {pickled[0]}: pickled files can run code and are never opened. Where they can '
    'be trusted, transformers converts them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)'
  )
