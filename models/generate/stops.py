"""Text as it is generated: whole characters, never the beginning of a stop string.

    text = Text(tokenizer, ['\\n\\n'])
    for ids in stream:
      piece, is_stopped = text.push(ids)
      print(piece, end='', flush=True)
      if is_stopped: break
    print(text.finish())

What the pieces come to does not depend on how the ids are cut into pushes.
"""

KEPT = 8  # ids that are decoded again with every new one; a character is at most 4 bytes, so at most 4 ids
REPLACEMENT = '\ufffd'


class Text:
  """The text of a growing list of ids, piece by piece.

      all pieces = decode(prompt + ids) after decode(prompt), up to the first place where a stop string begins

  A piece holds what later ids can no longer change: not a cut UTF-8 character (which decodes to U+FFFD), not a run of
  bytes that a tokenizer decodes as a whole, and no beginning of a stop string. The ids are decoded behind the last ones
  before them, because decoders treat the start of a text in a way of their own (a leading space is dropped). The work
  for an id does not grow with the text.

  Args:
    tokenizer: has decode(ids) -> str, and may have is_open(id) -> bool, see models/hf/tokenizers.py.
    stop_strings: texts that end the text; they are not part of it. Of several the one that begins first counts, even
      if it is complete later.
    prompt: ids that stand before.

  Attributes:
    is_stopped: whether a stop string was found.
    count: ids taken; ids pushed after a stop are not.

  Raises:
    ValueError: a stop string is empty or not a string.
  """

  def __init__(self, tokenizer, stop_strings=(), prompt=()):
    check_stop_strings(stop_strings)
    self._decode = tokenizer.decode
    self._is_open = getattr(tokenizer, 'is_open', lambda token: False)
    self._stops = tuple(stop_strings)
    self._longest = max(map(len, self._stops), default=0)
    self._window: list[int] = []  # the ids that are decoded again
    self._text, self._known = '', 0  # their text, and how many characters of it are certain
    self._held = ''  # certain characters that may begin a stop string
    self.is_stopped, self.count = False, 0
    self._anchor([int(token) for token in prompt])

  def push(self, ids):
    """Takes more ids.

    Returns:
      (new text, is_stopped: whether a stop string was found, now or before).
    """
    shown = ''
    for token in ids:
      if self.is_stopped:
        break
      self.count += 1
      shown += self._matched(self._settled(int(token)), is_last=False)
    return shown, self.is_stopped

  def finish(self):
    """What was held back, at the end of the ids; a cut character shows as U+FFFD. `is_stopped` may become true."""
    if self.is_stopped:
      return ''
    text = self._decode(self._window)
    new, self._known = text[self._known :], len(text)
    return self._matched(new, is_last=True)

  def _settled(self, token):
    """The characters that become certain with one more id."""
    self._window.append(token)
    if self._is_open(token):
      return ''
    before, self._text = self._text, self._decode(self._window)
    end = _certain(self._text)
    new, self._known = self._text[self._known : end], max(self._known, end)
    # A token without text, as a special one, need not be decoded again. At the start of a text only if there is
    # another of it: the first one may be a space that was dropped.
    if self._text == before and not self._decode([token]) and (before or token in self._window[:-1]):
      self._window.pop()
    if len(self._window) > 2 * KEPT:
      self._anchor(self._window)
    return new

  def _anchor(self, ids):
    """Decodes from here on behind the last of `ids` alone, of which at least one has text."""
    count = KEPT
    while True:
      self._window = list(ids[-count:])
      self._text = self._decode(self._window)
      self._known = _certain(self._text)
      # A run of bytes that goes on must be there from its start.
      is_torn = count < len(ids) and self._is_open(ids[-1]) and self._is_open(ids[-count])
      if count >= len(ids) or (self._known and not is_torn):
        return
      count *= 2

  def _matched(self, new, is_last):
    """What may be shown of the text held and the new one."""
    text = self._held + new
    found = min((i for i in map(text.find, self._stops) if i >= 0), default=len(text))
    begun = len(text)
    if not is_last:
      tails = range(max(0, len(text) - self._longest + 1), len(text))
      begun = next((i for i in tails if any(stop.startswith(text[i:]) for stop in self._stops)), begun)
    self.is_stopped = found < len(text) and found <= begun
    end = min(found, begun)
    self._held = '' if self.is_stopped else text[end:]
    return text[:end]


def text_of(tokenizer, ids, stop_strings=(), prompt=()):
  """All of the text of `ids`, which stand behind `prompt`: what `Text` gives in pieces."""
  text = Text(tokenizer, stop_strings, prompt)
  return text.push(ids)[0] + text.finish()


def check_stop_strings(stop_strings):
  """ValueError unless these are strings of at least one character."""
  wrong = [stop for stop in stop_strings if not isinstance(stop, str) or not stop]
  if isinstance(stop_strings, str) or wrong:
    shown = stop_strings if isinstance(stop_strings, str) else wrong[0]
    raise ValueError(f'stop_strings: expected texts of one character or more, got {shown!r}')


def _certain(text):
  """Characters that more bytes behind them cannot change: all but a last U+FFFD."""
  return len(text) - text.endswith(REPLACEMENT)
