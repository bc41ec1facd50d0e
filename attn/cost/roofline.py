"""Times from costs: rooflines, full and empty cores, rings, decoding, and what no algorithm can do without.

    r = roofline.of(cost.forward(call, blocks), hardware.get('v5e'))
    r.seconds, r.bound, r.left_out      # the longest of the resources, its name, and what has no figure

Times are those of a machine that overlaps everything perfectly, never a prediction. With the bytes of the schedule they
suppose that no tile which is loaded again is found in a cache, as the second-level cache of a GPU does; with
`is_least=True` every operand is loaded once, which bounds the time of these operations from below.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

from attn import cost as costs, softmax
from attn.cost import Attention, Cost, Sizes
from attn.cost.hardware import Hardware

# Rows and keys of the tiles that `best` looks at, large ones first. Smaller ones cost more than this model knows: what
# surrounds a tile takes longer than the tile, on TPUs below 256 by much.
_TILES = {'tpu': (2048, 1024, 512, 256), 'gpu': (256, 128, 64), 'cpu': (512, 256, 128, 64)}
_LONG = 2**22  # tiles: more only where nothing else fits


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a cost on a chip.

  Attributes:
    parts: resource -> seconds it is busy: matmul, exp, vector, memory.
    launch: seconds of launches, which nothing overlaps.
    left_out: resources that the chip has no figure for, and which the times therefore miss.
  """

  parts: Mapping[str, float]
  launch: float
  left_out: tuple[str, ...]

  @property
  def seconds(self) -> float:
    """With perfect overlap: the longest part, and the launches."""
    return max(self.parts.values(), default=0.0) + self.launch

  @property
  def serial_seconds(self) -> float:
    """Without any overlap: the sum."""
    return sum(self.parts.values()) + self.launch

  @property
  def bound(self) -> str:
    """The resource that takes longest; 'launch' if launches take longer; 'unknown' if nothing has a figure."""
    parts = {**self.parts, 'launch': self.launch}
    return max(parts, key=lambda x: parts[x]) if self.parts else 'unknown'


def of(cost: Cost, chip: Hardware, *, is_least=False) -> Roofline:
  """The roofline of a cost on a chip.

      seconds = max(sum_dtype flops / peak, exps / rate, vector / rate, bytes / bandwidth) + launches latency

  Args:
    cost: what is done.
    chip: where.
    is_least: take cost.least_bytes for the bytes, as if whatever was loaded stayed in a cache.
  """
  moved = cost.hbm_bytes if cost.least_bytes is None or not is_least else cost.least_bytes
  parts, left_out = {}, []
  unknown = [x for x, flops in cost.matmul_flops.items() if flops and x not in chip.matmul]
  if unknown:
    left_out.append(f'matmul in {", ".join(unknown)}')
  else:
    parts['matmul'] = sum(flops / chip.matmul[x] for x, flops in cost.matmul_flops.items() if flops)
  for name, amount, rate in (
    ('exp', cost.exps, chip.exp_rate),
    ('vector', cost.vector_ops, chip.vector_rate),
    ('memory', moved, chip.hbm_bandwidth),
  ):
    if rate is not None:
      parts[name] = amount / rate
    elif amount:
      left_out.append(name)
  if chip.launch_latency is None:
    left_out.append('launch')
  return Roofline(parts, cost.launches * (chip.launch_latency or 0.0), tuple(left_out))


def fits(cost: Cost, chip: Hardware) -> bool | None:
  """Whether a program's fast memory is there; None if the chip has no figure."""
  return None if chip.fast_bytes is None else cost.fast_bytes <= chip.fast_bytes


def best(call: Attention, chip: Hardware, *, is_backward=False, multiple=1) -> tuple[softmax.Blocks, Cost]:
  """The tile sizes that fit the chip and take the least time by the roofline of the schedule, and their cost.

  Rows of a tile, those of all heads that share a key head together, and keys are powers of two; a plan has its own
  tiles. Of those that take equally long the ones with the least sum of all parts, then the larger ones.

  Args:
    call: the call.
    chip: where.
    is_backward: the backward in place of the forward.
    multiple: what the queries of a tile are a multiple of.

  Raises:
    ValueError: not even the smallest tiles fit.
  """
  s, count = call.sizes, costs.backward if is_backward else costs.forward
  if call.plan is None:
    sides = itertools.product(_TILES[chip.kind], _TILES[chip.kind])
    rounded = lambda rows: -(-max(1, rows // s.G) // multiple) * multiple
    choices = [softmax.Blocks(q=rounded(rows), kv=kv) for rows, kv in sides]
  else:
    choices = [softmax.Blocks(q=call.plan.block_q, kv=call.plan.block_kv)]
  found: dict[softmax.Blocks, Cost] = {}
  for blocks in map(call.clipped, choices):
    need = costs.fast_bytes(call, blocks, lanes=chip.lanes, is_backward=is_backward)
    is_long = (s.T // blocks.q) * (s.S // blocks.kv) > _LONG
    if need <= (chip.fast_bytes or math.inf) and blocks not in found and not (is_long and found):
      found[blocks] = count(call, blocks, lanes=chip.lanes)
  if not found:
    raise ValueError(
      f'no tiles fit {chip.name}: {blocks.q * call.group} rows and {blocks.kv} keys need {need} bytes of fast memory '
      f'at D={s.D}, V={s.V}, G={s.G}, and it has {chip.fast_bytes}'
    )
  times = {blocks: of(cost, chip) for blocks, cost in found.items()}
  blocks = min(found, key=lambda x: (times[x].seconds, times[x].serial_seconds))
  return blocks, found[blocks]


def occupancy(programs: int, cores: int) -> tuple[int, float]:
  """(waves, busy share): programs of equal length on cores, a wave of them at a time; the last wave may be part empty.

  Raises:
    ValueError: programs or cores below 1.
  """
  if programs < 1 or cores < 1:
    raise ValueError(f'programs={programs} and cores={cores} must be at least 1')
  waves = -(-programs // cores)
  return waves, programs / (waves * cores)


@dataclasses.dataclass(frozen=True)
class Ring:
  """Keys and values going round a ring of devices.

  Attributes:
    bytes_sent: by each device, all hops: (P - 1) / P S K (D + V) itemsize B.
    hop_seconds: of sending one device's share to the next.
    compute_seconds: of the tiles of one hop, at least, by the roofline.
    is_hidden: whether even that is as long as sending.
  """

  bytes_sent: float
  hop_seconds: float
  compute_seconds: float
  is_hidden: bool


def ring(call: Attention, cost: Cost, chip: Hardware, devices: int) -> Ring:
  """Context parallelism over a ring: each device holds T / P queries and S / P keys, and work is balanced.

  A device is what JAX calls one: where a chip is two (`Hardware.devices`), each has half of it, and the ring is as slow
  as its links between chips.

  Args:
    call: the whole call.
    cost: of the whole call, on one chip.
    chip: that all devices are, or are parts of.
    devices: P.

  Raises:
    ValueError: fewer than 2 devices, or no figure for the chip's link.
  """
  if devices < 2:
    raise ValueError(f'devices={devices} must be at least 2')
  if chip.link_bandwidth is None:
    raise ValueError(f'hardware={chip.name!r} has no figure for its links: {chip.sources["link_bandwidth"]}')
  s = call.sizes
  share = s.B * s.S * s.K * (s.D + s.V) * call.itemsize / devices
  compute, hop = of(cost, chip, is_least=True).seconds * chip.devices / devices**2, share / chip.link_bandwidth
  return Ring((devices - 1) * share, hop, compute, compute >= hop)


@dataclasses.dataclass(frozen=True)
class Decode:
  """A step of decoding, one token for each of `batch` sequences.

  Attributes:
    tokens_per_second: all sequences together, at most.
    bound: 'memory' or 'matmul'.
    crossover_batch: sequences from which on arithmetic takes longer than memory; inf if it never does.
  """

  tokens_per_second: float
  bound: str
  crossover_batch: float


def decode(
  chip: Hardware, *, batch: int, weight_bytes: float, kv_bytes: float, flops: float, dtype='bfloat16'
) -> Decode:
  """The roofline of decoding.

      tokens / s <= min(bandwidth / (weight_bytes / batch + kv_bytes), peak / flops)

  Args:
    chip: where.
    batch: sequences in a step.
    weight_bytes: read once a step.
    kv_bytes: read for each sequence (cost.kv_bytes, cost.state_bytes).
    flops: of matrix products for each token.
    dtype: of the products.

  Raises:
    ValueError: batch below 1, nothing to read or compute, or no figure for the dtype.
  """
  if batch < 1:
    raise ValueError(f'batch={batch} must be at least 1')
  if not flops > 0:
    raise ValueError(f'flops={flops} must be above 0')
  if not (weight_bytes >= 0 and kv_bytes >= 0 and weight_bytes + kv_bytes > 0):
    raise ValueError(f'weight_bytes={weight_bytes} and kv_bytes={kv_bytes} must be at least 0, and one of them above')
  if dtype not in chip.matmul or chip.hbm_bandwidth is None:
    raise ValueError(f'dtype={dtype!r} has no figure for {chip.name}, expected one of {", ".join(chip.matmul)}')
  by_memory = chip.hbm_bandwidth / (weight_bytes / batch + kv_bytes)
  by_matmul = chip.matmul[dtype] / flops
  # Compute takes over where flops / peak = (weight_bytes / batch + kv_bytes) / bandwidth.
  spare = flops / chip.matmul[dtype] * chip.hbm_bandwidth - kv_bytes
  crossover = weight_bytes / spare if spare > 0 else math.inf
  return Decode(min(by_memory, by_matmul), 'memory' if by_memory < by_matmul else 'matmul', crossover)


@dataclasses.dataclass(frozen=True)
class IOBound:
  """Numbers that must move between a fast memory of M numbers and the main memory, one head, up to constants.

  Attributes:
    flash: T S D^2 / M, what tiles that stay resident need.
    small: T S D / sqrt(M), what two plain matrix products need, with the scores in main memory.
    materialized: T S + (T + S) D / 2, scores written once and inputs read once.
    floor: T D + S (D + V) + T V, every input read and the output written once.
    is_large: M >= D^2: `flash` is optimal; below, `small` is.
  """

  flash: float
  small: float
  materialized: float
  floor: float
  is_large: bool

  @property
  def numbers(self) -> float:
    """The bound of the regime, not below the floor."""
    return max(self.flash if self.is_large else self.small, self.floor)


def io_bound(sizes: Sizes, fast_numbers: float) -> IOBound:
  """The I/O complexity of exact dense attention, a head: it holds for all algorithms, up to constants.

  Args:
    sizes: T, S, D and V are used.
    fast_numbers: M, numbers (not bytes) that the fast memory holds.

  Raises:
    ValueError: M below 1.

  Source: arXiv:2205.14135 theorem 2; arXiv:2402.07443.
  """
  if fast_numbers < 1:
    raise ValueError(f'fast_numbers={fast_numbers} must be at least 1')
  s, M = sizes, fast_numbers
  scores = s.T * s.S
  return IOBound(
    flash=scores * s.D**2 / M,
    small=scores * s.D / math.sqrt(M),
    materialized=scores + (s.T + s.S) * s.D / 2,
    floor=s.T * s.D + s.S * (s.D + s.V) + s.T * s.V,
    is_large=s.D**2 <= M,
  )


def io_bytes(call: Attention, blocks: softmax.Blocks, chip: Hardware, *, is_backward=False) -> float:
  """Bytes that must move for the visited scores E between the main memory and a fast memory of M numbers.

      itemsize E D^2 / M   where D^2 <= M,   else itemsize E D / sqrt(M),   and no less than cost.least_bytes

  The first is up to a constant; a program's tiles never move less. Backward as forward, with its own least bytes.

  Args:
    call: the call.
    blocks: tile sizes in tokens, which E and the least bytes go by.
    chip: whose fast memory of one program counts; without a figure the least bytes remain.
    is_backward: the backward in place of the forward.

  Source: arXiv:2205.14135 theorems 2 and 5, with the visited share as in its section 3.3; arXiv:2402.07443.
  """
  least = costs.least_bytes(call, blocks, is_backward=is_backward)
  if chip.fast_bytes is None:
    return least
  D, M, n = call.sizes.D, chip.fast_bytes / call.itemsize, call.itemsize
  return max(n * call.visits(blocks).elements * (D**2 / M if D**2 <= M else D / math.sqrt(M)), least)
