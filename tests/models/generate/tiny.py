"""A folder with a random decoder of bytes, as small as one can be, for the tests of the command."""

from models import hf
from models.config import LayerSpec
from tests.models import small

CHANGES = {'vocab': 260, 'depth': 1, 'layers': [LayerSpec(window=8)]}


def folder(path, seed=0, **settings):
  """Saves it in the native form, with the byte tokenizer; returns the path as text."""
  model, config = small.model(seed, **CHANGES), small.config(**CHANGES)
  hf.save(path, model, config, settings={'eos_token_id': 256} | settings, tokenizer='bytes')
  return str(path)
