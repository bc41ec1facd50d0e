"""models.speculative.tree against loops over root paths."""

import numpy as np
import pytest

from models.speculative.tree import Tree

TREES = {
  'chain': Tree.from_widths((1, 1, 1)),
  'pair': Tree.from_widths((2,)),
  'full': Tree.from_widths((3, 2, 1)),
  'ragged': Tree.from_parents([-1, 0, 0, 0, 1, 1, 3, 4]),
}


def path(tree, node):
  """The nodes from the root to `node`, climbing one parent at a time."""
  nodes = [node]
  while tree.parents[nodes[0]] >= 0:
    nodes.insert(0, tree.parents[nodes[0]])
  return nodes


@pytest.mark.parametrize('name', TREES)
def test_tables_match_root_paths(name):
  tree = TREES[name]
  assert tree.height == max(len(path(tree, i)) - 1 for i in range(tree.size))
  assert sorted(node for level in tree.levels for node in level) == list(range(tree.size))
  for i in range(tree.size):
    assert tree.depths[i] == len(path(tree, i)) - 1 and i in tree.levels[tree.depths[i]]
    assert tree.children[i] == tuple(j for j in range(tree.size) if tree.parents[j] == i)
    assert (i in tree.inner) == bool(tree.children[i])
    for j in range(tree.size):
      assert tree.mask[i, j] == (j in path(tree, i))


def test_sizes():
  assert TREES['chain'].parents == (-1, 0, 1, 2)
  assert TREES['full'].size == 1 + 3 + 6 + 6
  assert [len(level) for level in TREES['ragged'].levels] == [1, 3, 3, 1]
  np.testing.assert_array_equal(TREES['chain'].mask, np.tril(np.ones((4, 4), bool)))


def test_any_order_of_nodes_gives_the_same_tree():
  """Node 3 is the root, its children 0 and 4; 0 has 2, and 4 has 1 and 5."""
  assert Tree.from_parents([3, 4, 0, -1, 3, 4]) == Tree((-1, 0, 0, 1, 2, 2))
  assert Tree.from_parents(TREES['full'].parents) == TREES['full']
  assert len({Tree.from_widths([2, 1]), Tree.from_widths((2, 1))}) == 1  # hashable: a static argument of jit


@pytest.mark.parametrize('widths', [(), (0,), (2, -1), (1.5,), (True,), ('1',), None])
def test_rejects_widths(widths):
  with pytest.raises(ValueError, match='widths='):
    Tree.from_widths(widths)


@pytest.mark.parametrize(
  'parents, words',
  [
    ([-1, 2], r'parents\[1\]=2 must lie in -1 .. 1'),
    ([-2, 0], r'parents\[0\]=-2'),
    ([-1, -1, 0], 'one root'),
    ([1, 0], 'one root'),
    ([-1, 2, 1], 'a cycle: only 1 of 3'),
    ([-1], '2 nodes or more'),
  ],
)
def test_rejects_parents(parents, words):
  with pytest.raises(ValueError, match=words):
    Tree.from_parents(parents)


@pytest.mark.parametrize('parents', [(), (0,), (-1, 1), (-1, 0, 1, 0), (-1, 0, -1)])
def test_rejects_nodes_out_of_order(parents):
  with pytest.raises(ValueError, match='parents='):
    Tree(parents)
