"""models.hf.tokenizers: what a folder may hold, ids and texts, and its bad cases."""

import json
import sys

import pytest
from hypothesis import given, strategies as st

from models.hf import tokenizers as hf_tokenizers
from models.hf.tokenizers import SEPARATOR, ByteTokenizer
from tests.models.hf import made_tokenizers as made
from train import config as training

TEXTS = ['', 'the hello', ' a\n\n  b', 'é€😀', 'x\ufffdy']


def folder(path, files):
  for name, text in files.items():
    (path / name).write_text(text, encoding='utf-8')
  return path


@given(st.text())
def test_bytes_there_and_back(text):
  ids = ByteTokenizer().encode(text)
  assert ids == [256, *text.encode()]
  assert ByteTokenizer().encode(text, add_special=False) == ids[1:]
  assert ByteTokenizer().decode(ids) == text
  assert ByteTokenizer().decode([*ids, 256, 300]) == text


def test_bytes_are_those_of_training(tmp_path):
  found = hf_tokenizers.tokenizer(folder(tmp_path, {'config.json': '{"tokenizer": "bytes", "vocab_size": 257}'}))
  assert isinstance(found, ByteTokenizer)
  assert found.vocab == 257
  assert SEPARATOR == training.SEPARATOR
  assert found.decode([0xC3]) == '\ufffd'


@pytest.mark.parametrize('kind', ['byte_level', 'fallback', 'fallback_strip'])
def test_there_and_back(kind, tmp_path):
  library = made.KINDS[kind]()
  found = hf_tokenizers.tokenizer(made.folder(tmp_path, library))
  assert found.vocab == library.get_vocab_size()
  for text in TEXTS:
    assert found.decode(found.encode(text)) == text
    assert found.encode(text) == library.encode(text).ids
    assert found.encode(text, add_special=False) == library.encode(text, add_special_tokens=False).ids
  has_bos = kind != 'byte_level'
  assert (found.encode('a')[0] == 1) == has_bos
  assert found.encode('a', add_special=False)[0] != 1


def test_only_single_bytes_of_a_run_are_open(tmp_path):
  found = hf_tokenizers.tokenizer(made.folder(tmp_path / 'a', made.with_fallback()))
  byte, piece = found.encode('€', add_special=False)[-1], found.encode('the', add_special=False)[0]
  assert [found.is_open(i) for i in (byte, piece, 10**6)] == [True, False, True]
  found = hf_tokenizers.tokenizer(made.folder(tmp_path / 'b', made.byte_level()))
  assert not any(found.is_open(i) for i in range(found.vocab))


def test_truncation_and_padding_of_a_file_are_left_out(tmp_path):
  library = made.byte_level()
  library.enable_truncation(3)
  library.enable_padding(length=50)
  found = hf_tokenizers.tokenizer(made.folder(tmp_path, library))
  assert found.decode(found.encode('hello hello')) == 'hello hello'


def test_added_tokens_beyond_the_model_matter_when_used(tmp_path):
  library = made.byte_level()
  last = library.token_to_id('<think>')
  found = hf_tokenizers.tokenizer(made.folder(tmp_path, library, vocab_size=last))
  assert found.encode('hello')
  with pytest.raises(ValueError, match=f"the text holds '<think>', id {last}; the model has ids 0 .. {last - 1}"):
    found.encode('hello <think>')


@pytest.mark.parametrize(
  'config', [{'vocab_size': 100}, {'decoder': {'vocab': 100}}, {'text_config': {'vocab_size': 100}}]
)
def test_more_ids_than_the_model(config, tmp_path):
  with pytest.raises(ValueError, match=r'tokenizer.json: its highest id is 263, the model has ids 0 .. 99'):
    hf_tokenizers.tokenizer(made.folder(tmp_path, made.byte_level(), **config))


@pytest.mark.parametrize(
  'files, words',
  [
    ({}, 'expected tokenizer.json, or "tokenizer": "bytes" in config.json, found neither'),
    ({'config.json': '{}', 'tokenizer.model': ''}, 'found neither; tokenizer.model is another form of it'),
    ({'tokenizer.json': '{"version": "1.0", "model"'}, 'expected a tokenizer that the package tokenizers can read'),
    ({'tokenizer.json': '{}'}, 'expected a tokenizer that the package tokenizers can read'),
    ({'config.json': '{"tokenizer": "words"}'}, 'tokenizer=\'words\', expected "bytes"'),
    ({'config.json': '{"tokenizer": "bytes"}', 'tokenizer.json': '{}'}, 'expected one tokenizer, found'),
    ({'config.json': '{"tokenizer": "bytes", "decoder": {"vocab": 256}}'}, r'has ids 0 .. 256, the model 0 .. 255'),
    ({'config.json': '{"tokenizer"'}, 'config.json: expected JSON'),
    ({'config.json': '{"decoder": null}'}, 'config.json: decoder=None, expected a JSON object or no such entry'),
    (
      {'config.json': '{"vocab_size": 9, "text_config": null}'},
      'config.json: text_config=None, expected a JSON object',
    ),
    ({'config.json': '{"vocab_size": "40"}'}, "config.json: vocab_size='40', expected a whole number of 1 or more"),
    ({'config.json': '{"vocab_size": true}'}, 'config.json: vocab_size=True, expected a whole number'),
    ({'config.json': '{"decoder": {"vocab": "x"}}'}, "config.json: decoder.vocab='x', expected a whole number"),
    ({'config.json': '{"text_config": {"vocab_size": 0}}'}, 'config.json: text_config.vocab_size=0, expected a whole'),
    ({'config.json': '[]'}, 'config.json: expected a JSON object, found list'),
  ],
)
def test_bad_folders(files, words, tmp_path):
  with pytest.raises(ValueError, match=words):
    hf_tokenizers.tokenizer(folder(tmp_path, files))


def test_no_folder(tmp_path):
  with pytest.raises(ValueError, match='nothing: expected the folder of a checkpoint'):
    hf_tokenizers.tokenizer(tmp_path / 'nothing')


def test_without_the_library(tmp_path, monkeypatch):
  made.folder(tmp_path, made.byte_level())
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ImportError, match=r'tokenizers, which is not installed: pip install -e .\[hf\]'):
    hf_tokenizers.tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').unlink()
  (tmp_path / 'config.json').write_text(json.dumps({'tokenizer': 'bytes'}), encoding='utf-8')
  assert hf_tokenizers.tokenizer(tmp_path).encode('a') == [256, 97]
