"""Prepares the tokens of a training run without training, and says what they are.

  python -m train.prepare --config=FILE.py --workdir=DIR [--config.data.FIELD=VALUE ...]
  python -m train.prepare --config=FILE.py --config.data.prepared=DIR

  --config   a Python file whose get_config() returns a train.config.Config; its section `data` says what to prepare
  --workdir  the folder of the run, which finds them there; not needed with --config.data.prepared
  --config.data.source=more.jsonl, --config.data.tokenizer=DIR, ...   change single fields (train.main --help)

A preparation that was stopped or killed looks through all files again, which finds what is bad and held out, then goes
on making tokens behind the last 64 MB or so that are on disk. Tokens that are there already are checked, and told.

Exit status: 0 done; 2 a setting, file or folder does not fit; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import inspect
import os
import signal
import sys

if __name__ == '__main__':
  # The imports take seconds. SIGTERM ends the process at any time: every file is whole, or known not to be.
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))
  said = b'prepare: stopped by SIGTERM; the same command goes on\n'
  signal.signal(signal.SIGTERM, lambda *_: os.write(2, said) and os._exit(143))

from absl import app, flags

from train import config as configs, main as mains, metrics, workdir as workdirs
from train.config import UserError
from train.data import corpus as corpora, store


def main(argv):
  """Prepares; every expected failure is one line on stderr and an exit status."""
  try:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(argv) > 1:
      raise UserError(f'{argv[1]!r}: expected only flags')
    config, workdir = configs.load(flags.FLAGS.config), flags.FLAGS.workdir
    if not workdir and not config.data.prepared:
      raise UserError("--workdir='': expected the folder of a run, or --config.data.prepared=DIR")
    if workdir:
      workdirs.check(workdirs.expand(workdir), config)
    corpora.check_outside(config.data, workdir and workdirs.expand(workdir))
    corpus = store.open_or_prepare(config.data, workdir, vocab=config.model.vocab)
  except UserError as error:
    print(f'prepare: {error}', file=sys.stderr, flush=True)
    return 2
  except KeyboardInterrupt:
    print('prepare: stopped; the same command goes on', file=sys.stderr, flush=True)
    return 130
  print(table(corpus), flush=True)
  return 0


def table(corpus):
  """Lines that say what the prepared tokens are."""
  record, lines = corpus.record(), []
  parts = [('', corpus.parts)] + [(part.name, [part]) for part in corpus.parts if len(corpus.parts) > 1]
  for name, of in parts:
    for split, what in ((corpora.TRAIN, 'to train on'), (corpora.HELD_OUT, 'held out')):
      sides = [getattr(part, split) for part in of]
      lines.append((f'{name} {what}'.strip(), counts(sides, corpus.unit)))
  lines += [
    ('left out', f'{record["skipped_count"]:,} bad, {record["duplicate_count"]:,} duplicates'),
    *[('', f'{name}: {problem}') for name, problem in list(record['skipped'].items())[:5]],
    ('hash', corpus.hash),
    ('folder', str(corpus.folder)),
  ]
  return metrics.table(lines)


def counts(sides, unit):
  """'1,234 documents, 5,678 bytes, 1,300 tokens (4.37 bytes a token)' of some Tokens."""
  documents = sum(map(len, sides))
  size = sum(int(tokens.byte_counts.sum()) for tokens in sides)
  tokens = sum(len(tokens.stream) for tokens in sides)
  text = f'{size:,} bytes, {tokens:,} tokens ({size / max(tokens, 1):.2f} bytes a token)'
  return f'{documents:,} documents, ' + (f'{tokens:,} tokens' if unit == 'token' else text)


def parse(argv):
  """Flags of a command line, as train.main reads them."""
  if any(arg in ('--help', '-h', '-help', '--helpshort', '--helpfull') for arg in argv[1:]):
    print(inspect.cleandoc(__doc__ or ''))
    sys.exit(0)
  return mains.parse(argv, 'prepare')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
