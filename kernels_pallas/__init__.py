"""Hot loops: arrays and frozen block sizes in, arrays out. Knows nothing of models, papers or policies."""
