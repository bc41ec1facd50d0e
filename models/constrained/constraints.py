"""What a text may be, told token by token."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol


class Constraint(Protocol):
  """What `generate` asks. States are values: `advance` returns a new one and leaves the old one as it was.

  A state from which no complete text can be reached should be None: draws then turn away in time.
  """

  def start(self) -> Any:
    """The state of the empty text."""

  def advance(self, state: Any, token: int) -> Any:
    """The state after one more token, or None if the token must not come here."""

  def is_complete(self, state: Any) -> bool:
    """Whether the text may end here."""


class Automaton:
  """The texts that a finite automaton accepts, over the characters or bytes of tokens.

  A token may come if the automaton can walk all its characters and can still reach an accepting state.

  Args:
    transitions: {state: {character: next state}}, states of any hashable kind; what is not there is forbidden. With
      pieces of bytes, a character is an int.
    accepting: the states in which a text may end.
    pieces: the text of each token id, str or bytes; ids with an empty one (special tokens) or none are forbidden.
    start: the first state.

  Raises:
    ValueError: `start` or an accepting state that `transitions` do not know, or no text that is accepted.
  """

  def __init__(self, transitions, accepting, pieces, start=0):
    known = {*transitions, *(after for row in transitions.values() for after in row.values())}
    for name, states in (('start', [start]), ('accepting', accepting)):
      if strange := [state for state in states if state not in known]:
        raise ValueError(f'{name}={strange[0]!r} is no state of the transitions')
    self._accepting, self._pieces, self._start = frozenset(accepting), pieces, start
    live = set(self._accepting)
    while found := {s for s, row in transitions.items() if s not in live and not live.isdisjoint(row.values())}:
      live |= found
    if start not in live:
      raise ValueError(f'accepting={sorted(map(repr, accepting))} cannot be reached from start={start!r}')
    self._step = {s: {c: to for c, to in row.items() if to in live} for s, row in transitions.items()}

  def start(self):
    return self._start

  def advance(self, state, token):
    piece = (self._pieces[token] if token < len(self._pieces) else '') or ''
    for character in piece:
      state = self._step.get(state, {}).get(character)
      if state is None:
        return None
    return state if piece else None

  def is_complete(self, state):
    return state in self._accepting


def predicate(is_allowed, is_complete=lambda tokens: True):
  """A constraint from functions of the new tokens so far, a tuple of ints.

  Args:
    is_allowed: whether a text may begin with these tokens.
    is_complete: whether it may end with them; only asked about what is allowed.
  """
  return _Predicate(is_allowed, is_complete)


@dataclasses.dataclass(frozen=True)
class _Predicate:
  is_allowed: Callable[[tuple[Hashable, ...]], bool]
  is_ending: Callable[[tuple[Hashable, ...]], bool]

  def start(self):
    return ()

  def advance(self, state, token):
    longer = (*state, token)
    return longer if self.is_allowed(longer) else None

  def is_complete(self, state):
    return bool(self.is_ending(state))
