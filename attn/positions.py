"""Rotary positions: pairs of channels turned by an angle that grows with the position.

Scores of rotated queries and keys depend on positions only through their difference, so a key can be cached rotated
and moved later (`reposition`). The scalings stretch a model that was trained on short texts over longer ones; they
change the frequencies once, before anything is traced:

    rotary = Rotary(base=500_000.0, scaling=Llama3(8.0, 1.0, 4.0, original_length=8192))
    q, k = rotate(q, positions, rotary), rotate(k, positions, rotary)
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
  """Position interpolation: every frequency divided by `factor`, as if positions were p / factor.

  Source: arXiv:2306.15595 section 2.3.
  """

  factor: float

  def __post_init__(self):
    _at_least('factor', self.factor, 1)


@dataclasses.dataclass(frozen=True)
class NTKAware:
  """The base times factor^(w / (w - 2)), w the rotary width.

  The slowest pair is interpolated by `factor` exactly and the fastest is left alone.

  Source: arXiv:2309.00071 section 3.1, definition 1.
  """

  factor: float

  def __post_init__(self):
    _at_least('factor', self.factor, 1)


@dataclasses.dataclass(frozen=True)
class YaRN:
  """Slow pairs interpolated, fast pairs kept, a ramp between; and sharper attention.

  With r_i = original_length f_i / 2 pi, the turns of pair i over the training length, and gamma_i the ramp, 1 where
  r_i >= beta_fast and 0 where r_i <= beta_slow:

      f'_i = (1 - gamma_i) f_i / factor + gamma_i f_i
      rotated channels are multiplied by attention_factor = 0.1 ln(factor) + 1   (so logits are by its square)

  `ramp` says in what gamma is linear. The published models and Hugging Face transformers use 'index': linear in the
  pair's index, between the indices where r is beta_fast and beta_slow, rounded outwards if `truncate`. The paper's
  equation is 'turns': linear in r.

  Args:
    factor: new length over old length, >= 1.
    original_length: tokens of the training context; more than 2 pi beta_slow.
    beta_fast: turns at and above which a pair is kept (the paper's beta).
    beta_slow: turns at and below which a pair is interpolated (the paper's alpha).
    attention_factor: 0 means 0.1 ln(factor) + 1.
    ramp: 'index' or 'turns'.
    truncate: round the ends of the ramp to whole indices; for 'index' alone. (gpt-oss: False.)

  Source: arXiv:2309.00071 sections 3.2 and 3.4; `_compute_yarn_parameters` in Hugging Face transformers.
  """

  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 0.0
  ramp: str = 'index'
  truncate: bool = True

  def __post_init__(self):
    _at_least('factor', self.factor, 1)
    if not 0 < self.beta_slow < self.beta_fast:
      raise ValueError(f'beta_slow={self.beta_slow} must be above 0 and below beta_fast={self.beta_fast}')
    if not self.original_length > 2 * math.pi * self.beta_slow:
      raise ValueError(
        f'original_length={self.original_length} must be more than 2 pi beta_slow = {2 * math.pi * self.beta_slow:.4g}'
      )
    if self.attention_factor < 0:
      raise ValueError(f'attention_factor={self.attention_factor} must be above 0, or 0 for 0.1 ln(factor) + 1')
    if self.ramp not in ('index', 'turns'):
      raise ValueError(f"ramp={self.ramp!r} must be 'index' or 'turns'")


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Long wavelengths interpolated, short ones kept, the frequency blended between.

  With r_i = original_length f_i / 2 pi turns over the training length:

      s_i  = clip((r_i - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
      f'_i = (1 - s_i) f_i / factor + s_i f_i

  Source: arXiv:2407.21783 and the code released with Llama 3.1; `_compute_llama3_parameters` in transformers.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int

  def __post_init__(self):
    _at_least('factor', self.factor, 1)
    _at_least('original_length', self.original_length, 1)
    if not 0 < self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        f'low_freq_factor={self.low_freq_factor} must be above 0 and below high_freq_factor={self.high_freq_factor}'
      )


@dataclasses.dataclass(frozen=True)
class LongRope:
  """Every pair's frequency divided by a factor of its own, found by search; and sharper attention.

      f'_i = f_i / factors[i]
      rotated channels are multiplied by attention_factor = sqrt(1 + ln(factor) / ln(original_length))

  Published models have two lists of factors, for texts up to the original length and beyond. They are two settings:
  keys that were rotated by one do not fit queries rotated by the other.

  Args:
    factors: w / 2 divisors, w the rotary width.
    factor: new length over old length, >= 1; it sets the attention factor alone.
    original_length: tokens of the training context, 2 or more.
    attention_factor: 0 means the formula above (1 where factor = 1).

  Source: arXiv:2402.13753 section 3; `_compute_longrope_parameters` in Hugging Face transformers.
  """

  factors: tuple[float, ...]
  factor: float
  original_length: int
  attention_factor: float = 0.0

  def __post_init__(self):
    if not self.factors or not all(0 < x < math.inf for x in self.factors):
      raise ValueError(f'factors={self.factors} must be finite numbers above 0, one for each pair')
    _at_least('factor', self.factor, 1)
    _at_least('original_length', self.original_length, 2)
    if self.attention_factor < 0:
      raise ValueError(f'attention_factor={self.attention_factor} must be above 0, or 0 for the default')


@dataclasses.dataclass(frozen=True)
class Rotary:
  """How positions turn channels. Hashable: a static argument.

  Args:
    base: the wavelengths run from 2 pi to about 2 pi base; > 1.
    fraction: part of the channels that turns, the first ones; in (0, 1].
    scaling: None, Linear, NTKAware, YaRN, Llama3 or LongRope.

  Source: arXiv:2104.09864; partial rotary: GPT-J and GPT-NeoX (arXiv:2204.06745).
  """

  base: float = 10000.0
  fraction: float = 1.0
  scaling: Linear | NTKAware | YaRN | Llama3 | LongRope | None = None

  def __post_init__(self):
    if not self.base > 1:
      raise ValueError(f'base={self.base} must be more than 1')
    if not 0 < self.fraction <= 1:
      raise ValueError(f'fraction={self.fraction} must be in (0, 1]; without rotary, do not call rotate')
    if not isinstance(self.scaling, Linear | NTKAware | YaRN | Llama3 | LongRope | None):
      raise ValueError(f'scaling={self.scaling!r} must be None, Linear, NTKAware, YaRN, Llama3 or LongRope')


@functools.lru_cache(maxsize=256)
def frequencies(rotary: Rotary, width: int) -> tuple[np.ndarray, float]:
  """The angle each pair turns per position, and the factor on rotated channels.

      f_i = base ** (-2 i / w), then the scaling; i = 0 .. w / 2 - 1, w = fraction * width

  Args:
    rotary: the settings.
    width: D, channels of a head.

  Returns:
    (f [w / 2] float64 in radians per position, read-only; attention factor, 1.0 but for YaRN and LongRope). All
    static: numpy.

  Raises:
    ValueError: fraction * width is not an even integer >= 2, or LongRope has another number of factors.
  """
  rotary_width = round(rotary.fraction * width)
  if abs(rotary_width - rotary.fraction * width) > 1e-6 or rotary_width % 2 or rotary_width < 2:
    raise ValueError(
      f'fraction={rotary.fraction} of width={width} is {rotary.fraction * width:g} rotary channels, '
      'expected an even integer of at least 2'
    )
  scaling, base, attention_factor = rotary.scaling, rotary.base, 1.0
  if isinstance(scaling, NTKAware) and rotary_width > 2:  # a single pair has frequency 1 at any base
    base *= scaling.factor ** (rotary_width / (rotary_width - 2))
  f = base ** (-np.arange(0, rotary_width, 2, dtype=np.float64) / rotary_width)
  if isinstance(scaling, Linear):
    f = f / scaling.factor
  elif isinstance(scaling, YaRN):
    f = _blend(f, scaling.factor, _yarn_keep(scaling, f, base, rotary_width))
    attention_factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
  elif isinstance(scaling, Llama3):
    turns = scaling.original_length * f / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    f = _blend(f, scaling.factor, np.clip((turns - scaling.low_freq_factor) / span, 0, 1))
  elif isinstance(scaling, LongRope):
    if len(scaling.factors) != len(f):
      raise ValueError(f'factors has {len(scaling.factors)} entries, expected {len(f)}, one for each rotary pair')
    f = f / np.array(scaling.factors)
    default = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))
    attention_factor = scaling.attention_factor or default
  f.flags.writeable = False
  return f, attention_factor


def _blend(f, factor, keep):
  """Frequencies kept where keep is 1 and divided by factor where it is 0."""
  return np.where(keep == 1, f, (1 - keep) * f / factor + keep * f)


def _yarn_keep(yarn: YaRN, f, base, rotary_width):
  """gamma of YaRN for each pair: 1 keeps the frequency, 0 interpolates it."""
  if yarn.ramp == 'turns':
    turns = yarn.original_length * f / (2 * np.pi)
    return np.clip((turns - yarn.beta_slow) / (yarn.beta_fast - yarn.beta_slow), 0, 1)

  def index(turns):  # the (fractional) pair that makes this many turns over the training length
    return rotary_width * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

  low, high = index(yarn.beta_fast), index(yarn.beta_slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotary_width - 1)  # rotary_width, not half of it: as in the published code
  # A ramp of no length becomes a step, as in the published code; that code turns the ramp around where low > high.
  if low >= high:
    high = low + 0.001
  return 1 - np.clip((np.arange(rotary_width // 2) - low) / (high - low), 0, 1)


def rotate(x, positions, rotary: Rotary):
  """Turns the channels of every token by its position.

      out[p, i]       = a (x[i] cos(p f_i) - x[i + w/2] sin(p f_i))
      out[p, i + w/2] = a (x[i + w/2] cos(p f_i) + x[i] sin(p f_i))        i < w / 2

  with (f, a) = frequencies(rotary, D), w rotary channels; the channels after w are left alone. Halves are paired
  (GPT-NeoX, Llama in transformers), not neighbours (GPT-J): to load weights of the other kind, permute the columns of
  the projections. Queries and keys are rotated alike, so scores depend on the difference of their positions alone.

  Args:
    x: [B, T, H, D] queries or keys.
    positions: [T] or [B, T] positions, integers as a rule. Angles are float32: near position p they are exact to
      about 6e-8 p radians.
    rotary: the settings, static.

  Returns:
    [B, T, H, D] in x.dtype; the arithmetic is at least float32.

  Raises:
    ValueError: x is not [B, T, H, D], positions are not [T] or [B, T], or D does not suit the fraction.

  Source: arXiv:2104.09864 section 3.2.2.
  """
  x = jnp.asarray(x)
  return _turn(x, _positions('positions', positions, x), rotary, with_factor=True)


def reposition(k, old_positions, new_positions, rotary: Rotary):
  """Moves rotated keys to other positions, without the keys before rotation.

      reposition(rotate(k, p, rotary), p, p', rotary) = rotate(k, p', rotary)

  A rotation by the difference p' - p (taken in integers, so that far positions lose nothing). The attention factor of
  YaRN and LongRope, which the keys carry already, is not applied again.

  Args:
    k: [B, S, K, D] rotated keys.
    old_positions: [S] or [B, S] where they stand.
    new_positions: [S] or [B, S] where they shall stand.
    rotary: the settings they were rotated with.

  Returns:
    [B, S, K, D] in k.dtype.

  Raises:
    ValueError: as `rotate`.
  """
  k = jnp.asarray(k)
  old = _positions('old_positions', old_positions, k)
  new = _positions('new_positions', new_positions, k)
  return _turn(k, new - old, rotary, with_factor=False)


def _turn(x, positions, rotary, with_factor):
  f, attention_factor = frequencies(rotary, x.shape[-1])
  acc = jnp.promote_types(x.dtype, jnp.float32)
  angle = positions[..., None, None].astype(acc) * jnp.asarray(f, acc)  # [1 or B, T, 1, w / 2]
  factor = attention_factor if with_factor else 1.0
  cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
  half = len(f)
  a, b = x[..., :half].astype(acc), x[..., half : 2 * half].astype(acc)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def _positions(name: str, positions, x) -> jax.Array:
  """Positions as [1 or B, T], checked against x [B, T, H, D]."""
  if x.ndim != 4:
    raise ValueError(f'x has shape {x.shape}, expected [B, T, H, D]')
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x has dtype {x.dtype}, expected a floating type')
  B, T = x.shape[:2]
  if np.shape(positions) not in ((T,), (1, T), (B, T)):
    raise ValueError(f'{name} have shape {np.shape(positions)}, expected [{T}] or [{B}, {T}]')
  positions = jnp.atleast_2d(jnp.asarray(positions))
  if jnp.issubdtype(positions.dtype, jnp.integer):  # differences of narrow or unsigned integers wrap around
    positions = positions.astype(jnp.int64 if positions.dtype.itemsize == 8 else jnp.int32)
  return positions


def _at_least(name: str, value, low) -> None:
  if not value >= low:
    raise ValueError(f'{name}={value} must be at least {low}')
