"""Rows of several texts by weight: which row is drawn when, and batches of them from a background thread.

Nothing here is random but the order within a part: after n rows, part i has given n weight_i / sum(weights) of them,
rounded up or down. So the proportions hold from the first step on, and the place in the data is one count per part.
(Grain's own mix rounds weights to a hundredth of the smallest, and with three parts or more drifts by more than a row.)
"""

import collections
import concurrent.futures
import fractions
import math

import grain
import numpy as np

AHEAD = 4  # batches cut before they are asked for
MOST_ROWS = 2**32  # of a part; Grain shuffles no more
_FEW_ROWS = 2**14  # of a part; Grain shuffles at least so many numbers, and needs milliseconds a row for few


class Mixture:
  """Rows of several texts, numbered one text after the other; a row is of one of them.

  Attributes:
    parts: [train.data.Rows], of one seq_len and stride.
    names: of the parts, for messages.
    weights: how often rows of each part are drawn, relative to the others.
    offsets: int64 [parts + 1], the rows of part i are numbered offsets[i] to offsets[i + 1] - 1.
  """

  def __init__(self, parts, names, weights):
    self.parts, self.names, self.weights = parts, names, weights
    self.offsets = np.cumsum([0, *map(len, parts)])
    self.seq_len, self.stride = parts[0].seq_len, parts[0].stride

  def __len__(self):
    return int(self.offsets[-1])

  @property
  def padding(self):
    """Share of the places for targets that no text fills, over all rows."""
    return sum(part.padding * len(part) for part in self.parts) / max(1, len(self))

  def __call__(self, numbers):
    """As `Rows.__call__`, of row numbers over all parts. Only parts of which there are rows are read."""
    numbers = np.asarray(numbers, np.int64)
    part_of = self._part_of(numbers)
    out: dict[str, np.ndarray] = {}
    for i in np.unique(part_of):
      mine = part_of == i
      for name, array in self.parts[i](numbers[mine] - self.offsets[i]).items():
        out.setdefault(name, np.empty((len(numbers), self.seq_len), array.dtype))[mine] = array
    return out

  def where(self, numbers):
    """As `Rows.where`; with more than one part, a place begins with the part's name."""
    places = []
    for number, i in zip(numbers, self._part_of(np.asarray(numbers, np.int64))):
      place = self.parts[i].place(int(number) - int(self.offsets[i]))
      places.append(f'row {int(number)} ({f"{self.names[i]}: " if len(self.parts) > 1 else ""}{place})')
    return places

  def _part_of(self, numbers):
    """The part of each row; rows beyond the last belong to the last part that has any."""
    last = max(np.flatnonzero(np.diff(self.offsets)), default=0)
    return np.minimum(np.searchsorted(self.offsets, numbers, 'right') - 1, last)


class Draw:
  """The endless order of row numbers of a mixture.

  Row j of part i (from 0) is due after ceil((j + 1) sum(w) / w_i) rows and may not come before row j sum(w) / w_i.
  Of the parts that may give a row, the one whose row is due first does; this keeps all of them in time.

  Source: Tijdeman 1980, The chairman assignment problem (bound of one); Liu and Layland 1973 (earliest deadline first).
  """

  def __init__(self, mixture, seed):
    """Takes the lengths, offsets and weights of a Mixture, and the seed of the order of the first part.

    Raises:
      ValueError: a part without rows or with more than MOST_ROWS, a weight that is not above 0.
    """
    for name, part, weight in zip(mixture.names, mixture.parts, mixture.weights):
      if not (1 <= len(part) <= MOST_ROWS and 0 < weight < math.inf):
        wrong = f'part {name!r}: {len(part)} rows, weight {weight}'
        raise ValueError(f'{wrong}; expected 1 to {MOST_ROWS} rows and a finite weight above 0')
    exact = [fractions.Fraction(weight) for weight in mixture.weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    self.weights = [int(weight * scale) for weight in exact]
    self.total = sum(self.weights)
    self.offsets = mixture.offsets.tolist()
    self.orders = [order(len(part), seed, i) for i, part in enumerate(mixture.parts)]

  def __call__(self, drawn, count):
    """The next row numbers.

    Args:
      drawn: [parts] rows of each part before these.
      count: B.

    Returns:
      (int64 [B] row numbers, [parts] rows of each part after them).
    """
    drawn, numbers = list(drawn), []
    done = sum(drawn)
    for n in range(done + 1, done + count + 1):
      _, i = min(
        (-(-(given + 1) * self.total // weight), i)
        for i, (given, weight) in enumerate(zip(drawn, self.weights))
        if given * self.total < n * weight
      )
      numbers.append(self.offsets[i] + self.orders[i][drawn[i]])
      drawn[i] += 1
    return np.array(numbers, np.int64), drawn

  def check(self, drawn):
    """ValueError unless these rows of each part are what the weights give."""
    is_counts = isinstance(drawn, list) and all(type(given) is int and given >= 0 for given in drawn)
    if not is_counts or len(drawn) != len(self.weights):
      raise ValueError(f'drawn={drawn!r}: expected a count of rows for each of {len(self.weights)} parts')
    n = sum(drawn)
    if any(abs(given * self.total - n * weight) >= self.total for given, weight in zip(drawn, self.weights)):
      raise ValueError(f'drawn={drawn}: the rows of each part are not in proportion to the weights of the mixture')


class Batches:
  """An endless iterator over (row numbers [B], local row indices, arrays of the local rows).

  One thread draws and cuts AHEAD batches before they are asked for. The state is that after the last batch asked for:
  {'drawn': [rows of each part]}, the same in every process.
  """

  def __init__(self, mixture, batch, local, seed):
    self.mixture, self.batch, self.local = mixture, batch, local
    self.draw = Draw(mixture, seed)
    self._drawn = self._cut = [0] * len(mixture.parts)  # of batches given, of batches cut
    self._ahead: collections.deque = collections.deque()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='batches')

  def __iter__(self):
    return self

  def __next__(self):
    while len(self._ahead) <= AHEAD:
      self._ahead.append(self._thread.submit(self._next))
    *made, self._drawn = self._ahead.popleft().result()
    return tuple(made)

  def _next(self):
    chosen, self._cut = self.draw(self._cut, self.batch)
    return chosen, self.local, self.mixture(chosen[self.local]), self._cut

  def get_state(self):
    """What a checkpoint keeps: a dictionary of lists of integers."""
    return {'drawn': list(self._drawn)}

  def set_state(self, state):
    """Goes on after the batches of a state; ValueError if it is of other parts or weights."""
    if not isinstance(state, dict) or set(state) != {'drawn'}:
      raise ValueError(f"state {state!r}: expected {{'drawn': rows of each part}}")
    self.draw.check(state['drawn'])
    concurrent.futures.wait(self._ahead)
    self._ahead.clear()
    self._drawn = self._cut = list(state['drawn'])


def order(rows, seed, part=0):
  """The rows of a part in an endless order, shuffled anew in each pass: order[j] for any j, without those before it.

  Args:
    rows: how many there are.
    seed: of the run.
    part: its number; each has a seed of its own.
  """
  if rows <= _FEW_ROWS:
    return _FewRows(rows, [seed, part])
  own = seed if part == 0 else int(np.random.SeedSequence([seed, part]).generate_state(1)[0])
  return grain.MapDataset.range(rows).shuffle(seed=own).repeat()


class _FewRows:
  """The order of few rows: each pass is kept as a list while it lasts."""

  def __init__(self, rows, seeds):
    self.rows, self.seeds = rows, seeds
    self.number, self.numbers = -1, np.empty(0, np.int64)

  def __getitem__(self, j):
    number, within = divmod(j, self.rows)
    if number != self.number:
      # The raw words of a bit generator are the same in all versions of NumPy, those of its other methods are not.
      keys = np.random.PCG64([*self.seeds, number]).random_raw(self.rows)
      self.number, self.numbers = number, np.argsort(keys, kind='stable')
    return int(self.numbers[within])
