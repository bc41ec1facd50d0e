"""What the next token is drawn from: a Sampling turns logits into log-probabilities, `draw` takes a token."""

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen, a pytree whose numbers are leaves: a program is compiled once per `kind`, not per number.

  Applied in this order: repetition penalty, temperature, top-k, top-p of what is left, min-p.

  Attributes:
    temperature: divides the logits, 1e-30 .. 1e30; 0 takes the most likely token (the lowest of equals) and needs no
      filter.
    top_k: keep the top_k most likely tokens; 0 means all.
    top_p: keep the smallest set of most likely tokens whose probabilities sum to top_p or more; 1 means all.
    min_p: keep tokens of at least min_p times the probability of the most likely one; 0 means all.
    repetition_penalty: positive logits of tokens in the prompt or the new text are divided by it, negative ones
      multiplied; 1e-9 .. 1e9, 1 means none. It holds for temperature 0 too.
    kind: what is on, as a static part of the pytree; follows from the numbers and is not to be given.

  Source: top-k arXiv:1805.04833; top-p arXiv:1904.09751; min-p arXiv:2407.01082; repetition penalty arXiv:1909.05858
  section 4.1, for negative logits as in Hugging Face's transformers.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  kind: tuple[str, ...] = dataclasses.field(default=(), repr=False, metadata={'static': True})

  def __post_init__(self):
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != 'kind'}
    strange = [name for name, value in values.items() if not isinstance(value, numbers.Real)]
    if strange and not self.kind:
      raise ValueError(f'{strange[0]}={values[strange[0]]!r} must be a number of Python or NumPy')
    if strange:
      return  # traced, or the stand-ins that JAX puts into pytrees: the kind came along
    for name, value in values.items():  # one type each, or a program would be compiled for every one
      if not isinstance(value, bool) and (name != 'top_k' or isinstance(value, numbers.Integral)):
        object.__setattr__(self, name, _plain(name, value))
    choice = 'greedy' if self.temperature == 0 else 'plain'
    if self.temperature != 0 and (self.top_k != 0 or self.top_p != 1 or self.min_p != 0):
      choice = 'filtered'
    object.__setattr__(self, 'kind', (choice, *(['penalty'] if self.repetition_penalty != 1 else [])))

  @property
  def is_greedy(self):
    """Whether the most likely token is taken."""
    return 'greedy' in self.kind

  @property
  def has_penalty(self):
    """Whether earlier tokens count."""
    return 'penalty' in self.kind

  def check(self, vocab):
    """ValueError unless every number is in its range; vocab is the number of tokens."""
    top_k = self.top_k
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or not 0 <= top_k <= vocab:
      raise ValueError(f'top_k={top_k!r} must be an integer in 0 .. {vocab}')
    for name, is_good, expected in (
      # Far from where float32 ends: there 0 * inf would make NaN of tokens that are cut.
      ('temperature', lambda x: x == 0 or 1e-30 <= x <= 1e30, '0 or in 1e-30 .. 1e30'),
      ('top_p', lambda x: 0 < x <= 1, 'above 0 and up to 1'),
      ('min_p', lambda x: 0 <= x <= 1, 'between 0 and 1'),
      ('repetition_penalty', lambda x: 1e-9 <= x <= 1e9, 'in 1e-9 .. 1e9'),
    ):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, numbers.Real) or not is_good(value):
        raise ValueError(f'{name}={value!r} must be {expected}')


def _plain(name, value):
  """The number `name` as Python's float, or int if it is top_k."""
  try:
    return int(value) if name == 'top_k' else float(value)
  except OverflowError:
    raise ValueError(f'{name} has more digits than a float can hold') from None


GREEDY = Sampling()


def adjusted(logits, sampling, seen=None):
  """The distribution that `sampling` draws from.

  Args:
    logits: [..., V]; -inf is a token that cannot be drawn.
    sampling: Sampling.
    seen: [..., V] bool, the tokens so far; needed with a repetition penalty, otherwise not read.

  Returns:
    [..., V] normalised log-probabilities, at least float32; -inf where cut. Of temperature 0: 0 for the most likely
    token and -inf for all others. Ties go to the lower index; min-p keeps all of equal tokens.

  Raises:
    ValueError: a repetition penalty without `seen`.
  """
  logits = penalised(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), sampling, seen)
  if sampling.is_greedy:
    is_best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(is_best, jnp.zeros_like(logits), -jnp.inf)
  logits = tempered(logits, sampling.temperature)
  if 'filtered' in sampling.kind:
    logits = jnp.where(kept(logits, sampling.top_k, sampling.top_p, sampling.min_p), logits, -jnp.inf)
  return jax.nn.log_softmax(logits, axis=-1)


def draw(keys, logp):
  """One token per row: random keys [B] and log-probabilities [B, V] -> int32 [B]. Each row is a matter of its key."""
  return jax.vmap(jax.random.categorical)(keys, logp).astype(jnp.int32)


def checked_key(key, sampling):
  """The random key to draw with, typed; None if nothing is drawn.

  Raises:
    ValueError: no key, more than one, or one of a generator whose numbers depend on the batch.
  """
  if sampling.is_greedy:
    return None
  if key is None:
    raise ValueError(f'temperature={sampling.temperature} needs a random key, got key=None')
  is_typed = jnp.issubdtype(getattr(key, 'dtype', np.dtype(object)), jax.dtypes.prng_key)
  key = key if is_typed else np.asarray(key)
  is_known = str(jax.random.key_impl(key)) == 'threefry2x32' if is_typed else key.dtype == np.uint32
  if not is_known or key.shape != (() if is_typed else (2,)):  # (2,): the data of a key, as of jax.random.PRNGKey
    raise ValueError(
      f'key is {key.dtype} {key.shape}, expected one key of jax.random.key(seed), threefry2x32: the numbers of other '
      'generators depend on the batch'
    )
  return key if is_typed else jax.random.wrap_key_data(key, impl='threefry2x32')


def penalised(logits, sampling, seen):
  """Logits [..., V] after the repetition penalty on the tokens in seen [..., V]."""
  if not sampling.has_penalty:
    return logits
  if seen is None:
    raise ValueError('seen=None: a repetition penalty needs the tokens so far, expected bool [..., V]')
  penalty = sampling.repetition_penalty
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def tempered(logits, temperature):
  """logits / temperature up to a constant a row, without overflow: the largest is 0, however low the temperature."""
  below = logits - jnp.max(logits, axis=-1, keepdims=True)
  return below / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)


def kept(logits, top_k=0, top_p=1.0, min_p=0.0):
  """Which tokens top-k, then top-p, then min-p leave: logits [..., V] -> bool. Ties go to the lower index.

  All three leave the first n of the tokens in falling order, so that one sort of the values finds the last one kept.
  """
  V = logits.shape[-1]
  falling = -jnp.sort(-logits, axis=-1)
  in_k = jnp.arange(V) < jnp.where(top_k > 0, top_k, V)
  p = jax.nn.softmax(jnp.where(in_k, falling, -jnp.inf), axis=-1)
  before = jnp.cumsum(p, axis=-1) - p
  in_p = (before < top_p) | (top_p >= 1)  # rounding in the sum must not cut the tail when nothing is to be cut
  in_min = jnp.exp(falling - falling[..., :1]) >= min_p
  n = jnp.maximum(jnp.sum(in_k & in_p & in_min, axis=-1, keepdims=True), 1)  # a top_p that rounds to 0 keeps one too
  last = jnp.take_along_axis(falling, n - 1, axis=-1)
  is_above, is_equal = logits > last, logits == last
  of_equals = n - jnp.sum(is_above, axis=-1, keepdims=True)
  return is_above | (is_equal & (jnp.cumsum(is_equal, axis=-1) <= of_equals))


@functools.partial(jax.jit, static_argnames=('rows', 'samples'))
def row_keys(key, rows, samples):
  """Random keys [R]: of row r by prompt r // samples and sample r % samples."""
  of_row = lambda r: jax.random.fold_in(jax.random.fold_in(key, r // samples), r % samples)
  return jax.vmap(of_row)(jnp.arange(rows))
