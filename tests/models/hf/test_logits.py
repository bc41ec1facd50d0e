"""models.hf against the published PyTorch classes: logits and greedy choices that cases/make.py stored.

The files hold no weights: those follow from the names of the tensors, by the function that make.py uses.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from models import hf, state
from models.generate import generate
from models.hf import architectures
from tests.models.hf.cases.make import value

CASES = pathlib.Path(__file__).parent / 'cases'
NAMES = sorted(path.stem for path in CASES.glob('*.json'))
SCANNED = ('llama2', 'gpt_oss_mxfp4', 'gemma2', 'phi3_long')  # models whose pattern of layers repeats
CHUNK = 8
# Other rotary frequencies and weights are no other way through the cache.
LONG = ('llama3', 'llama_linear', 'llama_tied', 'llama_yarn', 'phi3_short', 'gpt_oss_mxfp4', 'gemma3_images')

GENERATED = ('gemma3', 'gpt_oss', 'qwen2')  # one pass through the loop of models.generate is enough for `make test`


@functools.cache
def stored(name):
  """(config.json, {tensor: shape}, arrays) of a case."""
  record = json.loads((CASES / f'{name}.json').read_text())
  with np.load(CASES / f'{name}.npz', allow_pickle=False) as file:
    return record['config'], {key: tuple(shape) for key, (_, shape) in record['tensors'].items()}, dict(file)


@functools.cache
def load(name, scan=False):
  """The model of a case, loaded from a folder in the published form; attention by its definition."""
  config, shapes, arrays = stored(name)
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / 'config.json').write_text(json.dumps(config))
    tensors = {key: value(key, shape) for key, shape in shapes.items()}
    save_file(tensors, pathlib.Path(folder) / 'model.safetensors')
    loaded = hf.load(folder, scan=scan, length=arrays['tokens'].shape[1])
  config = dataclasses.replace(loaded.config, implementation='reference')
  return state.merge(state.graph(config), state.split(loaded.model)[1])


@jax.jit
def forward(model, tokens, positions):
  return model(tokens, positions)


@jax.jit
def extend(model, tokens, positions, cache):
  return model.extend(tokens, positions, cache)


def assert_same(got, arrays):
  """Logits of the stored text, within 1e-4 of the largest, at every token that is not padding."""
  expected, is_text = arrays['logits'], arrays['positions'] >= 0
  assert is_text.sum() == 63
  error = np.abs(np.asarray(got) - expected)[is_text].max() / np.abs(expected[is_text]).max()
  assert error <= 1e-4, f'logits are off by {error:.1e} of the largest'


@pytest.mark.parametrize('name', NAMES)
def test_shapes_of_tensors(name):
  config, shapes, _ = stored(name)
  packs = {key.removesuffix('_scales'): shape for key, shape in shapes.items() if key.endswith('_scales')}
  shapes = {key: shape for key, shape in shapes.items() if not key.endswith(('_scales', '_blocks'))}
  shapes = {key: shape for key, shape in shapes.items() if not key.startswith(('vision_tower', 'multi_modal'))}
  shapes |= {key: (N, 32 * width_in, width_out) for key, (N, width_out, width_in) in packs.items()}
  assert architectures.shapes(architectures.of(config), architectures.read_config(config)) == shapes


@pytest.mark.parametrize('name', NAMES)
def test_logits(name):
  """A text longer than the window and the length that rotary positions were made for; padding on either side."""
  arrays = stored(name)[-1]
  assert_same(forward(load(name), arrays['tokens'], arrays['positions']), arrays)


@pytest.mark.parametrize('name', [pytest.param(x, marks=[pytest.mark.long] * (x in LONG)) for x in NAMES])
def test_logits_through_the_cache(name):
  model, arrays = load(name), stored(name)[-1]
  (B, T), parts = arrays['tokens'].shape, []
  cache = model.init_cache(B, T)
  for start in range(0, T, CHUNK):
    piece = slice(start, start + CHUNK)
    out, cache = extend(model, arrays['tokens'][:, piece], arrays['positions'][:, piece], cache)
    parts.append(np.asarray(out))
  assert_same(np.concatenate(parts, axis=1), arrays)


@pytest.mark.parametrize('name', NAMES)
def test_greedy_choices(name):
  """Every token of the stored continuation is the best one after those before it."""
  arrays = stored(name)[-1]
  tokens = np.concatenate([arrays['prompts'], arrays['continuation']], axis=1)
  P, new = arrays['prompts'].shape[1], arrays['continuation'].shape[1]
  positions = np.arange(tokens.shape[1], dtype=np.int32) - (P - arrays['lengths'])[:, None]
  out = forward(load(name), tokens, np.maximum(positions, -1))
  best = np.asarray(out).argmax(axis=-1)[:, P - 1 : P - 1 + new]
  np.testing.assert_array_equal(best, arrays['continuation'])


@pytest.mark.parametrize('name', [pytest.param(x, marks=[pytest.mark.long] * (x not in GENERATED)) for x in NAMES])
def test_generation(name):
  """models.generate writes the stored continuation of ragged prompts."""
  arrays = stored(name)[-1]
  prompts = [row[len(row) - n :].tolist() for row, n in zip(arrays['prompts'], arrays['lengths'])]
  got = generate(load(name), prompts, arrays['continuation'].shape[1])
  assert [row[0] for row in got.tokens] == arrays['continuation'].tolist()


@pytest.mark.parametrize('name', [pytest.param(x, marks=[pytest.mark.long] * (x in SCANNED[2:])) for x in SCANNED])
def test_logits_of_scanned_layers(name):
  arrays = stored(name)[-1]
  model = load(name, scan=True)
  assert model.scan and len(model.blocks) < model.depth
  assert_same(forward(model, arrays['tokens'], arrays['positions']), arrays)


def test_cases_are_those_of_every_family():
  kinds = {stored(name)[0]['architectures'][0] for name in NAMES}
  assert kinds == set(architectures.ARCHITECTURES) - {'AttnloomForCausalLM'}
