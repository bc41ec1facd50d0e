"""python -m train.main: flags, messages, exit status."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from tests.train import tiny
from train import main
from train.config import Config, UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp('main')
  source = tiny.write_corpus(folder / 'text')
  text = f'from tests.train import tiny\n\ndef get_config():\n  return tiny.config({source!r})\n'
  (folder / 'config.py').write_text(text)
  return folder / 'config.py'


@pytest.mark.parametrize(
  'args, words',
  [
    (['--config.model.widht=7'], "--config.model.widht: config.model has no field 'widht'; did you mean width?"),
    (['--config.modle.width=7'], "--config.modle.width: config has no field 'modle'; did you mean model?"),
    (['--config.model.layers[0].windw=5'], "config.model.layers[0] has no field 'windw'; did you mean window?"),
    (['--config.model.layers[5].window=5'], '--config.model.layers[5].window: expected an index'),
    (['--config.model.layers.window=5'], '--config.model.layers.window: expected an index'),
    (['--config.steps=5'], "--config.steps: config has no field 'steps'; did you mean train.steps?"),
    (['--config.optimizer.groups[0].rate=0.5'], 'config.optimizer.groups is empty, expected entries in the config'),
    (['--config.optimizer.groups=[]'], 'this is a list of GroupConfig; make its entries in the config file, and'),
    (['--config.model.layers=[]'], 'as --config.model.layers[0].mixer'),
    (['--config.distill.layers=1'], '--config.distill.layers=1: not numbers in brackets, such as [0,2]'),
    (['--config.distill.layers=[0,x]'], '--config.distill.layers=[0,x]: not numbers in brackets'),
    (['--config.model=5'], '--config.model: expected a single value'),
    (['--config.seed.x=5'], "--config.seed.x: config.seed has no field 'x'"),
    (['--config.model.width=wide'], "--config.model.width=wide: invalid literal for int() with base 10: 'wide'; exp"),
    (['--config.model.width=3.5'], '--config.model.width=3.5'),
    (['--config.model.scan=maybe'], '--config.model.scan=maybe'),
    (['--config.optimizer.learning_rate=fast'], '--config.optimizer.learning_rate=fast'),
    (['--steps=5'], "Unknown command line flag 'steps' (config fields are written --config.train.steps=...)"),
    (['--confg.train.steps=5'], "Unknown command line flag 'confg.train.steps'"),
    (['--config.seed'], '--config.seed'),
    (['--config=/nothing/here.py'], '--config=/nothing/here.py: expected a Python file, found nothing'),
  ],
)
def test_bad_flags_are_one_line_that_names_them(config_file, args, words, capsys, monkeypatch):
  argv = ['main', f'--config={config_file}', *args]
  monkeypatch.setattr(sys, 'argv', argv)
  known = set(flags.FLAGS)
  try:
    with pytest.raises(SystemExit) as stop:
      main.parse(argv)
  finally:
    for name in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.startswith('train: ')
  assert error.count('\n') == 1


def test_good_flags_are_set(config_file, monkeypatch):
  argv = ['main', f'--config={config_file}', '--config.train.steps=7', '--config.model.layers[0].window=4']
  argv += ['--config.model.scan', '--config.seed', '3', '--workdir=x', '--config.distill.layers=[0, 2]']
  monkeypatch.setattr(sys, 'argv', argv)
  known = set(flags.FLAGS)
  try:
    main.parse(argv)
    config = flags.FLAGS.config
    assert (config.train.steps, config.model.layers[0].window, config.model.scan, config.seed) == (7, 4, True, 3)
    assert config.distill.layers == [0, 2]
  finally:
    for name in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def test_help_names_every_field(capsys):
  with pytest.raises(SystemExit) as stop:
    main.parse(['main', '--help'])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  for path in ('train.steps=1000', 'model.layers[0].window=0', 'model.vocab=257', "data.bad_files='error'"):
    assert f'--config.{path}\n' in text
  for path in ('optimizer.groups', 'data.mixture', 'model.layers'):
    assert f'--config.{path}=' not in text and f'  config.{path}: ' in text
  for path in ('optimizer.groups[0].rate=1.0', "data.mixture[0].field='text'", 'distill.layers=[]'):
    assert f'--config.{path}\n' in text
  lines = text.split('Fields and defaults')[1].splitlines()
  assert all(lines[i + 1].strip() for i, line in enumerate(lines) if line.startswith('  --config.'))


def test_config_files(tmp_path):
  with pytest.raises(UserError, match='--config: expected a Python file'):
    main.check([])
  (tmp_path / 'empty.py').write_text('')
  with pytest.raises(UserError, match='expected a function get_config'):
    main.check(['--config', str(tmp_path / 'empty.py')])
  (tmp_path / 'named.py').write_text('from train.config import Config\n\ndef get_config(name):\n  return Config()\n')
  assert main.check([f'--config={tmp_path}/named.py:small', '--config.seed=1']) == {'config.seed': 'int'}
  assert main.field(Config(), 'model.layers[-1].window') == 0


@pytest.mark.parametrize(
  'args, words',
  [
    ([], "--workdir='': expected the path"),
    (['--workdir=/proc/nothing'], 'workdir /proc/nothing: cannot be written to'),
    (['--workdir=/tmp/unused', '--config.data.seq_len=0'], 'data.seq_len=0 must be an integer, 1 or more'),
  ],
)
def test_program_ends_with_one_line(config_file, args, words):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONWARNINGS': 'error'}
  command = [sys.executable, '-m', 'train.main', f'--config={config_file}', *args]
  ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
  assert ended.returncode == 2
  assert ended.stderr.startswith('train: ')
  assert words in ended.stderr
  assert ended.stderr.count('\n') == 1


def test_ctrl_c_before_the_first_step_is_quiet(config_file, tmp_path):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  command = [sys.executable, '-m', 'train.main', f'--config={config_file}', f'--workdir={tmp_path}/run']
  with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
    while process.poll() is None and not (tmp_path / 'run' / 'config.json').exists():
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
  assert process.returncode == -signal.SIGINT
  assert error == ''
