"""models.decoder against a loop in numpy float64; scanned, rematerialised, packed and bfloat16 against that."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import decoder
from models.config import LayerSpec
from tests.models import oracle, small

VARIANTS = {
  'plain': {},
  'heads': {'kv_heads': 4, 'head_dim': 6},
  'geglu': {'mlp': 'geglu', 'kv_heads': 1},
  'gelu': {'mlp': 'gelu'},
  'relu2': {'mlp': 'relu2'},
  'extras': {'qk_norm': 'head', 'sinks': True, 'norm_eps': 0.1, 'embed_scale': 0.7},
  'caps': {'attn_soft_cap': 2.0, 'logit_soft_cap': 3.0},
  'biases': {'attn_bias': 'qkvo', 'mlp_bias': True, 'tied_embeddings': False},
  'hybrid': {'depth': 4, 'layers': [LayerSpec(window=3, rope_fraction=0.0), LayerSpec(chunk=5, rope_fraction=0.5)]},
  'post': {'norms': 'post', 'qk_norm': 'all', 'attn_bias': 'qkv', 'attn_scale': 0.7},
  'both': {'norms': 'both', 'norm_plus_one': True, 'qk_norm': 'head', 'mlp': 'geglu'},
  'experts': {'experts': 5, 'experts_per_token': 2, 'mlp': 'swiglu_clipped', 'mlp_bias': True, 'sinks': True},
  'linear': {'layers': [LayerSpec(rope_scaling='linear', rope_factor=3.0, rope_base=50.0, window=6, chunk=4)]},
}


@pytest.mark.parametrize('name', VARIANTS)
def test_matches_oracle(name):
  with jax.enable_x64(True):
    changes = VARIANTS[name] | {'dtype': 'float64', 'param_dtype': 'float64'}
    model, tokens = small.model(**changes), small.tokens()
    got = small.forward(model, tokens)
    want = oracle.decoder(small.paths(model), small.config(**changes), tokens)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


def test_packed_documents_match_oracle_and_each_alone():
  layers = [LayerSpec(chunk=4), LayerSpec(window=3)]
  segments = np.array([[1] * 5 + [2] * 1 + [3] * 7, [7] * 10 + [0] * 3], np.int32)
  with jax.enable_x64(True):
    model = small.model(layers=layers, dtype='float64', param_dtype='float64')
    tokens = small.tokens()
    got = small.forward(model, tokens, None, segments)
    want = oracle.decoder(small.paths(model), small.config(layers=layers), tokens, segments)
    restarted = small.forward(model, tokens, decoder.restart(segments), segments)
    alone = small.forward(model, tokens[:1, 6:])
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)
  np.testing.assert_allclose(restarted, want, rtol=1e-9, atol=1e-10)
  np.testing.assert_allclose(got[:1, 6:], alone, rtol=1e-9, atol=1e-10)


def test_restart_counts_from_each_change():
  ids = np.array([[5, 5, 2, 2, 2, 5], [0, 0, 0, 0, 0, 0]])
  got = decoder.restart(jnp.asarray(ids))
  np.testing.assert_array_equal(decoder.restart(ids), got)
  np.testing.assert_array_equal(got, [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])


def changed(tokens, t):
  """A copy with another token at t: the array itself may still be read by a computation under way."""
  return (tokens + (np.arange(tokens.shape[1]) == t)).astype(np.int32) % small.VOCAB


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_no_token_sees_a_later_one(implementation):
  model, tokens = small.model(layers=small.HYBRID, implementation=implementation), small.tokens(batch=1)
  before = small.forward(model, tokens)
  after = small.forward(model, changed(tokens, 7))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert (np.abs(before - after)[:, 7:].max(-1) > 1e-6).all()


def test_window_reaches_exactly_so_far():
  model, tokens = small.model(layers=[LayerSpec(window=4)]), small.tokens(batch=1)
  before = small.forward(model, tokens)
  change = np.abs(before - small.forward(model, changed(tokens, 2)))[0].max(-1)
  reach = 2 + 2 * 3  # two layers, each three tokens back
  assert (change[2 : reach + 1] > 0).all() and (change[reach + 1 :] == 0).all()


@pytest.fixture(scope='module')
def base():
  model = small.model(layers=small.HYBRID)
  return model, value_and_grad(model)


def value_and_grad(model, tokens=None):
  tokens = small.tokens() if tokens is None else tokens
  graph, state = nnx.split(model)
  loss = lambda state: jnp.mean(jnp.square(nnx.merge(graph, state)(tokens)))
  value, grads = jax.jit(jax.value_and_grad(loss))(state)
  return value, small.paths(grads)


OPTIONS = {
  'qk_norm=head': ('mixer.q_norm.scale', 'mixer.k_norm.scale'),
  'sinks=True': ('mixer.sinks',),
  'attn_bias=qkvo': ('mixer.q.bias', 'mixer.k.bias', 'mixer.v.bias', 'mixer.o.bias'),
  'mlp_bias=True': ('mlp.gate.bias', 'mlp.up.bias', 'mlp.down.bias'),
  'norms=both': ('mixer_out_norm.scale', 'mlp_out_norm.scale'),
}


@pytest.mark.parametrize('option', OPTIONS)
def test_option_has_parameters_with_gradients(option, base):
  name, value = option.split('=')
  value, grads = value_and_grad(small.model(layers=small.HYBRID, **{name: value == 'True' or value}))
  assert abs(value - base[1][0]) > 1e-4
  new = sorted(set(grads) - set(base[1][1]))
  assert new == sorted(f'blocks.{i}.{path}' for i in range(2) for path in OPTIONS[option])
  for path in new:
    # Softmax does not see a constant in its logits: rotation alone makes the bias of k matter, and only a little.
    assert np.abs(grads[path]).max() > 1e-6, path


@pytest.mark.parametrize(
  'changes',
  [{'attn_soft_cap': 0.5}, {'logit_soft_cap': 1.0}, {'layers': [LayerSpec()]}, {'layers': [LayerSpec(window=4)]}],
)
def test_setting_makes_a_difference(changes, base):
  model = small.model(**({'layers': small.HYBRID} | changes))
  assert np.abs(small.forward(model, small.tokens()) - small.forward(base[0], small.tokens())).max() > 1e-3


def test_every_parameter_has_a_gradient(base):
  for path, grad in base[1][1].items():
    assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, path


@pytest.fixture(scope='module')
def deep():
  model = small.model(depth=4, layers=small.HYBRID)
  return model, value_and_grad(model)


def with_parameters_of(plain, scanned):
  """The scanned decoder (pattern of two, two repeats) with the parameters of the plain one."""
  own = small.paths(plain)

  def stack(head, *rest):
    if head != 'blocks':
      return own['.'.join([head, *rest])]
    return jnp.stack([own['.'.join([head, str(2 * r + rest[0]), *rest[1:]])] for r in range(2)])

  graph, state = nnx.split(scanned)
  flat = [(path, variable.replace(stack(*path))) for path, variable in nnx.to_flat_state(state)]
  return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.mark.parametrize('remat, second, scan', [('full', '', False), ('dots', '', True), ('attention', 'none', True)])
def test_scan_and_remat_change_nothing(remat, second, scan, deep):
  pattern = [small.HYBRID[0], dataclasses.replace(small.HYBRID[1], remat=second)]
  plain, other = deep[0], small.model(depth=4, layers=pattern, remat=remat, scan=scan)
  if scan:
    other = with_parameters_of(plain, other)
  want, want_grads = deep[1]
  got, grads = value_and_grad(other)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  for path, want in want_grads.items():
    head, *rest = path.split('.')
    if scan and head == 'blocks':
      i = int(rest[0])
      one = grads['.'.join([head, str(i % 2), *rest[1:]])][i // 2]
    else:
      one = grads[path]
    np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=path)


def test_scanned_starts_from_the_same_values():
  config = small.config(depth=4, layers=small.HYBRID)
  start = lambda **changes: jax.jit(
    lambda: small.paths(decoder.Decoder(dataclasses.replace(config, **changes), rngs=nnx.Rngs(3)))
  )()
  plain, stacked = start(), start(scan=True)
  np.testing.assert_array_equal(stacked['blocks.1.mlp.up.kernel'][1], plain['blocks.3.mlp.up.kernel'])
  np.testing.assert_array_equal(stacked['embed.table'], plain['embed.table'])


def test_compile_size_does_not_grow_with_depth():
  def lines(depth):
    model = nnx.eval_shape(lambda: decoder.Decoder(small.config(depth=depth, scan=True), rngs=nnx.Rngs(0)))
    return len(jax.jit(lambda m, x: m(x)).lower(model, small.tokens()).as_text().splitlines())

  assert lines(24) == lines(2)


@pytest.mark.parametrize('remat, saved', [('none', None), ('dots', True), ('full', False)])
def test_remat_policy_saves_what_it_says(remat, saved):
  """Projections run once in the forward pass; 'full' runs them again in the backward pass, 'dots' does not."""
  graph, state = nnx.split(small.model(depth=1, remat=remat, implementation='xla'))
  loss = lambda state: nnx.merge(graph, state).hidden(small.tokens()).sum()
  text = str(jax.make_jaxpr(jax.grad(loss))(state))
  dots, loops = text.count('dot_general'), text.count('while[') + text.count('scan[')
  plain_graph, plain_state = nnx.split(small.model(depth=1, implementation='xla'))
  plain = str(jax.make_jaxpr(jax.grad(lambda s: nnx.merge(plain_graph, s).hidden(small.tokens()).sum()))(plain_state))
  plain_dots, plain_loops = plain.count('dot_general'), plain.count('while[') + plain.count('scan[')
  if saved is False:
    assert dots > plain_dots and loops > plain_loops
  else:
    assert (dots, loops) == (plain_dots, plain_loops)


def test_bfloat16_stays_near_float32():
  changes = {'layers': small.HYBRID, 'qk_norm': 'head'}
  want = small.forward(small.model(**changes), small.tokens())
  model = small.model(**changes, dtype='bfloat16')
  assert {x.dtype for x in small.paths(model).values()} == {jnp.dtype('float32')}
  got = small.forward(model, small.tokens())
  assert got.dtype == jnp.float32
  assert jax.eval_shape(model.hidden, small.tokens()).dtype == jnp.bfloat16
  error = np.abs(got - want).max() / np.abs(want).max()
  assert error < 0.05, f'bfloat16 is off by {error:.1e} of the largest logit'


def test_shapes_and_stable_paths():
  model = small.model(layers=small.HYBRID, tied_embeddings=False)
  got = {path: x.shape for path, x in small.paths(model).items() if not path.startswith('blocks.1')}
  assert got == {
    'embed.table': (23, 16),
    'blocks.0.mixer_norm.scale': (16,),
    'blocks.0.mixer.q.kernel': (16, 16),
    'blocks.0.mixer.k.kernel': (16, 8),
    'blocks.0.mixer.v.kernel': (16, 8),
    'blocks.0.mixer.o.kernel': (16, 16),
    'blocks.0.mlp_norm.scale': (16,),
    'blocks.0.mlp.gate.kernel': (16, 24),
    'blocks.0.mlp.up.kernel': (16, 24),
    'blocks.0.mlp.down.kernel': (24, 16),
    'norm.scale': (16,),
    'head.kernel': (16, 23),
  }
  logits = small.forward(model, small.tokens(3))
  assert (logits.shape, logits.dtype) == ((3, small.T, 23), jnp.float32)


def test_token_outside_the_vocabulary_gives_nan():
  model = small.model()
  for wrong in (-1, small.VOCAB):
    tokens = small.tokens()
    tokens[0, 5] = wrong
    logits = small.forward(model, tokens)
    assert np.isnan(logits[0, 5:]).all() and np.isfinite(logits[1]).all()


def test_attention_map_is_what_the_layer_computes():
  changes = {'depth': 4, 'layers': small.HYBRID, 'sinks': True, 'attn_soft_cap': 2.0, 'qk_norm': 'head'}
  model, tokens = small.model(**changes), small.tokens()
  got = model.attention_map(tokens, 2)
  assert got.shape == (2, 4, small.T, small.T)
  seen = decoder.layer_masks(small.config(**changes), small.T)[2]
  assert (np.asarray(got)[..., ~seen] == 0).all() and (np.asarray(got)[..., seen] > 0).all()

  @jax.jit
  def mixed(model):
    x = model.embed(tokens)
    for i in range(2):
      x, _ = model.layer(i)(x)
    block = model.layer(2)
    x = block.mixer_norm(x)
    v = jnp.repeat(block.mixer.project(x)[2], 2, axis=2)
    want = block.mixer.o(jnp.einsum('bhts,bshd->bthd', got, v).reshape(2, small.T, -1))
    return block.mixer.apply(x, None)[0], want

  np.testing.assert_allclose(*mixed(model), rtol=1e-4, atol=1e-5)


def test_layer_masks():
  config = small.config(depth=4, layers=[LayerSpec(window=2), LayerSpec(chunk=3)])
  got = decoder.layer_masks(config, 5)
  t, s = np.indices((5, 5))
  assert len(got) == 4
  for i in (0, 2):
    np.testing.assert_array_equal(got[i], (s <= t) & (t - s < 2))
    np.testing.assert_array_equal(got[i + 1], (s <= t) & (t // 3 == s // 3))


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda m: m(np.ones((2, 3), np.float32)), 'tokens are float32'),
    (lambda m: m(np.ones(3, np.int32)), r'expected integers \[B, T\]'),
    (lambda m: m.attention_map(small.tokens(), 2), 'layer=2'),
    (lambda m: m.init_cache(0, 5), 'batch=0'),
    (lambda m: m.init_cache(1, 0), 'capacity=0'),
    (lambda m: m.init_cache(1, 5, slack=-1), 'slack=-1'),
  ],
)
def test_rejects(call, words, base):
  with pytest.raises(ValueError, match=words):
    call(base[0])
