"""attn.cache.storage against a dictionary of entries per row, and attention over it against the whole text at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import masks, softmax
from attn.cache import storage

K, D, V = 2, 4, 3
TWO = np.array([[0, 1]], np.int32)


jit_append, jit_rollback = jax.jit(storage.append), jax.jit(storage.rollback)


@functools.cache
def jit_attend(window):
  options = {'mask': causal(window), 'implementation': 'reference', 'return_residual': True}
  return jax.jit(lambda *a: storage.attend(*a, **options)), jax.jit(lambda *a: softmax.attend(*a, **options))


def causal(window):
  return masks.causal() & masks.window(window - 1) if window else masks.causal()


def entries(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


class Oracle:
  """What should be stored: per row, {position: (k, v)}; shares no code with attn."""

  def __init__(self, batch, capacity, is_ring):
    self.rows, self.capacity, self.is_ring = [{} for _ in range(batch)], capacity, is_ring

  def append(self, k, v, positions):
    for b, t in np.ndindex(positions.shape):
      p = int(positions[b, t])
      if p >= 0 and (self.is_ring or p < self.capacity):
        self.rows[b][p] = k[b, t], v[b, t]
    if self.is_ring:
      for row in self.rows:
        for p in list(row):
          if any(q > p and (q - p) % self.capacity == 0 for q in row):
            del row[p]

  def rollback(self, length):
    for b, row in enumerate(self.rows):
      self.rows[b] = {p: x for p, x in row.items() if p < length[b]}

  def check(self, slots):
    for b, row in enumerate(self.rows):
      got = {int(p): (slots.k[b, :, c], slots.v[b, :, c]) for c, p in enumerate(slots.positions[b]) if p >= 0}
      assert sorted(got) == sorted(row)
      for p in row:
        np.testing.assert_array_equal(got[p][0], row[p][0].astype(np.float32))
        np.testing.assert_array_equal(got[p][1], row[p][1].astype(np.float32))


@pytest.mark.parametrize('is_ring', [False, True])
@pytest.mark.parametrize('capacity', [2, 9])
def test_append_and_rollback_match_oracle(is_ring, capacity):
  rng = np.random.default_rng(capacity)
  slots = storage.init(3, capacity, K, D, V, is_ring=is_ring)
  oracle = Oracle(3, capacity, is_ring)
  length = np.zeros(3, int)
  for n in (1, 4, 1, 4, 4, 1):
    new = rng.integers(0, n + 1, 3)  # ragged: the rest is padding
    positions = np.where(np.arange(n) < new[:, None], length[:, None] + np.arange(n), -1).astype(np.int32)
    positions = rng.permuted(positions, axis=1)
    k, v = entries(n, 3, n, K, D), entries(n + 1, 3, n, K, V)
    slots = jit_append(slots, k, v, positions)
    oracle.append(k, v, positions)
    oracle.check(slots)
    length += new
    if n == 4:
      length = np.maximum(length - rng.integers(0, 3, 3), 0)
      slots = jit_rollback(slots, length)
      oracle.rollback(length)
      oracle.check(slots)
    held = [len(row) * ((K * D + K * V) * 4 + 4) for row in oracle.rows]
    assert storage.bytes_in_use(slots).tolist() == held


@pytest.mark.parametrize('window, spare', [(0, 0), (1, 0), (4, 0), (1, 1), (4, 1)])
@pytest.mark.parametrize('cuts', [[1] * 11, [4, 1, 6], [1, 6, 4]])
def test_attend_equals_whole_text(window, spare, cuts):
  B, T, H = 2, 11, 4
  q, k, v = entries(0, B, T, H, D), entries(1, B, T, K, D), entries(2, B, T, K, V)
  with jax.enable_x64(True):
    attend, attend_whole = jit_attend(window)
    want, want_lse = attend_whole(q, k, v)
    capacity = max(1, window - 1 + spare) if window else T
    slots = storage.init(B, capacity, K, D, V, dtype=q.dtype, is_ring=window > 0, has_spare=spare > 0)
    start = 0
    for n in cuts:
      part = slice(start, start + n)
      positions = np.broadcast_to(np.arange(T)[part], (B, n)).astype(np.int32)
      (out, lse), slots = attend(q[:, part], k[:, part], v[:, part], slots, positions)
      np.testing.assert_allclose(out, want[:, part], rtol=1e-10, atol=1e-12)
      np.testing.assert_allclose(lse, want_lse[:, part], rtol=1e-10, atol=1e-12)
      start += n


@pytest.mark.parametrize('is_ring', [False, True])
def test_writing_a_position_again_replaces_it(is_ring):
  q, k, v = (entries(i, 1, 6, K, n).astype(np.float32) for i, n in enumerate((D, D, V)))
  positions = np.arange(6, dtype=np.int32)[None]
  attend, attend_whole = jit_attend(7)
  slots = storage.init(1, 7, K, D, V, is_ring=is_ring)
  _, slots = attend(q, k + 1, v + 1, slots, positions)  # wrong at first
  _, slots = attend(q[:, :3], k[:, :3], v[:, :3], slots, positions[:, :3])
  (out, _), slots = attend(q[:, 3:], k[:, 3:], v[:, 3:], slots, positions[:, 3:])
  want, _ = attend_whole(q, k, v)
  np.testing.assert_allclose(out, want[:, 3:], rtol=1e-5, atol=1e-6)


def test_ring_ignores_entries_older_than_it_holds():
  k, v = entries(1, 1, 8, K, D), entries(2, 1, 8, K, V)
  positions = np.arange(8, dtype=np.int32)[None]
  slots = jit_append(storage.init(1, 3, K, D, V, is_ring=True), k, v, positions)
  again = jit_append(slots, k[:, :4] + 1, v[:, :4] + 1, positions[:, :4])
  jax.tree.map(np.testing.assert_array_equal, slots, again)


def test_overflow_of_a_full_storage_gives_nan_and_loses_nothing():
  q, k, v = (entries(i, 2, 6, K, D).astype(np.float32) for i in range(3))
  positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]], np.int32)
  attend, attend_whole = jit_attend(0)
  (out, lse), slots = attend(q, k, v, storage.init(2, 4, K, D), positions)
  want, _ = attend_whole(q, k, v)
  np.testing.assert_allclose(out[:, :4], want[:, :4], rtol=1e-5, atol=1e-6)
  assert np.isnan(out[0, 4:]).all() and np.isnan(lse[0, 4:]).all()
  np.testing.assert_array_equal(out[1, 4:], 0)  # padding
  np.testing.assert_array_equal(slots.positions, [[0, 1, 2, 3]] * 2)
  np.testing.assert_array_equal(slots.k, k[:, :4].swapaxes(1, 2))


@pytest.mark.parametrize('is_ring', [False, True])
def test_nan_of_padding_and_of_what_was_rolled_back_stays_out(is_ring):
  k, v = (entries(i, 1, 3, K, D).astype(np.float32) for i in range(2))
  slots = storage.init(1, 5, K, D, is_ring=is_ring)
  slots = jit_append(slots, k + np.nan, v + np.nan, np.arange(3, dtype=np.int32)[None])
  slots = jit_rollback(slots, np.zeros(1, np.int32))
  bad = np.array([[0, 1, -1]], np.int32)
  k[:, 2], v[:, 2] = np.nan, np.nan
  (out, _), slots = jit_attend(0)[0](k, k, v, slots, bad)
  assert np.isfinite(out).all()
  (out, _), _ = jit_attend(0)[0](k[:, :2], k[:, :2], v[:, :2], slots, np.array([[2, 3]], np.int32))
  assert np.isfinite(out).all()


def test_stored_dtype_is_kept():
  k = entries(0, 1, 3, K, D).astype(np.float32)
  slots = storage.init(1, 4, K, D, dtype=jnp.bfloat16)
  (out, _), slots = jit_attend(0)[0](k, k, k, slots, np.arange(3, dtype=np.int32)[None])
  assert (out.dtype, slots.k.dtype, slots.v.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda s: storage.init(1, 0, K, D), 'capacity=0'),
    (lambda s: storage.init(1, 4, K, D, 0), 'value_width=0'),
    (lambda s: storage.append(s, jnp.ones((1, 2, K, D + 1)), jnp.ones((1, 2, K, V)), TWO), 'k has shape'),
    (lambda s: storage.append(s, jnp.ones((1, 2, K, D)), jnp.ones((1, 2, 1, V)), TWO), 'v has shape'),
    (lambda s: storage.append(s, jnp.ones((1, 2, K, D)), jnp.ones((1, 2, K, V)), TWO[0]), 'positions has shape'),
    (lambda s: storage.append(s, jnp.ones((1, 2, K, D)), jnp.ones((1, 2, K, V)), TWO + 0.5), 'positions has dtype'),
  ],
)
def test_rejects(call, words):
  with pytest.raises(ValueError, match=words):
    call(storage.init(1, 4, K, D, V))


@pytest.mark.parametrize('length', [3, np.array([1, 2, 3]), np.array([1.0, 2.0])])
def test_rollback_rejects_lengths(length):
  slots = storage.init(2, 4, 1, 2)
  with pytest.raises(ValueError, match='length has shape'):
    storage.rollback(slots, length)


def test_decoding_does_not_copy_the_cache():
  """A step in a loop updates the slots in place: the temporary memory is that of a token, not of the cache."""
  for B, is_ring in ((1, False), (2, False), (1, True), (2, True)):
    slots = storage.init(B, 256, 12, 64, is_ring=is_ring, has_spare=is_ring)

    def step(i, carry):
      slots, q = carry
      out, slots = storage.attend(q, q, q, slots, jnp.full((len(q), 1), i, jnp.int32), is_causal=True)
      return slots, out

    loop = jax.jit(lambda slots, q: jax.lax.fori_loop(0, 99, step, (slots, q)), donate_argnums=0)
    compiled = loop.lower(slots, jnp.ones((B, 1, 12, 64))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < slots.k.nbytes / 2, (B, is_ring)


def test_peek_rejects_options_by_index():
  slots, x = storage.init(1, 4, K, D), jnp.ones((1, 2, K, D))
  with pytest.raises(ValueError, match='bias is not an option of peek'):
    storage.peek(x, x, x, slots, TWO, bias=jnp.ones((2, 2)))
