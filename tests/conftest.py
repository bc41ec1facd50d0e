"""What every test stands on: eight CPU devices, so that sharding is tested on any machine; a GPU only with -m gpu."""

import os


def pytest_configure(config):
  if config.option.markexpr == 'gpu':
    return
  os.environ['JAX_PLATFORMS'] = 'cpu'
  flags = os.environ.get('XLA_FLAGS', '')
  if 'xla_force_host_platform_device_count' not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count=8'.strip()
