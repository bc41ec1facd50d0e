"""How well does a checkpoint predict a text, and how much does it gain from a longer context?

  python -m experiments.perplexity --model=DIR --text=FILES
  python -m experiments.perplexity --model=DIR --text=book.txt,more/ --length=4096 --stride=1024 --out=runs/perplexity

FILES are paths, folders and globs separated by commas. Each file is a document of its own, begun as the tokenizer
begins one. Every token is predicted once, from all tokens before it in its window: windows of --length tokens, one
every --stride, of which each scores what those before it have not. So a token has length - stride tokens of context or
more, or all of its document. The first token of a document is context only (a separator or the like, if the
tokenizer puts one). --out gets perplexity.json and profile.png.
"""

import argparse
import functools
import json
import math
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments import machine, pictures
from models import hf
from models.config import DTYPES
from train.config import UserError
from train.data import corpus


def windows(count, length, stride):
  """The windows of a document of `count` tokens: [(start, first, end), ...].

  The model reads tokens start .. start + length - 1 and is scored on tokens first .. end - 1; all together are
  1 .. count - 1, each once.
  """
  found, first = [], 1
  for start in range(0, max(count - 1, 0), stride):
    end = min(start + length + 1, count)
    found.append((start, first, end))
    first = end
    if end == count:
      break
  return found


def contexts(count, length, stride):
  """How many tokens the predictions of tokens 1 .. count - 1 see: int [max(count - 1, 0)]."""
  parts = [np.arange(first, end) - start for start, first, end in windows(count, length, stride)]
  return np.concatenate([np.zeros(0, int), *parts])


def score(model, documents, *, length=1024, stride=512, batch=4, on_tokens=None):
  """The loss of every token but the first of each document.

      nll[i - 1] = -log softmax(logits(tokens start .. i - 1))[token i]

  All windows go through one compiled program, `batch` at a time, whatever the lengths.

  Args:
    model: a Decoder, or any module with its `hidden` and `logits`.
    documents: lists of token ids.
    length: tokens the model reads at once.
    stride: tokens between the starts of windows, up to length.
    batch: windows at once.
    on_tokens: called with the number of tokens scored since the last call.

  Returns:
    A float64 numpy array [max(tokens - 1, 0)] per document, in nats.

  Raises:
    ValueError: an argument out of its range.
    FloatingPointError: a loss is NaN or infinite; says which document.
  """
  check(length, stride, batch)
  documents = [np.asarray(tokens, np.int32).reshape(-1) for tokens in documents]
  graph, params = nnx.split(model)
  losses = [np.zeros(max(len(tokens) - 1, 0)) for tokens in documents]
  work = [(d, *window) for d, tokens in enumerate(documents) for window in windows(len(tokens), length, stride)]
  for i in range(0, len(work), batch):
    rows = np.zeros((batch, length + 1), np.int32)  # what stands behind a text changes nothing before it
    for row, (d, start, _, end) in zip(rows, work[i : i + batch]):
      row[: end - start] = documents[d][start:end]
    nll = np.asarray(_nll(graph, params, rows), np.float64)
    for row, (d, start, first, end) in zip(nll, work[i : i + batch]):
      losses[d][first - 1 : end - 1] = row[first - 1 - start : end - 1 - start]
      if not np.isfinite(losses[d][first - 1 : end - 1]).all():
        raise FloatingPointError(f'documents[{d}]: a loss is NaN or infinite, the parameters or the token ids are bad')
    if on_tokens:
      on_tokens(sum(end - first for _, _, first, end in work[i : i + batch]))
  return losses


def check(length, stride, batch):
  """The input rules of windows."""
  for name, value, high in (('length', length, math.inf), ('stride', stride, length), ('batch', batch, math.inf)):
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= high:
      raise ValueError(f'{name}={value!r} must be an integer in 1 .. {high}')


@functools.partial(jax.jit, static_argnames='graph')
def _nll(graph, params, rows):
  """rows [B, length + 1] -> losses [B, length] of all but the first; logits are held for one row at a time."""
  model = nnx.merge(graph, params)

  def of_row(hidden_and_targets):
    hidden, targets = hidden_and_targets
    logits = model.logits(hidden[None])[0]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]

  return jax.lax.map(of_row, (model.hidden(rows[:, :-1]), rows[:, 1:]))


def profile(losses, seen):
  """Mean loss by the number of context tokens, in buckets 1, 2, 3 .. 4, 5 .. 8, 9 .. 16 and so on.

  Args:
    losses: [n] in nats.
    seen: [n] int, context tokens of each, 1 or more.

  Returns:
    [{'from', 'to', 'tokens', 'nats_per_token'}, ...], buckets without tokens left out.
  """
  bucket = np.ceil(np.log2(np.maximum(seen, 1))).astype(int)
  rows = []
  for k in np.unique(bucket):
    mine = losses[bucket == k]
    low = 2 ** (int(k) - 1) + 1 if k else 1
    rows.append({'from': low, 'to': 2 ** int(k), 'tokens': len(mine), 'nats_per_token': float(mine.mean())})
  return rows


def summary(losses, sizes):
  """What the losses of all documents come to.

  Args:
    losses: arrays of `score`.
    sizes: bytes of text that the scored tokens of each document are.

  Returns:
    Dictionary: tokens, bytes, nats_per_token, perplexity, bits_per_byte.

  Raises:
    ValueError: nothing is scored.
  """
  tokens, nats, size = sum(map(len, losses)), sum(float(part.sum()) for part in losses), sum(sizes)
  if not tokens or not size:
    raise ValueError(f'there are {tokens} tokens and {size} bytes of text to score: expected one or more of both')
  mean = nats / tokens
  return {
    'tokens': tokens,
    'bytes': size,
    'nats_per_token': mean,
    'perplexity': math.exp(mean) if mean < 700 else math.inf,
    'bits_per_byte': nats / math.log(2) / size,
  }


def read(source, tokenizer, vocab, max_tokens=0):
  """The documents of --text, up to max_tokens scored tokens (0 means all).

  Returns:
    (names, documents, sizes): token ids of each file and the bytes of text that its scored tokens are.

  Raises:
    UserError: nothing found, or a file that is unreadable, no UTF-8, or holds an id that the model does not know.
  """
  names, documents, sizes, rest = [], [], [], max_tokens or sys.maxsize
  for name, path in corpus.find(source, 'text').items():
    try:
      with open(path, 'rb') as file:
        text = file.read().decode('utf-8')
    except OSError as error:
      raise UserError(f'text {path}: cannot be read ({error.strerror})') from error
    except UnicodeDecodeError as error:
      found = f'byte {error.object[error.start]} at {error.start}'
      raise UserError(f'text {path}: expected UTF-8, found {found}') from error
    tokens = tokenizer.encode(text)
    if wrong := [token for token in tokens if not 0 <= token < vocab]:
      raise UserError(f'text {path}: the tokenizer gives id {wrong[0]}, the model knows 0 .. {vocab - 1}')
    kept = tokens[: rest + 1]
    whole = text if len(kept) == len(tokens) else tokenizer.decode(kept)
    names.append(name)
    documents.append(kept)
    sizes.append(len(whole.encode()) - len(tokenizer.decode(kept[:1]).encode()))  # the first token is not scored
    rest -= max(len(kept) - 1, 0)
    if not rest:
      break
  return names, documents, sizes


def table(rows):
  """Lines of text that show a profile."""
  yield f'{"context tokens":>17}  {"tokens":>10}  {"nats/token":>10}  {"perplexity":>10}'
  for row in rows:
    span = f'{row["from"]:,} .. {row["to"]:,}' if row['to'] > row['from'] else f'{row["from"]:,}'
    loss = row['nats_per_token']
    yield f'{span:>17}  {row["tokens"]:>10,}  {loss:>10.4f}  {math.exp(min(loss, 700)):>10.2f}'


def draw(rows, path):
  """A picture of a profile: loss against context on a logarithmic axis."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7.0, 4.0), layout='constrained')
  axes = figure.subplots()
  x = [math.sqrt(row['from'] * row['to']) for row in rows]
  axes.plot(x, [row['nats_per_token'] for row in rows], color=pictures.BLUE, marker='o', markersize=4)
  axes.set_xscale('log', base=2)
  axes.set_xlabel('context tokens')
  axes.set_ylabel('nats per token')
  axes.grid(axis='y', color=pictures.GREY, alpha=0.25)
  figure.savefig(path, dpi=150)


def measure(arguments):
  """Loads, scores and returns what perplexity.json holds."""
  check(arguments.length, arguments.stride, arguments.batch)
  tokenizer = hf.tokenizer(arguments.model)
  loaded = hf.load(arguments.model, dtype=arguments.dtype or None, length=arguments.length)
  names, documents, sizes = read(arguments.text, tokenizer, loaded.config.vocab, arguments.max_tokens)
  options = {'length': arguments.length, 'stride': arguments.stride, 'batch': arguments.batch}
  total = sum(max(len(tokens) - 1, 0) for tokens in documents)
  with tqdm(total=total, desc='scoring', unit=' tokens', unit_scale=True, disable=None, leave=False) as bar:
    try:
      losses = score(loaded.model, documents, **options, on_tokens=bar.update)
    except FloatingPointError as error:
      raise UserError(re.sub(r'documents\[(\d+)\]', lambda match: names[int(match[1])], str(error))) from error
  seen = [contexts(len(tokens), arguments.length, arguments.stride) for tokens in documents]
  files = [
    {'file': name, 'tokens': len(part), 'bytes': size, 'nats_per_token': float(part.mean()) if len(part) else None}
    for name, part, size in zip(names, losses, sizes)
  ]
  return {
    **machine.facts(), 'model': arguments.model, 'text': arguments.text, 'dtype': loaded.config.dtype, **options,
    **summary(losses, sizes), 'profile': profile(np.concatenate(losses), np.concatenate(seen)), 'files': files,
  }  # fmt: skip


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m experiments.perplexity', description=__doc__.split('\n')[0])
  parser.add_argument('--model', required=True, help='folder of a checkpoint with its tokenizer')
  parser.add_argument('--text', required=True, help='paths, folders and globs, separated by commas')
  parser.add_argument('--length', type=int, default=1024, help='tokens the model reads at once')
  parser.add_argument('--stride', type=int, default=512, help='tokens between the starts of windows')
  parser.add_argument('--batch', type=int, default=4, help='windows at once')
  parser.add_argument('--dtype', default='', choices=('', *DTYPES), help="of computation; default: the checkpoint's")
  parser.add_argument('--max_tokens', type=int, default=0, help='stop after as many; 0 means all')
  parser.add_argument('--out', default='', help='folder for perplexity.json and profile.png')
  arguments = parser.parse_args(argv)
  if arguments.max_tokens < 0:
    parser.error(f'--max_tokens={arguments.max_tokens} must be 0 or more')
  try:
    result = measure(arguments)
  except (UserError, ValueError, ImportError, OSError) as error:
    print(f'perplexity: {error}', file=sys.stderr)
    return 2
  print(f'{result["tokens"]:,} tokens of {len(result["files"])} files: {result["nats_per_token"]:.4f} nats per token, '
        f'perplexity {result["perplexity"]:.3f}, {result["bits_per_byte"]:.4f} bits per byte')  # fmt: skip
  print('\n'.join(table(result['profile'])))
  if arguments.out:
    os.makedirs(arguments.out, exist_ok=True)
    path = os.path.join(arguments.out, 'perplexity.json')
    with open(path, 'w', encoding='utf-8') as file:
      json.dump(result, file, indent=1)
      file.write('\n')
    draw(result['profile'], os.path.join(arguments.out, 'profile.png'))
    print(f'wrote {path} and profile.png')
  return 0


if __name__ == '__main__':
  sys.exit(main())
