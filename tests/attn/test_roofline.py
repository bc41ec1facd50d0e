"""attn.cost.roofline by hand: times, tiles that fit, occupancy, rings, decoding, I/O bounds."""

import dataclasses
import math

import pytest

from attn import cost, masks, plan as plans
from attn.cost import Attention, Cost, Sizes, hardware, roofline
from attn.softmax import Blocks

# Round figures: 100 FLOP/s, 10 bytes/s, 4 exponentials/s, 20 operations/s, half a second a launch.
CHIP = hardware.Hardware(
  'round', 'gpu', {'bfloat16': 100.0, 'int8': 200.0}, 10.0, 1e9, 1000, 20.0, 4.0, 0.5, 3, 5.0, 1,
  dict.fromkeys(hardware.FIGURES, 'made up'),
)  # fmt: skip


def a_cost(flops=None, vector=0, exps=0, reads=0, writes=0, launches=1, least=None):
  return Cost(flops or {}, vector, exps, reads, writes, 0, 1, 1, launches, least)


@pytest.mark.parametrize(
  'made, seconds, serial, bound',
  [
    (a_cost({'bfloat16': 300, 'int8': 200}, 40, 4, 10, 5), 4.5, 4 + 2 + 1 + 1.5 + 0.5, 'matmul'),
    (a_cost({'bfloat16': 100}, exps=20), 5.5, 6.5, 'exp'),
    (a_cost({'bfloat16': 100}, vector=60), 3.5, 4.5, 'vector'),
    (a_cost({'bfloat16': 100}, reads=30, writes=10), 4.5, 5.5, 'memory'),
    (a_cost({'bfloat16': 100}, launches=7), 4.5, 4.5, 'launch'),
  ],
)
def test_roofline(made, seconds, serial, bound):
  got = roofline.of(made, CHIP)
  assert (got.seconds, got.serial_seconds, got.bound, got.left_out) == (seconds, serial, bound, ())


def test_the_least_time_loads_once():
  made = a_cost({'bfloat16': 100}, reads=30, writes=10, least=20)
  assert roofline.of(made, CHIP).seconds == 4.5 and roofline.of(made, CHIP, is_least=True).seconds == 2.5
  once = a_cost({'bfloat16': 100}, reads=30, writes=10)
  assert roofline.of(once, CHIP, is_least=True) == roofline.of(once, CHIP)


def test_loads_of_keys_again_are_not_in_the_least_time():
  chip, c = hardware.get('H100'), call(8192)
  small = cost.forward(c, Blocks(16, 64))  # all keys are loaded 512 times: the L2 of a GPU would have them
  once = 2 * 4 * 8192 * 8 * 128
  assert roofline.of(small, chip).bound == 'memory' and small.hbm_bytes > 50 * once
  least = roofline.of(small, chip, is_least=True)
  assert least.bound == 'matmul' and least.parts['memory'] == once / chip.hbm_bandwidth


def test_what_has_no_figure_is_left_out_and_said():
  blind = dataclasses.replace(CHIP, exp_rate=None, launch_latency=None)
  got = roofline.of(a_cost({'float32': 100}, exps=400, vector=40), blind)
  assert got.left_out == ('matmul in float32', 'exp', 'launch') and got.seconds == 2 and got.bound == 'vector'
  nothing = dataclasses.replace(blind, vector_rate=None, hbm_bandwidth=None)
  assert roofline.of(a_cost({'float32': 100}, vector=1), nothing).bound == 'unknown'


def call(T=4096, mask=masks.causal(), D=128, H=8, K=8):  # noqa: B008 (a mask never changes)
  return Attention(Sizes(B=1, T=T, S=T, H=H, K=K, D=D, V=D), mask=mask)


@pytest.mark.parametrize('name', hardware.HARDWARE)
@pytest.mark.parametrize('is_backward', [False, True])
def test_best_tiles_fit_and_are_best(name, is_backward):
  chip, c = hardware.get(name), call(1024)
  blocks, made = roofline.best(c, chip, is_backward=is_backward)
  assert made.fast_bytes <= chip.fast_bytes and roofline.fits(made, chip)
  count = cost.backward if is_backward else cost.forward
  assert made == count(c, blocks, lanes=chip.lanes)
  for other in (Blocks(256, 256), Blocks(512, 256), Blocks(512, 512)):
    rival = count(c, other, lanes=chip.lanes)
    if roofline.fits(rival, chip) and chip.kind == 'tpu':
      assert roofline.of(made, chip).seconds <= roofline.of(rival, chip).seconds


def test_of_equally_long_the_one_that_does_least():
  """With chunks of 64 all tiles of up to 64 keys load the same, but small ones compute less."""
  slow = dataclasses.replace(CHIP, fast_bytes=None, hbm_bandwidth=1e-6)
  blocks, made = roofline.best(call(256, masks.chunked(64), D=16, H=1, K=1), slow)
  assert blocks == Blocks(64, 64)
  rival = cost.forward(call(256, masks.chunked(64), D=16, H=1, K=1), Blocks(256, 64))
  assert rival.hbm_bytes == made.hbm_bytes and rival.flops > made.flops


def test_a_plan_has_its_own_tiles_and_others_a_multiple():
  mask, sizes = masks.causal(), Sizes(B=1, T=256, S=256, H=64, K=1, D=16, V=16)
  plan = plans.of(mask, 256, block_q=8, block_kv=32)
  blocks, made = roofline.best(Attention(sizes, mask=mask, plan=plan), hardware.get('B200'))
  assert blocks == Blocks(8, 32) and made == cost.forward(Attention(sizes, mask=mask), blocks)
  assert roofline.best(Attention(sizes, mask=mask), hardware.get('B200'))[0].q % 8
  assert roofline.best(Attention(sizes, mask=mask), hardware.get('v5e'), multiple=8)[0].q % 8 == 0


def test_nothing_fits():
  tiny = dataclasses.replace(CHIP, fast_bytes=10_000)
  with pytest.raises(ValueError, match='no tiles fit round: 64 rows and 64 keys need'):
    roofline.best(call(), tiny)
  made = cost.forward(call(), Blocks(64, 64))
  exact, short = (dataclasses.replace(CHIP, fast_bytes=made.fast_bytes - n) for n in (0, 1))
  assert roofline.fits(made, exact) and not roofline.fits(made, short)
  assert roofline.fits(made, dataclasses.replace(CHIP, fast_bytes=None)) is None


@pytest.mark.parametrize('programs, cores, want', [(132, 132, (1, 1)), (133, 132, (2, 133 / 264)), (1, 8, (1, 1 / 8))])
def test_occupancy(programs, cores, want):
  assert roofline.occupancy(programs, cores) == want


def test_ring():
  c = Attention(Sizes(B=2, T=8, S=8, H=2, K=1, D=3, V=5), mask=masks.everything())
  made = cost.forward(c, Blocks(8, 8))
  got = roofline.ring(c, made, CHIP, 4)
  whole = 2 * 8 * 1 * (3 + 5) * 2
  assert got.bytes_sent == 3 / 4 * whole and got.hop_seconds == whole / 4 / 5.0
  assert got.compute_seconds == roofline.of(made, CHIP, is_least=True).seconds / 16
  halves = roofline.ring(c, made, dataclasses.replace(CHIP, devices=2), 4)  # 4 devices are 2 chips
  assert halves.compute_seconds == 2 * got.compute_seconds and halves.hop_seconds == got.hop_seconds
  assert got.is_hidden == (got.compute_seconds >= got.hop_seconds)
  fast, slow = (dataclasses.replace(CHIP, link_bandwidth=x) for x in (1e9, 1e-9))
  assert roofline.ring(c, made, fast, 4).is_hidden and not roofline.ring(c, made, slow, 4).is_hidden
  with pytest.raises(ValueError, match='links'):
    roofline.ring(c, made, hardware.get('cpu'), 4)


def test_decode():
  step = lambda batch, kv=2.0: roofline.decode(CHIP, batch=batch, weight_bytes=60.0, kv_bytes=kv, flops=50.0)
  assert step(1).tokens_per_second == 10 / 62 and step(1).bound == 'memory'
  # 50 / 100 s a token of arithmetic; memory takes (60 / b + 2) / 10 s: equal at b = 20.
  assert step(1).crossover_batch == 20
  assert step(20).tokens_per_second == 2 and step(19).bound == 'memory' and step(21).bound == 'matmul'
  assert step(1, kv=5.0).crossover_batch == math.inf and step(10**6, kv=6.0).bound == 'memory'
  with pytest.raises(ValueError, match='float64'):
    roofline.decode(CHIP, batch=1, weight_bytes=1, kv_bytes=1, flops=1, dtype='float64')


@pytest.mark.parametrize(
  'bad, words',
  [
    ({'flops': 0}, 'flops=0'),
    ({'flops': -1.0}, 'flops=-1.0'),
    ({'flops': math.nan}, 'flops=nan'),
    ({'weight_bytes': 0, 'kv_bytes': 0}, 'weight_bytes=0 and kv_bytes=0'),
    ({'kv_bytes': -2}, 'kv_bytes=-2'),
    ({'batch': 0}, 'batch=0'),
  ],
)
def test_decode_rejects(bad, words):
  with pytest.raises(ValueError, match=words):
    roofline.decode(CHIP, **{'batch': 1, 'weight_bytes': 1.0, 'kv_bytes': 1.0, 'flops': 1.0, **bad})


def square(N, d):
  return Sizes(B=1, T=N, S=N, H=1, K=1, D=d, V=d)


def test_io_bounds_of_the_paper():
  below = roofline.io_bound(square(4096, 128), 2048)
  assert below.flash == pytest.approx(1.34e8, rel=2e-3) and below.small == pytest.approx(4.75e7, rel=2e-3)
  assert not below.is_large and below.numbers == below.small
  above = roofline.io_bound(square(4096, 64), 65536)
  assert above.flash == pytest.approx(1.05e6, rel=2e-3) and above.materialized == pytest.approx(1.70e7, rel=3e-3)
  assert above.is_large and above.numbers == max(above.flash, above.floor)


def test_regimes_meet_at_the_square_of_the_width():
  at = roofline.io_bound(square(4096, 128), 128**2)
  assert at.is_large and at.flash == at.small
  assert not roofline.io_bound(square(4096, 128), 128**2 - 1).is_large
  for M in (128**2, 2 * 128**2):  # the large regime falls as 1 / M
    assert roofline.io_bound(square(2**20, 128), 2 * M).numbers == roofline.io_bound(square(2**20, 128), M).numbers / 2
  assert roofline.io_bound(square(4096, 128), 1e12).numbers == 4 * 4096 * 128


def test_flash_moves_at_least_the_bound():
  """Tiles of the size that the bound is about move what it says, up to a small constant."""
  c, M = call(8192, masks.everything(), H=1, K=1), 2**18
  rows = M // (4 * 128)
  moved = cost.forward(c, Blocks(rows, 64)).hbm_bytes / 2
  bound = roofline.io_bound(c.sizes, M).numbers
  assert bound <= moved <= 10 * bound


def test_io_bytes_by_hand():
  """4 heads of 256 x 256 scores, of which causal tiles of 64 hold 10 of 16; D = 32, numbers of 2 bytes."""
  c = Attention(Sizes(B=2, T=256, S=256, H=2, K=1, D=32, V=16), mask=masks.causal())
  scores, once = 4 * 10 * 64 * 64, 2 * (4 * 256 * 48 + 2 * 256 * 48)
  at = lambda numbers, c=c: roofline.io_bytes(c, Blocks(64, 64), dataclasses.replace(CHIP, fast_bytes=2 * numbers))
  assert at(32**2) == 2 * scores and at(2 * 32**2) == scores > once  # E D^2 / M
  assert at(64) == 2 * scores * 32 / 8  # E D / sqrt(M), where M < D^2
  assert at(10**6) == once == roofline.io_bytes(c, Blocks(64, 64), dataclasses.replace(CHIP, fast_bytes=None))
  dense = Attention(square(256, 32), mask=masks.everything())
  for M in (100, 1024, 4096, 10**6):
    assert at(M, dense) == 2 * roofline.io_bound(dense.sizes, M).numbers
