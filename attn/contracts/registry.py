"""What a contract is, which there are, and how they are run."""

import dataclasses
import time
from collections.abc import Callable

from attn.catalog import Method


class ContractBroken(AssertionError):
  """A method does not keep a contract.

  Attributes:
    contract: its name.
    method: the method's name.
    seen: what was seen.
  """

  def __init__(self, contract: str, method: str, seen: str):
    super().__init__(f'{method} breaks the contract {contract!r}: {seen}')
    self.contract, self.method, self.seen = contract, method, seen


class Broken(AssertionError):
  """Raised inside a contract with what was seen; `run` adds the names."""


@dataclasses.dataclass(frozen=True)
class Contract:
  """A named demand on methods.

  Attributes:
    name: lower case with underscores.
    statement: one line: what holds.
    function: function(method) -> None, raises Broken.
    applies: applies(method) -> bool: is the demand meaningful for this method?
  """

  name: str
  statement: str
  function: Callable
  applies: Callable


@dataclasses.dataclass(frozen=True)
class Result:
  """How one contract went: outcome is 'held', 'broken', 'waived' or 'waived but held'."""

  contract: str
  outcome: str
  seconds: float
  text: str = ''


@dataclasses.dataclass(frozen=True)
class Report:
  """How all contracts went for one method."""

  method: str
  results: tuple[Result, ...]

  @property
  def broken(self) -> tuple[str, ...]:
    """Names of the contracts that are broken and not waived."""
    return tuple(x.contract for x in self.results if x.outcome == 'broken')

  @property
  def needless_waivers(self) -> tuple[str, ...]:
    """Names of the contracts that are waived although they hold."""
    return tuple(x.contract for x in self.results if x.outcome == 'waived but held')

  def __str__(self) -> str:
    lines = [f'{x.contract:<20} {x.outcome:<16} {x.seconds:5.2f} s  {x.text}'.rstrip() for x in self.results]
    return '\n'.join([self.method, *lines])


CONTRACTS: dict[str, Contract] = {}


def contract(applies: Callable[[Method], bool] = lambda method: True):
  """Decorator: registers a function as a contract under its name, with its docstring's first line as statement."""

  def register(function):
    statement = function.__doc__.splitlines()[0]
    CONTRACTS[function.__name__] = Contract(function.__name__, statement, function, applies)
    return function

  return register


def applicable(method: Method) -> tuple[str, ...]:
  """Names of the contracts that apply to a method, waived ones included.

  Raises:
    ValueError: it waives a contract that does not exist or does not apply.
  """
  names = tuple(name for name, x in CONTRACTS.items() if x.applies(method))
  for name in method.waived:
    if name not in CONTRACTS:
      raise ValueError(f'{method.name} waives {name!r}, which is not a contract: {", ".join(CONTRACTS)}')
    if name not in names:
      raise ValueError(f'{method.name} waives {name!r}, which does not apply to it: {", ".join(names)}')
  return names


check_waivers = applicable


def run(method: Method, name: str) -> None:
  """Runs one contract on a method, waived or not.

  Raises:
    ContractBroken: it does not hold, or the method raises where it should not.
    ValueError: no such contract, or one that does not apply.
  """
  names = applicable(method)
  if name not in names:
    raise ValueError(f'contract={name!r} is unknown or does not apply to {method.name}: {", ".join(names)}')
  try:
    CONTRACTS[name].function(method)
  except Broken as error:
    raise ContractBroken(name, method.name, str(error)) from None
  except Exception as error:
    raise ContractBroken(name, method.name, f'raised {type(error).__name__}: {error}') from error


def check(method: Method) -> Report:
  """Runs every contract that applies.

  Returns:
    The report; print it. A method is sound when `broken` and `needless_waivers` are empty.

  Raises:
    ValueError: the method waives a contract that does not exist or does not apply.
  """
  results = []
  for name in applicable(method):
    start, text, held = time.process_time(), '', True
    try:
      run(method, name)
    except ContractBroken as error:
      text, held = error.seen, False
    if name in method.waived:
      text = f'{method.waived[name]}; seen: {text}' if text else method.waived[name]
    outcome = ('waived but held' if held else 'waived') if name in method.waived else 'held' if held else 'broken'
    results.append(Result(name, outcome, time.process_time() - start, text))
  return Report(method.name, tuple(results))
