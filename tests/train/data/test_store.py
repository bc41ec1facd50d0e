"""train.data.store: what is prepared, that it is found again or goes on after a kill; damage and changes are named."""

import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st

from tests.models.hf import made_tokenizers as made
from tests.train import tiny
from train import meter
from train.config import DataConfig, SourceConfig, UserError
from train.data import encode, scan, shards, store

# A preparation in tiny shards that kills itself in its NUMBER-th write to a file.
KILLER = """
import os, signal, sys
from train.data import encode, shards, store
from train.config import DataConfig

source, folder, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
encode.BATCH, encode.SHARD = 300, 1000
fsync, count = os.fsync, 0

def counted(file):
  global count
  count += 1
  if count == number:
    os.kill(os.getpid(), signal.SIGKILL)
  fsync(file)

os.fsync = counted
store.open_or_prepare(DataConfig(source=source, held_out_percent=20.0), folder)
"""


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return tiny.write_corpus(tmp_path_factory.mktemp('corpus') / 'text')


def prepare(source, workdir, **settings):
  return store.open_or_prepare(DataConfig(source=str(source), held_out_percent=20.0, **settings), workdir)


def documents(tokens):
  """{name: list of ids}."""
  return {tokens.name(i): tokens.document(i).tolist() for i in range(len(tokens))}


def texts_below(folder):
  """{name: bytes} of all files of a folder, in the order of their names."""
  paths = sorted(path for path in pathlib.Path(folder).rglob('*') if path.is_file())
  return dict(sorted((path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths))


def folder_of(workdir):
  [folder] = (pathlib.Path(workdir) / 'data').iterdir()
  return folder


def shards_in(folder):
  """How many shards the journal of a folder has."""
  return len((folder / shards.JOURNAL).read_text().splitlines()) - 1


def contents(folder):
  """{name: bytes} of prepared tokens, without the lock."""
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != encode.LOCK}


def test_text_is_split_ordered_and_hashed_as_ever(source, tmp_path):
  found = prepare(source, tmp_path / 'run')
  # Figures of the version that held all text in memory.
  assert found.hash == 'b703b9398a00ef074ddf1de1dafb3cd228d7be7c3551c1a8c630c61471a3acac'
  [part] = found.parts
  assert list(part.held_out.names) == ['p2/f0.txt', 'p2/f1.txt', 'p5/f0.txt', 'p5/f1.txt']
  shutil.copytree(pathlib.Path(source) / 'p0', tmp_path / 'other' / 'p0')
  shutil.copytree(pathlib.Path(source) / 'p1', tmp_path / 'other' / 'p1')
  named = prepare(source, tmp_path / 'run', held_out=str(tmp_path / 'other'))
  assert named.hash == 'f5bf227877763704ea659e29b1cbcc7b2b09410f5b180f37ff625a7ed00b9433'
  assert named.record()['duplicates'] == ['p0/f0.txt', 'p0/f1.txt', 'p1/f0.txt', 'p1/f1.txt']


def test_a_stream_is_separators_and_bytes(source, tmp_path):
  found = prepare(source, tmp_path)
  [part] = found.parts
  texts, digest, files = texts_below(source), hashlib.sha256(), []
  for split, tokens in (('train', part.train), ('held_out', part.held_out)):
    own = {name: text for name, text in texts.items() if (name in part.held_out.names) == (split == 'held_out')}
    assert tokens.stream.dtype == np.uint16
    assert tokens.stream.tolist() == [i for text in own.values() for i in (256, *text)]
    assert list(tokens.names) == list(own)
    assert tokens.byte_counts.tolist() == [len(text) for text in own.values()]
    assert all(tokens.stream[start] == 256 for start in tokens.starts)
    assert found.size(split) == sum(map(len, own.values()))
  for name, text in texts.items():
    split = 'held_out' if name in part.held_out.names else 'train'
    digest.update(f'{split}\0{name}\0{len(text)}\0'.encode() + text)
    files.append([name, split, len(text), hashlib.sha256(text).hexdigest()[:16]])
  assert (found.hash, found.unit, found.vocab, found.separator) == (digest.hexdigest(), 'byte', 257, 256)
  record = found.record()
  assert record['files'] == files
  assert record['held_out_packages'] == ['p2', 'p5']
  assert {name: record['train'][name] for name in ('files', 'packages', 'documents')} == \
         {'files': 20, 'packages': 10, 'documents': 20}  # fmt: skip
  json.dumps(record)


@given(st.lists(st.one_of(st.binary(max_size=5), st.lists(st.integers(0, 70000), max_size=5)), max_size=5))
def test_in_memory(contents):
  found = store.in_memory([(f'd{i}', content) for i, content in enumerate(contents)], separator=300)
  assert found.stream.tolist() == [i for content in contents for i in (300, *content)]
  assert documents(found) == {f'd{i}': list(content) for i, content in enumerate(contents)}
  assert found.byte_counts.tolist() == list(map(len, contents))
  assert found.stream.dtype == (np.uint16 if max([0, *found.stream]) < 2**16 else np.uint32)


WORDS = [f'document number {i} é' for i in range(40)]


def write(folder, kind, texts):
  """A file of texts in a format; returns its path. Arrays hold the bytes of the texts."""
  folder.mkdir(exist_ok=True)
  path = folder / {'jsonl': 'a.jsonl', 'ids': 'a.jsonl', 'parquet': 'a.parquet', 'tokens': 'a.npy'}[kind]
  if kind in ('jsonl', 'ids'):
    values = texts if kind == 'jsonl' else [list(text.encode()) for text in texts]
    path.write_text(''.join(json.dumps({'text': value}) + '\n' for value in values))
  elif kind == 'parquet':
    pa.parquet.write_table(pa.table({'text': texts}), path, row_group_size=7)
  else:
    np.save(path, np.array([i for text in texts for i in (256, *text.encode())], np.uint16))
  return path


@pytest.mark.parametrize('kind', ['jsonl', 'ids', 'parquet', 'tokens'])
def test_records_are_split_by_their_content(tmp_path, kind):
  path = write(tmp_path / 'a', kind, [*WORDS, WORDS[3], WORDS[5]])
  found = prepare(path, tmp_path / 'run')
  [part] = found.parts
  by_content = {bytes(ids): name for side in found.side('train') + found.side('held_out')
                for name, ids in documents(side).items()}  # fmt: skip
  assert by_content == {text.encode(): f'{path.name}:{i + 1}' for i, text in enumerate(WORDS)}
  record = found.record()
  assert record['duplicates'] == [f'{path.name}:41', f'{path.name}:42']
  assert record['files'] == [
    [path.name, 'rows', path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()[:16]]
  ]
  assert len(part.train) + len(part.held_out) == 40
  assert 2 <= len(part.held_out) <= 16
  assert list(part.train.starts) == sorted(part.train.starts)
  # Order and other files change neither side.
  other = write(tmp_path / 'b', kind, [f'new {i}' for i in range(20)] + WORDS[::-1])
  held = lambda found: {bytes(ids) for tokens in found.side('held_out') for ids in documents(tokens).values()}
  assert held(prepare(other, tmp_path / 'run')) - {f'new {i}'.encode() for i in range(20)} == held(found)
  # One content more or less is another corpus.
  write(tmp_path / 'b', kind, WORDS[:39])
  assert prepare(other, tmp_path / 'run2').hash != found.hash


@pytest.mark.parametrize(
  'highest, dtype', [(65534, np.uint16), (65535, np.uint16), (65536, np.uint32), (2**32 - 2, np.uint32)]
)
def test_ids_without_a_tokenizer(tmp_path, highest, dtype):
  rows = np.arange(60, dtype=np.int64).reshape(20, 3)
  rows[3, 1] = highest
  np.save(tmp_path / 'a.npy', rows)
  found = prepare(tmp_path / 'a.npy', tmp_path / 'run', tokenizer='none', separator='100')
  assert (found.unit, found.vocab, found.parts[0].train.stream.dtype) == ('token', highest + 1, dtype)
  both = documents(found.parts[0].train) | documents(found.parts[0].held_out)
  assert [both[f'a.npy:{i + 1}'] for i in range(20)] == rows.tolist()
  assert set(found.parts[0].train.byte_counts) == {3}
  with pytest.raises(UserError, match=r"model.vocab=100: expected at least 101, for the ids of data.tokenizer='none'"):
    store.open_or_prepare(found_config(tmp_path), tmp_path / 'run', vocab=100)
  with pytest.raises(UserError, match=rf'model.vocab=101: expected at least {highest + 1}'):
    store.open_or_prepare(found_config(tmp_path), tmp_path / 'run', vocab=101)
  with pytest.raises(UserError, match='expected documents with a text'):
    list(store.texts(found_config(tmp_path), found, 'held_out'))


def found_config(tmp_path):
  return DataConfig(source=str(tmp_path / 'a.npy'), held_out_percent=20.0, tokenizer='none', separator='100')


def test_a_tokenizer_file(tmp_path):
  made.folder(tmp_path / 'hf', library := made.byte_level(), eos_token_id=library.token_to_id('</s>'))
  path = write(tmp_path, 'jsonl', WORDS)
  config = DataConfig(source=str(path), tokenizer=str(tmp_path / 'hf'), held_out_percent=20.0)
  found = store.open_or_prepare(config, tmp_path / 'run')
  library.encode_special_tokens = True
  both = documents(found.parts[0].train) | documents(found.parts[0].held_out)
  assert both == {f'a.jsonl:{i + 1}': library.encode(text).ids for i, text in enumerate(WORDS)}
  assert found.size('train') + found.size('held_out') == sum(len(text.encode()) for text in WORDS)
  assert found.separator == library.token_to_id('</s>')
  assert found.vocab <= library.get_vocab_size()
  held = dict(store.texts(config, found, 'held_out'))
  assert held == {name: WORDS[int(name.split(':')[1]) - 1].encode() for name in documents(found.parts[0].held_out)}
  # The same text with another tokenizer is another corpus, and tells which file differs.
  other = made.folder(tmp_path / 'other', library := made.with_fallback(), eos_token_id=2)
  config.tokenizer = str(other)
  changed = store.open_or_prepare(config, tmp_path / 'run')
  assert changed.hash != found.hash
  assert [row[1] for row in changed.record()['files']] == ['rows', 'tokenizer']


def test_texts_are_read_again_in_order(source, tmp_path):
  ids = write(tmp_path, 'ids', WORDS)
  mixture = [SourceConfig(source=source), SourceConfig(source=str(ids))]
  config = DataConfig(mixture=mixture, held_out_percent=20.0)
  found = store.open_or_prepare(config, tmp_path / 'run')
  for split in ('train', 'held_out'):
    want = [(f'[{part}] {name}', bytes(ids)) for part, tokens in enumerate(found.side(split))
            for name, ids in documents(tokens).items()]  # fmt: skip
    assert list(store.texts(config, found, split)) == want


def test_text_that_gives_the_separator_or_nothing_is_bad(tmp_path):
  library = made.byte_level()
  made.folder(tmp_path / 'hf', library)
  space, path = library.token_to_id('Ġ'), write(tmp_path, 'jsonl', ['ab', 'a b', 'cd', 'ef'])
  with pytest.raises(UserError, match=rf'a.jsonl:2: it holds the token {space}, which is data.separator'):
    prepare(path, tmp_path / 'run', tokenizer=str(tmp_path / 'hf'), separator=str(space))
  found = prepare(path, tmp_path / 'run', tokenizer=str(tmp_path / 'hf'), separator='Ġ', bad_files='skip')
  assert list(found.record()['skipped']) == ['a.jsonl:2']
  assert found.documents('train') + found.documents('held_out') == 3
  from tokenizers import normalizers

  library.normalizer = normalizers.Strip()
  made.folder(tmp_path / 'hf', library)
  path = write(tmp_path, 'jsonl', ['ab', '  ', 'cd', 'ef'])
  with pytest.raises(UserError, match=r'a.jsonl:2: the tokenizer gives no ids for it'):
    prepare(path, tmp_path / 'run2', tokenizer=str(tmp_path / 'hf'), separator='</s>')


def test_text_without_a_tokenizer_is_refused(source, tmp_path):
  with pytest.raises(UserError, match=r"f0.txt: a text, expected token ids for data.tokenizer='none'"):
    prepare(source, tmp_path, tokenizer='none', separator='0')


def test_bad_records_are_named_or_counted(tmp_path, monkeypatch):
  path = write(tmp_path, 'jsonl', WORDS)
  lines = path.read_text().splitlines()
  lines[3:3] = ['{"text": ""}', 'no JSON', '{"other": 1}']
  path.write_text('\n'.join(lines))
  with pytest.raises(UserError, match=rf'{path}:4: empty; remove it, or set data.bad_files=skip'):
    prepare(path, tmp_path / 'run')
  monkeypatch.setattr(scan, 'MOST_NAMED', 2)
  record = prepare(path, tmp_path / 'run', bad_files='skip').record()
  assert record['skipped_count'] == 3
  assert list(record['skipped']) == ['a.jsonl:4', 'a.jsonl:5']
  path.write_text('no JSON')
  with pytest.raises(UserError, match=r"no document is left for 'train' .*first bad one is a.jsonl:1: broken JSON"):
    prepare(path, tmp_path / 'other', bad_files='skip')


def test_a_second_run_finds_what_is_there(source, tmp_path, monkeypatch):
  first = prepare(source, tmp_path / 'run', prepared=str(tmp_path / 'all'))
  monkeypatch.setattr(encode, 'prepare', lambda *_: pytest.fail('prepared again'))
  second = prepare(source, tmp_path / 'other', prepared=str(tmp_path / 'all'), seq_len=7, batch=3, packing='single')
  assert second.record() == first.record()
  assert documents(second.parts[0].train) == documents(first.parts[0].train)
  assert not (tmp_path / 'other').exists()
  monkeypatch.chdir(pathlib.Path(source).parent)
  assert prepare('text', tmp_path / 'other', prepared=str(tmp_path / 'all')).folder == first.folder


def test_other_processes_only_open(source, tmp_path, monkeypatch):
  read = lambda: store.open_or_prepare(
    DataConfig(source=source, held_out_percent=20.0), tmp_path, is_writer=False, say=lambda line: pytest.fail(line)
  )
  with pytest.raises(UserError, match='expected prepared tokens, found none'):
    read()
  want = prepare(source, tmp_path)
  monkeypatch.setattr(shards, 'verify', lambda *_: pytest.fail('read all of it'))
  assert read().record() == want.record()


def killed(source, workdir, number):
  """Runs KILLER; whether it was killed."""
  command = [sys.executable, '-c', KILLER, str(source), str(workdir), str(number)]
  done = subprocess.run(command, env={**os.environ, 'PYTHONPATH': os.getcwd()}, check=False)
  assert done.returncode in (0, -signal.SIGKILL)
  return done.returncode != 0


@pytest.fixture
def small_shards(monkeypatch):
  monkeypatch.setattr(encode, 'BATCH', 300)
  monkeypatch.setattr(encode, 'SHARD', 1000)


@pytest.fixture
def uninterrupted(source, tmp_path, small_shards):
  """The files that a preparation in small shards gives."""
  prepare(source, tmp_path / 'whole')
  files = contents(folder_of(tmp_path / 'whole'))
  assert len(json.loads(files['index.json'])['values']['shards']) > 5
  return files


def test_a_killed_preparation_goes_on(source, tmp_path, uninterrupted, monkeypatch):
  # The journal is synced once, then with 10 columns in a shard: this one dies within the third.
  assert killed(source, tmp_path / 'run', 27)
  begun = contents(folder_of(tmp_path / 'run'))
  assert shards_in(folder_of(tmp_path / 'run')) == 2
  assert 'index.json' not in begun
  encoded, add = [], encode._Encoder._encode
  monkeypatch.setattr(encode._Encoder, '_encode', lambda self: (encoded.extend(self._batch), add(self)))
  prepare(source, tmp_path / 'run')
  assert contents(folder_of(tmp_path / 'run')) == uninterrupted
  assert len(encoded) == 20  # of 24: the first two shards were there


@pytest.mark.long
def test_killed_again_and_again(source, tmp_path, uninterrupted):
  count = 0
  while killed(source, tmp_path / 'run', 25 + count % 11):
    count += 1
  assert count > 2
  assert contents(folder_of(tmp_path / 'run')) == uninterrupted


@pytest.mark.parametrize('change', ['damage', 'text'])
def test_what_was_begun_otherwise_is_not_used(tmp_path, small_shards, monkeypatch, change):
  def stop(*_):
    raise KeyboardInterrupt

  source = tiny.write_corpus(tmp_path / 'text')
  with monkeypatch.context() as patch:
    patch.setattr(encode._Encoder, 'end', stop)
    with pytest.raises(KeyboardInterrupt):
      prepare(source, tmp_path / 'run')
  folder = folder_of(tmp_path / 'run')
  assert shards_in(folder) > 3
  changed = (folder / '0.train.tokens') if change == 'damage' else tmp_path / 'text' / 'p0' / 'f0.txt'
  content = bytearray(changed.read_bytes())
  content[50] ^= 1
  changed.write_bytes(content)
  prepare(source, tmp_path / 'run')
  prepare(source, tmp_path / 'whole')
  assert contents(folder) == contents(folder_of(tmp_path / 'whole'))


@pytest.fixture(scope='module')
def prepared(source, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('prepared')
  prepare(source, workdir)
  return folder_of(workdir)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_damage_is_named(source, prepared, tmp_path_factory, data):
  files = {name: content for name, content in contents(prepared).items() if content}
  name = data.draw(st.sampled_from(sorted(files)))
  content = bytearray(files[name])
  kind = data.draw(st.sampled_from(['flip', 'cut', 'longer', 'missing']))
  at = data.draw(st.integers(0, len(content) - 1))
  if kind == 'flip':
    content[at] ^= 1 << data.draw(st.integers(0, 7))
  elif kind == 'cut':
    del content[at:]
  elif kind == 'longer':
    content += b'}'
  path = prepared / name
  try:
    path.unlink()
    if kind != 'missing':
      path.write_bytes(content)
    if (name, kind) == ('index.json', 'missing'):
      assert prepare(source, prepared.parent.parent).folder == prepared  # it was never finished: made again
    else:
      with pytest.raises(
        UserError, match=re.escape(str(path)) + f'.* Remove {prepared}, and its tokens are prepared again'
      ):
        prepare(source, prepared.parent.parent)
  finally:
    path.write_bytes(files[name])


def test_a_full_disk_is_told_and_the_same_command_goes_on(source, tmp_path, uninterrupted, monkeypatch):
  count, fsync = 0, os.fsync

  def full(file):
    nonlocal count
    count += 1
    if count > 30:
      raise OSError(errno.ENOSPC, 'No space left on device')
    fsync(file)

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(
      UserError, match=r'the disk is full .*free some space, or .*data.prepared; the same command goes on'
    ):
      prepare(source, tmp_path / 'run')
  assert shards_in(folder_of(tmp_path / 'run')) == 2
  prepare(source, tmp_path / 'run')
  assert contents(folder_of(tmp_path / 'run')) == uninterrupted


def test_a_folder_that_cannot_be_written_to(source, tmp_path):
  with pytest.raises(UserError, match=r'/proc/nothing/.*: prepared tokens cannot be written there'):
    prepare(source, tmp_path, prepared='/proc/nothing')


def test_a_second_process_waits_and_uses_it(source, tmp_path, monkeypatch):
  began, goes_on, made_by, lines = threading.Event(), threading.Event(), [], []
  original = encode.prepare

  def slow(*arguments):
    made_by.append(threading.current_thread().name)
    began.set()
    assert goes_on.wait(30)
    original(*arguments)

  def say(line):
    lines.append(line)
    goes_on.set()

  monkeypatch.setattr(encode, 'prepare', slow)
  found = {}
  config = DataConfig(source=source, held_out_percent=20.0)
  run = lambda name: found.update({name: store.open_or_prepare(config, tmp_path, say=say)})
  first = threading.Thread(target=run, args=('first',), name='first')
  first.start()
  assert began.wait(30)
  second = threading.Thread(target=run, args=('second',), name='second')
  second.start()
  for thread in (first, second):
    thread.join(60)
  assert made_by == ['first']
  assert found['first'].record() == found['second'].record()
  assert re.search(rf'process {os.getpid()} prepares these tokens; waiting for it', lines[0])


CHANGES = {
  'changed': (lambda folder: (folder / 'p1' / 'f0.txt').write_text('something else'), r': p1/f0\.txt\. Going on'),
  'swapped': (lambda folder: os.replace(folder / 'p1' / 'f0.txt', folder / 'p1' / 'f1.txt'),
              r': p1/f0\.txt \(gone\), p1/f1\.txt\. Going on'),
  'gone': (lambda folder: (folder / 'p1' / 'f0.txt').unlink(), r': p1/f0\.txt \(gone\)\. Going on'),
  'new': (lambda folder: (folder / 'p1' / 'f2.txt').write_text('new'), r': p1/f2\.txt \(new\)\. Going on'),
  'all gone': (shutil.rmtree, r'data\.source=.*found nothing at this path'),
}  # fmt: skip


@pytest.mark.parametrize('change', CHANGES)
def test_text_that_changes_between_runs_is_named(tmp_path, change):
  folder = tmp_path / 'text'
  tiny.write_corpus(folder)
  prepare(folder, tmp_path / 'run')
  apply, words = CHANGES[change]
  apply(folder)
  with pytest.raises(UserError, match=words):
    prepare(folder, tmp_path / 'run')


def test_a_record_file_that_changes_between_runs_is_named(tmp_path):
  path = write(tmp_path / 'text', 'jsonl', WORDS)
  write(tmp_path / 'text', 'parquet', WORDS)
  prepare(tmp_path / 'text', tmp_path / 'run')
  content = bytearray(path.read_bytes())
  content[20] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=r'text has changed since its tokens were prepared: a\.jsonl\. Going on'):
    prepare(tmp_path / 'text', tmp_path / 'run')


def test_a_file_of_another_date_and_the_same_content_is_the_same(tmp_path, monkeypatch):
  source = tiny.write_corpus(tmp_path / 'text')
  want = prepare(source, tmp_path / 'run').record()
  os.utime(tmp_path / 'text' / 'p1' / 'f0.txt', ns=(1, 1))
  monkeypatch.setattr(encode, 'prepare', lambda *_: pytest.fail('prepared again'))
  assert prepare(source, tmp_path / 'run').record() == want


@pytest.mark.parametrize('change', ['content', 'added', 'date'])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch, change):
  path, look = write(tmp_path, 'jsonl', WORDS), scan.look

  def looked(*arguments):
    seen, date = look(*arguments), path.stat().st_mtime_ns
    if change == 'added':
      path.write_text(path.read_text() + '{"text": "one more"}\n')
    else:
      path.write_text(path.read_text().replace('number 3', 'number 4' if change == 'content' else 'number 3'))
      os.utime(path, ns=(date, date + (change == 'date')))  # the content, which keeps its size, tells alone
    return seen

  monkeypatch.setattr(scan, 'look', looked)
  with pytest.raises(UserError, match=rf'{path}: the file has changed while it was read'):
    prepare(path, tmp_path / 'run')
  assert not (folder_of(tmp_path / 'run') / 'index.json').exists()


def test_progress_without_a_terminal_is_a_line_now_and_then():
  lines = []
  with meter.Meter(4000, 'preparing tokens', lines.append, plain_seconds=0) as shown:
    for done in (1000, 3000):
      shown.to(done)
  assert lines == [
    'preparing tokens: 1.00kB of 4.00kB (25%), 00:00 left',
    'preparing tokens: 3.00kB of 4.00kB (75%), 00:00 left',
  ]
  with meter.Meter(4000, 'preparing tokens', lambda line: pytest.fail(line)) as shown:
    shown.to(4000)


@pytest.mark.long
def test_the_library_of_this_python(tmp_path):
  found = store.open_or_prepare(DataConfig(bad_files='skip'), tmp_path)
  digest = hashlib.sha256()
  texts = {split: dict(store.texts(DataConfig(bad_files='skip'), found, split)) for split in ('train', 'held_out')}
  for name in sorted(texts['train'] | texts['held_out']):
    split = 'held_out' if name in texts['held_out'] else 'train'
    text = texts[split][name]
    digest.update(f'{split}\0{name}\0{len(text)}\0'.encode() + text)
  assert found.hash == digest.hexdigest()
  for split, tokens in zip(('train', 'held_out'), (found.parts[0].train, found.parts[0].held_out), strict=True):
    want = [np.frombuffer(b'\0' + text, np.uint8).astype(int) for text in texts[split].values()]
    for part in want:
      part[0] = 256
    np.testing.assert_array_equal(tokens.stream, np.concatenate(want))
