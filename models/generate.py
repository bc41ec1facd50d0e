"""Generation: a prompt in one call of `extend`, then token by token, all in one compiled loop."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def generate(
  model, prompt, max_new_tokens, *, lengths=None, temperature=0.0, top_k=0, top_p=1.0, key=None, stop_token=-1
):
  """Continues each row of a prompt.

      next ~ softmax(logits / temperature) over the top_k tokens, of these over the top_p nucleus

  Compiles once per shape of the prompt and number of new tokens, and again for greedy, plain and filtered sampling.

  Args:
    model: a Decoder, or any module with its `init_cache`, `extend_hidden` and `logits`.
    prompt: [B, T] int tokens; row b is its first lengths[b].
    max_new_tokens: new tokens per row, 1 or more.
    lengths: [B] int in 1 .. T; None means T.
    temperature: 0 takes the most likely token (the lowest of equals) and ignores top_k, top_p and key.
    top_k: sample from the top_k most likely tokens (the lowest of equals); 0 means all.
    top_p: sample from the smallest set of most likely tokens whose probabilities sum to top_p or more; 1 means all.
    key: a random key, needed if temperature > 0. Equal keys give equal texts.
    stop_token: a row ends after this token, which is kept; -1 means none.

  Returns:
    (tokens [B, T + max_new_tokens] int32, lengths [B] int32): row b holds lengths[b] tokens, the prompt included and
    without a gap behind it, then zeros.

  Raises:
    ValueError: an argument out of its range, or a token outside the vocabulary.
    FloatingPointError: the logits of a running row were NaN or all -inf.
  """
  prompt = jnp.asarray(prompt)
  if prompt.ndim != 2 or not prompt.size or not jnp.issubdtype(prompt.dtype, jnp.integer):
    raise ValueError(f'prompt is {prompt.dtype} {prompt.shape}, expected integers [B, T], one token or more')
  B, T = prompt.shape
  lengths = jnp.full(B, T, jnp.int32) if lengths is None else jnp.asarray(lengths)
  one = lambda: model.extend_hidden(jnp.zeros((1, 1), jnp.int32), None, model.init_cache(1, 1))
  vocab = jax.eval_shape(lambda: model.logits(one()[0])).shape[-1]
  check_prompt(prompt, lengths, vocab)
  check_sampling(max_new_tokens, temperature, top_k, top_p, key, stop_token, vocab)

  graph, state = nnx.split(model)
  is_filtered = temperature > 0 and (top_k > 0 or top_p < 1)
  tokens, lengths, is_sound = _generate(
    graph, state, prompt, lengths.astype(jnp.int32), max_new_tokens,
    key if temperature > 0 else None, temperature, top_k, top_p, stop_token, is_filtered,
  )  # fmt: skip
  if not is_sound:
    raise FloatingPointError('the logits were NaN or all -inf: the parameters are broken')
  return tokens, lengths


def sample(logits, key, temperature=1.0, top_k=0, top_p=1.0):
  """Draws one token per row: logits [..., vocab] -> int32 [...]; the arguments of `generate`, here also traced."""
  logits = tempered(logits, temperature)
  return jax.random.categorical(key, jnp.where(kept(logits, top_k, top_p), logits, -jnp.inf)).astype(jnp.int32)


def tempered(logits, temperature):
  """logits / temperature up to a constant a row, without overflow: the largest is 0, however low the temperature."""
  below = logits - jnp.max(logits, axis=-1, keepdims=True)
  return below / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)


def kept(logits, top_k=0, top_p=1.0):
  """Which tokens top-k and then top-p leave: logits [..., vocab] -> bool. Ties go to the lower index."""
  vocab = logits.shape[-1]
  order = jnp.argsort(-logits, axis=-1, stable=True)
  in_k = jnp.arange(vocab) < jnp.where(top_k > 0, top_k, vocab)
  p = jax.nn.softmax(jnp.where(in_k, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf), axis=-1)
  before = jnp.cumsum(p, axis=-1) - p
  in_p = (before < top_p) | (top_p >= 1)  # rounding in the sum must not cut the tail when nothing is to be cut
  rank = jnp.argsort(order, axis=-1)
  return jnp.take_along_axis(in_k & in_p, rank, axis=-1)


@functools.partial(jax.jit, static_argnames=('graph', 'max_new_tokens', 'is_filtered'))
def _generate(
  graph, state, prompt, lengths, max_new_tokens, key, temperature, top_k, top_p, stop_token, is_filtered
):  # fmt: skip
  model = nnx.merge(graph, state)
  B, T = prompt.shape
  index = jnp.arange(T)
  is_text = index < lengths[:, None]
  prompt = jnp.where(is_text, prompt, 0).astype(jnp.int32)
  cache = model.init_cache(B, T + max_new_tokens)
  hidden, cache = model.extend_hidden(prompt, jnp.where(is_text, index, -1), cache)
  hidden = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
  tokens = jnp.pad(prompt, ((0, 0), (0, max_new_tokens)))

  def choose(logits, step):
    if key is None:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    step_key = jax.random.fold_in(key, step)
    if is_filtered:
      return sample(logits, step_key, temperature, top_k, top_p)
    return jax.random.categorical(step_key, tempered(logits, temperature)).astype(jnp.int32)

  def is_running(carry):
    step, is_done = carry[0], carry[4]
    return (step < max_new_tokens) & ~jnp.all(is_done)

  def advance(carry):
    step, tokens, lengths, hidden, is_done, is_sound, cache = carry
    logits = model.logits(hidden)[:, 0]
    top = jnp.max(logits, axis=-1)  # NaN if any is
    is_sound &= jnp.all(is_done | (top > -jnp.inf))
    new = choose(logits, step)
    place = jnp.where(is_done, T + max_new_tokens, lengths)  # out of bounds: dropped
    tokens = tokens.at[jnp.arange(B), place].set(new, mode='drop')
    position = jnp.where(is_done, -1, lengths)
    lengths = lengths + ~is_done
    is_done |= new == stop_token
    hidden, cache = model.extend_hidden(new[:, None], position[:, None], cache)
    return step + 1, tokens, lengths, hidden, is_done, is_sound, cache

  start = (0, tokens, lengths, hidden, jnp.zeros(B, bool), jnp.array(True), cache)
  _, tokens, lengths, _, _, is_sound, _ = jax.lax.while_loop(is_running, advance, start)
  return tokens, lengths, is_sound


def check_prompt(prompt, lengths, vocab):
  """Values that can be read (not traced) must be in range: what jit would turn into NaN is an error here."""
  (B, T), is_traced = prompt.shape, isinstance(prompt, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer)
  if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(f'lengths are {lengths.dtype} {lengths.shape}, expected integers [{B}]')
  if is_traced:
    return
  prompt, lengths = np.asarray(prompt), np.asarray(lengths)
  if lengths.min() < 1 or lengths.max() > T:
    raise ValueError(f'lengths={lengths.tolist()} must lie in 1 .. {T}, the width of the prompt')
  wrong = prompt[(np.arange(T) < lengths[:, None]) & ((prompt < 0) | (prompt >= vocab))]
  if wrong.size:
    raise ValueError(f'prompt holds token {wrong[0]}, expected 0 .. {vocab - 1}')


def check_sampling(max_new_tokens, temperature, top_k, top_p, key, stop_token, vocab):
  """The input rules of the options of `generate`."""
  for name, value, low, high in (
    ('max_new_tokens', max_new_tokens, 1, math.inf),
    ('top_k', top_k, 0, vocab),
    ('stop_token', stop_token, -1, vocab - 1),
  ):
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
      raise ValueError(f'{name}={value!r} must be an integer in {low} .. {high}')
  if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
    raise ValueError(f'temperature={temperature!r} must be a finite number, 0 or more')
  if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p!r} must lie above 0 and up to 1')
  if temperature > 0 and key is None:
    raise ValueError(f'temperature={temperature} needs a random key, got key=None')
