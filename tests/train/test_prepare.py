"""python -m train.prepare: what it prints and refuses, and that a run finds what it has prepared."""

import os
import signal
import subprocess
import sys
import types

import pytest

from tests.train import tiny
from train import main, prepare
from train.config import DataConfig, SourceConfig
from train.data import encode, store


def command(*arguments):
  """(exit status, stdout, stderr) of the command in a process of its own."""
  done = subprocess.run(
    [sys.executable, '-m', 'train.prepare', *map(str, arguments)],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp('config')
  source = tiny.write_corpus(folder / 'text')
  (folder / 'named.py').write_text(
    f'from tests.train import tiny\n\ndef get_config():\n  return tiny.config({source!r})\n', encoding='utf-8'
  )
  return folder / 'named.py'


def test_it_prepares_what_a_run_reads(config_file, tmp_path, monkeypatch):
  status, out, err = command(f'--config={config_file}', f'--workdir={tmp_path}', '--config.data.seq_len=8')
  assert (status, err) == (0, '')
  monkeypatch.setattr(encode, 'prepare', lambda *_: pytest.fail('prepared again'))
  config = DataConfig(source=str(config_file.parent / 'text'), held_out_percent=20)
  found = store.open_or_prepare(config, tmp_path)
  size, tokens = found.size('train'), len(found.parts[0].train.stream)
  assert f'20 documents, {size:,} bytes, {tokens:,} tokens ({size / tokens:.2f} bytes a token)' in out
  assert f'{found.size("held_out"):,} bytes' in out
  assert '0 bad, 0 duplicates' in out
  assert found.hash in out
  assert str(found.folder) in out


def test_the_table_of_a_mixture(tmp_path):
  for name, count in (('a', 30), ('b', 20)):
    (tmp_path / f'{name}.jsonl').write_text(''.join(f'{{"text": [{i}, 1, 2]}}\n' for i in range(9, count)) + 'broken\n')
  mixture = [SourceConfig(source=str(tmp_path / f'{name}.jsonl')) for name in 'ab']
  config = DataConfig(mixture=mixture, tokenizer='none', separator='0',
                      bad_files='skip', held_out_percent=30)  # fmt: skip
  text = prepare.table(store.open_or_prepare(config, tmp_path / 'run'))
  for words in (
    'a.jsonl to train on',
    'b.jsonl held out',
    '2 bad',
    'a.jsonl:22: broken JSON',
    'b.jsonl:12: broken JSON',
  ):
    assert words in text
  assert 'bytes' not in text


def in_process(monkeypatch, source, workdir, *more, **data):
  """The exit status of the command, run here: absl reads the flags of a process once."""
  model = {'vocab': data.pop('vocab', 260)}
  given = types.SimpleNamespace(config=tiny.config(source, data=data, model=model), workdir=workdir and str(workdir))
  monkeypatch.setattr(prepare, 'flags', types.SimpleNamespace(FLAGS=given))
  return prepare.main(['prepare', *more])


@pytest.mark.parametrize(
  'workdir, more, words',
  [
    ('', {}, "--workdir='': expected the folder of a run, or --config.data.prepared=DIR"),
    ('{0}/run', {'source': '/nothing/here'}, "data.source='/nothing/here': expected a file"),
    ('{0}/run', {'vocab': 10}, 'model.vocab=10: expected at least 257'),
    ('{0}', {}, 'expected a new or empty folder or a run, found other'),
    ('{1}/text/run', {}, 'expected a folder outside of the text data.source'),
    ('', {'prepared': '{1}/text/run'}, 'data.prepared='),
  ],
)
def test_what_does_not_fit_is_one_line_and_status_2(config_file, tmp_path, capsys, monkeypatch, workdir, more, words):
  (tmp_path / 'other').write_text('')
  here = lambda value: value.format(tmp_path, config_file.parent) if isinstance(value, str) else value
  more = {name: here(value) for name, value in more.items()}
  source = more.pop('source', config_file.parent / 'text')
  assert in_process(monkeypatch, str(source), here(workdir), **more) == 2
  err = capsys.readouterr().err
  assert words in err
  assert err.startswith('prepare: ')
  assert err.count('\n') == 1
  assert [path.name for path in tmp_path.iterdir()] == ['other']
  assert not (config_file.parent / 'text' / 'run').exists()


def test_only_flags(config_file, tmp_path, capsys, monkeypatch):
  assert in_process(monkeypatch, str(config_file.parent / 'text'), tmp_path, 'more') == 2
  assert "prepare: 'more': expected only flags" in capsys.readouterr().err


def test_ctrl_c_is_told(config_file, tmp_path, capsys, monkeypatch):
  def stop(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(store, 'open_or_prepare', stop)
  assert in_process(monkeypatch, str(config_file.parent / 'text'), tmp_path) == 130
  assert 'stopped; the same command goes on' in capsys.readouterr().err


@pytest.mark.parametrize('is_importing', [True, False])
@pytest.mark.parametrize('number, status, words', [(signal.SIGINT, 130, ''), (signal.SIGTERM, 143, 'SIGTERM')])
def test_signals_end_it_with_their_status(config_file, tmp_path, is_importing, number, status, words):
  # What it imports first, or the config file, says that it is read, and holds the command up.
  (tmp_path / 'slow').mkdir()
  module = tmp_path / 'slow' / ('absl.py' if is_importing else 'slow.py')
  hold = 'import os, time\nos.write(1, b"here")\ntime.sleep(60)\n'
  module.write_text(hold if is_importing else f'def get_config():\n  pass\n{hold}')
  config = config_file if is_importing else module
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  if is_importing:
    environment['PYTHONPATH'] = f'{tmp_path / "slow"}'
  process = subprocess.Popen(
    [sys.executable, '-m', 'train.prepare', f'--config={config}', f'--workdir={tmp_path / "run"}'],
    env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  assert process.stdout.read(4) == b'here'
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == status
  assert err.decode() == (f'prepare: stopped by {words}; the same command goes on\n' if words else '')


def test_a_bad_flag_is_told_by_this_program(config_file):
  status, _, err = command(f'--config={config_file}', '--config.data.sources=a')
  assert status == 2
  assert err.startswith('prepare: --config.data.sources: config.data has no field')


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help(capsys, flag):
  with pytest.raises(SystemExit) as stop:
    prepare.parse(['prepare', flag])
  assert stop.value.code == 0
  out = capsys.readouterr().out
  assert 'python -m train.prepare --config=FILE.py --workdir=DIR' in out
  assert 'Exit status' in out
  assert 'looks through all files again' in out
  assert main.usage() not in out
