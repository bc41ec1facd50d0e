"""Padding, empty rows, and numbers at the edge: what is not there must not be felt, what is there must be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import masks, softmax
from tests.attn import oracle
from tests.attn.softmax_cases import BLOCKS, attend, inputs

IMPLEMENTATIONS = softmax.IMPLEMENTATIONS
SHAPE = 'B2T6S7H4K2D3V2'
PADDING = {  # name -> (options, [B, T] queries that exist, [B, S] keys that exist)
  'lengths': (
    {'query_seq_lengths': np.array([4, 6]), 'key_value_seq_lengths': np.array([7, 3])},
    np.arange(6) < np.array([[4], [6]]),
    np.arange(7) < np.array([[7], [3]]),
  ),
  'no length': (
    {'query_seq_lengths': np.array([0, 2]), 'key_value_seq_lengths': np.array([5, 0])},
    np.arange(6) < np.array([[0], [2]]),
    np.arange(7) < np.array([[5], [0]]),
  ),
  'positions': (
    {'positions': np.array([[0, 1, -1, 3, 4, -1]] * 2), 'kv_positions': np.array([-1, 5, 2, -1, 0, 1, -1])},
    np.array([[0, 1, -1, 3, 4, -1]] * 2) >= 0,
    np.array([[-1, 5, 2, -1, 0, 1, -1]] * 2) >= 0,
  ),
}


@functools.partial(jax.jit, static_argnames='implementation')
def forward_and_backward(q, k, v, cotangents, options, mask=None, implementation=None):
  kwargs = {'implementation': implementation, 'blocks': BLOCKS, 'return_residual': True}
  result, vjp = jax.vjp(lambda *qkv: softmax.attend(*qkv, **options, mask=mask, **kwargs), q, k, v)
  return [*result, *vjp(cotangents)]


@pytest.mark.parametrize('name', PADDING)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_padding_is_never_felt(implementation, name):
  options, queries, keys = PADDING[name]
  q, k, v = inputs(SHAPE, np.float32)
  rng = np.random.default_rng(2)
  cotangents = rng.normal(size=(2, 6, 4, 2)).astype('f'), rng.normal(size=(2, 6, 4)).astype('f')
  # The padding is empty, or holds what memory may hold.
  runs = []
  for fill in (0.0, np.nan, np.inf, -np.inf, 3e38):
    pairs = (q, queries), (k, keys), (v, keys)
    filled = [np.where(there[..., None, None], x, np.float32(fill)) for x, there in pairs]
    runs.append(forward_and_backward(*filled, cotangents, options, implementation=implementation))
  for run in runs[1:]:
    for got, want in zip(run, runs[0]):
      np.testing.assert_array_equal(got, want)
  out, lse, dq, dk, dv = (np.asarray(x) for x in runs[0])
  assert (out[~queries] == 0).all() and np.isneginf(lse[~queries]).all()
  for grad, there in ((dq, queries), (dk, keys), (dv, keys)):
    assert np.isfinite(grad).all() and (grad[~there] == 0).all()
  alive = queries & keys.any(1, keepdims=True)
  assert np.isfinite(lse[alive]).all() and np.isneginf(lse[~alive]).all()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_what_a_query_sees_it_feels(implementation):
  """A NaN in a visible key is an error of the caller and must show, in the rows that see it and in no other."""
  q, k, v = inputs('B1T6S6H2K1D3V2', np.float32)
  k[0, 3] = np.nan
  out, lse = attend(q, k, v, is_causal=True, implementation=implementation, blocks=BLOCKS, return_residual=True)
  assert np.isfinite(out[:, :3]).all() and np.isfinite(lse[:, :3]).all()
  assert np.isnan(out[:, 3:]).all() and np.isnan(lse[:, 3:]).all()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_lengths_beyond_the_array_are_the_array(implementation):
  q, k, v = inputs(SHAPE, np.float32)
  lengths = {'query_seq_lengths': np.array([6, 6]), 'key_value_seq_lengths': np.array([7, 7])}
  kwargs = {'implementation': implementation, 'blocks': BLOCKS}
  want = attend(q, k, v, **kwargs)
  oracle.assert_close(attend(q, k, v, **lengths, **kwargs), want, 'float32')
  oracle.assert_close(attend(q, k, v, **{n: x + 9 for n, x in lengths.items()}, **kwargs), want, 'float32')


@pytest.mark.parametrize('shape', ['B2T3S0H2K1D3V2', 'B2T0S3H2K1D3V2', 'B0T2S3H2K1D3V2'])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_empty_axes(implementation, shape):
  q, k, v = inputs(shape, np.float32)
  out, lse = attend(q, k, v, implementation=implementation, return_residual=True)
  assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3]
  assert (np.asarray(out) == 0).all()
  if k.shape[1] == 0:
    assert np.isneginf(lse).all()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_rows_that_see_nothing_have_zero_gradients(implementation):
  q, k, v = inputs('B1T12S12H2K1D3V2', np.float32)
  ones = np.ones((1, 12, 2, 2), np.float32), np.ones((1, 12, 2), np.float32)
  mask = masks.causal(-9) & ~masks.sink(0)  # queries 0 to 8 see nothing: a whole tile, and one row of the next
  got = forward_and_backward(q, k, v, ones, {}, mask, implementation=implementation)
  out, lse, dq, dk, dv = (np.asarray(x) for x in got)
  assert (out[:, :9] == 0).all() and np.isneginf(lse[:, :9]).all() and (dq[:, :9] == 0).all()
  assert (dk[:, 3:] == 0).all() and (dv[:, 3:] == 0).all()
  assert np.isfinite(lse[:, 9:]).all() and all(np.isfinite(x).all() for x in (dq, dk, dv))


def logits_only(logits, **kwargs):
  """Attention with the given logits [T, S], by way of q . k, exact for integers; values that name their key."""
  S = logits.shape[1]
  q, k = logits[None, :, None, :], np.eye(S)[None, :, None, :]
  return attend(q, k, np.eye(S)[None, :, None, :], scale=1.0, return_residual=True, **kwargs)


EXTREME = {
  'rising by thousands': np.arange(8) * 1e4,
  'falling by thousands': np.arange(8)[::-1] * 1e4,
  'all far below': np.full(8, -1e4) + np.arange(8) / 8,
  'all far above': np.full(8, 1e4) + np.arange(8) / 8,
  'one far above': np.where(np.arange(8) == 5, 1e4, 0),
  'both ends': np.array([-1e4, 1e4] * 4),
}


@pytest.mark.parametrize('dtype', ['float64', 'float32'])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_extreme_logits(implementation, dtype):
  logits = np.stack(list(EXTREME.values()))
  T, S = logits.shape
  with jax.enable_x64(dtype == 'float64'):
    given = logits.astype(dtype)
    out, lse = logits_only(given, implementation=implementation, blocks=BLOCKS)
    p = np.exp(logits - logits.max(1, keepdims=True))
    total = p.sum(1, keepdims=True)
    oracle.assert_close(out[0, :, 0], p / total, dtype)
    np.testing.assert_allclose(lse[0, :, 0], (logits.max(1, keepdims=True) + np.log(total))[:, 0], rtol=1e-6)
    assert out.dtype == dtype and out.shape == (1, T, 1, S)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_extreme_logits_have_finite_gradients(implementation):
  logits = np.stack(list(EXTREME.values())).astype(np.float32)
  q, k = logits[None, :, None, :], np.eye(8, dtype=np.float32)[None, :, None, :]
  cotangents = np.ones((1, 6, 1, 8), np.float32), np.ones((1, 6, 1), np.float32)
  for x in forward_and_backward(q, k, k, cotangents, {}, implementation=implementation):
    assert np.isfinite(x).all()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_large_bias_shared_by_all_queries(implementation):
  """The last tile is filled up with queries that do not exist, and exp(1e4) of theirs must not be felt."""
  q, k, v = inputs('B1T5S7H2K1D3V2', np.float32)
  cotangents = np.ones((1, 5, 2, 2), np.float32), np.ones((1, 5, 2), np.float32)
  plain = forward_and_backward(q, k, v, cotangents, {}, implementation=implementation)
  for options in ({'bias': np.full((1, 1, 1, 7), 1e4, np.float32)}, {'logit_bias': np.full((1, 7), 1e4, np.float32)}):
    got = forward_and_backward(q, k, v, cotangents, options, implementation=implementation)
    for x, want in zip([got[0], *got[2:]], [plain[0], *plain[2:]]):
      assert np.isfinite(x).all()
      np.testing.assert_allclose(x, want, rtol=0.05, atol=0.01)  # a logit of 1e4 has three digits behind the point
    oracle.assert_close(got[1], np.asarray(plain[1]) + 1e4, 'float32')


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_additive_masks(implementation):
  """A bias of -inf, or of the least number where there is another key to see, is the same as a mask."""
  q, k, v = inputs('B1T6S7H2K1D3V2', np.float32)
  seen = np.tri(6, 7, dtype=bool)
  kwargs = {'implementation': implementation, 'blocks': BLOCKS, 'return_residual': True}
  want = attend(q, k, v, mask=seen, **kwargs)
  for least in (-np.inf, np.finfo(np.float32).min / 2):
    got = attend(q, k, v, bias=np.where(seen, 0, least).astype(np.float32), **kwargs)
    for a, b in zip(got, want):
      oracle.assert_close(a, b, 'float32')
  # Where every key has the least number, all are equal: a mean, as in jax.nn.
  out = attend(q, k, v, bias=np.full((6, 7), -3e38, np.float32), **kwargs)[0]
  oracle.assert_close(out, np.broadcast_to(v.mean(1, keepdims=True), out.shape), 'float32')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_narrow_types(implementation, dtype):
  """Against the oracle on the rounded inputs: sums and probabilities are not accumulated in the narrow type."""
  q, k, v = (np.asarray(jnp.asarray(x, dtype)) for x in inputs('B1T17S37H4K2D16V8'))
  cotangents = np.ones((1, 17, 4, 8), q.dtype), np.ones((1, 17, 4), np.float32)
  mask = masks.causal(20) & masks.window(10, None)
  got = forward_and_backward(q, k, v, cotangents, {}, mask, implementation=implementation)
  wide = {'q': q, 'k': k, 'v': v} | {'mask': oracle.dense(lambda b, h, i, j, t, s: i - 10 <= j <= i + 20, 17, 37)}
  wide = {n: x.astype(np.float64) if n in 'qkv' else x for n, x in wide.items()}
  out, lse = oracle.attend(**wide)
  grads = oracle.gradients(**wide, d_out=np.ones_like(out), d_lse=np.ones_like(lse))
  oracle.assert_close(got[1], lse, 'float32', 'log-sum-exp')  # the products of narrow numbers are exact in float32
  for name, a, b in zip(['out', 'dq', 'dk', 'dv'], [got[0], *got[2:]], [out, *grads.values()]):
    assert a.dtype == dtype
    oracle.assert_close(a, b, dtype, name)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_cotangent_of_nan_at_padding_stays_there(implementation):
  # A z-loss over the real rows pulls with 0 * -inf = NaN on the log-sum-exp of padding.
  q, k, v = inputs('B2T9S9H2K2D4V4', np.float32)
  lengths = np.array([9, 4])
  is_text = np.arange(9)[None, :, None] < lengths[:, None, None]

  def z_loss(q, k, v):
    _, lse = softmax.attend(
      q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation,
      return_residual=True,
    )  # fmt: skip
    return jnp.where(is_text, lse**2, 0).sum()

  dq, dk, _ = jax.jit(jax.grad(z_loss, argnums=(0, 1, 2)))(q, k, v)
  assert np.isfinite(dq).all() and np.isfinite(dk).all() and np.abs(dk).max() > 0.01
  assert not dq[1, 4:].any() and not dk[1, 4:].any()
