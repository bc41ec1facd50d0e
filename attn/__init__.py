"""attnloom: every attention variant as one pure JAX function.

    from attn import dot_product_attention, masks
    out = dot_product_attention(q, k, v, mask=masks.causal() & masks.window(511))
"""

import importlib

from attn import bias, layouts, masks, positions, softmax
from attn.adapters import flax_attention_fn
from attn.dot_product import dot_product_attention
from attn.softmax import attend, merge

# Imported when they are first asked for.
_LATER = (
  'block_sparse', 'catalog', 'contracts', 'cost', 'distributed', 'draw', 'low_rank', 'plan', 'simulate', 'split_kv',
)  # fmt: skip

__all__ = [
  'attend', 'bias', 'dot_product_attention', 'flax_attention_fn', 'layouts', 'masks', 'merge', 'positions', 'softmax',
  *_LATER,
]  # fmt: skip


def __getattr__(name):
  if name in _LATER:
    return importlib.import_module(f'attn.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *__all__})
