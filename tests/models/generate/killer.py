"""`python -m tests.models.generate.killer N ...`: the command, killed in the middle of its N-th write."""

import os
import signal
import sys

from models.generate import __main__ as command, files


def main(fatal, argv):
  write, calls = files.Output.write, []

  def deadly(output, lines):
    calls.append(lines)
    if len(calls) == fatal:
      text = ''.join(lines)
      write(output, [text[: len(text) // 2]])
      os.kill(os.getpid(), signal.SIGKILL)
    write(output, lines)

  files.Output.write = deadly
  return command.main(argv)


if __name__ == '__main__':
  sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
