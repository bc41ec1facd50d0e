"""The order of tokens in which n devices, each with an equal part of a row, have equal causal work.

The row is cut into 2n runs, and device r gets runs r and 2n - 1 - r: an early one, whose queries see little, and a late
one. For T = 8 and n = 2 the devices hold tokens 0 1 6 7 and 2 3 4 5. In plain order the last device would have nearly
twice the mean work, and all others would wait for it.

Whatever works by positions need not know of the order: tokens, positions, segment ids and targets are permuted alike.

Source: arXiv:2407.21783 section 3.3.2; Zhu 2024, https://github.com/zhuzilin/ring-flash-attention.
"""

import jax.numpy as jnp
import numpy as np


def order(T: int, n: int) -> np.ndarray:
  """The token that stands at each place of the permuted row.

  Args:
    T: tokens, a multiple of n. If T / n is odd, the n early runs are a token longer than the late ones.
    n: devices.

  Returns:
    int [T]; places r T / n to (r + 1) T / n are those of device r, in increasing order.

  Raises:
    ValueError: n does not divide T.
  """
  if n < 1 or T % n:
    raise ValueError(f'T={T} tokens: expected a multiple of n={n} devices')
  late = T // n // 2
  early = T // n - late
  runs = np.arange(n * early).reshape(n, early), np.arange(n * early, T).reshape(n, late)[::-1]
  return np.concatenate(runs, axis=1).ravel()


def inverse(T: int, n: int) -> np.ndarray:
  """The place at which each token stands: int [T]."""
  return np.argsort(order(T, n))


def permute(x, n: int, axis=1):
  """x in the order for n devices along an axis; numpy arrays stay such."""
  return _take(x, order(np.shape(x)[axis], n), axis)


def restore(x, n: int, axis=1):
  """x back in the order of its tokens: the inverse of `permute`."""
  return _take(x, inverse(np.shape(x)[axis], n), axis)


def _take(x, index, axis):
  return (np if isinstance(x, np.ndarray) else jnp).take(x, index, axis=axis)
