"""models.speculative.verify: the law of what it gives, by enumerating every draw, and every branch, against loops."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.speculative import verify
from models.speculative.tree import Tree
from tests.models.speculative.law import chi_squared

V = 4
# (draft, target), unnormalised: alike, apart, without common tokens, cut on either side, certain, nearly so.
PAIRS = {
  'random': ([3, 5, 1, 2], [1, 2, 4, 4]),
  'equal': ([3, 5, 1, 2], [3, 5, 1, 2]),
  'disjoint': ([1, 2, 0, 0], [0, 0, 2, 1]),
  'cut draft': ([1, 2, 0, 0], [1, 2, 3, 4]),
  'cut target': ([1, 2, 3, 4], [0, 1, 0, 1]),
  'certain draft': ([0, 1, 0, 0], [1, 2, 3, 4]),
  'certain target': ([1, 2, 3, 4], [0, 0, 1, 0]),
  'certain both': ([0, 1, 0, 0], [0, 0, 0, 1]),
  'peaked draft': ([1, 1e-30, 1e-45, 1e-60], [1, 1, 1, 1]),
  'peaked both': ([1e-30, 1, 1e-45, 1e-60], [1, 1e-40, 1e-20, 1e-30]),
}


def pair(name):
  q, p = (np.array(x, np.float64) for x in PAIRS[name])
  return q / q.sum(), p / p.sum()


def log(p):
  with np.errstate(divide='ignore'):
    return np.log(p)


def draws(q, w):
  """{w different tokens: probability of drawing them in this order}; what has no probability fills up at the end."""
  got = {}
  for tokens in itertools.permutations(range(len(q)), w):
    chance, left = 1.0, q.copy()
    for i, c in enumerate(tokens):
      if left.sum() == 0:
        chance *= sorted(tokens[i:]) == list(tokens[i:])  # any one order, so that the sum is 1
        chance /= len(list(itertools.combinations(np.setdiff1d(range(len(q)), tokens[:i]), w - i)))
        break
      chance *= left[c] / left.sum()
      left[c] = 0
    if chance:
      got[tokens] = chance
  return got


def law(q, p, w, attempt):
  """Law of the token behind one node with w children: the sum over all draws, decisions taken from `attempt`."""
  cases, B = draws(q, w), math.factorial(V)  # as many rows for every w: one compilation
  tokens, chance, out = np.zeros((B, w), int), np.zeros(B), np.zeros(V)
  tokens[: len(cases)], chance[: len(cases)] = list(cases), list(cases.values())
  np.testing.assert_allclose(chance.sum(), 1, atol=1e-14)
  left_p, left_q, reached = jnp.tile(p, (B, 1)), jnp.tile(log(q), (B, 1)), chance
  for j in range(w):
    a, left_p, left_q = attempt(jnp.asarray(tokens[:, j]), jnp.ones(B, bool), left_q, left_p)
    np.add.at(out, tokens[:, j], reached * np.asarray(a))
    reached = reached * (1 - np.asarray(a))
  return out + reached @ np.asarray(left_p)


attempt = jax.jit(lambda *args: verify.attempt(*args))


@pytest.mark.parametrize('w', [1, 2, 3, 4])
@pytest.mark.parametrize('name', PAIRS)
def test_the_law_of_a_node_is_the_target(name, w):
  q, p = pair(name)
  with jax.enable_x64(True):
    np.testing.assert_allclose(law(q, p, w, attempt), p, rtol=1e-12, atol=1e-14)


def test_acceptance_of_a_worked_example():
  with jax.enable_x64(True):
    q, p = np.array([0.2, 0.6, 0.2]), np.array([0.5, 0.3, 0.2])
    a, rest, _ = attempt(jnp.arange(3), jnp.ones(3, bool), jnp.tile(log(q), (3, 1)), jnp.tile(p, (3, 1)))
  np.testing.assert_allclose(a, [1, 0.5, 1], rtol=1e-12)
  np.testing.assert_allclose(q @ np.asarray(a), 0.7, rtol=1e-12)
  np.testing.assert_allclose(rest[1], [1, 0, 0], atol=1e-12)


def faults():
  def always(token, is_tried, log_q, p):
    _, p, log_q = attempt(token, is_tried, log_q, p)
    return jnp.ones(len(token)), p, log_q

  def no_residual(token, is_tried, log_q, p):
    a, _, log_q = attempt(token, is_tried, log_q, p)
    return a, p, log_q

  def with_replacement(token, is_tried, log_q, p):
    a, p, _ = attempt(token, is_tried, log_q, p)
    return a, p, log_q

  return {f.__name__: f for f in (always, no_residual, with_replacement)}


@pytest.mark.parametrize('fault', faults())
def test_a_wrong_law_is_seen(fault):
  q, p = pair('random')
  with jax.enable_x64(True):
    assert np.abs(law(q, p, 2, faults()[fault]) - p).max() > 1e-2


def test_a_smaller_rest_is_not_divided_by_nothing():
  """float32: p = q up to rounding leaves a residual of nothing, or of rounding errors alone."""
  q = np.array([[0.3, 0.3, 0.4]], np.float32)
  for p in (q, q * (1 - 1e-7), q / q.sum()):
    a, rest, _ = attempt(jnp.array([0]), jnp.array([True]), jnp.log(q), jnp.asarray(p, jnp.float32))
    assert a[0] >= 1 - 1e-6 and np.isfinite(rest).all() and abs(rest.sum() - 1) < 1e-6


TREES = {
  'chain': Tree.from_widths((1, 1, 1)),
  'wide': Tree.from_widths((3, 2)),
  'ragged': Tree.from_parents([-1, 0, 0, 0, 1, 1, 3, 4]),
}


def inputs(tree, B, seed=0):
  """Random distributions, a fifth of them cut, drafted tokens and uniforms."""
  rng = np.random.default_rng(seed)

  def laws(n):
    x = rng.dirichlet(np.full(V, 0.5), (B, n)) * (rng.random((B, n, V)) > 0.2)
    x[x.sum(-1) == 0] = 1
    return x / x.sum(-1, keepdims=True)

  q, p = laws(len(tree.inner)), laws(tree.size)
  q[: B // 4] = p[: B // 4, list(tree.inner)]
  tokens = np.zeros((B, tree.size), np.int32)
  for b, (i, node) in itertools.product(range(B), enumerate(tree.inner)):
    noise = log(q[b, i]) + rng.gumbel(size=V)
    tokens[b, list(tree.children[node])] = np.argsort(-noise)[: len(tree.children[node])]
  return tokens, q, p, rng.random((B, tree.size))


def walk(tree, tokens, q, p, uniforms):
  """One row: the accepted nodes and the law of the next token."""
  node, path = 0, []
  while True:
    rest, at = p[node], tree.inner.index(node) if node in tree.inner else -1
    left, taken = q[at].copy(), None
    for child in tree.children[node]:
      c = tokens[child]
      if left[c] == 0:
        continue
      share = left / left.sum()
      if uniforms[child] * share[c] < rest[c]:
        taken = child
        break
      new = np.maximum(rest - share, 0)
      rest = new / new.sum() if new.sum() > 0 else rest
      left[c] = 0
    if taken is None:
      return path, rest
    node = taken
    path.append(node)


@pytest.mark.parametrize('name', TREES)
def test_accept_matches_a_walk(name):
  tree, B = TREES[name], 200
  tokens, q, p, uniforms = inputs(tree, B)
  with jax.enable_x64(True):
    path, count, rest = jax.jit(verify.accept, static_argnums=0)(tree, tokens, log(q), log(p), uniforms)
  lengths = set()
  for b in range(B):
    want, law_of_next = walk(tree, tokens[b], q[b], p[b], uniforms[b])
    assert path[b].tolist() == want + [-1] * (tree.height - len(want)) and count[b] == len(want)
    np.testing.assert_allclose(rest[b], law_of_next, atol=1e-12)
    lengths.add(len(want))
  assert lengths == set(range(tree.height + 1))  # every case has come


@pytest.mark.parametrize(
  'name', ['ragged', *[pytest.param(name, marks=pytest.mark.long) for name in ('chain', 'wide')]]
)
def test_drawn_trees_give_texts_of_the_target(name):
  """Draws, acceptance and the last draw together, in float32: counts of the first two tokens, 50,000 trees."""
  tree, B = TREES[name], 50_000
  rng = np.random.default_rng(1)
  table_q, table_p = (log(rng.dirichlet(np.full(V, 0.7), 1 + V)).astype(np.float32) for _ in range(2))  # by last token

  @jax.jit
  def run(key):
    draw_key, accept_key, last_key = jax.random.split(key, 3)
    tokens, log_q = jnp.full((B, tree.size), V), []
    for node in tree.inner:  # the token V, the root's, stands for the start of the text
      log_q.append(jnp.asarray(table_q)[tokens[:, node]])
      keys = jax.random.split(jax.random.fold_in(draw_key, node), B)
      children = np.array(tree.children[node])
      tokens = tokens.at[:, children].set(verify.draw(keys, log_q[-1], len(children)))
    log_p = jnp.asarray(table_p)[tokens]
    uniforms = jax.random.uniform(accept_key, (B, tree.size))
    path, count, p = verify.accept(tree, tokens, jnp.stack(log_q, axis=1), log_p, uniforms)
    last = jax.random.categorical(last_key, jnp.log(p))
    text = jnp.where(path >= 0, tokens[jnp.arange(B)[:, None], path], 0)
    return jnp.pad(text, ((0, 0), (0, 1))).at[jnp.arange(B), count].set(last), count

  text, count = run(jax.random.key(0))
  first, pairs = np.exp(table_p[V]), np.exp(table_p[V][:, None] + table_p[:V])
  assert chi_squared(np.bincount(text[:, 0], minlength=V), first) > 1e-4
  long = np.asarray(text)[np.asarray(count) >= 1]  # their first token is biased: only what follows it has a law
  for token in range(V):
    seconds = np.bincount(long[long[:, 0] == token, 1], minlength=V)
    assert chi_squared(seconds, pairs[token] / pairs[token].sum()) > 1e-4


@pytest.mark.parametrize('w', [1, 2, 3])
def test_draws_have_the_law_of_draws_in_turn(w):
  n = 50_000
  for q in (np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.7, 0.3 - 1e-7, 1e-7, 0.0])):
    got = np.asarray(verify.draw(jax.random.split(jax.random.key(3), n), jnp.tile(log(q), (n, 1)), w))
    cases = draws(q, w)
    if len(q[q > 0]) == V:
      counts = [np.sum((got == c).all(1)) for c in cases]
      assert sum(counts) == n and chi_squared(np.array(counts), np.array(list(cases.values()))) > 1e-4
    else:
      assert not (got[:, : np.count_nonzero(q)] == 3).any()  # what has no probability comes last
  assert all(len(set(row)) == w for row in got[:100].tolist())


def test_without_a_key_the_most_likely_come_in_order():
  log_q = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
  assert verify.draw(None, log_q, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_rejects():
  tree = TREES['wide']
  good = dict(zip(('tokens', 'log_q', 'log_p', 'uniforms'), inputs(tree, 2)))
  for name, x in good.items():
    with pytest.raises(ValueError, match=f'{name} has shape .* for a tree of 10 nodes'):
      verify.accept(tree, **(good | {name: x[:, :-1]}))
