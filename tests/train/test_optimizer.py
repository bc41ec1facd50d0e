"""train.optimizer: the learning rate at single steps; AdamW and Muon against numpy float64; groups; what is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib

from models.config import DecoderConfig, LayerSpec
from train import optimizer, sharding
from train.config import GroupConfig, MeshConfig, OptimizerConfig, UserError

COMMON = {'learning_rate': 2.0, 'warmup_steps': 4, 'final_fraction': 0.1, 'decay_fraction': 0.25}


@pytest.mark.parametrize(
  'name, steps, values',
  [
    ('constant', 20, {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 19: 2.0}),
    ('wsd', 20, {0: 0.5, 3: 2.0, 4: 2.0, 15: 2.0, 16: 2.0 - 0.36, 19: 2.0 - 4 * 0.36, 20: 0.2, 30: 0.2}),
    ('cosine', 20, {0: 0.5, 3: 2.0, 4: 2.0, 12: 1.1, 20: 0.2}),
    ('wsd', 4, {0: 0.5, 3: 2.0}),
    ('cosine', 2, {0: 0.5, 1: 1.0}),
  ],
)
def test_schedule(name, steps, values):
  schedule = optimizer.schedule(OptimizerConfig(schedule=name, **COMMON), steps)
  for step, want in values.items():
    np.testing.assert_allclose(schedule(step), want, rtol=1e-6, err_msg=f'step {step}')


@pytest.mark.parametrize('name', ['constant', 'wsd', 'cosine'])
def test_without_warmup_the_first_step_has_the_full_rate(name):
  schedule = optimizer.schedule(OptimizerConfig(schedule=name, **{**COMMON, 'warmup_steps': 0}), 8)
  np.testing.assert_allclose(schedule(0), 2.0)


def test_wsd_without_decay_is_constant():
  schedule = optimizer.schedule(OptimizerConfig(schedule='wsd', **{**COMMON, 'decay_fraction': 0.0}), 20)
  np.testing.assert_allclose([schedule(i) for i in (4, 19)], 2.0)


SHAPES = {
  'embed.table': (5, 4),
  'blocks.0.mixer.q.kernel': (4, 6),
  'blocks.0.mixer.q.lora_a': (4, 2),
  'blocks.0.mixer.sinks': (2,),
  'blocks.0.mixer_norm.scale': (3, 4),  # of scanned layers
  'blocks.0.mlp.up.bias': (3, 6),
  'blocks.0.mlp.down.kernel': (3, 6, 4),
  'blocks.1.mlp.experts.up.kernel': (2, 3, 4, 4),  # and of experts
  'norm.scale': (4,),
  'head.kernel': (4, 5),
}
BY_MUON = ['blocks.0.mixer.q.kernel', 'blocks.0.mlp.down.kernel', 'blocks.1.mlp.experts.up.kernel']
ADAPTER = 'blocks.0.mixer.q.lora_a'
DECAYED = ['embed.table', 'head.kernel', ADAPTER, *BY_MUON]
CONFIG = OptimizerConfig(
  learning_rate=0.05, schedule='cosine', warmup_steps=2, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, momentum=0.7
)
GROUPS = [
  GroupConfig(match=r'.*\.mixer\..*', rate=0.5, decay=3.0),
  GroupConfig(match=r'.*\.(experts\.up|mixer\.q)\.kernel', method='adamw', decay=0.0),
  GroupConfig(match=r'head\.kernel', method='muon', rate=2.0),
]
STEPS = 6


def arrays(seed=0, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  return {path: rng.normal(size=shape) for path, shape in shapes.items()}


def shapes(dtype=jnp.float32):
  return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SHAPES.items()}


def rate(n):
  """Of CONFIG at step n of STEPS."""
  return 0.05 * ((n + 1) / 2 if n < 2 else (1 + np.cos(np.pi * (n - 2) / (STEPS - 2))) / 2)


def newton_schulz(x):
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
  return x


def oracle(params, grads, muon, decays, rates, config=CONFIG):
  """Parameters after each step; one parameter, and one matrix of it, at a time."""
  m, v = ({path: np.zeros_like(x) for path, x in params.items()} for _ in range(2))
  after = []
  for n, g in enumerate(grads):
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    new = {}
    for path, p in params.items():
      x = g[path] * min(1, config.clip_norm / norm) if config.clip_norm else g[path]
      if path in muon:
        b, t = config.momentum, n + 1
        m[path] = b * m[path] + (1 - b) * x
        ahead = b * m[path] / (1 - b ** (t + 1)) + (1 - b) * x / (1 - b**t)
        u = np.zeros_like(p)
        for i in np.ndindex(p.shape[:-2]):
          u[i] = newton_schulz(ahead[i]) * 0.2 * np.sqrt(max(p.shape[-2:]))
      else:
        m[path] = config.b1 * m[path] + (1 - config.b1) * x
        v[path] = config.b2 * v[path] + (1 - config.b2) * x**2
        m_hat, v_hat = m[path] / (1 - config.b1 ** (n + 1)), v[path] / (1 - config.b2 ** (n + 1))
        u = m_hat / (np.sqrt(v_hat) + config.eps)
      new[path] = p - rate(n) * rates.get(path, 1) * (u + config.weight_decay * decays.get(path, 0) * p)
    params = new
    after.append(params)
  return after


CASES = {
  'adamw': ({}, [], dict.fromkeys(DECAYED, 1.0), {}),
  'adamw, no clipping': ({'clip_norm': 0.0}, [], dict.fromkeys(DECAYED, 1.0), {}),
  'muon': ({'method': 'muon'}, BY_MUON, dict.fromkeys(DECAYED, 1.0), {}),
  'muon, groups': (
    {'method': 'muon', 'groups': GROUPS},
    ['blocks.0.mixer.q.kernel', 'blocks.0.mlp.down.kernel', 'head.kernel'],
    dict.fromkeys(['embed.table', 'blocks.0.mlp.down.kernel', 'head.kernel'], 1.0)
    | dict.fromkeys(['blocks.0.mixer.q.kernel', ADAPTER], 3.0),
    {path: 0.5 for path in SHAPES if '.mixer.' in path} | {'head.kernel': 2.0},
  ),
  'adamw, muon in a group': (
    {'groups': GROUPS[2:]},
    ['head.kernel'],
    dict.fromkeys(DECAYED, 1.0),
    {'head.kernel': 2.0},
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_matches_oracle(name):
  # Not 1e-10: optax computes learning rates and corrections of bias in float32, whatever the parameters are.
  changes, muon, decays, rates = CASES[name]
  config = dataclasses.replace(CONFIG, **changes)
  start, grads = arrays(), [arrays(seed) for seed in range(1, STEPS + 1)]
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, start)
    tx = optimizer.make(config, STEPS, params)
    state, step = tx.init(params), jax.jit(tx.update)
    for g, want in zip(grads, oracle(start, grads, muon, decays, rates, config)):
      updates, state = step(g, state, params)
      params = optax.apply_updates(params, updates)
      for path in SHAPES:
        np.testing.assert_allclose(params[path], want[path], rtol=1e-6, atol=1e-7, err_msg=path)


def test_muon_brings_singular_values_near_one_and_the_scale_of_adamw():
  config = OptimizerConfig(method='muon', learning_rate=1.0, warmup_steps=0, schedule='constant', weight_decay=0.0)
  params = {'blocks.0.mlp.up.kernel': jnp.zeros((2, 16, 64))}
  grads = {
    path: jnp.asarray(x, jnp.float32) for path, x in arrays(shapes={'blocks.0.mlp.up.kernel': (2, 16, 64)}).items()
  }
  grads['blocks.0.mlp.up.kernel'] *= jnp.array([1e-3, 1.0])[:, None, None]  # one of the two is much smaller
  tx = optimizer.make(config, 1, params)
  update = np.asarray(tx.update(grads, tx.init(params), params)[0]['blocks.0.mlp.up.kernel'])
  values = np.linalg.svd(update, compute_uv=False) / (0.2 * 8)
  assert (values > 0.6).all() and (values < 1.3).all()
  np.testing.assert_allclose(np.sqrt(np.mean(update**2, axis=(1, 2))), 0.2, rtol=0.15)


@functools.cache
def on_mesh(**axes):
  """(updates, state) of the second of two steps, with everything placed by the rules."""
  config = dataclasses.replace(CONFIG, method='muon')
  names = {'embed.table': (8, 8), 'blocks.0.mixer.q.kernel': (3, 8, 16), 'blocks.0.mlp.experts.down.kernel': (2, 16, 8)}
  mesh = sharding.make_mesh(MeshConfig(data=1, **axes))
  params, *grads = [{path: np.float32(x) for path, x in arrays(seed, names).items()} for seed in range(3)]
  tx, placed = optimizer.make(config, STEPS, params), sharding.params_sharding(params, mesh)
  whole = sharding.like_params(jax.eval_shape(tx.init, params), placed, mesh)
  update = jax.jit(tx.update, in_shardings=(placed, whole, placed), out_shardings=(placed, whole), donate_argnums=1)
  state = jax.device_put(jax.tree.map(jnp.array, tx.init(params)), whole)
  for g in grads:
    updates, state = update(g, state, params)
  return updates, state


@pytest.mark.parametrize('axes', [{'fsdp': 4, 'tensor': 2}])
def test_sharded_equals_one_device(axes):
  want, got = on_mesh(), on_mesh(**axes)
  muon = next(x for x in jax.tree.leaves(got, is_leaf=is_muon) if is_muon(x))
  assert muon.mu['blocks.0.mixer.q.kernel'].sharding.spec == P(None, 'fsdp', 'tensor')
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def is_muon(x):
  return isinstance(x, contrib.MuonState)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_state_lies_with_its_parameters_and_survives_a_checkpoint(dtype, tmp_path):
  config = dataclasses.replace(CONFIG, method='muon', groups=GROUPS)
  params = {path: jnp.asarray(x, dtype) for path, x in arrays().items()}
  tx = optimizer.make(config, STEPS, shapes(dtype))
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    path = next((key.key for key in keys if getattr(key, 'key', None) in SHAPES), None)
    assert leaf.shape == (SHAPES[path] if path else leaf.shape) and (path or leaf.size <= 3), keys
    assert not path or leaf.dtype == jnp.float32, keys
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / 'state', state)
    saver.wait_until_finished()
    again = saver.restore(tmp_path / 'state', jax.eval_shape(tx.init, params))
  assert jax.tree.structure(again) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_plans():
  config = OptimizerConfig(
    method='muon', groups=[GroupConfig(match=r'.*mixer.*', rate=0.5), GroupConfig(match='.*', decay=2.0)]
  )
  got = optimizer.plans(config, shapes())
  assert list(got) == list(SHAPES)
  assert {path for path, plan in got.items() if plan.method == 'muon'} == set(BY_MUON)
  assert {path: plan.decay for path, plan in got.items() if plan.decay} == {
    **dict.fromkeys(DECAYED, 2.0),
    BY_MUON[0]: 1.0,
    ADAPTER: 1.0,
  }
  assert {path for path, plan in got.items() if plan.rate == 0.5} == {path for path in SHAPES if 'mixer' in path}


@pytest.mark.parametrize(
  'groups, words',
  [
    ([GroupConfig(match='(')], r"groups\[0\].match='\(': expected a regular expression \(missing"),
    (
      [GroupConfig(match='kernel')],
      r"groups\[0\].match='kernel' matches no trainable parameter: .* such as embed.table",
    ),
    (
      [GroupConfig(match='.*'), GroupConfig(match='head.*')],
      r"groups\[1\].*'head.\*' matches no .* earlier group leaves",
    ),
    ([GroupConfig(match='head.*'), GroupConfig(match='.*', method='muon')], r'groups\[1\].method.*sinks \(2,\) is no'),
    ([GroupConfig(match=r'.*_norm\.scale', method='muon')], r'mixer_norm.scale \(3, 4\) is no matrix'),
    (
      [GroupConfig(match='head.*', decay=0.0), GroupConfig(match=r'.*\.(bias|scale)', decay=2.0)],
      r'groups\[1\].decay=2.0 has no effect on blocks.0.mixer_norm.scale',
    ),
  ],
)
def test_groups_reject(groups, words):
  with pytest.raises(UserError, match=words):
    optimizer.make(OptimizerConfig(groups=groups), 10, shapes())


def test_trainable():
  of = lambda expression, rank=0: optimizer.trainable(
    OptimizerConfig(trainable=expression), DecoderConfig(adapter_rank=rank), iter(SHAPES)
  )
  assert of('') == list(SHAPES)
  assert of('', rank=2) == ['blocks.0.mixer.q.lora_a']
  assert of(r'head\.kernel|.*norm.scale|.*_a', rank=2) == [
    ADAPTER, 'blocks.0.mixer_norm.scale', 'norm.scale', 'head.kernel'
  ]  # fmt: skip
  with pytest.raises(UserError, match=r"trainable='head.*' matches no adapter, such as blocks.0.mixer.q.lora_a"):
    of(r'head\.kernel', rank=2)
  for wrong, words in [('head', "trainable='head' matches no"), ('*', r"'\*': expected a regular expression")]:
    with pytest.raises(UserError, match=words):
      of(wrong)


SCANNED = DecoderConfig(depth=4, layers=[LayerSpec(window=4), LayerSpec()], scan=True)
STACKS = {f'blocks.{i}.mixer.{name}.kernel': (2, 4, 4) for i in range(2) for name in 'qk'} | {'norm.scale': (4,)}


def test_layers_of_scanned_models_are_numbered_as_layers():
  of = lambda expression: optimizer.trainable(OptimizerConfig(trainable=expression), SCANNED, STACKS)
  assert of(r'blocks\.[02]\..*|norm.scale') == ['blocks.0.mixer.q.kernel', 'blocks.0.mixer.k.kernel', 'norm.scale']
  assert of(r'blocks\.\d\.mixer\.q.*') == ['blocks.0.mixer.q.kernel', 'blocks.1.mixer.q.kernel']
  for expression, here, there in [(r'blocks\.0\..*', 0, 2), (r'blocks\.[123]\..*', 2, 0)]:
    with pytest.raises(UserError) as caught:
      of(expression)
    said = f'matches blocks.{here}.mixer.q.kernel and not blocks.{there}.mixer.q.kernel'
    assert str(caught.value).startswith(f'optimizer.trainable={expression!r} {said}: expected both or neither')
  with pytest.raises(UserError, match=r"trainable='blocks.4.\*' matches no"):
    of('blocks.4.*')

  params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in STACKS.items()}
  plans = lambda *matches: optimizer.plans(
    OptimizerConfig(groups=[GroupConfig(match=match, rate=0.5) for match in matches]), params, SCANNED
  )
  found = plans(r'blocks\.[13]\..*')
  assert {path for path, plan in found.items() if plan.rate == 0.5} == {p for p in STACKS if p.startswith('blocks.1')}
  with pytest.raises(UserError, match=r'groups\[1\].match=.* matches blocks.2.mixer.k.kernel and not blocks.0.mixer.k'):
    plans(r'.*\.q\.kernel', r'blocks\.2\..*')


def test_muon_leaves_routers_to_adamw():
  names = ['mlp.router.kernel', 'mlp.experts.up.kernel', 'mixer.q.kernel']
  params = {f'blocks.0.{name}': jax.ShapeDtypeStruct((4, 4), jnp.float32) for name in names}
  found = optimizer.plans(OptimizerConfig(method='muon'), params)
  assert [plan.method for plan in found.values()] == ['adamw', 'muon', 'muon']


def test_only_matrices_decay():
  """Scales of scanned layers are stacked into matrices: they do not decay for that."""
  tx = optimizer.make(OptimizerConfig(learning_rate=0.1, schedule='constant', warmup_steps=0), 10, shapes())
  params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
  of = jax.jit(lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0])
  for path, update in of(params).items():
    np.testing.assert_allclose(update, -0.01 if path in DECAYED else 0.0, rtol=1e-6, err_msg=path)
