"""train.loop: a whole run, stopping and going on, and what it refuses."""

import copy
import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest

from models import state as model_state
from tests.train import tiny
from train import checkpoint, data, interrupt, loop, loss, metrics, program, workdir as workdirs
from train.config import GroupConfig, SourceConfig, UserError
from train.data import store
from train.data.corpus import HELD_OUT


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return tiny.write_corpus(tmp_path_factory.mktemp('corpus') / 'text')


@pytest.fixture(scope='module')
def whole(source, tmp_path_factory):
  """A run from start to end: (workdir, config, result)."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  config = tiny.config(source, eval={'every': 4}, log={'tensorboard': True})
  return workdir, config, loop.run(config, workdir)


def call_at(monkeypatch, step, action):
  """Makes the loop call `action` while it prepares step `step` (evaluation uses another batch size)."""
  calls = []
  real = data.to_global

  def to_global(local, arrays, batch, sharding):
    if batch == 8:
      calls.append(batch)
      if len(calls) == step:
        action()
    return real(local, arrays, batch, sharding)

  monkeypatch.setattr(data, 'to_global', to_global)


def corpus_of(config, workdir):
  return store.open_or_prepare(config.data, workdir, is_writer=False)


def test_run_leaves_what_it_says(whole, source):
  workdir, config, result = whole
  corpus = corpus_of(config, workdir)
  assert json.loads((workdir / 'result.json').read_text()) == result
  assert result['steps'] == 12
  assert result['held_out_bytes'] == corpus.size(HELD_OUT)
  assert 3 < result['held_out_bits_per_byte'] < 8
  assert result['mfu'] > 0
  record = json.loads((workdir / 'corpus.json').read_text())
  assert record['hash'] == result['corpus_hash'] == corpus.hash
  assert {file[1] for file in record['files']} == {'train', 'held_out'}
  assert json.loads((workdir / 'config.json').read_text())['config']['data']['source'] == source
  assert [(line['step'], line['steps']) for line in tiny.lines(workdir, 'train')] == [(5, 5), (10, 5), (12, 2)]
  evals = [(line['step'], line['is_all']) for line in tiny.lines(workdir, 'eval')]
  assert evals == [(4, False), (8, False), (12, True)]
  assert list((workdir / 'tb').iterdir())
  first, last = tiny.lines(workdir, 'train')[0], tiny.lines(workdir, 'train')[-1]
  assert last['bits_per_byte'] < first['bits_per_byte']
  assert abs(first['bits_per_byte'] - first['loss'] / math.log(2)) < 0.5


def test_finished_run_computes_nothing_again(whole, monkeypatch, capsys):
  workdir, config, result = whole
  monkeypatch.setattr(loop.store, 'open_or_prepare', lambda *_, **__: pytest.fail('read the corpus'))
  before = (workdir / 'metrics.jsonl').read_text()
  assert loop.run(config, workdir) == result
  assert 'finished' in capsys.readouterr().out
  assert (workdir / 'metrics.jsonl').read_text() == before


def test_another_stride_evaluates_a_finished_run_again(whole, tmp_path):
  workdir, config, result = whole
  shutil.copytree(workdir, tmp_path / 'run')
  changed = copy.deepcopy(config)
  changed.eval.stride = 4
  again = loop.run(changed, tmp_path / 'run')
  assert again['held_out_bytes'] == result['held_out_bytes']
  assert again['held_out_bits_per_byte'] != result['held_out_bits_per_byte']  # bytes have more before them
  shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  before = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  with pytest.raises(UserError, match='expected a checkpoint of its finished run, found none'):
    loop.run(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == before


def test_load_model(whole):
  workdir, config, result = whole
  loaded, model, step = checkpoint.load_model(str(workdir))
  assert (loaded, step) == (config, 12)
  rows = data.held_out_rows(corpus_of(config, workdir), config.data)
  sums = loss.of_model(model, rows(np.arange(len(rows))))
  np.testing.assert_allclose(metrics.bits(sums), result['held_out_bits_per_byte'], rtol=1e-5)
  with pytest.raises(UserError, match='expected a checkpoint of step 3'):
    checkpoint.load_model(workdir, step=3)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_same_command_continues(whole, source, tmp_path, monkeypatch, number):
  config = tiny.config(source, eval={'every': 4})
  with monkeypatch.context() as patched:
    call_at(patched, 7, lambda: signal.raise_signal(number))
    with pytest.raises(interrupt.Interrupted, match=f'{number.name} at step 7') as stop:
      loop.run(config, tmp_path / 'run')
  assert (stop.value.signal, stop.value.step) == (number, 7)
  assert signal.getsignal(number) == {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL)
  assert not (tmp_path / 'run' / 'result.json').exists()
  if number == signal.SIGTERM:  # once is enough for the rest
    return
  with open(tmp_path / 'run' / 'metrics.jsonl', 'a') as file:  # as if it had been killed later
    file.write('{"kind": "train", "step": 9}\n{"kind": "tr')
  result = loop.run(config, tmp_path / 'run')
  assert result['held_out_bits_per_byte'] == whole[2]['held_out_bits_per_byte']
  assert [(line['step'], line['steps']) for line in tiny.lines(tmp_path / 'run', 'train')] == [
    (5, 5), (7, 2), (10, 3), (12, 2),
  ]  # fmt: skip
  assert [line['bits_per_byte'] for line in tiny.lines(tmp_path / 'run', 'eval')] == [
    line['bits_per_byte'] for line in tiny.lines(whole[0], 'eval')
  ]
  want_step, want = tiny.saved(whole[0], config)
  step, got = tiny.saved(tmp_path / 'run', config)
  assert step == want_step == 12
  for mine, theirs in zip(got, want, strict=True):
    np.testing.assert_array_equal(mine, theirs)


def test_more_steps_continue_a_finished_run_and_time_saves(source, tmp_path):
  loop.run(tiny.config(source, train={'steps': 2}), tmp_path)
  config = tiny.config(source, train={'steps': 4}, checkpoint={'seconds': 1e-6, 'keep': 3})
  assert loop.run(config, tmp_path)['steps'] == 4
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['2', '3', '4']
  assert [line['step'] for line in tiny.lines(tmp_path, 'train')] == [2, 3, 4]
  with pytest.raises(UserError, match=r'train\.steps=3: expected at least the 4 steps'):
    loop.run(tiny.config(source, train={'steps': 3}), tmp_path)


@pytest.mark.parametrize('checkpoints', [0, 3])
def test_a_loss_that_is_not_finite_stops_the_run(source, tmp_path, monkeypatch, checkpoints):
  config = tiny.config(source, checkpoint={'every': checkpoints}, log={'every': 100})
  real = program.steps.trainer

  def trainer(*args, **options):  # the parameters become NaN in the fifth step
    def step(state, batch):
      state, sums = real(*args, **options)(state, batch)
      planted = {path: jax.numpy.where(state.step == 5, jax.numpy.nan, x) for path, x in state.params.items()}
      return state._replace(params=planted), sums

    return step

  monkeypatch.setattr(program.steps, 'trainer', trainer)
  with pytest.raises(loop.NotFinite, match=r'step 6: loss nan.*row \d+ \(p\d+/f\d.txt byte \d+\)') as error:
    loop.run(config, tmp_path)
  assert ('last checkpoint is of step 3' if checkpoints else 'no checkpoint was written') in str(error.value)
  assert [path.name for path in (tmp_path / 'checkpoints').glob('*')] == ['3'] * bool(checkpoints)
  (line,) = tiny.lines(tmp_path, 'not_finite')
  assert line['step'] == 6
  assert len(line['rows']) == 8
  assert not (tmp_path / 'result.json').exists()


def test_an_absurd_learning_rate_is_not_saved(source, tmp_path):
  config = tiny.config(source, optimizer={'learning_rate': 1e38, 'warmup_steps': 0}, checkpoint={'every': 1})
  with pytest.raises(loop.NotFinite, match=r'step [123]: '):
    loop.run(config, tmp_path)
  for path in (tmp_path / 'checkpoints').iterdir():
    _, model, _ = checkpoint.load_model(tmp_path, int(path.name))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(model_state.split(model)[1])))


def test_profile(source, tmp_path, capsys):
  loop.run(tiny.config(source, train={'profile_steps': 5}), tmp_path)
  assert 'profile of 3 steps' in capsys.readouterr().out
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_another_config_is_refused_by_name(whole, source):
  workdir, _, _ = whole
  before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
  config = tiny.config(source, seed=5, eval={'every': 3}, optimizer={'b2': 0.5})
  with pytest.raises(UserError, match=r'(?s)another config.*seed: 0 -> 5\n  optimizer.b2: 0.95 -> 0.5$'):
    loop.run(config, workdir)
  assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before


def test_files_that_are_not_a_run_are_refused(source, tmp_path):
  for name in 'abcde':
    (tmp_path / name).write_text(name)
  with pytest.raises(UserError, match='found a, b, c and 2 more; nothing was changed'):
    loop.run(tiny.config(source), tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == list('abcde')
  with pytest.raises(UserError, match='expected a folder, found a file'):
    loop.run(tiny.config(source), tmp_path / 'a')
  with pytest.raises(UserError, match='cannot be written to'):
    loop.run(tiny.config(source), '/proc/nothing')


def test_a_changed_corpus_is_refused(tmp_path):
  source = tiny.write_corpus(tmp_path / 'text', words=20)
  config = tiny.config(source, train={'steps': 1}, checkpoint={'every': 1})
  loop.run(config, tmp_path / 'run')
  (tmp_path / 'text' / 'p1' / 'f0.txt').write_text('something else')
  (tmp_path / 'text' / 'p1' / 'new.txt').write_text('something new')
  config.train.steps = 2
  with pytest.raises(UserError, match=r'text has changed.*: p1/f0.txt, p1/new.txt \(new\)\. Going on'):
    loop.run(config, tmp_path / 'run')


def test_a_workdir_inside_its_text_is_refused(tmp_path):
  source = tiny.write_corpus(tmp_path / 'text')
  with pytest.raises(UserError, match=r'runs: expected a folder outside of the text data.source='):
    loop.run(tiny.config(source), tmp_path / 'text' / 'p0' / 'runs')
  assert not (tmp_path / 'text' / 'p0' / 'runs').exists()


def poisoned(monkeypatch, bad):
  """Rows in which some batches have a NaN weight, as the loop asks for them: their loss is not finite."""
  calls = []
  real = data.to_global

  def to_global(local, arrays, batch, sharding):
    if batch == 8:
      calls.append(batch)
      if len(calls) in bad:
        arrays = {**arrays, 'weights': np.full_like(arrays['weights'], np.nan)}
    return real(local, arrays, batch, sharding)

  monkeypatch.setattr(data, 'to_global', to_global)


def test_steps_that_are_not_finite_are_left_out_and_counted(source, tmp_path, monkeypatch, capsys):
  config = tiny.config(source, train={'skip_nonfinite': 2, 'steps': 8}, log={'every': 4})
  with monkeypatch.context() as patched:
    poisoned(patched, {3, 4})
    result = loop.run(config, tmp_path / 'two')
  assert 'left out, 2 of at most 2. The batch was row' in capsys.readouterr().out
  assert np.isfinite(result['held_out_bits_per_byte'])
  assert [(line['step'], line['skipped']) for line in tiny.lines(tmp_path / 'two', 'not_finite')] == [(3, 1), (4, 2)]
  assert [(line['step'], line['steps']) for line in tiny.lines(tmp_path / 'two', 'train')] == [(4, 2), (8, 4)]
  # The count is the run's, not the process's: one more after it went on is one too many.
  config.train.steps = 12
  with monkeypatch.context() as patched:
    poisoned(patched, {2})
    with pytest.raises(loop.NotFinite, match=r'step 10: loss nan.*2 steps have been left out.*checkpoint is of step 8'):
      loop.run(config, tmp_path / 'two')
  config.train.skip_nonfinite = 3  # may be raised
  result = loop.run(config, tmp_path / 'two')
  assert (result['steps'], result['skipped'], result['tokens']) == (12, 2, 10 * 8 * 16)


def test_a_run_that_learned_nothing_is_no_result(source, tmp_path):
  config = tiny.config(source, train={'skip_nonfinite': 9, 'steps': 2, 'z_loss': 3e38})
  with pytest.raises(loop.NotFinite, match='all 2 steps were left out'):
    loop.run(config, tmp_path)
  assert not (tmp_path / 'result.json').exists()
  assert all(line['objective'] == 'inf' for line in tiny.lines(tmp_path, 'not_finite'))


def test_a_run_with_everything(tmp_path):
  """Two formats by weight, packed whole, Muon with groups, averages, z-loss, bfloat16, accumulation; stopped once."""
  words = [f'{word} {"abc" * (i % 5)}' for i, word in enumerate(tiny.WORDS * 12)]
  with open(tmp_path / 'a.jsonl', 'w', encoding='utf-8') as file:
    file.writelines(json.dumps({'content': f'{i} {word}'}) + '\n' for i, word in enumerate(words))
  source = tiny.write_corpus(tmp_path / 'text')
  parts = [SourceConfig(source=str(tmp_path / 'a.jsonl'), weight=3.0, field='content'), SourceConfig(source=source)]
  settings = {
    'data': {'mixture': parts, 'packing': 'documents', 'prepared': str(tmp_path / 'prepared'), 'seq_len': 32},
    'optimizer': {'method': 'muon', 'schedule': 'constant', 'groups': [GroupConfig(match=r'embed\.table', rate=0.5)]},
    'train': {'ema_decay': 0.9, 'z_loss': 1e-3, 'skip_nonfinite': 1, 'steps': 8, 'accumulate': 2},
  }
  config = tiny.config('', **settings)
  config.model.dtype, config.model.layers[0].remat = 'bfloat16', 'full'
  result = loop.run(config, tmp_path / 'run')
  assert 3 < result['held_out_bits_per_byte'] < 8.1
  lines = tiny.lines(tmp_path / 'run', 'train')
  assert all(np.isfinite(line['z']) for line in lines)
  for steps in (3, 8):  # with a constant rate that of a step does not depend on the length of the run
    config.train.steps = steps
    loop.run(config, tmp_path / 'twice')
  (_, want), (_, got) = (tiny.saved(tmp_path / name, config) for name in ('run', 'twice'))
  assert len(want) > 40
  assert all(np.array_equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
  # Averages are what is evaluated and loaded.
  _, averaged, _ = checkpoint.load_model(tmp_path / 'run')
  _, raw, _ = checkpoint.load_model(tmp_path / 'run', weights='raw')
  held = data.held_out_rows(corpus_of(config, tmp_path / 'run'), config.data)
  sums = [loss.of_model(model, held(np.arange(len(held)))) for model in (averaged, raw)]
  assert metrics.bits(sums[0]) == pytest.approx(result['held_out_bits_per_byte'], rel=1e-4)
  assert metrics.bits(sums[0]) != metrics.bits(sums[1])


def test_a_run_begins_with_another_and_learns_from_a_third(whole, source, tmp_path):
  """Fine-tuning with frozen parameters and a teacher, through the loop."""
  workdir, _, result = whole
  config = tiny.config(
    source,
    train={'init_from': str(workdir), 'steps': 3},
    optimizer={'trainable': r'blocks\..*', 'warmup_steps': 0},
    distill={'teacher': str(workdir), 'features': 0.1},
  )
  tuned = loop.run(config, tmp_path / 'run')
  assert abs(tuned['held_out_bits_per_byte'] - result['held_out_bits_per_byte']) < 0.3
  _, before, _ = checkpoint.load_model(workdir)
  _, after, _ = checkpoint.load_model(tmp_path / 'run')
  before, after = (model_state.split(model)[1] for model in (before, after))
  assert {path for path in before if not np.array_equal(before[path], after[path])} == {
    path for path in before if path.startswith('blocks.')
  }
  (line,) = tiny.lines(tmp_path / 'run', 'train')
  assert 0 <= line['distill_outputs'] < 0.1
  assert 'distill_features' in line
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['models'].keys() == {
    'train.init_from', 'distill.teacher',
  }  # fmt: skip
  # Another teacher in the same place is found when the run goes on.
  config.train.steps = 4
  shutil.copytree(workdir, tmp_path / 'teacher')
  moved = copy.deepcopy(config)
  moved.distill.teacher = str(tmp_path / 'teacher')
  loop.run(moved, tmp_path / 'student')
  loop.run(tiny.config(source, train={'steps': 13}, eval={'every': 4}, log={'tensorboard': True}), tmp_path / 'teacher')
  moved.train.steps = 5
  with pytest.raises(UserError, match=r'what distill\.teacher names has changed'):
    loop.run(moved, tmp_path / 'student')
  config.train.init_from = str(tmp_path / 'nothing')
  with pytest.raises(UserError, match='nothing'):
    loop.run(config, tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_token_ids_without_text_are_counted_in_tokens(tmp_path):
  rng = np.random.default_rng(0)
  np.save(tmp_path / 'ids.npy', rng.integers(0, 50, (120, 24)).astype(np.uint16))
  data = {'source': str(tmp_path / 'ids.npy'), 'tokenizer': 'none', 'separator': '50'}
  config = tiny.config('', data=data, train={'steps': 2})
  config.model.vocab = 52
  result = loop.run(config, tmp_path / 'run')
  assert 4 < result['held_out_bits_per_token'] < 7
  assert 'held_out_bits_per_byte' not in result
  config.model.vocab = 50
  with pytest.raises(UserError, match=r'model\.vocab=50'):
    loop.run(config, tmp_path / 'small')


def test_a_workdir_is_used_by_one_process(tmp_path):
  with workdirs.lock(tmp_path), pytest.raises(UserError, match=r'in use by process \d+'), workdirs.lock(tmp_path):
    pass
  with workdirs.lock(tmp_path):
    pass


def test_damaged_files_of_a_run_are_named(source, tmp_path):
  (tmp_path / 'config.json').write_text('{"config"')
  for text in ('{"config"', '[]', '{"config": {}}'):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(UserError, match=r'config\.json: expected a JSON file of a run'):
      loop.run(tiny.config(source), tmp_path)
  with pytest.raises(UserError, match=r'expected a run, found no config\.json'):
    checkpoint.load_model(tmp_path / 'nothing')


def test_home_folder_is_expanded(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert workdirs.expand('~/runs/a') == tmp_path / 'runs' / 'a'
  with pytest.raises(UserError, match='--workdir'):
    workdirs.expand('')
