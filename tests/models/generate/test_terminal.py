"""models.generate.terminal: rows that grow together are shown one after the other; figures of speed."""

import io

from models.generate import terminal


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_rows_are_shown_in_order():
  out = io.StringIO()
  printer = terminal.Printer(['A', 'B', 'C'], out)
  shown = []
  for row, text, is_finished in [
    (0, 'a1', False), (1, 'b1', False), (0, 'a2\n', True), (2, 'c1', True), (1, 'b2', False), (1, '', True),
  ]:  # fmt: skip
    printer.take(row, text, is_finished)
    shown.append(out.getvalue())
  printer.end()
  assert shown[0] == shown[1] == 'A\na1'
  assert shown[2] == shown[3] == 'A\na1a2\nB\nb1'
  assert shown[4] == shown[3] + 'b2'
  assert out.getvalue() == shown[5] == 'A\na1a2\nB\nb1b2\nC\nc1\n'


def test_a_stopped_line_is_ended():
  out = io.StringIO()
  printer = terminal.Printer([''], out)
  printer.take(0, 'text', False)
  printer.end()
  printer.end()
  assert out.getvalue() == 'text\n'


def test_control_characters():
  for out, want in ((Terminal(), 'a\ufffd[2Jb\tc\n'), (io.StringIO(), 'a\x1b[2Jb\tc\n')):
    terminal.Printer([''], out).take(0, 'a\x1b[2Jb\tc', True)
    assert out.getvalue() == want


def test_what_is_text_stays():
  """Spaces of all kinds, joiners, soft hyphens and marks; not what moves the cursor or turns the line round."""
  text = 'a\u3000b\u00a0c\u200bd\u200de\u200cf\u00adg\u2009\u0301\U0001f469\u200d\U0001f4bb\ue000\n\t'
  assert terminal.visible(text) == text
  moving = '\x00\x07\r\x1b\x7f\x9b\ud800\u2028\u2029\u202a\u202e\u2066\u2069'
  assert terminal.visible(moving) == '\ufffd' * len(moving)


def test_clock():
  times = iter([10.0, 12.5, 12.5, 16.5])
  clock = terminal.Clock(lambda: next(times))
  clock.take(0, 1)
  clock.take(1, 1)
  clock.take(0, 8)
  assert clock.text(1) == (
    '10 tokens; the first after 2.50 s, in which 1 token of prompt were read and programs were compiled; '
    'then 2.0 tokens/s'
  )
