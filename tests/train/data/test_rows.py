"""train.data against a cutting of one stream written as plain loops."""

import types

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding

from train import data, sharding
from train.config import SEPARATOR, DataConfig, MeshConfig, UserError
from train.data import mixing, store

TEXTS = [b'abc', b'x', 'λμνξ'.encode(), b'hello world', b'', b'z' * 9]
TOKENS = store.in_memory([(f'f{i}', text) for i, text in enumerate(TEXTS)])
LENGTHS = [(1, 1), (5, 5), (7, 3), (8, 1), (64, 64), (64, 10)]
ARRAYS = ('tokens', 'targets', 'segment_ids', 'weights', 'bytes')


def make(tokens, seq_len, **options):
  return data.Rows(tokens, seq_len, separator=SEPARATOR, **options)


def oracle(texts, seq_len, stride, is_separator_target, bytes_of=len):
  """Every row as a list of (token, target, document in the row, weight, bytes), by loops."""
  stream = []
  for text in texts:
    stream += [(SEPARATOR, 0.0), *((token, bytes_of(text) / len(text)) for token in text)]
  rows = []
  first = 0
  while first < len(stream) - 1:
    row, document = [], 0
    for t in range(first - (seq_len - stride), first + stride):
      token, _ = stream[t] if 0 <= t < len(stream) else (SEPARATOR, 0.0)
      target, size = stream[t + 1] if 0 <= t + 1 < len(stream) else (SEPARATOR, 0.0)
      document += token == SEPARATOR
      counts = t >= first and t + 1 < len(stream) and (is_separator_target or target != SEPARATOR)
      row.append((token, target, document, float(counts), np.float32(size) * counts))
    rows.append(row)
    first += stride
  return np.array(rows)


def check(rows, want):
  assert len(rows) == len(want)
  got = rows(np.arange(len(rows)))
  assert set(got) == set(ARRAYS)
  for i, name in enumerate(ARRAYS):
    np.testing.assert_array_equal(got[name], want[:, :, i], name)
    assert got[name].dtype == (np.int32 if i < 3 else np.float32)


@pytest.mark.parametrize('seq_len, stride', LENGTHS)
@pytest.mark.parametrize('is_separator_target', [True, False])
def test_rows_match_oracle(seq_len, stride, is_separator_target):
  rows = make(TOKENS, seq_len, stride=stride, is_separator_target=is_separator_target)
  check(rows, oracle(TEXTS, seq_len, stride, is_separator_target))


@settings(deadline=None, max_examples=60)
@given(
  st.lists(st.lists(st.integers(0, 255), max_size=20), min_size=1, max_size=8).filter(lambda d: len(d) > 1 or d[0]),
  st.integers(1, 24),
  st.integers(0, 24),
  st.booleans(),
)
def test_drawn_rows_match_oracle(texts, seq_len, stride, is_separator_target):
  stride = stride % (seq_len + 1)
  rows = make(store.in_memory(list(enumerate(texts))), seq_len, stride=stride, is_separator_target=is_separator_target)
  check(rows, oracle(texts, seq_len, stride or seq_len, is_separator_target))


@pytest.mark.parametrize('packing', ['stream', 'documents', 'single'])
def test_bytes_of_targets_add_up_to_those_of_the_documents(packing):
  """Tokens that stand for more or less than a byte; one of them looks like a separator."""
  texts = [[1, 2, 70000], [5], [3, SEPARATOR, 4, 4, 4]]
  made = store.in_memory([(str(i), text) for i, text in enumerate(texts)])
  counts = np.array([12, 7, 4])
  rows = make(store.Tokens(made.stream, made.starts, counts, made.names), 4, packing=packing)
  got = rows(np.arange(len(rows) + 1))
  assert got['bytes'].sum(dtype=float) == pytest.approx(23, rel=1e-6)
  for token, rate in [(70000, 4), (5, 7), (3, 0.8)]:
    assert set(got['bytes'][(got['targets'] == token) & (got['weights'] == 1)]) == {np.float32(rate)}
  is_end = (got['bytes'] == 0) & (got['weights'] == 1)
  assert is_end.sum() == (2 if packing == 'stream' else 3)
  assert set(got['targets'][is_end]) == {SEPARATOR}


@pytest.mark.parametrize('seq_len, stride', [(5, 5), (7, 3), (64, 10)])
def test_each_held_out_byte_is_a_target_once_and_nothing_else_is(seq_len, stride):
  rows = make(TOKENS, seq_len, stride=stride, is_separator_target=False)
  got = rows(np.arange(len(rows) + 3))  # with rows beyond the last
  targets = got['targets'][got['weights'] == 1]
  assert bytes(targets.astype(np.uint8)) == b''.join(TEXTS)
  assert targets.max() < SEPARATOR
  np.testing.assert_array_equal(got['bytes'], got['weights'])


def test_padding_is_the_share_of_places_without_a_target():
  assert make(TOKENS, 5).padding == pytest.approx(1 - 37 / 40)  # 32 bytes and 6 separators, the first no target
  rows = make(TOKENS, 5, packing='single')
  weights = rows(np.arange(len(rows)))['weights']
  assert rows.padding == pytest.approx(1 - weights.mean())


def test_where_names_documents():
  rows = make(TOKENS, 5)
  # Separators stand at 0, 4, 6 and 15 of the stream.
  assert rows.where([0, 1, 4]) == ['row 0 (f0 byte 0)', 'row 1 (f1 byte 0)', 'row 4 (f3 byte 4)']


@pytest.mark.parametrize(
  'options, words',
  [
    ({'packing': 'random'}, "packing='random': expected one of"),
    ({'seq_len': 0}, 'seq_len=0'),
    ({'stride': 5}, 'stride=5'),
    ({'stride': -1}, 'stride=-1'),
    ({'packing': 'documents', 'stride': 2}, 'expected stride=0, got 2'),
  ],
)
def test_rejects(options, words):
  with pytest.raises(ValueError, match=words):
    make(TOKENS, **{'seq_len': 4, **options})


def on(mesh):
  return NamedSharding(sharding.make_mesh(MeshConfig(**mesh)), sharding.ROWS)


def test_batches_visit_each_row_once_a_pass_and_continue_from_a_state():
  rows, placed = make(TOKENS, 3), on({'data': 1})
  iterator = data.batches(rows, 4, placed, seed=7)
  drawn = [next(iterator) for _ in range(10)]
  numbers = np.concatenate([chosen for chosen, _, _ in drawn])
  for start in range(0, len(numbers) - len(rows), len(rows)):
    assert sorted(numbers[start : start + len(rows)]) == list(range(len(rows)))
  assert list(numbers[: len(rows)]) != list(numbers[len(rows) : 2 * len(rows)])
  np.testing.assert_array_equal(drawn[3][2]['tokens'], rows(drawn[3][0])['tokens'])

  again = data.batches(rows, 4, placed, seed=7)
  for _ in range(5):
    next(again)
  state = again.get_state()
  third = data.batches(rows, 4, placed, seed=7)
  third.set_state(state)
  for want in drawn[5:]:
    np.testing.assert_array_equal(next(third)[0], want[0])
  assert list(next(data.batches(rows, 4, placed, seed=8))[0]) != list(drawn[0][0])


@pytest.mark.parametrize('mesh', [{'data': 1}, {'data': 4}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
@pytest.mark.parametrize('packing', ['stream', 'documents'])
def test_global_arrays_hold_the_rows(mesh, packing):
  rows, placed = make(TOKENS, 4, packing=packing), on(mesh)
  chosen, local, arrays = next(data.batches(rows, 4, placed, seed=0))
  made = data.to_global(local, arrays, 4, placed)
  assert set(made) == set(ARRAYS)
  for name, want in rows(chosen).items():
    np.testing.assert_array_equal(made[name], want)
    assert made[name].sharding == placed


def test_rows_cut_along_their_length_have_positions_and_go_in_zigzag():
  rows, placed = make(TOKENS, 8, packing='documents'), on({'data': 1, 'context': 2})
  chosen, local, arrays = next(data.batches(rows, 2, placed, seed=0))
  made = data.to_global(local, arrays, 2, placed)
  order = [0, 1, 6, 7, 2, 3, 4, 5]
  for name, want in rows(chosen).items():
    np.testing.assert_array_equal(made[name], want[:, order])
  segments = rows(chosen)['segment_ids']
  want = [[list(row[:t]).count(row[t]) for t in order] for row in segments]  # ids of a row never come back
  np.testing.assert_array_equal(made['positions'], want)


def test_in_order_fills_up_the_last_batch():
  rows, placed = make(TOKENS, 5, is_separator_target=False), on({'data': 1})
  total = 0.0
  for numbers, _, arrays in data.in_order(rows, np.arange(len(rows)), 4, placed):
    assert numbers.shape == (4,)
    total += arrays['weights'].sum()
  assert total == sum(map(len, TEXTS))


class Counting:
  """A stream that notes which of its tokens were read."""

  def __init__(self, stream):
    self.stream, self.read = stream, set()

  def __len__(self):
    return len(self.stream)

  def __getitem__(self, index):
    self.read |= set(np.arange(len(self.stream))[index].ravel().tolist())
    return self.stream[index]


@pytest.mark.parametrize('packing', ['stream', 'documents', 'single'])
def test_only_the_rows_asked_for_are_read(packing):
  rows = make(TOKENS, 6, packing=packing)
  for row in range(len(rows)):
    rows.stream = Counting(TOKENS.stream)
    got = rows([row])
    if packing == 'stream':
      want = set(range(row * 6, min(row * 6 + 7, len(TOKENS.stream))))
      assert rows.stream.read == want
    else:  # the places of its targets, and the separator before
      assert got['weights'].sum() <= len(rows.stream.read) <= got['weights'].sum() + got['segment_ids'].max()
  rows.stream = Counting(TOKENS.stream)
  assert rows([len(rows), len(rows) + 5])['weights'].sum() == 0
  assert not rows.stream.read


def corpus(*parts):
  """What is read of a store.Corpus, of parts (training texts, held-out texts)."""
  tokens = lambda texts, name: store.in_memory([(f'{name}{i}', text) for i, text in enumerate(texts)])
  made = [store.Part(f'part{i}', 1.0, tokens(a, 'train'), tokens(b, 'held')) for i, (a, b) in enumerate(parts)]
  return types.SimpleNamespace(parts=made, separator=SEPARATOR)


def test_held_out_text_is_that_of_all_parts_one_after_the_other():
  held = data.held_out_rows(corpus(([b'train'], TEXTS[:2]), ([b'train'], []), ([b'more'], TEXTS[2:])),
                            DataConfig(seq_len=6, packing='documents'), stride=2)  # fmt: skip
  assert held.stride == 2
  got, again = [], []
  for _, _, arrays in data.in_order(held, np.arange(len(held)), 4, on({'data': 1})):
    got += arrays['targets'][arrays['weights'] == 1].tolist()
    again.append(arrays['bytes'].sum())
  assert bytes(got) == b''.join(TEXTS)
  assert sum(again) == len(got)
  assert held.where([0, len(held) - 1]) == ['row 0 (part0: held0 byte 0)', 'row 18 (part2: held3 byte 7)']


def test_training_rows_are_packed_as_the_config_says():
  made = data.training_rows(corpus((TEXTS, [])), DataConfig(seq_len=16, packing='single', tokenizer='some.json'))
  assert isinstance(made, mixing.Mixture)
  assert len(made) == len(TEXTS)
  assert made.where([3]) == ['row 3 (train3 token 0)']


def test_parts_with_nothing_in_them_are_refused_by_name():
  with pytest.raises(UserError, match=r'data.source \(part0\): expected 1 .* training rows, got 0'):
    data.training_rows(corpus(([], TEXTS)), DataConfig(seq_len=4))
  with pytest.raises(UserError, match='expected held-out text in some part, found none'):
    data.held_out_rows(corpus((TEXTS, []), (TEXTS, [])), DataConfig(seq_len=4))


def test_a_row_longer_than_the_text_is_padded():
  got = make(store.in_memory([('a', b'xy')]), 100)([0])
  assert got['weights'].sum() == 2
  assert got['segment_ids'][0, -1] == 98  # the document and each separator after it
