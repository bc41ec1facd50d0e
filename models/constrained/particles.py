"""Texts of a model under a constraint: sequential Monte Carlo with adaptive weighted rejection sampling."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.constrained import rejection
from models.generate import placing
from models.generate.prefill import open_model, padded_stops, prefill, read_prompts, whole
from models.generate.sampling import Sampling, adjusted, checked_key

PLAIN = Sampling(temperature=1.0)


@dataclasses.dataclass(frozen=True)
class Particles:
  """Weighted texts, what `generate` returns; P of them.

  Attributes:
    tokens: the new tokens of each, with its stop token.
    log_weights: [P] float64. mean(exp(log_weights)) is an estimate of Z, and for any function of a text,
      mean(exp(log_weights) f) one of Z times its mean over the allowed texts: both unbiased.
    finish: of each, 'stop' (a stop token came), 'length' (max_new_tokens came) or 'dead' (no token was allowed, or none
      found in max_evaluations: weight zero).
    evaluations: tokens that the constraint was asked about, in all.
    resamplings: how often particles were drawn anew from their weights.
  """

  tokens: list[list[int]]
  log_weights: np.ndarray
  finish: list[str]
  evaluations: int
  resamplings: int

  @property
  def log_normalizer(self):
    """log of the estimate of Z, the probability that the model's own text is allowed; -inf if all are dead."""
    return log_mean(self.log_weights)

  @property
  def probabilities(self):
    """[P] weights that sum to one; zeros if all are dead."""
    return shares(self.log_weights)


@dataclasses.dataclass(frozen=True)
class _Particle:
  state: Any
  tokens: tuple[int, ...] = ()
  log_weight: float = 0.0
  finish: str = ''  # while it runs


def generate(
  model, prompt, max_new_tokens, constraint, *, particles=1, sampling=PLAIN, key, stop_tokens=(),
  resample_threshold=0.5, estimator='next', max_evaluations=0, prefill_chunk=512,
):  # fmt: skip
  """Samples texts that a constraint allows.

      p(x) = prod_t softmax(logits(prompt, x_<t))[x_t]   of texts x up to a stop token or max_new_tokens
      Z = sum_x p(x) allowed(x),   texts are weighted samples of p(x) allowed(x) / Z

  A text is allowed if the constraint allows each of its tokens in turn and is complete where it ends, before the stop
  token or at max_new_tokens. Each particle draws its tokens by `rejection.draw` and multiplies its weight by the
  estimate of what was allowed. When the effective number of particles, (sum w)^2 / sum w^2, falls below
  resample_threshold P, they are drawn anew from their weights (systematic resampling) and go on with equal ones.

  One particle alone follows the constraint token by token: it is a fair sample of each step, not of the whole text.
  Particles correct this by their weights.

  Args:
    model: a Decoder, or any module with its `init_cache`, `extend_hidden` and `logits`.
    prompt: ints, one or more; the constraint does not see it.
    max_new_tokens: 1 or more, stop tokens included.
    constraint: Constraint, see models/constrained/constraints.py. It is asked about tokens that are not stop tokens.
    particles: P, texts that are written side by side.
    sampling: Sampling of temperature above 0; p is the distribution it leaves.
    key: a random key. Equal keys give equal texts.
    stop_tokens: ids that end a text.
    resample_threshold: in 0 (never) .. 1.
    estimator: of rejection.draw.
    max_evaluations: of rejection.draw, for each token of each particle.
    prefill_chunk: tokens of the prompt that are read at once.

  Returns:
    Particles.

  Raises:
    ValueError: an argument out of its range, or a token outside the vocabulary.
    FloatingPointError: the logits were NaN, +inf or all -inf.

  Source: arXiv:2504.05410.
  """
  opened = open_model(model)
  (prompt,) = read_prompts([prompt], None, opened.vocab)
  P, new = whole('particles', particles, 1), whole('max_new_tokens', max_new_tokens, 1)
  stops = frozenset(padded_stops(stop_tokens, opened.vocab).tolist()) - {-1}
  key = _check(sampling, key, resample_threshold, opened.vocab)
  rejection.check_estimator(estimator, max_evaluations)
  cache, last, position = prefill(opened, [prompt], new, whole('prefill_chunk', prefill_chunk, 1), P)
  rows, idle = None, len(last) - P  # idle rows make a mesh divide them
  crowd = [_Particle(constraint.start())] * P
  evaluations = resamplings = 0
  for step in range(new):
    step_key, is_last = jax.random.fold_in(key, step), step + 1 == new
    logp, cache = _next(opened, sampling, [(*prompt, *p.tokens) for p in crowd], last, position, rows, cache)
    for i, particle in enumerate(crowd):
      if particle.finish:
        continue
      allowed = _Allowed(constraint, particle.state, stops, is_last)
      drawn = rejection.draw(
        _sound(logp[i]), allowed, jax.random.fold_in(step_key, i), estimator=estimator, max_evaluations=max_evaluations
      )
      evaluations += drawn.evaluations
      crowd[i] = allowed.after(particle, drawn)
    if is_last or all(p.finish for p in crowd):
      break
    chosen = _resampled([p.log_weight for p in crowd], resample_threshold, jax.random.fold_in(step_key, P))
    rows = None
    if chosen is not None:
      resamplings += 1
      weight = log_mean([p.log_weight for p in crowd])
      crowd = [dataclasses.replace(crowd[row], log_weight=weight) for row in chosen]
      rows = np.concatenate([chosen, np.arange(P, P + idle)])
    last = np.array([0 if p.finish else p.tokens[-1] for p in crowd] + [0] * idle, np.int32)
    position = np.array([-1 if p.finish else len(prompt) + step for p in crowd] + [-1] * idle, np.int32)
  weights = np.array([p.log_weight for p in crowd])
  return Particles([list(p.tokens) for p in crowd], weights, [p.finish for p in crowd], evaluations, resamplings)


class _Allowed:
  """The predicate of one step of one particle; keeps the states that it has asked the constraint for."""

  def __init__(self, constraint, state, stop_tokens, is_last):
    self._constraint, self._state, self._stop_tokens, self._is_last = constraint, state, stop_tokens, is_last
    self._after = {}

  def __call__(self, token):
    if token in self._stop_tokens:
      return self._constraint.is_complete(self._state)
    after = self._constraint.advance(self._state, token)
    if after is None or (self._is_last and not self._constraint.is_complete(after)):
      return False
    self._after[token] = after
    return True

  def after(self, particle, drawn):
    """The particle with the token of a rejection.Draw."""
    if drawn.token < 0:
      return dataclasses.replace(particle, log_weight=-np.inf, finish='dead')
    has_stopped = drawn.token in self._stop_tokens
    return _Particle(
      state=self._state if has_stopped else self._after[drawn.token],
      tokens=(*particle.tokens, drawn.token),
      log_weight=particle.log_weight + drawn.log_weight,
      finish='stop' if has_stopped else 'length' if self._is_last else '',
    )


def log_mean(log_weights):
  """log mean exp of [P], -inf if all are."""
  return float(np.logaddexp.reduce(log_weights) - math.log(len(log_weights)))


def shares(log_weights):
  """exp of [P], divided by its sum; zeros if all are -inf."""
  top = np.max(log_weights)
  if top == -np.inf:
    return np.zeros(len(log_weights))
  weights = np.exp(np.asarray(log_weights) - top)
  return weights / weights.sum()


def systematic(weights, u):
  """Rows drawn by systematic resampling: row i comes floor or ceil of P weights[i] times, on average P weights[i].

  Args:
    weights: [P], sum 1.
    u: uniform in [0, 1).

  Returns:
    [P] ints, rising.
  """
  P = len(weights)
  ends = np.cumsum(weights)
  rows = np.searchsorted(ends / ends[-1], (np.arange(P) + u) / P, side='right')
  return np.minimum(rows, np.flatnonzero(weights)[-1])  # rounding of the last end must not draw a weight of zero


def _resampled(log_weights, threshold, key):
  """Rows to go on with, or None if the effective number of particles is large enough."""
  weights = shares(log_weights)
  if 1 / (weights**2).sum() >= threshold * len(weights) * (1 - 1e-9):  # equal weights are enough for a threshold of 1
    return None
  return systematic(weights, float(jax.random.uniform(key)))


def _next(opened, sampling, texts, last, position, rows, cache):
  """The model's next step, of rows `rows` of the cache (None: as they are).

  Args:
    opened: Opened.
    sampling: Sampling.
    texts: tokens so far of each particle, prompt included.
    last: [R] int32 newest tokens.
    position: [R] int32 where they stand, -1 in rows that are finished or idle.
    rows: [R] int or None.
    cache: ModelCache.

  Returns:
    ([R, V] numpy float64 log-probabilities to draw from, ModelCache).
  """
  seen = None
  if sampling.has_penalty:
    seen = np.zeros((len(last), opened.vocab), bool)
    for row, text in zip(seen, texts):
      row[list(text)] = True
  with placing.current(opened.mesh):
    if rows is not None:
      cache = _take(cache, rows)
    logp, cache = _extend(opened.graph, opened.params, sampling, seen, last, position, cache)
    return np.asarray(logp, np.float64), cache


def _sound(logp):
  """logp [V], normalised in float64, or FloatingPointError."""
  if not logp.max() > -np.inf:  # NaN if any is
    raise FloatingPointError('the logits were NaN, +inf or all -inf: the parameters are broken')
  return logp - np.logaddexp.reduce(logp)


@functools.partial(jax.jit, static_argnames='graph', donate_argnames='cache')
def _extend(graph, params, sampling, seen, last, position, cache):
  model = nnx.merge(graph, params)
  last, position, seen = placing.by_rows((last, position, seen))
  hidden, cache = model.extend_hidden(last[:, None], position[:, None], cache)
  logp = adjusted(model.logits(hidden)[:, 0], sampling, seen)
  return placing.everywhere(logp), placing.by_heads(cache)


@jax.jit
def _take(cache, rows):
  return placing.by_heads(cache.take(rows))


def _check(sampling, key, resample_threshold, vocab):
  """The input rules of `generate` that are its own; the key, typed."""
  if not isinstance(sampling, Sampling):
    raise ValueError(f'sampling={sampling!r} must be a Sampling')
  sampling.check(vocab)
  if sampling.is_greedy:
    raise ValueError('sampling has temperature=0, which leaves one token to a constraint: expected one above 0')
  if not 0 <= resample_threshold <= 1:
    raise ValueError(f'resample_threshold={resample_threshold!r} must lie in 0 .. 1')
  return checked_key(key, sampling)
