"""The highest FLOP/s of a device, for model FLOPs use."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 matrix FLOP/s of one jax device, by a part of its device_kind; the first match counts.
# TPU: cloud.google.com/tpu/docs, the page of each version (v4's two cores are one device). NVIDIA: the data sheets,
# SXM forms, without sparsity. Use of float32 or tf32 programs is given against the same figures.
BFLOAT16 = [
  ('TPU v4', 275e12),
  ('TPU v5 lite', 197e12),
  ('TPU v5e', 197e12),
  ('TPU v5p', 459e12),
  ('TPU v5', 459e12),
  ('TPU v6 lite', 918e12),
  ('TPU v6e', 918e12),
  ('TPU7x', 1153.5e12),  # one of the chip's two dies, 2307e12 together
  ('A100', 312e12),
  ('H100 PCIe', 756e12),
  ('H100', 989e12),
  ('H200', 989e12),
  ('GH200', 989e12),
  ('B200', 2250e12),
  ('L40S', 362e12),
  ('L40', 181e12),
  ('L4', 121e12),
  ('T4', 65e12),  # float16
]


def flops(mesh, given=0.0):
  """FLOP/s of all devices of a mesh together, and where the figure is from.

  Args:
    mesh: jax.sharding.Mesh.
    given: FLOP/s of one device (on CPU of the machine), or 0.

  Returns:
    (FLOP/s, 'given' | 'table' | 'measured'), or (0.0, 'unknown').
  """
  device = mesh.devices.flat[0]
  # The CPU devices of a process share its cores.
  count = jax.process_count() if device.platform == 'cpu' else mesh.size
  if given:
    return given * count, 'given'
  if device.platform == 'cpu':
    return measure(device) * count, 'measured'
  known = [figure for part, figure in BFLOAT16 if part in device.device_kind]
  return (known[0] * count, 'table') if known else (0.0, 'unknown')


def measure(device, n=1024, seconds=0.15):
  """FLOP/s of a float32 matrix product [n, n] x [n, n], the best of several."""
  x = jax.device_put(jnp.ones((n, n), jnp.float32), device)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  best, start = float('inf'), time.perf_counter()
  while time.perf_counter() - start < seconds:
    before = time.perf_counter()
    jax.block_until_ready(product(x, x))
    best = min(best, time.perf_counter() - before)
  return 2 * n**3 / best
