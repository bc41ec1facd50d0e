"""One token from the allowed part of a distribution, by asking about as few tokens as chance lets it.

Tokens are drawn one after the other without replacement, so that none is asked about twice, until one is allowed. It
has the distribution of the model restricted to what is allowed. How much that is, Z, is not known then: most tokens
were never looked at. A little more work gives an estimate w of it that is right on average, whatever token came.
"""

from typing import NamedTuple

import jax
import numpy as np

ESTIMATORS = ('next', 'loop')
FIRST = 64  # tokens that are put in order at first: few draws go on after them


class Draw(NamedTuple):
  """What `draw` returns.

  Attributes:
    token: its index; -1 if no allowed one was found.
    log_weight: log of the estimate of Z; -inf without a token.
    evaluations: tokens that the predicate was asked about, each once.
  """

  token: int
  log_weight: float
  evaluations: int


def draw(logp, is_allowed, key=None, *, estimator='next', max_evaluations=0, shuffle=None):
  """Draws a token from the allowed ones, with an unbiased estimate of the probability of them all.

      Z = sum_x exp(logp[x]) is_allowed(x)
      P(token = x) = exp(logp[x]) is_allowed(x) / Z,   E[exp(log_weight) | token = x] = Z

  r_1, r_2, ... are drawn without replacement, r_n from what is left by r_1 ... r_{n-1}, until a = r_{n+1} is allowed.
  m is the mass that was left before a: that of all tokens but r_1 ... r_n. Then

      'next'  the token after a in the same order is asked about: w = m if it is allowed, w = exp(logp[a]) if not (or
              if there is none)
      'loop'  a second such loop draws from that m, a included, until it meets an allowed token; with s tokens
              rejected in it, w = m / (n + s + 1)

  'next': given all until a, w is exp(logp[a]) plus what is left of m times the chance that the token after a is
  allowed, on average Z. 'loop': the chance of these n + s rejections and of a is that of one loop with the same
  rejections in this order, times exp(logp[a]) / m; with the factor w, the n + s + 1 places that a can have in the
  order are equally likely, and they sum to exp(logp[a]). 'next' varies less where the distribution is peaked, and not
  at all if everything is allowed or only one token is.

  Args:
    logp: [V] float, log-probabilities; they need not sum to one. Tokens at -inf are never drawn nor asked about.
    is_allowed: function of a token, an int, that returns whether it is allowed; always the same for the same token.
    key: a random key.
    estimator: 'next' or 'loop'.
    max_evaluations: tokens that may be asked about; 0 means all. Needs 'next'. A draw that finds nothing in as many
      has weight zero; P(token = x) E[w | token = x] = exp(logp[x]) still holds for allowed x, while P alone is no
      longer the restricted distribution.
    shuffle: in place of `shuffled` and the key: a function of (logp, loop number 0 or 1) that yields the tokens above
      -inf, drawn without replacement.

  Returns:
    Draw.

  Raises:
    ValueError: logp is no vector of numbers below +inf, an unknown estimator, a limit out of range, no key.

  Source: arXiv:2504.05410, 'loop' its AWRS; 'next' is the estimator that its authors use since.
  """
  logp = np.asarray(logp, np.float64)
  _check(logp, key, estimator, max_evaluations, shuffle)
  if shuffle is None:
    shuffle = lambda logp, loop: shuffled(logp, jax.random.fold_in(key, loop))
  order, is_left = iter(shuffle(logp, 0)), np.isfinite(logp)
  for rejected, token in enumerate(order):
    if is_allowed(token):
      break
    is_left[token] = False
    if rejected + 1 == max_evaluations:
      return Draw(-1, -np.inf, max_evaluations)
  else:
    return Draw(-1, -np.inf, int(np.isfinite(logp).sum()))
  log_left = np.logaddexp.reduce(logp[is_left])

  evaluations = rejected + 1
  if estimator == 'next':
    if evaluations == max_evaluations:
      return Draw(token, log_left, evaluations)  # the indicator of one draw from what is left: no estimate of the rest
    after = next(order, None)
    if after is None:
      return Draw(token, logp[token], evaluations)
    return Draw(token, log_left if is_allowed(after) else logp[token], evaluations + 1)

  for again in shuffle(np.where(is_left, logp, -np.inf), 1):
    if again == token:
      break
    evaluations += 1
    if is_allowed(again):
      break
    rejected += 1
  return Draw(token, log_left - np.log(rejected + 1), evaluations)


def shuffled(logp, key):
  """Yields all tokens above -inf, each drawn from those left with probability proportional to exp(logp).

  Tokens race: x arrives after a time of exponential distribution with rate exp(logp[x]), and they come in the order of
  their arrival. Only the first ones are sorted before more are asked for.

  Args:
    logp: [V] numpy float64.
    key: a random key.
  """
  bits = np.asarray(jax.random.bits(key, (2, len(logp)), 'uint32')).astype(np.uint64)
  # 53 random bits and a half: float32 would cut off what is rarer than 1e-7.
  uniform = ((bits[0] << np.uint64(21) | bits[1] >> np.uint64(11)) + 0.5) * 2.0**-53
  log_time = np.where(np.isfinite(logp), np.log(-np.log(uniform)) - logp, np.inf)
  count = int(np.isfinite(logp).sum())
  first = np.argpartition(log_time, FIRST)[:FIRST] if count > FIRST else np.nonzero(np.isfinite(logp))[0]
  first = first[np.argsort(log_time[first])]
  yield from map(int, first)
  if count > FIRST:
    yield from map(int, np.argsort(log_time)[FIRST:count])


def _check(logp, key, estimator, max_evaluations, shuffle):
  """The input rules of `draw`."""
  if logp.ndim != 1 or not logp.size or np.isnan(logp).any() or logp.max() == np.inf:
    raise ValueError(f'logp is {logp.shape}, expected [V] log-probabilities, neither NaN nor +inf')
  check_estimator(estimator, max_evaluations)
  if key is None and shuffle is None:
    raise ValueError('key=None: a draw needs a random key')


def check_estimator(estimator, max_evaluations):
  """The input rules of how a draw is weighed."""
  if estimator not in ESTIMATORS:
    raise ValueError(f'estimator={estimator!r} must be one of {", ".join(map(repr, ESTIMATORS))}')
  if isinstance(max_evaluations, bool) or not isinstance(max_evaluations, int | np.integer) or max_evaluations < 0:
    raise ValueError(f'max_evaluations={max_evaluations!r} must be an integer, 0 (no limit) or more')
  if max_evaluations and estimator != 'next':
    raise ValueError(f"max_evaluations={max_evaluations} needs estimator='next', got {estimator!r}")
