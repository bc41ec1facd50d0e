"""Devices that are not here: what a compiler for them needs to be told, and what they are.

    os.environ.update(aot.environment('v5e:16x16'))      # before jax is imported
    devices, chip = aot.devices('v5e:16x16')             # 256 devices that programs can be compiled for, not run on

TPUs come from libtpu (`pip install -e .[aot]`), which needs no TPU to compile for one. 'cpu:8' are eight devices
made of this machine's processor.
"""

import importlib.util
import os
import re

from attn.cost import hardware
from train.config import UserError

EXAMPLES = ('v4:2x2x1', 'v5e:2x2', 'v5e:16x16', 'v5p:2x2x1', 'v5p:8x8x8', 'v6e:16x16', 'tpu7x:2x2x1', 'cpu:8')
TPUS = tuple(name for name, chip in hardware.HARDWARE.items() if chip.kind == 'tpu')
# For libtpu's start, which warns where it cannot find out what it runs on; they say nothing of what is compiled for.
_QUIET = {'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_SKIP_MDS_QUERY': '1'}


def split(topology):
  """('v5e', (16, 16)) of 'v5e:16x16'.

  Raises:
    UserError: not a name of chips and their arrangement.
  """
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', topology)
  if not found or not (found[1] == 'cpu' or found[1] in TPUS) or (found[1] == 'cpu' and not found[2].isdigit()):
    raise UserError(
      f'--topology={topology!r}: expected chips ({", ".join(TPUS)}) and how they are arranged, or cpu:N, such as '
      f'{", ".join(EXAMPLES)}'
    )
  sizes = tuple(map(int, found[2].split('x')))
  if not all(sizes):
    raise UserError(f'--topology={topology!r}: expected at least 1 chip along each axis')
  return found[1], sizes


def environment(topology, environ=os.environ):
  """Variables to be set before jax is imported.

  Args:
    topology: as `split` takes it.
    environ: what is set now.

  Returns:
    Dictionary for os.environ.update. The processor of this machine stays jax's own platform: nothing is run on others.
  """
  kind, sizes = split(topology)
  if kind == 'cpu':
    others = [flag for flag in environ.get('XLA_FLAGS', '').split() if 'host_platform_device_count' not in flag]
    flags = [*others, f'--xla_force_host_platform_device_count={sizes[0]}']
    return {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(flags)}
  # By itself libtpu lets one process of a machine load it, for the sake of the TPU that it would use.
  return {'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', **_QUIET}


def devices(topology):
  """The devices of a topology, in the compiler's order, and what kind they are.

  Args:
    topology: as `split` takes it.

  Returns:
    (list of devices, attn.cost.hardware.Hardware).

  Raises:
    UserError: an unknown name, an arrangement that there is not, or no libtpu.
  """
  kind, sizes = split(topology)
  import jax

  if kind == 'cpu':
    found = jax.devices('cpu')
    if len(found) < sizes[0]:
      raise UserError(
        f'--topology={topology!r}: this process has {len(found)} CPU devices; set '
        f'XLA_FLAGS=--xla_force_host_platform_device_count={sizes[0]} before jax is imported'
      )
    return found[: sizes[0]], hardware.get('cpu')
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(f'--topology={topology!r}: compiling for a TPU needs libtpu: pip install -e .[aot]')
  from jax.experimental import topologies

  chip = hardware.get(kind)
  # Two cores that are one device.
  options = {'chip_config_name': 'megacore'} if (chip.cores or 1) > chip.devices else {}
  try:
    described = topologies.get_topology_desc(platform='tpu', topology_name=topology, **options)
  except Exception as error:  # of several kinds, by the part of libtpu that finds out
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise UserError(
      f'--topology={topology!r}: libtpu knows no such arrangement ({reason}); examples: {", ".join(EXAMPLES)}'
    ) from error
  return list(described.devices), chip
