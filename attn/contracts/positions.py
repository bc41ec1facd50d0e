"""Contracts on rotations of queries and keys by position."""

import numpy as np

from attn.contracts.registry import contract
from attn.contracts.trial import close, trial


@contract(lambda method: method.family == 'positions')
def relative(method):
  """Scores of two tokens depend on the difference of their positions alone."""
  t = trial(method)
  q, k = t.inputs(seed=24), t.inputs(seed=25)
  scores = []
  for shift in (0, 1, 100):
    at = q['positions'] + shift
    a, b = (t.run({'x': x['x'], 'positions': at})['out'] for x in (q, k))
    scores.append(np.einsum('bthd,bshd->bhts', a, b))
  for shifted in scores[1:]:
    close(shifted, scores[0], 'the scores after a shift of all positions')


@contract(lambda method: method.family == 'positions')
def isometry(method):
  """The length of a vector does not depend on its position."""
  t = trial(method)
  inputs = t.inputs(seed=26)
  away, home = (t.run({**inputs, 'positions': n * inputs['positions']})['out'] for n in (1, 0))
  close(np.linalg.norm(away, axis=-1), np.linalg.norm(home, axis=-1), 'the length of rotated vectors')
