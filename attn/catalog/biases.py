"""Records of additive biases and their factors."""

import numpy as np

from attn import bias, low_rank, softmax
from attn.cache import storage
from attn.catalog import oracles
from attn.catalog.exact import CACHE, FORMS, QKV
from attn.catalog.method import Input, Limit, Method, State

T5 = {'is_bidirectional': False, 'max_distance': 9}
GRID = (3, 4)  # 12 patches
SLOPES = bias.alibi_slopes(4)


def _lengths(lengths, T):
  return {'query_seq_lengths': lengths, 'key_value_seq_lengths': lengths}


def _t5(distance):
  """The bucket of a distance i - j >= 0 for 8 buckets to 9 tokens, written out."""
  return (0, 1, 2, 3, 4, 5, 6, 6, 7)[min(distance, 8)]


def _grid(i, j):
  """Swin's index for 3 x 4 patches: 5 x 7 offsets, query - key, shifted to start at 0."""
  return (i // 4 - j // 4 + 2) * 7 + (i % 4 - j % 4 + 3)


def _softmax(q, k, v, added, allowed=lambda i, j: True):
  return oracles.softmax(q, k, v, allowed=allowed, bias=added)


def _scored(make, name):
  """The call of a method whose learned array becomes a score."""

  def call(q, k, v, **options):
    return softmax.attend(q, k, v, score=make(options.pop(name)), **options)

  return call


def _cached(make, name):
  def extend(q, k, v, state, positions, **options):
    return storage.attend(q, k, v, state, positions, score=make(options.pop(name)), **options)

  return State(CACHE.init, extend)


def _factored(q, k, v, f, g, **options):
  return low_rank.attend(q, k, v, low_rank.Factors(f, g), **options)


def _product(q, k, v, f, g):
  """Softmax attention with the product of factors as the bias, a row of the batch at a time."""
  parts = []
  for b in range(len(q)):
    G = f.shape[1] // g.shape[1]
    added = lambda h, i, j, b=b, G=G: sum(x * y for x, y in zip(f[b, h, i], g[b, h // G, j]))
    parts.append(oracles.softmax(q[b : b + 1], k[b : b + 1], v[b : b + 1], bias=added))
  return {name: np.concatenate([x[name] for x in parts]) for name in ('out', 'lse')}


def _record(name, title, paper, authors, **fields) -> Method:
  fields.setdefault('entry', 'attn.softmax.attend')
  fields.setdefault('forms', FORMS)
  return Method(name, title, 'bias', paper, authors, has_lse=True, lengths=_lengths, **fields)


def _t5_relative(values):
  return bias.t5_relative(values, **T5)


def _grid_table(values):
  return bias.grid_table(values, GRID)


METHODS = (
  _record(
    'alibi',
    'Attention with linear biases (ALiBi)',
    'arXiv:2108.12409',
    'Press et al. 2022',
    idea='A penalty on the logits that grows with the distance, in place of positions in queries and keys.',
    formula='out[t,h] = sum_{s <= t} softmax_{s <= t}(q[t] . k[s] / sqrt(D) - slopes[h] (t - s)) v[s]',
    cost='as causal attention; no [T, S] array. As low-rank factors: 2 more channels',
    usage='softmax.attend(q, k, v, is_causal=True, score=bias.alibi(slopes))  # [H]: bias.alibi_slopes(H)',
    call=_scored(bias.alibi, 'slopes'),
    settings={'is_causal': True},
    inputs={**QKV, 'slopes': Input('H')},
    oracle=lambda q, k, v, slopes: _softmax(q, k, v, lambda h, i, j: -slopes[h] * (i - j), lambda i, j: j <= i),
    is_causal=True,
    reach=(None, 0),
    state=_cached(bias.alibi, 'slopes'),
    limits={
      'slopes of 0: causal attention': Limit('causal', inputs={'slopes': np.zeros_like}),
      'steep slopes: own value': Limit(
        lambda q, k, v, slopes: np.repeat(v, q.shape[2] // v.shape[2], axis=2),
        inputs={'slopes': lambda x: np.full_like(x, 1e4)},
      ),
    },
  ),
  _record(
    't5_relative',
    'Relative position buckets (T5)',
    'arXiv:1910.10683',
    'Raffel et al. 2020 (T5)',
    idea='A learned bias per head and bucket of distances, the buckets growing with the distance.',
    formula='out[t,h] = sum_{s <= t} softmax_{s <= t}(q[t] . k[s] / sqrt(D) + values[bucket(t - s), h]) v[s]',
    cost='as causal attention; buckets x H numbers',
    usage=(
      'softmax.attend(q, k, v, is_causal=True, '
      'score=bias.t5_relative(values, is_bidirectional=False, max_distance=9))  # [buckets, H]'
    ),
    call=_scored(_t5_relative, 'values'),
    settings={'is_causal': True},
    inputs={**QKV, 'values': Input('NH')},
    sizes={'N': 8},
    oracle=lambda q, k, v, values: _softmax(q, k, v, lambda h, i, j: values[_t5(i - j), h], lambda i, j: j <= i),
    is_causal=True,
    reach=(None, 0),
    state=_cached(_t5_relative, 'values'),
    limits={
      'one value for all buckets: causal attention, but for the log-sum-exp': Limit(
        lambda q, k, v, values: softmax.attend(q, k, v, is_causal=True),
        inputs={'values': lambda x: np.broadcast_to(x[:1], x.shape)},
      ),
      'a table of zeros: causal attention': Limit('causal', inputs={'values': np.zeros_like}),
    },
  ),
  _record(
    'relative_table',
    'Relative position table on a grid (Swin)',
    'arXiv:2103.14030',
    'Liu et al. 2021 (Swin)',
    idea='A learned bias per head and offset between patches on a grid.',
    formula=(
      'out[t,h] = sum_s softmax_s(q[t] . k[s] / sqrt(D) + values[n, h]) v[s]\n'
      'n = (dy + height - 1) (2 width - 1) + dx + width - 1,   dy, dx: rows and columns from patch s to patch t'
    ),
    cost='as softmax attention; (2 height - 1) (2 width - 1) H numbers',
    usage='softmax.attend(q, k, v, score=bias.grid_table(values, (3, 4)))  # [5 * 7, H]',
    call=_scored(_grid_table, 'values'),
    inputs={**QKV, 'values': Input('NH')},
    sizes={'N': 35},
    oracle=lambda q, k, v, values: _softmax(q, k, v, lambda h, i, j: values[_grid(i, j), h]),
    limits={'a table of zeros: softmax attention': Limit('softmax', inputs={'values': np.zeros_like})},
  ),
  _record(
    'flash_bias',
    'Low-rank bias in the width of the heads (FlashBias)',
    'arXiv:2505.12044',
    'Wu et al. 2025 (FlashBias)',
    idea='A bias of rank R as R more channels of queries and keys: no [T, S] array, in any kernel.',
    formula='softmax(Q K^T / sqrt(D) + F G^T) V = softmax([Q / sqrt(D), F] [K, G]^T) V',
    cost='2 T S R more operations a head; no bias read or written',
    usage='low_rank.attend(q, k, v, low_rank.Factors(f, g))  # f [B, H, T, R], g [B, K, S, R]',
    entry='attn.low_rank.attend',
    call=_factored,
    inputs={**QKV, 'f': Input('BHTR'), 'g': Input('BKSR')},
    sizes={'R': 3},
    oracle=_product,
    limits={
      'rank 0: softmax attention': Limit('softmax', sizes={'R': 0}),
      'factors of 0: softmax attention': Limit('softmax', inputs={'f': np.zeros_like}),
      'factors of ALiBi: ALiBi': Limit(
        lambda q, k, v, f, g: softmax.attend(q, k, v, is_causal=True, score=bias.alibi(SLOPES)),
        settings={'is_causal': True},
        sizes={'R': 2},
        inputs={
          'f': lambda x: np.broadcast_to(low_rank.alibi(SLOPES, x.shape[2]).f, x.shape),
          'g': lambda x: np.broadcast_to(low_rank.alibi(SLOPES, x.shape[2]).g, x.shape),
        },
      ),
    },
  ),
)
