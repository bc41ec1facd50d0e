"""Tensors of a checkpoint as device arrays in our layout, and back to numpy in the published one.

Published linear weights are [out, in], ours [in, out]. Each device gets its part in the published layout, read from the
file, and turns it there: numpy is slow at it, and a host would need a second copy of what several devices share.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from models import sharding
from models.hf import safetensors

BLOCKS, SCALES = '_blocks', '_scales'  # endings of the two tensors that hold one in MXFP4
GROUP = 32  # values with one scale
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fetch(tensors, wants):
  """What the file holds of some parameters, on the devices that need it.

  Args:
    tensors: safetensors.Folder.
    wants: list of (architectures.Source, shape of the parameter, its NamedSharding or None for the default device,
      whether the tensor is stored in MXFP4), all of one tensor: each part of the file is read once.

  Returns:
    List of tuples of arrays, for `finish` and `store`: the part in the published layout, or its blocks and scales.
  """
  parts = [_parts(tensors, *want) for want in wants]
  return list(zip(*(_fetch(tensors, column) for column in zip(*parts))))


def _parts(tensors, source, shape, placement, is_packed):
  """[(tensor, index, placement)] of the arrays that a parameter is made of."""
  cuts = [None] * len(shape)
  if placement is not None:
    cuts[: len(placement.spec)] = placement.spec
  if source.transpose:
    cuts[-2:] = cuts[:-3:-1]
  on = lambda *cuts: None if placement is None else NamedSharding(placement.mesh, P(*cuts))
  if not is_packed:
    return [(source.tensor, source.index, on(*cuts) if source.transpose else placement)]
  # The tensor is [N, in, out], its blocks [N, out, in / 32, 16]. Groups are cut only where a cut falls between two.
  whole = slice(None)
  experts, inside, out = source.index or (whole, whole, whole)
  groups = tensors.tensors[source.tensor + SCALES].shape[-1]
  parts = 1 if placement is None else sharding.parts(cuts[1], placement.mesh)
  if inside != whole:
    raise ValueError(f'{source.tensor}: {inside} of a tensor in MXFP4, expected all of its groups')
  on_blocks = on(cuts[0], cuts[2], None if groups % parts else cuts[1])
  return [(source.tensor + end, (experts, out), on_blocks) for end in (BLOCKS, SCALES)]


def _fetch(tensors, column):
  """Arrays in the published layout for [(tensor, index, placement)] with one tensor."""
  name = column[0][0]
  plans = []
  for _, index, placement in column:
    ranges = safetensors.index_ranges(index, tensors.tensors[name].shape)
    shape = tuple(map(len, ranges))
    cuts = {None: [slice(None)] * len(shape)}
    if placement is not None:
      cuts = placement.addressable_devices_indices_map(shape)
    plans.append((shape, placement, {device: tuple(r[s] for r, s in zip(ranges, cut)) for device, cut in cuts.items()}))
  unique = list(dict.fromkeys(part for *_, parts in plans for part in parts.values()))
  indexes = [tuple(slice(r.start, r.stop, r.step) for r in part) for part in unique]
  read = dict(zip(unique, tensors.read_parts(name, indexes)))
  arrays = []
  for shape, placement, parts in plans:
    local = [jax.device_put(read[part], device) for device, part in parts.items()]
    arrays.append(local[0] if placement is None else jax.make_array_from_single_device_arrays(shape, placement, local))
  return arrays


def finish(raw, source, placement, dtype):
  """The parameter from what `fetch` gave, which is used up."""
  is_packed = len(raw) > 1
  if not is_packed and not source.transpose and raw[0].dtype == dtype:
    return raw[0]
  array = _finisher(is_packed, source.transpose, dtype, placement)(*raw)
  _free(array, raw)
  return array


def store(stack, slot, array):
  """`stack`, used up, with `array`, used up, at `slot` of axis 0."""
  stack = _store(stack, slot, array)
  _free(stack, [array])
  return stack


def zeros(shape, dtype, placement):
  """A stack for `store`."""
  return jnp.zeros(shape, dtype, device=placement)


def published(array, slot, transpose):
  """A parameter, or `array[slot]` of a stack, as numpy in the published layout."""
  # A new array in any case: jax would keep the host's copy as long as the parameter.
  return np.asarray(_take(array, slot, transpose))


@functools.partial(jax.jit, static_argnums=2)
def _take(array, slot, transpose):
  if slot is not None:
    array = jax.lax.dynamic_index_in_dim(array, slot, keepdims=False)
  return jnp.swapaxes(array, -1, -2) if transpose else array


# Apart from `finish`: in one program, XLA on CPU turns and copies element by element, which takes 18 times as long.
@functools.partial(jax.jit, donate_argnums=0)
def _store(stack, slot, array):
  # As integers: a bfloat16 update goes through float32 on CPU, and a signalling NaN would lose its bit.
  plain = jnp.dtype(f'uint{8 * stack.dtype.itemsize}')
  bits = [jax.lax.bitcast_convert_type(x, plain) for x in (stack, array)]
  return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_index_in_dim(*bits, slot, 0), stack.dtype)


def _free(result, used):
  """Waits for the result, so that only one tensor is under way, and frees what it was made from."""
  result.block_until_ready()
  for array in used:
    array.delete()


@functools.cache  # so that all layers of all loads share a compilation
def _finisher(is_packed, transpose, dtype, placement):
  options = {} if placement is None else {'out_shardings': placement}
  return jax.jit(lambda *raw: _ours(raw, is_packed, transpose).astype(dtype), **options)


def _ours(raw, is_packed, transpose):
  # The blocks of a [N, in, out] tensor are in the order [N, out, in].
  x = jnp.swapaxes(unpack(*raw), -1, -2) if is_packed else raw[0]
  return jnp.swapaxes(x, -1, -2) if transpose else x


def unpack(blocks, scales):
  """Values of a tensor in MXFP4.

      x[..., 32 g + 2 i + j] = e2m1(4-bit half j of blocks[..., g, i], the low one first) 2^(scales[..., g] - 127)

  e2m1 is a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Results
  below 2^-126 may be zero.

  Args:
    blocks: [..., G, 16] uint8.
    scales: [..., G] uint8; 255 gives infinities and NaN.

  Returns:
    [..., 32 G] bfloat16, exact.

  Source: OCP Microscaling Formats (MX) Specification 1.0.
  """
  table = jnp.asarray([*_E2M1, *(-x for x in _E2M1)], jnp.float32)
  values = table[jnp.stack([blocks & 15, blocks >> 4], axis=-1).astype(jnp.int32)]
  # The bits of a power of two: its exponent, without the mantissa. The lowest one, 2^-127, has no exponent.
  bits = jnp.where(scales == 0, 1 << 22, scales.astype(jnp.int32) << 23)
  factor = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return (values * factor[..., None, None]).astype(jnp.bfloat16).reshape(*scales.shape[:-1], -1)
