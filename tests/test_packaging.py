"""The wheel holds attn and kernels_pallas, and nothing of the names that would clash in somebody's environment."""

import email
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXTRAS = {'train', 'test', 'hf', 'data', 'draw', 'tpu', 'cuda13', 'aot', 'bench', 'notebooks'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp('packaging')
  source = folder / 'source'
  source.mkdir()
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  for name in ('attn', 'kernels_pallas', 'models', 'train', 'experiments', 'tests'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-index']
  run = subprocess.run([*command, '--wheel-dir', folder, source], capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr[-3000:]
  (path,) = folder.glob('attnloom-*.whl')
  return zipfile.ZipFile(path)


def test_holds_attn_and_kernels_pallas_only(wheel):
  tops = {name.split('/')[0] for name in wheel.namelist()}
  assert {top for top in tops if not top.endswith('.dist-info')} == {'attn', 'kernels_pallas'}


def test_holds_every_module(wheel):
  paths = [path for package in ('attn', 'kernels_pallas') for path in (ROOT / package).rglob('*.py')]
  expected = {path.relative_to(ROOT).as_posix() for path in paths}
  assert {name for name in wheel.namelist() if name.endswith('.py')} == expected


def test_says_what_it_is(wheel):
  (name,) = (name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))
  metadata = email.message_from_bytes(wheel.read(name))
  assert metadata['Name'] == 'attnloom'
  assert metadata['License-Expression'] == 'Apache-2.0'
  assert set(metadata.get_all('Provides-Extra')) >= EXTRAS
  needed = {re.match(r'[\w-]+', line)[0] for line in metadata.get_all('Requires-Dist') if 'extra ==' not in line}
  assert needed == {'jax', 'numpy'}
  assert any(name.endswith('LICENSE') for name in wheel.namelist())
