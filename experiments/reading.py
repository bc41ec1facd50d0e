"""What a trained model does with text: which tokens a head looks at, what it writes after a prompt."""

import re

import jax
import numpy as np

from models.generate import Sampling, generate
from train.data import tokenizers

BYTES = tokenizers.Bytes()
FAR = 4  # tokens back from which on a head is said to look far
PYTHON_PROMPTS = ('import ', 'def __init__(self, ', 'class ', '    """Return the ')
TEMPERATURES = (0.5, 0.9)
NEW_TOKENS = 200


def snippet(files, length, tokenizer=BYTES):
  """(file name, tokens): a separator and length - 1 tokens of a held-out file, from the start of a method if any."""
  cut = lambda text: [tokenizer.separator, *tokenizer.encode_texts([text])[0][: length - 1].tolist()]
  for name, text in files:
    found = re.search(rb'    def __init__\(self, [^\n]+\n        self\.[^\n]+\n', text)
    if found and len(text) - found.start() >= length:
      return name, cut(text[found.start() :])
  name, text = max(files, key=lambda file: len(file[1]))
  return name, cut(text)


def farthest_head(config, model, tokens):
  """The head that puts the most weight on keys at least FAR back, the first key excepted.

  Args:
    config: DecoderConfig.
    model: Decoder.
    tokens: T ids.

  Returns:
    (layer, head, its weights [T, T], its mean weight there, number of heads looked at).
  """
  T = len(tokens)
  is_far = np.arange(T)[:, None] - np.arange(T) >= FAR
  is_far[:, 0] = False
  best: tuple = ()
  # One program, in which the compiler computes what the layers share once.
  maps = jax.jit(lambda tokens: [model.attention_map(tokens, layer)[0] for layer in range(config.depth)])
  for layer, weights_HTT in enumerate(map(np.asarray, maps(np.asarray([tokens], np.int32)))):
    # The first queries have nothing far to look at.
    shares = np.where(is_far, weights_HTT, 0).sum(-1)[:, min(FAR + 1, T - 1) :].mean(-1)
    head = int(shares.argmax())
    if not best or shares[head] > best[3]:
      best = layer, head, weights_HTT[head], float(shares[head])
  return *best, config.depth * config.heads


def prompts(data, files):
  """Texts to continue: of Python if that is what was trained on, otherwise beginnings of held-out files."""
  if 'python_stdlib' in data.source:
    return list(PYTHON_PROMPTS)
  return [as_text(text[:24]) for _, text in files[:3]]


def continuations(config, model, texts, temperature, seed=0, tokenizer=BYTES):
  """What the model writes after each text, up to its row length, or until it ends the file.

  Args:
    config: train.config.Config.
    model: Decoder.
    texts: [str].
    temperature: 0 takes the most likely token.
    seed: of sampling.
    tokenizer: of the run.

  Returns:
    [str], without the prompts. Bytes that are no text show as replacement characters.
  """
  T = config.data.seq_len
  # A line end first: in the middle of a file a prompt stands at the start of a line.
  encoded = tokenizer.encode_texts([f'\n{text}'.encode() for text in texts])
  rows = [ids[: max(1, T - 1)].tolist() for ids in encoded]
  new = max(1, min(NEW_TOKENS, T - max(map(len, rows))))
  key = jax.random.key(seed) if temperature else None
  got = generate(model, rows, new, sampling=Sampling(temperature), key=key, stop_tokens=[tokenizer.separator])
  return [as_text(tokens, tokenizer) for (tokens,) in got.tokens]


def as_text(tokens, tokenizer=BYTES):
  """Ids as text; control characters and broken UTF-8 show as replacement characters, the separator as an end sign."""
  tokens = [int(token) for token in tokens]
  text = tokenizer.decode([token for token in tokens if token != tokenizer.separator])
  text = ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)
  return text + ('∎' if tokenizer.separator in tokens else '')
