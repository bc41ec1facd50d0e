"""attn.distributed on meshes of every kind: axes that are explicit, cut by an outer map, or named by one string."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from attn import distributed, softmax
from tests.attn import oracle
from tests.attn.softmax_cases import inputs
from tests.attn.test_distributed import NAMES, WAYS, case, mesh_of


@pytest.mark.parametrize('way', WAYS)
def test_explicit_axes_and_the_current_mesh(way):
  q, k, v, sinks = case('float32')[0]
  with jax.set_mesh(mesh_of({'data': 2, 'context': 4}, AxisType.Explicit)):
    run = lambda *x: WAYS[way](*x[:3], sinks=x[3], is_causal=True, implementation='reference').sum()
    got = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3)))(q, k, v, sinks)
  run = lambda *x: softmax.attend(*x[:3], sinks=x[3], is_causal=True, implementation='reference').sum()
  for name, a, b in zip(NAMES, got, jax.jit(jax.grad(run, argnums=(0, 1, 2, 3)))(q, k, v, sinks)):
    oracle.assert_close(a, b, 'float32', name=name)


@pytest.mark.parametrize('kv_heads', [2, 4, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 8))])
@pytest.mark.parametrize('way', WAYS)
def test_explicit_heads_may_come_cut(way, kv_heads):
  """Four parts of the heads; K = 2 heads come cut in two, and are repeated after they are brought together."""
  (q, _, _), (_, k, v) = inputs('B1T8S8H8K8D4V3', np.float32), inputs(f'B1T8S8H8K{kv_heads}D4V3', np.float32)
  mesh = mesh_of({'context': 2, 'tensor': 2, 'data': 2}, AxisType.Explicit)
  cut = {1: None, 2: 'tensor'}.get(kv_heads, ('tensor', 'data'))
  place = lambda x, heads: jax.device_put(x, NamedSharding(mesh, P(None, 'context', heads)))
  parts = place(q, ('tensor', 'data')), place(k, cut), place(v, cut)
  axes = {'batch_axes': (), 'head_axes': ('tensor', 'data')}
  if way == 'all_to_all':
    axes['head_axes'] = 'tensor'  # two heads must remain on a device
  run = functools.partial(WAYS[way], is_causal=True, implementation='reference', **axes)
  with jax.set_mesh(mesh):
    got = run(*parts), jax.jit(run)(*parts)
  want = softmax.attend(q, k, v, is_causal=True, implementation='reference')
  for x in got:
    oracle.assert_close(x, want, 'float32')


@pytest.mark.parametrize('way, implementation', [*((way, 'xla') for way in WAYS), ('ring', 'reference')])
def test_inside_a_map_over_the_batch(way, implementation):
  """An outer jax.shard_map has cut the rows: one is left on a device, and the batch is not cut again."""
  q, k, v = inputs('B2T8S8H4K2D4V3', np.float32)
  mesh, options = mesh_of({'data': 2, 'context': 2, 'tensor': 2}), {'is_causal': True, 'implementation': implementation}
  attend = functools.partial(WAYS[way], mesh=None if implementation == 'xla' else mesh, **options)
  outer = jax.shard_map(attend, mesh=mesh, in_specs=P('data'), out_specs=P('data'), axis_names={'data'})
  grads = lambda f: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x) ** 2), argnums=(0, 1, 2)))
  with jax.set_mesh(mesh):
    got = grads(outer)(q, k, v)
  want = grads(functools.partial(softmax.attend, **options))(q, k, v)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    oracle.assert_close(a, b, 'float32')


def test_an_axis_that_is_cut_already_has_no_parts():
  mesh, seen = mesh_of({'data': 2, 'context': 4}), []

  def inner(x):
    seen.append((distributed.parts(), distributed.parts('data'), distributed.parts('tensor')))
    return x

  for names in ({'data'}, {'data', 'context'}):
    mapped = jax.shard_map(inner, mesh=mesh, in_specs=P('data'), out_specs=P('data'), axis_names=names)
    jax.eval_shape(mapped, jnp.zeros(4))
  with jax.set_mesh(mesh):
    inner(0)
  inner(0)
  assert seen == [(4, 1, 1), (1, 1, 1), (4, 2, 1), (1, 1, 1)]
  attend = lambda x: distributed.ring(x, x, x)
  mapped = jax.shard_map(attend, mesh=mesh, in_specs=P('data', 'context'), out_specs=P('data', 'context'))
  with pytest.raises(ValueError, match="axis='context' is Manual, cut by an outer jax"):
    jax.eval_shape(mapped, jnp.zeros((2, 8, 4, 4)))


def test_one_name_is_one_axis():
  """Read letter by letter, 'data' would name four axes that the mesh lacks, and nothing would be cut."""
  mesh = mesh_of({'data': 2, 'context': 2, 'd': 2})
  given = jax.ShapeDtypeStruct((2, 8, 4, 4), jnp.float32)

  def made(**axes):
    return str(jax.make_jaxpr(lambda x: distributed.ring(x, x, x, mesh=mesh, **axes))(given))

  one, two = made(batch_axes='data', head_axes='d'), made(batch_axes=('data',), head_axes=['d'])
  assert one == two
  assert one != made(batch_axes=(), head_axes=())
