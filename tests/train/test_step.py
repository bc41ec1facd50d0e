"""train.loss and train.step: sums against numpy, packed documents against single ones, parts against whole batches."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import state as model_state
from models.config import DecoderConfig, LayerSpec
from train import data, loss, optimizer, state as states, step as steps
from train.config import OptimizerConfig
from train.corpus import File

TEXTS = [b'abcabc', b'xyzzy', b'hello world', b'0123456789']
FILES = [File(f'f{i}', f'f{i}', text) for i, text in enumerate(TEXTS)]
MODEL = DecoderConfig(vocab=260, width=16, depth=2, heads=2, layers=[LayerSpec(window=4), LayerSpec()])


@pytest.fixture(scope='module')
def model():
  return states.Decoder(MODEL, rngs=nnx.Rngs(0))


def test_cross_entropy_by_hand():
  logits = np.random.default_rng(0).normal(size=(2, 3, 300))
  targets = np.array([[5, 256, 7], [256, 0, 299]])
  weights = np.array([[1, 1, 0], [0, 1, 1]], np.float32)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  got = loss.cross_entropy(logits, targets, weights)
  np.testing.assert_allclose(got['nll'], nll[0, 0] + nll[0, 1] + nll[1, 1] + nll[1, 2], rtol=1e-6)
  np.testing.assert_allclose(got['byte_nll'], nll[0, 0] + nll[1, 1], rtol=1e-6)
  assert got['tokens'] == 4
  assert got['bytes'] == 2


def test_masked_targets_reach_neither_loss_nor_gradient():
  logits, targets, weights = np.zeros((1, 2, 4), np.float32), np.array([[1, 2]]), np.array([[1, 0]], np.float32)
  value, grad = jax.value_and_grad(lambda x: loss.cross_entropy(x, targets, weights)['nll'])(logits)
  np.testing.assert_allclose(value, np.log(4), rtol=1e-6)
  np.testing.assert_allclose(grad, [[[0.25, -0.75, 0.25, 0.25], [0, 0, 0, 0]]], rtol=1e-6)


def test_packed_documents_equal_single_ones(model):
  packed = data.Rows(FILES, 64, is_separator_target=False)
  alone = [data.Rows([file], 64, is_separator_target=False) for file in FILES]
  assert len(packed) == 1
  got = loss.of_model(model, packed(np.arange(1)))
  want = [loss.of_model(model, rows(np.arange(1))) for rows in alone]
  assert got['bytes'] == sum(float(x['bytes']) for x in want) == sum(map(len, TEXTS))
  np.testing.assert_allclose(got['nll'], sum(float(x['nll']) for x in want), rtol=1e-5)


@pytest.mark.parametrize('chunk', [1, 8])
def test_chunked_loss_is_the_same(model, chunk):
  graph, params = model_state.split(model)
  batch = data.Rows(FILES, 16)(np.arange(3))
  of = lambda params, chunk: loss.of_model(model_state.merge(graph, params), batch, chunk)['nll']
  both = jax.jit(jax.value_and_grad(of), static_argnums=1)
  (want, want_grad), (got, got_grad) = both(params, 0), both(params, chunk)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  for path in params:
    np.testing.assert_allclose(got_grad[path], want_grad[path], rtol=1e-4, atol=1e-4, err_msg=path)
  with pytest.raises(ValueError, match='chunk=5 must divide T=16'):
    of(params, 5)


def test_split_and_merge_are_inverse(model):
  graph, params = model_state.split(model)
  assert 'blocks.1.mixer.q.kernel' in params
  _, again = model_state.split(model_state.merge(graph, params))
  assert list(again) == list(params)
  assert all(np.array_equal(again[path], params[path]) for path in params)
  assert {path: x.shape for path, x in model_state.abstract_params(MODEL).items()} == {
    p: x.shape for p, x in params.items()
  }


def test_accumulation_equals_the_large_batch():
  config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule='constant')
  tx, schedule = optimizer.make(config, 10), optimizer.schedule(config, 10)
  init = states.initializer(MODEL, tx, 0)
  # Rows with different numbers of targets: a mean over means of parts would be something else.
  batch = data.Rows(FILES, 16, is_separator_target=False)(np.array([0, 1, 2, 9]))
  results = {}
  for accumulate in (1, 4):
    step = jax.jit(steps.trainer(model_state.graph(MODEL), tx, schedule, accumulate=accumulate))
    results[accumulate] = step(init(), batch)
  want, want_sums = results[1]
  assert want.step == 1
  got, sums = results[4]
  for name in want_sums:
    np.testing.assert_allclose(sums[name], want_sums[name], rtol=1e-5, err_msg=name)
  for (path, mine), theirs in zip(got.opt_state[1][0].mu.items(), want.opt_state[1][0].mu.values()):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7, err_msg=path)
