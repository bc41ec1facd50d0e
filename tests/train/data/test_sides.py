"""What stands on which side: nothing held out is trained on in another form, by another path or in another part."""

import hashlib
import json

import numpy as np
import pytest

from tests.models.hf import made_tokenizers as made
from train.config import DataConfig, SourceConfig
from train.data import corpus, store

TEXTS = [f'dear reader, this is letter {i} of {7 * i}' for i in range(120)]


def write_lines(path, values):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps({'text': value}) + '\n' for value in values), encoding='utf-8')
  return str(path)


def prepare(tmp_path, *sources, **settings):
  if len(sources) == 1:
    settings['source'] = str(sources[0])
  else:
    settings['mixture'] = [SourceConfig(source=str(source)) for source in sources]
  return store.open_or_prepare(DataConfig(held_out_percent=20.0, **settings), tmp_path / 'run')


def texts(found, split):
  """[text] of all documents of a side, as the tokenizer tells them."""
  decode = found.tokenizer.decode
  return [decode(tokens.document(i).tolist()) for tokens in found.side(split) for i in range(len(tokens))]


def names(found, split):
  return [name for tokens in found.side(split) for name in tokens.names]


def assert_apart(found, documents):
  train, held = ({text.strip().replace('\r\n', '\n') for text in texts(found, split)} for split in corpus.SIDES)
  assert train
  assert held
  assert not train & held
  assert len(train | held) == documents


@pytest.mark.parametrize('kind', ['bytes', 'file'])
def test_text_and_ids_of_one_text_stand_on_one_side(tmp_path, kind):
  settings, encode = {}, lambda text: list(text.encode())
  if kind == 'file':
    library = made.byte_level()
    settings['tokenizer'] = str(made.folder(tmp_path / 'hf', library))
    settings['separator'] = '</s>'
    encode = lambda text: library.encode(text, add_special_tokens=False).ids
  a = write_lines(tmp_path / 'a.jsonl', TEXTS)
  b = write_lines(tmp_path / 'b.jsonl', [encode(text) for text in TEXTS])
  found = prepare(tmp_path, a, b, **settings)
  assert_apart(found, len(TEXTS))
  # Each part trains on what no part holds out.
  assert [len(part.train) for part in found.parts] == [len(set(texts(found, 'train')))] * 2
  both = write_lines(tmp_path / 'c.jsonl', [*TEXTS, *(encode(text) for text in TEXTS)])
  assert prepare(tmp_path, both, **settings).record()['duplicate_count'] == len(TEXTS)


def test_ids_without_a_text_are_told_apart(tmp_path):
  library = made.byte_level()
  first, second = library.token_to_id('<s>'), library.token_to_id('<|end|>')
  path = write_lines(tmp_path / 'a.jsonl', [[first], [second], [first, first], [second]])
  settings = {'tokenizer': str(made.folder(tmp_path / 'hf', library)), 'separator': '</s>'}
  assert prepare(tmp_path, path, **settings).record()['duplicate_count'] == 1


def test_white_space_at_the_ends_and_line_ends_tell_no_records_apart(tmp_path):
  lines = [text.replace(', ', ',\n') for text in TEXTS]
  path = write_lines(
    tmp_path / 'a.jsonl',
    [*lines, *(f'{text}\n' for text in lines), *(f'\t {text}' for text in lines),
     *(text.replace('\n', '\r\n') for text in lines)],
  )  # fmt: skip
  found = prepare(tmp_path, path)
  assert_apart(found, len(TEXTS))
  assert found.record()['duplicate_count'] == 3 * len(TEXTS)
  # What is in the middle does.
  path = write_lines(tmp_path / 'b.jsonl', ['a b', 'a  b', 'a\nb', 'A b'])
  assert prepare(tmp_path, path).record()['duplicate_count'] == 0
  # The hash is of the text as it is.
  before = prepare(tmp_path, path).hash
  (tmp_path / 'b.jsonl').unlink()
  path = write_lines(tmp_path / 'b.jsonl', ['a b', 'a  b', 'a\nb', 'A b\n'])
  after = store.open_or_prepare(DataConfig(source=path, held_out_percent=20.0), tmp_path / 'other')
  assert before != after.hash


def test_a_text_file_and_a_record_of_one_text_stand_on_one_side(tmp_path):
  for i, text in enumerate(TEXTS):
    (tmp_path / 'files').mkdir(exist_ok=True)
    (tmp_path / 'files' / f'{i}.txt').write_text(f'{text}\n')
  assert_apart(prepare(tmp_path, tmp_path / 'files', write_lines(tmp_path / 'a.jsonl', TEXTS)), len(TEXTS))


def test_text_files_are_told_apart_by_every_byte(tmp_path):
  for i in range(20):
    (tmp_path / 'text' / f'{i}.txt').parent.mkdir(exist_ok=True)
    (tmp_path / 'text' / f'{i}.txt').write_text('text' + '\n' * (i // 2))
  found = prepare(tmp_path, tmp_path / 'text')
  assert found.record()['duplicate_count'] == 10


def write_packages(folder):
  for p in range(30):
    for name in ('a.py', 'deep/b.py', 'c.md'):
      path = folder / f'p{p}' / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(f'{name} of package {p} ' * (5 + p * 7 % 11))
  return folder


def packages_of(found, split):
  """[set of the packages 'p0', ... of one side] of the parts."""
  return [{name[name.index('p') :].split('/')[0] for name in tokens.names} for tokens in found.side(split)]


def test_parts_share_the_choice_of_packages(tmp_path):
  folder = write_packages(tmp_path / 'src')
  found = prepare(tmp_path, f'{folder}/**/*.py', f'{folder}/**/*.md', f'{folder}/p*/c*')
  held, train = set.union(*packages_of(found, 'held_out')), set.union(*packages_of(found, 'train'))
  assert not held & train
  assert len(held) >= 2
  # A copy elsewhere is split alike, and has the same hash.
  other = write_packages(tmp_path / 'moved' / 'text')
  moved = prepare(tmp_path, f'{other}/**/*.py', f'{other}/**/*.md', f'{other}/p*/c*')
  assert moved.hash == found.hash


def test_a_part_within_a_package_of_another_goes_with_it(tmp_path):
  folder = write_packages(tmp_path / 'src')
  sources = corpus.sources(DataConfig(mixture=[SourceConfig(source=str(folder / name)) for name in ('p0', '')]))
  units = corpus.packages(sources)
  assert {unit for unit, source in zip(units, sources, strict=True) if '/p0/' in source.path} == {'p0'}
  assert len(set(units)) == 30


def test_packages_of_one_name_in_two_parts_are_two(tmp_path):
  for part in 'ab':
    write_packages(tmp_path / part)
  sources = corpus.sources(DataConfig(mixture=[SourceConfig(source=str(tmp_path / part)) for part in 'ab']))
  assert set(corpus.packages(sources)) == {f'{label}p{p}' for label in ('', '[1] ') for p in range(30)}


def test_a_file_that_two_paths_of_a_source_reach_counts_once(tmp_path):
  folder = write_packages(tmp_path / 'src')
  for paths in (['', '/p3'], ['/p3', ''], ['/p3/*.py', ''], ['', '/**']):
    sources = corpus.sources(DataConfig(source=','.join(f'{folder}{path}' for path in paths)))
    assert len(sources) == len({source.path for source in sources}) == 90
    # All of p3 is one package, whatever name its files have.
    assert len({unit for unit, file in zip(corpus.packages(sources), sources, strict=True) if '/p3/' in file.path}) == 1


def test_links_to_folders_are_followed_once(tmp_path):
  folder = write_packages(tmp_path / 'src')
  (tmp_path / 'more').mkdir()
  (tmp_path / 'more' / 'm.txt').write_text('more')
  (folder / 'link').symlink_to(tmp_path / 'more')
  (folder / 'circle').symlink_to(folder)
  (folder / 'p1' / 'circle').symlink_to(folder)
  found = corpus.find(str(folder), 'data.source')
  assert len(found) == 91
  assert found['link/m.txt'] == str(folder / 'link' / 'm.txt')


def test_a_folder_called_held_out_is_not_the_held_out_text(tmp_path):
  for name in ('src/held_out/a.txt', 'src/b.txt', 'other/a.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f'the text of {name}')
  settings = {'held_out': str(tmp_path / 'other')}
  found = prepare(tmp_path, tmp_path / 'src', **settings)
  assert names(found, 'train') == ['b.txt', 'held_out/a.txt']
  assert names(found, 'held_out') == ['held_out:/a.txt']
  assert {row[0]: row[1] for row in found.record()['files']} == {
    'b.txt': 'train', 'held_out/a.txt': 'train', 'held_out:/a.txt': 'held_out',
  }  # fmt: skip
  for changed in ('src/held_out/a.txt', 'other/a.txt'):
    text = (tmp_path / changed).read_text()
    (tmp_path / changed).write_text('something else')
    with pytest.raises(ValueError, match=r'text has changed since its tokens were prepared: held_out:?/a.txt\.'):
      prepare(tmp_path, tmp_path / 'src', **settings)
    (tmp_path / changed).write_text(text)


def test_the_split_of_rows_hashes_no_single_one(monkeypatch):
  digests = np.random.default_rng(0).integers(0, 2**64, (100_000, 2), np.uint64)
  hashed, sha256 = [], hashlib.sha256
  monkeypatch.setattr(hashlib, 'sha256', lambda text: (hashed.append(text), sha256(text))[1])
  held = corpus.split_rows(digests, 3.0, 0)
  assert hashed == [b'0:']
  assert 0.028 < held.mean() < 0.032
  # Both halves of a digest count, and the seed.
  other = corpus.split_rows(digests, 3.0, 1)
  assert (held & other).mean() < 0.002
  for half in (0, 1):
    counted = np.zeros_like(digests)
    counted[:, half] = np.arange(len(digests))
    assert 0.028 < corpus.split_rows(counted, 3.0, 0).mean() < 0.032
