"""attn.distributed.zigzag: the order of tokens in which every device has the same causal work."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn.distributed import zigzag


def test_hand_example():
  assert zigzag.order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
  assert zigzag.inverse(8, 2).tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
  assert zigzag.order(6, 2).tolist() == [0, 1, 5, 2, 3, 4]  # runs of 2, 2, 1, 1 tokens
  assert zigzag.order(3, 3).tolist() == [0, 1, 2]
  assert zigzag.order(5, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize('T, n', [(32, 4), (48, 3), (16, 8)])
def test_causal_work_is_balanced(T, n):
  work = (zigzag.order(T, n) + 1).reshape(n, -1).sum(axis=1)  # keys that the queries of a device see
  assert work.tolist() == [T * (T + 1) // 2 // n] * n
  runs = zigzag.order(T, n).reshape(n, 2, -1) // (T // n // 2)
  assert runs.min(-1).tolist() == runs.max(-1).tolist() == [[r, 2 * n - 1 - r] for r in range(n)]


@pytest.mark.parametrize('xp', [np, jnp])
@pytest.mark.parametrize('T, n', [(12, 3), (15, 3)])
def test_permute_and_restore(xp, T, n):
  x = xp.arange(2 * T * 3).reshape(2, T, 3)
  moved = zigzag.permute(x, n)
  assert isinstance(moved, type(x))
  np.testing.assert_array_equal(moved[:, 0], x[:, 0])
  np.testing.assert_array_equal(moved[:, T // n - 1], x[:, -1])  # the last token, on the first device
  np.testing.assert_array_equal(zigzag.restore(moved, n), x)
  np.testing.assert_array_equal(zigzag.permute(x.swapaxes(0, 1), n, axis=0), moved.swapaxes(0, 1))


@pytest.mark.parametrize('T, n', [(10, 4), (4, 0)])
def test_rejects(T, n):
  with pytest.raises(ValueError, match=f'T={T} tokens: expected a multiple of n={n}'):
    zigzag.order(T, n)
