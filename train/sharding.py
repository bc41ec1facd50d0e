"""Where arrays live: a mesh of devices with named axes, and a table from parameter paths to placements."""

import math
import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from train.config import MESH_AXES, UserError

# (regular expression that a whole path must match, placement of its last axes). The first match wins. Axes before
# those a placement names, such as the repeats of scanned layers, are not cut.
RULES = [
  (r'embed\.table', P('tensor', 'fsdp')),  # [vocab, E]
  (r'head\.kernel', P('fsdp', 'tensor')),  # [E, vocab]
  (r'blocks\.\d+\.mixer\.[qkv]\.kernel', P('fsdp', 'tensor')),  # [E, heads * D]
  (r'blocks\.\d+\.mixer\.[qkv]\.bias', P('tensor')),
  (r'blocks\.\d+\.mixer\.o\.kernel', P('tensor', 'fsdp')),  # [heads * D, E]
  (r'blocks\.\d+\.mlp\.(gate|up)\.kernel', P('fsdp', 'tensor')),  # [E, inside]
  (r'blocks\.\d+\.mlp\.(gate|up)\.bias', P('tensor')),
  (r'blocks\.\d+\.mlp\.down\.kernel', P('tensor', 'fsdp')),  # [inside, E]
  (r'blocks\.\d+\.(mixer\.o|mlp\.down)\.bias', P()),
  (r'blocks\.\d+\.mixer\.sinks', P()),
  (r'(.*\.|)\w*norm\.scale', P()),
]
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
  return jax.make_mesh(
    tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices[:needed]
  )


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
  """The placement of each parameter.

  Args:
    params: {path: array or shape}, as train.state gives them.
    mesh: jax.sharding.Mesh.
    rules: [(regular expression, PartitionSpec)].

  Returns:
    {path: NamedSharding}.

  Raises:
    UserError: a path that no rule matches, or an axis that its mesh axes do not divide.
  """
  return {path: NamedSharding(mesh, _spec(path, array.shape, mesh, rules)) for path, array in params.items()}


def _spec(path, shape, mesh, rules):
  found = next(((pattern, spec) for pattern, spec in rules if re.fullmatch(pattern, path)), None)
  if found is None:
    raise UserError(f'parameter {path!r} {shape} matches no rule: expected a line for it in train/sharding.py RULES')
  pattern, spec = found
  if len(spec) > len(shape):
    raise UserError(f'parameter {path!r} {shape}: rule {pattern!r} places {len(spec)} axes, more than there are')
  spec = P(*[None] * (len(shape) - len(spec)), *spec)
  for i, axis in enumerate(spec):
    if axis is not None and shape[i] % mesh.shape[axis]:
      raise UserError(
        f'mesh.{axis}={mesh.shape[axis]}: expected a divisor of axis {i} of parameter {path!r} {shape}'
        + (' (model.vocab may be larger than the tokenizer needs)' if path in ('embed.table', 'head.kernel') else '')
      )
  return spec


def like_params(tree, params_shardings, mesh):
  """Placements for a tree, such as an optimizer's state, that holds dictionaries keyed by parameter paths.

  A leaf below such a key lies as its parameter does; all others are whole on every device.
  """
  whole = NamedSharding(mesh, P())

  def place(path, leaf):
    keys = [getattr(key, 'key', None) for key in path]
    return next((params_shardings[key] for key in keys if key in params_shardings), whole)

  return jax.tree_util.tree_map_with_path(place, tree)
