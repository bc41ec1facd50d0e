"""Texts on a terminal while they grow, one behind the other, and how fast they came."""

import sys
import time
import unicodedata

# Ends of lines and directions of writing: they move what stands around them.
MOVING = frozenset('\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')


class Printer:
  """Shows rows that grow at the same time one after the other: the first that is not finished as it comes.

  Args:
    headings: one per row, shown before it; '' for none.
    out: a text file, sys.stdout by default. On a terminal, control characters are shown as U+FFFD: a model must not
      move the cursor.
  """

  def __init__(self, headings, out=None):
    self._out = sys.stdout if out is None else out
    self._headings = list(headings)
    self._waiting = [''] * len(self._headings)
    self._is_finished = [False] * len(self._headings)
    self._current = self._column = -1
    self._is_terminal = self._out.isatty()
    if hasattr(self._out, 'reconfigure'):
      self._out.reconfigure(errors='replace')  # a terminal without UTF-8 is no reason to stop
    self._next()

  def take(self, row, text, is_finished):
    """Text of row `row`, and whether it was the last."""
    self._waiting[row] += text
    self._is_finished[row] |= is_finished
    if row == self._current:
      self._show()

  def end(self):
    """Shows nothing more: the cursor goes to the start of a line."""
    if self._column:
      self._write('\n')

  def _show(self):
    text, self._waiting[self._current] = self._waiting[self._current], ''
    self._write(visible(text) if self._is_terminal else text)
    if self._is_finished[self._current]:
      self.end()
      self._next()

  def _next(self):
    self._current, self._column = self._current + 1, 0
    if self._current < len(self._headings):
      if self._headings[self._current]:
        self._write(self._headings[self._current] + '\n')
      self._column = 1  # an empty text has its line, too
      self._show()

  def _write(self, text):
    if text:
      self._out.write(text)
      self._out.flush()
      self._column = 0 if text.endswith('\n') else 1


def visible(text):
  """A text in which U+FFFD stands for what moves the cursor or other text: control characters but line ends and tabs,
  surrogates, and MOVING. Joiners, soft hyphens and every kind of space are text."""
  is_shown = lambda c: c in '\n\t' or (unicodedata.category(c) not in ('Cc', 'Cs') and c not in MOVING)
  return ''.join(c if is_shown(c) else '\ufffd' for c in text)


class Clock:
  """Measures a generation from its start: the time to the first tokens, and the speed from there.

  Args:
    now: gives seconds.
  """

  def __init__(self, now=time.monotonic):
    self._now, self._start = now, now()
    self._first = self._end = 0.0
    self.tokens, self._rows = 0, set()

  def take(self, row, tokens):
    """`tokens` new tokens of a row have come."""
    self._end = self._now()
    self._first = self._first if self._rows else self._end
    self._rows.add(row)
    self.tokens += tokens

  def text(self, prompt_tokens):
    """A line with the figures. The first token of every row belongs to the time before."""
    line = f'{count(self.tokens, "token")}; the first after {self._first - self._start:.2f} s, in which '
    line += f'{count(prompt_tokens, "token")} of prompt were read and programs were compiled'
    rest, seconds = self.tokens - len(self._rows), self._end - self._first
    return line + (f'; then {rest / seconds:.1f} tokens/s' if rest and seconds else '')


def count(n, noun):
  """'1 token', '2 tokens'."""
  return f'{n:,} {noun}' + 's' * (n != 1)
