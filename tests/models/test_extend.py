"""Decoding through models.decoder's cache equals the whole text at once: teacher forcing, rollback, fork, overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cache import ModelCache
from models.config import LayerSpec
from tests.models import small

YARN = LayerSpec(window=5, rope_scaling='yarn', rope_factor=4.0, rope_original_length=16)
LLAMA = LayerSpec(rope_scaling='llama3', rope_factor=2.0, rope_original_length=16, rope_fraction=0.5)
PATTERNS = {
  'full': {'layers': [LayerSpec(rope_scaling='ntk', rope_factor=2.0)], 'sinks': True},
  'hybrid': {'layers': small.HYBRID, 'qk_norm': 'head'},
  'rings': {'layers': [LayerSpec(window=1), LayerSpec(chunk=4), LayerSpec(window=6, chunk=5)], 'depth': 3},
  'scaled': {'layers': [YARN, LLAMA], 'attn_soft_cap': 2.0, 'sinks': True, 'qk_norm': 'head'},
  'scanned': {'layers': [LayerSpec(window=4), LayerSpec(), LayerSpec(chunk=4)], 'depth': 6, 'scan': True},
}


@functools.cache
def case(name, dtype='float32'):
  """A model, tokens and their logits in one pass."""
  with jax.enable_x64(dtype == 'float64'):
    model = small.model(**PATTERNS[name], dtype=dtype, param_dtype=dtype)
    tokens = small.tokens()
    return model, tokens, np.asarray(small.forward(model, tokens))


def decode(model, tokens, cuts, slack=0, capacity=small.T):
  cache, out, start = model.init_cache(len(tokens), capacity, slack), [], 0
  for n in cuts:
    logits, cache = small.extend(model, tokens[:, start : start + n], None, cache)
    out.append(np.asarray(logits))
    start += n
  return np.concatenate(out, axis=1), cache


@pytest.mark.parametrize('name', PATTERNS)
@pytest.mark.parametrize('cuts', [[1] * small.T, [5] + [1] * 8, [5, 7, 1]], ids=['steps', 'prefill', 'chunks'])
def test_decode_equals_teacher_forcing(name, cuts):
  with jax.enable_x64(True):
    model, tokens, want = case(name, 'float64')
    got, cache = decode(model, tokens, cuts)
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
  np.testing.assert_array_equal(cache.length, [small.T] * 2)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_decode_equals_teacher_forcing_in_float32(implementation):
  model = small.model(**PATTERNS['hybrid'], implementation=implementation)
  want = small.forward(model, small.tokens())
  got, _ = decode(model, small.tokens(), [5, 1, 7])
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('name', ['hybrid', 'rings', 'scanned'])
def test_ragged_prompts_and_chunks(name):
  """Rows of different lengths in one batch, padding before, between and behind, equal each row alone."""
  with jax.enable_x64(True):
    model, tokens, want = case(name, 'float64')
    places = [
      np.array([[0, 1, 2, 3, -1, -1, -1], [0, 1, 2, 3, 4, 5, 6]], np.int32),
      np.array([[-1, 4, -1, 5, 6, 7, -1], [-1, -1, -1, -1, -1, -1, -1]], np.int32),
      np.array([[-1, 8, 9, 10, 11, 12, -1], [7, 8, 9, 10, 11, -1, 12]], np.int32),
    ]
    cache = model.init_cache(2, small.T)
    for place in places:
      logits, cache = small.extend(model, np.take_along_axis(tokens, np.maximum(place, 0), axis=1), place, cache)
      for b, t in zip(*np.nonzero(place >= 0)):
        np.testing.assert_allclose(logits[b, t], want[b, place[b, t]], rtol=1e-10, atol=1e-10)
      np.testing.assert_array_equal(cache.length, np.maximum(cache.length, place.max(1) + 1))
  np.testing.assert_array_equal(cache.length, [small.T] * 2)


@pytest.mark.parametrize('name', ['full', 'hybrid', 'scanned'])
def test_rollback_is_as_if_the_tokens_had_never_come(name):
  model, tokens, want = case(name)
  wrong = (tokens + 1) % small.VOCAB
  cache = model.init_cache(2, small.T, slack=3)
  for start in (0, 5):
    n = 5
    _, cache = small.extend(model, tokens[:, start : start + n], None, cache)
    _, cache = small.extend(model, wrong[:, start + n : start + n + 3], None, cache)
    cache = jax.jit(ModelCache.rollback, static_argnums=1)(cache, 3)
    np.testing.assert_array_equal(cache.length, [start + n] * 2)
  logits, cache = small.extend(model, tokens[:, 10:], None, cache)
  np.testing.assert_allclose(logits, want[:, 10:], rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_rollback_beyond_the_slack_is_refused_or_seen():
  model, tokens, _ = case('hybrid')
  _, cache = decode(model, tokens[:, :9], [5, 4], slack=2)
  with pytest.raises(ValueError, match=r'n=3 is more than slack=2'):
    cache.rollback(3)
  with pytest.raises(ValueError, match='n=-1'):
    cache.rollback(-1)
  logits, twice = small.extend(model, tokens[:, 6:7], None, cache.rollback(2).rollback(1))
  assert np.isnan(logits).all()
  logits, _ = small.extend(model, tokens[:, 7:8], None, twice)
  assert np.isnan(logits).all()  # and the row stays lost
  ok, _ = small.extend(model, tokens[:, 7:8], None, cache.rollback(1).rollback(1))
  assert np.isfinite(ok).all()


def test_rollback_of_full_layers_needs_no_slack():
  model, tokens, want = case('full')
  _, cache = decode(model, tokens[:, :9], [5, 4])
  logits, _ = small.extend(model, tokens[:, 2:7], None, cache.rollback(7))
  np.testing.assert_allclose(logits, want[:, 2:7], rtol=1e-4, atol=1e-5 * np.abs(want).max())
  assert cache.rollback(20).length.tolist() == [0, 0]


@pytest.mark.parametrize('name', ['hybrid', 'scanned'])
def test_fork(name):
  model, tokens, want = case(name)
  _, cache = decode(model, tokens[:, :5], [5])
  forked = cache.fork(2)
  assert forked.length.tolist() == [5] * 4
  other = (tokens[:, 5:10] + 1) % small.VOCAB
  both = np.stack([tokens[:, 5:10], other], axis=1).reshape(4, 5)  # row b becomes rows 2 b and 2 b + 1
  logits, _ = small.extend(model, both, None, forked)
  np.testing.assert_allclose(logits[::2], want[:, 5:10], rtol=1e-4, atol=1e-5 * np.abs(want).max())
  assert np.abs(logits[1::2] - want[:, 5:10]).max() > 1e-2
  with pytest.raises(ValueError, match='copies=0'):
    cache.fork(0)


def test_overflow_is_not_silent():
  model, tokens, want = case('hybrid')
  got, _ = decode(model, tokens, [5, 5, 3], capacity=8)
  np.testing.assert_allclose(got[:, :8], want[:, :8], rtol=1e-4, atol=1e-5 * np.abs(want).max())
  assert np.isnan(got[:, 8:]).all()


def test_windows_alone_have_no_end():
  model, tokens, want = case('rings')
  got, _ = decode(model, tokens, [5, 7, 1], capacity=8)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_sizes_of_caches():
  model = small.model(**PATTERNS['scanned'])
  cache = model.init_cache(2, 100, slack=3, dtype=jnp.bfloat16)
  assert [slots.k.shape for slots in cache.layers] == [(2, 2, 2, 7, 4), (2, 2, 2, 100, 4), (2, 2, 2, 7, 4)]
  assert [slots.is_ring for slots in cache.layers] == [True, False, True]
  assert {slots.v.dtype for slots in cache.layers} == {jnp.dtype('bfloat16')}
  assert not model.init_cache(1, 3).is_local  # shorter than any window: everything is kept


def test_cache_takes_no_segments():
  model = small.model()
  mixer = model.layer(0).mixer
  with pytest.raises(ValueError, match='segment_ids with a cache'):
    ids = jnp.zeros((1, 2), int)
    mixer.apply(jnp.zeros((1, 2, 16)), mixer.init_state(1, 4, 'float32'), positions=ids, segment_ids=ids)
