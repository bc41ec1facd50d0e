"""Sampled texts of models.speculative have the target's law: counts of thousands of rows against teacher forcing."""

import functools
import itertools

import jax
import numpy as np
import pytest

from models import speculative
from models.config import LayerSpec
from models.generate import Sampling
from models.speculative import Tree, loop, verify
from tests.models import small
from tests.models.speculative.law import chi_squared

V, NEW, ROWS = 5, 3, 4096
PROMPT = [3] * 5  # the other four tokens are new: with a penalty it matters what the path to a node holds
SIZES = {'vocab': V, 'width': 8, 'depth': 1, 'heads': 2, 'kv_heads': 1, 'mlp_width': 8}
PENALISED = Sampling(temperature=1.5, top_k=4, repetition_penalty=3.0)
CASES = {
  'chain': ((1, 1), Sampling(temperature=1.3)),
  'tree': ((2, 2), PENALISED),
  'all tokens': ((5, 1), Sampling(temperature=1.0)),
  'void': ((4, 3), Sampling(temperature=0.7, top_k=2)),  # more children than tokens of any probability
  'nucleus': (Tree.from_parents([-1, 0, 0, 1, 1, 3]), Sampling(temperature=1.1, top_p=0.8, min_p=0.05)),
  'one': ((1,), PENALISED),
}


@functools.cache
def models():
  return tuple(small.model(seed=seed, **SIZES, layers=[LayerSpec(window=3)]) for seed in (0, 1))


def adjusted(logits, sampling, seen):
  """Probabilities after penalty, temperature, top-k, top-p and min-p, one token after the other."""
  x = [float(v) for v in logits]
  for token in seen if sampling.repetition_penalty != 1 else ():
    x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
  p = np.exp(np.array(x) / sampling.temperature)
  order = sorted(range(V), key=lambda i: (-p[i], i))[: sampling.top_k or V]
  total, kept, mass = sum(p[i] for i in order), [], 0.0
  for i in order:
    if mass < sampling.top_p * total and p[i] >= sampling.min_p * p[order[0]]:
      kept.append(i)
    mass += p[i]
  return np.array([p[i] if i in kept else 0.0 for i in range(V)]) / sum(p[i] for i in kept)


def law(model, sampling):
  """Probability of every text of NEW tokens behind the prompt, [V] * NEW."""
  texts = np.array(list(itertools.product(range(V), repeat=NEW)), np.int32)
  logits = np.asarray(small.forward(model, np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)))
  out = np.ones(len(texts))
  for row, (text, of_row) in enumerate(zip(texts, logits)):
    for i, token in enumerate(text):
      out[row] *= adjusted(of_row[len(PROMPT) + i - 1], sampling, {*PROMPT, *text[:i].tolist()})[token]
  np.testing.assert_allclose(out.sum(), 1, rtol=1e-6)
  return out


def counts(widths, sampling, seed=0):
  """How often each text came, and the statistics."""
  got, statistics = speculative.generate(
    *models(), np.tile(PROMPT, (ROWS, 1)), NEW, widths=widths, sampling=sampling, key=jax.random.key(seed)
  )
  texts = np.array([row for [row] in got.tokens])
  return np.bincount(np.ravel_multi_index(texts.T, (V,) * NEW), minlength=V**NEW), statistics


@pytest.mark.parametrize(
  'name', ['tree', *[pytest.param(name, marks=pytest.mark.long) for name in CASES if name != 'tree']]
)
def test_texts_have_the_law_of_the_target(name):
  widths, sampling = CASES[name]
  target, draft = models()
  got, statistics = counts(widths, sampling)
  assert chi_squared(got, law(target, sampling)) > 1e-4
  assert chi_squared(got, law(draft, sampling)) < 1e-50  # so that there is something to see
  assert 0.2 < statistics.acceptance[0] <= 1


@pytest.mark.long
@pytest.mark.parametrize('fault', ['always', 'no residual', 'replacement'])
def test_a_wrong_verification_is_seen(fault, monkeypatch):
  attempt, sharp = verify.attempt, Sampling(temperature=0.6)  # one likely child: the second is far from its q

  def wrong(token, is_tried, log_q, p):
    chance, rest, left = attempt(token, is_tried, log_q, p)
    if fault == 'always':
      return is_tried.astype(p.dtype), rest, left
    return chance, p if fault == 'no residual' else rest, log_q if fault == 'replacement' else left

  monkeypatch.setattr(verify, 'attempt', wrong)
  loop.advance.clear_cache()
  try:
    got, _ = counts((2, 2), sharp)
  finally:
    loop.advance.clear_cache()
  assert chi_squared(got, law(models()[0], sharp)) < 1e-6


def test_a_draft_equal_to_the_target_is_always_accepted_and_keys_count():
  target, _ = models()
  widths, sampling = CASES['tree']
  run = lambda draft, seed, new=6: speculative.generate(
    target, draft, [PROMPT] * ROWS, new, widths=widths, sampling=sampling, key=jax.random.key(seed)
  )
  got, statistics = run(target, 0)
  np.testing.assert_allclose(statistics.acceptance, 1, atol=1e-4)  # but for rounding: p and q are computed apart
  again, other = run(target, 0)[0], run(target, 1)[0]
  assert got.tokens == again.tokens != other.tokens
  shorter = run(target, 0, new=4)[0]
  assert [row[:4] for [row] in got.tokens] == [row for [row] in shorter.tokens]
