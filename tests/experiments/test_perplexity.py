"""experiments.perplexity: every token against a whole new pass over its context, and what the command says."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import perplexity
from models import hf
from models.config import LayerSpec
from tests.models import oracle, small
from train.config import UserError

LAYERS = {'vocab': 257, 'layers': [LayerSpec(window=6), LayerSpec()]}


@functools.cache
def model():
  return small.model(**LAYERS)


def document(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, count).tolist()


@functools.cache
def full_pass(tokens):
  """log softmax after each token of a text, in numpy float64."""
  logits = oracle.decoder(small.paths(model()), small.config(**LAYERS), np.array([tokens]))[0]
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def by_tokens(tokens, length, stride):
  """(losses, context sizes), a whole pass over its own context for each token: the first window that reaches it."""
  losses, seen = [], []
  for i in range(1, len(tokens)):
    start = 0
    while i > start + length:
      start += stride
    losses.append(-full_pass(tuple(tokens[start:i]))[-1, tokens[i]])
    seen.append(i - start)
  return losses, seen


@pytest.mark.parametrize('length, stride', [(8, 4), (8, 8), (8, 1), (7, 3)])
def test_every_token_is_scored_once_with_its_context(length, stride):
  documents = [document(count, count) for count in (0, 1, 2, length, length + 1, length + 2, 21)]
  got = perplexity.score(model(), documents, length=length, stride=stride, batch=3)
  for tokens, losses in zip(documents, got):
    want, seen = by_tokens(tokens, length, stride)
    np.testing.assert_allclose(losses, want, rtol=2e-5)
    assert losses.shape == (max(len(tokens) - 1, 0),)
    found = perplexity.contexts(len(tokens), length, stride)
    assert found.tolist() == seen
    assert all(n >= min(length - stride, i) for i, n in enumerate(found, 1))


def test_float64_is_exact():
  with jax.enable_x64(True):
    double = small.model(**LAYERS, dtype='float64', param_dtype='float64')
    single = small.paths(model())
    for path, array in small.paths(double).items():
      np.testing.assert_allclose(array, single[path], rtol=1e-6)
    (got,) = perplexity.score(double, [document(13)], length=8, stride=4)
    params, config = small.paths(double), small.config(**LAYERS)
    want = []
    for i in range(1, 13):
      start = 0 if i <= 8 else 4
      logits = oracle.decoder(params, config, np.array([document(13)[start:i]]))[0, -1]
      want.append(np.log(np.exp(logits).sum()) - logits[document(13)[i]])
  np.testing.assert_allclose(got, want, rtol=1e-10)


def test_batches_and_neighbours_change_nothing_and_share_a_program():
  documents = [document(count, count) for count in (5, 30, 1, 17)]
  perplexity.score(model(), documents[:1], length=8, stride=4, batch=3)
  before = perplexity._nll._cache_size()
  together = perplexity.score(model(), documents, length=8, stride=4, batch=3)
  assert perplexity._nll._cache_size() == before
  for batch in (1, 64):
    for got, want in zip(perplexity.score(model(), documents, length=8, stride=4, batch=batch), together):
      np.testing.assert_allclose(got, want, rtol=1e-5)
  for tokens, want in zip(documents, together):
    (alone,) = perplexity.score(model(), [tokens], length=8, stride=4, batch=3)
    np.testing.assert_allclose(alone, want, rtol=1e-5)


def test_progress_counts_every_token():
  counts = []
  perplexity.score(model(), [document(30), document(4)], length=8, stride=4, batch=3, on_tokens=counts.append)
  assert sum(counts) == 29 + 3


def test_profile_buckets():
  seen = np.array([1, 2, 3, 4, 4, 5, 8, 9])
  rows = perplexity.profile(np.arange(8.0), seen)
  assert [(row['from'], row['to'], row['tokens'], row['nats_per_token']) for row in rows] == [
    (1, 1, 1, 0), (2, 2, 1, 1), (3, 4, 3, 3), (5, 8, 2, 5.5), (9, 16, 1, 7)
  ]  # fmt: skip
  assert len(list(perplexity.table(rows))) == 6


def test_summary():
  got = perplexity.summary([np.array([math.log(2), math.log(8)]), np.zeros(0)], [2, 0])
  assert got == pytest.approx(
    {'tokens': 2, 'bytes': 2, 'nats_per_token': math.log(4), 'perplexity': 4, 'bits_per_byte': 2}
  )
  with pytest.raises(ValueError, match='0 tokens and 0 bytes'):
    perplexity.summary([np.zeros(0)], [0])


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'length': 0}, 'length=0'),
    ({'stride': 9}, r'stride=9 must be an integer in 1 .. 8'),
    ({'stride': 0}, 'stride=0'),
    ({'batch': 2.0}, 'batch=2.0'),
  ],
)
def test_rejects(changes, words):
  with pytest.raises(ValueError, match=words):
    perplexity.score(model(), [[1, 2]], **({'length': 8, 'stride': 4} | changes))


def test_broken_parameters_are_an_error():
  broken = small.model(**LAYERS)
  broken.norm.scale[...] = jnp.full(16, jnp.nan)
  with pytest.raises(FloatingPointError, match=r'documents\[1\]'):
    perplexity.score(broken, [[1], [1, 2]], length=8, stride=4, batch=3)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A folder as hf.save leaves it, with the byte tokenizer."""
  folder = tmp_path_factory.mktemp('model') / 'tiny'
  hf.save(folder, model(), small.config(**LAYERS), tokenizer='bytes')
  return folder


@pytest.fixture
def text(tmp_path):
  """A folder with files of several lengths."""
  folder = tmp_path / 'text'
  folder.mkdir()
  for name, content in (('a.txt', 'A first file. Größe.\n'), ('b.txt', ''), ('c.txt', 'x'), ('d.txt', 'and one more')):
    (folder / name).write_text(content, encoding='utf-8')
  return folder


def run(checkpoint, text, *more):
  return perplexity.main([f'--model={checkpoint}', f'--text={text}', '--length=8', '--stride=4', '--batch=3', *more])


def test_the_command(checkpoint, text, tmp_path, capsys):
  assert run(checkpoint, text, f'--out={tmp_path / "out"}') == 0
  said, stored = capsys.readouterr().out, json.loads((tmp_path / 'out/perplexity.json').read_text())
  losses, sizes = [], []
  for file in sorted(text.iterdir()):
    content = file.read_bytes()
    losses += by_tokens([256, *content], 8, 4)[0]  # the separator is the context of the first byte
    sizes.append(len(content))
  assert stored['tokens'] == stored['bytes'] == sum(sizes) and stored['length'] == 8
  assert [row['tokens'] for row in stored['files']] == sizes
  assert stored['nats_per_token'] == pytest.approx(np.mean(losses), rel=1e-5)
  assert stored['perplexity'] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
  assert stored['bits_per_byte'] == pytest.approx(np.mean(losses) / math.log(2), rel=1e-5)
  assert sum(row['tokens'] for row in stored['profile']) == sum(sizes)
  assert f'{stored["tokens"]} tokens of 4 files' in said and 'context tokens' in said
  assert (tmp_path / 'out/profile.png').read_bytes()[:4] == b'\x89PNG'


def test_max_tokens_cuts_the_text(checkpoint, text, tmp_path):
  assert run(checkpoint, text, f'--out={tmp_path}', '--max_tokens=25') == 0
  stored = json.loads((tmp_path / 'perplexity.json').read_text())
  assert stored['tokens'] == stored['bytes'] == 25
  assert [row['file'] for row in stored['files']] == ['a.txt', 'b.txt', 'c.txt', 'd.txt']


class Letters:
  """A tokenizer without a token that begins a text."""

  vocab = 256

  def encode(self, text):
    return list(text.encode())

  def decode(self, ids):
    return bytes(ids).decode()


def test_bytes_of_a_first_token_that_is_not_scored_do_not_count(text):
  names, documents, sizes = perplexity.read(str(text), Letters(), 256)
  assert names == ['a.txt', 'b.txt', 'c.txt', 'd.txt']
  assert [len(tokens) for tokens in documents] == [23, 0, 1, 12] and sizes == [22, 0, 0, 11]
  with pytest.raises(UserError, match=r'a.txt: the tokenizer gives id \d+, the model knows 0 .. 31'):
    perplexity.read(str(text), Letters(), 32)


def test_faults_of_the_text_name_the_file(checkpoint, text, capsys):
  (text / 'e.txt').write_bytes(b'good, then \xff')
  assert run(checkpoint, text) == 2
  assert 'e.txt: expected UTF-8, found byte 255 at 11' in capsys.readouterr().err
  assert run(checkpoint, text / 'none.txt') == 2
  assert 'none.txt' in capsys.readouterr().err
  (text / 'e.txt').unlink()
  (text / 'e.txt').symlink_to(text / 'gone')
  assert run(checkpoint, text) == 2
  assert 'e.txt: cannot be read' in capsys.readouterr().err
  assert run(checkpoint, text / 'b.txt') == 2
  assert '0 tokens and 0 bytes' in capsys.readouterr().err
  assert run(text, text) == 2
  assert 'perplexity: ' in capsys.readouterr().err
