"""The notebooks run from top to bottom in a kernel of this interpreter, and are stored without outputs."""

import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
QUICKSTART = ROOT / 'notebooks' / 'quickstart.ipynb'
LONGEST = 300  # seconds for a cell on a busy machine; all of them take some 30


def cells(path, kind='code'):
  stored = json.loads(path.read_text(encoding='utf-8'))['cells']
  return [x for x in stored if x['cell_type'] == kind]


def source(path, words):
  """The code of the one cell that holds these words."""
  (found,) = (text for text in (''.join(x['source']) for x in cells(path)) if words in text)
  return found


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  """The name of a kernel that is this interpreter, with two devices, and that leaves nothing at home."""
  folder = tmp_path / 'jupyter' / 'kernels' / 'here'
  folder.mkdir(parents=True)
  argv = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
  spec = {'argv': argv, 'display_name': 'here', 'language': 'python'}
  (folder / 'kernel.json').write_text(json.dumps(spec), encoding='utf-8')
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
  for name in ('JUPYTER_RUNTIME_DIR', 'JUPYTER_CONFIG_DIR', 'IPYTHONDIR', 'MPLCONFIGDIR'):
    monkeypatch.setenv(name, str(tmp_path / name.lower()))
  monkeypatch.setenv('JUPYTER_PLATFORM_DIRS', '1')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
  return 'here'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda x: x.name)
def test_runs(path, kernel):
  import nbclient
  import nbformat

  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=LONGEST, kernel_name=kernel, resources={'metadata': {'path': str(path.parent)}}
  )
  client.execute()
  outputs = [x for cell in notebook.cells if cell.cell_type == 'code' for x in cell.outputs]
  assert not [x for x in outputs if x.output_type == 'error']
  assert not [x for x in outputs if x.output_type == 'stream' and x.name == 'stderr'], 'a warning in a notebook'
  if path == QUICKSTART:
    check_quickstart(''.join(x.text for x in outputs if x.output_type == 'stream'), outputs)


def check_quickstart(text, outputs):
  """What a reader is told is so."""
  differences = [float(x) for x in re.findall(r'difference[^:\d]*[: ]+(\d\S*)', text.replace(';', ' '))]
  assert len(differences) == 5 and max(differences) < 1e-5, text
  memory = {
    name: [float(x.replace(',', '')) for x in re.findall(r'= \d+: ([\d,.]+) MiB', text.split(name)[1])][:2]
    for name in ('jax.nn', 'reference', 'xla')
  }
  assert memory['xla'][1] < 8 * memory['xla'][0] and memory['reference'][1] > 12 * memory['reference'][0]
  assert 'cpu' in text and '2 devices with 256 of 512 tokens each' in text
  assert 'last token that notices: 31\n' in text
  start, end = (float(x) for x in re.search(r'([\d.]+) bits per byte at the start, ([\d.]+) at the end', text).groups())
  assert start > 7 and end < 4
  assert sum('image/png' in x.get('data', {}) for x in outputs) >= 9


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda x: x.name)
def test_is_stored_clean(path):
  text = path.read_text(encoding='utf-8')
  for cell in cells(path):
    assert cell['outputs'] == [] and cell['execution_count'] is None, 'store the notebook without outputs'
    assert not any(len(line.rstrip('\n')) > 120 for line in cell['source'])
    compile(''.join(cell['source']), path.name, 'exec')
  assert not re.search(r'/(home|Users|content|tmp|work|root|opt|usr)/|[A-Z]:\\\\|index-url|pypi|simple/', text)
  stored = json.loads(text)
  assert set(stored['metadata']['language_info']) == {'name'}, 'no version of somebody\'s interpreter'
  kinds = [x['cell_type'] for x in stored['cells']]
  assert kinds[0] == 'markdown' and kinds.count('markdown') > 0.6 * kinds.count('code')


def test_one_device_has_no_ring(monkeypatch, capsys):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  exec(source(QUICKSTART, 'distributed.ring'), {'jax': jax})
  assert 'One device' in capsys.readouterr().out


class Setup:
  """The first cell, run in a folder that is no checkout; the commands it runs are noted in place of run."""

  def __init__(self, folder, monkeypatch):
    self.commands = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(subprocess, 'run', self.note)
    for name in [x for x in os.environ if x.startswith(('TPU_', 'COLAB_TPU'))]:
      monkeypatch.delenv(name)
    monkeypatch.setattr('shutil.which', lambda name: None)

  def note(self, command, check):
    self.commands.append([str(x) for x in command])
    if command[0] == 'git':
      (command[-1] / 'attn').mkdir(parents=True)
      (command[-1] / 'attn' / 'softmax.py').touch()

  def __call__(self, where):
    code = source(QUICKSTART, 'SOURCE =')
    assert "SOURCE = ''" in code
    exec(code.replace("SOURCE = ''", f'SOURCE = {where!r}'), {})
    return sys.path[0]


def test_setup_needs_a_source(tmp_path, monkeypatch):
  with pytest.raises(RuntimeError, match='set SOURCE'):
    Setup(tmp_path, monkeypatch)('')


def test_setup_in_a_checkout_installs_nothing(monkeypatch):
  setup = Setup(ROOT / 'notebooks', monkeypatch)
  assert setup('') == str(ROOT) and not setup.commands


def test_setup_from_git(tmp_path, monkeypatch):
  setup = Setup(tmp_path, monkeypatch)
  monkeypatch.setenv('TPU_NAME', 'local')
  root = setup('https://example.org/attnloom.git')
  assert root == str(tmp_path / 'attnloom')
  clone, install = setup.commands
  assert clone[:2] == ['git', 'clone'] and clone[-2:] == ['https://example.org/attnloom.git', root]
  assert install[:4] == [sys.executable, '-m', 'pip', 'install'] and install[-1] == f'{root}[train,tpu]'
  assert setup('') == root and len(setup.commands) == 2, 'a second time it is there'


def test_setup_from_a_zip(tmp_path, monkeypatch):
  with zipfile.ZipFile(tmp_path / 'attnloom.zip', 'w') as archive:
    archive.writestr('attnloom-main/attn/softmax.py', '')
  setup = Setup(tmp_path, monkeypatch)
  root = setup('attnloom.zip')
  assert root == str(tmp_path / 'attnloom' / 'attnloom-main')
  assert setup.commands == [[sys.executable, '-m', 'pip', 'install', '--quiet', '-e', f'{root}[train]']]
