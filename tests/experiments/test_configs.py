"""Every experiment's config is one that a run accepts, and says what its docstring claims."""

import importlib
import pathlib

import pytest

import experiments
from train import config as configs

FOLDER = pathlib.Path(experiments.__file__).parent
NAMES = [path.stem for path in sorted(FOLDER.glob('*.py')) if 'def get_config(' in path.read_text(encoding='utf-8')]


@pytest.mark.parametrize('name', NAMES)
def test_config_loads_and_documents_itself(name):
  module = importlib.import_module(f'experiments.{name}')
  configs.load(module.get_config())
  first, *_ = module.__doc__.splitlines()
  assert first.endswith('?'), 'the docstring begins with the question'
  for word in (f'--config=experiments/{name}.py', 'Claim:', 'Cost:', 'Result:'):
    assert word in module.__doc__


@pytest.mark.parametrize('name', ['quickstart', 'quickstart_long'])
def test_layers_alternate_window_and_full(name):
  config = importlib.import_module(f'experiments.{name}').get_config()
  windows = [config.model.spec(layer).window for layer in range(config.model.depth)]
  assert all(bool(window) == (layer % 2 == 0) for layer, window in enumerate(windows))
  assert config.data.source == 'python_stdlib'


def test_the_longer_run_has_the_split_of_the_short_one():
  of = lambda name: importlib.import_module(f'experiments.{name}').get_config().data
  short, long = of('quickstart'), of('quickstart_long')
  for field in ('source', 'held_out', 'held_out_percent', 'split_seed', 'bad_files'):
    assert getattr(short, field) == getattr(long, field)
