"""models.speculative: greedy texts against teacher forcing, what the caches hold, statistics, and bad arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import speculative
from models.config import LayerSpec
from models.generate import Sampling, generate
from models.speculative import Tree, loop
from tests.models import small

NEW = 12
RAGGED = Tree.from_parents([-1, 0, 0, 0, 1, 1, 3, 4])
PROMPTS = [row[:n].tolist() for row, n in zip(small.tokens(batch=4, length=9), (6, 1, 4, 9))]


def noisy(model, scale=0.05):
  """A model that often agrees: its parameters with noise."""
  graph, state = nnx.split(model)
  rng = np.random.default_rng(5)
  return nnx.merge(graph, jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), state))


@functools.cache
def models(name):
  """A target and a draft."""
  if name == 'windows':
    target = small.model(layers=[LayerSpec(window=3), LayerSpec()], sinks=True)
    return target, noisy(target)
  if name == 'scanned':
    other = {'layers': [LayerSpec(window=5)], 'depth': 1, 'width': 12, 'heads': 3, 'kv_heads': 3, 'dtype': 'bfloat16'}
    return small.model(layers=small.HYBRID, depth=4, scan=True), small.model(seed=1, **other)
  if name == 'rings':
    target = small.model(layers=[LayerSpec(window=1), LayerSpec(chunk=4), LayerSpec(window=6, chunk=5)], depth=3)
    return target, noisy(target)
  if name == 'scanned draft':
    return small.model(depth=1), small.model(seed=2, layers=[LayerSpec(window=4)], depth=2, scan=True)
  raise KeyError(name)


TREES = {'windows': RAGGED, 'scanned': (1, 1), 'rings': (2, 2), 'scanned draft': (1, 1, 1, 1)}
# Two cases suffice where every round is looked at, and other two where texts are: each of the rest is `long`.
ROUNDS = [pytest.param(name, marks=[pytest.mark.long] * (name in ('rings', 'scanned draft'))) for name in TREES]
TEXTS = [pytest.param(name, marks=[pytest.mark.long] * (name == 'scanned')) for name in TREES]


@functools.cache
def oracle(name, new=NEW):
  """Greedy texts, the whole text again for every token: (tokens, log-probabilities) of each prompt."""
  texts = []
  for prompt in PROMPTS:
    text, log_probs = list(prompt), []
    while len(text) < len(prompt) + new:
      padded = np.zeros((1, 9 + NEW), np.int32)
      padded[0, : len(text)] = text
      logits = np.asarray(small.forward(models(name)[0], padded)[0, len(text) - 1], np.float64)
      text.append(int(np.argmax(logits)))
      log_probs.append(logits[text[-1]] - np.log(np.exp(logits).sum()))
    texts.append((text[len(prompt) :], log_probs))
  return texts


@pytest.mark.parametrize('name', TEXTS)
def test_greedy_equals_teacher_forcing(name):
  got, statistics = speculative.generate(*models(name), PROMPTS, NEW, widths=TREES[name])
  for tokens, log_probs, finish, want in zip(got.tokens, got.log_probs, got.finish, oracle(name)):
    assert tokens == [want[0]] and finish == ['length']
    np.testing.assert_allclose(log_probs[0], want[1], atol=1e-4)
  assert statistics.tokens.tolist() == [NEW] * 4
  # What a call gives beyond one token was accepted, and what was accepted was tried.
  assert (statistics.tokens <= statistics.target_calls + statistics.accepted.sum(1)).all()
  assert (statistics.tokens > statistics.target_calls - 1 + statistics.accepted.sum(1) - 1).all()
  assert (statistics.accepted <= statistics.tried).all() and (statistics.tried[:, 0] == statistics.target_calls).all()
  assert (statistics.tried[:, 1:] <= statistics.accepted[:, :-1]).all()
  if name == 'windows':  # something was accepted, and something was not, at every depth
    assert 0 < statistics.acceptance[0] < 1 and statistics.accepted.sum(0).all()


@pytest.mark.parametrize('name', ROUNDS)
def test_caches_hold_exactly_the_text(name, monkeypatch):
  """After every round: the entries are those of a fresh cache that read the text but for its last token (or two)."""
  states = []

  def watched(*args):
    state, outcome = advance(*args)
    states.append(jax.tree.map(np.array, state))
    return state, outcome

  advance = loop.advance
  monkeypatch.setattr(loop, 'advance', watched)
  got, statistics = speculative.generate(*models(name), PROMPTS, NEW, widths=TREES[name])
  late = 0
  for state in states[: statistics.target_calls.min() - 1]:  # all rows are running
    for which, model in zip(('target', 'draft'), models(name)):
      cache = getattr(state, which)
      texts = [prompt + new[0] for prompt, new in zip(PROMPTS, got.tokens)]
      held = state.position - (state.before >= 0) * (which == 'draft')
      late += np.sum(state.before >= 0)
      index = np.arange(9 + NEW)
      tokens = np.array([text + [0] * (9 + NEW - len(text)) for text in texts], np.int32)
      positions = np.where(index < held[:, None], index, -1).astype(np.int32)
      _, fresh = small.extend(model, tokens, positions, model.init_cache(4, cache.capacity))
      np.testing.assert_array_equal(cache.length, held)
      for x, y in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(fresh.layers)):
        tolerance = {'int32': 0, 'float32': 1e-5, 'bfloat16': 0.05}[x.dtype.name]
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max())
  assert late or name != 'windows'  # the case in which the draft has yet to read an accepted leaf


@pytest.mark.parametrize('new', [1, 2, 10, 12])
def test_a_draft_equal_to_the_target_is_always_accepted(new):
  target, _ = models('windows')
  got, statistics = speculative.generate(target, target, PROMPTS, new, widths=RAGGED)  # first children: three deep
  assert got.tokens == [[tokens[:new]] for tokens, _ in oracle('windows')]
  assert statistics.target_calls.tolist() == [-(-new // 4)] * 4
  rounds, rest = divmod(new, 4)
  want = [rounds + (rest > depth) for depth in range(3)]
  assert statistics.tried.tolist() == statistics.accepted.tolist() == [want] * 4
  np.testing.assert_array_equal(statistics.tokens_per_call, new / -(-new // 4))
  np.testing.assert_array_equal(statistics.acceptance, [1.0 if n else np.nan for n in want])


@pytest.mark.parametrize('draft', [0, 1], ids=['equal', 'noisy'])
@pytest.mark.parametrize('at', range(NEW))
def test_a_stop_token_cuts_an_accepted_run(at, draft):
  """Wherever it comes: in the middle of a path, at its end, as the token behind it."""
  target = models('windows')[0]
  full = oracle('windows')
  stops = [full[1][0][at], full[2][0][at]]
  got, _ = speculative.generate(target, models('windows')[draft], PROMPTS, NEW, widths=RAGGED, stop_tokens=stops)
  for [tokens], [finish], (want, _) in zip(got.tokens, got.finish, full):
    ends = [i for i, token in enumerate(want) if token in stops]
    assert tokens == want[: ends[0] + 1 if ends else NEW]
    assert finish == ('stop' if ends else 'length')


def test_prompts_are_read_in_chunks_and_rows_stand_alone():
  target, draft = models('windows')
  options = {'widths': RAGGED, 'stop_tokens': [oracle('windows')[0][0][3]]}
  whole, of_all = speculative.generate(target, draft, PROMPTS, NEW, **options)
  parts, _ = speculative.generate(target, draft, PROMPTS, NEW, prefill_chunk=3, **options)
  assert parts.tokens == whole.tokens
  other, of_other = speculative.generate(target, draft, PROMPTS[:2] + [[1], [2]], NEW, **options)
  assert other.tokens[:2] == whole.tokens[:2]
  np.testing.assert_array_equal(of_other.accepted[:2], of_all.accepted[:2])


@pytest.mark.long
@pytest.mark.parametrize('penalty', [1.0, 1.7])
@pytest.mark.parametrize('widths', [(1,), (4, 2, 1), RAGGED], ids=str)
def test_greedy_equals_generate(widths, penalty):
  target, draft = models('windows')
  sampling = Sampling(repetition_penalty=penalty)
  want = generate(target, PROMPTS, 30, sampling=sampling, stop_tokens=[7])
  got, _ = speculative.generate(target, draft, PROMPTS, 30, widths=widths, sampling=sampling, stop_tokens=[7])
  assert got.tokens == want.tokens and got.finish == want.finish
  for [a], [b] in zip(got.log_probs, want.log_probs):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.long
def test_rows_and_heads_on_a_mesh():
  """Three prompts and an idle row over four devices, and the draft's parameters on one."""
  target, draft = models('windows')
  want, statistics = speculative.generate(target, draft, PROMPTS[:3], NEW, widths=(2, 1))
  with jax.set_mesh(jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
    got, of_mesh = speculative.generate(target, draft, PROMPTS[:3], NEW, widths=(2, 1))
  assert got.tokens == want.tokens
  np.testing.assert_array_equal(of_mesh.accepted, statistics.accepted)


def test_broken_parameters_are_an_error():
  for which, name in enumerate(('target', 'draft')):
    pair = [small.model(layers=[LayerSpec(window=3), LayerSpec()], sinks=True) for _ in range(2)]
    pair[which].norm.scale[...] *= jnp.nan
    with pytest.raises(FloatingPointError, match=rf"prompts\[0\]: the {name}'s logits"):
      speculative.generate(*pair, PROMPTS, NEW, widths=RAGGED)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'draft': small.model(vocab=22)}, 'vocabulary of 22 tokens, expected the 23'),
    ({'widths': ()}, r'widths=\(\)'),
    ({'widths': (1, 0)}, r'widths=\(1, 0\)'),
    ({'widths': (24,)}, 'a node has 24 children, expected no more than the 23'),
    ({'prompts': []}, r'prompts=\[\]'),
    ({'prompts': [[1], []]}, r'prompts\[1\]'),
    ({'prompts': [[1, 23]]}, 'token 23'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'prefill_chunk': 0}, 'prefill_chunk=0'),
    ({'stop_tokens': [23]}, 'stop_tokens'),
    ({'sampling': 0.5}, 'sampling=0.5 must be a Sampling'),
    ({'sampling': Sampling(temperature=-1.0)}, 'temperature=-1.0'),
    ({'sampling': Sampling(temperature=1.0)}, 'key=None'),
    ({'sampling': Sampling(temperature=1.0), 'key': jax.random.split(jax.random.key(0))}, r'key is .* \(2,\)'),
    ({'sampling': Sampling(temperature=1.0), 'key': jax.random.key(0, impl='rbg')}, 'threefry'),
  ],
)
def test_rejects(changes, words):
  target, draft = models('windows')
  good = {'target': target, 'draft': draft, 'prompts': PROMPTS, 'max_new_tokens': 2}
  with pytest.raises(ValueError, match=words):
    speculative.generate(**(good | changes))
