"""train.compile_report: figures against counts by hand, what it says of programs that do not fit, and its command."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import seven_b
from models import size
from models.config import DecoderConfig
from tests.train.compile_report.test_aot import needs_libtpu
from train import config as configs
from train.compile_report import advice, facts as gathered, page
from train.config import Config, DataConfig, MeshConfig, TrainConfig, UserError

ROOT = pathlib.Path(__file__).parents[3]
WIDTH, VOCAB, DEPTH, T, B = 64, 512, 3, 64, 8


def small(**mesh):
  """A config of a scanned model for four devices."""
  model = DecoderConfig(
    vocab=VOCAB, width=WIDTH, depth=DEPTH, heads=4, kv_heads=2, mlp_width=128, tied_embeddings=False, scan=True
  )
  return configs.load(Config(model=model, data=DataConfig(seq_len=T, batch=B), mesh=MeshConfig(**mesh)))


@functools.cache
def four_devices():
  return gathered.gather(small(data=1, fsdp=4), 'cpu:4')


WEIGHTS = DEPTH * (2 * WIDTH * WIDTH + 2 * WIDTH * 32 + 3 * WIDTH * 128) + WIDTH * VOCAB  # of products


def test_bytes_of_a_device():
  memory, scales = four_devices()['memory'], (2 * DEPTH + 1) * WIDTH
  # All but the scales of norms is cut into four; Adam has two numbers for each, and its counters.
  assert memory['parameters'] == 4 * ((WEIGHTS + VOCAB * WIDTH) / 4 + scales)
  assert 0 <= memory['optimizer'] - 2 * memory['parameters'] <= 64
  batch = 5 * 4 * B * T / 4
  assert memory['arguments'] == pytest.approx(3 * memory['parameters'] + batch, abs=128)
  assert memory['needed'] == sum(memory[name] for name in ('arguments', 'output', 'temporary', 'code'))
  assert memory['temporary'] > 0 and memory['output'] < 4096, 'the state takes the place of the old one'
  assert four_devices()['fits'] and memory['capacity'] == 16 * 2**30


def test_flops_of_a_device():
  flops, tokens = four_devices()['flops'], B * T / 4
  # Forward once and backward twice; attention in one tile, hidden pairs too: two products forward, five backward.
  assert flops['compiled'] == 6 * WEIGHTS * tokens + 7 * 2 * T * WIDTH * DEPTH * tokens
  assert flops['model'] == 3 * size.flops_per_token(small().model, T) * tokens
  assert (flops['attention'], flops['open']) == (0, 0)
  assert flops['cost_analysis'] < 0.7 * flops['compiled'], 'which has each layer once'


def test_collectives_of_a_device():
  found = four_devices()['collectives']
  assert {axes for one in found for axes in one['axes']} == {'fsdp'}
  assert all(one['open_loops'] == 0 for one in found)
  assert sum(one['times'] % DEPTH == 0 for one in found) >= 2, 'those of layers are done in every layer'


def test_page():
  text = page.page(four_devices(), ['Do this.'])
  assert 'on cpu:4: 4 devices (data 1, fsdp 4, context 1, tensor 1)' in text
  for words in (r'arguments: parameters +173\.\d\d KiB', r'all-\w+ +fsdp', 'not a measurement', '  - Do this.'):
    assert re.search(words, text), words
  assert 'left out: links' in text and 'DOES NOT FIT' not in text


@pytest.mark.parametrize(
  'mesh, topology, words',
  [
    ({'data': 1, 'fsdp': 2}, 'cpu:4', r'product of all 4 devices of cpu:4, got 2'),
    ({'data': 1, 'fsdp': 8}, 'cpu:4', r'at most 4 devices, got 8'),
    ({'data': 3}, 'cpu:3', r'data.batch=8: expected a multiple'),
    ({}, 'cpu:99', r'has 8 CPU devices'),
  ],
)
def test_settings_that_do_not_fit(mesh, topology, words):
  with pytest.raises(UserError, match=words):
    gathered.gather(small(**mesh), topology)


def test_teachers_are_refused():
  config = small()
  config.distill.teacher = 'runs/first'
  with pytest.raises(UserError, match=r"distill.teacher='runs/first': expected"):
    gathered.gather(config, 'cpu:4')


@pytest.mark.parametrize(
  'message, needed, usable',
  [
    ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.50G of 15.75G hbm.', 20.5 * 2**30, 15.75 * 2**30),
    (
      'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
      'temporaries (32.00G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org',
      32 * 2**30,
      15.75 * 2**30,
    ),
    ('RESOURCE_EXHAUSTED: Used 900.0M of 64.0M hbm. Exceeded', 900 * 2**20, 64 * 2**20),
    ('RESOURCE_EXHAUSTED: something else', 0, 7),
  ],
)
def test_what_a_refusal_says(message, needed, usable):
  said = gathered._of_refusal(message, 7)
  assert (said['needed'], said['usable']) == (int(needed), int(usable))
  assert not said['refusal'].startswith(('RESOURCE', 'E1000')) and 'openxla' not in said['refusal']


def refused(**changes):
  """Facts of a program that does not fit: 9 GB of state and more, on 16 devices of 16 GB."""
  memory = {'parameters': 3e9, 'optimizer': 6e9, 'averages': 0, 'capacity': 16e9, 'needed': 20e9, 'usable': 15e9}
  memory |= {'refusal': 'too large', 'largest': [[4e9, 'bf16[2,4096]']]}
  mesh = {'data': 4, 'fsdp': 2, 'context': 1, 'tensor': 2}
  return {'fits': False, 'memory': memory, 'mesh': mesh, 'devices': 16, 'tokens': 8 * 4096, **changes}


def test_advice_where_it_does_not_fit():
  config = Config(model=DecoderConfig(vocab=65536, remat='none'), data=DataConfig(seq_len=4096, batch=16))
  said = ' '.join(advice.advise(refused(), config))
  for words in ('mesh.fsdp up', "model.remat='attention'", 'train.loss_chunk', 'train.accumulate=2', 'mesh.context=2'):
    assert words in said
  config = Config(
    model=DecoderConfig(vocab=256, remat='full'),
    data=DataConfig(seq_len=4096, batch=8),
    train=TrainConfig(loss_chunk=256),
  )
  said = advice.advise(refused(memory={**refused()['memory'], 'parameters': 1e9, 'optimizer': 2e9}), config)
  assert said == ['More parts of each row: mesh.context=2.'], 'nothing else is left to say'
  text = page.page(refused(parameters=1, topology='v5e:4x4', versions={}, compile_seconds=1.0), said)
  assert 'DOES NOT FIT: 18.63 GiB where 13.97 GiB are usable' in text
  assert '3.73 GiB  bf16[2,4096]' in text


def fitting(links, compute=1.0, memory=0.5, needed=12e9, collectives=()):
  """Facts of a program that fits, whose links are busy for so many seconds."""
  parts = {'compute': compute, 'memory': memory, 'links': sum(links.values())}
  return {
    'fits': True,
    'memory': {'needed': needed, 'capacity': 16e9},
    'mesh': {'data': 1, 'fsdp': 4, 'context': 1, 'tensor': 4},
    'devices': 16,
    'tokens': 8 * 4096,
    'times': {'compute': compute, 'memory': memory, 'links': links},
    'estimate': {'bound': max(parts, key=parts.get)},
    'collectives': list(collectives),
  }


def collective(kind, shape, axes, total=1.0):
  return {'kind': kind, 'shape': shape, 'axes': axes, 'total': total}


@pytest.mark.parametrize(
  'facts, words',
  [
    (fitting({'tensor': 2.0, 'fsdp': 1.0}), '2.000 s of the 3.000 s that links are busy go over tensor'),
    (fitting({'fsdp': 0.6}), 'weights are gathered'),
    (fitting({'fsdp': 0.1}), 'Nothing stands out.'),
    (fitting({}, memory=2.0), 'Main memory bounds'),
    (fitting({}, needed=1e9), "94% of the memory is free: model.remat='dots'"),
    (fitting({}, collectives=[collective('all-gather', 'f32[64,64]', ('fsdp',))]), 'gathered in float32'),
    (fitting({}, collectives=[collective('all-gather', 'bf16[8,4096,64]', ('context',))]), 'rows should stay cut'),
    (fitting({}, collectives=[collective('all-reduce', 'bf16[8,4096,64]', ('fsdp',))]), 'as if rows were not cut'),
    (fitting({}, collectives=[collective('all-reduce', 'bf16[2,4096,64]', ('fsdp',))]), 'Nothing stands out.'),
    (fitting({}, collectives=[collective('all-reduce', 'bf16[4096,64]', ('fsdp',))]), 'Nothing stands out.'),
  ],
)
def test_advice(facts, words):
  model = DecoderConfig(remat='attention', dtype='bfloat16')
  said = advice.advise(facts, Config(model=model, data=DataConfig(seq_len=4096, batch=8)))
  assert len(said) == 1 and words in said[0]


def run(*args, **changes):
  """The command in a process of its own."""
  env = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  command = [sys.executable, '-m', 'train.compile_report', *args]
  return subprocess.run(command, cwd=ROOT, env={**env, **changes}, capture_output=True, text=True)


SMALL = [
  '--config.model.width=128', '--config.model.heads=2', '--config.model.kv_heads=2', '--config.model.mlp_width=256',
  '--config.model.vocab=512', '--config.model.depth=2', '--config.data.seq_len=128', '--config.data.batch=4',
  '--config.train.loss_chunk=0', '--config.mesh.fsdp=2', '--config.mesh.context=1', '--config.mesh.tensor=2',
]  # fmt: skip


def test_command_on_bad_settings(tmp_path):
  done = run('--config=experiments/seven_b.py', '--topology=v5e:big')
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith("compile_report: --topology='v5e:big': expected chips")
  assert len(done.stderr.splitlines()) == 1


@needs_libtpu
def test_command_for_a_tpu(tmp_path):
  done = run('--config=experiments/seven_b.py', *SMALL, '--topology=v5e:2x2', f'--json={tmp_path}/facts.json')
  assert done.returncode == 0, done.stderr
  assert done.stderr == 'compiling for v5e:2x2: a minute or more for a large model\n'
  facts = json.loads((tmp_path / 'facts.json').read_text(encoding='utf-8'))
  assert (facts['chip'], facts['devices'], facts['fits']) == ('v5e', 4, True)
  assert set(facts['times']['links']) >= {'fsdp', 'tensor'}
  # Rows are cut, so weights travel: gathered in bfloat16, layer by layer, and nothing in float32.
  gathers = [one for one in facts['collectives'] if one['kind'] == 'all-gather' and one['axes'] == ['fsdp']]
  assert any(one['shape'].startswith('bf16') and one['times'] % 2 == 0 for one in gathers)
  assert not any(one['shape'].startswith('f32') for one in gathers)
  assert not any('as if rows were not cut' in line for line in facts['suggestions'])
  sums = [one for one in facts['collectives'] if one['kind'] == 'all-reduce' and one['axes'] == ['fsdp']]
  assert not any(one['shape'].startswith(('bf16[4,128', 'f32[4,128')) for one in sums), 'activations of all rows'
  for words in ('v5e:2x2: 4 devices', 'Memory, of 16.00 GiB', 'tokens/s', 'Suggestions'):
    assert words in done.stdout


@pytest.mark.long
@needs_libtpu
def test_command_where_it_does_not_fit():
  one = ['--config.mesh.fsdp=1', '--config.mesh.tensor=1', '--config.data.batch=1', '--config.model.depth=1']
  done = run('--config=experiments/seven_b.py', *SMALL, *one, '--config.model.vocab=8388608', '--topology=v5e:1x1')
  assert done.returncode == 3, done.stderr
  assert re.search(r'DOES NOT FIT: [\d.]+ GiB where 15\.75 GiB are usable', done.stdout)


CRASH = """#!/bin/sh
echo 'F0000 compiler.cc:1] Check failed: it fits' >&2
kill -ABRT $$
"""


def test_a_compiler_that_aborts(tmp_path):
  python = tmp_path / 'python'
  python.write_text(CRASH, encoding='utf-8')
  python.chmod(0o755)
  code = f"""
import sys
from absl import app
from train.compile_report import __main__ as command
sys.executable = {str(python)!r}
app.run(command.main, ['x', '--config=experiments/seven_b.py', '--topology=v5e:2x2'], command._parse)
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
  assert done.returncode == 1
  assert 'compile_report: the compiler ended by signal 6' in done.stderr and 'Check failed: it fits' in done.stderr


@pytest.mark.long
@needs_libtpu
@pytest.mark.parametrize(
  'topology, flags',
  [('v5e:16x16', []), ('v5p:8x8x8', [f'--config.mesh.{axis}=8' for axis in ('fsdp', 'context', 'tensor')])],
)
def test_seven_billion_parameters(topology, flags, tmp_path):
  """The whole pod: minutes of one core, 2 GB of memory."""
  done = run('--config=experiments/seven_b.py', f'--topology={topology}', *flags, f'--json={tmp_path}/facts.json')
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / 'facts.json').read_text(encoding='utf-8'))
  memory = facts['memory']
  assert facts['fits'] and memory['needed'] < 0.5 * memory['capacity']
  assert facts['tokens'] == 2**19 and 7e9 < facts['parameters'] < 7.5e9
  depth = seven_b.get_config().model.depth
  for one in facts['collectives']:
    heavy = one['total'] > 1e8
    assert not (heavy and one['kind'] == 'all-gather' and one['shape'].startswith('f32')), one
    assert not (heavy and one['kind'] == 'all-gather' and 'context' in one['axes']), one
  layered = [one for one in facts['collectives'] if one['times'] % depth == 0]
  assert sum(one['total'] for one in layered) > 0.8 * sum(one['total'] for one in facts['collectives'])
