"""train.loss against loops in numpy float64: sums, z-loss, gradients, and parts against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import loss

B, T, VOCAB = 2, 12, 7
NAMES = ['objective', 'nll', 'tokens', 'byte_nll', 'bytes', 'z']


def inputs(seed=0):
  """(logits, targets, weights, byte_counts): some targets do not count, some stand for no text."""
  rng = np.random.default_rng(seed)
  weights = np.float32(rng.choice([0.0, 1.0, 1.0, 0.5], (B, T)))
  byte_counts = np.float32(np.where(weights > 0, rng.choice([0.0, 1.0, 2.5], (B, T)), 0.0))
  return 3 * rng.normal(size=(B, T, VOCAB)), rng.integers(0, VOCAB, (B, T)), weights, byte_counts


def oracle(logits, targets, weights, byte_counts, z_loss):
  """(sums, gradient of objective by the logits), one target at a time."""
  sums, grad = dict.fromkeys(NAMES, 0.0), np.zeros_like(logits)
  for b, t in np.ndindex(*targets.shape):
    w, total = weights[b, t], np.exp(logits[b, t]).sum()
    nll = w * (np.log(total) - logits[b, t, targets[b, t]])
    sums['nll'] += nll
    sums['tokens'] += w
    sums['z'] += w * np.log(total) ** 2
    if byte_counts[b, t] > 0:
      sums['byte_nll'] += nll
      sums['bytes'] += w * byte_counts[b, t]
    p = np.exp(logits[b, t]) / total
    grad[b, t] = w * (p + 2 * z_loss * np.log(total) * p)
    grad[b, t, targets[b, t]] -= w
  return sums | {'objective': sums['nll'] + z_loss * sums['z']}, grad


@pytest.mark.parametrize('z_loss', [0.0, 0.3])
def test_matches_oracle(z_loss):
  logits, *rest = inputs()

  def of(logits):
    sums = loss.cross_entropy(logits, *rest, z_loss=z_loss)
    return sums['objective'], sums

  grad, sums = jax.grad(of, has_aux=True)(jnp.asarray(logits, jnp.float32))
  want, want_grad = oracle(logits, *rest, z_loss)
  assert sorted(sums) == sorted(NAMES)
  for name in NAMES:
    assert sums[name].dtype == jnp.float32
    np.testing.assert_allclose(sums[name], want[name], rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-5)


def test_without_z_loss_the_objective_is_nll_to_the_bit():
  logits, *rest = inputs()
  sums = loss.cross_entropy(logits, *rest)
  assert sums['objective'] == sums['nll'] != loss.cross_entropy(logits, *rest, z_loss=1e-3)['objective']


def test_z_is_float32_for_bfloat16_logits():
  logits, *rest = inputs()
  logits = jnp.asarray(logits, jnp.bfloat16)
  got = loss.cross_entropy(logits, *rest, z_loss=0.5)
  want, _ = oracle(np.asarray(logits, np.float64), *rest, 0.5)
  for name in NAMES:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


def test_targets_that_do_not_count_reach_nothing():
  logits, targets, weights, byte_counts = inputs()
  off = weights == 0
  assert off.any()
  sums = loss.cross_entropy(np.where(off[..., None], np.inf, logits), targets, weights, byte_counts, z_loss=0.1)
  for name, want in loss.cross_entropy(logits, targets, weights, byte_counts, z_loss=0.1).items():
    assert sums[name] == want, name
  grad = jax.grad(lambda x: loss.cross_entropy(x, targets, weights, byte_counts, z_loss=0.1)['objective'])(
    np.float32(logits)
  )
  assert not np.asarray(grad)[off].any() and np.asarray(grad)[~off].all()
  nothing = loss.cross_entropy(np.full_like(logits, np.nan), targets, 0 * weights, byte_counts, z_loss=0.1)
  assert not any(nothing.values())


class Model:
  """Rows of a table as hidden state, and a matrix."""

  def __init__(self, table, head):
    self.table, self.head = table, head

  def hidden(self, tokens, positions, segment_ids):
    return self.table[tokens]

  def logits(self, hidden):
    return hidden @ self.head


@pytest.mark.parametrize('chunk', [1, 4])
def test_chunks_give_the_same_sums_and_gradients(chunk):
  rng = np.random.default_rng(0)
  weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((VOCAB, 5), (5, VOCAB))]
  _, targets, counts, byte_counts = inputs()
  batch = {'tokens': rng.integers(0, VOCAB, (B, T)), 'targets': targets, 'segment_ids': None}
  batch |= {'weights': counts, 'bytes': byte_counts}

  def of(weights, chunk):
    sums = loss.of_model(Model(*weights), batch, chunk, z_loss=0.2)
    return sums['objective'], sums

  (want, want_sums), (got, sums) = (jax.grad(of, has_aux=True)(weights, chunk) for chunk in (0, chunk))
  assert list(sums) == list(want_sums)
  for name in NAMES:
    np.testing.assert_allclose(sums[name], want_sums[name], rtol=1e-5, err_msg=name)
  for mine, theirs in zip(got, want):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match='chunk=5 must divide T=12'):
    of(weights, 5)
