"""models.generate.sampling: filters and penalty against a walk down the sorted list, frequencies of what is drawn."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.generate import Sampling, sampling

kept = jax.jit(sampling.kept)
LOGITS = np.array([0.3, 2.0, 1.0, -1.0, 1.5, 0.9], np.float32)


def kept_oracle(logits, top_k=0, top_p=1.0, min_p=0.0):
  """The tokens left, by walking down the sorted list. Ties to the lower index."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
  p = np.exp(np.array([logits[i] for i in order], np.float64) - max(logits))
  p /= p.sum()
  left, total = set(), 0.0
  for i, share in zip(order, p):
    if (total >= top_p and top_p < 1) or share < min_p * p[0]:
      break
    left.add(i)
    total += share
  return left


def adjusted_oracle(logits, seen, options):
  """Probabilities of one row, rule by rule."""
  logits = [float(x) for x in logits]
  penalty = options.repetition_penalty
  logits = [(x / penalty if x > 0 else x * penalty) if has else x for x, has in zip(logits, seen)]
  if options.temperature == 0:
    return np.eye(len(logits))[logits.index(max(logits))]
  logits = [x / options.temperature for x in logits]
  left = kept_oracle(logits, options.top_k, options.top_p, options.min_p)
  p = np.array([math.exp(x - max(logits)) if i in left else 0.0 for i, x in enumerate(logits)])
  return p / p.sum()


@pytest.mark.parametrize('top_k', [0, 1, 3, 7])
@pytest.mark.parametrize('top_p', [1e-6, 0.3, 0.75, 1.0])
@pytest.mark.parametrize('min_p', [0.0, 0.1, 0.4])
def test_kept_matches_oracle(top_k, top_p, min_p):
  rng = np.random.default_rng(0)
  logits = np.round(rng.normal(size=(20, 7)) * 2, 1).astype(np.float32)  # rounded: with ties
  logits[0] = 1.0
  got = np.asarray(kept(logits, top_k, top_p, min_p))
  for row, left in zip(logits, got):
    assert set(np.nonzero(left)[0]) == kept_oracle(row, top_k, top_p, min_p)


def test_top_p_stops_where_it_is_reached():
  np.testing.assert_array_equal(kept(jnp.array([[1.0, 1.0]]), 0, 0.5), [[True, False]])


@pytest.mark.parametrize('top_p', [1e-38, 1e-40, 1e-300])
def test_the_lowest_top_p_keeps_one(top_p):
  """Some are 0 in float32."""
  np.testing.assert_array_equal(kept(jnp.array([[1.0, 3.0, 2.0]]), 0, top_p), [[False, True, False]])


def test_top_p_of_one_keeps_what_rounding_would_cut():
  logits = jnp.array([[40.0, 0.0, -40.0, 1.0]])
  assert kept(logits, 0, 1.0).all()


def test_min_p_of_one_keeps_all_of_the_largest():
  np.testing.assert_array_equal(kept(jnp.array([[2.0, 1.9, 2.0]]), 0, 1.0, 1.0), [[True, False, True]])


OPTIONS = [
  Sampling(),
  Sampling(repetition_penalty=1.8),
  Sampling(temperature=0.7),
  Sampling(temperature=2.5, top_k=4),
  Sampling(temperature=0.7, top_p=0.6, repetition_penalty=0.5),
  Sampling(temperature=1.3, min_p=0.3),
  Sampling(temperature=1.7, top_k=4, top_p=0.8, min_p=0.2, repetition_penalty=3.0),
]


@pytest.mark.parametrize('options', OPTIONS, ids=repr)
def test_adjusted_matches_oracle(options):
  rng = np.random.default_rng(1)
  logits, seen = rng.normal(size=(9, 8)) * 2, rng.random((9, 8)) < 0.5
  with jax.enable_x64(True):
    got = jax.jit(sampling.adjusted)(jnp.asarray(logits), options, seen)
  want = [adjusted_oracle(row, of, options) for row, of in zip(logits, seen)]
  np.testing.assert_allclose(np.exp(got), want, rtol=1e-12, atol=1e-15)
  assert (np.isneginf(got) == (np.array(want) == 0)).all()


def test_half_precision_is_computed_in_float32():
  got = sampling.adjusted(jnp.asarray(LOGITS, jnp.bfloat16), Sampling(temperature=0.5))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(np.exp(got).sum(), 1, rtol=1e-6)


@pytest.mark.parametrize('temperature, top_k, top_p', [(1.0, 0, 1.0), (0.5, 3, 1.0), (2.0, 0, 0.6), (1.5, 4, 0.7)])
def test_draws_have_the_right_frequencies(temperature, top_k, top_p):
  options, n = Sampling(temperature, top_k, top_p), 20_000
  draws = sampling.draw(
    jax.random.split(jax.random.key(1), n), jnp.tile(sampling.adjusted(jnp.asarray(LOGITS), options), (n, 1))
  )
  p = adjusted_oracle(LOGITS, [False] * 6, options)
  got = np.bincount(draws, minlength=6) / n
  assert (got[p == 0] == 0).all()
  np.testing.assert_allclose(got, p, atol=4 * np.sqrt(0.25 / n))


def test_a_draw_is_a_matter_of_its_key():
  keys, logp = jax.random.split(jax.random.key(2), 50), jnp.tile(jnp.asarray(LOGITS), (50, 1))
  together = sampling.draw(keys, logp)
  assert together.dtype == jnp.int32
  np.testing.assert_array_equal(together[7:10], sampling.draw(keys[7:10], logp[:3]))


def test_the_lowest_temperature_is_greedy():
  logits = jnp.asarray([[3.0, 9.0, 8.0, 9.5]])
  for temperature in (0.0, 1e-3, 1e-38, 1e-45):
    got = sampling.adjusted(logits, Sampling(temperature))
    np.testing.assert_array_equal(jnp.exp(got), [[0, 0, 0, 1]])


@pytest.mark.parametrize('temperature', [1e-30, 1e30])
@pytest.mark.parametrize('penalty', [1e-9, 1e9])
@pytest.mark.parametrize('filters', [{}, {'top_p': 0.999, 'min_p': 1e-45}])
def test_the_ends_of_the_ranges_are_sound(temperature, penalty, filters):
  options = Sampling(temperature, repetition_penalty=penalty, **filters)
  options.check(4)
  got = sampling.adjusted(jnp.array([-jnp.inf, 30.0, -30.0, 0.0]), options, jnp.array([True, True, True, False]))
  assert got[0] == -jnp.inf and not jnp.isnan(got).any()
  np.testing.assert_allclose(jnp.exp(got).sum(), 1, rtol=1e-6)


def test_greedy_takes_the_lower_of_equals_and_no_token_that_is_cut():
  got = sampling.adjusted(jnp.array([[-jnp.inf, 2.0, 2.0], [-jnp.inf, -jnp.inf, -9.0]]), Sampling())
  np.testing.assert_array_equal(got, [[-np.inf, 0, -np.inf], [-np.inf, -np.inf, 0]])
  plain = sampling.adjusted(jnp.array([-jnp.inf, 1.0, 1.0]), Sampling(1.0, top_k=3, top_p=0.99))
  np.testing.assert_allclose(jnp.exp(plain), [0, 0.5, 0.5], rtol=1e-6)


def test_numbers_compile_nothing_kinds_do():
  adjusted = jax.jit(lambda *args: sampling.adjusted(*args))  # with a cache of its own
  run = lambda **options: adjusted(jnp.asarray(LOGITS), Sampling(**options), jnp.ones(6, bool))
  for temperature in (1.0, 2, 0.3, np.float32(1), np.float64(0.5), np.int64(3), Fraction(1, 3)):
    run(temperature=temperature)
  assert adjusted._cache_size() == 1
  for options in ({'top_k': 2}, {'top_k': np.int32(3), 'top_p': np.float32(0.9)}, {'min_p': 0.1}):
    run(temperature=1.0, **options)
  assert adjusted._cache_size() == 2
  run()
  run(top_k=3)  # has no effect with temperature 0
  assert adjusted._cache_size() == 3
  run(repetition_penalty=1.1)
  run(repetition_penalty=1.2)
  assert adjusted._cache_size() == 4


def test_the_kind_follows_the_numbers():
  options = dataclasses.replace(Sampling(temperature=1.0, top_k=3), temperature=0.0)
  assert options == Sampling(top_k=3) and options.is_greedy
  assert dataclasses.replace(options, repetition_penalty=2.0).has_penalty


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'temperature': -1.0}, r'temperature=-1.0 must be 0 or in 1e-30 .. 1e30'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'temperature': float('inf')}, 'temperature=inf'),
    ({'temperature': True}, 'temperature=True'),
    ({'temperature': 1e39}, r'temperature=1e\+39'),
    ({'temperature': 1e-45}, 'temperature=1e-45'),
    ({'temperature': 10**400}, 'temperature has more digits'),
    ({'top_k': -1}, r'top_k=-1 must be an integer in 0 .. 23'),
    ({'top_k': 24}, 'top_k=24'),
    ({'top_k': 2.0}, r'top_k=2\.0'),
    ({'top_p': 0.0}, r'top_p=0\.0 must be above 0 and up to 1'),
    ({'top_p': 1.1}, 'top_p=1.1'),
    ({'min_p': -0.1}, 'min_p=-0.1 must be between 0 and 1'),
    ({'min_p': 1.5}, 'min_p=1.5'),
    ({'repetition_penalty': 0.0}, 'repetition_penalty=0.0 must be in 1e-9 .. 1e9'),
    ({'repetition_penalty': float('inf')}, 'repetition_penalty=inf'),
    ({'repetition_penalty': 1e-45}, 'repetition_penalty=1e-45'),
    ({'repetition_penalty': 1e39}, r'repetition_penalty=1e\+39'),
    ({'temperature': '1'}, "temperature='1' must be a number"),
    ({'top_p': None}, 'top_p=None must be a number'),
  ],
)
def test_rejects(changes, words):
  with pytest.raises(ValueError, match=words):
    Sampling(**changes).check(vocab=23)


def test_a_penalty_needs_the_tokens():
  with pytest.raises(ValueError, match='seen=None'):
    sampling.adjusted(jnp.zeros((1, 3)), Sampling(repetition_penalty=2.0))
