"""What a record of a run says about where it was computed."""

import os
import platform


def device_name(device, count=1):
  """'2 x NVIDIA H200' and the like; of a CPU the processor's name and the cores this process may use."""
  if device.platform != 'cpu':
    return f'{count} x {device.device_kind}' if count > 1 else device.device_kind
  return f'{cpu_name()}, {len(os.sched_getaffinity(0))} cores'


def cpu_name():
  """The processor's name, as far as the system tells it."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      names = [line.split(':', 1)[1].strip() for line in file if line.startswith('model name')]
  except OSError:
    names = []
  return names[0] if names else platform.processor() or platform.machine()
