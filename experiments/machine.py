"""What a measurement has to say about where it was taken."""

import datetime
import importlib.metadata
import os
import platform
import subprocess

import jax

from train.machine import cpu_name

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch', 'transformers')


def facts():
  """Device, cores, date, versions and commit, as plain values for JSON. `commit` is '' outside of a git checkout."""
  device = jax.devices()[0]
  return {
    'device': cpu_name() if device.platform == 'cpu' else f'{jax.device_count()} x {device.device_kind}',
    'cores': len(os.sched_getaffinity(0)),
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
    'versions': {'python': platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
    'commit': commit(),
  }


def commit():
  """Revision of the checkout this file is in, with '+' if files were changed since."""
  folder = os.path.dirname(os.path.abspath(__file__))
  git = lambda *words: subprocess.run(['git', '-C', folder, *words], capture_output=True, text=True, check=False).stdout
  try:
    revision = git('rev-parse', '--short=12', 'HEAD').strip()
    # Figures that are being written beside the code do not change it.
    changed = git('status', '--porcelain', '--untracked-files=no', '--', ':/', ':(exclude,top)experiments/results')
  except OSError:
    return ''
  return revision + ('+' if revision and changed.strip() else '')


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ''
