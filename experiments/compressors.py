"""Bits per byte of the usual compressors on given files: the yardstick beside a language model's.

All files are joined in the given order and compressed as one stream, which is the best case for a compressor: one
header, and what it learned from one file serves the next.
"""

import bz2
import lzma
import zlib

COMMANDS = ('gzip -9', 'bz2 -9', 'xz -9e')


def bits_per_byte(files):
  """Compressed bits per original byte, for each of COMMANDS.

  Args:
    files: [(name, bytes), ...] in the order in which they are joined.

  Returns:
    dict from the name of a compressor to bits per byte, headers included.

  Raises:
    ValueError: there is nothing to compress.
  """
  text = b''.join(content for _, content in files)
  if not text:
    raise ValueError(f'files={[name for name, _ in files]} hold no bytes, expected at least one byte')
  return {name: 8 * _size(name, text) / len(text) for name in COMMANDS}


def _size(name, text):
  if name == 'gzip -9':
    # The header and the check sum of a gzip file are 18 bytes, those of a zlib stream 6.
    return len(zlib.compress(text, 9)) + 12
  if name == 'bz2 -9':
    return len(bz2.compress(text, 9))
  return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
