"""models.size against the parameters of real models, dense masks, and the compiler's count."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from models import decoder, size, state as model_state
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
  # Own gradients of both; of what they are multiplied with, those of `down` and of the output.
  assert size.step_flops_per_token(config, 3, trained) == forward + 2 * mlp + mlp + 2 * output
  assert size.step_flops_per_token(config, 3, ['norm.scale']) == forward + 2 * output
  assert size.step_flops_per_token(config, 3, ['embed.table']) == 3 * forward - 2 * (attention + mlp)
  assert size.step_flops_per_token(config, 3, []) == forward
  mixer = 2 * attention + pairs
  assert size.mixer_flops_per_token(config, 3, [0], ['blocks.0.mixer.o.kernel']) == mixer + attention // 2
  assert size.mixer_flops_per_token(config, 3, [0], trained) == mixer
  # All but what reaches below q, k and v, for which nothing is trained.
  assert size.mixer_flops_per_token(config, 3, [0]) == 3 * mixer - 2 * 3 * 8 * 8
  adapted = dataclasses.replace(config, adapter_rank=2)
  assert size.flops_per_token(adapted, 3) == forward + 2 * 4 * (8 * 2 + 2 * 8)


@pytest.mark.parametrize(
  'match, changes',
  [
    pytest.param('.*', {}, marks=pytest.mark.long),
    pytest.param('head.*', {}, marks=pytest.mark.long),
    pytest.param(r'embed\.table', {}, marks=pytest.mark.long),
    pytest.param(r'blocks\.3\..*', {}, marks=pytest.mark.long),
    (r'blocks\.1\.mlp\.down\.kernel', {}),
    (r'.*\.o\.kernel|norm\.scale', {'scan': True}),
    (r'.*\.lora_.', {'adapter_rank': 16}),
  ],
)
def test_flops_of_a_step_near_the_compilers_count(match, changes):
  """Of what is left of a gradient when all that nobody needs is gone; scanned layers are compiled apart."""
  T, B = 8, 4
  common = {'width': 64, 'depth': 4, 'mlp_width': 192, 'vocab': 128, 'tied_embeddings': False, 'mlp': 'relu2'}
  config = small.config(**common, **changes)
  apart = dataclasses.replace(config, scan=False)
  graph, shapes = model_state.graph(apart), model_state.abstract_params(apart)
  trained = {path: x for path, x in shapes.items() if re.fullmatch(match, path)}

  def of(trained, frozen, x):
    return model_state.merge(graph, {**frozen, **trained})(x).mean()

  tokens = jax.ShapeDtypeStruct((B, T), np.int32)
  frozen = {path: x for path, x in shapes.items() if path not in trained}
  compiled = jax.jit(jax.grad(of)).lower(trained, frozen, tokens).compile()
  mine = [path for path in model_state.abstract_params(config) if re.fullmatch(match, path)]
  got, want = size.step_flops_per_token(config, T, mine), compiled.cost_analysis()['flops'] / (B * T)
  assert 0.87 * want < got < 1.03 * want, got / want


def test_of_experts_those_count_that_are_used():
  one = DecoderConfig(vocab=50, width=8, depth=1, heads=2, mlp_width=16)
  more = dataclasses.replace(one, experts=4, experts_per_token=2)
  router, mlp = 8 * 4, 3 * 8 * 16
  assert size.flops_per_token(more, 3) == size.flops_per_token(one, 3) + 2 * (mlp + router)
