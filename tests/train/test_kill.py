"""A run that is killed again and again - in steps, in saves, between them - ends with every bit of one that was not."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.train import tiny

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 16


def start(folder, *args):
  """Runs `python -m ...` on one CPU device, as a person does; what one process has compiled the next can read."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONWARNINGS': 'error'}
  env |= {'JAX_COMPILATION_CACHE_DIR': f'{folder}/cache', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  return subprocess.run(
    [sys.executable, '-m', *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
  )


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """A config with averages, and the flags of its runs; the run `whole` is not killed."""
  folder = tmp_path_factory.mktemp('kill')
  source = tiny.write_corpus(folder / 'text')
  changes = {'train': {'steps': STEPS, 'ema_decay': 0.9}, 'checkpoint': {'every': 4}, 'log': {'every': 3}}
  changes |= {'eval': {'every': 5}}
  text = f'from tests.train import tiny\n\ndef get_config():\n  return tiny.config({source!r}, **{changes!r})\n'
  (folder / 'config.py').write_text(text)
  flags = lambda name: [f'--config={folder}/config.py', f'--workdir={folder}/{name}']
  whole = start(folder, 'train.main', *flags('whole'))
  assert whole.returncode == 0, whole.stderr
  assert whole.stderr == ''
  return tiny.config(source, **changes), flags, folder


def left(folder, name):
  """Steps of the folders of checkpoints."""
  return {path.name for path in (folder / name / 'checkpoints').iterdir() if path.name.isdigit()}


def assert_as_if_nothing_had_happened(command, name):
  config, flags, folder = command
  ended = start(folder, 'train.main', *flags(name))
  assert ended.returncode == 0, ended.stderr
  step, got = tiny.saved(folder / name, config)
  want_step, want = tiny.saved(folder / 'whole', config)
  assert step == want_step == STEPS
  assert len(got) > 40  # parameters, two moments, averages, counts
  for mine, theirs in zip(got, want, strict=True):
    np.testing.assert_array_equal(mine, theirs)
  results = [json.loads((folder / at / 'result.json').read_text()) for at in (name, 'whole')]
  assert results[0]['held_out_bits_per_byte'] == results[1]['held_out_bits_per_byte']
  assert tiny.computed(folder / name) == tiny.computed(folder / 'whole')
  evals = [[(x['step'], x['bits_per_byte']) for x in tiny.lines(folder / at, 'eval')] for at in (name, 'whole')]
  assert evals[0] == evals[1]
  return ended


def killed(command, name, point, step):
  _, flags, folder = command
  ended = start(folder, 'tests.train.killer', point, str(step), *flags(name))
  assert ended.returncode == -9, (point, ended.returncode, ended.stderr)
  return ended


def cut_short(command, name, point, step, before):
  """Writes fail as on a full disk: a limit on the size of files needs no rights and holds for every library."""
  _, flags, folder = command
  ended = start(folder, 'tests.train.killer', point, str(step), *flags(name))
  assert ended.returncode == 3, ended.stderr
  assert ended.stderr.startswith(f'train: checkpoint of step {step}: the disk is full, or a limit of it is reached (')
  assert f'The checkpoint of step {before} is untouched' in ended.stderr
  assert ended.stderr.count('\n') == 1


def test_sigkill_changes_nothing(command):
  folder = command[2]
  killed(command, 'killed', 'step', 7)
  assert left(folder, 'killed') == {'4'}
  cut_short(command, 'killed', 'full', 12, 8)
  assert left(folder, 'killed') == {'4', '8'}
  killed(command, 'killed', 'save', 12)
  assert left(folder, 'killed') == {'4', '8'}
  assert list((folder / 'killed' / 'checkpoints').glob('12.*'))
  killed(command, 'killed', 'commit', 12)
  assert left(folder, 'killed') == {'4', '8', '12'}
  ended = assert_as_if_nothing_had_happened(command, 'killed')
  assert 'going on after step 8' in ended.stdout
  assert 'checkpoint of step 12: the run ended before its manifest was written; deleted' in ended.stdout
  assert left(folder, 'killed') == {'12', '16'}


@pytest.mark.long
def test_sigkill_elsewhere_changes_nothing(command):
  folder = command[2]
  killed(command, 'more', 'commit', 4)  # the first there is
  assert 'the run ended before its manifest' in killed(command, 'more', 'between', 6).stdout
  killed(command, 'more', 'manifest', 8)
  killed(command, 'more', 'delete', 12)
  assert {path.name for path in (folder / 'more' / 'checkpoints').iterdir()} == {'4.deleted', '8', '12'}
  assert 'going on after step 12' in assert_as_if_nothing_had_happened(command, 'more').stdout
  assert left(folder, 'more') == {'12', '16'}


@pytest.mark.long
def test_a_full_disk_changes_nothing(command):
  folder = command[2]
  cut_short(command, 'full', 'full', 8, 4)
  assert left(folder, 'full') == {'4'}
  cut_short(command, 'full', 'manifest-full', 8, 4)
  assert left(folder, 'full') == {'4'}
  assert 'going on after step 4' in assert_as_if_nothing_had_happened(command, 'full').stdout
