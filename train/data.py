"""Rows of tokens from a corpus, in an order that a seed fixes and that a checkpoint can take up again.

A text is one stream of tokens: the separator, the bytes of a file, the separator, the bytes of the next. Row r holds
seq_len tokens of it and, as targets, the tokens that follow each of them, so a token is a target exactly once.
"""

import bisect

import grain
import jax
import numpy as np

from attn.distributed import zigzag
from models import decoder
from train.config import SEPARATOR


class Rows:
  """A text cut into rows.

  With `stride` below seq_len, rows overlap: a row scores its last `stride` targets only, each with at least
  seq_len - stride tokens before it (fewer at the beginning of the text).

  Attributes:
    stream: uint16 [N], separators and bytes.
    seq_len: T, tokens a row.
    stride: new tokens a row.
    names: file names, in stream order.
    starts: index in the stream of each file's separator.
    is_separator_target: whether the end of a file is a target. False gives each byte as a target once, nothing else.
  """

  def __init__(self, files, seq_len, *, stride=0, is_separator_target=True):
    parts = [np.frombuffer(bytes([0]) + file.text, np.uint8).astype(np.uint16) for file in files]
    for part in parts:
      part[0] = SEPARATOR
    self.stream = np.concatenate(parts)
    self.names = [file.name for file in files]
    self.starts = np.cumsum([0] + [len(part) for part in parts[:-1]]).tolist()
    self.seq_len = seq_len
    self.stride = stride or seq_len
    self.is_separator_target = is_separator_target

  def __len__(self):
    return -(-(len(self.stream) - 1) // self.stride)

  def __call__(self, rows):
    """Arrays of some rows; those beyond the last are empty: all weights are 0.

    Args:
      rows: [B] row numbers.

    Returns:
      Dictionary of int32 [B, T]: `tokens`; `targets`; `segment_ids` (the files of a row, counted; a model that needs
      positions counts them within each); and float32 `weights`, 1 where the target counts.
    """
    T = self.seq_len
    index = np.asarray(rows)[:, None] * self.stride + np.arange(T + 1) - (T - self.stride)
    is_text = (index >= 0) & (index < len(self.stream))
    # Outside of the text stand separators, each a document of its own, so that nothing real looks at them.
    stream = np.where(is_text, self.stream[index.clip(0, len(self.stream) - 1)], SEPARATOR).astype(np.int32)
    tokens, targets = stream[:, :-1], stream[:, 1:]
    counts = is_text[:, 1:] & is_text[:, :-1] & (np.arange(T) >= T - self.stride)
    if not self.is_separator_target:
      counts &= targets != SEPARATOR
    return {
      'tokens': tokens,
      'targets': targets,
      'segment_ids': np.cumsum(tokens == SEPARATOR, axis=1, dtype=np.int32),
      'weights': counts.astype(np.float32),
    }

  def where(self, rows):
    """What some rows were cut from, for messages: ['row 5 (email/parser.py byte 1023)', ...]."""
    places = []
    for row in rows:
      at = int(row) * self.stride
      i = bisect.bisect_right(self.starts, at) - 1
      places.append(f'row {int(row)} ({self.names[i]} byte {max(0, at - self.starts[i] - 1)})')
    return places


def batches(rows, batch, sharding, seed):
  """An endless iterator over shuffled batches, shuffled anew in each pass over the text.

  Every process draws the same row numbers and cuts only the rows that its own devices hold, so the place in the data
  does not depend on the number of processes or devices.

  Args:
    rows: Rows.
    batch: B, rows a step over all devices.
    sharding: of [B, T] arrays.
    seed: of the order.

  Returns:
    A Grain iterator with get_state and set_state, of (row numbers [B], local row indices, arrays of the local rows).
  """
  local = local_rows(sharding, (batch, rows.seq_len))
  numbers = grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat().batch(batch)
  cut = numbers.map(lambda chosen: (chosen, local, rows(np.asarray(chosen)[local])))
  return iter(cut.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


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
