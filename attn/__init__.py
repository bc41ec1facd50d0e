"""attnloom: every attention variant as one pure JAX function.

    from attn import dot_product_attention, masks
    out = dot_product_attention(q, k, v, mask=masks.causal() & masks.window(511))
"""

from attn import masks, softmax
from attn.adapters import flax_attention_fn
from attn.dot_product import dot_product_attention
from attn.softmax import attend, merge

__all__ = ['attend', 'dot_product_attention', 'flax_attention_fn', 'masks', 'merge', 'softmax']
