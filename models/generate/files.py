"""Prompts from a JSON Lines file, texts into another; a command that was stopped goes on where it was.

An input line is {"prompt": "..."} or {"tokens": [1, 2, 3]}, with an "id" or any other entries. For each there are as
many output lines as samples, in the order of the input: its entries, and text, tokens, log_probs, finish and index.
OUT.settings.json beside the output tells what made it, so that nothing else is ever written into it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from tqdm import tqdm

WRITTEN = ('text', 'tokens', 'log_probs', 'finish', 'index')
WINDOW = 4  # batches among which prompts are sorted by length; as much may have to be computed again after a stop
LOADED = ('config.json', 'generation_config.json', 'tokenizer.json')
WHOLE = 64 << 20  # bytes: a fingerprint reads all of a folder that has no more
SAMPLES, SAMPLE = 64, 64 << 10  # of a larger one it reads so many places of each file, of so many bytes


class Prompt(NamedTuple):
  """A line of the input: its entries, with an id, the ids of its tokens, and its number, from 1."""

  record: dict[str, Any]
  tokens: list[int]
  line: int = 0


class Row(NamedTuple):
  """One new text: `text`, its `tokens` and their `log_probs`, and 'stop' or 'length' as `finish`."""

  text: str
  tokens: list[int]
  log_probs: list[float]
  finish: str


def run(prompts, output, compute, samples, batch, has_log_probs=False):
  """Computes what an output lacks, and writes it in the order of the prompts, some batches at a time.

  Prompts of similar lengths share a batch. The batches follow from the prompts and `batch` alone, so that one that was
  stopped makes the same ones as one that was not.

  Args:
    prompts: [Prompt].
    output: Output.
    compute: (number of the batch, [tokens of a prompt]) -> a list of `samples` Rows for each prompt.
    samples: texts per prompt.
    batch: prompts per call.
    has_log_probs: whether the lines hold them.

  Returns:
    Number of tokens written.

  Raises:
    FloatingPointError: the model gave NaN; it names the line of the input.
  """
  waiting: dict[int, list[Row]] = {}
  done, count = output.done, 0
  with tqdm(total=len(prompts), initial=done, unit=' prompts', smoothing=0.1) as bar:
    for number, indices in enumerate(batches([len(prompt.tokens) for prompt in prompts], batch)):
      if all(i < output.done for i in indices):
        continue
      try:
        rows = compute(number, [prompts[i].tokens for i in indices])
      except FloatingPointError as error:
        raise _located(error, [prompts[i] for i in indices]) from error
      waiting |= dict(zip(indices, rows, strict=True))
      ready = []
      while done in waiting:
        found = waiting.pop(done)
        assert len(found) == samples, f'{len(found)} rows, expected {samples}'
        ready += [line(prompts[done], index, row, has_log_probs) for index, row in enumerate(found)]
        count += sum(len(row.tokens) for row in found)
        done += 1
      output.write(ready)
      bar.update(done - bar.n)
  return count


def _located(error, batch):
  """The error with the line of the input in place of the number within the batch, its attribute `prompt`."""
  number = getattr(error, 'prompt', None)
  found = batch if number is None else [batch[number]]
  told = ', '.join(f'line {prompt.line} (id {prompt.record["id"]!r})' for prompt in found)
  return FloatingPointError(f'{told}: {str(error).removeprefix(f"prompts[{number}]: ")}')


def line(prompt, index, row, has_log_probs):
  """An output line, with its end."""
  record = {name: value for name, value in prompt.record.items() if name != 'tokens'}
  record |= {'text': row.text, 'tokens': row.tokens}
  record |= {'log_probs': [round(x, 6) for x in row.log_probs]} if has_log_probs else {}
  record |= {'finish': row.finish, 'index': index}
  return json.dumps(record, ensure_ascii=False) + '\n'


def batches(lengths, size):
  """[[index of a prompt]]: within WINDOW * size neighbours sorted by length, so that little is filled up."""
  found = []
  for start in range(0, len(lengths), WINDOW * size):
    window = range(start, min(start + WINDOW * size, len(lengths)))
    order = sorted(window, key=lambda i: (lengths[i], i))
    found += [order[i : i + size] for i in range(0, len(order), size)]
  return found


def read(path, tokenizer, vocab, room=0):
  """The prompts of a file.

  Args:
    path: of a JSON Lines file, or of a pipe, which can be read only once; empty lines are passed over.
    tokenizer: has encode(text).
    vocab: tokens are 0 .. vocab - 1.
    room: tokens that a prompt may have; 0 means any number.

  Returns:
    ([Prompt], SHA-256 of the file in hexadecimal). A prompt without an id has the number of its line.

  Raises:
    ValueError: no prompt, or lines that are none: all of them are named.
  """
  prompts, wrong = [], []
  with open(path, 'rb') as file:
    content = file.read()
  for number, text in enumerate(content.split(b'\n'), 1):
    if text.strip():
      try:
        prompts.append(_prompt(text, number, tokenizer, vocab, room))
      except ValueError as error:
        wrong.append(f'line {number}: {error}')
  if wrong:
    raise ValueError(f'{path}: {len(wrong)} of its lines cannot be used\n  ' + '\n  '.join(wrong))
  if not prompts:
    raise ValueError(f'{path}: expected a line {{"prompt": "..."}} or more, found none')
  return prompts, hashlib.sha256(content).hexdigest()


def _prompt(text, number, tokenizer, vocab, room):
  """The Prompt of one line; ValueError without its number."""
  try:
    record = json.loads(text)
    json.dumps(record, ensure_ascii=False).encode()
  except UnicodeError:
    raise ValueError('is not UTF-8') from None
  except RecursionError:
    raise ValueError('has lists or objects within each other that are too deep') from None
  except ValueError as error:
    raise ValueError(f'is not JSON ({error})') from None
  if not isinstance(record, dict) or ('prompt' in record) == ('tokens' in record):
    raise ValueError('expected {"prompt": "..."} or {"tokens": [...]}')
  taken = [name for name in record if name in WRITTEN and name != 'tokens']
  if taken:
    raise ValueError(f'has an entry {taken[0]!r}, which the output has for something else')
  if 'prompt' in record:
    if not isinstance(record['prompt'], str) or not record['prompt']:
      raise ValueError(f'prompt={record["prompt"]!r}, expected a text of one character or more')
    tokens = tokenizer.encode(record['prompt'])
  else:
    tokens = record['tokens']
    is_whole = lambda token: isinstance(token, int) and not isinstance(token, bool)
    if not isinstance(tokens, list) or not tokens or not all(map(is_whole, tokens)):
      raise ValueError('tokens: expected a list of one integer or more')
  outside = next((token for token in tokens if not 0 <= token < vocab), None)
  if outside is not None:
    raise ValueError(f'token {outside} is none of 0 .. {vocab - 1}')
  if room and len(tokens) > room:
    raise ValueError(f'{len(tokens)} tokens are too many, expected {room} or fewer')
  return Prompt({'id': number} | record, tokens, number)


class Output(contextlib.AbstractContextManager):
  """The output file, open behind the last prompt that is complete in it, and closed to other processes.

  Args:
    path: of the file.
    prompts: [Prompt].
    samples: lines per prompt.
    settings: JSON dictionary of all that decides what is written.

  Attributes:
    done: prompts that were complete when it was opened.

  Raises:
    ValueError: the path is a folder, the file is not of these settings (what differs is named) or of these prompts, or
      another process writes it. Nothing has been changed then.
  """

  def __init__(self, path, prompts, samples, settings):
    self.path = pathlib.Path(path)
    if self.path.is_dir():
      raise ValueError(f'output {path}: is a folder, expected the name of a file')
    self.beside = self.path.with_name(self.path.name + '.settings.json')
    with contextlib.ExitStack() as stack:
      self._file = stack.enter_context(open(self.path, 'ab+'))
      self._lock()
      if os.fstat(self._file.fileno()).st_size:
        self._check(settings)
        self.done = self._kept(prompts, samples)
      else:
        self._remember(settings)
        self.done = 0
      stack.pop_all()  # it stays open

  def write(self, lines):
    """Appends lines; they are on the disk when this returns."""
    if lines:
      self._file.write(''.join(lines).encode())
      self._file.flush()
      os.fsync(self._file.fileno())

  def __exit__(self, *error):
    self._file.close()

  def _lock(self):
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(f'{self.path}: another process writes it') from None

  def _remember(self, settings):
    """Before the first line, so that no line stands without what made it."""
    new = self.beside.with_name(self.beside.name + '.new')
    with open(new, 'w', encoding='utf-8') as file:
      json.dump(settings, file, indent=2)
      file.write('\n')
      file.flush()
      os.fsync(file.fileno())
    os.replace(new, self.beside)

  def _check(self, settings):
    if not self.beside.exists():
      raise ValueError(f'{self.path}: holds something else, expected a new file or one that this command has begun')
    try:
      found = json.loads(self.beside.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{self.beside}: expected the settings that {self.path} was begun with ({error})') from error
    if not isinstance(found, dict):
      raise ValueError(f'{self.beside}: expected the settings that {self.path} was begun with, a JSON object')
    settings = json.loads(json.dumps(settings))
    names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if names:
      told = ', '.join(f'{name} was {found.get(name)!r} and is {settings.get(name)!r}' for name in names)
      raise ValueError(f'{self.path} was begun otherwise: {told}; expected the same, or another output')

  def _kept(self, prompts, samples):
    """Cuts the file behind the last complete prompt; returns their number."""
    self._file.seek(0)
    count = start = end = 0  # whole lines; bytes of the whole prompts, and of the whole lines
    for text in self._file:
      if not text.endswith(b'\n'):
        break  # torn: it was the last
      if count == len(prompts) * samples or not _is_line(text, prompts[count // samples], count % samples):
        raise ValueError(f'{self.path}: line {count + 1} is not what this command wrote; nothing was changed')
      count, end = count + 1, end + len(text)
      start = start if count % samples else end
    self._file.truncate(start)
    return count // samples


def _is_line(text, prompt, index):
  """Whether a line is of this prompt and sample."""
  try:
    record = json.loads(text)
    return (record['id'], record['index']) == (prompt.record['id'], index)
  except (ValueError, KeyError, TypeError, RecursionError):
    return False


def fingerprint(folder):
  """A short hash of a model's folder: of the names, sizes and contents of the files that a model is loaded from.

  If they have more than WHOLE bytes together, the time of the last change of each file counts, and of its contents
  SAMPLES places of SAMPLE bytes, the first and the last among them. A copy that keeps no times is another model then.
  """
  paths = sorted(pathlib.Path(folder).expanduser().iterdir())
  paths = [path for path in paths if path.name in LOADED or path.suffix == '.safetensors']
  stats = [path.stat() for path in paths]
  is_small = sum(stat.st_size for stat in stats) <= WHOLE
  digest = hashlib.sha256()
  for path, stat in zip(paths, stats):
    digest.update(f'{path.name}\0{stat.st_size}\0{"" if is_small else stat.st_mtime_ns}\0'.encode())
    with open(path, 'rb') as file:
      if is_small or stat.st_size <= SAMPLES * SAMPLE:
        digest.update(file.read())
      else:
        for i in range(SAMPLES):
          file.seek((stat.st_size - SAMPLE) * i // (SAMPLES - 1))
          digest.update(file.read(SAMPLE))
  return digest.hexdigest()[:16]
