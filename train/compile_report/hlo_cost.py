"""What a compiled program computes and moves on one device: counted from its text, loops with their trip counts.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs; so of a model with scanned layers it
sees one layer.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from train.compile_report import hlo

# What moves nothing in main memory by itself.
FREE = (
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
  'partition-id', 'replica-id', 'opt-barrier', 'optimization-barrier', 'async-start', 'async-update',
)  # fmt: skip
SLICES = ('dynamic-slice', 'slice', 'gather')
FORMS = ('bitcast', 'copy', 'convert', 'reshape')  # of which a fusion makes as much as is asked for
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
KERNELS = ('tpu_custom_call', 'mosaic_gpu', '__gpu$xla.gpu.triton')


class Cost(NamedTuple):
  """Costs of a run of a program on one device.

  Attributes:
    flops: of matrix products; a multiplication and an addition are two.
    bytes: read and written in main memory. Of what a program slices out of an array the slice counts.
    open_flops: of matrix products in loops whose count depends on data, each such loop as one round; in neither of the
      above.
    open_bytes: the same for bytes.
    kernels: executions of hand-written kernels, whose insides are not known.
  """

  flops: int
  bytes: int
  open_flops: int
  open_bytes: int
  kernels: int


def count(module):
  """The Cost of a Module of train.compile_report.hlo.parse."""
  flops, moved, kernels = [0, 0], [0, 0], 0
  inside = {}  # name of a fused computation -> its FLOPs
  for one in hlo.executed(module):
    instruction, is_open = one.instruction, int(one.open_loops > 0)
    if instruction.opcode == 'fusion':
      if instruction.called not in inside:
        inside[instruction.called] = _flops_inside(module, instruction.called)
      flops[is_open] += one.times * inside[instruction.called]
    else:
      flops[is_open] += one.times * _flops(instruction, one.computation)
    moved[is_open] += one.times * _bytes(module, instruction, one.computation)
    kernels += one.times * (instruction.opcode == 'custom-call' and any(x in instruction.attributes for x in KERNELS))
  return Cost(flops[0], moved[0], flops[1], moved[1], kernels)


def _flops_inside(module, name):
  computation = module.computations[name]
  return sum(
    _flops_inside(module, x.called) if x.opcode == 'fusion' else _flops(x, computation)
    for x in computation.instructions.values()
  )


def _flops(instruction, computation):
  """Of a matrix product: 2 (elements of the result) (elements summed for each); else 0."""
  if instruction.opcode == 'dot':
    left = computation.instructions[instruction.operands[0]].shapes[0].dims
    summed = instruction.attribute(r'lhs_contracting_dims=\{([\d,]*)\}')
    length = math.prod(left[int(axis)] for axis in summed.split(',') if axis)
    return 2 * math.prod(instruction.shapes[0].dims) * length
  if instruction.opcode == 'convolution':
    return _convolution_flops(instruction, computation)
  return 0


def _convolution_flops(instruction, computation):
  """Of a convolution, which is how TPUs are told of matrix products: positions outside the input count nothing."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  if not labels:
    return 0
  left, right = (computation.instructions[name].shapes[0].dims for name in instruction.operands[:2])
  sizes = [dict(zip(label, dims)) for label, dims in zip(labels.groups(), (left, right, instruction.shapes[0].dims))]
  window = dict(part.split('=') for part in instruction.attribute(r'window=\{([^}]*)\}').split())
  setting = lambda name, i, default: window[name].split('x')[i] if name in window else default
  total = 2 * sizes[2]['b'] * sizes[2]['f'] * sizes[1]['i']
  for i, label in enumerate(sorted(x for x in labels[3] if x.isdigit())):
    number = lambda name, i=i: int(setting(name, i, 1))
    begin, spread = int(setting('pad', i, '0_0').split('_')[0]), number('lhs_dilate')
    out = np.arange(sizes[2][label])[:, None] * number('stride') - begin
    places = out + np.arange(number('size')) * number('rhs_dilate')
    total *= int(((places >= 0) & (places <= (sizes[0][label] - 1) * spread) & (places % spread == 0)).sum())
  return total


def _bytes(module, instruction, computation):
  """Bytes of main memory that an instruction reads and writes."""
  opcode = instruction.opcode
  if opcode in FREE or opcode.endswith('-done'):
    return 0
  operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
  if opcode == 'fusion':
    return _fusion_bytes(module, instruction, operands)
  if opcode in SLICES:
    return 2 * _main(instruction)
  if opcode == 'dynamic-update-slice':
    return 2 * _main(operands[1])
  if opcode == 'copy-start':  # (to, from, mark)
    return sum(shape.bytes for shape in instruction.shapes[:2] if shape.memory == 0)
  if opcode.endswith('-start'):
    return sum(shape.bytes for shape in instruction.shapes if shape.memory == 0)
  return _main(instruction) + sum(map(_main, operands))


def _main(instruction):
  """Bytes of a result that lies in main memory."""
  return sum(shape.bytes for shape in instruction.shapes if shape.memory == 0)


def _fusion_bytes(module, instruction, operands):
  """Of a fusion: what it reads of its operands, and what it writes. Collectives that it carries along cost nothing."""
  fused, total = module.computations[instruction.called], 0
  for parameter in fused.instructions.values():
    if parameter.opcode != 'parameter' or int(parameter.inside) >= len(operands):
      continue
    whole = _main(operands[int(parameter.inside)])
    some = _uses(module, fused, parameter.name) if whole else []
    if all(place == 0 and user.opcode in (*SLICES, 'dynamic-update-slice') for user, place in some):
      parts = sum(user.bytes for user, _ in some if user.opcode in SLICES)  # an update leaves the rest as it is
      total += min(whole, parts)
    else:
      total += whole
  return total + _written(fused, instruction)


def _uses(module, computation, name):
  """[(instruction, place among its operands)] that read a value in a fusion, through changes of its form."""
  found: list = []
  for user in computation.instructions.values():
    for place, operand in enumerate(user.operands):
      if operand != name or user.opcode == 'tuple' or user.opcode in COLLECTIVES:
        continue
      if user.opcode in FORMS:
        found += _uses(module, computation, user.name)
      elif user.opcode == 'fusion':
        inner = module.computations[user.called]
        given = next(x.name for x in inner.instructions.values() if x.opcode == 'parameter' and x.inside == str(place))
        found += _uses(module, inner, given)
        if _origin(inner).name == given:
          found += _uses(module, computation, user.name)
      else:
        found.append((user, place))
  return found


def _origin(computation, name=''):
  """The instruction that a result, by itself that of the computation, is another form of."""
  made = computation.instructions[name or computation.root]
  while made.opcode in FORMS:
    made = computation.instructions[made.operands[0]]
  return made


def _written(fused, instruction):
  """Bytes of main memory that a fusion writes: of an array that it updates, the update."""
  root = fused.instructions[fused.root]
  is_tuple = root.opcode == 'tuple' and len(root.operands) == len(instruction.shapes)
  if not is_tuple and len(instruction.shapes) > 1:
    return _main(instruction)
  total = 0
  for shape, name in zip(instruction.shapes, root.operands if is_tuple else (root.name,)):
    made = _origin(fused, name)
    if shape.memory == 0 and made.opcode not in ('parameter', *COLLECTIVES):
      update = fused.instructions[made.operands[1]].bytes if made.opcode == 'dynamic-update-slice' else shape.bytes
      total += min(shape.bytes, update)
  return total
