"""Keeps what is worth keeping of a run as one small JSON file, which a report of another run can show beside its own.

  python -m experiments.store_result --workdir=runs/quickstart_long --out=experiments/results/quickstart_long.json

The file holds: `command`, `remark`, `config`, `parameters`, `steps`, `tokens`, `seconds`, `tokens_per_second`, `mfu`;
`held_out` (bits_per_byte, bytes); `compressors` (bits per byte of the same files); `curve` (`train` and `held_out`,
points of [step, tokens trained on, bits per byte], at most 200 each); `corpus` (hash, files and bytes of both sides);
device, date and versions, as result.json of the run says; and `stored_at_commit`, the revision of the checkout that
wrote the file. A run may have been computed by an earlier one: `remark` is the place to say so.
"""

import argparse
import json
import os
import sys

from experiments import compressors, machine, runs
from train import config as configs
from train.config import UserError

MOST_POINTS = 200


def record(run, files, *, command='', remark=''):
  """What the file holds, as a dictionary.

  Args:
    run: experiments.runs.Run, finished.
    files: [(name, bytes)], its held-out files.
    command: that trained it.
    remark: what a reader of the figures has to know; README and reports show it.

  Raises:
    UserError: the run is not finished.
  """
  if not run.result:
    raise UserError(f'workdir {run.workdir}: expected a finished run, found one at step {run.steps}')
  return {
    'command': command,
    'remark': remark,
    'device': run.device,
    'date': run.date,
    'versions': run.result['versions'],
    'stored_at_commit': machine.commit(),
    'parameters': run.parameters,
    'steps': run.steps,
    'tokens': run.train[-1]['tokens_so_far'],
    'seconds': run.seconds,
    'tokens_per_second': run.tokens_per_second,
    'mfu': run.mfu,
    'held_out': {name: run.final[name] for name in ('bits_per_byte', 'bytes')},
    'compressors': compressors.bits_per_byte(files),
    'curve': {'train': points(run.train), 'held_out': points(run.held_out)},
    'corpus': {name: run.corpus[name] for name in ('hash', 'train', 'held_out')},
    'config': configs.to_dict(run.config),
  }


def points(lines):
  """[[step, tokens so far, bits per byte], ...] of metric lines, evenly thinned to MOST_POINTS; the last one stays."""
  every = -(-len(lines) // MOST_POINTS)
  kept = lines[::-1][:: max(every, 1)][::-1]
  return [[line['step'], line['tokens_so_far'], round(line['bits_per_byte'], 4)] for line in kept]


def main(argv=None):
  parser = argparse.ArgumentParser(
    prog='python -m experiments.store_result', description='Keeps the result of a finished run as a small JSON file.'
  )
  parser.add_argument('--workdir', required=True, help='folder of the run')
  parser.add_argument('--out', required=True, help='JSON file to write')
  parser.add_argument('--command', default='', help='the command that trained it, for the record')
  parser.add_argument('--remark', default='', help='what a reader of the figures has to know, shown beside them')
  arguments = parser.parse_args(argv)
  try:
    run = runs.read(arguments.workdir)
    values = record(run, runs.held_out_files(run), command=arguments.command, remark=arguments.remark)
  except UserError as error:
    print(f'store_result: {error}', file=sys.stderr)
    return 2
  os.makedirs(os.path.dirname(os.path.abspath(arguments.out)), exist_ok=True)
  with open(arguments.out, 'w', encoding='utf-8') as file:
    json.dump(values, file, indent=1)
    file.write('\n')
  bits = values['held_out']['bits_per_byte']
  print(f'wrote {arguments.out}: {bits:.3f} bits per byte after {values["steps"]:,} steps')
  return 0


if __name__ == '__main__':
  sys.exit(main())
