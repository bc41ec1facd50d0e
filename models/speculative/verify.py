"""Drawing drafted tokens and accepting them: the two sides of one law, as pure functions of probabilities.

Children of a node are drawn from the draft's distribution q without replacement. The target, whose distribution there
is p, takes them in the order in which they were drawn; q_j is q without the j - 1 that came before, normalised:

    child c_j is accepted with probability min(1, p(c_j) / q_j(c_j))
    otherwise p <- max(p - q_j, 0), normalised; when no child is left, the next token is drawn from p

What comes out has the law p, whatever q is. For one child a node this is speculative sampling (arXiv:2211.17192,
arXiv:2302.01318); children in turn are arXiv:2305.09781, without replacement arXiv:2402.12374 and arXiv:2402.14160.
"""

import jax
import jax.numpy as jnp
import numpy as np


def draw(keys, log_q, n):
  """n different tokens a row, as n draws in turn without replacement: those of the largest log q + Gumbel noise.

  Args:
    keys: [...] random keys, one per row; None takes the n most likely tokens (the lowest of equals) in order.
    log_q: [..., V] log-probabilities; -inf is never drawn while anything else is left.
    n: tokens, 1 .. V.

  Returns:
    [..., n] int32, in the order of the draws. Where fewer than n tokens have any probability, the rest of the row is
    arbitrary, and `accept` takes none of it.
  """
  if keys is not None:
    # In the usual mode noise ends at 16, and a token less likely than exp(-16) would not come at its rate.
    noise = lambda key: jax.random.gumbel(key, log_q.shape[-1:], log_q.dtype, mode='high')
    for _ in range(log_q.ndim - 1):
      noise = jax.vmap(noise)
    log_q = log_q + noise(keys)
  return jax.lax.top_k(log_q, n)[1].astype(jnp.int32)


def accept(tree, tokens, log_q, log_p, uniforms):
  """The path of drafted tokens that the target takes, and the distribution of the token behind it.

  Args:
    tree: Tree of N nodes.
    tokens: [B, N] int token of each node; that of the root is not read. The children of a node differ, and those of
      no probability in log_q (what `draw` fills up with) are never accepted.
    log_q: [B, I, V] log-probabilities that the children of the I nodes `tree.inner` were drawn from.
    log_p: [B, N, V] log-probabilities of the target behind each node.
    uniforms: [B, N] random numbers in [0, 1), one for each node.

  Returns:
    (path [B, height] int32: the accepted nodes from the root down, then -1; count [B] int32: how many they are;
    p [B, V]: probabilities of the next token, 0 wherever log_p of the last accepted node is -inf)

  Raises:
    ValueError: shapes that do not fit the tree.
  """
  check(tree, tokens, log_q, log_p, uniforms)
  B, row = len(tokens), jnp.arange(len(tokens))
  width = max(map(len, tree.children))
  children = jnp.array([c + (-1,) * (width - len(c)) for c in tree.children], jnp.int32)  # -1: no child
  asked = jnp.array([tree.inner.index(node) if node in tree.inner else 0 for node in range(tree.size)])

  def descend(carry, width):
    node, is_open, p = carry

    def offer(j, carry):
      accepted, p, left = carry
      child = jnp.where(is_open & (accepted < 0), children[node, j], -1)
      chance, p, left = attempt(tokens[row, child], child >= 0, left, p)
      return jnp.where(uniforms[row, child] < chance, child, accepted), p, left

    accepted = jnp.full(B, -1, jnp.int32)
    accepted, p, _ = jax.lax.fori_loop(0, width, offer, (accepted, p, log_q[row, asked[node]]))
    is_open = accepted >= 0
    node = jnp.where(is_open, accepted, node)
    p = jnp.where(is_open[:, None], jax.nn.softmax(log_p[row, node], axis=-1), p)
    return (node, is_open, p), accepted

  widths = np.array([max(len(tree.children[node]) for node in level) for level in tree.levels[:-1]])
  start = jnp.zeros(B, jnp.int32), jnp.ones(B, bool), jax.nn.softmax(log_p[:, 0], axis=-1)
  (_, _, p), path = jax.lax.scan(descend, start, widths)
  return path.T, jnp.sum(path >= 0, axis=0, dtype=jnp.int32), p


def attempt(token, is_tried, log_q, p):
  """One child of each row: how likely it is to be accepted, and p and log q for the next one.

  Args:
    token: [B] int the child's token.
    is_tried: [B] bool; rows that try nothing keep p and log_q.
    log_q: [B, V] log-probabilities up to a constant, without the children tried before.
    p: [B, V] probabilities that the token should have.

  Returns:
    (chance [B] of acceptance, p [B, V] given a rejection, log_q [B, V] without the token)
  """
  row = jnp.arange(len(token))
  is_tried &= log_q[row, token] > -jnp.inf
  q = jnp.where(is_tried[:, None], jax.nn.softmax(log_q, axis=-1), 0)  # of logarithms: a small rest is not lost
  q_token, p_token = q[row, token], p[row, token]
  chance = jnp.where(p_token < q_token, p_token / jnp.where(q_token > 0, q_token, 1), is_tried.astype(p.dtype))
  rest = jnp.maximum(p - q, 0)
  total = jnp.sum(rest, axis=-1, keepdims=True)
  # Nothing is left where p = q up to rounding: a rejection is then a rounding error, and p stays what it was.
  is_split = is_tried[:, None] & (total > 0)
  p = jnp.where(is_split, rest / jnp.where(is_split, total, 1), p)
  return chance, p, log_q.at[row, token].set(jnp.where(is_tried, -jnp.inf, log_q[row, token]))


def check(tree, tokens, log_q, log_p, uniforms):
  """The input rules of `accept`."""
  B, N = len(tokens), tree.size
  V = log_p.shape[-1]
  for name, x, want in (
    ('tokens', tokens, (B, N)),
    ('log_q', log_q, (B, len(tree.inner), V)),
    ('log_p', log_p, (B, N, V)),
    ('uniforms', uniforms, (B, N)),
  ):
    if x.shape != want:
      raise ValueError(f'{name} has shape {x.shape}, expected {want} for a tree of {N} nodes')
