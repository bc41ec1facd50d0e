"""python -m models.generate as a program: Ctrl-C ends it with a line and 130, whenever it comes."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from models.generate import __main__ as command

ROOT = pathlib.Path(__file__).parents[3]


def test_ctrl_c_in_the_imports():
  """They say which module they have reached."""
  words = [sys.executable, '-X', 'importtime', '-m', 'models.generate', '--help']
  with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    while b' jax.' not in process.stderr.readline():
      assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert out == b''
  assert err.endswith(b'python -m models.generate: stopped\n') and b'Traceback' not in err


class Ended(BaseException):
  """What os._exit does in a test."""


@pytest.fixture
def program(monkeypatch):
  """program(what main does) -> the status and whether it ended past the ordinary end, at which jax can crash."""
  before = signal.getsignal(signal.SIGINT)
  monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
  hard = []

  def end(status):
    hard.append(status)
    raise Ended

  monkeypatch.setattr(os, '_exit', end)

  def program(main):
    monkeypatch.setattr(command, 'main', main)
    try:
      command.program()
    except Ended:
      return hard[0], True
    except SystemExit as stop:
      return stop.code, False
    raise AssertionError('did not end')

  yield program
  signal.signal(signal.SIGINT, before)


def interrupted():
  signal.raise_signal(signal.SIGINT)
  return 0


def twice():
  try:
    interrupted()
  finally:
    interrupted()


class Deaf:
  def __del__(self):
    interrupted()


def passed_over():
  """A Ctrl-C whose error Python ignores."""
  value = Deaf()
  del value
  return 0


@pytest.mark.parametrize(
  'main, status, is_hard',
  [
    (lambda: 0, 0, False),
    (lambda: 2, 2, False),
    (lambda: 130, 130, True),
    (interrupted, 130, True),
    (twice, 130, True),
  ],
)
def test_ends_of_the_program(main, status, is_hard, program):
  assert program(main) == (status, is_hard)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_ctrl_c_that_python_passes_over(program, monkeypatch, capfd):
  calls = []
  monkeypatch.setattr(os, '_exit', calls.append)  # the hook must not raise
  assert program(passed_over) == (0, False)  # as the test is still here
  assert calls == [130]
  assert 'python -m models.generate: stopped\n' in capfd.readouterr().err
