"""How fast are decoding and the import of a checkpoint on this machine, beside transformers and beside the disk?

  python -m experiments.bench_generate
  python -m experiments.bench_generate --only=import

Claims, on a CPU: a Llama of 110 million parameters writes at least as many tokens per second as transformers' own
model, from the same checkpoint and with the same tokens (64 tokens of prompt, 128 new ones, greedy, float32, rows 1
and 8); a checkpoint of 1 GB is loaded at half the speed of a plain read of its file, or better. Cost: 10 minutes on 2
cores. Result: experiments/results/bench_generate.json.

Whatever is compared runs in turns in one process, and the figure is the median over neighbouring pairs. Decoding needs
the extra `bench` (pip install -e .[bench]). The checkpoint is written to the folder for temporary files (TMPDIR), which
should be on a disk.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import machine, timing
from experiments.bench_core import say, write
from models import hf, size
from models.config import DecoderConfig
from models.decoder import Decoder
from models.generate import generate

RESULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results', 'bench_generate.json')
AT_LEAST = {'decode': 1.0, 'import': 0.5}
TORCH_THREADS = 2
BLOCK = 16 << 20  # bytes of a plain read at once


def llama(**fields):
  """A DecoderConfig that LlamaForCausalLM can express."""
  return DecoderConfig(tied_embeddings=True, embed_scale=1.0, norm_eps=1e-5, **fields)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of what is measured; `TINY` makes a run of seconds whose figures mean nothing."""

  decoder: DecoderConfig = dataclasses.field(
    default_factory=lambda: llama(vocab=32000, width=768, depth=12, heads=12, mlp_width=2048)
  )
  batches: tuple[int, ...] = (1, 8)
  prompt: int = 64
  new: int = 128
  seconds: float = 90.0
  file: DecoderConfig = dataclasses.field(
    default_factory=lambda: llama(
      vocab=32000, width=1536, depth=16, heads=16, mlp_width=4096, param_dtype='bfloat16', dtype='bfloat16'
    )
  )
  loads: int = 7


def tiny():
  """Sizes of the tests."""
  decoder = llama(vocab=64, width=32, depth=2, heads=2, mlp_width=48)
  file = dataclasses.replace(decoder, param_dtype='bfloat16', dtype='bfloat16')
  return Sizes(decoder=decoder, batches=(1, 2), prompt=4, new=6, seconds=0.05, file=file, loads=2)


def random_model(config):
  """A decoder of the config whose parameters are random, made in numpy: norms about 1, matrices of unit gain."""
  graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(0)

  def fill(path, x):
    values = rng.standard_normal(x.shape, np.float32)
    name = jax.tree_util.keystr(path)
    if 'scale' in name:
      return jnp.asarray(1 + 0.1 * values, x.dtype)
    inputs = x.shape[-1 if 'table' in name else -2]
    return jnp.asarray(values * inputs**-0.5, x.dtype)

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, params))


def decode(sizes):
  """models.generate beside transformers' generate, on the weights of one checkpoint; None without transformers."""
  try:
    import torch
    import transformers
  except ImportError as error:
    say(f'decode: left out, transformers and PyTorch are needed ({error}); pip install -e .[bench]')
    return None
  with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of the other libraries' making
    torch.set_num_threads(TORCH_THREADS)
    hf.save(os.path.join(folder, 'llama'), random_model(sizes.decoder), sizes.decoder, architecture='LlamaForCausalLM')
    ours = hf.load(os.path.join(folder, 'llama')).model
    theirs = transformers.LlamaForCausalLM.from_pretrained(os.path.join(folder, 'llama'), dtype=torch.float32)
    theirs.eval()
    rows = [compare(sizes, batch, ours, theirs) for batch in sizes.batches]
  count = size.parameters(sizes.decoder)
  return {'shape': f'Llama, {count / 1e6:.1f} M parameters, float32, greedy, {sizes.prompt} + {sizes.new} tokens',
          'first': f'transformers {importlib.metadata.version("transformers")}, '
                   f'attention {theirs.config._attn_implementation}, {TORCH_THREADS} threads of PyTorch',
          'second': 'models.generate', 'parameters': count, 'times': rows}  # fmt: skip


def compare(sizes, batch, ours, theirs):
  """Tokens per second of both for one number of rows; RuntimeError unless the tokens are the same."""
  import torch
  from transformers import GenerationConfig

  prompt = np.random.default_rng(1).integers(0, sizes.decoder.vocab, (batch, sizes.prompt))
  ids = torch.tensor(prompt)
  settings = GenerationConfig(max_new_tokens=sizes.new, do_sample=False, eos_token_id=None, pad_token_id=0)

  def first():
    with torch.inference_mode():
      out = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out[:, sizes.prompt :].tolist()

  second = lambda: [row[0] for row in generate(ours, prompt, sizes.new).tokens]
  tokens = first(), second()
  if tokens[0] != tokens[1]:
    at = next(i for i, (a, b) in enumerate(zip(*map(np.ravel, tokens))) if a != b)
    raise RuntimeError(f'B={batch}: tokens of transformers and of models.generate differ from number {at} on')
  times = timing.in_turns(lambda: len(first()), lambda: len(second()), seconds=sizes.seconds)
  speeds = {f'{name}_tokens_per_second': batch * sizes.new / times[f'{name}_s'] for name in ('first', 'second')}
  say(f'decode B={batch}: {times["ratio"]:.2f} of the speed of transformers (goal: at least {AT_LEAST["decode"]}), '
      f'{speeds["second_tokens_per_second"]:.0f} and {speeds["first_tokens_per_second"]:.0f} tokens/s')  # fmt: skip
  return {'B': batch, **times, **speeds, 'at_least': AT_LEAST['decode']}


def imports(sizes):
  """hf.load beside a plain read of the same file, with the system's cache emptied of it before each, and with it.

  The goal is for the first. In the second a plain read is one copy in memory, and a load cannot be but several.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'model'
    hf.save(path, random_model(sizes.file), sizes.file, architecture='LlamaForCausalLM')
    files = sorted(path.glob('*.safetensors'))
    count = sum(file.stat().st_size for file in files)
    forget(files)
    compiling = timing.once(lambda: load(path))
    rows = []
    for name, goal in (('cold', AT_LEAST['import']), ('warm', None)):
      pairs = [alternate(i, path, files, is_cold=name == 'cold') for i in range(sizes.loads)]
      ratios = sorted(read / load for read, load in pairs)
      first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
      ratio = statistics.median(ratios)
      goal_text = f' (goal: at least {goal})' if goal else ''
      say(f'import of {count / 1e9:.2f} GB, {name}: {ratio:.2f} of the speed of a plain read{goal_text}, '
          f'{count / second / 1e9:.2f} and {count / first / 1e9:.2f} GB/s')  # fmt: skip
      rows.append({'cache': name, 'first_s': first, 'second_s': second, 'ratio': ratio, 'ratio_low': ratios[0],
                   'ratio_high': ratios[-1], 'pairs': pairs, 'at_least': goal})  # fmt: skip
    memory = peak(path)
  say(f'import: {memory["peak_bytes"] / 1e9:.2f} GB of memory at most, {memory["before_bytes"] / 1e9:.2f} GB before')
  return {'shape': f'Llama, bfloat16, {count:,} bytes', 'bytes': count, 'first': f'read in blocks of {BLOCK >> 20} MiB',
          'second': 'hf.load', 'times': rows, 'first_load_s': compiling, 'memory': memory}  # fmt: skip


def alternate(i, path, files, is_cold):
  """(seconds of a plain read, seconds of hf.load), in an order that changes with i."""

  def plain():
    buffer = bytearray(BLOCK)
    for file in files:
      with open(file, 'rb', buffering=0) as stream:
        while stream.readinto(buffer):
          pass

  seconds = {}
  runs = {'read': plain, 'load': lambda: load(path)}
  for name in list(runs)[:: 1 if i % 2 else -1]:
    if is_cold:
      forget(files)
    seconds[name] = timing.once(runs[name])
  return seconds['read'], seconds['load']


def load(path):
  """The parameters of a checkpoint, without a progress bar."""
  return nnx.state(hf.load(path, progress=lambda done, total, name: None).model)


def forget(files):
  """Asks the system to drop what it holds of the files in memory; the disk itself may hold more."""
  for file in files:
    with open(file, 'rb') as stream:
      os.fsync(stream.fileno())  # what is not written yet would stay
      os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak(path):
  """Largest memory of a process that loads a checkpoint, and what it held before."""
  code = (
    'import re, sys, jax\n'
    'from models import hf\n'
    # Not getrusage: its maximum has that of the process which started this one.
    "most = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    'jax.block_until_ready(jax.numpy.zeros(1))\n'
    'before = most()\n'
    'loaded = hf.load(sys.argv[1])\n'
    'print(before, most())\n'
  )
  root = pathlib.Path(__file__).parents[1]
  run = subprocess.run([sys.executable, '-c', code, str(path)], cwd=root, capture_output=True, text=True, check=False)
  if run.returncode:
    raise RuntimeError(f'loading in another process failed: {run.stderr}')
  before, most = map(int, run.stdout.split())
  return {'before_bytes': before, 'peak_bytes': most}


PARTS = {'decode': decode, 'import': imports}


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m experiments.bench_generate', description=__doc__.split('\n')[0])
  parser.add_argument('--only', choices=tuple(PARTS), help='measure one part; others keep their stored figures')
  parser.add_argument('--out', default=RESULT, help='JSON file to write')
  parser.add_argument('--tiny', action='store_true', help='seconds instead of minutes; the figures mean nothing')
  arguments = parser.parse_args(argv)
  stored = {}
  if os.path.exists(arguments.out):
    with open(arguments.out, encoding='utf-8') as file:
      stored = json.load(file)
  say(f'on {machine.facts()["device"]}, {machine.facts()["cores"]} cores')
  names = [arguments.only] if arguments.only else list(PARTS)
  missing = []
  for name in names:
    figures = PARTS[name](tiny() if arguments.tiny else Sizes())
    if figures is None:
      missing.append(name)
      continue
    stored[name] = {**machine.facts(), 'is_tiny': arguments.tiny, **figures}
    write(stored, arguments.out)  # after each part: a failure in the next must not lose minutes
    say(f'wrote {name} to {arguments.out}')
  return 1 if missing else 0


if __name__ == '__main__':
  sys.exit(main())
