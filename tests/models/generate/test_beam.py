"""models.generate.beam: against every text of a tiny vocabulary, and against a search in lists."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models.config import LayerSpec
from models.generate import beam, beam_search, generate
from tests.models import small

PROMPTS = [[3, 1, 2], [0], [2, 2, 0, 1, 3, 1]]
STOPS = (1, 2)  # of which the model with 9 tokens makes enough for the rules of stopping to differ
WIDTH = 16


@functools.cache
def model(vocab=4):
  with jax.enable_x64(True):
    layers = [LayerSpec(window=3), LayerSpec()]
    return small.model(vocab=vocab, layers=layers, dtype='float64', param_dtype='float64')


@functools.cache
def single():
  return small.model(depth=1)


@jax.jit
def log_probs(model, texts):
  return jax.nn.log_softmax(model(texts), axis=-1)


@functools.cache
def next_log_probs(vocab, text):
  """log p of every token behind a text (a tuple), from one pass over it."""
  padded = np.zeros((1, WIDTH), np.int32)
  padded[0, : len(text)] = text
  return np.asarray(log_probs(model(vocab), padded))[0, len(text) - 1]


def score_of(vocab, prompt, text, length_penalty):
  steps = [next_log_probs(vocab, (*prompt, *text[:n]))[token] for n, token in enumerate(text)]
  return sum(steps) / len(text) ** length_penalty


def every_text(vocab, longest):
  """All texts that end with their first stop token, or are as long as they may be."""
  for n in range(1, longest + 1):
    for text in itertools.product(range(vocab), repeat=n):
      if not set(text[:-1]) & set(STOPS) and (text[-1] in STOPS or n == longest):
        yield text


def in_lists(vocab, prompt, longest, beams, length_penalty, early_stopping):
  """The search as its definition says it, for one prompt: [(score, text)], best first."""
  running, ended = [(0.0, ())], []
  for n in range(1, longest + 1):
    candidates = sorted(
      ((total + p, (*text, token)) for total, text in running
       for token, p in enumerate(next_log_probs(vocab, (*prompt, *text)))),
      key=lambda pair: -pair[0],
    )  # fmt: skip
    running = [pair for pair in candidates if pair[1][-1] not in STOPS][:beams]
    new = [pair for pair in candidates[:beams] if pair[1][-1] in STOPS] + (running if n == longest else [])
    ended = sorted(ended + [(total / n**length_penalty, text) for total, text in new], reverse=True)[:beams]
    reach = longest if early_stopping == 'never' and length_penalty > 0 else n
    if len(ended) == beams and (early_stopping is True or running[0][0] / reach**length_penalty <= ended[-1][0]):
      break
  return ended


@pytest.mark.parametrize('length_penalty', [0.0, 1.0, -0.5])
def test_finds_every_text_where_beams_suffice(length_penalty):
  """2 + 4 + 8 + 16 texts that stop, 16 of full length: 46, of which no beginning is ever lost with 64 beams."""
  with jax.enable_x64(True):
    got = beam_search(model(), PROMPTS[:1], 4, 64, length_penalty=length_penalty, stop_tokens=STOPS)
    scores = {text: score_of(4, PROMPTS[0], text, length_penalty) for text in every_text(4, 4)}
  want = sorted(scores, key=lambda text: -scores[text])
  assert [tuple(text) for text in got.tokens[0]] == want and len(want) == 46
  np.testing.assert_allclose(got.scores[0], [scores[text] for text in want], rtol=1e-9)
  assert got.finish[0] == ['stop' if text[-1] in STOPS else 'length' for text in want]


@pytest.mark.parametrize('length_penalty', [1.0, 0.0, 2.0])
@pytest.mark.parametrize('early_stopping', [False, True, 'never'])
def test_equals_a_search_in_lists(length_penalty, early_stopping):
  with jax.enable_x64(True):
    options = {'length_penalty': length_penalty, 'early_stopping': early_stopping}
    got = beam_search(model(9), PROMPTS, 8, 3, stop_tokens=STOPS, **options)
    for prompt, texts, scores in zip(PROMPTS, got.tokens, got.scores):
      want = in_lists(9, prompt, 8, 3, **options)
      assert [tuple(text) for text in texts] == [text for _, text in want]
      np.testing.assert_allclose(scores, [score for score, _ in want], rtol=1e-9)


def test_rules_of_stopping_differ():
  """Otherwise the test above would say less than it seems to."""
  with jax.enable_x64(True):
    found = {str([in_lists(9, prompt, 8, 3, 1.0, rule) for prompt in PROMPTS]) for rule in (False, True, 'never')}
  assert len(found) == 3


def test_one_beam_is_greedy():
  with jax.enable_x64(True):
    for stops in ((), STOPS):
      greedy = generate(model(9), PROMPTS, 8, stop_tokens=stops)
      got = beam_search(model(9), PROMPTS, 8, 1, stop_tokens=iter(stops))
      assert got.tokens == greedy.tokens and got.finish == greedy.finish
      for (score,), (log_probs,) in zip(got.scores, greedy.log_probs):
        np.testing.assert_allclose(score, np.mean(log_probs), rtol=1e-9)


def test_one_beam_that_never_stops_early():
  """It goes on behind the stop token of greedy generation, and finds a better score."""
  with jax.enable_x64(True):
    search = functools.partial(beam_search, model(9), PROMPTS, 8, 1, length_penalty=4, stop_tokens=STOPS)
    soon, late = search(), search(early_stopping='never')
  assert all(b[0] >= a[0] for a, b in zip(soon.scores, late.scores)) and soon.tokens != late.tokens


@pytest.mark.parametrize('length_penalty', [8, -8.0])
def test_the_ends_of_length_penalties(length_penalty):
  """In float32; a lower sum over a power of 2 .. 31 is better the longer, or the shorter, the text is."""
  got = beam_search(single(), [[1]], 31, 2, length_penalty=length_penalty, stop_tokens=range(1, 9))
  lengths = [len(text) for text in got.tokens[0]]
  assert np.isfinite(got.scores).all() and got.scores[0] == sorted(got.scores[0], reverse=True)
  sums = np.array(got.scores[0]) * np.array(lengths, float) ** length_penalty
  assert (sums < 0).all() and (sums > -31 * 20).all()
  assert lengths == sorted(lengths, reverse=length_penalty > 0)


def test_on_a_mesh():
  """Three prompts over two groups of devices."""
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  with jax.enable_x64(True):
    want = beam_search(model(9), PROMPTS, 8, 3, stop_tokens=STOPS)
    with jax.set_mesh(mesh):
      got = beam_search(model(9), PROMPTS, 8, 3, stop_tokens=STOPS)
  assert got.tokens == want.tokens
  np.testing.assert_allclose(np.concatenate(got.scores), np.concatenate(want.scores), rtol=1e-9)


def test_lengths_share_programs():
  sizes = []
  for length, new, penalty in ((1, 3, 1.0), (9, 20, 0.5), (30, 32, 2), (4, 7, 0)):
    got = beam_search(single(), [[1] * length], new, 2, length_penalty=penalty)
    assert [len(text) for text in got.tokens[0]] == [new, new]
    sizes.append(beam._search._cache_size())
  assert len(set(sizes)) == 1


def test_broken_parameters_are_an_error():
  broken = small.model(depth=1)
  broken.norm.scale[...] = jnp.full(16, jnp.nan)
  with pytest.raises(FloatingPointError, match=r'prompts\[0\]: the logits were NaN') as caught:
    beam_search(broken, [[1], [2]], 2, 2)
  assert caught.value.prompt == 0


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'prompts': [[1], []]}, r'prompts\[1\]'),
    ({'prompts': [[4]]}, r'holds token 4, expected 0 .. 3'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'beams': 0}, 'beams=0'),
    ({'length_penalty': float('nan')}, 'length_penalty=nan'),
    ({'length_penalty': 8.5}, r'length_penalty=8\.5 must be a number in -8 .. 8'),
    ({'length_penalty': -1e10}, 'length_penalty=-1'),
    ({'length_penalty': -8, 'max_new_tokens': 10_000}, 'length_penalty=-8 with max_new_tokens=10000'),
    ({'length_penalty': '1'}, "length_penalty='1'"),
    ({'early_stopping': 'soon'}, "early_stopping='soon' must be True, False or 'never'"),
    ({'early_stopping': 1}, 'early_stopping=1'),
    ({'stop_tokens': [4]}, 'token=4'),
    ({'stop_tokens': 3}, 'stop_tokens=3: expected a list of tokens'),
    ({'prefill_chunk': 0}, 'prefill_chunk=0'),
  ],
)
def test_rejects(changes, words):
  with jax.enable_x64(True), pytest.raises(ValueError, match=words):
    beam_search(**({'model': model(), 'prompts': [[1]], 'max_new_tokens': 2, 'beams': 2} | changes))
