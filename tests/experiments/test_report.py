"""The report of a run: whole, honest about figures, safe with any text."""

import html.parser
import json
import shutil

import pytest

from experiments import report, runs, store_result
from train.config import UserError


class Page(html.parser.HTMLParser):
  """Tags, the values of attributes that load something, and the text of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.loaded, self.words = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.loaded += [value for name, value in attrs if name in ('src', 'href', 'xlink:href', 'srcset', 'data', 'action')]

  def handle_data(self, data):
    self.words.append(data)

  @property
  def text(self):
    return ' '.join(' '.join(self.words).split())


@pytest.fixture(scope='module')
def longer(finished, tmp_path_factory):
  path = tmp_path_factory.mktemp('longer') / 'long.json'
  said = ['--command=python -m train.main ...', '--remark=on a shared machine']
  assert store_result.main([f'--workdir={finished}', f'--out={path}', *said]) == 0
  return path


@pytest.fixture(scope='module')
def built(finished, longer, tmp_path_factory):
  out = tmp_path_factory.mktemp('report') / 'report.html'
  assert report.main([f'--workdir={finished}', f'--out={out}', f'--longer={longer}']) == 0
  return out.read_text(encoding='utf-8')


def test_stands_alone(built):
  page = Page(built)
  assert page.loaded  # pictures inside pictures
  assert all(value.startswith(('#', 'data:image/png;base64,')) for value in page.loaded)
  assert not {'script', 'link', 'iframe', 'object', 'img'} & set(page.tags)
  assert 'url(http' not in built and '@import' not in built


def test_shows_the_remark_on_the_longer_run(built):
  assert 'Remark: on a shared machine.' in Page(built).text


def test_shows_all_sections(built):
  page = Page(built)
  headings = ['Beside compressors', 'What a longer run reaches', 'Loss', 'Masks', 'An attention map', 'Samples']
  assert [word for word in page.words if word in headings] == headings
  assert 'The run' in page.words
  assert page.tags.count('svg') == 4
  assert page.tags.count('mark') == 2 * 2  # two held-out files, two temperatures


def test_figures_are_those_of_the_run(built, finished):
  run, text = runs.read(finished), Page(built).text
  assert run.final['is_all']
  assert f'{run.final["bits_per_byte"]:.3f}' in text
  assert f'{run.result["tokens_per_second"]:,.0f}' in text
  assert run.corpus['hash'][:16] in text
  assert f'{run.parameters:,}' in text
  assert 'The text is the same' in text


def test_text_of_files_is_escaped(built):
  assert '<b>&amp;' not in built.split('<style>')[1].split('</style>')[1]
  assert '&lt;b&gt;&amp;amp;' in built


def test_longer_run_that_is_absent_or_of_other_text(finished, longer, tmp_path):
  run = runs.read(finished)
  absent = report.longer_section(run, report.read_longer(str(tmp_path / 'none.json')), 'none.json')
  assert 'No longer run is stored' in ''.join(absent)
  record = json.loads(longer.read_text())
  record['corpus']['hash'] = 'f' * 64
  assert 'another version' in ''.join(report.longer_section(run, record, ''))
  record['config']['data']['source'] = 'elsewhere'
  assert 'not compared' in ''.join(report.longer_section(run, record, ''))


def test_longer_run_that_is_no_record(tmp_path):
  path = tmp_path / 'bad.json'
  path.write_text('{"held_out": {}}')
  with pytest.raises(UserError, match=r'bad.json: expected a file of experiments.store_result'):
    report.read_longer(str(path))


@pytest.mark.parametrize(
  'bits, words',
  [
    (2.5, 'The compressors win: each of them (a, b) needs fewer bits'),
    (1.5, 'needs fewer bits than a, and more than b'),
    (0.5, 'The model wins: it needs fewer bits than a, b'),
  ],
)
def test_verdict_follows_the_figures(bits, words):
  assert words in report.verdict(bits, {'a': 2.0, 'b': 1.0})


def test_unfinished_run_says_so(finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  (tmp_path / 'run/result.json').unlink()
  run = runs.read(tmp_path / 'run')
  assert 'Not finished: 6 of 6 steps' in ''.join(report.headline(run, 6))
  with pytest.raises(UserError, match='expected a finished run'):
    store_result.record(run, [])


def test_finished_run_that_is_taken_up_again_is_not_finished(finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  stored = json.loads((tmp_path / 'run/config.json').read_text())
  stored['config']['train']['steps'] = 9
  (tmp_path / 'run/config.json').write_text(json.dumps(stored))
  assert 'Not finished: 6 of 9 steps' in ''.join(report.headline(runs.read(tmp_path / 'run'), 6))


def test_out_in_no_folder_is_a_message(finished, tmp_path, capsys):
  assert report.main([f'--workdir={finished}', f'--out={tmp_path}/nothing/report.html']) == 2
  assert f'found no {tmp_path}/nothing' in capsys.readouterr().err


def test_no_run_is_a_message(tmp_path, capsys):
  assert report.main([f'--workdir={tmp_path}']) == 2
  assert str(tmp_path) in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_record_holds_what_a_report_needs(longer, finished):
  record, run = json.loads(longer.read_text()), runs.read(finished)
  assert record['held_out']['bytes'] == run.corpus['held_out']['bytes']
  assert record['curve']['held_out'][-1][:2] == [6, record['tokens']]
  assert set(record['compressors']) == {'gzip -9', 'bz2 -9', 'xz -9e'}
  assert record['config']['train']['steps'] == record['steps'] == 6


def test_points_are_thinned_from_the_end():
  lines = [{'step': i, 'tokens_so_far': 10 * i, 'bits_per_byte': 1.0} for i in range(1, 1002)]
  points = store_result.points(lines)
  assert len(points) <= 200
  assert points[-1] == [1001, 10010, 1.0]
  assert store_result.points([]) == []


CLOCKS = [(0, '0:00 min'), (245.2, '4:05 min'), (605, '10:05 min'), (7384, '2:03:04 h')]


@pytest.mark.parametrize('seconds, text', CLOCKS)
def test_minutes(seconds, text):
  assert report.minutes(seconds) == text
