"""What devices send each other in a compiled program: which collectives, how often, how much, over which mesh axes."""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from train.compile_report import hlo

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all')


class Collective(NamedTuple):
  """A collective of a program, or several that are alike.

  Attributes:
    kind: a name of KINDS.
    shape: of the largest array in it, on one device: the result of a gather, what goes into a reduction.
    bytes: of all its arrays: as `shape`.
    axes: names of the mesh axes among whose devices it takes place; () if the text does not tell.
    group: devices that take part together.
    times: how often a device does it in a run of the program.
    open_loops: loops around it whose count depends on data; each is counted as one round in `times`.
    sources: operations of the traced program that it was made for.
  """

  kind: str
  shape: str
  bytes: int
  axes: tuple
  group: int
  times: int
  open_loops: int
  sources: tuple

  @property
  def sent(self):
    """Bytes that a device sends each time, in a ring of n: bytes for a permutation, twice bytes (n - 1) / n for an
    all-reduce, bytes (n - 1) / n for the others.
    """
    if self.kind == 'collective-permute':
      return self.bytes
    return self.bytes * (self.group - 1) / self.group * (2 if self.kind == 'all-reduce' else 1)

  @property
  def total(self):
    """Bytes that a device sends for it in a run of the program."""
    return self.sent * self.times


def read(module, mesh):
  """The collectives of a program, those that are alike as one, the heaviest first.

  A collective that the compiler lets run beside other work appears several times in a program: it is counted where it
  starts. An all-reduce of which each device keeps a part alone is a reduce-scatter.

  Args:
    module: of train.compile_report.hlo.parse.
    mesh: {axis: size}, in the order in which the devices of the program are numbered.

  Returns:
    List of Collective.
  """
  alike: dict = {}
  for one in hlo.executed(module):
    for instruction, scattered in _started(module, one):
      kind = re.sub('-start$', '', instruction.opcode)
      shapes = _arrays(module, one, instruction, kind)
      groups = groups_of(instruction, math.prod(mesh.values()))
      size = max(map(len, groups), default=1)
      axes = axes_of(groups, mesh)
      size = math.prod(mesh[axis] for axis in axes) if kind == 'collective-permute' and axes else size
      if size == 1:
        continue
      kind = 'reduce-scatter' if scattered else kind
      key = kind, tuple(map(str, shapes)), axes, size, one.open_loops
      times, sources = alike.get(key, (0, ()))
      source = instruction.source or one.instruction.source
      alike[key] = times + one.times, sources if source in sources else (*sources, source)
  found = []
  for (kind, shapes, axes, size, open_loops), (times, sources) in alike.items():
    arrays = [hlo.shapes_of(shape)[0] for shape in shapes]
    largest = max(arrays, key=lambda shape: shape.bytes)
    total = sum(shape.bytes for shape in arrays)
    found.append(Collective(kind, str(largest), total, axes, size, times, open_loops, sources))
  return sorted(found, key=lambda one: -one.total)


def _started(module, one):
  """[(collective, whether its result is scattered)] that an executed instruction starts."""
  instruction = one.instruction
  if re.sub('-start$', '', instruction.opcode) in KINDS:
    return [(instruction, False)]
  if instruction.opcode != 'fusion':
    return []
  inner = module.computations[instruction.called]
  # While a collective is under way, fusions carry it along, and the one that ends it names it once more.
  if instruction.called.startswith('async_collective_fusion') or 'async-collective-done' in instruction.name:
    return []
  is_scattered = instruction.called.startswith('all-reduce-scatter')
  return [(x, is_scattered) for x in inner.instructions.values() if re.sub('-start$', '', x.opcode) in KINDS]


def _arrays(module, one, instruction, kind):
  """Shapes of the arrays of a collective: its operands where it makes them smaller, else its results."""
  # What keeps track of an asynchronous one is a u32[], as the number that is sent may be.
  results = [shape for shape in instruction.shapes if shape.dtype != 'u32' or shape.dims] or instruction.shapes[:1]
  if instruction.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute', 'all-to-all'):
    return results[len(results) // 2 :]  # operands, then results
  if kind == 'reduce-scatter':
    within = one.computation.instructions
    if instruction.name not in within:
      within = module.computations[one.instruction.called].instructions
    return [shape for name in instruction.operands if name in within for shape in within[name].shapes]
  return results


def groups_of(instruction, devices):
  """Lists of device numbers that take part together in a collective; [] if the text does not tell.

  XLA writes them out, {{0,1},{2,3}}; as a reshaped and transposed range, [2,2]<=[2,2]T(1,0); or by axes of a mesh of
  its own, mesh['a'=2,'b'=2] {'b'}. {} are all devices. Of a collective-permute: pairs.
  """
  text = instruction.attributes
  if found := re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', text):
    return [list(map(int, pair)) for pair in re.findall(r'\{(\d+),(\d+)\}', found[1])]
  if found := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    shape, source, order = (tuple(map(int, part.split(','))) if part else () for part in found.groups())
    ids = np.arange(math.prod(source)).reshape(source)
    return (ids.transpose(order) if order else ids).reshape(shape).tolist()
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', text):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    names = re.findall(r"'([^']+)'", found[2])
    if ':(' in found[2]:  # a part of an axis
      return []
    axes = [*(i for i, name in enumerate(sizes) if name not in names), *(list(sizes).index(name) for name in names)]
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values())).transpose(axes)
    return ids.reshape(-1, math.prod(sizes[name] for name in names)).tolist()
  if found := re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', text):
    groups = [list(map(int, group.split(','))) for group in re.findall(r'\{([\d,]+)\}', found[1])]
    return groups or [list(range(devices))]
  return []


def axes_of(groups, mesh):
  """The mesh axes along which the devices of a group differ.

  Args:
    groups: lists of device numbers.
    mesh: {axis: size}, in the order in which devices are numbered.
  """
  sizes = tuple(mesh.values())
  varying = set()
  for first, *others in groups:
    for other in others:
      places = zip(np.unravel_index(first, sizes), np.unravel_index(other, sizes))
      varying |= {axis for axis, (a, b) in zip(mesh, places) if a != b}
  return tuple(axis for axis in mesh if axis in varying)


def by_axes(found):
  """{mesh axes: bytes that a device sends over them}, the largest first."""
  key = lambda one: one.axes
  sums = {axes: sum(x.total for x in some) for axes, some in itertools.groupby(sorted(found, key=key), key)}
  return dict(sorted(sums.items(), key=lambda item: -item[1]))
