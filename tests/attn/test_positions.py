"""attn.positions against complex rotations in float64 loops."""

import cmath
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attn import positions
from attn.positions import Linear, Llama3, LongRope, NTKAware, Rotary, YaRN

SETTINGS = {
  'plain': Rotary(),
  'base': Rotary(base=100.0),
  'partial': Rotary(fraction=0.5),
  'linear': Rotary(scaling=Linear(4.0)),
  'ntk': Rotary(scaling=NTKAware(4.0)),
  'yarn': Rotary(base=100.0, scaling=YaRN(4.0, original_length=64, beta_fast=8.0)),
  'yarn_turns': Rotary(base=100.0, scaling=YaRN(4.0, original_length=64, beta_fast=8.0, ramp='turns')),
  'yarn_not_truncated': Rotary(base=100.0, scaling=YaRN(4.0, 64, beta_fast=8.0, truncate=False, attention_factor=1.5)),
  'llama3': Rotary(base=100.0, scaling=Llama3(8.0, 1.0, 4.0, original_length=64)),
  'longrope': Rotary(scaling=LongRope((1.0, 1.5, 4.0, 30.0), 32.0, original_length=64)),
  'partial_yarn': Rotary(fraction=0.5, scaling=YaRN(2.0, original_length=256)),
}
each_setting = pytest.mark.parametrize('name', SETTINGS)


def oracle_frequencies(rotary, width):
  """One pair at a time, from the papers and the published code; shares nothing with attn.positions."""
  w, scaling, base, factor = int(width * rotary.fraction), rotary.scaling, rotary.base, 1.0
  if isinstance(scaling, NTKAware):
    base = base * math.exp(math.log(scaling.factor) * w / (w - 2))
  out = []
  for i in range(w // 2):
    f = 1 / base ** (2 * i / w)
    if isinstance(scaling, Linear):
      f = f / scaling.factor
    if isinstance(scaling, Llama3):
      wavelength, old = 2 * math.pi / f, scaling.original_length
      if wavelength > old / scaling.low_freq_factor:
        f = f / scaling.factor
      elif wavelength > old / scaling.high_freq_factor:
        smooth = (old / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        f = (1 - smooth) * f / scaling.factor + smooth * f
    if isinstance(scaling, LongRope):
      f = f / scaling.factors[i]
      factor = scaling.attention_factor or math.sqrt(1 + math.log(scaling.factor, scaling.original_length))
    if isinstance(scaling, YaRN):
      factor = scaling.attention_factor or 1 + math.log(scaling.factor) / 10
      if scaling.ramp == 'turns':
        turns = scaling.original_length / (2 * math.pi / f)
        gamma = (turns - scaling.beta_slow) / (scaling.beta_fast - scaling.beta_slow)
      else:
        ends = []
        for turns, rounded in ((scaling.beta_fast, math.floor), (scaling.beta_slow, math.ceil)):
          end = w * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
          ends.append(rounded(end) if scaling.truncate else end)
        low, high = max(ends[0], 0), min(ends[1], w - 1)
        gamma = 1 - (i - low) / (high - low)
      gamma = min(max(gamma, 0), 1)
      f = gamma * f + (1 - gamma) * f / scaling.factor
    out.append(f)
  return out, factor


def oracle(x, places, rotary):
  """Every pair of channels as a complex number, turned by e^(i p f)."""
  f, factor = oracle_frequencies(rotary, x.shape[-1])
  out, half = np.array(x), len(f)
  places = np.broadcast_to(places, x.shape[:2])
  for b, t, h, i in np.ndindex(*x.shape[:3], half):
    z = complex(x[b, t, h, i], x[b, t, h, i + half]) * cmath.exp(1j * places[b, t] * f[i]) * factor
    out[b, t, h, i], out[b, t, h, i + half] = z.real, z.imag
  return out


def array(*shape, seed=0, dtype=np.float64):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@each_setting
def test_frequencies_match_the_published_formulas(name):
  for width in (8,) if isinstance(SETTINGS[name].scaling, LongRope) else (8, 16, 64):  # its factors are for one width
    f, factor = positions.frequencies(SETTINGS[name], width)
    want, want_factor = oracle_frequencies(SETTINGS[name], width)
    np.testing.assert_allclose(f, want, rtol=1e-13)
    assert f.dtype == np.float64 and factor == pytest.approx(want_factor, rel=1e-15)


def test_the_ramps_are_really_ramps():
  """Some pair is kept, some interpolated, some between: otherwise the tests above say little."""
  plain, _ = positions.frequencies(Rotary(base=100.0), 16)
  for name in ('yarn', 'yarn_turns', 'yarn_not_truncated', 'llama3'):
    f, _ = positions.frequencies(SETTINGS[name], 16)
    ratio, factor = plain / f, SETTINGS[name].scaling.factor
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(factor), name
    assert np.any((ratio > 1.01) & (ratio < factor - 0.01)), name


@pytest.mark.parametrize('ids', [[0, 1, 2, 3, 4], [[3, 0, 7, -1, 40], [5, 6, 7, 8, 9]]], ids=['T', 'BT'])
@each_setting
def test_rotate_matches_oracle(name, ids):
  x = array(2, 5, 3, 8)
  with jax.enable_x64(True):
    got = positions.rotate(x, np.array(ids), SETTINGS[name])
  np.testing.assert_allclose(got, oracle(x, np.array(ids), SETTINGS[name]), rtol=1e-12, atol=1e-12)


@each_setting
def test_scores_depend_on_the_difference_alone_and_norms_are_kept(name):
  rotary, (q, k) = SETTINGS[name], array(2, 1, 6, 2, 8)
  places = np.array([0, 1, 5, 11, 30, 100])
  with jax.enable_x64(True):
    scores = [
      np.einsum('bthd,bshd->bhts', *(positions.rotate(x, places + shift, rotary) for x in (q, k)))
      for shift in (0, 1, 1000)
    ]
    rotated = np.asarray(positions.rotate(q, places, rotary))
  for other in scores[1:]:
    np.testing.assert_allclose(other, scores[0], rtol=1e-10, atol=1e-10)
  f, factor = positions.frequencies(rotary, 8)
  w = 2 * len(f)
  norm = lambda x: np.linalg.norm(x, axis=-1)
  np.testing.assert_allclose(norm(rotated[..., :w]), factor * norm(q[..., :w]), rtol=1e-12)
  np.testing.assert_array_equal(rotated[..., w:], q[..., w:])


@each_setting
def test_reposition_is_rotation_at_the_new_place(name):
  rotary, k = SETTINGS[name], array(2, 5, 2, 8)
  old, new = np.array([[0, 1, 2, 3, 4], [7, 90, 11, 0, 2]]), np.array([9, 2, 2, 1000, 0])
  with jax.enable_x64(True):
    moved = positions.reposition(positions.rotate(k, old, rotary), old, new, rotary)
    want = positions.rotate(k, new, rotary)
  np.testing.assert_allclose(moved, want, rtol=1e-11, atol=1e-11)


def test_reposition_takes_the_difference_in_integers():
  """Positions beyond float32's integers: a move by one is a turn by one all the same."""
  k, far = array(1, 3, 1, 8, dtype=np.float32), np.array([2**24 + 1, 2**25 + 3, 2**30 + 1])
  got = positions.reposition(k, far, far + 1, Rotary())
  np.testing.assert_array_equal(got, positions.rotate(k, np.ones(3, int), Rotary()))


def test_limit_cases():
  x, places = array(1, 7, 2, 16), np.arange(7)
  with jax.enable_x64(True):
    rotate = lambda rotary, places=places, x=x: np.asarray(positions.rotate(x, places, rotary))
    plain = rotate(Rotary())
    for scaling in (Linear(1.0), NTKAware(1.0), YaRN(1.0, 64), YaRN(1.0, 64, ramp='turns'), Llama3(1.0, 1.0, 4.0, 64)):
      np.testing.assert_allclose(rotate(Rotary(scaling=scaling)), plain, rtol=1e-14, atol=1e-15, err_msg=str(scaling))
    # Interpolation by 4 at position 4 p is plain rotation at p.
    np.testing.assert_allclose(rotate(Rotary(scaling=Linear(4.0)), 4 * places), plain, rtol=1e-13, atol=1e-14)
    # At position 0 nothing turns.
    np.testing.assert_array_equal(rotate(Rotary(), 0 * places), x)
    # Half the channels rotated: those as a narrower head, the others untouched.
    half = rotate(Rotary(fraction=0.5))
    np.testing.assert_array_equal(half[..., :8], rotate(Rotary(), x=x[..., :8]))
  # The slowest pair of NTK-aware scaling is interpolated exactly, the fastest not at all.
  f, g = positions.frequencies(Rotary(), 16)[0], positions.frequencies(Rotary(scaling=NTKAware(8.0)), 16)[0]
  np.testing.assert_allclose([f[0] / g[0], f[-1] / g[-1]], [1, 8], rtol=1e-12)


def test_yarn_far_outside_its_range_keeps_or_interpolates_everything():
  f, _ = positions.frequencies(Rotary(base=2.0), 8)
  kept, _ = positions.frequencies(Rotary(base=2.0, scaling=YaRN(4.0, original_length=10**9)), 8)
  np.testing.assert_array_equal(kept, f)
  turns = YaRN(4.0, original_length=7, beta_slow=1.0, ramp='turns')
  scaled, _ = positions.frequencies(Rotary(base=10.0**9, scaling=turns), 64)
  np.testing.assert_allclose(scaled[4:], positions.frequencies(Rotary(base=10.0**9), 64)[0][4:] / 4, rtol=1e-12)


def test_dtypes():
  x, places = array(1, 9, 2, 16), np.arange(9) * 11
  for dtype, tolerance in ((jnp.bfloat16, 2**-7), (jnp.float16, 2**-10), (jnp.float32, 1e-5)):
    low = jnp.asarray(x, dtype)
    got = positions.rotate(low, places, Rotary())
    want = oracle(np.asarray(low, np.float64), places, Rotary())
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


def test_gradients():
  x, old, new = array(1, 3, 2, 8), np.array([1, 5, 9]), np.array([0, 7, 2])
  with jax.enable_x64(True):
    for name in ('plain', 'partial_yarn'):
      check_grads(lambda x, r=SETTINGS[name]: positions.rotate(x, old, r), (x,), order=2, modes=['fwd', 'rev'])
      check_grads(lambda x, r=SETTINGS[name]: positions.reposition(x, old, new, r), (x,), order=1, modes=['rev'])


def test_jit_and_vmap_take_traced_positions():
  x, places = array(4, 2, 5, 2, 8, dtype=np.float32), np.arange(20, dtype=np.int32).reshape(4, 5)
  rotate = jax.jit(positions.rotate, static_argnums=2)
  together = jax.vmap(lambda x, p: rotate(x, p, Rotary()))(x, places)
  for i in range(4):
    np.testing.assert_allclose(together[i], positions.rotate(x[i], places[i], Rotary()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda: Rotary(base=1.0), 'base=1.0'),
    (lambda: Rotary(fraction=0.0), 'fraction=0.0'),
    (lambda: Rotary(fraction=1.5), 'fraction=1.5'),
    (lambda: Rotary(scaling='yarn'), "scaling='yarn'"),
    (lambda: Linear(0.5), 'factor=0.5'),
    (lambda: Linear(math.nan), 'factor=nan'),
    (lambda: NTKAware(0.5), 'factor=0.5'),
    (lambda: YaRN(0.5, 64), 'factor=0.5'),
    (lambda: YaRN(2.0, 6), 'original_length=6'),
    (lambda: YaRN(2.0, 64, beta_fast=1.0), 'beta_slow=1.0'),
    (lambda: YaRN(2.0, 64, attention_factor=-1.0), 'attention_factor=-1.0'),
    (lambda: YaRN(2.0, 64, ramp='cosine'), "ramp='cosine'"),
    (lambda: Llama3(0.5, 1.0, 4.0, 64), 'factor=0.5'),
    (lambda: Llama3(8.0, 4.0, 1.0, 64), 'low_freq_factor=4.0'),
    (lambda: Llama3(8.0, 1.0, 4.0, 0), 'original_length=0'),
    (lambda: LongRope((), 8.0, 64), r'factors=\(\)'),
    (lambda: LongRope((1.0, 0.0), 8.0, 64), r'factors=\(1.0, 0.0\)'),
    (lambda: LongRope((1.0,), 0.5, 64), 'factor=0.5'),
    (lambda: LongRope((1.0,), 2.0, 1), 'original_length=1'),
    (lambda: positions.frequencies(Rotary(), 7), 'width=7'),
    (lambda: positions.frequencies(Rotary(fraction=0.25), 12), 'fraction=0.25 of width=12'),
    (lambda: positions.frequencies(Rotary(fraction=0.3), 8), 'fraction=0.3 of width=8'),
    (lambda: positions.rotate(jnp.zeros((2, 3, 8)), jnp.arange(3), Rotary()), r'x has shape \(2, 3, 8\)'),
    (lambda: positions.rotate(jnp.zeros((2, 3, 1, 8), int), jnp.arange(3), Rotary()), 'x has dtype int'),
    (lambda: positions.rotate(jnp.zeros((2, 3, 1, 8)), jnp.arange(4), Rotary()), r'positions have shape \(4,\)'),
    (lambda: positions.rotate(jnp.zeros((2, 3, 1, 7)), jnp.arange(3), Rotary()), 'width=7'),
    (
      lambda: positions.reposition(jnp.zeros((2, 3, 1, 8)), jnp.arange(3), jnp.zeros((3, 3)), Rotary()),
      r'new_positions have shape \(3, 3\)',
    ),
  ],
)
def test_bad_input_is_refused_by_name(make, words):
  with pytest.raises(ValueError, match=words):
    make()
