"""Masks of coordinates beside their predicates in plain Python, pair by pair, sharing no code with attn."""

import functools
from typing import NamedTuple

import numpy as np

from attn import masks

SHAPE = (4, 5, 3)
HEADS = 2


class Token(NamedTuple):
  at: tuple  # coordinates
  segment: int
  order: int


@functools.cache
def window_of(i, n, w, stride, dilation, is_causal):
  """The keys of query i on an axis of n tokens, as a set: windows as start and end, groups as lists of tokens."""
  group = [x for x in range(n) if x % dilation == i % dilation]
  n, g = len(group), group.index(i)
  if is_causal:
    leader = min((g // stride) * stride + stride - 1, n - 1)
    return {group[x] for x in range(max(leader - w + 1, 0), g + 1)}
  leader = min((g // stride) * stride + stride // 2, n - 1)
  right = w // 2 + w % 2 - 1
  start = max(leader - w // 2, 0)
  if leader + right >= n:
    start = n - w
  return {group[x] for x in range(start, start + w)}


def neighbors(window, stride=(1, 1, 1), dilation=(1, 1, 1), is_causal=(False,) * 3, shape=SHAPE):
  def pair(q, k, h):
    axes = zip(q.at, k.at, shape, window, stride, dilation, is_causal)
    return all(i < n and j < n and j in window_of(i, n, *rest) for i, j, n, *rest in axes)

  return pair


def radial(frames, tokens, decay, block, has_sink=False, shape=None):
  """By frames and places in a frame; shape is that of the grid where there are three axes."""

  def pair(q, k, h):
    frame_q, frame_k = q.at[0], k.at[0]
    if shape is not None and any(i >= n for x in (q, k) for i, n in zip(x.at, shape)):
      return False
    space = [x[1] if len(x) == 2 else x[1] * shape[2] + x[2] for x in (q.at, k.at)]
    dt, dx = abs(frame_q - frame_k), abs(space[0] - space[1])
    if dt <= 1 or (has_sink and frame_k == 0):
      return True
    length = 2 ** len(f'{tokens:b}') / 2 ** len(f'{dt:b}')
    if length < block and dt % int(block / length):
      return False
    return dx <= decay * length or dx <= block

  return pair


def distance2(q, k, axes):
  return sum((q.at[a] - k.at[a]) ** 2 for a in axes)


SHIFTS = np.array([0, 2])
GRAPH = np.array([[1, 0, 1], [1, 1, 0], [0, 0, 0]], bool)

# name -> (mask, predicate of query, key and head)
CASES = {
  'neighborhood': (masks.neighborhood(SHAPE, 3), neighbors((3, 3, 3))),
  'neighborhood even': (masks.neighborhood(SHAPE, (2, 4, 3)), neighbors((2, 4, 3))),
  'neighborhood strided': (masks.neighborhood(SHAPE, (3, 4, 2), (2, 3, 2)), neighbors((3, 4, 2), (2, 3, 2))),
  'neighborhood dilated': (
    masks.neighborhood(SHAPE, (2, 2, 1), (1, 2, 1), (2, 2, 2)), neighbors((2, 2, 1), (1, 2, 1), (2, 2, 2)),
  ),
  'neighborhood causal': (
    masks.neighborhood(SHAPE, (3, 4, 1), (1, 2, 1), (1, 1, 2), (True, True, False)),
    neighbors((3, 4, 1), (1, 2, 1), (1, 1, 2), (True, True, False)),
  ),
  'band': (masks.band(1, -2, 1), lambda q, k, h: -2 <= k.at[1] - q.at[1] <= 1),
  'band below': (masks.band(2, None, -1), lambda q, k, h: k.at[2] < q.at[2]),
  'band above': (masks.band(0, 0, None), lambda q, k, h: k.at[0] >= q.at[0]),
  'disc': (masks.disc(2), lambda q, k, h: distance2(q, k, (0, 1, 2)) < 4),
  'disc of a fraction': (masks.disc(2.3, (1, 2)), lambda q, k, h: distance2(q, k, (1, 2)) < 2.3**2),
  'radial': (masks.radial(SHAPE, 0.3, block=4), radial(4, 15, 0.3, 4, shape=SHAPE)),
  'radial skipping': (masks.radial(SHAPE, 0.5, block=16, has_sink=True), radial(4, 15, 0.5, 16, True, SHAPE)),
  'grouped': (masks.grouped(7, 3), lambda q, k, h: (q.order + 3) // 7 == (k.order + 3) // 7),
  'grouped by head': (masks.grouped(4, SHIFTS), lambda q, k, h: (q.order + 2 * h) // 4 == (k.order + 2 * h) // 4),
  'grouped on an axis': (masks.grouped(2, 1, axis=1), lambda q, k, h: (q.at[1] + 1) // 2 == (k.at[1] + 1) // 2),
  'same segment': (masks.same_segment(), lambda q, k, h: q.segment == k.segment),
  'segments': (masks.segments((0, 2), 1), lambda q, k, h: q.segment in (0, 2) and k.segment == 1),
  'segments of queries': (masks.segments(1, None), lambda q, k, h: q.segment == 1),
  'segment graph': (masks.segment_graph(GRAPH), lambda q, k, h: bool(GRAPH[q.segment, k.segment])),
  'segment graph of two': (
    masks.segment_graph(GRAPH[:2, :2]),
    lambda q, k, h: q.segment < 2 and k.segment < 2 and bool(GRAPH[q.segment, k.segment]),
  ),
  'recent': (masks.recent(9), lambda q, k, h: q.order - 9 < k.order <= q.order),
  'random blocks': (
    masks.random_blocks(5, 3, 8, 66),
    lambda q, k, h: q.order < 66 and k.order < 66 and k.order // 8 in CHOSEN[q.order // 8],
  ),
}  # fmt: skip
CHOSEN = CASES['random blocks'][0].chosen.tolist()

# Combinations as the papers have them.
COMPOSED = {
  'text and neighborhood': (
    masks.neighborhood(SHAPE, 3) & masks.segments(1, 1) | masks.segments(0, None) | masks.segments(None, 0),
    lambda q, k, h: 0 in (q.segment, k.segment) or (q.segment == k.segment == 1 and neighbors((3, 3, 3))(q, k, h)),
  ),
  'frames': (
    masks.grouped(2, axis=0) | masks.band(0, -2, 0) | masks.segments(None, 0),
    lambda q, k, h: q.at[0] // 2 == k.at[0] // 2 or 0 <= q.at[0] - k.at[0] <= 2 or k.segment == 0,
  ),
  'shifted groups': (
    masks.causal() & masks.grouped(8, np.array([0, 4])),
    lambda q, k, h: k.order <= q.order and (q.order + 4 * h) // 8 == (k.order + 4 * h) // 8,
  ),
  'all but a disc': (
    ~(masks.disc(2) | masks.same_segment()), lambda q, k, h: distance2(q, k, (0, 1, 2)) >= 4 and q.segment != k.segment,
  ),
}  # fmt: skip


def evaluate(mask, T, S=None, *, batch=1, heads=1, positions=None, kv_positions=None):
  """masks.dense in numpy, which compiles nothing."""
  sides = []
  for n, x in ((T, positions), (T if S is None else S, kv_positions)):
    index = np.arange(n)[None, None]
    sides.append(masks.Tokens(index, index if x is None else np.asarray(x)[None, None]))
  seen = mask.tile(*sides, batch, heads)
  return np.broadcast_to(seen, (*seen.shape[:2], T, T if S is None else S))


def rows(layout):
  """The tokens of a layout; None for a hole."""
  return [
    Token(tuple(map(int, at)), int(segment), int(order)) if order >= 0 else None
    for at, segment, order in zip(layout.coords, layout.segment, layout.order)
  ]


def dense(pair, layout, kv_layout=None):
  """bool [1, HEADS, T, S] pair by pair."""
  q, k = rows(layout), rows(layout if kv_layout is None else kv_layout)
  seen = lambda q, k, h: q is not None and k is not None and pair(q, k, h)
  return np.array([[[[seen(x, y, h) for y in k] for x in q] for h in range(HEADS)]], bool)


def tiles(seen, block_q, block_kv):
  """(is any pair allowed, are all) of every tile of seen [.., T, S]."""
  T, S = seen.shape[2:]
  starts = np.arange(0, T, block_q), np.arange(0, S, block_kv)
  over = lambda f: f.reduceat(f.reduceat(seen, starts[0], axis=2), starts[1], axis=3)
  return over(np.logical_or), over(np.logical_and)
