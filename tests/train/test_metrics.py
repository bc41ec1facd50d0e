"""train.metrics and train.peak: what is written again after a stop, what a clock sees, what a terminal shows."""

import json
import math
import os
import pty
import sys

import numpy as np
import pytest

from train import metrics, peak, sharding
from train.config import MeshConfig

SUMS = {'nll': 20.0, 'tokens': 10.0, 'byte_nll': 8 * math.log(2), 'bytes': 4.0, 'grad_norm': 2.0, 'learning_rate': 0.5}


def train_line(seconds):
  return {'seconds': seconds, 'tokens_per_second': 100.0, 'loss': 1.0}


def test_writer_cuts_off_what_is_beyond_the_checkpoint(tmp_path):
  writer = metrics.Writer(tmp_path, 0, has_tensorboard=False)
  for step in (5, 10, 15):
    writer.write('train', step, train_line(step / 5))
    writer.write('eval', step, {'bits_per_byte': 2.0})
  writer.write('not_finite', 8, {'loss': 'nan'})  # left out
  writer.write('not_finite', 16, {'loss': 'nan'})  # the run ended there
  writer.close()
  with open(tmp_path / 'metrics.jsonl', 'a', encoding='utf-8') as file:
    file.write('{"kind": "train", "st')
  writer = metrics.Writer(tmp_path, 10, has_tensorboard=True)
  assert (writer.seconds, writer.tokens) == (2.0, 200.0)
  writer.write('train', 12, train_line(2.5))
  writer.close()
  assert (writer.seconds, writer.tokens) == (2.5, 250.0)
  records = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  kinds = [(record['kind'], record['step']) for record in records]
  assert kinds == [('train', 5), ('eval', 5), ('train', 10), ('eval', 10), ('not_finite', 8), ('train', 12)]
  assert len(list((tmp_path / 'tb').iterdir())) == 1


def test_damaged_lines_are_left_out_and_kept_aside(tmp_path, capsys):
  writer = metrics.Writer(tmp_path, 0, has_tensorboard=False)
  for step in (5, 10, 15):
    writer.write('train', step, train_line(step / 5))
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  before = bytearray(path.read_bytes())
  before[before.index(b'"step": 10')] ^= 0x80  # no UTF-8 any more
  path.write_bytes(before)
  metrics.Writer(tmp_path, 20, has_tensorboard=False).close()
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [5, 15]
  assert (tmp_path / 'metrics.damaged.jsonl').read_bytes() == before
  assert '1 lines are damaged and left out' in capsys.readouterr().out


def test_a_board_that_cannot_be_written_to_holds_nothing_up(tmp_path, capsys):
  writer = metrics.Writer(tmp_path, 0, has_tensorboard=True)
  records = writer._board._file._py_recordio_writer
  records._writer.close()
  with open('/dev/full', 'wb', buffering=0) as full:
    records._writer = full
    for step in range(3):
      writer.write('train', step, train_line(float(step)))
    writer.close()
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3
  assert capsys.readouterr().err == f'{tmp_path}/tb: No space left on device; the run goes on without TensorBoard\n'
  (tmp_path / 'file').mkdir()
  (tmp_path / 'file' / 'tb').write_text('')
  writer = metrics.Writer(tmp_path / 'file', 0, has_tensorboard=True)
  writer.write('train', 1, train_line(1.0))
  writer.close()
  assert 'File exists; the run goes on' in capsys.readouterr().err


def test_a_board_has_what_was_written(tmp_path):
  from tensorboardX.proto import event_pb2

  writer = metrics.Writer(tmp_path, 4, has_tensorboard=True)
  writer.write('eval', 5, {'loss': 0.5, 'is_all': True, 'rows': ['x']})
  writer.close()
  (path,) = (tmp_path / 'tb').iterdir()
  data, events = path.read_bytes(), []
  while data:  # length, its checksum, the event, its checksum
    size = int.from_bytes(data[:8], 'little')
    events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  _, start, figure = events
  assert (start.step, start.session_log.status) == (5, event_pb2.SessionLog.START)
  assert figure.step == 5
  assert [(value.tag, value.simple_value) for value in figure.summary.value] == [('eval/loss', 0.5)]


def test_writer_that_is_off_writes_nothing(tmp_path):
  writer = metrics.Writer(tmp_path, 0, has_tensorboard=True, is_on=False)
  writer.write('train', 1, train_line(1.0))
  writer.close()
  assert not list(tmp_path.iterdir())


def test_window_divides_sums_and_leaves_out_pauses(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  window = metrics.Window()
  now[0] += 50.0
  window.pause(50.0)
  window.add(SUMS, is_timed=False)
  window.add(SUMS)
  now[0] += 2.0
  values = window.values(7.0, flops_per_token=3.0, peak=30.0)
  want = {'steps': 2, 'loss': 2.0, 'bits_per_byte': 2.0, 'tokens': 20, 'grad_norm': 2.0, 'learning_rate': 0.5}
  assert {name: values[name] for name in want} == pytest.approx(want)
  assert values['seconds'] == 9.0
  assert values['tokens_per_second'] == 5.0  # 10 timed tokens in 2 seconds
  assert values['mfu'] == 0.5
  assert window.steps == 0


def test_clock():
  assert [metrics.clock(s) for s in (3.9, 62, 3723)] == ['0:03', '1:02', '1:02:03']


VALUES = {'bits_per_byte': 2.125, 'tokens_per_second': 1234.0, 'mfu': 0.25}


def test_plain_lines_now_and_then(capsys, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  progress = metrics.Progress(0, 100, plain_seconds=10.0)
  for step in range(1, 101):
    progress.done(step)
    progress.show(VALUES)
    now[0] += 1.0
  progress.close()
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == 'step 1 of 100: 2.125 bits per byte, 1,234 tokens/s, 25% of peak'
  assert lines[1] == 'step 11 of 100: 2.125 bits per byte, 1,234 tokens/s, 25% of peak, 1:29 left'
  assert lines[-1].startswith('step 100 of 100')
  assert len(lines) == 11
  metrics.Progress(0, 1, plain_seconds=0.0, is_on=False).say('nothing')
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('terminal, is_bar', [('xterm', True), ('dumb', False)])
def test_bar_on_a_terminal(terminal, is_bar, capsys, monkeypatch):
  monkeypatch.setenv('TERM', terminal)
  monkeypatch.delenv('CI', raising=False)
  outside, inside = pty.openpty()
  with os.fdopen(inside, 'w') as stderr:
    monkeypatch.setattr(sys, 'stderr', stderr)
    progress = metrics.Progress(2, 8, plain_seconds=0.0)
    progress.done(6)
    progress.show(VALUES)
    progress.close()
    stderr.write('end')
    stderr.flush()
    shown = os.read(outside, 10000).decode()
  os.close(outside)
  assert ('6/8' in shown and '2.125 bits per byte' in shown) == is_bar
  assert ('step 6 of 8' in capsys.readouterr().out) != is_bar


def test_peak():
  mesh = sharding.make_mesh(MeshConfig(data=2))
  assert peak.flops(mesh, 5.0) == (5.0, 'given')  # the CPU devices share one machine
  figure, source = peak.flops(mesh)
  assert source == 'measured'
  assert 1e8 < figure < 1e15


@pytest.mark.parametrize(
  'kind, want',
  [('NVIDIA H200', 989e12), ('NVIDIA L40S', 362e12), ('NVIDIA L4', 121e12), ('TPU v5p', 459e12), ('TPU v5e', 197e12)],
)
def test_peak_table(kind, want):
  class Device:
    platform, device_kind = 'other', kind

  class Mesh:
    size, devices = 4, np.array([Device()] * 4)

  assert peak.flops(Mesh()) == (4 * want, 'table')
  Device.device_kind = 'something else'
  assert peak.flops(Mesh()) == (0.0, 'unknown')
