"""Where arrays live: a mesh of devices with named axes; parameters by the table of models/sharding.py."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from models import sharding
from models.sharding import RULES
from train.config import MESH_AXES, UserError

ROWS = P(('data', 'fsdp'), 'context')  # of [B, T] arrays


def make_mesh(config, devices=None):
  """The mesh of a MeshConfig, over the first devices it needs.

  Args:
    config: MeshConfig.
    devices: list of devices; None means all.

  Returns:
    jax.sharding.Mesh with axes data, fsdp, context, tensor, placed by the compiler (Auto).

  Raises:
    UserError: more parts than devices, or, with more than one process, devices left over.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
  others = math.prod(size for axis, size in sizes.items() if axis != 'data')
  if sizes['data'] == -1:
    sizes['data'] = max(1, len(devices) // others)
  needed = math.prod(sizes.values())
  shown = ', '.join(f'mesh.{axis}={size}' for axis, size in sizes.items())
  if needed > len(devices):
    raise UserError(f'{shown}: expected a product of at most {len(devices)} devices, got {needed}')
  if needed < len(devices) and jax.process_count() > 1:
    raise UserError(f'{shown}: expected a product of all {len(devices)} devices of all processes, got {needed}')
  # Axes of a mesh need not be those of a TPU's torus; jax.make_mesh would refuse to split these on most generations.
  placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices[:needed], allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_batch(config, mesh):
  """UserError unless the rows of a step and their tokens divide among the mesh."""
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  parts = rows * config.train.accumulate
  if config.data.batch % parts:
    raise UserError(
      f'data.batch={config.data.batch}: expected a multiple of mesh.data * mesh.fsdp * train.accumulate = {parts}'
    )
  if config.eval.batch % rows:
    raise UserError(f'eval.batch={config.eval.batch}: expected a multiple of mesh.data * mesh.fsdp = {rows}')
  if config.data.seq_len % mesh.shape['context']:
    raise UserError(f'data.seq_len={config.data.seq_len}: expected a multiple of mesh.context={mesh.shape["context"]}')


def params_sharding(params, mesh, rules=RULES):
  """As models.sharding.params_sharding, with a UserError for what does not fit."""
  try:
    return sharding.params_sharding(params, mesh, rules)
  except ValueError as error:
    raise UserError(str(error)) from error


def like_params(tree, params_shardings, mesh):
  """Placements for a tree, such as an optimizer's state, that holds dictionaries keyed by parameter paths.

  A leaf below such a key lies as its parameter does; all others are whole on every device.
  """
  whole = NamedSharding(mesh, P())

  def place(path, leaf):
    keys = [getattr(key, 'key', None) for key in path]
    return next((params_shardings[key] for key in keys if key in params_shardings), whole)

  return jax.tree_util.tree_map_with_path(place, tree)
