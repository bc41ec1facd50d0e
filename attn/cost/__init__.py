"""What an attention call costs: FLOPs, exponentials, bytes, fast memory, counted before anything runs.

    call = cost.Attention(cost.Sizes(B=1, T=8192, S=8192, H=32, K=8, D=128, V=128), mask=causal() & window(1023))
    cost.forward(call, softmax.Blocks(q=128, kv=512)).matmul_flops       # {'bfloat16': ...}

The machine that is counted for computes tiles: `blocks.q` queries of all G = H / K heads that share a key head, and
`blocks.kv` keys. Tiles that the mask leaves empty are skipped, all others are computed whole, so that work goes by the
elements of visited tiles and not of the mask. Every load of a tile counts, as if nothing were cached between main
memory and a core; `least_bytes` counts what must move even if everything were. attn/cost/roofline.py makes times.
"""

import dataclasses
import math
import types
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from attn import bias as biases, masks, plan as plans, softmax
from attn.cost import op_count, visits as tiles
from attn.cost.visits import Sizes, Visits

# Vector operations a score, forward: scale, maximum, subtract, add to the sum. Backward: scale, subtract the
# log-sum-exp, subtract delta, multiply by p. A mask compares and selects; a soft cap multiplies before and after tanh,
# and its slope 1 - t * t, times ds, is three more. Counts are of what attn/tiled.py does, a multiply-add being one.
_SCORE, _SCORE_BACK, _MASK, _CAP, _CAP_BACK = 4, 4, 2, 2, 5


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one call does.

  Attributes:
    matmul_flops: dtype of the operands -> FLOPs, a multiply-add being two.
    vector_ops: operations beside matrix products, a multiply-add being one.
    exps: exponentials, and what else goes through the same unit (tanh).
    read_bytes: from main memory, every load counted.
    write_bytes: to main memory.
    fast_bytes: fast memory that one program needs.
    passes: times that all keys are gone through for the same query.
    programs: parts that may run at the same time.
    launches: kernels.
    least_bytes: what must move however much is cached: every operand that is used, and every result, once. None where
      that is all that read_bytes and write_bytes count.
  """

  matmul_flops: Mapping[str, int]
  vector_ops: int
  exps: int
  read_bytes: int
  write_bytes: int
  fast_bytes: int
  passes: int
  programs: int
  launches: int = 1
  least_bytes: int | None = None

  def __post_init__(self):
    object.__setattr__(self, 'matmul_flops', types.MappingProxyType(dict(self.matmul_flops)))

  @property
  def flops(self) -> int:
    """Of matrix products, all dtypes together."""
    return sum(self.matmul_flops.values())

  @property
  def hbm_bytes(self) -> int:
    """Read and written."""
    return self.read_bytes + self.write_bytes

  @property
  def intensity(self) -> float:
    """FLOPs of matrix products per byte."""
    return self.flops / self.hbm_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
  """A call of softmax.attend by its shapes and options.

  Attributes:
    sizes: axis lengths.
    dtype: of q, k, v and out.
    mask: a mask of attn.masks with everything that hides keys; its arrays must fit the sizes.
    soft_cap: whether the logits are capped.
    bias: shape of an additive bias that is read from memory, [1 or B, 1 or H, 1 or T, 1 or S], or None.
    score: a score of attn.bias, or None.
    splits: runs of keys that are computed apart and merged (attn/split_kv.py).
    shift: query t stands at position t + shift: S - T puts the queries at the end of the keys, as in decoding.
    plan: of attn.plan: its tiles are those that are computed, at its tile sizes; the mask is then what hides keys in
      tiles that are partly hidden. None takes the tiles that the mask leaves.
  """

  sizes: Sizes
  dtype: str = 'bfloat16'
  mask: masks.Mask = dataclasses.field(default_factory=masks.everything)
  soft_cap: bool = False
  bias: tuple[int, ...] | None = None
  score: biases.Score | None = None
  splits: int = 1
  shift: int = 0
  plan: plans.Plan | None = None
  _seen: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

  def __post_init__(self):
    s = self.sizes
    masks.check(self.mask, s.B, s.H, s.T, s.S, is_default=(self.shift == 0, True))
    whole = (s.B, s.H, s.T, s.S)
    if self.bias is not None and (len(self.bias) != 4 or any(n not in (1, want) for n, want in zip(self.bias, whole))):
      raise ValueError(f'bias={self.bias} must be a shape of 4 axes that broadcasts to {whole} [B, H, T, S]')
    if not 1 <= self.splits <= s.S:
      raise ValueError(f'splits={self.splits} must be in 1..{s.S}, the number of keys')
    if isinstance(self.shift, bool) or not isinstance(self.shift, int | np.integer) or abs(self.shift) + s.T >= 2**31:
      raise ValueError(f'shift={self.shift!r} must be an integer, and positions below 2**31')
    if self.plan is not None:
      plans.check(self.plan, s.B, s.H, s.K, s.T, s.S)

  @property
  def itemsize(self) -> int:
    """Bytes of a number of q, k, v and out."""
    return jnp.dtype(self.dtype).itemsize

  @property
  def score_ops(self) -> tuple[int, int]:
    """(vector operations, exponentials) that the score function does for each logit."""
    if 'score' not in self._seen:
      self._seen['score'] = op_count.of_score(self.score, self.sizes.H)
    return self._seen['score']

  @property
  def group(self) -> int:
    """Query heads whose rows are in one tile: G, unless a plan has a list for each."""
    return tiles.group(self.sizes, self.plan)

  def clipped(self, blocks: softmax.Blocks) -> softmax.Blocks:
    """Tiles no larger than the arrays.

    Raises:
      ValueError: blocks below 1, or other than those of the plan.
    """
    softmax.check_blocks(blocks)
    clip = lambda q, kv: softmax.Blocks(q=min(q, self.sizes.T), kv=min(kv, self.sizes.S))
    if self.plan is not None and clip(blocks.q, blocks.kv) != clip(self.plan.block_q, self.plan.block_kv):
      raise ValueError(f'blocks={blocks}, but the tiles of the plan are {self.plan.block_q} x {self.plan.block_kv}')
    return clip(blocks.q, blocks.kv)

  def visits(self, blocks: softmax.Blocks) -> Visits:
    """The tiles that are computed: no O(TS) memory."""
    blocks = self.clipped(blocks)
    if blocks not in self._seen:
      self._seen[blocks] = (
        tiles.of_mask(self.sizes, self.mask, blocks, self.shift)
        if self.plan is None
        else tiles.of_plan(self.sizes, self.plan)
      )
    return self._seen[blocks]


def forward(call: Attention, blocks: softmax.Blocks, *, lanes=1, return_residual=False) -> Cost:
  """softmax.attend over tiles, keys innermost.

      FLOPs = 2 E (D + V),   bytes = (T (D + V) + visited columns (D + V)) itemsize a head,   E = visited elements

  Args:
    call: the call.
    blocks: tile sizes in tokens.
    lanes: what the last axis is padded to in fast memory (Hardware.lanes).
    return_residual: whether the log-sum-exp is written.
  """
  s, v, blocks = call.sizes, call.visits(blocks), call.clipped(blocks)
  rows, n = s.B * s.T * s.H, call.itemsize
  score_ops, score_exps = call.score_ops
  vector = (_SCORE + (_CAP if call.soft_cap else 0) + (call.bias is not None) + score_ops) * v.elements
  # A tile's maximum and sum join the running ones, and the old output shrinks; at the end it is divided by the sum.
  vector += _MASK * v.partial + (s.V + 4) * v.rows + (s.V + 1) * rows
  exps = (1 + call.soft_cap + score_exps) * v.elements + v.rows + rows * return_residual
  reads = n * (rows * s.D + v.columns * (s.D + s.V)) + _dense_bytes(call, blocks)
  writes = n * rows * s.V + 4 * rows * return_residual
  launches = 1
  if call.splits > 1:  # every run leaves (out, lse), which one more kernel merges
    parts = call.splits * rows
    vector, exps, launches = vector + 2 * s.V * parts, exps + parts, call.splits + 1
    reads += (n * s.V + 4) * parts + n * (call.splits - 1) * rows * s.D
    writes += (n * s.V + 4) * parts
  return Cost(
    {call.dtype: 2 * v.elements * (s.D + s.V)}, vector, exps, reads, writes,
    fast_bytes(call, blocks, lanes=lanes), 1, s.B * (s.H // call.group) * -(-s.T // blocks.q) * call.splits, launches,
    least_bytes(call, blocks),
  )  # fmt: skip


def backward(call: Attention, blocks: softmax.Blocks, *, lanes=1) -> Cost:
  """Gradients of q, k and v from the log-sum-exp, with the probabilities computed again: five products.

      FLOPs = 2 E (3 D + 2 V)      2.5 times the forward where D == V

  Counted for queries innermost: a program owns a tile of keys and sums its dk and dv; dq is read, added to and
  written in float32 for each tile; delta = rowsum(out * d_out) is made before.
  """
  s, v, blocks = call.sizes, call.visits(blocks), call.clipped(blocks)
  rows, keys, n = s.B * s.T * s.H, s.B * s.S * s.K, call.itemsize
  score_ops, score_exps = call.score_ops
  vector = (_SCORE_BACK + (_CAP_BACK if call.soft_cap else 0) + (call.bias is not None) + 2 * score_ops) * v.elements
  vector += _MASK * v.partial + s.D * v.rows + s.V * rows  # dq += ..., delta
  reads = n * (keys * (s.D + s.V) + v.rows * (s.D + s.V) + 2 * rows * s.V) + 4 * (2 + s.D) * v.rows
  reads += _dense_bytes(call, blocks)
  writes = n * keys * (s.D + s.V) + 4 * s.D * v.rows + 4 * rows
  if call.bias is not None:
    writes += 4 * math.prod(call.bias)
  return Cost(
    {call.dtype: 2 * v.elements * (3 * s.D + 2 * s.V)}, vector, (1 + call.soft_cap + score_exps) * v.elements,
    reads, writes, fast_bytes(call, blocks, lanes=lanes, is_backward=True), 1,
    s.B * (s.H // call.group) * -(-s.S // blocks.kv), 2, least_bytes(call, blocks, is_backward=True),
  )  # fmt: skip


def materialized(call: Attention) -> Cost:
  """Attention as separate operations, scores in main memory: implementation='reference', without a mask.

  The scores, in float32, are written three times: as logits, exponentials and quotients. They are read four times: for
  the maximum, the exponential, the sum and quotient, and by the second product.
  """
  s, n = call.sizes, call.itemsize
  rows, keys, scores = s.B * s.T * s.H, s.B * s.S * s.K, s.B * s.H * s.T * s.S
  least = n * (rows + keys) * (s.D + s.V)
  reads, writes = n * (rows * s.D + keys * (s.D + s.V)) + 4 * 4 * scores, n * rows * s.V + 3 * 4 * scores
  return Cost({call.dtype: 2 * scores * (s.D + s.V)}, 5 * scores, scores, reads, writes, 0, 3, rows, 5, least)


def least_bytes(call: Attention, blocks: softmax.Blocks, *, is_backward=False) -> int:
  """Bytes that must move whatever is cached: what the visited tiles hold read once, results written once.

      forward    q, k, v; out
      backward   q, k, v, out, d_out of visited rows and keys, their log-sum-exp; dq, dk, dv

  A bias counts with as many numbers as its visited part has at least, and in the backward its gradient.

  Args:
    call: the call.
    blocks: tile sizes in tokens; smaller ones hold fewer rows and keys that nothing sees.
    is_backward: of `backward`, in place of `forward`.
  """
  s, v, n = call.sizes, call.visits(blocks), call.itemsize
  rows, keys, used_rows, used_keys = s.B * s.T * s.H, s.B * s.S * s.K, v.distinct_rows, v.distinct_columns
  total = n * used_keys * (s.D + s.V) + _once(call, v)
  if not is_backward:
    return total + n * (used_rows * s.D + rows * s.V)
  total += n * (used_rows * (2 * s.D + 2 * s.V) + keys * (s.D + s.V)) + 4 * used_rows
  return total + (0 if call.bias is None else min(4, n) * math.prod(call.bias))


def array_bytes(call: Attention, *, is_backward=False) -> int:
  """Main memory of the arrays of a call: q, k, v, out and a bias; backward also the gradients and the log-sum-exp."""
  s, n = call.sizes, call.itemsize
  rows, keys = s.B * s.T * s.H, s.B * s.S * s.K
  total = n * ((rows + keys) * (s.D + s.V) + (0 if call.bias is None else math.prod(call.bias)))
  if is_backward:
    return 2 * total + 4 * rows
  return total + ((n * s.V + 4) * call.splits * rows if call.splits > 1 else 0)


def fast_bytes(call: Attention, blocks: softmax.Blocks, *, lanes=1, is_backward=False) -> int:
  """Fast memory of one program: inputs twice (one is used while the next comes), scores and sums in float32.

      2 (Bq D + Bk (D + V)) itemsize + 4 Bq Bk + 4 Bq (V + 2)                                 forward
      2 (Bq + Bk) (D + V) itemsize + 16 Bq + 8 Bq Bk + 4 Bk (D + V) + 16 Bq D                 backward

  with Bq = blocks.q G rows (G = call.group). Last axes are padded to `lanes`; a number a row takes `lanes` too.
  """
  blocks, n = call.clipped(blocks), call.itemsize
  pad = lambda width: -(-width // lanes) * lanes
  Bq, Bk, D, V = blocks.q * call.group, blocks.kv, pad(call.sizes.D), pad(call.sizes.V)
  if is_backward:  # q, d_out, k, v, lse and delta; p and ds; dk and dv; dq in and out, twice
    inputs = 2 * (Bq + Bk) * (D + V) * n + 2 * 2 * Bq * lanes * 4
    return inputs + 2 * Bq * pad(Bk) * 4 + Bk * (D + V) * 4 + 2 * 2 * Bq * D * 4
  return 2 * (Bq * D + Bk * (D + V)) * n + Bq * pad(Bk) * 4 + Bq * (V + 2 * lanes) * 4


def linear(sizes: Sizes, chunk: int, *, update='additive', dtype='bfloat16', keep_states=False) -> Cost:
  """The chunkwise recurrence S = S + k u', a chunk of C tokens at a time, T == S.

      a chunk and head: P = q k', P u: 2 C^2 (D + V);  q S, k' u: 4 C D V;
      update 'delta' also k k' (its triangle), the triangular solve and w S: C^2 D + C^2 (D + V) + 2 C D V

  Feature maps, decays and their exponentials are not counted; they are O(T (D + C)).

  Args:
    sizes: axis lengths.
    chunk: C.
    update: 'additive' or 'delta'.
    dtype: of q, k, v and out.
    keep_states: write each chunk's first state in float32, as a backward needs it: T / C D V numbers a head.
  """
  s = sizes
  if s.T != s.S:
    raise ValueError(f'T={s.T} queries are not S={s.S} keys: a recurrence reads and writes the same tokens')
  if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
    raise ValueError(f'chunk={chunk!r} must be an integer, at least 1')
  if update not in ('additive', 'delta'):
    raise ValueError(f"update={update!r} must be 'additive' or 'delta'")
  flops = vector = 0
  for C, times in ((chunk, s.T // chunk), (s.T % chunk, 1)):
    one = 2 * C * C * (s.D + s.V) + 4 * C * s.D * s.V
    if update == 'delta':
      one += C * C * s.D + C * C * (s.D + s.V) + 2 * C * s.D * s.V
    flops += times * one
    vector += times * (C * C + s.D * s.V if C else 0)  # the causal mask, the state's sum
  n, heads, C = jnp.dtype(dtype).itemsize, s.B * s.H, min(chunk, s.T)
  states = 4 * heads * -(-s.T // chunk) * s.D * s.V if keep_states else 0
  return Cost(
    {dtype: heads * flops}, heads * vector, 0, n * s.B * s.T * (s.H * s.D + s.K * (s.D + s.V)),
    n * s.B * s.T * s.H * s.V + states, 2 * C * 2 * (s.D + s.V) * n + 4 * (C * C + s.D * s.V), 1, heads,
  )  # fmt: skip


def kv_bytes(sizes: Sizes, itemsize: float, scale_bytes: float = 0) -> float:
  """Bytes of keys and values that one token of decoding reads, a sequence: S K (D + V) itemsize and the scales.

  Args:
    sizes: axis lengths.
    itemsize: bytes of a stored number; 0.5 for 4 bits.
    scale_bytes: bytes of scales a stored token and key head.
  """
  return sizes.S * sizes.K * ((sizes.D + sizes.V) * itemsize + scale_bytes)


def state_bytes(sizes: Sizes) -> int:
  """Bytes of a recurrent state [H, D, V] in float32 that one token of decoding reads and writes, a sequence."""
  return 2 * sizes.H * sizes.D * sizes.V * 4


def cost_estimate(cost: Cost) -> dict[str, int]:
  """Keywords of jax.experimental.pallas.CostEstimate."""
  return {
    'flops': cost.flops + cost.vector_ops,
    'transcendentals': cost.exps,
    'bytes_accessed': cost.hbm_bytes,
  }


def _dense_bytes(call, blocks):
  """Bytes of bias and of bool arrays in the mask that the visited tiles read."""
  v, G = call.visits(blocks), call.group
  total = 0
  for shape, itemsize in _dense(call):
    heads = G if shape[1] > 1 else 1
    if shape[2] > 1:
      count = (v.elements if shape[3] > 1 else v.rows) * heads // G
    else:
      count = (v.columns if shape[3] > 1 else v.tiles) * heads
    total += itemsize * count
  return total


def _once(call, v):
  """Bytes of the bias that the visited tiles hold, at least, each number once.

  Rows of the batch and heads that share it may hold different parts: together at least the mean of theirs.
  """
  s = call.sizes
  if call.bias is None:
    return 0
  b, h, t, n = call.bias
  held = (v.elements if n > 1 else v.distinct_rows) if t > 1 else v.distinct_columns * call.group * (n > 1)
  return call.itemsize * (held * b * h // (s.B * s.H))


def _dense(call):
  """(shape, bytes of a number) of the arrays [1 or B, 1 or H, 1 or T, 1 or S] that are read beside q, k and v."""
  if call.bias is not None:
    yield call.bias, call.itemsize
  for array in tiles.arrays_of(call.mask):
    yield array.shape, 1
