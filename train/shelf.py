"""The checkpoints of a run as files: which are whole, which are left from a save cut short, and which have changed.

    checkpoints/STEP/         the files of a checkpoint; elsewhere in checkpoints/, unfinished ones
    manifests/STEP.json       its manifest, written last
    manifests/STEP.saving     a save began and its manifest is not written: so a missing manifest means no harm
    manifests/STEP.deleting   the checkpoint is an old one, of which parts may be gone
    bad_checkpoints/          those that were finished and have something wrong; nothing deletes them

A process may end at any line here. Only process 0 of a run changes anything.
"""

import errno
import re
import shutil

from train import manifest, workdir as workdirs
from train.config import UserError

LEFT = re.compile(r'\d+\.(orbax-checkpoint-tmp(-\d+)?|deleted)')  # names of unfinished folders


class Shelf:
  """The checkpoints of a run.

  Args:
    workdir: absolute pathlib.Path of the run.
  """

  def __init__(self, workdir):
    self.workdir = workdir
    self._checkpoints, self._manifests = workdir / workdirs.CHECKPOINTS, workdir / workdirs.MANIFESTS

  def folder(self, step):
    """Path of a checkpoint."""
    return self._checkpoints / str(step)

  def steps(self):
    """Steps of the checkpoints that were finished, in order."""
    return workdirs.saved_steps(self.workdir)

  def problems(self, step, items=()):
    """See manifest.problems."""
    return manifest.problems(self.folder(step), self._manifest(step), step, items=items)

  def newest_whole(self, say=print):
    """Step of the newest checkpoint whose files are as they were written; 0 if no save was ever finished.

    Args:
      say: called with a line for each checkpoint that is newer and not whole. One that was never finished is deleted,
        since nothing says what its files were; others are moved to bad_checkpoints/.

    Raises:
      UserError: there are checkpoints, and all have something wrong. Nothing was changed.
    """
    wrong, bad, newest = {}, set(), 0
    for step in reversed(self._all()):
      if self._mark(step, 'deleting').exists():
        continue
      if self._mark(step, 'saving').exists() and not self._manifest(step).exists():
        if self.folder(step).exists():
          wrong[step] = 'the run ended before its manifest was written'
      elif found := self.problems(step):
        wrong[step] = manifest.summary(found)
        bad.add(step)
      else:
        newest = step
        break
    if bad and not newest:
      lines = [f'step {step}: {text}' for step, text in wrong.items()]
      raise UserError(
        f'workdir {self.workdir}: no checkpoint is whole; nothing was changed. Put the files back, or move '
        f'{workdirs.CHECKPOINTS} and {workdirs.MANIFESTS} away to begin anew:\n  ' + '\n  '.join(lines)
      )
    for step, text in wrong.items():
      say(f'checkpoint of step {step}: {text}; {self._move(step) if step in bad else self._remove(step)}')
    self._sweep()
    return newest

  def begin(self, step):
    """Before a save."""
    for folder in (self._checkpoints, self._manifests):
      folder.mkdir(exist_ok=True)
    if self.folder(step).exists():  # an old one that could not be moved away
      raise FileExistsError(errno.EEXIST, 'there is one already', str(self.folder(step)))
    self._mark(step, 'saving').touch()

  def finish(self, step, keep):
    """After a save: writes the manifest, then deletes all but the newest `keep` checkpoints."""
    manifest.write(self.folder(step), self._manifest(step), step)
    self._mark(step, 'saving').unlink()
    for old in self.steps()[:-keep]:
      self._delete(old)

  def give_up(self, step):
    """After a save that failed: frees the space of what it had written so far."""
    for path in self._checkpoints.glob(f'{step}.*'):
      shutil.rmtree(path, ignore_errors=True)
    if self._mark(step, 'saving').exists() and not self._manifest(step).exists():
      shutil.rmtree(self.folder(step), ignore_errors=True)

  def bad(self):
    """Names in bad_checkpoints/."""
    return sorted(path.name for path in (self.workdir / workdirs.BAD_CHECKPOINTS).glob('*'))

  def _manifest(self, step):
    return self._manifests / f'{step}.json'

  def _mark(self, step, kind):
    return self._manifests / f'{step}.{kind}'

  def _all(self):
    """Steps that a folder or a manifest tells of, in order."""
    names = [path.name for path in self._checkpoints.glob('*')]
    names += [path.name.removesuffix('.json') for path in self._manifests.glob('*.json')]
    return sorted({int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name))})

  def _move(self, step):
    """Moves a checkpoint and its manifest to bad_checkpoints/; says what was done."""
    to = self.workdir / workdirs.BAD_CHECKPOINTS
    to.mkdir(exist_ok=True)
    taken = self.bad()
    count = next(i for i in range(len(taken) + 1) if not {f'{step}.{i}', f'{step}.{i}.json'} & {*taken})
    done = f'moved to {workdirs.BAD_CHECKPOINTS}/{step}.{count}'
    # The folder first: what is left if the process ends here is a manifest whose folder is missing, said once more.
    if self.folder(step).exists():
      try:
        _move(self.folder(step), to / f'{step}.{count}')
      except OSError as error:
        done = f'{self.folder(step)} cannot be moved to {to} ({error}): move it before the run comes to this step'
    # Without its manifest, a folder that stays does not count as a checkpoint.
    if self._manifest(step).exists():
      self._manifest(step).rename(to / f'{step}.{count}.json')
    return done

  def _remove(self, step):
    """Deletes a checkpoint that was never finished; says so."""
    shutil.rmtree(self.folder(step))
    return 'deleted'

  def _delete(self, step):
    self._mark(step, 'deleting').touch()
    self._manifest(step).unlink(missing_ok=True)
    aside = self._checkpoints / f'{step}.deleted'
    if self.folder(step).exists():
      self.folder(step).rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
    self._mark(step, 'deleting').unlink()

  def _sweep(self):
    """Ends deletions that were cut short, removes unfinished folders and marks that mean nothing any more."""
    for path in list(self._manifests.glob('*.deleting')):
      if path.stem.isascii() and path.stem.isdigit():
        self._delete(int(path.stem))
    for path in list(self._checkpoints.glob('*')):
      if LEFT.fullmatch(path.name):
        shutil.rmtree(path, ignore_errors=True)
    for path in [*self._manifests.glob('*.saving'), *self._manifests.glob('.*.tmp')]:
      path.unlink()


def _move(path, to):
  """Renames a folder; where that is on another disk, as checkpoints/ may be a link, copies and deletes it."""
  try:
    path.rename(to)
  except OSError as error:
    if error.errno != errno.EXDEV:
      raise
    try:
      shutil.copytree(path, to, symlinks=True)
    except OSError:
      shutil.rmtree(to, ignore_errors=True)
      raise
    shutil.rmtree(path)
