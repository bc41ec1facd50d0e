"""train.data.readers: what stands in files of each format, what is refused by which name, that little is held."""

import gzip
import json
import pickle
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st

from train.config import UserError
from train.data import readers

SEPARATOR, VOCAB = 7, 100


def read(path, kind='', field='text'):
  """[(row, text or list of ids or 'bad: problem')] of a file."""
  kind = kind or readers.format_of(str(path))
  found = []
  for row, end, text, ids, problem in readers.documents(str(path), kind, field, SEPARATOR, VOCAB):
    assert 0 <= end <= max(path.stat().st_size, 1)
    assert problem or (text is None) != (ids is None)
    found.append((row, f'bad: {problem}' if problem else text if ids is None else ids.tolist()))
  return found


def write_parquet(path, columns, **options):
  pa.parquet.write_table(pa.table(columns), path, **options)
  return path


@pytest.mark.parametrize(
  'name, kind',
  [
    ('a.jsonl', 'jsonl'), ('a.jsonl.gz', 'jsonl'), ('a.parquet', 'parquet'), ('a.npy', 'tokens'), ('a.py', 'text'),
    ('A.JSONL', 'jsonl'), ('a.ndjson', 'jsonl'), ('a.Ndjson.GZ', 'jsonl'), ('a.Parquet', 'parquet'), ('json', 'text'),
    ('a.csv.txt', 'text'),
  ],
)  # fmt: skip
def test_format_goes_by_name(name, kind):
  assert readers.format_of(f'/some.zip/where.json/{name}') == kind


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl.zst', 'a.csv', 'a.CSV', 'a.txt.gz', 'a.npz', 'a.tar'])
def test_names_that_do_not_tell_the_format_are_refused(name):
  with pytest.raises(UserError, match=rf'/{name}: expected a name that tells the format.*text, jsonl, parquet, tokens'):
    readers.format_of(f'/some/where/{name}')


TEXTS = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), min_size=1)


@settings(max_examples=30)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8), is_packed=st.booleans(), is_ascii=st.booleans())
def test_lines_are_read_as_json_says(tmp_path_factory, texts, is_packed, is_ascii):
  path = tmp_path_factory.mktemp('lines') / ('a.jsonl' + '.gz' * is_packed)
  content = '\n \n'.join(json.dumps({'id': 1, 'text': text}, ensure_ascii=is_ascii) for text in texts).encode()
  path.write_bytes(gzip.compress(content) if is_packed else content)
  assert read(path) == [(2 * i + 1, text.encode()) for i, text in enumerate(texts)]


BAD_LINES = [
  (b'{"text": "a"', r'broken JSON'),
  (b'[' * 100000, r'broken JSON'),
  (b'\xef\xbb\xbf{"text": "a"}', r'broken JSON'),
  (b'{"text": "a\xff"}', r'not UTF-8 at byte 11 of the line'),
  (b'{"text": "\\ud800"}', r'half of a surrogate pair'),
  (b'["a"]', r'a list, expected a JSON object'),
  (b'{"other": "a", "more": 1}', r"no field 'text', it has 'other', 'more'; data.field names the field"),
  (b'{"text": null}', r"'text' is a NoneType"),
  (b'{"text": 12}', r"'text' is a int, expected a text or a list of token ids"),
  (b'{"text": ""}', r'empty'),
  (b'{"text": "a\\u0000b"}', r'NUL byte at 1'),
  (b'{"text": []}', r'empty'),
  (b'{"text": [1, true]}', r'is a list'),
  (b'{"text": [1, 2.0]}', r'is a list'),
  (b'{"text": [1, -1]}', r'id -1, expected 0 \.\. 99'),
  (b'{"text": [1, 100]}', r'id 100, expected 0 \.\. 99'),
  (b'{"text": [1, 18446744073709551617]}', r'id 18446744073709551617'),
  (b'{"text": [1, 7, 2]}', r'the separator 7 at place 1'),
]


@pytest.mark.parametrize('line, words', BAD_LINES)
def test_bad_lines_are_told_and_the_next_is_read(tmp_path, line, words):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": [7, 1, 2, 7]}\n')
  first, bad, last = read(tmp_path / 'a.jsonl')
  assert (first, last) == ((1, b'one'), (3, [1, 2]))
  assert bad[0] == 2
  assert re.search(words, bad[1])


def test_a_byte_order_mark_may_begin_the_file(tmp_path):
  for name, pack in (('a.jsonl', bytes), ('a.JSONL.GZ', gzip.compress)):
    (tmp_path / name).write_bytes(pack(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n'))
    assert read(tmp_path / name) == [(1, b'a'), (2, b'b')]


def test_a_damaged_gzip_is_told_after_what_could_be_read(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  lines = b''.join(b'{"text": "%d"}\n' % i for i in range(20000))
  whole = gzip.compress(lines)
  path.write_bytes(whole[: len(whole) // 2])
  found = read(path)
  assert found[0] == (1, b'0')
  assert found[-1][1].startswith('bad: unreadable after row')
  path.write_bytes(b'{"text": "a"}')
  assert 'bad: unreadable' in read(path)[0][1]


COLUMNS = {
  'text': pa.array(['one', 'zwö', 'x' * 3000]),
  'large': pa.array(['one', 'zwö', 'x' * 3000], pa.large_string()),
  'view': pa.array(['one', 'zwö', 'x' * 3000], pa.string_view()),
  'dictionary': pa.array(['one', 'zwö', 'x' * 3000]).dictionary_encode(),
}


@pytest.mark.parametrize('field', COLUMNS)
def test_columns_of_text(tmp_path, field):
  path = write_parquet(tmp_path / 'a.parquet', COLUMNS, row_group_size=2)
  assert read(path, field=field) == [(1, b'one'), (2, 'zwö'.encode()), (3, b'x' * 3000)]


@pytest.mark.parametrize(
  'kind', [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 3), pa.list_(pa.uint64())]
)
def test_columns_of_ids(tmp_path, kind):
  rows = [[7, 1, 2], [3, 4, 5], [6, 99, 7]]
  path = write_parquet(tmp_path / 'a.parquet', {'other': [1, 2, 3], 'ids': pa.array(rows, kind)}, row_group_size=2)
  assert read(path, field='ids') == [(1, [1, 2]), (2, [3, 4, 5]), (3, [6, 99])]


def test_bad_rows_are_told_and_the_next_is_read(tmp_path):
  broken = pa.array([b'a\xff', b'b'], pa.binary()).view(pa.string())
  columns = {
    'text': pa.array([None, 'b']),
    'empty': ['', 'b'],
    'broken': broken,
    'ids': [None, [1]],
    'hole': [[1, None], [1]],
    'high': [[1, 100], [1]],
    'number': [1, 2],
    'lists': [[['a']], [['b']]],
  }
  path = write_parquet(tmp_path / 'a.parquet', columns)
  for field, words in (('text', "'text' has no value"), ('empty', 'empty'), ('broken', 'not UTF-8 at byte 1')):
    assert read(path, field=field) == [(1, f'bad: {words}' if words[0] != 'n' else f'bad: badly encoded ({words})'),
                                       (2, b'b')]  # fmt: skip
  for field, words in (
    ('ids', "'ids' has no value"),
    ('hole', 'id -1, expected 0 .. 99'),
    ('high', 'id 100, expected 0 .. 99'),
  ):
    assert read(path, field=field) == [(1, f'bad: {words}'), (2, [1])]
  for field, words in (
    ('number', 'is int64, expected a text'),
    ('lists', 'expected a text'),
    ('no', "no column 'no', it has 'text', 'empty', 'broken', 'ids', 'hole'; data.field names the column"),
  ):
    [(row, problem)] = read(path, field=field)
    assert row == 0
    assert words in problem


def test_a_number_beyond_64_bits_with_a_sign_is_one_bad_row(tmp_path):
  rows = pa.array([[1, 2], [1, 2**63], [1, None], [3]], pa.list_(pa.uint64()))
  path = write_parquet(tmp_path / 'a.parquet', {'ids': rows})
  assert read(path, field='ids') == [
    (1, [1, 2]), (2, f'bad: id {2**63}, expected 0 .. 99'), (3, f'bad: id {2**64 - 1}, expected 0 .. 99'), (4, [3]),
  ]  # fmt: skip


def test_damaged_parquet_is_told(tmp_path):
  path = write_parquet(tmp_path / 'a.parquet', {'text': [f'text {i}' * 50 for i in range(5000)]}, row_group_size=1000)
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  [(row, problem)] = read(path)
  assert (row, problem[:4]) == (0, 'bad:')
  damaged = bytearray(whole)
  damaged[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
  path.write_bytes(damaged)
  assert any(str(value).startswith('bad:') for _, value in read(path))


@settings(max_examples=60)
@given(
  documents=st.lists(st.lists(st.integers(8, 99), min_size=1, max_size=20), min_size=1, max_size=8),
  block=st.integers(1, 9),
  dtype=st.sampled_from(['u1', 'i2', '>u4', 'i8', 'u8']),
  has_end=st.booleans(),
)
def test_a_stream_is_cut_at_separators(tmp_path_factory, documents, block, dtype, has_end):
  path = tmp_path_factory.mktemp('array') / 'a.npy'
  ids = [i for document in documents for i in (SEPARATOR, *document)]
  np.save(path, np.array(ids + [SEPARATOR] * has_end, dtype))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(readers, 'IDS', block)
    assert read(path) == list(enumerate(documents, 1))


@pytest.mark.parametrize('order', ['C', 'F'])
def test_a_row_of_a_table_is_a_document(tmp_path, order):
  np.save(
    tmp_path / 'a.npy', np.array([[7, 1, 2, 3], [4, 5, 7, 7], [1, 7, 2, 3], [7, 7, 7, 7], [8, 9, 99, 100]], order=order)
  )
  assert read(tmp_path / 'a.npy') == [
    (1, [1, 2, 3]), (2, [4, 5]), (3, 'bad: the separator 7 at place 1, expected one document'), (4, 'bad: empty'),
    (5, 'bad: id 100, expected 0 .. 99'),
  ]  # fmt: skip


@pytest.mark.parametrize(
  'array, words',
  [
    (np.array([7, 1.5]), 'an array of float64'),
    (np.array([True, False]), 'an array of bool'),
    (np.zeros((2, 2, 2), int), r'\[2, 2, 2\], expected whole numbers in 1 or 2 dimensions'),
    (np.array([1, 2, 7]), 'begins with id 1, expected the separator 7'),
    (np.zeros(0, int), 'bad:'),
    (np.array([7]), 'bad: empty'),
  ],
)
def test_other_arrays_are_refused(tmp_path, array, words):
  np.save(tmp_path / 'a.npy', array)
  [(row, problem)] = read(tmp_path / 'a.npy')
  assert row == (len(array) == 1)
  assert re.search(words, problem)


class Trap:
  """Writes a file when it is unpickled."""

  def __reduce__(self):
    return (open, (self.path, 'w'))


def test_nothing_is_unpickled(tmp_path):
  trap = Trap()
  trap.path = str(tmp_path / 'sprung')
  np.save(tmp_path / 'object.npy', np.array([trap, 1], object), allow_pickle=True)
  (tmp_path / 'pickle.npy').write_bytes(pickle.dumps(trap))
  np.savez(tmp_path / 'many.npz', a=np.zeros(2, int))
  (tmp_path / 'many.npz').rename(tmp_path / 'many.npy')
  for name in ('object', 'pickle', 'many'):
    [(row, problem)] = read(tmp_path / f'{name}.npy')
    assert (row, problem.startswith('bad: not a .npy array of numbers')) == (0, True)
  assert not (tmp_path / 'sprung').exists()


def test_a_truncated_array_is_told(tmp_path):
  np.save(tmp_path / 'a.npy', np.full(1000, 7))
  content = (tmp_path / 'a.npy').read_bytes()
  for size in (0, 5, 100, len(content) - 8):
    (tmp_path / 'a.npy').write_bytes(content[:size])
    [(row, problem)] = read(tmp_path / 'a.npy')
    assert (row, problem.startswith('bad: not a .npy array of numbers')) == (0, True)


@pytest.mark.parametrize('kind', ['jsonl', 'parquet', 'one row group', 'tokens'])
def test_files_are_not_held_whole(tmp_path, kind, monkeypatch):
  count, size = 300, 1 << 16
  path = tmp_path / 'big'
  if kind == 'jsonl':
    path.write_text(''.join(json.dumps({'text': 'x' * size}) + '\n' for _ in range(count)))
  elif kind != 'tokens':
    monkeypatch.setattr(readers, 'ROWS_BYTES', 10 * size)
    rows = count if kind == 'one row group' else 10
    texts = {'text': ['x' * size] * count, 'other': [['y']] * count}
    path = write_parquet(path, texts, row_group_size=rows, write_batch_size=4, data_page_size=4 * size,
                         use_dictionary=False, compression='none')  # fmt: skip
    kind = 'parquet'
  else:
    np.save(tmp_path / 'big.npy', np.tile(np.append(SEPARATOR, np.ones(size // 8 - 1, int)), count))
    path = tmp_path / 'big.npy'
  tracemalloc.start()
  try:
    seen = [pa.total_allocated_bytes() for _ in readers.documents(str(path), kind, 'text', SEPARATOR, VOCAB)]
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert len(seen) == count
  assert max(seen) < path.stat().st_size / 4
  # An array is looked at in blocks of readers.IDS ids.
  assert peak < (2.5 * 8 * readers.IDS if kind == 'tokens' else path.stat().st_size / 4)


@pytest.mark.parametrize('kind', ['jsonl', 'parquet', 'tokens'])
def test_files_that_cannot_be_opened_are_told(tmp_path, kind):
  for path, words in ((tmp_path, 'not a regular file'), (tmp_path / 'nothing', r'unreadable \(No such file')):
    [document] = readers.documents(str(path), kind, 'text', SEPARATOR, VOCAB)
    assert document.row == 0
    assert re.search(words, document.problem)
