"""Compiles the 7B step for two pods, stores what the reports say, and writes the table of docs/scaling.md.

  python -m experiments.compile_table            (compiles: some minutes)
  python -m experiments.compile_table --stored   (only writes the table again, from what is stored)
  python -m experiments.compile_table --check    (writes nothing, fails if the table is not what is stored)

The table stands between <!-- begin compile_report --> and <!-- end compile_report -->.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STORED = os.path.join('experiments', 'results', 'compile_report.json')
DOCUMENT = os.path.join('docs', 'scaling.md')
CONFIG = 'experiments/seven_b.py'
PODS = {
  'v5e:16x16': [],
  'v5p:8x8x8': ['--config.mesh.fsdp=8', '--config.mesh.context=8', '--config.mesh.tensor=8'],
}
KEPT = (
  'topology',
  'chip',
  'devices',
  'mesh',
  'parameters',
  'tokens',
  'versions',
  'fits',
  'memory',
  'flops',
  'estimate',
)


def measured():
  """{'date': ..., 'pods': facts of each pod, without what differs from one compilation to the next}."""
  pods = []
  for topology, flags in PODS.items():
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'facts.json')
      command = ['-m', 'train.compile_report', f'--config={CONFIG}', f'--topology={topology}', *flags, f'--json={path}']
      subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
      with open(path, encoding='utf-8') as file:
        facts = json.load(file)
    sent: dict = {}
    for one in facts['collectives']:
      axes = '+'.join(one['axes']) or '?'
      sent[axes] = sent.get(axes, 0) + one['total']
    pods.append({**{name: facts[name] for name in KEPT}, 'flags': flags, 'sent': sent, 'times': facts['times']})
  return {'date': datetime.date.today().isoformat(), 'pods': pods}


def table(stored):
  """The figures as a Markdown table, a column for each pod."""
  pods = stored['pods']
  gib = lambda count: f'{count / 2**30:.2f} GiB'
  state = lambda memory: memory['parameters'] + memory['optimizer']
  over = lambda pod: ', '.join(f'{axes} {count / 1e9:.1f}' for axes, count in _heavy(pod['sent']).items())
  seconds = lambda estimate: f'{estimate["seconds"]:.2f} to {estimate["serial_seconds"]:.2f} s'
  mfu = lambda estimate: f'{estimate["mfu"]:.0%} to {estimate["serial_mfu"]:.0%}'
  rows = {
    'mesh': lambda pod: ', '.join(f'{axis} {parts}' for axis, parts in pod['mesh'].items() if parts > 1),
    'chips': lambda pod: f'{pod["devices"]}',
    'tokens a step': lambda pod: f'{pod["tokens"]:,}',
    'memory of a chip': lambda pod: gib(pod['memory']['capacity']),
    'parameters and optimizer state': lambda pod: gib(state(pod['memory'])),
    'temporary': lambda pod: gib(pod['memory']['temporary']),
    'all': lambda pod: f'{gib(pod["memory"]["needed"])}, {pod["memory"]["needed"] / pod["memory"]["capacity"]:.0%}',
    'matrix products': lambda pod: f'{(pod["flops"]["compiled"] + pod["flops"]["attention"]) / 1e12:.1f} TFLOP',
    'sent, GB': over,
    'estimate of a step': lambda pod: seconds(pod['estimate']),
    'estimated model FLOPs use': lambda pod: mfu(pod['estimate']),
  }
  names = ' | '.join('`' + pod['topology'] + '`' for pod in pods)
  lines = [f'| a chip and step | {names} |', '|---' * (len(pods) + 1) + '|']
  lines += [f'| {name} | {" | ".join(of(pod) for pod in pods)} |' for name, of in rows.items()]
  versions = ', '.join(f'{name} {version}' for name, version in pods[0]['versions'].items())
  return '\n'.join(
    [*lines, '', f'Compiled {stored["date"]} with {versions}; estimates are rooflines, not measurements.']
  )


def _heavy(sent):
  """What is sent over the axes that matter, the most first."""
  return {axes: count for axes, count in sorted(sent.items(), key=lambda item: -item[1]) if count >= 5e7}


def updated(text, stored):
  """The text of docs/scaling.md with its table made anew."""
  marks = '<!-- begin compile_report -->', '<!-- end compile_report -->'
  before, found, rest = text.partition(marks[0])
  _, found_end, after = rest.partition(marks[1])
  if not (found and found_end):
    raise ValueError(f'{DOCUMENT}: expected {marks[0]} and then {marks[1]}')
  return f'{before}{marks[0]}\n{table(stored)}\n{marks[1]}{after}'


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m experiments.compile_table', description='The 7B step on two pods.')
  parser.add_argument('--stored', action='store_true', help='compile nothing, write the table from what is stored')
  parser.add_argument('--check', action='store_true', help='write nothing, fail if the table would change')
  arguments = parser.parse_args(argv)
  stored_path, document_path = os.path.join(ROOT, STORED), os.path.join(ROOT, DOCUMENT)
  if arguments.stored or arguments.check:
    with open(stored_path, encoding='utf-8') as file:
      stored = json.load(file)
  else:
    stored = measured()
    with open(stored_path, 'w', encoding='utf-8') as file:
      json.dump(stored, file, indent=1)
      file.write('\n')
  with open(document_path, encoding='utf-8') as file:
    old = file.read()
  new = updated(old, stored)
  if arguments.check and new != old:
    print(f'{DOCUMENT} is not up to date: python -m experiments.compile_table --stored', file=sys.stderr)
    return 1
  if new != old:
    with open(document_path, 'w', encoding='utf-8') as file:
      file.write(new)
  return 0


if __name__ == '__main__':
  sys.exit(main())
