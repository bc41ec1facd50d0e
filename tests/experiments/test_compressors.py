"""Bits per byte are those of the files that the commands would write."""

import bz2
import gzip
import lzma

import pytest

from experiments import compressors

FILES = [('a', b'spam and eggs ' * 300), ('b', bytes(range(256)) * 4)]


def test_sizes_are_those_of_whole_files():
  text = FILES[0][1] + FILES[1][1]
  sizes = {
    'gzip -9': len(gzip.compress(text, 9, mtime=0)),
    'bz2 -9': len(bz2.compress(text, 9)),
    'xz -9e': len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
  }
  assert compressors.bits_per_byte(FILES) == {name: 8 * size / len(text) for name, size in sizes.items()}


def test_nothing_to_compress_is_an_error():
  with pytest.raises(ValueError, match='no bytes'):
    compressors.bits_per_byte([('empty', b'')])
