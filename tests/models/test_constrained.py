"""models.constrained: estimators against enumeration of all their choices, texts against enumeration of all texts."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

from models import constrained
from models.constrained import particles as particles_module
from models.generate.sampling import Sampling
from tests.models import small

DISTRIBUTIONS = {
  'flat': [1 / 3, 1 / 3, 1 / 3],
  'skewed': [0.9, 1e-9, 0.0999, 1e-4],
  'tiny': [1e-300, 1 - 1e-12, 1e-12],
  'with a zero': [0.25, 0.0, 0.6, 0.15],
  'not normalised': [3.0, 0.5, 1.5],
  'five': [0.02, 0.5, 0.08, 0.3, 0.1],
}


class Tree:
  """All runs of a function that makes choices: `choose` takes the choices of one run, `runs` goes through all."""

  def runs(self, function):
    """Yields (probability, result) of every run."""
    todo = [[]]
    while todo:
      self._planned, self._made, self._probability, self._todo = todo.pop(), [], 1.0, todo
      result = function()
      yield self._probability, result

  def choose(self, weights):
    """An index, with probability proportional to its weight."""
    options = [i for i, w in enumerate(weights) if w > 0]
    if len(self._made) == len(self._planned):
      self._todo += [[*self._made, i] for i in options[1:]]
      self._planned = [*self._planned, options[0]]
    choice = self._planned[len(self._made)]
    self._made.append(choice)
    self._probability *= weights[choice] / math.fsum(weights)
    return choice

  def shuffle(self, logp, loop):
    """In place of constrained.shuffled: only the tokens that are asked for are chosen."""
    del loop
    weights = np.exp(logp)
    while weights.any():
      token = self.choose(weights)
      yield token
      weights[token] = 0


@functools.cache
def enumerated(name, allowed, **options):
  """[(probability, Draw, tokens asked about)] of every run of draw."""
  tree, p = Tree(), np.array(DISTRIBUTIONS[name])
  with np.errstate(divide='ignore'):
    logp = np.log(p)

  def run():
    asked = []
    drawn = constrained.draw(
      logp, lambda token: asked.append(token) or token in allowed, shuffle=tree.shuffle, **options
    )
    return drawn, asked

  return [(probability, *result) for probability, result in tree.runs(run)]


def subsets(name):
  tokens = range(len(DISTRIBUTIONS[name]))
  return [frozenset(s) for n in range(len(tokens) + 1) for s in itertools.combinations(tokens, n)]


@pytest.mark.parametrize('name', DISTRIBUTIONS)
@pytest.mark.parametrize('estimator', constrained.ESTIMATORS)
def test_estimates_are_unbiased_and_tokens_exact(name, estimator):
  p = np.array(DISTRIBUTIONS[name])
  for allowed in subsets(name):
    runs = enumerated(name, allowed, estimator=estimator)
    Z = math.fsum(p[list(allowed)])
    assert math.fsum(q for q, _, _ in runs) == pytest.approx(1, rel=1e-12)
    total = math.fsum(q * math.exp(drawn.log_weight) for q, drawn, _ in runs)
    assert total == pytest.approx(Z, rel=1e-12, abs=0)
    for token in range(len(p)):
      of_token = [(q, math.exp(drawn.log_weight)) for q, drawn, _ in runs if drawn.token == token]
      want = p[token] if token in allowed else 0.0
      assert math.fsum(q * w for q, w in of_token) == pytest.approx(want, rel=1e-12, abs=0)
      if Z:
        assert math.fsum(q for q, _ in of_token) == pytest.approx(want / Z, rel=1e-12, abs=0)
    assert all((drawn.token == -1) == (drawn.log_weight == -np.inf) == (Z == 0) for _, drawn, _ in runs)


@pytest.mark.parametrize('name', ['skewed', 'five'])
@pytest.mark.parametrize('limit', [1, 2, 3])
def test_a_limit_keeps_the_estimates_unbiased(name, limit):
  p = np.array(DISTRIBUTIONS[name])
  for allowed in subsets(name):
    runs = enumerated(name, allowed, max_evaluations=limit)
    for token in range(len(p)):
      mean = math.fsum(q * math.exp(drawn.log_weight) for q, drawn, _ in runs if drawn.token == token)
      assert mean == pytest.approx(p[token] if token in allowed else 0.0, rel=1e-12, abs=0)
    assert all(drawn.evaluations <= limit for _, drawn, _ in runs)


@pytest.mark.parametrize('estimator', constrained.ESTIMATORS)
def test_no_token_is_asked_about_twice_and_all_are_counted(estimator):
  for name in DISTRIBUTIONS:
    for allowed in subsets(name):
      for _, drawn, asked in enumerated(name, allowed, estimator=estimator):
        assert drawn.evaluations == len(asked) == len(set(asked))
        assert all(DISTRIBUTIONS[name][token] > 0 for token in asked)
        if not allowed:
          assert len(asked) == np.count_nonzero(DISTRIBUTIONS[name])


def test_next_does_not_vary_if_all_or_one_is_allowed():
  p = DISTRIBUTIONS['five']
  for allowed in [frozenset(range(5)), *(frozenset([i]) for i in range(5))]:
    Z = math.fsum(p[i] for i in allowed)
    assert all(math.exp(drawn.log_weight) == pytest.approx(Z) for _, drawn, _ in enumerated('five', allowed))


def test_shuffled_draws_without_replacement():
  p = np.array([0.5, 0.0, 0.3, 0.2])
  with np.errstate(divide='ignore'):
    orders = [tuple(constrained.shuffled(np.log(p), key)) for key in jax.random.split(jax.random.key(0), 2000)]
  for order in itertools.permutations([0, 2, 3]):
    a, b, _ = p[list(order)]
    want = a * b / (1 - a)
    assert orders.count(order) / len(orders) == pytest.approx(want, abs=4 * math.sqrt(want / len(orders)))


def test_shuffled_goes_on_after_the_first_ones():
  logp = np.log(np.random.default_rng(0).dirichlet(np.ones(500)))
  logp[7] = -np.inf
  order = list(constrained.shuffled(logp, jax.random.key(1)))
  assert sorted(order) == [i for i in range(500) if i != 7]
  assert order == list(constrained.shuffled(logp, jax.random.key(1)))
  assert order != list(constrained.shuffled(logp, jax.random.key(2)))


def test_draw_with_keys_has_the_right_distribution():
  p, allowed = np.array(DISTRIBUTIONS['five']), {0, 2, 4}
  keys = jax.random.split(jax.random.key(3), 3000)
  for estimator in constrained.ESTIMATORS:
    draws = [constrained.draw(np.log(p), allowed.__contains__, key, estimator=estimator) for key in keys]
    weights = np.exp([drawn.log_weight for drawn in draws])
    assert weights.mean() == pytest.approx(0.2, abs=4 * weights.std() / math.sqrt(len(keys)))
    share = np.bincount([drawn.token for drawn in draws], minlength=5) / len(keys)
    np.testing.assert_allclose(share, [0.1, 0, 0.4, 0, 0.5], atol=4 * math.sqrt(0.25 / len(keys)))


def test_a_permissive_predicate_is_asked_about_few_tokens():
  logp = np.random.default_rng(0).normal(size=50_000) * 3
  is_allowed = lambda token: token % 10 > 0
  for estimator in constrained.ESTIMATORS:
    draws = [constrained.draw(logp, is_allowed, jax.random.key(i), estimator=estimator) for i in range(30)]
    assert np.mean([drawn.evaluations for drawn in draws]) < 4


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'logp': np.zeros((2, 2))}, r'logp is \(2, 2\)'),
    ({'logp': []}, r'logp is \(0,\)'),
    ({'logp': [0.0, np.nan]}, 'neither NaN'),
    ({'logp': [0.0, np.inf]}, r'nor \+inf'),
    ({'key': None}, 'key=None'),
    ({'estimator': 'last'}, "estimator='last' must be one of 'next', 'loop'"),
    ({'max_evaluations': -1}, 'max_evaluations=-1'),
    ({'max_evaluations': 2.0}, 'max_evaluations=2.0'),
    ({'max_evaluations': 2, 'estimator': 'loop'}, "needs estimator='next'"),
  ],
)
def test_draw_rejects(changes, words):
  arguments = {'logp': [0.0, 0.0], 'is_allowed': bool, 'key': jax.random.key(0)} | changes
  with pytest.raises(ValueError, match=words):
    constrained.draw(**arguments)


# Automata and predicates.

LETTERS = {0: {'a': 1, 'x': 9}, 1: {'b': 1, 'c': 2}, 2: {'a': 1}, 9: {'x': 9}}  # (ab*c)+; 'x' leads nowhere


def walk(constraint, tokens):
  state = constraint.start()
  for token in tokens:
    state = constraint.advance(state, token)
    if state is None:
      return None
  return constraint.is_complete(state)


def test_automaton_walks_characters_of_tokens():
  pieces = ['a', 'bb', 'bc', 'c', '', 'x', 'abcab']
  automaton = constrained.Automaton(LETTERS, [2], pieces)
  assert walk(automaton, []) is False and walk(automaton, [0, 3]) is True
  assert walk(automaton, [0, 1, 2]) is True and walk(automaton, [6]) is False
  assert walk(automaton, [6, 3, 0, 3]) is True
  assert walk(automaton, [3]) is None and walk(automaton, [0, 3, 3]) is None
  assert walk(automaton, [7]) is None  # models may have more ids than the tokenizer
  assert walk(automaton, [4]) is None  # an empty piece would never end
  assert walk(automaton, [5]) is None  # allowed by the table, but no accepting state can be reached from there


def test_automaton_equals_a_regular_expression():
  import re

  pieces = [b'a', b'b', b'c', b'bc']
  rows = {state: {ord(c): to for c, to in row.items()} for state, row in LETTERS.items()}
  automaton = constrained.Automaton(rows, {2}, pieces)
  for n in range(5):
    for tokens in itertools.product(range(4), repeat=n):
      text = b''.join(pieces[t] for t in tokens)
      assert (walk(automaton, tokens) or False) == bool(re.fullmatch(b'(ab*c)+', text))


@pytest.mark.parametrize(
  'arguments, words',
  [
    ({'accepting': [3]}, 'accepting=3 is no state'),
    ({'accepting': [2], 'start': 5}, 'start=5 is no state'),
    ({'accepting': [2], 'start': 9}, 'cannot be reached from start=9'),
    ({'accepting': []}, r'accepting=\[\] cannot be reached'),
  ],
)
def test_automaton_rejects(arguments, words):
  with pytest.raises(ValueError, match=words):
    constrained.Automaton(LETTERS, pieces=['a'], **arguments)


# Texts of a model.

PROMPT, LENGTH, STOP = [3, 1], 3, 2


@functools.cache
def model():
  return small.model(vocab=4)


@functools.cache
def texts(stop_tokens):
  """{text: probability} of all that the model can write, by whole passes."""
  rows = np.array([[*PROMPT, *text] for text in itertools.product(range(4), repeat=LENGTH)])
  logits = np.asarray(small.forward(model(), rows), np.float64)[:, len(PROMPT) - 1 : -1]
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  found = {}
  for row, steps in zip(rows[:, len(PROMPT) :], logp):
    end = next((i + 1 for i, token in enumerate(row) if token in stop_tokens), LENGTH)
    found[tuple(row[:end].tolist())] = math.exp(sum(steps[i, row[i]] for i in range(end)))
  assert math.fsum(found.values()) == pytest.approx(1, abs=1e-5)
  return found


# No 1 after a 0, nothing after two 3s, and the sum must be even where a text ends.
def begins(tokens):
  return not any(pair == (0, 1) for pair in itertools.pairwise(tokens)) and tokens[:2] != (3, 3)


def ends(tokens):
  return sum(tokens) % 2 == 0


def is_allowed(text, stop_tokens):
  kept = text[:-1] if text[-1] in stop_tokens else text
  return all(begins(kept[: i + 1]) for i in range(len(kept))) and ends(kept)


@pytest.mark.parametrize('stop_tokens', [(), (STOP,)])
@pytest.mark.parametrize('particles, threshold', [(1, 0.5), (4, 1.0), (4, 0.9), (4, 0.0)])
def test_the_normaliser_of_texts_is_unbiased(stop_tokens, particles, threshold):
  allowed = {text: p for text, p in texts(stop_tokens).items() if is_allowed(text, stop_tokens)}
  Z, runs = math.fsum(allowed.values()), 400 if particles == 1 else 200
  estimates, of_text, resamplings = [], dict.fromkeys(allowed, 0.0), 0
  for i in range(runs):
    got = constrained.generate(
      model(), PROMPT, LENGTH, constrained.predicate(begins, ends), particles=particles, key=jax.random.key(i),
      stop_tokens=stop_tokens, resample_threshold=threshold,
    )  # fmt: skip
    estimates.append(math.exp(got.log_normalizer))
    resamplings += got.resamplings
    assert got.probabilities.sum() == pytest.approx(float(any(f != 'dead' for f in got.finish)))
    for tokens, weight, finish in zip(got.tokens, np.exp(got.log_weights), got.finish):
      assert (finish == 'dead') == (weight == 0)
      if weight:
        of_text[tuple(tokens)] += weight / particles / runs
        assert finish == ('stop' if tokens[-1] in stop_tokens else 'length')
  error = np.std(estimates) / math.sqrt(len(estimates))
  assert 0 < error < 0.1 * Z
  assert np.mean(estimates) == pytest.approx(Z, abs=4 * error)
  for text, p in allowed.items():
    assert of_text[text] == pytest.approx(p, abs=6 * math.sqrt(p * Z / runs / particles) + 0.01 * Z)
  assert (resamplings > 0) == (particles > 1 and threshold > 0)


def run(constraint, **changes):
  arguments = {'particles': 3, 'key': jax.random.key(0), 'stop_tokens': (STOP,)} | changes
  return constrained.generate(model(), PROMPT, LENGTH, constraint, **arguments)


def test_everything_allowed_has_weight_one_exactly():
  got = run(constrained.predicate(lambda tokens: True))
  np.testing.assert_allclose(got.log_weights, 0, atol=1e-12)
  assert got.evaluations == 2 * sum(map(len, got.tokens))


def test_a_single_text_has_its_probability():
  text = (1, 0, 3)
  got = run(constrained.predicate(lambda tokens: tokens == text[: len(tokens)], lambda tokens: tokens == text))
  assert got.tokens == [list(text)] * 3 and got.finish == ['length'] * 3
  assert got.log_normalizer == pytest.approx(math.log(texts((STOP,))[text]), abs=1e-5)


def test_particles_that_are_drawn_anew_go_on_from_their_own_text():
  # The first token is free, the others follow from it: weights are then known exactly.
  forced = constrained.predicate(lambda t: t == (t[0], (t[0] + 1) % 4, t[0] ^ 1)[: len(t)])
  arguments = {'particles': 6, 'key': jax.random.key(0), 'stop_tokens': ()}
  as_drawn, anew = (run(forced, **arguments, resample_threshold=threshold) for threshold in (0.0, 1.0))
  rows = np.array([[*PROMPT, *text] for text in as_drawn.tokens + anew.tokens])
  logits = np.asarray(small.forward(model(), rows), np.float64)[:, len(PROMPT) - 1 : -1]
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  second, third = (np.array([logp[i, t, row[len(PROMPT) + t]] for i, row in enumerate(rows)]) for t in (1, 2))
  np.testing.assert_allclose(as_drawn.log_weights, (second + third)[:6], rtol=1e-5)
  mean = np.log(np.exp(second[:6]).mean())
  np.testing.assert_allclose(anew.log_weights, mean + third[6:], rtol=1e-5)
  assert anew.resamplings == 1 and as_drawn.resamplings == 0 and as_drawn.tokens != anew.tokens
  assert len(np.unique(third[6:].round(3))) > 1  # the texts differ in what is checked


def test_dead_ends_have_weight_zero():
  got = run(constrained.predicate(lambda tokens: len(tokens) < 2, lambda tokens: False))
  assert got.finish == ['dead'] * 3 and got.log_normalizer == -np.inf
  assert got.probabilities.tolist() == [0, 0, 0] and all(len(tokens) == 1 for tokens in got.tokens)
  at_once = run(constrained.predicate(lambda tokens: False, lambda tokens: False))
  assert at_once.tokens == [[], [], []] and at_once.evaluations == 12


def test_a_stop_token_needs_a_complete_text():
  for i in range(20):
    got = run(constrained.predicate(lambda tokens: True, lambda tokens: len(tokens) == 1), key=jax.random.key(i))
    alive = [tokens for tokens, finish in zip(got.tokens, got.finish) if finish != 'dead']
    assert all(len(tokens) == 2 and tokens[-1] == STOP for tokens in alive)


def test_sampling_and_limits_are_used():
  top = run(constrained.predicate(lambda tokens: True), sampling=Sampling(temperature=1.0, top_k=1))
  assert len({tuple(tokens) for tokens in top.tokens}) == 1 and top.evaluations == sum(map(len, top.tokens))
  limited = run(constrained.predicate(begins, ends), max_evaluations=1)
  assert limited.evaluations <= 3 * LENGTH
  # What was seen has its positive logits divided and its negative ones multiplied: it never comes again.
  penalised = Sampling(temperature=1.0, repetition_penalty=1e9)
  logits = np.asarray(small.forward(model(), np.array([PROMPT])))[0, -1]
  assert logits[3] < 0 or logits[1] < 0
  gone = [token for token in PROMPT if logits[token] < 0]
  firsts = [run(constrained.predicate(bool), sampling=penalised, key=jax.random.key(i)).tokens for i in range(5)]
  assert not {row[0] for rows in firsts for row in rows} & set(gone)


def test_equal_keys_give_equal_texts():
  constraint = constrained.predicate(begins, ends)
  first, again, other = (run(constraint, key=jax.random.key(i), particles=4) for i in (1, 1, 2))
  assert first.tokens == again.tokens and first.log_weights.tolist() == again.log_weights.tolist()
  assert first.tokens != other.tokens


def test_a_mesh_changes_nothing():
  arguments = {'particles': 3, 'key': jax.random.key(4), 'resample_threshold': 1.0}
  want = run(constrained.predicate(begins, ends), **arguments)
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    got = run(constrained.predicate(begins, ends), **arguments)
  assert got.tokens == want.tokens and got.resamplings == want.resamplings > 0
  np.testing.assert_allclose(got.log_weights, want.log_weights, rtol=1e-5)


@pytest.mark.parametrize('weights', [[0.5, 0.5], [0.0, 1.0, 0.0], [0.7, 0.0, 0.1, 0.2], [0.1] * 10])
def test_systematic_resampling(weights):
  weights, P = np.array(weights), len(weights)
  counts = []
  for u in (np.arange(1000) + 0.5) / 1000:
    count = np.bincount(particles_module.systematic(weights, u), minlength=P)
    assert (np.abs(count - P * weights) < 1).all() and count.sum() == P
    counts.append(count)
  np.testing.assert_allclose(np.mean(counts, axis=0), P * weights, atol=2e-3)


def test_systematic_resampling_at_its_ends():
  assert particles_module.systematic(np.array([0.0, 0.5, 0.5, 0.0]), 0.0).tolist() == [1, 1, 2, 2]
  assert particles_module.systematic(np.array([0.0, 1.0, 0.0]), 1 - 1e-16).tolist() == [1, 1, 1]


def test_broken_parameters_are_an_error():
  broken = small.model(vocab=4)
  broken.norm.scale[...] = np.full(16, np.nan)
  with pytest.raises(FloatingPointError, match='NaN'):
    constrained.generate(broken, PROMPT, LENGTH, constrained.predicate(bool), key=jax.random.key(0))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'prompt': []}, r'prompts\[0\] is .* expected one token'),
    ({'prompt': [0.5]}, r'prompts\[0\] is float64'),
    ({'prompt': [4]}, r'prompts\[0\] holds token 4, expected 0 .. 3'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'particles': True}, 'particles=True'),
    ({'stop_tokens': (4,)}, 'stop_tokens: token=4 must be an integer in 0 .. 3'),
    ({'prefill_chunk': 0}, 'prefill_chunk=0'),
    ({'resample_threshold': 1.5}, 'resample_threshold=1.5'),
    ({'sampling': Sampling()}, 'temperature=0'),
    ({'sampling': Sampling(temperature=1.0, top_k=5)}, 'top_k=5'),
    ({'key': None}, 'key=None'),
    ({'estimator': 'first'}, "estimator='first'"),
  ],
)
def test_generate_rejects(changes, words):
  arguments = {'prompt': PROMPT, 'max_new_tokens': LENGTH, 'key': jax.random.key(0)} | changes
  with pytest.raises(ValueError, match=words):
    constrained.generate(model(), constraint=constrained.predicate(bool), **arguments)
