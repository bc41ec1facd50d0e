"""Two real processes, each with one CPU device, compute what one process computes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from tests.train import tiny

ROOT = pathlib.Path(__file__).parents[2]


def test_two_processes_equal_one(tmp_path):
  source = tiny.write_corpus(tmp_path / 'text')
  text = f'from tests.train import tiny\n\ndef get_config():\n  return tiny.config({source!r})\n'
  (tmp_path / 'config.py').write_text(text)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  flags = [f'--config={tmp_path}/config.py', '--config.train.steps=8', '--config.checkpoint.every=5']
  together = ['--config.mesh.data=2', '--distributed', f'--coordinator=localhost:{port}', '--processes=2']

  def begin(name, *more):
    command = [sys.executable, '-m', 'train.main', *flags, f'--workdir={tmp_path / name}', *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)

  runs = [begin('two', *together, f'--process={i}') for i in range(2)] + [begin('one')]
  ended = [(*run.communicate(timeout=120), run.returncode) for run in runs]
  assert [status for *_, status in ended] == [0, 0, 0], [error for _, error, _ in ended]
  assert 'held out' in ended[0][0]
  assert 'held out' not in ended[1][0]
  got, want = (tiny.computed(tmp_path / name) for name in ('two', 'one'))
  assert len(got) == len(want) == 2
  for mine, theirs in zip(got, want):  # only the order of sums differs
    for name, value in theirs.items():
      np.testing.assert_allclose(mine[name], value, rtol=1e-5, err_msg=name)
  results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('two', 'one')]
  assert results[0]['devices'] == 2
  assert results[0]['held_out_bytes'] == results[1]['held_out_bytes']
  np.testing.assert_allclose(*[result['held_out_bits_per_byte'] for result in results], rtol=1e-5)
