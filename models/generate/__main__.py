"""`python -m models.generate`: a model continues prompts, on the terminal or from file to file.

    python -m models.generate --model=runs/tiny --prompt='def main('          # shown as it is made
    python -m models.generate --model=runs/tiny --prompt='def ' --temperature=0.8 --top_p=0.95 --samples=3 --seed=1
    python -m models.generate --model=runs/tiny --prompt='# ' --stop='\\n\\n' --max_new_tokens=500
    echo -n 'import ' | python -m models.generate --model=runs/tiny --prompt=-
    python -m models.generate --model=runs/tiny --prompt='def ' --beams=4
    python -m models.generate --model=runs/large --draft=runs/tiny --widths=2,2,1 --prompt='def '
    python -m models.generate --model=runs/tiny --input=prompts.jsonl --output=texts.jsonl --batch=32

A line of --input is {"prompt": "..."} or {"tokens": [1, 2, 3]}, with an "id" and other entries if you like; they are
kept in the output. Ctrl-C, a crash or a kill loses little: the same command goes on where it was.

Exit status: 0 done; 1 the model gives NaN; 2 an argument, a file or the model does not fit, or the memory is too small;
130 stopped by Ctrl-C.
"""

import argparse
import contextlib
import inspect
import os
import pathlib
import signal
import sys
from typing import Any, NamedTuple

import jax

from models import hf, speculative
from models.config import DTYPES
from models.generate import files, terminal
from models.generate.beam import beam_search
from models.generate.engine import generate, stream
from models.generate.sampling import Sampling
from models.generate.stops import Text, check_stop_strings

NAME = 'python -m models.generate'


class Checkpoint(NamedTuple):
  """What is known of a folder before its parameters are read; `room` is the longest text, 0 if any will do."""

  folder: pathlib.Path
  vocab: int
  tokenizer: Any
  stop_tokens: tuple[int, ...]
  room: int


def main(argv=None):
  """Runs the command; returns the exit status. Every expected failure is one line on stderr."""
  args = parse(argv)
  try:
    check(args)
    return (to_file if args.input else to_terminal)(args)
  except (ValueError, ImportError, OSError) as error:
    if isinstance(error, BrokenPipeError):  # `| head` has seen enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 141
    return _fail(error, 2)
  except FloatingPointError as error:
    return _fail(error, 1)
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith('RESOURCE_EXHAUSTED'):
      raise
    told = str(error).strip().split('\n')[0]
    sizes = {name: getattr(args, name) for name in ('max_new_tokens', 'samples', *(['batch'] if args.input else []))}
    options = ', '.join(f'--{name}={value}' for name, value in sizes.items())
    return _fail(f'the model and its texts do not fit into memory with {options} ({told})', 2)
  except KeyboardInterrupt:
    return _fail('stopped' + ('; the same command goes on' if args.input else ''), 130)


class Parser(argparse.ArgumentParser):
  """Says what is wrong in one line."""

  def error(self, message):
    self.exit(_fail(message, 2))


def parse(argv=None):
  """The arguments of a command line; a bad one ends the program with a line that names it, status 2."""
  text = inspect.cleandoc(__doc__ or '')
  parser = Parser(
    prog=NAME, description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )  # fmt: skip
  add = parser.add_argument
  add('--model', required=True, metavar='DIR', help="folder of a published checkpoint, or of train.export's")
  add('--prompt', action='append', metavar='TEXT', help='text to continue; may be repeated; - is all of stdin')
  add('--input', metavar='FILE', help='prompts as JSON Lines, in place of --prompt')
  add('--output', metavar='FILE', help='JSON Lines to write, with --input')
  add('--max_new_tokens', type=_whole(1), default=128, metavar='N', help='new tokens per text, 128 by default')
  add('--temperature', type=float, default=0.0, help='0 (by default) takes the most likely token')
  add('--top_k', type=_whole(0), default=0, metavar='K', help='draw from the K most likely tokens; 0 means all')
  add('--top_p', type=float, default=1.0, metavar='P', help='draw from the most likely tokens that sum to P')
  add('--min_p', type=float, default=0.0, metavar='P', help='draw from tokens of P times the highest probability')
  add('--repetition_penalty', type=float, default=1.0, metavar='X', help='above 1: tokens of the text count less')
  add('--seed', type=_whole(0, 2**32 - 1), default=0, help='of drawing, 0 by default')
  add('--samples', type=_whole(1), default=1, metavar='N', help='texts per prompt')
  add('--beams', type=_whole(0), default=0, metavar='N', help='beam search with N beams; the best text is written')
  add('--draft', metavar='DIR', help='smaller model that drafts for --model (speculative decoding)')
  add('--widths', type=_widths, metavar='2,2,1', help='with --draft: children per node of its tree; 1,1,1,1 by default')
  add(
    '--stop', action='append', default=[], metavar='TEXT', help='end before this text; may be repeated; \\n: line end'
  )
  add('--ignore_eos', action='store_true', help="go on after the model's end tokens")
  add('--log_probs', action='store_true', help='write the log-probability of each token, too')
  add('--dtype', choices=DTYPES, help="of the computation; the checkpoint's by default")
  add('--param_dtype', choices=DTYPES, help="of the parameters; the checkpoint's by default")
  add('--length', type=_whole(1), metavar='N', help='longest text, prompt included, that will be made')
  add('--prefill_chunk', type=_whole(1), default=512, metavar='N', help='tokens of a prompt that are read at once')
  add('--batch', type=_whole(1), default=8, metavar='N', help='with --input: prompts at once')
  add('--data', type=_whole(1), default=1, metavar='N', help='devices that texts are spread over')
  add('--tensor', type=_whole(1), default=1, metavar='N', help='devices that the model is cut over')
  args = parser.parse_args(argv)
  args.given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
  args.stop = [stop.replace('\\n', '\n') for stop in args.stop]
  return args


def _whole(least, most=None):
  def integer(text):
    if int(text) < least or (most is not None and int(text) > most):
      wanted = f'{least} or more' if most is None else f'in {least} .. {most}'
      raise argparse.ArgumentTypeError(f'{text} must be {wanted}')
    return int(text)

  return integer


def _widths(text):
  try:
    return tuple(map(_whole(1), text.split(',')))
  except ValueError:
    raise argparse.ArgumentTypeError(f'{text!r}: expected whole numbers with commas between them, as 2,2,1') from None


def check(args):
  """ValueError for options that do not fit each other, or that would do nothing."""
  if bool(args.prompt) == bool(args.input):
    raise ValueError("expected --prompt='...' (- reads stdin), or --input=FILE with --output=FILE")
  if bool(args.input) != bool(args.output):
    raise ValueError('--input and --output need each other')
  filters = ['top_k', 'top_p', 'min_p']
  for name, others in {
    'beams': ['temperature', *filters, 'repetition_penalty', 'samples', 'seed', 'log_probs', 'draft'],
    'draft': ['samples'],
  }.items():
    both = [other for other in others if other in args.given]
    if name in args.given and both:
      raise ValueError(f'--{name} and --{both[0]} exclude each other')
  for name in (*filters, 'samples', 'seed'):
    if name in args.given and args.temperature == 0:
      raise ValueError(f'--{name} has no effect at --temperature=0; expected a temperature above 0')
  for name, needed in {'widths': 'draft', 'batch': 'input'}.items():
    if name in args.given and needed not in args.given:
      raise ValueError(f'--{name} needs --{needed}')
  check_stop_strings(args.stop)
  for name in ('prompt', 'stop'):
    for text in getattr(args, name) or ():
      _check_text(f'--{name}={text!r}', text)


def _check_text(name, text):
  """ValueError if a text came in bytes that are not UTF-8, which Python keeps as surrogates."""
  try:
    text.encode()
  except UnicodeError:
    raise ValueError(f'{name} is not UTF-8') from None


def _read_stdin():
  try:
    text = sys.stdin.read()
  except UnicodeError:
    raise ValueError('--prompt=-: stdin is not UTF-8') from None
  _check_text('--prompt=-: stdin', text)
  return text


def look(args):
  """The Checkpoint of --model.

  Raises:
    ValueError: it is none, or the options do not fit it.
  """
  folder = pathlib.Path(args.model).expanduser()
  if (folder / 'checkpoints').is_dir():
    to = folder / 'model'
    raise ValueError(
      f'{folder} holds a training run: python -m train.export --workdir={folder} --out={to} makes a --model={to} of it'
    )
  config, settings = hf.read_config(folder, length=args.length)
  sampling(args).check(config.vocab)
  stop_tokens = () if args.ignore_eos else hf.stop_tokens(folder)
  longest = args.length or settings.get('max_position_embeddings') or 0
  if longest and longest <= args.max_new_tokens:
    raise ValueError(f'--max_new_tokens={args.max_new_tokens} leaves no room for a prompt in texts of {longest} tokens')
  room = longest - args.max_new_tokens if longest else 0
  return Checkpoint(folder, config.vocab, hf.tokenizer(folder), stop_tokens, room)


def sampling(args):
  """The Sampling that the options say."""
  names = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
  return Sampling(**{name: getattr(args, name) for name in names})


class Session:
  """A loaded model and the options of a command.

  Args:
    args: of `parse`.
    checkpoint: of `look`.
  """

  def __init__(self, args, checkpoint):
    self.args, self.checkpoint = args, checkpoint
    options = {'mesh': mesh(args.data, args.tensor), 'length': args.length}
    options |= {'dtype': args.dtype, 'param_dtype': args.param_dtype}
    self.model = hf.load(checkpoint.folder, **options).model
    self.draft = hf.load(pathlib.Path(args.draft).expanduser(), **options).model if args.draft else None
    self._common = {'stop_tokens': checkpoint.stop_tokens, 'prefill_chunk': args.prefill_chunk}

  @property
  def is_whole(self):
    """Whether texts come whole, not piece by piece."""
    return bool(self.args.beams or self.draft)

  def pieces(self, prompts, key):
    """An iterator of models.generate.Piece."""
    return stream(self.model, prompts, self.args.max_new_tokens, **self._options(key))

  def rows(self, prompts, key):
    """The texts of some prompts.

    Args:
      prompts: lists of ints.
      key: a random key.

    Returns:
      A list of Rows for each prompt.
    """
    new = self.args.max_new_tokens
    if not self.is_whole:
      got = generate(self.model, prompts, new, **self._options(key))
      columns = zip(got.text, got.tokens, got.log_probs, got.finish, strict=True)
      return [[files.Row(*row) for row in zip(*column, strict=True)] for column in columns]
    if self.args.beams:
      beams = beam_search(self.model, prompts, new, self.args.beams, **self._common)
      parts: list[tuple] = [(tokens[0], [], finish[0]) for tokens, finish in zip(beams.tokens, beams.finish)]
    else:
      widths = {'widths': self.args.widths} if self.args.widths else {}
      options = {'sampling': sampling(self.args), 'key': key, **widths, **self._common}
      got, _ = speculative.generate(self.model, self.draft, prompts, new, **options)
      parts = [(a[0], b[0], c[0]) for a, b, c in zip(got.tokens, got.log_probs, got.finish)]
    return [[self._row(prompt, *part)] for prompt, part in zip(prompts, parts)]

  def _options(self, key):
    args = self.args
    return {
      'sampling': sampling(args), 'key': key, 'samples': args.samples, 'stop_strings': args.stop,
      'tokenizer': self.checkpoint.tokenizer, **self._common,
    }  # fmt: skip

  def _row(self, prompt, tokens, log_probs, finish):
    """The Row of a text that was made without a look at stop strings: it is cut there."""
    text = Text(self.checkpoint.tokenizer, self.args.stop, prompt)
    is_ended = finish == 'stop'  # by a token, which is no part of the text
    shown = text.push(tokens[: len(tokens) - is_ended])[0] + text.finish()
    if text.is_stopped:
      tokens, log_probs, finish = tokens[: text.count], log_probs[: text.count], 'stop'
    return files.Row(shown, tokens, log_probs, finish)


def mesh(data, tensor):
  """A mesh of data * tensor devices, or None for one.

  Raises:
    ValueError: there are fewer.
  """
  n, devices = data * tensor, jax.devices()
  if n > len(devices):
    raise ValueError(f'--data={data} and --tensor={tensor} need {n} devices, found {len(devices)}')
  kinds = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((data, tensor), ('data', 'tensor'), axis_types=kinds, devices=devices[:n]) if n > 1 else None


def to_terminal(args):
  """Continues the prompts of the command line on stdout; figures go to stderr. Returns the exit status."""
  checkpoint = look(args)
  texts = [_read_stdin() if text == '-' else text for text in args.prompt]
  prompts = [checkpoint.tokenizer.encode(text) for text in texts]
  for text, prompt in zip(texts, prompts):
    if not prompt:
      raise ValueError(f'--prompt={text!r} has no token, expected one or more')
    if checkpoint.room and len(prompt) > checkpoint.room:
      raise ValueError(f'--prompt={text[:40]!r} has {len(prompt)} tokens, expected {checkpoint.room} or fewer')
  session = Session(args, checkpoint)
  names = [(b, s) for b in range(len(prompts)) for s in range(args.samples)]
  headings = [f'== prompt {b + 1}, text {s + 1}' for b, s in names] if len(names) > 1 else ['']
  printer, clock = terminal.Printer(headings), terminal.Clock()
  values: list[list] = [[] for _ in names]

  def take(row, tokens, log_probs, text, finish):
    clock.take(row, len(tokens))
    values[row] += zip(tokens, log_probs)
    printer.take(row, text, bool(finish))

  key = jax.random.key(args.seed)
  try:
    if session.is_whole:
      for row, (found,) in enumerate(session.rows(prompts, key)):
        take(row, found.tokens, found.log_probs, found.text, found.finish)
    else:
      for piece in session.pieces(prompts, key):
        row = piece.prompt * args.samples + piece.sample
        take(row, piece.tokens, piece.log_probs, piece.text, piece.finish)
  finally:
    printer.end()
    if args.log_probs:
      _print_log_probs(headings, values, checkpoint.tokenizer)
    if clock.tokens:
      print(clock.text(sum(map(len, prompts))), file=sys.stderr)
  return 0


def _print_log_probs(headings, values, tokenizer):
  """A line per token on stderr."""
  for heading, row in zip(headings, values):
    lines = [f'{log_prob:9.4f}  {tokenizer.decode([token])!r} ({token})' for token, log_prob in row]
    print('\n'.join(([heading] if heading else []) + lines), file=sys.stderr)


def to_file(args):
  """Continues the prompts of --input into --output. Returns the exit status."""
  checkpoint = look(args)
  prompts, input_hash = files.read(args.input, checkpoint.tokenizer, checkpoint.vocab, checkpoint.room)
  unimportant = {'given', 'prompt', 'input', 'output', 'model', 'draft'}
  settings = {name: value for name, value in vars(args).items() if name not in unimportant}
  settings |= {'input': input_hash, 'model': files.fingerprint(args.model)}
  settings |= {'draft': files.fingerprint(args.draft) if args.draft else ''}
  with files.Output(args.output, prompts, args.samples, settings) as output:
    if output.done < len(prompts):
      session, key = Session(args, checkpoint), jax.random.key(args.seed)
      # Rows count from 0 in each batch, so each batch has a key of its own.
      compute = lambda number, some: session.rows(some, jax.random.fold_in(key, number))
      files.run(prompts, output, compute, args.samples, args.batch, args.log_probs)
  print(f'{args.output}: {terminal.count(len(prompts) * args.samples, "text")}', file=sys.stderr)
  return 0


def program():
  """`main` as a program of its own: whenever Ctrl-C comes, a line and status 130. A second one does not wait."""

  def end(*_):
    os.write(2, f'{NAME}: stopped\n'.encode())
    os._exit(130)

  def interrupt(*_):
    signal.signal(signal.SIGINT, end)
    raise KeyboardInterrupt

  def lost(unraisable):
    # Raised where Python passes over errors, as in the callbacks that jax has in the garbage collection.
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
      end()
    sys.__unraisablehook__(unraisable)

  try:
    sys.unraisablehook = lost
    signal.signal(signal.SIGINT, interrupt)
    status = main()
    signal.signal(signal.SIGINT, end)
  except KeyboardInterrupt:  # before main() looks at it, or after
    status = _fail('stopped', 130)
  if status == 130:
    # jax that was interrupted in a compilation crashes when Python ends in order. Every line of files is on the disk.
    for file in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):  # `| head` has seen enough
        file.flush()
    os._exit(status)
  sys.exit(status)


def _fail(message, status):
  print(f'{NAME}: {message}', file=sys.stderr, flush=True)
  return status


if __name__ == '__main__':
  program()
