"""Writes the parts of README.md that are made from the catalog and from stored results.

  python -m experiments.readme
  python -m experiments.readme --check

Each part stands between two marks, <!-- begin NAME --> and <!-- end NAME -->. --check writes nothing and fails if a
part is not what it should be.
"""

import argparse
import json
import os
import sys

from attn import catalog

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join('experiments', 'results')


def updated(text, root=ROOT):
  """The text of README.md with its parts made anew.

  Raises:
    ValueError: a part has no marks in the text.
  """
  for name, content in (('methods', catalog.table()), ('figures', figures(root))):
    marks = f'<!-- begin {name} -->', f'<!-- end {name} -->'
    before, found, rest = text.partition(marks[0])
    _, found_end, after = rest.partition(marks[1])
    if not (found and found_end):
      raise ValueError(f'README.md: expected {marks[0]} and then {marks[1]}')
    text = f'{before}{marks[0]}\n{content.strip()}\n{marks[1]}{after}'
  return text


def figures(root=ROOT):
  """What was measured, as a Markdown table of the files in experiments/results; a sentence if there are none."""
  rows, places = [], []
  bench = _read(root, 'bench_core.json')
  for name, part in bench.items():
    rows += PARTS[name](part)
    places.append(_place('`make bench`', part))
  if sparse := _read(root, 'bench_sparse.json'):
    rows += _sparse(sparse)
    places.append(_place('plans (`python -m experiments.bench_sparse`)', sparse))
  for name, part in _read(root, 'bench_generate.json').items():
    rows += GENERATE_PARTS[name](part)
    places.append(_place('generation (`python -m experiments.bench_generate`)', part))
  for name, command, made in (('bench_train', 'training', _train), ('faults', 'faults', _faults)):
    if part := _read(root, f'{name}.json'):
      rows += made(part)
      places.append(_place(f'{command} (`python -m experiments.{name}`)', part))
  for name, command in (('quickstart', '`make train`'), ('quickstart_long', 'a longer run')):
    if run := _read(root, f'{name}.json'):
      rows.append(_run_row(command, run))
      places.append(_place(command, run))
  if not rows:
    return 'None are stored yet.'
  table = ['| what | figure | goal |', '|---|---|---|', *(f'| {" | ".join(row)} |' for row in rows)]
  return '\n'.join([*table, '', 'Measured: ' + '; '.join(dict.fromkeys(places)) + '.'])


def _attention(part):
  label = lambda row: f"attention, B = {row['B']}, T = {row['T']}, {row['pass']}, time over jax.nn's"
  rows = [(label(row), f'{row["ratio"]:.2f}', f'{row["at_most"]}') for row in part['times']]
  for row in part['memory']:
    what = f'attention, {row["pass"]}, temporary memory at T = {row["T"][-1]:,} (jax.nn)'
    figure = f'{row["first_bytes"][-1] / 2**20:.0f} MiB ({row["second_bytes"][-1] / 2**20:,.0f} MiB)'
    rows.append((what, f'{figure}, grows as T^{row["first_exponent"]:.2f} (T^{row["second_exponent"]:.2f})', 'T^1'))
  return rows


def _sparse(stored):
  label = lambda row: f'{row["pattern"]}, T = {row["T"]:,}, {row["pass"]}: full attention over the plan\'s time'
  figure = lambda row: f'{row["ratio"]:.1f}, {row["counted"]:.1f} counted in tiles'
  goal = lambda row: f'{row["at_least"] * row["counted"]:.1f}'
  rows = [(label(row), figure(row), goal(row)) for row in stored['times']]
  made = stored['planning']
  what = f'plan of a causal window with sinks in documents, {made["T"]:,} tokens, tiles of {made["block"]}'
  return [*rows, (what, f'{made["seconds"]:.2f} s', f'{made["at_most"]:.0f} s')]


def _loop(part):
  return [('training loop, time over its bare step', f'{part["ratio"]:.3f}', f'{part["at_most"]}')]


def _step(part):
  return [("training step, time over eager PyTorch's", f'{part["ratio"]:.2f}', f'{part["at_most"]}')]


def _import(part):
  return [('`import attn`', f'{part["attn_s"]:.2f} s, of which jax {part["jax_s"]:.2f} s', f'{part["at_most"]} s')]


PARTS = {'attention': _attention, 'loop': _loop, 'step': _step, 'import': _import}


def _decode(part):
  shape = part['shape'].split(', ', 1)[1]
  label = lambda row: f"greedy decoding, {shape}, B = {row['B']}: speed over transformers'"
  figure = lambda row: f'{row["ratio"]:.2f}, {row["second_tokens_per_second"]:.0f} tokens/s'
  return [(label(row), figure(row), f'{row["at_least"]}') for row in part['times']]


def _checkpoint(part):
  size = f'{part["bytes"] / 1e9:.1f} GB'
  where = {'cold': 'from the disk', 'warm': "from the system's cache"}
  label = lambda row: f'loading a checkpoint of {size} {where[row["cache"]]}: speed over a plain read'
  figure = lambda row: f'{row["ratio"]:.2f}, {part["bytes"] / row["second_s"] / 1e9:.2f} GB/s'
  rows = [(label(row), figure(row), f'{row["at_least"] or ""}') for row in part['times']]
  most = f'{part["memory"]["peak_bytes"] / 1e9:.2f} GB'
  return [*rows, (f'memory of a process that loads a checkpoint of {size}', most, '')]


GENERATE_PARTS = {'decode': _decode, 'import': _checkpoint}


def _train(part):
  size = f'{part["checkpoint_bytes"] / 1e6:.0f} MB'
  return [
    ('training loop with everything on, time over its jitted step', f'{part["ratio"]:.3f}', f'{part["at_most"]}'),
    (f'a checkpoint of {size}, in steps that it costs', f'{part["stall_steps"]:.2f}', f'{part["stall_at_most"]:.0f}'),
  ]


def _faults(part):
  what = f'{part["points"]} kills at random points, {part["damaged"]} checkpoints damaged: bits that differ in the end'
  return [(what, f'{part["differing_bits"]} of {part["bits_compared"]:,}', '0')]


def _run_row(command, run):
  """The row of a file of experiments.store_result."""
  packed = ', '.join(f'{name} {bits:.2f}' for name, bits in run['compressors'].items())
  sizes = f'{run["parameters"] / 1e6:.1f} M parameters, {_time(run["seconds"])} of training'
  remark = f'; {run["remark"]}' if run.get('remark') else ''
  what = f'{command}: held-out bits per byte ({packed}), {sizes}{remark}'
  return what, f'{run["held_out"]["bits_per_byte"]:.3f}', '2.1' if command == '`make train`' else ''


def _place(what, facts):
  """Where and when something was measured."""
  cores = f', {facts["cores"]} cores' if 'cores' in facts else ''
  return f'{what} on {facts["device"]}{cores}, {facts["date"]}, jax {facts["versions"]["jax"]}'


def _time(seconds):
  return f'{seconds / 3600:.1f} h' if seconds >= 3600 else f'{seconds / 60:.1f} min'


def _read(root, name):
  path = os.path.join(root, RESULTS, name)
  if not os.path.exists(path):
    return {}
  with open(path, encoding='utf-8') as file:
    return json.load(file)


def main(argv=None):
  about = 'Writes the parts of README.md that are made from the catalog and from stored results.'
  parser = argparse.ArgumentParser(prog='python -m experiments.readme', description=about)
  parser.add_argument('--check', action='store_true', help='write nothing, fail if something would change')
  arguments = parser.parse_args(argv)
  path = os.path.join(ROOT, 'README.md')
  with open(path, encoding='utf-8') as file:
    old = file.read()
  new = updated(old)
  if arguments.check and new != old:
    print('README.md is not up to date: run `make docs`', file=sys.stderr)
    return 1
  if new != old:
    with open(path, 'w', encoding='utf-8') as file:
      file.write(new)
  print('README.md is up to date')
  return 0


if __name__ == '__main__':
  sys.exit(main())
