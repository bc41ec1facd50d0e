"""One round of speculative decoding for all rows of a batch: draft a tree, look at it once, keep what the target takes.

Between two rounds the target's cache holds each text but for its last token, the root of the next tree. The draft's
holds the same, or one token less: it is never asked behind a leaf, so that an accepted leaf comes to it with the next
root. What is not accepted is never stored, so nothing is rolled back, also in rings.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.generate import placing, sampling as samplings
from models.speculative import verify


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Where the rows stand between two rounds, a pytree.

  Attributes:
    target: ModelCache of the target.
    draft: ModelCache of the draft.
    last: [B] int32 last token of the text.
    before: [B] int32 the token before it, -1 where the draft's cache holds it.
    position: [B] int32 position of the last token.
    left: [B] int32 tokens still to come; 0 in rows that are done.
    made: [B] int32 new tokens so far.
    seen: [B, V] bool tokens of the text, or None without a repetition penalty.
  """

  target: Any
  draft: Any
  last: Any
  before: Any
  position: Any
  left: Any
  made: Any
  seen: Any


class Outcome(NamedTuple):
  """What a round gave each row: D is the tree's height.

  Attributes:
    tokens: [B, D + 1] int32 new tokens, of which the first `count` are kept.
    log_probs: [B, D + 1] their log-probabilities: log softmax of the target's own logits.
    count: [B] int32, 0 in rows that were done.
    is_stopped: [B] bool, a stop token came; it is kept, what follows it is not.
    left: [B] int32 tokens still to come.
    tried: [B, D] bool, whether the kept token at that depth was chosen with drafted children at hand.
    accepted: [B, D] bool, whether it is one of them.
    is_sound: [B, 2] bool, False where logits of the target, or of the draft, were NaN, +inf or all -inf.
  """

  tokens: Any
  log_probs: Any
  count: Any
  is_stopped: Any
  left: Any
  tried: Any
  accepted: Any
  is_sound: Any


@functools.partial(jax.jit, donate_argnames='state')
def begin(state):
  """The State placed on the current mesh, if there is one."""
  rows = placing.by_rows(dataclasses.replace(state, target=None, draft=None))
  return dataclasses.replace(rows, target=placing.by_heads(state.target), draft=placing.by_heads(state.draft))


@functools.partial(jax.jit, static_argnames=('graphs', 'tree'), donate_argnames='state')
def advance(graphs, params, tree, state, sampling, proposal, keys, stops):
  """A round.

  Args:
    graphs: of target and draft (static).
    params: of target and draft.
    tree: Tree (static).
    state: State, donated.
    sampling: Sampling of the text.
    proposal: Sampling that the draft's children are drawn by: the same, or of temperature 1 for a greedy text.
    keys: [B] random keys, one per row, the same in all rounds; None for a greedy text.
    stops: [S] int32 stop tokens.

  Returns:
    (State, Outcome)
  """
  target, draft = (nnx.merge(graph, part) for graph, part in zip(graphs, params))
  draw_keys, accept_keys, last_keys = _of_round(keys, state.made)
  is_running = state.left > 0
  positions = jnp.where(is_running[:, None], state.position[:, None] + tree.depths, -1)

  tokens, log_q, drafted, draft_cache, is_draft_sound = propose(draft, tree, state, positions, proposal, draw_keys)
  hidden, looked = target.look(tokens, positions, state.target, mask=tree.mask)
  seen = _seen_behind(tree, range(tree.size), tokens, state.seen)
  logits = target.logits(hidden)
  is_sound = jnp.stack([_is_sound(logits), is_draft_sound], axis=1) | ~is_running[:, None]
  log_p = samplings.adjusted(logits, sampling, seen)

  if keys is None:  # every chance is 0 or 1
    path, count, p = verify.accept(tree, tokens, log_q, log_p, jnp.zeros(tokens.shape))
    last = jnp.argmax(p, axis=-1).astype(jnp.int32)
  else:
    uniform = lambda key: jax.random.uniform(key, (tree.size,), log_p.dtype)
    path, count, p = verify.accept(tree, tokens, log_q, log_p, jax.vmap(uniform)(accept_keys))
    last = samplings.draw(last_keys, jnp.log(p))
  outcome = _outcome(tree, state, tokens, logits, path, count, last, stops, is_sound)

  nodes = jnp.pad(path, ((0, 0), (1, 0)))  # the root, then what was accepted
  node = jnp.take_along_axis(nodes, count[:, None], axis=1)[:, 0]
  is_kept = is_running[:, None] & (jnp.arange(tree.height + 1) <= count[:, None])
  places = jnp.where(is_kept, state.position[:, None] + jnp.arange(tree.height + 1), -1)
  is_inner = np.isin(np.arange(tree.size), tree.inner)
  number = np.cumsum(is_inner) - 2  # of a node in `drafted`, which has the inner nodes without the root
  if drafted is not None:
    index, is_there = jnp.asarray(number)[nodes[:, 1:]], jnp.asarray(is_inner)[nodes[:, 1:]]
    draft_cache = draft_cache.accept(drafted, jnp.maximum(index, 0), jnp.where(is_there, places[:, 1:], -1))
  token = jnp.take_along_axis(tokens, node[:, None], axis=1)[:, 0]
  state = State(
    target=placing.by_heads(state.target.accept(looked, jnp.maximum(nodes, 0), places)),
    draft=placing.by_heads(draft_cache),
    last=last,
    before=jnp.where(jnp.asarray(is_inner)[node], -1, token),
    position=state.position + count + 1,
    left=outcome.left,
    made=state.made + outcome.count,
    seen=_with_tokens(state.seen, outcome),
  )
  return state, placing.everywhere(outcome)


def propose(draft, tree, state, positions, proposal, keys):
  """Draws the tree's tokens, level by level.

  Args:
    draft: the draft model.
    tree: Tree.
    state: State.
    positions: [B, N] int32 of the nodes, -1 in rows that are done.
    proposal: Sampling.
    keys: [B] random keys, or None to take the most likely tokens.

  Returns:
    (tokens [B, N] int32, log_q [B, I, V] that the children of the I inner nodes were drawn from, Pending of the inner
    nodes without the root or None, the draft's cache with the root, [B] bool whether all logits are sound)
  """
  B = len(state.last)
  certain = jnp.stack([state.before, state.last], axis=1)
  places = jnp.where(certain >= 0, positions[:, :1] + jnp.array([-1, 0]), -1)
  places = jnp.where(positions[:, :1] >= 0, places, -1)
  hidden, cache = draft.extend_hidden(jnp.maximum(certain, 0), places, state.draft)
  hidden = hidden[:, 1:]

  tokens = jnp.zeros((B, tree.size), jnp.int32).at[:, 0].set(state.last)
  pending, looked, laws, is_sound = None, np.zeros(0, int), [], jnp.ones(B, bool)
  for depth, level in enumerate(tree.levels[:-1]):
    parents = np.array([node for node in level if tree.children[node]])
    if depth:
      looked = np.concatenate([looked, parents])
      mask = tree.mask[np.ix_(parents, looked)]
      hidden, pending = draft.look(tokens[:, parents], positions[:, parents], cache, mask=mask, pending=pending)
    logits = draft.logits(hidden)
    is_sound &= _is_sound(logits)
    laws.append(samplings.adjusted(logits, proposal, _seen_behind(tree, parents, tokens, state.seen)))
    of_nodes = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    node_keys = None if keys is None else of_nodes(keys, jnp.asarray(parents))
    drawn = verify.draw(node_keys, laws[-1], max(len(tree.children[node]) for node in parents))
    which = [(i, j) for i, node in enumerate(parents) for j in range(len(tree.children[node]))]
    row, column = np.array(which).T
    tokens = tokens.at[:, np.array(tree.levels[depth + 1])].set(drawn[:, row, column])
  return tokens, jnp.concatenate(laws, axis=1), pending, cache, is_sound


def _of_round(keys, made):
  """Three keys for each row, of this round alone; None without keys."""
  if keys is None:
    return None, None, None
  split = lambda key, made: jax.random.split(jax.random.fold_in(key, made), 3)
  parts = jax.vmap(split)(keys, made)
  return parts[:, 0], parts[:, 1], parts[:, 2]


def _is_sound(logits):
  """[B] bool, whether the logits [B, n, V] can be drawn from; NaN comes through the maximum."""
  return jnp.all(jnp.isfinite(jnp.max(logits, axis=-1)), axis=1)


def _seen_behind(tree, nodes, tokens, seen):
  """[B, n, V] bool: the tokens of the text and of the path to each of n nodes; None where seen is."""
  if seen is None:
    return None
  rows, ancestors = np.nonzero(tree.mask[np.array(nodes)])
  here = jnp.repeat(seen[:, None], len(nodes), axis=1)
  return here.at[jnp.arange(len(seen))[:, None], rows, tokens[:, ancestors]].set(True)


def _with_tokens(seen, outcome):
  """[B, V] bool with the tokens that a round kept; None where seen is."""
  if seen is None:
    return None
  B, n = outcome.tokens.shape
  token = jnp.where(jnp.arange(n) < outcome.count[:, None], outcome.tokens, seen.shape[1])  # out of bounds: dropped
  return seen.at[jnp.arange(B)[:, None], token].set(True, mode='drop')


def _outcome(tree, state, tokens, logits, path, count, last, stops, is_sound):
  """Outcome of a round: the accepted path and the token behind it, cut at a stop token and at the tokens left."""
  row, steps = jnp.arange(len(last))[:, None], jnp.arange(tree.height + 1)
  nodes = jnp.maximum(jnp.pad(path, ((0, 0), (1, 0))), 0)  # step i follows node i
  drafted = jnp.pad(tokens[row, nodes[:, 1:]], ((0, 0), (0, 1)))
  new = jnp.where(steps < count[:, None], drafted, last[:, None])
  is_kept = steps < jnp.minimum(count + 1, state.left)[:, None]
  is_stop = jnp.isin(new, stops) & is_kept
  is_kept &= jnp.cumsum(is_stop, axis=1) - is_stop == 0  # up to the first stop token
  is_stopped, kept = jnp.any(is_stop, axis=1), jnp.sum(is_kept, axis=1, dtype=jnp.int32)
  is_inner = jnp.asarray(np.isin(np.arange(tree.size), tree.inner))
  return Outcome(
    tokens=new,
    log_probs=logits[row, nodes, new] - jax.nn.logsumexp(logits, axis=-1)[row, nodes],
    count=kept,
    is_stopped=is_stopped,
    left=jnp.where(is_stopped, 0, state.left - kept),
    tried=(is_kept & is_inner[nodes])[:, :-1],
    accepted=(is_kept & (steps < count[:, None]))[:, :-1],
    is_sound=is_sound,
  )
