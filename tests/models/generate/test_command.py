"""python -m models.generate: what it writes and where, its bad arguments, and that a stop changes nothing."""

import hashlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from models import hf
from models.generate import Sampling, __main__ as command, generate
from models.hf.tokenizers import ByteTokenizer
from tests.models.generate import tiny

ROOT = pathlib.Path(__file__).parents[3]
NEW = 12
PROMPTS = ['hello', 'a', 'def f(', '€']
SAMPLED = ['--samples=2', '--temperature=0.7', '--top_k=9']
SAMPLING = Sampling(0.7, 9)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny.folder(tmp_path_factory.mktemp('command') / 'model')


@pytest.fixture(scope='module')
def run(folder):
  def run(*options):
    return command.main([f'--model={folder}', f'--max_new_tokens={NEW}', *options])

  return run


@pytest.fixture(scope='module')
def expected(folder):
  """What models.generate gives for the same; texts by prompt and sample."""
  model = hf.load(folder).model

  def expected(texts, **options):
    prompts = [ByteTokenizer().encode(text) for text in texts]
    options = {'stop_tokens': [256], 'tokenizer': ByteTokenizer(), **options}
    return generate(model, prompts, NEW, **options)

  return expected


def test_a_prompt(run, expected, capsys):
  assert run('--prompt=hello') == 0
  shown = capsys.readouterr()
  assert shown.out == expected(['hello']).text[0][0] + '\n'
  assert f'{NEW} tokens; the first after ' in shown.err
  assert '6 tokens of prompt' in shown.err
  assert ' tokens/s' in shown.err
  assert shown.err.count('\n') == 1


def test_prompts_and_samples(run, expected, capsys, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('from stdin'))
  assert run('--prompt=hello', '--prompt=-', '--seed=3', *SAMPLED) == 0
  got = expected(['hello', 'from stdin'], samples=2, sampling=SAMPLING, key=jax.random.key(3))
  want = [f'== prompt {b + 1}, text {s + 1}\n{got.text[b][s]}' for b in (0, 1) for s in (0, 1)]
  assert capsys.readouterr().out == '\n'.join(want) + '\n'


def test_log_probs(run, expected, capsys):
  assert run('--prompt=hello', '--log_probs') == 0
  got, lines = expected(['hello']), capsys.readouterr().err.splitlines()
  assert [float(line.split()[0]) for line in lines[:NEW]] == pytest.approx(got.log_probs[0][0], abs=1e-4)
  assert [line.split()[-1] for line in lines[:NEW]] == [f'({token})' for token in got.tokens[0][0]]


@pytest.mark.parametrize('option', ['--samples=1', '--beams=1', pytest.param('--draft', marks=pytest.mark.long)])
def test_a_stop_string(option, run, expected, folder, capsys):
  whole = expected(['hello']).text[0][0]
  stop = whole[4:6]
  assert (
    run('--prompt=hello', f'--stop={stop}', '--stop=zzz', f'--draft={folder}' if option == '--draft' else option) == 0
  )
  assert capsys.readouterr().out == whole[: whole.index(stop)] + '\n'


def test_end_tokens(run, expected, tmp_path, capsys):
  third = expected(['hello']).tokens[0][0][2]
  other = tiny.folder(tmp_path / 'ends', eos_token_id=[256, third])
  assert run(f'--model={other}', '--prompt=hello') == 0
  short = capsys.readouterr().out
  assert run(f'--model={other}', '--prompt=hello', '--ignore_eos') == 0
  assert capsys.readouterr().out == expected(['hello']).text[0][0] + '\n'
  assert short == expected(['hello'], stop_tokens=[third]).text[0][0] + '\n'


@pytest.mark.long
def test_options_reach_the_model(run, folder, capsys):
  assert run('--prompt=hello', '--dtype=bfloat16', '--param_dtype=bfloat16', '--data=2', '--tensor=2') == 0
  assert run('--prompt=hello', '--beams=3') == 0
  assert (
    run('--prompt=hello', f'--draft={folder}', '--widths=2,1', '--temperature=0.5', '--repetition_penalty=1.5') == 0
  )
  assert capsys.readouterr().err.count(' tokens; ') == 3


def write_input(path):
  lines = [{'prompt': text, 'kind': i} if i else {'tokens': list(text.encode())} for i, text in enumerate(PROMPTS)]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
  return str(path)


FILE_OPTIONS = ['--batch=2', '--log_probs', *SAMPLED]


@pytest.fixture(scope='module')
def whole(run, tmp_path_factory):
  """(input, output) of a run that nobody stopped."""
  path = tmp_path_factory.mktemp('files')
  given, output = write_input(path / 'in.jsonl'), path / 'out.jsonl'
  assert run(f'--input={given}', f'--output={output}', *FILE_OPTIONS) == 0
  return given, output


def test_file_to_file(whole, expected):
  records = [json.loads(line) for line in whole[1].read_text(encoding='utf-8').splitlines()]
  assert [(r['id'], r['index'], r.get('kind')) for r in records] == [
    (i + 1, s, i or None) for i in range(len(PROMPTS)) for s in (0, 1)
  ]
  # The shortest two of all are the first batch.
  batch = [PROMPTS[1], PROMPTS[3]]
  got = expected(batch, samples=2, sampling=SAMPLING, key=jax.random.fold_in(jax.random.key(0), 0))
  for b, i in enumerate((1, 3)):
    for s, record in enumerate(records[2 * i : 2 * i + 2]):
      assert record['prompt'] == batch[b]
      assert (record['text'], record['tokens'], record['finish']) == (
        got.text[b][s], got.tokens[b][s], got.finish[b][s]
      )  # fmt: skip
      assert record['log_probs'] == pytest.approx(got.log_probs[b][s], abs=1e-5)


def test_ctrl_c_and_going_on(whole, run, tmp_path, monkeypatch, capsys):
  options = [f'--input={whole[0]}', f'--output={tmp_path}/out.jsonl', *FILE_OPTIONS]
  calls = []

  def stopping(*args, **named):
    calls.append(args)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return generate(*args, **named)

  monkeypatch.setattr(command, 'generate', stopping)
  assert run(*options) == 130
  assert capsys.readouterr().err.endswith('models.generate: stopped; the same command goes on\n')
  monkeypatch.setattr(command, 'generate', generate)
  assert run(*options) == 0
  assert (tmp_path / 'out.jsonl').read_bytes() == whole[1].read_bytes()
  assert run(*options) == 0
  assert run(*options, '--temperature=0.8') == 2
  assert 'temperature was 0.7 and is 0.8' in capsys.readouterr().err
  changed = tmp_path / 'in.jsonl'
  changed.write_bytes(pathlib.Path(whole[0]).read_bytes().replace(b'def', b'dif'))
  assert run(f'--input={changed}', *options[1:]) == 2
  assert 'was begun otherwise: input was ' in capsys.readouterr().err
  assert run(*options, f'--model={tiny.folder(tmp_path / "other", seed=1)}') == 2
  assert 'was begun otherwise: model was ' in capsys.readouterr().err
  assert (tmp_path / 'out.jsonl').read_bytes() == whole[1].read_bytes()


@pytest.mark.long
def test_sigkill_changes_nothing(whole, run, folder, tmp_path):
  options = [f'--input={whole[0]}', f'--output={tmp_path}/out.jsonl', *FILE_OPTIONS]
  words = ['-m', 'tests.models.generate.killer', '2', f'--model={folder}', f'--max_new_tokens={NEW}', *options]
  killed = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  torn = (tmp_path / 'out.jsonl').read_bytes()
  assert torn and not torn.endswith(b'\n')
  assert run(*options) == 0
  assert (tmp_path / 'out.jsonl').read_bytes() == whole[1].read_bytes()


def test_ctrl_c_on_the_terminal(folder):
  """The program itself: text comes while it is made, Ctrl-C keeps it, and ends with 130."""
  words = ['-m', 'models.generate', f'--model={folder}', '--prompt=a', '--max_new_tokens=30000', '--ignore_eos']
  env = {**os.environ, 'PYTHONWARNINGS': 'error'}
  with subprocess.Popen(
    [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  assert process.returncode == 130, err.decode()
  assert first
  assert out.endswith(b'\n')
  figures, last = err.decode().splitlines()
  assert 'tokens; the first after' in figures
  assert last == 'python -m models.generate: stopped'


@pytest.mark.parametrize(
  'error', [MemoryError('no room'), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no room\nx')]
)
def test_too_large_for_the_memory(error, run, monkeypatch, capsys):
  def full(*args, **options):
    raise error

  monkeypatch.setattr(command, 'stream', full)
  assert run('--prompt=a') == 2
  shown = capsys.readouterr().err
  assert f'do not fit into memory with --max_new_tokens={NEW}, --samples=1 (' in shown and 'no room)' in shown
  assert shown.endswith('no room)\n')
  error = jax.errors.JaxRuntimeError('INTERNAL: a bug')  # not a matter of memory
  with pytest.raises(jax.errors.JaxRuntimeError, match='a bug'):
    run('--prompt=a')


def test_stdin_that_is_no_utf_8(run, monkeypatch, capsys):
  for errors in ('strict', 'surrogateescape'):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'a\xff'), encoding='utf-8', errors=errors))
    assert run('--prompt=-') == 2
    assert capsys.readouterr().err == 'python -m models.generate: --prompt=-: stdin is not UTF-8\n'


def test_input_from_a_pipe(run, tmp_path):
  """It can be read only once, and what is remembered of it is what was in it."""
  os.mkfifo(tmp_path / 'pipe')
  text = b'{"prompt": "hello"}\n'
  # Who opens it again gets nothing.
  with subprocess.Popen(
    ['sh', '-c', 'printf %s "$0" > pipe; while :; do : > pipe; done', text], cwd=tmp_path
  ) as writer:
    try:
      assert run(f'--input={tmp_path}/pipe', f'--output={tmp_path}/out.jsonl') == 0
    finally:
      writer.kill()
  settings = json.loads((tmp_path / 'out.jsonl.settings.json').read_text(encoding='utf-8'))
  assert settings['input'] == hashlib.sha256(text).hexdigest()


BAD = [
  (['--prompt'], 'argument --prompt: expected one argument'),
  (['--promt=a'], 'unrecognized arguments: --promt=a'),
  (['--prompt=a', '--top_k=x'], "argument --top_k: invalid integer value: 'x'"),
  (['--prompt=a', '--seed=4294967296'], 'argument --seed: 4294967296 must be in 0 .. 4294967295'),
  (['--prompt=a', '--seed=-1'], 'argument --seed: -1 must be in 0 .. 4294967295'),
  (['--prompt=a\udcff'], "--prompt='a\\udcff' is not UTF-8"),
  (['--prompt=a', '--stop=\udcff'], "--stop='\\udcff' is not UTF-8"),
  (['--prompt=a', '--samples=0'], 'argument --samples: 0 must be 1 or more'),
  (['--prompt=a', '--widths=2,,1'], "argument --widths: '2,,1': expected whole numbers"),
  (['--prompt=a', '--dtype=int8'], 'argument --dtype: invalid choice'),
  ([], "expected --prompt='...' (- reads stdin), or --input=FILE with --output=FILE"),
  (['--prompt=a', '--input=b', '--output=c'], "expected --prompt='...' (- reads stdin), or --input"),
  (['--input=b'], '--input and --output need each other'),
  (['--prompt=a', '--beams=2', '--temperature=1'], '--beams and --temperature exclude each other'),
  (['--prompt=a', '--draft=b', '--samples=2', '--temperature=1'], '--draft and --samples exclude each other'),
  (['--prompt=a', '--top_p=0.5'], '--top_p has no effect at --temperature=0'),
  (['--prompt=a', '--widths=1'], '--widths needs --draft'),
  (['--prompt=a', '--batch=3'], '--batch needs --input'),
  (['--prompt=a', '--stop='], "stop_strings: expected texts of one character or more, got ''"),
  (['--prompt=a', '--temperature=-1'], 'temperature=-1.0 must be'),
  (['--prompt=a', '--temperature=1', '--top_k=999'], 'top_k=999 must be an integer in 0 .. 260'),
  (['--prompt=a', '--length=12'], '--max_new_tokens=12 leaves no room for a prompt in texts of 12 tokens'),
  (['--prompt=hello', '--length=16'], "--prompt='hello' has 6 tokens, expected 4 or fewer"),
  (['--prompt=a', '--data=9'], '--data=9 and --tensor=1 need 9 devices, found 8'),
  (['--prompt=a', '--draft=/nowhere'], '/nowhere'),
  (['--input=/nowhere', '--output=/nowhere/out'], "No such file or directory: '/nowhere'"),
]


@pytest.mark.parametrize('options, words', BAD, ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_bad_arguments_are_one_line(options, words, run, capsys):
  try:
    status = run(*options)
  except SystemExit as stop:
    status = stop.code
  shown = capsys.readouterr()
  assert status == 2
  assert shown.out == ''
  assert shown.err.startswith('python -m models.generate: ')
  assert words in shown.err
  assert shown.err.count('\n') == 1


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda path: None, 'expected a folder'),
    (lambda path: path.mkdir(), 'expected a file, found none'),
    (lambda path: (path / 'checkpoints').mkdir(parents=True), 'python -m train.export --workdir='),
  ],
)
def test_bad_folders(make, words, run, tmp_path, capsys):
  make(tmp_path / 'model')
  assert run(f'--model={tmp_path}/model', '--prompt=a') == 2
  assert words in capsys.readouterr().err


def test_bad_lines_are_all_named(run, tmp_path, capsys):
  (tmp_path / 'in.jsonl').write_text('{"prompt": "a"}\n{"tokens": [999]}\nno\n{"prompt": "' + 'x' * 40 + '"}\n')
  assert run(f'--input={tmp_path}/in.jsonl', f'--output={tmp_path}/out.jsonl', '--length=50') == 2
  error = capsys.readouterr().err
  assert 'line 2: token 999' in error and 'line 3: is not JSON' in error and 'line 4: 41 tokens are too many' in error
  assert not (tmp_path / 'out.jsonl').exists()


def test_broken_parameters(run, tmp_path, capsys):
  model = hf.load(tiny.folder(tmp_path / 'a')).model
  model.norm.scale[...] *= float('nan')
  hf.save(tmp_path / 'b', model, hf.read_config(tmp_path / 'a')[0], tokenizer='bytes')
  assert run(f'--model={tmp_path}/b', '--prompt=hello') == 1
  assert 'prompts[0]: the logits were NaN' in capsys.readouterr().err


def test_help_shows_every_option(capsys):
  with pytest.raises(SystemExit) as stop:
    command.parse(['--help'])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert text.count('python -m models.generate --model=') >= 6
  assert '--repetition_penalty X' in text
