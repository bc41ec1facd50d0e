"""The report as text, for a terminal."""

ROWS = 14  # collectives shown, the heaviest


def page(facts, suggestions):
  """The report of the facts that train.compile_report.facts.gather found."""
  mesh = ', '.join(f'{axis} {parts}' for axis, parts in facts['mesh'].items())
  versions = ', '.join(f'{name} {version}' for name, version in facts['versions'].items())
  lines = [
    f'{_count(facts["parameters"])} parameters, {facts["tokens"]:,} tokens a step, on {facts["topology"]}: '
    f'{facts["devices"]} devices ({mesh})',
    f'compiled in {facts["compile_seconds"]:.0f} s ({versions}); all figures are of one device and one step',
    '',
    *_memory(facts),
  ]
  if 'flops' in facts:
    lines += ['', *_flops(facts), '', *_collectives(facts), '', *_estimate(facts)]
  lines += ['', 'Suggestions', *(f'  - {line}' for line in suggestions)]
  return '\n'.join(lines)


def _memory(facts):
  memory = facts['memory']
  percent = lambda x: f'{x / memory["capacity"]:7.1%}'
  line = lambda name, x: f'  {name:<34}{size(x):>10} {percent(x)}'
  lines = [f'Memory, of {size(memory["capacity"])}']
  if not facts['fits'] and 'arguments' not in memory:
    lines += [line(name, memory[name]) for name in ('parameters', 'optimizer', 'averages') if memory[name]]
    if memory['needed']:
      lines.append(f'  DOES NOT FIT: {size(memory["needed"])} where {size(memory["usable"])} are usable')
    return [*lines, f'  the compiler says: {memory["refusal"]}', *_largest(memory)]
  held = memory['parameters'] + memory['optimizer'] + memory['averages']
  lines += [
    line('arguments: parameters', memory['parameters']),
    line('arguments: optimizer state', memory['optimizer']),
    *([line('arguments: averages', memory['averages'])] if memory['averages'] else []),
    line('arguments: batch, padding', max(0, memory['arguments'] - held)),
    line('temporary', memory['temporary']),
    line('results beside the arguments', memory['output']),
    line('program', memory['code']),
    line('all' if facts['fits'] else 'all: DOES NOT FIT', memory['needed']),
  ]
  return lines + _largest(memory)


def _largest(memory):
  if not memory['largest']:
    return []
  lines = ['  The largest temporary pieces, and what lies there in turn:']
  return lines + [
    f'    {size(count):>10}  {what if len(what) < 90 else what[:87] + "..."}' for count, what in memory['largest']
  ]


def _flops(facts):
  flops = facts['flops']
  line = lambda name, x: f'  {name:<58}{x / 1e12:>10.3f} T'
  lines = [
    'FLOPs',
    line('model: forward and backward, visible pairs only', flops['model']),
    line('compiled program: its matrix products, loops multiplied', flops['compiled']),
  ]
  if flops['attention']:
    lines.append(line('beside them attention, by formula', flops['attention']))
  lines.append(line("the compiler's own count, which has each loop once", flops['cost_analysis']))
  return lines


def _collectives(facts):
  found = facts['collectives']
  total = sum(one['total'] for one in found)
  lines = [f'Collectives: a device sends {size(total)}']
  if found:
    lines.append(f'  {"kind":<20}{"over":<16}{"array":<26}{"bytes":>10}{"times":>8}{"sent in all":>14}')
  for one in found[:ROWS]:
    over = '+'.join(one['axes']) or '?'
    times = f'{one["times"]:,}' + '+' * bool(one['open_loops'])
    lines.append(
      f'  {one["kind"]:<20}{over:<16}{one["shape"]:<26}{size(one["bytes"]):>10}{times:>8}{size(one["total"]):>14}'
    )
  if rest := found[ROWS:]:
    lines.append(f'  {len(rest)} more{"":<73}{size(sum(one["total"] for one in rest)):>13}')
  return lines


def _estimate(facts):
  times, estimate = facts['times'], facts['estimate']
  line = lambda name, seconds: f'  {name:<34}{seconds:>9.3f} s'
  lines = ['Estimate by roofline: peaks of the chip, not a measurement', line('matrix products', times['compute'])]
  lines.append(line('main memory', times['memory']))
  lines += [line(f'links, {axes}', seconds) for axes, seconds in times['links'].items() if seconds >= 5e-4]
  both = f'{estimate["seconds"]:.3f} s if all of it overlaps, {estimate["serial_seconds"]:.3f} s if nothing does'
  bound = {'compute': 'matrix products', 'memory': 'main memory', 'links': 'links'}[estimate['bound']]
  lines += [
    f'  a step: {both}; {bound} bound it',
    f'  at most {estimate["tokens_per_second"]:,.0f} tokens/s, {estimate["mfu"]:.0%} model FLOPs use '
    f'({estimate["serial_mfu"]:.0%} if nothing overlaps)',
  ]
  if estimate['left_out']:
    lines.append(f'  left out: {", ".join(estimate["left_out"])}')
  return lines


def size(count):
  """'1.18 GiB' of a number of bytes."""
  for unit, factor in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
    if count >= factor:
      return f'{count / factor:.2f} {unit}'
  return f'{count:.0f} B'


def _count(number):
  """'7.25 B' or '0.4 M' of a number of parameters."""
  return f'{number / 1e9:.2f} B' if number >= 1e9 else f'{number / 1e6:.1f} M'
