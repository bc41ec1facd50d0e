"""attn.adapters: Flax's own modules with our attention functions, against the same modules with Flax's."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import attn
from attn import adapters, bias, catalog, dot_product_attention, low_rank, masks, softmax

B, T, E, H = 2, 6, 16, 4
STATIC = ('broadcast_dropout', 'dropout_rate', 'deterministic', 'dtype', 'precision', 'module', 'is_causal')
X = np.random.default_rng(0).standard_normal((B, T, E)).astype(np.float32)
LENGTHS = np.array([6, 4])
PADDING = nnx.make_attention_mask(jnp.ones((B, T)), jnp.arange(T) < LENGTHS[:, None])  # float32, as Flax makes them


def in_nnx(attention_fn=None, **options):
  chosen = {} if attention_fn is None else {'attention_fn': attention_fn}
  return nnx.MultiHeadAttention(H, E, decode=False, rngs=nnx.Rngs(0), **chosen, **options)


def in_linen(attention_fn=None, **options):
  chosen = {} if attention_fn is None else {'attention_fn': attention_fn}
  return linen.MultiHeadDotProductAttention(H, **chosen, **options)


@functools.cache
def linen_parameters():
  return jax.jit(in_linen().init)(jax.random.key(0), X)


def compiled(layer, parameters=None):
  """f(mask, **static) -> output, and the gradients of its sum of squares by parameters and input."""
  graph, state = nnx.split(layer) if parameters is None else (None, parameters)

  def loss(state, x, call):
    y = nnx.merge(graph, state)(x, **call) if parameters is None else layer.apply(state, x, **call)
    return jnp.sum(y**2), y

  @functools.partial(jax.jit, static_argnames='is_causal', compiler_options={'xla_backend_optimization_level': 0})
  def run(mask, **call):
    (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, X, call | {'mask': mask})
    return y, *jax.tree.leaves(grads)

  return run


@functools.cache
def module(kind, ours, **options):
  attention_fn = None if ours is None else OURS[ours]()
  if kind == 'nnx':
    return compiled(in_nnx(attention_fn, **options))
  return compiled(in_linen(attention_fn, **options), linen_parameters())


def assert_same(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * max(1, float(np.abs(b).max())))


OURS = {
  'name': lambda: adapters.flax_attention_fn('softmax'),
  'function': lambda: adapters.flax_attention_fn(dot_product_attention, implementation='xla'),
  'partial': lambda: functools.partial(adapters.flax_attention_fn('flash', is_causal=False)),
  'jitted': lambda: jax.jit(adapters.flax_attention_fn(softmax.attend), static_argnames=STATIC),
  "jax.nn's": lambda: adapters.flax_attention_fn(jax.nn.dot_product_attention),
}
CAUSAL = nnx.make_causal_mask(jnp.ones((B, T)))
MASKS = {'causal': CAUSAL, 'padding': PADDING, 'both': nnx.combine_masks(PADDING, CAUSAL)}


@pytest.mark.parametrize('name', MASKS)
@pytest.mark.parametrize('ours', OURS)
@pytest.mark.parametrize('kind', ['nnx', 'linen'])
def test_modules_under_masks(kind, ours, name):
  assert_same(module(kind, ours)(MASKS[name]), module(kind, None)(MASKS[name]))


@pytest.mark.parametrize('kind', ['nnx', 'linen'])
def test_modules_without_a_mask(kind):
  assert_same(module(kind, 'name')(None), module(kind, None)(None))


@pytest.mark.parametrize('ours', ['name', "jax.nn's"])
def test_is_causal(ours):
  assert_same(module('nnx', ours)(PADDING, is_causal=True), module('nnx', None)(MASKS['both']))


@pytest.mark.parametrize('kv_heads', [1, 2])
def test_shared_key_heads(kv_heads):
  ours, flax = (module('nnx', name, num_kv_heads=kv_heads) for name in ('name', None))
  assert_same(ours(MASKS['both']), flax(MASKS['both']))


def test_decoding_with_the_cache_of_flax():
  """One token a call, Flax's cache and mask: the rows of one causal pass."""
  layer = in_nnx(adapters.flax_attention_fn('softmax'))
  want = layer(X, mask=CAUSAL)
  layer.init_cache((B, T, E))
  for t in range(T):
    np.testing.assert_allclose(layer(X[:, t : t + 1], decode=True)[:, 0], want[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shape', [(T, E), (2, 3, T, E)])
def test_any_number_of_batch_axes(shape):
  x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
  mask = nnx.make_causal_mask(jnp.ones(shape[:-1]))
  ours, flax = in_nnx(adapters.flax_attention_fn('softmax')), in_nnx()
  want = flax(x[None] if len(shape) == 2 else x, mask=mask[None] if len(shape) == 2 else mask)
  np.testing.assert_allclose(ours(x, mask=mask), want[0] if len(shape) == 2 else want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(ours(x, mask=mask[..., :1, :, :].astype(bool)), ours(x, mask=mask), rtol=1e-6)


# The signature


def test_signature_is_the_one_that_both_modules_know():
  expected = (
    '(query, key, value, bias=None, mask=None, broadcast_dropout=True, dropout_rng=None, dropout_rate=0.0, '
    'deterministic=True, dtype=None, precision=None, module=None, is_causal=False)'
  )
  plain = adapters.flax_attention_fn(softmax.attend, soft_cap=2.0)
  for f in (plain, functools.partial(plain), jax.jit(plain, static_argnames=STATIC)):
    assert str(inspect.signature(f)) == expected
  assert attn.flax_attention_fn is adapters.flax_attention_fn


def test_linen_hands_no_mask_to_a_function_of_keywords():
  """The trap that the exact signature is for: such a function gets no mask, and nothing says so. Ours gets it."""
  seen = []

  def keywords(query, key, value, **more):
    seen.append(more.get('mask'))
    return softmax.attend(query, key, value)

  in_linen(keywords).apply(linen_parameters(), X, mask=CAUSAL)
  assert seen == [None]

  def recorded(q, k, v, *, mask=None):
    seen.append(mask)
    return softmax.attend(q, k, v, mask=mask)

  ours = adapters.flax_attention_fn(recorded)
  for f in (ours, functools.partial(ours), functools.partial(ours, is_causal=False)):
    in_linen(f).apply(linen_parameters(), X, mask=CAUSAL)
    assert seen.pop().dtype == bool


# Masks and settings


def heads(seed=2, K=H):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((B, T, n, 4)).astype(np.float32) for n in (H, K, K))


def same(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_masks_join():
  q, k, v = heads()
  near = masks.window(2, 2)
  want = softmax.attend(q, k, v, mask=near & masks.array(PADDING.astype(bool)), is_causal=True)
  for settings in ({'mask': near}, {'mask': near, 'is_causal': True}, {'mask': masks.dense(near, T)}):
    same(adapters.flax_attention_fn('softmax', **settings)(q, k, v, mask=PADDING, is_causal=True), want)
  f = adapters.flax_attention_fn('sliding_window', mask=masks.causal() & near)
  same(f(q, k, v, mask=PADDING), want)
  f = adapters.flax_attention_fn(functools.partial(softmax.attend, mask=near))  # what is bound is not lost
  same(f(q, k, v, mask=PADDING, is_causal=True), want)


def test_a_query_that_sees_nothing_gives_zeros():
  q, k, v = heads()
  none = jnp.zeros((B, 1, T, T)).at[:, :, 1:].set(1)
  got = adapters.flax_attention_fn('softmax')(q, k, v, mask=none)
  assert not np.asarray(got[:, 0]).any() and np.asarray(got[:, 1:]).all()


def test_an_additive_mask_is_refused():
  q, k, v = heads()
  with pytest.raises(ValueError, match=r'mask has values from -1000000000.0 to 0.0, expected 0 and 1'):
    adapters.flax_attention_fn('softmax')(q, k, v, mask=(PADDING - 1) * 1e9)


def test_a_traced_mask_that_is_not_0_and_1_gives_nan():
  """Read as Flax reads it, an additive mask would hide what it shows and show what it hides."""
  q, k, v = heads()
  attend = adapters.flax_attention_fn('softmax')
  run = jax.jit(lambda mask: attend(q, k, v, mask=mask))
  same(run(PADDING), attend(q, k, v, mask=PADDING))
  same(jax.jit(lambda: attend(q, k, v, mask=PADDING))(), attend(q, k, v, mask=PADDING))
  same(jax.jit(lambda: attend(q, k, v, mask=nnx.make_causal_mask(X[..., 0])))(), attend(q, k, v, mask=CAUSAL))
  for wrong in ((PADDING - 1) * 1e9, 2 * PADDING, jnp.where(PADDING > 0, 1, jnp.nan)):
    assert np.isnan(run(wrong)).all()
  added = np.asarray((PADDING - 1) * 1e9)
  with pytest.raises(ValueError, match='mask has values from -1000000000'):
    jax.jit(lambda: attend(q, k, v, mask=added))()


@pytest.mark.parametrize(
  'name, settings',
  [
    ('is_causal', {'is_causal': True}),
    ('mask', {'mask': masks.causal() & masks.window(3)}),
    ('score', {'score': bias.alibi(bias.alibi_slopes(H).astype(np.float32))}),
  ],
)
@pytest.mark.parametrize('kind', ['nnx', 'linen'])
def test_what_goes_by_position_is_refused_in_a_cache_of_flax(kind, name, settings):
  """There one query meets all slots, and would count as the first one."""
  attention_fn = adapters.flax_attention_fn(softmax.attend, **settings)
  with pytest.raises(ValueError, match=f'{name} goes by position, and where T=1 queries stand among S=6 keys'):
    if kind == 'nnx':
      layer = in_nnx(attention_fn)
      layer.init_cache((B, T, E))
      layer(X[:, :1], decode=True)
    else:
      layer = linen.MultiHeadDotProductAttention(H, decode=True, attention_fn=attention_fn)
      cache = jax.eval_shape(in_linen_with_cache().init, jax.random.key(0), X)['cache']
      cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
      layer.apply(linen_parameters() | {'cache': cache}, X[:, :1], mutable=['cache'])


def in_linen_with_cache():
  return linen.MultiHeadDotProductAttention(H, decode=True)


def test_positions_may_differ_in_number_where_they_are_known():
  (q, _, _), (_, k, v) = heads(), heads()
  step = q[:, 3:4]
  want = softmax.attend(q, k, v, is_causal=True)[:, 3:4]
  where = {'positions': np.array([3]), 'kv_positions': np.arange(T)}
  same(adapters.flax_attention_fn('softmax', is_causal=True, **where)(step, k, v), want)
  same(adapters.flax_attention_fn('softmax', mask=masks.array(np.arange(T) < 4))(step, k, v), want)
  same(adapters.flax_attention_fn('softmax', is_causal=False)(step, k, v), softmax.attend(step, k, v))
  for f in (adapters.flax_attention_fn('softmax'), functools.partial(adapters.flax_attention_fn('flash'))):
    with pytest.raises(ValueError, match='is_causal goes by position, and where T=1 '):
      f(step, k, v, is_causal=True)


@pytest.mark.parametrize('name', ['deterministic', 'dropout_rate', 'broadcast_dropout', 'is_causal'])
def test_traced_flags_are_refused_by_name(name):
  q, k, v = heads()
  value = {'dropout_rate': 0.5}.get(name, True)
  with pytest.raises(ValueError, match=f"{name} is traced, .*: jax.jit needs static_argnames='{name}'"):
    jax.jit(adapters.flax_attention_fn('softmax'))(q, k, v, **{name: value})


def test_settings_reach_the_function():
  q, k, v = heads(K=2)
  slopes = bias.alibi_slopes(H).astype(np.float32)
  for method, settings, want in (
    ('soft_cap', {'soft_cap': 3.0}, softmax.attend(q, k, v, is_causal=True, soft_cap=3.0)),
    ('sinks', {'sinks': slopes}, softmax.attend(q, k, v, is_causal=True, sinks=slopes)),
    ('split_kv', {'splits': 2}, softmax.attend(q, k, v, is_causal=True)),
    (softmax.attend, {'score': bias.alibi(slopes)}, softmax.attend(q, k, v, score=bias.alibi(slopes))),
    (dot_product_attention, {'logit_bias': np.ones((B, T), np.float32)}, softmax.attend(q, k, v)),
    (low_rank.attend, {'factors': low_rank.alibi(slopes, T), 'is_causal': True},
     softmax.attend(q, k, v, is_causal=True, score=bias.alibi(slopes))),
    (lambda q, k, v, **more: softmax.attend(q, k, v, **more), {'soft_cap': 2.0}, softmax.attend(q, k, v, soft_cap=2.0)),
  ):  # fmt: skip
    same(adapters.flax_attention_fn(method, **settings)(q, k, v), want)


def test_bias_and_types():
  q, k, v = heads()
  added = np.random.default_rng(3).standard_normal((H, T, T)).astype(np.float32)
  same(adapters.flax_attention_fn('softmax')(q, k, v, added), softmax.attend(q, k, v, bias=added))
  got = adapters.flax_attention_fn('softmax')(q, k, v, added, dtype=jnp.bfloat16)
  assert got.dtype == jnp.bfloat16
  assert adapters.flax_attention_fn('softmax')(q.astype(jnp.bfloat16), k, v).dtype == np.float32


def test_dropout():
  layer = in_nnx(adapters.flax_attention_fn('softmax'), dropout_rate=0.5, broadcast_dropout=False, deterministic=False)
  one, two = (layer(X, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 2))
  np.testing.assert_array_equal(one, layer(X, rngs=nnx.Rngs(dropout=1)))
  assert np.abs(one - two).max() > 0.01
  np.testing.assert_allclose(layer(X, deterministic=True), in_nnx()(X), rtol=1e-4, atol=1e-5)
  q, k, v = heads()
  key = jax.random.key(1)
  got = adapters.flax_attention_fn('softmax')(
    q, k, v, dropout_rng=key, dropout_rate=0.5, deterministic=False, broadcast_dropout=False
  )
  same(got, softmax.attend(q, k, v, dropout_rate=0.5, dropout_key=key))
  in_old = in_linen(adapters.flax_attention_fn('softmax'), dropout_rate=0.5, broadcast_dropout=False)
  got = in_old.apply(linen_parameters(), X, deterministic=False, rngs={'dropout': jax.random.key(2)})
  assert np.abs(got - in_linen().apply(linen_parameters(), X)).max() > 0.01


# What is refused


@pytest.mark.parametrize(
  'method, settings, words',
  [
    ('softmacks', {}, 'did you mean softmax'),
    ('rotary', {}, "method='rotary' takes x and positions, not q, k and v"),
    ('cached', {}, "method='cached' is called as storage.attend"),
    ('t5_relative', {}, "method='t5_relative' is called as softmax.attend"),
    ('sliding_window', {}, r'sliding_window needs mask, as in softmax.attend\(q, k, v, mask=masks.causal\(\)'),
    ('sinks', {}, 'sinks needs sinks, as in'),
    ('split_kv', {}, 'split_kv needs splits'),
    (low_rank.attend, {}, 'attend needs factors'),
    ('softmax', {'sof_cap': 2.0}, 'sof_cap is not a setting of softmax: did you mean soft_cap?'),
    (dot_product_attention, {'softcap': 2.0}, 'softcap is not a setting of dot_product_attention: did you mean soft_c'),
    (softmax.attend, {'zzz': 2.0}, 'zzz is not a setting of attend: expected one of mask, bias'),
    (softmax.attend, {'dropout_rate': 0.1}, 'dropout_rate is no setting of an attention_fn: .* of the module'),
    (softmax.attend, {'return_residual': True}, 'return_residual is no setting'),
    (3, {}, 'method=3 is neither a name of the catalog nor a function'),
    (softmax.merge, {}, 'has the parameters parts, expected q, k and v first'),
  ],
)  # fmt: skip
def test_refused_when_it_is_made(method, settings, words):
  with pytest.raises(ValueError, match=words):
    adapters.flax_attention_fn(method, **settings)


def bare(q, k, v):
  return v


@pytest.mark.parametrize(
  'function, settings, call, words',
  [
    (bare, {}, {'mask': PADDING}, 'mask cannot be honoured: bare has no such parameter'),
    (bare, {}, {'is_causal': True}, 'is_causal cannot be honoured'),
    (bare, {}, {'bias': np.zeros((T, T), np.float32)}, 'bias cannot be honoured'),
    (bare, {}, {'precision': 'highest'}, 'precision cannot be honoured'),
    (jax.nn.dot_product_attention, {},
     {'dropout_rate': 0.1, 'deterministic': False, 'broadcast_dropout': False}, 'dropout_rate cannot be honoured'),
    (softmax.attend, {}, {'dropout_rate': 0.1, 'deterministic': False}, 'broadcast_dropout=True'),
    (softmax.attend, {}, {'module': object()}, 'module: attention weights cannot be stored'),
    (softmax.attend, {'bias': np.zeros((T, T), np.float32)}, {'bias': np.zeros((T, T), np.float32)}, 'give it once'),
    (softmax.attend, {}, {'mask': np.ones((5, 1, 1, T, T), bool)}, r'mask has shape \(5, 1, 1, 6, 6\)'),
    (low_rank.attend, {'factors': low_rank.separable(np.ones(T, np.float32), np.ones(T, np.float32))},
     {'bias': np.zeros((T, T), np.float32)}, 'bias and low-rank factors exclude each other'),
  ],
)  # fmt: skip
def test_refused_in_the_call(function, settings, call, words):
  with pytest.raises(ValueError, match=words):
    adapters.flax_attention_fn(function, **settings)(*heads(), **call)


def test_shapes_that_do_not_fit():
  q, k, v = heads()
  with pytest.raises(ValueError, match='value does not fit'):
    adapters.flax_attention_fn('softmax')(q, k, v[0])


def test_every_exact_method_is_an_attention_fn_or_says_why():
  q, k, v = heads(K=2)
  for record in catalog.methods('exact'):
    try:
      f = adapters.flax_attention_fn(record.name)
    except ValueError as error:
      assert 'needs' in str(error) or 'is called as' in str(error), error
      assert record.usage in str(error)
    else:
      same(f(q, k, v), softmax.attend(q, k, v, is_causal=record.is_causal))
