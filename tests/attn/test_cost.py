"""attn.cost against the compiler's counts, a tiler that counts its loads, dense masks, and numbers by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from attn import bias, cost, masks, softmax, tiled
from attn.cost import Attention, Sizes, hardware, op_count, roofline
from attn.softmax import Blocks
from tests.attn import oracle, tiler

H100 = hardware.get('H100')


def sizes(T=64, S=None, B=1, H=1, K=None, D=16, V=None):
  return Sizes(B=B, T=T, S=S or T, H=H, K=K or H, D=D, V=V or D)


def call(*args, mask=masks.everything(), dtype='float32', **kwargs):  # noqa: B008 (a mask never changes)
  fields = {k: kwargs.pop(k) for k in ('soft_cap', 'bias', 'score', 'splits', 'shift') if k in kwargs}
  return Attention(sizes(*args, **kwargs), dtype, mask, **fields)


def qkv(T, S, D, V, seed=0):
  r = np.random.default_rng(seed)
  return r.normal(size=(T, D)), r.normal(size=(S, D)), r.normal(size=(S, V))


SHAPES = [(8, 8, 4, 4, 8, 8), (16, 24, 4, 6, 4, 8), (13, 29, 5, 3, 4, 7), (1, 9, 4, 4, 8, 2), (7, 1, 2, 9, 3, 3)]


@pytest.mark.parametrize('T, S, D, V, bq, bk', SHAPES)
def test_bytes_are_those_of_a_tiler(T, S, D, V, bq, bk):
  q, k, v = qkv(T, S, D, V)
  out, lse, memory, visited = tiler.attend(q, k, v, bq, bk)
  want, _ = oracle.attend(q[None, :, None], k[None, :, None], v[None, :, None])
  np.testing.assert_allclose(out, want[0, :, 0], rtol=1e-11)  # it is attention that was counted
  got = cost.forward(call(T, S, D=D, V=V), Blocks(bq, bk))
  assert got.hbm_bytes == 4 * memory.moved == 4 * (-(-T // bq) * S * (D + V) + T * (D + V))
  assert got.read_bytes == 4 * sum(memory.loads.values()) and got.flops == memory.flops
  assert visited == T * S and got.exps == T * S + T * -(-S // bk)

  do = np.random.default_rng(1).normal(size=out.shape)
  *grads, memory = tiler.gradients(q, k, v, out, lse, do, bq, bk)
  loss = lambda *qkv: (tiler.attend(*qkv, bq, bk)[0] * do).sum()
  for n, grad in enumerate(grads):  # along one direction of each input
    step = 1e-5 * np.random.default_rng(n).normal(size=grad.shape)
    up, down = (loss(*(x + sign * step if m == n else x for m, x in enumerate((q, k, v)))) for sign in (1, -1))
    np.testing.assert_allclose((up - down) / 2, (grad * step).sum(), rtol=1e-5, atol=1e-12)
  got = cost.backward(call(T, S, D=D, V=V), Blocks(bq, bk))
  assert (got.read_bytes, got.write_bytes) == tuple(4 * sum(x.values()) for x in (memory.loads, memory.stores))
  assert got.flops == memory.flops


MASKS = {
  'causal': (masks.causal(), lambda i, j: j <= i),
  'window': (masks.causal() & masks.window(5), lambda i, j: i - 5 <= j <= i),
  'sink': (masks.causal() & (masks.window(3) | masks.sink(2)), lambda i, j: j <= i and (j >= i - 3 or j < 2)),
  'chunked': (masks.chunked(6), lambda i, j: i // 6 == j // 6),
}


@pytest.mark.parametrize('mask, allowed', MASKS.values(), ids=MASKS)
@pytest.mark.parametrize('T, S, bq, bk', [(16, 16, 4, 4), (29, 29, 4, 8), (23, 31, 8, 3)])
def test_visits_by_brute_force(mask, allowed, T, S, bq, bk):
  seen = np.array([[allowed(i, j) for j in range(S)] for i in range(T)])
  tiles = [(r, c) for r in tiler.runs(T, bq) for c in tiler.runs(S, bk) if seen[r, c].any()]
  elements = sum(seen[at].size for at in tiles)
  partial = sum(seen[at].size for at in tiles if not seen[at].all())
  got = call(T, S, mask=mask).visits(Blocks(bq, bk))
  assert (got.tiles, got.elements, got.share) == (len(tiles), elements, elements / (T * S))
  assert got.rows == sum(seen[at].shape[0] for at in tiles) and got.columns == sum(seen[at].shape[1] for at in tiles)
  # A short last tile is never called full, so that padding is masked.
  short = sum(seen[r, c].size for r, c in tiles if seen[r, c].all() and seen[r, c].shape != (bq, bk))
  assert got.partial == partial + short

  q, k, v = qkv(T, S, 4, 4)
  rows = seen.any(1)  # the tiler divides by the sum of a row
  if rows.all():
    _, _, memory, visited = tiler.attend(q, k, v, bq, bk, seen)
    made = cost.forward(call(T, S, D=4, mask=mask), Blocks(bq, bk))
    assert (made.hbm_bytes, made.flops, visited) == (4 * memory.moved, memory.flops, elements)


def test_heads_that_share_keys_share_their_tiles():
  q, k, v = qkv(24, 10, 4, 4)  # 12 queries of 2 heads, side by side
  _, _, memory, _ = tiler.attend(q, k, v, 2 * 5, 3)
  got = cost.forward(call(12, 10, H=6, K=3, D=4, B=2), Blocks(5, 3))
  assert got.hbm_bytes == 2 * 3 * 4 * memory.moved and got.flops == 2 * 3 * memory.flops
  assert got.programs == 2 * 3 * 3


def test_masks_of_heads_and_rows():
  reach = np.array([0, 20])
  by_head = masks.array(np.stack([np.tri(8, dtype=bool), np.tri(8, k=-4, dtype=bool)])[None])
  apart = call(8, H=2, mask=by_head).visits(Blocks(4, 4))
  assert apart.elements == 16 * 3 + 16 and apart.tiles == 4
  together = call(8, H=2, K=1, mask=by_head).visits(Blocks(4, 4))  # one list for both heads
  assert together.elements == 2 * 16 * 3 and together.tiles == 3
  per_row = call(8, B=2, H=3, mask=masks.causal(reach)).visits(Blocks(4, 4))
  assert per_row.elements == 3 * 16 * (3 + 4)
  with pytest.raises(ValueError, match='shape'):
    call(9, H=2, mask=by_head)


@pytest.fixture(scope='module')
def compiled():
  """The compiler's counts for dense attention, [B, T, H, D] = [2, 96, 3, 40], S = 80, V = 24."""
  q, k, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 96, 3, 40), (2, 80, 3, 40), (2, 80, 3, 24)))
  s = jax.ShapeDtypeStruct((2, 3, 96, 80), jnp.float32)

  def dense(q, k, v):
    return jnp.einsum('bhts,bshv->bthv', jax.nn.softmax(jnp.einsum('bthd,bshd->bhts', q, k)), v)

  analysis = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()
  squares = lambda f: lambda *args: jax.grad(lambda *x: jnp.sum(f(*x) ** 2), tuple(range(len(args))))(*args)
  return {
    'forward': analysis(dense, q, k, v),
    'softmax': analysis(jax.nn.softmax, s),
    'gradients': analysis(squares(dense), q, k, v),
    'gradient of softmax': analysis(squares(jax.nn.softmax), s),
  }


def test_flops_are_those_of_the_compiler(compiled):
  c = call(96, 80, B=2, H=3, D=40, V=24)
  want = compiled['forward']['flops'] - compiled['softmax']['flops']
  assert cost.forward(c, Blocks(32, 16)).matmul_flops == {'float32': pytest.approx(want, rel=0.02)}
  # Plain differentiation keeps the probabilities: all six products but the one that the tiles compute again.
  want = compiled['gradients']['flops'] - compiled['gradient of softmax']['flops']
  got = cost.forward(c, Blocks(32, 16)).flops + cost.backward(c, Blocks(32, 16)).flops - 2 * 2 * 3 * 96 * 80 * 40
  assert got == pytest.approx(want, rel=0.02)


def test_bytes_of_the_unfused_version(compiled):
  got = cost.materialized(call(96, 80, B=2, H=3, D=40, V=24))
  assert 0.5 < compiled['forward']['bytes accessed'] / got.hbm_bytes < 2
  scores = 2 * 3 * 96 * 80
  assert got.write_bytes == 4 * (3 * scores + 2 * 96 * 3 * 24)
  assert got.read_bytes == 4 * (4 * scores + 2 * 96 * 3 * 40 + 2 * 80 * 3 * 64)
  assert got.least_bytes == 4 * 2 * 3 * (96 + 80) * 64
  assert got.passes == 3 and got.flops == cost.forward(call(96, 80, B=2, H=3, D=40, V=24), Blocks(96, 80)).flops


def test_backward_is_two_and_a_half_forwards():
  c = call(64, D=32, mask=masks.causal())
  assert cost.backward(c, Blocks(16, 16)).flops == 2.5 * cost.forward(c, Blocks(16, 16)).flops


def test_fast_memory_by_hand():
  c = call(4096, H=4, K=4, D=64, dtype='bfloat16')
  want = 2 * (128 * 64 + 256 * 128) * 2 + 128 * 256 * 4 + 128 * 66 * 4
  assert cost.fast_bytes(c, Blocks(128, 256)) == want == cost.forward(c, Blocks(128, 256)).fast_bytes
  lanes = 2 * (128 * 128 + 256 * 256) * 2 + 128 * 256 * 4 + 128 * (128 + 2 * 128) * 4
  assert cost.fast_bytes(c, Blocks(128, 256), lanes=128) == lanes
  grouped = call(4096, H=8, K=2, D=64, dtype='bfloat16')
  assert cost.fast_bytes(grouped, Blocks(32, 256)) == want  # 4 heads of 32 queries are 128 rows
  assert cost.fast_bytes(c, Blocks(10**6, 10**6)) == cost.fast_bytes(c, Blocks(4096, 4096))
  both = 2 * (128 + 256) * 128 * 2 + 4 * 128 * 4 + 2 * 128 * 256 * 4 + 256 * 128 * 4 + 4 * 128 * 64 * 4
  assert cost.fast_bytes(c, Blocks(128, 256), is_backward=True) == both


def test_bytes_fall_as_tiles_grow_to_the_floor():
  moved = {bq: cost.forward(call(512, D=64), Blocks(bq, 64)).hbm_bytes for bq in (32, 64, 128, 512, 4096)}
  q_and_out, floor = 4 * 512 * 128, 4 * 512 * 128 * 2
  assert (moved[32] - q_and_out) == 2 * (moved[64] - q_and_out) == 4 * (moved[128] - q_and_out)
  assert moved[512] == moved[4096] == floor == 4 * roofline.io_bound(sizes(512, D=64), 1e9).floor


def test_least_bytes_are_every_array_once():
  c = call(30, 40, B=2, H=6, K=3, D=5, V=7)
  q, k, v, out = 2 * 30 * 6 * 5, 2 * 40 * 3 * 5, 2 * 40 * 3 * 7, 2 * 30 * 6 * 7
  for blocks in (Blocks(4, 8), Blocks(7, 40)):
    assert cost.forward(c, blocks).least_bytes == cost.least_bytes(c, blocks) == 4 * (q + k + v + out)
    want = 4 * (q + k + v + 2 * out + 2 * 30 * 6 + q + k + v)  # q, k, v, out, d_out, lse; dq, dk, dv
    assert cost.backward(c, blocks).least_bytes == cost.least_bytes(c, blocks, is_backward=True) == want
  assert cost.array_bytes(c) == 4 * (q + k + v + out)
  assert cost.array_bytes(c, is_backward=True) == 4 * (2 * (q + k + v + out) + 2 * 30 * 6)
  biased = call(30, 40, B=2, H=6, K=3, D=5, V=7, bias=(1, 6, 30, 40))
  n = 4 * 6 * 30 * 40
  assert cost.least_bytes(biased, Blocks(4, 8)) - cost.least_bytes(c, Blocks(4, 8)) == n
  back = [cost.least_bytes(x, Blocks(4, 8), is_backward=True) for x in (c, biased)]
  assert back[1] - back[0] == 2 * n  # read, and its gradient written
  assert cost.array_bytes(biased) - cost.array_bytes(c) == n
  assert cost.array_bytes(biased, is_backward=True) - cost.array_bytes(c, is_backward=True) == 2 * n


def test_least_bytes_leave_out_what_no_tile_holds():
  """One query beside the first of 64 keys: a tile of 8 keys."""
  one = call(1, 64, D=3, V=5, mask=masks.causal())
  assert cost.least_bytes(one, Blocks(8, 8)) == 4 * (3 + 8 * 8 + 5)
  last = call(1, 64, D=3, V=5, mask=masks.causal(), shift=63)
  assert cost.least_bytes(last, Blocks(8, 8)) == 4 * (3 + 64 * 8 + 5)


DENSE = np.tri(40, dtype=bool)[None, None]


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'mask': masks.causal()},
    {'mask': masks.causal() & masks.window(5)},
    {'T': 1, 'S': 4096, 'mask': masks.causal()},
    {'T': 1, 'S': 4096, 'mask': masks.causal() & masks.window(7), 'shift': 4095},
    {'T': 1, 'S': 4096, 'mask': masks.causal(), 'shift': 4095, 'splits': 8},
    {'T': 4096, 'S': 8, 'mask': masks.window(3, 3)},
    {'mask': masks.causal(np.array([-40, 0]))},
    {'mask': masks.array(DENSE)},
    {'mask': masks.causal(), 'bias': (1, 1, 40, 40)},
    {'mask': masks.causal(), 'bias': (2, 8, 40, 1)},
    {'mask': masks.causal(), 'bias': (1, 8, 1, 40)},
    {'mask': masks.causal(), 'bias': (1, 1, 1, 1)},
  ],
  ids=str,
)
@pytest.mark.parametrize('K', [8, 2])
@pytest.mark.parametrize('is_backward', [False, True])
def test_a_bound_is_no_more_than_what_is_moved(options, K, is_backward):
  c = call(**{'T': 40, 'S': 40, 'B': 2, 'H': 8, 'K': K, 'D': 64, **options})
  count = cost.backward if is_backward else cost.forward
  for blocks in (Blocks(8, 16), Blocks(4, 4), Blocks(40, 64)):
    made = count(c, blocks)
    fitting = dataclasses.replace(H100, fast_bytes=made.fast_bytes)  # the smallest memory that holds these tiles
    for chip in (fitting, H100):
      assert made.least_bytes <= roofline.io_bytes(c, blocks, chip, is_backward=is_backward) <= made.hbm_bytes
    assert roofline.of(made, H100, is_least=True).seconds <= roofline.of(made, H100).seconds


def test_options_cost_what_they_add():
  plain = cost.forward(call(32, 48, H=2), Blocks(16, 16))
  more = lambda **options: cost.forward(call(32, 48, H=2, **options), Blocks(16, 16))
  scores = 2 * 32 * 48
  assert more(soft_cap=True).exps - plain.exps == scores
  assert more(soft_cap=True).vector_ops - plain.vector_ops == 2 * scores
  assert more(bias=(1, 2, 32, 48)).read_bytes - plain.read_bytes == 4 * scores
  assert more(bias=(1, 1, 1, 48)).read_bytes - plain.read_bytes == 4 * 2 * 48 * 2  # for both query tiles of both heads
  dense = np.ones((1, 1, 32, 48), bool)
  assert more(mask=masks.array(dense)).read_bytes - plain.read_bytes in (0, scores)
  split = more(splits=3)
  assert split.programs == 3 * plain.programs and split.launches == 4 and split.flops == plain.flops
  assert split.write_bytes - plain.write_bytes == 3 * 2 * 32 * (16 + 1) * 4
  # Two more loads of q, and (out, lse) of three runs by the merge.
  assert split.read_bytes - plain.read_bytes == 2 * 2 * 32 * 16 * 4 + 3 * 2 * 32 * (16 + 1) * 4
  back = [cost.backward(call(32, 48, H=2, **x), Blocks(16, 16)) for x in ({}, {'bias': (1, 2, 32, 48)})]
  assert back[1].write_bytes - back[0].write_bytes == 4 * scores == back[1].read_bytes - back[0].read_bytes
  residual = cost.forward(call(32, 48, H=2), Blocks(16, 16), return_residual=True)
  assert residual.write_bytes - plain.write_bytes == 4 * 2 * 32
  with pytest.raises(ValueError, match='bias'):
    call(32, 48, bias=(1, 2, 32, 48))


def test_vector_operations_by_hand():
  """Two tiles of 8 x 4 scores and values of width 3: 4 a score, 7 a row and tile, 4 a row at the end."""
  rows, tiles = 8, 2
  assert cost.forward(call(8, 8, D=5, V=3), Blocks(8, 4)).vector_ops == 4 * 64 + 7 * rows * tiles + 4 * rows
  assert cost.backward(call(8, 8, D=5, V=3), Blocks(8, 4)).vector_ops == 4 * 64 + 5 * rows * tiles + 3 * rows
  masked = call(8, 8, D=5, V=3, mask=masks.causal())  # both tiles need it: compare and select
  assert cost.forward(masked, Blocks(8, 4)).vector_ops == 6 * 64 + 7 * rows * tiles + 4 * rows


def test_operations_of_score_functions():
  count = lambda f, *arrays: op_count.of_score(bias.score(f, *arrays), 3)
  assert count(lambda s, b, h, i, j: s) == (0, 0)
  assert count(lambda s, b, h, i, j: s + (i - j)) == (2, 0)
  assert count(lambda s, b, h, i, j: 5 * jnp.tanh(s / 5)) == (2, 1)
  assert count(lambda s, b, h, i, j, gain: s * gain[h], np.ones(3)) == (1, 0)
  assert op_count.of_score(None, 3) == (0, 0)
  # Roots and powers go through the special unit.
  assert count(lambda s, b, h, i, j: jnp.sqrt(s) + jax.lax.rsqrt(s) * s**0.3) == (2, 3)
  # A table that is small and even, as an early tile was: work on it alone is not of a logit.
  assert count(lambda s, b, h, i, j, x: s + (x * x + 1).sum(), np.ones((2, 3), np.float32)) == (1, 0)
  alibi = bias.alibi(bias.alibi_slopes(4))
  more = cost.forward(call(16, H=4, score=alibi), Blocks(8, 8)).vector_ops
  assert more > cost.forward(call(16, H=4), Blocks(8, 8)).vector_ops


def test_operations_of_branches_and_loops():
  count = lambda f, *arrays: op_count.of_score(bias.score(f, *arrays), 3)
  dear = lambda s: jnp.exp(s * 2) + 1
  assert count(lambda s, b, h, i, j, flag: jax.lax.cond(flag > 0, dear, lambda s: s + 1, s), np.ones(())) == (2, 1)
  assert count(lambda s, b, h, i, j: jax.lax.fori_loop(0, 5, lambda n, s: dear(s), s)) == (10, 5)
  double = lambda s: jax.lax.fori_loop(0, 2, lambda n, s: s * 2, s)
  assert count(lambda s, b, h, i, j: jax.lax.fori_loop(0, 3, lambda n, s: double(s), s)) == (6, 0)
  assert count(lambda s, b, h, i, j: jax.jit(dear)(s)) == (2, 1)
  with pytest.raises(NotImplementedError, match='while'):
    count(lambda s, b, h, i, j: jax.lax.while_loop(lambda s: s.sum() < 9, lambda s: s * 2, s))


@pytest.mark.parametrize('T, chunk', [(24, 8), (29, 8), (5, 64)])
def test_linear_family(T, chunk):
  q, k, v = qkv(T, T, 4, 6)
  out, memory = tiler.recurrence(q, k, v, chunk)
  np.testing.assert_allclose(out, np.tril(q @ k.T) @ v, rtol=1e-9, atol=1e-12)
  got = cost.linear(sizes(T, D=4, V=6), chunk, dtype='float32')
  assert got.flops == memory.flops and got.read_bytes == 4 * sum(memory.loads.values())
  delta = cost.linear(sizes(T, D=4, V=6), chunk, update='delta', dtype='float32')
  parts = [min(chunk, T - i) for i in range(0, T, chunk)]
  assert delta.flops - got.flops == sum(C * C * 4 + C * C * 10 + 2 * C * 4 * 6 for C in parts)
  kept = cost.linear(sizes(T, H=3, D=4, V=6), chunk, keep_states=True)
  lost = cost.linear(sizes(T, H=3, D=4, V=6), chunk)
  assert kept.write_bytes - lost.write_bytes == 3 * len(parts) * 4 * 6 * 4  # NC D V numbers of 4 bytes a head


def test_what_decoding_reads():
  s = sizes(1, 1000, H=8, K=2, D=64)
  assert cost.kv_bytes(s, 2) == 2 * 2 * 64 * 2 * 1000
  assert cost.kv_bytes(s, 0.5, scale_bytes=4) == 1000 * 2 * (64 + 4)
  assert cost.state_bytes(s) == 2 * 8 * 64 * 64 * 4


def test_cost_estimate_is_what_pallas_takes():
  c = cost.forward(call(64), Blocks(16, 16))
  estimate = pl.CostEstimate(**cost.cost_estimate(c))
  assert estimate.flops == c.flops + c.vector_ops and estimate.bytes_accessed == c.hbm_bytes
  assert all(type(x) is int for x in cost.cost_estimate(c).values())


def test_time_grows_with_every_size():
  def seconds(**more):
    c = call(**{'T': 4096, 'S': 4096, 'B': 2, 'H': 8, 'D': 128, 'dtype': 'bfloat16', **more})
    return roofline.of(cost.forward(c, Blocks(256, 256)), H100).seconds

  for name, values in (('T', (512, 4096, 5000)), ('S', (512, 4096, 5000)), ('B', (1, 2, 3)), ('H', (4, 8, 16))):
    times = [seconds(**{name: n}) for n in values]
    assert times == sorted(times) and times[0] < times[-1], name


def test_scaling_exponents():
  def slope(f):
    return np.log2(f(2**16) / f(2**15))

  time = lambda c: roofline.of(c, H100).seconds
  dense = lambda T: time(cost.forward(call(T, D=128, dtype='bfloat16'), Blocks(512, 512)))
  local = lambda T: time(
    cost.forward(call(T, D=128, dtype='bfloat16', mask=masks.causal() & masks.window(1000)), Blocks(512, 512))
  )
  assert slope(dense) == pytest.approx(2.0, abs=0.01)
  assert slope(local) == pytest.approx(1.0, abs=0.05)
  assert slope(lambda T: time(cost.linear(sizes(T, D=128), 128))) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
  'build, words',
  [
    (lambda: sizes(0), 'T=0'),
    (lambda: sizes(4, D=2.5), 'D=2.5'),
    (lambda: sizes(4, H=3, K=2), 'K=2 key heads must divide H=3'),
    (lambda: call(4, splits=5), 'splits=5'),
    (lambda: call(4).visits((4, 4)), 'Blocks'),
    (lambda: cost.linear(sizes(4, 5), 2), 'T=4 queries are not S=5'),
    (lambda: cost.linear(sizes(4), 0), 'chunk=0'),
    (lambda: cost.linear(sizes(4), 2, update='gated'), "update='gated'"),
  ],
)
def test_rejects(build, words):
  with pytest.raises(ValueError, match=words):
    build()


def test_tiled_attention_visits_what_is_counted(monkeypatch):
  """The tiles that attn/tiled.py goes through are those of the model."""
  mask, blocks, q, seen = masks.causal() & masks.window(30), Blocks(16, 8), jnp.zeros((1, 60, 2, 16)), []
  real = tiled.work
  monkeypatch.setattr(tiled, 'work', lambda *args: seen.append(real(*args)) or seen[-1])
  softmax.attend(q, q, q, mask=mask, implementation='xla', blocks=blocks)
  count = {run.is_masked: run.q_id.shape[-1] for run in seen[0].runs}
  got = call(60, H=2, mask=mask).visits(blocks)
  assert got.tiles == 2 * sum(count.values())
  whole = 2 * 16 * 8 * count.get(False, 0)
  assert got.elements - got.partial == whole > 0
