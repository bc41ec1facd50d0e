"""train.data.shards: damage to the journal of a preparation is found and told, and nothing is lost to it."""

import json
import re

import numpy as np
import pytest

from tests.train import tiny
from train.config import DataConfig, UserError
from train.data import encode, shards, store

DTYPES = {'a': np.dtype('<i4'), 'b': np.dtype('u1')}


def shard(writer, number):
  writer.add('a', [number, 2 * number])
  writer.add('b', [number])
  writer.commit(documents=number)


@pytest.fixture
def begun(tmp_path):
  """A folder with three shards of plan 'p'."""
  writer = shards.Writer(tmp_path, DTYPES, 'p')
  for number in range(1, 4):
    shard(writer, number)
  return tmp_path


def reopened(folder, plan='p'):
  """(documents of each shard that is taken over, lines that were said)."""
  lines: list[str] = []
  writer = shards.Writer(folder, DTYPES, plan, lines.append)
  return [values['documents'] for values in writer.shards], lines


def test_shards_are_taken_over_and_go_on(begun):
  writer = shards.Writer(begun, DTYPES, 'p', lambda line: pytest.fail(line))
  assert (writer.length('a'), writer.length('b')) == (6, 3)
  shard(writer, 4)
  assert reopened(begun) == ([1, 2, 3, 4], [])
  assert shards.mapped(begun, 'a', DTYPES['a']).tolist() == [1, 2, 2, 4, 3, 6, 4, 8]
  assert reopened(begun, 'other') == ([], [])
  assert [(begun / name).stat().st_size for name in DTYPES] == [0, 0]


def test_a_shard_adds_a_line_to_the_journal(begun):
  before = (begun / shards.JOURNAL).read_bytes()
  shard(shards.Writer(begun, DTYPES, 'p'), 4)
  after = (begun / shards.JOURNAL).read_bytes()
  assert after.startswith(before)
  assert after[len(before) :].count(b'\n') == 1


def test_a_line_that_was_being_written_is_cut_off(begun):
  journal = begun / shards.JOURNAL
  whole = journal.read_bytes()
  for cut in (1, 20, len(whole.splitlines()[-1])):
    journal.write_bytes(whole[:-cut])
    assert reopened(begun) == ([1, 2], [])
    shard(shards.Writer(begun, DTYPES, 'p'), 3)
    assert journal.read_bytes() == whole


def test_any_flipped_bit_is_told_or_costs_the_last_shard_only(begun):
  journal = begun / shards.JOURNAL
  whole = journal.read_bytes()
  rng = np.random.default_rng(0)
  for at in [len(whole) - 1, *rng.integers(0, len(whole), 60).tolist()]:
    content = bytearray(whole)
    content[at] ^= 1 << int(rng.integers(8))
    journal.write_bytes(content)
    files = [(begun / name).read_bytes() for name in DTYPES]
    taken, lines = reopened(begun)
    if at == len(whole) - 1:
      assert (taken, lines) == ([1, 2], [])
    else:
      assert taken == []
      assert re.search(r'journal.jsonl: damaged, line \d is not what was written.*written again', lines[0])
    for name, content in zip(DTYPES, files, strict=True):
      (begun / name).write_bytes(content)


OTHERS = ['[]', 'null', '{', '{"plan": 1}', '{"sha256": "x", "values": {}}', '\xff', '[' * 10**5]


@pytest.mark.parametrize('text', OTHERS)
def test_a_journal_of_something_else_is_told(begun, text):
  (begun / shards.JOURNAL).write_text(text + '\n', encoding='latin-1')
  taken, [line] = reopened(begun)
  assert taken == []
  assert 'damaged, line 1' in line


def test_a_line_that_is_gone_or_doubled_is_told(begun):
  journal = begun / shards.JOURNAL
  lines = journal.read_bytes().splitlines(keepends=True)
  for changed in ([0, 2, 3], [0, 1, 1, 2], [1, 2, 3], [0, 2, 1, 3]):
    journal.write_bytes(b''.join(lines[i] for i in changed))
    taken, said = reopened(begun)
    assert taken == []
    assert 'damaged, line' in said[0]


def test_damaged_tokens_are_told(begun):
  (begun / 'a').write_bytes(b'\0' * 24)
  taken, [line] = reopened(begun)
  assert taken == []
  assert re.search(r'a: damaged, bytes 0 to 8 .*written again from the start', line)


def test_documents_that_get_lost_are_an_error(tmp_path, monkeypatch):
  config = DataConfig(source=tiny.write_corpus(tmp_path / 'text'), held_out_percent=20)
  write = encode._Encoder._write
  with monkeypatch.context() as patch:
    patch.setattr(encode._Encoder, '_write', lambda self, name, rows: write(self, name, rows[1:]))
    with pytest.raises(UserError, match=r': \d+ documents were written, 24 are in the text; start again'):
      store.open_or_prepare(config, tmp_path / 'run')
  assert store.open_or_prepare(config, tmp_path / 'run').documents('train') == 20


def test_a_batch_ends_at_a_number_of_documents(tmp_path, monkeypatch):
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': f'{i}'}) + '\n' for i in range(100)))
  sizes, encoded = [], encode._Encoder._encode
  monkeypatch.setattr(encode, 'MOST', 16)
  monkeypatch.setattr(encode._Encoder, '_encode', lambda self: (sizes.append(len(self._batch)), encoded(self)))
  store.open_or_prepare(DataConfig(source=str(tmp_path / 'a.jsonl')), tmp_path / 'run')
  assert max(sizes) == 16
  assert sum(sizes) == 100
