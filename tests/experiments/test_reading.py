"""What the report reads from a model: snippets, heads, continuations."""

import types

import numpy as np

from experiments import reading


def test_snippet_begins_at_a_method():
  text = b'import os\n\n\nclass A:\n    def __init__(self, a):\n        self.a = a\n' + b'#' * 40
  name, tokens = reading.snippet([('small.py', b'x = 1\n'), ('a.py', text)], 40)
  assert name == 'a.py'
  assert tokens == [256, *text[text.index(b'    def') :][:39]]


def test_snippet_of_other_text_is_its_beginning():
  assert reading.snippet([('a', b'short'), ('b', b'a longer text')], 6) == ('b', [256, *b'a lon'])


def test_farthest_head_is_the_one_that_looks_back():
  T, heads = 12, 3
  near, first, far = np.eye(T), np.zeros((T, T)), np.zeros((T, T))
  first[:, 0] = 1
  far[np.arange(T), np.maximum(np.arange(T) - 5, 0)] = 1
  maps = [np.stack([near, near, first]), np.stack([near, far, first])]
  model = types.SimpleNamespace(attention_map=lambda tokens, layer: maps[layer][None])
  config = types.SimpleNamespace(depth=2, heads=heads)
  layer, head, weights, share, count = reading.farthest_head(config, model, list(range(T)))
  assert (layer, head, count) == (1, 1, 6)
  assert abs(share - 6 / 7) < 1e-6  # query 5 looks at the first key
  np.testing.assert_array_equal(weights, far)


def test_as_text_shows_every_token():
  assert reading.as_text(b'a\x00\tb\n') == 'a\ufffd\tb\n'
  assert reading.as_text('é'.encode()) == 'é'
  assert reading.as_text([255, 97, 256]) == '\ufffda∎'
