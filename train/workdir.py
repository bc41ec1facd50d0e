"""The folder of a run: who may write to it, and what its files are called.

    config.json    the run's config and fingerprints        corpus.json    hash, files and sides of its text
    metrics.jsonl  one line per log.every steps, evaluation  result.json    at the end
    checkpoints/   of state and place in the data            tb/, profile/  for TensorBoard
    manifests/     of the files of checkpoints               bad_checkpoints/  those that were not whole
    data/          the text as tokens
"""

import contextlib
import fcntl
import json
import os
import pathlib
import platform

from train import config as configs
from train.config import UserError

CONFIG, CORPUS, METRICS, RESULT = 'config.json', 'corpus.json', 'metrics.jsonl', 'result.json'
CHECKPOINTS, MANIFESTS, BAD_CHECKPOINTS = 'checkpoints', 'manifests', 'bad_checkpoints'
LOCK, DATA = '.lock', 'data'


def expand(path):
  """Absolute pathlib.Path; ~ is the home folder."""
  if not str(path):
    raise UserError("--workdir='': expected the path of a folder for the run")
  return pathlib.Path(os.path.abspath(os.path.expanduser(path)))


def check(workdir, config):
  """Refuses a folder that a run of `config` must not write to. Changes nothing.

  Args:
    workdir: absolute path.
    config: checked Config.

  Returns:
    The contents of config.json of the run that is there, or None if the folder is new or empty.

  Raises:
    UserError: not a folder, files that are not a run, a run of another config, whose fields are named, one that has
      done more steps, or a finished one without checkpoints to go on from.
  """
  if not workdir.exists():
    return None
  if not workdir.is_dir():
    raise UserError(f'workdir {workdir}: expected a folder, found a file')
  if not (workdir / CONFIG).exists():
    # What is prepared before a run begins may have been stopped, or made by train.prepare.
    others = sorted(path.name for path in workdir.iterdir() if path.name not in (LOCK, _temporary(CONFIG), DATA))
    if others:
      shown = ', '.join(others[:3]) + (f' and {len(others) - 3} more' if len(others) > 3 else '')
      raise UserError(f'workdir {workdir}: expected a new or empty folder or a run, found {shown}; nothing was changed')
    return None
  stored = read_json(workdir / CONFIG)
  changed = configs.differences(stored['config'], configs.to_dict(config))
  if changed:
    raise UserError(
      f'workdir {workdir} holds a run of another config; nothing was changed. Choose another workdir, or undo:\n  '
      + '\n  '.join(changed)
    )
  done = max(saved_steps(workdir), default=0)
  if done > config.train.steps:
    raise UserError(f'train.steps={config.train.steps}: expected at least the {done} steps that {workdir} has done')
  if (workdir / RESULT).exists() and not done and not finished(workdir, stored, config):
    raise UserError(f'workdir {workdir}: expected a checkpoint of its finished run, found none; nothing was changed')
  return stored


def saved_steps(workdir):
  """Steps of the checkpoints whose save was finished, which is when their manifest is written, in order."""
  names = [path.name for path in (workdir / CHECKPOINTS).glob('*')]
  steps = sorted(int(name) for name in names if name.isascii() and name.isdigit())
  return [step for step in steps if (workdir / MANIFESTS / f'{step}.json').exists()]


def finished(workdir, stored, config):
  """The contents of result.json if it is of all steps of `config`, evaluated as it says, else None."""
  if not stored or not (workdir / RESULT).exists():
    return None
  result = read_json(workdir / RESULT)
  is_same = result['steps'] == config.train.steps and result.get('eval_stride', 0) == config.eval.stride
  return result if is_same else None


def check_corpus(workdir, stored, corpus):
  """Refuses to go on with another text than the run began with.

  Args:
    workdir: absolute path.
    stored: contents of config.json, or None for a new run.
    corpus: Corpus as it is now.

  Raises:
    UserError: the hash differs; the message names files that differ.
  """
  if not stored or stored['corpus_hash'] == corpus.hash:
    return
  contents = lambda record: {name: rest for name, _, *rest in record['files']}
  now = contents(corpus.record())
  before = contents(read_json(workdir / CORPUS)) if (workdir / CORPUS).exists() else {}
  different = [name for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
  shown = ', '.join(different[:5]) + (f' and {len(different) - 5} more' if len(different) > 5 else '')
  raise UserError(
    f'workdir {workdir}: the text has changed since the run began (hash {stored["corpus_hash"][:12]}, now '
    f'{corpus.hash[:12]}): {shown}. Going on would mix two corpora: restore the files, or choose another workdir'
  )


def write_run(workdir, config, corpus, parameters):
  """Writes config.json, then corpus.json if it is not there."""
  values = {
    'config': configs.to_dict(config),
    'corpus_hash': corpus.hash,
    'parameters': parameters,
    'python': platform.python_version(),
  }
  write_json(workdir / CONFIG, values)
  if not (workdir / CORPUS).exists():
    write_json(workdir / CORPUS, corpus.record())


@contextlib.contextmanager
def lock(workdir):
  """Context: makes the folder and has it for this process. The lock ends with the process, however that ends.

  Raises:
    UserError: another process has it, or the folder cannot be made or written to.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / LOCK, 'a+', encoding='utf-8')  # noqa: SIM115 - closed below
  except OSError as error:
    raise UserError(f'workdir {workdir}: cannot be written to ({error.strerror})') from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(f'workdir {workdir} is in use by process {file.read().strip() or "unknown"}') from error
    file.truncate(0)
    file.write(f'{os.getpid()}\n')
    file.flush()
    yield


def write_json(path, values):
  """Writes a file that is there whole or not at all."""
  temporary = path.with_name(_temporary(path.name))
  with open(temporary, 'w', encoding='utf-8') as file:
    json.dump(values, file, indent=1)
    file.write('\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def read_json(path):
  """The contents of a JSON file of a run."""
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: expected a JSON file of a run, cannot read it ({error})') from error


def _temporary(name):
  return f'.{name}.tmp'
