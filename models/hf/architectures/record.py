"""What the reader and writer of checkpoints know of an architecture, and the shapes of its tensors."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from models import state


@dataclasses.dataclass(frozen=True)
class Source:
  """Where one of our parameters lies in the published tensors.

  Attributes:
    tensor: name in the file.
    index: slices, one per axis of that tensor from the first on, of the part that is ours; () is all of it.
    transpose: swap the last two axes after indexing: published [out, in] -> our kernel [in, out].
    packed: '' or 'mxfp4': the file may hold `{tensor}_blocks` [N, out, in / 32, 16] and `{tensor}_scales`
      [N, out, in / 32] in place of the tensor, which is [N, in, out]. `index` is that of the tensor.
  """

  tensor: str
  index: tuple = ()
  transpose: bool = False
  packed: str = ''


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A published form of checkpoints: config.json and tensor names.

  Attributes:
    name: as in `architectures` of config.json.
    model_type: as in config.json.
    read_config: (config.json as a dictionary, length) -> DecoderConfig, dtypes left at float32. length is that of the
      longest text to be used, None the longest that the model knows: models with two sets of rotary frequencies
      take the one for it. ValueError names every entry that cannot be honoured.
    write_config: DecoderConfig -> dictionary, the inverse: what `read_config` makes of it is `normal(config)`.
      ValueError names every field that the architecture cannot express. How a model is run (dtype, param_dtype, scan,
      remat, implementation) is no part of it.
    sources: DecoderConfig -> {path of a parameter of the unscanned model: Source}.
    ignored: (tensor name, DecoderConfig) -> whether the tensor may be in a file and is not read.
    tied: tensor that may repeat the embedding table where embeddings are tied, or ''.
    settings: config.json -> its entries that DecoderConfig does not hold; `architectures.config_json` puts them and
      the config together again.
  """

  name: str
  model_type: str
  read_config: Callable
  write_config: Callable
  sources: Callable
  ignored: Callable
  tied: str
  settings: Callable


def shapes(architecture, config):
  """{tensor: shape} of a checkpoint of this architecture.

  Raises:
    ValueError: parts of a tensor that overlap, or leave something out.
  """
  ours = {path: leaf.shape for path, leaf in state.abstract_params(dataclasses.replace(config, scan=False)).items()}
  parts: dict[str, list[tuple[tuple, tuple]]] = {}
  for path, source in architecture.sources(config).items():
    shape = ours[path]
    if source.transpose:
      shape = (*shape[:-2], shape[-1], shape[-2])
    parts.setdefault(source.tensor, []).append((shape, source.index))
  return {tensor: _whole(tensor, pieces) for tensor, pieces in parts.items()}


def _whole(tensor: str, pieces: list[tuple[tuple, tuple]]) -> tuple:
  """Shape of the tensor that the pieces (shape, index) make up."""
  whole = pieces[0][0]
  for axis in range(len(whole)):
    cuts = [index[axis] if axis < len(index) else slice(None) for _, index in pieces]
    if all(cut == slice(None) for cut in cuts):
      continue
    size = sum(shape[axis] for shape, _ in pieces)
    count = np.zeros(size, int)
    for cut, (shape, _) in zip(cuts, pieces):
      count[cut] += 1
      if len(range(size)[cut]) != shape[axis]:
        raise ValueError(f'{tensor}: {cut} of {size} along axis {axis} has not the {shape[axis]} rows of its parameter')
    if (count != 1).any():
      raise ValueError(f'{tensor}: its parts do not make up {size} along axis {axis}, each once')
    whole = (*whole[:axis], size, *whole[axis + 1 :])
  if len(pieces) > 1 and all(index == () for _, index in pieces):
    raise ValueError(f'{tensor}: named by {len(pieces)} parameters')
  return whole


class Reader:
  """Typed access to the entries of a config.json, which gathers what is wrong with them for one error."""

  def __init__(self, name: str, record: dict[str, Any]):
    self.name, self.record = name, record
    self.problems: list[str] = []

  def get(self, key, default, *kinds):
    """The entry, or `default` where there is none; of one of the types `kinds` (None: may be null), else a problem."""
    return self.typed(key, self.record.get(key, default), default, *kinds)

  def typed(self, key, value, default, *kinds):
    """`value` if it is of one of the types, else `default` and a problem."""
    if fits(value, kinds):
      return value
    names = ' or '.join('null' if kind is None else kind.__name__ for kind in kinds)
    self.problem(f'{key}={value!r} (expected {names})')
    return default

  def problem(self, text: str) -> None:
    """Notes what cannot be honoured."""
    self.problems.append(text)

  def check(self):
    """ValueError if there were problems, with all of them."""
    if self.problems:
      problems = dict.fromkeys(self.problems)  # entries for several kinds of layers are read once for each
      raise ValueError(f'config.json of {self.name} cannot be honoured: ' + '; '.join(problems))


def fits(value, kinds) -> bool:
  """Whether a JSON value is of one of the kinds; whole numbers are floats too, true and false are no numbers."""
  if value is None or isinstance(value, bool):
    return (None if value is None else bool) in kinds
  return any(_is_number(value) if kind is float else isinstance(value, kind) for kind in kinds if kind is not None)


def _is_number(value) -> bool:
  """Whether a JSON value is a number that a float can hold."""
  return isinstance(value, int | float) and abs(value) <= sys.float_info.max
