"""experiments.faults and experiments.bench_train: what they store, and that the former sees a bit that differs."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import bench_train, faults
from train import checkpoint, program, sharding
from train.config import MeshConfig


@pytest.mark.long
def test_points_are_stored_and_continued(tmp_path):
  out = tmp_path / 'faults.json'
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  for count in (1, 2):
    command = [sys.executable, '-m', 'experiments.faults', f'--points={count}', f'--out={out}']
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f'{count} points: 0 of ' in ended.stdout
    stored = json.loads(out.read_text())
    assert stored['points'] == len(stored['rows']) == count
    assert stored['differing_bits'] == stored['damage_not_found'] == 0
    assert stored['versions']['orbax-checkpoint']


def test_a_bit_that_differs_is_counted(tmp_path):
  made = program.make(faults.config('unused'), sharding.make_mesh(MeshConfig(data=1)))
  place = faults.Place()
  place.get_state = lambda: {'next_index': 1}
  first = made.first_state()
  with checkpoint.Checkpoints(tmp_path, made.config.checkpoint) as saved:
    saved.save(6, first, place)
  leaves = [np.array(x) for x in jax.tree.leaves(first)]
  bits = 8 * sum(x.nbytes for x in leaves)
  assert faults.differing(tmp_path, {6: (leaves, {'next_index': 1})}, made) == (6, [], bits, 0)
  leaves[1].view(np.uint8).reshape(-1)[0] ^= 6  # two bits
  assert faults.differing(tmp_path, {6: (leaves, {'next_index': 2})}, made) == (6, [], bits, 3)


@pytest.mark.long
def test_bench_stores_what_it_says(tmp_path, capsys):
  out = tmp_path / 'bench.json'
  assert bench_train.main(['--tiny', f'--out={out}']) == 0
  stored = json.loads(out.read_text())
  assert stored['is_tiny']
  assert stored['device'] and stored['date'] and stored['versions']
  assert stored['ratio'] > 0
  assert len(stored['stalls']) >= 1
  assert f'a save of {stored["checkpoint_bytes"] / 1e6:.0f} MB' in capsys.readouterr().out


def test_windows_are_compared_with_quiet_steps():
  sizes = bench_train.TINY
  steps = dict.fromkeys(range(2, 17), 1.0)
  steps[9] += 0.5  # after the save of step 8
  assert bench_train.windows(steps, sizes) == [0.0, 0.5, 0.0]
