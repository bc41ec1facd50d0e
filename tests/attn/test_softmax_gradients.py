"""Gradients of attn.softmax.attend: finite differences, biases of every shape, types, and what 'xla' refuses.

That the gradients of every option are right is tested beside their values, in test_softmax.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attn import masks, softmax
from tests.attn import oracle
from tests.attn.softmax_cases import BLOCKS, FLOATS, QUICK, SHAPE, case, check, inputs

IMPLEMENTATIONS = softmax.IMPLEMENTATIONS


def test_formulas_of_the_oracle():
  """The oracle's gradients are the derivatives of its own values, to the last digits, by a complex step."""
  one = case('B2T3S4H4K2D3V2', 'causal', 'soft cap', 'array mask', 'bias', 'logit bias per head', 'sinks')
  settings = one.oracle_arguments()
  rng = np.random.default_rng(0)
  settings |= {'keep': rng.random((2, 4, 3, 4)) < 0.7, 'dropout_rate': 0.3}
  grads = oracle.gradients(**settings, d_out=one.d_out, d_lse=one.d_lse)
  assert set(grads) == set(FLOATS)
  for name, grad in grads.items():
    step = rng.normal(size=grad.shape)
    out, lse = oracle.attend(**settings | {name: settings[name] + 1e-30j * step})
    slope = np.imag((one.d_out * out).sum() + (one.d_lse * np.where(np.isfinite(lse), lse, 0)).sum()) / 1e-30
    np.testing.assert_allclose(slope, (grad * step).sum(), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_finite_differences(implementation):
  one = case('B1T9S4H2K1D3V2', 'streaming mask', 'soft cap', 'bias', 'logit bias', 'sinks')
  floats = {name: one.arrays[name] for name in FLOATS}

  @jax.jit
  def f(floats):
    kwargs = {'implementation': implementation, 'blocks': BLOCKS, 'return_residual': True}
    return softmax.attend(**floats, **one.static, mask=one.mask, **kwargs)

  with jax.enable_x64(True):
    check_grads(f, (floats,), order=1, modes=['rev'])


BIAS_SHAPES = list(itertools.product((1, 2), (1, 4), (1, 13), (1, 11)))


def bias_gradients(implementation, shapes):
  """The gradient of one loss for a bias of every shape, all in one compilation; and what it should be."""
  one = case(SHAPE, 'streaming mask', 'sinks')
  rng = np.random.default_rng(4)
  biases = [rng.normal(size=shape) for shape in shapes]

  def loss(bias):
    kwargs = {'implementation': implementation, 'blocks': BLOCKS, 'return_residual': True}
    out, lse = softmax.attend(**one.arrays, mask=one.mask, bias=bias, **kwargs)
    return (out * one.d_out).sum() + (lse * one.d_lse).sum()

  with jax.enable_x64(True):
    got = jax.jit(lambda biases: [jax.grad(loss)(bias) for bias in biases], compiler_options=QUICK)(biases)
  for bias, grad in zip(biases, got):
    assert grad.shape == bias.shape
    want = oracle.gradients(**one.oracle_arguments(), bias=bias, d_out=one.d_out, d_lse=one.d_lse)['bias']
    np.testing.assert_allclose(grad, want, rtol=1e-10, atol=1e-12, err_msg=f'bias of shape {bias.shape}')


def test_bias_of_every_broadcast_shape():
  bias_gradients('xla', BIAS_SHAPES)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_bias_of_fewer_axes(implementation):
  bias_gradients(implementation, [(), (11,), (13, 1), (13, 11), (4, 1, 11)])


def test_bias_with_every_head_of_its_own_and_one_key_head():
  check(case('B2T5S5H3K1D2V2', 'bias', 'causal'), 'xla')


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_log_sum_exp_alone_has_a_gradient(implementation):
  """d lse / d logit is the probability: with q . k = 0 and a bias, softmax(bias)."""
  bias = np.random.default_rng(0).normal(size=(1, 1, 1, 6))
  zeros = np.zeros((1, 1, 1, 2)), np.zeros((1, 6, 1, 2)), np.zeros((1, 6, 1, 2))
  with jax.enable_x64(True):
    kwargs = {'implementation': implementation, 'return_residual': True, 'blocks': softmax.Blocks(q=1, kv=4)}
    loss = lambda bias: softmax.attend(*zeros, bias=bias, **kwargs)[1].sum()
    grad = jax.jit(jax.grad(loss), compiler_options=QUICK)(bias)
  p = np.exp(bias)
  np.testing.assert_allclose(grad, p / p.sum(), rtol=1e-12)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_only_visible_keys_get_a_gradient(implementation):
  q, k, v = inputs('B1T9S9H2K1D3V3', np.float32)
  mask = masks.causal() & masks.window(2)

  def loss(k, v):
    return softmax.attend(q, k, v, mask=mask, implementation=implementation, blocks=BLOCKS)[:, 6].sum()

  for grad in jax.jit(jax.grad(loss, argnums=(0, 1)))(k, v):
    touched = np.abs(grad).sum((0, 2, 3)) > 0
    np.testing.assert_array_equal(np.flatnonzero(touched), [4, 5, 6])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_gradients_have_the_types_of_their_inputs(implementation, dtype):
  one = case('B1T4S5H2K1D3V2', 'bias', 'logit bias', 'sinks')
  q, k, v = (one.arrays[n].astype(np.float32) for n in 'qkv')
  floats = {n: jnp.asarray(x, dtype) for n, x in zip('qkv', (q, k, v))}
  floats |= {n: jnp.asarray(one.arrays[n], 'float32') for n in ('bias', 'logit_bias', 'sinks')}
  kwargs = {'implementation': implementation, 'return_residual': True, 'blocks': BLOCKS}

  def forward_and_backward(floats):
    result, vjp = jax.vjp(lambda floats: softmax.attend(**floats, **kwargs), floats)
    return result, vjp(result)[0]

  (out, lse), grads = jax.eval_shape(forward_and_backward, floats)
  assert out.dtype == dtype and lse.dtype == np.float32
  assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == jax.tree.map(lambda x: (x.shape, x.dtype), floats)


def small_loss(implementation):
  _, k, v = inputs('B1T3S4H1K1D2V2', np.float32)
  return lambda q: (softmax.attend(q, k, v, is_causal=True, implementation=implementation) ** 2).sum()


def test_reference_has_every_order():
  """Second derivatives, forward over reverse and reverse over reverse, against differences of the oracle's gradient."""
  q, k, v = inputs('B1T2S3H1K1D2V2')
  rng = np.random.default_rng(0)
  d_out, d_lse, step = rng.normal(size=(1, 2, 1, 2)), rng.normal(size=(1, 2, 1)), rng.normal(size=q.shape)

  def loss(q):
    out, lse = softmax.attend(q, k, v, soft_cap=0.9, implementation='reference', return_residual=True)
    return (out * d_out).sum() + (lse * d_lse).sum()

  def both(q):
    forward = jax.jvp(jax.grad(loss), (q,), (step,))[1]
    return forward, jax.grad(lambda q: (jax.grad(loss)(q) * step).sum())(q)

  with jax.enable_x64(True):
    got = jax.jit(both, compiler_options=QUICK)(q)
  grad = lambda q: oracle.gradients(q, k, v, d_out, d_lse, soft_cap=0.9)['q']
  want = (grad(q + 1e-5 * step) - grad(q - 1e-5 * step)) / 2e-5
  for second in got:
    np.testing.assert_allclose(second, want, rtol=1e-7, atol=1e-9)


def test_reference_has_every_order_on_rows_that_see_nothing():
  q, k, v = inputs('B1T3S3H1K1D2V2')
  seen = np.tri(3, k=-1, dtype=bool)  # the first query sees nothing
  with jax.enable_x64(True):
    loss = lambda q: softmax.attend(q, k, v, mask=seen, implementation='reference').sum()
    hessian = jax.jit(jax.hessian(loss), compiler_options=QUICK)(q)
  assert np.isfinite(hessian).all()


@pytest.mark.parametrize(
  'transform',
  [
    lambda f, q: jax.jvp(f, (q,), (q,)),
    lambda f, q: jax.jvp(jax.grad(f), (q,), (q,)),
    lambda f, q: jax.grad(lambda q: jax.grad(f)(q).sum())(q),
    lambda f, q: jax.hessian(f)(q),
  ],
)
def test_tiles_refuse_what_they_cannot(transform):
  q = inputs('B1T3S4H1K1D2V2', np.float32)[0]
  with pytest.raises(NotImplementedError, match="implementation='reference'"):
    transform(small_loss('xla'), q)


def test_tiles_refuse_second_order_under_jit():
  q = inputs('B1T3S4H1K1D2V2', np.float32)[0]
  with pytest.raises(NotImplementedError, match="implementation='reference'"):
    jax.jit(jax.grad(lambda q: jax.grad(jax.jit(small_loss('xla')))(q).sum()))(q)


@pytest.mark.parametrize(
  'transform', [lambda f, q: jax.jvp(jax.jit(f), (q,), (q,)), lambda f, q: jax.linearize(f, q)[1](q)]
)
def test_jax_refuses_where_tiles_cannot_tell(transform):
  q = inputs('B1T3S4H1K1D2V2', np.float32)[0]
  with pytest.raises((NotImplementedError, TypeError), match='forward-mode'):
    transform(small_loss('xla'), q)
