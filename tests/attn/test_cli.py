"""`python -m attn`: in this process, and once each way as a command."""

import json
import subprocess
import sys

import pytest

from attn import catalog, contracts
from attn.__main__ import main


def run(capsys, *args):
  code = main(list(args))
  got = capsys.readouterr()
  return code, got.out, got.err


def test_list(capsys):
  code, out, err = run(capsys)
  assert (code, err) == (0, '')
  lines = out.splitlines()
  column = lines[0].index('family')
  for method in catalog.methods():
    line = next(x for x in lines if x.startswith(f'{method.name} '))
    assert line[column:].startswith(method.family) and method.paper in line and line.endswith(method.idea)


def test_list_of_a_family(capsys):
  code, out, _ = run(capsys, '--family', 'positions')
  assert code == 0 and 'yarn' in out and 'sliding_window' not in out


@pytest.mark.parametrize('method', catalog.methods(), ids=lambda x: x.name)
def test_describe(capsys, method):
  code, out, err = run(capsys, method.name)
  assert (code, err) == (0, '')
  flat = ' '.join(out.split())
  texts = [method.title, method.idea, method.url, method.authors, method.usage, method.path, method.cost]
  for text in [*texts, *method.formula.splitlines(), *method.limits, *contracts.applicable(method)]:
    assert ' '.join(text.split()) in flat, text
  assert max(len(x) for x in out.splitlines()) <= 130


def test_json(capsys):
  code, out, _ = run(capsys, '--json')
  assert code == 0
  assert [x['name'] for x in json.loads(out)] == [x.name for x in catalog.methods()]
  code, out, _ = run(capsys, 'sliding_window', '--json')
  got = json.loads(out)
  assert code == 0
  assert got['paper'] == 'arXiv:2310.06825' and got['url'] == 'https://arxiv.org/abs/2310.06825'
  assert got['inputs']['q'] == ['B', 'T', 'H', 'D']
  assert 'ring of 4' in got['state'] and 'window_reach' in got['contracts'] and got['waived'] == {}


def test_waivers_are_shown(capsys, monkeypatch):
  monkeypatch.setitem(catalog.get('causal').waived, 'vmap', 'for the sake of this test')
  _, out, _ = run(capsys, 'causal')
  assert 'waived       vmap: for the sake of this test' in out
  _, out, _ = run(capsys, 'causal', '--json')
  got = json.loads(out)
  assert got['waived'] == {'vmap': 'for the sake of this test'} and 'vmap' not in got['contracts']


@pytest.mark.parametrize(
  'args, words',
  [
    (['sliding_windw'], 'did you mean sliding_window'),
    (['--family', 'spars'], 'must be one of exact, positions'),
    (['yarn', '--family', 'exact'], 'exclude each other'),
  ],
)
def test_errors_help_and_give_code_2(capsys, args, words):
  code, out, err = run(capsys, *args)
  assert (code, out) == (2, '') and words in err and 'Traceback' not in err


def test_help(capsys):
  with pytest.raises(SystemExit) as exit_:
    main(['--help'])
  assert exit_.value.code == 0 and '--json' in capsys.readouterr().out


def test_as_a_command():
  got = subprocess.run([sys.executable, '-m', 'attn', 'yarn'], capture_output=True, text=True, timeout=120)
  assert got.returncode == 0 and got.stdout.startswith('YaRN'), got.stderr
  got = subprocess.run([sys.executable, '-m', 'attn', 'yarm'], capture_output=True, text=True, timeout=120)
  assert got.returncode == 2 and 'did you mean yarn' in got.stderr and 'Traceback' not in got.stderr
