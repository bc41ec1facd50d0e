"""attn.bias: scores against loops in numpy float64, the published formulas, and through `softmax.attend`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import bias, masks, softmax
from tests.attn import oracle

B, T, S, H, K, D, V = 2, 9, 11, 4, 2, 4, 3


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def qkv(seed=0):
  return normal(seed, B, T, H, D), normal(seed + 1, B, S, K, D), normal(seed + 2, B, S, K, V)


def loop(f, heads=H, batch=1, T=T, S=S):
  """f(h, i, j) for every pair, [batch, heads, T, S]."""
  out = np.zeros((batch, heads, T, S))
  for b, h, i, j in np.ndindex(*out.shape):
    out[b, h, i, j] = f(h, i, j)
  return out


def test_tile_sees_batch_head_and_positions():
  def f(s, b, h, i, j, gain):
    return s * gain[h] + 1000 * b + 100 * h + 10 * i + j

  s, gain = normal(0, B, H, 3, 2), normal(1, H)
  q, k = masks.tokens(3, np.array([[5, 6, 7], [2, 3, 4]])), masks.tokens(2, np.array([8, 9]))
  with jax.enable_x64(True):
    got = bias.score(f, gain).tile(jnp.asarray(s), q, k)
  for b, h, t, n in np.ndindex(*s.shape):
    place = 1000 * b + 100 * h + 10 * (5 + t - 3 * b) + 8 + n
    assert got[b, h, t, n] == pytest.approx(s[b, h, t, n] * gain[h] + place, rel=1e-14)


def test_a_score_is_a_pytree_whose_function_is_static():
  x = bias.alibi(np.ones(3, np.float32))
  leaves, tree = jax.tree.flatten(x)
  assert len(leaves) == 1 and leaves[0].shape == (3,)
  for make in (
    lambda: bias.alibi(np.ones(3, np.float32)),
    lambda: bias.t5_relative(np.ones((8, 2), np.float32), max_distance=16),
    lambda: bias.grid_table(np.ones((9, 2), np.float32), (2, 2)),
  ):
    assert jax.tree.structure(make()) == jax.tree.structure(make())  # nothing is compiled twice
  assert jax.tree.structure(x) == tree
  assert bias.as_score(x) is x


@pytest.mark.parametrize(
  'f, words',
  [
    (lambda s, b, h, i, j: i >= j, 'returned bool, expected floating point'),
    (lambda s, b, h, i, j: s.sum(-1), r'returned shape \(1, 2, 3\), expected \(1, 2, 3, 5\)'),
    (lambda s, b, h, i, j: s[:, :, :2], 'it must be elementwise'),
  ],
)
def test_what_a_function_may_not_return(f, words):
  with pytest.raises(ValueError, match=words):
    bias.dense(f, 3, 5, heads=2)


def test_a_bias_alone_is_broadcast():
  got = bias.dense(lambda s, b, h, i, j: (j - i) * 0.5, 3, 5, heads=2, batch=2)
  np.testing.assert_array_equal(got, 0.5 * loop(lambda h, i, j: j - i, 2, 2, 3, 5))


@pytest.mark.parametrize('transform', [jax.jit, jax.grad, jax.vmap], ids=['jit', 'grad', 'vmap'])
def test_a_traced_array_that_is_not_declared_is_refused(transform):
  hidden = jnp.ones(2) if transform is jax.vmap else 2.0
  close = lambda x: lambda s, b, h, i, j: s * x
  nested = lambda x: jax.jit(close({'x': x}['x']))
  partial = lambda x: functools.partial(lambda x, s, b, h, i, j: s + x, x)
  for make in (close, nested, partial):
    with pytest.raises(ValueError, match=r'closes over traced arrays of shape \(\): declare them'):
      transform(lambda x, make=make: bias.dense(make(x), 3).sum())(hidden)
  f = lambda s, b, h, i, j, x: (s + 1) * x
  np.testing.assert_array_equal(jax.grad(lambda x: bias.dense(bias.score(f, x), 3, heads=2).sum())(2.0), 18)


def test_constants_may_be_closed_over():
  gain = jnp.arange(2.0)
  got = jax.jit(lambda: bias.dense(lambda s, b, h, i, j: s + gain[h], 2, heads=2))()
  np.testing.assert_array_equal(got, loop(lambda h, i, j: h, 2, 1, 2, 2))


# Published biases


@pytest.mark.parametrize(
  'heads, slopes',
  [
    (1, [2**-8]),
    (2, [2**-4, 2**-8]),
    (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
    (3, [2**-4, 2**-8, 2**-2]),
    (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    (12, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
  ],
)
def test_alibi_slopes_are_those_of_the_paper(heads, slopes):
  np.testing.assert_allclose(bias.alibi_slopes(heads), slopes, rtol=1e-15)


def test_alibi_takes_away_what_is_far():
  slopes = bias.alibi_slopes(H).astype(np.float32)
  got = bias.dense(bias.alibi(slopes), T, S, heads=H)
  np.testing.assert_array_equal(got, loop(lambda h, i, j: -slopes[h] * abs(i - j)))
  far = bias.dense(bias.alibi(np.ones(1, np.float32)), 1, 1, positions=np.array([40000]), kv_positions=np.array([3]))
  assert far.item() == -39997


def published_t5_bucket(relative_position, bidirectional, num_buckets, max_distance):
  """The published formula for one offset (memory - query), in float32 as there."""
  ret, n = 0, -relative_position
  if bidirectional:
    num_buckets //= 2
    ret += num_buckets if n < 0 else 0
    n = abs(n)
  else:
    n = max(n, 0)
  max_exact = num_buckets // 2
  if n < max_exact:
    return ret + n
  large = np.log(np.float32(n) / np.float32(max_exact)) / np.float32(math.log(max_distance / max_exact))
  return ret + min(max_exact + int(np.float32(large * np.float32(num_buckets - max_exact))), num_buckets - 1)


@pytest.mark.parametrize('is_bidirectional', [True, False])
@pytest.mark.parametrize('buckets, max_distance', [(32, 128), (8, 20), (64, 256), (6, 7)])
def test_t5_buckets_are_the_published_ones(buckets, max_distance, is_bidirectional):
  offsets = np.arange(-300, 301)
  got = bias.t5_buckets(offsets, buckets=buckets, max_distance=max_distance, is_bidirectional=is_bidirectional)
  want = [published_t5_bucket(int(n), is_bidirectional, buckets, max_distance) for n in offsets]
  np.testing.assert_array_equal(got, want)
  assert got.dtype == np.int32 and set(got) <= set(range(buckets))


def test_t5_worked_example():
  """T5's own numbers: 32 buckets to 128 tokens, a decoder: 0..15 alone, 16..18 together, all from 113 in the last."""
  causal = functools.partial(bias.t5_buckets, is_bidirectional=False)
  np.testing.assert_array_equal(causal([0, -1, -15, -16, -18, -19, -64, -112, -113, -999, 1, 50]),
                                [0, 1, 15, 16, 16, 17, 26, 30, 31, 31, 0, 0])  # fmt: skip
  np.testing.assert_array_equal(bias.t5_buckets([0, -7, -8, 7, 8, 127, 999]), [0, 7, 8, 23, 24, 31, 31])


@pytest.mark.parametrize('is_bidirectional', [True, False])
def test_t5_relative_is_the_loop(is_bidirectional):
  values = normal(3, 8, H).astype(np.float32)
  bucket = lambda i, j: published_t5_bucket(j - i, is_bidirectional, 8, 6)
  got = bias.dense(bias.t5_relative(values, is_bidirectional=is_bidirectional, max_distance=6), T, S, heads=H)
  np.testing.assert_array_equal(got, loop(lambda h, i, j: values[bucket(i, j), h]))


@pytest.mark.parametrize('rows', [1, H])
def test_table_clips_offsets(rows):
  values = normal(4, rows, 7).astype(np.float32)
  want = loop(lambda h, i, j: values[h % rows, max(-3, min(3, j - i)) + 3])
  np.testing.assert_array_equal(bias.dense(bias.table(values), T, S, heads=H), want)


@pytest.mark.parametrize('grid', [(2, 3), (4,), (2, 2, 3)])
def test_grid_table_is_the_published_index(grid):
  """Swin's construction: differences of coordinates, shifted to start at 0, as digits of a mixed base; query - key."""
  N, size = math.prod(grid), math.prod(2 * n - 1 for n in grid)
  values = normal(5, size, H).astype(np.float32)

  def pair(h, i, j):
    if i >= N or j >= N:
      return 0
    a, b, index = np.unravel_index(i, grid), np.unravel_index(j, grid), 0
    for n, x, y in zip(grid, a, b):
      index = index * (2 * n - 1) + int(x) - int(y) + n - 1
    return values[index, h]

  got = bias.dense(bias.grid_table(values, grid), N + 1, heads=H)
  np.testing.assert_array_equal(got, loop(pair, T=N + 1, S=N + 1))


def test_grid_table_worked_example():
  """A 2 x 2 window: 9 entries, the middle one for a patch itself, the last for (1, 1) above-left of the query."""
  got = bias.dense(bias.grid_table(np.arange(9, dtype=np.float32)[:, None], (2, 2)), 4)[0, 0]
  np.testing.assert_array_equal(got, [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])


READY = {
  'alibi': (bias.alibi, (H,)),
  'table': (bias.table, (H, 5)),
  'table for all heads': (bias.table, (1, 5)),
  't5': (functools.partial(bias.t5_relative, max_distance=6), (8, H)),
  'grid': (functools.partial(bias.grid_table, grid=(3, 3)), (25, H)),
}


@pytest.mark.parametrize('name', READY)
def test_gradient_of_what_is_learned(name):
  """The bias is linear in it, so the gradient along a direction is the bias of the direction."""
  make, shape = READY[name]
  values, direction, pulled = normal(6, *shape), normal(7, *shape), normal(8, 1, H, T, S)
  of = lambda x: bias.dense(make(x), T, S, heads=H, dtype=x.dtype)
  with jax.enable_x64(True):
    grad = jax.grad(lambda x: jnp.sum(pulled * of(x)))(jnp.asarray(values))
    want = np.sum(pulled * of(jnp.asarray(direction)))
  assert grad.shape == shape
  np.testing.assert_allclose(np.sum(np.asarray(grad) * direction), want, rtol=1e-12)


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda: bias.score(3), 'f=3 is not callable'),
    (lambda: bias.alibi_slopes(0), 'H=0'),
    (lambda: bias.alibi(np.ones((2, 2), np.float32)), r'slopes have shape \(2, 2\)'),
    (lambda: bias.alibi(np.ones(2, np.int32)), 'slopes .* int32'),
    (lambda: bias.dense(bias.alibi(np.ones(2, np.float32)), 3, heads=3), 'slopes have 2 heads, expected 3'),
    (lambda: bias.dense(bias.table(np.ones((2, 3), np.float32)), 3, heads=4), 'values have 2 heads, expected 4'),
    (lambda: bias.dense(bias.t5_relative(np.ones((8, 2), np.float32)), 3, heads=4), 'values have 2 heads'),
    (lambda: bias.table(np.ones((2, 4), np.float32)), 'odd number of offsets'),
    (lambda: bias.t5_relative(np.ones((9, 2), np.float32)), 'buckets=9'),
    (lambda: bias.t5_relative(np.ones((32, 2), np.float32), max_distance=8), 'max_distance=8 must be above 8'),
    (lambda: bias.grid_table(np.ones((8, 2), np.float32), (2, 2)), r'values have shape \(8, 2\), expected \[9, H\]'),
  ],
)
def test_rejects(call, words):
  with pytest.raises(ValueError, match=words):
    call()


# Through softmax.attend

FORMS = {'reference': {'implementation': 'reference'}, 'xla': {'implementation': 'xla', 'blocks': softmax.Blocks(8, 4)}}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', READY)
def test_attend_with_a_score_is_attend_with_the_bias(name, form):
  make, shape = READY[name]
  values, arrays = normal(9, *shape), qkv(10)
  pulled = normal(13, B, T, H, V)

  def loss(as_score, q, k, v, values):
    x = make(values)
    how = {'score': x} if as_score else {'bias': bias.dense(x, T, S, heads=H, dtype=values.dtype)}
    out = softmax.attend(q, k, v, is_causal=True, **how, **FORMS[form])
    return jnp.sum(pulled * out), out

  with jax.enable_x64(True):
    run = lambda kind: jax.jit(jax.value_and_grad(functools.partial(loss, kind), (0, 1, 2, 3), has_aux=True))
    (_, out), grads = run(True)(*arrays, values)
    (_, _), want_grads = run(False)(*arrays, values)
    dense = np.asarray(bias.dense(make(values), T, S, heads=H, dtype=np.float64))
  oracle.assert_close(out, oracle.attend(*arrays, bias=dense, is_causal=True)[0])
  for x, got, want in zip(['q', 'k', 'v', 'values'], grads, want_grads):
    oracle.assert_close(got, want, name=f'gradient of {x}')
