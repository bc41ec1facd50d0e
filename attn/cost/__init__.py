"""What an attention call costs: FLOPs, exponentials, bytes, fast memory, counted before anything runs.

    call = cost.Attention(cost.Sizes(B=1, T=8192, S=8192, H=32, K=8, D=128, V=128), mask=causal() & window(1023))
    cost.forward(call, softmax.Blocks(q=128, kv=512)).matmul_flops       # {'bfloat16': ...}

The machine that is counted for computes tiles: `blocks.q` queries of all G = H / K heads that share a key head, and
`blocks.kv` keys. Tiles that the mask leaves empty are skipped, all others are computed whole, so that work goes by the
elements of visited tiles and not of the mask. Every load of a tile counts; caches between main memory and a core are
not modelled. attn/cost/roofline.py makes times of costs.
"""

import dataclasses
import types
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from attn import bias as biases, masks, softmax
from attn.cost import op_count
from attn.masks import sequence

# Vector operations a score, forward: scale, maximum, subtract, add to the sum. Backward: scale, subtract the
# log-sum-exp, subtract delta, multiply by p. A mask compares and selects; a soft cap multiplies before and after tanh,
# and its slope 1 - t * t, times ds, is three more. Counts are of what attn/tiled.py does, a multiply-add being one.
_SCORE, _SCORE_BACK, _MASK, _CAP, _CAP_BACK = 4, 4, 2, 2, 5
_BEARABLE = 2**24  # tiles that are looked at one by one


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Axis lengths of a call: batch, queries, keys, query heads, key heads, key width, value width."""

  B: int
  T: int
  S: int
  H: int
  K: int
  D: int
  V: int

  def __post_init__(self):
    for name, n in dataclasses.asdict(self).items():
      if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f'{name}={n!r} must be an integer, at least 1')
    if self.H % self.K:
      raise ValueError(f'K={self.K} key heads must divide H={self.H} query heads')

  @property
  def G(self) -> int:
    """Query heads that share a key head."""
    return self.H // self.K


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


@dataclasses.dataclass(frozen=True)
class Visits:
  """Tiles that are computed, summed over the batch and the key heads.

  Attributes:
    tiles: how many.
    elements: scores in them, of every query head; what lies beyond the arrays is not counted.
    partial: scores in those tiles that need the mask.
    rows: query rows in them, of every query head.
    columns: keys in them, of every key head.
    share: elements / all scores.
    is_bound: whether these are upper bounds: the list of tiles was too long, and larger tiles were looked at.
  """

  tiles: int
  elements: int
  partial: int
  rows: int
  columns: int
  share: float
  is_bound: bool = False


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
  """

  sizes: Sizes
  dtype: str = 'bfloat16'
  mask: masks.Mask = dataclasses.field(default_factory=masks.everything)
  soft_cap: bool = False
  bias: tuple[int, ...] | None = None
  score: biases.Score | None = None
  splits: int = 1
  _seen: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

  def __post_init__(self):
    s = self.sizes
    masks.check(self.mask, s.B, s.H, s.T, s.S, is_default=(True, True))
    whole = (s.B, s.H, s.T, s.S)
    if self.bias is not None and (len(self.bias) != 4 or any(n not in (1, want) for n, want in zip(self.bias, whole))):
      raise ValueError(f'bias={self.bias} must be a shape of 4 axes that broadcasts to {whole} [B, H, T, S]')
    if not 1 <= self.splits <= s.S:
      raise ValueError(f'splits={self.splits} must be in 1..{s.S}, the number of keys')

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

  def clipped(self, blocks: softmax.Blocks) -> softmax.Blocks:
    """Tiles no larger than the arrays."""
    softmax.check_blocks(blocks)
    return softmax.Blocks(q=min(blocks.q, self.sizes.T), kv=min(blocks.kv, self.sizes.S))

  def visits(self, blocks: softmax.Blocks) -> Visits:
    """The tiles that are computed: no O(TS) memory."""
    blocks = self.clipped(blocks)
    if blocks not in self._seen:
      self._seen[blocks] = _visits(self.sizes, self.mask, blocks)
    return self._seen[blocks]


def _visits(s, mask, blocks):
  bq, bk = blocks.q, blocks.kv
  while -(-s.T // bq) * -(-s.S // bk) > _BEARABLE:
    bq, bk = (2 * bq, bk) if bq < bk else (bq, 2 * bk)
  coarse = _visits_of_tiles(s, mask, softmax.Blocks(q=bq, kv=bk))
  m, n = bq // blocks.q, bk // blocks.kv
  if m == n == 1:
    return coarse
  return dataclasses.replace(
    coarse, tiles=m * n * coarse.tiles, rows=n * coarse.rows, columns=m * coarse.columns, is_bound=True
  )


def _visits_of_tiles(s, mask, blocks):
  some, every = masks.verdicts(mask, s.T, s.S, block_q=blocks.q, block_kv=blocks.kv, batch=s.B, heads=s.H)
  some, every = np.asarray(some), np.asarray(every)
  # A tile that ends beyond the arrays holds padding and needs a mask.
  whole = (np.arange(0, s.T, blocks.q)[:, None] + blocks.q <= s.T) & (np.arange(0, s.S, blocks.kv) + blocks.kv <= s.S)
  every = every & whole
  if some.shape[1] > 1:  # a tile holds the rows of all heads that share a key head
    some = some.reshape(some.shape[0], s.K, s.G, *some.shape[2:]).any(2)
    every = every.reshape(every.shape[0], s.K, s.G, *every.shape[2:]).all(2)
  times = (s.B // some.shape[0]) * (s.K // some.shape[1])
  rows = np.minimum(blocks.q, s.T - np.arange(0, s.T, blocks.q)) * s.G
  per_row = some.sum(-1)
  elements = _elements(some, rows, blocks.kv, s.S)
  return Visits(
    tiles=times * int(per_row.sum()),
    elements=times * elements,
    partial=times * _elements(some & ~every, rows, blocks.kv, s.S),
    rows=times * int((per_row * rows).sum()),
    columns=times * _elements(some, np.ones_like(rows), blocks.kv, s.S),
    share=times * elements / (s.B * s.H * s.T * s.S),
  )


def _elements(tiles, rows, block_kv, S):
  """Sum of rows x keys over tiles [b, k, nq, nk]; the last key tile may be short."""
  short = tiles.shape[-1] * block_kv - S
  return int(((tiles.sum(-1) * block_kv - tiles[..., -1] * short) * rows).sum())


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
    fast_bytes(call, blocks, lanes=lanes), 1, s.B * s.K * -(-s.T // blocks.q) * call.splits, launches,
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
    writes += 4 * int(np.prod(call.bias))
  return Cost(
    {call.dtype: 2 * v.elements * (3 * s.D + 2 * s.V)}, vector, (1 + call.soft_cap + score_exps) * v.elements,
    reads, writes, fast_bytes(call, blocks, lanes=lanes, is_backward=True), 1, s.B * s.K * -(-s.S // blocks.kv), 2,
  )  # fmt: skip


def materialized(call: Attention) -> Cost:
  """Attention as separate operations, scores in main memory: implementation='reference', without a mask.

  The scores, in float32, are written and read three times: maximum; exponential and sum; quotient, which the second
  product reads.
  """
  s, n = call.sizes, call.itemsize
  rows, keys, scores = s.B * s.T * s.H, s.B * s.S * s.K, s.B * s.H * s.T * s.S
  reads = n * (rows * s.D + keys * (s.D + s.V)) + 3 * 4 * scores + 4 * scores
  writes = n * rows * s.V + 3 * 4 * scores
  return Cost({call.dtype: 2 * scores * (s.D + s.V)}, 5 * scores, scores, reads, writes, 0, 3, rows, 5)


def fast_bytes(call: Attention, blocks: softmax.Blocks, *, lanes=1, is_backward=False) -> int:
  """Fast memory of one program: inputs twice (one is used while the next comes), scores and sums in float32.

      2 (Bq D + Bk (D + V)) itemsize + 4 Bq Bk + 4 Bq (V + 2)                                 forward
      2 (Bq + Bk) (D + V) itemsize + 16 Bq + 8 Bq Bk + 4 Bk (D + V) + 16 Bq D                 backward

  with Bq = blocks.q G rows. Last axes are padded to `lanes`; a number a row takes `lanes` too.
  """
  blocks, n = call.clipped(blocks), call.itemsize
  pad = lambda width: -(-width // lanes) * lanes
  Bq, Bk, D, V = blocks.q * call.sizes.G, blocks.kv, pad(call.sizes.D), pad(call.sizes.V)
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
  s, v = call.sizes, call.visits(blocks)
  total = 0
  if call.bias is not None:
    heads = s.G if call.bias[1] > 1 else 1
    total += call.itemsize * _tile_sum(v, s, heads, call.bias[2] > 1, call.bias[3] > 1)
  for array in _arrays(call.mask):
    heads = s.G if array.shape[1] > 1 else 1
    total += _tile_sum(v, s, heads, array.shape[2] > 1, array.shape[3] > 1)
  return total


def _tile_sum(v, s, heads, has_rows, has_columns):
  """Numbers of an array [.., T or 1, S or 1] that the visited tiles hold."""
  if has_rows:
    return (v.elements if has_columns else v.rows) * heads // s.G
  return (v.columns if has_columns else v.tiles) * heads


def _arrays(mask):
  """The bool arrays inside a mask."""
  if isinstance(mask, sequence.Array):
    return [mask.values]
  parts = [getattr(mask, x.name) for x in dataclasses.fields(mask)] if dataclasses.is_dataclass(mask) else []
  return [array for part in parts if isinstance(part, masks.Mask) for array in _arrays(part)]
