"""Generation: prompts are read once, in chunks; then a compiled loop makes tokens, and the host looks now and then."""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.generate import placing, sampling as samplings
from models.generate.prefill import BrokenLogits, Opened, listed, open_model, padded_stops, prefill, read_prompts, whole
from models.generate.sampling import GREEDY, Sampling
from models.generate.stops import Text, check_stop_strings

BLOCK = 32  # tokens per call of the compiled loop, at most
CALL_SECONDS = 0.1  # a call should take no longer when somebody watches


@dataclasses.dataclass(frozen=True)
class Generated:
  """New texts; `tokens[b][s]` belongs to sample s of prompt b, and so on.

  Attributes:
    tokens: lists of ints, without the prompt; the last is a stop token, or the last one that was needed to be sure of a
      stop string: the one that completed it, or a later one where the tokenizer or a longer stop string left it open.
    log_probs: lists of floats, one per token: log softmax(logits) of the model itself, before penalties, temperature
      and filters, whatever the token was drawn from.
    finish: 'stop' (a stop token or a stop string) or 'length'.
    text: the new text, without the stop token and from a stop string on; None without a tokenizer.
  """

  tokens: list[list[list[int]]]
  log_probs: list[list[list[float]]]
  finish: list[list[str]]
  text: list[list[str]] | None = None


class Piece(NamedTuple):
  """What one row gained: a part of the lists in Generated, of `sample` of `prompt`; finish is '' while it goes on."""

  prompt: int
  sample: int
  tokens: list[int]
  log_probs: list[float]
  text: str
  finish: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What the loop carries, R rows; donated from call to call.

  Attributes:
    cache: ModelCache of all tokens but the last.
    last: [R] int32 the newest token.
    position: [R] int32 where it stands.
    made: [R] int32 new tokens.
    is_done: [R] bool.
    seen: [R, V] bool the tokens of the text, or None without a repetition penalty.
  """

  cache: Any
  last: Any
  position: Any
  made: Any
  is_done: Any
  seen: Any


@dataclasses.dataclass(frozen=True)
class Task:
  """The checked arguments of `generate`."""

  opened: Opened
  prompts: list[np.ndarray]
  max_new_tokens: int
  sampling: Sampling
  key: jax.Array | None
  samples: int
  stop_tokens: np.ndarray
  stop_strings: tuple[str, ...]
  tokenizer: Any
  prefill_chunk: int


def generate(
  model, prompts, max_new_tokens, *, lengths=None, sampling=GREEDY, key=None, samples=1, stop_tokens=(),
  stop_strings=(), tokenizer=None, prefill_chunk=512, on_tokens=None,
):  # fmt: skip
  """Continues prompts.

      next ~ sampling.adjusted(logits(prompt, new tokens))   until a stop token, a stop string, or max_new_tokens

  A row is a matter of (key, the index of its prompt, its sample number) and does not depend, up to rounding, on what
  else is generated, on the chunks or on the size of the cache. Programs are compiled for the number of rows, the
  capacity of the cache (prefill.capacity_for of the longest prompt and max_new_tokens), the width of a chunk, and
  sampling.kind; lengths, numbers of tokens and of stop tokens share them.

  On a mesh (jax.set_mesh, or that over which the parameters are cut) rows are cut over its axes data and fsdp, with
  idle ones where these do not divide them, and the key heads of caches over tensor where it divides them.

  A decoder of scanned layers (config.scan) holds its cache twice within a step and copies it at every token: generate
  with models.state.unscanned(model, config), or load with hf.load(folder, scan=False).

  Args:
    model: a Decoder, or any module with its `init_cache`, `extend_hidden` and `logits`.
    prompts: B lists of one int or more, or an integer array [B, T].
    max_new_tokens: new tokens per row, 1 or more.
    lengths: [B] int in 1 .. T, with an array: prompt b is its first lengths[b] tokens; None means T.
    sampling: Sampling; the default takes the most likely token.
    key: a random key, needed if sampling.temperature > 0. Equal keys give equal texts.
    samples: texts per prompt, which is read once for all.
    stop_tokens: tokens that end a row; they are kept as its last token.
    stop_strings: texts that end a row, and are no part of `text`; they need a tokenizer.
    tokenizer: has decode(ids) -> str; gives `text`.
    prefill_chunk: tokens of a prompt that are read at once; less need less memory.
    on_tokens: function that is called with each Piece while the texts grow.

  Returns:
    Generated.

  Raises:
    ValueError: an argument out of its range, a token outside the vocabulary; before anything is computed.
    FloatingPointError: the logits of a running row were NaN, +inf or all -inf; its attribute `prompt` is the index of
      the prompt.
  """
  task = _task(
    model, prompts, max_new_tokens, lengths=lengths, sampling=sampling, key=key, samples=samples,
    stop_tokens=stop_tokens, stop_strings=stop_strings, tokenizer=tokenizer, prefill_chunk=prefill_chunk,
  )  # fmt: skip
  table = lambda of: [[of() for _ in range(samples)] for _ in task.prompts]
  tokens, log_probs, finish, text = table(list), table(list), table(str), table(str)
  for piece in _pieces(task, is_watched=on_tokens is not None):
    b, s = piece.prompt, piece.sample
    tokens[b][s] += piece.tokens
    log_probs[b][s] += piece.log_probs
    finish[b][s] = piece.finish
    text[b][s] += piece.text
    if on_tokens is not None:
      on_tokens(piece)
  return Generated(tokens, log_probs, finish, None if tokenizer is None else text)


def stream(model, prompts, max_new_tokens, **options):
  """As `generate`, piece by piece: an iterator of Piece, some ten times a second; all together they are its result.

  Arguments are checked by the call itself. An iterator that is dropped ends the generation.
  """
  return _pieces(_task(model, prompts, max_new_tokens, **options), is_watched=True)


def _task(
  model, prompts, max_new_tokens, *, lengths=None, sampling=GREEDY, key=None, samples=1, stop_tokens=(),
  stop_strings=(), tokenizer=None, prefill_chunk=512,
):  # fmt: skip
  """The arguments of `generate`, checked."""
  opened = open_model(model)
  if not isinstance(sampling, Sampling):
    raise ValueError(f'sampling={sampling!r} must be a Sampling')
  sampling.check(opened.vocab)
  if not isinstance(stop_strings, str):
    stop_strings = tuple(listed('stop_strings', stop_strings, 'a list of texts'))
  check_stop_strings(stop_strings)
  if tokenizer is not None and not callable(getattr(tokenizer, 'decode', None)):
    raise ValueError(f'tokenizer={tokenizer!r} has no decode: expected None, or an object with decode(ids) -> str')
  if stop_strings and tokenizer is None:
    raise ValueError(f'stop_strings={stop_strings!r} need a tokenizer, got tokenizer=None')
  return Task(
    opened=opened,
    prompts=read_prompts(prompts, lengths, opened.vocab),
    max_new_tokens=whole('max_new_tokens', max_new_tokens, 1),
    sampling=sampling,
    key=samplings.checked_key(key, sampling),
    samples=whole('samples', samples, 1),
    stop_tokens=padded_stops(stop_tokens, opened.vocab),
    stop_strings=stop_strings,
    tokenizer=tokenizer,
    prefill_chunk=whole('prefill_chunk', prefill_chunk, 1),
  )


def _pieces(task, is_watched):
  """The pieces of all rows; programs are called within the context of the mesh, which is left while one yields."""
  graph, params, mesh, vocab = task.opened
  cache, last, position = prefill(task.opened, task.prompts, task.max_new_tokens, task.prefill_chunk, task.samples)
  R, live = len(last), len(task.prompts) * task.samples
  seen = None
  if task.sampling.has_penalty:
    seen = np.zeros((R, vocab), bool)
    for r in range(live):
      seen[r, task.prompts[r // task.samples]] = True
  with placing.current(mesh):
    state = _begin(State(cache, last, position, np.zeros(R, np.int32), position < 0, seen))
    keys = None if task.key is None else samplings.row_keys(task.key, R, task.samples)
  del cache  # the state holds it, and gives it away at every call
  rows = [_Row(task, r) for r in range(live)]
  limit = 1 if is_watched else BLOCK
  while not all(row.finish for row in rows):
    start = time.monotonic()
    is_stopped = np.array([bool(row.finish) for row in rows] + [True] * (R - live))
    with placing.current(mesh):
      state, out = _decode(
        graph, params, state, is_stopped, keys, task.sampling, task.stop_tokens, task.max_new_tokens, limit
      )
      tokens, log_probs, is_sound = jax.device_get(out)
    if not is_sound[:live].all():
      raise BrokenLogits(int(np.flatnonzero(~is_sound[:live])[0]) // task.samples)
    if is_watched:
      limit = min(BLOCK, 2 * limit) if time.monotonic() - start < CALL_SECONDS / 2 else max(1, limit // 2)
    for row, ids, values in zip(rows, tokens, log_probs):
      if not row.finish:
        yield row.take(ids[ids >= 0].tolist(), values[ids >= 0].tolist())


class _Row:
  """What the host knows of one row: how many tokens it has, its text, and whether it is finished."""

  def __init__(self, task, r):
    self.task, self.prompt, self.sample, self.finish = task, r // task.samples, r % task.samples, ''
    self.rest = task.max_new_tokens
    self.stops = frozenset(task.stop_tokens.tolist())
    prompt = task.prompts[self.prompt].tolist()
    self.text = None if task.tokenizer is None else Text(task.tokenizer, task.stop_strings, prompt)

  def take(self, ids, log_probs):
    """The Piece of new ids, of which only the last one can be a stop token."""
    has_stop, text, count = ids[-1] in self.stops, '', len(ids)
    if self.text is not None:
      before = self.text.count
      text, is_stopped = self.text.push(ids[: len(ids) - has_stop])
      if is_stopped:
        has_stop, count = True, self.text.count - before
    self.rest -= count
    self.finish = 'stop' if has_stop else '' if self.rest else 'length'
    if self.finish and self.text is not None:
      text += self.text.finish()
      self.finish = 'stop' if self.text.is_stopped else self.finish
    return Piece(self.prompt, self.sample, ids[:count], log_probs[:count], text, self.finish)


@functools.partial(jax.jit, donate_argnames='state')
def _begin(state):
  rows = dataclasses.replace(state, cache=None)
  return dataclasses.replace(placing.by_rows(rows), cache=placing.by_heads(state.cache))


@functools.partial(jax.jit, static_argnames='graph', donate_argnames='state')
def _decode(graph, params, state, is_stopped, keys, sampling, stop_tokens, max_new_tokens, limit):
  """Up to `limit` <= BLOCK new tokens for every row that is not done.

  Returns:
    (State, (tokens [R, BLOCK] int32, -1 behind the new ones; their log-probabilities [R, BLOCK]; [R] bool, whether the
    logits could be used)), the latter whole on every device.
  """
  model = nnx.merge(graph, params)
  R = len(state.last)
  state = dataclasses.replace(state, is_done=state.is_done | is_stopped)
  out = jnp.full((R, BLOCK), -1, jnp.int32), jnp.zeros((R, BLOCK)), jnp.ones(R, bool)

  def is_running(carry):
    i, state, _ = carry
    return (i < limit) & ~jnp.all(state.is_done)

  def step(carry):
    i, state, (tokens, log_probs, is_sound) = carry
    position = jnp.where(state.is_done, -1, state.position)
    hidden, cache = model.extend_hidden(state.last[:, None], position[:, None], state.cache)
    logits = model.logits(hidden)[:, 0]
    new, is_usable = _choose(logits, keys, state, sampling)
    log_prob = jnp.take_along_axis(logits, new[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    made = state.made + ~state.is_done
    is_last = jnp.any(new[:, None] == stop_tokens, axis=-1) | (made >= max_new_tokens) | ~is_usable
    seen = None if state.seen is None else state.seen.at[jnp.arange(R), new].max(~state.is_done)
    out = (
      tokens.at[:, i].set(jnp.where(state.is_done, -1, new)),
      log_probs.at[:, i].set(log_prob.astype(log_probs.dtype)),
      is_sound & (state.is_done | is_usable),
    )
    position = state.position + ~state.is_done
    return i + 1, State(placing.by_heads(cache), new, position, made, state.is_done | is_last, seen), out

  _, state, out = jax.lax.while_loop(is_running, step, (0, state, out))
  return state, placing.everywhere(out)


def _choose(logits, keys, state, sampling):
  """The next tokens [R] int32, and [R] bool, whether what they were chosen from can be used."""
  if sampling.is_greedy:
    logits = samplings.penalised(logits, sampling, state.seen)
    new = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  else:
    logits = samplings.adjusted(logits, sampling, state.seen)
    new = samplings.draw(jax.vmap(jax.random.fold_in)(keys, state.made), logits)
  return new, jnp.isfinite(jnp.max(logits, axis=-1))  # NaN if any is
