"""The benchmark runs, with sizes at which its figures mean nothing, and stores what it says."""

import json

import jax.numpy as jnp
import pytest

from experiments import bench_core, readme, timing


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bench')
  (folder / 'experiments/results').mkdir(parents=True)
  out = folder / 'experiments/results/bench_core.json'
  for part in ('attention', 'loop', 'import'):
    assert bench_core.main(['--tiny', f'--only={part}', f'--out={out}']) == 0
  return folder, json.loads(out.read_text())


def test_every_part_says_where_and_when(stored):
  assert set(stored[1]) == {'attention', 'loop', 'import'}
  for part in stored[1].values():
    assert part['is_tiny'] and part['device'] and part['date'] and part['versions']['jax']


def test_attention_gives_the_same_result(stored):
  attention = stored[1]['attention']
  assert {(row['B'], row['T'], row['pass']) for row in attention['times']} == {
    (*shape, name) for shape in bench_core.TINY.shapes for name in ('forward', 'forward+backward')
  }
  assert all(row['relative_difference'] < 1e-5 and row['ratio'] > 0 for row in attention['times'])
  assert all(len(row['first_bytes']) == len(row['T']) for row in attention['memory'])


def test_loop_is_timed_without_its_first_steps(stored):
  loop = stored[1]['loop']
  assert loop['first_s'] > 0 and loop['second_s'] > 0
  assert len(loop['rounds']) == bench_core.TINY.loop_rounds


def test_step_without_torch_is_left_out_with_a_message(monkeypatch, capsys):
  monkeypatch.setitem(__import__('sys').modules, 'torch', None)
  assert bench_core.step(bench_core.TINY) is None
  assert 'PyTorch is not installed' in capsys.readouterr().out


def test_step_of_jax_learns():
  _, params, step = bench_core.jax_step(bench_core.TINY)
  tokens = jnp.zeros((2, 16), jnp.int32)
  losses = [step(tokens, tokens) for _ in range(4)]
  assert losses == sorted(losses, reverse=True)
  assert params['embed.table'].shape == (288, 32)


def test_figures_of_the_readme_are_made_from_it(stored):
  text = readme.figures(stored[0])
  assert "attention, B = 1, T = 16, forward, time over jax.nn's" in text
  assert '`import attn`' in text and 'Measured: `make bench` on ' in text


def test_in_turns_alternates_and_compares():
  calls = []
  result = timing.in_turns(lambda: calls.append('a'), lambda: calls.append('b'), seconds=0.0, least=3)
  assert ''.join(calls) == 'ab' + 'ab' + 'ba' + 'ab'
  assert result['pairs'] == 3
  assert result['ratio_low'] <= result['ratio'] <= result['ratio_high']
