"""train.compile_report.aot: names of topologies, what they need, and what is said of those that there are not."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from train.compile_report import aot
from train.config import UserError

ROOT = pathlib.Path(__file__).parents[3]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')


@pytest.mark.parametrize('name', aot.EXAMPLES)
def test_examples_are_read(name):
  kind, sizes = aot.split(name)
  assert f'{kind}:{"x".join(map(str, sizes))}' == name


@pytest.mark.parametrize(
  'name', ['', 'v5e', 'v5e:', 'v5e:16*16', 'v9:2x2', 'h100:8', 'cpu:2x2', 'cpu:-1', 'v5e:16x16 ', ':4', 'v5e:x2']
)
def test_other_names_are_refused(name):
  with pytest.raises(UserError, match=r'--topology=.*v5e:16x16.*v5p:8x8x8'):
    aot.split(name)
  with pytest.raises(UserError, match='at least 1 chip'):
    aot.split('v5e:0x4')


def test_environment():
  assert aot.environment('cpu:3', {'XLA_FLAGS': '--a=1 --xla_force_host_platform_device_count=8'}) == {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--a=1 --xla_force_host_platform_device_count=3',
  }
  of_tpu = aot.environment('v6e:16x16', {})
  assert of_tpu['JAX_PLATFORMS'] == 'cpu' and of_tpu['ALLOW_MULTIPLE_LIBTPU_LOAD'] == '1'
  assert 'XLA_FLAGS' not in of_tpu


def test_processors():
  found, chip = aot.devices('cpu:4')
  assert found == jax.devices()[:4] and chip.name == 'cpu'
  with pytest.raises(UserError, match=r'has 8 CPU devices; set XLA_FLAGS=.*count=9'):
    aot.devices('cpu:9')


def test_without_libtpu(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'libtpu' else find(name, *a))
  with pytest.raises(UserError, match=r'pip install -e \.\[aot\]'):
    aot.devices('v5e:2x2')


ASK = """
import json, os, sys
from train.compile_report import aot
os.environ.update(aot.environment('v5e:2x2'))
from train.config import UserError
said = {}
for name in sys.argv[1:]:
  try:
    devices, chip = aot.devices(name)
    said[name] = [len(devices), devices[0].device_kind, chip.name]
  except UserError as error:
    said[name] = str(error)
print(json.dumps(said))
"""


@needs_libtpu
def test_devices_of_tpus():
  """In a process of its own: libtpu stays in the one that loads it."""
  names = ['v5e:16x16', 'v5p:8x8x8', 'v6e:16x16', 'v4:2x2x1', 'tpu7x:2x2x1', 'v5e:3x3']
  done = subprocess.run([sys.executable, '-c', ASK, *names], cwd=ROOT, env=os.environ, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  said = json.loads(done.stdout)
  assert 'no such arrangement' in said['v5e:3x3'] and 'v5e:16x16' in said['v5e:3x3']
  assert {name: said[name] for name in names[:5]} == {
    'v5e:16x16': [256, 'TPU v5 lite', 'v5e'],
    'v5p:8x8x8': [512, 'TPU v5', 'v5p'],
    'v6e:16x16': [256, 'TPU v6 lite', 'v6e'],
    'v4:2x2x1': [4, 'TPU v4', 'v4'],
    'tpu7x:2x2x1': [8, 'TPU7x', 'tpu7x'],
  }
  assert done.stderr == '', 'libtpu is quiet'
