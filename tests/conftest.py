"""What every test stands on: eight CPU devices, so that sharding is tested on any machine."""

import os
import types

import pytest

if not os.environ.get('ATTN_TEST_GPU'):
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
flags = os.environ.get('XLA_FLAGS', '')
if 'xla_force_host_platform_device_count' not in flags:
  os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count=8'.strip()


def pytest_deselected(items):
  """Counts on a worker of pytest-xdist, which by itself reports nothing of them."""
  output = getattr(items[0].config, 'workeroutput', None) if items else None
  if output is not None:
    output['deselected'] = output.get('deselected', 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
  """Puts the count of a worker (each has the same) into the closing line."""
  stats = node.config.pluginmanager.get_plugin('terminalreporter').stats
  if 'deselected' not in stats:
    count = getattr(node, 'workeroutput', {}).get('deselected', 0)
    stats['deselected'] = [types.SimpleNamespace() for _ in range(count)]
