"""models.hf.writer: a checkpoint is there whole or not at all."""

import errno
import functools
import os
import pathlib
import resource
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from models.hf import safetensors, writer

ARRAYS = {f'x{i}': np.full((4, 4), i, np.float32) for i in range(4)}
OTHERS = {f'x{i}': np.full((4, 4), -i, np.float32) for i in range(4)}
SHARDS = {'single': {}, 'sharded': {'max_shard_bytes': 130}}


def write(folder, arrays, **options):
  writer.write(folder, arrays, arrays.__getitem__, **options)


def values(folder):
  """{name: first value} of what is there, or None if it does not open."""
  try:
    with safetensors.Folder(folder) as tensors:
      return {name: tensors.read(name).flat[0] for name in tensors.tensors}
  except ValueError:
    return None


def test_tensors_are_asked_for_one_at_a_time_in_file_order(tmp_path):
  shapes = {'a': np.zeros(3, np.uint8), 'b': np.zeros(3, np.float32), 'c': np.zeros(3, ml_dtypes.bfloat16)}
  asked = []
  writer.write(tmp_path, shapes, lambda name: asked.append(name) or shapes[name])
  with safetensors.Folder(tmp_path) as tensors:
    assert list(tensors.tensors) == asked == ['b', 'c', 'a']


@pytest.mark.parametrize('options', SHARDS.values(), ids=SHARDS)
def test_an_error_on_the_way_leaves_nothing(tmp_path, options):
  def get(name):
    if name == 'x3':
      raise OSError(28, 'No space left on device')
    return OTHERS[name]

  folder = tmp_path / 'new'
  with pytest.raises(OSError, match='No space left'):
    writer.write(folder, OTHERS, get, files={'config.json': b'{}'}, **options)
  assert list(folder.iterdir()) == []
  write(folder, ARRAYS, **options)
  before = sorted(path.name for path in folder.iterdir())
  with pytest.raises(OSError, match='No space left'):
    writer.write(folder, OTHERS, get, overwrite=True, **options)
  assert sorted(path.name for path in folder.iterdir()) == before
  assert values(folder) == {'x0': 0, 'x1': 1, 'x2': 2, 'x3': 3}


def test_disk_full(tmp_path):
  """A limit on the size of files stands in for a full disk: the system's error comes through, the folder is empty."""
  x = np.zeros(1_000_000, np.float32)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(OSError) as caught:
      write(tmp_path, {'x': x})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert caught.value.errno == errno.EFBIG
  assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
  """Stands for the end of the process: nothing that would change a folder works any more."""


@pytest.fixture
def kill_after(monkeypatch):
  """A function of the number of steps (calls that change what is on the disk) after which the process ends."""
  left = [float('inf')]

  def counted(function):
    def call(*args, **kwargs):
      left[0] -= 1
      if left[0] < 0:
        raise Killed
      return function(*args, **kwargs)

    return call

  for place, name in ((os, 'replace'), (os, 'fsync'), (pathlib.Path, 'unlink')):
    monkeypatch.setattr(place, name, counted(getattr(place, name)))
  return functools.partial(left.__setitem__, 0)


@pytest.mark.parametrize('old, new', [('single', 'sharded'), ('sharded', 'single')])
def test_a_kill_at_any_step_leaves_old_new_or_nothing(tmp_path, kill_after, old, new):
  olds, news = ({f'x{i}': sign * i for i in range(4)} for sign in (1, -1))
  seen, is_killed = [], True
  while is_killed:
    folder = tmp_path / f'{len(seen)}'
    write(folder, ARRAYS, files={'config.json': b'{"old": 1}'}, **SHARDS[old])
    try:
      kill_after(len(seen))
      write(folder, OTHERS, files={'config.json': b'{}'}, overwrite=True, **SHARDS[new])
      is_killed = False
    except Killed:
      pass
    finally:
      kill_after(float('inf'))
    found = values(folder)
    assert found in (None, olds, news)
    assert found is None or (folder / 'config.json').read_bytes() == (b'{"old": 1}' if found == olds else b'{}')
    seen.append('nothing' if found is None else 'old' if found == olds else 'new')
    write(folder, OTHERS, overwrite=True)  # what was left is cleared away
    assert [path.name for path in folder.iterdir()] == [safetensors.SINGLE]
  assert seen == sorted(seen, key=['old', 'nothing', 'new'].index)
  assert set(seen) == {'old', 'nothing', 'new'}


def test_a_killed_process_leaves_a_folder_that_does_not_open(tmp_path):
  code = """
import os, signal, sys, numpy as np
from models.hf import writer
arrays = {f'x{i}': np.zeros((400, 400), np.float32) for i in range(4)}
get = lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == 'x3' else arrays[name]
writer.write(sys.argv[1], arrays, get, max_shard_bytes=1_000_000)
"""
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert len(list(tmp_path.iterdir())) == 4  # under other names
  assert values(tmp_path) is None


def test_refuses_to_overwrite(tmp_path):
  write(tmp_path, ARRAYS)
  with pytest.raises(ValueError, match=r'holds model.safetensors: expected a folder without a checkpoint'):
    write(tmp_path, OTHERS)
  assert values(tmp_path) == {'x0': 0, 'x1': 1, 'x2': 2, 'x3': 3}
  (tmp_path / 'tokenizer.json').write_text('{}')
  write(tmp_path, OTHERS, overwrite=True, **SHARDS['sharded'])
  assert values(tmp_path) == {'x0': 0, 'x1': -1, 'x2': -2, 'x3': -3}
  assert not (tmp_path / safetensors.SINGLE).exists() and (tmp_path / 'tokenizer.json').exists()
  write(tmp_path, ARRAYS, overwrite=True, obsolete=['tokenizer.json'])
  assert [path.name for path in tmp_path.iterdir()] == [safetensors.SINGLE]


@pytest.mark.parametrize('name', ['config.json', 'pytorch_model.bin', 'model-00001-of-00002.safetensors'])
def test_parts_of_a_checkpoint_are_not_written_over(tmp_path, name):
  (tmp_path / name).write_bytes(b'')
  with pytest.raises(ValueError, match=f'holds {name}'):
    write(tmp_path, ARRAYS)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'get': lambda name: np.zeros((4, 3), np.float32)}, r"tensor 'x0' is float32 \(4, 3\), expected float32 \(4, 4\)"),
    ({'get': lambda name: np.zeros((4, 4), np.int32)}, "tensor 'x0' is int32"),
    ({'max_shard_bytes': 0}, 'max_shard_bytes=0: expected a positive number'),
    ({'max_shard_bytes': float('nan')}, 'max_shard_bytes=nan'),
    ({'shapes': {'x': np.zeros(3, np.complex128)}}, "tensor 'x' of dtype complex128: expected one of float64"),
    ({'shapes': {'__metadata__': np.zeros(3, np.float32)}}, "tensor '__metadata__'"),
  ],
)
def test_rejects(tmp_path, change, words):
  folder = tmp_path / 'new'
  with pytest.raises(ValueError, match=words):
    writer.write(folder, **{'shapes': ARRAYS, 'get': ARRAYS.__getitem__, **change})
  assert values(folder) is None and not (folder.exists() and list(folder.iterdir()))
  (tmp_path / 'file').write_bytes(b'')
  with pytest.raises(ValueError, match='file: expected a folder, found a file'):
    write(tmp_path / 'file', ARRAYS)
