"""Rows of tokens from a corpus, in an order that a seed fixes and that a checkpoint can take up again.

A text is one stream of tokens: the separator, the tokens of a document, the separator, those of the next. It may be a
map of a file: only what rows ask for is read. A row holds seq_len tokens and, as targets, the tokens that follow each.
"""

import bisect

import jax
import numpy as np

from attn.distributed import zigzag
from models import decoder
from train.checks import PACKINGS
from train.config import UserError
from train.data import mixing, packing

_NAMED = 3  # pieces of a row that messages name


class Rows:
  """A text cut into rows.

  'stream' cuts it as it stands: row r holds tokens r T to r T + T - 1, and each token but the first separator is a
  target once. With `stride` below seq_len, rows overlap: a row scores its last `stride` targets only, each with at
  least seq_len - stride tokens before it (fewer at the beginning of the text).

  'documents' and 'single' cut between documents (train/data/packing.py): each token, and the separator after each
  document, is a target once, and what follows the last piece of a row is padding.

  Attributes:
    stream: uint16 or uint32 [N], separators and tokens.
    starts: int64 [documents], index in the stream of each document's separator.
    seq_len: T, tokens a row.
    stride: new tokens a row.
    plan: packing.Plan, or None for 'stream'.
  """

  def __init__(self, tokens, seq_len, *, separator, packing='stream', stride=0, is_separator_target=True, unit='byte'):
    """Plans the rows.

    Args:
      tokens: train.data.store.Tokens.
      seq_len: T.
      separator: id of the token before each document, which padding is made of too.
      packing: 'stream', 'documents' (whole documents, best fit), 'single' (one a row).
      stride: new tokens a row, for 'stream'; 0 means seq_len.
      is_separator_target: whether the end of a document is a target. False gives each token of a document as a target
        once, nothing else.
      unit: what `where` calls a place in a document.

    Raises:
      ValueError: an argument out of its range.
    """
    if packing not in PACKINGS:
      raise ValueError(f'packing={packing!r}: expected one of {PACKINGS}')
    if seq_len < 1 or not 0 <= stride <= seq_len:
      raise ValueError(f'seq_len={seq_len}, stride={stride}: expected 1 <= seq_len and 0 <= stride <= seq_len')
    if stride and packing != 'stream':
      raise ValueError(f"packing={packing!r}: expected stride=0, got {stride}; rows overlap with packing='stream' only")
    self.tokens = tokens
    self.stream, self.starts, self.byte_counts = map(np.asarray, (tokens.stream, tokens.starts, tokens.byte_counts))
    self.seq_len = seq_len
    self.stride = stride or seq_len
    self.separator = separator
    self.is_separator_target = is_separator_target
    self.unit = unit
    self.plan = None if packing == 'stream' else _PLANS[packing](self.starts, len(self.stream), seq_len)

  def __len__(self):
    if self.plan is None:
      return -(-max(0, len(self.stream) - 1) // self.stride)
    return self.plan.rows

  @property
  def padding(self):
    """Share of the places for targets that no text fills."""
    filled = max(0, len(self.stream) - 1) if self.plan is None else len(self.stream)
    return 1 - filled / (len(self) * self.stride) if len(self) else 0.0

  def __call__(self, rows):
    """Arrays of some rows; those beyond the last are empty: all weights are 0.

    Args:
      rows: [B] row numbers.

    Returns:
      Dictionary of int32 [B, T]: `tokens`; `targets`; `segment_ids` (the documents of a row, counted; a model that
      needs positions counts them within each; a separator that stands for no text is one of its own); and float32
      [B, T]: `weights`, 1 where the target counts; `bytes`, the bytes of text that a target stands for: those of its
      document over the document's tokens, 0 for separators and where the weight is 0.
    """
    rows = np.asarray(rows, np.int64)
    return self._from_stream(rows) if self.plan is None else self._from_pieces(*self.plan.pieces(rows))

  def _from_stream(self, rows):
    T, N = self.seq_len, len(self.stream)
    begin = rows * self.stride - (T - self.stride)
    window = np.full((len(rows), T + 1), self.separator, np.int32)
    for i, at in enumerate(begin.tolist()):
      part = self.stream[max(at, 0) : max(at + T + 1, 0)]
      window[i, max(-at, 0) : max(-at, 0) + len(part)] = part
    # The documents of each row, from the one its first token is of (-1 before the text).
    first = np.searchsorted(self.starts, begin, 'right') - 1
    counts = np.searchsorted(self.starts, begin + T + 1, 'left') - first
    documents = packing.ranges(counts) + np.repeat(first, counts)
    row = np.repeat(np.arange(len(rows)), counts)
    place = self.starts[documents] - begin[row] if len(self.starts) else documents
    is_start = np.zeros((len(rows), T + 1), bool)
    inside = (documents >= 0) & (place >= 0)
    is_start[row[inside], place[inside]] = True

    index = begin[:, None] + np.arange(T + 1)
    is_text = (index >= 0) & (index < N)
    counts_here = is_text[:, 1:] & is_text[:, :-1] & (np.arange(T) >= T - self.stride)
    if not self.is_separator_target:
      counts_here &= ~is_start[:, 1:]
    weights = counts_here.astype(np.float32)
    document = np.cumsum(is_start[:, 1:], axis=1) + (np.cumsum(counts) - counts)[:, None]
    return {
      'tokens': window[:, :-1],
      'targets': window[:, 1:],
      # Outside of the text stand separators, each a document of its own, so that nothing real looks at them.
      'segment_ids': np.cumsum(is_start[:, :-1] | ~is_text[:, :-1], axis=1, dtype=np.int32),
      'weights': weights,
      'bytes': self._bytes_per_token(documents)[document] * weights * ~is_start[:, 1:],
    }

  def _from_pieces(self, begin, length, counts):
    T, N, B = self.seq_len, len(self.stream), len(counts)
    # Runs of places: the pieces of a row, then its padding, which begins nowhere.
    is_padding = np.zeros(len(begin) + B, bool)
    is_padding[np.cumsum(counts + 1) - 1] = True
    used = np.bincount(np.repeat(np.arange(B), counts), length, B).astype(np.int64)
    runs = np.empty(len(is_padding), np.int64)
    runs[~is_padding], runs[is_padding] = length, T - used
    number = packing.ranges(counts + 1) + 1
    within = packing.ranges(runs)

    is_text = np.repeat(~is_padding, runs)
    index = np.repeat(begin, length) + within[is_text]
    last = np.cumsum(length) - 1  # of each piece, among the places with text
    tokens = np.full(B * T, self.separator, np.int32)
    tokens[is_text] = self.stream[index]
    text_targets = np.empty(len(index), np.int32)
    text_targets[:-1] = tokens[is_text][1:]
    after = begin + length
    text_targets[last] = np.where(after < N, self.stream[np.minimum(after, N - 1)], self.separator)
    document = np.searchsorted(self.starts, begin, 'right') - 1
    ends = after == self._end(document)  # the piece is the last of its document
    bytes_here = np.repeat(self._bytes_per_token(document), length)
    bytes_here[last[ends]] = 0
    counts_here = np.ones(len(index), np.float32)
    if not self.is_separator_target:
      counts_here[last[ends]] = 0

    def spread(values, rest):
      whole = np.full(B * T, rest, values.dtype)
      whole[is_text] = values
      return whole.reshape(B, T)

    segments = np.repeat(number, runs) + np.where(is_text, 0, within)
    return {
      'tokens': tokens.reshape(B, T),
      'targets': spread(text_targets, self.separator),
      'segment_ids': segments.astype(np.int32).reshape(B, T),
      'weights': spread(counts_here, 0),
      'bytes': spread(bytes_here, 0),
    }

  def _end(self, documents):
    """Index in the stream after each document."""
    following = np.minimum(documents + 1, len(self.starts) - 1)
    return np.where(documents + 1 < len(self.starts), self.starts[following], len(self.stream))

  def _bytes_per_token(self, documents):
    """float32, bytes of text that a token of each document stands for; 0 for document -1."""
    if not len(self.starts):
      return np.zeros(len(documents), np.float32)
    size = self._end(documents) - self.starts[documents] - 1
    return np.where(documents < 0, 0, self.byte_counts[documents] / np.maximum(size, 1)).astype(np.float32)

  def where(self, rows):
    """What some rows were cut from, for messages: ['row 5 (email/parser.py byte 1023)', ...]."""
    return [f'row {int(row)} ({self.place(int(row))})' for row in rows]

  def place(self, row):
    """Where the pieces of a row begin: 'email/parser.py byte 1023', and the next few of a row that has more."""
    begin = [row * self.stride] if self.plan is None else self.plan.pieces(np.array([row]))[0].tolist()
    names = []
    for at in begin[:_NAMED]:
      i = bisect.bisect_right(self.starts, at) - 1
      names.append(f'{self.tokens.name(i)} {self.unit} {max(0, at - int(self.starts[i]) - 1)}')
    more = [f'and {len(begin) - _NAMED} more'] if len(begin) > _NAMED else []
    return ', '.join(names + more) or 'empty'


_PLANS = {'documents': packing.documents, 'single': packing.single}


def training_rows(corpus, config):
  """Rows of the training side of all parts of a corpus, packed as a DataConfig says.

  Args:
    corpus: train.data.store.Corpus.
    config: DataConfig.

  Returns:
    mixing.Mixture.

  Raises:
    UserError: a part has no row, or more than can be shuffled.
  """
  made = _rows(corpus, [part.train for part in corpus.parts], config, packing=config.packing)
  for i, (part, rows) in enumerate(zip(corpus.parts, made.parts)):
    if not 1 <= len(rows) <= mixing.MOST_ROWS:
      field = f'data.mixture[{i}]' if config.mixture else 'data.source'
      raise UserError(f'{field} ({part.name}): expected 1 to {mixing.MOST_ROWS:,} training rows, got {len(rows):,}')
  return made


def held_out_rows(corpus, config, stride=0):
  """Rows of the held-out text of all parts, one after the other, in which each token of a document is a target once.

  Args:
    corpus: train.data.store.Corpus.
    config: DataConfig.
    stride: new tokens a row, as for `Rows`.

  Returns:
    mixing.Mixture, cut as 'stream' whatever the training text is.

  Raises:
    UserError: no part has held-out text.
  """
  held_out = [part.held_out for part in corpus.parts]
  made = _rows(corpus, held_out, config, stride=stride, is_separator_target=False)
  if not len(made):
    raise UserError(f'data.held_out={config.held_out!r}: expected held-out text in some part, found none')
  return made


def _rows(corpus, side, config, **options):
  """The Mixture of one side, [Tokens] of all parts."""
  unit = 'byte' if config.tokenizer == 'bytes' else 'token'
  parts = [Rows(tokens, config.seq_len, separator=corpus.separator, unit=unit, **options) for tokens in side]
  return mixing.Mixture(parts, [part.name for part in corpus.parts], [part.weight for part in corpus.parts])


def batches(rows, batch, sharding, seed):
  """An endless iterator over batches of rows drawn by weight, each part shuffled anew in each pass over it.

  Every process draws the same row numbers and cuts only the rows that its own devices hold, so the place in the data
  does not depend on the number of processes or devices.

  Args:
    rows: Rows, or mixing.Mixture of some.
    batch: B, rows a step over all devices.
    sharding: of [B, T] arrays.
    seed: of the order.

  Returns:
    mixing.Batches, of (row numbers [B], local row indices, arrays of the local rows).
  """
  mixture = mixing.Mixture([rows], ['text'], [1.0]) if isinstance(rows, Rows) else rows
  return mixing.Batches(mixture, batch, local_rows(sharding, (batch, rows.seq_len)), seed)


def in_order(rows, chosen, batch, sharding):
  """Batches of the row numbers `chosen`, once, in order, as `batches` gives them; the last is filled up."""
  local = local_rows(sharding, (batch, rows.seq_len))
  beyond = len(rows)
  for start in range(0, len(chosen), batch):
    numbers = np.full(batch, beyond)
    part = chosen[start : start + batch]
    numbers[: len(part)] = part
    yield numbers, local, rows(numbers[local])


def local_rows(sharding, shape):
  """Sorted indices of the rows of a [B, T] array that devices of this process hold."""
  held = np.zeros(shape[0], bool)
  for index in sharding.addressable_devices_indices_map(shape).values():
    held[index[0]] = True
  return np.flatnonzero(held)


def to_global(local, arrays, batch, sharding):
  """Global [B, T] arrays from the rows `local` that this process has cut.

  Where the mesh cuts rows along their length, tokens stand in the order of attn.distributed.zigzag, and `positions`
  tell their places in the text.
  """
  parts = sharding.mesh.shape.get('context', 1)
  if parts > 1:
    arrays = {**arrays, 'positions': decoder.restart(arrays['segment_ids'])}
    arrays = {name: zigzag.permute(array, parts) for name, array in arrays.items()}

  def put(array):
    def part(index):
      first = np.searchsorted(local, index[0].start or 0)
      size = len(range(batch)[index[0]])
      return array[first : first + size, index[1]]

    return jax.make_array_from_callback((batch, array.shape[1]), sharding, part)

  return {name: put(array) for name, array in arrays.items()}
