"""What does all that a run does beside its steps cost, and how long does a checkpoint hold it up?

  python -m experiments.bench_train

Three programs run in turns: some steps of the loop with everything on (metrics, TensorBoard, averages, steps left out
if not finite, checkpoints in the background with SHA-256 manifests), as many of its own jitted step alone, and as many
of the same step without averages and skipping. Evaluating and compiling are left out.

Claims, on a CPU: away from saves the loop takes at most 1.03 of its bare step's time; a save makes the steps from it to
the next save take at most one step longer in all, whatever then runs in the background. Cost: 8 minutes on 2 cores.
Result: experiments/results/bench_train.json.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import statistics
import sys
import tempfile
import time
from typing import Any

from experiments import bench_core, machine

RESULT = os.path.join(os.path.dirname(bench_core.RESULT), 'bench_train.json')
AT_MOST = {'loop': 1.03, 'stall': 1.0}  # what the figures are held against; a line is printed, and nothing fails


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of what is measured; `TINY` makes a run of seconds whose figures mean nothing."""

  width: int = 256
  depth: int = 4
  batch: int = 16
  seq_len: int = 256
  steps: int = 36  # a round
  every: int = 12  # steps between saves
  rounds: int = 4


TINY = Sizes(32, 2, 2, 16, 8, 4, 1)
QUIET = 3  # steps before a save that count as away from the last one


def everything(config, sizes):
  """The config of bench_core's loop with all that may cost something."""
  config.train.ema_decay, config.train.skip_nonfinite = 0.999, 3
  config.checkpoint.every, config.checkpoint.seconds = sizes.every, 0.0
  config.log.tensorboard = True
  return config


def measure(sizes):
  """Runs the rounds; returns the figures."""
  from train import data, loop

  marks: list[float] = []
  real = data.to_global

  def to_global(local, arrays, batch, sharding):
    if batch == sizes.batch:  # not one of an evaluation
      marks.append(time.perf_counter())
    return real(local, arrays, batch, sharding)

  rounds: dict[str, list[Any]] = {'loop': [], 'windows': [], 'bare': [], 'plain': []}
  data.to_global = to_global
  try:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
      config = bench_core.loop_config(sizes, folder)
      plain = bench_core.bare_step(config, os.path.join(folder, 'plain'))
      config = everything(config, sizes)
      config.eval.batch = sizes.batch + 1
      bare, workdir = bench_core.bare_step(config, os.path.join(folder, 'bare')), os.path.join(folder, 'run')
      for i in range(sizes.rounds):
        # One step more, so that the last save is not that of the end; its start is the first step's end.
        config.train.steps = (i + 1) * (sizes.steps + 1)
        marks.clear()
        loop.run(config, workdir)
        at, last = i * (sizes.steps + 1), len(marks)
        steps = {at + 1 + j: marks[j + 1] - marks[j] for j in range(1, last - 1)}  # the first one compiles
        rounds['loop'].append(statistics.median(seconds for step, seconds in steps.items() if is_quiet(step, sizes)))
        rounds['windows'].append(windows(steps, sizes))
        rounds['bare'].append(bare(sizes.steps // 2))
        rounds['plain'].append(plain(sizes.steps // 2))
        print(f'round {i + 1} of {sizes.rounds}', file=sys.stderr, flush=True)
      size = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(f'{workdir}/checkpoints')
                 for name in names) / len(os.listdir(f'{workdir}/checkpoints'))  # fmt: skip
  finally:
    data.to_global = real
  return figures(rounds, size, sizes)


def is_quiet(step, sizes):
  """Whether a step is away from saves: one of the last before the next."""
  return sizes.every - QUIET <= step % sizes.every


def windows(steps, sizes):
  """Seconds by which the steps from a save to the next exceed as many quiet ones, for each save with all of them."""
  found = []
  quiet = statistics.median(seconds for step, seconds in steps.items() if is_quiet(step, sizes))
  for save in range(sizes.every * (min(steps) // sizes.every + 1), max(steps), sizes.every):
    window = [steps[step] for step in range(save, save + sizes.every) if step in steps]
    if len(window) == sizes.every:
      found.append(sum(window) - sizes.every * quiet)
  return found


def figures(rounds, size, sizes):
  """What is stored, and printed."""
  loop_s, bare_s, plain_s = (statistics.median(rounds[name]) for name in ('loop', 'bare', 'plain'))
  ratio = statistics.median(a / b for a, b in zip(rounds['loop'], rounds['bare'], strict=True))
  to_plain = statistics.median(a / b for a, b in zip(rounds['loop'], rounds['plain'], strict=True))
  stalls = [extra / bare for extras, bare in zip(rounds['windows'], rounds['bare'], strict=True) for extra in extras]
  stall = statistics.median(stalls)
  bench_core.say(
    f'loop with everything on: {ratio:.3f} of its jitted step (goal: at most {AT_MOST["loop"]}), {to_plain:.3f} of one '
    f'without averages and skipping; {1e3 * loop_s:.0f}, {1e3 * bare_s:.0f} and {1e3 * plain_s:.0f} ms'
  )
  bench_core.say(
    f'a save of {size / 1e6:.0f} MB: {stall:.2f} steps (goal: at most {AT_MOST["stall"]}), {stall * bare_s:.3f} s'
  )
  return {
    'shape': f'depth={sizes.depth} width={sizes.width} B={sizes.batch} T={sizes.seq_len} save every {sizes.every}',
    'first': 'train.loop with TensorBoard, averages, skipping, checkpoints with manifests',
    'second': 'its jitted step',
    'third': 'the jitted step without averages and skipping',
    'first_s': loop_s,
    'second_s': bare_s,
    'third_s': plain_s,
    'ratio': ratio,
    'ratio_to_third': to_plain,
    'at_most': AT_MOST['loop'],
    'stall_steps': stall,
    'stalls': stalls,
    'stall_at_most': AT_MOST['stall'],
    'checkpoint_bytes': int(size),
    'rounds': rounds,
  }


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m experiments.bench_train', description=__doc__.split('\n')[0])
  parser.add_argument('--out', default=RESULT, help='JSON file to write')
  parser.add_argument('--tiny', action='store_true', help='seconds instead of minutes; the figures mean nothing')
  arguments = parser.parse_args(argv)
  bench_core.say(f'on {machine.facts()["device"]}, {machine.facts()["cores"]} cores')
  found = measure(TINY if arguments.tiny else Sizes())
  bench_core.write({**machine.facts(), 'is_tiny': arguments.tiny, **found}, arguments.out)
  bench_core.say(f'wrote {arguments.out}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
