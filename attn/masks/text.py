"""Masks as text, and text as masks: `causal() & (window(1023) | sink(4))`.

    mask_text.write(masks.causal() | masks.prefix(5))        # 'causal() | prefix(5)'
    mask_text.parse('causal() & (window(1023) | sink(4))')   # the mask; nothing runs but constructors of attn.masks
    mask_text.rebracketed('causal() & window(3) | sink(1)')  # 'causal() & (window(3) | sink(1))', perhaps meant

In Python `&` binds tighter than `|`: `a & b | c` is `(a & b) | c`. `write` puts these brackets wherever the two meet.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from attn import masks
from attn.masks.predicates import And, Mask, Not, Or
from attn.masks.radial_bands import Radial
from attn.masks.segment_graphs import Segments
from attn.masks.sequence import Causal, Document, Prefix, Window
from attn.masks.spatial import Disc, Grouped, Neighborhood, Placed, RandomBlocks

LONGEST = 10_000  # characters of a text: Python's own parser recurses
MOST_NUMBERS = 64  # of an array, written out
WORDS = {'and': '&', 'or': '|', 'not': '~'}
NOT_TEXT = ('array', 'function', 'placed')  # they take what a text cannot say


def write(mask: Mask) -> str:
  """The expression that makes a mask, with brackets wherever `&` and `|` meet.

  `parse(write(mask))` is the mask again, unless it holds functions, layouts or arrays of more than 64 numbers: these
  are in angle brackets, which `parse` refuses.
  """
  if isinstance(mask, And | Or):
    sign = ' & ' if isinstance(mask, And) else ' | '
    # a & b & c is (a & b) & c, so a chain needs brackets on its right side alone.
    left = write(mask.a) if type(mask.a) is type(mask) else _operand(mask.a, mask)
    return f'{left}{sign}{_operand(mask.b, mask)}'
  if isinstance(mask, Not):
    return f'~{_operand(mask.a, mask)}'
  if isinstance(mask, Prefix):
    return f'sink({mask.fixed})' if mask.fixed is not None and mask.fixed >= 0 else _prefix(mask)
  return _leaf(mask)


def parse(text: str) -> Mask:
  """The mask that a text describes.

  Known are the constructors of attn.masks that take numbers, with numbers, None, True, False and tuples of them as
  arguments, the operators `&`, `|`, `~`, and brackets. The text is read and never executed.

  Raises:
    ValueError: anything else; the message says at which character, and which known word is nearest.
  """
  return _Reader(text).mask()


def rebracketed(text: str) -> str | None:
  """What a text would be if `|` bound tighter than `&`, or None where brackets leave no doubt.

      causal() & window(3) | sink(1)   is read as   (causal() & window(3)) | sink(1)
                                       and gives    causal() & (window(3) | sink(1))

  Raises:
    ValueError: as `parse`.
  """
  reader = _Reader(text)
  other = reader.mask(binds_tighter=ast.BitOr)
  return write(other) if reader.is_mixed else None


@functools.cache
def constructors() -> dict[str, Callable[..., Mask]]:
  """The functions that a text may call, by name."""
  found = {name: getattr(masks, name) for name in masks.__all__ if name not in NOT_TEXT}
  return {
    name: f for name, f in found.items() if inspect.isfunction(f) and inspect.signature(f).return_annotation is Mask
  }


class _Reader:
  """One text on its way to a mask. `is_mixed` says whether `&` and `|` met without brackets."""

  def __init__(self, text):
    if not isinstance(text, str) or not text.strip():
      raise ValueError(f'mask={text!r}, expected an expression such as causal() & (window(3) | sink(1))')
    if len(text) > LONGEST:
      raise ValueError(f'the mask has {len(text)} characters, expected at most {LONGEST}')
    # On one line, so that a place is one number; a leading blank would be an indentation.
    self.text, self.is_mixed = re.sub(r'\s', ' ', text).strip(), False
    try:
      self.tree = ast.parse(self.text, mode='eval').body
    except SyntaxError as error:
      # Python has no place for an end that comes too early.
      raise self.error(f'cannot be read ({error.msg})', (error.offset or len(self.text) + 1) - 1) from None
    except (ValueError, RecursionError, MemoryError) as error:
      raise ValueError(f'the mask {_short(self.text)!r} cannot be read: {error}') from None

  def mask(self, binds_tighter: type = ast.BitAnd):
    try:
      return self.expression(self.tree, binds_tighter)
    except RecursionError:
      raise ValueError(f'the mask {_short(self.text)!r} cannot be read: too many brackets') from None

  def expression(self, node, tight):
    match node:
      case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
        return self.chain(node, tight)
      case ast.UnaryOp(op=ast.Invert()):
        return ~self.expression(node.operand, tight)
      case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(value=ast.Name(id='masks'), attr=name)):
        return self.call(node, self.known(name, node))
      case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
        word = {ast.And: 'and', ast.Or: 'or', ast.Not: 'not'}[type(node.op)]
        raise self.error(f'holds {word!r}: combine masks with & | ~', self.word(word, node))
      case ast.Name(id=name):
        self.known(name, node)
        raise self.error(f'names {name} without calling it: expected {name}{_signature(name)}', node)
      case ast.BinOp():
        sign = self.text[self.end(node.left) : self.start(node.right)].strip(' ()')
        raise self.error(f'holds {sign!r}: combine masks with & | ~', self.text.index(sign, self.end(node.left)))
      case ast.Call():
        raise self.error(f'calls {ast.unparse(node.func)}, expected {_listed()}', node)
    raise self.error(f'holds {_short(ast.unparse(node))}, expected a mask such as causal()', node)

  def chain(self, node, tight):
    """Operands and operators up to the next brackets, folded from the left, those of `tight` first."""
    operands, signs = [], []

    def collect(x):
      if x is not node and not self.is_open(x):
        operands.append(self.expression(x, tight))
        return
      collect(x.left)
      signs.append(type(x.op))
      collect(x.right)

    collect(node)
    self.is_mixed |= len(set(signs)) > 1
    groups, last = [operands[0]], None
    for sign, operand in zip(signs, operands[1:], strict=True):
      if sign is tight:
        groups[-1] = _join(sign, groups[-1], operand)
      else:
        groups.append(operand)
        last = sign
    return functools.reduce(functools.partial(_join, last), groups)

  def is_open(self, node):
    """Whether a node is `a & b` or `a | b` without brackets about it."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.BitAnd | ast.BitOr):
      return False
    before, after = self.text[: self.start(node)].rstrip(), self.text[self.end(node) :].lstrip()
    return not (before.endswith('(') and after.startswith(')'))

  def call(self, node, name):
    make = constructors()[name]
    for x in (*node.args, *node.keywords):
      if isinstance(x, ast.Starred) or (isinstance(x, ast.keyword) and x.arg is None):
        raise self.error(f'holds {ast.unparse(x)}, expected numbers', x)
    args = [self.value(x) for x in node.args]
    kwargs = {x.arg: self.value(x.value) for x in node.keywords}
    try:
      inspect.signature(make).bind(*args, **kwargs)
    except TypeError as error:
      raise self.error(f'calls {ast.unparse(node)} ({error}), expected {name}{_signature(name)}', node) from None
    try:
      return make(*args, **kwargs)
    except (ValueError, OverflowError) as error:
      raise self.error(f'calls {ast.unparse(node)}: {error}', node) from None

  def value(self, node):
    match node:
      case ast.Constant(value=int() | float() | None):
        return node.value
      case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as n)) if not isinstance(n, bool):
        return -n
      case ast.Tuple() | ast.List():
        return tuple(self.value(x) for x in node.elts)
    raise self.error(f'holds {_short(ast.unparse(node))}, expected a number, None, a bool or a tuple of them', node)

  def known(self, name, node):
    if name in constructors():
      return name
    if name in NOT_TEXT:
      raise self.error(f'calls {name}, which a text cannot give its arguments: make this mask in Python', node)
    near = difflib.get_close_matches(name.lower(), constructors(), n=2, cutoff=0.5)
    hint = f'did you mean {" or ".join(near)}?' if near else f'expected {_listed()}'
    raise self.error(f'holds the unknown word {name}: {hint}', node)

  def error(self, what, at):
    at = at if isinstance(at, int) else self.start(at)
    return ValueError(f'the mask {_short(self.text)!r}, at character {at + 1}, {what}')

  def start(self, node):
    # Syntax trees count bytes.
    return len(self.text.encode()[: node.col_offset].decode())

  def end(self, node):
    return len(self.text.encode()[: node.end_col_offset].decode())

  def word(self, word, node):
    """Where a word stands: a syntax tree tells the places of operands alone."""
    begin = self.end(node.values[0]) if isinstance(node, ast.BoolOp) else self.start(node)
    return self.text.index(word, begin)


def _join(sign, a, b):
  return a & b if sign is ast.BitAnd else a | b


def _operand(mask, parent):
  """A mask as one side of another one; the prefix of a prefix LM by its name."""
  if isinstance(mask, And | Or):
    return f'({write(mask)})'
  if isinstance(mask, Prefix) and isinstance(parent, Or) and any(isinstance(x, Causal) for x in (parent.a, parent.b)):
    return _prefix(mask)
  return write(mask)


def _prefix(mask):
  return _call('prefix', mask.fixed if mask.length is None else mask.length)


def _leaf(mask):
  """A predicate by its constructor."""
  match mask:
    case Causal(fixed, offset):
      return _call('causal', *[x for x in (fixed, offset) if x is not None and not _is_zero(x)])
    case Window(left, right):
      return _call('window', *(left, right)[: 1 + (right != 0)])
    case Document(q_ids, kv_ids):
      return _call('document', *(q_ids, kv_ids)[: 1 + (kv_ids is not q_ids)])
    case Neighborhood(shape, window):
      ones, never = (1,) * len(shape), (False,) * len(shape)
      given = ((mask.stride, ones), (mask.dilation, ones), (mask.is_causal, never))
      used = max((n for n, (x, default) in enumerate(given, 1) if x != default), default=0)
      return _call('neighborhood', shape, window, *(x for x, _ in given[:used]))
    case Disc(square, axes):
      return _call('disc', _radius(square), *(() if axes is None else (axes,)))
    case Grouped(size, axis, fixed, shift):
      shift = [x for x in (fixed, shift) if x is not None and not _is_zero(x)]
      return _call('grouped', size, *shift, **({} if axis is None else {'axis': axis}))
    case Radial(shape, decay, block, has_sink):
      return _call('radial', shape, decay, block=block, **({'has_sink': True} if has_sink else {}))
    case RandomBlocks(chosen, block):
      return f'random_blocks(<{chosen.shape[1]} of {chosen.shape[0]} blocks>, {block})'
    case Segments():
      sets = (x[0] if x is not None and len(x) == 1 else x for x in (mask.q_set, mask.k_set))
      return _call('segments', *sets)
    case Placed(a, q_layout, kv_layout):
      same = kv_layout is q_layout
      return f'placed({write(a)}, {", ".join(f"<{len(x)} tokens>" for x in (q_layout, kv_layout)[: 2 - same])})'
  # The others have the fields of their constructor, which has their name in lower case.
  fields = [getattr(mask, x.name) for x in dataclasses.fields(mask)] if dataclasses.is_dataclass(mask) else []
  return _call(re.sub(r'(?<!^)(?=[A-Z])', '_', type(mask).__name__).lower(), *fields)


def _is_zero(x):
  return isinstance(x, int) and x == 0


def _radius(square):
  """The shortest radius whose square is above square - 1 and not above `square`."""
  root = math.isqrt(square)
  if root * root == square:
    return root
  radii = (round(math.sqrt(square - 0.5), digits) for digits in range(1, 17))
  return next(x for x in radii if math.ceil(x * x) == square)


def _call(name, *values, **keywords):
  words = [*(_value(x) for x in values), *(f'{key}={_value(x)}' for key, x in keywords.items())]
  return f'{name}({", ".join(words)})'


def _value(x: Any) -> str:
  if x is None or isinstance(x, bool | int | float | np.integer):
    return str(x)
  if isinstance(x, tuple | list):
    return '(' + ', '.join(map(_value, x)) + ',' * (len(x) == 1) + ')'
  if isinstance(x, jax.core.Tracer):
    return f'<{x.dtype}{list(x.shape)}>'
  if isinstance(x, np.ndarray | jax.Array):
    return _value(np.asarray(x).tolist()) if x.size <= MOST_NUMBERS and x.ndim else f'<{x.dtype}{list(x.shape)}>'
  return f'<{getattr(x, "__name__", type(x).__name__)}>'


def _signature(name):
  return re.sub(r' -> .*', '', str(inspect.signature(constructors()[name])))


def _listed():
  return 'one of ' + ', '.join(sorted(constructors()))


def _short(text):
  return text if len(text) <= 80 else text[:77] + '...'
