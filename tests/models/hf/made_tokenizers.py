"""Tokenizers of the kinds that published checkpoints have, made here: as small as they can be."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ['<s>', '</s>', '<|end|>']


def byte_level():
  """As of Llama 3, Qwen, gpt-oss: every byte is a character of the vocabulary, merges make pieces. No token before."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [('Ġ', 't'), ('h', 'e'), ('Ġt', 'he'), ('Ã', '©'), ('â', 'Ĥ'), ('a', 'â'), ('Ġ', 'Ġ'), ('Ċ', 'Ċ')]
  pieces = letters + [a + b for a, b in merges]
  made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(SPECIAL)
  made.add_tokens([AddedToken('<think>', special=False)])
  return made


def with_fallback(strips=True):
  """As of Llama 2 (strips=True) and Gemma: '▁' is a space, characters outside the vocabulary are bytes; '<s>' first."""
  letters = ['▁', *'abcdehlot', 'é', 'he', '▁the', '▁▁', 'lo']
  merges = [('h', 'e'), ('▁', 't'), ('▁t', 'he'), ('▁', '▁'), ('l', 'o')]
  pieces = ['<unk>', *SPECIAL, *(f'<0x{i:02X}>' for i in range(256)), *letters, '▁t']
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  made = Tokenizer(models.BPE(vocabulary, merges, unk_token='<unk>', byte_fallback=True, fuse_unk=True))
  spaces = [normalizers.Prepend('▁')] if strips else []
  made.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(' ', '▁')])
  chain = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  made.decoder = decoders.Sequence([*chain, decoders.Strip(' ', 1, 0)] if strips else chain)
  made.add_special_tokens(['<unk>', *SPECIAL])
  made.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
  return made


def metaspace():
  """As of models converted with a Metaspace decoder, which drops the first space."""
  pieces = ['<unk>', *SPECIAL, '▁', *'abcdehlot', '▁the', '▁a', 'é']
  made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token='<unk>'))
  made.pre_tokenizer = pre_tokenizers.Split(Regex('.'), 'isolated')
  made.decoder = decoders.Metaspace()
  made.add_special_tokens(SPECIAL)
  return made


KINDS = {
  'byte_level': byte_level,
  'fallback_strip': with_fallback,
  'fallback': lambda: with_fallback(strips=False),
  'metaspace': metaspace,
}


def folder(path, made, **config):
  """Writes tokenizer.json and a config.json into a new folder; returns the folder."""
  path.mkdir(parents=True, exist_ok=True)
  made.save(str(path / 'tokenizer.json'))
  (path / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  return path
