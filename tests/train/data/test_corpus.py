"""train.data.corpus: what is read, what is refused, and that no neighbour of a held-out file is trained on."""

import json
import os
import pathlib

import numpy as np
import pytest

from tests.train import tiny
from train.config import DataConfig, SourceConfig, UserError
from train.data import corpus, store


@pytest.fixture
def load(tmp_path_factory):
  """A function of a DataConfig that prepares it in a new folder."""
  return lambda config: store.open_or_prepare(config, tmp_path_factory.mktemp('run'))


def files(found, split):
  """{name: text} of one side of a corpus of bytes."""
  return {
    tokens.name(i): bytes(tokens.document(i).tolist()) for tokens in found.side(split) for i in range(len(tokens))
  }


def packages(found, split):
  return {name.split('/')[0] for name in files(found, split)}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return tiny.write_corpus(tmp_path_factory.mktemp('corpus') / 'text', packages=30)


def test_split_by_package_is_deterministic_and_bounded(source, load):
  config = DataConfig(source=source, held_out_percent=10)
  first, second = load(config), load(config)
  assert first.hash == second.hash
  assert first.record() == second.record()
  held = packages(first, corpus.HELD_OUT)
  assert len(held) >= 2
  assert held.isdisjoint(packages(first, corpus.TRAIN))
  total = first.size(corpus.TRAIN) + first.size(corpus.HELD_OUT)
  assert 0.1 <= first.size(corpus.HELD_OUT) / total <= 0.15
  assert first.documents(corpus.TRAIN) + first.documents(corpus.HELD_OUT) == 60
  other = load(DataConfig(source=source, held_out_percent=10, split_seed=1))
  assert packages(other, corpus.HELD_OUT) != held
  assert other.hash != first.hash


def test_split_passes_over_large_packages():
  sizes = {f'p{i}': 10 for i in range(99)} | {'big': 9000}
  for seed in range(5):
    held = corpus.split_packages(sizes, 3.0, seed)
    assert 'big' not in held
    assert 30 <= len(held) <= 45


def test_split_of_few_packages_takes_the_smallest():
  assert corpus.split_packages({'a': 50, 'b': 900, 'c': 90}, 1.0, 0) == {'a'}
  assert corpus.split_packages({f'p{i}': 100 + i for i in range(9)}, 1.0, 0) == {'p0', 'p1'}


def test_split_of_rows_holds_out_its_share_and_equal_rows_alike():
  digests = np.random.default_rng(0).integers(0, 2**64, (20000, 2), np.uint64)
  held = corpus.split_rows(digests, 3.0, 0)
  assert 0.025 < held.mean() < 0.035
  order = np.random.default_rng(1).permutation(len(digests))
  np.testing.assert_array_equal(corpus.split_rows(digests[order], 3.0, 0), held[order])
  np.testing.assert_array_equal(corpus.split_rows(np.repeat(digests, 2, axis=0), 3.0, 0), np.repeat(held, 2))
  assert (corpus.split_rows(digests, 3.0, 1) != held).any()


@pytest.mark.parametrize('count, held', [(1, 0), (2, 1), (7, 1), (8, 2), (20, 2)])
def test_split_of_few_rows_holds_out_some(count, held):
  digests = np.random.default_rng(0).integers(0, 2**64, (count, 2), np.uint64)
  assert corpus.split_rows(digests, 0.1, 0).sum() == held


def test_module_file_is_its_own_package_and_hidden_folders_are_left_out(tmp_path, load):
  for name in ('a.py', 'b.py', 'pack/c.py', 'pack/deep/d.py', '__pycache__/e.py', '.git/f', 'site-packages/g.py'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f'# {name}')
  found = corpus.sources(DataConfig(source=str(tmp_path)))
  assert [(source.name, source.package) for source in found] == [
    ('a.py', 'a.py'), ('b.py', 'b.py'), ('pack/c.py', 'pack'), ('pack/deep/d.py', 'pack'),
  ]  # fmt: skip
  assert len(load(DataConfig(source=str(tmp_path))).record()['files']) == 4


def test_globs_and_lists_of_paths(tmp_path):
  for name in ('x/a.txt', 'x/b.txt', 'x/c.md', 'y/a.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  assert list(corpus.find(f'{tmp_path}/x/*.txt', 'data.source')) == ['a.txt', 'b.txt']
  assert list(corpus.find(f'{tmp_path}/**/*.txt', 'data.source')) == ['x/a.txt', 'x/b.txt', 'y/a.txt']
  assert list(corpus.find(f'{tmp_path}/x/c.md, {tmp_path}/y', 'data.source')) == ['a.txt', 'c.md']
  assert list(corpus.find(f'{tmp_path}/x/a.txt,{tmp_path}/y/a.txt', 'data.source')) == ['a.txt', 'y:a.txt']


def test_duplicates_are_dropped_on_the_training_side(tmp_path, load):
  for i in range(9):
    (tmp_path / f'{i}.txt').write_text(f'text of file number {i}')
  config = DataConfig(source=str(tmp_path), held_out_percent=20)
  held = next(iter(files(load(config), corpus.HELD_OUT).values()))
  (tmp_path / 'copy.txt').write_bytes(held)
  (tmp_path / 'copy2.txt').write_bytes(held)
  found = load(config)
  train, kept = files(found, corpus.TRAIN), files(found, corpus.HELD_OUT)
  texts = [*train.values(), *kept.values()]
  assert len(texts) == len(set(texts)) == 9
  assert held in kept.values()
  assert found.record()['duplicate_count'] == len(found.record()['duplicates']) == 2


def test_named_held_out_files(tmp_path, load):
  (tmp_path / 'book.txt').write_text('a long text')
  (tmp_path / 'other.txt').write_text('another text')
  found = load(DataConfig(source=str(tmp_path / 'book.txt'), held_out=str(tmp_path / 'other.txt')))
  assert files(found, corpus.TRAIN) == {'book.txt': b'a long text'}
  assert files(found, corpus.HELD_OUT) == {'held_out/other.txt': b'another text'}


def write_lines(path, texts):
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return str(path)


def test_no_part_of_a_mixture_trains_on_what_another_holds_out(tmp_path, load):
  shared = [f'shared document {i}' for i in range(40)]
  a = write_lines(tmp_path / 'a.jsonl', shared + [f'only in a {i}' for i in range(40)])
  b = write_lines(tmp_path / 'b.jsonl', [f'only in b {i}' for i in range(5)] + shared[::-1] + shared[:3])
  for i, text in enumerate(shared[:20]):
    (tmp_path / 'c').mkdir(exist_ok=True)
    (tmp_path / 'c' / f'{i}.txt').write_text(text)
  mixture = [SourceConfig(source=source, weight=i + 1.0) for i, source in enumerate((a, b, str(tmp_path / 'c')))]
  found = load(DataConfig(source='', mixture=mixture, held_out_percent=30.0))
  texts = lambda tokens: [bytes(tokens.document(i).tolist()) for i in range(len(tokens))]
  held = [text for part in found.parts for text in texts(part.held_out)]
  assert len(held) == len(set(held))
  for part in found.parts:
    train = texts(part.train)
    assert len(train) == len(set(train)) > 0
    assert not set(train) & set(held)
  assert [part.weight for part in found.parts] == [1.0, 2.0, 3.0]
  # What no part holds out may stand in several.
  assert set(texts(found.parts[0].train)) & set(texts(found.parts[1].train))


def test_named_held_out_records_of_a_mixture_stand_in_its_first_part(tmp_path, load):
  a = write_lines(tmp_path / 'a.jsonl', ['one', 'two', 'three'])
  b = write_lines(tmp_path / 'b.jsonl', ['four', 'two'])
  held = write_lines(tmp_path / 'held.jsonl', ['two', 'five'])
  found = load(DataConfig(mixture=[SourceConfig(source=a), SourceConfig(source=b)], held_out=held))
  assert [files(found, corpus.TRAIN)] == [{'a.jsonl:1': b'one', 'a.jsonl:3': b'three', 'b.jsonl:1': b'four'}]
  assert [len(part.held_out) for part in found.parts] == [2, 0]
  assert files(found, corpus.HELD_OUT) == {'held_out/held.jsonl:1': b'two', 'held_out/held.jsonl:2': b'five'}


def test_packages_of_one_name_in_two_sources_stay_whole(tmp_path):
  for source in ('a', 'b', 'c/b'):
    for name in ('same.txt', f'{source[0]}.txt'):
      path = tmp_path / source / 'core' / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(f'{source} {name}')
  found = corpus.find(','.join(str(tmp_path / source) for source in ('a', 'b', 'c/b', 'b')), 'data.source')
  packages = {name.split('/')[0]: set() for name in found}
  for name, path in found.items():
    packages[name.split('/')[0]].add(os.path.dirname(path))
  assert packages == {
    'core': {f'{tmp_path}/a/core'}, 'b:core': {f'{tmp_path}/b/core'}, 'b2:core': {f'{tmp_path}/c/b/core'},
  }  # fmt: skip
  assert len(found) == 6


def test_a_file_name_need_not_be_text(tmp_path, load):
  tiny.write_corpus(tmp_path / 'text')
  with open(os.fsencode(tmp_path / 'text') + b'/na\xffme.txt', 'w') as file:
    file.write('its content is')
  found = load(DataConfig(source=str(tmp_path / 'text')))
  assert 'na\\xffme.txt' in files(found, corpus.TRAIN) | files(found, corpus.HELD_OUT)


def make_bad(folder, kind):
  path = pathlib.Path(folder) / 'p0' / 'bad.txt'
  if kind == 'empty':
    path.write_bytes(b'')
  elif kind == 'binary':
    path.write_bytes(b'text\0text')
  elif kind == 'badly encoded':
    path.write_bytes(b'text \xe9\xff')
  elif kind == 'unreadable':
    path.symlink_to(path.with_name('nothing'))
  else:
    os.mkfifo(path)
  return path


@pytest.mark.parametrize('kind', ['empty', 'binary', 'badly encoded', 'unreadable', 'not a regular file'])
def test_bad_files_are_named_or_counted(tmp_path, kind, load):
  folder = tiny.write_corpus(tmp_path / 'text', packages=3, files=1)
  want = load(DataConfig(source=folder))
  path = make_bad(folder, kind)
  with pytest.raises(UserError, match=rf'{path}: {kind}.*data.bad_files=skip'):
    load(DataConfig(source=folder))
  found = load(DataConfig(source=folder, bad_files='skip'))
  record = found.record()
  assert list(record['skipped']) == ['p0/bad.txt']
  assert record['skipped_count'] == 1
  assert kind in record['skipped']['p0/bad.txt']
  assert found.hash == want.hash


@pytest.mark.parametrize(
  'source, words',
  [
    ('/nothing/here', "data.source='/nothing/here'.*found nothing at this path"),
    ('/nothing/*.txt', 'at least one file'),
    (' , ', 'expected .*python_stdlib'),
  ],
)
def test_rejects_sources(source, words, load):
  with pytest.raises(UserError, match=words):
    load(DataConfig(source=source))
  with pytest.raises(UserError, match=words.replace('data.source', r'data.mixture\[1\].source')):
    load(DataConfig(mixture=[SourceConfig(source='python_stdlib'), SourceConfig(source=source)]))


@pytest.mark.parametrize('where', ['source', 'held_out', 'mixture'])
def test_what_a_run_writes_stands_outside_of_its_text(tmp_path, where):
  text, inside = str(tmp_path), tmp_path / 'a' / 'run'
  value = [SourceConfig(source=text)] if where == 'mixture' else text
  config = DataConfig(**{where: value})
  with pytest.raises(UserError, match=rf'workdir .*run: expected a folder outside of the text data.{where}'):
    corpus.check_outside(config, inside)
  config.prepared = str(inside)
  with pytest.raises(UserError, match=rf'data.prepared=.*: expected a folder outside of the text data.{where}'):
    corpus.check_outside(config, '')
  corpus.check_outside(DataConfig(prepared=str(inside)), tmp_path)


GLOBS = [('', '**'), ('', '**/*.txt'), ('', '*/run/*.txt'), ('', 'a/r*/**'), ('', 'a/*/data/*'), ('a/run', '*')]


@pytest.mark.parametrize('below, pattern', GLOBS)
def test_a_glob_reaches_not_where_a_run_writes(tmp_path, below, pattern):
  source = str(tmp_path / below / pattern)
  with pytest.raises(UserError, match=r'workdir .*run: expected a folder outside of the text data.source='):
    corpus.check_outside(DataConfig(source=source), tmp_path / 'a' / 'run')


def test_the_folder_of_prepared_tokens_is_no_text(tmp_path):
  (tmp_path / 'run' / 'data').mkdir(parents=True)
  with pytest.raises(UserError, match=r'workdir .*run: expected a folder outside'):
    corpus.check_outside(DataConfig(source=str(tmp_path / 'run' / 'data')), tmp_path / 'run')
  config = DataConfig(source=str(tmp_path / 'run' / 'data'), prepared=str(tmp_path / 'run' / 'data'))
  with pytest.raises(UserError, match=r'data.prepared=.*: expected a folder outside'):
    corpus.check_outside(config, '')
  for pattern in ('*.txt', 'b/*/*.txt', 'a/[x-z]/**', '*/*'):
    corpus.check_outside(DataConfig(source=str(tmp_path / pattern)), tmp_path / 'a' / 'b' / 'c')


def test_rejects_what_cannot_be_split(tmp_path, load):
  (tmp_path / 'one.txt').write_text('text')
  with pytest.raises(UserError, match='at least 2 top-level'):
    load(DataConfig(source=str(tmp_path)))
  (tmp_path / 'two.txt').write_text('text')
  with pytest.raises(UserError, match="no document is left for 'train'"):
    load(DataConfig(source=str(tmp_path)))
  line = write_lines(tmp_path / 'one.jsonl', ['text', 'text'])
  with pytest.raises(UserError, match="no document is left for 'held_out' after 0 bad ones and 1 duplicates"):
    load(DataConfig(source=line))


def test_python_stdlib():
  found = corpus.find('python_stdlib', 'data.source')
  assert 'asyncio/base_events.py' in found
  assert not any('site-packages' in name or '__pycache__' in name for name in found)
