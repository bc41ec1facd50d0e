"""models.generate: greedy against a loop over whole texts, sampling against numpy, and its bad arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import generate as generation
from models.config import LayerSpec
from models.generate import generate
from tests.models import small

NEW = 5


@functools.cache
def model():
  return small.model(layers=[LayerSpec(window=3), LayerSpec()], sinks=True)


def oracle(prompt, lengths, stop=-1):
  """Greedy decoding, the whole text again for every token."""
  rows = []
  for row, n in zip(prompt, lengths):
    text = list(row[:n])
    while len(text) < n + NEW and (len(text) == n or text[-1] != stop):
      padded = np.zeros((1, len(row) + NEW), np.int32)
      padded[0, : len(text)] = text
      text.append(int(np.argmax(small.forward(model(), padded)[0, len(text) - 1])))
    rows.append(text)
  return rows


@pytest.mark.parametrize('has_stop', [False, True])
def test_greedy_equals_teacher_forcing(has_stop):
  prompt, lengths = small.tokens(batch=3, length=6), [6, 1, 4]
  want = oracle(prompt, lengths)
  stop = want[1][2] if has_stop else -1
  want = oracle(prompt, lengths, stop)
  prompt[1, 1:] = 99  # padding may be anything
  tokens, got_lengths = generate(model(), prompt, NEW, lengths=lengths, stop_token=stop)
  assert tokens.shape == (3, 6 + NEW) and tokens.dtype == jnp.int32
  assert got_lengths.tolist() == [len(row) for row in want]
  for got, row in zip(np.asarray(tokens), want):
    assert got.tolist() == row + [0] * (6 + NEW - len(row))
  if has_stop:
    assert got_lengths[1] < 1 + NEW and tokens[1, got_lengths[1] - 1] == stop


def kept_oracle(logits, top_k, top_p):
  """The tokens left, by walking down the sorted list. Ties to the lower index."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
  p = np.exp(np.array([logits[i] for i in order]) - max(logits))
  p /= p.sum()
  left, total = set(), 0.0
  for i, share in zip(order, p):
    if total >= top_p and top_p < 1:
      break
    left.add(i)
    total += share
  return left


@pytest.mark.parametrize('top_k', [0, 1, 3, 7])
@pytest.mark.parametrize('top_p', [1e-6, 0.3, 0.75, 1.0])
def test_kept_matches_oracle(top_k, top_p):
  rng = np.random.default_rng(0)
  logits = np.round(rng.normal(size=(20, 7)) * 2, 1).astype(np.float32)  # rounded: with ties
  logits[0] = 1.0
  got = np.asarray(generation.kept(logits, top_k, top_p))
  for row, kept in zip(logits, got):
    assert set(np.nonzero(kept)[0]) == kept_oracle(row.astype(np.float64), top_k, top_p)


def test_top_p_stops_where_it_is_reached():
  np.testing.assert_array_equal(generation.kept(jnp.array([[1.0, 1.0]]), 0, 0.5), [[True, False]])


def test_top_p_of_one_keeps_what_rounding_would_cut():
  logits = jnp.array([[40.0, 0.0, -40.0, 1.0]])
  assert generation.kept(logits, 0, 1.0).all()


@pytest.mark.parametrize('temperature, top_k, top_p', [(1.0, 0, 1.0), (0.5, 3, 1.0), (2.0, 0, 0.6), (1.5, 4, 0.7)])
def test_sample_has_the_right_frequencies(temperature, top_k, top_p):
  logits = np.array([0.3, 2.0, 1.0, -1.0, 1.5, 0.9], np.float32)
  n = 20_000
  draws = generation.sample(jnp.tile(logits, (n, 1)), jax.random.key(1), temperature, top_k, top_p)
  p = np.exp(logits / temperature)
  p[[i for i in range(6) if i not in kept_oracle(logits / temperature, top_k, top_p)]] = 0
  p /= p.sum()
  got = np.bincount(draws, minlength=6) / n
  assert (got[p == 0] == 0).all()
  np.testing.assert_allclose(got, p, atol=4 * np.sqrt(0.25 / n))


def test_sampling_follows_the_key_and_top_1_is_greedy():
  prompt = small.tokens(length=6)
  key = jax.random.key(5)
  plain = functools.partial(generate, model(), prompt, NEW, temperature=1.0)
  first, again, other = plain(key=key)[0], plain(key=key)[0], plain(key=jax.random.key(6))[0]
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  greedy = generate(model(), prompt, NEW)[0]
  np.testing.assert_array_equal(plain(key=key, top_k=1)[0], greedy)
  np.testing.assert_array_equal(plain(key=key, top_p=1e-6)[0], greedy)


def test_the_lowest_temperature_is_greedy():
  logits = jnp.asarray([[3.0, 9.0, 8.0, 9.5]])
  for temperature in (1e-3, 1e-38, 1e-45):
    assert generation.sample(logits, jax.random.key(0), temperature).tolist() == [3]


def test_settings_do_not_compile_again():
  prompt = small.tokens(length=6)
  compiled = generation._generate._cache_size
  run = lambda **options: generate(model(), prompt, NEW, key=jax.random.key(0), **options)
  run(temperature=1.0, top_k=3)
  before = compiled()
  run(temperature=0.7, top_k=5, top_p=0.9, stop_token=3)
  assert compiled() == before


def test_broken_parameters_are_an_error():
  broken = small.model(layers=[LayerSpec(window=3), LayerSpec()], sinks=True)
  broken.norm.scale[...] = jnp.full(16, jnp.nan)
  with pytest.raises(FloatingPointError, match='NaN'):
    generate(broken, small.tokens(length=6), NEW)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'prompt': np.ones((2, 3))}, 'prompt is float'),
    ({'prompt': np.ones(3, int)}, r'expected integers \[B, T\]'),
    ({'prompt': np.ones((1, 0), int)}, 'one token or more'),
    ({'prompt': np.array([[1, 23]])}, r'token 23, expected 0 .. 22'),
    ({'prompt': np.array([[1, -1]])}, r'token -1, expected 0 .. 22'),
    ({'lengths': [1]}, r'lengths are int32 \(1,\)'),
    ({'lengths': [0, 2]}, r'lengths=\[0, 2\] must lie in 1 .. 3'),
    ({'lengths': [1, 4]}, r'lengths=\[1, 4\] must lie in 1 .. 3'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'max_new_tokens': 1.5}, 'max_new_tokens=1.5'),
    ({'temperature': -1.0}, 'temperature=-1.0'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'temperature': 1.0}, 'key=None'),
    ({'top_k': -1}, 'top_k=-1'),
    ({'top_k': 24}, 'top_k=24'),
    ({'top_p': 0.0}, 'top_p=0.0'),
    ({'top_p': 1.1}, 'top_p=1.1'),
    ({'stop_token': 23}, 'stop_token=23'),
  ],
)
def test_rejects(changes, words):
  with pytest.raises(ValueError, match=words):
    generate(**({'model': model(), 'prompt': np.ones((2, 3), int), 'max_new_tokens': 2} | changes))
