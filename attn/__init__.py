"""attnloom: every attention variant as one pure JAX function.

    from attn import dot_product_attention, masks
    out = dot_product_attention(q, k, v, mask=masks.causal() & masks.window(511))
"""

from attn import masks, softmax
from attn.dot_product import dot_product_attention
from attn.softmax import attend, merge

__all__ = ['attend', 'dot_product_attention', 'masks', 'merge', 'softmax']
