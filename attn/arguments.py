"""Checks of the numbers that masks and layouts are made of; each names the argument in its message."""

import operator

import numpy as np


def integer(name, value, minimum, below=2**31):
  """value as an int in [minimum, below).

  Raises:
    ValueError: it is not an integer, or out of range.
  """
  try:
    value = operator.index(value)
  except TypeError:
    raise ValueError(f'{name}={value!r} is not an integer') from None
  if not minimum <= value < below:
    raise ValueError(f'{name}={value} must be at least {minimum} and below {_shown(below)}')
  return value


def integers(name, values, minimum, count=None):
  """values as a tuple of ints of at least `minimum`; one number stands for `count` of them.

  Raises:
    ValueError: as `integer`; not `count` of them, or none at all.
  """
  if count is not None and _is_number(values):
    values = (values,) * count
  try:
    values = tuple(values)
  except TypeError:
    raise ValueError(f'{name}={values!r} is not a sequence of integers') from None
  if not values or count not in (None, len(values)):
    raise ValueError(f'{name}={values!r} has {len(values)} numbers, expected {count or "some"}, one for each axis')
  return tuple(integer(name, x, minimum) for x in values)


def int32(name, values):
  """A numpy array of integers as int32; any other array as it is: its values may not be known.

  Raises:
    ValueError: a value is out of range, which jax would cut off in silence.
  """
  if not isinstance(values, np.ndarray):
    return values
  limits = np.iinfo(np.int32)
  if values.size and not limits.min <= int(values.min()) <= int(values.max()) <= limits.max:
    raise ValueError(f'{name} has values from {values.min()} to {values.max()}, expected what int32 holds')
  return values.astype(np.int32)


def booleans(name, values, count):
  """values as a tuple of `count` bools; one bool stands for all.

  Raises:
    ValueError: not bools, or not `count` of them.
  """
  values = (values,) * count if isinstance(values, bool) else values
  if not isinstance(values, tuple | list) or len(values) != count or any(not isinstance(x, bool) for x in values):
    raise ValueError(f'{name}={values!r}, expected True or False, or {count} of them, one for each axis')
  return tuple(values)


def _is_number(x):
  try:
    operator.index(x)
  except TypeError:
    return False
  return True


def _shown(limit):
  return '2**31' if limit == 2**31 else limit
