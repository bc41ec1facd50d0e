"""models.generate: greedy against whole texts, rows alone against rows together, stops, streams, meshes, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models import sharding, state as states
from models.config import LayerSpec
from models.generate import Generated, Sampling, engine, generate, prefill, stream
from tests.models import small

NEW = 7
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]]
CASES = {
  'hybrid': {'layers': [LayerSpec(window=3), LayerSpec()], 'sinks': True},
  'rings': {'layers': [LayerSpec(window=1), LayerSpec(chunk=4), LayerSpec(window=6, chunk=5)], 'depth': 3},
  'scanned': {'layers': [LayerSpec(window=4), LayerSpec()], 'depth': 4, 'scan': True},
}
SAMPLED = {'sampling': Sampling(temperature=1.5), 'key': jax.random.key(5)}


@pytest.fixture(autouse=True)
def in_double_precision():
  """So that rows in other company, chunks and caches give the same tokens, not almost always the same."""
  with jax.enable_x64(True):
    yield


@functools.cache
def model(name='hybrid', dtype='float64', **changes):
  return small.model(**CASES[name] | changes, dtype=dtype, param_dtype=dtype)


@functools.cache
def single():
  return small.model(depth=1)


def logits_behind(model, prompts, rows):
  """The model's logits before each new token, from one pass over each whole text."""
  texts = np.zeros((len(rows), 32), np.int32)
  for b, (prompt, row) in enumerate(zip(prompts, rows)):
    texts[b, : len(prompt) + len(row)] = [*prompt, *row]
  logits = np.asarray(small.forward(model, texts), np.float64)
  return [logits[b, len(prompt) - 1 : len(prompt) + len(row) - 1] for b, (prompt, row) in enumerate(zip(prompts, rows))]


def check_log_probs(got, behind):
  """Log-probabilities are those of the logits alone."""
  for logits, (row,), (log_probs,) in zip(behind, got.tokens, got.log_probs):
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(log_probs, np.log(p[np.arange(len(row)), row]), rtol=1e-9)


def check_greedy(model, got, stops=()):
  """Every token is the most likely one of a whole pass, and texts end where they should."""
  behind = logits_behind(model, PROMPTS, [row for (row,) in got.tokens])
  for logits, (row,), finish in zip(behind, got.tokens, got.finish):
    assert row == logits.argmax(-1).tolist()
    assert not set(row[:-1]) & set(stops)
    assert finish == (['stop'] if row[-1] in stops else ['length'])
    assert len(row) == NEW or row[-1] in stops
  check_log_probs(got, behind)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('chunk', [3, 512])
def test_greedy_equals_teacher_forcing(name, chunk):
  check_greedy(model(name), generate(model(name), PROMPTS, NEW, prefill_chunk=chunk))


@pytest.mark.long
def test_half_precision():
  one = model(dtype='bfloat16')
  got = generate(one, PROMPTS, NEW)
  rows = [row for (row,) in got.tokens]
  for row, logits in zip(rows, logits_behind(one, PROMPTS, rows)):  # the most likely, but for rounding
    assert (logits.max(-1) - logits[np.arange(NEW), row]).max() < 0.02 * np.abs(logits).max()


def test_arrays_with_lengths_are_lists():
  prompts, lengths = np.full((4, 11), 99), [len(row) for row in PROMPTS]  # padding may be anything
  for row, prompt in zip(prompts, PROMPTS):
    row[: len(prompt)] = prompt
  assert generate(model(), prompts, NEW, lengths=lengths) == generate(model(), PROMPTS, NEW)
  assert isinstance(generate(model(), jnp.asarray(prompts % 23), 1), Generated)


def test_stop_tokens():
  free = generate(model(), PROMPTS, NEW)
  stops = [free.tokens[0][0][2], free.tokens[1][0][1], 0, 1]
  got = generate(model(), PROMPTS, NEW, stop_tokens=stops)
  check_greedy(model(), got, stops)
  assert len(got.tokens[0][0]) <= 3 and {'stop'} <= {finish[0] for finish in got.finish}


def test_lengths_share_programs():
  """Ten lengths of prompts and texts: one loop, and a program to read chunks of 16 tokens, and of 32."""
  programs = (engine._decode, engine._begin, prefill._read, prefill._empty)
  count = lambda: [program._cache_size() for program in programs]
  before = count()
  for length, new in zip([1, 2, 7, 16, 17, 18, 24, 30, 33, 20], [1, 40, 9, 33, 1, 31, 5, 2, 30, 12]):
    got = generate(single(), [[1] * length], new, stop_tokens=range(length % 3))
    assert len(got.tokens[0][0]) == new or got.finish == [['stop']]
  assert np.subtract(count(), before).tolist() == [1, 1, 2, 1]


def test_sizes():
  sizes = [prefill.capacity_for(n) for n in (1, 64, 65, 1000, 1025, 1281, 2048, 2049, 100_000)]
  assert sizes == [64, 64, 128, 1024, 1280, 1536, 2048, 2560, 114_688]
  assert prefill.chunks(0, 512) == []
  assert prefill.chunks(1030, 512) == [(0, 512), (512, 512), (1024, 16)]
  assert prefill.chunks(17, 512) == [(0, 32)] and prefill.chunks(90, 100) == [(0, 100)]
  assert prefill.chunks(12, 4) == [(0, 4), (4, 4), (8, 4)]


@functools.cache
def sampled():
  return generate(model(), PROMPTS, NEW, **SAMPLED)


def test_sampling_follows_the_key():
  assert generate(model(), PROMPTS, NEW, **SAMPLED) == sampled()
  assert generate(model(), PROMPTS, NEW, **SAMPLED | {'key': jax.random.key(6)}) != sampled()
  raw = jax.random.key_data(SAMPLED['key'])  # as of jax.random.PRNGKey
  assert generate(model(), PROMPTS, NEW, **SAMPLED | {'key': raw}) == sampled()


def test_rows_are_a_matter_of_key_prompt_and_sample():
  alone = generate(model(), PROMPTS[:2], NEW, **SAMPLED)
  assert alone.tokens == sampled().tokens[:2]
  other = generate(model(), [[1] * 20, *PROMPTS[1:]], 60, prefill_chunk=5, **SAMPLED)  # other chunks and capacity
  assert [row[0][:NEW] for row in other.tokens[1:]] == [row[0] for row in sampled().tokens[1:]]
  twice = generate(model(), PROMPTS[:2], NEW, samples=2, **SAMPLED)
  assert [row[:1] for row in twice.tokens] == alone.tokens
  assert all(row[0] != row[1] for row in twice.tokens)
  same = generate(model(), [PROMPTS[0]] * 2, NEW, samples=2, **SAMPLED)
  assert same.tokens[0] == twice.tokens[0] and same.tokens[1][0] not in same.tokens[0]


def test_two_tokens_have_the_right_frequencies():
  """In 2000 samples of one prompt: the second token, and how often it is the first one again."""
  n, temperature = 2000, 2.0
  got = generate(single(), [[3, 1]], 2, sampling=Sampling(temperature), key=jax.random.key(2), samples=n)
  texts = np.array([[3, 1, first] for first in range(23)], np.int32)
  p = np.exp(np.asarray(small.forward(single(), texts), np.float64) / temperature)
  p /= p.sum(-1, keepdims=True)
  first, second = p[0, 1], p[:, 2]
  drawn = np.array(got.tokens[0])
  error = 4 * np.sqrt(0.25 / n)
  for i, want in enumerate((first, first @ second)):
    np.testing.assert_allclose(np.bincount(drawn[:, i], minlength=23) / n, want, atol=error)
  np.testing.assert_allclose((drawn[:, 0] == drawn[:, 1]).mean(), first @ np.diag(second), atol=error)


def test_filters_that_leave_one_token_are_greedy():
  for filters in ({'top_k': 1}, {'top_p': 1e-6}, {'min_p': 1.0}):
    got = generate(model(), PROMPTS, NEW, sampling=Sampling(temperature=1.0, **filters), key=jax.random.key(0))
    check_greedy(model(), got)  # also of log_probs, which are not 0


def test_a_large_penalty_never_repeats():
  """Positive logits become nearly 0, negative ones very small: what was seen does not come again."""
  got = generate(model(), PROMPTS, NEW, sampling=Sampling(repetition_penalty=1e6))
  for prompt, (row,) in zip(PROMPTS, got.tokens):
    assert len(set(row)) == NEW and not set(row) & set(prompt)
  check_log_probs(got, logits_behind(model(), PROMPTS, [row for (row,) in got.tokens]))


class Letters:
  """A tokenizer whose tokens are a, b, c, ..."""

  def decode(self, ids):
    return ''.join(chr(97 + token) for token in ids)


def test_stop_strings_cut_the_text():
  free = generate(model(), PROMPTS, 60, tokenizer=Letters(), **SAMPLED)
  assert free.text[0] == [Letters().decode(free.tokens[0][0])]
  stop = free.text[0][0][40:43]
  got = generate(model(), PROMPTS, 60, tokenizer=Letters(), stop_strings=[stop, '?'], **SAMPLED)
  for text, whole, (row,), finish in zip(got.text, free.text, got.tokens, got.finish):
    end = whole[0].find(stop)
    assert text == [whole[0][: end if end >= 0 else 60]] and finish == ['stop' if end >= 0 else 'length']
    assert len(row) == (end + 3 if end >= 0 else 60)
  assert got.finish[0] == ['stop']


def test_the_stop_token_is_no_text():
  free = generate(model(), PROMPTS, NEW, tokenizer=Letters())
  got = generate(model(), PROMPTS, NEW, tokenizer=Letters(), stop_tokens=free.tokens[0][0][2:3])
  assert got.tokens[0][0][-1] == free.tokens[0][0][2]
  assert got.text[0] == [Letters().decode(got.tokens[0][0][:-1])]


def test_a_stream_is_the_whole_in_pieces():
  options = {'samples': 2, 'tokenizer': Letters(), 'stop_tokens': [7], **SAMPLED}
  want, seen = generate(model(), PROMPTS[:2], 40, **options), []
  assert generate(model(), PROMPTS[:2], 40, on_tokens=seen.append, **options) == want
  for pieces in (seen, list(stream(model(), PROMPTS[:2], 40, **options))):
    assert len(pieces) > 4 and len(pieces[0].tokens) == 1
    for b, s in np.ndindex(2, 2):
      of_row = [piece for piece in pieces if (piece.prompt, piece.sample) == (b, s)]
      assert [token for piece in of_row for token in piece.tokens] == want.tokens[b][s]
      assert [value for piece in of_row for value in piece.log_probs] == want.log_probs[b][s]
      assert ''.join(piece.text for piece in of_row) == want.text[b][s]
      assert [piece.finish for piece in of_row] == [''] * (len(of_row) - 1) + [want.finish[b][s]]


def caches(devices):
  """Live arrays that look like the entries of a full layer."""
  found = [x for x in jax.live_arrays() if x.ndim == 4 and x.shape[1:] == (2, 64, 4)]
  return [x for x in found if len(x.sharding.device_set) == devices and not x.is_deleted()]


def test_the_cache_is_held_once():
  before = {id(x) for x in caches(1)}
  held = []
  watch = lambda piece: held.append([x.shape[0] for x in caches(1) if id(x) not in before])
  generate(model(), PROMPTS[:2], NEW, samples=2, on_tokens=watch, **SAMPLED)
  assert held and all(shapes == [4, 4] for shapes in held)  # keys and values of the layer without a window


def test_the_loop_works_in_place():
  opened = prefill.open_model(single())
  cache, last, position = prefill.prefill(opened, [np.arange(9)], 40, 512)
  size = sum(x.nbytes for x in jax.tree.leaves(cache))
  state = engine.State(cache, last, position, np.zeros(1, np.int32), np.zeros(1, bool), None)
  arguments = np.zeros(1, bool), None, Sampling(), np.full(8, -1, np.int32), NEW, 32
  memory = engine._decode.lower(opened.graph, opened.params, state, *arguments).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= size


MESHES = [
  ({'data': 2, 'tensor': 2}, False),
  pytest.param({'data': 2, 'tensor': 2}, True, marks=pytest.mark.long),
  pytest.param({'fsdp': 2, 'data': 2, 'tensor': 2}, False, marks=pytest.mark.long),
  pytest.param({'tensor': 4, 'context': 2}, False, marks=pytest.mark.long),
]


@functools.cache
def on_one_device():
  return generate(model(vocab=24), PROMPTS[1:], NEW, **SAMPLED)


@pytest.mark.parametrize('sizes, is_given', MESHES)
def test_on_a_mesh(sizes, is_given):
  """Three prompts over two or four groups of devices, one row idle; the mesh of the context or of the parameters."""
  mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
  shapes = set()
  watch = lambda piece: shapes.update((x.shape, x.sharding.shard_shape(x.shape)) for x in caches(mesh.size))
  options = {'on_tokens': watch, **SAMPLED}
  if is_given:
    with jax.set_mesh(mesh):
      got = generate(model(vocab=24), PROMPTS[1:], NEW, **options)
  else:
    graph, params = states.split(model(vocab=24))
    params = jax.device_put(params, sharding.params_sharding(params, mesh))
    got = generate(states.merge(graph, params), PROMPTS[1:], NEW, **options)
  assert got.tokens == on_one_device().tokens and got.finish == on_one_device().finish
  np.testing.assert_allclose(np.array(got.log_probs), on_one_device().log_probs, rtol=1e-9)
  rows = sizes.get('data', 1) * sizes.get('fsdp', 1)
  padded = -(-3 // rows) * rows
  heads = 2 if sizes['tensor'] > 2 else 1  # four devices cannot share two heads
  assert shapes == {((padded, 2, 64, 4), (padded // rows, heads, 64, 4))}


@pytest.mark.parametrize('prompts, copies, parts', [(1, 8, 8), (3, 3, 2), (5, 1, 4), (9, 8, 8), (2, 3, 1), (1, 2, 8)])
def test_rows_of_prompts_are_cut_evenly(prompts, copies, parts):
  held_by, rows, of_row = prefill._layout(prompts, copies, parts)
  assert of_row.tolist() == [*np.repeat(range(prompts), copies), *[prompts] * (-prompts * copies % parts)]
  found = np.take_along_axis(held_by, rows, axis=1).ravel()
  np.testing.assert_array_equal(found[: prompts * copies], of_row[: prompts * copies])
  assert held_by.shape[1] <= -(-prompts // parts) + 1


@pytest.mark.parametrize('name', ['hybrid', 'scanned'])
def test_samples_lie_on_all_devices(name):
  """Three texts of each of three prompts over two devices: ten rows, one of them idle, and what they hold."""
  prompts = [np.array(row) for row in PROMPTS[1:]]
  read = lambda: prefill.prefill(prefill.open_model(model(name)), prompts, NEW, 512, 3)
  want, *want_rows = read()
  with jax.set_mesh(jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])):
    got, *got_rows = read()
  for x, y in zip(got_rows, want_rows):
    assert len(x) == 10 and x[:9].tolist() == y.tolist()
  assert got_rows[1][9] == -1 and got.length.sharding.shard_shape(got.length.shape) == (5,)
  axis = 1 if name == 'scanned' else 0
  for x, y in zip(jax.tree.leaves(got.layers), jax.tree.leaves(want.layers)):
    assert x.sharding.shard_shape(x.shape)[axis] == 5
    np.testing.assert_allclose(np.take(x, range(9), axis), y, rtol=1e-9, atol=1e-12)


def test_parameters_of_another_mesh():
  graph, params = states.split(model(vocab=24))
  of = lambda *sizes: jax.make_mesh(sizes, ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  placed = states.merge(graph, jax.device_put(params, sharding.params_sharding(params, of(2, 2))))
  with jax.set_mesh(of(4, 2)), pytest.raises(ValueError, match='parameters lie on the mesh'):
    generate(placed, PROMPTS, 1)


def test_broken_parameters_are_an_error():
  broken = small.model(depth=1, tied_embeddings=False)
  broken.embed.table[...] = broken.embed.table[...].at[5].set(jnp.nan)
  with pytest.raises(FloatingPointError, match=r'prompts\[1\]: the logits were NaN') as caught:
    generate(broken, [[1], [1, 5, 1]], 1, samples=2)
  assert caught.value.prompt == 1


def test_what_is_drawn_from_must_be_sound():
  """Finite logits that a penalty makes infinite."""
  large = small.model(depth=1, tied_embeddings=False)
  large.head.kernel[...] = large.head.kernel[...] * 1e32
  for options in (Sampling(repetition_penalty=1e-9), Sampling(1.0, repetition_penalty=1e-9)):
    with pytest.raises(FloatingPointError, match=r'prompts\[0\]'):
      generate(large, [list(range(23))], 1, sampling=options, key=jax.random.key(0))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'prompts': np.ones((2, 3))}, 'prompts are float'),
    ({'prompts': np.ones(3, int)}, r'expected integers \[B, T\]'),
    ({'prompts': np.ones((1, 0), int)}, 'one token or more'),
    ({'prompts': []}, r'prompts=\[\]'),
    ({'prompts': [[1], []]}, r'prompts\[1\] is float64 \(0,\), expected one token'),
    ({'prompts': None}, 'prompts=None: expected lists of tokens'),
    ({'prompts': 5}, 'prompts=5'),
    ({'prompts': [[1], [1, [2]]]}, r'prompts\[1\] is not even'),
    ({'prompts': [[1.5]]}, r'prompts\[0\] is float64'),
    ({'prompts': [[[1]]]}, r'prompts\[0\] is int64 \(1, 1\)'),
    ({'prompts': np.array([[1, 23]])}, r'prompts\[0\] holds token 23, expected 0 .. 22'),
    ({'prompts': [[1], [3, -1]]}, r'prompts\[1\] holds token -1, expected 0 .. 22'),
    ({'lengths': [1]}, r'lengths are int64 \(1,\)'),
    ({'lengths': [0, 2]}, r'lengths=\[0, 2\] must lie in 1 .. 3'),
    ({'lengths': [1, 4]}, r'lengths=\[1, 4\] must lie in 1 .. 3'),
    ({'prompts': [[1]], 'lengths': [1]}, 'lengths belong to prompts as an array'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'max_new_tokens': 1.5}, 'max_new_tokens=1.5'),
    ({'samples': 0}, 'samples=0'),
    ({'prefill_chunk': 0}, 'prefill_chunk=0'),
    ({'sampling': Sampling(top_p=0.0)}, 'top_p=0.0'),
    ({'sampling': 1.0}, r'sampling=1\.0 must be a Sampling'),
    ({'sampling': Sampling(temperature=1.0)}, 'key=None'),
    ({'sampling': Sampling(1.0), 'key': jax.random.split(jax.random.key(0))}, r'key is key<fry> \(2,\)'),
    ({'sampling': Sampling(1.0), 'key': jax.random.key(0, impl='rbg')}, 'threefry2x32'),
    ({'stop_tokens': [1, 23]}, r'stop_tokens: token=23 must be an integer in 0 .. 22'),
    ({'sampling': Sampling(1.0), 'key': 0}, r'key is int64 \(\), expected one key'),
    ({'sampling': Sampling(1.0), 'key': np.zeros(3, np.uint32)}, r'key is uint32 \(3,\)'),
    ({'stop_tokens': 5}, 'stop_tokens=5: expected a list of tokens'),
    ({'stop_tokens': None}, 'stop_tokens=None'),
    ({'stop_strings': None}, 'stop_strings=None: expected a list of texts'),
    ({'stop_strings': ['x']}, 'need a tokenizer'),
    ({'tokenizer': 3}, 'tokenizer=3 has no decode'),
    ({'model': 3}, 'model is a int without init_cache, extend_hidden, logits'),
    ({'stop_strings': [''], 'tokenizer': Letters()}, 'stop_strings'),
  ],
)
def test_rejects(changes, words):
  for call in (generate, stream):
    with pytest.raises(ValueError, match=words):
      call(**({'model': model(), 'prompts': np.ones((2, 3), int), 'max_new_tokens': 2} | changes))
