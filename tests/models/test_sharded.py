"""A decoder over eight devices equals one device: parameters are placed from outside, the modules say nothing."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.models import small

CUTS = {'q': 1, 'k': 1, 'v': 1, 'o': 0, 'gate': 1, 'up': 1, 'down': 0}  # the axis of a kernel that 'tensor' cuts


def place(path, x, mesh, has_repeats):
  """Kernels are cut by their role, everything else is copied."""
  axis = CUTS.get(path[-2]) if path[-1] == 'kernel' else None
  spec = [] if axis is None else [None] * (axis + has_repeats) + ['tensor']
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize('scan', [False, True])
def test_sharded_equals_one_device(scan):
  model = small.model(layers=small.HYBRID, depth=4, scan=scan, implementation='xla')
  tokens = small.tokens(batch=4)
  want, (want_extended, _) = small.forward(model, tokens), small.extend(model, tokens, None, model.init_cache(4, 16))
  graph, state = nnx.split(model)
  mesh = jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    flat = [
      (path, v.replace(place(path, v.get_value(), mesh, scan and path[0] == 'blocks')))
      for path, v in nnx.to_flat_state(state)
    ]
    placed = nnx.merge(graph, nnx.from_flat_state(flat))
    batch = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec('data')))
    got = small.forward(placed, batch)
    got_extended, _ = small.extend(placed, batch, None, placed.init_cache(4, 16))
  assert len(got.sharding.device_set) == 8
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
  np.testing.assert_allclose(got_extended, want_extended, rtol=1e-5, atol=1e-5 * np.abs(want).max())
