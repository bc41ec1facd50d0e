"""Writes the model of a training run as a checkpoint that models.hf loads and `python -m models.generate` runs.

  python -m train.export --workdir=runs/quickstart --out=runs/quickstart/model
  python -m train.export --workdir=runs/quickstart --out=runs/llama --architecture=LlamaForCausalLM --step=500
  python -m train.export --workdir=runs/quickstart --out=runs/last --weights=raw

Without --architecture it is the native form, which holds any model of this project. Exit status: 0 done; 2 the run, the
folder or the architecture does not fit.
"""

import argparse
import os
import sys

from absl import logging

from models import adapters, hf
from models.hf.tokenizers import FILE
from train import checkpoint, workdir as workdirs
from train.config import UserError
from train.data import tokenizers


def export(workdir, out, *, architecture=None, step=None, weights=''):
  """Saves the parameters of a run's checkpoint, its DecoderConfig, and its tokenizer, if it had one.

  Adapters are merged into the weights. Tensors have the dtypes of the run's parameters: averages of bfloat16 ones,
  which the run keeps and evaluates in float32, are rounded.

  Args:
    workdir: of the run.
    out: a new or empty folder.
    architecture: of published checkpoints, 'LlamaForCausalLM' and the like; None means the native form.
    step: of the checkpoint; None means the newest.
    weights: 'ema' for the averages of the parameters, 'raw' for the last ones, '' for averages if the run kept them.

  Returns:
    The step.

  Raises:
    UserError: no run or checkpoint there, or `out` holds files.
    ValueError: the architecture is unknown, or cannot express the model; nothing is written then.
  """
  out = workdirs.expand(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'out {out}: expected a new or empty folder; nothing was changed')
  config, model, step = checkpoint.load_model(workdir, step, weights)
  model, model_config = adapters.merged(model, config.model)
  used = tokenizers.load(config.data)
  tokenizer = 'bytes' if used.fingerprint == 'bytes' else _folder(workdir, used) if used.path else None
  settings = {'bos_token_id': used.separator, 'eos_token_id': used.separator}
  hf.save(out, model, model_config, architecture=architecture, settings=settings, tokenizer=tokenizer)
  return step


def _folder(workdir, used):
  """The folder of a run's tokenizer file, if that is still the one the run was trained with."""
  files = workdirs.read_json(workdirs.expand(workdir) / workdirs.CORPUS)['files']
  if used.fingerprint[:16] not in [digest for _, side, _, digest in files if side == 'tokenizer']:
    raise UserError(f'{used.path}: the tokenizer has changed since the run began; nothing was written')
  if os.path.basename(used.path) != FILE:
    raise UserError(f'{used.path}: expected a file called {FILE}, as loading the checkpoint will; nothing was written')
  return os.path.dirname(used.path)


def main(argv=None):
  """Runs the command; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m train.export', description='Write the model of a training run as a checkpoint.', allow_abbrev=False
  )
  parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of the run')
  parser.add_argument('--out', required=True, metavar='DIR', help='new or empty folder to write')
  parser.add_argument('--architecture', metavar='NAME', help='as LlamaForCausalLM; without it, the native form')
  parser.add_argument('--step', type=int, help='of the checkpoint; without it, the newest')
  parser.add_argument(
    '--weights', choices=('ema', 'raw'), default='', help='averages or last ones; without it, averages if there are any'
  )
  args = parser.parse_args(argv)
  logging.set_verbosity(logging.ERROR)
  try:
    step = export(args.workdir, args.out, architecture=args.architecture, step=args.step, weights=args.weights)
  except (ValueError, OSError) as error:
    print(f'python -m train.export: {error}', file=sys.stderr)
    return 2
  print(f'{os.path.relpath(args.out)}: the model after {step} steps')
  return 0


if __name__ == '__main__':
  sys.exit(main())
