"""Ctrl-C and SIGTERM: the step that runs is finished and saved; a second one stops at once."""

import os
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
  """A run was stopped by a signal after its state was saved. `signal` is the number, `step` the steps done."""

  def __init__(self, number, step):
    super().__init__(f'stopped by {signal.Signals(number).name} at step {step}')
    self.signal, self.step = number, step


class Watch:
  """Context in which the first signal is only noted: `number` is 0 until then. The second ends the process.

  The process may end at any time, since every file of a run is whole or not there.
  """

  def __init__(self):
    self.number = 0
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
    return self

  def __exit__(self, *unused):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, unused_frame):
    if self.number:
      os.write(sys.stderr.fileno(), b'\nstopped at once; the same command continues from the last checkpoint\n')
      os._exit(128 + number)
    self.number = number
    os.write(sys.stderr.fileno(), b'\nfinishing the step and saving; once more stops at once\n')
