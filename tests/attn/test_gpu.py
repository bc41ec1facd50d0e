"""On a real GPU: exact attention and its gradients against the definition on the same machine's CPU in float64.

  python -m pytest -m gpu tests/attn/test_gpu.py
"""

import jax
import numpy as np
import pytest

from attn import masks, softmax

pytestmark = pytest.mark.gpu

# float32 products are tf32 on a GPU unless the precision says otherwise.
TOLERANCE = {('float32', 'highest'): 1e-5, ('float32', None): 5e-3, ('bfloat16', None): 3e-2}


@pytest.mark.parametrize('implementation', softmax.IMPLEMENTATIONS)
@pytest.mark.parametrize('dtype, precision', TOLERANCE)
def test_gpu_equals_float64(implementation, dtype, precision):
  gpu, cpu = jax.devices('gpu')[0], jax.devices('cpu')[0]
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((2, 300, h, 64)).astype(jax.numpy.dtype(dtype)) for h in (8, 2, 2))
  cotangents = rng.standard_normal(q.shape), rng.standard_normal(q.shape[:3])

  def results(q, k, v, cotangents, **options):
    attend = lambda *x: softmax.attend(*x, mask=masks.causal() & masks.window(99), return_residual=True, **options)
    out, back = jax.vjp(attend, q, k, v)
    return *out, *back(tuple(c.astype(o.dtype) for c, o in zip(cotangents, out)))

  with jax.enable_x64(True):
    inputs = jax.device_put([x.astype(np.float64) for x in (q, k, v)], cpu)
    want = results(*inputs, jax.device_put(cotangents, cpu), implementation='reference')
  inputs, pulled = jax.device_put((q, k, v), gpu), jax.device_put([c.astype(np.float32) for c in cotangents], gpu)
  got = jax.jit(lambda *x: results(*x, implementation=implementation, precision=precision))(*inputs, pulled)
  assert got[0].devices() == {gpu}
  for name, a, b in zip(('out', 'lse', 'dq', 'dk', 'dv'), got, want):
    a, b = np.asarray(a, np.float64), np.asarray(b)
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error < TOLERANCE[dtype, precision], f'{name} is off by {error:.1e} of its largest value'
