"""train.data.packing against pieces cut and put together one by one."""

import collections
import itertools
import time

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from train import data
from train.config import SEPARATOR
from train.data import packing, store

TEXTS = st.lists(st.lists(st.integers(0, 255), max_size=30), min_size=1, max_size=12)


def make(texts, seq_len, packing, **options):
  tokens = store.in_memory([(f'f{i}', text) for i, text in enumerate(texts)])
  return data.Rows(tokens, seq_len, separator=SEPARATOR, packing=packing, **options)


def pieces_of(texts, seq_len):
  """Pieces in the order of the text: lists of (token, target, whether the target is the end of the document)."""
  made = []
  for text in texts:
    whole = [SEPARATOR, *text, SEPARATOR]
    places = [(whole[i], whole[i + 1], i == len(text)) for i in range(len(whole) - 1)]
    made += [places[i : i + seq_len] for i in range(0, len(places), seq_len)]
  return made


def pieces_in(arrays, is_separator_target=True):
  """The pieces of each row, read from the arrays: its segments, without the padding at the end."""
  made = []
  for tokens, targets, segments, weights, sizes in zip(*(arrays[name].tolist() for name in (
    'tokens', 'targets', 'segment_ids', 'weights', 'bytes'))):  # fmt: skip
    row = collections.defaultdict(list)
    for token, target, segment, weight, size in zip(tokens, targets, segments, weights, sizes):
      assert (weight, size) in ({(1, 1), (1, 0)} if is_separator_target else {(1, 1), (0, 0)})
      row[segment].append((token, target, size == 0))
    assert list(row) == list(range(1, len(row) + 1))
    assert segments == sorted(segments)
    made.append(list(row.values()))
  return made


def without_padding(arrays, used):
  """Pieces of rows of which the first used[r] places hold text; the rest is checked to be padding."""
  made = []
  for r, count in enumerate(used):
    rest = {name: array[r, count:] for name, array in arrays.items()}
    assert set(rest['tokens'].tolist()) | set(rest['targets'].tolist()) <= {SEPARATOR}
    assert not rest['weights'].any() and not rest['bytes'].any()
    ids = arrays['segment_ids'][r]
    assert (np.diff(ids[max(0, count - 1) :]) == 1).all()  # each a segment of its own
    made += pieces_in({name: array[r : r + 1, :count] for name, array in arrays.items()})
  return made


def best_fit(lengths, seq_len):
  """What rows hold, the longest piece first, each into the row with the least room that is enough. Tries all rows."""
  rows = []
  for length in sorted(lengths, reverse=True):
    fitting = [row for row in rows if sum(row) + length <= seq_len]
    if fitting:
      max(fitting, key=sum).append(length)
    else:
      rows.append([length])
  return rows


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.integers(1, 24))
@example([[]], 1)
@example([[1] * 8, [2] * 7, [3] * 15], 8)  # one place more than a row, a whole row, two
def test_single_is_one_piece_a_row(texts, seq_len):
  rows, want = make(texts, seq_len, 'single'), pieces_of(texts, seq_len)
  assert len(rows) == len(want)
  got = without_padding(rows(np.arange(len(rows))), [len(piece) for piece in want])
  assert got == [[piece] for piece in want]


@settings(deadline=None, max_examples=100)
@given(TEXTS, st.integers(1, 24))
@example([[]], 1)
@example([[1] * 8, [2] * 7, [3] * 15], 8)
@example([[1] * 5, [2] * 3, [3] * 2, [4] * 3, [5]], 12)
def test_documents_are_whole_and_rows_as_full_as_by_best_fit(texts, seq_len):
  rows, pieces = make(texts, seq_len, 'documents'), pieces_of(texts, seq_len)
  want = best_fit([len(piece) for piece in pieces], seq_len)
  assert len(rows) == len(want)
  used = np.diff(np.append(0, np.cumsum(rows.plan.length))[rows.plan.first])
  got = without_padding(rows(np.arange(len(rows))), used)
  assert sorted(piece for row in got for piece in row) == sorted(pieces)
  assert sorted(used) == sorted(map(sum, want))
  assert rows.padding == pytest.approx(1 - used.sum() / (len(rows) * seq_len))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), max_size=200), st.integers(40, 64))
def test_best_fit_equals_one_by_one(lengths, seq_len):
  order, first = packing.best_fit(np.array(lengths, np.int32), seq_len)
  assert sorted(order) == list(range(len(lengths)))
  got = [[lengths[i] for i in order[a:b]] for a, b in itertools.pairwise(first)]
  want = best_fit(lengths, seq_len)
  assert all(row == sorted(row, reverse=True) for row in got)
  assert sorted(map(sum, got)) == sorted(map(sum, want))
  again, _ = packing.best_fit(np.array(lengths, np.int32), seq_len)
  np.testing.assert_array_equal(order, again)


@pytest.mark.parametrize('how', ['documents', 'single'])
def test_any_rows_in_any_order(how):
  rows = make([[i] * (5 * i % 19) for i in range(1, 30)], 12, how)
  whole = rows(np.arange(len(rows)))
  chosen = np.array([3, len(rows) + 2, 0, 3, len(rows) - 1, len(rows)])
  got = rows(chosen)
  for i, row in enumerate(chosen):
    for name, array in got.items():
      if row < len(rows):
        np.testing.assert_array_equal(array[i], whole[name][row])
      elif name == 'segment_ids':
        assert array[i].tolist() == list(range(1, 13))
      else:
        assert set(array[i]) == {SEPARATOR if name in ('tokens', 'targets') else 0}


def test_without_separator_targets_each_token_is_a_target_once_and_nothing_else_is():
  texts = [[i] * (5 * i % 19) for i in range(1, 30)]
  rows = make(texts, 12, 'documents', is_separator_target=False)
  got = rows(np.arange(len(rows)))
  assert sorted(got['targets'][got['weights'] == 1]) == sorted(token for text in texts for token in text)
  np.testing.assert_array_equal(got['weights'], got['bytes'])


def test_the_first_target_of_a_later_piece_has_one_token_before_it():
  rows = make([[1, 2, 3, 4, 5, 6]], 4, 'single')
  got = rows([0, 1])
  assert got['tokens'].tolist() == [[SEPARATOR, 1, 2, 3], [4, 5, 6, SEPARATOR]]
  assert got['targets'].tolist() == [[1, 2, 3, 4], [5, 6, SEPARATOR, SEPARATOR]]
  assert got['segment_ids'].tolist() == [[1, 1, 1, 1], [1, 1, 1, 2]]
  assert got['weights'].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_where_names_the_pieces_of_a_row():
  rows = make([[1] * 9, [2] * 3, [], [], [3]], 8, 'documents')
  # Pieces of 8 and 2 places (the long document), 4, 1, 1, 2: the rest of the first stands with the second.
  assert rows.where([0, 1, 2]) == [
    'row 0 (f0 byte 0)',
    'row 1 (f1 byte 0, f0 byte 7, f4 byte 0)',
    'row 2 (f2 byte 0, f3 byte 0)',
  ]
  rows = make([[1]] * 5, 10, 'documents', unit='token')
  assert rows.where([0, 1]) == ['row 0 (f0 token 0, f1 token 0, f2 token 0, and 2 more)', 'row 1 (empty)']


def test_no_documents_give_no_rows():
  assert [len(make([], 4, how)) for how in data.PACKINGS] == [0, 0, 0]


@pytest.mark.parametrize('count', [200_000, pytest.param(5_000_000, marks=pytest.mark.long)])
def test_plans_of_many_documents_are_fast_and_full(count):
  """The work grows with the distinct lengths, not with documents times rows: seconds, where one by one takes days."""
  rng = np.random.default_rng(0)
  places = np.minimum(rng.lognormal(6, 1.5, count).astype(np.int64) + 1, 10**6)
  ends = np.cumsum(places)
  began = time.process_time()
  plan = packing.documents(ends - places, int(ends[-1]), 4096)
  assert time.process_time() - began < 2 + count / 100_000
  used = np.add.reduceat(plan.length, plan.first[:-1])
  assert used.max() <= 4096
  assert used.sum() == ends[-1]
  assert used.sum() / (len(used) * 4096) > 0.99
  assert sum(array.nbytes for array in plan) <= 12 * len(plan.begin) + 8 * (len(used) + 1)
