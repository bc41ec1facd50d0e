"""How the arrays of an attention call are cut over the axes of a device mesh: rules, placements, what a device knows.

Sequences are cut over one axis, batch and heads over others. `call` checks global arrays, `Call.run` hands every device
its part, and `Shard` is the view from one device: attention to the keys at hand, neighbours, masks with global numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from attn import masks, softmax
from attn.masks import predicates, sequence, spatial

OPTIONS = ('is_causal', 'scale', 'soft_cap', 'precision', 'implementation', 'blocks')  # static, of softmax.attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """What goes with queries or keys."""

  positions: jax.Array  # int [1 or B, t]
  segments: jax.Array | None  # int [1 or B, t]


@dataclasses.dataclass(frozen=True)
class Shard:
  """A device among others: the axes that cut sequence, batch and heads, and the static options of attention."""

  axis: str
  n: int  # devices on it
  batch: tuple[str, ...]
  heads: tuple[str, ...]
  options: tuple  # of (name, value)

  def attend(self, q, k, v, q_tokens, kv_tokens, mask):
    """(out, lse) of the queries and keys at hand."""
    options = given(q_tokens, kv_tokens, mask) | dict(self.options)
    return softmax.attend(q, k, v, **options, return_residual=True)

  def gradients(self, q, k, v, q_tokens, kv_tokens, mask, out, lse, d_out, d_lse):
    """(dq, dk, dv) that the keys at hand add, from out and lse over all keys and the cotangents of both."""
    from attn import tiled

    options = given(q_tokens, kv_tokens, mask) | dict(self.options)
    blocks, _ = options.pop('blocks', None), options.pop('implementation', None)
    call, _ = softmax.checked(q, k, v, **options)
    grads = tiled.gradients(call, out, lse, d_out, d_lse, blocks)
    return grads.q, grads.k, grads.v

  def hand_on(self, tree):
    """Every device's arrays to the next device, the last one's to the first."""
    ways = [(i, (i + 1) % self.n) for i in range(self.n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, ways), tree)

  def mask(self, mask, rows, heads, head_axes=None):
    """The mask on a device that holds so many rows of the batch and heads: functions see the numbers of all."""
    first_row = jax.lax.axis_index(self.batch) * rows if self.batch else 0
    head_axes = self.heads if head_axes is None else head_axes
    first_head = jax.lax.axis_index(head_axes) * heads if head_axes else 0

    def numbered(part):
      if not isinstance(part, sequence.Function):
        return part
      return sequence.Function((jnp.asarray(first_row), jnp.asarray(first_head), *part.arrays), _Numbered(part.f))

    return _map_predicates(numbered, mask)


@dataclasses.dataclass(frozen=True)
class _Numbered:
  """A mask function of all rows and heads for a device that counts its own from 0. Equal if the functions are."""

  f: Callable

  def __call__(self, b, h, i, j, first_row, first_head, *arrays):
    return self.f(b + first_row, h + first_head, i, j, *arrays)


def given(q_tokens, kv_tokens, mask):
  """The keyword arguments of softmax.attend that say what is seen."""
  return {
    'mask': mask,
    'positions': q_tokens.positions,
    'kv_positions': kv_tokens.positions,
    'segment_ids': q_tokens.segments,
    'kv_segment_ids': kv_tokens.segments,
  }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
  """Checked global arrays and how they are cut."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  q_tokens: Tokens
  kv_tokens: Tokens
  mask: masks.Mask
  mesh: Any = dataclasses.field(metadata={'static': True})
  shard: Shard = dataclasses.field(metadata={'static': True})
  is_query_cut: bool = dataclasses.field(metadata={'static': True})

  @property
  def head_parts(self):
    """Parts that heads are cut into."""
    return math.prod(self.mesh.shape[name] for name in self.shard.heads)

  def run(self, of_device):
    """Global (out, lse) of of_device(shard, q, k, v, q_tokens, kv_tokens, mask), which sees the parts of a device."""
    try:
      return _run(of_device, self)
    except TypeError as error:
      if 'forward-mode' not in str(error):
        raise
      raise NotImplementedError("first-order reverse mode only, use implementation='reference'") from error

  def token_specs(self, tokens, axis):
    """Placements of Tokens whose sequence is cut over an axis, or over none."""
    return jax.tree.map(lambda x: P(self._if_rows(x), axis), tokens)

  def mask_specs(self):
    """Settings with an entry for each row of the batch are cut with it; all else is whole."""

    def specs(part):
      has_rows = isinstance(part, sequence.Causal | sequence.Prefix)
      return jax.tree.map(lambda x: P(self._if_rows(x)) if has_rows and x.ndim else P(), part)

    return _map_predicates(specs, self.mask)

  def _if_rows(self, x):
    return (self.shard.batch or None) if len(x) == len(self.q) else None


@functools.partial(jax.jit, static_argnums=0)
def _run(of_device, call):
  shard = call.shard
  q_axis = shard.axis if call.is_query_cut else None
  q_spec, kv_spec = (P(shard.batch or None, axis, shard.heads or None) for axis in (q_axis, shard.axis))
  # Each device needs the key heads of its query heads: repeated where there are fewer than parts, or no multiple.
  k, v = (_repeated(x, call, kv_spec) for x in (call.k, call.v))
  arrays = call.q, k, v, call.q_tokens, call.kv_tokens, call.mask
  tokens = call.token_specs(call.q_tokens, q_axis), call.token_specs(call.kv_tokens, shard.axis)
  specs = q_spec, kv_spec, kv_spec, *tokens, call.mask_specs()
  arrays = jax.tree.map(lambda x, spec: _placed(x, call.mesh, spec), arrays, specs)
  run: Callable = functools.partial(of_device, shard)
  if _axes_of(call.mesh, AxisType.Manual) and not isinstance(of_device, jax.custom_vjp):
    # What an inner jax.shard_map keeps for the backward it cuts over outer axes as well, and does not compile (jax
    # 0.10.2): it may keep its inputs alone.
    run = jax.checkpoint(run)
  return jax.shard_map(run, mesh=call.mesh, in_specs=specs, out_specs=(q_spec, q_spec))(*arrays)


def _repeated(x, call, spec):
  """Keys or values of this placement, with heads for every part. Heads that are repeated must not be cut before."""
  if x.shape[2] % call.head_parts:
    x = _placed(x, call.mesh, P(*spec[:2]))
  return repeat_heads(x, call.head_parts)


def _placed(x, mesh, spec):
  """x placed so on the Explicit axes of the mesh; the compiler sees to the others."""
  explicit = _axes_of(mesh, AxisType.Explicit)
  if not explicit:
    return x
  names = lambda entry: (entry,) if isinstance(entry, str) else entry or ()
  spec = P(*(tuple(name for name in names(entry) if name in explicit) or None for entry in spec))
  return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def _axes_of(mesh, kind):
  return {name for name, one in zip(mesh.axis_names, mesh.axis_types) if one is kind}


def parts(axis):
  """Parts that the current mesh cuts arrays into by an axis; 1 where it has none, or the arrays are cut already."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if axis in _axes_of(mesh, AxisType.Manual) else mesh.shape.get(axis, 1)


def call(
  q, k, v, *, mesh, axis, batch_axes, head_axes, is_query_cut=True, mask=None, positions=None, kv_positions=None,
  segment_ids=None, kv_segment_ids=None, **options,
):  # fmt: skip
  """The input rules of attention over a mesh: a Call, or a ValueError."""
  for name in options:
    if name not in OPTIONS:
      raise ValueError(f'{name} is not an option of attention over devices, expected one of {", ".join(OPTIONS)}')
  q, k, v = (jnp.asarray(x) for x in (q, k, v))
  softmax.check_qkv(q, k, v)
  (B, T, H, _), S = q.shape, k.shape[1]
  mesh, batch, heads = _axes(mesh, axis, batch_axes, head_axes)
  _divides('B', B, mesh, batch)
  _divides('H', H, mesh, heads)
  _divides('T', T, mesh, (axis,) if is_query_cut else ())
  _divides('S', S, mesh, (axis,))
  if kv_segment_ids is not None and segment_ids is None:
    raise ValueError('kv_segment_ids came without segment_ids')
  for name, x, of_keys in (('positions', positions, kv_positions), ('segment_ids', segment_ids, kv_segment_ids)):
    if x is not None and of_keys is None and T != S:
      raise ValueError(f'{name} came without kv_{name}, and T={T} queries are not S={S} keys')
  q_tokens = Tokens(_numbers('positions', positions, B, T), _ids('segment_ids', segment_ids, B, T))
  kv_positions = positions if kv_positions is None else kv_positions
  mask = _by_position(mask, B, H, T, S, is_default=(positions is None, kv_positions is None))
  kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
  kv_tokens = Tokens(_numbers('kv_positions', kv_positions, B, S), _ids('kv_segment_ids', kv_segment_ids, B, S))
  shard = Shard(axis, mesh.shape[axis], batch, heads, tuple(sorted(options.items())))
  return Call(q, k, v, q_tokens, kv_tokens, mask, mesh, shard, is_query_cut)


def _axes(mesh, axis, batch_axes, head_axes):
  """(mesh, axes of the batch, axes of heads): those that the mesh has and that are not cut by hand already."""
  current = jax.sharding.get_abstract_mesh()
  manual = _axes_of(current, AxisType.Manual)
  # Inside jax.shard_map only the current mesh knows what is cut already.
  mesh = current if mesh is None or (manual and dict(mesh.shape) == dict(current.shape)) else mesh
  if axis not in mesh.shape:
    raise ValueError(f'axis={axis!r} is not in the mesh {dict(mesh.shape)}: give mesh=, or enter jax.set_mesh(mesh)')
  if axis in manual:
    raise ValueError(f'axis={axis!r} is Manual, cut by an outer jax.shard_map: expected an axis that it leaves alone')
  owner = {axis: 'axis'}
  found = []
  for argument, names in (('batch_axes', batch_axes), ('head_axes', head_axes)):
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
      raise ValueError(f'{argument}={names!r}, expected a tuple of names of mesh axes')
    for name in names:
      if name in owner:
        raise ValueError(f'{argument}={names!r}: {name!r} is in {owner[name]} already, expected each mesh axis once')
      owner[name] = argument
    found.append(tuple(name for name in names if name in mesh.shape and name not in manual))
  return mesh, *found


def repeat_heads(x, parts):
  """x [B, S, K, ...] with every head repeated, next to itself, as often as it takes for `parts` to divide them."""
  repeats = parts // math.gcd(x.shape[2], parts)
  return x if repeats == 1 else jnp.repeat(x, repeats, axis=2)


def _divides(name, size, mesh, axes):
  parts = math.prod(mesh.shape[axis] for axis in axes)
  if size % parts:
    shown = ' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes)
    raise ValueError(f'{name}={size}: expected a multiple of {parts}, the devices on mesh axis {shown}')


def _numbers(name, x, B, n):
  return _ids(name, np.arange(n, dtype=np.int32) if x is None else x, B, n)


def _ids(name, x, B, n):
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.shape not in ((n,), (1, n), (B, n)) or not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f'{name} have shape {x.shape} and dtype {x.dtype}, expected integers [{n}] or [{B}, {n}]')
  return jnp.atleast_2d(x)


def _by_position(mask, B, H, T, S, is_default):
  """The mask, if it goes by positions alone: indices change their meaning when arrays are cut."""
  if mask is not None and not isinstance(mask, masks.Mask):
    raise ValueError(f'mask is a {type(mask).__name__}, expected a mask of predicates on positions')
  mask = masks.everything() if mask is None else mask
  masks.check(mask, B, H, T, S, is_default=is_default)

  def check(part):
    if isinstance(part, sequence.Array | sequence.Document | sequence.Lengths):
      raise ValueError(
        f'mask has a part {type(part).__name__} that goes by index, expected predicates on positions (documents: '
        'segment_ids; padding: negative positions)'
      )
    if isinstance(part, spatial.Grouped) and np.ndim(part.shift) and len(part.shift) > 1:
      raise ValueError(f'mask has groups with a shift for each head, {part.shift}: expected one shift for all heads')
    return part

  return _map_predicates(check, mask)


def _map_predicates(f, mask):
  """The mask with f of it in place of every predicate, and of every array of a layout."""
  is_joined = lambda x: isinstance(x, predicates.And | predicates.Or | predicates.Not | spatial.Placed)
  return jax.tree.map(f, mask, is_leaf=lambda x: isinstance(x, masks.Mask) and not is_joined(x))
