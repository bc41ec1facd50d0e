"""train.config: each setting that does not fit is refused by name; configs survive being written down."""

import json

import pytest

from tests.train import tiny
from train import config as configs
from train.config import Config, UserError


def changed(path, value):
  made = tiny.config('text')
  *parents, name = path.split('.')
  record = made
  for parent in parents:
    record = record.layers[0] if parent == 'layer' else getattr(record, parent)
  setattr(record, name, value)
  return made


@pytest.mark.parametrize(
  'path, value, words',
  [
    ('seed', -1, r'config.seed=-1: expected a number from 0'),
    ('train.steps', 0, r'train.steps=0 must be an integer, 1 or more'),
    ('train.steps', 1e3, r'train.steps=1000.0: expected int, got float'),
    ('train.steps', True, r'train.steps=True: expected int'),
    ('train.accumulate', 3, r'train.accumulate=3: expected a divisor of data.batch=8'),
    ('train.loss_chunk', 5, r'train.loss_chunk=5: expected a divisor of data.seq_len=16'),
    ('data.seq_len', 0, r'data.seq_len=0 must be an integer, 1 or more'),
    ('data.batch', 0, r'data.batch=0'),
    ('data.bad_files', 'warn', r"data.bad_files='warn' must be one of 'error', 'skip'"),
    ('data.source', 3, r'data.source=3: expected str'),
    ('data.held_out_percent', 0.0, r'data.held_out_percent=0.0: expected a number from 0.1 to 50'),
    ('model.vocab', 256, r'model.vocab=256: expected at least 257'),
    ('model.heads', 3, r'model.heads=3'),
    ('model.layer.window', 17, r'model.layers\[0\].window=17: expected at most data.seq_len=16'),
    ('model.layer.chunk', 17, r'model.layers\[0\].chunk=17: expected at most'),
    ('model.layer.window', '8', r"model.layers\[0\].window='8': expected int, got str"),
    ('model.layers', [3], r'model.layers=\[3\]: expected a list of LayerSpec'),
    ('model', 'large', r"model='large': expected a DecoderConfig"),
    ('mesh.data', 0, r'mesh.data=0: expected -1'),
    ('mesh.tensor', 0, r'mesh.tensor=0'),
    ('eval.stride', 17, r'eval.stride=17: expected at most data.seq_len=16'),
    ('optimizer.schedule', 'linear', r"optimizer.schedule='linear' must be one of"),
    ('optimizer.learning_rate', float('nan'), r'optimizer.learning_rate=nan: expected a finite number'),
    ('optimizer.b2', 1.0, r'optimizer.b2=1.0: expected a number from 0, below 1$'),
    ('train.ema_decay', 1.0, r'train.ema_decay=1.0: expected a number from 0, below 1$'),
    ('optimizer.eps', 0.0, r'optimizer.eps=0.0: expected a number above 0'),
    ('optimizer.decay_fraction', 1.5, r'optimizer.decay_fraction=1.5: expected a number from 0 to 1'),
    ('checkpoint.keep', 0, r'checkpoint.keep=0'),
    ('train.stepz', 3, r'train.stepz: TrainConfig has no such field; it has steps,'),
    ('model.layer.windw', 3, r'model.layers\[0\].windw: LayerSpec has no such field'),
  ],
)
def test_rejects(path, value, words):
  with pytest.raises(UserError, match=words):
    configs.load(changed(path, value))


def test_rejects_another_type():
  with pytest.raises(UserError, match='config is a dict'):
    configs.load({})


def test_load_copies():
  made = tiny.config('text')
  loaded = configs.load(made)
  made.model.layers[0].window = 3
  assert loaded.model.layers[0].window == 8
  assert configs.load(Config()) == Config()


def test_written_and_read_again():
  made = tiny.config('text', seed=3, train={'steps': 7})
  values = json.loads(json.dumps(configs.to_dict(made)))
  assert configs.from_dict(Config, values) == made
  values['optimizer']['momentun'] = 1
  with pytest.raises(UserError, match="OptimizerConfig has no field 'momentun'"):
    configs.from_dict(Config, values)


def test_differences():
  old = configs.to_dict(tiny.config('text'))
  new = tiny.config('text', seed=1, train={'steps': 99}, log={'every': 7}, mesh={'fsdp': 2})
  new.model.layers[0].window = 4
  assert configs.differences(old, configs.to_dict(new)) == ['seed: 0 -> 1', 'model.layers[0].window: 8 -> 4']
  new.model.layers.append(new.model.layers[0])
  assert configs.differences(old, configs.to_dict(new))[2] == "model.layers[1].mixer: '(none)' -> 'attention'"
