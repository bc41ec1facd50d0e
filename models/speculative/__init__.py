"""Speculative decoding: a small model drafts a tree of tokens, a large one takes those it would have drawn itself.

    from models import speculative
    got, statistics = speculative.generate(target, draft, [[1, 2, 3]], 100, widths=(2, 2, 1))
    statistics.tokens_per_call                                # per prompt

The tree may have any shape (`Tree`). Texts have the law of the target's own, see verify.py.
"""

from models.speculative.engine import Statistics, generate
from models.speculative.tree import Tree

__all__ = ['Statistics', 'Tree', 'generate']
