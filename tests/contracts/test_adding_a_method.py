"""docs/adding_a_method.md does what it says: its Python blocks run in turn, and the new method is in the catalog."""

import pathlib
import re

import pytest

from attn import catalog
from attn.__main__ import main

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'adding_a_method.md'


@pytest.fixture
def restored_catalog():
  known = {x.name for x in catalog.methods()}
  yield
  for method in catalog.methods():
    if method.name not in known:
      del catalog._METHODS[method.name]


def test_the_example_runs(restored_catalog, capsys):
  text = PAGE.read_text(encoding='utf-8')
  blocks = re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
  assert len(blocks) == 4
  names: dict = {'__name__': 'kerple'}
  for block in blocks:
    line = text[: text.index(block)].count('\n')
    exec(compile('\n' * line + block, str(PAGE), 'exec'), names)
  report = capsys.readouterr().out
  assert all(f'{x} ' in report for x in ('oracle', 'causality', 'padding', 'limits', 'sharded')), report
  assert 'kerple' in catalog.table()
  assert main(['kerple']) == 0
  assert 'Chi et al. 2022' in capsys.readouterr().out


def test_what_the_page_names_exists():
  text = PAGE.read_text(encoding='utf-8')
  for path in re.findall(r'`((?:attn|tests|docs)/[a-z_/]+\.\w+)`', text):
    assert (PAGE.parents[1] / path).exists(), path
  assert len(catalog.get('sliding_window').state.capacities) > 1
