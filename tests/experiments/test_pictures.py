"""Pictures are well-formed SVG that an HTML page can hold, whatever the data."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from experiments import pictures

LINES = {'gzip -9': 1.95, 'bz2 -9': 1.72, 'xz -9e': 1.65}
CURVE = [(10 * i, 8 / i) for i in range(1, 30)]


def parsed(svg):
  assert svg.startswith('<svg') and 'http' not in svg
  return ElementTree.fromstring(svg.replace('xlink:href', 'href'))


@pytest.mark.parametrize('train, held_out', [(CURVE, CURVE[::5]), (CURVE, []), (CURVE[:1], CURVE[:1]), ([], [])])
def test_curves(train, held_out):
  parsed(pictures.curves(train, held_out, LINES))


def test_longer_run():
  parsed(pictures.longer_run({'this run': [(0, 8.0), (1e5, 3.0)], 'longer run': [(1e7, 1.2)]}, LINES))


@pytest.mark.parametrize('count', [1, 2, 5])
def test_layer_masks(count):
  parsed(pictures.layer_masks([np.tri(8, dtype=bool)] * count, [f'layer {i}' for i in range(count)]))


def test_attention_map_of_every_byte():
  for start in range(0, 257, 32):
    tokens = list(range(start, min(start + 32, 257)))
    parsed(pictures.attention_map(np.tri(len(tokens)) / np.arange(1, len(tokens) + 1)[:, None], tokens))


SIGNS = [(10, '↵'), (32, '·'), (65, 'A'), (36, '$'), (0, '00'), (200, 'c8'), (256, '∅')]


@pytest.mark.parametrize('token, sign', SIGNS)
def test_glyph(token, sign):
  assert pictures.glyph(token) == sign


def test_names_of_lines_do_not_touch():
  places = pictures._apart([1.0, 1.0, 1.01, 5.0, 5.05], 0.1)
  assert np.diff(places).min() >= 0.1 - 1e-9
  assert abs(np.mean(places[:3]) - np.mean([1.0, 1.0, 1.01])) < 1e-9
  assert pictures._apart([1.0, 2.0], 0.1) == [1.0, 2.0]
