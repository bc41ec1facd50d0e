"""Exact attention inside jax.shard_map and on meshes with Explicit axes, which jax.make_mesh makes by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from attn import masks, softmax
from tests.attn.softmax_cases import inputs

SHAPE = 'B2T19S19H4K2D8V8'
MASK = masks.causal() & (masks.window(7) | masks.sink(2))
OPTIONS = {'mask': MASK, 'blocks': softmax.Blocks(8, 8), 'return_residual': True}


def loss(out, lse):
  return jnp.sum(out * jnp.cos(out)) + jnp.sum(jnp.sin(lse))


def expected(q, k, v, sinks):
  run = lambda *x: loss(*softmax.attend(*x[:3], sinks=x[3], implementation='reference', **OPTIONS))
  return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3)))(q, k, v, sinks)


@pytest.mark.parametrize('implementation', softmax.IMPLEMENTATIONS)
def test_shard_map_over_batch_and_heads(implementation):
  q, k, v = inputs(SHAPE, np.float32)
  sinks = np.linspace(-1, 1, 4, dtype=np.float32)
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  rows = P('data', None, 'tensor')
  attend = lambda *x: softmax.attend(*x[:3], sinks=x[3], implementation=implementation, **OPTIONS)
  sharded = jax.shard_map(attend, mesh=mesh, in_specs=(rows, rows, rows, P('tensor')), out_specs=(rows, rows))
  got = jax.jit(jax.value_and_grad(lambda *x: loss(*sharded(*x)), argnums=(0, 1, 2, 3)))(q, k, v, sinks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected(q, k, v, sinks))


@pytest.mark.parametrize('implementation', softmax.IMPLEMENTATIONS)
def test_keys_over_devices_merge(implementation):  # what context parallelism is made of
  q, k, v = inputs('B2T19S20H4K2D8V8', np.float32)
  mesh = jax.make_mesh((4,), ('context',), axis_types=(AxisType.Auto,))
  positions = jnp.arange(20)

  def part(q, k, v, kv_positions):
    options = {'positions': jnp.arange(19), 'kv_positions': kv_positions, 'implementation': implementation}
    out, lse = softmax.attend(q, k, v, **OPTIONS, **options)
    outs, lses = (jax.lax.all_gather(x, 'context') for x in (out, lse))
    out, lse = softmax.merge(list(zip(outs, lses)))
    return jax.lax.pmean(out, 'context'), jax.lax.pmean(lse, 'context')

  cut = P(None, 'context')
  run = jax.shard_map(part, mesh=mesh, in_specs=(P(), cut, cut, P('context')), out_specs=(P(), P()))
  got = jax.jit(run)(q, k, v, positions)
  want = softmax.attend(q, k, v, implementation='reference', **OPTIONS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.parametrize('implementation', softmax.IMPLEMENTATIONS)
def test_explicit_axes(implementation):
  q, k, v = inputs(SHAPE, np.float32)
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'))
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, P('data'))) for x in (q, k, v)]
    attend = lambda *x: softmax.attend(*x, implementation=implementation, **OPTIONS)
    got = jax.jit(jax.value_and_grad(lambda *x: loss(*attend(*x)), argnums=(0, 1, 2)))(*placed)
  run = lambda *x: loss(*softmax.attend(*x, implementation='reference', **OPTIONS))
  want = jax.value_and_grad(run, argnums=(0, 1, 2))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
