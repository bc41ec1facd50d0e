"""models.size against the parameters of real models, dense masks, and the compiler's count."""

import dataclasses

import jax
import numpy as np
import pytest

from models import decoder, size
from models.config import DecoderConfig, LayerSpec
from tests.models import small

SETTINGS = {
  'tied': {},
  'untied': {'tied_embeddings': False, 'attn_bias': 'qkvo', 'mlp_bias': True, 'sinks': True, 'qk_norm': 'head'},
  'scanned': {'scan': True, 'depth': 4, 'layers': small.HYBRID, 'mlp': 'relu2'},
}


@pytest.mark.parametrize('name', SETTINGS)
def test_parameters(name):
  params = small.paths(small.model(**SETTINGS[name]))
  assert size.parameters(small.config(**SETTINGS[name])) == sum(x.size for x in params.values())


def test_parameters_by_hand():
  attention, mlp, norms = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 24, 2 * 16
  assert size.parameters(small.config()) == 23 * 16 + 2 * (attention + mlp + norms) + 16


@pytest.mark.parametrize('T', [1, 7, 20])
def test_visible_pairs_match_the_masks(T):
  layers = [LayerSpec(), LayerSpec(window=3), LayerSpec(chunk=4), LayerSpec(window=3, chunk=5)]
  config = small.config(depth=4, layers=layers)
  want = [mask.sum() for mask in decoder.layer_masks(config, T)]
  assert [size.visible_pairs(spec, T) for spec in layers] == want


@pytest.mark.parametrize('name', SETTINGS)
def test_flops_near_the_compilers_count(name):
  """'reference' computes hidden pairs too, and the compiler counts norms, softmax and activations: within 15%."""
  T, B = 32, 2
  changes = SETTINGS[name] | {'width': 64, 'mlp_width': 192, 'vocab': 128, 'scan': False}
  config, model = small.config(**changes), small.model(**changes)
  compiled = jax.jit(lambda m, x: m(x)).lower(model, np.zeros((B, T), np.int32)).compile()
  got = size.flops_per_token(config, T)
  hidden_pairs = sum((~mask).sum() for mask in decoder.layer_masks(config, T))
  want = compiled.cost_analysis()['flops'] / (B * T) - 4 * 64 * hidden_pairs / T
  assert 0.85 * want < got < want


def test_window_costs_less_and_depth_costs_more():
  full, local = small.config(), small.config(layers=[LayerSpec(window=4)])
  assert size.flops_per_token(local, 64) < size.flops_per_token(full, 64) < size.flops_per_token(full, 128)
  assert size.flops_per_token(full, 4) == size.flops_per_token(local, 4)


def test_flops_of_a_step_by_hand():
  config = DecoderConfig(vocab=50, width=8, depth=1, heads=2, mlp='gelu', mlp_width=16)
  attention, mlp, output = 4 * 8 * 8, 2 * 8 * 16, 50 * 8
  pairs = 4 * 2 * 4 * (1 + 2 + 3) / 3
  forward = 2 * (attention + mlp + output) + pairs
  assert size.flops_per_token(config, 3) == forward
  assert size.step_flops_per_token(config, 3) == 3 * forward
  trained = [f'blocks.0.mlp.{name}.kernel' for name in ('up', 'down')]
  assert size.step_flops_per_token(config, 3, trained) == 3 * forward - 2 * (attention + output)
  adapted = dataclasses.replace(config, adapter_rank=2)
  assert size.flops_per_token(adapted, 3) == forward + 2 * 4 * (8 * 2 + 2 * 8)


def test_of_experts_those_count_that_are_used():
  one = DecoderConfig(vocab=50, width=8, depth=1, heads=2, mlp_width=16)
  more = dataclasses.replace(one, experts=4, experts_per_token=2)
  router, mlp = 8 * 4, 3 * 8 * 16
  assert size.flops_per_token(more, 3) == size.flops_per_token(one, 3) + 2 * (mlp + router)
