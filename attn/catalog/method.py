"""What the catalog knows of a method: the record and its parts."""

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

FAMILIES = {
  'exact': 'Softmax attention, exactly: masks, shared heads, tiles, sinks, caches',
  'positions': 'Positions inside queries and keys',
  'bias': 'Additive biases and score functions',
}


@dataclasses.dataclass(frozen=True)
class Input:
  """An array that a method takes.

  Args:
    axes: one letter an axis, of B batch, T queries, S keys, H query heads, K key heads, D key width, V value width,
      N entries of a table, R rank.
    kind: what is in it, a key of attn.contracts.trial.KINDS: 'normal' floats, 'ids' of segments, 'positions'.
  """

  axes: str
  kind: str = 'normal'


@dataclasses.dataclass(frozen=True)
class Limit:
  """A case in which a method is exactly another one.

  Args:
    equals: the name of the other method, or a function of this method's inputs that returns the output.
    settings: what replaces or joins this method's settings.
    equal_settings: what replaces or joins the other's settings.
    sizes: axis lengths that differ from the usual small ones, as {'K': 1}.
    inputs: functions of an input that make the case, by the input's name.
  """

  equals: str | Callable
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  equal_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  inputs: Mapping[str, Callable] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class State:
  """How a method goes on from where it was: a cache, a recurrent state.

  Args:
    init: init(batch, capacity, sizes, dtype) -> state; sizes maps axis letters to lengths.
    extend: extend(state=, positions=[B, n], **token inputs of n tokens, **settings) -> (out, state).
    capacities: name of a storage -> tokens it holds; 0 means all of them.
  """

  init: Callable
  extend: Callable
  capacities: Mapping[str, int] = dataclasses.field(default_factory=lambda: {'full': 0})


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """One record of the catalog.

  Args:
    name: how it is called by, lower case with underscores.
    title: how people call it.
    family: a key of FAMILIES.
    paper: 'arXiv:NNNN.NNNNN' or an address.
    authors: authors and year.
    idea: one line.
    formula: text, a few lines.
    cost: text: time and memory.
    usage: one call as a person would write it, on q, k, v and the other inputs; the tests run it.
    entry: the function, or its dotted path.
    oracle: oracle(**inputs) -> {'out': array} and 'lse' where there is one: float64 numpy loops that share no code
      with `entry`, at `settings`.
    settings: keywords of entry, small enough that 12 tokens show them at work.
    forms: name -> keywords: ways to compute the same. The first one is what the contracts use most.
    inputs: name -> Input, in the order of entry; the first one decides the sizes.
    sizes: axis lengths it needs, as {'K': 1}.
    is_causal: no output depends on a later token.
    reach: (back, ahead): how many tokens before and after itself a query sees, all of them; None where unbounded.
    has_lse: return_residual=True also returns the log-sum-exp.
    lengths: lengths([B], T) -> keywords that tell entry the number of valid tokens in each row; None: it cannot.
    state: its stateful form; None: it has none.
    call: what the contracts call in place of entry, where entry takes other arguments than inputs and settings.
    limits: statement -> Limit.
    waived: contract -> the reason why it cannot hold.
  """

  name: str
  title: str
  family: str
  paper: str
  authors: str
  idea: str
  formula: str
  cost: str
  usage: str
  entry: str | Callable
  oracle: Callable[..., Mapping[str, Any]]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  forms: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {'plain': {}})
  inputs: Mapping[str, Input] = dataclasses.field(default_factory=dict)
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  is_causal: bool = False
  reach: tuple[int | None, int | None] | None = None
  has_lse: bool = False
  lengths: Callable | None = None
  state: State | None = None
  call: Callable | None = None
  limits: Mapping[str, Limit] = dataclasses.field(default_factory=dict)
  waived: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not re.fullmatch(r'[a-z][a-z0-9_]*', self.name):
      raise ValueError(f'name={self.name!r} must be lower case letters, digits and underscores')
    if self.family not in FAMILIES:
      raise ValueError(f'{self.name}: family={self.family!r} must be one of {", ".join(FAMILIES)}')
    for field in ('title', 'paper', 'authors', 'idea', 'formula', 'cost', 'usage'):
      if not getattr(self, field).strip():
        raise ValueError(f'{self.name}: {field} is empty')
    if not self.inputs or not self.forms:
      raise ValueError(f'{self.name}: inputs={dict(self.inputs)} and forms={dict(self.forms)} must not be empty')
    if self.paper.startswith('arXiv:') and not re.fullmatch(r'arXiv:\d{4}\.\d{4,5}', self.paper):
      raise ValueError(f"{self.name}: paper={self.paper!r} must be 'arXiv:NNNN.NNNNN' or an address")
    for contract, reason in self.waived.items():
      if not reason.strip():
        raise ValueError(f'{self.name}: contract {contract!r} is waived without a reason')

  @property
  def url(self) -> str:
    """Where the paper is."""
    return self.paper.replace('arXiv:', 'https://arxiv.org/abs/', 1)

  @property
  def path(self) -> str:
    """The dotted path of the entry point."""
    return self.entry if isinstance(self.entry, str) else f'{self.entry.__module__}.{self.entry.__qualname__}'

  def function(self) -> Callable:
    """What computes it on inputs and settings: `call`, or the entry point."""
    if self.call is not None:
      return self.call
    if not isinstance(self.entry, str):
      return self.entry
    module, _, name = self.entry.rpartition('.')
    return getattr(importlib.import_module(module), name)
