"""train.export: the exported folder holds the run's model, and refuses what does not fit."""

import json

import numpy as np
import pytest

from models import hf, state
from models.hf.tokenizers import SEPARATOR, ByteTokenizer
from tests.models.hf import made_tokenizers as made
from tests.train import tiny
from train import checkpoint, export, loop
from train.config import UserError


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('export')
  train = {'steps': 4, 'ema_decay': 0.9}
  config = tiny.config(tiny.write_corpus(folder / 'text'), train=train, checkpoint={'every': 2, 'keep': 2})
  loop.run(config, str(folder / 'run'))
  return folder / 'run'


@pytest.mark.parametrize('architecture', [None, 'MistralForCausalLM'])
def test_holds_the_model_of_the_run(architecture, run, tmp_path, capsys):
  out = tmp_path / 'model'
  chosen = [] if architecture is None else [f'--architecture={architecture}']
  assert export.main([f'--workdir={run}', f'--out={out}', *chosen]) == 0
  assert 'the model after 4 steps' in capsys.readouterr().out
  config, model, _ = checkpoint.load_model(run)
  loaded = hf.load(out)
  got, want = state.split(loaded.model)[1], state.split(model)[1]
  assert set(got) == set(want)
  for path in want:
    np.testing.assert_array_equal(got[path], want[path], err_msg=path)
  if architecture is None:
    assert loaded.config == config.model
  assert hf.stop_tokens(out) == (SEPARATOR,)
  assert isinstance(hf.tokenizer(out), ByteTokenizer)


def test_an_older_step(run, tmp_path):
  assert export.export(run, tmp_path / 'model', step=2) == 2
  got = state.split(hf.load(tmp_path / 'model').model)[1]
  want = state.split(checkpoint.load_model(run, 2)[1])[1]
  newest = state.split(checkpoint.load_model(run)[1])[1]
  np.testing.assert_array_equal(got['embed.table'], want['embed.table'])
  assert np.any(got['embed.table'] != newest['embed.table'])


def test_averages_or_the_last_parameters(run, tmp_path):
  found = {}
  for weights in ('', 'ema', 'raw'):
    out, chosen = tmp_path / f'model{weights}', [f'--weights={weights}'] * bool(weights)
    assert export.main([f'--workdir={run}', f'--out={out}', *chosen]) == 0
    found[weights] = state.split(hf.load(out).model)[1]['embed.table']
    want = checkpoint.load_params(run, weights=weights)[1]['embed.table']
    np.testing.assert_array_equal(found[weights], want)
  np.testing.assert_array_equal(found[''], found['ema'])
  assert np.any(found['raw'] != found['ema'])


def test_the_tokenizer_of_the_run_comes_along(tmp_path, capsys):
  library = made.byte_level()
  made.folder(tmp_path / 'hf', library)
  data = {'tokenizer': str(tmp_path / 'hf'), 'separator': '</s>'}
  config = tiny.config(
    tiny.write_corpus(tmp_path / 'text'), data=data, train={'steps': 1}, model={'vocab': library.get_vocab_size()}
  )
  loop.run(config, str(tmp_path / 'run'))
  export.export(tmp_path / 'run', tmp_path / 'model')
  found = hf.tokenizer(tmp_path / 'model')
  assert found.encode('alpha beta') == library.encode('alpha beta').ids
  assert hf.stop_tokens(tmp_path / 'model') == (library.token_to_id('</s>'),)
  made.folder(tmp_path / 'hf', made.with_fallback())
  assert export.main([f'--workdir={tmp_path}/run', f'--out={tmp_path}/other']) == 2
  assert 'the tokenizer has changed since the run began' in capsys.readouterr().err
  assert not (tmp_path / 'other').exists()


def test_refuses(run, tmp_path, capsys):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full/notes').write_text('keep me')
  for workdir, out, more, words in [
    (run, 'full', [], 'full: expected a new or empty folder; nothing was changed'),
    (run, 'full/notes', [], 'notes: expected a new or empty folder'),
    (tmp_path / 'full', 'new', [], 'expected a run, found no config.json'),
    (run, 'new', ['--step=3'], 'expected a checkpoint of step 3, found [2, 4]'),
    (run, 'new', ['--architecture=LamaForCausalLM'], 'LlamaForCausalLM'),
  ]:
    assert export.main([f'--workdir={workdir}', f'--out={tmp_path}/{out}', *more]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith('python -m train.export: ') and shown.err.count('\n') == 1
    assert words in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['full']
  with pytest.raises(UserError):
    export.export(run, tmp_path / 'full')


@pytest.mark.parametrize(
  'text, words',
  [
    ('{"architectures": ["AttnloomForCausalLM"]}', 'expected a run; it is a checkpoint, not a run'),
    ('[]', 'expected a run; its config.json is of something else'),
    ('{"config": 3}', 'expected a run; its config.json is of something else'),
  ],
)
def test_a_folder_that_is_no_run(text, words, tmp_path, capsys):
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model/config.json').write_text(text)
  assert export.main([f'--workdir={tmp_path}/model', f'--out={tmp_path}/new']) == 2
  assert f'workdir {tmp_path}/model: {words}\n' in capsys.readouterr().err


def test_what_an_architecture_cannot_express(run, tmp_path, capsys):
  assert export.main([f'--workdir={run}', f'--out={tmp_path}/model', '--architecture=LlamaForCausalLM']) == 2
  assert 'window' in capsys.readouterr().err
  assert not (tmp_path / 'model').exists()
  assert json.loads((run / 'config.json').read_text())['config']['model']['layers'][0]['window'] == 8
