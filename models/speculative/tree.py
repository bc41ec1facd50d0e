"""The shape of a tree of drafted tokens, fixed before the program runs, and the tables that follow from it."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tree:
  """A rooted tree whose nodes are numbered level by level, the children of a node next to each other.

  Node 0 is the root, the last token of the text; every other node is a drafted token that follows its parent. A chain
  of n drafted tokens is `Tree.from_widths((1,) * n)`.

  Attributes:
    parents: the parent of each node, -1 for the root; it does not decrease.

  Raises:
    ValueError: parents that do not describe such a tree, or a root alone.
  """

  parents: tuple[int, ...]

  def __post_init__(self):
    parents = tuple(map(int, self.parents))
    object.__setattr__(self, 'parents', parents)
    is_ordered = list(parents) == sorted(parents) and all(0 <= p < i for i, p in enumerate(parents[1:], 1))
    if len(parents) < 2 or parents[0] != -1 or not is_ordered:
      raise ValueError(f'parents={parents} must be (-1, ...) with 0 <= parents[i] < i, not decreasing, 2 nodes or more')

  @classmethod
  def from_widths(cls, widths):
    """The tree in which every node at depth d has widths[d] children: (1, 1, 1) is a chain, (2, 2) has 1 + 2 + 4 nodes.

    Raises:
      ValueError: widths are not one or more integers of 1 or more.
    """
    widths = tuple(widths) if np.iterable(widths) else (widths,)
    if not widths or any(isinstance(w, bool) or not isinstance(w, int | np.integer) or w < 1 for w in widths):
      raise ValueError(f'widths={widths} must be one or more integers, each 1 or more')
    parents, level = [-1], [0]
    for width in widths:
      first = len(parents)
      parents += [node for node in level for _ in range(width)]
      level = list(range(first, len(parents)))
    return cls(tuple(parents))

  @classmethod
  def from_parents(cls, parents):
    """Any tree: parents[i] is the node before node i, -1 for the root. Nodes may come in any order and are renumbered.

    Raises:
      ValueError: no single root, a parent that does not exist, or a cycle.
    """
    parents = list(map(int, parents))
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
      if not -1 <= parent < len(parents):
        raise ValueError(f'parents[{node}]={parent} must lie in -1 .. {len(parents) - 1}')
      if parent >= 0:
        children[parent].append(node)
    order = [node for node, parent in enumerate(parents) if parent < 0]
    if len(order) != 1:
      raise ValueError(f'parents={parents} must have one root (-1), got {len(order)}')
    for node in order:  # grows while it is walked: breadth first
      order += children[node]
    if len(order) != len(parents):
      raise ValueError(f'parents={parents} hold a cycle: only {len(order)} of {len(parents)} nodes hang on the root')
    number = {node: i for i, node in enumerate(order)}
    return cls((-1, *(number[parents[node]] for node in order[1:])))

  @property
  def size(self):
    """N, nodes, the root included."""
    return len(self.parents)

  @functools.cached_property
  def depths(self):
    """[N] int: edges from the root."""
    depths = np.zeros(self.size, np.int32)
    for node in range(1, self.size):
      depths[node] = depths[self.parents[node]] + 1
    return depths

  @property
  def height(self):
    """Depth of the deepest node: the most drafted tokens that can be accepted at once."""
    return int(self.depths[-1])

  @functools.cached_property
  def children(self):
    """The children of each node, a tuple of N tuples, in the order in which they are drawn and tried."""
    children: list[list[int]] = [[] for _ in self.parents]
    for node in range(1, self.size):
      children[self.parents[node]].append(node)
    return tuple(map(tuple, children))

  @functools.cached_property
  def levels(self):
    """The nodes of depth 0, 1, ... height: a tuple of tuples."""
    return tuple(tuple(np.flatnonzero(self.depths == d).tolist()) for d in range(self.height + 1))

  @functools.cached_property
  def inner(self):
    """The nodes that have children, in order: those after which the draft is asked for more."""
    return tuple(node for node in range(self.size) if self.children[node])

  @functools.cached_property
  def mask(self):
    """[N, N] bool: True where node i (row) sees node j, that is where j lies on the path from the root to i."""
    mask = np.eye(self.size, dtype=bool)
    for node in range(1, self.size):
      mask[node] |= mask[self.parents[node]]
    return mask
