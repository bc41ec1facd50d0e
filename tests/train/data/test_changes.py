"""Going on with a run whose files or tokens have changed, come back or moved, and trouble of the machine."""

import errno
import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

from tests.models.hf import made_tokenizers as made
from tests.train import tiny
from train import config as configs, loop, workdir as workdirs
from train.config import DataConfig, SourceConfig, UserError
from train.data import corpus, encode, readers, scan, store, tokenizers

TEXTS = [f'letter {i} of {7 * i}' for i in range(60)]


def write_lines(path, texts):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts), encoding='utf-8')
  return str(path)


def begin(config, workdir):
  """What a run does with its text before its first step."""
  workdir.mkdir(exist_ok=True)
  stored = workdirs.check(workdir, config)
  found = store.open_or_prepare(config.data, workdir, vocab=config.model.vocab)
  workdirs.check_corpus(workdir, stored, found)
  workdirs.write_run(workdir, config, found, 0, {})
  return found


@pytest.fixture
def tokenized(tmp_path):
  """A config of lines and a tokenizer file."""
  made.folder(tmp_path / 'hf', made.byte_level())
  data = {'tokenizer': str(tmp_path / 'hf'), 'separator': '</s>', 'held_out_percent': 20.0}
  return tiny.config(write_lines(tmp_path / 'a.jsonl', TEXTS), data=data, model={'vocab': 300})


def test_other_tokens_of_the_same_text_are_refused(tokenized, tmp_path, monkeypatch):
  first = begin(tokenized, tmp_path / 'run')
  assert json.loads((tmp_path / 'run' / 'corpus.json').read_text())['tokens'] == first.tokens
  assert begin(tokenized, tmp_path / 'run').tokens == first.tokens
  shutil.rmtree(tmp_path / 'run' / 'data')
  encode_texts = tokenizers.FromFile.encode_texts
  with monkeypatch.context() as patch:
    # As another version of the library might.
    swapped = lambda self, texts: [ids[::-1] for ids in encode_texts(self, texts)]
    patch.setattr(tokenizers.FromFile, 'encode_texts', swapped)
    with pytest.raises(UserError, match=r'tokens of the same text are others .*install the version .*goes on'):
      begin(tokenized, tmp_path / 'run')
  assert list((tmp_path / 'run' / 'data').iterdir()) == []
  assert begin(tokenized, tmp_path / 'run').tokens == first.tokens


def test_the_tokens_of_a_text_are_told_by_their_bytes_too(tmp_path, monkeypatch):
  np.save(tmp_path / 'a.npy', np.arange(200).reshape(50, 4))
  prepare = lambda name: store.open_or_prepare(DataConfig(source=str(tmp_path / 'a.npy')), tmp_path / name)
  first = prepare('one')
  assert prepare('two').tokens == first.tokens
  monkeypatch.setattr(tokenizers.Bytes, 'count_bytes', lambda self, documents: [7] * len(documents))
  assert prepare('three').hash == first.hash
  assert prepare('four').tokens != first.tokens


def test_a_text_that_changed_is_refused_before_it_is_prepared_and_can_be_restored(tmp_path, monkeypatch):
  text = tmp_path / 'text'
  config = tiny.config(tiny.write_corpus(text))
  first = begin(config, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'data')
  shutil.copytree(text, tmp_path / 'copy')
  (text / 'p1' / 'f0.txt').write_text('something else')
  (text / 'p2' / 'f1.txt').unlink()
  with monkeypatch.context() as patch:
    patch.setattr(encode, 'prepare', lambda *_: pytest.fail('prepared'))
    words = r'run: the text has changed since the run began: p1/f0\.txt, p2/f1\.txt \(gone\)\.'
    with pytest.raises(UserError, match=words + r'.*restore the files, and the same command goes on'):
      begin(config, tmp_path / 'run')
  shutil.copytree(tmp_path / 'copy', text, dirs_exist_ok=True)
  # A file that is new is found when all are prepared.
  (text / 'p1' / 'new.txt').write_text('something new')
  with pytest.raises(UserError, match=r'run: the text has changed .*: p1/new\.txt\. Going on'):
    begin(config, tmp_path / 'run')
  (text / 'p1' / 'new.txt').unlink()
  assert begin(config, tmp_path / 'run').hash == first.hash


def test_prepared_tokens_that_others_may_use_stay_after_a_refusal(tmp_path):
  text, shared = tmp_path / 'text', str(tmp_path / 'shared')
  config = tiny.config(tiny.write_corpus(text), data={'prepared': shared})
  begin(config, tmp_path / 'run')
  shutil.rmtree(shared)
  (text / 'p1' / 'new.txt').write_text('something new')
  found = store.open_or_prepare(config.data, '')
  with pytest.raises(UserError, match='text has changed'):
    begin(config, tmp_path / 'run')
  assert (found.folder / encode.INDEX).exists()


@pytest.mark.parametrize('setting', ['source', 'mixture', 'held_out', 'tokenizer'])
def test_what_has_moved_and_is_the_same_goes_on(tokenized, tmp_path, setting):
  source, data = tokenized.data.source, tokenized.data
  if setting == 'mixture':
    data.mixture = [SourceConfig(source=source)]
  elif setting == 'held_out':
    data.held_out = write_lines(tmp_path / 'held' / 'h.jsonl', ['held out'])
  first = begin(tokenized, tmp_path / 'run')

  def move(changed):
    moved = tmp_path / ('changed' if changed else 'moved')
    texts = [*TEXTS, 'one more'] if changed else TEXTS
    if setting == 'tokenizer':
      data.tokenizer = str(moved / 'hf')
      moved.mkdir()
      made.folder(moved / 'hf', made.with_fallback() if changed else made.byte_level())
    elif setting == 'held_out':
      data.held_out = write_lines(moved / 'h.jsonl', ['held out', 'one more'] if changed else ['held out'])
    elif setting == 'mixture':
      data.mixture[0].source = write_lines(moved / 'a.jsonl', texts)
    else:
      data.source = write_lines(moved / 'a.jsonl', texts)

  move(False)
  found = begin(tokenized, tmp_path / 'run')
  assert (found.hash, found.tokens) == (first.hash, first.tokens)
  move(True)
  with pytest.raises(UserError, match='the text has changed since the run began'):
    begin(tokenized, tmp_path / 'run')
  assert set((tmp_path / 'run' / 'data').iterdir()) == {first.folder, found.folder}


def test_other_fields_of_the_data_are_still_another_run(tmp_path):
  old = tiny.config('a')
  for field, value in (('seq_len', 8), ('separator', '256'), ('field', 'body'), ('held_out_percent', 21)):
    new = tiny.config('b', data={field: value})
    [line] = configs.differences(configs.to_dict(old), configs.to_dict(new))
    assert line.startswith(f'data.{field}: ')


def test_a_finished_run_looks_at_a_source_that_moved(tmp_path):
  source = tiny.write_corpus(tmp_path / 'text', words=20)
  config = tiny.config(source, train={'steps': 1})
  result = loop.run(config, tmp_path / 'run')
  shutil.copytree(source, tmp_path / 'moved')
  config.data.source = str(tmp_path / 'moved')
  assert loop.run(config, tmp_path / 'run')['corpus_hash'] == result['corpus_hash']
  (tmp_path / 'moved' / 'p0' / 'f0.txt').write_text('something else')
  config.data.source = f'{tmp_path}/moved/**'
  with pytest.raises(UserError, match=r'text has changed since the run began: p0/f0\.txt\.'):
    loop.run(config, tmp_path / 'run')


@pytest.mark.parametrize('how', ['written', 'replaced'])
def test_another_content_of_the_same_size_and_date_is_found(tmp_path, how):
  path = pathlib.Path(write_lines(tmp_path / 'text' / 'a.jsonl', TEXTS))
  prepare = lambda: store.open_or_prepare(DataConfig(source=str(path)), tmp_path / 'run')
  prepare()
  date, content = path.stat().st_mtime_ns, path.read_bytes().replace(b'letter 7', b'letter X')
  if how == 'replaced':
    (tmp_path / 'other').write_bytes(content)
    os.utime(tmp_path / 'other', ns=(date, date))
    os.replace(tmp_path / 'other', path)
  else:
    path.write_bytes(content)
  os.utime(path, ns=(date, date))
  with pytest.raises(UserError, match=r'text has changed since its tokens were prepared: a\.jsonl\.'):
    prepare()


@pytest.mark.parametrize('field', [0, 1, 2])
def test_each_date_and_the_inode_are_looked_at(tmp_path, monkeypatch, field):
  source = write_lines(tmp_path / 'a.jsonl', TEXTS)
  prepare = lambda: store.open_or_prepare(DataConfig(source=source), tmp_path / 'run')
  prepare()
  found = os.stat(source)
  assert scan.state(source) == [found.st_size, [found.st_mtime_ns, found.st_ctime_ns, found.st_ino], '']
  state, hashed, fingerprint = scan.state, [], scan.fingerprint

  def moved(path):
    size, dates, digest = state(path)
    return [size, [value + (i == field) for i, value in enumerate(dates)], digest]

  monkeypatch.setattr(scan, 'fingerprint', lambda path: (hashed.append(path), fingerprint(path))[1])
  prepare()
  assert hashed == []
  monkeypatch.setattr(scan, 'state', moved)
  prepare()
  assert hashed == [source]


def failing(monkeypatch, name, number):
  """Opening files of this name fails with an error of the system."""
  real = open

  def fails(path, *arguments, **options):
    if str(path).endswith(name):
      raise OSError(number, os.strerror(number))
    return real(path, *arguments, **options)

  monkeypatch.setattr('builtins.open', fails)


@pytest.mark.parametrize('bad_files', ['error', 'skip'])
@pytest.mark.parametrize('number', [errno.EIO, errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize('kind', ['jsonl', 'txt'])
def test_trouble_of_the_machine_is_no_bad_file(tmp_path, monkeypatch, number, kind, bad_files):
  for name in 'abcdefgh':
    os.chmod(write_lines(tmp_path / 'text' / f'{name}.{kind}', TEXTS), 0o644)
  with monkeypatch.context() as patch:
    failing(patch, f'b.{kind}', number)
    with pytest.raises(UserError, match=rf'b\.{kind}: cannot be read \(.*start again when the machine can') as error:
      store.open_or_prepare(DataConfig(source=str(tmp_path / 'text'), bad_files=bad_files), tmp_path / 'run')
  assert 'skip' not in str(error.value)


def test_a_file_without_rights_is_left_out_until_it_has_them(tmp_path, monkeypatch):
  for name in 'abc':
    write_lines(tmp_path / 'text' / f'{name}.jsonl', [f'{name} {text}' for text in TEXTS])
  os.chmod(tmp_path / 'text' / 'b.jsonl', 0o600)
  prepare = lambda: store.open_or_prepare(DataConfig(source=str(tmp_path / 'text'), bad_files='skip'), tmp_path / 'run')
  with monkeypatch.context() as patch:
    failing(patch, 'b.jsonl', errno.EACCES)
    assert prepare().record()['skipped'] == {'b.jsonl': 'unreadable (Permission denied)'}
    prepare()
  with pytest.raises(UserError, match=r'text has changed since its tokens were prepared: b\.jsonl\.'):
    prepare()


def test_a_bad_text_file_of_another_date_is_the_same(tmp_path):
  text = tmp_path / 'text'
  tiny.write_corpus(text)
  (text / 'bad.txt').write_bytes(b'\xff')
  prepare = lambda: store.open_or_prepare(DataConfig(source=str(text), bad_files='skip'), tmp_path / 'run')
  prepare()
  os.utime(text / 'bad.txt', ns=(1, 1))
  prepare()
  (text / 'bad.txt').write_bytes(b'good')
  with pytest.raises(UserError, match=r': bad\.txt\. Going on'):
    prepare()


def test_a_package_that_is_missing_is_no_bad_file(tmp_path, monkeypatch):
  (tmp_path / 'a.parquet').write_bytes(b'PAR1')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match=r'a.parquet: reading Parquet needs the package pyarrow.*pip install') as error:
    list(readers.documents(str(tmp_path / 'a.parquet'), 'parquet', 'text', 256, 257))
  assert 'skip' not in str(error.value)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
  tiny.write_corpus(tmp_path / 'text')
  real = os.scandir

  def fails(path):
    if str(path).endswith('p3'):
      raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    return real(path)

  monkeypatch.setattr(os, 'scandir', fails)
  with pytest.raises(UserError, match=r"data.source='.*text': the folder .*p3 cannot be listed \(Permission denied\)"):
    corpus.find(str(tmp_path / 'text'), 'data.source')
