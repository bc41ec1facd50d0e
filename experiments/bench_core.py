"""How fast is the core on this machine: attention beside jax.nn, the loop, a step beside PyTorch, the import?

  python -m experiments.bench_core
  python -m experiments.bench_core --only=attention

Claims, on a CPU: attention takes at most 0.6 of jax.nn's time at T = 512 and 0.4 above, in memory that grows no
faster than T; the loop costs at most 3% over a bare step; a step takes no longer than eager PyTorch's; `import attn`
takes less than 1.5 s. Cost: 5 minutes on 2 cores. Result: experiments/results/bench_core.json.

Whatever is compared runs in turns in one process, and the figure is the median over neighbouring pairs. The comparison
with PyTorch needs the extra `bench` (pip install -e .[bench]).
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import softmax
from experiments import machine, timing

RESULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results', 'bench_core.json')
# What the figures are held against; a line is printed beside each, and nothing fails.
AT_MOST = {
  'attention 512': 0.6,
  'attention above': 0.4,
  'memory exponent': 1.1,
  'loop': 1.03,
  'step': 1.0,
  'import': 1.5,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of what is measured; `TINY` makes a run of seconds whose figures mean nothing."""

  # (B, T). With B = 1 the scores of T = 512 lie in the cache, and jax.nn runs at the speed of its products.
  shapes: tuple[tuple[int, int], ...] = ((1, 512), (4, 512), (1, 2048), (1, 8192))
  memory_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
  heads: int = 8
  head_dim: int = 64
  seconds: float = 12.0
  width: int = 256
  depth: int = 4
  batch: int = 16
  seq_len: int = 256
  loop_steps: int = 25
  loop_rounds: int = 5
  imports: int = 7


TINY = Sizes(((1, 16), (1, 32)), (32, 64), 2, 8, 0.05, 32, 2, 2, 16, 4, 1, 1)


def attention(sizes):
  """softmax.attend('xla') against jax.nn.dot_product_attention('xla'), causal, float32."""
  rows = []
  for B, T in sizes.shapes:
    shape = (B, T, sizes.heads, sizes.head_dim)
    q, k, v, g = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    for name, arguments in (('forward', (q, k, v)), ('forward+backward', (q, k, v, g))):
      ours, theirs = (compiled(f, name, shape) for f in (attn_xla, jax_nn_xla))
      difference = relative_difference(ours(*arguments), theirs(*arguments))
      calls = (functools.partial(f, *arguments) for f in (ours, theirs))
      times = timing.in_turns(*calls, seconds=sizes.seconds)
      limit = AT_MOST['attention 512'] if T <= 512 else AT_MOST['attention above']
      say(
        f'attention B={B} T={T} {name}: {times["ratio"]:.2f} of jax.nn (goal: at most {limit}), '
        f'{1e3 * times["first_s"]:.1f} ms; results differ by {difference:.0e}'
      )
      rows.append({'B': B, 'T': T, 'pass': name, **times, 'at_most': limit, 'relative_difference': difference})
  return {
    'shape': 'H={heads} D={head_dim} float32 causal'.format_map(dataclasses.asdict(sizes)),
    'first': "attn.softmax.attend(implementation='xla')",
    'second': "jax.nn.dot_product_attention(implementation='xla')",
    'times': rows,
    'memory': memory(sizes),
  }


def memory(sizes):
  """Temporary bytes at several lengths, by the compiler's account, and the exponent p of bytes ~ T^p between the two
  longest."""
  rows = []
  for name in ('forward', 'forward+backward'):
    row: dict[str, Any] = {'pass': name, 'T': list(sizes.memory_lengths)}
    for label, function in (('first', attn_xla), ('second', jax_nn_xla)):
      shapes = [(1, T, sizes.heads, sizes.head_dim) for T in sizes.memory_lengths]
      sizes_in_bytes = [compiled(function, name, s).memory_analysis().temp_size_in_bytes for s in shapes]
      row[f'{label}_bytes'] = sizes_in_bytes
      T, longer = sizes.memory_lengths[-2:]
      row[f'{label}_exponent'] = math.log(sizes_in_bytes[-1] / sizes_in_bytes[-2]) / math.log(longer / T)
    rows.append(row)
    say(
      f'memory {name}: T={longer} takes {row["first_bytes"][-1] / 2**20:.1f} MiB, jax.nn '
      f'{row["second_bytes"][-1] / 2**20:.0f} MiB; bytes grow as T^{row["first_exponent"]:.2f} '
      f'(goal: at most {AT_MOST["memory exponent"]}), jax.nn as T^{row["second_exponent"]:.2f}'
    )
  return rows


def attn_xla(q, k, v):
  """What is measured."""
  return softmax.attend(q, k, v, is_causal=True, implementation='xla')


def jax_nn_xla(q, k, v):
  """What it is measured against."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='xla')


def compiled(function, name, shape):
  """`function` of q, k, v, or with name 'forward+backward' its result and gradients from q, k, v and a cotangent."""

  def both(q, k, v, g):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(g)

  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * (3 if name == 'forward' else 4)
  return jax.jit(function if name == 'forward' else both).lower(*arrays).compile()


def relative_difference(a, b):
  """Largest difference of two trees of arrays, each as a share of the largest value of its array in b."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)


def imports(sizes):
  """Seconds of `import attn` in fresh processes, and of `import jax`, which it needs."""
  seconds = {}
  for name in ('jax', 'attn'):
    code = f'import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)'
    run = lambda code=code: float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True).stdout)
    run()  # compiles the sources and warms the disk's cache
    seconds[name] = statistics.median(run() for _ in range(sizes.imports))
  say(f'import attn: {seconds["attn"]:.2f} s (goal: under {AT_MOST["import"]}), of which jax {seconds["jax"]:.2f} s')
  return {'attn_s': seconds['attn'], 'jax_s': seconds['jax'], 'at_most': AT_MOST['import'], 'processes': sizes.imports}


def step(sizes):
  """A training step of a decoder against the same model in eager PyTorch, from the same parameters, on the CPU."""
  try:
    import torch

    from experiments import torch_twin
  except ImportError as error:
    say(f'step: left out, PyTorch is not installed ({error}); pip install -e .[bench]')
    return None
  config, params, ours = jax_step(sizes)
  twin = torch_twin.Decoder(config.model, sizes.seq_len)
  twin.copy_from(params)
  theirs = torch_twin.make_step(twin, config.optimizer)
  rows = np.random.default_rng(0).integers(0, 256, (sizes.batch, sizes.seq_len + 1))
  tokens, targets = jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])
  torch_tokens, torch_targets = torch.tensor(rows[:, :-1]), torch.tensor(rows[:, 1:])
  losses = ours(tokens, targets), theirs(torch_tokens, torch_targets)
  if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
    raise RuntimeError(f'losses {losses[0]} (jax) and {losses[1]} (PyTorch) of the same parameters must agree to 1e-4')
  run = lambda: ours(tokens, targets), lambda: theirs(torch_tokens, torch_targets)
  times = timing.in_turns(*run, seconds=2 * sizes.seconds, least=5)
  last = ours(tokens, targets), theirs(torch_tokens, torch_targets)
  count = sum(p.size for p in params.values())
  say(
    f'step: {times["ratio"]:.2f} of PyTorch (goal: at most {AT_MOST["step"]}), {1e3 * times["first_s"]:.0f} ms; '
    f'losses {losses[0]:.6f} and {losses[1]:.6f}, after {times["pairs"] + 2} steps {last[0]:.4f} and {last[1]:.4f}'
  )
  return {
    'shape': f'depth={sizes.depth} width={sizes.width} B={sizes.batch} T={sizes.seq_len} AdamW float32',
    'first': 'models.decoder, jitted',
    'second': f'eager PyTorch, {torch.get_num_threads()} threads',
    'parameters': count,
    **times,
    'at_most': AT_MOST['step'],
    'first_losses': losses,
    'last_losses': last,
  }


def loop(sizes):
  """The training loop, with its data, metrics and progress, against its own jitted step on batches made before.

  The two run in turns: some steps of the loop, which each time goes on with its run, some of the bare step. Compiling,
  evaluating and saving are left out of both.
  """
  from train import loop as train_loop

  rounds = []
  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    config, n = loop_config(sizes, folder), sizes.loop_steps
    bare, seconds = bare_step(config, os.path.join(folder, 'run')), 0.0
    for i in range(sizes.loop_rounds):
      config.train.steps = (i + 1) * n
      now = train_loop.run(config, os.path.join(folder, 'run'))['seconds']
      # A run does not time the first step after a start, which compiles.
      rounds.append(((now - seconds) / (n - 1), bare(n)))
      seconds = now
      print(f'loop: round {i + 1} of {sizes.loop_rounds}', file=sys.stderr, flush=True)
  ratio = statistics.median(a / b for a, b in rounds)
  first, second = (statistics.median(times) for times in zip(*rounds, strict=True))
  times = f'{1e3 * first:.0f} and {1e3 * second:.0f} ms'
  say(f'loop: {ratio:.3f} of a bare step (goal: at most {AT_MOST["loop"]}), {times}')
  return {'shape': f'depth={sizes.depth} width={sizes.width} B={sizes.batch} T={sizes.seq_len}', 'first': 'train.loop',
          'second': 'its jitted step', 'first_s': first, 'second_s': second, 'ratio': ratio,
          'rounds': rounds, 'steps_a_round': n, 'at_most': AT_MOST['loop']}  # fmt: skip


def loop_config(sizes, folder):
  """The config of a run on some files of the standard library, which are copied below `folder`."""
  from models.config import DecoderConfig, LayerSpec
  from train.config import Config, DataConfig, LogConfig, MeshConfig, OptimizerConfig

  text = os.path.join(folder, 'text')
  os.mkdir(text)
  for name in ('argparse', 'ast', 'dataclasses', 'datetime', 'difflib', 'doctest', 'enum', 'inspect', 'typing'):
    shutil.copy(os.path.join(sysconfig.get_paths()['stdlib'], f'{name}.py'), text)
  layers = [LayerSpec(window=min(64, sizes.seq_len)), LayerSpec()]
  return Config(
    model=DecoderConfig(vocab=288, width=sizes.width, depth=sizes.depth, heads=4, layers=layers),
    data=DataConfig(source=text, seq_len=sizes.seq_len, batch=sizes.batch, held_out_percent=0.1),
    optimizer=OptimizerConfig(schedule='constant', warmup_steps=0),
    mesh=MeshConfig(data=1),
    log=LogConfig(plain_seconds=1e9),
  )


def bare_step(config, workdir):
  """A function of n: runs n steps of the loop's jitted step on batches on the device, returns seconds a step."""
  from train import data, program, sharding
  from train.data import store

  made = program.make(config, sharding.make_mesh(config.mesh))
  held = [made.first_state()]
  corpus = store.open_or_prepare(config.data, workdir)
  rows = data.Rows(corpus.parts[0].train, config.data.seq_len, separator=corpus.separator)
  B, jitted = config.data.batch, made.train_step
  batches = [jax.device_put(rows(np.arange(i * B, (i + 1) * B) % len(rows)), made.by_rows) for i in range(8)]
  held[0], _ = jitted(held[0], batches[0])

  def run(n):
    start = time.perf_counter()
    for i in range(n):
      held[0], sums = jitted(held[0], batches[i % len(batches)])
    jax.block_until_ready((held[0], sums))
    return (time.perf_counter() - start) / n

  return run


def jax_step(sizes):
  """(config, copied parameters, function of (tokens, targets) that trains by one step and returns the loss)."""
  from flax import nnx

  from models import state
  from models.config import DecoderConfig, LayerSpec
  from models.decoder import Decoder
  from train import config as train_config, loss, optimizer

  model = DecoderConfig(vocab=288, width=sizes.width, depth=sizes.depth, heads=4, layers=[LayerSpec()])
  config = train_config.Config(model=model, optimizer=train_config.OptimizerConfig(schedule='constant', warmup_steps=0))
  graph, params = state.split(Decoder(model, rngs=nnx.Rngs(0)))
  tx = optimizer.make(config.optimizer, 1000, params)
  held = [params, tx.init(params)]

  def objective(params, tokens, targets):
    ones = jnp.ones(targets.shape)
    sums = loss.cross_entropy(state.merge(graph, params)(tokens), targets, ones, ones)
    return sums['nll'] / sums['tokens']

  def update(params, opt_state, tokens, targets):
    value, grads = jax.value_and_grad(objective)(params, tokens, targets)
    updates, opt_state = tx.update(grads, opt_state, params)
    return jax.tree.map(jnp.add, params, updates), opt_state, value

  jitted = jax.jit(update, donate_argnums=(0, 1))

  def run(tokens, targets):
    held[0], held[1], value = jitted(*held, tokens, targets)
    return float(value)

  return config, {path: np.array(array) for path, array in params.items()}, run


def say(text):
  """One line of progress."""
  print(text, flush=True)


def write(stored, path):
  """Writes the JSON file."""
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(stored, file, indent=1)
    file.write('\n')


PARTS = {'attention': attention, 'loop': loop, 'step': step, 'import': imports}


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m experiments.bench_core', description=__doc__.split('\n')[0])
  parser.add_argument('--only', choices=tuple(PARTS), help='measure one part; others keep their stored figures')
  parser.add_argument('--out', default=RESULT, help='JSON file to write')
  parser.add_argument('--tiny', action='store_true', help='seconds instead of minutes; the figures mean nothing')
  arguments = parser.parse_args(argv)
  stored = {}
  if arguments.only and os.path.exists(arguments.out):
    with open(arguments.out, encoding='utf-8') as file:
      stored = json.load(file)
  say(f'on {machine.facts()["device"]}, {machine.facts()["cores"]} cores')
  for name in [arguments.only] if arguments.only else PARTS:
    figures = PARTS[name](TINY if arguments.tiny else Sizes())
    if figures is not None:
      stored[name] = {**machine.facts(), 'is_tiny': arguments.tiny, **figures}
      write(stored, arguments.out)  # after each part: a failure in the next must not lose minutes
  say(f'wrote {arguments.out}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
