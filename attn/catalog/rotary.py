"""Records of rotary positions."""

import functools
import math

import numpy as np

from attn import positions
from attn.catalog import oracles
from attn.catalog.method import Input, Limit, Method
from attn.positions import Linear, Llama3, LongRope, NTKAware, Rotary, YaRN


def _angle(i, base=10000.0, width=8):
  return base ** (-2 * i / width)


def _yarn_angle(i):
  """YaRN by 4 from 64 tokens, base 100, width 8, 8 fast turns: the ramp from pair 0 (0.21 down) to 3 (2.02 up)."""
  keep = 1 - i / 3
  return (keep + (1 - keep) / 4) * _angle(i, base=100.0)


def _llama3_angle(i):
  """Llama 3 scaling by 8 from 64 tokens, base 100, width 8."""
  turns = 64 * _angle(i, base=100.0) / (2 * math.pi)
  keep = 1.0 if turns > 4 else 0.0 if turns < 1 else (turns - 1) / 3
  return (keep + (1 - keep) / 8) * _angle(i, base=100.0)


def _record(name, title, paper, authors, rotary, limits, *, oracle, **fields) -> Method:
  def moved(x, places):
    old = (7 * places + 3) % 50
    return positions.reposition(positions.rotate(x, old, rotary), old, places, rotary)

  return Method(
    name,
    title,
    'positions',
    paper,
    authors,
    entry='attn.positions.rotate',
    cost='O(T H D) time; nothing stored but the frequencies',
    settings={'rotary': rotary},
    inputs={'x': Input('BTHD'), 'positions': Input('BT', 'positions')},
    oracle=functools.partial(oracles.rotary, **oracle),
    limits={
      **limits,
      'moved from other positions: rotated here': Limit(moved),
      'position 0: the factor alone': Limit(lambda x, places: _scaled(x, rotary), inputs={'positions': np.zeros_like}),
    },
    **fields,
  )


def _scaled(x, rotary):
  f, factor = positions.frequencies(rotary, x.shape[-1])
  return np.concatenate([factor * x[..., : 2 * len(f)], x[..., 2 * len(f) :]], axis=-1)


def _plain_if(text, rotary) -> dict[str, Limit]:
  plain = {'rotary': Rotary(base=rotary.base)}
  return {text: Limit('rotary', settings={'rotary': rotary}, equal_settings=plain)}


METHODS = (
  _record(
    'rotary',
    'Rotary position embedding',
    'arXiv:2104.09864',
    'Su et al. 2021',
    Rotary(),
    {},
    oracle={'angles': _angle},
    idea='Pairs of channels turn with the position, so that scores depend on differences of positions.',
    formula='(x[i] + j x[i + D/2]) e^(j p f[i]),   f[i] = base^(-2 i / D)',
    usage='rotate(x, positions, Rotary(base=10000.0))',
  ),
  _record(
    'partial_rotary',
    'Partial rotary',
    'arXiv:2204.06745',
    'Black et al. 2022 (GPT-NeoX)',
    Rotary(fraction=0.5),
    _plain_if('fraction 1: rotary', Rotary(fraction=1.0)),
    oracle={'angles': functools.partial(_angle, width=4), 'rotary_width': 4},
    idea='The first part of the channels turns, the rest carries no position.',
    formula='rotary on x[: fraction D], the identity on the rest',
    usage='rotate(x, positions, Rotary(fraction=0.5))',
  ),
  _record(
    'linear_scaling',
    'Position interpolation',
    'arXiv:2306.15595',
    'Chen et al. 2023',
    Rotary(scaling=Linear(4.0)),
    {
      **_plain_if('factor 1: rotary', Rotary(scaling=Linear(1.0))),
      'positions times the factor: rotary': Limit(
        lambda x, places: positions.rotate(x, places // 4, Rotary()), inputs={'positions': lambda p: 4 * p}
      ),
    },
    oracle={'angles': lambda i: _angle(i) / 4},
    idea='Positions divided by a factor, so that a longer text falls on the positions of training.',
    formula='f[i] = base^(-2 i / D) / factor',
    usage='rotate(x, positions, Rotary(scaling=Linear(4.0)))',
  ),
  _record(
    'ntk_aware',
    'NTK-aware scaling',
    'arXiv:2309.00071',
    'Peng et al. 2023, after bloc97',
    Rotary(scaling=NTKAware(4.0)),
    _plain_if('factor 1: rotary', Rotary(scaling=NTKAware(1.0))),
    oracle={'angles': functools.partial(_angle, base=10000.0 * 4.0 ** (8 / 6))},
    idea='A larger base: slow pairs are interpolated, fast ones hardly.',
    formula='f[i] = (base factor^(D / (D - 2)))^(-2 i / D)',
    usage='rotate(x, positions, Rotary(scaling=NTKAware(4.0)))',
  ),
  _record(
    'yarn',
    'YaRN',
    'arXiv:2309.00071',
    'Peng et al. 2023',
    Rotary(base=100.0, scaling=YaRN(4.0, original_length=64, beta_fast=8.0)),
    _plain_if('factor 1: rotary', Rotary(base=100.0, scaling=YaRN(1.0, original_length=64))),
    oracle={'angles': _yarn_angle, 'factor': 0.1 * math.log(4.0) + 1},
    idea='Slow pairs interpolated, fast ones kept, a ramp between, and sharper attention.',
    formula='f2[i] = (1 - gamma[i]) f[i] / factor + gamma[i] f[i];   rotated channels times 0.1 ln(factor) + 1',
    usage='rotate(x, positions, Rotary(base=100.0, scaling=YaRN(4.0, original_length=64, beta_fast=8.0)))',
  ),
  _record(
    'llama3_scaling',
    'Llama 3 scaling',
    'arXiv:2407.21783',
    'Llama Team 2024',
    Rotary(base=100.0, scaling=Llama3(8.0, 1.0, 4.0, original_length=64)),
    _plain_if('factor 1: rotary', Rotary(base=100.0, scaling=Llama3(1.0, 1.0, 4.0, original_length=64))),
    oracle={'angles': _llama3_angle},
    idea='Wavelengths beyond the training length interpolated, short ones kept, blended between.',
    formula='f2[i] = (1 - s[i]) f[i] / factor + s[i] f[i],   s[i] = clip((turns[i] - low) / (high - low), 0, 1)',
    usage='rotate(x, positions, Rotary(base=100.0, scaling=Llama3(8.0, 1.0, 4.0, original_length=64)))',
  ),
  _record(
    'longrope',
    'LongRoPE',
    'arXiv:2402.13753',
    'Ding et al. 2024',
    Rotary(scaling=LongRope((1.0, 1.5, 4.0, 8.0), 8.0, original_length=64)),
    _plain_if('factors 1: rotary', Rotary(scaling=LongRope((1.0,) * 4, 1.0, original_length=64))),
    oracle={'angles': lambda i: _angle(i) / (1.0, 1.5, 4.0, 8.0)[i], 'factor': math.sqrt(1.5)},
    idea='A divisor for the frequency of each pair, found by search, and sharper attention.',
    formula='f2[i] = f[i] / factors[i];   rotated channels times sqrt(1 + ln(factor) / ln(original_length))',
    usage='rotate(x, positions, Rotary(scaling=LongRope((1.0, 1.5, 4.0, 8.0), 8.0, original_length=64)))',
  ),
)
