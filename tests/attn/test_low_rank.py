"""attn.low_rank: factors against loops of the bias they stand for, and attention with them against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import bias, low_rank, low_rank_fit, softmax
from attn.low_rank import Factors
from tests.attn import oracle

B, T, S, H, K, D, V, R = 2, 7, 9, 4, 2, 4, 3, 3


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def qkv(seed=0, T=T, S=S):
  return normal(seed, B, T, H, D), normal(seed + 1, B, S, K, D), normal(seed + 2, B, S, K, V)


def product(f, g, heads=H):
  """sum_r f g by loops: [B, heads, T, S], for leading axes that broadcast and g per key head."""
  f, g = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (f, g))
  out = np.zeros((B, heads, f.shape[2], g.shape[2]))
  for b, h, t, s in np.ndindex(*out.shape):
    a = f[b % f.shape[0], h % f.shape[1], t]
    c = g[b % g.shape[0], h * g.shape[1] // heads, s]
    out[b, h, t, s] = sum(x * y for x, y in zip(a, c))
  return out


# Attention with factors


@pytest.mark.parametrize(
  'f, g',
  [
    ((B, H, T, R), (B, K, S, R)),
    ((H, T, R), (1, S, R)),
    ((T, R), (S, R)),
    ((1, 1, T, R), (B, 1, S, R)),
    ((T, 0), (S, 0)),
  ],
)
@pytest.mark.parametrize('options', [{}, {'scale': 0.3, 'is_causal': True}], ids=['plain', 'scale and causal'])
def test_attend_is_attention_with_the_bias(f, g, options):
  """The scale is on q . k alone: with a scale of 0.3 a factor that were scaled too would show."""
  f, g, arrays = normal(3, *f), normal(4, *g), qkv()
  with jax.enable_x64(True):
    got, lse = low_rank.attend(*arrays, Factors(f, g), return_residual=True, **options)
  want, want_lse = oracle.attend(*arrays, bias=product(f, g), **options)
  oracle.assert_close(got, want)
  oracle.assert_close(lse, want_lse)


def test_no_channels_are_no_bias_to_the_bit():
  q, k, v = (x.astype(np.float32) for x in qkv())
  none = Factors(np.zeros((T, 0), np.float32), np.zeros((S, 0), np.float32))
  np.testing.assert_array_equal(low_rank.attend(q, k, v, none, scale=0.5), softmax.attend(q, k, v, scale=0.5))


@pytest.mark.parametrize('multiple_of, width', [(1, D + R), (8, 8), (6, 12)])
def test_augment_is_the_identity_of_the_paper(multiple_of, width):
  q, k, _ = qkv()
  f, g = normal(3, H, T, R), normal(4, S, R)
  with jax.enable_x64(True):
    q2, k2, scale = low_rank.augment(q, k, Factors(f, g), 0.7, multiple_of=multiple_of)
  assert (q2.shape, k2.shape, scale) == ((B, T, H, width), (B, S, K, width), 1.0)
  got = scale * np.einsum('bthd,bshd->bhts', q2, np.repeat(k2, H // K, axis=2))
  want = 0.7 * np.einsum('bthd,bshd->bhts', q, np.repeat(k, H // K, axis=2)) + product(f, g)
  np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize('parts', [None, 3])
@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_gradients_are_those_of_the_bias(implementation, parts):
  """dF = dS G and dG = dS' F, by autodiff of the dense bias; in parts, as near as they carry."""
  arrays, f, g, pulled = qkv(), normal(3, H, T, R), normal(4, 1, S, R), normal(5, B, T, H, V)
  if parts:
    arrays, f, g, pulled = jax.tree.map(lambda x: x.astype(np.float32), (arrays, f, g, pulled))
  run = {'is_causal': True, 'implementation': implementation, 'blocks': softmax.Blocks(8, 4)}

  @jax.jit
  def got(q, k, v, f, g):
    grad = jax.grad(lambda *x: jnp.vdot(pulled, low_rank.attend(*x[:3], Factors(*x[3:]), parts=parts, **run)), range(5))
    return grad(q, k, v, f, g)

  @jax.jit
  def want(q, k, v, f, g):
    dense = lambda f, g: jnp.einsum('htr,zsr->hts', f, g, precision='highest')
    grad = jax.grad(lambda q, k, v, f, g: jnp.vdot(pulled, softmax.attend(q, k, v, bias=dense(f, g), **run)), range(5))
    return grad(q, k, v, f, g)

  with jax.enable_x64(not parts):
    for name, a, b in zip(['q', 'k', 'v', 'f', 'g'], got(*arrays, f, g), want(*arrays, f, g)):
      # A cotangent of a part is rounded as the part is.
      assert oracle.relative_error(a, b) < (4e-3 if parts else 1e-10), name


def test_heads_of_a_group_share_the_key_factor():
  q, k, v = qkv()
  g = np.repeat(normal(4, K, S, R), H // K, axis=0)
  f = normal(3, H, T, R)
  with jax.enable_x64(True):
    got = low_rank.attend(q, k, v, Factors(f, g))  # equal within each group: seen, since the values are known
    np.testing.assert_array_equal(got, low_rank.attend(q, k, v, Factors(f, g[:: H // K])))
    g[1, 2, 0] += 1
    with pytest.raises(ValueError, match='within a group g must not differ'):
      low_rank.attend(q, k, v, Factors(f, g))
    with pytest.raises(ValueError, match=r'factor g has shape .* expand_heads=True'):
      jax.jit(low_rank.attend)(q, k, v, Factors(f, g))
    got = jax.jit(functools.partial(low_rank.attend, expand_heads=True))(q, k, v, Factors(f, g))
  oracle.assert_close(got, oracle.attend(q, k, v, bias=product(f, g))[0])


@pytest.mark.parametrize(
  'change, words',
  [
    ({'soft_cap': 2.0}, 'soft_cap and low-rank factors exclude each other: the cap would bend the bias'),
    ({'bias': np.zeros((T, S), np.float32)}, 'bias and low-rank factors exclude'),
    ({'score': lambda s, b, h, i, j: s}, 'score and low-rank factors exclude'),
    ({'factors': Factors(np.zeros((T, 2), np.float32), np.zeros((S, 3), np.float32))}, 'the rank R'),
    ({'factors': Factors(np.zeros((S, 2), np.float32), np.zeros((S, 2), np.float32))}, r'factor f .* 1 or 4, 7, R'),
    ({'factors': Factors(np.zeros((3, T, 2), np.float32), np.zeros((S, 2), np.float32))}, 'factor f'),
    ({'factors': Factors(np.zeros((T, 2), np.float32), np.zeros((3, S, 2), np.float32))}, r'factor g .* 1 or 2 or 4'),
    ({'factors': Factors(np.zeros((3, 1, T, 2), np.float32), np.zeros((S, 2), np.float32))}, '1 or 2, 1 or 4, 7'),
    ({'factors': Factors(np.zeros((T, 2), np.int32), np.zeros((S, 2), np.float32))}, 'factor f .* int32'),
    ({'parts': 0}, 'parts=0'),
  ],
)
def test_attend_rejects(change, words):
  q, k, v = (x.astype(np.float32) for x in qkv())
  factors = Factors(np.zeros((T, 2), np.float32), np.zeros((S, 2), np.float32))
  with pytest.raises(ValueError, match=words):
    low_rank.attend(q, k, v, **{'factors': factors, **change})


# Exact factors


def loop(f, heads=1, T=T, S=S):
  out = np.zeros((1, heads, T, S))
  for h, i, j in np.ndindex(heads, T, S):
    out[0, h, i, j] = f(h, i, j)
  return out


X, Y, M, N = normal(20, T, 3), normal(21, S, 3), normal(22, T), normal(23, S)
COLUMNS, ROWS = normal(24, H, T, 5), normal(25, H, T, 2)
EXACT = {  # factors, their rank, the bias of (h, i, j), heads, keys
  'alibi': (lambda: low_rank.alibi(np.array([0.5, 0.3]), T, S), 2, lambda h, i, j: -(0.5, 0.3)[h] * (i - j), 2, S),
  'squared distance': (lambda: low_rank.distance(X, Y), 5, lambda h, i, j: sum((X[i] - Y[j]) ** 2), 1, S),
  'with multipliers': (
    lambda: low_rank.distance(X, Y, query_factor=-M, key_factor=N),
    5,
    lambda h, i, j: -M[i] * N[j] * sum((X[i] - Y[j]) ** 2),
    1,
    S,
  ),
  'squared offset': (lambda: low_rank.distance(np.arange(T)[:, None] * 1.0), 3, lambda h, i, j: (i - j) ** 2, 1, T),
  'cosine': (lambda: low_rank.cosine([0.3, 2.0], T, S), 2, lambda h, i, j: np.cos((0.3, 2.0)[h] * (i - j)), 2, S),
  'separable': (lambda: low_rank.separable(M, N), 2, lambda h, i, j: M[i] + N[j], 1, S),
  'boxes': (
    lambda: low_rank.box_rpb(COLUMNS, ROWS),
    7,
    lambda h, i, j: COLUMNS[h, i, j % 5] + ROWS[h, i, j // 5],
    H,
    10,
  ),
  'sum': (
    lambda: low_rank.cosine([0.3], T, S) + low_rank.alibi(np.array([0.5, 0.3]), T, S),
    4,
    lambda h, i, j: np.cos(0.3 * (i - j)) - (0.5, 0.3)[h] * (i - j),
    2,
    S,
  ),
}


@pytest.mark.parametrize('name', EXACT)
def test_exact_factors(name):
  make, rank, f, heads, keys = EXACT[name]
  want = loop(f, heads, S=keys)
  with jax.enable_x64(True):
    factors = make()
    np.testing.assert_allclose(factors.dense(), want, rtol=1e-12, atol=1e-12)
    traced = jax.tree.map(jnp.asarray, factors)
    np.testing.assert_allclose(traced.dense(), want, rtol=1e-12, atol=1e-12)
  assert factors.rank == rank
  assert {np.linalg.matrix_rank(x) for x in want[0]} <= {min(rank, keys, T), rank - (name == 'boxes')}


def test_constructors_take_traced_arrays():
  with jax.enable_x64(True):
    for make, at in (
      (lambda x: low_rank.alibi(x, T, S), np.array([0.5, 0.3])),
      (lambda x: low_rank.distance(x, Y, key_factor=N), X),
      (lambda x: low_rank.cosine(x, T, S), np.array([0.3])),
      (lambda x: low_rank.separable(x, N), M),
      (lambda x: low_rank.box_rpb(x, ROWS), COLUMNS),
    ):
      np.testing.assert_allclose(jax.jit(lambda x, make=make: make(x).dense())(at), make(at).dense(), rtol=1e-12)


def test_alibi_favours_what_is_near():
  """The published example has F G' = + m (i - j), the opposite sign, and its kernel adds it."""
  slopes = bias.alibi_slopes(2)
  published = Factors(
    slopes[:, None, None] * np.stack([np.ones(T), np.arange(T)], -1), np.stack([-np.arange(T), np.ones(T)], -1)
  )
  ours, theirs = (np.tril(x.dense()) for x in (low_rank.alibi(slopes, T), published))
  assert ours[0, 0, 5, 0] == -5 * 0.0625 and theirs[0, 0, 5, 0] == +5 * 0.0625
  np.testing.assert_allclose(ours, np.tril(bias.dense(bias.alibi(slopes), T, heads=2)), atol=1e-7)
  q = np.zeros((1, T, 2, 4), np.float32)
  v = np.broadcast_to(np.arange(T, dtype=np.float32)[:, None, None], (1, T, 2, 1))
  far, near = (low_rank.attend(q, q, v, x, is_causal=True)[0, -1, :, 0] for x in (published, low_rank.alibi(slopes, T)))
  assert (near > 3).all() and (far < 3).all()  # the mean age of what the last query reads; 3 is the plain mean


def test_positions_may_come_from_a_cache():
  positions, stored = np.array([[7, 8], [3, 4]]), np.array([[6, 7, 8], [2, 3, 4]])
  got = low_rank.alibi(np.array([0.5]), 2, 3, positions=positions, kv_positions=stored).dense()
  for b in range(2):
    np.testing.assert_array_equal(got[b, 0], -0.5 * (positions[b][:, None] - stored[b]))


def test_two_sided_distances_have_full_rank():
  """So what would fake them is refused."""
  i = np.arange(64)
  assert np.linalg.matrix_rank(np.abs(i[:, None] - i).astype(float)) == 64
  points = normal(9, 50, 3)
  assert np.linalg.matrix_rank(np.linalg.norm(points[:, None] - points, axis=-1)) == 50
  with pytest.raises(ValueError, match=r'is_causal=False: .* full rank'):
    low_rank.alibi(np.array([0.5]), T, is_causal=False)
  with pytest.raises(ValueError, match=r'power=1: .* full rank'):
    low_rank.distance(points, power=1)


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda: low_rank.alibi(np.ones((2, 2)), T), r'slopes have shape \(2, 2\)'),
    (lambda: low_rank.alibi(np.ones(2), T, positions=np.arange(3)), r'positions have shape \(3,\), expected \[7\]'),
    (lambda: low_rank.distance(X, Y[:, :2]), r'x has shape \(7, 3\) and y \(9, 2\)'),
    (lambda: low_rank.svd(np.ones((3, 4), np.float32), 4), r'rank=4 must be in 0..3'),
    (lambda: low_rank.svd(np.ones((3, 4), np.float32), share=1.5), 'share=1.5'),
    (lambda: low_rank.svd(np.ones((3, 4), np.float32), -1), 'rank=-1 must be at least 0'),
    (lambda: low_rank.svd(np.ones((3, 4), np.float32), 1.5), 'rank=1.5 is not an integer'),
    (lambda: low_rank.svd(np.ones(4, np.float32), 1), r'bias has shape \(4,\) .* expected floating \[..., T, S\]'),
    (lambda: low_rank.svd(np.ones((0, 4), np.float32)), r'bias has shape \(0, 4\) .* not empty'),
    (lambda: low_rank.svd(np.ones((3, 4), int)), 'bias has shape .* and dtype int32'),
    (lambda: low_rank.svd(np.full((3, 4), np.nan)), 'bias has NaN or infinities'),
    (lambda: low_rank.energy(np.full((3, 4), -np.inf)), 'bias has NaN or infinities'),
    (lambda: jax.jit(low_rank.svd)(np.ones((3, 4), np.float32)), 'rank=None: expected a number where the bias is tr'),
    (lambda: low_rank.augment(*qkv()[:2], low_rank.separable(M, N), np.nan), 'scale=nan is not a finite'),
    (lambda: low_rank_fit.factors(jax.random.key(0), np.full((3, 4), np.nan), 1), 'bias has NaN'),
    (lambda: low_rank_fit.factors(jax.random.key(0), np.ones((3, 4), int), 1), 'bias has shape .* dtype int32'),
    (lambda: low_rank_fit.factors(jax.random.key(0), np.ones((3, 4)), 1.5), 'rank=1.5 is not an integer'),
    (lambda: low_rank_fit.factors(jax.random.key(0), np.ones((3, 4)), 1, steps=-1), 'steps=-1'),
    (
      lambda: low_rank_fit.networks(jax.random.key(0), np.ones((1, 2, 3, 3)), 1, np.full((1, 3, 2), np.inf)),
      'x has NaN or infinities',
    ),
    (lambda: low_rank.separable(M, N) + low_rank.separable(M, N[1:]), 'do not fit each other'),
    (lambda: low_rank.augment(*qkv()[:2], low_rank.separable(M, N), multiple_of=0), 'multiple_of=0'),
    (lambda: low_rank_fit.factors(jax.random.key(0), np.ones((3, 4)), 0), 'rank=0'),
    (lambda: low_rank_fit.networks(jax.random.key(0), np.ones((1, 2, 3, 4)), 1, np.ones((1, 3, 2))), 'bias .* x .* y'),
    (
      lambda: low_rank_fit.networks(jax.random.key(0), np.ones((1, 2, 3, 3)), 1, np.ones((1, 3, 2)), kv_heads=3),
      'kv_heads=3 must divide H=2',
    ),
  ],
)
def test_rejects(call, words):
  with pytest.raises(ValueError, match=words):
    call()


# Approximate factors


def test_svd():
  x = normal(30, H, 6, 2) @ normal(31, H, 2, 8) + 1e-3 * normal(32, H, 6, 8)
  with jax.enable_x64(True):
    curve = np.asarray(low_rank.energy(x))
    assert curve.shape == (H, 6) and (np.diff(curve) >= 0).all() and (curve[:, 1] > 0.999).all()
    np.testing.assert_allclose(curve[:, -1], 1, rtol=1e-12)
    whole = low_rank.svd(x, 6)
    np.testing.assert_allclose(whole.dense()[0], x, atol=1e-12)
    for rank in range(7):  # what is left is what the curve says
      left = np.sum((np.asarray(low_rank.svd(x, rank).dense()[0]) - x) ** 2, (1, 2)) / np.sum(x**2, (1, 2))
      np.testing.assert_allclose(left, 1 - (curve[:, rank - 1] if rank else 0), atol=1e-10)
    chosen = low_rank.svd(x)
    assert chosen.rank == max(1 + int(np.argmax(row >= 0.995)) for row in curve) == 2
    assert low_rank.svd(x, share=1.0).rank == 6
    np.testing.assert_array_equal(low_rank.energy(np.zeros((3, 3))), 1)


def test_svd_of_a_learned_table_keeps_the_attention():
  """A smooth relative bias on 4 x 4 patches: half of the channels hold 99.5%, and the output is nearly the same."""
  dy, dx = np.meshgrid(np.arange(-3, 4), np.arange(-3, 4), indexing='ij')
  values = np.exp(-(dy**2 + dx**2)[..., None] / np.array([4.0, 9.0])).reshape(49, 2).astype(np.float32)
  dense = bias.dense(bias.grid_table(values, (4, 4)), 16, heads=2)[0]
  factors = low_rank.svd(dense)
  assert factors.rank <= 8
  q, k, v = (normal(seed, 1, 16, 2, 4).astype(np.float32) for seed in (1, 2, 3))
  assert oracle.relative_error(low_rank.attend(q, k, v, factors), softmax.attend(q, k, v, bias=dense)) < 0.05


def test_zeros_and_narrow_types_are_taken_apart_too():
  factors, error = low_rank_fit.factors(jax.random.key(0), np.zeros((3, 4), np.float32), 2, steps=3)
  assert error == 0 and not np.asarray(factors.dense()).any()
  assert not np.asarray(low_rank.svd(np.zeros((3, 4), np.float32)).dense()).any()
  x = normal(37, 3, 4).astype(jnp.bfloat16)
  factors = low_rank.svd(x, 3)
  assert factors.f.dtype == factors.g.dtype == np.float32
  np.testing.assert_allclose(factors.dense()[0, 0], x.astype(np.float32), atol=1e-6)


def test_trained_factors_reach_the_best_ones():
  x = normal(33, 2, 12, 3) @ normal(34, 2, 3, 10) + 0.1 * normal(35, 2, 12, 10)
  x = x.astype(np.float32)
  factors, error = low_rank_fit.factors(jax.random.key(0), x, 3)
  best = np.sqrt(np.sum((low_rank.svd(x, 3).dense()[0] - x) ** 2) / np.sum(x**2))
  assert best <= error * 1.0001 and error <= best * 1.02
  np.testing.assert_allclose(np.sqrt(np.sum((factors.dense()[0] - x) ** 2) / np.sum(x**2)), error, rtol=1e-3)


def test_trained_networks_hold_on_tokens_they_have_not_seen():
  """The bias of two heads as a function of points: exp(-|x - y|^2), which has no exact factors of low rank."""
  points = normal(36, 24, 6, 1).astype(np.float32)
  gap = np.sum((points[:, :, None] - points[:, None]) ** 2, -1)
  x = np.stack([np.exp(-gap), 1 / (1 + gap)], axis=1)
  train = functools.partial(low_rank_fit.networks, jax.random.key(0), x[:16], 6, points[:16], hidden=(16, 16))
  nets, error = train(kv_heads=1)
  assert error < 0.1
  unseen = nets(points[16:], points[16:])
  assert (unseen.f.shape, unseen.g.shape) == ((8, 2, 6, 6), (8, 1, 6, 6))
  assert np.linalg.norm(unseen.dense() - x[16:]) / np.linalg.norm(x[16:]) < 0.2
