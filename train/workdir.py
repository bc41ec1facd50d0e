"""The folder of a run: who may write to it, and what its files are called.

    config.json    the run's config and fingerprints        corpus.json    hash, files and sides of its text
    metrics.jsonl  one line per log.every steps, evaluation  result.json    at the end
    checkpoints/   of state and place in the data            tb/, profile/  for TensorBoard
    manifests/     of the files of checkpoints               bad_checkpoints/  those that were not whole
    data/          the text as tokens
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import shutil

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
  stored = read_json(workdir / CONFIG, ('config', 'corpus_hash'))
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
  steps = sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))
  return [step for step in steps if (workdir / MANIFESTS / f'{step}.json').exists()]


def finished(workdir, stored, config):
  """The contents of result.json if it is of all steps of `config`, evaluated as it says, else None."""
  if not stored or not (workdir / RESULT).exists():
    return None
  result = read_json(workdir / RESULT, ('steps',))
  is_same = result['steps'] == config.train.steps and result.get('eval_stride', 0) == config.eval.stride
  # Files that have moved are compared first, see `check_corpus`.
  return result if is_same and not configs.moved(stored['config'], configs.to_dict(config)) else None


def check_corpus(workdir, stored, corpus):
  """Refuses to go on with another text or other tokens than the run began with; what was prepared for it goes.

  Args:
    workdir: absolute path.
    stored: contents of config.json, or None for a new run.
    corpus: Corpus as it is now.

  Raises:
    UserError: a hash differs; the message names files that differ.
  """
  if not stored:
    return
  begun = read_json(workdir / CORPUS, ('files',)) if (workdir / CORPUS).exists() else {'files': []}
  if stored['corpus_hash'] == corpus.hash and begun.get('tokens', corpus.tokens) == corpus.tokens:
    return
  if corpus.is_new:
    shutil.rmtree(corpus.folder)
  if stored['corpus_hash'] == corpus.hash:
    raise UserError(
      f'workdir {workdir}: the tokens of the same text are others than when the run began, as of another version '
      'of the package tokenizers. Going on would mix two corpora: install the version that the run began with, and '
      'the same command goes on; or choose another workdir'
    )
  contents = lambda record: {path if side != 'tokenizer' else side: rest for path, side, *rest in record['files']}
  now, before = contents(corpus.record()), contents(begun)
  different = [name for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
  raise other_text(workdir, different, f' (hash {stored["corpus_hash"][:12]}, now {corpus.hash[:12]})')


def other_text(workdir, different, how=''):
  """The UserError of a run whose text is another one now, with the names of the files that differ."""
  shown = ', '.join(different[:5]) + (f' and {len(different) - 5} more' if len(different) > 5 else '')
  return UserError(
    f'workdir {workdir}: the text has changed since the run began{how}: {shown}. Going on would mix two corpora: '
    'restore the files, and the same command goes on; or choose another workdir'
  )


def check_models(workdir, stored, found):
  """Refuses to go on with another teacher than the run began with.

  Args:
    workdir: absolute path.
    stored: contents of config.json, or None for a new run.
    found: {setting: what train.initial.identity says of its folder} of those that are read now.

  Returns:
    The same of all that the run has read since it began.

  Raises:
    UserError: the contents of a folder differ.
  """
  begun = (stored or {}).get('models', {})
  for name, identity in found.items():
    if begun.get(name, identity) != identity:
      raise UserError(
        f'workdir {workdir}: what {name} names has changed since the run began: expected the model it began with, '
        'or another workdir'
      )
  return {**found, **begun}


def write_run(workdir, config, corpus, parameters, models):
  """Writes config.json, then corpus.json if it is not there."""
  values = {
    'config': configs.to_dict(config),
    'corpus_hash': corpus.hash,
    'parameters': parameters,
    'models': models,
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
  """Writes a file of JSON that is there whole or not at all."""
  write_whole(path, json.dumps(values, indent=1) + '\n')


def write_whole(path, text):
  """Writes a file that is there whole or not at all."""
  temporary = path.with_name(_temporary(path.name))
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def seal(values):
  """SHA-256 of what JSON can hold, written beside it in files that must tell when they are damaged."""
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def read_json(path, names=()):
  """The contents of a JSON file of a run; if there are `names`, an object that has at least these entries."""
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: expected a JSON file of a run, cannot read it ({error})') from error
  if names and not (isinstance(found, dict) and all(name in found for name in names)):
    raise UserError(f'{path}: expected a JSON file of a run, an object with {", ".join(names)}')
  return found


def _temporary(name):
  return f'.{name}.tmp'
