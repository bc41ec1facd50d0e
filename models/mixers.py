"""Mixers: the part of a layer that moves information between tokens.

A mixer is constructed as MIXERS[name](spec, config, rngs=...) and has two calls:

    state = mixer.init_state(batch, capacity, dtype, slack=0)
    y, state = mixer.apply(x, state, positions=positions, segment_ids=None)

x [B, T, E] is the layer's normed input and T any number: a text, a prompt, a chunk of it, one token. With state None
the T tokens are the whole text (training). A state is a pytree whose arrays begin with the batch axis, with a method
`rollback(length [B])`; `slack` tokens may be rolled back.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attn import distributed, masks, positions as attn_positions, softmax
from attn.cache import storage
from models import layers

CHECKPOINT_NAMES = ('attn_out', 'attn_lse')  # what a remat policy may keep of attention


class Attention(nnx.Module):
  """Causal softmax attention, grouped heads, rotary positions, optionally within a window or a chunk.

  On a mesh (of jax.set_mesh) that cuts rows along their length, by an axis `context`, whole texts go through
  `attn.distributed.ring`. With a state nothing changes.
  """

  def __init__(self, spec, config, *, rngs):
    H, K, D = config.heads, config.K, config.D
    linear = functools.partial(layers.Linear, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
    has_bias = config.attn_bias != ''
    self.heads, self.kv_heads, self.head_dim = H, K, D
    self.window, self.chunk, self.rotary = spec.window, spec.chunk, spec.rotary()
    self.scale = config.attn_scale or D**-0.5
    self.soft_cap = config.attn_soft_cap or None
    self.implementation = config.implementation or None
    self.q = linear(config.width, H * D, has_bias=has_bias)
    self.k = linear(config.width, K * D, has_bias=has_bias)
    self.v = linear(config.width, K * D, has_bias=has_bias)
    out_std = (2 * config.depth * H * D) ** -0.5
    self.o = linear(H * D, config.width, has_bias=config.attn_bias == 'qkvo', std=out_std)
    self.norms_heads = config.qk_norm == 'head'
    norm = lambda heads: layers.norm(D if self.norms_heads else heads * D, config)
    self.q_norm = norm(H) if config.qk_norm else None
    self.k_norm = norm(K) if config.qk_norm else None
    self.sinks = nnx.Param(jnp.zeros(H, config.param_dtype)) if config.sinks else None

  @property
  def lookback(self):
    """Tokens a query may see before itself; 0 also where there is no limit (`is_local` tells)."""
    return min(x for x in (self.window, self.chunk) if x) - 1 if self.is_local else 0

  @property
  def is_local(self):
    """Whether a window or a chunk limits what a query sees."""
    return bool(self.window or self.chunk)

  def mask(self):
    """What a query may see, by position."""
    return mask(self.window, self.chunk)

  def init_state(self, batch, capacity, dtype, slack=0):
    """An empty cache for texts of up to `capacity` tokens; local layers keep a ring of lookback + slack + 1."""
    ring = self.lookback + slack + 1
    is_ring = self.is_local and ring < capacity
    slots = ring if is_ring else capacity
    kind = {'is_ring': is_ring, 'has_spare': is_ring}
    return storage.init(batch, slots, self.kv_heads, self.head_dim, dtype=dtype, **kind)

  def apply(self, x, state, *, positions=None, segment_ids=None):
    """Mixes x [B, T, E]; see the module's docstring. positions [T] or [B, T]; None means 0..T-1 (no state)."""
    q, k, v = self.project(x, positions)
    options = self._options()
    if state is None:
      # Where the mesh cuts rows along their length, keys travel; the order of the tokens is that of `positions`.
      attend = distributed.ring if distributed.parts() > 1 else softmax.attend
      out = attend(q, k, v, positions=positions, segment_ids=segment_ids, **options)
    elif segment_ids is not None:
      raise ValueError('segment_ids with a cache: a row of a cache holds one text, expected None')
    else:
      out, state = storage.attend(q, k, v, state, positions, **options)
    return self.o(out.reshape(*x.shape[:2], -1)), state

  def look(self, x, state, pending, *, positions, mask):
    """As `apply` with a state, but nothing is stored.

    Args:
      x: [B, n, E].
      state: of `init_state`.
      pending: None, or the pair of m tokens of an earlier look.
      positions: [B, m + n], of the pending tokens and these; negative is padding.
      mask: [B or 1, 1, n, m + n] bool, which of the pending tokens and of these a token may see, if the layer's own
        mask by position allows it too.

    Returns:
      (y [B, n, E], pending: keys and values of the m + n tokens, for another look or `storage.append`).
    """
    q, k, v = self.project(x, positions[:, -x.shape[1] :])
    if pending is not None:
      k, v = (jnp.concatenate([old, new], axis=1) for old, new in zip(pending, (k, v)))
    out = storage.peek(q, k, v, state, positions, among=mask, **self._options())
    return self.o(out.reshape(*x.shape[:2], -1)), (k, v)

  def _options(self):
    """What every form of attention is told."""
    return {
      'mask': self.mask(),
      'scale': self.scale,
      'soft_cap': self.soft_cap,
      'sinks': None if self.sinks is None else self.sinks[...],
      'implementation': self.implementation,
    }

  def weights(self, x):
    """Attention probabilities [B, H, T, T] of a whole text x [B, T, E], spelled out."""
    q, k, _ = self.project(x)
    acc = jnp.promote_types(q.dtype, jnp.float32)
    k = jnp.repeat(k, self.heads // self.kv_heads, axis=2)
    s_BHTS = jnp.einsum('bthd,bshd->bhts', q, k, preferred_element_type=acc) * self.scale
    if self.soft_cap:
      s_BHTS = self.soft_cap * jnp.tanh(s_BHTS / self.soft_cap)
    s_BHTS = jnp.where(masks.dense(self.mask(), x.shape[1]), s_BHTS, -jnp.inf)
    if self.sinks is None:
      return jax.nn.softmax(s_BHTS, axis=-1)
    sinks = jnp.broadcast_to(self.sinks[...].astype(acc)[:, None, None], (*s_BHTS.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([s_BHTS, sinks], axis=-1), axis=-1)[..., :-1]

  def project(self, x, positions=None):
    """x [B, T, E] -> q [B, T, H, D], k and v [B, T, K, D], normed and rotated as attention takes them."""
    split = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
    q, k, v = self.q(x), self.k(x), split(self.v(x))
    if self.q_norm is None or self.k_norm is None:
      q, k = split(q), split(k)
    elif self.norms_heads:
      q, k = self.q_norm(split(q)), self.k_norm(split(k))
    else:
      q, k = split(self.q_norm(q)), split(self.k_norm(k))
    if self.rotary is not None:
      positions = jnp.arange(x.shape[1]) if positions is None else positions
      q, k = (attn_positions.rotate(y, positions, self.rotary) for y in (q, k))
    return q, k, v


def mask(window=0, chunk=0):
  """Causal, within a window (tokens, self included) and a chunk; 0 means no limit."""
  seen = masks.causal()
  if window:
    seen &= masks.window(window - 1)
  if chunk:
    seen &= masks.chunked(chunk)
  return seen


MIXERS = {'attention': Attention}


def mixer(spec, config, *, rngs):
  """The mixer that `spec` names; an unknown name is a ValueError that lists the known ones."""
  if spec.mixer not in MIXERS:
    raise ValueError(f'mixer={spec.mixer!r} is unknown, expected one of {", ".join(map(repr, MIXERS))}')
  return MIXERS[spec.mixer](spec, config, rngs=rngs)
