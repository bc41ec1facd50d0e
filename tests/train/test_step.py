"""train.step and train.program: parts against whole batches, frozen parameters, averages, steps that are left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import state as model_state
from models.config import DecoderConfig, LayerSpec
from models.decoder import Decoder
from tests.train import tiny
from train import config as configs, loss, program, sharding, state as states, step as steps

MODEL = DecoderConfig(vocab=260, width=16, depth=2, heads=2, layers=[LayerSpec(window=4), LayerSpec()])
PATHS = ['a', 'b']


def batch_of(rng, B=4, T=16):
  """Random tokens; rows have different numbers of targets, so that a mean over means of parts would be wrong."""
  weights = np.float32(np.arange(T) < rng.integers(2, T, (B, 1)))
  tokens = rng.integers(0, 256, (B, T + 1)).astype(np.int32)
  segments = np.cumsum(rng.random((B, T)) < 0.2, axis=1).astype(np.int32)
  return {
    'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': segments, 'weights': weights, 'bytes': weights,
  }  # fmt: skip


def toy(params, batch):
  """Sums of a loss whose gradient is plain: objective = sum over rows x of a x^2 + b x."""
  x = batch['x']
  return {'objective': (params['a'] * x**2 + params['b'] * x).sum(), 'tokens': jnp.float32(x.size)}


def toy_state(tx, trainable=PATHS, ema=False):
  params = {'a': jnp.float32(2), 'b': jnp.float32(-1)}
  trained = {path: params[path] for path in trainable}
  zero = jnp.zeros((), jnp.int32)
  return states.State(zero, params, tx.init(trained), dict(trained) if ema else {}, zero)


def test_gradient_is_of_the_mean_over_tokens():
  x, tx = np.array([[1.0, 2.0], [3.0, -1.0]], np.float32), optax.sgd(0.5)
  state, sums = steps.trainer(toy, tx, lambda n: 0.25 * n)(toy_state(tx), {'x': x})
  want = {'a': 2 - 0.5 * (x**2).mean(), 'b': -1 - 0.5 * x.mean()}
  assert {path: float(value) for path, value in state.params.items()} == pytest.approx(want)
  assert float(sums['grad_norm']) == pytest.approx(np.hypot((x**2).mean(), x.mean()))
  assert (int(state.step), int(sums['skipped']), float(sums['learning_rate'])) == (1, 0, 0.0)


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state():
  tx = optax.adam(0.1)
  step = steps.trainer(toy, tx, lambda n: 0.1, trainable=['b'])
  state = toy_state(tx, ['b'])
  new, _ = step(state, {'x': np.ones((2, 2), np.float32)})
  assert float(new.params['a']) == 2
  assert float(new.params['b']) != -1
  assert sorted(new.opt_state[0].mu) == ['b']


def test_average_follows_the_steps():
  tx = optax.sgd(0.5)
  step, state = steps.trainer(toy, tx, lambda n: 0.5, ema_decay=0.9), toy_state(tx, ema=True)
  mean = {path: np.float64(x) for path, x in state.ema.items()}
  for n in range(4):
    state, _ = step(state, {'x': np.float32([[n, 1.0]])})
    d = min(0.9, (1 + n) / (10 + n))
    mean = {path: d * mean[path] + (1 - d) * float(state.params[path]) for path in mean}
    assert {path: float(x) for path, x in state.averaged.items()} == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(bad):
  tx = optax.adam(0.1)
  step = jax.jit(steps.trainer(toy, tx, lambda n: n, ema_decay=0.5, may_skip=True))
  good, wrong = ({'x': np.float32([[x, 1.0]])} for x in (3.0, bad))
  one, _ = step(toy_state(tx, ema=True), good)
  two, sums = step(one, wrong)
  assert (int(two.step), int(two.skipped), int(sums['skipped'])) == (2, 1, 1)
  for mine, theirs in zip(jax.tree.leaves((two.params, two.opt_state, two.ema)), jax.tree.leaves(one[1:4])):
    assert np.array_equal(mine, theirs)
  three, sums = step(two, good)
  assert (int(three.step), int(three.skipped)) == (3, 1)
  # The step after it is the second of the optimizer, the average and the schedule.
  same, want = step(one, good)
  assert float(sums['learning_rate']) == float(want['learning_rate']) == 1
  assert all(float(three.averaged[path]) == float(same.averaged[path]) for path in PATHS)


def test_an_update_that_is_not_finite_is_left_out_too():
  tx = optax.sgd(3e38)
  step = steps.trainer(toy, tx, lambda n: n, may_skip=True)
  state, sums = step(toy_state(tx), {'x': np.float32([[3.0]])})
  assert np.isfinite(sums['grad_norm'])
  assert not sums['is_finite']
  assert (float(state.params['a']), int(state.skipped)) == (2, 1)


def test_without_leave_to_skip_nan_reaches_the_parameters():
  tx = optax.sgd(0.5)
  state, sums = steps.trainer(toy, tx, lambda n: n)(toy_state(tx), {'x': np.float32([[np.nan]])})
  assert np.isnan(state.params['a'])
  assert (bool(sums['is_finite']), int(sums['skipped'])) == (False, 0)


def made(**changes):
  config = tiny.config('nowhere', data={'batch': 4, 'seq_len': 16}, **changes)
  config = configs.load(dataclasses.replace(config, model=MODEL))
  return program.make(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))


def test_accumulation_equals_the_large_batch():
  batch = batch_of(np.random.default_rng(0))
  results = {}
  for accumulate in (1, 4):
    found = made(train={'accumulate': accumulate, 'z_loss': 1e-2})
    results[accumulate] = found.train_step(found.first_state(), batch)
  want, want_sums = results[1]
  got, sums = results[4]
  assert want.step == 1
  assert sums.keys() == want_sums.keys()
  for name in want_sums:
    np.testing.assert_allclose(sums[name], want_sums[name], rtol=1e-5, err_msg=name)
  assert len(jax.tree.leaves(got.opt_state)) > 20
  for mine, theirs in zip(jax.tree.leaves(got.opt_state), jax.tree.leaves(want.opt_state)):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7)


def test_program_places_what_it_is_given_and_trains_what_it_is_told():
  found = made(optimizer={'trainable': r'blocks\.1\..*'}, train={'ema_decay': 0.9})
  table = np.full((260, 16), 0.25, np.float32)
  state = found.first_state({'embed.table': jax.device_put(table, found.placed.params['embed.table'])})
  assert np.array_equal(state.params['embed.table'], table)
  assert sorted(state.ema) == sorted(found.trainable) == sorted(p for p in state.params if p.startswith('blocks.1.'))
  before = {path: np.asarray(x) for path, x in state.params.items()}
  batch = batch_of(np.random.default_rng(1))
  assert found.batch_shapes().keys() == batch.keys()
  assert all(shape.shape == batch[name].shape for name, shape in found.batch_shapes().items())
  after, _ = found.train_step(state, batch)
  changed = {path for path, x in after.params.items() if not np.array_equal(x, before[path])}
  assert changed == set(found.trainable)


def test_first_state_takes_the_place_of_what_it_is_given():
  found = made()
  table = jax.device_put(np.full((260, 16), 0.25, np.float32) + 0, found.placed.params['embed.table']) * 2
  assert np.all(found.first_state({'embed.table': table}).params['embed.table'] == 0.5)
  assert table.is_deleted()


@pytest.mark.parametrize(
  'model, words',
  [
    ({'adapter_match': 'nothing'}, "^model: adapter_match='nothing' matches no linear map, expected one or more of"),
    ({'adapter_match': r'.*\.0\.mixer\.q', 'scan': True, 'layers': [LayerSpec()]}, r'and not blocks\.1\.mixer\.q, exp'),
    ({'adapter_match': r'.*experts\..*', 'experts': 2, 'experts_per_token': 1}, 'expected linear maps only'),
    ({}, r"^train\.init_from='' with model\.adapter_rank=2: only adapters would be trained"),
  ],
)
def test_adapters_that_do_not_fit(model, words):
  config = tiny.config('nowhere', data={'batch': 4, 'seq_len': 16})
  config = configs.load(dataclasses.replace(config, model=dataclasses.replace(MODEL, adapter_rank=2, **model)))
  with pytest.raises(configs.UserError, match=words):
    program.make(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))


def test_split_and_merge_are_inverse():
  graph, params = model_state.split(Decoder(MODEL, rngs=nnx.Rngs(0)))
  assert 'blocks.1.mixer.q.kernel' in params
  _, again = model_state.split(model_state.merge(graph, params))
  assert list(again) == list(params)
  assert all(np.array_equal(again[path], params[path]) for path in params)
  shapes = {path: x.shape for path, x in model_state.abstract_params(MODEL).items()}
  assert shapes == {path: x.shape for path, x in params.items()}


def test_evaluation_is_the_loss():
  found = made()
  batch, state = batch_of(np.random.default_rng(2)), found.first_state()
  model = model_state.merge(found.graph, state.params)
  want = loss.of_model(model, batch)
  got = found.eval_step(state.averaged, batch)
  assert {name: float(x) for name, x in got.items()} == pytest.approx({n: float(x) for n, x in want.items()}, rel=1e-5)
