"""models.hf.safetensors and writer against the safetensors library, and against damaged files."""

import json
import os
import pathlib
import tempfile

import hypothesis
import numpy as np
import pytest
import safetensors as library
import safetensors.numpy
from hypothesis import strategies as st

from models.hf import safetensors, writer

PLAIN = [name for name in safetensors.DTYPES if name not in ('BF16', 'F8_E4M3', 'F8_E5M2')]
SHAPES = [(), (3,), (2, 5), (0, 4), (3, 2, 7)]


def random(name, shape, seed=0):
  """An array of a dtype of the format with any bits, NaN and denormals among them."""
  dtype = safetensors.DTYPES[name]
  rng = np.random.default_rng(seed)
  if name == 'BOOL':
    return rng.integers(0, 2, shape).astype(bool)
  return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def every_dtype():
  """{name: array} with all dtypes and shapes."""
  names = [(name, shape) for name in safetensors.DTYPES for shape in SHAPES]
  return {f'{name}.{i}': random(name, shape, i) for i, (name, shape) in enumerate(names)}


def written(folder, arrays, **options):
  writer.write(folder, arrays, arrays.__getitem__, **options)
  return folder


def file_of(header, data=b'', length=None):
  """The bytes of a file with this header (an object, or bytes)."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(text) if length is None else length).to_bytes(8, 'little') + text + data


def of_library(data):
  """{name: (dtype, shape, bytes)} as the library has it."""
  return {name: (x['dtype'], tuple(x['shape']), bytes(x['data'])) for name, x in library.deserialize(data)}


def of_ours(path):
  names = {dtype: name for name, dtype in safetensors.DTYPES.items()}
  with safetensors.File(path) as file:
    return {name: (names[x.dtype], x.shape, file.read(name).tobytes()) for name, x in file.tensors.items()}


def test_reads_what_the_library_wrote(tmp_path):
  arrays = {name: x for name, x in every_dtype().items() if name.split('.')[0] in PLAIN}
  safetensors_file = tmp_path / 'x.safetensors'
  library.numpy.save_file(arrays, safetensors_file, metadata={'format': 'pt'})
  with safetensors.File(safetensors_file) as file:
    assert file.metadata == {'format': 'pt'}
    assert set(file.tensors) == set(arrays)
    for name, x in arrays.items():
      got = file.read(name)
      assert (got.dtype, got.shape) == (x.dtype, x.shape)
      assert got.tobytes() == x.tobytes()
      assert got.flags.writeable and (got.ctypes.data % 64 == 0 or not got.size)


@pytest.mark.parametrize('max_shard_bytes', [1e9, 100])
def test_library_reads_what_the_writer_wrote(tmp_path, max_shard_bytes):
  arrays = every_dtype()
  written(tmp_path, arrays, max_shard_bytes=max_shard_bytes)
  found = {}
  for path in tmp_path.glob('*.safetensors'):
    data = path.read_bytes()
    assert int.from_bytes(data[:8], 'little') % 8 == 0
    one = of_library(data)
    assert sum(len(x) for *_, x in one.values()) <= max_shard_bytes or len(one) == 1
    found |= one
    with safetensors.File(path) as file:  # each tensor begins at a multiple of its own item
      assert all(x.offset % x.dtype.itemsize == 0 for x in file.tensors.values())
  assert found == {name: (name.split('.')[0], x.shape, x.tobytes()) for name, x in arrays.items()}
  with safetensors.Folder(tmp_path) as folder:
    assert {name: (x.dtype, x.shape) for name, x in folder.tensors.items()} == {
      name: (x.dtype, x.shape) for name, x in arrays.items()
    }
    for name, x in arrays.items():
      assert folder.read(name).tobytes() == x.tobytes()


slices = st.builds(slice, *[st.none() | st.integers(-12, 12)] * 2, st.none() | st.integers(1, 4))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.data())
def test_parts_equal_numpy(data):
  shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
  name = data.draw(st.sampled_from(['F32', 'BF16', 'U8']))
  index = st.lists(slices, max_size=len(shape)).map(tuple)
  indexes = data.draw(st.lists(index | index.map(lambda i: (..., *i)), min_size=1, max_size=3))
  arrays = {'a': random('U8', (3,)), 'x': random(name, shape, 1)}
  block = data.draw(st.sampled_from([8, 32, 1000]))
  with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    written(folder, arrays)
    patch.setattr(safetensors, '_BLOCK', block)
    with safetensors.Folder(folder) as tensors:
      for i, got in zip(indexes, tensors.read_parts('x', indexes)):
        want = arrays['x'][i]
        assert got.shape == want.shape and got.flags.c_contiguous
        assert got.tobytes() == want.tobytes()


def test_reads_only_what_is_asked_for(tmp_path, monkeypatch):
  written(tmp_path, {'x': np.arange(1000, dtype=np.float32).reshape(100, 10)})
  with safetensors.Folder(tmp_path) as tensors:
    read = []
    monkeypatch.setattr(os, 'preadv', lambda fd, to, at, f=os.preadv: read.append((at, len(to[0]))) or f(fd, to, at))
    start = tensors.tensors['x'].offset
    tensors.read('x', (slice(7, 9),))
    assert read == [(start + 7 * 40, 2 * 40)]
    read.clear()
    tensors.read_parts('x', [(slice(10, 30), slice(0, 5)), (slice(10, 30), slice(5, 10))])
    assert read == [(start + 10 * 40, 20 * 40)]  # rows that two parts share are read once


@pytest.mark.parametrize('index', [0, (0,), (slice(None, None, -1),), (slice(None),) * 3, (..., ...), (None,)])
def test_index_rejects(tmp_path, index):
  written(tmp_path, {'x': np.zeros((2, 2), np.float32)})
  with safetensors.Folder(tmp_path) as tensors, pytest.raises(ValueError, match=r'index=.*expected at most 2 slices'):
    tensors.read('x', index)


X = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
DAMAGED = {
  'empty': (b'', 'header of 0 bytes in a file of 0'),
  'seven bytes': (b'\1\0\0\0\0\0\0', 'in a file of 7'),
  'header past the end': (file_of({'x': X}, length=1000), 'header of 1000 bytes in a file of .*expected at most'),
  'header of 2^63': (file_of({'x': X}, length=2**63), 'expected at most'),
  'not UTF-8': (file_of(b'{"\xff": 1}'), 'header: expected JSON'),
  'not JSON': (file_of(b'{"x": '), 'header: expected JSON'),
  'a list': (file_of(b'[1]'), "begins with b'\\[1\\]', expected '{'"),
  'deep': (file_of(b'{"x":' * 100_000), 'expected JSON'),
  'NaN': (file_of(b'{"x": NaN}'), 'NaN'),
  'half a surrogate pair': (file_of(b'{"\\ud800": 1}'), 'expected JSON'),
  'twice': (
    file_of(b'{"x":%s,"x":%s}' % ((json.dumps(X).encode(),) * 2), bytes(8)),
    "the name 'x' stands there twice",
  ),
  'metadata': (file_of({'__metadata__': {'a': 1}}), '__metadata__ is .* expected names with texts'),
  'no dictionary': (file_of({'x': 3}), "tensor 'x': 3, expected dtype, shape and data_offsets"),
  'a field is missing': (file_of({'x': {'dtype': 'F32', 'shape': [2]}}), 'expected dtype, shape and data_offsets'),
  'a field too many': (file_of({'x': {**X, 'order': 'F'}}, bytes(8)), 'expected dtype, shape and data_offsets'),
  'dtype': (file_of({'x': {**X, 'dtype': 'F31'}}, bytes(8)), "dtype 'F31', expected one of F64, F32"),
  'dtype list': (file_of({'x': {**X, 'dtype': []}}, bytes(8)), 'dtype .*expected one of'),
  'negative shape': (file_of({'x': {**X, 'shape': [-2]}}, bytes(8)), r'shape \[-2\], expected a list of integers'),
  'true': (file_of({'x': {**X, 'shape': [True, 2]}}, bytes(8)), 'shape .*expected a list of integers'),
  'fraction': (file_of({'x': {**X, 'shape': [2.0]}}, bytes(8)), 'shape .*expected a list of integers'),
  'huge': (file_of({'x': {**X, 'shape': [2**40, 2**40, 0], 'data_offsets': [0, 0]}}), 'too large'),
  'axes': (file_of({'x': {**X, 'shape': [1] * 40 + [2]}}, bytes(8)), '41 axes'),
  'size': (file_of({'x': {**X, 'shape': [3]}}, bytes(8)), r'data_offsets \[0, 8\], expected 12 bytes for F32 \[3\]'),
  'backwards': (file_of({'x': {**X, 'data_offsets': [8, 0]}}, bytes(8)), 'expected 8 bytes'),
  'three offsets': (file_of({'x': {**X, 'data_offsets': [0, 4, 8]}}, bytes(8)), 'and two'),
  'hole': (file_of({'x': {**X, 'data_offsets': [4, 12]}}, bytes(12)), "'x' begins at byte 4 of the data, expected 0"),
  'overlap': (file_of({'x': X, 'y': {**X, 'data_offsets': [4, 12]}}, bytes(12)), "'y' begins at byte 4 .*expected 8"),
  'truncated': (file_of({'x': X}, bytes(7)), r'bytes, expected .*: 8, header \d+, tensors 8'),
  'too long': (file_of({'x': X}, bytes(9)), r'bytes, expected .*tensors 8'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_files_are_refused(tmp_path, case):
  data, words = DAMAGED[case]
  path = tmp_path / 'x.safetensors'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=words) as caught:
    safetensors.File(path)
  assert str(path) in str(caught.value)


def test_an_undamaged_one_is_not(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(file_of({'x': X, 'e': {**X, 'shape': [0], 'data_offsets': [8, 8]}}, bytes(8)))
  assert of_ours(path)['x'] == ('F32', (2,), bytes(8))


sizes = st.integers(-1, 4) | st.sampled_from([2**31, 2**62, 2**64, 1.0, True, None])
entries = st.fixed_dictionaries(
  {
    'dtype': st.sampled_from(['F32', 'BF16', 'U8', 'BOOL', 'F4', 7]),
    'shape': st.lists(sizes, max_size=3),
    'data_offsets': st.lists(st.integers(-1, 32) | sizes, min_size=1, max_size=3),
  }
)
headers = st.dictionaries(st.sampled_from(['a', 'b', 'ü', '__metadata__', '']), entries | st.none(), max_size=3)
GOOD = {'a': {**X, 'shape': [1, 2]}, 'b': {'dtype': 'BF16', 'shape': [3], 'data_offsets': [8, 14]}}


@st.composite
def files(draw):
  """Bytes of a file: of drawn headers, or a good one that is cut, grown or changed in some bytes."""
  header = draw(headers | st.just(GOOD))
  data = bytearray(file_of(header, draw(st.binary(min_size=14, max_size=14) | st.binary(max_size=40))))
  for _ in range(draw(st.integers(0, 3))):
    at = draw(st.integers(0, len(data) - 1))
    data[at] ^= 1 << draw(st.integers(0, 7))
  return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@hypothesis.settings(deadline=None, max_examples=600)
@hypothesis.given(files())
def test_drawn_files_are_refused_or_read_as_the_library_does(data):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'x.safetensors'
    path.write_bytes(data)
    try:
      got = of_ours(path)
    except ValueError as error:
      assert str(path) in str(error)
    else:
      assert got == of_library(data)


def test_every_flip_of_a_header(tmp_path):
  path = tmp_path / 'x.safetensors'
  good = file_of(GOOD, bytes(range(14)))
  accepted = 0
  for bit in range(8 * (len(good) - 14)):
    data = bytearray(good)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
      got = of_ours(path)
    except ValueError:
      continue
    accepted += 1
    assert got == of_library(bytes(data))
  assert accepted < 60  # other names, dtypes of the same size: what a header may say


def test_a_file_that_shrinks_or_changes_while_open_is_an_error(tmp_path):
  path = written(tmp_path, {'x': np.arange(100, dtype=np.float32)}) / safetensors.SINGLE
  with safetensors.File(path) as file:
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"ends at byte \d+ in tensor 'x', expected"):
      file.read('x')
  path = written(tmp_path, {'x': np.arange(100, dtype=np.float32)}, overwrite=True) / safetensors.SINGLE
  with safetensors.File(path) as file:
    with open(path, 'r+b') as other:
      other.seek(-4, os.SEEK_END)
      other.write(b'1234')
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="changed while 'x' was read"):
      file.read('x')


def sharded(folder):
  written(folder, {'x': np.zeros(3, np.float32), 'y': np.ones(3, np.float32)}, max_shard_bytes=12)
  return folder / safetensors.INDEX, json.loads((folder / safetensors.INDEX).read_text())


ONE, TWO = (f'model-0000{i}-of-00002.safetensors' for i in (1, 2))


@pytest.mark.parametrize(
  'weight_map, words',
  [
    ({'x': ONE, 'y': 'model-3.safetensors'}, "'y' lies in 'model-3.safetensors', which is missing"),
    ({'x': ONE, 'y': TWO, 'z': TWO}, f"'z' lies in '{TWO}', which does not have it"),
    ({'x': TWO, 'y': ONE}, "'x' lies in .* which does not have it"),
    ({'x': ONE, 'y': ONE}, "'y' lies in .* which does not have it"),
    ({'x': ONE, 'y': '../x.safetensors'}, 'expected the plain name'),
    ({'x': ONE, 'y': '/etc/x.safetensors'}, 'expected the plain name'),
    ({'x': ONE, 'y': '..\\x.safetensors'}, 'expected the plain name'),
    ({'x': ONE, 'y': 'pytorch_model.bin'}, 'expected the plain name of a .safetensors file'),
    ({'x': ONE, 'y': 3}, 'expected the plain name'),
    ({}, 'weight_map is {}'),
    ([], r'weight_map is \[\]'),
  ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, weight_map, words):
  path, index = sharded(tmp_path)
  path.write_text(json.dumps({**index, 'weight_map': weight_map}))
  with pytest.raises(ValueError, match=words):
    safetensors.Folder(tmp_path)


def test_a_tensor_that_the_index_lacks_is_refused(tmp_path):
  sharded(tmp_path)
  written(tmp_path / 'other', {'y': np.ones(3, np.float32), 'z': np.ones(3, np.float32)})
  os.replace(tmp_path / 'other' / safetensors.SINGLE, tmp_path / TWO)
  with pytest.raises(ValueError, match=f"{TWO}: tensor 'z' is not in model.safetensors.index.json"):
    safetensors.Folder(tmp_path)
  written(tmp_path / 'third', {'y': np.ones(3, np.float32), 'x': np.ones(3, np.float32)})
  os.replace(tmp_path / 'third' / safetensors.SINGLE, tmp_path / TWO)
  with pytest.raises(ValueError, match=f"{TWO}: tensor 'x' is not in"):
    safetensors.Folder(tmp_path)


def test_folders_without_a_checkpoint(tmp_path):
  with pytest.raises(ValueError, match=r'expected model.safetensors or model.safetensors.index.json, found neither'):
    safetensors.Folder(tmp_path)
  with pytest.raises(ValueError, match='nowhere: expected a folder'):
    safetensors.Folder(tmp_path / 'nowhere')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=r'pytorch_model.bin: pickled files .* never opened.*save_pretrained'):
    safetensors.Folder(tmp_path)


def test_two_checkpoints_in_a_folder_are_refused(tmp_path):
  sharded(tmp_path)
  written(tmp_path / 'other', {'x': np.zeros(3, np.float32)})
  os.replace(tmp_path / 'other' / safetensors.SINGLE, tmp_path / safetensors.SINGLE)
  with pytest.raises(ValueError, match='found both'):
    safetensors.Folder(tmp_path)


def test_what_is_no_file_is_refused(tmp_path):
  """A named pipe would be waited for, a device has no end."""
  os.mkfifo(tmp_path / 'pipe.safetensors')
  for path in (tmp_path / 'pipe.safetensors', '/dev/zero', tmp_path):
    with pytest.raises(ValueError, match='expected a file'):
      safetensors.File(path)
  os.rename(tmp_path / 'pipe.safetensors', tmp_path / safetensors.SINGLE)
  with pytest.raises(ValueError, match=r'expected model\.safetensors'):
    safetensors.Folder(tmp_path)
