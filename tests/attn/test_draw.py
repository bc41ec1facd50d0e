"""attn.draw: what pictures show, read back from their pixels and their text; how long and large they may get."""

import base64
import io
import re
import time
import tracemalloc
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from attn import draw, layouts, masks, plan
from attn.draw import cells, picture
from attn.masks import causal, document, prefix, sink, window

TWO_HEADS = plan.from_blocks(np.ones((1, 2, 1, 1), bool), T=8, S=8, block_q=8, block_kv=8)
ONES = np.ones((1, 2, 1, 4), np.float32)
SVG = '{http://www.w3.org/2000/svg}'


def images(made):
  """The images of an SVG, one pixel a cell, as [n, m, 4] of 0..255."""
  found = [x.get('href') for x in ET.fromstring(made.svg()).iter(f'{SVG}image')]
  return [np.asarray(Image.open(io.BytesIO(base64.b64decode(x.split(',')[1]))).convert('RGBA')) for x in found]


def words(made):
  """The text of an SVG."""
  return [''.join(x.itertext()).strip().replace('\xa0', ' ') for x in ET.fromstring(made.svg()).iter(f'{SVG}text')]


def has(image, color, alpha=1.0):
  """bool [n, m]: the cells of a colour."""
  want = np.round(255 * picture.rgba(color, alpha)).astype(int)
  # A nearly transparent colour is stored with an error.
  return (np.abs(image.astype(int) - want) <= [8, 8, 8, 1]).all(-1) if want[3] else image[..., 3] == 0


def seen_by(f, T, S=None):
  return np.array([[f(i, j) for j in range(S or T)] for i in range(T)])


@pytest.mark.parametrize(
  'mask, lengths, f',
  [
    (causal(), (12,), lambda i, j: j <= i),
    (causal() & (window(3) | sink(2)), (33,), lambda i, j: j <= i and (j >= i - 3 or j < 2)),
    (causal() & window(3) | sink(4), (16,), lambda i, j: i - 3 <= j <= i or j < 4),
    (causal() | prefix(5), (10, 24), lambda i, j: j <= i or j < 5),
    (window(2, None), (7, 5), lambda i, j: j >= i - 2),
    (causal(299), (1, 300), lambda i, j: True),
  ],
)
def test_cells_of_an_svg_are_the_mask(mask, lengths, f):
  made = draw.mask(mask, *lengths)
  (image,) = images(made)
  want = seen_by(f, *lengths)
  np.testing.assert_array_equal(has(image, picture.BLUE), want)
  np.testing.assert_array_equal(has(image, picture.UNSEEN), ~want)
  assert made.facts == {'share': want.mean(), 'empty_rows': 0, 'cell': (1, 1), 'is_exact': True}
  assert f'{100 * want.mean():.3g} % of the pairs seen' in made.title


def test_pixels_of_a_png():
  """Queries go down, keys to the right: the lower left is seen, the upper right is not."""
  made = draw.mask(causal() & (window(3) | sink(2)), 32)
  pixels = np.asarray(Image.open(io.BytesIO(made.png())).convert('RGB')).astype(int)
  axes, scale = made.figure.axes[0], picture.RESOLUTION / made.figure.dpi
  blue = np.round(255 * picture.rgba(picture.BLUE)[:3])
  for t, s in np.ndindex(32, 32):
    x, y = axes.transData.transform((s + 0.5, t + 0.5)) * scale
    is_blue = np.abs(pixels[int(len(pixels) - y), int(x)] - blue).max() < 20
    assert is_blue == (s <= t and (s >= t - 3 or s < 2)), (t, s)


def test_rows_that_see_nothing_are_marked():
  made = draw.mask(causal(-2) & window(9), 12)
  (image,) = images(made)
  np.testing.assert_array_equal(has(image, picture.ORANGE, 0.4).all(1), np.arange(12) < 2)
  assert made.facts['empty_rows'] == 2 and '2 queries see nothing' in made.title
  assert 'queries that see nothing' in words(made)
  nothing = draw.mask(~masks.everything(), 8)
  assert has(images(nothing)[0], picture.ORANGE, 0.4).all() and nothing.facts['share'] == 0


def test_padding_is_hidden_as_attention_hides_it():
  positions = np.array([0, 1, 2, -1, 3, -1])
  (image,) = images(draw.mask(causal(), 6, positions=positions))
  there = positions >= 0
  want = there[:, None] & there & (positions <= positions[:, None])
  np.testing.assert_array_equal(has(image, picture.BLUE), want)
  np.testing.assert_array_equal(has(image, picture.ORANGE, 0.4).all(1), ~there)


def test_a_row_of_the_batch_and_a_head():
  ids = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
  by_head = masks.function(lambda b, h, i, j: i - j == h)
  (image,) = images(draw.mask(document(ids) | by_head, 4, batch=2, heads=4, at=(1, 3)))
  want = seen_by(lambda i, j: ids[1][i] == ids[1][j] or i - j == 3, 4)
  np.testing.assert_array_equal(has(image, picture.BLUE), want)
  with pytest.raises(ValueError, match='head=4, expected 0 to 3'):
    draw.mask(by_head, 4, heads=4, at=(0, 4))


# Downsampling.


@pytest.mark.parametrize('T, most', [(24, 8), (23, 8), (30, 7), (5, 512)])
def test_cells_count_pairs(T, most):
  mask = causal() & (window(5) | sink(2))
  found = cells.of(mask, T, T + 4, most=most)
  dense = seen_by(lambda i, j: j <= i and (j >= i - 5 or j < 2), T, T + 4)
  q, kv = found.size
  assert q == -(-T // most) and found.is_exact and found.total == dense.mean()
  for i, j in np.ndindex(found.share.shape):
    part = dense[i * q : (i + 1) * q, j * kv : (j + 1) * kv]
    assert found.share[i, j] == pytest.approx(part.mean())


@pytest.mark.parametrize('T', [6000, 5003])
def test_large_cells_agree_with_verdicts_and_counts(T):
  mask = causal() & (window(700) | sink(40)) & ~masks.chunked(1)
  found = cells.of(mask, T)
  assert not found.is_exact and max(found.share.shape) <= cells.MOST_CELLS
  i, j = np.arange(T)[:, None], np.arange(T)
  dense = (j < i) & ((j >= i - 700) | (j < 40))
  q, kv = found.size
  exact = np.add.reduceat(np.add.reduceat(dense, np.arange(0, T, q), 0, dtype=int), np.arange(0, T, kv), 1)
  exact = exact / cells.areas((T, T), found.size)
  assert found.total == pytest.approx(dense.mean(), rel=0.01)
  assert (found.share[exact == 0] == 0).all() and (found.share[exact == 1] == 1).all()
  assert (exact[(found.share == 0) & ~found.is_maybe] == 0).all()
  # Samples: 16 of each cell.
  assert np.abs(found.share - exact).mean() < 0.01
  np.testing.assert_array_equal(found.empty, exact.sum(1) == 0)


def test_a_million_tokens_in_bounded_time_and_memory():
  rng = np.random.default_rng(0)
  mask = causal() & (window(50_000) | sink(4)) & document(np.sort(rng.integers(0, 20, 1_000_000)))
  draw.mask(causal(), 8)  # what matplotlib loads is not measured
  tracemalloc.start()
  begin = time.perf_counter()
  made = draw.mask(mask, 1_000_000)
  seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
  tracemalloc.stop()
  (image,) = images(made)
  assert image.shape[:2] == (512, 512) and made.facts['cell'] == (1954, 1954)
  assert 'about' in made.title and 'a cell is 1,954 x 1,954 pairs' in made.title
  assert seconds < 20 and peak < 400e6, (seconds, peak)
  assert has(image, picture.BLUE)[300, 290]
  assert has(image, picture.UNSEEN)[[290, 300], [300, 5]].all()


def test_the_pairs_looked_at_are_those_of_the_cell():
  T = 512 * 9 - 4
  found = cells.of(masks.function(lambda b, h, i, j: i // 9 == j // 9), T)
  assert found.size == (9, 9) and not found.is_exact
  np.testing.assert_array_equal(found.share, np.eye(512))


def test_a_mask_that_says_nothing_of_tiles():
  made = draw.mask(masks.function(lambda b, h, i, j: j <= i), 20_000)
  assert made.facts['share'] == pytest.approx(0.5, abs=0.01)
  assert 'few or none' in words(made)


# Layouts.


def test_a_picture_shows_keys_where_they_stand():
  layout = layouts.grid(5, 7)
  made = draw.mask(masks.disc(2.1), layout=layout, query=[17, 0])
  flat, middle, corner = images(made)[-1], *images(made)[:2]
  y, x = np.mgrid[:5, :7]
  for image, (a, b) in ((middle, (2, 3)), (corner, (0, 0))):
    np.testing.assert_array_equal(has(image, picture.BLUE), (y - a) ** 2 + (x - b) ** 2 < 4.41)
  places = np.stack([y.ravel(), x.ravel()], 1)
  want = ((places[:, None] - places) ** 2).sum(-1) < 4.41
  np.testing.assert_array_equal(has(flat, picture.BLUE), want)
  assert 'query 17 at (2, 3) sees 13 keys' in words(made) and 'query 0 at (0, 0) sees 6 keys' in words(made)


def test_a_permuted_layout_is_drawn_in_space():
  layout = layouts.grid(4, 6).tiled((2, 3))
  t = 9  # some token of the array
  image = images(draw.mask(masks.disc(1.1), layout=layout, query=t))[0]
  y, x = np.mgrid[:4, :6]
  a, b = layout.coords[t]
  np.testing.assert_array_equal(has(image, picture.BLUE), (y - a) ** 2 + (x - b) ** 2 < 1.21)


def test_frames_of_a_video_side_by_side():
  made = draw.mask(masks.neighborhood((3, 4, 5), (3, 3, 3)), layout=layouts.grid(3, 4, 5), query=32)  # (1, 2, 2)
  image = images(made)[0]
  blue, shown = has(image, picture.BLUE), image[..., 3] > 0
  assert blue.sum() == 27 and shown.sum() == 60 and '27 keys' in ' '.join(words(made))
  assert {'frame 0', '1', '2'} <= set(words(made))
  (top,), first = np.flatnonzero(shown.any(1))[:1], np.flatnonzero(shown.any(0))[0]
  np.testing.assert_array_equal(np.argwhere(blue[top : top + 4, first : first + 5])[[0, -1]], [[1, 1], [3, 3]])


def test_text_before_a_picture():
  layout = layouts.concat(layouts.line(3), layouts.grid(4, 4))
  mask = masks.disc(1.1) & masks.segments(1, 1) | masks.segments(None, 0)
  made = draw.mask(mask, layout=layout, query=[3])
  image = images(made)[0]
  assert has(image, picture.BLUE).sum() == 3 + 3 and {'segment 0', 'segment 1'} <= set(words(made))
  assert draw.mask(masks.placed(mask, layout), 19).facts['share'] == made.facts['share']


def test_queries_that_are_chosen_for_a_layout():
  made = draw.mask(masks.disc(2), layout=layouts.grid(9, 9))
  assert [x for x in words(made) if x.startswith('query ')] == [
    'query 40 at (4, 4) sees 9 keys', 'query 0 at (0, 0) sees 4 keys',
  ]  # fmt: skip


# Brackets.


def test_forgotten_brackets_are_seen():
  made = draw.readings('causal() & window(3) | sink(4)', 12)
  read, meant = images(made)
  only = seen_by(lambda i, j: j > i and j < 4, 12)
  np.testing.assert_array_equal(has(read, picture.GREEN), only)
  assert not has(meant, picture.GREEN).any() and made.facts['differ']
  np.testing.assert_array_equal(has(meant, picture.BLUE), seen_by(lambda i, j: j <= i and (j >= i - 3 or j < 4), 12))
  text = ' '.join(words(made))
  assert 'as read: (causal() & window(3)) | sink(4)' in text
  assert 'perhaps meant: causal() & (window(3) | sink(4))' in text
  same = draw.readings('causal() & window(3) | sink(1)', 12)
  assert not same.facts['differ'] and 'both allow the same pairs' in ' '.join(words(same))
  assert len(images(draw.readings('causal() & (window(3) | sink(4))', 12))) == 1


# Plans.


def test_tiles_of_a_plan():
  chosen = np.zeros((1, 1, 5, 6), bool)
  chosen[0, 0, [0, 0, 2, 4, 4], [1, 3, 0, 3, 5]] = True
  partial = np.zeros_like(chosen)
  partial[0, 0, 2] = True
  made = draw.plan(plan.from_blocks(chosen, T=40, S=48, block_q=8, block_kv=8, partial=partial), order=True)
  (image,) = images(made)
  empty = ~chosen.any((0, 1, 3))[:, None] | ~chosen.any((0, 1, 2))
  np.testing.assert_array_equal(has(image, picture.ORANGE, 0.4), empty)
  np.testing.assert_array_equal(has(image, picture.BLUE), (chosen & ~partial)[0, 0])
  np.testing.assert_array_equal(has(image, picture.BLUE, 0.55), (chosen & partial)[0, 0])
  assert made.facts == {'visited': 5 / 30, 'full': 4 / 30, 'empty_rows': 2, 'unused_columns': 2, 'entries': 5}
  assert '2 query blocks without a tile' in made.title


def test_the_plan_of_a_mask():
  made = draw.plan(plan.of(causal() & window(15), 64, block_q=8, block_kv=8))
  (image,) = images(made)
  kind = seen_by(lambda i, j: 2 if i - j == 1 else 1 if i - j in (0, 2) else 0, 8)
  for value, alpha in ((2, 1), (1, 0.55)):
    np.testing.assert_array_equal(has(image, picture.BLUE, alpha), kind == value)


def test_a_plan_of_many_tiles():
  made = draw.plan(plan.of(causal() & window(5000), 200_000, block_q=128, block_kv=128))
  (image,) = images(made)
  assert max(image.shape) <= 512 and 'a cell is 4 x 4 tiles' in made.title
  assert made.facts['visited'] == pytest.approx(1 - ((1563 - 41) * (1563 - 40) + 1563 * 1562) / 2 / 1563**2, rel=0.02)


# Attention maps.


def test_weights_of_queries_and_keys():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 9, 4, 8)), rng.normal(size=(2, 9, 2, 8))
  made = draw.attention(q=q.astype(np.float32), k=k.astype(np.float32), b=1, mask=causal() & window(4))
  shown = images(made)
  assert len(shown) == 4 + 1  # and the bar
  s = np.einsum('thd,shd->hts', q[1], np.repeat(k[1], 2, axis=1)) / np.sqrt(8)
  allowed = seen_by(lambda i, j: i - 4 <= j <= i, 9)
  p = np.exp(s) * allowed
  p /= p.sum(-1, keepdims=True)
  assert made.facts['largest'] == pytest.approx(p.max(), rel=1e-4)
  import matplotlib

  for head in range(4):
    want = np.round(255 * matplotlib.colormaps['viridis'](p[head] / p.max()))
    np.testing.assert_allclose(shown[head][allowed], want[allowed], atol=2)
    assert has(shown[head], picture.UNSEEN)[~allowed].all()


def test_long_attention_is_pooled():
  rng = np.random.default_rng(1)
  q, k = (rng.normal(size=(1, 150, 1, 8)).astype(np.float32) for _ in range(2))
  from attn import softmax
  from attn.draw import attention_picture

  weights = softmax.attend(q, k, np.eye(150, dtype=np.float32)[None, :, None], is_causal=True)[0, :, 0]
  want = np.asarray(weights, np.float64).reshape(50, 3, 50, 3).sum(3).mean(1)
  old = cells.MOST_CELLS
  try:
    cells.MOST_CELLS = 64
    maps = attention_picture.from_queries(q, k, 0, {'is_causal': True})
    np.testing.assert_allclose(maps.weights[0], want, atol=1e-6)
    np.testing.assert_allclose(attention_picture.from_weights(weights, 0).weights[0], want, atol=1e-6)
    assert 'the sum over 3 keys, the mean of 3 queries' in draw.attention(weights).title
  finally:
    cells.MOST_CELLS = old


def test_a_logarithmic_scale_and_what_is_no_number():
  weights = np.array([[1, 0.1, 0.01], [0.001, 1e-9, 0], [np.nan, 0.1, 1]])
  made = draw.attention(weights, scale='log', labels=['a', '$b$', 'c'])
  image = images(made)[0]
  assert has(image, picture.UNSEEN)[1, 2] and has(image, picture.ORANGE)[2, 0]
  assert (image[1, 0] != image[1, 1]).any() and (image[0, 0] == image[2, 2]).all()
  assert '$b$' in words(made) and {'1', '0.1', '0.01', '0.001', '0.0001'} <= set(words(made))


# Files and pages.


def test_svg_stands_in_a_page():
  both = draw.readings('causal() & window(1) | sink(2)', 8)
  made = [draw.mask(causal(), 8), draw.mask(causal(), 8, tiles=(4, 4)), both]
  page = '<html><body>' + ''.join(x.svg() for x in made) + '</body></html>'
  assert not re.search(r'\bid="|url\(#|href="#|<use|<\?xml|<!DOCTYPE|<metadata|<style', page)
  assert picture.INK not in page and page.count('currentColor') > 10 and page.count('<svg') == 3
  assert 'aria-label="causal(): T = 8; 56.2 % of the pairs seen"' in made[0].svg()
  assert 'causal() &amp; (window(1) | sink(2))' in made[2].svg()
  assert all(len(x.svg()) < 40_000 for x in made)


def test_equal_pictures_are_equal_files(tmp_path):
  for suffix in ('png', 'svg'):
    for name in 'ab':
      draw.mask(causal() & window(3), 16).save(tmp_path / f'{name}.{suffix}')
    assert (tmp_path / f'a.{suffix}').read_bytes() == (tmp_path / f'b.{suffix}').read_bytes()
  assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'
  text = (tmp_path / 'a.svg').read_text(encoding='utf-8')
  assert ET.fromstring(text).tag == f'{SVG}svg' and 'prefers-color-scheme:dark' in text
  assert draw.mask(causal(), 4)._repr_png_()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
  'name, words',
  [('x.gif', r'\.png or \.svg'), ('x', 'no suffix'), ('no/x.png', "no folder '.*no'"), ('a.png', 'a folder')],
)
def test_paths_that_will_not_do(tmp_path, name, words):
  (tmp_path / 'a.png').mkdir()
  with pytest.raises(ValueError, match=words):
    draw.mask(causal(), 4).save(tmp_path / name)


def test_titles_are_broken_and_not_cut():
  made = draw.mask(causal() & document(np.arange(64) // 9) & (window(40) | sink(4) | masks.dilated(3)), 64)
  figure = made.figure
  figure.draw_without_rendering()
  box = figure._suptitle.get_window_extent()
  assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 + 1
  long = [picture.broken('a' * n + ' b, c ' + 'd' * n, 40) for n in (3, 30, 60)]
  assert long == [['aaa b, c ddd'], ['a' * 30 + ' b, c', '  ' + 'd' * 30], ['a' * 60, '  b, c', '  ' + 'd' * 60]]


@pytest.mark.parametrize('n', [1, 2, 9, 16, 17, 64, 100, 777, 4096, 4100, 10**6])
def test_ticks(n):
  found = picture.ticks(n)
  assert found[0] == 0 and found[-1] < n and 1 <= len(found) <= 16 and len(set(np.diff(found))) <= 1
  assert len(found) >= min(n, 4)
  assert 1 <= len(picture.ticks(n, 3)) <= 4


def test_numbers_in_words():
  assert [picture.number(x) for x in (0, 999, 4096, 12_000, 200_000, 3_000_000)] == [
    '0', '999', '4,096', '12k', '200k', '3M',
  ]  # fmt: skip
  assert [picture.percent(x).replace('\xa0', ' ') for x in (0.5, 0.99996, 1, 0.00123)] == [
    '50 %', '99.996 %', '100 %', '0.123 %',
  ]  # fmt: skip


def test_without_matplotlib(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'matplotlib.figure', None)
  with pytest.raises(ImportError, match=r'extra `draw`: pip install -e \.\[draw\]'):
    draw.mask(causal(), 4)


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda: draw.mask(causal()), 'T=None without a layout'),
    (lambda: draw.mask(causal(), 0), 'T=0, expected at least 1'),
    (lambda: draw.mask(document(np.zeros(5, int)), 4), r'expected \[4\]'),
    (lambda: draw.mask(causal(), 4, query=1), 'without a layout'),
    (lambda: draw.mask(causal(), layout=layouts.line(4), query=4), 'indices from 0 to 3'),
    (lambda: draw.mask(causal(), 5, layout=layouts.line(4)), 'layout has 4 tokens'),
    (lambda: draw.mask(causal(), 4, kv_layout=layouts.line(4)), 'without layout'),
    (lambda: draw.mask(masks.placed(causal(), layouts.line(4)), 4, layout=layouts.line(4)), 'has one already'),
    (lambda: draw.mask(causal(), layout=layouts.grid(2, 2, 2, 2)), 'expected 1 to 3 axes'),
    (lambda: draw.mask(causal(), 1000, tiles=(1, 1)), 'block_q=1 of tiles makes 1000 lines'),
    (lambda: draw.mask(causal(), 4, tiles=(0, 1)), 'block_q=0'),
    (lambda: draw.compare({}, 4), '0 masks, expected one to four'),
    (lambda: draw.plan(causal()), 'expected a Plan'),
    (lambda: draw.plan(TWO_HEADS, at=(0, 2)), 'head=2, expected 0 to 1'),
    (lambda: draw.attention(), 'expected either weights alone, or q and k'),
    (lambda: draw.attention(np.ones((4, 4)), is_causal=True), 'expected either'),
    (lambda: draw.attention(np.ones(4)), r'expected \[T, S\]'),
    (lambda: draw.attention(np.ones((2, 1, 4, 4)), b=2), 'b=2'),
    (lambda: draw.attention(np.ones((4, 4)), scale='root'), 'linear, log'),
    (lambda: draw.attention(np.ones((65, 2, 2))), '65 heads, expected at most 64'),
    (lambda: draw.attention(np.ones((4, 4)), labels='abc'), 'labels has 3 words, expected 4'),
    (lambda: draw.attention(q=ONES, k=ONES, return_residual=True), 'return_residual'),
    (lambda: draw.attention(q=ONES[0], k=ONES), r'expected \[B, T, H, D\]'),
  ],
)  # fmt: skip
def test_refusals(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_a_plan_of_one_list_serves_every_head():
  assert draw.plan(plan.of(causal(), 16, block_q=8, block_kv=8), at=(1, 3)).facts['visited'] == 0.75


def test_traced_plans_are_refused():
  with pytest.raises(ValueError, match='traced'):
    jax.jit(lambda x: draw.plan(plan.from_blocks(x, T=8, S=8, block_q=8, block_kv=8)))(jnp.ones((1, 1, 1, 1), bool))
