"""What the documents show works: every Python block runs, every command is run, with sizes made small.

A command is a line of a bash block that begins with `python -m` or `make`. A new one that no rule below knows fails.
docs/adding_a_method.md is executed by its own test in tests/contracts.
"""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

import pytest

from experiments import compile_table, readme

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
TINY_RUN = [
  '--config.model.width=32', '--config.model.heads=2', '--config.model.depth=2', '--config.data.batch=8',
  '--config.data.seq_len=64', '--config.optimizer.warmup_steps=0', '--config.eval.bytes=256',
  '--config.eval.stride=0', '--config.log.tensorboard=false',
]  # fmt: skip
TINY_REPORT = [
  '--config.eval.stride=0',
  '--config.model.width=64', '--config.model.heads=4', '--config.model.kv_heads=2', '--config.model.mlp_width=64',
  '--config.model.depth=2', '--config.model.vocab=512', '--config.data.seq_len=64', '--config.data.batch=4',
  '--config.train.loss_chunk=0', '--config.mesh.fsdp=2', '--config.mesh.context=1', '--config.mesh.tensor=2',
  '--topology=cpu:4',
]  # fmt: skip
RUN_AS_THEY_ARE = (
  'attn', 'train.main', 'train.prepare', 'train.export', 'models.generate', 'experiments.report',
  'experiments.store_result', 'experiments.perplexity',
)  # fmt: skip
SETTINGS_READ = r'config\.(?:data\.(?:source|tokenizer)|train\.init_from|distill\.teacher)'
FILES_READ = rf'--(?:model|input|{SETTINGS_READ}(?==runs/))=(\S+)'
LONGEST = 300  # seconds for a command on a busy machine; they take some 10


def blocks(path, language):
  """The fenced blocks of a document in one language."""
  return re.findall(rf'^```{language}\n(.*?)^```$', path.read_text(encoding='utf-8'), re.M | re.S)


def commands():
  """Every command that a document shows, once."""
  found = [line for path in DOCUMENTS for block in blocks(path, 'bash') for line in block.splitlines()]
  return list(dict.fromkeys(line for line in found if re.match(r'python -m |make\b', line)))


def make(*words, cwd=ROOT, is_checked=True):
  """What make did, as if it were not called by a make that calls these tests."""
  env = {name: value for name, value in os.environ.items() if not name.startswith(('MAKE', 'MFLAGS'))}
  return subprocess.run(['make', *words], cwd=cwd, env=env, capture_output=True, text=True, check=is_checked)


def made_by(target):
  """The Python commands that `make` runs for a target, its environment being there."""
  done = make('-n', *target.split()[1:])
  lines = [line for line in done.stdout.splitlines() if line.startswith('.venv/bin/python -m') and ' pip ' not in line]
  return [line.replace('.venv/bin/python', 'python', 1) for line in lines]


def workdir_of(command):
  return re.search(r'--workdir=(\S+)', command)[1]


def small(command, folder):
  """The command as arguments that write below `folder` and take seconds."""
  words = shlex.split(command)[2:]
  module, words = words[0], words[1:]
  words = [re.sub(r'^--(workdir|out|model|input|output)=', rf'--\1={folder}/', word) for word in words]
  words = [re.sub(r'^(--config\.(?:data|train|distill)\.\w+)=runs/', rf'\1={folder}/runs/', word) for word in words]
  if module == 'train.main' and '--help' not in words:
    steps = [int(word.split('=')[1]) // 100 for word in words if word.startswith('--config.train.steps=')]
    words += [*TINY_RUN, f'--config.train.steps={max([2, *steps])}']
    if not any('data.source' in word for word in words):
      words.append(f'--config.data.source={text_files(folder)}')
  elif module == 'train.compile_report':
    words += TINY_REPORT
  elif module == 'experiments.bench_core':
    words = [*(words or ['--only=import']), '--tiny', f'--out={folder}/bench.json']
  elif module == 'attn' and '--draw' in words:
    file = folder / words[words.index('--draw') + 1]
    file.parent.mkdir(parents=True, exist_ok=True)
    words[words.index('--draw') + 1] = str(file)
  elif module in ('experiments.readme', 'experiments.compile_table'):
    words = ['--check']
  elif module == 'pytest':
    words += ['--collect-only', '-p', 'no:cacheprovider', 'tests/test_packaging.py']
  elif module in ('ruff', 'mypy'):  # .ci/run runs them; here only that they are there
    words = ['--version']
  elif module not in RUN_AS_THEY_ARE:
    raise AssertionError(f'{command}: no rule of tests/test_docs.py runs this command; add one')
  return [sys.executable, '-m', module, *words]


def text_files(folder):
  """A folder with a few files of the standard library."""
  text = folder / 'text'
  if not text.exists():
    text.mkdir()
    for name in ('bisect', 'colorsys', 'heapq', 'keyword', 'queue', 'sched', 'stat', 'this', 'types'):
      shutil.copy(pathlib.Path(sysconfig.get_paths()['stdlib']) / f'{name}.py', text)
  return text


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where all commands of this module write; `runs/first` of a document is below it."""
  return tmp_path_factory.mktemp('docs')


def make_files(command, folder):
  """Makes the files and the model that a command reads: by the command or the Python block that shows how."""
  for path in re.findall(FILES_READ, command):
    if not (folder / path).exists():
      if makes := [line for line in commands() if {f'--out={path}', f'--workdir={path}'} & set(line.split())]:
        run(makes[0], folder)
        continue
      found = [block for document in DOCUMENTS for block in blocks(document, 'python') if f"'{path}'" in block]
      assert found, f'{command}: no document shows how {path} is made'
      with contextlib.chdir(folder):
        exec(compile(found[0], path, 'exec'), {})


def run(command, folder):
  """Runs a command, and before it those that train the run and make the files it needs."""
  make_files(command, folder)
  if '--workdir=' in command:
    trains = [line for line in [*commands(), *made_by('make train')] if 'train.main' in line and '--workdir' in line]
    first = next((line for line in trains if workdir_of(line) == workdir_of(command)), None)
    assert first, f'{command}: no document shows how {workdir_of(command)} is trained'
    if first != command and not (folder / workdir_of(command)).exists():
      run(first, folder)
  if 'train.export' in command:  # which writes into a new folder, once
    shutil.rmtree(folder / re.search(r'--out=(\S+)', command)[1], ignore_errors=True)
  done = subprocess.run(
    small(command, folder), cwd=ROOT, capture_output=True, text=True, check=False, timeout=LONGEST, env=os.environ
  )
  assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}'
  return done.stdout


@pytest.mark.parametrize('command', [line for line in commands() if line.startswith('python')])
def test_command(command, folder):
  run(command, folder)


@pytest.mark.parametrize('target', [line for line in commands() if line.startswith('make')])
def test_target(target, folder):
  underlying = made_by(target)
  assert underlying, f'{target} runs no Python command'
  for command in underlying:
    run(command, folder)


@pytest.mark.parametrize('path', [p for p in DOCUMENTS if p.name != 'adding_a_method.md'], ids=lambda p: p.name)
def test_python_blocks(path, folder, monkeypatch):
  found = blocks(path, 'python')
  assert found
  if "'runs/first" in ''.join(found) and not (folder / 'runs/first').exists():
    run(next(line for line in commands() if '--workdir=runs/first ' in line), folder)
  monkeypatch.chdir(folder)
  names = {'__name__': path.name}  # a block may use what an earlier one made
  for block in found:
    exec(compile(block, path.name, 'exec'), names)


def test_make_lists_every_target():
  listed = make().stdout
  text = (ROOT / 'Makefile').read_text(encoding='utf-8')
  targets = re.search(r'^\.PHONY: (.*)$', text, re.M)[1].split()
  assert re.findall(r'^  make (\S+)', listed, re.M) == targets
  assert {'train', 'test', 'test-all', 'lint', 'format', 'bench', 'clean'} <= set(targets)


@pytest.mark.parametrize('target', ['train', 'report', 'test', 'test-all', 'lint', 'format', 'bench', 'docs'])
def test_target_of_the_makefile(target, folder):
  assert [small(command, folder) for command in made_by(f'make {target}')]


def test_make_clean_leaves_runs(tmp_path):
  shutil.copy(ROOT / 'Makefile', tmp_path)
  for name in ('.venv/bin', 'attn/__pycache__', 'runs/first', 'build'):
    (tmp_path / name).mkdir(parents=True)
  make('clean', cwd=tmp_path)
  left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*'))
  assert left == ['Makefile', 'attn', 'runs', 'runs/first']


def test_an_old_python_is_refused(tmp_path):
  old = tmp_path / 'old_python'
  old.write_text('#!/bin/sh\nexit 1\n', encoding='utf-8')
  old.chmod(0o755)
  done = make('lint', f'PYTHON={old}', f'VENV={tmp_path / "venv"}', is_checked=False)
  assert done.returncode != 0
  assert 'older than Python 3.11' in done.stderr
  assert not (tmp_path / 'venv').exists()


def test_readme_is_up_to_date():
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  assert readme.updated(text) == text, 'run `make docs`'


def test_table_of_compile_reports_is_up_to_date():
  assert compile_table.main(['--check']) == 0, 'run `python -m experiments.compile_table --stored`'


def test_links_lead_somewhere():
  for path in DOCUMENTS:
    for link in re.findall(r'\]\(([^)#]+)\)', path.read_text(encoding='utf-8')):
      if not link.startswith('http'):
        assert (path.parent / link).exists(), f'{path.name} links to {link}'
