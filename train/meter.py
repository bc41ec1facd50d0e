"""How far work over many bytes has come: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import time

from tqdm import tqdm

DELAY = 1.0  # seconds that nothing is shown: most preparations are done by then
PLAIN_SECONDS = 10.0


class Meter:
  """Shows how many bytes of a total are done.

  Args:
    total: bytes.
    what: is done, such as 'preparing tokens'.
    say: called with the lines where there is no terminal.
    plain_seconds: seconds, at least, between these lines.
  """

  def __init__(self, total, what, say, *, plain_seconds=PLAIN_SECONDS):
    self.total, self.done = total, 0
    self._what, self._say, self._plain_seconds = what, say, plain_seconds
    self._began = self._last = time.monotonic()
    is_terminal = sys.stderr.isatty() and os.environ.get('TERM', 'dumb') != 'dumb' and not os.environ.get('CI')
    self._bar = None
    if is_terminal:
      # Some terminals do not tell their size: a bar of width 0 would be nothing.
      size = {'dynamic_ncols': True} if all(os.get_terminal_size(sys.stderr.fileno())) else {'ncols': 100, 'nrows': 20}
      self._bar = tqdm(total=total, desc=what, unit='B', unit_scale=True, delay=DELAY, leave=False, **size)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._bar is not None:
      self._bar.close()

  def to(self, done):
    """`done` bytes are done."""
    moved, self.done = done - self.done, done
    if self._bar is not None:
      self._bar.update(moved)
    elif time.monotonic() - self._last >= self._plain_seconds:
      self._last = time.monotonic()
      share = done / max(self.total, 1)
      left = (self._last - self._began) * (1 - share) / share if share else 0.0
      size = f'{tqdm.format_sizeof(done)}B of {tqdm.format_sizeof(self.total)}B ({share:.0%})'
      self._say(f'{self._what}: {size}, {tqdm.format_interval(left)} left')
