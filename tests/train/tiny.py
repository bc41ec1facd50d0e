"""A corpus and a config so small that a run takes seconds, and what the tests read of a run."""

import json
import random

import jax
import numpy as np

from models.config import DecoderConfig, LayerSpec
from train import checkpoint, program, sharding, workdir as workdirs
from train.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  LogConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)

WORDS = ['alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta', 'eta', 'theta', 'iota', 'kappa', 'λ', 'μ']


def write_corpus(folder, packages=12, files=2, words=60):
  """Folders p0, p1, ... of text files f0.txt, ...; returns the path."""
  rng = random.Random(0)
  for p in range(packages):
    (folder / f'p{p}').mkdir(parents=True)
    for f in range(files):
      text = ' '.join(rng.choice(WORDS) for _ in range(words + rng.randrange(9)))
      (folder / f'p{p}' / f'f{f}.txt').write_text(text, encoding='utf-8')
  return str(folder)


def config(source, **changes):
  """A Config of a one-block model on one device; changes are sections or single fields: train={'steps': 3}, seed=1."""
  made = Config(
    model=DecoderConfig(vocab=260, width=16, depth=1, heads=2, layers=[LayerSpec(window=8)]),
    data=DataConfig(source=source, held_out_percent=20, seq_len=16, batch=8),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
    train=TrainConfig(steps=12, peak_flops=1e12),
    mesh=MeshConfig(data=1),
    eval=EvalConfig(bytes=64, batch=4),
    checkpoint=CheckpointConfig(seconds=0.0),
    log=LogConfig(every=5, tensorboard=False, plain_seconds=0.0),
  )
  for name, values in changes.items():
    if isinstance(values, dict):
      for field, value in values.items():
        assert hasattr(getattr(made, name), field), field
        setattr(getattr(made, name), field, value)
    else:
      setattr(made, name, values)
  return made


def lines(workdir, kind):
  """The records of one kind in metrics.jsonl."""
  with open(workdir / workdirs.METRICS, encoding='utf-8') as file:
    return [record for record in map(json.loads, file) if record['kind'] == kind]


def computed(workdir):
  """The train lines of a run without what a clock says."""
  return [
    {name: record[name] for name in ('step', 'steps', 'loss', 'bits_per_byte', 'tokens', 'grad_norm', 'learning_rate')}
    for record in lines(workdir, 'train')
  ]


class Place:
  """Stands for the iterator where only a checkpoint is read."""

  state: dict | None = None

  def get_state(self):
    return self.state

  def set_state(self, state):
    self.state = state


def saved(workdir, config):
  """(step, list of all arrays) of the newest checkpoint: parameters, optimizer state, averages, counts."""
  made = program.make(config, sharding.make_mesh(config.mesh))
  with checkpoint.Checkpoints(workdir, config.checkpoint) as kept:
    step, state = kept.restore(made.abstract, made.placed, Place())
  return step, [np.asarray(x) for x in jax.tree.leaves(state)]
