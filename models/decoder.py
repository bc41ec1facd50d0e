"""A decoder-only language model whose layers are named by data.

    model = Decoder(DecoderConfig(depth=4, layers=[LayerSpec(window=128), LayerSpec()]), rngs=nnx.Rngs(0))
    logits = model(tokens)                                    # training: the whole text
    cache = model.init_cache(batch=2, capacity=512)           # inference: a prompt, then token by token
    logits, cache = model.extend(prompt, None, cache)

No sharding is written here: parameters are placed from outside, by their paths, and everything else follows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn import masks
from models import adapters, experts, layers, mixers, sharding
from models.cache import ModelCache, Pending

# What `Decoder.features` can give of a layer: what its mixer reads (normed), what the mixer gives (before any norm),
# and the residual stream behind the layer.
FEATURES = ('inputs', 'mixed', 'outputs')


class Block(nnx.Module):
  """One layer: x + mixer(x), then x + mlp(x), each with an RMSNorm before it, after it, or both (config.norms)."""

  def __init__(self, spec, config, *, rngs):
    self.remat = spec.remat or config.remat
    norm = lambda is_there: layers.norm(config.width, config) if is_there else None
    self.mixer_norm, self.mlp_norm = (norm(config.norms != 'post') for _ in range(2))
    self.mixer_out_norm, self.mlp_out_norm = (norm(config.norms != 'pre') for _ in range(2))
    self.mixer = mixers.mixer(spec, config, rngs=rngs)
    self.mlp = experts.mlp(config, rngs=rngs)

  def __call__(self, x, state=None, positions=None, segment_ids=None):
    y, state = self.mixer.apply(self.mixer_input(x), state, positions=positions, segment_ids=segment_ids)
    return self._rest(x, y), state

  def look(self, x, state, pending, positions, mask):
    """As a call with a state, for tokens that are not stored: see `Decoder.look`."""
    y, pending = self.mixer.look(self.mixer_input(x), state, pending, positions=positions, mask=mask)
    return self._rest(x, y), pending

  def features(self, x, positions=None, segment_ids=None):
    """As a call without a state, and FEATURES of the layer."""
    inputs = self.mixer_input(x)
    mixed, _ = self.mixer.apply(inputs, None, positions=positions, segment_ids=segment_ids)
    outputs = self._rest(x, mixed)
    return outputs, {'inputs': inputs, 'mixed': mixed, 'outputs': outputs}

  def mixer_input(self, x):
    """What the mixer reads of the residual stream x."""
    return x if self.mixer_norm is None else self.mixer_norm(x)

  def _rest(self, x, y):
    x = x + (y if self.mixer_out_norm is None else self.mixer_out_norm(y))
    y = self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
    return x + (y if self.mlp_out_norm is None else self.mlp_out_norm(y))


class Decoder(nnx.Module):
  """Embedding, depth layers, norm, output projection.

  Parameter paths: embed.table, blocks.I.{mixer_norm,mixer_out_norm,mlp_norm,mlp_out_norm}.scale,
  blocks.I.mixer.{q,k,v,o}.{kernel,bias}, blocks.I.mixer.{q_norm,k_norm}.scale, blocks.I.mixer.sinks,
  blocks.I.mlp.{gate,up,down}.{kernel,bias} or blocks.I.mlp.router.{kernel,bias} and
  blocks.I.mlp.experts.{gate,up,down}.{kernel,bias}, norm.scale, head.kernel (if embeddings are not tied); lora_a and
  lora_b beside the kernel where a linear map has an adapter. I counts layers; with config.scan it counts the layers of
  the pattern, and parameters have the repeats on axis 0. Kernels are [in, out]. Both forms start from the same values.

  Token ids outside 0 .. vocab - 1 give NaN for the rest of their row: data must be checked before.

  Args:
    config: DecoderConfig; it is validated.
    rngs: nnx.Rngs.
  """

  def __init__(self, config, *, rngs):
    config.validate()
    self.dtype, self.scan = jnp.dtype(config.dtype), config.scan
    self.depth, self.pattern = config.depth, len(config.layers)
    self.soft_cap = config.logit_soft_cap
    self.has_chunks = any(spec.chunk for spec in config.layers)
    dtypes = {'dtype': config.dtype, 'param_dtype': config.param_dtype}
    self.embed = layers.Embed(
      config.vocab, config.width, scale=config.input_scale, std=config.width**-0.5, rngs=rngs, **dtypes
    )
    keys = jax.random.split(rngs.params(), config.depth)
    if config.scan:
      make = lambda i: nnx.vmap(lambda key: _block(config, range(i, config.depth, self.pattern), key))
      self.blocks = nnx.List([make(i)(keys[i :: self.pattern]) for i in range(self.pattern)])
    else:
      self.blocks = nnx.List([_block(config, [i], keys[i]) for i in range(config.depth)])
    self.norm = layers.norm(config.width, config)
    self.head = None if config.tied_embeddings else layers.Linear(config.width, config.vocab, rngs=rngs, **dtypes)
    if config.adapter_rank:
      if self.head is not None:
        adapters.attach(self.head, ['head'], config, jax.random.fold_in(keys[0], 1 << 17))
      adapters.check(self, config)

  def __call__(self, tokens, positions=None, segment_ids=None):
    """Logits [B, T, vocab], at least float32, of whole texts; see `hidden` for the arguments."""
    return self.logits(self.hidden(tokens, positions, segment_ids))

  def hidden(self, tokens, positions=None, segment_ids=None):
    """The normed residual stream before the output projection.

    Args:
      tokens: [B, T] int.
      positions: [T] or [B, T] int; None counts tokens from the start of the row (or of the segment: attention sees
        differences, and chunks are then counted within segments). Leave them out unless the text has gaps: what is
        hidden is then known before the program runs, and is not computed. Negative ones are padding.
      segment_ids: [B, T] int: tokens see only tokens of equal id, adjacent ones (packed documents).

    Returns:
      [B, T, E] in config.dtype.
    """
    check_tokens(tokens)
    positions = self._positions(positions, segment_ids)
    no_states = [()] * len(self.blocks)
    run = lambda block, x, _: (sharding.by_rows(block(x, None, positions, segment_ids)[0]), ())
    x, _ = self._layers(sharding.by_rows(self.embed(tokens)), no_states, run)
    return self.norm(x)

  def features(self, tokens, positions=None, segment_ids=None, *, layers, kinds=FEATURES):
    """As `hidden`, and what chosen layers read and give, in the same pass.

    Args:
      tokens, positions, segment_ids: as of `hidden`.
      layers: numbers of layers, 0 .. depth - 1.
      kinds: names in FEATURES.

    Returns:
      (hidden [B, T, E], {layer: {kind: [B, T, E]}}). A scanned decoder holds all layers of a place in the pattern if
      one of them is chosen.

    Raises:
      ValueError: a layer or a kind that is not there.
    """
    check_tokens(tokens)
    self._check_layers(layers)
    if unknown := [kind for kind in kinds if kind not in FEATURES]:
      raise ValueError(f'kinds={list(kinds)}: {unknown[0]!r} is unknown, expected of {", ".join(FEATURES)}')
    positions = self._positions(positions, segment_ids)

    def run(block, x, wanted):
      x, found = block.features(x, positions, segment_ids)
      return sharding.by_rows(x), {kind: found[kind] for kind in wanted}

    places = {i % len(self.blocks) for i in layers}
    wanted = [dict.fromkeys(kinds, ()) if place in places else {} for place in range(len(self.blocks))]
    x, found = self._layers(sharding.by_rows(self.embed(tokens)), wanted, run)
    return self.norm(x), {i: self._of_layer(found, i) for i in layers}

  def mixed(self, inputs, positions=None, segment_ids=None):
    """What the mixers of chosen layers make of given inputs, each for itself: {layer: [B, T, E]} -> the same.

    Of a scanned decoder, all layers of a place in the pattern are computed if one of them is chosen.
    """
    self._check_layers(inputs)
    positions = self._positions(positions, segment_ids)

    def run(block, nothing, x):
      is_chosen = not isinstance(x, tuple)
      apply = lambda: block.mixer.apply(x, None, positions=positions, segment_ids=segment_ids)[0]
      return nothing, apply() if is_chosen else ()

    def of_place(place):
      if not self.scan:
        return inputs.get(place, ())
      of_layers = [inputs.get(i) for i in range(place, self.depth, self.pattern)]
      some = next((x for x in of_layers if x is not None), None)
      return () if some is None else jnp.stack([jnp.zeros_like(some) if x is None else x for x in of_layers])

    _, found = self._layers((), [of_place(place) for place in range(len(self.blocks))], run)
    return {i: self._of_layer(found, i) for i in inputs}

  def logits(self, hidden):
    """[B, T, E] of `hidden` -> [B, T, vocab], at least float32."""
    out = self.embed.attend(hidden) if self.head is None else self.head(hidden, at_least_float32=True)
    return self.soft_cap * jnp.tanh(out / self.soft_cap) if self.soft_cap else out

  def init_cache(self, batch, capacity, slack=0, dtype=None):
    """An empty cache.

    Args:
      batch: B, rows.
      capacity: tokens a row may hold. A row that outgrows it gives NaN if some layer keeps all entries.
      slack: tokens that `ModelCache.rollback` may forget at once; 0 is enough for models without windows and chunks.
      dtype: of stored keys and values; None means config.dtype.
    """
    for name, value, least in (('batch', batch, 1), ('capacity', capacity, 1), ('slack', slack, 0)):
      if value < least:
        raise ValueError(f'{name}={value} must be at least {least}')
    init = lambda block: block.mixer.init_state(batch, capacity, dtype or self.dtype, slack)
    repeats = self.depth // self.pattern
    stack = lambda x: jnp.broadcast_to(x, (repeats, *x.shape))
    states = [jax.tree.map(stack, init(b)) if self.scan else init(b) for b in self.blocks]
    return ModelCache(
      layers=states,
      length=jnp.zeros(batch, jnp.int32),
      reach=jnp.zeros(batch, jnp.int32),
      capacity=capacity,
      slack=slack,
      is_local=any(getattr(state, 'is_ring', False) for state in states),
      is_scanned=self.scan,
    )

  def extend(self, tokens, positions, cache):
    """Logits of new tokens that follow those in the cache.

    Args:
      tokens: [B, n] int; n is any number: a prompt, a part of it, one token.
      positions: [B, n] int, increasing in each row; negative ones are padding. None means the next n positions.
      cache: ModelCache.

    Returns:
      (logits [B, n, vocab], ModelCache). Equal to those of the whole text at once. NaN where a token does not fit
      the capacity, and in rows that were rolled back by more than the slack.
    """
    hidden, cache = self.extend_hidden(tokens, positions, cache)
    return self.logits(hidden), cache

  def extend_hidden(self, tokens, positions, cache):
    """As `extend`, with the hidden state [B, n, E] in place of the logits."""
    check_tokens(tokens)
    if positions is None:
      positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    x, states = self._layers(self.embed(tokens), cache.layers, lambda block, x, state: block(x, state, positions))
    cache, is_good = cache.advance(states, positions)
    return jnp.where(is_good[:, None, None], self.norm(x), jnp.nan), cache

  def look(self, tokens, positions, cache, *, mask=None, pending=None):
    """As `extend_hidden`, but nothing is stored: for drafts, of which only a part will stay.

    The tokens may be the nodes of a tree: those at the same depth stand at the same position, and `mask` says which
    see each other. `cache.accept` then stores the path that is kept.

    Args:
      tokens: [B, n] int.
      positions: [B, n] int, none of which the cache holds; negative ones are padding.
      cache: ModelCache.
      mask: bool [n, m + n] or [B, n, m + n], True where a token may see one of the m pending tokens or of these (itself
        included); position rules of the layers hold too. None lets them see all that are not later than themselves.
      pending: what an earlier look on the same cache gave, of m tokens.

    Returns:
      (hidden [B, n, E], Pending of m + n tokens). NaN in rows that were rolled back by more than the slack, or that
      have accepted tokens beyond the capacity.

    Raises:
      ValueError: shapes that do not fit.
    """
    check_tokens(tokens)
    (B, n), m = tokens.shape, 0 if pending is None else pending.positions.shape[1]
    positions = jnp.asarray(positions, jnp.int32)
    if positions.shape != (B, n):
      raise ValueError(f'positions have shape {positions.shape}, expected {(B, n)} as tokens')
    mask = jnp.ones((n, m + n), bool) if mask is None else jnp.asarray(mask)
    if mask.shape not in ((n, m + n), (B, n, m + n)) or mask.dtype != bool:
      raise ValueError(f'mask is {mask.dtype} {mask.shape}, expected bool {(n, m + n)} or {(B, n, m + n)}')
    mask = jnp.broadcast_to(mask, (B, n, m + n))[:, None]
    states, everything = cache.layers, positions
    if pending is not None:
      states, everything = list(zip(states, pending.layers)), jnp.concatenate([pending.positions, positions], axis=1)
    pair = lambda state: state if pending is not None else (state, None)
    look = lambda block, x, state: block.look(x, *pair(state), everything, mask)
    x, entries = self._layers(self.embed(tokens), states, look)
    is_good = cache.can_see(positions)
    return jnp.where(is_good[:, None, None], self.norm(x), jnp.nan), Pending(entries, everything)

  def layer(self, i):
    """The Block of layer i = 0 .. depth - 1, also of a scanned decoder (then a copy)."""
    if not 0 <= i < self.depth:
      raise ValueError(f'layer={i} must lie in 0 .. {self.depth - 1}')
    if not self.scan:
      return self.blocks[i]
    graph, params = nnx.split(self.blocks[i % self.pattern])
    return nnx.merge(graph, jax.tree.map(lambda x: x[i // self.pattern], params))

  def attention_map(self, tokens, layer):
    """Attention probabilities [B, H, T, T] of one layer, for pictures: O(T^2) memory. Rows sum to 1, less the sink.

    Tokens stand in their order, and any number of them will do, also on a mesh that cuts rows along their length.
    """
    check_tokens(tokens)
    mixer = self.layer(layer).mixer
    if not isinstance(mixer, mixers.Attention):
      raise ValueError(f'layer={layer} is {type(mixer).__name__}, expected a layer with attention weights')
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # the layers below need not divide T
      return _attention_map(*nnx.split(self), tokens, layer)

  def _positions(self, positions, segment_ids):
    """Positions for whole texts: chunks are counted within segments."""
    is_restarted = positions is None and segment_ids is not None and self.has_chunks
    return restart(segment_ids) if is_restarted else positions

  def _check_layers(self, layers):
    if wrong := [i for i in layers if not 0 <= i < self.depth]:
      raise ValueError(f'layers={list(layers)}: expected numbers in 0 .. {self.depth - 1}, got {wrong[0]}')

  def _of_layer(self, found, i):
    """Layer i's part of the list that `_layers` gave."""
    return jax.tree.map(lambda x: x[i // self.pattern], found[i % self.pattern]) if self.scan else found[i]

  def _layers(self, x, states, run):
    """All blocks, one by one or scanned over the repeats of the pattern.

    Args:
      x: [B, T, E].
      states: a pytree for each of self.blocks.
      run: (block, x, its state) -> (x, what becomes of the state).

    Returns:
      (x, list of what became of the states).
    """
    if not self.scan:
      new = []
      for block, state in zip(self.blocks, states):
        x, state = self._remat(block.remat, *nnx.split(block), run)(x, state)
        new.append(state)
      return x, new
    graphs, params = zip(*(nnx.split(block) for block in self.blocks))

    remats = [block.remat for block in self.blocks]

    def repeat(x, slices):
      new = []
      for remat, graph, param, state in zip(remats, graphs, *slices):
        x, state = self._remat(remat, graph, param, run)(x, state)
        new.append(state)
      return x, new

    return jax.lax.scan(repeat, x, (list(params), states))

  def _remat(self, remat, graph, params, run):
    """The block as a function of (x, state), whose backward pass keeps what `remat` says."""
    apply = lambda params, *args: run(nnx.merge(graph, params), *args)
    if remat != 'none':
      apply = jax.checkpoint(apply, policy=POLICIES[remat], prevent_cse=not self.scan)
    return lambda *args: apply(params, *args)


def _block(config, places, key):
  """The Block of a layer, or of several that a scan stacks."""
  made = Block(config.spec(places[0]), config, rngs=layers.Keys(key))
  adapters.attach(made, [f'blocks.{i}' for i in places], config, key)
  return made


@functools.partial(jax.jit, static_argnames=('graph', 'layer'))
def _attention_map(graph, state, tokens, layer):
  model = nnx.merge(graph, state)
  x = model.embed(tokens)
  for i in range(layer):
    x, _ = model.layer(i)(x)
  last = model.layer(layer)
  return last.mixer.weights(last.mixer_input(x))


POLICIES = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'attention': jax.checkpoint_policies.save_only_these_names(*mixers.CHECKPOINT_NAMES),
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(*mixers.CHECKPOINT_NAMES),
  ),
}


def restart(segment_ids):
  """[B, T] ids -> [B, T] int32 positions counted from the start of each run of equal ids; numpy for numpy."""
  is_host = isinstance(segment_ids, np.ndarray)
  xp, running_max = (np, np.maximum.accumulate) if is_host else (jnp, jax.lax.cummax)
  index = xp.arange(segment_ids.shape[1], dtype=np.int32)
  is_start = xp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
  return index - running_max(xp.where(is_start, index, 0), axis=1)


def layer_masks(config, T):
  """What each layer may see: a list of depth bool arrays [T, T], True where query t (row) sees key s."""
  of = lambda spec: np.asarray(masks.dense(mixers.mask(spec.window, spec.chunk), T))[0, 0]
  return [of(config.spec(i)) for i in range(config.depth)]


def check_tokens(tokens):
  """The input rules of token arrays that do not depend on values."""
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f'tokens are {tokens.dtype} {tokens.shape}, expected integers [B, T]')
