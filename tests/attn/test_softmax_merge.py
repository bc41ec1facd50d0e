"""Partial results: attention over parts of the keys, merged, is attention over all of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import masks, softmax
from tests.attn import oracle
from tests.attn.softmax_cases import QUICK, SHAPE, attend, case, inputs

IMPLEMENTATIONS = softmax.IMPLEMENTATIONS
SPLITS = [(0, 11), (5,), (1, 2), (0, 4, 4, 11), (3, 6, 9), tuple(range(1, 11))]  # with empty parts, and one key each
merge = jax.jit(softmax.merge, compiler_options=QUICK)
add_sinks = jax.jit(softmax.add_sinks, compiler_options=QUICK)


def parts_of(arrays, seen, cuts, implementation):
  """[(out, lse)] of the keys between the cuts."""
  edges = [0, *cuts, arrays['k'].shape[1]]
  keys = [slice(a, b) for a, b in itertools.pairwise(edges)]
  return [
    softmax.attend(
      arrays['q'], arrays['k'][:, s], arrays['v'][:, s], bias=arrays['bias'][..., s], mask=seen[..., s],
      implementation=implementation, return_residual=True,
    )
    for s in keys
  ]  # fmt: skip


split = jax.jit(parts_of, static_argnums=(2, 3), compiler_options=QUICK)


@pytest.mark.parametrize('cuts', SPLITS)
def test_any_split_is_the_whole(cuts):
  one = case(SHAPE, 'bias', 'array mask')  # the mask has empty rows, whole and in parts
  with jax.enable_x64(True):
    out, lse = merge(split(one.arrays, one.seen, cuts, 'reference'))
  want_out, want_lse = oracle.attend(**one.oracle_arguments())
  np.testing.assert_allclose(out, want_out, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_gradient_of_a_split_is_that_of_the_whole(implementation):
  one = case(SHAPE, 'bias', 'array mask')

  @functools.partial(jax.jit, compiler_options=QUICK)
  def gradients(arrays, seen):
    def loss(arrays):
      out, lse = softmax.merge(parts_of(arrays, seen, (4, 5), implementation))
      return (out * one.d_out).sum() + jnp.where(jnp.isfinite(lse), lse * one.d_lse, 0).sum()

    return jax.grad(loss)(arrays)

  with jax.enable_x64(True):
    got = gradients(one.arrays, one.seen)
  want = oracle.gradients(**one.oracle_arguments(), d_out=one.d_out, d_lse=one.d_lse)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=1e-12, err_msg=name)


def random_parts(n, dtype=np.float64, seed=0):
  """Parts that no attention made: merge is a function of its arguments alone. Some rows of some parts are empty."""
  rng = np.random.default_rng(seed)
  parts = []
  for _ in range(n):
    out, lse = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(2, 5, 3)) * 5
    lse[:, 0] = -np.inf
    lse[rng.random(lse.shape) < 0.3] = -np.inf
    parts.append((np.where(np.isfinite(lse)[..., None], out, 0).astype(dtype), lse))
  return parts


def test_formula():
  parts = random_parts(3)
  with jax.enable_x64(True):
    out, lse = (np.asarray(x) for x in merge(parts))
  for at in np.ndindex(2, 5, 3):
    weights = [np.exp(part[1][at]) for part in parts]
    if sum(weights) == 0:
      assert (out[at] == 0).all() and np.isneginf(lse[at])
      continue
    np.testing.assert_allclose(lse[at], np.log(sum(weights)), rtol=1e-12, atol=1e-12)
    want = sum(w * part[0][at] for w, part in zip(weights, parts)) / sum(weights)
    np.testing.assert_allclose(out[at], want, rtol=1e-12, atol=1e-12)


def test_associative_and_commutative():
  a, b, c = random_parts(3)
  with jax.enable_x64(True):
    want = merge([a, b, c])
    for got in (merge([merge([a, b]), c]), merge([a, merge([b, c])]), merge([c, a, b]), merge((b, c, a))):
      for x, y in zip(got, want):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_one_part_is_itself():
  with jax.enable_x64(True):
    (part,) = random_parts(1)
    for got, want in zip(merge([part]), part):
      np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('rubbish', [1e30, np.nan, np.inf])
def test_an_empty_part_weighs_nothing_whatever_it_holds(rubbish):
  a, b = random_parts(2, np.float32)
  empty = np.full_like(a[0], rubbish), np.full_like(a[1], -np.inf)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(parts):
    result, vjp = jax.vjp(softmax.merge, parts)
    return result, vjp(jax.tree.map(jnp.ones_like, result))[0]

  (out, lse), grads = run([a, empty, b])
  want_out, want_lse = merge([a, b])
  oracle.assert_close(out, want_out, 'float32')
  oracle.assert_close(lse, want_lse, 'float32')
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(grads[1]))
  (out, lse), _ = run([empty, empty])
  assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()


def test_parts_far_apart():
  (a, _), (b, _) = random_parts(2, np.float32)
  far = [(a, np.full((2, 5, 3), 1e4, np.float32)), (b, np.full((2, 5, 3), -1e4, np.float32))]
  out, lse = merge(far)
  np.testing.assert_array_equal(out, a)
  np.testing.assert_array_equal(lse, far[0][1])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_narrow_outputs_keep_their_type_and_a_wide_log_sum_exp(dtype):
  parts = [(jnp.asarray(out, dtype), jnp.asarray(lse, 'float32')) for out, lse in random_parts(2, np.float32)]
  out, lse = merge(parts)
  assert out.dtype == dtype and lse.dtype == np.float32
  wide = [(out.astype('float32'), lse) for out, lse in parts]
  oracle.assert_close(out, merge(wide)[0], dtype)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_sinks_are_a_part_without_value(implementation):
  one = case(SHAPE, 'sinks', 'array mask')
  sinks = one.arrays.pop('sinks')
  kwargs = {'implementation': implementation, 'return_residual': True}
  with jax.enable_x64(True):
    want = attend(**one.arrays, mask=one.seen, sinks=sinks, **kwargs)
    out, lse = attend(**one.arrays, mask=one.seen, **kwargs)
    value_zero = np.zeros_like(out), np.broadcast_to(sinks, lse.shape).astype(lse.dtype)
    for got in (add_sinks(out, lse, sinks), merge([(out, lse), value_zero])):
      for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
  rows = ~one.seen.any(-1).transpose(0, 2, 1)
  assert rows.any()
  np.testing.assert_allclose(np.asarray(want[1])[rows], np.broadcast_to(sinks, rows.shape)[rows], rtol=1e-12)
  assert (np.asarray(want[0])[rows] == 0).all()


def test_sinks_on_parts_are_added_once_at_the_end():
  one = case(SHAPE, 'sinks', 'bias', 'array mask')
  with jax.enable_x64(True):
    whole = merge(split(one.arrays, one.seen, (4,), 'xla'))
    out, lse = add_sinks(*whole, one.arrays['sinks'])
  want_out, want_lse = oracle.attend(**one.oracle_arguments())
  np.testing.assert_allclose(out, want_out, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-10, atol=1e-12)


def test_a_sink_of_no_weight_and_of_all():
  q, k, v = inputs('B1T4S4H2K2D3V2', np.float32)
  plain = functools.partial(attend, q, k, v, mask=masks.causal())
  np.testing.assert_array_equal(plain(sinks=np.full(2, -np.inf, np.float32)), plain())
  np.testing.assert_array_equal(plain(sinks=np.full(2, 1e5, np.float32)), np.zeros((1, 4, 2, 2)))


def part(*shape, lse=None):
  return np.zeros(shape, np.float32), np.zeros(shape[:-1] if lse is None else lse, np.float32)


@pytest.mark.parametrize(
  'parts, words',
  [
    ([], 'parts.*empty'),
    ([part(1, 2, 3, 4), part(1, 2, 3, 5)], r'\(1, 2, 3, 5\).*\(1, 2, 3, 4\)'),
    ([part(1, 2, 3, 4), part(1, 3, 3, 4)], r'\(1, 3, 3, 4\).*\(1, 2, 3, 4\)'),
    ([part(1, 2, 3, 4, lse=(1, 3, 2))], r'lse \(1, 3, 2\)'),
  ],
)
def test_rejects(parts, words):
  with pytest.raises(ValueError, match=words):
    softmax.merge(parts)


@pytest.mark.parametrize('sinks', [np.zeros(2, np.float32), np.zeros((1, 3), np.float32), np.zeros(3, int)])
def test_rejects_sinks_that_do_not_fit(sinks):
  with pytest.raises(ValueError, match='sinks'):
    softmax.add_sinks(*part(1, 2, 3, 4), sinks)


def test_nan_is_seen_through_merge_and_sinks():
  out, lse = np.ones((1, 2, 1, 3), np.float32), np.zeros((1, 2, 1), np.float32)
  broken = out * np.nan, lse * np.nan
  for got in (softmax.merge([broken, (out, lse)]), softmax.add_sinks(*broken, np.zeros(1, np.float32))):
    assert np.isnan(got[0]).all() and np.isnan(got[1]).all()
