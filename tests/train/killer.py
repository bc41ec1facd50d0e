"""`python -m train.main` with a fault at a chosen point: python -m tests.train.killer POINT STEP FLAGS...

step      SIGKILL while the step is computed          commit    between Orbax's commit and the manifest of STEP
between   SIGKILL before it begins                    manifest  before the finished manifest has its name
save      SIGKILL while Orbax writes STEP             delete    in the middle of deleting what STEP makes old
full      no file may grow beyond 2,000 bytes while Orbax writes STEP
manifest-full  none may beyond 100 while the manifest of STEP is written
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
import threading
import time

from absl import app

from train import checkpoint, data, main, manifest, shelf

TRAIN_BATCH = 8  # of tests.train.tiny; evaluation has another


def die():
  os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def files_up_to(size):
  """As on a full disk, a write that makes a file larger fails, of libraries in other languages too."""
  _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def before(owner, name, action):
  """Calls action(arguments) before a function of a module or class."""
  real = getattr(owner, name)

  def call(*args, **options):
    action(*args)
    return real(*args, **options)

  setattr(owner, name, call)


def die_in_step(point, step):
  """Dies when the loop prepares its `step`-th batch, with nothing being saved."""
  count, all_saved = [], []
  before(checkpoint.Checkpoints, 'save', lambda saved, *_: all_saved.append(saved))

  def prepared(unused_local, unused_arrays, batch, *_):
    count.extend([batch] * (batch == TRAIN_BATCH))
    if len(count) == step:
      for saved in all_saved:
        saved.wait()
      threading.Timer(0.0005, die).start() if point == 'step' else die()

  before(data, 'to_global', prepared)


def arm(point, step):
  """Plants the fault."""
  is_now = lambda at: at == step

  def die_when_it_is_written(saved, at, *_):
    def wait():
      folder = saved._shelf.folder(at).parent
      while not any(path.name.startswith(f'{at}.') for path in folder.glob('*')):
        time.sleep(0)
      die()

    if is_now(at):
      threading.Thread(target=wait, daemon=True).start()
      time.sleep(0.01)

  def die_half_way(path, *_):
    if str(path).endswith('.deleted'):
      assert not os.path.exists(str(path).removesuffix('.deleted'))
      shutil.rmtree(os.path.join(path, 'params'))
      die()

  if point in ('step', 'between'):
    die_in_step(point, step)
  elif point == 'save':
    before(checkpoint.Checkpoints, 'save', die_when_it_is_written)
  elif point == 'commit':
    before(manifest, 'write', lambda _, path, at: is_now(at) and die())
  elif point == 'manifest':
    before(os, 'replace', lambda _, path: str(path).endswith(f'manifests/{step}.json') and die())
  elif point == 'delete':
    real_finish = shelf.Shelf.finish

    def finish(kept, at, keep):
      if is_now(at):
        before(shutil, 'rmtree', die_half_way)
      real_finish(kept, at, keep)

    shelf.Shelf.finish = finish
  else:
    owner, name, size = (checkpoint.Checkpoints, 'save', 2000) if point == 'full' else (manifest, 'write', 100)
    real = getattr(owner, name)

    def call(first, second, third, *rest):
      at = second if point == 'full' else third
      with files_up_to(size) if is_now(at) else contextlib.nullcontext():
        real(first, second, third, *rest)
        if point == 'full':
          first._join()

    setattr(owner, name, call)


if __name__ == '__main__':
  arm(sys.argv[1], int(sys.argv[2]))
  del sys.argv[1:3]
  app.run(main.main, flags_parser=main.parse)
