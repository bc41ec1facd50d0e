"""Speculative generation: checks, prompts, and the host's loop over rounds."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from models.generate import Generated, Sampling, placing
from models.generate.prefill import BrokenLogits, Opened, open_model, padded_stops, prefill, read_prompts, whole
from models.generate.sampling import GREEDY, checked_key, row_keys
from models.speculative import loop
from models.speculative.tree import Tree


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What the drafts were worth, per prompt; B prompts, D the height of the tree.

  Attributes:
    target_calls: [B] int, calls of the target after the prompt, one per tree.
    tokens: [B] int, new tokens.
    tried: [B, D] int, new tokens that were chosen with drafted children of depth 1, 2, ... D at hand.
    accepted: [B, D] int, how many of them are one of these children.
  """

  target_calls: np.ndarray
  tokens: np.ndarray
  tried: np.ndarray
  accepted: np.ndarray

  @property
  def tokens_per_call(self):
    """[B] new tokens per call of the target, between 1 and D + 1."""
    return self.tokens / self.target_calls

  @property
  def acceptance(self):
    """[D] the share of accepted among tried at each depth, over all prompts; NaN where nothing was tried."""
    accepted, tried = self.accepted.sum(axis=0), self.tried.sum(axis=0)
    return np.divide(accepted, tried, out=np.full(len(tried), np.nan), where=tried > 0)


class _Task(NamedTuple):
  """The checked arguments of `generate`."""

  models: tuple[Opened, Opened]  # target, draft
  tree: Tree
  prompts: list[np.ndarray]
  max_new_tokens: int
  sampling: Sampling
  key: jax.Array | None
  stop_tokens: np.ndarray
  prefill_chunk: int


def generate(
  target, draft, prompts, max_new_tokens, *, widths=(1, 1, 1, 1), sampling=GREEDY, key=None, stop_tokens=(),
  prefill_chunk=512,
):  # fmt: skip
  """Continues prompts with texts that have the target's law, whatever the draft is; a good draft makes it faster.

  In every round the draft grows a tree of tokens behind each text: the children of a node are drawn from its
  distribution without replacement (greedy: its most likely tokens). One call of the target gives its distributions at
  all nodes, and `verify.accept` follows the tree as far as they allow. A round adds one token more than it accepts. The
  target's part may differ in the last bits from a call per token, by the order of sums; nothing else differs.

  A row is a matter of (key, the index of its prompt, widths). Programs are compiled for the tree, the number of
  prompts, the capacity of the caches, and sampling.kind.

  Args:
    target: a Decoder, or any module with its `init_cache`, `extend_hidden`, `look` and `logits`.
    draft: the same, with the same vocabulary; all else may differ.
    prompts: B lists of one int or more, or an integer array [B, T].
    max_new_tokens: new tokens per prompt, 1 or more.
    widths: children of every node at depth 0, 1, ...: (1, 1, 1, 1) is a chain of four tokens; or any Tree.
    sampling: Sampling; it holds for the draft too. A repetition penalty counts the tokens on the path to each node.
    key: a random key, needed if sampling.temperature > 0.
    stop_tokens: tokens that end a text; they are kept as its last.
    prefill_chunk: tokens of a prompt that are read at once.

  Returns:
    (Generated with one sample per prompt, Statistics). Greedy texts are those of models.generate.

  Raises:
    ValueError: an argument out of its range, a token outside the vocabulary, vocabularies that differ, a tree with
      more children at a node than there are tokens.
    FloatingPointError: the logits of a running row were NaN, +inf or all -inf; it names the model, and its attribute
      `prompt` is the index of the prompt.

  Source: arXiv:2211.17192, arXiv:2302.01318 (chains); arXiv:2305.09781 (trees); arXiv:2402.12374, arXiv:2402.14160
    (children without replacement).
  """
  sizes = {'max_new_tokens': max_new_tokens, 'prefill_chunk': prefill_chunk}
  task = _task(target, draft, prompts, widths, sampling, key, stop_tokens, **sizes)
  return _collected(task)


def _task(target, draft, prompts, widths, sampling, key, stop_tokens, *, max_new_tokens, prefill_chunk):
  """The arguments of `generate`, checked."""
  opened = [open_model(target, 'target', ['look']), open_model(draft, 'draft', ['look'])]
  vocab, other = (model.vocab for model in opened)
  if vocab != other:
    raise ValueError(f'draft has a vocabulary of {other} tokens, expected the {vocab} of target')
  tree = widths if isinstance(widths, Tree) else Tree.from_widths(widths)
  width = max(map(len, tree.children))
  if width > vocab:
    raise ValueError(f'widths: a node has {width} children, expected no more than the {vocab} tokens there are')
  if not isinstance(sampling, Sampling):
    raise ValueError(f'sampling={sampling!r} must be a Sampling')
  sampling.check(vocab)
  mesh = opened[0].mesh or opened[1].mesh
  opened = [model._replace(mesh=mesh, params=placing.spread(model.params, mesh)) for model in opened]
  return _Task(
    models=(opened[0], opened[1]),
    tree=tree,
    prompts=read_prompts(prompts, None, vocab),
    max_new_tokens=whole('max_new_tokens', max_new_tokens, 1),
    sampling=sampling,
    key=checked_key(key, sampling),
    stop_tokens=padded_stops(stop_tokens, vocab),
    prefill_chunk=whole('prefill_chunk', prefill_chunk, 1),
  )


def _collected(task):
  """(Generated, Statistics) of all rounds."""
  B, D = len(task.prompts), task.tree.height
  tokens: list[list[int]] = [[] for _ in range(B)]
  log_probs: list[list[float]] = [[] for _ in range(B)]
  finish = [''] * B
  calls, tried, accepted = np.zeros(B, int), np.zeros((B, D), int), np.zeros((B, D), int)
  for outcome in _rounds(task):
    for model, is_sound in zip(('target', 'draft'), outcome.is_sound[:B].T):
      if not is_sound.all():
        raise BrokenLogits(int(np.argmin(is_sound)), f"the {model}'s logits were NaN, +inf or all -inf, it is broken")
    calls += outcome.count[:B] > 0
    tried += outcome.tried[:B]
    accepted += outcome.accepted[:B]
    for b, n in enumerate(outcome.count[:B]):
      tokens[b] += outcome.tokens[b, :n].tolist()
      log_probs[b] += outcome.log_probs[b, :n].tolist()
      if n and not outcome.left[b]:
        finish[b] = 'stop' if outcome.is_stopped[b] else 'length'
  wrap = lambda rows: [[row] for row in rows]
  statistics = Statistics(calls, np.array([len(row) for row in tokens]), tried, accepted)
  return Generated(wrap(tokens), wrap(log_probs), wrap(finish)), statistics


def _rounds(task):
  """The Outcome of every round, on the host, until all rows are done."""
  target, draft = task.models
  read = lambda model: prefill(model, task.prompts, task.max_new_tokens, task.prefill_chunk)
  (cache, last, position), (draft_cache, _, _) = read(target), read(draft)
  R, seen = len(last), None
  if task.sampling.has_penalty:
    seen = np.zeros((R, target.vocab), bool)
    for row, prompt in zip(seen, task.prompts):
      row[prompt] = True
  # The most likely tokens of the draft, for a greedy text, are ranked by all of its distribution.
  proposal = task.sampling
  if task.sampling.is_greedy:
    proposal = Sampling(temperature=1.0, repetition_penalty=task.sampling.repetition_penalty)
  left = np.where(position < 0, 0, task.max_new_tokens).astype(np.int32)
  fill = lambda value: np.full(R, value, np.int32)
  graphs, params = (target.graph, draft.graph), (target.params, draft.params)
  with placing.current(target.mesh):
    state = loop.begin(loop.State(cache, draft_cache, last, fill(-1), position, left, fill(0), seen))
    keys = None if task.key is None else row_keys(task.key, R, 1)
    del cache, draft_cache  # the state holds them, and gives them away at every round
    while left.any():
      state, outcome = loop.advance(graphs, params, task.tree, state, task.sampling, proposal, keys, task.stop_tokens)
      outcome = jax.device_get(outcome)
      left = outcome.left
      yield outcome
