"""Generation under a constraint that is asked about few tokens: adaptive weighted rejection sampling.

    texts = constrained.generate(model, prompt, 20, constraint, particles=8, key=key, stop_tokens=(0,))

`draw` takes one token of one distribution, `generate` writes texts, `Automaton` and `predicate` make constraints.
"""

from models.constrained.constraints import Automaton, Constraint, predicate
from models.constrained.particles import Particles, generate
from models.constrained.rejection import ESTIMATORS, Draw, draw, shuffled

__all__ = ['ESTIMATORS', 'Automaton', 'Constraint', 'Draw', 'Particles', 'draw', 'generate', 'predicate', 'shuffled']
