"""`python -m train.main` with a SIGKILL at a chosen point: python -m tests.train.killer POINT STEP FLAGS..."""

import os
import signal
import sys
import threading
import time

from absl import app

from train import checkpoint, data, main

TRAIN_BATCH = 8  # of tests.train.tiny; evaluation has another


def die():
  os.kill(os.getpid(), signal.SIGKILL)


def arm(point, step):
  """Kills at `step` steps after the start: 'step' (while it is computed) or 'between'; or in the 'save' of `step`."""
  prepared, managers = [], []
  to_global, save = data.to_global, checkpoint.save

  def count(local, arrays, batch, sharding):
    if batch == TRAIN_BATCH:
      prepared.append(local)
    if len(prepared) == step:
      for manager in managers:
        manager.wait_until_finished()
      threading.Timer(0.0005, die).start() if point == 'step' else die()
    return to_global(local, arrays, batch, sharding)

  def watched(manager, at, state, iterator):
    def die_when_it_has_begun():
      while not any('tmp' in name and name.startswith(str(at)) for name in os.listdir(manager.directory)):
        time.sleep(0)
      die()

    managers.append(manager)
    if point == 'save' and at == step:
      threading.Thread(target=die_when_it_has_begun, daemon=True).start()
      time.sleep(0.01)
    save(manager, at, state, iterator)

  data.to_global = count if point != 'save' else to_global
  checkpoint.save = watched


if __name__ == '__main__':
  arm(sys.argv[1], int(sys.argv[2]))
  del sys.argv[1:3]
  app.run(main.main, flags_parser=main.parse)
