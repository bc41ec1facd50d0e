"""Decoder.look and ModelCache.accept: drafts and their trees against whole texts."""

import jax
import numpy as np
import pytest

from models.config import LayerSpec
from tests.models import small

PATTERNS = {
  'hybrid': {'layers': small.HYBRID, 'sinks': True, 'qk_norm': 'head', 'attn_soft_cap': 2.0},
  'scanned': {'layers': [LayerSpec(window=4), LayerSpec(chunk=4)], 'depth': 4, 'scan': True},
}
START = 6  # tokens in the cache; a window of 4 has a ring


@jax.jit
def look(model, tokens, positions, cache, mask, pending):
  hidden, pending = model.look(tokens, positions, cache, mask=mask, pending=pending)
  return model.logits(hidden), pending


def case(name):
  model = small.model(**PATTERNS[name], dtype='float64', param_dtype='float64')
  tokens = small.tokens(length=START + 1)
  _, cache = small.extend(model, tokens[:, :START], None, model.init_cache(2, small.T))
  return model, tokens, cache


# A tree of seven nodes: 0 -> 1, 2; 1 -> 3, 4; 2 -> 5; 5 -> 6.
PARENTS = [-1, 0, 0, 1, 1, 2, 5]


def path(node):
  return [*path(PARENTS[node]), node] if node >= 0 else []


@pytest.mark.parametrize('name', PATTERNS)
@pytest.mark.parametrize('cut', [7, 3])
def test_nodes_of_a_tree_equal_the_text_of_their_path(name, cut):
  """In one look, and in two, the second of which sees what the first left pending."""
  with jax.enable_x64(True):
    model, tokens, cache = case(name)
    nodes = np.random.default_rng(3).integers(0, small.VOCAB, (2, 7))
    depth = np.array([len(path(i)) - 1 for i in range(7)])
    mask = np.array([[s in path(t) for s in range(7)] for t in range(7)])
    positions = np.tile(START + depth, (2, 1)).astype(np.int32)
    got, pending = look(model, nodes[:, :cut], positions[:, :cut], cache, mask[:cut, :cut], None)
    if cut < 7:
      more, pending = look(model, nodes[:, cut:], positions[:, cut:], cache, mask[cut:], pending)
      got = np.concatenate([got, more], axis=1)
    for node in range(7):
      text = np.concatenate([tokens[:, :START], nodes[:, path(node)]], axis=1)
      want = small.forward(model, np.pad(text, ((0, 0), (0, small.T - text.shape[1]))))[:, text.shape[1] - 1]
      np.testing.assert_allclose(got[:, node], want, rtol=1e-10, atol=1e-10)
    # Row 0 keeps the path to node 6, row 1 that to node 1: afterwards nothing tells that the others were there.
    index, kept = np.array([[0, 2, 5, 6], [0, 1, 0, 0]]), np.array([[6, 7, 8, 9], [6, 7, -1, -1]], np.int32)
    cache = cache.accept(pending, index, kept)
    np.testing.assert_array_equal(cache.length, [START + 4, START + 2])
    last = np.array([[1], [2]])
    got, cache = small.extend(model, last, None, cache)
    for b, nodes_of in enumerate(([0, 2, 5, 6], [0, 1])):
      text = np.concatenate([tokens[b, :START], nodes[b, nodes_of], last[b]])[None]
      want = small.forward(model, np.pad(text, ((0, 0), (0, small.T - text.shape[1]))))[0, text.shape[1] - 1]
      np.testing.assert_allclose(got[b, 0], want, rtol=1e-10, atol=1e-10)


def test_padding_is_neither_seen_nor_stored():
  with jax.enable_x64(True):
    model, _, cache = case('hybrid')
    nodes, positions = np.array([[3, 22, 4], [22, 5, 6]]), np.array([[6, -1, 7], [-1, 6, 7]], np.int32)
    got, pending = look(model, nodes, positions, cache, None, None)
    cache = cache.accept(pending, np.tile(np.arange(3), (2, 1)), positions)
    for b, (at, text) in enumerate((([0, 2], [3, 4]), ([1, 2], [5, 6]))):
      want, _ = small.extend(model, np.tile(text, (2, 1)), None, case('hybrid')[2])
      np.testing.assert_allclose(got[b, at], want[b], rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(cache.length, [8, 8])


def test_rows_can_be_taken_in_any_order():
  with jax.enable_x64(True):
    for name in PATTERNS:
      model, tokens, cache = case(name)
      want, _ = small.extend(model, tokens[:, START:], None, cache)
      rows = np.array([1, 0, 1])
      got, taken = small.extend(model, tokens[rows, START:], None, cache.take(rows))
      np.testing.assert_allclose(got, want[rows], rtol=1e-12)
      np.testing.assert_array_equal(taken.length, [START + 1] * 3)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'positions': np.zeros((2, 2), np.int32)}, r'positions have shape \(2, 2\), expected \(2, 3\)'),
    ({'mask': np.ones((3, 2), bool)}, r'mask is bool \(3, 2\), expected bool \(3, 3\) or \(2, 3, 3\)'),
    ({'mask': np.ones((3, 3))}, 'mask is float'),
  ],
)
def test_rejects(changes, words):
  model = small.model(**PATTERNS['hybrid'])
  arguments = {'positions': np.full((2, 3), 6, np.int32), 'mask': None} | changes
  with pytest.raises(ValueError, match=words):
    model.look(np.ones((2, 3), int), arguments['positions'], model.init_cache(2, 8), mask=arguments['mask'])


def test_accept_rejects():
  model = small.model(**PATTERNS['hybrid'])
  cache = model.init_cache(2, 8)
  _, pending = look(model, np.ones((2, 3), int), np.tile(np.arange(3, dtype=np.int32), (2, 1)), cache, None, None)
  with pytest.raises(ValueError, match=r'index has shape \(2, 2\) and positions \(2, 3\)'):
    cache.accept(pending, np.zeros((2, 2), int), np.zeros((2, 3), np.int32))


def test_rows_that_lost_entries_give_nan():
  """As with `extend`: rolled back twice beyond the slack, or a token accepted beyond the capacity."""
  model, tokens = small.model(layers=small.HYBRID), small.tokens(length=10)
  _, cache = small.extend(model, tokens, None, model.init_cache(2, small.T, slack=2))
  cache = cache.rollback(2).rollback(2)
  positions = np.array([[6], [-1]], np.int32)
  got, _ = look(model, tokens[:, :1], positions, cache, None, None)
  assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()

  cache = model.init_cache(2, 8)
  _, pending = look(model, tokens[:, :2], np.array([[7, 8], [6, 7]], np.int32), cache, None, None)
  cache = cache.accept(pending, np.array([[0, 1], [0, 1]]), np.array([[7, 8], [6, 7]], np.int32))
  got, _ = look(model, tokens[:, :2], np.array([[9, 10], [8, 9]], np.int32), cache, None, None)
  assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


def test_take_rejects():
  cache = small.model(**PATTERNS['hybrid']).init_cache(2, 8)
  for rows, words in ((np.array([0.0]), 'rows are float32'), (1, r'rows are int32 \(\), expected integers \[R\]')):
    with pytest.raises(ValueError, match=words):
      cache.take(rows)
