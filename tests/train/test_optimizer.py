"""train.optimizer: the learning rate at single steps, and one step of AdamW by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from train import optimizer
from train.config import OptimizerConfig

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


@pytest.mark.parametrize('clip', [0.0, 1.0])
def test_one_step_by_hand(clip):
  config = OptimizerConfig(
    learning_rate=0.1, schedule='constant', warmup_steps=0, eps=0.5, weight_decay=0.2, clip_norm=clip
  )
  params = {'blocks.0.mlp.up.kernel': jnp.ones((1, 1)), 'norm.scale': jnp.ones((1,)), 'embed.table': jnp.ones((1, 1))}
  grads = {name: jnp.full_like(x, g) for (name, x), g in zip(params.items(), (2.0, -4.0, 4.0))}
  tx = optimizer.make(config, 10)
  updates, _ = tx.update(grads, tx.init(params), params)
  for name, g in zip(params, (2.0, -4.0, 4.0)):
    g = g / 6.0 if clip else g
    decay = 0.0 if name == 'norm.scale' else 0.2
    np.testing.assert_allclose(updates[name].ravel()[0], -0.1 * (g / (abs(g) + 0.5) + decay), rtol=1e-5)


def test_stacked_scales_do_not_decay():
  config = OptimizerConfig(learning_rate=0.1, schedule='constant', warmup_steps=0)
  params = {'blocks.0.mixer_norm.scale': jnp.ones((3, 2)), 'blocks.0.mixer.q.bias': jnp.ones((3, 2))}
  tx = optimizer.make(config, 10)
  updates, _ = tx.update({name: jnp.zeros_like(x) for name, x in params.items()}, tx.init(params), params)
  assert all(not np.any(x) for x in updates.values())
