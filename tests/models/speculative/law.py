"""Whether counts fit a law."""

import numpy as np
from scipy import special


def chi_squared(counts, p):
  """Probability that counts at least this far from n p come from the law p; 0 if something impossible came.

  Cells that expect fewer than 5 are put together with the next larger.
  """
  counts, p = np.asarray(counts, np.float64).ravel(), np.asarray(p, np.float64).ravel()
  if (counts[p == 0] > 0).any():
    return 0.0
  expected = counts.sum() * p / p.sum()
  cells = [[0.0, 0.0]]
  for i in np.argsort(expected):
    cells[-1][0] += counts[i]
    cells[-1][1] += expected[i]
    if cells[-1][1] >= 5:
      cells.append([0.0, 0.0])
  if len(cells) > 1:  # what is left expects fewer than 5
    got, want = cells.pop()
    cells[-1] = [cells[-1][0] + got, cells[-1][1] + want]
  x = sum((got - want) ** 2 / want for got, want in cells)
  return float(special.gammaincc((len(cells) - 1) / 2, x / 2)) if len(cells) > 1 else 1.0
