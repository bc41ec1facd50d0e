"""A compiled program as XLA prints it: computations, instructions, and how often each is executed.

Of the text only what costs need is read: names, opcodes, shapes, which computation calls which, and the trip counts of
loops. Nothing here knows what a program is for.
"""

import dataclasses
import math
import re
from typing import NamedTuple

BITS = {'pred': 8, 's4': 4, 'u4': 4, 's2': 2, 'u2': 2, 'f4e2m1fn': 4, 'bf16': 16, 'c64': 64, 'c128': 128}
PASSED_ON = ('copy', 'bitcast', 'reshape', 'optimization-barrier', 'copy-start', 'copy-done')


class Shape(NamedTuple):
  """An array of a program, as one device holds it."""

  dtype: str
  dims: tuple
  memory: int  # memory space: 0 is the device's main memory

  @property
  def bytes(self):
    """Without padding."""
    bits = BITS.get(self.dtype) or int((re.match(r'[a-z]+(\d+)', self.dtype) or ['', '0'])[1])
    return math.prod(self.dims) * bits // 8

  def __str__(self):
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: of its result.
    opcode: 'fusion', 'while', 'all-gather-start', ...
    shapes: of its result, one for each array of a tuple, however deep.
    operands: names.
    inside: what stands between its brackets, for constants and parameters.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  shapes: tuple
  operands: tuple
  inside: str
  attributes: str

  @property
  def bytes(self):
    """Of its result."""
    return sum(shape.bytes for shape in self.shapes)

  def attribute(self, pattern):
    """The first group of a regular expression in the attributes, or ''."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ''

  @property
  def called(self):
    """Name of the computation that a fusion, call or async-start runs, or ''."""
    return self.attribute(r'(?:calls|to_apply)=%?([\w.\-]+)')

  @property
  def source(self):
    """The operation of the traced program that it was made for."""
    return self.attribute(r'op_name="([^"]*)"')


class Computation(NamedTuple):
  """Instructions by name, in the order of the text; the last one in `root` is the result."""

  instructions: dict
  root: str


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program: computations by name, and the name of the one that runs first."""

  computations: dict
  entry: str


class Executed(NamedTuple):
  """An instruction of a computation that is executed as such (not of a fusion).

  Attributes:
    instruction: it.
    computation: that it stands in.
    times: how often a device executes it in a run of the program.
    open_loops: loops around it whose count depends on data; each is counted as one round in `times`.
  """

  instruction: Instruction
  computation: Computation
  times: int
  open_loops: int


def parse(text):
  """The Module of a program's text, such as `compiled.as_text()` or a dump of XLA.

  Raises:
    ValueError: there is no entry computation in it.
  """
  computations: dict = {}
  current: dict = {}
  entry = name = root = ''
  for line in text.splitlines():
    if line.startswith('}'):
      computations[name] = Computation(current, root)
    elif line.endswith('{') and not line.startswith((' ', 'HloModule')):
      head = re.match(r'(ENTRY )?%?([\w.\-]+)', line)
      if head:
        name, current, root = head[2], {}, ''
        entry = name if head[1] else entry
    elif line.startswith('  ') and ' = ' in line:
      instruction = _instruction(line)
      current[instruction.name] = instruction
      root = instruction.name if line.lstrip().startswith('ROOT ') else root
  if entry not in computations:
    raise ValueError(f'expected the text of an XLA program with an ENTRY computation, got {text[:80]!r}')
  return Module(computations, entry)


def _instruction(line):
  """The Instruction of a line '  ROOT %name = shape opcode(operands), attributes'."""
  name, rest = re.sub(r'/\*.*?\*/', '', line).split(' = ', 1)
  rest = rest.lstrip()
  end = _closing(rest) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode = rest[: rest.index('(')]
  rest = rest[len(opcode) :]
  end = _closing(rest)
  inside = rest[1:end]
  return Instruction(
    name.replace('ROOT ', '').strip().lstrip('%'), opcode, shapes_of(shape),
    tuple(re.findall(r'%([\w.\-]+)', inside)), inside, rest[end + 1 :],
  )  # fmt: skip


def _closing(text):
  """Index of the bracket that closes the one that `text` begins with."""
  depth = 0
  for match in re.finditer(r'[()]', text):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  raise ValueError(f'no closing bracket in {text[:80]!r}')


def shapes_of(text):
  """The Shapes in 'bf16[4,2]{1,0:T(8,128)S(1)}' or in a tuple of such."""
  found = re.findall(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?', text)
  space = lambda layout: int((re.search(r'S\((\d+)\)', layout) or ['', '0'])[1])
  return tuple(
    Shape(dtype, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n), space(layout))
    for dtype, dims, layout in found
    if dtype != 'token'
  )


def executed(module):
  """Every instruction that a device executes, as a list of Executed; the insides of fusions are left out.

  Bodies of loops count with their trip counts; of the branches of a conditional each counts as if it were taken.
  """
  found = []

  def walk(name, times, open_loops, outer):
    computation = module.computations[name]
    for instruction in computation.instructions.values():
      found.append(Executed(instruction, computation, times, open_loops))
      if instruction.opcode == 'while':
        frame = (instruction, computation, outer)
        count = trips(module, frame)
        inner = (times, open_loops + 1) if count is None else (times * count, open_loops)
        walk(instruction.attribute(r'body=%?([\w.\-]+)'), *inner, frame)
      elif instruction.opcode == 'conditional':
        branches = instruction.attribute(r'branch_computations=\{([^}]*)\}') or ','.join(
          re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', instruction.attributes)
        )
        for branch in re.findall(r'[\w.\-]+', branches):
          walk(branch, times, open_loops, None)
      elif instruction.opcode in ('call', 'async-start') and instruction.called:
        walk(instruction.called, times, open_loops, None)

  walk(module.entry, 1, 0, None)
  return found


def trips(module, frame):
  """How often a loop runs, or None if that depends on data.

  Args:
    module: Module.
    frame: (the `while`, the Computation it stands in, the frame of the loop around it or None).
  """
  loop, _, _ = frame
  if known := loop.attribute(r'known_trip_count[^}]*"n":"(\d+)"'):
    return int(known)
  condition = module.computations[loop.attribute(r'condition=%?([\w.\-]+)')]
  test = condition.instructions[condition.root]
  if test.opcode != 'compare' or test.attribute(r'direction=(\w+)') not in ('LT', 'GT'):
    return None
  low, high = test.operands if test.attribute(r'direction=(\w+)') == 'LT' else reversed(test.operands)
  counter = condition.instructions[low]
  if counter.opcode != 'get-tuple-element':
    return None
  index = int(counter.attribute(r'index=(\d+)'))
  # Inside the condition as inside the body, what is carried unchanged has the value it came with.
  end = _number(module, condition, high, frame)
  start, step = _given(module, frame, index), _step(module, loop, index)
  if end is None or start is None or not step:
    return None
  return max(0, -(-(end - start) // step))


def _number(module, computation, name, frame):
  """The integer that an instruction is known to have, or None. `frame`: of the loop whose body or test it is in."""
  instruction = computation.instructions[name]
  if instruction.opcode == 'constant':
    return int(instruction.inside) if re.fullmatch(r'-?\d+', instruction.inside) else None
  if instruction.opcode in PASSED_ON:
    return _number(module, computation, instruction.operands[0], frame)
  if instruction.opcode == 'get-tuple-element' and frame is not None:
    source = computation.instructions[instruction.operands[0]]
    index = int(instruction.attribute(r'index=(\d+)'))
    if source.opcode == 'parameter' and _is_unchanged(module, frame[0], index):
      return _given(module, frame, index)
  return None


def _given(module, frame, index):
  """The integer that a loop is started with at an index of what it carries, or None."""
  loop, computation, outer = frame
  start = computation.instructions[loop.operands[0]]
  if start.opcode != 'tuple':
    return None
  return _number(module, computation, start.operands[index], outer)


def _result(module, loop, index):
  """(body, the instruction that a round of a loop puts at an index of what it carries), or None for the latter."""
  body = module.computations[loop.attribute(r'body=%?([\w.\-]+)')]
  root = body.instructions[body.root]
  return body, body.instructions[root.operands[index]] if root.opcode == 'tuple' else None


def _is_carried(body, name, index):
  """Whether an instruction of a loop's body is what came in at an index."""
  instruction = body.instructions[name]
  while instruction.opcode in PASSED_ON:
    instruction = body.instructions[instruction.operands[0]]
  return instruction.opcode == 'get-tuple-element' and instruction.attribute(r'index=(\d+)') == str(index)


def _is_unchanged(module, loop, index):
  body, result = _result(module, loop, index)
  return result is not None and _is_carried(body, result.name, index)


def _step(module, loop, index):
  """What a round of a loop adds at an index of what it carries: a positive integer, or None."""
  body, result = _result(module, loop, index)
  if result is None:
    return None
  while result.opcode in PASSED_ON:
    result = body.instructions[result.operands[0]]
  if result.opcode == 'fusion':  # an addition by itself, as some backends wrap it
    inner = module.computations[result.called]
    if inner.instructions[inner.root].opcode != 'add':
      return None
  elif result.opcode != 'add':
    return None
  constants = [x for x in map(body.instructions.get, result.operands) if x is not None and x.opcode == 'constant']
  if len(constants) != 1 or not any(_is_carried(body, name, index) for name in result.operands):
    return None
  value = int(constants[0].inside) if re.fullmatch(r'\d+', constants[0].inside) else 0
  return value or None
