"""train.distill: each loss against numpy float64, its limit cases, and what a student learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from models import sharding, state as model_state
from models.config import LayerSpec
from tests.models import small
from train import distill, loss, state as states, step as steps
from train.config import DistillConfig, UserError

B, T, V, E = 2, 6, 11, 5


def arrays(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def some_weights():
  weights = np.random.default_rng(9).uniform(0.2, 1.0, size=(B, T))
  weights[1, 3:] = 0
  return weights


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def kl(p, q):
  return float(np.sum(p * np.log(p / q)))


def outputs_oracle(student, teacher, weights, tau, divergence, share):
  total = 0.0
  for b, t in np.ndindex(B, T):
    p, q = softmax(teacher[b, t] / tau), softmax(student[b, t] / tau)
    m = share * p + (1 - share) * q
    found = {'forward': kl(p, q), 'reverse': kl(q, p), 'jensen': share * kl(p, m) + (1 - share) * kl(q, m)}
    total += weights[b, t] * tau**2 * found[divergence]
  return total


@pytest.mark.parametrize('tau', [1.0, 2.5])
@pytest.mark.parametrize('divergence, share', [('forward', 0.5), ('reverse', 0.5), ('jensen', 0.5), ('jensen', 0.1)])
def test_outputs_match_numpy(divergence, share, tau):
  student, teacher, weights = 2 * arrays(B, T, V), 2 * arrays(B, T, V, seed=1), some_weights()
  want = outputs_oracle(student, teacher, weights, tau, divergence, share)
  of = functools.partial(distill.outputs, temperature=tau, divergence=divergence, share=share)
  with jax.enable_x64(True):
    np.testing.assert_allclose(of(student, teacher, weights), want, rtol=1e-10)
    if tau != 1:
      check_grads(lambda x: of(x, teacher, weights), (student,), order=1, modes=['rev'])
  low = of(jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16), jnp.asarray(weights, jnp.float32))
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low, want, rtol=0.05)


@pytest.mark.parametrize('divergence', ['forward', 'reverse', 'jensen'])
def test_outputs_of_equals_are_zero(divergence):
  x = arrays(B, T, V).astype(np.float32)
  of = functools.partial(distill.outputs, teacher=jnp.asarray(x), weights=jnp.ones((B, T)), divergence=divergence)
  value, grad = jax.value_and_grad(of)(jnp.asarray(x) + 3)  # a shift of all logits changes no distribution
  assert abs(value) < 1e-5
  np.testing.assert_allclose(grad, 0, atol=1e-6)


@pytest.mark.parametrize('divergence, factor', [('forward', 0.5), ('reverse', 0.5), ('jensen', 0.125)])
def test_outputs_at_a_large_temperature_are_a_variance(divergence, factor):
  """tau^2 KL -> the variance of the difference of logits over the vocabulary, halved; Jensen a quarter of that."""
  student, teacher, weights = arrays(B, T, V), arrays(B, T, V, seed=1), some_weights()
  with jax.enable_x64(True):
    got = distill.outputs(student, teacher, weights, temperature=1e4, divergence=divergence)
  np.testing.assert_allclose(got, factor * np.sum(weights * (student - teacher).var(-1)), rtol=1e-3)


def test_hidden_states_match_numpy():
  student, teacher, weights = arrays(B, T, E), 3 * arrays(B, T, E, seed=1), some_weights()
  want = dict.fromkeys(('squared_error', 'relative_error', 'cosine_distance'), 0.0)
  for b, t in np.ndindex(B, T):
    x, y, w = student[b, t], teacher[b, t], weights[b, t]
    want['squared_error'] += w * sum((x - y) ** 2) / E
    want['relative_error'] += w * sum((x - y) ** 2) / sum(y**2)
    want['cosine_distance'] += w * (1 - x @ y / np.sqrt((x @ x) * (y @ y)))
  with jax.enable_x64(True):
    for name, value in want.items():
      of = getattr(distill, name)
      np.testing.assert_allclose(of(student, teacher, weights), value, rtol=1e-5, err_msg=name)
      np.testing.assert_allclose(of(teacher, teacher, weights), 0, atol=1e-9, err_msg=name)
      check_grads(lambda x, of=of: of(x, teacher, weights), (student,), order=1, modes=['rev'])
    np.testing.assert_allclose(distill.cosine_distance(7 * teacher, teacher, weights), 0, atol=1e-9)
    zero = jax.grad(lambda x: distill.cosine_distance(x, x, weights) + distill.relative_error(x, x, weights))
    assert np.isfinite(zero(np.zeros((B, T, E)))).all()


def test_attention_maps_match_numpy():
  H, rng = 3, np.random.default_rng(0)
  maps = []
  for _ in range(2):
    x = np.exp(rng.normal(size=(B, H, T, T))) * np.tril(np.ones((T, T)))
    maps.append(x / x.sum(-1, keepdims=True))
  (student, teacher), weights = maps, some_weights()
  want = 0.0
  for b, h, t in np.ndindex(B, H, T):
    want += weights[b, t] * kl(teacher[b, h, t, : t + 1], student[b, h, t, : t + 1]) / H
  with jax.enable_x64(True):
    np.testing.assert_allclose(distill.attention_maps(student, teacher, weights), want, rtol=1e-10)
    value, grad = jax.value_and_grad(distill.attention_maps)(student, teacher, weights)
  np.testing.assert_allclose(value, want)
  assert np.isfinite(grad).all()
  assert distill.attention_maps(teacher, teacher, weights) == 0


def test_tokens_without_weight_may_be_anything():
  x, y, weights = arrays(B, T, E), arrays(B, T, E, seed=1), some_weights()
  bad = np.where(weights[..., None] > 0, x, np.nan)
  for of in (distill.outputs, distill.squared_error, distill.relative_error, distill.cosine_distance):
    np.testing.assert_array_equal(of(bad, y, weights), of(x, y, weights))


@pytest.mark.parametrize(
  'depth, teacher_depth, want',
  [
    (4, 4, [0, 1, 2, 3]),
    (2, 4, [1, 3]),
    (4, 2, [0, 0, 1, 1]),
    (3, 8, [2, 5, 7]),
    (3, 2, [0, 1, 1]),
    (1, 5, [4]),
  ],
)
def test_layers_are_paired_by_depth(depth, teacher_depth, want):
  assert [distill.teacher_layer(i, depth, teacher_depth) for i in range(depth)] == want


STUDENT = {'depth': 2, 'layers': [LayerSpec(window=4), LayerSpec()]}
TEACHER = {'depth': 4, 'norms': 'both', 'tied_embeddings': False}
ALL = DistillConfig(labels=0.3, outputs=0.7, temperature=2.0, features=0.2, attention=0.4)
EACH = {'outputs': 1.0, 'features': 1.0, 'attention': 1.0}


def batch(rows=2):
  rng = np.random.default_rng(3)
  tokens = small.tokens(rows, 12)
  segment_ids = np.repeat([[0] * 7 + [1] * 5], rows, axis=0).astype(np.int32)
  weights = np.ones(tokens.shape, np.float32)
  weights[0, 6] = 0
  kinds = {'tokens': tokens, 'targets': rng.permutation(tokens), 'segment_ids': segment_ids, 'weights': weights}
  return {**kinds, 'bytes': np.ones(tokens.shape, np.float32)}


@functools.partial(jax.jit, static_argnames=('graphs', 'chunk', 'settings', 'z_loss'))
def _sums(graphs, params, batch, chunk, settings, z_loss):
  models = [model_state.merge(graph, one) for graph, one in zip(graphs, params)]
  return distill.of_models(*models, batch, chunk, DistillConfig(**dict(settings)), z_loss=z_loss)


def sums(student, teacher, chunk=0, settings=ALL, z_loss=0.0):
  graphs, params = zip(*(model_state.split(model) for model in (student, teacher)))
  fixed = tuple((field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings))
  return _sums(graphs, params, batch(), chunk, tuple((k, tuple(v) if k == 'layers' else v) for k, v in fixed), z_loss)


def by_hand(student, teacher):
  """The three losses layer by layer, without a scan."""
  logits, *found = _by_hand(student, teacher)
  w = batch()['weights']
  share = lambda x, y: np.mean((x - y) ** 2, -1) / np.mean(y**2, -1)
  mean = lambda losses: np.mean([np.sum(w * np.asarray(x)) for x in losses])
  features, attention = (jax.device_get(x) for x in found)
  return {
    'distill_outputs': distill.outputs(*logits, w, temperature=2.0),
    'distill_features': mean([share(x, y) for x, y in features]),
    'distill_attention': mean([np.mean((x - y) ** 2, -1) for x, y in attention]),
  }


@jax.jit
def _by_hand(student, teacher):
  """Logits, and for pairs of layers residual streams behind them and what their mixers make of the same inputs."""
  data = batch()
  rows = data['tokens'], None, data['segment_ids']
  seen = []
  for model in (student, teacher):
    x, layers = model.embed(rows[0]), []
    for block in model.blocks:
      inputs = block.mixer_input(x)
      mixed, _ = block.mixer.apply(inputs, None, segment_ids=rows[2])
      x, _ = block(x, None, None, rows[2])
      layers.append((inputs, mixed, x))
    seen.append(layers)
  pairs = [(0, 1), (1, 3)]
  features = [(seen[0][i][2], seen[1][j][2]) for i, j in pairs]
  mix = lambda i, inputs: student.blocks[i].mixer.apply(inputs, None, segment_ids=rows[2])[0]
  attention = [(mix(i, seen[1][j][0]), seen[1][j][1]) for i, j in pairs]
  return [model(*rows) for model in (student, teacher)], features, attention


@pytest.mark.parametrize('scan', [pytest.param(False, marks=pytest.mark.long), True])
def test_of_models_is_the_sum_of_its_parts(scan):
  flat = small.model(0, **STUDENT), small.model(1, **TEACHER)
  student, teacher = flat
  if scan:
    teacher = stacked(teacher)
    student = small.model(0, **STUDENT, scan=True, remat='full')
    given = {path: x[None] if path.startswith('blocks') else x for path, x in small.paths(flat[0]).items()}
    student = model_state.merge(model_state.split(student)[0], given)
  got = sums(student, teacher, z_loss=1e-2)
  want = {**loss.of_model(flat[0], batch(), z_loss=1e-2), **by_hand(*flat)}
  want['objective'] = 0.3 * want['nll'] + 1e-2 * want['z'] + 0.7 * want['distill_outputs']
  want['objective'] += 0.2 * want['distill_features'] + 0.4 * want['distill_attention']
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)


def stacked(model):
  """A scanned model of one with layers apart."""
  graph = model_state.graph(small.config(**TEACHER, scan=True))
  params, stacks = {}, {}
  for path, x in small.paths(model).items():
    name, _, rest = path.partition('.')
    if name == 'blocks':
      stacks.setdefault('blocks.0.' + rest.partition('.')[2], []).append(x)
    else:
      params[path] = x
  return model_state.merge(graph, {**params, **{path: jnp.stack(x) for path, x in stacks.items()}})


@pytest.mark.long
def test_chunks_change_nothing():
  """Also where the teacher is wider, which outputs alone do not mind."""
  models = small.model(0, **STUDENT), small.model(1, **{**TEACHER, 'width': 24, 'depth': 1})
  settings = DistillConfig(outputs=0.7)
  whole, cut = (sums(*models, chunk, settings) for chunk in (0, 4))
  assert 'distill_features' not in whole
  for name in whole:
    np.testing.assert_allclose(cut[name], whole[name], rtol=1e-5, err_msg=name)


@pytest.mark.long
def test_on_a_mesh():
  models = small.model(0, **STUDENT, vocab=24), small.model(1, **TEACHER, vocab=24)
  want = sums(*models)
  axes = {'axis_types': (jax.sharding.AxisType.Auto,) * 2, 'devices': jax.devices()[:4]}
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), **axes)
  placed = []
  for model in models:
    graph, params = model_state.split(model)
    placed.append(model_state.merge(graph, jax.device_put(params, sharding.params_sharding(params, mesh))))
  with jax.set_mesh(mesh):
    got = sums(*placed)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  'options, words',
  [
    ({'layers': [0, 2]}, r'layers=\[0, 2\]: expected numbers in 0 .. 1, got 2'),
    ({'layers': [0], 'kinds': ['mixed', 'weights']}, "'weights' is unknown, expected of inputs, mixed, outputs"),
  ],
)
def test_features_reject(options, words):
  with pytest.raises(ValueError, match=words):
    small.model(0, **STUDENT).features(small.tokens(), **options)


def gradient(settings, teacher_changes=TEACHER, chunk=0):
  """A function of (trained, teacher's parameters) for the gradient of the objective; the shapes of both."""
  configs = small.config(**STUDENT), small.config(**teacher_changes)
  graphs, params = [model_state.graph(x) for x in configs], [model_state.abstract_params(x) for x in configs]

  def objective(mine, theirs):
    models = [model_state.merge(graph, x) for graph, x in zip(graphs, (mine, theirs))]
    return distill.of_models(*models, batch(), chunk, settings)['objective']

  return objective, params


@pytest.mark.parametrize(
  'settings',
  [
    pytest.param(ALL, marks=pytest.mark.long),
    pytest.param(DistillConfig(outputs=0.0, features=1.0, layers=[0]), marks=pytest.mark.long),
    DistillConfig(labels=0.0, outputs=0.0, attention=1.0, layers=[1]),
  ],
)
def test_flops_near_the_compilers_count(settings):
  common = {'width': 64, 'heads': 4, 'mlp_width': 192, 'vocab': 128}
  student, teacher = small.config(**STUDENT, **common), small.config(**TEACHER, **common)
  graphs, params = zip(*((model_state.graph(x), model_state.abstract_params(x)) for x in (student, teacher)))

  def objective(mine, theirs):
    models = [model_state.merge(graph, x) for graph, x in zip(graphs, (mine, theirs))]
    found = distill.of_models(*models, batch(), 0, settings)
    return found['objective'], found['nll']

  compiled, tokens = jax.jit(jax.grad(objective, has_aux=True)).lower(*params).compile(), batch()['tokens']
  share = distill.flops_per_token(settings, student, teacher, tokens.shape[1]) * tokens.size
  assert 0.8 < share / compiled.cost_analysis()['flops'] < 1.03


def test_no_more_logits_than_a_chunk():
  objective, params = gradient(ALL, chunk=3)
  sizes = []

  def look(jaxpr):
    for equation in jaxpr.eqns:
      sizes.extend(x.aval.size for x in equation.outvars if x.aval.shape[-1:] == (small.VOCAB,) and x.aval.ndim > 2)
      for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else [value]:
          if hasattr(inner := getattr(inner, 'jaxpr', inner), 'eqns'):
            look(inner)

  look(jax.make_jaxpr(jax.grad(objective))(*params).jaxpr)
  assert sizes and max(sizes) <= 2 * 3 * small.VOCAB


def test_nothing_of_the_teachers_inside_is_kept():

  def kept(depth):
    objective, params = gradient(ALL, {**TEACHER, 'depth': depth})
    # What the backward pass needs from the forward pass.
    saved = jax.eval_shape(lambda mine, theirs: jax.vjp(lambda x: objective(x, theirs), mine)[1], *params)
    return sum(x.size for x in jax.tree.leaves(saved))

  assert kept(6) == kept(2) > 0


def test_student_that_is_its_teacher_has_nothing_to_learn():
  objective, _ = gradient(DistillConfig(labels=0.0, **EACH), STUDENT)
  params = model_state.split(small.model(0, **STUDENT))[1]
  value, grads = jax.jit(jax.value_and_grad(objective))(params, params)
  assert abs(value) < 1e-4
  for path, x in grads.items():
    np.testing.assert_allclose(x, 0, atol=1e-4, err_msg=path)


def test_attention_alone_trains_mixers_alone():
  objective, params = gradient(DistillConfig(labels=0.0, outputs=0.0, attention=1.0, layers=[1]))
  mine, theirs = (model_state.split(small.model(i, **x))[1] for i, x in enumerate((STUDENT, TEACHER)))
  grads = jax.jit(jax.grad(objective))(mine, theirs)
  moved = {path for path, x in grads.items() if np.any(x)}
  assert moved == {f'blocks.1.mixer.{name}.kernel' for name in 'qkvo'}
  # No backward pass through the rest: its only products with the vocabulary are those of the two forward passes.
  dots = str(jax.make_jaxpr(jax.grad(objective))(*params)).count('dot_general')
  everything = gradient(DistillConfig(labels=1.0, outputs=0.0, attention=1.0, layers=[1]))[0]
  assert dots < 0.8 * str(jax.make_jaxpr(jax.grad(everything))(*params)).count('dot_general')


@pytest.mark.long
def test_student_comes_nearer_to_its_teacher():
  """Through the step of train/step.py, with every loss on, accumulated over two parts."""
  configs = small.config(**STUDENT), small.config(**TEACHER)
  graphs = [model_state.graph(x) for x in configs]
  params, theirs = (model_state.split(small.model(i, **x))[1] for i, x in enumerate((STUDENT, TEACHER)))
  settings = DistillConfig(labels=0.0, outputs=1.0, features=0.5, attention=0.5)

  def sums_of(params, batch, theirs):
    student, teacher = (model_state.merge(graph, x) for graph, x in zip(graphs, (params, theirs)))
    return distill.of_models(student, teacher, batch, 6, settings)

  tx = optax.adam(1e-2)
  step = jax.jit(steps.trainer(sums_of, tx, lambda n: 1e-2, accumulate=2))
  state = states.State(jnp.int32(0), params, tx.init(params), {}, jnp.int32(0))
  seen = []
  for _ in range(40):
    state, found = step(state, batch(4), theirs)
    seen.append({name: float(found[f'distill_{name}']) for name in EACH})
  for name in EACH:
    assert seen[-1][name] < 0.7 * seen[0][name], (name, seen[0], seen[-1])


@pytest.mark.parametrize(
  'changes, settings, words',
  [
    ({'vocab': 24}, {}, "distill.teacher='t' has vocab=24: expected model.vocab=23, with the same tokens"),
    ({'width': 8}, {'features': 1.0}, 'width=8: expected model.width=16 with distill.features, or distill.features=0'),
    ({'width': 8}, {'attention': 1.0}, 'width=8: expected model.width=16 with distill.attention'),
    ({}, {'layers': [1]}, r'distill.layers=\[1\] has no effect with distill.features=0 and distill.attention=0'),
    ({}, {'layers': [1, 1], 'features': 1.0}, r'distill.layers=\[1, 1\]: expected each layer once'),
  ],
)
def test_check(changes, settings, words):
  with pytest.raises(UserError, match=words):
    distill.check(DistillConfig(teacher='t', **settings), small.config(), small.config(**changes))
  distill.check(DistillConfig(teacher='t'), small.config(), small.config(width=8))


@pytest.mark.parametrize('options', [{'divergence': 'backward'}, {'temperature': 0.0}, {'share': 1.0}])
def test_rejects(options):
  with pytest.raises(ValueError, match=f'{next(iter(options))}={next(iter(options.values()))!r}'):
    distill.outputs(arrays(B, T, V), arrays(B, T, V), some_weights(), **options)
