"""attn.dot_product_attention takes the place of jax.nn's: same signature, same results."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, softmax
from tests.attn import oracle
from tests.attn.softmax_cases import QUICK, attend

IMPLEMENTATIONS = softmax.IMPLEMENTATIONS
B, T, S, H, K, D = 2, 7, 11, 4, 2, 8


def inputs(dtype='float32'):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, D))]


def bias(*shape):
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def mask(*shape):
  seen = np.random.default_rng(2).random(shape) < 0.6
  seen[..., 0] = True  # every query sees a key: with none, jax.nn gives a mean of the values and we give zeros
  return seen


OPTIONS = {
  'plain': {},
  'bias': {'bias': bias(B, H, T, S)},
  'bias of all heads': {'bias': bias(B, 1, T, S)},
  'bias per key': {'bias': bias(1, 1, 1, S)},
  'mask': {'mask': mask(B, H, T, S)},
  'mask of all heads': {'mask': mask(1, 1, T, S)},
  'scale': {'scale': 0.3},
  'causal': {'is_causal': True},
  'window': {'local_window_size': 2},
  'left window': {'local_window_size': (3, 0)},
  'right window': {'local_window_size': (1, 4)},
  'causal window': {'local_window_size': (2, 2), 'is_causal': True},
  'query lengths': {'query_seq_lengths': np.array([7, 3], np.int32)},
  'key lengths': {'key_value_seq_lengths': np.array([4, 11], np.int32)},
  'everything': {
    'bias': bias(1, H, T, S),
    'mask': mask(B, 1, T, S),
    'scale': 0.5,
    'is_causal': True,
    'query_seq_lengths': np.array([5, 7], np.int32),
    'key_value_seq_lengths': np.array([9, 3], np.int32),
    'local_window_size': (8, 1),
  },
}
STATIC = ('scale', 'is_causal', 'local_window_size', 'implementation', 'return_residual')
ours = jax.jit(attn.dot_product_attention, static_argnames=(*STATIC, 'soft_cap'))
theirs = jax.jit(jax.nn.dot_product_attention, static_argnames=STATIC, compiler_options=QUICK)


def test_signature():
  want = list(inspect.signature(jax.nn.dot_product_attention).parameters.values())
  got = list(inspect.signature(attn.dot_product_attention).parameters.values())
  for a, b in zip(got, want):
    assert (a.name, a.kind, a.default) == (b.name, b.kind, b.default)
  more = got[len(want) :]
  assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in more)


@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_same_results(implementation, name):
  options = OPTIONS[name]
  got, residual = ours(*inputs(), **options, implementation=implementation, return_residual=True)
  want, want_residual = theirs(*inputs(), **options, return_residual=True)
  lengths = options.get('query_seq_lengths', np.array([T, T]))
  exists = np.arange(T) < lengths[:, None]  # where jax.nn's residual means something
  oracle.assert_close(got, want, 'float32')
  oracle.assert_close(np.asarray(residual)[exists], np.asarray(want_residual)[exists], 'float32')


@pytest.mark.parametrize('shape', [(9, 9), (9, 4), (1, 9)])
def test_causal_is_aligned_at_the_first_token(shape):
  T, S = shape
  q, k, v = (jnp.resize(x, (B, n, *x.shape[2:])) for x, n in zip(inputs(), (T, S, S)))
  oracle.assert_close(ours(q, k, v, is_causal=True), theirs(q, k, v, is_causal=True), 'float32')


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_same_gradients(implementation):
  q, k, v = inputs()
  options = {name: OPTIONS['everything'][name] for name in ('mask', 'scale', 'is_causal', 'key_value_seq_lengths')}

  def gradients(f, **more):
    loss = lambda q, k, v, bias: (f(q, k, v, bias, **options, **more) ** 2).sum()
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, bias(1, H, T, S))

  got = gradients(attn.dot_product_attention, implementation=implementation)
  for a, b in zip(got, gradients(jax.nn.dot_product_attention)):
    oracle.assert_close(a, b, 'float32')


def test_without_a_batch():
  q, k, v = (x[0] for x in inputs())
  options = {'bias': bias(1, H, T, S), 'mask': mask(1, 1, T, S), 'is_causal': True, 'return_residual': True}
  for got, want in zip(ours(q, k, v, **options), theirs(q, k, v, **options)):
    assert got.shape == want.shape
    oracle.assert_close(got, want, 'float32')
  assert ours(q, k, v).shape == (T, H, D)
  # A bias and a mask of three axes are those of one row of the batch, as there.
  options = {'bias': bias(H, T, S), 'mask': mask(H, T, S)}
  oracle.assert_close(ours(q, k, v, **options), theirs(q, k, v, **options), 'float32')


def test_bias_and_mask_by_position():
  q, k, v = inputs()
  both = bias(1, 1, T, S), mask(1, 1, T, S)
  oracle.assert_close(ours(q, k, v, *both), theirs(q, k, v, *both), 'float32')


def test_numpy_arrays_are_taken():
  q, k, v = (np.asarray(x) for x in inputs())
  oracle.assert_close(attn.dot_product_attention(q, k, v), theirs(q, k, v), 'float32')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_narrow_types(implementation, dtype):
  got, residual = ours(*inputs(dtype), implementation=implementation, return_residual=True)
  assert got.dtype == dtype and residual.dtype == np.float32
  # float16 products are more than jax.nn can do on a CPU, so its float32 result on the same numbers is the measure.
  oracle.assert_close(got, theirs(*(x.astype('float32') for x in inputs(dtype))), dtype)


def test_rows_that_see_nothing_are_zeros():
  """Where we differ from jax.nn, on purpose."""
  q, k, v = inputs()
  seen = mask(1, 1, T, S)
  seen[..., 2, :] = False
  got, residual = ours(q, k, v, mask=seen, return_residual=True)
  assert (np.asarray(got[:, 2]) == 0).all() and np.isneginf(residual[:, 2]).all()


def test_more_than_jax_nn():
  """Mask objects, values of another width, soft caps and sinks are welcome; the residual has a gradient."""
  q, k, v = inputs()
  wide = jnp.concatenate([v, v[..., :3]], axis=-1)
  sinks = np.linspace(-1, 1, H, dtype=np.float32)
  got = ours(q, k, wide, mask=masks.causal(), soft_cap=2.0, sinks=sinks, local_window_size=(2, 0))
  want = attend(q, k, wide, mask=masks.causal() & masks.window(2), soft_cap=2.0, sinks=sinks)
  oracle.assert_close(got, want, 'float32')
  grad = jax.jit(jax.grad(lambda q: attn.dot_product_attention(q, k, v, return_residual=True)[1].sum()))(q)
  assert np.abs(grad).max() > 0


@pytest.mark.parametrize(
  'change, words',
  [
    ({'implementation': 'cudnn'}, "implementation='cudnn'"),
    ({'local_window_size': -1}, 'local_window_size=-1'),
    ({'local_window_size': (1, 2, 3)}, 'local_window_size'),
    ({'local_window_size': 1.5}, r'local_window_size=1\.5'),
    ({'local_window_size': (2, -1)}, r'local_window_size=\(2, -1\)'),
    ({'query': np.zeros((T, H, D), np.float32)}, r'\(7, 4, 8\)'),
    ({'query': np.zeros((D,), np.float32)}, r'\(8,\)'),
    ({'mask': np.zeros((B, H, T, S), np.float32)}, 'mask.*float32.*bool'),
    ({'mask': np.zeros((T, S), int), 'local_window_size': 2}, 'mask.*int.*bool'),
    ({'bias': np.zeros((B, H, S, T), np.float32)}, 'bias'),
    ({'query_seq_lengths': np.zeros(3, int)}, 'query_seq_lengths'),
  ],
)
def test_rejects(change, words):
  with pytest.raises(ValueError, match=words):
    attn.dot_product_attention(**dict(zip(('query', 'key', 'value'), inputs())) | change)


def test_a_misspelt_keyword_is_an_error():
  with pytest.raises(TypeError, match='softcap'):
    attn.dot_product_attention(*inputs(), softcap=3.0)
