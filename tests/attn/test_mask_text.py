"""attn.masks.text: masks as text, there and back; what is refused, and where."""

import ast
import inspect

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from attn import layouts, masks
from attn.masks import causal, document, prefix, sink, text as mask_text, window

LEAVES = [
  'causal()', 'causal(-3)', 'window(3)', 'window(2, 1)', 'window(None, 4)', 'window(5, None)', 'chunked(4)',
  'prefix(-1)', 'sink(0)', 'sink(4)', 'dilated(2)', 'everything()', 'document((0, 0, 1))', 'causal((1, 2))',
  'prefix((3,))', 'document(((0, 1), (2, 2)), ((1, 1), (0, 1)))', 'neighborhood((8, 8), (3, 3))',
  'neighborhood((4, 8), (3, 3), (1, 2))', 'neighborhood((8,), (3,), (1,), (2,))',
  'neighborhood((8, 8), (3, 3), (1, 1), (1, 1), (True, False))', 'disc(3)', 'disc(2.1)', 'disc(1.6, (0, 2))',
  'grouped(4)', 'grouped(4, 2, axis=0)', 'grouped(4, (0, 2))', 'band(0, -3, None)', 'segments(0, None)',
  'segments((0, 2), 1)', 'same_segment()', 'segment_graph(((True, False), (True, True)))',
  'radial((4, 8, 8), 0.5, block=128)', 'radial((4, 8), 0.2, block=16, has_sink=True)',
]  # fmt: skip


def same(a, b):
  """Whether two masks are equal in structure and in every array."""
  (x, x_tree), (y, y_tree) = (jax.tree.flatten(m) for m in (a, b))
  return x_tree == y_tree and all(np.array_equal(u, v) for u, v in zip(x, y))


@pytest.mark.parametrize('text', LEAVES)
def test_one_predicate_there_and_back(text):
  mask = mask_text.parse(text)
  assert mask_text.write(mask) == text
  assert same(mask_text.parse(text), mask)


def test_every_constructor_is_tried():
  missing = set(mask_text.constructors()) - {x.split('(')[0] for x in LEAVES}
  assert missing == {'random_blocks', 'recent'}  # one is written by what it drew, one as a window
  assert same(mask_text.parse('recent(4)'), window(3))
  assert same(mask_text.parse('random_blocks(7, 1, 2, length=8)'), masks.random_blocks(7, 1, 2, 8))


def test_only_what_takes_numbers_may_be_called():
  functions = {n for n in masks.__all__ if inspect.isfunction(getattr(masks, n))}
  others = functions - set(mask_text.constructors())
  assert others == {'array', 'function', 'placed', 'check', 'dense', 'empty_rows', 'tokens', 'verdicts'}


@pytest.mark.parametrize(
  'mask, text',
  [
    (causal() & (window(1023) | sink(4)), 'causal() & (window(1023) | sink(4))'),
    (causal() & window(3) | sink(4), '(causal() & window(3)) | sink(4)'),
    (causal() | prefix(5), 'causal() | prefix(5)'),
    (prefix(5) | causal(), 'prefix(5) | causal()'),
    (causal() & window(3) & sink(4), 'causal() & window(3) & sink(4)'),
    (causal() & (window(3) & sink(4)), 'causal() & (window(3) & sink(4))'),
    (~(causal() | prefix(1)) & ~window(2), '~(causal() | prefix(1)) & ~window(2)'),
    (~~causal(), '~~causal()'),
  ],
)
def test_brackets(mask, text):
  assert mask_text.write(mask) == text
  assert same(mask_text.parse(text), mask)


@st.composite
def trees(draw, depth=4):
  if depth == 0 or draw(st.booleans()):
    return mask_text.parse(draw(st.sampled_from(LEAVES)))
  a, b = draw(trees(depth=depth - 1)), draw(trees(depth=depth - 1))
  return draw(st.sampled_from([a & b, a | b, ~a]))


@settings(max_examples=60, deadline=None)
@given(trees())
def test_any_mask_there_and_back(mask):
  text = mask_text.write(mask)
  assert same(mask_text.parse(text), mask)
  assert mask_text.rebracketed(text) is None
  # And as Python itself would read it.
  assert same(eval(text, {name: getattr(masks, name) for name in mask_text.constructors()}), mask)


@pytest.mark.parametrize(
  'text, read, other',
  [
    ('causal() & window(3) | sink(4)', '(causal() & window(3)) | sink(4)', 'causal() & (window(3) | sink(4))'),
    ('sink(4) | causal() & window(3)', 'sink(4) | (causal() & window(3))', '(prefix(4) | causal()) & window(3)'),
    (
      'causal() & window(3) | sink(4) & dilated(2)',
      '(causal() & window(3)) | (sink(4) & dilated(2))',
      'causal() & (window(3) | sink(4)) & dilated(2)',
    ),
    ('causal() & (window(3) | sink(4))', None, None),
    ('(causal() & window(3)) | sink(4)', None, None),
    ('((causal()) & window(3))|(sink(4))', None, None),
    ('causal() & (chunked(9) & window(3) | sink(4))', 'causal() & ((chunked(9) & window(3)) | sink(4))',
     'causal() & (chunked(9) & (window(3) | sink(4)))'),
    ('~(causal() & window(3) | sink(4))', '~((causal() & window(3)) | sink(4))', '~(causal() & (window(3) | sink(4)))'),
    ('causal() & window(3) & sink(4)', None, None),
    ('(causal() | prefix(3)) & (window(3) | sink(4))', None, None),
  ],
)  # fmt: skip
def test_the_other_reading(text, read, other):
  if read is not None:
    assert mask_text.write(mask_text.parse(text)) == read
    assert same(mask_text.parse(read), mask_text.parse(text))
  assert mask_text.rebracketed(text) == other


def test_spelling():
  want = causal() & (window(3) | sink(1))
  for text in (
    ' causal()\n  & (window(left=3) | sink(1))\n', 'masks.causal() & (masks.window(3,) | masks.sink(n=1))',
    'causal(0) & (window(3, right=0) | (sink)(1))', 'causal()&(window(0x3)|sink(1))',
  ):  # fmt: skip
    assert same(mask_text.parse(text), want), text


@pytest.mark.parametrize(
  'text, at, words',
  [
    ('casual() & window(3)', 1, 'unknown word casual: did you mean causal'),
    ('causal() & windw(3)', 12, 'unknown word windw: did you mean window?'),
    ('causal() & masks.windw(3)', 12, 'did you mean window?'),
    ('zzz()', 1, 'expected one of band, causal, chunked'),
    ('causal & window(3)', 1, r'without calling it: expected causal\(offset=0\)'),
    ('causal() and window(3)', 10, "'and': combine masks with & | ~"),
    ('causal() | (sink(1) or window(3))', 21, "'or': combine"),
    ('not causal()', 1, "'not': combine"),
    ('causal() + window(3)', 10, r"'\+': combine"),
    ('causal() & 3', 12, 'holds 3, expected a mask'),
    ('causal() &', 11, 'cannot be read'),
    ('causal() & (window(3)', 12, 'cannot be read'),
    ('window()', 1, r"missing a required argument: 'left'.*expected window\(left"),
    ('causal() | window(3, up=2)', 12, "unexpected keyword argument 'up'"),
    ('window(-1)', 1, 'left=-1 must be at least 0'),
    ('window("3")', 8, "holds '3', expected a number"),
    ('causal() & window(2 ** 3)', 19, 'expected a number'),
    ('window(*(1, 2))', 8, 'expected numbers'),
    ('window(**{})', 1, 'calls|holds|expected'),
    ('document("é") & foo()', 10, "holds 'é'"),
    ('sink(len("é")) & foo()', 6, r"holds len\('é'\)"),
    ('array((True, False))', 1, 'array, which a text cannot give'),
    ('function(print)', 1, 'make this mask in Python'),
    ('__import__("os").system("false")', 1, "calls __import__.*expected one of"),
    ('causal().__class__', 1, 'expected a mask'),
    ('(lambda: causal())()', 1, 'expected one of|expected a mask'),
    ('[causal() for x in y]', 1, 'expected a mask'),
    ('causal(); causal()', 9, 'cannot be read'),
    ('random_blocks(<1 of 4 blocks>, 2)', 15, 'cannot be read'),
  ],
)
def test_refusals_say_what_and_where(text, at, words):
  with pytest.raises(ValueError, match=words) as error:
    mask_text.parse(text)
  if 'window(**' not in text:
    assert f'at character {at}, ' in str(error.value)


@pytest.mark.parametrize('text', ['', '  \n', None, 'x' * 20_000, '(' * 3000 + 'causal()' + ')' * 3000, 'causal()\0'])
def test_refuses_what_cannot_be_text(text):
  with pytest.raises(ValueError, match='mask'):
    mask_text.parse(text)


def test_depth_is_refused_and_not_a_crash():
  for text in ('~' * 5000 + 'causal()', ' & '.join(['causal()'] * 900)):
    try:
      mask_text.write(mask_text.parse(text))
    except ValueError as error:
      assert 'cannot be read' in str(error)


def test_nothing_is_executed(monkeypatch):
  monkeypatch.setattr('builtins.eval', lambda *_: pytest.fail('executed'))
  monkeypatch.setattr('builtins.exec', lambda *_: pytest.fail('executed'))
  assert same(mask_text.parse('causal()'), causal())
  assert isinstance(ast.parse('causal()', mode='eval'), ast.Expression)


def test_what_text_cannot_hold_is_shown():
  def diagonal(b, h, i, j):
    return i == j

  long = document(np.zeros(65, np.int32))
  placed = masks.placed(masks.disc(2), layouts.grid(4, 4))
  for mask, text in (
    (masks.function(diagonal), 'function((), <diagonal>)'),
    (masks.array(np.ones((16, 16), bool)), 'array(<bool[1, 1, 16, 16]>)'),
    (long, 'document(<int32[65]>)'),
    (placed, 'placed(disc(2), <16 tokens>)'),
    (masks.random_blocks(0, 1, 2, 8), 'random_blocks(<1 of 4 blocks>, 2)'),
  ):
    assert mask_text.write(mask) == text
    with pytest.raises(ValueError, match='cannot'):
      mask_text.parse(text)
  assert jax.jit(lambda n: len(mask_text.write(prefix(n))))(np.arange(2)) == len('prefix(<int32[2]>)')
