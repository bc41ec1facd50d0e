"""Ctrl-C and SIGTERM: the step that runs is finished and saved; a second one stops at once."""

import os
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
  """A run was stopped by a signal after its state was saved. `signal` is the number, `step` the steps done."""

  def __init__(self, number, step):
    super().__init__(f'stopped by {signal.Signals(number).name} at step {step}')
    self.signal, self.step = number, step


def status(number):
  """Exit status of a run that a signal stopped: 0 for SIGTERM, by which schedulers ask; 128 + number for others."""
  return 0 if number == signal.SIGTERM else 128 + number


def end_at_once():
  """From here on, SIGTERM ends the process at once with status 0, whatever it computes; in a Watch, the second does.

  For a program, in its main thread. The process may end at any time, since every file of a run is whole or not there.
  """
  global _listener
  _listener = _Listener()
  _listener.start()
  signal.signal(signal.SIGTERM, lambda *_: None)  # what the listener waits for needs a handler, whatever it does


class Watch:
  """Context in which the first signal is only noted, and `asked` gives it in all processes of the run at the same call.
  The second ends this process.

  Attributes:
    number: the first signal of this process, 0 until then.
    asked: function without arguments, see train.processes.Agreement.
  """

  def __init__(self):
    from train import processes  # it imports jax, which takes seconds

    self.number = 0
    self._before, self._seen = {}, 0
    self.asked = processes.Agreement(lambda: self.number).asked

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
      if _listener:
        _listener.act = self._count
    return self

  def __exit__(self, *unused):
    if _listener:
      _listener.act = _end
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, unused_frame):
    if self.number and not _listener:
      _end_again(number)
    elif not self.number:
      self.number = number
      os.write(2, b'\nfinishing the step and saving; once more stops at once\n')

  def _count(self, number):
    """In the listener's thread, which a step that never ends does not hold up."""
    self._seen += 1
    if self._seen > 1:
      _end_again(number)


def leave(message, exit_status):
  """Ends the process with a line on stderr; train.processes puts one here that ends all processes of a run."""
  os.write(2, f'train: {message}\n'.encode())
  os._exit(exit_status)


_listener = None


class _Listener(threading.Thread):
  """Hears every signal that has a handler, also while the main thread is in a compiler."""

  def __init__(self):
    super().__init__(name='signals', daemon=True)
    self.act = _end
    self._read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

  def run(self):
    while True:
      for number in os.read(self._read, 1):
        if number in SIGNALS:
          self.act(number)


def _end(number):
  leave(f'stopped by {signal.Signals(number).name}; the same command continues', status(number))


def _end_again(number):
  leave('stopped at once; the same command continues from the last checkpoint', 128 + number)
