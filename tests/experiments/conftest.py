"""One small finished run for all tests of this folder."""

import pytest

from models.config import DecoderConfig, LayerSpec
from train import loop
from train.config import Config, DataConfig, EvalConfig, LogConfig, OptimizerConfig, TrainConfig

CLASS = '''class Number{i}:
    def __init__(self, value, name):
        self.value = value
        self.name = name < 'é' & "<script>alert({i})</script>"

'''


@pytest.fixture(scope='session')
def texts(tmp_path_factory):
  """A folder of text files that look like markup to a careless report."""
  folder = tmp_path_factory.mktemp('texts')
  for i in range(8):
    (folder / f'part{i}.py').write_text('# <b>&amp;\n' + CLASS.format(i=i) * 8, encoding='utf-8')
  return folder


@pytest.fixture(scope='session')
def finished(tmp_path_factory, texts):
  """The workdir of a run of 6 steps."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  config = Config(
    model=DecoderConfig(vocab=288, width=32, depth=2, heads=2, layers=[LayerSpec(window=16), LayerSpec()]),
    data=DataConfig(source=str(texts), seq_len=48, batch=8, held_out_percent=20.0),
    optimizer=OptimizerConfig(warmup_steps=0),
    train=TrainConfig(steps=6),
    eval=EvalConfig(every=3, bytes=512),
    log=LogConfig(every=2, tensorboard=False),
  )
  loop.run(config, workdir)
  return workdir
