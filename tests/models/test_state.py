"""models.state: parameters by paths, and scanned models taken apart."""

import numpy as np
import pytest
from flax import nnx

from models import state
from models.config import LayerSpec
from models.decoder import Decoder
from tests.models import small

CONFIGS = {
  'hybrid': {'depth': 12, 'layers': small.HYBRID, 'sinks': True},
  'experts': {'experts': 3, 'experts_per_token': 2, 'tied_embeddings': False},
}


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('scan', [False, True])
def test_abstract_params_are_those_of_the_model(name, scan):
  config = small.config(**CONFIGS[name], scan=scan)
  _, want = state.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  got = state.abstract_params(config)
  assert {path: (x.shape, x.dtype) for path, x in got.items()} == {p: (x.shape, x.dtype) for p, x in want.items()}


def test_unscanned_is_the_same_model():
  changes = {'depth': 4, 'layers': [LayerSpec(window=4), LayerSpec()], 'scan': True}
  model, config = small.model(**changes), small.config(**changes)
  apart, its_config = state.unscanned(model, config)
  assert not apart.scan and not its_config.scan and len(apart.blocks) == 4
  tokens = small.tokens()
  np.testing.assert_allclose(small.forward(apart, tokens), small.forward(model, tokens), rtol=1e-5, atol=1e-5)
  assert state.unscanned(apart, its_config)[0] is apart
