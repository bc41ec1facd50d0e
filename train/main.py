"""Trains a language model on text.

  python -m train.main --config=experiments/quickstart.py --workdir=DIR [--config.FIELD=VALUE ...]

  --config   a Python file whose get_config() returns a train.config.Config
  --workdir  the folder of the run. The same command again goes on where the run stopped
  --config.train.steps=500, --config.model.layers[0].window=64, --config.distill.layers=[0,2], ...
             change single fields; 0 and '' mean off. Lists of records get their entries in the config file

Ctrl-C and SIGTERM finish the step, save and end; a second one, or one before the first step, stops at once. With more
than one process, start each with --distributed (and on plain machines --coordinator, --processes, --process); they
share the workdir. A signal to one stops all; when one ends with an error or is gone, all end (a process that says
nothing is gone after --heartbeat_seconds, 20). See docs/training.md, docs/data.md, docs/finetuning.md, docs/scaling.md.

Exit status: 0 done, or saved after SIGTERM (result.json is there only when all steps are done); 1 the loss is not
finite, or a traceback tells; 2 a setting, file or folder does not fit; 3 a checkpoint or another file could not be
written; 4 (or 134, where jax ends a process itself) another process of the run is gone, or did not come within two
minutes; 130 saved after Ctrl-C; 128 + the number of a second signal, which ends all processes at once.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import signal
import sys
import traceback
import typing
import warnings

if __name__ == '__main__':
  # Until a run watches for them, signals end the process: nothing is lost, and the imports take seconds.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

from absl import app, flags
from ml_collections import config_flags

from train.config import Config, UserError


class _Numbers(flags.ArgumentParser):
  """A list of numbers."""

  def parse(self, argument):
    if isinstance(argument, list):  # the default
      return argument
    try:
      found = ast.literal_eval(argument)
    except (SyntaxError, ValueError):
      found = None
    if not isinstance(found, list) or not all(isinstance(x, (int, float)) for x in found):
      raise ValueError('not numbers in brackets, such as [0,2]')
    return found

  def flag_type(self):
    return 'list'


config_flags.register_flag_parser_for_type(list, _Numbers())
_CONFIG = config_flags.DEFINE_config_file('config', None, 'Python file whose get_config() returns a Config.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other processes of this run (jax.distributed).')
_COORDINATOR = flags.DEFINE_string('coordinator', '', 'host:port of process 0; "" lets jax find it on a cluster.')
_PROCESSES = flags.DEFINE_integer('processes', 0, 'Number of processes; 0 lets jax find it.')
_PROCESS = flags.DEFINE_integer('process', -1, 'Number of this process, from 0; -1 lets jax find it.')
_HEARTBEAT = flags.DEFINE_integer('heartbeat_seconds', 20, 'Seconds of silence after which a process counts as gone.')


def main(argv):
  """Runs; every expected failure is one line on stderr and an exit status."""
  from train import checkpoint, interrupt, loop, processes

  interrupt.end_at_once()
  try:
    if len(argv) > 1:
      raise UserError(f'{argv[1]!r}: expected only flags')
    if not _WORKDIR.value:
      raise UserError("--workdir='': expected the path of a folder for the run")
    _quiet()
    _join()
    loop.run(_CONFIG.value, _WORKDIR.value)
  except UserError as error:
    return _fail(error, 2)
  except loop.NotFinite as error:
    return _fail(error, 1)
  except checkpoint.SaveFailed as error:
    return checkpoint.leave(_fail(error, 3))
  except OSError as error:  # of the files beside checkpoints: a full disk, a folder that is gone
    where = error.filename or _WORKDIR.value
    return checkpoint.leave(_fail(f'{where}: {error.strerror or error}; the same command goes on', 3))
  except interrupt.Interrupted as stop:
    print(f'train: {stop} and saved; the same command continues', file=sys.stderr, flush=True)
    return interrupt.status(stop.signal)
  except Exception as error:
    if processes.is_joined():
      processes.end_of(error)
    traceback.print_exception(error)
    return checkpoint.leave(1)
  return 0


def parse(argv, program='train'):
  """Flags of a command line. A bad one ends the program with a line that names both, status 2."""
  if any(arg in ('--help', '-h', '-help', '--helpshort', '--helpfull') for arg in argv[1:]):
    print(usage())
    sys.exit(0)
  kinds: dict[str, str] = {}
  try:
    kinds = check(argv[1:])
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)  # in ml_collections
      return flags.FLAGS(argv)
  except UserError as error:
    sys.exit(_fail(error, 2, program))
  except flags.IllegalFlagValueError as error:
    named = next((name for name in kinds if f'--{name}=' in str(error)), '')
    sys.exit(_fail(f'{error}' + (f'; expected {kinds[named]}' if named else ''), 2, program))
  except flags.Error as error:
    sys.exit(_fail(f'{error}{_meant(argv)}', 2, program))


def check(args):
  """Checks the config file and the fields that are set, before absl does, for the sake of the messages.

  Args:
    args: command line without the program.

  Returns:
    {'config.model.width': 'int', ...}, the fields that are set and their types.

  Raises:
    UserError: no such file or field; the message names it and fields of similar names.
  """
  paths = [arg.split('=', 1)[1] for arg in args if re.match('--?config=', arg)]
  paths += [args[i + 1] for i, arg in enumerate(args[:-1]) if re.fullmatch('--?config', arg)]
  if not paths:
    raise UserError('--config: expected a Python file with get_config(), such as --config=experiments/quickstart.py')
  path, *argument = paths[-1].split(':', 1)
  if not os.path.isfile(path):
    raise UserError(f'--config={path}: expected a Python file, found nothing at this path')
  spec = importlib.util.spec_from_file_location('experiment', path)
  if spec is None or spec.loader is None:
    raise UserError(f'--config={path}: expected a Python file (.py)')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise UserError(f'--config={path}: expected a function get_config in it')
  config = module.get_config(*argument)
  set_fields = [match[1] for arg in args if (match := re.match(r'--?(?:no)?config\.([^=]+)', arg))]
  return {f'config.{path}': type(field(config, path)).__name__ for path in set_fields}


def field(config, path):
  """The value of the field `path`, such as 'model.layers[0].window'; UserError if a config has no such field."""
  kind: typing.Any = None
  record, done = config, 'config'
  for name in re.sub(r'\[', '.[', path).split('.'):
    if isinstance(record, list):
      if not record:
        raise UserError(f'--config.{path}: {done} is empty, expected entries in the config file to change fields of')
      if not re.fullmatch(r'\[-?\d+\]', name) or not -len(record) <= int(name[1:-1]) < len(record):
        raise UserError(f'--config.{path}: expected an index of {done}, from [0] to [{len(record) - 1}], got {name!r}')
      record, kind = record[int(name[1:-1])], None
    elif dataclasses.is_dataclass(record) and hasattr(record, name):
      record, kind = getattr(record, name), typing.get_type_hints(type(record)).get(name)
    else:
      names = [field.name for field in dataclasses.fields(record)] if dataclasses.is_dataclass(record) else []
      near = difflib.get_close_matches(name, names, n=2) or _elsewhere(name, config)
      hint = f'; did you mean {" or ".join(near)}?' if near else f'; it has {", ".join(names)}' if names else ''
      raise UserError(f'--config.{path}: {done} has no field {name!r}{hint}')
    done += name if name.startswith('[') else f'.{name}'
  if item := _item(kind):
    raise UserError(
      f'--config.{path}: expected a single value, this is a list of {item.__name__}; make its entries in the config '
      f'file, and change their fields, as --config.{path}[0].{dataclasses.fields(item)[0].name}'
    )
  if dataclasses.is_dataclass(record):
    raise UserError(f'--config.{path}: expected a single value, this is a {type(record).__name__}; set its fields')
  return record


def _item(kind):
  """The dataclass of the items of a type that is a list of records, else None."""
  item = next(iter(typing.get_args(kind)), None)
  return item if typing.get_origin(kind) is list and dataclasses.is_dataclass(item) else None


def _elsewhere(name, config):
  """Full names of fields called `name` in the sections of a config."""
  sections = [field.name for field in dataclasses.fields(config)]
  return [f'{section}.{name}' for section in sections if hasattr(getattr(config, section), name)]


def _meant(argv):
  """A hint for flags that lack their section, such as --steps for --config.train.steps."""
  for arg in argv[1:]:
    name = re.sub('^--?', '', arg).split('=')[0].split('.')[-1]
    if '.' not in arg.split('=')[0] and name not in flags.FLAGS and _elsewhere(name, Config()):
      return f' (config fields are written --config.{_elsewhere(name, Config())[0]}=...)'
  return ''


def usage():
  """The text of --help: this module's, then every field of a config with its default."""
  lines = [inspect.cleandoc(__doc__ or ''), '', 'Fields and defaults (a config file may set others):']

  def describe(record, prefix):
    text = inspect.cleandoc(type(record).__doc__ or '').split('Attributes:')[-1]
    told = {match[1]: ' '.join(match[2].split()) for match in re.finditer(r'^ {2}(\w+): ((?:.|\n {4})*)', text, re.M)}
    hints = typing.get_type_hints(type(record))
    for name, value in vars(record).items():
      if dataclasses.is_dataclass(value):
        lines.append('')
        describe(value, f'{prefix}.{name}')
      elif item := _item(hints[name]):
        lines.append(f'  {prefix}.{name}: {told.get(name, "")}')
        lines.append('        Entries are made in the config file. Fields of the first:')
        describe(item(), f'{prefix}.{name}[0]')
      else:
        lines.append(f'  --{prefix}.{name}={value!r}\n        {told.get(name, "")}')

  describe(Config(), 'config')
  return '\n'.join(lines)


def _quiet():
  """Libraries say only what went wrong; Orbax raises it."""
  from train import checkpoint

  checkpoint.quiet()


def _join():
  """Joins the other processes of a run."""
  if _DISTRIBUTED.value:
    from train import processes

    processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, heartbeat_seconds=_HEARTBEAT.value)


def _fail(message, status, program='train'):
  """Says what went wrong, and ends all processes of the run."""
  processes = sys.modules.get('train.processes')  # a bad flag is found before the import
  if processes and processes.is_joined():
    processes.end(message, status)
  print(f'{program}: {message}', file=sys.stderr, flush=True)
  return status


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
