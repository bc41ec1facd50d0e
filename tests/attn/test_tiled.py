"""The work lists of attn.tiled: what is visited, what skips the mask, fixed or made from data."""

import jax
import numpy as np
import pytest

from attn import masks, softmax, tiled
from tests.attn import oracle

BLOCKS = softmax.Blocks(q=8, kv=8)
T = 64


def arrays(T=T, B=2, seed=0, dtype=np.float64):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(B, T, heads, 4)).astype(dtype) for heads in (2, 1, 1)]


def counts(**options):
  """Tiles without and with the mask."""
  call, _ = softmax.checked(*arrays(), **options)
  count = lambda run: int(len(run.q_id) if run.count is None else run.count)
  found = {run.is_masked: count(run) for run in tiled.work(call, BLOCKS).runs}
  return found.get(False, 0), found.get(True, 0)


def truth(mask, positions=None):
  """How many tiles are full, and how many neither full nor empty, in any row of the batch."""
  seen = np.asarray(masks.dense(mask, T, batch=2, positions=positions, kv_positions=positions)).any(1)
  seen = seen.reshape(-1, 8, 8, 8, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8, 64)
  full = seen.all((0, 3))
  return full.sum(), (seen.any((0, 3)) & ~full).sum()


def zigzag(n=4):
  """Positions of the rows of a batch: four parts, each of a run of the front and one of the back."""
  runs = np.arange(T).reshape(2 * n, -1)
  return np.concatenate([np.r_[runs[r], runs[2 * n - 1 - r]] for r in range(n)])


MASKS = {
  'causal': masks.causal(),
  'streaming': masks.causal() & (masks.window(20) | masks.sink(3)),
  'chunked': masks.chunked(16),
}


@pytest.mark.parametrize('name', ['causal', 'chunked'])
def test_lists_are_tight(name):
  assert counts(mask=MASKS[name]) == truth(MASKS[name])


@pytest.mark.parametrize('name', MASKS)
@pytest.mark.parametrize('order', ['shifted', 'zigzag', 'empty slots'])
def test_lists_made_from_positions_are_tight(name, order):
  positions = {
    'shifted': np.arange(T) + np.array([[5], [5]]),
    'zigzag': zigzag(),
    'empty slots': np.where(np.arange(T) < np.array([[40], [30]]), np.arange(T), -1),
  }[order]
  found, mask = counts(mask=MASKS[name], positions=positions), MASKS[name] & masks.Occupied()
  full, partial = truth(mask, positions)
  assert found[0] <= full and sum(found) >= full + partial  # a promise
  # Two masks that are each partial on a tile, or a tile that is half empty, leave bounds in doubt.
  assert found == (full, partial) or name == 'streaming' or order == 'empty slots'
  assert sum(found) < 64 * 0.7


@pytest.mark.parametrize('name', ['causal', 'streaming'])
def test_traced_positions_give_the_same(name):
  q, k, v = arrays()
  mask, positions = MASKS[name], np.stack([zigzag(), np.where(np.arange(T) < 50, np.arange(T), -1)])

  @jax.jit
  def f(q, k, v, positions):
    def loss(q, k, v):
      out, lse = softmax.attend(
        q, k, v, mask=mask, positions=positions, implementation='xla', blocks=BLOCKS, return_residual=True
      )
      return (out * np.cos(np.arange(4))).sum() + jax.numpy.where(jax.numpy.isfinite(lse), lse, 0).sum(), (out, lse)

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

  with jax.enable_x64(True):
    (_, (out, lse)), grads = f(q, k, v, positions)
  seen = np.asarray(masks.dense(mask, T, batch=2, positions=positions, kv_positions=positions))
  want = oracle.attend(q, k, v, mask=seen, positions=positions)
  oracle.assert_close(out, want[0])
  oracle.assert_close(lse, want[1])
  d_out = np.broadcast_to(np.cos(np.arange(4)), out.shape)
  wanted = oracle.gradients(q, k, v, d_out, np.ones(lse.shape), mask=seen, positions=positions)
  for name, grad in zip('qkv', grads):
    oracle.assert_close(grad, wanted[name], name=name)


def test_gradients_over_a_part_of_the_keys_add_up():
  """tiled.gradients with the results over all keys: what a ring of devices sums."""
  q, k, v = arrays(T=32)
  d_out, d_lse = np.random.default_rng(1).normal(size=q.shape), np.random.default_rng(2).normal(size=q.shape[:3])
  positions = np.arange(32)
  with jax.enable_x64(True):
    out, lse = softmax.attend(q, k, v, is_causal=True, implementation='reference', return_residual=True)
    parts = []
    for keys in (slice(0, 20), slice(20, 32)):
      call, _ = softmax.checked(
        q, k[:, keys], v[:, keys], is_causal=True, positions=positions, kv_positions=positions[keys]
      )
      parts.append(tiled.gradients(call, out, lse, d_out, d_lse, BLOCKS))
  want = oracle.gradients(q, k, v, d_out, d_lse, is_causal=True)
  oracle.assert_close(parts[0].q + parts[1].q, want['q'])
  for name in 'kv':
    oracle.assert_close(np.concatenate([getattr(x, name) for x in parts], axis=1), want[name])
