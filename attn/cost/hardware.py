"""Chips by their figures, each with its source: what the cost model divides by.

    chip = hardware.get('v5e')
    chip.matmul['bfloat16'], chip.hbm_bandwidth, chip.sources['hbm_bandwidth']

All figures are peaks of one chip, of which JAX may show two devices (`devices`). A figure that could not be sourced is
None, and whoever uses it says what is left out. Derived ones say from what: the clock of a TPU follows from its peak
and its matrix units, and with it the rates of its vector unit (8 x 128 numbers an operation) from the slots that the
compiler fills in one cycle.
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping

FIGURES = (
  'matmul', 'hbm_bandwidth', 'hbm_bytes', 'fast_bytes', 'vector_rate', 'exp_rate', 'launch_latency', 'cores',
  'link_bandwidth', 'devices',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Hardware:
  """Peak figures of one chip.

  Attributes:
    name: what `get` finds it by.
    kind: 'tpu', 'gpu' or 'cpu'.
    matmul: dtype of the operands -> FLOP/s, dense, a multiply-add being two.
    hbm_bandwidth: bytes/s between main memory and the chip.
    hbm_bytes: main memory.
    fast_bytes: memory that one program of a kernel may fill with tiles, scores and sums: vector memory of a core;
      shared memory of a block and the registers of its multiprocessor.
    vector_rate: float32 operations/s beside the matrix units, a multiply-add being one.
    exp_rate: exponentials/s in float32.
    launch_latency: seconds from one kernel to the next.
    cores: programs that run at the same time.
    link_bandwidth: bytes/s, one way, that a chip can send to its neighbour in a ring.
    devices: that JAX shows for a chip; each has an equal share of it.
    sources: figure -> where it is from, or for None why it is missing.
  """

  name: str
  kind: str
  matmul: Mapping[str, float]
  hbm_bandwidth: float | None
  hbm_bytes: float | None
  fast_bytes: int | None
  vector_rate: float | None
  exp_rate: float | None
  launch_latency: float | None
  cores: int | None
  link_bandwidth: float | None
  devices: int
  sources: Mapping[str, str]

  def __post_init__(self):
    for field in ('matmul', 'sources'):
      object.__setattr__(self, field, types.MappingProxyType(dict(getattr(self, field))))
    missing = [x for x in FIGURES if not self.sources.get(x, '').strip()]
    if missing or set(self.sources) - set(FIGURES):
      raise ValueError(f'{self.name}: sources are {sorted(self.sources)}, expected all of {", ".join(FIGURES)}')

  @property
  def lanes(self) -> int:
    """What the last axis of an array in fast memory is padded to a multiple of."""
    return 128 if self.kind == 'tpu' else 1


def get(name: str) -> Hardware:
  """The chip called `name`, in upper or lower case.

  Raises:
    ValueError: there is none; the message suggests names that look alike.
  """
  by_lower = {x.lower(): x for x in HARDWARE}
  if name.lower() in by_lower:
    return HARDWARE[by_lower[name.lower()]]
  near = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.4)
  hint = f'did you mean {" or ".join(by_lower[x] for x in near)}? ' if near else ''
  raise ValueError(f'hardware={name!r} is unknown: {hint}expected one of {", ".join(HARDWARE)}')


_GIB = 2**30
_CLOUD = 'Google Cloud TPU documentation, https://docs.cloud.google.com/tpu/docs/'
_JAX = 'JAX 0.10.2, jax/_src/pallas/mosaic/tpu_info.py'
_SLOTS = "slots of one cycle as libtpu 0.0.51 reports them with a compiled program's schedule"
_NO_LATENCY = 'not published; measure it where it matters'


def _tpu(
  name, page, matmul, hbm_bandwidth, hbm_bytes, vmem, cores, clock, alus, link_bandwidth, /, devices=1, **sources
):  # fmt: skip
  """A TPU; its vector unit works on 8 x 128 numbers in each of `alus` slots, and one more makes exponentials."""
  return Hardware(
    name, 'tpu', matmul, hbm_bandwidth, hbm_bytes, vmem, cores * alus * 1024 * clock, cores * 1024 * clock, None, cores,
    link_bandwidth, devices,
    {
      'matmul': f'{_CLOUD}{page}; float32 is not published',
      'hbm_bandwidth': f'{_CLOUD}{page}',
      'hbm_bytes': f'{_CLOUD}{page}',
      'fast_bytes': f'{_JAX}: VMEM of a TensorCore; what a kernel may take by default is less',
      'vector_rate': f'derived: {cores} cores x {alus} slots (VALU) x 8 x 128 lanes x {clock / 1e9:.3g} GHz; {_SLOTS}',
      'exp_rate': f'derived: {cores} cores x 1 slot (EUP) x 8 x 128 lanes x {clock / 1e9:.3g} GHz; {_SLOTS}',
      'launch_latency': _NO_LATENCY,
      'cores': f'{_CLOUD}{page}: TensorCores',
      'link_bandwidth': f'{_CLOUD}{page}, derived: both ways and all ports together / 2 / ports',
      'devices': f'{_JAX}: one a chip of one TensorCore, or of two that work as one (megacore), else one a TensorCore',
      **sources,
    },
  )  # fmt: skip


def _tpus():
  # FLOP of one cycle of one matrix unit: 128 x 128 multiply-adds, in the two last generations 256 x 256 on two rows.
  small, large = 2 * 128 * 128, 2 * 2 * 256 * 256
  return (
    _tpu(
      'v4', 'v4', {'bfloat16': 275e12, 'int8': 275e12}, 1200e9, 32 * _GIB, 16 * 2**20, 2, 275e12 / (2 * 4 * small), 2,
      45e9, link_bandwidth='How to Scale Your Model, https://jax-ml.github.io/scaling-book/tpus: one way, one link',
    ),
    _tpu(
      'v5e', 'v5e', {'bfloat16': 197e12, 'int8': 393e12}, 819e9, 16 * _GIB, 128 * 2**20, 1, 197e12 / (4 * small),
      4, 400e9 / 2 / 4, hbm_bytes=f'{_CLOUD}v5e prints 16 GB; {_JAX} has 17.2e9 bytes: 16 GiB',
    ),
    _tpu(
      'v5p', 'v5p', {'bfloat16': 459e12, 'int8': 918e12}, 2765e9, 95 * _GIB, 64 * 2**20, 2, 459e12 / (2 * 4 * small), 4,
      1200e9 / 2 / 6, matmul=f'{_CLOUD}v5p; int8 from {_JAX}; float32 is not published',
    ),
    _tpu(
      'v6e', 'v6e', {'bfloat16': 918e12, 'int8': 1836e12}, 1638e9, 32 * _GIB, 128 * 2**20, 1, 918e12 / (2 * large),
      4, 800e9 / 2 / 4, hbm_bytes=f'{_CLOUD}tpu7x: 32 GiB, in the table of generations',
    ),
    _tpu(
      'tpu7x', 'tpu7x', {'bfloat16': 2307e12, 'float8_e4m3fn': 4614e12, 'float8_e5m2': 4614e12}, 7380e9, 192 * _GIB,
      64 * 2**20, 2, 2307e12 / (2 * 2 * large), 4, 1200e9 / 2 / 6, devices=2,
    ),
  )  # fmt: skip


_GUIDE = 'https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/#throughput-of-native-arithmetic-instructions'


def _gpu(name, matmul, hbm_bandwidth, hbm_bytes, block_kib, cores, clock, fp32, link_bandwidth, /, **sources):
  """A GPU: each of `cores` multiprocessors does `fp32` operations and 16 exponentials a cycle."""
  return Hardware(
    name, 'gpu', matmul, hbm_bandwidth, hbm_bytes, (block_kib + 256) * 1024, cores * fp32 * clock, cores * 16 * clock,
    None, cores, link_bandwidth, 1,
    {
      'vector_rate': f'derived: {cores} multiprocessors x {fp32} a cycle ({_GUIDE}) x {clock / 1e9:.4g} GHz',
      'exp_rate': f'derived: {cores} multiprocessors x 16 a cycle ({_GUIDE}) x {clock / 1e9:.4g} GHz',
      'launch_latency': _NO_LATENCY,
      'devices': 'JAX shows each GPU as a device',
      **sources,
    },
  )  # fmt: skip


def _fp8(rate):
  return {'float8_e4m3fn': rate, 'float8_e5m2': rate, 'int8': rate}


def _gpus():
  a100 = 'NVIDIA A100 datasheet (SXM, 80 GB), https://www.nvidia.com/en-us/data-center/a100/'
  ga100 = 'NVIDIA A100 architecture whitepaper: 108 multiprocessors, 1.41 GHz'
  h100 = 'NVIDIA H100 datasheet (SXM), https://www.nvidia.com/en-us/data-center/h100/'
  gh100 = 'NVIDIA H100 architecture whitepaper v1.04, table 3: 132 multiprocessors, 1.83 GHz with tensor cores'
  h200 = 'NVIDIA H200 datasheet (SXM), https://www.nvidia.com/en-us/data-center/h200/'
  b200 = 'NVIDIA DGX B200 datasheet, an eighth of it, https://www.nvidia.com/en-us/data-center/dgx-b200/'
  dense = 'without sparsity: half of what is printed; float32 on the ordinary cores'
  nvlink = 'NVLink, one way: half of what is printed'
  hopper = {'bfloat16': 989.4e12, 'float16': 989.4e12, **_fp8(1978.9e12), 'float32': 67e12}
  block = 'shared memory of a block and 64K registers of 4 bytes, https://docs.nvidia.com/cuda/'
  return (
    _gpu(
      'A100', {'bfloat16': 312e12, 'float16': 312e12, 'int8': 624e12, 'float32': 19.5e12}, 2039e9, 80e9, 163, 108,
      1.41e9, 64, 300e9, matmul=f'{a100}, {dense}', hbm_bandwidth=a100, hbm_bytes=a100, cores=ga100,
      fast_bytes=f'{block}ampere-tuning-guide', link_bandwidth=f'{a100}, {nvlink}',
    ),
    _gpu(
      'H100', hopper, 3.35e12, 80e9, 227, 132, 1.83e9, 128, 450e9, matmul=f'{h100}, {dense}', hbm_bandwidth=h100,
      hbm_bytes=h100, cores=gh100, fast_bytes=f'{block}hopper-tuning-guide', link_bandwidth=f'{h100}, {nvlink}',
    ),
    _gpu(
      'H200', hopper, 4.8e12, 141e9, 227, 132, 1.83e9, 128, 450e9, matmul=f'{h200}, {dense}', hbm_bandwidth=h200,
      hbm_bytes=h200, cores=f'{gh100}; the H200 has the same chip', fast_bytes=f'{block}hopper-tuning-guide',
      link_bandwidth=f'{h200}, {nvlink}',
    ),
    _gpu(
      'B200', {'bfloat16': 2250e12, 'float16': 2250e12, **_fp8(4500e12)}, 8e12, 180e9, 227, 148,
      2250e12 / (148 * 8192), 128, 900e9, matmul=f'{b200}, {dense}', hbm_bandwidth=b200, hbm_bytes=b200,
      cores='148: https://github.com/openxla/xla, xla/stream_executor/cuda/cuda_core_info_table.cc; the clock of '
      '1.86 GHz is derived: peak / (148 x 8192 FLOP a cycle)', fast_bytes=f'{block}blackwell-tuning-guide',
      link_bandwidth=f'{b200}, {nvlink}',
    ),
  )  # fmt: skip


def _cpu():
  # Two 512-bit units: 2 x 16 numbers a cycle and core.
  cores, clock, width = 2, 3e9, 32
  why = 'assumed: 2 cores of 3 GHz with two 512-bit multiply-add units each'
  return Hardware(
    'cpu', 'cpu', {'float32': 2 * cores * width * clock}, 40e9, 16 * _GIB, 2**20, cores * width * clock,
    cores * width * clock / 12, 0.0, cores, None, 1,
    {
      'matmul': f'{why}; bfloat16 and int8 are left open',
      'hbm_bandwidth': 'assumed: two channels of memory, 20 GB/s each',
      'hbm_bytes': 'assumed: 16 GiB',
      'fast_bytes': 'assumed: a second-level cache of 1 MiB a core',
      'vector_rate': why,
      'exp_rate': f'{why}; assumed: 12 operations an exponential',
      'launch_latency': 'a call of a function: nothing beside the rest',
      'cores': why,
      'link_bandwidth': 'no links',
      'devices': 'JAX shows one device of the whole processor unless told otherwise',
    },
  )  # fmt: skip


HARDWARE: Mapping[str, Hardware] = types.MappingProxyType({x.name: x for x in (*_tpus(), *_gpus(), _cpu())})
