"""Records of exact attention over the tiles of a plan."""

import jax
import jax.numpy as jnp
import numpy as np

from attn import block_sparse, masks, plan
from attn.catalog import oracles
from attn.catalog.exact import QKV
from attn.catalog.method import Limit, Method


def _checkered(i, j):
  return (i + j) % 2 == 0


def _over_blocks(q, k, v, *, chosen, mask, lists='static', **options):
  """Attention over the blocks of 8 queries and 4 keys that chosen(i, j) names, from lists of every kind."""
  T, S = q.shape[1], k.shape[1]
  blocks = chosen(*np.indices((-(-T // 8), -(-S // 4))))
  heads = {'one for each head': (q.shape[0], q.shape[2]), 'one for each key head': (1, k.shape[2])}.get(lists, (1, 1))
  made = plan.from_blocks(np.broadcast_to(blocks, (*heads, *blocks.shape)), T=T, S=S, block_q=8, block_kv=4)
  if lists == 'arrays':
    made = jax.tree.map(jnp.asarray, made)
  return block_sparse.attend(q, k, v, made, mask=mask, **options)


def _lengths(lengths, T):
  return {'query_seq_lengths': lengths, 'key_value_seq_lengths': lengths}


METHODS = (
  Method(
    'block_sparse',
    'Block-sparse attention',
    'exact',
    'arXiv:2205.14135',
    'Dao et al. 2022 (FlashAttention)',
    idea='Tiles of queries and keys are chosen beforehand; what is not in the list of tiles is never computed.',
    formula=(
      'out[t] = sum_s p[t,s] v[s],   p[t,:] = softmax_s(q[t] . k[s] / sqrt(D))\n'
      'over s <= t whose tile (t // bq, s // bk) is in the plan'
    ),
    cost='O(n bq bk (D + V)) time for n tiles; O(T + S + n) memory, forward and backward',
    usage=(
      'block_sparse.attend(q, k, v, plan.from_blocks(np.indices((1, 1, 2, 3)).sum(0) % 2 == 0, '
      'T=12, S=12, block_q=8, block_kv=4), mask=masks.causal())'
    ),
    entry='attn.block_sparse.attend',
    call=_over_blocks,
    settings={'chosen': _checkered, 'mask': masks.causal()},
    forms={
      'one static list': {},
      'lists as arrays': {'lists': 'arrays'},
      'a list for each key head': {'lists': 'one for each key head'},
      'a list for each head': {'lists': 'one for each head'},
    },
    inputs=QKV,
    oracle=lambda q, k, v: oracles.softmax(q, k, v, allowed=lambda i, j: j <= i and _checkered(i // 8, j // 4)),
    is_causal=True,
    has_lse=True,
    lengths=_lengths,
    limits={
      'all tiles: causal attention': Limit('causal', settings={'chosen': lambda i, j: i + j >= 0}),
      'no tiles: zeros': Limit(
        lambda q, k, v: np.zeros((*q.shape[:3], v.shape[3])), settings={'chosen': lambda i, j: i + j < 0}
      ),
    },
  ),
)
