"""`python -m attn --draw`: masks of methods and masks written as text, in this process."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from attn import catalog, masks
from attn.__main__ import main
from attn.draw import method_picture


@pytest.fixture
def run(capsys, tmp_path):
  def call(*args):
    """(code, stdout, stderr) of the command; FILE.suffix among the arguments is a new file."""
    code = main([x.replace('FILE', str(tmp_path / 'mask')) for x in args])
    return (code, *capsys.readouterr())

  call.folder = tmp_path
  return call


def text_of(path):
  return ' '.join(ET.fromstring(path.read_text(encoding='utf-8')).itertext()).replace('\xa0', ' ')


def test_a_method(run):
  code, out, err = run('sliding_window', '--draw', 'FILE.svg')
  assert (code, err) == (0, '')
  assert out.startswith(str(run.folder / 'mask.svg')) and 'causal() & window(3): T = 64; 6.1 % of the pairs seen' in out
  text = text_of(run.folder / 'mask.svg')
  assert 'Sliding-window attention' in text and 'causal() & window(3)' in text


def test_lengths_and_json(run):
  code, out, _ = run('causal', '--draw', 'FILE.png', '--shape', 'T=16,S=24', '--json')
  got = json.loads(out)
  assert code == 0 and got['share'] == np.tri(16, 24, 24 - 16).mean() and got['file'].endswith('mask.png')
  assert (run.folder / 'mask.png').read_bytes()[:4] == b'\x89PNG'


def test_a_file_is_written_over(run):
  (run.folder / 'mask.png').write_text('old', encoding='utf-8')
  assert run('causal', '--draw', 'FILE.png')[0] == 0
  assert (run.folder / 'mask.png').read_bytes()[:4] == b'\x89PNG'


def test_any_mask(run):
  code, out, err = run('--mask', 'causal() & (window(7) | sink(2))', '--draw', 'FILE.svg', '--shape', 'T=32')
  assert (code, err) == (0, '') and 'causal() & (window(7) | sink(2)): T = 32' in out
  code, out, err = run('flash', '--mask', 'window(2)', '--draw', 'FILE.svg')
  assert (code, err) == (0, '') and 'FlashAttention window(2): T = 64' in out


def test_forgotten_brackets_are_told(run):
  code, _, err = run('--mask', 'causal() & window(3) | sink(4)', '--draw', 'FILE.svg')
  assert code == 0 and 'read as (causal() & window(3)) | sink(4)' in err
  assert 'if causal() & (window(3) | sink(4)) was meant' in err
  text = text_of(run.folder / 'mask.svg')
  assert 'as read: (causal() & window(3)) | sink(4)' in text and 'perhaps meant: causal()' in text


@pytest.mark.parametrize('method', catalog.methods(), ids=lambda x: x.name)
def test_every_method_has_a_mask_or_says_that_it_has_none(method):
  has_mask = 'mask' in method.settings or method.settings.get('is_causal')
  if not has_mask:
    with pytest.raises(ValueError, match=f'{method.name} .*has no mask'):
      method_picture.of_method(method, 12, 12)
    return
  mask, words = method_picture.of_method(method, 12, 12)
  seen = np.asarray(masks.dense(mask, 12))[0, 0]
  assert words and 0 < seen.sum() < 144
  assert not method.is_causal or not np.triu(seen, 1).any()


def test_documents_and_caches():
  mask, words = method_picture.of_method(catalog.get('packed'), 20, 20)
  assert words == 'causal() & document(segment_ids)'
  document = np.repeat([0, 1, 2, 3], [7, 3, 6, 4])
  np.testing.assert_array_equal(masks.dense(mask, 20)[0, 0], np.tri(20) * (document[:, None] == document) > 0)
  mask, _ = method_picture.of_method(catalog.get('cached'), 4, 10)
  np.testing.assert_array_equal(masks.dense(mask, 4, 10)[0, 0], np.tri(4, 10, 6))
  with pytest.raises(ValueError, match='whole rows'):
    method_picture.of_method(catalog.get('packed'), 4, 8)


@pytest.mark.parametrize(
  'args, words',
  [
    (['rotary', '--draw', 'FILE.png'], 'rotary (family positions) has no mask'),
    (['softmax', '--draw', 'FILE.png'], 'hides no key from any query'),
    (['causal', '--draw', 'FILE.gif'], "ends in '.gif', expected .png or .svg"),
    (['causal', '--draw', 'FILE'], 'expected .png or .svg'),
    (['causal', '--draw', 'FILE/no/x.png'], 'there is no folder'),
    (['casual', '--draw', 'FILE.png'], 'did you mean causal'),
    (['--draw', 'FILE.png'], 'needs the name of a method, or --mask'),
    (['--mask', 'causal()'], '--mask needs --draw'),
    (['--mask', 'casual()', '--draw', 'FILE.png'], 'at character 1, holds the unknown word casual'),
    (['--mask', '', '--draw', 'FILE.png'], 'expected an expression'),
    (['causal', '--draw', 'FILE.png', '--shape', 'T=0'], "T='0'"),
    (['causal', '--draw', 'FILE.png', '--shape', 'Q=3'], "unknown axis 'Q'"),
    (['causal', '--draw', 'FILE.png', '--backward'], '--draw and --backward exclude each other'),
    (['--family', 'exact', '--draw', 'FILE.png'], '--draw and --family exclude'),
  ],
)
def test_errors_give_code_2_and_no_file(run, args, words):
  code, out, err = run(*args)
  assert (code, out) == (2, '') and words in err and 'Traceback' not in err
  assert not list(run.folder.iterdir())


def test_bad_paths_are_refused_before_anything_is_computed(run, monkeypatch):
  monkeypatch.setattr('attn.draw.cells.of_look', lambda *_: pytest.fail('computed'))
  assert run('causal', '--draw', 'FILE.gif', '--shape', 'T=1000000')[0] == 2
  assert run('--mask', 'causal() & window(3) | sink(4)', '--draw', '/no/such/folder/x.png')[0] == 2


def test_without_matplotlib(run, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'matplotlib.figure', None)
  code, out, err = run('causal', '--draw', 'FILE.png')
  assert (code, out) == (2, '') and 'pip install -e .[draw]' in err
