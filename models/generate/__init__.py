"""Generation: tokens after a prompt, most likely, sampled or searched.

    from models.generate import Sampling, generate
    got = generate(model, [[1, 2, 3], [4]], 100, sampling=Sampling(temperature=0.8), key=jax.random.key(0))
    got.tokens[1][0]                                          # prompt 1, sample 0

`stream` gives the same piece by piece, `beam_search` the best texts. Prompts of many lengths share compiled programs.
"""

import os
import signal
import sys

if sys.argv[0] == '-m' and 'models.generate' in sys.orig_argv:
  # The command begins with these imports, which take seconds: Ctrl-C in them ends it as it does later, in a line.
  signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'python -m models.generate: stopped\n'), os._exit(130)))

from models.generate.beam import Beams, beam_search
from models.generate.engine import Generated, Piece, generate, stream
from models.generate.sampling import Sampling

__all__ = ['Beams', 'Generated', 'Piece', 'Sampling', 'beam_search', 'generate', 'stream']
