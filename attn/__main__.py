"""`python -m attn`: the methods of the catalog.

    python -m attn                     # a table of all
    python -m attn --family exact      # of one family
    python -m attn sliding_window      # one of them: formula, paper, shapes, cost, limit cases, contracts
    python -m attn yarn --json         # for programs
    python -m attn causal --shape T=8192,H=32,K=8,D=128     # FLOPs, bytes and time there, on each chip
    python -m attn sliding_window --draw mask.png           # its mask; .svg for a page
    python -m attn --mask 'causal() & (window(7) | sink(2))' --draw mask.png --shape T=64
"""

import argparse
import json
import shutil
import sys
import textwrap

from attn import catalog, contracts
from attn.catalog import Method

AXES = {
  'B': 'batch', 'T': 'queries', 'S': 'keys', 'H': 'query heads', 'K': 'key heads', 'D': 'key width', 'V': 'value width',
  'N': 'entries of a table', 'R': 'rank',
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m attn', description='List the attention methods of attnloom, or describe one.'
  )
  parser.add_argument('name', nargs='?', help='a method to describe; without it, all are listed')
  parser.add_argument('--family', metavar='FAMILY', help=f'list this family alone: {", ".join(catalog.FAMILIES)}')
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument(
    '--shape', metavar='T=8192,H=32', help='what the method costs at these lengths of B, T, S, H, K, D, V'
  )
  parser.add_argument('--mask', metavar='MASK', help="in place of the method's own, as 'causal() & window(1023)'")
  parser.add_argument('--draw', metavar='FILE', help="draw the method's mask, or that of --mask, as .png or .svg")
  parser.add_argument('--dtype', help='with --shape: of q, k and v; bfloat16 by default')
  parser.add_argument('--hardware', metavar='CHIP', help='with --shape: one chip, or all (by default)')
  parser.add_argument('--backward', action='store_true', help='with --shape: the backward in place of the forward')
  args = parser.parse_args(argv)
  try:
    _check(args)
    if args.draw is not None:
      _draw(args)
    elif args.name is None:
      found = catalog.methods(args.family)
      print(json.dumps([summary(x) for x in found], indent=2) if args.json else table(found))
    elif args.family is not None:
      raise ValueError(f'name={args.name!r} and --family={args.family!r} exclude each other')
    elif args.shape is not None:
      print(_cost(args))
    else:
      method = catalog.get(args.name)
      print(json.dumps(record(method), indent=2) if args.json else describe(method))
  except (ValueError, NotImplementedError, ImportError, OSError) as error:
    print(f'python -m attn: {error}', file=sys.stderr)
    return 2
  return 0


def _check(args) -> None:
  """Refuses options that would do nothing."""
  if args.shape is not None and args.name is None and args.draw is None:
    raise ValueError(f'--shape={args.shape!r} needs the name of a method')
  if args.draw is not None:
    unused = [x for x in ('family', 'dtype', 'hardware', 'backward') if _is_given(args, x)]
    if unused:
      raise ValueError(f'--draw and --{unused[0]} exclude each other')
    return
  if args.mask is not None and args.name is None:
    raise ValueError('--mask needs --draw, or the name of a method and --shape')
  for option in ('dtype', 'hardware', 'backward', 'mask'):
    if _is_given(args, option) and args.shape is None:
      raise ValueError(f'--{option} needs --shape')


def _is_given(args, option) -> bool:
  return getattr(args, option) not in (None, False)


def _draw(args) -> None:
  from attn.draw import method_picture

  method = None if args.name is None else catalog.get(args.name)
  picture, notes = method_picture.written(args.draw, method=method, mask=args.mask, shape=args.shape)
  for note in notes:
    print(f'python -m attn: {note}', file=sys.stderr)
  facts = {'file': args.draw, 'title': picture.title, **picture.facts}
  print(json.dumps(facts, indent=2) if args.json else f'{args.draw}: {picture.title}')


def _cost(args) -> str:
  from attn.cost import method_cost

  given = {'dtype': args.dtype, 'chips': args.hardware, 'mask': args.mask}
  given = {name: x for name, x in given.items() if x is not None}
  report = method_cost.report(catalog.get(args.name), args.shape, is_backward=args.backward, **given)
  return json.dumps(report, indent=2) if args.json else method_cost.text(report, _width())


def summary(method: Method) -> dict[str, str]:
  """What the table shows of a method."""
  return {
    'name': method.name,
    'family': method.family,
    'paper': method.paper,
    'title': method.title,
    'idea': method.idea,
  }


def record(method: Method) -> dict:
  """All that `describe` prints, as JSON types."""
  return {
    **summary(method),
    'authors': method.authors,
    'url': method.url,
    'formula': method.formula.splitlines(),
    'inputs': {name: list(x.axes) for name, x in method.inputs.items()},
    'usage': method.usage,
    'entry': method.path,
    'forms': list(method.forms),
    'state': list(method.state.capacities) if method.state else [],
    'is_causal': method.is_causal,
    'cost': method.cost,
    'limits': list(method.limits),
    'contracts': [x for x in contracts.applicable(method) if x not in method.waived],
    'waived': dict(method.waived),
  }


def table(found) -> str:
  """One line a method, in columns."""
  rows = [('method', 'family', 'paper', 'idea'), *((x.name, x.family, x.paper, x.idea) for x in found)]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  lines = ['  '.join([*(cell.ljust(n) for cell, n in zip(row, widths)), row[3]]) for row in rows]
  return '\n'.join([lines[0], '-' * min(_width(), max(map(len, lines))), *lines[1:], '', _count(found)])


def describe(method: Method) -> str:
  """A page on one method."""
  facts, used = record(method), {a for x in method.inputs.values() for a in x.axes}
  shapes = [f'{name} [{", ".join(axes)}]' for name, axes in facts['inputs'].items()]
  lines = [f'{method.title}  ({method.name}, family {method.family})', '']
  lines += _paragraph(method.idea)
  lines += ['', *(f'    {x}' for x in facts['formula']), '']
  lines += _entry('paper', f'{method.authors}, {method.url}')
  lines += _entry('call', method.usage)
  lines += _entry('function', method.path)
  lines += _entry('shapes', ', '.join(shapes))
  lines += _entry('', ', '.join(f'{a} {AXES[a]}' for a in AXES if a in used))
  lines += _entry('forms', ', '.join(method.forms))
  lines += _entry('state', ', '.join(facts['state']) or 'none')
  lines += _entry('cost', method.cost)
  for i, statement in enumerate(method.limits):
    lines += _entry('' if i else 'limit cases', statement)
  lines += _entry('contracts', ', '.join(facts['contracts']))
  for i, (name, reason) in enumerate(method.waived.items()):
    lines += _entry('' if i else 'waived', f'{name}: {reason}')
  return '\n'.join(lines)


def _entry(label: str, text: str) -> list[str]:
  return textwrap.wrap(
    text, _width(), initial_indent=f'{label:<13}', subsequent_indent=' ' * 13, break_long_words=False,
    break_on_hyphens=False,
  )  # fmt: skip


def _paragraph(text: str) -> list[str]:
  return textwrap.wrap(text, _width())


def _width() -> int:
  return max(60, min(120, shutil.get_terminal_size((100, 24)).columns))


def _count(found) -> str:
  return f'{len(found)} methods; `python -m attn NAME` describes one'


if __name__ == '__main__':
  sys.exit(main())
