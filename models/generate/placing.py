"""Where rows, caches and parameters of a generation lie: on one device, or over the axes of a mesh.

Rows are cut over the axes data and fsdp, the key heads of caches over tensor. The functions that take traced arrays
do nothing without a mesh.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec as P

ROWS, HEADS = ('data', 'fsdp'), 'tensor'


def mesh_of(params):
  """The mesh to compute on: that of jax.set_mesh, else the one that parameters are cut over, else None.

  Its axes are the compiler's (Auto), whatever they were.
  """
  mesh: Any = jax.sharding.get_mesh()
  if mesh.size < 2:
    of_params = [x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(x.sharding, NamedSharding)]
    mesh = max(of_params, key=lambda mesh: mesh.size, default=mesh)
  return jax.sharding.Mesh(mesh.devices, mesh.axis_names) if mesh.size > 1 else None


def current(mesh):
  """The context in which programs for the mesh are called."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def spread(params, mesh):
  """Parameters on the mesh: those that are cut over it stay as they are, others are copied to all of its devices.

  Raises:
    ValueError: parameters that are cut over another mesh.
  """
  if mesh is None:
    return params

  def place(x):
    spec = P()
    if isinstance(x.sharding, NamedSharding) and x.sharding.mesh.size > 1:
      if dict(x.sharding.mesh.shape) != dict(mesh.shape) or x.sharding.device_set != set(mesh.devices.flat):
        raise ValueError(f'parameters lie on the mesh {x.sharding.mesh.shape}, expected the current one, {mesh.shape}')
      spec = x.sharding.spec
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(place, params)


def padded(rows, mesh):
  """The number of rows with the idle ones that make the mesh divide it."""
  parts = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
  return -(-rows // parts) * parts


def by_rows(tree):
  """Traced arrays [R, ...], cut by rows."""
  return jax.tree.map(lambda x: _cut(x, 0, None), tree)


def everywhere(tree):
  """Traced arrays, whole on every device: what every process of a machine can read."""
  return tree if _sizes() is None else jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def by_heads(cache):
  """A traced ModelCache, cut by rows and, in arrays [R, heads, slots, width], by heads where they divide."""
  row = 1 if cache.is_scanned else 0
  place = lambda x: _cut(x, row, row + 1 if x.ndim - row == 4 else None)
  return dataclasses.replace(
    cache,
    layers=jax.tree.map(place, cache.layers),
    length=_cut(cache.length, 0, None),
    reach=_cut(cache.reach, 0, None),
  )


def _sizes():
  """{axis: size} of the mesh of the program being traced, or None where there is one device."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  return sizes if math.prod(sizes.values()) > 1 else None


def _cut(x, row, head):
  sizes = _sizes()
  if sizes is None:
    return x
  spec: list = [None] * x.ndim
  spec[row] = tuple(axis for axis in ROWS if axis in sizes)
  if head is not None and x.shape[head] % sizes.get(HEADS, 1) == 0:
    spec[head] = HEADS if HEADS in sizes else None
  return jax.lax.with_sharding_constraint(x, P(*spec))
