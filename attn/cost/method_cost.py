"""The cost of a catalog method at a shape: what `python -m attn NAME --shape` prints.

    report = method_cost.report(catalog.get('causal'), 'T=8192,H=32,K=8,D=128', chips='v5e')
    print(method_cost.text(report))
"""

import dataclasses
import difflib
import textwrap

import numpy as np

from attn import bias, masks
from attn.catalog import Method
from attn.cost import Attention, Sizes, array_bytes, hardware, roofline
from attn.masks import text as mask_text

DEFAULTS = {'B': 1, 'T': 8192, 'H': 32, 'D': 128}  # S is T, K is H, V is D
LONGEST = 2**24  # tokens, heads or channels
DTYPES = ('bfloat16', 'float16', 'float32', 'float8_e4m3fn', 'float8_e5m2')

_CACHED, _SPLIT, _PLANNED = 'attn.cache.storage.attend', 'attn.split_kv.attend', 'attn.block_sparse.attend'
_ENTRIES = ('attn.softmax.attend', _SPLIT, _CACHED, _PLANNED)
# Settings that change the result or the schedule and not the count, and inputs that weigh nothing beside q, k and v.
_FREE_SETTINGS = ('implementation', 'blocks', 'scale', 'precision')
_COUNTED_SETTINGS = ('mask', 'is_causal', 'soft_cap', 'splits', 'chosen')
_FREE_INPUTS = ('q', 'k', 'v', 'sinks', 'segment_ids')
# Scores that a record makes from an array of its own, at a real size.
_SCORES = {
  'alibi': lambda s: bias.alibi(bias.alibi_slopes(s.H)),
  't5_relative': lambda s: bias.t5_relative(np.zeros((32, s.H), np.float32), is_bidirectional=False),
}


def of_method(method: Method, sizes: Sizes, dtype='bfloat16', mask=None) -> tuple[Attention, tuple[str, ...]]:
  """The call that a method makes at these sizes, for the functions of attn/cost/.

  Args:
    method: a record of the catalog.
    sizes: axis lengths.
    dtype: of q, k, v and out.
    mask: in place of the method's own; None keeps it.

  Returns:
    (call, notes): notes say what the record does that the count does not, or what was assumed.

  Raises:
    NotImplementedError: the method has no cost model; the message says why.
    ValueError: sizes, dtype or mask that do not fit it.
  """
  if dtype not in DTYPES:
    near = difflib.get_close_matches(str(dtype), DTYPES, n=1, cutoff=0.3)
    raise ValueError(f'dtype={dtype!r} is unknown: {_meant(near)}expected one of {", ".join(DTYPES)}')
  _check_countable(method, mask)
  if method.sizes.get('K') == 1 and sizes.K != 1:
    raise ValueError(f'K={sizes.K}, but {method.name} has one key head: K=1')
  settings = method.settings
  if mask is None:
    mask = settings.get('mask', masks.everything())
    if settings.get('is_causal'):
      mask = masks.causal() if isinstance(mask, masks.Everything) else masks.causal() & mask
  shift, notes = _placed(method, sizes, mask)
  if 'segment_ids' in method.inputs:
    notes.append('documents are data: costed as one document in each row of the batch')
  if method.path == _CACHED:
    notes.append('T new tokens against S keys, themselves included; writing them to the cache is not counted')
  if method.path == _PLANNED:
    notes.append('the plan of the mask, with a list for each key head; reading the list itself is not counted')
  if method.name == 'flash_bias':
    rank = method.sizes['R']
    sizes = dataclasses.replace(sizes, D=sizes.D + rank)
    notes.append(f'a bias of rank {rank}: D is {sizes.D} with the channels that carry it')
  score = _SCORES[method.name](sizes) if method.name in _SCORES else None
  return Attention(
    sizes, dtype, mask, soft_cap=settings.get('soft_cap') is not None, score=score, splits=settings.get('splits', 1),
    shift=shift,
  ), tuple(notes)  # fmt: skip


def is_decoding(method, T, S):
  """Whether T queries of a method stand at the end of S keys: fewer than keys, where it goes on from a state."""
  return T < S and (method.state is not None or method.path in (_CACHED, _SPLIT))


def _placed(method, s, mask):
  """How far the queries stand into the keys, and notes that say so."""
  if s.T == s.S or isinstance(mask, masks.Everything):
    return 0, []
  if is_decoding(method, s.T, s.S):
    shift = s.S - s.T
    at = f'position {shift}' if s.T == 1 else f'positions {shift} to {s.S - 1}'
    return shift, [f'as in decoding: the T={s.T} queries stand at the end of the S={s.S} keys, at {at}']
  return 0, [f'query 0 stands beside key 0 (top-left): T={s.T} queries have positions from 0, as S={s.S} keys have']


def _check_countable(method, mask):
  name = method.name
  if name == 'flash_bias':
    return
  if method.path not in _ENTRIES:
    raise NotImplementedError(
      f'no cost model for {name} (family {method.family}): its function is {method.path}, '
      f'and only calls of {", ".join(_ENTRIES)} are counted'
    )
  if method.path == _PLANNED and mask is None:
    raise NotImplementedError(
      f'no cost model for {name} without --mask: its tiles are chosen, here for 12 tokens; '
      '--mask costs the plan of a mask'
    )
  unknown = [x for x in method.settings if x not in (*_COUNTED_SETTINGS, *_FREE_SETTINGS)]
  if name not in _SCORES:
    unknown += [x for x in method.inputs if x not in _FREE_INPUTS]
  if unknown:
    raise NotImplementedError(f'no cost model for {name}: what its {", ".join(unknown)} cost is not counted')


def sizes_of(text: str, method: Method | None = None) -> tuple[Sizes, tuple[str, ...]]:
  """Sizes from 'B=1,T=8192,H=32', and the letters that were not given.

  Raises:
    ValueError: text of another form, an unknown letter, a length that is no integer or out of range, by name.
  """
  letters, given = [x.name for x in dataclasses.fields(Sizes)], {}
  for part in text.split(','):
    letter, equals, number = (x.strip() for x in part.partition('='))
    if not equals:
      raise ValueError(f'--shape has {part.strip()!r}, expected LETTER=LENGTH as in T=8192,H=32')
    if letter not in letters:
      hint = _meant([letter.upper()] if letter.upper() in letters else [])
      raise ValueError(f'--shape has the unknown axis {letter!r}: {hint}expected one of {", ".join(letters)}')
    if letter in given:
      raise ValueError(f'--shape has {letter} twice')
    digits = number.lstrip('0') if number.isascii() and number.isdecimal() else ''
    if not digits or len(digits) > len(str(LONGEST)) or int(digits) > LONGEST:
      short = number if len(number) <= 40 else f'{number[:40]}...'
      raise ValueError(f'--shape has {letter}={short!r}, expected an integer from 1 to {LONGEST}')
    given[letter] = int(digits)
  full = {**DEFAULTS, **given}
  full.setdefault('S', full['T'])
  full.setdefault('K', 1 if method is not None and method.sizes.get('K') == 1 else full['H'])
  full.setdefault('V', full['D'])
  return Sizes(**full), tuple(x for x in letters if x not in given)


def report(method: Method, shape: str, *, dtype='bfloat16', chips='all', mask: str | None = None, is_backward=False):
  """All that `text` prints, as JSON types.

  Args:
    method: a record of the catalog.
    shape: as 'B=1,T=8192,H=32,K=8,D=128'; what is missing has a default.
    dtype: of q, k, v and out.
    chips: a name of attn.cost.hardware, or 'all'.
    mask: text in place of the method's own mask (attn/masks/text.py).
    is_backward: the backward in place of the forward.

  Raises:
    NotImplementedError: the method has no cost model.
    ValueError: any argument that cannot be read, by name.
  """
  found = list(hardware.HARDWARE.values()) if chips == 'all' else [hardware.get(chips)]
  sizes, defaults = sizes_of(shape, method)
  call, notes = of_method(method, sizes, dtype, None if mask is None else mask_text.parse(mask))
  return {
    'method': method.name,
    'title': method.title,
    'direction': 'backward' if is_backward else 'forward',
    'mask': mask_text.write(call.mask),
    'mask_from': 'catalog' if mask is None else '--mask',
    'mask_is_small': mask is None and 'mask' in method.settings,
    'shape': dataclasses.asdict(sizes),
    'defaults': list(defaults),
    'dtype': dtype,
    'notes': list(notes),
    'hardware': [_on(call, chip, is_backward, 8 if method.path == _PLANNED else 1) for chip in found],
  }


def _on(call, chip, is_backward, multiple):
  """One row of the report; block_sparse wants queries in a multiple of 8."""
  try:
    blocks, c = roofline.best(call, chip, is_backward=is_backward, multiple=multiple)
  except ValueError as error:
    return {'name': chip.name, 'error': str(error)}
  least, line, visits = roofline.of(c, chip, is_least=True), roofline.of(c, chip), call.visits(blocks)
  waves, busy = roofline.occupancy(c.programs, chip.cores)
  return {
    'name': chip.name,
    'tile': [blocks.q, blocks.kv],
    'visited_share': visits.share,
    'visited_is_bound': visits.is_bound,
    'estimates': list(_OF_VISITS) if visits.is_bound else [],
    'matmul_flops': dict(c.matmul_flops),
    'vector_ops': c.vector_ops,
    'exps': c.exps,
    'read_bytes': c.read_bytes,
    'write_bytes': c.write_bytes,
    'least_bytes': c.least_bytes,
    'io_bound_bytes': roofline.io_bytes(call, blocks, chip, is_backward=is_backward),
    'intensity': c.intensity,
    'passes': c.passes,
    'fast_bytes': c.fast_bytes,
    'fast_bytes_there': chip.fast_bytes,
    'programs': c.programs,
    'waves': waves,
    'busy_share': busy,
    'seconds': least.seconds,
    'parts': dict(least.parts),
    'bound': least.bound,
    'uncached_seconds': line.seconds,
    'uncached_serial_seconds': line.serial_seconds,
    'uncached_parts': dict(line.parts),
    'uncached_bound': line.bound,
    'left_out': list(line.left_out),
    'array_bytes': array_bytes(call, is_backward=is_backward),
    'fits_memory': array_bytes(call, is_backward=is_backward) <= chip.hbm_bytes,
  }


# What is an upper bound, or made of upper bounds, where the visited tiles are: no bound from below any more.
_OF_VISITS = (
  'visited_share', 'matmul_flops', 'vector_ops', 'exps', 'read_bytes', 'write_bytes', 'least_bytes', 'io_bound_bytes',
  'intensity', 'seconds', 'parts', 'bound', 'uncached_seconds', 'uncached_serial_seconds', 'uncached_parts',
  'uncached_bound',
)  # fmt: skip


def text(report: dict, width=100) -> str:
  """A report for people: what was costed, one line a chip, and what the figures leave out."""
  r = report
  own = '--mask' if r['mask_from'] == '--mask' else "the catalog's"
  if r['mask_is_small']:
    own += ', sized for 12 tokens: --mask costs another'
  sizes = ' '.join(f'{k}={v}' for k, v in r['shape'].items())
  lines = [
    f'{r["title"]}  ({r["method"]}), cost of the {r["direction"]}', '',
    f'mask    {r["mask"]}   ({own})',
    f'shape   {sizes}' + (f'   (by default: {", ".join(r["defaults"])})' if r['defaults'] else ''),
    f'dtype   {r["dtype"]}', '',
  ]  # fmt: skip
  fine = [x for x in r['hardware'] if 'error' not in x]
  rows = [_HEAD, *(_row(x) for x in fine)]
  widths = [max(map(len, column)) for column in zip(*rows)]
  if fine:
    lines += ['  '.join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows]
  lines += [x['error'] for x in r['hardware'] if 'error' in x]
  lines += ['']
  for note in _footnotes(r, fine):
    lines += textwrap.wrap(note, width, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)
  return '\n'.join(lines)


_HEAD = (
  'chip', 'tile', 'visited', 'matmul', 'exp', 'bytes', 'I/O bound', 'FLOP/B', 'fast memory', 'busy', 'time >=',
  'bound by', 'uncached', 'in turn',
)  # fmt: skip


def _row(x):
  about = '~' if x['visited_is_bound'] else ''
  return (
    x['name'],
    f'{x["tile"][0]}x{x["tile"][1]}',
    f'{"<" if about else ""}{100 * x["visited_share"]:.3g}%',
    about + _si(sum(x['matmul_flops'].values()), 'FLOP'),
    about + _si(x['exps'], ''),
    about + _si(x['read_bytes'] + x['write_bytes'], 'B'),
    about + _si(x['io_bound_bytes'], 'B'),
    f'{about}{x["intensity"]:.0f}',
    _si(x['fast_bytes'], 'B'),
    f'{100 * x["busy_share"]:.3g}%',
    about + _si(x['seconds'], 's'),
    x['bound'],
    about + _si(x['uncached_seconds'], 's'),
    about + _si(x['uncached_serial_seconds'], 's'),
  )


def _footnotes(r, fine):
  yield from r['notes']
  if not fine:
    return
  passes = ', '.join(str(n) for n in sorted({x['passes'] for x in fine}))
  yield f'passes over the keys: {passes}. tile: queries x keys, for all heads that share a key head.'
  yield 'visited: share of the scores that are in tiles which the mask does not leave empty.'
  if any(x['visited_is_bound'] for x in fine):
    yield (
      '<, ~: there are too many tiles to look at each, and larger ones were: < is an upper bound, and what has a ~ is '
      'made of it and is no bound from below, under "time >=" neither.'
    )
  yield 'busy: programs run in rounds, one a core; the share of cores that have one, over all rounds.'
  yield (
    'bytes: this schedule with nothing cached between main memory and the cores, each load of a tile counted. '
    'I/O bound: N d + N^2 d^2 s / M numbers up to a constant, s the visited share, M the fast memory of a program.'
  )
  yield (
    'time >=: a bound from below for these tiles and operations: the longest of matmul, exp and vector at peak rates, '
    'and of memory with every operand moved once. uncached: the same with the bytes of this schedule; '
    'a cache (the L2 of a GPU) makes it less. in turn: uncached, without overlap, the sum.'
  )
  for what in sorted({y for x in fine for y in x['left_out']}):
    names = ', '.join(x['name'] for x in fine if what in x['left_out'])
    yield f'left out for want of a figure: {what} ({names})'
  small = ', '.join(x['name'] for x in fine if not x['fits_memory'])
  if small:
    arrays = 'q, k, v, out, their gradients and the log-sum-exp' if r['direction'] == 'backward' else 'q, k, v and out'
    yield f'{arrays} ({_si(fine[0]["array_bytes"], "B")}) do not fit the main memory of {small}'


def _si(x, unit):
  """Three digits and a prefix: 193 GFLOP, 0.24 ms."""
  for prefix, size in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3), ('', 1), ('m', 1e-3), ('u', 1e-6)):
    if abs(x) >= size:
      return f'{x / size:.3g} {prefix}{unit}'.strip()
  return f'{x / 1e-9:.3g} n{unit}' if x else f'0 {unit}'.strip()


def _meant(near):
  return f'did you mean {near[0]}? ' if near else ''
