"""Attention as cascades of small einsums, and how often each must go through the keys.

A cascade is a list of tensors with named ranks, each made from earlier ones. From the graph alone follows the number
of *passes* over a rank: walks along all of it that must end before the next can begin. A maximum over the keys that is
then subtracted from every key ends a pass. The number belongs to the cascade and not to a schedule: with n passes, all
keys are held in fast memory or read n times.

    passes(THREE_PASS, 'm'), passes(TWO_PASS, 'm'), passes(ONE_PASS, 'm')      # 3, 2, 1
    evaluate(ONE_PASS, {'Q': q, 'K': k, 'V': v}, 'AV')                         # the same numbers from each

Ranks: e key width, f value width, p queries, m keys; or m1 tiles of m0 keys each.

Source: arXiv:2406.10491 (FuseMax).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor as an einsum names it: a name and coordinates.

  Attributes:
    name: of the tensor.
    ranks: names of its ranks, in order.
    shift: rank -> 1 where the element after the running one is meant (what a loop has just made), as in RM[m1+1, p].
    last: ranks of which the last element alone is meant, as in RD[m1=end, p].
  """

  name: str
  ranks: tuple[str, ...]
  shift: tuple[str, ...] = ()
  last: tuple[str, ...] = ()

  @property
  def walked(self) -> frozenset[str]:
    """Ranks along which the tensor is gone through."""
    return frozenset(self.ranks) - frozenset(self.last)


@dataclasses.dataclass(frozen=True)
class Einsum:
  """out = reduce f(inputs), over every rank of the inputs that the output lacks.

  Attributes:
    out: what is made.
    inputs: what from.
    f: a function of numbers, one an input.
    reduce: 'sum', 'max', 'kth' (the k-th largest, see `top_k`) or ''.
    first: of a running tensor, its value before the loop.
    exps: exponentials that f takes.
  """

  out: Tensor
  inputs: tuple[Tensor, ...]
  f: Callable
  reduce: str = ''
  first: float | None = None
  exps: int = 0

  @property
  def ranks(self) -> frozenset[str]:
    """All ranks that it goes through."""
    return frozenset().union(self.out.walked, *(x.walked for x in self.inputs))

  @property
  def reduced(self) -> tuple[str, ...]:
    """Ranks that it sums or takes the maximum over."""
    return tuple(sorted(self.ranks - self.out.walked))


Cascade = tuple[Einsum, ...]


def einsum(out: str, *inputs: str, f: Callable, reduce='', first=None, exps=0) -> Einsum:
  """An Einsum from text: 'RM[m1+1,p]' is the element after, 'RD[m1=end,p]' the last.

  Raises:
    ValueError: text that is not of that form; a rank that the output lacks and nothing reduces.
  """
  made = Einsum(_tensor(out), tuple(_tensor(x) for x in inputs), f, reduce, first, exps)
  if bool(made.reduced) != bool(reduce):
    raise ValueError(f'{out}: reduce={reduce!r} with ranks {made.reduced} that the output lacks')
  if set(made.out.ranks) - set().union(*(x.ranks for x in made.inputs)):
    raise ValueError(f'{out} has a rank that no input has: {", ".join(inputs)}')
  return made


def _tensor(text):
  name, bracket, ranks = text.replace(' ', '').removesuffix(']').partition('[')
  parts = [re.fullmatch(r'([a-z]\d*)(\+1|=end|)', x) for x in ranks.split(',')]
  if not name or not bracket or None in parts or not text.endswith(']'):
    raise ValueError(f'tensor={text!r} must look like QK[m,p], with +1 or =end after a rank if need be')
  found = [x.groups() for x in parts if x]
  marked = lambda mark: tuple(r for r, sign in found if sign == mark)
  return Tensor(name, tuple(r for r, _ in found), marked('+1'), marked('=end'))


def flops(cascade: Cascade, sizes: Mapping[str, int]) -> dict[str, int]:
  """Operations of each tensor: the sizes of its ranks times the operations at a point.

  At a point each further input is one operation and a reduction is one more, so that a matrix product has two.

  Args:
    cascade: any.
    sizes: rank -> length.

  Raises:
    ValueError: two tensors of one name.
  """
  _check_names(cascade)
  count = lambda x: len(x.inputs) - 1 + bool(x.reduce)
  return {x.out.name: count(x) * math.prod(sizes[r] for r in x.ranks) for x in cascade}


def exps(cascade: Cascade, sizes: Mapping[str, int]) -> int:
  """Exponentials of a cascade."""
  return sum(x.exps * math.prod(sizes[r] for r in x.ranks) for x in cascade if x.exps)


def passes(cascade: Cascade, rank: str) -> int:
  """The number of passes over a rank, by a search of the graph.

  A rank may be cut, m into m1 and m0: then an einsum goes through all of it only if it has both; one that has m1 alone
  works on results of whole tiles. Walks go from the first element to the last. Of each tensor is known the pass that it
  belongs to, and whether it is there during that pass, element by element, or after its end. A reduction over the rank
  is there after, and so is a tensor that runs from the last element to the first; whatever goes through the rank again
  and needs it belongs to the next pass.

  Raises:
    ValueError: no einsum goes through the rank; it is whole in one einsum and cut in another; two tensors of one name;
      a loop needs the end of itself.
  """
  _check_names(cascade)
  parts = _parts(cascade, rank)
  if not parts or not any(parts <= x.ranks for x in cascade):
    raise ValueError(f'rank={rank!r} is not a rank of the cascade, or no einsum goes through all of it')
  outer = max(parts, key=lambda x: (len(x), x))  # m, or m1 of m1 and m0
  backwards = _backwards(cascade, outer)
  there: dict[str, tuple[int, bool]] = {}  # name -> (pass, is it there only after the end)
  total = 0
  for _ in range(len(cascade) + 1):  # a running tensor is read before it is made: again until nothing changes
    before = dict(there)
    for x in cascade:
      at, is_after = max((there.get(y.name, (0, True)) for y in x.inputs), default=(0, True))
      is_after |= any(outer in y.last and there.get(y.name) == (at, False) for y in x.inputs)
      if parts <= x.ranks:
        at, is_after = at + is_after, False
        total = max(total, at)
      if outer in x.reduced or x.out.name in backwards:
        is_after = True
      there[x.out.name] = at, is_after
    if there == before:
      return total
  raise ValueError('the cascade has a loop that needs its own end')


def _parts(cascade, rank):
  """The ranks that `rank` is cut into, or itself.

  Raises:
    ValueError: it is both whole and cut.
  """
  parts = frozenset(r for x in cascade for r in x.ranks if re.fullmatch(rf'{rank}\d*', r))
  if rank in parts and len(parts) > 1:
    names = ', '.join(sorted(parts))
    raise ValueError(f'rank={rank!r} is whole in some einsums and cut in others ({names}): expected one of the two')
  return parts


def _backwards(cascade, rank):
  """Names of tensors that run from the last element of a rank to the first: the element after makes the one before."""
  made = {x.out.name: x for x in cascade}
  needs = {name: {y.name for y in x.inputs} for name, x in made.items()}
  for _ in made:  # what they need, what that needs, and so on
    needs = {name: found.union(*(needs.get(y, ()) for y in found)) for name, found in needs.items()}
  is_next = lambda y: rank in y.shift and y.name in made and rank not in made[y.name].out.shift
  return {name for name, x in made.items() for y in x.inputs if is_next(y) and name in needs[y.name] | {y.name}}


def _check_names(cascade):
  names = [x.out.name for x in cascade]
  twice = sorted({x for x in names if names.count(x) > 1})
  if twice:
    raise ValueError(f'the cascade makes {", ".join(twice)} twice, expected a name for each tensor')


def minimal_bytes(cascade: Cascade, rank: str, sizes: Mapping[str, int], itemsize: int, fast_bytes: float) -> int:
  """Bytes that must be read of those inputs that have the rank: once if they fit, else once a pass.

  Args:
    cascade: any.
    rank: which.
    sizes: rank -> length.
    itemsize: bytes of a number.
    fast_bytes: room for these inputs.
  """
  _check_names(cascade)
  made = {x.out.name for x in cascade}
  inputs = {y.name: y for x in cascade for y in x.inputs if y.name not in made}
  parts = _parts(cascade, rank)
  size = sum(itemsize * math.prod(sizes[r] for r in y.ranks) for y in inputs.values() if parts & set(y.ranks))
  return size if size <= fast_bytes else passes(cascade, rank) * size


def evaluate(cascade: Cascade, inputs: Mapping[str, Any], name: str, *, k: int | None = None) -> np.ndarray:
  """A tensor of a cascade, element by element: slow, for small sizes, as the definition.

  Args:
    cascade: any.
    inputs: arrays by name, their axes in the order of the ranks.
    name: of the tensor that is asked for.
    k: of 'kth'; None is the last.

  Raises:
    ValueError: no such tensor or two of a name, arrays that do not fit each other, a missing input, or k that is not in
      1..n, for n elements of a 'kth'.
  """
  _check_names(cascade)
  by_name = {x.out.name: x for x in cascade}
  if name not in by_name:
    raise ValueError(f'name={name!r} is not made by the cascade, expected one of {", ".join(by_name)}')
  sizes: dict[str, int] = {}
  arrays = {x: np.asarray(y) for x, y in inputs.items()}
  for tensor in (y for x in cascade for y in x.inputs if y.name not in by_name):
    if tensor.name not in arrays or arrays[tensor.name].ndim != len(tensor.ranks):
      raise ValueError(f'inputs have no {tensor.name} of axes {tensor.ranks}')
    for r, n in zip(tensor.ranks, arrays[tensor.name].shape):
      if sizes.setdefault(r, n) != n:
        raise ValueError(f'{tensor.name} has length {n} along {r}, expected {sizes[r]}')
  known: dict[tuple, float] = {}

  def element(tensor_name, at):
    if tensor_name in arrays:
      return arrays[tensor_name][at]
    x = by_name[tensor_name]
    # A running tensor of n steps has n + 1 elements, of which the first is given.
    if any(at[x.out.ranks.index(r)] == 0 for r in x.out.shift):
      return x.first
    if (tensor_name, at) not in known:
      here = {r: i - (r in x.out.shift) for r, i in zip(x.out.ranks, at)}
      points = itertools.product(*(range(sizes[r]) for r in x.reduced))
      values = [x.f(*(read(y, here | dict(zip(x.reduced, point))) for y in x.inputs)) for point in points]
      known[tensor_name, at] = _reduced(values, x.reduce, k)
    return known[tensor_name, at]

  def read(tensor, here):
    at = tuple(sizes[r] if r in tensor.last else here[r] + (r in tensor.shift) for r in tensor.ranks)
    return element(tensor.name, at)

  out = by_name[name].out
  shape = [sizes[r] + (r in out.shift) for r in out.ranks]
  return np.array([element(name, at) for at in itertools.product(*map(range, shape))]).reshape(shape)


def _reduced(values: Sequence[float], how: str, k: int | None):
  if how == 'kth':
    k = len(values) if k is None else k
    if not 1 <= k <= len(values):
      raise ValueError(f'k={k} must be in 1..{len(values)}')
    return sorted(values, reverse=True)[k - 1]
  return max(values) if how == 'max' else sum(values) if how == 'sum' else values[0]


def _times(a, b):
  return a * b


def _exp_of_difference(a, b):
  return math.exp(a - b)


def _over(a, b):
  return a / b


_QK = einsum('QK[m,p]', 'Q[e,p]', 'K[e,m]', f=_times, reduce='sum')


def _softmax(logits: str) -> Cascade:
  return (
    einsum('GM[p]', f'{logits}[m,p]', f=float, reduce='max'),
    einsum('SN[m,p]', f'{logits}[m,p]', 'GM[p]', f=_exp_of_difference, exps=1),
    einsum('SD[p]', 'SN[m,p]', f=float, reduce='sum'),
  )


_NORMALIZED = (
  einsum('A[m,p]', 'SN[m,p]', 'SD[p]', f=_over),
  einsum('AV[f,p]', 'A[m,p]', 'V[f,m]', f=_times, reduce='sum'),
)
_DEFERRED = (
  einsum('SNV[f,p]', 'SN[m,p]', 'V[f,m]', f=_times, reduce='sum'),
  einsum('AV[f,p]', 'SNV[f,p]', 'SD[p]', f=_over),
)

# Maximum; sum of exponentials; quotient and product.
THREE_PASS: Cascade = (_QK, *_softmax('QK'), *_NORMALIZED)
# The same, divided once a query and not once a key.
DEFERRED_DIVISION: Cascade = (_QK, *_softmax('QK'), *_DEFERRED)
# With a bias for every pair: elementwise, no pass more.
BIASED: Cascade = (
  _QK,
  einsum('QKB[m,p]', 'QK[m,p]', 'B[m,p]', f=lambda a, b: a + b),
  *_softmax('QKB'),
  *_NORMALIZED,
)
# Attention to those keys whose logits are among the k largest of a query.
TOP_K: Cascade = (
  _QK,
  einsum('TH[p]', 'QK[m,p]', f=float, reduce='kth'),
  einsum('TS[m,p]', 'QK[m,p]', 'TH[p]', f=lambda a, b: math.exp(a - b) if a >= b else 0.0, exps=1),
  einsum('SD[p]', 'TS[m,p]', f=float, reduce='sum'),
  einsum('SNV[f,p]', 'TS[m,p]', 'V[f,m]', f=_times, reduce='sum'),
  einsum('AV[f,p]', 'SNV[f,p]', 'SD[p]', f=_over),
)

_TILES = (
  einsum('BQK[m1,m0,p]', 'Q[e,p]', 'BK[e,m1,m0]', f=_times, reduce='sum'),
  einsum('LM[m1,p]', 'BQK[m1,m0,p]', f=float, reduce='max'),
)
# Tiles with maxima of their own, which are corrected when the one of all is known.
TWO_PASS: Cascade = (
  *_TILES,
  einsum('SLN[m1,m0,p]', 'BQK[m1,m0,p]', 'LM[m1,p]', f=_exp_of_difference, exps=1),
  einsum('SLD[m1,p]', 'SLN[m1,m0,p]', f=float, reduce='sum'),
  einsum('GM[p]', 'LM[m1,p]', f=float, reduce='max'),
  einsum('PLM[m1,p]', 'LM[m1,p]', 'GM[p]', f=_exp_of_difference, exps=1),
  einsum('SD[p]', 'SLD[m1,p]', 'PLM[m1,p]', f=_times, reduce='sum'),
  einsum('A[m1,m0,p]', 'SLN[m1,m0,p]', 'PLM[m1,p]', 'SD[p]', f=lambda a, b, c: a * b / c),
  einsum('AV[f,p]', 'A[m1,m0,p]', 'BV[f,m1,m0]', f=_times, reduce='sum'),
)
# FlashAttention-2: a running maximum, and running sums that shrink when it grows.
ONE_PASS: Cascade = (
  *_TILES,
  einsum('RM[m1+1,p]', 'RM[m1,p]', 'LM[m1,p]', f=max, first=-math.inf),
  einsum('SLN[m1,m0,p]', 'BQK[m1,m0,p]', 'RM[m1+1,p]', f=_exp_of_difference, exps=1),
  einsum('SLD[m1,p]', 'SLN[m1,m0,p]', f=float, reduce='sum'),
  einsum('SLNV[f,m1,p]', 'SLN[m1,m0,p]', 'BV[f,m1,m0]', f=_times, reduce='sum'),
  einsum('PRM[m1,p]', 'RM[m1,p]', 'RM[m1+1,p]', f=_exp_of_difference, exps=1),
  einsum('SPD[m1,p]', 'RD[m1,p]', 'PRM[m1,p]', f=_times),
  einsum('RD[m1+1,p]', 'SLD[m1,p]', 'SPD[m1,p]', f=lambda a, b: a + b, first=0.0),
  einsum('SPNV[f,m1,p]', 'RNV[f,m1,p]', 'PRM[m1,p]', f=_times),
  einsum('RNV[f,m1+1,p]', 'SLNV[f,m1,p]', 'SPNV[f,m1,p]', f=lambda a, b: a + b, first=0.0),
  einsum('AV[f,p]', 'RNV[f,m1=end,p]', 'RD[m1=end,p]', f=_over),
)


def local_linear(steps: int) -> Cascade:
  """Local linear attention with `steps` of conjugate gradients: each is a pass, between the first and the last.

  The weights W of the first pass stand for an online softmax; a step multiplies the keys' second moment with X, and the
  update of X from that product is a number of a query. For counting; not evaluated.

  Source: arXiv:2510.01450.
  """
  cascade = [
    einsum('W[m,p]', 'Q[e,p]', 'K[e,m]', f=_times, reduce='sum'),
    einsum('X0[e,p]', 'W[m,p]', 'K[e,m]', f=_times, reduce='sum'),
  ]
  for n in range(steps):
    cascade += [
      einsum(f'KX{n}[m,p]', f'X{n}[e,p]', 'K[e,m]', f=_times, reduce='sum'),
      einsum(f'Y{n}[e,p]', 'W[m,p]', f'KX{n}[m,p]', 'K[e,m]', f=lambda w, x, k: w * x * k, reduce='sum'),
      einsum(f'X{n + 1}[e,p]', f'X{n}[e,p]', f'Y{n}[e,p]', f=lambda x, y: x - y),
    ]
  return (
    *cascade,
    einsum('KX[m,p]', f'X{steps}[e,p]', 'K[e,m]', f=_times, reduce='sum'),
    einsum('AV[f,p]', 'W[m,p]', 'KX[m,p]', 'V[f,m]', f=lambda w, x, v: w * (1 - x) * v, reduce='sum'),
  )
