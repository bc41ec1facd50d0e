"""attn.softmax.attend under jit, vmap, remat and sharding; its memory; its matrix products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from attn import masks, softmax
from tests.attn import oracle
from tests.attn.softmax_cases import BLOCKS, QUICK, attend, case, inputs

IMPLEMENTATIONS = softmax.IMPLEMENTATIONS
quick = functools.partial(jax.jit, compiler_options=QUICK)


def loss_of(implementation, mask=None, blocks=BLOCKS, **options):
  """A loss over output and log-sum-exp, as a function of a dictionary of arrays."""

  def loss(arrays):
    kwargs = {'implementation': implementation, 'blocks': blocks, 'return_residual': True}
    out, lse = softmax.attend(**arrays, mask=mask, **options, **kwargs)
    return jnp.sin(out.astype(jnp.float32)).sum() + jnp.cos(lse).sum()

  return loss


def assert_same(got, want, dtype='float32'):
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
    oracle.assert_close(a, b, dtype, jax.tree_util.keystr(path))


def floats(shape, *names):
  return {n: x.astype(np.float32) for n, x in case(shape, *names).arrays.items()}


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_eager_is_jitted(implementation):
  q, k, v = inputs('B1T5S6H2K1D3V2', np.float32)
  kwargs = {'is_causal': True, 'implementation': implementation, 'blocks': BLOCKS}
  assert_same(softmax.attend(q, k, v, **kwargs), attend(q, k, v, **kwargs))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_vmap(implementation):
  """Over an axis of everything, a mask included; forward and backward."""
  many = {n: np.stack([x, 2 * x[::-1], -x]) for n, x in floats('B2T5S7H2K1D3V2', 'bias', 'sinks').items()}
  offsets = np.array([-1, 2, 6])

  def one(arrays, offset):
    return jax.value_and_grad(loss_of(implementation, masks.causal(offset)))(arrays)

  got = quick(jax.vmap(one))(many, offsets)
  single = quick(one)
  alone = [single({n: x[i] for n, x in many.items()}, offsets[i]) for i in range(3)]
  assert_same(got, jax.tree.map(lambda *x: np.stack(x), *alone), 'float32')


def test_vmap_over_the_bias_alone():
  arrays = floats('B1T5S7H2K1D3V2')
  biases = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 7)).astype(np.float32)
  one = lambda bias: jax.value_and_grad(loss_of('xla'))(arrays | {'bias': bias})
  single = quick(one)
  assert_same(quick(jax.vmap(one))(biases), jax.tree.map(lambda *x: np.stack(x), *[single(bias) for bias in biases]))


@pytest.mark.parametrize('policy', [None, 'save', 'offer'])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_remat(implementation, policy):
  arrays = floats('B1T9S9H2K1D3V2', 'sinks')
  loss = loss_of(implementation, is_causal=True)
  policies = {
    None: None,
    'save': jax.checkpoint_policies.save_only_these_names('attn_out', 'attn_lse'),
    'offer': jax.checkpoint_policies.dots_saveable,
  }
  got = quick(jax.grad(jax.checkpoint(loss, policy=policies[policy])))(arrays)
  assert_same(got, quick(jax.grad(loss))(arrays))


def test_saved_names_spare_the_second_forward():
  """With output and log-sum-exp saved, remat runs the forward loop once, not twice."""
  arrays = floats('B1T9S9H2K1D3V2')
  save = jax.checkpoint_policies.save_only_these_names('attn_out', 'attn_lse')

  def loops(policy):
    loss = jax.checkpoint(loss_of('xla'), policy=policy)
    return str(jax.make_jaxpr(jax.grad(loss))(arrays)).count('exp ')

  assert loops(save) < loops(None)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_in_a_scan_over_layers(implementation):
  arrays = floats('B1T5S5H2K2D3V3')
  loss = loss_of(implementation, is_causal=True)

  def stacked(arrays, steps):
    def layer(q, _):
      return softmax.attend(q, arrays['k'], arrays['v'], implementation=implementation, blocks=BLOCKS), None

    q = arrays['q']
    if steps == 'scan':
      q, _ = jax.lax.scan(layer, q, None, length=3)
    else:
      q = layer(layer(layer(q, None)[0], None)[0], None)[0]
    return loss(arrays | {'q': q})

  got, want = (quick(jax.grad(stacked), static_argnums=1)(arrays, steps) for steps in ('scan', 'loop'))
  assert_same(got, want)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_sharded_over_batch_and_heads_is_one_device(implementation):
  arrays = floats('B4T9S11H4K2D8V4', 'bias', 'sinks', 'logit bias per head')
  ids, kv_ids = np.arange(9) // 4 * np.ones((4, 1), int), np.arange(11) // 4 * np.ones((4, 1), int)
  mesh = jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  specs = dict.fromkeys(['q', 'k', 'v', 'logit_bias'], P('data', None, 'tensor'))
  specs |= {'bias': P('data', 'tensor'), 'sinks': P('tensor')}

  def one(arrays, ids, kv_ids):
    segments = {'segment_ids': ids, 'kv_segment_ids': kv_ids}
    key = jax.random.key(0)
    options = {'dropout_rate': 0.2, 'dropout_key': key, **segments}
    return jax.value_and_grad(loss_of(implementation, masks.causal(2), **options))(arrays)

  want = jax.jit(one)(arrays, ids, kv_ids)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  spread = {n: put(x, specs[n]) for n, x in arrays.items()}
  with jax.set_mesh(mesh):
    got = jax.jit(one)(spread, put(ids, P('data')), put(kv_ids, P('data')))
  assert_same(got, want)
  assert got[1]['q'].sharding.is_equivalent_to(spread['q'].sharding, 4), 'the gradient of q is gathered'


def temporary_bytes(T, backward, dtype='float32', **options):
  """What XLA sets aside for one call on B1 H2 K1 D16, arguments and results not counted. Nothing is run."""
  arrays = {n: jax.ShapeDtypeStruct((1, T, heads, 16), dtype) for n, heads in (('q', 2), ('k', 1), ('v', 1))}
  run = loss_of('xla', blocks=None, **options)
  run = jax.grad(run) if backward else run
  return jax.jit(run).lower(arrays).compile().memory_analysis().temp_size_in_bytes


MEMORY = {
  'plain': {},
  'masked': {'mask': masks.causal() & (masks.window(100) | masks.sink(4)), 'soft_cap': 5.0},
  'dropout': {'is_causal': True, 'dropout_rate': 0.1, 'dropout_key': np.zeros(2, np.uint32)},
  'lengths': {'query_seq_lengths': np.array([9]), 'key_value_seq_lengths': np.array([9])},
}


@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('name', MEMORY)
def test_memory_is_linear(name, backward):
  """From T to 2T less than 2.5 times, and far from a [T, S] array of float32 per head."""
  T = 8192
  half, whole = (temporary_bytes(n, backward, **MEMORY[name]) for n in (T, 2 * T))
  assert whole < 2.5 * half, f'{half} bytes at T = {T}, {whole} at {2 * T}'
  assert whole < (2 * T) ** 2 * 4 / 16, f'{whole} bytes at T = {2 * T}'


def test_memory_with_a_shared_bias_is_linear():
  """A bias per key has a gradient per key: no [T, S] array is made on the way."""

  def bytes_at(T):
    arrays = {n: jax.ShapeDtypeStruct((1, T, 1, 16), 'float32') for n in 'qkv'}
    arrays['bias'] = jax.ShapeDtypeStruct((1, 1, 1, T), 'float32')
    run = jax.grad(loss_of('xla', blocks=None))
    return jax.jit(run).lower(arrays).compile().memory_analysis().temp_size_in_bytes

  assert bytes_at(16384) < min(2.5 * bytes_at(8192), 16384**2 * 4 / 16)


def equations(jaxpr):
  """Every equation of a program, in all its nested programs."""
  for eqn in jaxpr.eqns:
    yield eqn
    is_program = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
      if is_program(inner):
        yield from equations(getattr(inner, 'jaxpr', inner))


def products(f, arrays):
  return [eqn for eqn in equations(jax.make_jaxpr(f)(arrays).jaxpr) if eqn.primitive.name == 'dot_general']


@pytest.mark.parametrize('precision', [None, 'highest', jax.lax.Precision.HIGH])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_precision_reaches_every_product(implementation, precision):
  arrays = {n: jnp.asarray(x, 'bfloat16') for n, x in zip('qkv', inputs('B1T5S7H2K1D3V2'))}
  options = {'is_causal': True, 'precision': precision}
  forward = products(loss_of(implementation, **options), arrays)
  backward = products(jax.grad(loss_of(implementation, **options)), arrays)
  assert len(forward) >= 2 and len(backward) >= 5
  want = {None: None, 'highest': jax.lax.Precision.HIGHEST}.get(precision, precision)
  for eqn in forward + backward:
    assert eqn.params['precision'] in (want, (want, want)), eqn
  for eqn in forward:
    assert eqn.outvars[0].aval.dtype == np.float32, f'a product is accumulated in {eqn.outvars[0].aval.dtype}'


def test_work_hidden_by_the_mask_is_not_done():
  """A window of one tile in 64: the loops of 'xla' visit the tiles near the diagonal only."""

  def tiles(mask):
    arrays = {n: jax.ShapeDtypeStruct((1, 1024, 1, 16), 'float32') for n in 'qkv'}
    run = lambda arrays: softmax.attend(**arrays, mask=mask, implementation='xla', blocks=softmax.Blocks(q=16, kv=16))
    found = equations(jax.make_jaxpr(run)(arrays).jaxpr)
    return sum(eqn.params['length'] for eqn in found if eqn.primitive.name == 'scan')

  assert tiles(None) == 64 * 64
  assert tiles(masks.causal()) == 64 * 65 // 2
  assert tiles(masks.causal() & masks.window(16)) == 2 * 64 - 1
  assert tiles(masks.chunked(32)) == 2 * 64


def test_numpy_inputs_are_taken_as_jax_takes_them():
  """float64 numpy arrays without x64 are float32, without a warning."""
  q, k, v = inputs('B1T5S6H2K1D3V2')
  for implementation in IMPLEMENTATIONS:
    out, lse = softmax.attend(q, k, v, implementation=implementation, return_residual=True)
    assert out.dtype == lse.dtype == np.float32
