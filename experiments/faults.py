"""Does a run that is killed and damaged at random points end with every bit of one that was left alone?

  python -m experiments.faults --points=100 --out=experiments/results/faults.json

A small model trains; again and again its process gets SIGKILL: in a step, in a save (from the first copied array to the
last deleted file of an older checkpoint), or while it restores. After some kills a bit of a random file of the newest
checkpoint, or of its manifest, is flipped, or the file is cut short or deleted. After each point the newest whole
checkpoint is read and compared, bit by bit, with the state of a run that nothing happened to, at the same step:
parameters, optimizer, averages, counts, place in the data. Then the run goes on.

Claim: no bit differs, and no damage goes unnoticed. Cost: about 5 seconds a point on 2 cores. The same command
continues an interrupted one. Exit status: 0; 1 if a bit differs or damage was not found.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

import jax
import numpy as np
from tqdm import tqdm

from experiments import bench_core, machine
from models.config import DecoderConfig, LayerSpec
from train import checkpoint, config as configs, data, loop, program, sharding, shelf as shelves

STEPS, EVERY, KEEP = 48, 3, 3
KINDS = {'step': 4, 'save': 4, 'restore': 1}  # where the process is killed, and how often
DAMAGES = {'': 3, 'bit': 2, 'cut': 1, 'gone': 1}  # what is then done to the newest checkpoint
STEP_SECONDS, SAVE_SECONDS, RESTORE_SECONDS = 0.01, 0.3, 0.3  # in which a kill is spread, from the beginning of one


def config(text):
  """Of a run of seconds with everything that a checkpoint can hold."""
  return configs.Config(
    model=DecoderConfig(vocab=260, width=32, depth=2, heads=2, layers=[LayerSpec(window=8), LayerSpec()]),
    data=configs.DataConfig(source=str(text), held_out_percent=20, seq_len=32, batch=8),
    optimizer=configs.OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
    train=configs.TrainConfig(steps=STEPS, ema_decay=0.99, skip_nonfinite=3, peak_flops=1e12),
    mesh=configs.MeshConfig(data=1),
    eval=configs.EvalConfig(every=10, bytes=256, batch=4),
    checkpoint=configs.CheckpointConfig(every=EVERY, seconds=0.0, keep=KEEP),
    log=configs.LogConfig(every=5, tensorboard=False, plain_seconds=1e9),
  )


def write_text(folder):
  """Some files of words."""
  rng = random.Random(0)
  for i in range(12):
    (folder / f'p{i}').mkdir(parents=True, exist_ok=True)
    words = (''.join(rng.choice('aeiourstln') for _ in range(rng.randrange(2, 9))) for _ in range(300))
    (folder / f'p{i}' / 'text.txt').write_text(' '.join(words), encoding='utf-8')


def reference(folder):
  """{step: (leaves of the State, place in the data)} of a run that nothing happens to, at every checkpoint."""
  states, real = {}, checkpoint.Checkpoints.save

  def save(saved, step, state, iterator):
    states[step] = [np.array(x) for x in jax.tree.leaves(jax.device_get(state))], iterator.get_state()
    real(saved, step, state, iterator)

  with mock.patch.object(checkpoint.Checkpoints, 'save', save), contextlib.redirect_stdout(io.StringIO()):
    loop.run(config(folder / 'text'), folder / 'reference')
  return states


def child(folder, kind, share):
  """Trains, and kills this process within the step or save that `share` (0 to 1) of what is left ends at."""
  rng, calls = random.Random(share), []
  run = config(folder / 'text')
  left = max(1, STEPS - max(shelves.Shelf(folder / 'run').steps(), default=0))
  owner, name, unit, seconds = {
    'step': (data, 'to_global', 1, STEP_SECONDS),
    'save': (checkpoint.Checkpoints, 'save', EVERY, SAVE_SECONDS),
    'restore': (checkpoint.Checkpoints, 'restore', left, RESTORE_SECONDS),
  }[kind]
  real = getattr(owner, name)

  def call(*args):
    if kind != 'step' or args[2] == run.data.batch:  # not one of an evaluation
      calls.append(name)
      if len(calls) == 1 + int(share * left / unit):
        threading.Timer(rng.random() * seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    return real(*args)

  setattr(owner, name, call)
  loop.run(run, folder / 'run')
  os._exit(0)


def damage(workdir, kind, rng):
  """Damages a random file of the newest checkpoint or its manifest; returns its step, 0 if there are too few."""
  shelf = shelves.Shelf(workdir)
  steps = shelf.steps()
  if len(steps) < 2:
    return 0
  files = sorted(path for path in shelf.folder(steps[-1]).rglob('*') if path.is_file() and path.stat().st_size)
  path = rng.choice([*files, workdir / 'manifests' / f'{steps[-1]}.json'])
  text = bytearray(path.read_bytes())
  if kind == 'bit':
    text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    path.write_bytes(text)
  elif kind == 'cut':
    path.write_bytes(text[: rng.randrange(len(text))])
  else:
    path.unlink()
  return steps[-1]


class Place:
  """Stands for the iterator."""

  state: dict | None = None

  def set_state(self, state):
    self.state = state


def differing(workdir, states, made):
  """(step of the newest whole checkpoint, lines on bad ones, bits compared, bits that differ from the reference)."""
  place, said = Place(), list[str]()
  with checkpoint.Checkpoints(workdir, made.config.checkpoint) as saved:
    step, state = saved.restore(made.abstract, made.placed, place, said.append)
  if not step:
    return 0, said, 0, 0
  want, want_place = states[step]
  bits = wrong = 0
  for x, y in zip(jax.tree.leaves(jax.device_get(state)), want, strict=True):
    different = np.bitwise_xor(np.ascontiguousarray(x).reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8))
    bits, wrong = bits + 8 * different.size, wrong + int(np.unpackbits(different).sum())
  return step, said, bits, wrong + (place.state != want_place)


def points(folder, rows, count, save):
  """Appends the rows of points that are missing, one by one."""
  write_text(folder / 'text')
  states = reference(folder)
  made = program.make(config(folder / 'text'), sharding.make_mesh(configs.MeshConfig(data=1)))
  bar = tqdm(total=count, initial=len(rows), unit='point', disable=None)
  workdir, runs = folder / 'run', 0
  while len(rows) < count:
    rng = random.Random(len(rows) + 1000 * runs)
    kind = rng.choices([*KINDS], [*KINDS.values()])[0]
    command = [sys.executable, '-m', 'experiments.faults', f'--child={kind}', f'--share={rng.random()}']
    began = time.monotonic()
    ended = subprocess.run([*command, f'--folder={folder}'], env=environment(folder), capture_output=True, check=False)
    if ended.returncode not in (0, -signal.SIGKILL):
      raise RuntimeError(f'a run ended with status {ended.returncode}: {ended.stderr.decode()[-2000:]}')
    is_over = ended.returncode == 0  # before its point came: it is compared, and another run begins
    harm = '' if is_over else rng.choices([*DAMAGES], [*DAMAGES.values()])[0]
    harmed = damage(workdir, harm, rng) if harm else 0
    step, said, bits, wrong = differing(workdir, states, made)
    row = {'kind': kind if not is_over else 'end', 'damage': harm if harmed else '', 'damaged_step': harmed}
    row |= {'step': step, 'is_found': not harmed or step < harmed, 'bad': len(said)}
    rows.append({**row, 'bits': bits, 'differing_bits': wrong, 'seconds': round(time.monotonic() - began, 2)})
    runs += is_over
    if is_over:
      shutil.rmtree(workdir)
    save(rows)
    bar.update()
    bar.set_postfix_str(f'{sum(row["differing_bits"] for row in rows)} bits differ')
  bar.close()


def environment(folder):
  """Of the processes: one reads what another has compiled; no temporary file stays."""
  cache = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  return {**os.environ, **cache, 'TMPDIR': str(folder)}


def summed(rows):
  """What the file says beside the rows."""
  count = lambda name: {value: sum(row[name] == value for row in rows) for value in sorted({row[name] for row in rows})}
  return {
    'points': len(rows),
    'differing_bits': sum(row['differing_bits'] for row in rows),
    'bits_compared': sum(row['bits'] for row in rows),
    'damaged': sum(bool(row['damaged_step']) for row in rows),
    'damage_not_found': sum(not row['is_found'] for row in rows),
    'unfinished_or_bad_moved': sum(row['bad'] for row in rows),
    'kinds': count('kind'),
    'damages': count('damage'),
  }


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m experiments.faults', description=__doc__.split('\n')[0])
  parser.add_argument('--points', type=int, default=100, help='faults')
  parser.add_argument('--out', default=os.path.join(os.path.dirname(bench_core.RESULT), 'faults.json'))
  parser.add_argument('--child', choices=KINDS, help=argparse.SUPPRESS)
  parser.add_argument('--share', type=float, help=argparse.SUPPRESS)
  parser.add_argument('--folder', type=pathlib.Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args(argv)
  checkpoint.quiet()
  if arguments.child:
    return child(arguments.folder, arguments.child, arguments.share)
  if arguments.points < 1:
    parser.error(f'--points={arguments.points}: expected 1 or more')
  rows = []
  if os.path.exists(arguments.out):
    with open(arguments.out, encoding='utf-8') as file:
      rows = json.load(file)['rows'][: arguments.points]
  facts = machine.facts()
  facts['versions'] |= {name: importlib.metadata.version(name) for name in ('orbax-checkpoint', 'grain')}
  save = lambda rows: bench_core.write({**facts, **summed(rows), 'rows': rows}, arguments.out)
  with tempfile.TemporaryDirectory() as folder:
    # Each compiled program is computed by one process and read by the others: their bits are those of one compilation.
    jax.config.update('jax_compilation_cache_dir', os.path.join(folder, 'cache'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    points(pathlib.Path(folder), rows, arguments.points, save)
  found = summed(rows)
  print(f'{found["points"]} points: {found["differing_bits"]} of {found["bits_compared"]:,} bits differ; '
        f'{found["damaged"]} checkpoints damaged, {found["damage_not_found"]} of them not found')  # fmt: skip
  return int(bool(found['differing_bits'] or found['damage_not_found']))


if __name__ == '__main__':
  sys.exit(main())
