"""train.data.mixing: exact proportions, the same batches for any number of processes, and the place in the data."""

import fractions
import itertools
import json
import math
import re
import time

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings, strategies as st

from tests.train.data.test_rows import Counting
from train import data
from train.config import SEPARATOR, DataConfig, SourceConfig
from train.data import mixing, store

T = 8
WEIGHTS = st.one_of(st.integers(1, 50), st.floats(1e-3, 1e3), st.sampled_from([0.1, 0.7, 1 / 3, 1e-9, 1e9]))


def text(seed, documents=9):
  rng = np.random.default_rng(seed)
  return [(f't{seed}/{i}', rng.integers(0, 256, rng.integers(1, 25))) for i in range(documents)]


def mixture(weights=(1.0,), packing='stream', tokens=None):
  tokens = tokens or [store.in_memory(text(seed, 9 + seed)) for seed in range(len(weights))]
  parts = [data.Rows(part, T, separator=SEPARATOR, packing=packing) for part in tokens]
  return mixing.Mixture(parts, [f'part{i}' for i in range(len(parts))], list(weights))


def parts_of(mixed, numbers):
  return np.array([next(i for i in range(len(mixed.parts)) if number < mixed.offsets[i + 1]) for number in numbers])


@settings(deadline=None, max_examples=60)
@given(st.lists(WEIGHTS, min_size=1, max_size=7))
@example([1, 1, 1])
@example([6, 3, 3, 2, 1])
@example([1e9, 1, 1, 1, 1, 1, 1])
@example([1, 1.0001])
def test_after_each_row_each_part_was_drawn_in_proportion(weights):
  draw = mixing.Draw(mixture(weights), 0)
  total = sum(map(fractions.Fraction, weights))
  counts = [0] * len(weights)
  for n in range(1, 150):
    (number,), counts = draw(counts, 1)
    assert number == draw(([0] * len(weights)), n)[0][-1] if n % 50 == 0 else True
    for count, weight in zip(counts, weights):
      assert abs(count - n * fractions.Fraction(weight) / total) < 1
    assert sum(counts) == n


def test_whole_weights_repeat_after_their_sum():
  """3 : 2 : 1, by hand: of the parts that may give a row, the one whose next row is due first."""
  mixed = mixture([3, 2, 1])
  numbers, drawn = mixing.Draw(mixed, 0)([0, 0, 0], 12)
  assert parts_of(mixed, numbers).tolist() == [0, 1, 0, 1, 0, 2] * 2
  assert drawn == [6, 4, 2]


@pytest.mark.parametrize('rows', [1, 2, 37, mixing._FEW_ROWS, mixing._FEW_ROWS + 1])
def test_order_has_each_row_once_a_pass(rows):
  order = mixing.order(rows, 3, 1)
  passes = [[order[j] for j in range(n * rows, (n + 1) * rows)] for n in range(3)]
  assert all(sorted(one) == list(range(rows)) for one in passes)
  assert rows < 37 or (passes[0] != passes[1] != passes[2] != passes[0])
  late = 10**12 * rows + rows // 2
  found = order[late]
  assert order[5 % rows] == passes[0][5 % rows]
  assert found == order[late] == mixing.order(rows, 3, 1)[late]


def test_order_is_that_of_earlier_runs():
  """Written down, the many rows when they came from a pipeline of Grain's; runs of any version must agree."""
  many, few = mixing.order(20_000, 7), mixing.order(5, 0)
  assert [many[j] for j in (0, 1, 2, 19_999, 20_000, 20_001, 10**12)] == [8812, 17398, 1185, 354, 18996, 11593, 5658]
  assert [mixing.order(20_000, 7, part=1)[j] for j in range(3)] == [3402, 11155, 12162]
  assert [few[j] for j in range(15)] == [3, 2, 1, 0, 4, 4, 3, 1, 0, 2, 1, 0, 4, 2, 3]


def test_each_part_is_shuffled_by_its_own_seed_and_anew_in_each_pass():
  same = store.in_memory(text(0))
  mixed = mixture([1.0, 1.0], tokens=[same, same])
  n = len(mixed.parts[0])
  numbers, _ = mixing.Draw(mixed, 5)([0, 0], 6 * n)
  passes = []
  for i in range(2):
    own = numbers[parts_of(mixed, numbers) == i] - mixed.offsets[i]
    passes += own.reshape(3, n).tolist()
  assert all(sorted(one) == list(range(n)) for one in passes)
  assert len(set(map(tuple, passes))) == 6
  other, _ = mixing.Draw(mixed, 6)([0, 0], n)
  assert other.tolist() != numbers[:n].tolist()


def local(process, processes, batch):
  return np.array_split(np.arange(batch), processes)[process]


def batches(mixed, process=0, processes=1, batch=6, seed=3):
  return mixing.Batches(mixed, batch, local(process, processes, batch), seed)


@pytest.mark.parametrize('packing', data.PACKINGS)
@pytest.mark.parametrize('weights', [(1.0,), (1.0, 2.5, 0.3)])
def test_any_number_of_processes_and_any_stop_gives_the_same_batches(packing, weights):
  mixed = mixture(weights, packing)
  whole = list(itertools.islice(batches(mixed), 12))
  assert len({tuple(chosen) for chosen, *_ in whole}) > 9
  for processes, after in [(2, 5), (3, 0), (6, 11)]:  # the run before had one, here go on two, three, six
    first = batches(mixed)
    for _ in range(after):
      next(first)
    state = json.loads(json.dumps(first.get_state()))
    then = [batches(mixed, i, processes) for i in range(processes)]
    for one in then:
      next(one)  # a place that is left
      one.set_state(state)
      assert one.get_state() == state
    for chosen, _, arrays in whole[after:]:
      made = [next(one) for one in then]
      for name, array in arrays.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for *_, part in made]), array)
      assert all(mine.tolist() == chosen.tolist() for mine, *_ in made)
      assert np.concatenate([rows for _, rows, _ in made]).tolist() == list(range(6))
    assert all(one.get_state() == then[0].get_state() for one in then)


@pytest.mark.parametrize('packing', data.PACKINGS)
def test_a_process_reads_its_own_rows_only(packing):
  mixed = mixture((1.0, 1.0), packing)
  made = batches(mixed, 1, 3)
  for part in mixed.parts:
    part.stream = Counting(part.stream)
  chosen = [made._next()[0] for _ in range(2)]
  want = mixture((1.0, 1.0), packing)
  for part in want.parts:
    part.stream = Counting(part.stream)
  for numbers in chosen:
    for number in numbers[[2, 3]]:
      want([number])
  assert [part.stream.read for part in mixed.parts] == [part.stream.read for part in want.parts]
  assert 0 < sum(len(part.stream.read) for part in mixed.parts) < sum(len(part.stream) for part in mixed.parts) / 2


def written(folder):
  """Four sources, one of each format; returns the parts of a mixture of them."""
  rng = np.random.default_rng(0)
  texts = [[bytes(rng.integers(97, 123, rng.integers(2, 30)).tolist()).decode() for _ in range(20)] for _ in range(4)]
  (folder / 'text').mkdir()
  for i, one in enumerate(texts[0]):
    (folder / 'text' / f'{i}.txt').write_text(one)
  (folder / 'a.jsonl').write_text(''.join(json.dumps({'text': one}) + '\n' for one in texts[1]))
  pyarrow.parquet.write_table(pyarrow.table({'text': texts[2]}), folder / 'a.parquet')
  np.save(folder / 'a.npy', np.concatenate([[SEPARATOR, *one.encode()] for one in texts[3]]).astype(np.uint16))
  sources = [folder / name for name in ('text', 'a.jsonl', 'a.parquet', 'a.npy')]
  return [SourceConfig(source=str(source), weight=weight) for source, weight in zip(sources, (4.0, 3.0, 2.0, 1.0))]


@pytest.mark.parametrize('packing', data.PACKINGS)
def test_all_formats_go_on_where_they_were(packing, tmp_path):
  config = DataConfig(mixture=written(tmp_path), packing=packing, held_out_percent=10, seq_len=T)
  corpora = [store.open_or_prepare(config, tmp_path / 'run', say=lambda line: None) for _ in range(2)]
  before, after = (data.training_rows(corpus, config) for corpus in corpora)  # made, and opened again
  want = list(itertools.islice(batches(before, batch=10), 8))
  assert sorted(set(parts_of(before, want[0][0]))) == [0, 1, 2, 3]
  first, second = batches(before, batch=10), batches(after, 1, 2, batch=10)
  for _ in range(3):
    next(first)
  second.set_state(json.loads(json.dumps(first.get_state())))
  for chosen, _, arrays in want[3:]:
    numbers, _, part = next(second)
    assert numbers.tolist() == chosen.tolist()
    for name, array in arrays.items():
      np.testing.assert_array_equal(part[name], array[5:])
  assert after.where(chosen) == before.where(chosen)
  assert re.search(r'a.jsonl: a.jsonl:\d+ byte \d+', ' '.join(after.where(range(len(after)))))
  texts = {token for _, _, arrays in want for token in arrays['targets'][arrays['bytes'] > 0].tolist()}
  assert texts <= set(range(97, 123))


@pytest.mark.parametrize('packing', data.PACKINGS)
def test_a_map_of_a_file_gives_the_same_rows(packing, tmp_path):
  made = store.in_memory(text(4))
  made.stream.tofile(tmp_path / 'stream')
  mapped = np.memmap(tmp_path / 'stream', made.stream.dtype, mode='r')
  got = mixture((1.0,), packing, [store.Tokens(mapped, made.starts, made.byte_counts, made.names)])
  want = mixture((1.0,), packing, [made])
  for name, array in want(np.arange(len(want))).items():
    mine = got(np.arange(len(got)))[name]
    np.testing.assert_array_equal(mine, array)
    assert type(mine) is np.ndarray


def test_rows_of_a_mixture_are_those_of_its_parts():
  mixed = mixture((1.0, 1.0, 1.0), 'documents')
  lengths = [len(part) for part in mixed.parts]
  assert len(mixed) == sum(lengths)
  numbers = np.random.default_rng(0).permutation(len(mixed) + 2)
  got = mixed(numbers)
  where = mixed.where(numbers)
  for i, number in enumerate(numbers):
    part, row = 0, int(number)
    while part < 2 and row >= lengths[part]:
      part, row = part + 1, row - lengths[part]
    for name, array in mixed.parts[part]([row]).items():
      np.testing.assert_array_equal(got[name][i], array[0])
    place = mixed.parts[part].where([row])[0].removeprefix(f'row {row} (')
    assert where[i] == f'row {number} (part{part}: {place}'
  assert mixed.padding == pytest.approx(1 - got['weights'].sum() / ((len(mixed)) * T))


def test_a_late_place_is_found_at_once():
  mixed = mixture((0.7, 0.2, 0.1))
  draw = mixing.Draw(mixed, 0)
  n = 10**12
  total = sum(map(fractions.Fraction, mixed.weights))
  late = [math.floor(n * fractions.Fraction(weight) / total) for weight in mixed.weights]
  late[0] += n - sum(late)
  made = batches(mixed)
  began = time.process_time()
  made.set_state({'drawn': late})
  chosen, *_ = next(made)
  assert time.process_time() - began < 2
  np.testing.assert_array_equal(chosen, mixing.Draw(mixed, 3)(late, 6)[0])
  assert sum(made.get_state()['drawn']) == n + 6
  assert sorted(set(parts_of(mixed, draw(late, 40)[0]))) == [0, 1, 2]


@pytest.mark.parametrize(
  'state, words',
  [
    ({'next_index': 4}, 'expected'),
    ({'drawn': [3]}, 'expected a count of rows for each of 2 parts'),
    ({'drawn': [3, -1]}, 'expected a count'),
    ({'drawn': [3, '1']}, 'expected a count'),
    ({'drawn': 3}, 'expected a count'),
    ({'drawn': [1, 3]}, 'not in proportion'),
    ([], 'expected'),
  ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, words):
  mixed = mixture((3.0, 1.0))
  made = batches(mixed)
  next(made)
  with pytest.raises(ValueError, match=words):
    made.set_state(state)
  np.testing.assert_array_equal(next(made)[0], list(itertools.islice(batches(mixed), 2))[1][0])


@pytest.mark.parametrize('weight', [0.0, -1.0, float('nan'), float('inf')])
def test_weights_that_draw_nothing_are_refused(weight):
  with pytest.raises(ValueError, match=r'part1.*expected .* a finite weight above 0'):
    batches(mixture((1.0, weight)))


def test_parts_without_rows_are_refused():
  tokens = [store.in_memory(text(0)), store.in_memory([])]
  with pytest.raises(ValueError, match="part 'part1': 0 rows"):
    batches(mixture((1.0, 1.0), tokens=tokens))


def test_a_batch_may_be_larger_than_the_text():
  tokens = [store.in_memory([('a', b'abc')]), store.in_memory([('b', b'xyz' * 5)])]
  mixed = mixture((1.0, 1.0), tokens=tokens)
  chosen, _, arrays = next(batches(mixed, batch=12))
  assert np.bincount(chosen).tolist() == [6, 3, 3]
  assert arrays['tokens'].shape == (12, T)


def test_an_error_of_the_thread_reaches_the_loop():
  mixed = mixture()
  made = batches(mixed)
  next(made)

  def fail(numbers):
    raise OSError('the file is gone')

  mixed.parts[0].__class__ = type('Gone', (data.Rows,), {'__call__': lambda self, rows: fail(rows)})
  with pytest.raises(OSError, match='the file is gone'):
    for _ in range(mixing.AHEAD + 2):
      next(made)
