"""Signals at any time, and going on with other devices."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train import tiny
from train import data, interrupt, loop

ROOT = pathlib.Path(__file__).parents[2]
TOLERANCE = 1e-5  # of losses in float32 on another mesh


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return tiny.write_corpus(tmp_path_factory.mktemp('corpus') / 'text')


def begin(folder, source, *flags):
  (folder / 'config.py').write_text(
    f'from tests.train import tiny\n\ndef get_config():\n  return tiny.config({source!r})\n'
  )
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONUNBUFFERED': '1', 'PYTHONWARNINGS': 'error'}
  command = [sys.executable, '-m', 'train.main', f'--config={folder}/config.py', f'--workdir={folder}/run', *flags]
  pipe = subprocess.PIPE
  return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def test_sigterm_before_the_first_step_ends_at_once(source, tmp_path):
  run = begin(tmp_path, source)
  while run.poll() is None and not (tmp_path / 'run' / 'config.json').exists():
    time.sleep(0.01)
  began = time.monotonic()
  run.send_signal(signal.SIGTERM)
  _, error = run.communicate(timeout=60)
  assert run.returncode == 0
  assert error == 'train: stopped by SIGTERM; the same command continues\n'
  assert time.monotonic() - began < 2  # a compiler, which the main thread is in now, would take longer to hear of it
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.parametrize(
  'number, status', [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_a_signal_saves_and_says_so(source, tmp_path, number, status):
  run = begin(tmp_path, source, '--config.train.steps=1000000', '--config.log.every=50')
  for line in run.stdout:
    if line.startswith('step 50 of'):
      break
  began = time.monotonic()
  run.send_signal(number)
  _, error = run.communicate(timeout=60)
  assert run.returncode == status
  assert time.monotonic() - began < 30
  (step,) = re.findall(
    rf'train: stopped by {number.name} at step (\d+) and saved; the same command continues\n$', error
  )
  assert (tmp_path / 'run' / 'manifests' / f'{step}.json').exists()
  assert (tmp_path / 'run' / 'checkpoints' / step).is_dir()


@pytest.fixture(scope='module')
def whole(source, tmp_path_factory):
  """A run on one device with the checkpoints 2, 4 and 6: (workdir, its config with changes)."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'

  def config(**mesh):
    changes = {'train': {'steps': 6, 'ema_decay': 0.9}, 'eval': {'every': 3, 'bytes': 0}, 'log': {'every': 1}}
    return tiny.config(source, **changes, checkpoint={'every': 2, 'keep': 3}, mesh={'data': 1, **mesh})

  loop.run(config(), workdir)
  return workdir, config


def as_at(step, whole, folder):
  """A copy of a run as it was when a checkpoint had been saved."""
  workdir = pathlib.Path(shutil.copytree(whole[0], folder))
  (workdir / 'result.json').unlink()
  for later in range(step + 2, 7, 2):
    shutil.rmtree(workdir / 'checkpoints' / str(later))
    (workdir / 'manifests' / f'{later}.json').unlink()
  return workdir


def evals(workdir):
  return [(line['step'], line['bits_per_byte'], line['is_all']) for line in tiny.lines(workdir, 'eval')]


def test_a_signal_ends_an_evaluation_which_is_done_again(whole, tmp_path, monkeypatch):
  workdir = as_at(2, whole, tmp_path / 'run')
  real, seen = data.in_order, []

  def in_order(*args):
    for batch in real(*args):
      seen.append(batch)
      if len(seen) == 2:
        signal.raise_signal(signal.SIGTERM)
      yield batch

  with monkeypatch.context() as patched:
    patched.setattr(data, 'in_order', in_order)
    with pytest.raises(interrupt.Interrupted, match='SIGTERM at step 3'):
      loop.run(whole[1](), workdir)
  assert len(seen) == 2  # of many
  assert evals(workdir) == []
  loop.run(whole[1](), workdir)
  assert evals(workdir) == evals(whole[0])
  assert [step for step, *_ in evals(workdir)] == [3, 6]
  assert tiny.computed(workdir) == tiny.computed(whole[0])


MESHES = [(2, {'fsdp': 2, 'tensor': 2}), pytest.param(4, {'data': 4}, marks=pytest.mark.long)]


@pytest.mark.parametrize('start, mesh', MESHES)
def test_another_mesh_goes_on_with_the_same_losses(whole, tmp_path, start, mesh):
  """From one device to parameters over 2 x 2, or to rows over 4: only the order of sums differs."""
  workdir = as_at(start, whole, tmp_path / 'run')
  assert loop.run(whole[1](**mesh), workdir)['devices'] == 4
  got, want = (tiny.computed(folder) for folder in (workdir, whole[0]))
  assert [line['step'] for line in got] == list(range(1, 7))
  for mine, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(mine['loss'], theirs['loss'], rtol=TOLERANCE)
    np.testing.assert_allclose(mine['grad_norm'], theirs['grad_norm'], rtol=TOLERANCE)
  (_, mine), (_, theirs) = (tiny.saved(folder, whole[1]()) for folder in (workdir, whole[0]))
  for x, y in zip(mine, theirs, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=10 * TOLERANCE * max(1, np.abs(y).max()))
