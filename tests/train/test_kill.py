"""A run that is killed three times - in a step, in a save, between steps - ends with every bit of one that was not."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.train import tiny

ROOT = pathlib.Path(__file__).parents[2]


def start(folder, *args):
  """Runs `python -m ...` on one CPU device, as a person does; what one process has compiled the next can read."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONWARNINGS': 'error'}
  env |= {'JAX_COMPILATION_CACHE_DIR': f'{folder}/cache', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  return subprocess.run(
    [sys.executable, '-m', *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
  )


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  folder = tmp_path_factory.mktemp('kill')
  source = tiny.write_corpus(folder / 'text')
  text = f'from tests.train import tiny\n\ndef get_config():\n  return tiny.config({source!r})\n'
  (folder / 'config.py').write_text(text)
  settings = ['--config.train.steps=16', '--config.checkpoint.every=4', '--config.log.every=3', '--config.eval.every=5']
  config = tiny.config(source, train={'steps': 16}, checkpoint={'every': 4}, log={'every': 3}, eval={'every': 5})
  return config, lambda name: [f'--config={folder}/config.py', f'--workdir={folder}/{name}', *settings], folder


def test_sigkill_changes_nothing(command):
  config, flags, folder = command
  whole = start(folder, 'train.main', *flags('whole'))
  assert whole.returncode == 0, whole.stderr
  assert whole.stderr == ''
  for point, step, left in (('step', 7, {'4'}), ('save', 12, {'4', '8'}), ('between', 6, {'8', '12'})):
    killed = start(folder, 'tests.train.killer', point, str(step), *flags('killed'))
    assert killed.returncode == -9, (point, killed.returncode, killed.stderr)
    found = {path.name for path in (folder / 'killed' / 'checkpoints').iterdir()}
    assert {name for name in found if name.isdigit()} == left, point
    assert any('tmp' in name for name in found) == (point == 'save')
  ended = start(folder, 'train.main', *flags('killed'))
  assert ended.returncode == 0, ended.stderr
  assert 'going on after step 12' in ended.stdout

  step, got = tiny.saved(folder / 'killed', config)
  want_step, want = tiny.saved(folder / 'whole', config)
  assert step == want_step == 16
  for mine, theirs in zip(got, want, strict=True):
    np.testing.assert_array_equal(mine, theirs)
  results = [json.loads((folder / name / 'result.json').read_text()) for name in ('killed', 'whole')]
  assert results[0]['held_out_bits_per_byte'] == results[1]['held_out_bits_per_byte']
  assert tiny.computed(folder / 'killed') == tiny.computed(folder / 'whole')
  evals = [[(x['step'], x['bits_per_byte']) for x in tiny.lines(folder / name, 'eval')] for name in ('killed', 'whole')]
  assert evals[0] == evals[1]
