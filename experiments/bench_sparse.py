"""Does a sparse pattern save the time that its tiles promise, and the memory?

  python -m experiments.bench_sparse

Claim: attention over a plan takes the time of its tiles: full attention with tiles of the same size takes longer by at
least 0.8 of the ratio that `attn.simulate` counts, forward and backward, and neither holds an array of T x T. Also the
seconds to plan a million tokens. Cost: 4 minutes on 2 cores. Result: experiments/results/bench_sparse.json.

Both run in turns in one process; the figure is the median over neighbouring pairs.
"""

import argparse
import functools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from attn import block_sparse, layouts, masks, plan, simulate
from experiments import machine, timing
from experiments.bench_core import relative_difference, say, write

RESULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results', 'bench_sparse.json')
AT_LEAST = 0.8  # of the counted ratio
PLAN_SECONDS = 2.0  # for a million tokens


def patterns(is_tiny):
  """{name: (mask, T, tile)}; on grids, tokens are in the order of their tiles."""
  n, w, side = (128, 32, 16) if is_tiny else (8192, 1024, 64)
  line, square = (64, (8, 8)) if is_tiny else (128, (8, 16))
  stride, near = (4, 9) if is_tiny else (8, 17)
  grid = layouts.grid(side, side).tiled(square)
  hood = lambda stride: masks.placed(masks.neighborhood((side, side), (near, near), stride), grid)
  ids = np.sort(np.random.default_rng(0).integers(0, 8, n))
  return {
    f'causal window {w}': (masks.causal() & masks.window(w - 1), n, line),
    f'causal window {w}, sink, documents': (
      masks.causal() & (masks.window(w - 1) | masks.sink(16)) & masks.document(ids), n, line,
    ),
    f'neighborhood {near}x{near} of {side}x{side}': (hood(1), side * side, square[0] * square[1]),
    f'neighborhood {near}x{near}, stride {stride}': (hood((stride, stride)), side * side, square[0] * square[1]),
  }  # fmt: skip


def compare(name, mask, T, tile, seconds, heads=8, head_dim=64):
  """Full attention and the pattern, over plans of equal tiles: times, counted ratio, bytes."""
  full, sparse = (plan.of(m, T, block_q=tile, block_kv=tile) for m in (masks.everything(), mask))
  counted = simulate.plan(sparse)
  q, k, v, g = (jax.random.normal(key, (1, T, heads, head_dim)) for key in jax.random.split(jax.random.key(0), 4))
  rows = []
  for kind in ('forward', 'forward+backward'):
    dense, thin = (compiled(kind, made, m, q.shape) for made, m in ((full, masks.everything()), (sparse, mask)))
    arguments = (q, k, v, g)[: 3 if kind == 'forward' else 4]
    times = timing.in_turns(*(functools.partial(f, *arguments) for f in (dense, thin)), seconds=seconds)
    share = times['ratio'] / counted.mean
    temporary = thin.memory_analysis().temp_size_in_bytes
    say(f'{name} {kind}: {times["ratio"]:.2f} times faster, {share:.2f} of the {counted.mean:.2f} counted '
        f'(goal: at least {AT_LEAST}); {1e3 * times["second_s"]:.0f} ms, {temporary / 2**20:.0f} MiB')
    rows.append({'pattern': name, 'T': T, 'tile': tile, 'pass': kind, **times, 'counted': counted.mean,
                 'share_of_counted': share, 'at_least': AT_LEAST, 'full_share': counted.full_share,
                 'temporary_bytes': temporary})  # fmt: skip
  return rows


def compiled(kind, made, mask, shape):
  """Attention over a plan, or with its gradients, for q, k, v (and the cotangent) of one shape."""
  f = lambda q, k, v: block_sparse.attend(q, k, v, made, mask=mask)
  both = lambda q, k, v, g: jax.vjp(f, q, k, v)[1](g)
  one = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.jit(f).lower(one, one, one).compile() if kind == 'forward' else jax.jit(both).lower(*[one] * 4).compile()


def check(mask, T, tile):
  """The largest difference from attention with the mask as an array, as a fraction."""
  q, k, v = (jax.random.normal(key, (1, T, 1, 16)) for key in jax.random.split(jax.random.key(1), 3))
  got = compiled('forward', plan.of(mask, T, block_q=tile, block_kv=tile), mask, q.shape)(q, k, v)
  return relative_difference(got, jax.nn.dot_product_attention(q, k, v, mask=masks.dense(mask, T)))


def planning(is_tiny):
  """Seconds to make the plan of a causal window with sinks in documents, a million tokens long, best of three."""
  T, block = (4096, 64) if is_tiny else (2**20, 512)
  ids = np.sort(np.random.default_rng(0).integers(0, 300, T))
  mask = masks.causal() & (masks.window(4095) | masks.sink(64)) & masks.document(ids)
  best = float('inf')
  for _ in range(3):
    start = time.perf_counter()
    made = plan.of(mask, T, block_q=block, block_kv=block)
    best = min(best, time.perf_counter() - start)
  say(f'plan of {T:,} x {T:,} in tiles of {block}: {best:.2f} s (goal: at most {PLAN_SECONDS}), {made}')
  return {'T': T, 'block': block, 'seconds': best, 'at_most': PLAN_SECONDS, 'entries': int(made.nnz.max())}


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m experiments.bench_sparse', description=__doc__.split('\n')[0])
  parser.add_argument('--out', default=RESULT, help='JSON file to write')
  parser.add_argument('--tiny', action='store_true', help='seconds instead of minutes; the figures mean nothing')
  arguments = parser.parse_args(argv)
  say(f'on {machine.facts()["device"]}, {machine.facts()["cores"]} cores')
  rows, differences = [], {}
  found = patterns(arguments.tiny)
  for name, (mask, T, tile) in found.items():
    differences[name] = float(check(mask, T, tile))
    rows += compare(name, mask, T, tile, 0.05 if arguments.tiny else 15.0)
  stored = {**machine.facts(), 'is_tiny': arguments.tiny, 'shape': 'B=1 H=8 D=64 float32',
            'first': 'block_sparse.attend over the plan of everything()', 'second': 'over the plan of the pattern',
            'times': rows, 'relative_difference': differences, 'planning': planning(arguments.tiny)}  # fmt: skip
  write(stored, arguments.out)
  say(f'wrote {arguments.out}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
