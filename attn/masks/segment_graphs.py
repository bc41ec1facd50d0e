"""Predicates of segments, the parts of a layout: which part sees which; made by attn/masks/."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from attn.masks.predicates import UNKNOWN, Mask, Verdict, column, equal, register, row, static
from attn.masks.spatial import bounds, product


@register
class SameSegment(Mask):
  def tile(self, q, k, batch, heads):
    return row(_segment(q)) == column(_segment(k))

  def boxes(self, q, k):
    if not _can_read(q, k):
      return UNKNOWN
    return equal(*bounds(q, _segment(q.tokens), k, _segment(k.tokens)))


@register
class Segments(Mask):
  q_set: tuple | None = static()
  k_set: tuple | None = static()

  def tile(self, q, k, batch, heads):
    return _in(self.q_set, _segment(q))[..., :, None] & _in(self.k_set, _segment(k))[..., None, :]

  def boxes(self, q, k):
    if not _can_read(q, k):
      return UNKNOWN
    return product(q, _in(self.q_set, _segment(q.tokens)), k, _in(self.k_set, _segment(k.tokens)))


@register
class SegmentGraph(Mask):
  matrix: Any  # bool [n, n]

  def tile(self, q, k, batch, heads):
    q, k = (self._known(_segment(x)) for x in (q, k))
    return jnp.asarray(self._whole())[row(q), column(k)]

  def boxes(self, q, k):
    if not (_can_read(q, k) and q.can_read(self.matrix)):
      return UNKNOWN
    q_has, k_has = self._has(q), self._has(k).swapaxes(-1, -2)
    # Counts of pairs of segments, in float32 since that multiplies fast; they are small.
    seen = self._whole()
    return Verdict(q_has @ seen.astype(np.float32) @ k_has > 0, q_has @ (~seen).astype(np.float32) @ k_has == 0)

  def _whole(self):
    """The matrix with a row and a column for segments beyond it, which see nothing."""
    xp = np if isinstance(self.matrix, np.ndarray) else jnp
    return xp.pad(self.matrix, ((0, 1), (0, 1)))

  def _known(self, segment):
    n = self.matrix.shape[0]
    known = (segment >= 0) & (segment < n)
    return segment * known + n * ~known

  def _has(self, boxes):
    """Whether a run has tokens of each segment: float32 [..., runs, n + 1]."""
    segment = self._known(_segment(boxes.tokens))
    found = [boxes.bounds(segment == a)[1] for a in range(self.matrix.shape[0] + 1)]
    return (np if isinstance(segment, np.ndarray) else jnp).stack(found, -1).astype(np.float32)


def _segment(tokens):
  """Segments of tokens; all 0 without a layout."""
  return tokens.index * 0 if tokens.segment is None else tokens.segment


def _in(chosen, segment):
  """Whether segments are among the chosen; None is all."""
  if chosen is None:
    return segment == segment
  found = segment != segment
  for a in chosen:
    found = found | (segment == a)
  return found


def _can_read(q, k):
  return q.can_read(*(_segment(x.tokens) for x in (q, k)))
