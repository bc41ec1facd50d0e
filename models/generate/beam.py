"""Beam search: the most likely texts, found by keeping the best few beginnings."""

import dataclasses
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.generate import placing
from models.generate.prefill import BrokenLogits, open_model, padded_stops, power_of_two, prefill, read_prompts, whole

LARGEST_POWER = 1e30  # of a length: scores stay far from where float32 ends
LEAST_TEXT = 32  # one program searches for all texts that are shorter


@dataclasses.dataclass(frozen=True)
class Beams:
  """The best texts found, best first; `tokens[b][i]` is number i of prompt b, and so on.

  Attributes:
    tokens: lists of ints, without the prompt; a stop token is the last.
    scores: sum of log-probabilities / number of new tokens ** length_penalty.
    finish: 'stop' or 'length'.
  """

  tokens: list[list[list[int]]]
  scores: list[list[float]]
  finish: list[list[str]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
  """What a step of the search carries: B prompts, N beams each, texts of up to M tokens.

  Attributes:
    cache: ModelCache of B * N rows.
    last: [B * N] int32 newest token of the beams.
    position: [B * N] int32 where it stands.
    texts: [B, N, M] int32 new tokens of the beams that go on.
    sums: [B, N] their summed log-probabilities; -inf is no beam.
    ended: [B, N, M] int32 texts that are finished, best first, -1 behind their last token.
    scores: [B, N] their scores; -inf is none.
    is_done: [B] bool.
    is_sound: [B] bool, whether all logits could be used.
  """

  cache: Any
  last: jax.Array
  position: jax.Array
  texts: jax.Array
  sums: jax.Array
  ended: jax.Array
  scores: jax.Array
  is_done: jax.Array
  is_sound: jax.Array


def beam_search(
  model, prompts, max_new_tokens, beams, *, lengths=None, length_penalty=1.0, stop_tokens=(), early_stopping=False,
  prefill_chunk=512,
):  # fmt: skip
  """Searches for the texts of the highest score.

      score = sum_t log p(token t | prompt, tokens before) / n ** length_penalty   over the n new tokens

  Each step extends the running beams of a prompt by every token and looks at the best `beams` of all these: those that
  end with a stop token are finished, and the best `beams` of the others run on. Of finished texts the best `beams` are
  kept; after max_new_tokens the running ones join them. With one beam this is greedy generation, except with
  early_stopping='never' and a length_penalty above 0, where the search goes on behind a stop token. A step copies the
  cache once, since beams take over the entries of those that they continue. Meshes as in `generate`.

  Args:
    model: a Decoder, or any module with its `init_cache`, `extend_hidden` and `logits`.
    prompts: B lists of one int or more, or an integer array [B, T].
    max_new_tokens: most new tokens, 1 or more.
    beams: N, beams per prompt, and texts returned.
    lengths: [B] int in 1 .. T, with an array: prompt b is its first lengths[b] tokens; None means T.
    length_penalty: exponent, -8 .. 8; above 0 favours long texts, below 0 short ones. max_new_tokens to the power of
      |length_penalty| is at most 1e30.
    stop_tokens: tokens that finish a text; they count in its score and its length.
    early_stopping: when a prompt is done, before max_new_tokens: True, as soon as `beams` texts are finished; False,
      when `beams` are and no running beam, ended now, would beat the worst; 'never', when none can, however it goes on.
    prefill_chunk: tokens of a prompt that are read at once.

  Returns:
    Beams; fewer than N texts of a prompt where there are no more of them.

  Raises:
    ValueError: an argument out of its range, a token outside the vocabulary.
    FloatingPointError: logits were NaN, +inf or all -inf; its attribute `prompt` is the index of the prompt.

  Source: length penalty and early stopping as in Hugging Face's transformers, `GenerationMixin.generate`.
  """
  opened = open_model(model)
  prompts = read_prompts(prompts, lengths, opened.vocab)
  N, new = whole('beams', beams, 1), whole('max_new_tokens', max_new_tokens, 1)
  is_number = isinstance(length_penalty, numbers.Real) and not isinstance(length_penalty, bool)
  if not is_number or not -8 <= length_penalty <= 8:
    raise ValueError(f'length_penalty={length_penalty!r} must be a number in -8 .. 8')
  if float(new) ** abs(float(length_penalty)) > LARGEST_POWER:
    raise ValueError(
      f'length_penalty={length_penalty!r} with max_new_tokens={new}: expected max_new_tokens ** |length_penalty| of at '
      f'most {LARGEST_POWER:.0e}, or scores would overflow'
    )
  if not any(early_stopping is known for known in (True, False)) and early_stopping != 'never':
    raise ValueError(f"early_stopping={early_stopping!r} must be True, False or 'never'")
  stops = padded_stops(stop_tokens, opened.vocab)

  graph, params, mesh, _ = opened
  # Whole prompts are idle, not rows: the beams of a prompt lie on one device.
  idle = [np.zeros(0, np.int32)] * (placing.padded(len(prompts), mesh) - len(prompts))
  cache, last, position = prefill(opened, [*prompts, *idle], new, whole('prefill_chunk', prefill_chunk, 1), N)
  with placing.current(mesh):
    state = _begin(cache, last, position, N, power_of_two(new, LEAST_TEXT))
    del cache
    state, out = _search(graph, params, state, stops, new, float(length_penalty), early_stopping)
    del state
    ended, scores, is_sound = jax.device_get(out)
  broken = np.flatnonzero(~is_sound[: len(prompts)])
  if broken.size:
    raise BrokenLogits(int(broken[0]))
  return _beams(ended[: len(prompts)], scores[: len(prompts)], frozenset(stops.tolist()))


def _beams(ended, scores, stops):
  """Beams of the arrays of a finished Search."""
  tokens = [[row[row >= 0].tolist() for row in rows[np.isfinite(of)]] for rows, of in zip(ended, scores)]
  finish = [['stop' if row[-1] in stops else 'length' for row in rows] for rows in tokens]
  return Beams(tokens, [of[np.isfinite(of)].tolist() for of in scores], finish)


@functools.partial(jax.jit, static_argnames=('N', 'M'), donate_argnames='cache')
def _begin(cache, last, position, N, M):
  B = len(last) // N
  empty, first = jnp.full((B, N, M), -1, jnp.int32), jnp.arange(N) == 0
  rows = {
    'last': last,
    'position': position,
    'texts': empty,
    'sums': jnp.broadcast_to(jnp.where(first, 0.0, -jnp.inf), (B, N)),  # all beams are equal: one is enough
    'ended': empty,
    'scores': jnp.full((B, N), -jnp.inf),
    'is_done': position[::N] < 0,
    'is_sound': jnp.ones(B, bool),
  }
  return Search(cache=placing.by_heads(cache), **placing.by_rows(rows))


@functools.partial(jax.jit, static_argnames=('graph', 'early_stopping'), donate_argnames='state')
def _search(graph, params, state, stops, max_new_tokens, length_penalty, early_stopping):
  """(Search at its end, (ended [B, N, M], scores [B, N], is_sound [B]) whole on every device)."""
  model = nnx.merge(graph, params)
  B, N, _ = state.texts.shape

  def step(carry):
    i, state = carry
    logp, cache, is_sound = _log_probs(model, state)
    V = logp.shape[-1]
    sums, best = jax.lax.top_k((state.sums[..., None] + logp).reshape(B, N * V), min(N * V, N * (1 + len(stops))))
    parents, tokens = best // V, (best % V).astype(jnp.int32)
    texts = jnp.take_along_axis(state.texts, parents[..., None], axis=1).at[:, :, i].set(tokens)
    is_stop = jnp.any(tokens[..., None] == stops, axis=-1)
    ends = jnp.where(is_stop, jnp.arange(sums.shape[1]) < N, (i + 1 == max_new_tokens) & _first(~is_stop, N))
    scores = sums / (i + 1.0) ** length_penalty
    ended, kept = _merge(state, texts, jnp.where(ends, scores, -jnp.inf))
    running, order = jax.lax.top_k(jnp.where(is_stop, -jnp.inf, sums), N)
    pick = lambda x: jnp.take_along_axis(x, order.reshape(B, N, *[1] * (x.ndim - 2)), axis=1)
    rows = (jnp.arange(B)[:, None] * N + pick(parents)).reshape(-1)
    # What the best running beam may still come to: now, or with all the tokens that may follow.
    n = jnp.where((early_stopping == 'never') & (length_penalty > 0), max_new_tokens, i + 1.0)
    is_over = kept[:, -1] > -jnp.inf
    if early_stopping is not True:
      is_over &= running[:, 0] / n**length_penalty <= kept[:, -1]
    is_done = state.is_done | is_over | ~is_sound | (running[:, 0] == -jnp.inf)
    return i + 1, Search(
      cache=placing.by_heads(cache.take(rows)),
      last=pick(tokens).reshape(-1),
      position=state.position + ~jnp.repeat(state.is_done, N),
      texts=pick(texts),
      sums=running,
      ended=ended,
      scores=kept,
      is_done=is_done,
      is_sound=state.is_sound & is_sound,
    )

  is_running = lambda carry: (carry[0] < max_new_tokens) & ~jnp.all(carry[1].is_done)
  _, state = jax.lax.while_loop(is_running, step, (0, state))
  return state, placing.everywhere((state.ended, state.scores, state.is_sound))


def _log_probs(model, state):
  """(log p of the next token [B, N, V], the cache with the newest tokens, [B] whether logits could be used)."""
  B, N, _ = state.texts.shape
  position = jnp.where(jnp.repeat(state.is_done, N), -1, state.position)
  hidden, cache = model.extend_hidden(state.last[:, None], position[:, None], state.cache)
  logits = model.logits(hidden)[:, 0].reshape(B, N, -1)
  is_usable = jnp.isfinite(jnp.max(logits, axis=-1)) | (state.sums == -jnp.inf)
  return jax.nn.log_softmax(logits, axis=-1), cache, jnp.all(is_usable, axis=1) | state.is_done


def _first(flags, n):
  """The first n True of each row."""
  return flags & (jnp.cumsum(flags, axis=1) <= n)


def _merge(state, texts, scores):
  """(texts, scores) of the best N of the finished ones and new ones; those of a prompt that is done stay."""
  N = state.scores.shape[1]
  scores = jnp.where(state.is_done[:, None], -jnp.inf, scores)
  best, index = jax.lax.top_k(jnp.concatenate([state.scores, scores], axis=1), N)
  everything = jnp.concatenate([state.ended, texts], axis=1)
  return jnp.take_along_axis(everything, index[..., None], axis=1), best
