"""Several processes that train as one: joining, doing the same, stopping together, and ending when one has ended.

They talk through the key-value store of jax's coordination service, which process 0 runs. A thread of each process
listens there, so that a signal or an error of one reaches the others within a second, whatever they compute. A process
that ends without a word is missed by the next collective or, at the latest, by the service's heartbeats.
"""

import atexit
import contextlib
import faulthandler
import json
import math
import os
import re
import socket
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils

from train import interrupt
from train.config import UserError

HEARTBEAT = 20  # seconds without a heartbeat after which a process counts as gone
JOIN_SECONDS = 120.0  # that a process waits for the others to begin
GONE = 4  # exit status when another process is gone, or does not come
_POLL_MS = 200
_FAREWELL = 3.0  # seconds that process 0 waits for the others to hear why the run ends
_LOST = re.compile('gloo|unavailable|deadline_exceeded|aborted|connection|heartbeat|coordination', re.I)
_ROOT = 'attnloom'


class Elsewhere(RuntimeError):
  """Process 0 raised an error that the others cannot raise themselves."""


def join(coordinator='', count=0, index=-1, *, heartbeat_seconds=HEARTBEAT):
  """Joins the other processes of a run, before anything else is asked of jax.

  Ends the process with GONE if they are not all there within JOIN_SECONDS. A signal meanwhile ends this one alone.

  Args:
    coordinator: host:port of process 0; '' lets jax find it on a cluster, as it does the others.
    count: processes; 0 lets jax find it.
    index: number of this one; -1 lets jax find it.
    heartbeat_seconds: after which a process that hangs or is gone ends the others.

  Raises:
    UserError: a setting is missing or cannot be.
  """
  global _listener
  if heartbeat_seconds < 1:
    raise UserError(f'--heartbeat_seconds={heartbeat_seconds}: expected 1 or more')
  host, _, port = coordinator.rpartition(':')
  if coordinator and not (host and port.isascii() and port.isdigit()):
    raise UserError(f'--coordinator={coordinator}: expected host:port')
  late = f'{{}} after {JOIN_SECONDS:.0f} s; start all processes of the run again'
  if coordinator and index > 0 and not _answers(host.strip('[]'), int(port)):
    interrupt.leave(late.format(f'process 0 does not answer at {coordinator}'), GONE)
  alone = threading.Timer(JOIN_SECONDS, interrupt.leave, (late.format('not all processes have joined'), GONE))
  alone.daemon = True
  alone.start()
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
  try:
    jax.distributed.initialize(
      coordinator_address=coordinator or None,
      num_processes=count or None,
      process_id=index if index >= 0 else None,
      heartbeat_timeout_seconds=heartbeat_seconds,
      initialization_timeout=math.ceil(2 * JOIN_SECONDS),  # then jax aborts with its stacks, so not before
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(f'--distributed: cannot join the other processes ({_first_line(error)})') from error
  finally:
    alone.cancel()
  if faulthandler.is_enabled():
    faulthandler.enable(all_threads=False)  # jax aborts when another process hangs: stacks would bury its words
  _listener = _Listener()
  _listener.start()
  interrupt.leave = end
  atexit.register(_listener.close)  # before jax's own


def first_only(function, name):
  """Process 0 calls a function; every process gets what it returned, or its error.

  Args:
    function: without arguments; returns what JSON can hold.
    name: of this call; all processes make the calls of one name in the same order.

  Raises:
    UserError: of process 0. Other errors of it are an Elsewhere in the others.
  """
  if jax.process_count() == 1:
    return function()
  with _counting:
    _calls[name] = _calls.get(name, 0) + 1
    key = f'{_ROOT}/first/{name}/{_calls[name]}'
  if jax.process_index():
    said = json.loads(_get(key))
    if 'error' in said:
      raise UserError(said['error']) if said['is_user'] else Elsewhere(f'process 0: {said["error"]}')
    return said['value']
  try:
    value = function()
  except Exception as error:
    said = {'error': str(error) or type(error).__name__, 'is_user': isinstance(error, UserError)}
    _client().key_value_set(key, json.dumps(said))
    raise
  _client().key_value_set(key, json.dumps({'value': value}))
  return value


def agreed(*flags):
  """Each flag as the largest of all processes, so that all do the same. Waits for all of them."""
  if jax.process_count() == 1:
    return flags
  return multihost_utils.process_allgather(np.array(flags, np.int32)).max(axis=0).tolist()


class Agreement:
  """A signal to any process as all of them see it: from the same call of `asked` on.

  No call waits for other processes, until there is a signal. Then each process tells how many calls it has made and
  makes no further one until all have told; all stop at the call after the largest number. The listening threads talk,
  so a process may be in a step or a save meanwhile.

  Args:
    number: function without arguments, the signal this process got or 0.
  """

  def __init__(self, number):
    self._number, self._lock = number, threading.Lock()
    self._count, self._stop_at, self._agreed = 0, 0, 0
    self.key = ''
    if _listener:
      _listener.watch(self)

  def asked(self):
    """The signal, or 0. Every process makes the same calls."""
    if not self.key:
      return self._number()
    with self._lock:
      self._count += 1
      return self._agreed if self._stop_at and self._count >= self._stop_at else 0

  def exchange(self, client, hear):
    """Called by the listening thread every now and then: passes a signal on, and agrees if there is one."""
    if self._stop_at:
      return
    if number := self._number():
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        client.key_value_set(f'{self.key}/signal', str(number))
    found = dict(client.key_value_dir_get(f'{self.key}/'))
    if signal := next((value for key, value in found.items() if key.endswith('/signal')), ''):
      with self._lock:
        self.tell(client)
        while len(counts := client.key_value_dir_get(f'{self.key}/at/')) < jax.process_count():
          hear(client)  # ends the process if another has failed
          time.sleep(0.01)
        self._stop_at, self._agreed = 1 + max(int(value) for _, value in counts), int(signal)

  def tell(self, client):
    """Tells the others how many calls were made."""
    client.key_value_set(f'{self.key}/at/{jax.process_index()}', str(self._count), allow_overwrite=True)


def end(message, status):
  """Ends this process with a line on stderr and an exit status, and all others of the run with the same."""
  _say(message)
  if _listener:
    teller = threading.Thread(target=_tell, args=(str(message), status), daemon=True)
    teller.start()
    teller.join(2 * _FAREWELL)  # process 0 may hang
  sys.stdout.flush()
  os._exit(status)


def _tell(message, status):
  """Tells the others that this process ends."""
  with contextlib.suppress(Exception):  # the others may be gone
    told = {'process': jax.process_index(), 'message': message, 'status': status}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
      _client().key_value_set(f'{_ROOT}/failed', json.dumps(told))
    _farewell(_client())


def end_of(error):
  """Ends the processes of a run for an error that nobody expected: one of another process if it looks like that."""
  if not is_lost(error):
    traceback.print_exception(error)
    end(f'{type(error).__name__}: {_first_line(error)}', 1)
  time.sleep(1.0)  # the listener may hear why, and then ends this process
  end(f'another process of this run is gone ({_first_line(error)}); {_AGAIN}', GONE)


def is_lost(error):
  """Whether an error is one of jax that tells that another process of this run is gone."""
  return is_joined() and isinstance(error, jax.errors.JaxRuntimeError) and bool(_LOST.search(str(error)))


def is_joined():
  """Whether this is one of several processes that joined here."""
  return _listener is not None


_AGAIN = 'the same commands continue from the last checkpoint'
_counting = threading.Lock()
_calls: dict[str, int] = {}  # of first_only, by name
_listener: '_Listener | None' = None


class _Listener(threading.Thread):
  """Hears that another process failed, and exchanges signals."""

  def __init__(self):
    super().__init__(name='processes', daemon=True)
    self._closing, self._agreement, self._agreements = threading.Event(), None, 0

  def watch(self, agreement):
    self._agreements += 1
    agreement.key = f'{_ROOT}/stop/{self._agreements}'
    self._agreement = agreement

  def run(self):
    try:
      while not self._closing.is_set():
        self.hear(_client(), _POLL_MS)
        if self._agreement:
          self._agreement.exchange(_client(), self.hear)
    except Exception as error:
      if not self._closing.is_set():
        _say(f'process 0 of this run is gone ({_first_line(error)}); {_AGAIN}')
        os._exit(GONE)

  def hear(self, client, wait_ms=1):
    try:
      told = json.loads(client.blocking_key_value_get(f'{_ROOT}/failed', wait_ms))
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
      return
    if told['process'] != jax.process_index():
      _say(f'process {told["process"]}: {told["message"]}')
      _farewell(client)
      os._exit(told['status'])
    self._closing.wait()  # this process is about to end itself

  def close(self):
    """Ends the thread: one that Python's end finds in a call of the service would crash."""
    self._closing.set()
    if threading.current_thread() is not self:
      self.join()
    if self._agreement:
      with contextlib.suppress(Exception):
        self._agreement.tell(_client())  # others may still wait for it


def _farewell(client):
  """Tells that this process knows why the run ends; process 0, which runs the service, waits for all."""
  with contextlib.suppress(Exception):
    client.key_value_set(f'{_ROOT}/known/{jax.process_index()}', '', allow_overwrite=True)
    until = time.monotonic() + _FAREWELL
    while jax.process_index() == 0 and time.monotonic() < until:
      if len(client.key_value_dir_get(f'{_ROOT}/known/')) == jax.process_count():
        break
      time.sleep(0.02)


def _answers(host, port):
  """Whether something listens at a port within JOIN_SECONDS."""
  until = time.monotonic() + JOIN_SECONDS
  while time.monotonic() < until:
    try:
      socket.create_connection((host, port), timeout=1.0).close()
      return True
    except OSError:
      time.sleep(0.1)
  return False


def _client():
  from jax._src import distributed

  return distributed.global_state.client


def _get(key):
  """The value of a key, once it is there."""
  while True:
    try:
      return _client().blocking_key_value_get(key, 1000)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def _say(message):
  # Not through sys.stderr, whose lock another thread may hold.
  os.write(2, f'train: {message}\n'.encode())


def _first_line(error):
  return next(iter(str(error).splitlines()), type(error).__name__)
