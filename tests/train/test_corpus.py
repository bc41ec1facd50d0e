"""train.corpus: what is read, what is refused, and that no neighbour of a held-out file is trained on."""

import os
import pathlib

import pytest

from tests.train import tiny
from train import corpus
from train.config import DataConfig, UserError


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return tiny.write_corpus(tmp_path_factory.mktemp('corpus') / 'text', packages=30)


def test_split_by_package_is_deterministic_and_bounded(source):
  config = DataConfig(source=source, held_out_percent=10)
  first, second = corpus.load(config), corpus.load(config)
  assert first == second
  held = {file.package for file in first.side(corpus.HELD_OUT)}
  assert len(held) >= 2
  assert held.isdisjoint({file.package for file in first.side(corpus.TRAIN)})
  total = first.size(corpus.TRAIN) + first.size(corpus.HELD_OUT)
  assert 0.1 <= first.size(corpus.HELD_OUT) / total <= 0.15
  assert len(first.files) == 60
  other = corpus.load(DataConfig(source=source, held_out_percent=10, split_seed=1))
  assert {file.package for file in other.side(corpus.HELD_OUT)} != held
  assert other.hash != first.hash


def test_split_passes_over_large_packages():
  files = [corpus.File(f'p{i}', f'p{i}', b'x' * 10) for i in range(99)] + [corpus.File('big', 'big', b'x' * 9000)]
  for seed in range(5):
    held = corpus.split_packages(files, 3.0, seed)
    assert 'big' not in held
    assert 30 <= len(held) <= 45


def test_split_of_few_packages_takes_the_smallest():
  files = [corpus.File(name, name, b'x' * size) for name, size in (('a', 50), ('b', 900), ('c', 90))]
  assert corpus.split_packages(files, 1.0, 0) == {'a'}
  files = [corpus.File(f'p{i}', f'p{i}', b'x' * (100 + i)) for i in range(9)]
  assert corpus.split_packages(files, 1.0, 0) == {'p0', 'p1'}


def test_module_file_is_its_own_package_and_hidden_folders_are_left_out(tmp_path):
  for name in ('a.py', 'b.py', 'pack/c.py', 'pack/deep/d.py', '__pycache__/e.py', '.git/f', 'site-packages/g.py'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f'# {name}')
  files = corpus.load(DataConfig(source=str(tmp_path))).files
  assert [(file.name, file.package) for file in files] == [
    ('a.py', 'a.py'), ('b.py', 'b.py'), ('pack/c.py', 'pack'), ('pack/deep/d.py', 'pack'),
  ]  # fmt: skip


def test_globs_and_lists_of_paths(tmp_path):
  for name in ('x/a.txt', 'x/b.txt', 'x/c.md', 'y/a.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  assert list(corpus.find(f'{tmp_path}/x/*.txt', 'data.source')) == ['a.txt', 'b.txt']
  assert list(corpus.find(f'{tmp_path}/**/*.txt', 'data.source')) == ['x/a.txt', 'x/b.txt', 'y/a.txt']
  assert list(corpus.find(f'{tmp_path}/x/c.md, {tmp_path}/y', 'data.source')) == ['a.txt', 'c.md']
  assert list(corpus.find(f'{tmp_path}/x/a.txt,{tmp_path}/y/a.txt', 'data.source')) == ['a.txt', 'y:a.txt']


def test_duplicates_are_dropped_on_the_training_side(tmp_path):
  for i in range(9):
    (tmp_path / f'{i}.txt').write_text(f'text of file number {i}')
  config = DataConfig(source=str(tmp_path), held_out_percent=20)
  held = corpus.load(config).side(corpus.HELD_OUT)[0]
  (tmp_path / 'copy.txt').write_bytes(held.text)
  (tmp_path / 'copy2.txt').write_bytes(held.text)
  found = corpus.load(config)
  texts = [file.text for file in found.files]
  assert len(texts) == len(set(texts)) == 9
  assert len(found.duplicates) == 2


def test_named_held_out_files(tmp_path):
  (tmp_path / 'book.txt').write_text('a long text')
  (tmp_path / 'other.txt').write_text('another text')
  found = corpus.load(DataConfig(source=str(tmp_path / 'book.txt'), held_out=str(tmp_path / 'other.txt')))
  assert [file.name for file in found.side(corpus.HELD_OUT)] == ['held_out/other.txt']
  assert [file.text for file in found.side(corpus.HELD_OUT)] == [b'another text']


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


def test_a_file_name_need_not_be_text(tmp_path):
  tiny.write_corpus(tmp_path / 'text')
  with open(os.fsencode(tmp_path / 'text') + b'/na\xffme.txt', 'w') as file:
    file.write('its content is')
  names = [file.name for file in corpus.load(DataConfig(source=str(tmp_path / 'text'))).files]
  assert 'na\\xffme.txt' in names


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
def test_bad_files_are_named_or_counted(tmp_path, kind):
  folder = tiny.write_corpus(tmp_path / 'text', packages=3, files=1)
  want = corpus.load(DataConfig(source=folder))
  path = make_bad(folder, kind)
  with pytest.raises(UserError, match=rf'{path}: {kind}.*data.bad_files=skip'):
    corpus.load(DataConfig(source=folder))
  found = corpus.load(DataConfig(source=folder, bad_files='skip'))
  assert list(found.skipped) == ['p0/bad.txt']
  assert kind in found.skipped['p0/bad.txt']
  assert found.hash == want.hash
  assert found.record()['skipped'] == found.skipped


@pytest.mark.parametrize(
  'source, words',
  [
    ('/nothing/here', "data.source='/nothing/here'.*found nothing at this path"),
    ('/nothing/*.txt', 'at least one file'),
    (' , ', 'expected .*python_stdlib'),
  ],
)
def test_rejects_sources(source, words):
  with pytest.raises(UserError, match=words):
    corpus.load(DataConfig(source=source))


def test_rejects_what_cannot_be_split(tmp_path):
  (tmp_path / 'one.txt').write_text('text')
  with pytest.raises(UserError, match='at least 2 top-level'):
    corpus.load(DataConfig(source=str(tmp_path)))
  (tmp_path / 'two.txt').write_text('text')
  with pytest.raises(UserError, match="no file is left for 'train'"):
    corpus.load(DataConfig(source=str(tmp_path)))


def test_python_stdlib():
  found = corpus.find('python_stdlib', 'data.source')
  assert 'asyncio/base_events.py' in found
  assert not any('site-packages' in name or '__pycache__' in name for name in found)
