"""train.data.tokenizers: ids and bytes of texts, separators that are found or asked for, and what is refused."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.models.hf import made_tokenizers as made
from train.config import DataConfig, UserError
from train.data import tokenizers

TEXTS = ['the hello', ' a\n\n  b', 'é€😀', 'a</s>b<|end|><s>', 'x\ufffdy']


def load(tokenizer, separator=''):
  return tokenizers.load(DataConfig(tokenizer=str(tokenizer), separator=separator))


@given(st.lists(st.text(), max_size=4))
def test_bytes(texts):
  found = load('bytes')
  encoded = found.encode_texts([text.encode() for text in texts])
  assert [bytes(ids) for ids in encoded] == [text.encode() for text in texts]
  assert found.count_bytes(encoded) == [len(text.encode()) for text in texts]
  assert (found.separator, found.vocab, found.least_vocab, found.unit, found.fingerprint) == (
    256,
    257,
    257,
    'byte',
    'bytes',
  )


@pytest.mark.parametrize('kind', ['byte_level', 'fallback', 'fallback_strip'])
def test_ids_of_a_file_are_the_librarys_with_nothing_around_them(tmp_path, kind):
  library = made.KINDS[kind]()
  found = load(made.folder(tmp_path, library), '</s>')
  library.encode_special_tokens = True
  encoded = found.encode_texts([text.encode() for text in TEXTS])
  for text, ids in zip(TEXTS, encoded, strict=True):
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert found.separator not in ids
    assert found.decode(ids) == text
  assert found.count_bytes(encoded) == [len(text.encode()) for text in TEXTS]
  content = (tmp_path / 'tokenizer.json').read_bytes()
  assert found.fingerprint == hashlib.sha256(content).hexdigest()
  assert load(tmp_path / 'tokenizer.json', '</s>').fingerprint == found.fingerprint


@pytest.mark.parametrize(
  'name, config, want',
  [
    ('config.json', {'eos_token_id': 258}, 258),
    ('config.json', {'eos_token_id': [259, 258]}, 259),
    ('generation_config.json', {'eos_token_id': 258}, 258),
    ('tokenizer_config.json', {'eos_token': '</s>'}, None),
    ('tokenizer_config.json', {'eos_token': {'content': '</s>', 'special': True}}, None),
  ],
)
def test_the_separator_is_the_end_of_text_of_the_folder(tmp_path, name, config, want):
  library = made.byte_level()
  made.folder(tmp_path, library)
  (tmp_path / name).write_text(json.dumps(config))
  assert load(tmp_path).separator == (want if want is not None else library.token_to_id('</s>'))


def test_a_separator_is_a_text_or_a_number(tmp_path):
  library = made.byte_level()
  made.folder(tmp_path, library, eos_token_id=1)
  assert load(tmp_path, '<|end|>').separator == library.token_to_id('<|end|>')
  found = load(tmp_path, '1000')
  assert (found.separator, found.vocab, found.least_vocab) == (1000, 1001, 1001)
  assert load('none', '50256').separator == 50256


def test_added_tokens_that_no_text_gives_need_no_place_in_the_model(tmp_path):
  library = made.byte_level()
  pieces = library.get_vocab_size(with_added_tokens=False)
  found = load(made.folder(tmp_path, library), '3')
  assert found.least_vocab == pieces
  assert found.vocab == library.get_vocab_size()


def test_no_text_counts_ids():
  found = load('none', '5')
  assert found.count_bytes([np.arange(3), np.arange(4)]) == [3, 4]
  assert (found.unit, found.separator, found.least_vocab) == ('token', 5, 6)


@pytest.mark.parametrize(
  'tokenizer, separator, words',
  [
    ('bytes', '0', "data.separator='0': expected '' or 256"),
    ('none', '', "data.separator='': expected the id"),
    ('none', '</s>', "data.separator='</s>': expected the id"),
    ('none', '4294967296', 'expected the id'),
    ('none', '٣', "data.separator='٣': expected the id"),
    ('{}', '٣', r"data.separator='٣': .*has no such token"),
    ('/nothing/here', '', "data.tokenizer='/nothing/here': expected 'bytes', 'none', a tokenizer.json or a folder"),
    ('', '', "data.tokenizer='': expected 'bytes'"),
    ('{}', '', r"no config file beside the tokenizer names one; its special tokens are '<s>' \(264\), '</s>' \(265\)"),
    ('{}', '<eot>', "data.separator='<eot>': .*tokenizer.json has no such token; its special tokens are"),
    ('{}', '4294967296', 'expected an id below'),
  ],
)
def test_rejects(tmp_path, tokenizer, separator, words):
  made.folder(tmp_path, made.byte_level())
  with pytest.raises(UserError, match=words):
    load(tokenizer.format(tmp_path), separator)


@pytest.mark.parametrize('content', ['', '{"model": 1}', 'no JSON'])
def test_rejects_other_files(tmp_path, content):
  (tmp_path / 'tokenizer.json').write_text(content)
  with pytest.raises(UserError, match=r'data.tokenizer: .*tokenizer.json: expected a tokenizer'):
    load(tmp_path, '0')


def test_rejects_a_damaged_config_beside(tmp_path):
  made.folder(tmp_path, made.byte_level())
  (tmp_path / 'config.json').write_text('{"eos')
  with pytest.raises(UserError, match=r'config.json: expected JSON .*or name data.separator'):
    load(tmp_path)
  assert load(tmp_path, '3').separator == 3


def test_the_model_must_hold_the_ids():
  tokenizers.check_vocab(257, 257, 'bytes')
  with pytest.raises(UserError, match=r'model.vocab=256: expected at least 257, for the ids of bytes'):
    tokenizers.check_vocab(257, 256, 'bytes')
