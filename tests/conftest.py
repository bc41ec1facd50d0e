"""What every test stands on: eight CPU devices, so that sharding is tested on any machine; a GPU only with -m gpu."""

import os
import types

import pytest


def pytest_configure(config):
  if config.option.markexpr == 'gpu':
    return
  os.environ['JAX_PLATFORMS'] = 'cpu'
  flags = os.environ.get('XLA_FLAGS', '')
  if 'xla_force_host_platform_device_count' not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count=8'.strip()


# Under pytest-xdist the closing line would not say what was deselected: each worker deselects the same tests and tells
# the process that prints.


def pytest_deselected(items):
  config = items[0].config if items else None
  if config is not None and hasattr(config, 'workeroutput'):
    config.workeroutput['deselected'] = config.workeroutput.get('deselected', 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  count = getattr(node, 'workeroutput', {}).get('deselected', 0)
  stats = node.config.pluginmanager.get_plugin('terminalreporter').stats
  if count and not stats.get('deselected'):
    stats['deselected'] = [types.SimpleNamespace() for _ in range(count)]
