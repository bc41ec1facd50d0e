"""train.data against a packing of documents written as plain loops."""

import numpy as np
import pytest
from jax.sharding import NamedSharding

from train import data, sharding
from train.config import SEPARATOR, MeshConfig
from train.corpus import File

TEXTS = [b'abc', b'x', 'λμνξ'.encode(), b'hello world', b'', b'z' * 9]
FILES = [File(f'f{i}', f'f{i}', text) for i, text in enumerate(TEXTS)]


def oracle(seq_len, stride, is_separator_target):
  """Every row as a list of (token, target, document in the row, weight), by loops; None outside of the text."""
  stream = []
  for text in TEXTS:
    stream += [SEPARATOR, *text]
  rows = []
  first = 0
  while first < len(stream) - 1:
    row, document = [], 0
    for t in range(first - (seq_len - stride), first + stride):
      token = stream[t] if 0 <= t < len(stream) else SEPARATOR
      target = stream[t + 1] if 0 <= t + 1 < len(stream) else SEPARATOR
      document += token == SEPARATOR
      counts = t >= first and t + 1 < len(stream) and (is_separator_target or target != SEPARATOR)
      row.append((token, target, document, float(counts)))
    rows.append(row)
    first += stride
  return np.array(rows)


@pytest.mark.parametrize('seq_len, stride', [(1, 1), (5, 5), (7, 3), (8, 1), (64, 64), (64, 10)])
@pytest.mark.parametrize('is_separator_target', [True, False])
def test_rows_match_oracle(seq_len, stride, is_separator_target):
  rows = data.Rows(FILES, seq_len, stride=stride, is_separator_target=is_separator_target)
  want = oracle(seq_len, stride, is_separator_target)
  assert len(rows) == len(want)
  got = rows(np.arange(len(rows)))
  for i, name in enumerate(('tokens', 'targets', 'segment_ids', 'weights')):
    np.testing.assert_array_equal(got[name], want[:, :, i], name)


@pytest.mark.parametrize('seq_len, stride', [(5, 5), (7, 3), (64, 10)])
def test_each_held_out_byte_is_a_target_once_and_nothing_else_is(seq_len, stride):
  rows = data.Rows(FILES, seq_len, stride=stride, is_separator_target=False)
  got = rows(np.arange(len(rows) + 3))  # with rows beyond the last
  targets = got['targets'][got['weights'] == 1]
  assert bytes(targets.astype(np.uint8)) == b''.join(TEXTS)
  assert targets.max() < SEPARATOR


def test_where_names_files():
  rows = data.Rows(FILES, 5)
  # Separators stand at 0, 4, 6 and 15 of the stream.
  assert rows.where([0, 1, 4]) == ['row 0 (f0 byte 0)', 'row 1 (f1 byte 0)', 'row 4 (f3 byte 4)']


def on(mesh):
  return NamedSharding(sharding.make_mesh(MeshConfig(**mesh)), sharding.ROWS)


def test_batches_visit_each_row_once_a_pass_and_continue_from_a_state():
  rows, placed = data.Rows(FILES, 3), on({'data': 1})
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
def test_global_arrays_hold_the_rows(mesh):
  rows, placed = data.Rows(FILES, 4), on(mesh)
  chosen, local, arrays = next(data.batches(rows, 4, placed, seed=0))
  made = data.to_global(local, arrays, 4, placed)
  for name, want in rows(chosen).items():
    np.testing.assert_array_equal(made[name], want)
    assert made[name].sharding == placed


def test_in_order_fills_up_the_last_batch():
  rows, placed = data.Rows(FILES, 5, is_separator_target=False), on({'data': 1})
  total = 0.0
  for numbers, _, arrays in data.in_order(rows, np.arange(len(rows)), 4, placed):
    assert numbers.shape == (4,)
    total += arrays['weights'].sum()
  assert total == sum(map(len, TEXTS))
