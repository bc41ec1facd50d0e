"""What a finished or stopped training run has left in its folder, read for reports and records."""

import dataclasses
import json
from typing import Any

from models import size
from train import checkpoint, workdir as workdirs
from train.config import Config, UserError
from train.data import store
from train.data.corpus import HELD_OUT


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as its files tell it.

  Attributes:
    workdir: absolute path.
    config: train.config.Config.
    stored: contents of config.json.
    corpus: contents of corpus.json.
    result: contents of result.json; {} if the run is not finished, or has been taken up again for more steps.
    train: lines of kind 'train', each with `tokens_so_far` added.
    held_out: lines of kind 'eval', the same.
    parameters: number of them.
  """

  workdir: Any
  config: Config
  stored: dict
  corpus: dict
  result: dict
  train: list[dict]
  held_out: list[dict]
  parameters: int

  @property
  def steps(self):
    """Steps done, as far as the metrics tell."""
    return self.train[-1]['step'] if self.train else 0

  @property
  def seconds(self):
    """Seconds of training: compiling, evaluating and saving left out."""
    return self.train[-1]['seconds'] if self.train else 0.0

  @property
  def tokens_per_second(self):
    """Mean over the run."""
    so_far = self.train[-1]['tokens_so_far'] / self.seconds if self.seconds else 0.0
    return self.result.get('tokens_per_second', so_far)

  @property
  def mfu(self):
    """Model FLOPs use: mean over steps; 0 if the device's peak is unknown."""
    so_far = sum(line['mfu'] * line['steps'] for line in self.train) / max(self.steps, 1)
    return self.result.get('mfu', so_far)

  @property
  def date(self):
    """Day on which the run ended, or ''."""
    return self.result.get('date', '')[:10]

  @property
  def device(self):
    """What it ran on, or '' if it is not finished."""
    return self.result.get('device', '')

  @property
  def final(self):
    """The last evaluation: of all held-out bytes if the run is finished. None if there was none."""
    return self.held_out[-1] if self.held_out else None


def read(workdir):
  """The Run of a workdir.

  Raises:
    UserError: no run there, or one that has not done a step.
  """
  workdir = workdirs.expand(workdir)
  config = checkpoint.read_config(workdir)
  stored = workdirs.read_json(workdir / workdirs.CONFIG)
  train, held_out = _lines(workdir / workdirs.METRICS)
  if not train:
    raise UserError(f'workdir {workdir}: expected a run of some steps, found none in {workdirs.METRICS}')
  return Run(
    workdir,
    config,
    stored,
    workdirs.read_json(workdir / workdirs.CORPUS),
    workdirs.finished(workdir, stored, config) or {},
    train,
    held_out,
    size.parameters(config.model),
  )


def held_out_files(run):
  """[(name, bytes)] of the held-out documents of a run, in the order of their names.

  Raises:
    UserError: the text is not what it was when the run began, or the run is of token ids without a text.
  """
  corpus = store.open_or_prepare(run.config.data, run.workdir)
  workdirs.check_corpus(run.workdir, run.stored, corpus)
  return list(store.texts(run.config.data, corpus, HELD_OUT))


def _lines(path):
  """Lines of kind 'train' and of kind 'eval', with the tokens trained on so far."""
  if not path.exists():
    return [], []
  train, held_out, tokens = [], [], 0
  with open(path, encoding='utf-8') as file:
    for line in file:
      try:
        record = json.loads(line)
      except ValueError:
        break  # torn by a crash: it was the last
      if record['kind'] == 'train':
        tokens += record['tokens']
        train.append(record | {'tokens_so_far': tokens})
      elif record['kind'] == 'eval':
        held_out.append(record | {'tokens_so_far': tokens})
  return train, held_out
