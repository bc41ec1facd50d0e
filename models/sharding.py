"""Where a model's parameters lie on a mesh: a table from parameter paths to placements.

Mesh axes are `data` (copies), `fsdp` (parameters and rows cut), `context` (rows cut along their length), `tensor`
(heads and the inside of MLPs cut). A mesh may lack any of them.
"""

import math
import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

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
  (r'blocks\.\d+\.mlp\.experts\.(gate|up)\.kernel', P('fsdp', 'tensor')),  # [experts, E, inside]
  (r'blocks\.\d+\.mlp\.experts\.(gate|up)\.bias', P('tensor')),
  (r'blocks\.\d+\.mlp\.experts\.down\.kernel', P('tensor', 'fsdp')),  # [experts, inside, E]
  (r'blocks\.\d+\.mlp\.router\.(kernel|bias)', P()),
  # Adapters: [in, rank] as the first axis of the kernel, [rank, out] as its last.
  (r'(head|blocks\.\d+\.(mixer\.[qkv]|mlp\.(gate|up)))\.lora_a', P('fsdp', None)),
  (r'(head|blocks\.\d+\.(mixer\.[qkv]|mlp\.(gate|up)))\.lora_b', P(None, 'tensor')),
  (r'blocks\.\d+\.(mixer\.o|mlp\.down)\.lora_a', P('tensor', None)),
  (r'blocks\.\d+\.(mixer\.o|mlp\.down)\.lora_b', P(None, 'fsdp')),
  (r'blocks\.\d+\.mlp\.router\.lora_[ab]', P()),
  (r'blocks\.\d+\.(mixer\.o|mlp\.down|mlp\.experts\.down)\.bias', P()),
  (r'blocks\.\d+\.mixer\.sinks', P()),
  (r'(.*\.|)\w*norm\.scale', P()),
]


def params_sharding(params, mesh, rules=RULES):
  """The placement of each parameter.

  Args:
    params: {path: array or shape}, as models.state.split gives them.
    mesh: jax.sharding.Mesh.
    rules: [(regular expression, PartitionSpec)].

  Returns:
    {path: NamedSharding}.

  Raises:
    ValueError: a path that no rule matches, or an axis that its mesh axes do not divide.
  """
  return {path: NamedSharding(mesh, _spec(path, array.shape, mesh, rules)) for path, array in params.items()}


def _spec(path, shape, mesh, rules):
  found = next(((pattern, spec) for pattern, spec in rules if re.fullmatch(pattern, path)), None)
  if found is None:
    raise ValueError(f'parameter {path!r} {shape} matches no rule: expected a line for it in models/sharding.py RULES')
  pattern, spec = found
  if len(spec) > len(shape):
    raise ValueError(f'parameter {path!r} {shape}: rule {pattern!r} places {len(spec)} axes, more than there are')
  spec = P(*[None] * (len(shape) - len(spec)), *(_present(axes, mesh) for axes in spec))
  for i, axis in enumerate(spec):
    if axis is not None and shape[i] % parts(axis, mesh):
      raise ValueError(
        f'mesh.{axis}={parts(axis, mesh)}: expected a divisor of axis {i} of parameter {path!r} {shape}'
        + (' (model.vocab may be larger than the tokenizer needs)' if path in ('embed.table', 'head.kernel') else '')
      )
  return spec


def by_rows(x):
  """Activations [B, T, ...], cut over the current mesh (of jax.set_mesh) as rows are: B by data and fsdp, T by context.

  A compiler that is not told may keep all rows on every device and cut channels over fsdp, as parameters are: then
  activations are summed over fsdp in place of parameters being gathered. What the mesh does not divide is left to it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  auto = [
    name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind is AxisType.Auto and mesh.shape[name] > 1
  ]
  spec = []
  for length, names in zip(x.shape, (('data', 'fsdp'), ('context',))):
    axes = tuple(name for name in names if name in auto)
    spec.append(axes if axes and length % parts(axes, mesh) == 0 else P.UNCONSTRAINED)
  if all(axes is P.UNCONSTRAINED for axes in spec):
    return x
  return jax.lax.with_sharding_constraint(x, P(*spec, *[P.UNCONSTRAINED] * (x.ndim - 2)))


def parts(axes, mesh):
  """How many parts a mesh axis, or a tuple of them, or None, cuts an axis of an array into."""
  names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
  return math.prod(mesh.shape[name] for name in names)


def _present(axes, mesh):
  """The mesh axes of one axis of an array, without those that the mesh lacks."""
  if not isinstance(axes, tuple):
    return axes if axes in mesh.shape else None
  return tuple(axis for axis in axes if axis in mesh.shape) or None
