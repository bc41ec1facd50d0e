"""What a run says: lines of metrics.jsonl, TensorBoard, and a progress bar or plain lines.

A line of metrics.jsonl is a JSON object with `kind` and `step` (steps done):

    train       the `steps` steps up to `step`, those left out not counted: loss (nats per token), bits_per_byte (or
                bits_per_token, where the data is token ids without a tokenizer), tokens, grad_norm (mean),
                learning_rate (of the last step), seconds (of training since the run began, compiling, evaluating and
                saving left out), tokens_per_second, mfu (0 if unknown); with a z-loss or a teacher also z,
                distill_outputs, distill_features, distill_attention (per token, before their weights); left_out (steps)
    eval        bits_per_byte on `bytes` held-out bytes (or bits_per_token, tokens), is_all (whether these are all),
                seconds it took
    not_finite  a step that was left out, or that stopped the run: loss, grad_norm and what else was not finite, rows
                (what the batch was cut from), skipped (steps left out so far)

The train lines of a run cover each step once, also after a stop or a crash: what is beyond the restored checkpoint is
cut off.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time

import jax
from tqdm import tqdm

from train import workdir as workdirs


class Writer:
  """metrics.jsonl and, if asked for, TensorBoard of a run that goes on from `step`. Writes nothing if not `is_on`.

  Attributes:
    seconds: of training in all lines.
    tokens: trained on in these seconds.
    evaluated: step of the last eval line, 0 if there is none.
  """

  def __init__(self, workdir, step, *, has_tensorboard, is_on=True):
    self.seconds, self.tokens, self.evaluated = 0.0, 0.0, 0
    self._file = self._board = None
    if not is_on:
      return
    path = workdir / workdirs.METRICS
    records, damaged = _records_up_to(path, step)
    if damaged:
      kept = path.with_suffix('.damaged.jsonl')
      shutil.copy(path, kept)
      print(f'{path}: {damaged} lines are damaged and left out; the file as it was is {kept.name}', flush=True)
    for record in records:
      self._count(record)
    workdirs.write_whole(path, ''.join(json.dumps(record) + '\n' for record in records))
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 - closed by close()
    if has_tensorboard:
      self._board = _Board(workdir / 'tb', step)

  def write(self, kind, step, values):
    """Appends a line, which the system has at once."""
    record = {'kind': kind, 'step': step, **values}
    self._count(record)
    if self._file:
      self._file.write(json.dumps(record) + '\n')
      self._file.flush()
    if self._board:
      self._board.add(kind, step, values)

  def close(self):
    """Closes both; a checkpoint that is taken up later continues them."""
    if self._file:
      with contextlib.suppress(OSError):  # of a line that could not be written, which has been raised
        self._file.close()
    if self._board:
      self._board.close()

  def _count(self, record):
    if record['kind'] == 'train':
      self.tokens += record['tokens_per_second'] * (record['seconds'] - self.seconds)
      self.seconds = record['seconds']
    elif record['kind'] == 'eval':
      self.evaluated = record['step']


class _Board:
  """TensorBoard's file. It must not stop a run: where it cannot be written to, a line says so, once.

  Events are written by the thread that has them: the queue of tensorboardX.SummaryWriter, which a thread empties that
  ends with its first error, would hold a run up for ever.
  """

  def __init__(self, folder, step):
    import tensorboardX  # takes seconds where torch is installed, which it then imports
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2

    self._folder, self._scalar, self._event = folder, tensorboardX.summary.scalar, event_pb2.Event
    self._file = None
    with self._told():
      folder.mkdir(exist_ok=True)
      self._file = event_file_writer.EventsWriter(str(folder / 'events'))
      if step:  # what was written beyond a checkpoint is hidden
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(event_pb2.Event(step=step + 1, wall_time=time.time(), session_log=started))

  def add(self, kind, step, values):
    """Writes the numbers among some values, at once."""
    if self._file:
      with self._told():
        for name, value in values.items():
          if isinstance(value, int | float) and not isinstance(value, bool):
            summary = self._scalar(f'{kind}/{name}', value)
            self._file.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._file.flush()

  def close(self):
    """Closes the file."""
    if self._file:
      with self._told():
        self._file.close()

  @contextlib.contextmanager
  def _told(self):
    try:
      yield
    except OSError as error:
      self._file = None
      print(f'{self._folder}: {error.strerror}; the run goes on without TensorBoard', file=sys.stderr, flush=True)


def _records_up_to(path, step):
  """(records up to a step, number of damaged lines); an unfinished last line, as a crash leaves it, is none."""
  if not path.exists():
    return [], 0
  records, damaged = [], 0
  *lines, _ = path.read_bytes().split(b'\n')
  for line in lines:
    try:
      record = json.loads(line)
      is_wanted = record['step'] <= step and isinstance(record['kind'], str)
    except (ValueError, TypeError, KeyError):
      damaged += 1
    else:
      records += [record] * is_wanted
  return records, damaged


class Window:
  """Sums of the steps since the last train line, and the time they took.

  Args:
    unit: 'byte' or 'token', what bits are counted per.
    also: names of sums that a train line gives per token.
  """

  def __init__(self, unit='byte', also=()):
    self.unit, self.also = unit, also
    self.start()

  def start(self):
    """Forgets the sums; the clock runs from here."""
    self.steps, self.left_out, self.timed_tokens, self.sums = 0, 0, 0.0, {}
    self._mark = time.monotonic()

  def add(self, sums, *, is_timed=True):
    """Adds the sums of a step; one that is not timed, since it was compiled first, does not count for the speed."""
    self.steps += 1
    self.rate = float(sums['learning_rate'])
    self.timed_tokens += float(sums['tokens']) if is_timed else 0.0
    for name, value in sums.items():
      self.sums[name] = self.sums.get(name, 0.0) + float(value)

  def leave_out(self):
    """A step that changed nothing: its time counts, its figures do not."""
    self.left_out += 1

  def pause(self, seconds):
    """Leaves out time that was not training."""
    self._mark += seconds

  def values(self, seconds_before, flops_per_token, peak):
    """The values of a train line; starts the next window.

    Args:
      seconds_before: of training before this window.
      flops_per_token: of a training step.
      peak: FLOP/s of all devices, 0 if unknown.
    """
    took = max(time.monotonic() - self._mark, 0.0)
    speed = self.timed_tokens / took if took and self.timed_tokens else 0.0
    values = {
      'steps': self.steps,
      'loss': float(self.sums['nll']) / max(self.sums['tokens'], 1.0),
      f'bits_per_{self.unit}': bits(self.sums),
      'tokens': int(self.sums['tokens']),
      'grad_norm': self.sums['grad_norm'] / self.steps,
      'learning_rate': self.rate,
      'seconds': seconds_before + took,
      'tokens_per_second': speed,
      'mfu': speed * flops_per_token / peak if peak else 0.0,
      'left_out': self.left_out,
      **{name: float(self.sums[name]) / max(self.sums['tokens'], 1.0) for name in self.also},
    }
    self.start()
    return values


def as_floats(sums):
  """A dictionary of scalars on devices as Python's floats: sums of many in float32 would miscount beyond 2^24."""
  return {name: float(value) for name, value in jax.device_get(sums).items()}


def bits(sums):
  """Sums in nats of train.loss.cross_entropy -> bits per byte (or what else `bytes` counts)."""
  return float(sums['byte_nll']) / max(float(sums['bytes']), 1.0) / math.log(2)


class Progress:
  """A progress bar on a terminal, elsewhere a plain line at most every `plain_seconds`. Silent unless `is_on`."""

  def __init__(self, step, steps, *, plain_seconds, unit='byte', is_on=True):
    self.step, self.steps, self.unit, self.is_on = step, steps, unit, is_on
    self._plain_seconds, self._last = plain_seconds, 0.0
    # The clock for the time left begins after the first step, most of which is compiling.
    self._first, self._began = step + 1, 0.0
    terminal = sys.stderr.isatty() and os.environ.get('TERM', 'dumb') != 'dumb' and not os.environ.get('CI')
    self._bar = None
    if terminal and is_on:
      # Some terminals do not tell their size: a bar of width 0 would be nothing.
      size = {'dynamic_ncols': True} if all(os.get_terminal_size(sys.stderr.fileno())) else {'ncols': 100, 'nrows': 20}
      self._bar = tqdm(total=steps, initial=step, unit='step', desc='compiling', **size)

  def done(self, step):
    """Moves to `step`."""
    if self._bar:
      self._bar.update(step - self.step)
    self._began = self._began or time.monotonic()
    self.step = step

  def show(self, values):
    """Shows the values of a train line."""
    text = f'{values[f"bits_per_{self.unit}"]:.3f} bits per {self.unit}'
    text += f', {values["tokens_per_second"]:,.0f} tokens/s' if values['tokens_per_second'] else ''
    text += f', {values["mfu"]:.0%} of peak' if values['mfu'] else ''
    if self._bar:
      self._bar.set_description('training', refresh=False)
      self._bar.set_postfix_str(text)
    elif time.monotonic() - self._last >= self._plain_seconds or self.step == self.steps:
      self._last = time.monotonic()
      done, left = self.step - self._first, self.steps - self.step
      text += f', {clock((self._last - self._began) / done * left)} left' if done > 0 and left else ''
      self.say(f'step {self.step:,} of {self.steps:,}: {text}')

  def say(self, line=''):
    """Prints a line, above the bar if there is one."""
    if self._bar:
      self._bar.write(line, file=sys.stdout)
    elif self.is_on:
      print(line, flush=True)

  def close(self):
    """Ends the bar."""
    if self._bar:
      self._bar.close()
      self._bar = None


def clock(seconds):
  """1:02:03, 2:03 or 0:03."""
  hours, rest = divmod(int(seconds), 3600)
  return f'{hours}:{rest // 60:02d}:{rest % 60:02d}' if hours else f'{rest // 60}:{rest % 60:02d}'


def table(rows):
  """Lines of a table of (name, value) pairs."""
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'  {name:<{width}}  {value}' for name, value in rows)
