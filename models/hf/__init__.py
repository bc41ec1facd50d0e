"""Published checkpoints in and out: `load`, `save`, and what stands beside the tensors."""

from models.hf.checkpoint import Loaded, load, save
from models.hf.settings import read_config, stop_tokens
from models.hf.tokenizers import tokenizer

__all__ = ['Loaded', 'load', 'read_config', 'save', 'stop_tokens', 'tokenizer']
