"""Low-rank adapters: small matrices beside the linear maps of a decoder, trained in place of their weights.

    y = x W + b + (alpha / rank) (x A) B        A [in, rank] random, B [rank, out] zero

DecoderConfig.adapter_rank, adapter_alpha and adapter_match say which linear maps have one. A decoder with adapters
starts as the same decoder without: same seed, same parameters, same logits. `merged` puts them into the weights.

Source: arXiv:2106.09685 (LoRA).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers

NAMES = ('lora_a', 'lora_b')  # last parts of the paths of their parameters

FIRST_KEY = 1 << 16  # beyond what layers.Keys gives to other parameters


def attach(module, places, config, key):
  """Adds adapters to those linear maps of a part of a decoder that config.adapter_match matches.

  Args:
    module: nnx.Module, its parameters made.
    places: paths of the module in the unscanned decoder: one, or those of all layers that a scan stacks.
    config: DecoderConfig.
    key: random key of the module, whose other parameters are as they would be without adapters.

  Raises:
    ValueError: the expression tells layers of one stack apart, or matches a stack of experts.
  """
  if not config.adapter_rank:
    return
  for i, (below, part) in enumerate(nnx.iter_modules(module)):
    paths = ['.'.join(map(str, (place, *below))) for place in places]
    found = [path for path in paths if config.has_adapter(path)]
    kernel = getattr(part, 'kernel', None)
    if not found or not isinstance(kernel, nnx.Param):
      continue
    said = f'adapter_match={config.adapter_match!r} matches {found[0]}'
    if not isinstance(part, layers.Linear):
      raise ValueError(f'{said}, a {type(part).__name__} of {kernel.shape}, expected linear maps only')
    if len(found) < len(paths):
      other = next(path for path in paths if path not in found)
      raise ValueError(f'{said} and not {other}, expected both or neither with scan=True, or scan=False')
    own_key = jax.random.fold_in(key, FIRST_KEY + i)
    part.add_adapter(config.adapter_rank, config.adapter_alpha or config.adapter_rank, own_key)


def check(model, config):
  """ValueError if a decoder that should have adapters has none."""
  if not any(linear.lora_a is not None for linear in _linears(model)):
    kernels = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if path[-1] == 'kernel']
    names = dict.fromkeys('.'.join(map(str, path[:-1])) for path in kernels)
    raise ValueError(
      f'adapter_match={config.adapter_match!r} matches no linear map, expected one or more of {", ".join(names)}'
    )


def merged(model, config):
  """A decoder whose adapters are part of its weights: W + (alpha / rank) A B, in float32, rounded once.

  Args:
    model: Decoder of `config`, its parameters anywhere.
    config: DecoderConfig.

  Returns:
    (Decoder, DecoderConfig without adapters). Parameters that have no adapter are the same arrays; a model without
    adapters is returned.
  """
  if not config.adapter_rank:
    return model, config
  model = nnx.clone(model)
  for linear in _linears(model):
    if linear.lora_a is None:
      continue
    linear.kernel = nnx.Param(_sum(linear.kernel[...], linear.lora_a[...], linear.lora_b[...], linear.adapter_scale))
    linear.drop_adapter()
  return model, dataclasses.replace(config, adapter_rank=0, adapter_alpha=0.0, adapter_match='')


@jax.jit
def _sum(kernel, a, b, scale):
  """[..., in, out], [..., in, rank], [..., rank, out]: with an axis in front where layers are stacked."""
  change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  return (kernel.astype(change.dtype) + scale * change).astype(kernel.dtype)


def _linears(model):
  return [part for _, part in nnx.iter_modules(model) if isinstance(part, layers.Linear)]
