"""Two real processes, each with one CPU device: they compute what one computes, and stop and fail together."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.train import tiny
from train import interrupt, processes
from train.config import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """With config.py of tests.train.tiny, its text, and a cache of what was compiled."""
  folder = tmp_path_factory.mktemp('processes')
  source = tiny.write_corpus(folder / 'text')
  text = f'from tests.train import tiny\n\ndef get_config():\n  return tiny.config({source!r})\n'
  (folder / 'config.py').write_text(text)
  return folder


def begin(folder, name, *flags, count=2):
  """Starts the processes of a run."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONUNBUFFERED': '1'}
  env |= {'JAX_COMPILATION_CACHE_DIR': f'{folder}/cache', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  command = [sys.executable, '-m', 'train.main', f'--config={folder}/config.py', f'--workdir={folder / name}', *flags]
  if count > 1:
    command += [
      f'--config.mesh.data={count}',
      '--distributed',
      f'--coordinator=localhost:{port}',
      f'--processes={count}',
    ]
  pipe = subprocess.PIPE
  start = lambda more: subprocess.Popen([*command, *more], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)
  return [start([f'--process={i}'] if count > 1 else []) for i in range(count)]


def ended(runs, seconds=120):
  """[(exit status, stdout, stderr)] of processes."""
  try:
    texts = [run.communicate(timeout=seconds) for run in runs]
  finally:
    for run in runs:
      run.kill()
  return [(run.returncode, *text) for run, text in zip(runs, texts)]


def until_step(run, step):
  """Waits for a train line of `step` or later of process 0."""
  for line in run.stdout:
    if (found := re.match(r'step ([\d,]+) of', line)) and int(found[1].replace(',', '')) >= step:
      return
  pytest.fail(run.stderr.read())


def test_two_processes_equal_one(folder):
  flags = ['--config.train.steps=8', '--config.checkpoint.every=5']
  results = ended(begin(folder, 'two', *flags) + begin(folder, 'one', *flags, count=1))
  assert [status for status, *_ in results] == [0, 0, 0], [error for *_, error in results]
  assert 'held out' in results[0][1]
  assert 'held out' not in results[1][1]
  got, want = (tiny.computed(folder / name) for name in ('two', 'one'))
  assert len(got) == len(want) == 2
  for mine, theirs in zip(got, want):  # only the order of sums differs
    for name, value in theirs.items():
      np.testing.assert_allclose(mine[name], value, rtol=1e-5, err_msg=name)
  results = [json.loads((folder / name / 'result.json').read_text()) for name in ('two', 'one')]
  assert results[0]['devices'] == 2
  assert results[0]['held_out_bytes'] == results[1]['held_out_bytes']
  np.testing.assert_allclose(*[result['held_out_bits_per_byte'] for result in results], rtol=1e-5)


@pytest.mark.long
def test_a_signal_to_one_stops_all_at_the_same_step(folder):
  """And one process goes on with what two have saved."""
  flags = ['--config.train.steps=100000', '--config.log.every=20', '--config.optimizer.schedule=constant']
  runs = begin(folder, 'stopped', *flags)
  until_step(runs[0], 20)
  began = time.monotonic()
  runs[1].send_signal(signal.SIGTERM)
  results = ended(runs)
  assert time.monotonic() - began < 30
  assert [status for status, *_ in results] == [0, 0], results
  steps = {re.search(r'train: stopped by SIGTERM at step (\d+) and saved', error)[1] for *_, error in results}
  assert len(steps) == 1
  (step,) = map(int, steps)
  assert (folder / 'stopped' / 'manifests' / f'{step}.json').exists()
  assert not (folder / 'stopped' / 'result.json').exists()
  flags[0] = f'--config.train.steps={step + 2}'
  ((status, said, error),) = ended(begin(folder, 'stopped', *flags, count=1))
  assert status == 0, error
  assert f'going on after step {step}' in said


@pytest.mark.parametrize('victim', [1, pytest.param(0, marks=pytest.mark.long)])
def test_when_one_is_killed_the_other_ends(folder, victim):
  flags = ['--config.train.steps=100000', '--config.log.every=20']
  runs = begin(folder, f'killed {victim}', *flags)
  until_step(runs[0], 20)
  runs[victim].kill()
  began = time.monotonic()
  status, _, error = ended(runs, 60)[1 - victim]
  assert time.monotonic() - began < 60
  assert status != 0
  assert len(error.splitlines()) < 40
  assert 'is gone' in error or 'another task died' in error
  if victim == 1:
    assert status == processes.GONE
    assert re.search(
      '(?m)^train: another process of this run is gone .*the same commands continue from the last', error
    )


def test_an_error_of_one_ends_all_with_its_words(folder):
  """Process 0 finds that the workdir is in use, which no other looks at."""
  from train import workdir as workdirs

  with workdirs.lock(folder / 'used'):
    began = time.monotonic()
    first, second = ended(begin(folder, 'used'))
  assert time.monotonic() - began < 60
  assert [first[0], second[0]] == [2, 2]
  assert first[2].splitlines()[-1].endswith(f'used is in use by process {os.getpid()}')
  assert re.search(rf'(?m)^train: (process 0: )?workdir .*used is in use by process {os.getpid()}$', second[2])


@pytest.mark.long
def test_no_whole_checkpoint_is_an_error_in_all(folder):
  flags = ['--config.train.steps=2', '--config.checkpoint.every=1']
  assert ended(begin(folder, 'bad', *flags, count=1))[0][0] == 0
  for path in (folder / 'bad' / 'manifests').iterdir():
    path.write_text('')
  for status, _, error in ended(begin(folder, 'bad', *flags, '--config.train.steps=3')):
    assert status == 2
    assert 'no checkpoint is whole; nothing was changed' in error


def test_join_refuses_what_cannot_be():
  with pytest.raises(UserError, match='--heartbeat_seconds=0: expected 1 or more'):
    processes.join('localhost:1', 2, 0, heartbeat_seconds=0)


def test_join_says_what_does_not_come(monkeypatch):
  def leave(message, status):
    raise SystemExit(f'{message}: {status}')

  monkeypatch.setattr(processes, 'JOIN_SECONDS', 0.3)
  monkeypatch.setattr(interrupt, 'leave', leave)
  monkeypatch.setattr(jax.distributed, 'initialize', pytest.fail)
  for wrong in ('localhost', 'localhost:', ':80', 'localhost:http'):
    with pytest.raises(UserError, match=f'--coordinator={wrong}: expected host:port'):
      processes.join(wrong, 2, 1)
  with socket.socket() as taken:
    taken.bind(('localhost', 0))  # nothing listens
    port = taken.getsockname()[1]
    words = f'process 0 does not answer at localhost:{port} after 0 s; start all processes of the run again: 4'
    with pytest.raises(SystemExit, match=words):
      processes.join(f'localhost:{port}', 2, 1)


ALONE = """
import sys
from train import interrupt, processes

interrupt.end_at_once()
processes.JOIN_SECONDS = float(sys.argv[2])
print('joins', flush=True)
processes.join(f'localhost:{sys.argv[1]}', 2, 0)
"""


@pytest.mark.long
@pytest.mark.parametrize('seconds, status', [(2, processes.GONE), (100, 0)])
def test_a_process_alone_ends(seconds, status):
  """When nobody comes in time, and at SIGTERM."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  pipe = subprocess.PIPE
  run = subprocess.Popen(
    [sys.executable, '-c', ALONE, str(port), str(seconds)], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True
  )
  assert run.stdout.readline() == 'joins\n'
  if status == 0:
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
  _, error = run.communicate(timeout=30)
  assert run.returncode == status, error
  words = 'stopped by SIGTERM' if status == 0 else 'not all processes have joined after 2 s; start all processes'
  assert error.splitlines()[-1].startswith(f'train: {words}')


GLOO = 'FAILED_PRECONDITION: Gloo all-reduce: Connection closed by peer'


@pytest.mark.parametrize('error, is_lost', [
  (jax.errors.JaxRuntimeError(GLOO), True),
  (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), False),
  (processes.Elsewhere(f'process 0: {GLOO}'), False),
  (ConnectionResetError('Connection reset by peer'), False),
])  # fmt: skip
def test_only_errors_of_jax_tell_that_another_is_gone(monkeypatch, capsys, error, is_lost):
  ended = []
  monkeypatch.setattr(processes, 'end', lambda message, status: ended.append((message, status)))
  monkeypatch.setattr(processes.time, 'sleep', lambda _: None)
  assert not processes.is_lost(error)  # a process that is alone
  monkeypatch.setattr(processes, '_listener', object())
  assert processes.is_lost(error) == is_lost
  processes.end_of(error)
  assert ended[0][1] == (processes.GONE if is_lost else 1)
  assert (f'{type(error).__name__}: {error}' in capsys.readouterr().err) == (not is_lost)  # its traceback
  assert ('is gone' in ended[0][0]) == is_lost


def test_a_second_signal_is_told_to_all(monkeypatch):
  told = []
  monkeypatch.setattr(interrupt, 'leave', lambda *args: told.append(args))
  watch = interrupt.Watch()
  for _ in range(2):
    watch._count(signal.SIGTERM)
  assert told == [('stopped at once; the same command continues from the last checkpoint', 128 + signal.SIGTERM)]


class Store:
  """Stands for the client of the coordination service, which several processes share."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, key):
    return [(name, value) for name, value in self.values.items() if name.startswith(key)]


@pytest.mark.parametrize('counts', [(5, 5), (3, 7), (9, 2), (0, 4)])
def test_agreement_stops_all_at_the_same_call(monkeypatch, counts):
  """Two processes as two objects, which have made so many calls when a signal comes to the second."""
  store, signals = Store(), [0, 0]
  both = [processes.Agreement(lambda i=i: signals[i]) for i in range(2)]
  for one in both:
    one.key = 'stop/1'
  asked = [[one.asked() for _ in range(count)] for one, count in zip(both, counts)]
  signals[1] = 15
  at = {0: 0, 1: 1}
  monkeypatch.setattr(processes.jax, 'process_count', lambda: 2)

  def hear(_):  # the first waits here for the second, whose thread gets its turn
    monkeypatch.setattr(processes.jax, 'process_index', lambda: 0)
    both[0].exchange(store, pytest.fail)
    monkeypatch.setattr(processes.jax, 'process_index', lambda: 1)

  monkeypatch.setattr(processes.jax, 'process_index', lambda: at[1])
  # The second tells its count, then waits; the first finds the signal there and both counts.
  both[1].exchange(store, hear)
  asked = [calls + [one.asked() for _ in range(12 - len(calls))] for one, calls in zip(both, asked)]
  assert asked[0] == asked[1] == [0] * max(counts) + [15] * (12 - max(counts))
