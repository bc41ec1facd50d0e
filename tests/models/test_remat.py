"""What the backward pass keeps of each layer, by model.remat and layers[i].remat: less memory, the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import state
from models.config import REMATS, LayerSpec
from tests.models import small

ORDER = ('full', 'attention', 'dots', 'none')
FULL_NONE = {'remat': 'none', 'layers': ('full', '')}
NONE_FULL = {'remat': 'full', 'layers': ('none', '')}


def traced(changes, T=64):
  """(objective of parameters, shapes of parameters) of four layers in a pattern of two."""
  changes = {'scan': False, 'remat': 'none', 'layers': ('', ''), **changes}
  changes['layers'] = [LayerSpec(remat=remat) for remat in changes['layers']]
  config = small.config(depth=4, width=32, mlp_width=96, vocab=8, implementation='xla', **changes)
  graph, shapes = state.graph(config), state.abstract_params(config)
  tokens = np.arange(2 * T).reshape(2, T) % 8
  return lambda params: jnp.square(state.merge(graph, params).hidden(tokens)).sum(), shapes


def kept(**changes):
  """Bytes that the forward pass leaves for the backward pass, parameters included."""
  of, shapes = traced(changes)
  residuals = jax.eval_shape(lambda params: jax.vjp(of, params)[1], shapes)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))


@pytest.mark.parametrize('scan', [False, True])
def test_less_is_kept(scan):
  full, attention, dots, none = (kept(scan=scan, remat=remat) for remat in ORDER)
  assert full < attention < dots < none and set(ORDER) == set(REMATS)
  # Attention alone: its output and its log-sum-exp.
  assert attention - full == 4 * 4 * (2 * 64 * 4) * (8 + 1)


@pytest.mark.parametrize('scan', [False, True])
def test_each_layer_has_its_own(scan):
  """Two layers of each kind lie in the middle; a layer's own setting goes before the model's."""
  full, none = (kept(scan=scan, remat=remat) for remat in ('full', 'none'))
  mixed = kept(scan=scan, **FULL_NONE)
  assert full < mixed < none
  np.testing.assert_allclose(mixed, (full + none) / 2, rtol=0.01)
  assert kept(scan=scan, **NONE_FULL) == mixed
  assert kept(scan=scan, remat='dots', layers=('full', 'full')) == full


@pytest.mark.long
def test_compiled_memory_of_scanned_layers():
  """Scanned alone: of layers one after the other, XLA's scheduler for CPUs computes again before it must."""

  def temporary(**changes):
    of, shapes = traced(changes)
    return jax.jit(jax.grad(of)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

  full, attention, dots, none = (temporary(scan=True, remat=remat) for remat in ORDER)
  assert full < attention < dots < none
  assert full < temporary(scan=True, **FULL_NONE) < none


def test_rejects():
  with pytest.raises(ValueError, match=r"layers\[1\].remat='some' must be one of '', 'none', 'full'"):
    small.config(layers=[LayerSpec(), LayerSpec(remat='some')]).validate()
