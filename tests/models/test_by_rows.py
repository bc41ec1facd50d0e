"""models.sharding.by_rows: activations lie as rows do, and what cannot be cut is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from models import sharding


def mesh(**sizes):
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize(
  'sizes, shape, part',
  [
    ({'data': 2, 'fsdp': 2, 'context': 2}, (4, 6, 8), (1, 3, 8)),
    ({'fsdp': 4, 'tensor': 2}, (4, 6, 8), (1, 6, 8)),
    ({'fsdp': 4, 'context': 2}, (3, 6, 8), (3, 3, 8)),  # 4 does not divide 3
    ({'fsdp': 4, 'context': 2}, (4, 5), (1, 5)),
  ],
)
def test_parts(sizes, shape, part):
  x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  current = mesh(**sizes)
  given = jax.device_put(x, NamedSharding(current, P()))
  with jax.set_mesh(current):
    out = jax.jit(lambda x: 2 * sharding.by_rows(x))(given)
  assert out.sharding.shard_shape(shape) == part
  np.testing.assert_array_equal(out, 2 * x)


def test_gradients_lie_so_too():
  with jax.set_mesh(mesh(fsdp=4, tensor=2)):
    f = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(sharding.by_rows(x)))))
    assert f(np.zeros((4, 6, 8), np.float32)).sharding.shard_shape((4, 6, 8)) == (1, 6, 8)


def test_without_a_mesh_it_is_left_alone():
  x = jnp.zeros((4, 6, 8))
  assert sharding.by_rows(x) is x
  with jax.set_mesh(mesh(tensor=8)):
    assert sharding.by_rows(x) is x
