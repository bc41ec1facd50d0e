"""models.generate.stops: pieces of text against the decoding of all ids, for every way to cut them."""

import functools
import itertools

import pytest
from hypothesis import example, given, settings, strategies as st

from models.generate import stops
from models.hf.tokenizers import ByteTokenizer, FileTokenizer
from tests.models.hf import made_tokenizers as made

REPLACEMENT = '\ufffd'
KINDS = ['bytes', *made.KINDS]
STOPS = ['the', ' the', 'e\n', '\n\n', 'é', '€', 'hello', 'lo', 'aab', 'ab', 'b a', ' ', 'l' * 9]


@functools.cache
def tokenizer(kind, folder='/nowhere'):
  if kind == 'bytes':
    return ByteTokenizer()
  return FileTokenizer(made.folder(folder, made.KINDS[kind]()) / 'tokenizer.json')


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
  return {kind: tokenizer(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def oracle(tokenizer, ids, stop_strings, prompt=()):
  """Decodes all at once and cuts at the stop string that begins first."""
  before = tokenizer.decode(prompt)
  text = tokenizer.decode([*prompt, *ids])[len(before.removesuffix(REPLACEMENT)) :]
  return text[: min([len(text), *(text.index(stop) for stop in stop_strings if stop in text)])]


def pieces(tokenizer, ids, cuts, stop_strings, prompt=()):
  """What Text gives when the ids come in chunks that end at `cuts`."""
  text, shown, start = stops.Text(tokenizer, stop_strings, prompt), [], 0
  for end in [*sorted(cuts), len(ids)]:
    new, is_stopped = text.push(ids[start:end])
    shown.append(new)
    start = end
    if is_stopped:
      break
  return [*shown, text.finish()], text


CHARACTERS = [text.encode() for text in ('€', 'é', '😀', '\n\n')] + [b'\xe2\x82', b'\xff', b'\xac']
FIRST_BYTE = {'bytes': 0, 'fallback': 4, 'fallback_strip': 4}  # kinds whose byte ids stand in the order of bytes
PIECES = {'bytes': range(97, 103), 'byte_level': range(255, 269), 'metaspace': range(20)}  # other kinds: 260 .. 279


@st.composite
def cases(draw, kind):
  """(prompt, ids, cuts, stop strings): pieces of text, whole and cut characters, special and unknown ids."""
  vocab = 24 if kind == 'metaspace' else 285
  characters = [[FIRST_BYTE[kind] + byte for byte in text] for text in CHARACTERS] if kind in FIRST_BYTE else [[5]]
  usual = st.lists(st.sampled_from(PIECES.get(kind, range(260, 280))), max_size=6)
  run = st.one_of(usual, st.lists(st.integers(0, vocab), max_size=3), st.sampled_from(characters))
  ids = st.lists(run, max_size=9).map(lambda runs: list(itertools.chain(*runs)))
  prompt, ids = draw(st.one_of(st.just([]), ids)), draw(ids)
  cuts = draw(st.lists(st.integers(0, len(ids)), max_size=5))
  return prompt, ids, cuts, draw(st.lists(st.sampled_from(STOPS), max_size=3))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('has_prompt', [False, True])
def test_pieces_equal_the_whole(kind, has_prompt, tokenizers):
  @settings(max_examples=150, deadline=None)
  @given(cases(kind))
  def check(case):
    prompt, ids, cuts, stop_strings = case
    prompt = prompt if has_prompt else []
    want = oracle(tokenizers[kind], ids, stop_strings, prompt)
    for some in (cuts, range(len(ids))):
      got, text = pieces(tokenizers[kind], ids, some, stop_strings, prompt)
      assert ''.join(got) == want
      assert text.is_stopped == (want != oracle(tokenizers[kind], ids, (), prompt))
    assert stops.text_of(tokenizers[kind], ids, stop_strings, prompt) == want

  check()


@given(st.text('ab ', max_size=30), st.lists(st.text('ab ', min_size=1, max_size=5), max_size=4))
@example('aaab', ['aab'])
@example('abcd', ['bc', 'abcd'])
def test_stop_strings_that_overlap(text, stop_strings):
  ids = list(text.encode())
  got, _ = pieces(ByteTokenizer(), ids, range(len(ids)), stop_strings)
  assert ''.join(got) == oracle(ByteTokenizer(), ids, stop_strings)


def test_shows_nothing_that_is_not_decided():
  text = stops.Text(ByteTokenizer(), ['END.'])
  shown = [text.push([byte])[0] for byte in 'a€ENE END. more'.encode()]
  assert shown == ['a', '', '', '€', '', '', 'EN', 'E ', *[''] * 9]
  assert text.is_stopped
  assert text.count == len('a€ENE END.'.encode())
  assert text.push([97]) == ('', True)
  assert text.finish() == ''


def test_the_stop_string_that_begins_first_counts():
  text = stops.Text(ByteTokenizer(), ['bc', 'abcd'])
  assert text.push(b'xabc') == ('x', False)  # 'abcd' may still come
  assert text.push(b'd') == ('', True)
  text = stops.Text(ByteTokenizer(), ['bc', 'abcd'])
  assert text.push(b'xabc')[0] + text.push(b'e')[0] == 'xa'
  assert text.is_stopped
  text = stops.Text(ByteTokenizer(), ['ab', 'abcd'])
  assert text.push(b'xab') == ('x', True)  # where it is cut is certain


def test_a_stop_string_at_the_very_end():
  text = stops.Text(ByteTokenizer(), ['bc', 'abcd'])
  assert text.push(b'xabc') == ('x', False)
  assert text.finish() == 'a'
  assert text.is_stopped


def test_a_cut_character_at_the_end_is_shown_as_such():
  text = stops.Text(ByteTokenizer())
  assert text.push('a€'.encode()[:-1]) == ('a', False)
  assert text.finish() == REPLACEMENT


def test_a_leading_space_after_a_prompt(tokenizers):
  strips = tokenizers['fallback_strip']
  prompt, ids = strips.encode('hello'), strips.encode('the hello', add_special=False)
  assert stops.text_of(strips, ids) == 'the hello'
  assert stops.text_of(strips, ids, prompt=prompt) == ' the hello'


def test_a_prompt_that_ends_in_a_long_run_of_bytes(tokenizers):
  fallback = tokenizers['fallback']
  prompt, ids = fallback.encode('the €€€€'), fallback.encode('😀the', add_special=False)
  assert stops.text_of(fallback, ids, prompt=prompt) == '😀the'


class Counting:
  """Decodes bytes, and counts how many ids it is given."""

  def __init__(self):
    self.decoded = 0

  def decode(self, ids):
    self.decoded += len(ids)
    return ByteTokenizer().decode(ids)


@pytest.mark.parametrize('token', [ord('a'), 0x80, 0xE2, 256])
def test_work_does_not_grow_with_the_text(token):
  counting = Counting()
  text = stops.Text(counting, ['stop'])
  for _ in range(2000):
    text.push([token])
  assert counting.decoded < 2000 * 2 * (2 * stops.KEPT + 2)


@pytest.mark.parametrize('wrong', ['stop', [''], ['a', 5]])
def test_rejects(wrong):
  with pytest.raises(ValueError, match='stop_strings: expected texts of one character or more'):
    stops.Text(ByteTokenizer(), wrong)
