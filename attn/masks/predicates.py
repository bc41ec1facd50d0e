"""What a mask is: a predicate that is evaluated on tiles and on boxes of tokens; and how masks are combined."""

import dataclasses
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2  # the kinds of a tile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Tokens as masks see them. Every array is [1 or B, 1 or H, t].

  Attributes:
    index: place in the array.
    position: place in the text, which causality goes by; negative is padding or an empty slot.
    coords: place on each axis of a layout (attn/layouts.py); () without one.
    segment: kind of token in a layout: text, image, register; None without one.
  """

  index: Any
  position: Any
  coords: tuple = ()
  segment: Any = None


@dataclasses.dataclass(frozen=True)
class Boxes:
  """The tokens of an array in runs of `size`, the last of which may be shorter.

  Attributes:
    tokens: all of them; numpy arrays where their values are known.
    size: tokens in a run.
    is_static: whether verdicts may depend on nothing but numpy arrays and numbers. Then a mask says that it does not
      know wherever it holds a jax array: that is data, and a work list made from data cannot be fixed beforehand.
  """

  tokens: Tokens
  size: int
  is_static: bool = True

  def bounds(self, values):
    """Smallest and largest of values [..., t] in each run: two arrays [..., n]."""
    t, xp = values.shape[-1], np if isinstance(values, np.ndarray) else jnp
    n = -(-t // self.size)
    if t % self.size:
      last = xp.broadcast_to(values[..., -1:], (*values.shape[:-1], n * self.size - t))
      values = xp.concatenate([values, last], axis=-1)
    runs = values.reshape(*values.shape[:-1], n, self.size)
    return runs.min(-1), runs.max(-1)

  def can_read(self, *arrays):
    """Whether a verdict may depend on these."""
    return not self.is_static or all(isinstance(x, np.ndarray | int | None) for x in arrays)


class Verdict(NamedTuple):
  """What a mask says of tiles without looking at pairs; bool arrays that broadcast to [1 or B, 1 or H, nq, nk].

  `some` False promises that nothing is allowed, `every` True that everything is. (True, False) is always right.
  """

  some: Any
  every: Any

  @property
  def kind(self):
    """EMPTY, PARTIAL or FULL, int8."""
    return self.some.astype(np.int8) + self.every.astype(np.int8)


UNKNOWN = Verdict(np.ones((1, 1, 1, 1), bool), np.zeros((1, 1, 1, 1), bool))


class Mask:
  """A predicate on (query, key) pairs. Combine with `&`, `|`, `~`; read with `dense`, `tile` and `boxes`."""

  __array_ufunc__ = None  # so that numpy_array & mask comes here

  def tile(self, q: Tokens, k: Tokens, batch: int, heads: int) -> jax.Array:
    """Evaluates on every pair of q and k: bool [1 or B, 1 or H, t, s]."""
    raise NotImplementedError

  def boxes(self, q: Boxes, k: Boxes) -> Verdict:
    """What is certain of every pair of runs. Operators alone, so that numpy and traced arrays both work."""
    return UNKNOWN

  def check(self, B: int, H: int, T: int, S: int) -> None:
    """Raises ValueError unless every array inside fits."""

  def __and__(self, other):
    return And(self, _mask(other))

  def __or__(self, other):
    return Or(self, _mask(other))

  def __rand__(self, other):
    return And(_mask(other), self)

  def __ror__(self, other):
    return Or(_mask(other), self)

  def __invert__(self):
    return Not(self)

  def __eq__(self, other):
    """The same predicate with equal numbers and arrays."""
    if not isinstance(other, Mask):
      return NotImplemented
    kinds: list[Any] = [jax.tree.structure(x) for x in (self, other)]
    if kinds[0] != kinds[1]:
      return False
    return all(x is y or np.array_equal(x, y) for x, y in zip(jax.tree.leaves(self), jax.tree.leaves(other)))

  def __hash__(self):
    return hash(jax.tree.structure(self))

  def __repr__(self):
    from attn.masks import text

    return text.write(self)

  def __bool__(self):
    raise TypeError(
      'a mask has no single truth value: combine masks with & | ~ instead of `and` `or` `not`, '
      'and bracket them, as in causal() & (window(64) | sink(4))'
    )


def static(**kwargs):
  """A field that is part of the tree's structure."""
  return dataclasses.field(metadata={'static': True}, **kwargs)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(static,))
def register(cls):
  """A frozen dataclass that is a pytree."""
  own = not issubclass(cls, Mask)  # masks are compared and shown as a whole: see Mask
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=own, repr=own)(cls))


@register
class And(Mask):
  a: Mask
  b: Mask

  def tile(self, q, k, batch, heads):
    return self.a.tile(q, k, batch, heads) & self.b.tile(q, k, batch, heads)

  def boxes(self, q, k):
    a, b = self.a.boxes(q, k), self.b.boxes(q, k)
    return Verdict(a.some & b.some, a.every & b.every)

  def check(self, B, H, T, S):
    self.a.check(B, H, T, S)
    self.b.check(B, H, T, S)


@register
class Or(Mask):
  a: Mask
  b: Mask

  def tile(self, q, k, batch, heads):
    return self.a.tile(q, k, batch, heads) | self.b.tile(q, k, batch, heads)

  def boxes(self, q, k):
    a, b = self.a.boxes(q, k), self.b.boxes(q, k)
    return Verdict(a.some | b.some, a.every | b.every)

  def check(self, B, H, T, S):
    self.a.check(B, H, T, S)
    self.b.check(B, H, T, S)


@register
class Not(Mask):
  a: Mask

  def tile(self, q, k, batch, heads):
    return ~self.a.tile(q, k, batch, heads)

  def boxes(self, q, k):
    a = self.a.boxes(q, k)
    return Verdict(~a.every, ~a.some)

  def check(self, B, H, T, S):
    self.a.check(B, H, T, S)


@register
class Everything(Mask):
  def tile(self, q, k, batch, heads):
    return jnp.ones((1, 1, 1, 1), bool)

  def boxes(self, q, k):
    return Verdict(UNKNOWN.some, UNKNOWN.some)


def row(x):
  """[..., t] of queries against keys: [..., t, 1]."""
  return signed(x)[..., :, None]


def column(x):
  """[..., s] of keys against queries: [..., 1, s]."""
  return signed(x)[..., None, :]


def equal(q_low, q_high, k_low, k_high) -> Verdict:
  """The verdict of `value of the query == value of the key` from the bounds of both."""
  return Verdict((q_low <= k_high) & (k_low <= q_high), (q_low == q_high) & (k_low == k_high) & (q_low == k_low))


def signed(x):
  """As int64 if numpy or already wide, else int32: differences of narrow or unsigned integers wrap around."""
  if isinstance(x, np.ndarray):
    return x.astype(np.int64)
  return x.astype(jnp.int64 if x.dtype.itemsize == 8 else jnp.int32)


def _mask(x):
  if not isinstance(x, Mask):
    raise ValueError(f'cannot combine a mask with {type(x).__name__}: wrap a bool array in masks.array(...)')
  return x
