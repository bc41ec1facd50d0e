"""models.adapters: low-rank adapters change nothing at first, learn alone, and merge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import adapters, hf, sharding, state
from models.config import LayerSpec
from models.decoder import Decoder
from models.generate import generate
from tests.models import oracle, small

ON = {'adapter_rank': 3, 'adapter_alpha': 6.0}
EVERY = {**ON, 'adapter_match': r'.*\.(mixer\.[qkvo]|mlp\.(gate|up|down))'}
LOCAL = [LayerSpec(window=4), LayerSpec()]


def products(jaxpr):
  """The shapes of the results of all matrix products of a jaxpr, at any depth."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield equation.outvars[0].aval.shape
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from products(inner)


def started(config, impl='unsafe_rbg'):
  """{path: array} of a new model. The usual keys (threefry2x32) take long to compile."""
  return jax.jit(lambda: state.split(Decoder(config, rngs=nnx.Rngs(jax.random.key(0, impl=impl))))[1])()


@pytest.mark.parametrize('scan', [False, True])
def test_starts_as_the_base_model_bit_for_bit(scan):
  base = small.config(depth=4 if scan else 1, scan=scan, tied_embeddings=False, attn_bias='qkv')
  config = dataclasses.replace(base, **{**EVERY, 'adapter_match': EVERY['adapter_match'] + '|head'})
  old, new = started(base), started(config)
  for path in old:
    np.testing.assert_array_equal(new[path], old[path], err_msg=path)
  added = {path: x.shape[-2:] for path, x in new.items() if path not in old}
  kernels = {path.removesuffix('kernel'): x.shape[-2:] for path, x in old.items() if path.endswith('kernel')}
  assert added == {
    name + end: shape for name, (E, F) in kernels.items() for end, shape in (('lora_a', (E, 3)), ('lora_b', (3, F)))
  }
  logits = [small.forward(state.merge(state.graph(x), y), small.tokens()) for x, y in ((base, old), (config, new))]
  np.testing.assert_array_equal(*logits)
  firsts = [np.asarray(x).reshape(-1)[:3] for path, x in new.items() if path.endswith('lora_a')]
  assert len({tuple(x) for x in firsts}) == len(firsts)  # no two from one key
  for path, x in new.items():
    if path.endswith('lora_a'):
      assert 0.6 < np.std(x) * x.shape[-2] ** 0.5 < 1.4


@pytest.mark.long
def test_both_forms_start_from_the_same_values():
  scanned = small.config(depth=2, scan=True, **ON)
  usual = 'threefry2x32'
  apart, config = state.unscanned(state.merge(state.graph(scanned), started(scanned, usual)), scanned)
  want = started(config, usual)
  for path, x in small.paths(apart).items():
    np.testing.assert_array_equal(x, want[path], err_msg=path)


def test_default_is_the_projections_of_mixers():
  added = [path for path in state.abstract_params(small.config(**ON)) if path.endswith('lora_a')]
  assert added == [f'blocks.{i}.mixer.{name}.lora_a' for i in range(2) for name in 'koqv']


@functools.cache
def adapted(scan=False):
  """A model whose adapters have learned something."""
  changes = {**EVERY, 'depth': 4 if scan else 2, 'layers': LOCAL, 'scan': scan, 'attn_bias': 'qkvo'}
  return small.model(1, **changes), small.config(**changes)


def test_matches_oracle():
  model, config = adapted()
  params = {path: np.asarray(x, np.float64) for path, x in small.paths(model).items()}
  for path in [path for path in params if path.endswith('lora_a')]:
    name = path.removesuffix('lora_a')
    params[name + 'kernel'] = params[name + 'kernel'] + 2 * params.pop(path) @ params.pop(name + 'lora_b')
  want = oracle.decoder(params, config, small.tokens())
  np.testing.assert_allclose(small.forward(model, small.tokens()), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('scan', [False, True])
def test_merged_is_the_same_model(scan):
  model, config = adapted(scan)
  before = small.paths(model)
  merged, its_config = adapters.merged(model, config)
  assert its_config == dataclasses.replace(config, adapter_rank=0, adapter_alpha=0.0, adapter_match='')
  assert state.split(merged)[0] == state.graph(its_config)  # no trace is left
  assert small.paths(model).keys() == before.keys()  # the first is as it was
  np.testing.assert_allclose(
    small.forward(merged, small.tokens()), small.forward(model, small.tokens()), rtol=2e-4, atol=2e-4
  )
  assert adapters.merged(merged, its_config)[0] is merged


def test_merged_is_rounded_once():
  config = small.config(param_dtype='bfloat16', **ON)
  model = small.model(2, param_dtype='bfloat16', **ON)
  params = small.paths(model)
  assert {str(x.dtype) for path, x in params.items() if 'lora' in path} == {'float32'}
  got = small.paths(adapters.merged(model, config)[0])
  for path, x in got.items():
    want = np.asarray(params[path], np.float32)
    if path.endswith(('q.kernel', 'k.kernel', 'v.kernel', 'o.kernel')):
      a, b = (np.asarray(params[path.replace('kernel', name)], np.float64) for name in adapters.NAMES)
      want = (want + 2 * a @ b).astype(np.float32)
    np.testing.assert_array_equal(x, jnp.asarray(want, jnp.bfloat16), err_msg=path)


def test_generation_through_the_cache():
  model, _ = adapted()
  tokens = small.tokens()
  cache = model.init_cache(batch=2, capacity=small.T)
  first, cache = small.extend(model, tokens[:, :8], None, cache)
  second, _ = small.extend(model, tokens[:, 8:], None, cache)
  want = small.forward(model, tokens)
  np.testing.assert_allclose(np.concatenate([first, second], axis=1), want, rtol=2e-4, atol=2e-4)


@pytest.mark.long
def test_generates_as_merged():
  model, config = adapted()
  texts = [generate(x, [[1, 2, 3]], 4).tokens for x in (model, adapters.merged(model, config)[0])]
  assert texts[0] == texts[1]


@pytest.mark.parametrize('remat', ['none', 'full'])
@pytest.mark.parametrize('scan', [False, True])
def test_frozen_weights_get_no_gradient(scan, remat):
  config = small.config(width=24, heads=4, mlp_width=40, depth=2, scan=scan, remat=remat, **EVERY)
  graph = state.graph(config)
  params = state.abstract_params(config)
  trained = {path: x for path, x in params.items() if path.endswith(adapters.NAMES)}
  frozen = {path: x for path, x in params.items() if path not in trained}

  def gradients(trained, frozen, tokens):
    loss = lambda trained: jnp.square(state.merge(graph, {**frozen, **trained})(tokens)).sum()
    return jax.grad(loss)(trained)

  shapes = list(products(jax.make_jaxpr(gradients)(trained, frozen, small.tokens()).jaxpr))
  kernels = {x.shape[-2:] for path, x in frozen.items() if path.endswith(('kernel', 'table'))}
  kernels |= {(b, a) for a, b in kernels}
  assert {(24, 3), (3, 24)} & set(shapes)  # those of the adapters are there
  assert not kernels & set(shapes)
  everything = list(
    products(jax.make_jaxpr(lambda *x: gradients({**x[0], **x[1]}, {}, x[2]))(trained, frozen, small.tokens()).jaxpr)
  )
  assert kernels & set(everything)  # and are seen, where they are


def test_frozen_weights_take_no_memory():
  config = small.config(width=128, heads=4, kv_heads=4, mlp_width=512, depth=1, **ON)
  graph = state.graph(config)
  params = state.abstract_params(config)

  def temporary(trained):
    frozen = {path: x for path, x in params.items() if path not in trained}
    loss = lambda trained, frozen: jnp.square(state.merge(graph, {**frozen, **trained})(small.tokens())).sum()
    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen).compile().memory_analysis()
    return compiled.temp_size_in_bytes + compiled.output_size_in_bytes

  all_bytes = sum(4 * x.size for x in params.values())
  of_adapters = temporary({path: x for path, x in params.items() if path.endswith(adapters.NAMES)})
  assert temporary(params) - of_adapters > 0.7 * all_bytes


def test_on_a_mesh():
  """Placed as their kernels are cut; each rule of models/sharding.py is used."""
  config = small.config(vocab=24, depth=1, tied_embeddings=False, experts=2, experts_per_token=1, **ON)
  config.adapter_match = r'.*\.mixer\.[qkvo]|head|.*\.router'
  dense = small.config(vocab=24, **EVERY)
  mesh = jax.make_mesh(
    (2, 2), ('fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
  )
  axes: dict = {}
  for one in (config, dense):
    shapes = state.abstract_params(one)
    axes |= {path: (*x.spec, None, None)[:2] for path, x in sharding.params_sharding(shapes, mesh).items()}
  names = [path.removesuffix('lora_a') for path in axes if path.endswith('lora_a')]
  assert len(names) == 16
  for name in names:
    one, other = axes[name + 'kernel']
    assert axes[name + 'lora_a'] == (one, None) and axes[name + 'lora_b'] == (None, other), name
  model = small.model(1, vocab=24, **EVERY)
  want = small.forward(model, small.tokens(4, 12))
  graph, params = state.split(model)
  params = jax.device_put(params, sharding.params_sharding(params, mesh))
  with jax.set_mesh(mesh):
    got = small.forward(state.merge(graph, params), small.tokens(4, 12))
    merged = adapters.merged(state.merge(graph, params), dense)[0]
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
  kernels = {path: x for path, x in small.paths(merged).items() if path.endswith('kernel')}
  assert all(x.sharding.is_equivalent_to(params[path].sharding, x.ndim) for path, x in kernels.items())


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'adapter_rank': -1}, 'model.adapter_rank=-1 must be an integer, 0 or more'),
    ({'adapter_rank': 2, 'adapter_alpha': -1.0}, r'model.adapter_alpha=-1.0 must be a finite number'),
    ({'adapter_alpha': 8.0}, 'model.adapter_alpha=8.0 has no effect with adapter_rank=0'),
    ({'adapter_match': 'head'}, "model.adapter_match='head' has no effect with adapter_rank=0"),
    ({'adapter_rank': 2, 'adapter_match': '('}, r"model.adapter_match='\(' must be a regular expression: missing \)"),
    ({'adapter_rank': 2, 'adapter_match': 'head'}, "adapter_match='head' matches no linear map, expected .*mlp.down"),
    (
      {'adapter_rank': 2, 'adapter_match': '.*', 'experts': 2, 'experts_per_token': 1},
      r'matches blocks.0.mlp.experts.\w+, a Stack of \(2, .*expected linear maps only',
    ),
    (
      {'adapter_rank': 2, 'adapter_match': r'blocks\.0\..*', 'scan': True},
      r'matches blocks.0.\S+ and not blocks.1.\S+, expected both or neither with scan=True',
    ),
  ],
)
def test_rejects(changes, words):
  with pytest.raises(ValueError, match=words):
    nnx.eval_shape(lambda: Decoder(small.config(**changes), rngs=nnx.Rngs(0)))


def test_some_layers_only():
  config = small.config(adapter_rank=2, adapter_match=r'blocks\.1\.mixer\.q')
  added = [path for path in state.abstract_params(config) if 'lora' in path]
  assert added == ['blocks.1.mixer.q.lora_a', 'blocks.1.mixer.q.lora_b']


@pytest.mark.parametrize('architecture', [None, 'LlamaForCausalLM'])
def test_checkpoints_refuse_adapters(architecture, tmp_path):
  model, config = adapted()
  with pytest.raises(ValueError, match=r'config.adapter_rank=3: .* expected models.adapters.merged'):
    hf.save(tmp_path / 'model', model, config, architecture=architecture)
  assert not (tmp_path / 'model').exists()
  hf.save(tmp_path / 'model', *adapters.merged(model, config))
  text = (tmp_path / 'model/config.json').read_text()
  (tmp_path / 'model/config.json').write_text(text.replace('"adapter_rank": 0', '"adapter_rank": 3'))
  with pytest.raises(ValueError, match=r'decoder.adapter_rank=3 \(expected 0'):
    hf.load(tmp_path / 'model')
