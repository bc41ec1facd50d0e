"""Compiles the training step of a config for machines that are not here, and says what it needs of them.

  python -m train.compile_report --config=experiments/seven_b.py --topology=v5e:16x16 [--config.FIELD=VALUE ...]

  --config      as of train.main: a Python file whose get_config() returns a train.config.Config
  --topology    chips and how they are arranged: v5e:16x16, v5p:8x8x8, v6e:16x16, ... or cpu:8
  --json        also write the figures to this file
  --in_process  compile in this process and show all that the compiler prints

TPU topologies need `pip install -e .[aot]`. The program is that of the trainer, compiled by the compiler of the chip:
bytes and collectives are what a run would have. Times are a roofline, never a measurement.

Exit status: 0 the step fits into memory; 1 the compiler failed; 2 a setting does not fit; 3 the step does not fit.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from train import config as configs, main as entry
from train.compile_report import aot
from train.config import UserError

_TOPOLOGY = flags.DEFINE_string('topology', '', 'Chips and how they are arranged, such as v5e:16x16.')
_JSON = flags.DEFINE_string('json', '', 'File to write the figures to.')
_IN_PROCESS = flags.DEFINE_bool('in_process', False, 'Compile in this process.')
OURS = 'compile_report: '  # how lines of this program begin, among those of a compiler


def main(argv):
  """Reports; every expected failure is one line on stderr and an exit status."""
  from train.compile_report import facts as gathered

  try:
    if len(argv) > 1:
      raise UserError(f'{argv[1]!r}: expected only flags')
    environment = aot.environment(_TOPOLOGY.value)
    config = configs.load(flags.FLAGS.config)
    if _JSON.value and not os.path.isdir(os.path.dirname(os.path.abspath(_JSON.value))):
      raise UserError(f'--json={_JSON.value!r}: expected a file in a folder that is there')
    if not _IN_PROCESS.value:
      return _supervise(environment)
    os.environ.update(environment)
    return _report(config)
  except UserError as error:
    return _fail(error, 2)
  except gathered.CompilerError as error:
    return _fail(f'the compiler failed: {error}', 1)


def _report(config):
  """Prints the report; 0 or 3."""
  from train.compile_report import advice, facts as gathered, page

  facts = gathered.gather(config, _TOPOLOGY.value)
  suggestions = advice.advise(facts, config)
  if _JSON.value:
    with open(_JSON.value, 'w', encoding='utf-8') as file:
      json.dump({**facts, 'suggestions': suggestions}, file, indent=1)
      file.write('\n')
  print(page.page(facts, suggestions), flush=True)
  return 0 if facts['fits'] else 3


def _supervise(environment):
  """Runs this command in a process of its own: a compiler that aborts ends that one alone, and prints what it likes."""
  command = [sys.executable, '-m', 'train.compile_report', *sys.argv[1:], '--in_process']
  with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+', errors='replace') as err:
    child = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **environment})
    try:
      _wait(child)
    except KeyboardInterrupt:
      child.kill()
      child.wait()
      return 130
    for file in (out, err):
      file.seek(0)
    print(out.read(), end='', flush=True)
    said = err.read().splitlines()
  ours = [line for line in said if line.startswith(OURS)]
  if child.returncode in (0, 1, 2, 3) and (ours or child.returncode in (0, 3)):
    print(*ours, sep='\n', end='\n' if ours else '', file=sys.stderr, flush=True)
    return child.returncode
  last = [line for line in said if line.strip()][-12:]
  how = f'by signal {-child.returncode}' if child.returncode < 0 else f'with status {child.returncode}'
  return _fail('\n  '.join([f'the compiler ended {how}; --in_process shows all it prints. Its last lines:', *last]), 1)


def _wait(child):
  """Waits for the process that compiles; says on stderr for how long."""
  began, shown, is_terminal = time.monotonic(), 0.0, sys.stderr.isatty()
  say = lambda text, end: print(text, end=end, file=sys.stderr, flush=True)
  if not is_terminal:
    say(f'compiling for {_TOPOLOGY.value}: a minute or more for a large model', '\n')
  while child.poll() is None:
    time.sleep(0.1)
    seconds = time.monotonic() - began
    if is_terminal and seconds - shown >= 1:
      shown = seconds
      say(f'\rcompiling for {_TOPOLOGY.value}: {seconds:.0f} s', '')
  if is_terminal:
    say('\r\033[K', '')


def _fail(message, status):
  print(f'{OURS}{message}', file=sys.stderr, flush=True)
  return status


def _parse(argv):
  if any(arg in ('--help', '-h', '-help', '--helpshort', '--helpfull') for arg in argv[1:]):
    print(inspect.cleandoc(__doc__ or ''))
    sys.exit(0)
  return entry.parse(argv)


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
