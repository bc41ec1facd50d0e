"""Attention functions for other people's modules: `flax_attention_fn` for both of Flax's attention modules.

    near = flax_attention_fn('sliding_window', mask=masks.causal() & masks.window(255))
    layer = nnx.MultiHeadAttention(8, 512, attention_fn=near, rngs=rngs)

Nothing of Flax is imported here. In a module:

- A mask of the module, one among the settings, and is_causal hide what either hides. Masks of Flax are floating
  point by default: 0 hides and 1 does not. Any other number is refused, as what is added to logits (0 and -1e9) is a
  bias; where the values are not known yet, in jax.jit, it makes the output NaN. A query that sees nothing gives
  zeros, where Flax gives the mean of all values.
- What goes by position (is_causal, a mask of predicates, a score, a window) counts queries and keys from 0. So it
  is refused where the queries are not as many as the keys, in decoding with Flax's cache above all: one query and
  all slots, and nothing says where the query stands. There give the module a mask instead: that of the cache is
  causal. With `positions` among the settings it is as they say.
- Dropout is that of softmax.attend, which draws each entry by itself: broadcast_dropout=True (one pattern for all
  rows and heads, the default of Flax) is refused, set it to False on the module.
- Key heads may be fewer than query heads. Any number of batch axes.
"""

import difflib
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np

from attn import masks, softmax
from attn.masks import sequence

# What the module decides at each call, and what an attention_fn must not return.
_OF_THE_CALL = {
  'dropout_rate': 'the dropout_rate of the module',
  'dropout_key': "the module's own random stream",
  'return_residual': 'the function itself, outside of a module',
}
_BY_POSITION = ('is_causal', 'mask', 'score', 'local_window_size')


def flax_attention_fn(method='softmax', **settings):
  """An attention_fn for nnx.MultiHeadAttention and linen's nn.MultiHeadDotProductAttention.

  It has exactly the parameters that the two of them know. (linen hands over only what the signature names: a function
  of **keywords gets no mask there, and nothing says so.) It may be wrapped by functools.partial, or by jax.jit with
  every parameter from `broadcast_dropout` on static, `dropout_rng` apart. What it does with masks, positions and
  dropout is said at the head of this file.

  Args:
    method: a function (q [B, T, H, D], k [B, S, K, D], v [B, S, K, V], **options) -> [B, T, H, V], as softmax.attend or
      jax.nn.dot_product_attention; or the name of a method of the catalog. Of its record only the settings that make
      it what it is (is_causal) are taken over, sizes (a mask, a number of runs) are to be given.
    **settings: keywords of the function, bound here.

  Returns:
    attention_fn(query, key, value, bias=None, mask=None, broadcast_dropout=True, dropout_rng=None, dropout_rate=0.0,
    deterministic=True, dtype=None, precision=None, module=None, is_causal=False) -> [..., T, H, V].

  Raises:
    ValueError: here: no such method, one that does not take q, k and v alone, a setting that it does not know or that
      it needs; in the call: anything the function has no parameter for (mask, bias, precision, dropout), module (the
      weights that it would store are never formed), what goes by position where T != S, a traced flag or dropout_rate.
  """
  function, settings = _bound(method, settings)
  takes = _Parameters(function)

  def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=True,
    dtype=None,
    precision=None,
    module=None,
    is_causal=False,
  ):
    if module is not None:
      raise ValueError('module: attention weights cannot be stored (sow_weights), they are never formed')
    dropout = {'dropout_rate': dropout_rate, 'deterministic': deterministic, 'broadcast_dropout': broadcast_dropout}
    _check_static(is_causal=is_causal, **dropout)
    query, key, value = _promoted(query, key, value, dtype=dtype)
    batch = query.shape[:-3]
    mask, is_sound = _as_bool(mask)
    bound = settings | ({'is_causal': True} if is_causal else {})
    _check_places(bound, query.shape[-3], key.shape[-3])
    given = {'bias': _flat('bias', bias, batch), 'precision': precision, **_dropout(dropout_rng, **dropout)}
    options = bound | _hiding(_flat('mask', mask, batch), settings) | _new(given, settings)
    for name in options:
      if name not in takes:
        raise ValueError(f'{name} cannot be honoured: {takes.name} has no such parameter')
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    out = function(q, k, v, **options)
    out = out if is_sound is None else jnp.where(is_sound, out, jnp.nan)
    return out.reshape(*batch, *out.shape[1:])

  return attention_fn


def _bound(method, settings):
  """(function of q, k and v, its keywords), checked."""
  name, needed = method, {}
  if isinstance(method, str):
    from attn import catalog

    record = catalog.get(method)
    if tuple(record.inputs)[:3] != ('q', 'k', 'v'):
      raise ValueError(f'method={name!r} takes {" and ".join(record.inputs)}, not q, k and v: it is no attention_fn')
    if record.call is not None:
      raise ValueError(f'method={name!r} is called as {record.usage}: give that function, with its keywords')
    method = record.function()
    # What tests work with, a window of 4 for instance, is nothing to train with.
    own = {key: x for key, x in record.settings.items() if isinstance(x, bool | str)}
    needed = dict.fromkeys((*(x for x in record.settings if x not in own), *tuple(record.inputs)[3:]), record.usage)
    settings = own | settings
  while isinstance(method, functools.partial) and not method.args:
    method, settings = method.func, method.keywords | settings
  if not callable(method):
    raise ValueError(f'method={method!r} is neither a name of the catalog nor a function of q, k and v')
  takes = _Parameters(method)
  name = name if isinstance(name, str) else takes.name
  for key in settings:
    if key in _OF_THE_CALL:
      raise ValueError(f'{key} is no setting of an attention_fn: it comes from {_OF_THE_CALL[key]}')
    if key not in takes:
      near = difflib.get_close_matches(key, takes.names, n=1, cutoff=0.5)
      hint = f'did you mean {near[0]}?' if near else f'expected one of {", ".join(takes.names)}'
      raise ValueError(f'{key} is not a setting of {name}: {hint}')
  for key in (*needed, *takes.required):
    if key not in settings:
      raise ValueError(f'{name} needs {key}' + (f', as in {needed[key]}' if key in needed else ''))
  return method, settings


class _Parameters:
  """Names of the keywords that a function takes after q, k and v."""

  def __init__(self, function):
    parameters = list(inspect.signature(function).parameters.values())
    self.name = getattr(function, '__qualname__', repr(function))
    if sum(x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD) for x in parameters) < 3:
      has = ', '.join(x.name for x in parameters)
      raise ValueError(f'method={self.name} has the parameters {has}, expected q, k and v first')
    named = [x for x in parameters[3:] if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)]
    self.required = [x.name for x in named if x.default is x.empty]
    self.names = [x.name for x in named]
    is_open = any(x.kind is x.VAR_KEYWORD for x in parameters)
    is_ours = (getattr(function, '__module__', None) or '').startswith('attn.')
    if is_open and is_ours:  # ours hand what they do not name to softmax.attend
      self.names += [x for x in _Parameters(softmax.attend).names if x not in self.names]
    self.takes_all = is_open and not is_ours

  def __contains__(self, name):
    return self.takes_all or name in self.names


def _hiding(mask, settings):
  """The keyword that hides what the module hides, with what the mask among the settings does."""
  mine = settings.get('mask')
  if mask is None:
    return {}
  if mine is None:
    return {'mask': mask}
  return {'mask': mine & (masks.array(mask) if isinstance(mine, masks.Mask) else mask)}


def _new(given, settings):
  """What is not None of that which comes with the call."""
  for name, x in given.items():
    if x is not None and settings.get(name) is not None:
      raise ValueError(f'{name} is among the settings and in the call: give it once')
  return {name: x for name, x in given.items() if x is not None}


def _dropout(key, *, dropout_rate, deterministic, broadcast_dropout):
  if not dropout_rate or deterministic:
    return {}
  if broadcast_dropout:
    raise ValueError('broadcast_dropout=True: every entry is drawn by itself, set broadcast_dropout=False')
  return {'dropout_rate': dropout_rate, 'dropout_key': key}


def _as_bool(mask):
  """(the mask as bool, whether its numbers are all 0 or 1): None for what need not be asked when the program runs."""
  if mask is None or mask.dtype == bool:
    return mask, None
  if isinstance(mask, jax.core.Tracer):
    return mask.astype(bool), jnp.all((mask == 0) | (mask == 1))
  values = np.asarray(mask)
  if not ((values == 0) | (values == 1)).all():
    low, high = float(values.min()), float(values.max())
    raise ValueError(f'mask has values from {low} to {high}, expected 0 and 1: what is added is a bias')
  return values.astype(bool), None


def _check_static(**flags):
  for name, x in flags.items():
    if isinstance(x, jax.core.Tracer):
      raise ValueError(f'{name} is traced, expected a Python value: jax.jit needs static_argnames={name!r}')


def _check_places(settings, T, S):
  """ValueError for what goes by position where that of the queries is not known."""
  if T == S or settings.get('positions') is not None:
    return
  for name in _BY_POSITION:
    x = settings.get(name)
    is_by_index = name == 'mask' and not (isinstance(x, masks.Mask) and not isinstance(x, sequence.Array))
    if x is None or x is False or is_by_index:
      continue
    raise ValueError(
      f'{name} goes by position, and where T={T} queries stand among S={S} keys (a cache of Flax?) is not known: '
      "expected as many queries as keys; in decoding leave it to the module's own mask"
    )


def _promoted(*arrays, dtype):
  dtype = jnp.result_type(*arrays) if dtype is None else dtype
  arrays = tuple(jnp.asarray(x, dtype) for x in arrays)
  for name, x in zip(('query', 'key', 'value'), arrays):
    if x.ndim < 3 or x.shape[:-3] != arrays[0].shape[:-3]:
      shapes = ', '.join(str(x.shape) for x in arrays)
      raise ValueError(f'{name} does not fit: shapes are {shapes}, expected [..., tokens, heads, width] each')
  return arrays


def _flat(name, x, batch):
  """x [..., H, T, S], whose leading axes broadcast to batch, with one batch axis."""
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.ndim <= 3 or (len(batch) == 1 and x.ndim == 4):
    return x
  if x.ndim - 3 > len(batch) or any(n not in (1, m) for n, m in zip(x.shape[-4::-1], batch[::-1])):
    raise ValueError(f'{name} has shape {x.shape}, expected one that broadcasts to {batch} and [heads, queries, keys]')
  return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(math.prod(batch), *x.shape[-3:])
