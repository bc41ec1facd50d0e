"""Records of exact softmax attention."""

import functools

import jax.numpy as jnp
import numpy as np

from attn import softmax
from attn.cache import storage
from attn.catalog import oracles
from attn.catalog.method import Input, Limit, Method, State
from attn.masks import causal, chunked, dilated, prefix, window

FORMS = {
  'reference': {'implementation': 'reference'},
  'xla': {'implementation': 'xla', 'blocks': softmax.Blocks(q=8, kv=4)},
}
QKV = {'q': Input('BTHD'), 'k': Input('BSKD'), 'v': Input('BSKV')}


def _init(batch, capacity, sizes, dtype):
  return storage.init(batch, capacity, sizes['K'], sizes['D'], sizes['V'], dtype)


def _init_ring(batch, capacity, sizes, dtype):
  return storage.init(batch, capacity, sizes['K'], sizes['D'], sizes['V'], dtype, is_ring=True)


def _extend(q, k, v, state, positions, **options):
  return storage.attend(q, k, v, state, positions, **options)


CACHE = State(_init, _extend)


def _in_chunks(q, k, v, *, chunk, lengths=None, return_residual=False, **options):
  """A text through an empty cache, `chunk` tokens a call."""
  for name, x in (('q', q), ('k', k), ('v', v)):
    if x.ndim != 4 or x.shape[:2] != q.shape[:2]:
      raise ValueError(f'{name} has shape {x.shape}, expected 4 axes and {q.shape[:2]} tokens')
  B, T, K, D = k.shape
  slots = storage.init(B, T, K, D, v.shape[3], k.dtype)
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  positions = positions if lengths is None else jnp.where(positions < lengths[:, None], positions, -1)
  parts = []
  for i in range(0, T, chunk):
    new = slice(i, i + chunk)
    part, slots = storage.attend(
      q[:, new], k[:, new], v[:, new], slots, positions[:, new], return_residual=True, **options
    )
    parts.append(part)
  out, lse = (jnp.concatenate(x, axis=1) for x in zip(*parts))
  return (out, lse) if return_residual else out


def _lengths(lengths, T):
  return {'query_seq_lengths': lengths, 'key_value_seq_lengths': lengths}


def _record(name, title, paper, authors, *, oracle=None, **fields) -> Method:
  """A record of softmax.attend; `oracle` are keywords of the family's oracle."""
  fields.setdefault('entry', 'attn.softmax.attend')
  fields.setdefault('forms', FORMS)
  fields.setdefault('inputs', QKV)
  fields.setdefault('lengths', _lengths)
  oracle = functools.partial(oracles.softmax, **(oracle or {}))
  return Method(name, title, 'exact', paper, authors, oracle=oracle, has_lse=True, **fields)


def _until(i, j):
  return j <= i


METHODS = (
  _record(
    'softmax',
    'Softmax attention',
    'arXiv:1706.03762',
    'Vaswani et al. 2017',
    idea='Every query averages all values, weighted by the softmax of its dot products with the keys.',
    formula='out[t] = sum_s p[t,s] v[s],   p[t,:] = softmax_s(q[t] . k[s] / sqrt(D))',
    cost='O(T S (D + V)) time; O(T + S) memory with tiles',
    usage='softmax.attend(q, k, v)',
    sizes={'K': 4},
    limits={
      'one key: its value': Limit(lambda q, k, v: np.repeat(v, q.shape[1], axis=1), sizes={'S': 1}),
      'keys of zero: the mean of the values': Limit(
        lambda q, k, v: np.broadcast_to(v.mean(1, keepdims=True), v.shape), inputs={'k': np.zeros_like}
      ),
    },
  ),
  _record(
    'causal',
    'Causal softmax attention',
    'arXiv:1706.03762',
    'Vaswani et al. 2017',
    idea='Softmax attention to the past and present alone, as decoders need it.',
    formula='out[t] = sum_{s <= t} p[t,s] v[s],   p[t,:] = softmax_{s <= t}(q[t] . k[s] / sqrt(D))',
    cost='O(T^2 (D + V)) time, half of it skipped; O(T) memory; a cache of (D + V) K numbers a token',
    usage='softmax.attend(q, k, v, is_causal=True)',
    settings={'is_causal': True},
    oracle={'allowed': _until},
    is_causal=True,
    reach=(None, 0),
    sizes={'K': 4},
    state=CACHE,
    limits={'one token: its value': Limit(lambda q, k, v: v, sizes={'T': 1, 'S': 1})},
  ),
  _record(
    'multi_query',
    'Multi-query attention',
    'arXiv:1911.02150',
    'Shazeer 2019',
    idea='All query heads share one key head and one value head: the cache is H times smaller.',
    formula='out[t,h] = sum_{s <= t} softmax_{s <= t}(q[t,h] . k[s] / sqrt(D)) v[s]',
    cost='time of causal attention; a cache of D + V numbers a token',
    usage='softmax.attend(q, k, v, is_causal=True)  # k, v [B, S, 1, D]',
    settings={'is_causal': True},
    oracle={'allowed': _until},
    is_causal=True,
    reach=(None, 0),
    sizes={'K': 1},
    state=CACHE,
    limits={'one query head: causal attention': Limit('causal', sizes={'H': 1, 'K': 1})},
  ),
  _record(
    'grouped_query',
    'Grouped-query attention',
    'arXiv:2305.13245',
    'Ainslie et al. 2023',
    idea='G neighbouring query heads share a key head: between multi-head and multi-query.',
    formula='out[t,h] = sum_{s <= t} softmax_{s <= t}(q[t,h] . k[s,h // G] / sqrt(D)) v[s,h // G],   G = H / K',
    cost='time of causal attention; a cache of (D + V) K numbers a token',
    usage='softmax.attend(q, k, v, is_causal=True)  # k, v [B, S, K, D], K divides H',
    settings={'is_causal': True},
    oracle={'allowed': _until},
    is_causal=True,
    reach=(None, 0),
    state=CACHE,
    limits={
      'G = 1: causal attention': Limit('causal', sizes={'K': 4}),
      'G = H: multi-query attention': Limit('multi_query', sizes={'K': 1}),
    },
  ),
  _record(
    'flash',
    'FlashAttention',
    'arXiv:2205.14135',
    'Dao et al. 2022',
    idea='Softmax attention over tiles with a running maximum and sum; the backward computes the tiles again.',
    formula=(
      'for each tile of scores s:  m2 = max(m, max s);  c = exp(m - m2);  p = exp(s - m2)\n'
      '                            l = c l + sum p;  acc = c acc + p V;  m = m2\n'
      'out = acc / l,   lse = m + ln l'
    ),
    cost='O(T S (D + V)) time; O(T + S) memory, forward and backward',
    usage="softmax.attend(q, k, v, is_causal=True, implementation='xla', blocks=softmax.Blocks(q=128, kv=128))",
    settings={'is_causal': True, 'implementation': 'xla'},
    oracle={'allowed': _until},
    is_causal=True,
    reach=(None, 0),
    forms={
      'one tile': {'blocks': softmax.Blocks(q=12, kv=12)},
      'tiles of 8 x 5': {'blocks': softmax.Blocks(q=8, kv=5)},
    },
    limits={'tiles of any size: causal attention': Limit('causal', settings={'blocks': softmax.Blocks(q=8, kv=6)})},
  ),
  _record(
    'split_kv',
    'Split-KV attention',
    'https://pytorch.org/blog/flash-decoding/',
    'Dao et al. 2023 (Flash-Decoding)',
    idea='The keys in runs, attention to each, and one exact merge: parallel even for a single query.',
    formula='out = sum_n exp(lse_n - lse) out_n,   lse = ln sum_n exp(lse_n),   n over runs of keys',
    cost='O(T S (D + V)) time, `splits` runs at once; the merge O(splits T V)',
    usage='split_kv.attend(q, k, v, splits=3, is_causal=True)',
    entry='attn.split_kv.attend',
    settings={'is_causal': True, 'splits': 3},
    oracle={'allowed': _until},
    is_causal=True,
    reach=(None, 0),
    lengths=None,
    limits={'any number of runs: causal attention': Limit('causal', settings={'splits': 12})},
  ),
  _record(
    'sliding_window',
    'Sliding-window attention',
    'arXiv:2310.06825',
    'Jiang et al. 2023 (Mistral)',
    idea='A query sees the last w tokens, itself included; layers carry what is farther back.',
    formula='out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s],   t - w < s <= t',
    cost='O(T w (D + V)) time; a ring of w tokens as the cache',
    usage='softmax.attend(q, k, v, mask=masks.causal() & masks.window(4 - 1))  # w = 4',
    settings={'mask': causal() & window(3)},
    oracle={'allowed': lambda i, j: i - 4 < j <= i},
    is_causal=True,
    reach=(3, 0),
    state=State(
      lambda batch, capacity, sizes, dtype: (_init if capacity > 4 else _init_ring)(batch, capacity, sizes, dtype),
      _extend,
      {'full': 0, 'ring of 4': 4, 'ring of 3': 3},
    ),
    limits={
      'w >= T: causal attention': Limit('causal', settings={'mask': causal() & window(11)}),
      'w = 1: own value': Limit(
        lambda q, k, v: np.repeat(v, q.shape[2] // v.shape[2], axis=2), settings={'mask': causal() & window(0)}
      ),
    },
  ),
  _record(
    'local_window',
    'Two-sided window attention',
    'arXiv:2004.05150',
    'Beltagy et al. 2020 (Longformer)',
    idea='A query sees w / 2 tokens on either side of itself.',
    formula='out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s],   |t - s| <= w / 2',
    cost='O(T w (D + V)) time',
    usage='softmax.attend(q, k, v, mask=masks.window(2, 2))  # w = 4',
    settings={'mask': window(2, 2)},
    oracle={'allowed': lambda i, j: abs(i - j) <= 2},
    reach=(2, 2),
    limits={'w / 2 >= T: softmax attention': Limit('softmax', settings={'mask': window(11, 11)})},
  ),
  _record(
    'dilated_window',
    'Dilated sliding-window attention',
    'arXiv:2004.05150',
    'Beltagy et al. 2020 (Longformer)',
    idea='A window with gaps: every d-th of the last tokens, as far back as w d.',
    formula='out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s],   0 <= t - s < w d,  d divides t - s',
    cost='O(T w (D + V)) scores count; O(T w d (D + V)) time with tiles',
    usage='softmax.attend(q, k, v, mask=masks.causal() & masks.window(3 * 2 - 1) & masks.dilated(2))  # w = 3, d = 2',
    settings={'mask': causal() & window(5) & dilated(2)},
    oracle={'allowed': lambda i, j: j in (i, i - 2, i - 4)},
    is_causal=True,
    state=CACHE,
    limits={
      'd = 1: sliding window': Limit(
        'sliding_window', settings={'mask': causal() & window(3) & dilated(1)}
      ),
      'w d >= T, d = 1: causal attention': Limit('causal', settings={'mask': causal() & window(11) & dilated(1)}),
    },
  ),
  _record(
    'chunked',
    'Chunked local attention',
    'arXiv:1801.10198',
    'Liu et al. 2018',
    idea='The text in chunks; a query sees the tokens of its own chunk up to itself.',
    formula='out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s],   s <= t,  s // c = t // c',
    cost='O(T c (D + V)) time',
    usage='softmax.attend(q, k, v, mask=masks.causal() & masks.chunked(5))',
    settings={'mask': causal() & chunked(5)},
    oracle={'allowed': lambda i, j: 5 * (i // 5) <= j <= i},
    is_causal=True,
    state=CACHE,
    limits={
      'c >= T: causal attention': Limit('causal', settings={'mask': causal() & chunked(12)}),
      'c = 1: own value': Limit(
        lambda q, k, v: np.repeat(v, q.shape[2] // v.shape[2], axis=2), settings={'mask': causal() & chunked(1)}
      ),
    },
  ),
  _record(
    'prefix_lm',
    'Prefix language model',
    'arXiv:1910.10683',
    'Raffel et al. 2020 (T5)',
    idea='Every token sees the whole prefix; what follows is causal.',
    formula='out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s],   s <= t or s < n',
    cost='as causal attention',
    usage='softmax.attend(q, k, v, mask=masks.causal() | masks.prefix(5))',
    settings={'mask': causal() | prefix(5)},
    oracle={'allowed': lambda i, j: j <= i or j < 5},
    limits={
      'n = 0: causal attention': Limit('causal', settings={'mask': causal() | prefix(0)}),
      'n = T: softmax attention': Limit('softmax', settings={'mask': causal() | prefix(12)}),
    },
  ),
  _record(
    'packed',
    'Packed documents',
    'arXiv:2107.02027',
    'Krell et al. 2021',
    idea='Several documents in one row of the batch, each attending to itself alone.',
    formula='out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(D)) v[s],   s <= t,  segment_ids[s] = segment_ids[t]',
    cost='as causal attention',
    usage='softmax.attend(q, k, v, is_causal=True, segment_ids=segment_ids)  # [B, T]',
    inputs={**QKV, 'segment_ids': Input('BT', 'ids')},
    settings={'is_causal': True},
    oracle={'allowed': _until},
    is_causal=True,
    limits={
      'one document: causal attention': Limit('causal', inputs={'segment_ids': np.ones_like}),
      'documents of one token: own value': Limit(
        lambda q, k, v, segment_ids: np.repeat(v, q.shape[2] // v.shape[2], axis=2),
        inputs={'segment_ids': lambda x: np.broadcast_to(np.arange(x.shape[1]), x.shape)},
      ),
    },
  ),
  _record(
    'sinks',
    'Learned attention sinks',
    'arXiv:2508.10925',
    'OpenAI 2025 (gpt-oss)',
    idea='A learned logit per head takes probability and gives no value, so that a head may attend to nothing.',
    formula='out[t,h] = sum_{s <= t} exp(x[t,h,s]) v[s] / (exp(sink[h]) + sum_{s <= t} exp(x[t,h,s])), x = q.k / √D',
    cost='as causal attention, and H numbers',
    usage='softmax.attend(q, k, v, is_causal=True, sinks=sinks)  # [H]',
    inputs={**QKV, 'sinks': Input('H')},
    settings={'is_causal': True},
    oracle={'allowed': _until},
    is_causal=True,
    reach=(None, 0),
    state=CACHE,
    limits={'sinks of -inf: causal attention': Limit('causal', inputs={'sinks': lambda x: np.full_like(x, -np.inf)})},
  ),
  _record(
    'soft_cap',
    'Soft-capped attention',
    'arXiv:2408.00118',
    'Gemma Team 2024 (Gemma 2)',
    idea='Logits bent smoothly into (-c, c) before the softmax.',
    formula='out[t] = sum_{s <= t} softmax_{s <= t}(c tanh(q[t] . k[s] / (c sqrt(D)))) v[s]',
    cost='as causal attention, and a tanh a score',
    usage='softmax.attend(q, k, v, is_causal=True, soft_cap=1.5)',
    settings={'is_causal': True, 'soft_cap': 1.5},
    oracle={'allowed': _until, 'soft_cap': 1.5},
    is_causal=True,
    reach=(None, 0),
    state=CACHE,
    limits={'c to infinity: causal attention': Limit('causal', settings={'soft_cap': 1e9})},
  ),
  _record(
    'cached',
    'Attention with a cache',
    'arXiv:1911.02150',
    'Shazeer 2019',
    idea='Keys and values of the past are stored; new tokens, one or many, attend to them and are stored too.',
    formula='(out, cache) = attend(q, k, v, cache):   n new queries attend to stored and new keys, by position',
    cost='O(n S (D + V)) time for n new tokens; (D + V) K numbers a token stored',
    usage='storage.attend(q, k, v, storage.init(2, 12, 2, 8, 6), positions, is_causal=True)  # (out, slots)',
    entry='attn.cache.storage.attend',
    call=_in_chunks,
    settings={'is_causal': True},
    forms={'at once': {'chunk': 12}, 'chunks of 7': {'chunk': 7}},
    oracle={'allowed': _until},
    is_causal=True,
    reach=(None, 0),
    lengths=lambda lengths, T: {'lengths': lengths},
    state=CACHE,
    limits={
      'any number of tokens at a time: causal attention': Limit('causal', settings={'chunk': 4}),
    },
  ),
)
