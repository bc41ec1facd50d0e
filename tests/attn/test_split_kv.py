"""attn.split_kv: what the contracts of the catalog do not look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import masks, softmax, split_kv


def inputs(T=3, S=11):
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape) for shape in ((2, T, 4, 8), (2, S, 2, 8), (2, S, 2, 6))]


@pytest.mark.parametrize('splits', [1, 4, 11])
def test_options_and_positions_go_through(splits):
  """Decoding: queries at the end, an empty slot, sinks, a soft cap; some runs are seen by no query."""
  q, k, v = inputs()
  places = np.array([0, 1, 2, 3, -1, 5, 6, 7, 8, 9, 10])
  options = {
    'positions': np.array([8, 9, 10]), 'kv_positions': places, 'mask': masks.causal() & masks.window(4),
    'sinks': np.array([0.5, -1.0, 2.0, 0.0]), 'soft_cap': 2.0, 'scale': 0.7, 'return_residual': True,
  }  # fmt: skip
  with jax.enable_x64(True):
    got, want = split_kv.attend(q, k, v, splits=splits, **options), softmax.attend(q, k, v, **options)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'splits': 0}, r'splits=0 must be in 1\.\.11'),
    ({'splits': 12}, r'splits=12 must be in 1\.\.11'),
    ({'bias': jnp.zeros((3, 11))}, 'bias is not an option'),
    ({'key_value_seq_lengths': jnp.ones(2, int)}, 'key_value_seq_lengths is not an option'),
    ({'positions': np.arange(3)}, r'kv_positions has shape \(3,\)'),
  ],
)
def test_refuses(change, words):
  with pytest.raises(ValueError, match=words):
    split_kv.attend(*inputs(), **{'splits': 2, **change})
