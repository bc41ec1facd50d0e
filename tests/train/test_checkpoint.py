"""train.checkpoint with a State of a few arrays: what comes back, what is refused, and a disk that is full."""

import errno
import io
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import tiny
from train import checkpoint, config as configs, manifest, processes, state as states, workdir as workdirs
from train.config import CheckpointConfig, UserError

ROOT = pathlib.Path(__file__).parents[2]
ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step, *, has_ema=True):
  """A State whose every number depends on the step."""
  x = jnp.arange(12.0).reshape(3, 4) + step
  return states.State(
    jnp.int32(step), {'a.kernel': x, 'b': x[0] * 2}, ({'m': x - 1},), {'b': x[0] / 3} if has_ema else {}, jnp.int32(1)
  )


def place(step):
  made = tiny.Place()
  made.state = {'next_index': 5 * step}
  return made


def run_of(workdir, *steps, keep=2):
  """A run with checkpoints of some steps."""
  with checkpoint.Checkpoints(workdir, CheckpointConfig(keep=keep)) as saved:
    for step in steps:
      saved.save(step, state(step), place(step))


def restored(workdir, say=pytest.fail, *, has_ema=True):
  """(step, leaves, place) of a run."""
  abstract = jax.eval_shape(lambda: state(0, has_ema=has_ema))
  found = tiny.Place()
  with checkpoint.Checkpoints(workdir, CheckpointConfig()) as saved:
    step, got = saved.restore(abstract, jax.tree.map(lambda _: ONE, abstract), found, say)
  return step, got and jax.tree.map(np.asarray, got), found.state


def assert_is(got, step):
  assert got[0] == step
  assert got[2] == {'next_index': 5 * step}
  jax.tree.map(np.testing.assert_array_equal, got[1], state(step))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with the checkpoints 4 and 8; to be copied."""
  workdir = tmp_path_factory.mktemp('checkpoints') / 'run'
  workdir.mkdir()
  run_of(workdir, 2, 4, 8)
  return workdir


@pytest.fixture
def workdir(run, tmp_path):
  return pathlib.Path(shutil.copytree(run, tmp_path / 'run'))


def files(workdir, step):
  return sorted(path for path in (workdir / 'checkpoints' / str(step)).rglob('*') if path.is_file())


def test_the_newest_comes_back(run):
  assert_is(restored(run), 8)
  assert workdirs.saved_steps(run) == [4, 8]
  assert sorted(path.name for path in (run / 'manifests').iterdir()) == ['4.json', '8.json']


def test_no_checkpoint_is_a_start(tmp_path):
  assert restored(tmp_path) == (0, None, None)


def test_a_saved_state_may_be_overwritten(tmp_path, monkeypatch):
  double = jax.jit(lambda x: jax.tree.map(lambda y: y * 2, x), donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saved:
    now, at = state(1), place(1)
    real = saved._orbax.save

    def save(*args, **options):  # as if Orbax came to it only after the iterator has gone on
      at.state['next_index'] = 7
      real(*args, **options)

    monkeypatch.setattr(saved._orbax, 'save', save)
    saved.save(1, now, at)
    for _ in range(5):
      now = double(now)
  assert_is(restored(tmp_path), 1)


def test_a_flipped_bit_in_any_file_is_found(run, workdir):
  """Orbax alone gives back other numbers without a word."""
  names = [str(path.relative_to(run / 'checkpoints/8')) for path in files(run, 8)]
  kinds = {name.split('/')[0] for name in names}
  assert kinds >= {'params', 'optimizer', 'ema', 'data', '_CHECKPOINT_METADATA'}
  rng = np.random.default_rng(0)
  for name in names:
    path = workdir / 'checkpoints' / '8' / name
    before = path.read_bytes()
    if not before:
      continue
    changed = bytearray(before)
    changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    path.write_bytes(changed)
    assert manifest.problems(workdir / 'checkpoints/8', workdir / 'manifests/8.json', 8) == [
      f'{name}: its SHA-256 differs'
    ]
    path.write_bytes(before)
  path.write_bytes(changed)
  said: list[str] = []
  assert_is(restored(workdir, said.append), 4)
  assert said == [f'checkpoint of step 8: {names[-1]}: its SHA-256 differs; moved to bad_checkpoints/8.0']


def test_all_bad_is_refused(workdir):
  for step in (4, 8):
    os.truncate(files(workdir, step)[0], 1)
  with pytest.raises(UserError, match=r'(?s)no checkpoint is whole.*step 8: .*truncated\n  step 4: .*truncated'):
    restored(workdir)


def test_what_does_not_fit_is_refused(workdir):
  other = jax.eval_shape(lambda: state(0)._replace(params={'c': jnp.zeros(3)}))
  with (
    checkpoint.Checkpoints(workdir, CheckpointConfig()) as saved,
    pytest.raises(UserError, match='checkpoints/8: expected a checkpoint of this config and model'),
  ):
    saved.restore(other, jax.tree.map(lambda _: ONE, other), tiny.Place())


def test_a_save_with_keep_deletes_only_after_the_next_manifest(workdir, monkeypatch):
  seen = []
  real = manifest.write

  def write(folder, path, step):
    seen.append(workdirs.saved_steps(workdir))
    real(folder, path, step)

  monkeypatch.setattr(manifest, 'write', write)
  run_of(workdir, 12, keep=1)
  assert seen == [[4, 8]]
  assert workdirs.saved_steps(workdir) == [12]


def test_saving_does_not_wait_for_the_manifest(tmp_path, monkeypatch):
  may_end, real = threading.Event(), manifest.write
  monkeypatch.setattr(manifest, 'write', lambda *args: may_end.wait(60) and real(*args))
  with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saved:
    saved.save(1, state(1), place(1))
    saved.check()
    assert workdirs.saved_steps(tmp_path) == []  # not before it is finished
    threading.Timer(0.05, may_end.set).start()
    assert saved.newest() == 1


def test_the_newest_is_not_one_that_failed(workdir, monkeypatch):
  may_end = threading.Event()
  monkeypatch.setattr(manifest, 'write', lambda *_: (_ for _ in ()).throw(FULL if may_end.wait(60) else TimeoutError))
  saved = checkpoint.Checkpoints(workdir, CheckpointConfig())
  saved.save(12, state(12), place(12))
  threading.Timer(0.05, may_end.set).start()
  assert saved.newest() == 8
  assert saved.newest() == 8
  saved.__exit__(ValueError)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('where', ['manifest', 'arrays', 'begin'])
def test_a_full_disk_is_said_once_and_the_older_one_stays(workdir, monkeypatch, where):
  def fail(*args, **options):
    raise FULL

  with monkeypatch.context() as patched:
    if where == 'manifest':
      patched.setattr(manifest, 'write', fail)
    elif where == 'arrays':
      patched.setattr(checkpoint.ocp.AsyncCheckpointer, 'wait_until_finished', fail)
    else:
      patched.setattr(checkpoint.shelves.Shelf, 'begin', fail)
    saved = checkpoint.Checkpoints(workdir, CheckpointConfig())
    words = r'checkpoint of step 12: the disk is full.*No space left.*The checkpoint of step 8 is untouched'
    with pytest.raises(checkpoint.SaveFailed, match=words):
      saved.save(12, state(12), place(12))
      saved.wait()
  with pytest.raises(checkpoint.SaveFailed, match=words):
    saved.save(16, state(16), place(16))
  saved.__exit__(ValueError)  # another error has the word
  said: list[str] = []
  assert_is(restored(workdir, said.append), 8)
  assert said == []
  assert not (workdir / 'checkpoints' / '12').exists()
  assert not [path for path in (workdir / 'checkpoints').iterdir() if not path.name.isdigit()]


def test_bad_ones_are_named_where_space_is_needed(workdir, monkeypatch):
  (workdir / 'bad_checkpoints' / '2.0').mkdir(parents=True)
  monkeypatch.setattr(manifest, 'write', lambda *_: (_ for _ in ()).throw(FULL))
  with (
    pytest.raises(checkpoint.SaveFailed, match=r'Free some space \(bad_checkpoints has 1 that nothing deletes\)'),
    checkpoint.Checkpoints(workdir, CheckpointConfig()) as saved,
  ):
    saved.save(12, state(12), place(12))


LEAVES = """
import errno, os, sys
from tests.train.test_checkpoint import place, state
from train import checkpoint, config
import pathlib

real = os.mkdir
def mkdir(path, *args, **options):
  if 'orbax-checkpoint-tmp' in str(path):
    raise OSError(errno.EPERM, 'no folders here')
  return real(path, *args, **options)
os.mkdir = mkdir
checkpoint.quiet()
assert checkpoint.leave(5) == 5
try:
  with checkpoint.Checkpoints(pathlib.Path(sys.argv[1]), config.CheckpointConfig()) as saved:
    saved.save(1, state(1), place(1))
except checkpoint.SaveFailed as error:
  print(error)
  sys.exit(checkpoint.leave(3))
"""


@pytest.mark.long
def test_a_program_ends_after_a_save_that_cannot_begin(tmp_path):
  """Orbax's threads wait for each other for minutes then."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  ended = subprocess.run(
    [sys.executable, '-c', LEAVES, tmp_path], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
  )
  assert ended.returncode == 3, ended.stderr
  assert 'no folders here' in ended.stdout


def test_nothing_waits_for_a_save_when_another_process_is_gone(tmp_path, monkeypatch):
  gone, may_end = jax.errors.JaxRuntimeError('UNAVAILABLE: Gloo: connection closed by peer'), threading.Event()
  monkeypatch.setattr(processes, '_listener', object())
  monkeypatch.setattr(manifest, 'write', lambda *_: (_ for _ in ()).throw(gone if may_end.wait(60) else TimeoutError))
  saved = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  saved.save(1, state(1), place(1))
  saved.__exit__(type(gone), gone)
  assert saved._thread.is_alive()
  may_end.set()
  with pytest.raises(jax.errors.JaxRuntimeError, match='Gloo'):  # it is not the disk that has failed
    saved.wait()
  monkeypatch.setattr(processes, '_listener', None)
  saved.__exit__(ValueError)


def test_another_error_of_a_save_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(manifest, 'write', lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, 'Input/output error')))
  with (
    pytest.raises(checkpoint.SaveFailed, match=r'cannot be written .*Input/output error.*There is no older checkpoint'),
    checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saved,
  ):
    saved.save(1, state(1), place(1))


def test_nothing_unpickles(tmp_path, monkeypatch):
  def refused(*args, **options):
    raise AssertionError('unpickled')

  for name in ('load', 'loads', 'Unpickler', '_Unpickler'):
    monkeypatch.setattr(pickle, name, refused)
  with pytest.raises(pickle.UnpicklingError):
    np.load(io.BytesIO(b'\x80\x04N.'), allow_pickle=True)  # as one that does
  run_of(tmp_path, 1)
  assert_is(restored(tmp_path), 1)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """What a run with averages leaves: config.json and two checkpoints, the averages three times the parameters."""
  from train import optimizer, program, sharding

  workdir = tmp_path_factory.mktemp('trained') / 'run'
  workdir.mkdir()
  config = tiny.config('unused', train={'ema_decay': 0.9})
  made = program.make(config, sharding.make_mesh(config.mesh))
  first = made.first_state()
  assert set(first.ema) == set(optimizer.trainable(config.optimizer, config.model, list(first.params)))
  workdirs.write_json(workdir / 'config.json', {'config': configs.to_dict(config)})
  with checkpoint.Checkpoints(workdir, config.checkpoint) as saved:
    for step in (1, 2):
      ema = {path: 3 * step * x for path, x in first.params.items()}
      saved.save(step, first._replace(ema=ema), place(step))
  return workdir, jax.device_get(first.params)


@pytest.mark.parametrize('weights, factor', [('', 6), ('ema', 6), ('raw', 1)])
def test_load_params_chooses_the_weights(trained, weights, factor):
  workdir, first = trained
  config, params, step = checkpoint.load_params(workdir, weights=weights)
  assert step == 2
  assert config.train.ema_decay == 0.9
  assert params.keys() == first.keys()
  for path, x in params.items():
    np.testing.assert_array_equal(x, factor * first[path])
  if weights == '':
    _, params, step = checkpoint.load_params(workdir, 1)
    assert step == 1
    np.testing.assert_array_equal(params['norm.scale'], 3 * first['norm.scale'])


def test_load_params_takes_a_newer_one_when_the_run_deletes_its_own(trained, tmp_path, monkeypatch):
  """As a run does that goes on: before the files are hashed, and while they are read."""
  workdir = pathlib.Path(shutil.copytree(trained[0], tmp_path / 'run'))
  for step in (3, 4):
    shutil.copytree(workdir / 'checkpoints/2', workdir / f'checkpoints/{step}')
    manifest.write(workdir / f'checkpoints/{step}', workdir / f'manifests/{step}.json', step)
  real_problems, real_restored = manifest.problems, checkpoint._restored

  def problems(folder, *args, **options):
    if folder.name == '4':
      checkpoint.shelves.Shelf(workdir)._delete(4)
    return real_problems(folder, *args, **options)

  def restored(orbax, folder, items):
    if folder.name == '3':
      checkpoint.shelves.Shelf(workdir)._delete(3)
    return real_restored(orbax, folder, items)

  monkeypatch.setattr(manifest, 'problems', problems)
  monkeypatch.setattr(checkpoint, '_restored', restored)
  assert checkpoint.load_params(workdir)[2] == 2
  with pytest.raises(UserError, match=r'expected a checkpoint of step 4, found \[1, 2\]'):
    checkpoint.load_params(workdir, 4)


@pytest.mark.parametrize('error', [Exception('NOT_FOUND: no such chunk'), FileNotFoundError('gone'), KeyError('ema')])
def test_what_cannot_be_read_is_told(trained, monkeypatch, error):
  def restore(*args, **options):
    raise error

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, 'restore', restore)
  with pytest.raises(UserError, match=r'checkpoints/2: expected a checkpoint of this config and model'):
    checkpoint.load_params(trained[0])


def test_load_params_refuses(trained, tmp_path):
  workdir = pathlib.Path(shutil.copytree(trained[0], tmp_path / 'run'))
  with pytest.raises(ValueError, match="weights='best'"):
    checkpoint.load_params(workdir, weights='best')
  with pytest.raises(UserError, match=r'expected a checkpoint of step 3, found \[1, 2\]'):
    checkpoint.load_model(workdir, step=3)
  path = max((workdir / 'checkpoints/2/ema').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())
  path.write_bytes(path.read_bytes()[:-1] + b'?')
  with pytest.raises(UserError, match=r'checkpoints/2: expected a whole checkpoint; ema/.* SHA-256 differs; others: 1'):
    checkpoint.load_params(workdir)
  assert checkpoint.load_params(workdir, weights='raw')[2] == 2  # nothing of the averages is read
  text = (workdir / 'config.json').read_text().replace('"ema_decay": 0.9', '"ema_decay": 0.0')
  (workdir / 'config.json').write_text(text)
  with pytest.raises(UserError, match=r"weights='ema': expected a run with train\.ema_decay"):
    checkpoint.load_params(workdir, weights='ema')
  shutil.rmtree(workdir / 'manifests')  # none is finished
  with pytest.raises(UserError, match=r'expected a checkpoint, found \[\]'):
    checkpoint.load_params(workdir)
