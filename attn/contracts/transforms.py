"""Contracts on what JAX does with a method: jit, vmap, remat, low precision, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attn.contracts.registry import Broken, contract
from attn.contracts.trial import all_close, compiled, trial


@contract()
def jit(method):
  """Compiled and not, the results are the same."""
  t = trial(method)
  inputs = t.inputs(seed=18)
  with jax.enable_x64(True):
    plain = t.call({name: jnp.asarray(x) for name, x in inputs.items()})
    all_close(jax.jit(t.call)(inputs), plain, 'compiled against not compiled')


@contract()
def vmap(method):
  """Mapped over a new leading axis, each slice gives what it gives alone."""
  t = trial(method)
  each = [t.inputs(seed=seed) for seed in (19, 20)]
  with jax.enable_x64(True):
    together = compiled(jax.vmap(t.call))({name: np.stack([x[name] for x in each]) for name in each[0]})
  for i, inputs in enumerate(each):
    all_close({name: x[i] for name, x in together.items()}, t.run(inputs), f'of slice {i} under vmap')


@contract()
def remat(method):
  """Under jax.checkpoint the gradients are the same."""
  t = trial(method)
  inputs = t.inputs(seed=21)
  cotangents = t.cotangents(t.run(inputs))
  fixed = {name: x for name, x in inputs.items() if name not in t.floating}

  def loss(moving):
    results = jax.checkpoint(t.call)({name: moving.get(name, fixed.get(name)) for name in inputs})
    return sum(jnp.sum(cotangents[name] * x) for name, x in results.items())

  with jax.enable_x64(True):
    got = compiled(jax.grad(loss))({name: inputs[name] for name in t.floating})
  all_close(got, t.both(inputs, cotangents)[1], 'gradient under remat')


@contract()
def bfloat16(method):
  """bfloat16 inputs give bfloat16 outputs as near the oracle as the type allows; the log-sum-exp is float32."""
  t = trial(method)
  inputs = t.inputs(seed=22, dtype=jnp.bfloat16)
  want = method.oracle(**{name: np.asarray(x, np.float64) if name in t.floating else x for name, x in inputs.items()})
  got = t.run(inputs)
  if got['out'].dtype != jnp.bfloat16:
    raise Broken(f'out of bfloat16 inputs has dtype {got["out"].dtype}')
  if 'lse' in got and got['lse'].dtype != np.float32:
    raise Broken(f'lse of bfloat16 inputs has dtype {got["lse"].dtype}, expected float32')
  all_close(got, {name: want[name] for name in got if name in want}, 'of bfloat16 inputs', dtype='bfloat16')


@contract()
def sharded(method):
  """Sharded over batch and heads, results and gradients are those of one device (over the devices at hand)."""
  t = trial(method)
  data, tensor = (2 if jax.device_count() >= n else 1 for n in (2, 4))
  mesh = jax.make_mesh((data, tensor), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  on = {'B': ('data', data), 'H': ('tensor', tensor), 'K': ('tensor', tensor)}

  def place(x, axes):
    spec = [on[a][0] if a in on and x.shape[i] % on[a][1] == 0 else None for i, a in enumerate(axes)]
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  inputs = t.inputs(seed=23)
  want = t.run(inputs)
  cotangents = t.cotangents(want)
  with jax.enable_x64(True):
    placed = {name: place(x, method.inputs[name].axes) for name, x in inputs.items()}
    pulled = {name: place(x, 'BTHV'[: x.ndim]) for name, x in cotangents.items()}
  got, got_grads = t.both(placed, pulled)
  what = f'sharded over {data} x {tensor} devices'
  all_close(got, want, what)
  all_close(got_grads, t.both(inputs, cotangents)[1], f'gradient {what}', times=10)
