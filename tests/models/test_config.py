"""models.config: defaults, and errors that name field, value and expectation."""

import math

import pytest

from models import mixers
from models.config import DecoderConfig, LayerSpec
from tests.models import small


def test_defaults():
  config = DecoderConfig().validate()
  assert (config.K, config.D, config.F) == (4, 64, 704)
  assert DecoderConfig(width=256, mlp='gelu').F == 1024
  assert DecoderConfig(kv_heads=2, head_dim=32, mlp_width=100).F == 100
  assert DecoderConfig(depth=4, layers=small.HYBRID).spec(3) is small.HYBRID[1]


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'vocab': 0}, r'model.vocab=0 must be an integer, 1 or more'),
    ({'width': 2.5}, 'model.width=2.5'),
    ({'depth': True}, 'model.depth=True'),
    ({'heads': 3}, 'model.heads=3 must divide width=256'),
    ({'heads': 4, 'kv_heads': 3}, 'model.kv_heads=3 must divide heads=4'),
    ({'kv_heads': 8}, 'model.kv_heads=8 must divide heads=4'),
    ({'depth': 3, 'layers': small.HYBRID}, r'model.depth=3 must be a multiple of len\(layers\)=2'),
    ({'layers': []}, 'must name at least one layer'),
    ({'mlp': 'silu'}, "model.mlp='silu' must be one of 'swiglu'"),
    ({'remat': 'all'}, "model.remat='all' must be one of 'none'"),
    ({'dtype': 'f32'}, "model.dtype='f32' must be one of 'float32'"),
    ({'implementation': 'fast'}, "model.implementation='fast' must be one of '', 'reference'"),
    ({'attn_soft_cap': -1.0}, 'model.attn_soft_cap=-1.0'),
    ({'logit_soft_cap': math.inf}, 'model.logit_soft_cap=inf'),
    ({'embed_scale': -0.5}, 'model.embed_scale=-0.5'),
    ({'norm_eps': 0.0}, 'model.norm_eps=0.0'),
    ({'layers': [LayerSpec(), LayerSpec(window=-1)]}, r'model.layers\[1\].window=-1'),
    ({'layers': [LayerSpec(chunk=-2)]}, r'model.layers\[0\].chunk=-2'),
    ({'layers': [LayerSpec(mixer='mamba')]}, r"model.layers\[0\].mixer='mamba' must be one of 'attention'"),
    ({'layers': [LayerSpec(rope_base=1.0)]}, 'rope_base=1.0'),
    ({'layers': [LayerSpec(rope_fraction=1.5)]}, 'rope_fraction=1.5'),
    ({'layers': [LayerSpec(rope_fraction=0.01)]}, 'rope_fraction=0.01: .*even integer'),
    ({'layers': [LayerSpec(rope_scaling='su')]}, "rope_scaling='su' must be one of"),
    ({'layers': [LayerSpec(rope_factor=2.0)]}, "rope_factor=2.0 has no effect with rope_scaling=''"),
    ({'layers': [LayerSpec(rope_scaling='linear', rope_factor=0.5)]}, 'rope_factor=0.5'),
    ({'layers': [LayerSpec(rope_scaling='yarn', rope_factor=2.0)]}, 'rope_original_length=0 must be at least 8'),
  ],
)
def test_rejects(changes, words):
  with pytest.raises(ValueError, match=words):
    DecoderConfig(**changes).validate()


def test_unknown_mixer_lists_the_known():
  with pytest.raises(ValueError, match="mixer='mamba' is unknown, expected one of 'attention'"):
    mixers.mixer(LayerSpec(mixer='mamba'), DecoderConfig(), rngs=None)
