"""models.generate.files: what goes in and out, and that a stop at any byte changes nothing."""

import hashlib
import json
import os
import random

import pytest

from models.generate import files
from models.generate.files import Row
from models.hf.tokenizers import ByteTokenizer

SAMPLES, BATCH, COUNT = 2, 2, 11  # a window of eight and one of three
SETTINGS = {'temperature': 0.5, 'widths': (1, 1), 'input': 'abc'}


def prompts():
  rng = random.Random(0)
  texts = ['x' * rng.randrange(1, 9) for _ in range(COUNT)]
  return [files.Prompt({'id': f'p{i}', 'prompt': text}, list(text.encode())) for i, text in enumerate(texts)]


def rows(number, batch):
  """Stands in for a model: what it writes is a matter of the batch, the place in it and the sample."""
  text = lambda i, s: f'{number}.{i}.{s}é\n"'
  return [[Row(text(i, s), [number, i, s, len(tokens)], [-0.5] * 4, 'stop') for s in range(SAMPLES)]
          for i, tokens in enumerate(batch)]  # fmt: skip


class Stopped(Exception):
  pass


def make(path, compute=rows, given=None):
  """What one command does; returns how many prompts were there before."""
  given = prompts() if given is None else given
  with files.Output(path, given, SAMPLES, SETTINGS) as output:
    files.run(given, output, compute, SAMPLES, BATCH)
    return output.done


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp('whole') / 'out.jsonl'
  make(path)
  return path


def test_lines(whole):
  records = [json.loads(line) for line in whole.read_text(encoding='utf-8').splitlines()]
  assert [(record['id'], record['index']) for record in records] == [(f'p{i}', s) for i in range(COUNT) for s in (0, 1)]
  assert [record['prompt'] for record in records[::SAMPLES]] == [prompt.record['prompt'] for prompt in prompts()]
  assert all(record['tokens'][2:] == [record['index'], len(record['prompt'])] for record in records)
  assert records[0]['text'].endswith('é\n"')
  assert set(records[0]) == {'id', 'prompt', 'text', 'tokens', 'finish', 'index'}
  line = json.loads(files.line(prompts()[0], 0, Row('', [1], [-0.1234567], 'stop'), has_log_probs=True))
  assert line['log_probs'] == [-0.123457]


def test_every_cut_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
  monkeypatch.setattr(files.os, 'fsync', lambda file: None)  # which takes most of the time
  path, some = tmp_path / 'out.jsonl', prompts()[:5]
  make(path, given=some)
  want = path.read_bytes()
  for size in range(len(want) + 1):
    path.write_bytes(want[:size])
    done = make(path, given=some)
    assert path.read_bytes() == want, size
    assert done == want[:size].count(b'\n') // SAMPLES


@pytest.mark.parametrize('fatal', range(6))
def test_a_stop_in_any_batch(fatal, whole, tmp_path):
  def compute(number, batch):
    if number == fatal:
      raise Stopped
    return rows(number, batch)

  with pytest.raises(Stopped):
    make(tmp_path / 'out.jsonl', compute)
  computed = []
  make(tmp_path / 'out.jsonl', lambda number, batch: computed.append(number) or rows(number, batch))
  assert (tmp_path / 'out.jsonl').read_bytes() == whole.read_bytes()
  assert len(computed) <= 6
  assert fatal in computed


def test_done_is_done(whole, tmp_path):
  before = whole.read_bytes()
  assert make(whole, compute=None) == COUNT
  assert whole.read_bytes() == before


def test_batches_are_sorted_within_windows():
  lengths = [random.Random(1).randrange(50) for _ in range(30)]
  found = files.batches(lengths, 3)
  assert sorted(i for batch in found for i in batch) == list(range(30))
  for start in range(0, len(found), files.WINDOW):
    window = [i for batch in found[start : start + files.WINDOW] for i in batch]
    assert [lengths[i] for i in window] == sorted(lengths[i] for i in window)
    assert set(window) == set(range(start * 3, min(start * 3 + files.WINDOW * 3, 30)))


@pytest.mark.parametrize(
  'settings, words',
  [
    ({**SETTINGS, 'temperature': 0.7}, 'temperature was 0.5 and is 0.7; expected the same, or another output'),
    ({**SETTINGS, 'widths': (1,), 'input': 'd'}, r"widths was \[1, 1\] and is \[1\], input was 'abc' and is 'd'"),
    ({**SETTINGS, 'top_k': 1}, 'top_k was None and is 1'),
  ],
)
def test_other_settings(settings, words, whole):
  before = whole.read_bytes()
  with pytest.raises(ValueError, match=words):
    files.Output(whole, prompts(), SAMPLES, settings)
  assert whole.read_bytes() == before


@pytest.mark.parametrize(
  'change, line',
  [
    (lambda lines: lines[1:], 1),
    (lambda lines: [*lines[:5], b'\0' * 9 + b'\n', *lines[6:]], 6),
    (lambda lines: [*lines[:5], *lines[6:]], 6),
    (lambda lines: [*lines, lines[-1]], 23),
  ],
)
def test_a_changed_output(change, line, whole, tmp_path):
  path = tmp_path / 'out.jsonl'
  (tmp_path / 'out.jsonl.settings.json').write_bytes(whole.with_name('out.jsonl.settings.json').read_bytes())
  changed = b''.join(change(whole.read_bytes().splitlines(keepends=True)))
  path.write_bytes(changed)
  with pytest.raises(ValueError, match=f'line {line} is not what this command wrote; nothing was changed'):
    make(path)
  assert path.read_bytes() == changed


def test_a_file_of_something_else(tmp_path):
  path = tmp_path / 'notes.txt'
  path.write_text('keep me')
  with pytest.raises(ValueError, match='holds something else'):
    make(path)
  assert path.read_text() == 'keep me'


def test_a_folder_as_output(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in ('.', tmp_path, '/'):
    with pytest.raises(ValueError, match=f'output {path}: is a folder, expected the name of a file'):
      make(path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['[]', '"a"', '{"a"', '[' * 200_000])
def test_damaged_settings(text, whole, tmp_path):
  path = tmp_path / 'out.jsonl'
  path.write_bytes(whole.read_bytes())
  (tmp_path / 'out.jsonl.settings.json').write_text(text)
  with pytest.raises(
    ValueError, match=r'out\.jsonl\.settings\.json: expected the settings that .*out\.jsonl was begun with'
  ):
    make(path)
  assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize('number, told', [(1, r"line 2 \(id 'b'\)"), (None, r"line 3 \(id 3\), line 2 \(id 'b'\)")])
def test_nan_names_the_line(number, told, tmp_path):
  """Of a batch in which the second line stands behind the third."""
  given = read(tmp_path, '{"prompt": "a"}\n{"prompt": "abcd", "id": "b"}\n{"prompt": "ab"}')[1:]

  def compute(batch_number, batch):
    error = FloatingPointError('prompts[1]: NaN' if number else 'NaN')
    error.prompt = number
    raise error

  with (
    files.Output(tmp_path / 'out.jsonl', given, SAMPLES, SETTINGS) as output,
    pytest.raises(FloatingPointError, match=f'^{told}: NaN$'),
  ):
    files.run(given, output, compute, SAMPLES, BATCH)


def test_two_processes(tmp_path):
  path = tmp_path / 'out.jsonl'
  with files.Output(path, prompts(), SAMPLES, SETTINGS), pytest.raises(ValueError, match='another process writes it'):
    make(path)
  assert make(path) == 0


def read(tmp_path, text, **options):
  path = tmp_path / 'in.jsonl'
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  found, content = files.read(path, ByteTokenizer(), **{'vocab': 257, 'room': 5, **options})
  assert content == hashlib.sha256(path.read_bytes()).hexdigest()
  return found


def test_input(tmp_path):
  found = read(
    tmp_path, '{"prompt": "é", "kind": [1]}\n\n {"tokens": [1, 256], "id": "a"}\r\n{"prompt": "x", "id": null}'
  )
  assert found == [
    ({'id': 1, 'prompt': 'é', 'kind': [1]}, [256, 0xC3, 0xA9], 1),
    ({'id': 'a', 'tokens': [1, 256]}, [1, 256], 3),
    ({'id': None, 'prompt': 'x'}, [256, 120], 4),
  ]
  line = json.loads(files.line(found[1], 3, Row('t', [7], [-1.0], 'length'), has_log_probs=False))
  assert line == {'id': 'a', 'text': 't', 'tokens': [7], 'finish': 'length', 'index': 3}


BAD = {
  'what': 'is not JSON',
  '{"prompt": "a"': 'is not JSON',
  '["a"]': 'expected {"prompt": "..."} or {"tokens": [...]}',
  '{"text": "a"}': 'expected {"prompt": "..."}',
  '{"prompt": "a", "tokens": [1]}': 'expected {"prompt": "..."} or',
  '{"prompt": ""}': "prompt='', expected a text of one character",
  '{"prompt": 5}': 'prompt=5, expected',
  '{"tokens": []}': 'tokens: expected a list of one integer or more',
  '{"tokens": [1, true]}': 'tokens: expected',
  '{"tokens": [1, 257]}': 'token 257 is none of 0 .. 256',
  '{"tokens": [-1]}': 'token -1 is none',
  '{"prompt": "abcde"}': '6 tokens are too many, expected 5 or fewer',
  '{"prompt": "a", "text": "b"}': "has an entry 'text'",
  '{"prompt": "\\ud800"}': 'is not UTF-8',
  '[' * 200_000: 'has lists or objects within each other that are too deep',
}


def test_all_bad_lines_are_named(tmp_path):
  with pytest.raises(ValueError) as error:
    read(tmp_path, '{"prompt": "good"}\n' + '\n'.join(BAD) + '\n')
  message = str(error.value)
  assert f'in.jsonl: {len(BAD)} of its lines cannot be used' in message
  for number, words in enumerate(BAD.values(), 2):
    assert f'\n  line {number}: {words}' in message
  with pytest.raises(ValueError, match='line 1: is not UTF-8'):
    read(tmp_path, b'{"prompt": "\xff"}')
  with pytest.raises(ValueError, match='or more, found none'):
    read(tmp_path, '\n')


def write(folder, name, content, time=10**18):
  (folder / name).write_bytes(content)
  os.utime(folder / name, ns=(time, time))


def test_fingerprint_of_all(tmp_path):
  """A change of any byte counts, and only of the files that a model is loaded from."""
  size = 10_000
  for name in ('config.json', 'model.safetensors', 'out.jsonl'):
    write(tmp_path, name, bytes(size))
  first = files.fingerprint(tmp_path)
  write(tmp_path, 'out.jsonl', b'')
  write(tmp_path, 'model.safetensors', bytes(size), time=10**18 + 1)
  assert files.fingerprint(tmp_path) == first
  found = {first}
  for place in (5, 4999, 9999):
    changed = bytearray(size)
    changed[place] = 1
    write(tmp_path, 'model.safetensors', changed)
    found.add(files.fingerprint(tmp_path))
  assert len(found) == 4


def test_fingerprint_of_a_large_folder(tmp_path, monkeypatch):
  """Sizes and times, small files whole, and of large ones some places from the first to the last."""
  for name, value in {'WHOLE': 1000, 'SAMPLES': 4, 'SAMPLE': 10}.items():
    monkeypatch.setattr(files, name, value)
  size = 1000  # samples from 0, 330, 660 and 990
  write(tmp_path, 'config.json', bytes(30))
  write(tmp_path, 'model.safetensors', bytes(size))
  first = files.fingerprint(tmp_path)
  for place, is_seen in [(0, True), (9, True), (10, False), (330, True), (669, True), (989, False), (999, True)]:
    changed = bytearray(size)
    changed[place] = 1
    write(tmp_path, 'model.safetensors', changed)
    assert (files.fingerprint(tmp_path) != first) == is_seen, place
  write(tmp_path, 'model.safetensors', bytes(size), time=10**18 + 1)
  assert files.fingerprint(tmp_path) != first
  write(tmp_path, 'model.safetensors', bytes(size))
  assert files.fingerprint(tmp_path) == first
  write(tmp_path, 'config.json', bytes(15) + b'a' + bytes(14))
  assert files.fingerprint(tmp_path) != first
