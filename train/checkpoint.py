"""Checkpoints of the state and of the place in the data. The only module that knows Orbax.

A checkpoint has the items `params` {path: array}, `optimizer` {step, opt_state, skipped}, `ema` {path: array} if the
run keeps averages, and `data` (the iterator's state). Orbax gives back flipped bits without a word, so what it has
written is hashed (train/manifest.py), and read only if it is as it was.
"""

import copy
import errno
import os
import re
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from models import state as model_state
from train import (
  checks,
  config as configs,
  manifest,
  optimizer,
  processes,
  sharding,
  shelf as shelves,
  state as states,
  workdir as workdirs,
)
from train.config import UserError

WEIGHTS = ('', 'ema', 'raw')
TRIES = 5  # to load the newest checkpoint of a run that goes on, and deletes old ones
DETAIL = 120  # characters at either end of a library's message
_FULL = re.compile(r'No space left|Disk quota|File too large|RESOURCE_EXHAUSTED', re.I)


class SaveFailed(Exception):
  """A checkpoint could not be written. The message names the step, the reason, and what is left to go on from."""


class Checkpoints:
  """Context: saves a run in the background, one checkpoint at a time, and restores the newest whole one.

  Every process of a run makes the same calls.

  Args:
    workdir: absolute path of the run.
    config: CheckpointConfig.
  """

  def __init__(self, workdir, config):
    self._shelf, self._keep = shelves.Shelf(workdir), config.keep
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._thread: threading.Thread | None = None
    self._failed: BaseException | None = None

  def __enter__(self):
    return self

  def __exit__(self, kind, error=None, *unused):
    """Waits for what is being saved; if nothing else has gone wrong, SaveFailed."""
    if processes.is_lost(error):
      return  # what is being saved waits for a process that is gone, until jax aborts this one
    self._join()
    self._orbax.close()
    if kind is None:
      self.check()

  def newest(self):
    """Step of the newest finished checkpoint, 0 if there is none; waits for what is being saved, raises nothing."""
    self._join()
    return max(self._shelf.steps(), default=0)

  def save(self, step, state, iterator):
    """Starts to save; returns as soon as the arrays may change. A checkpoint exists whole or not at all.

    Args:
      step: steps done.
      state: State of arrays.
      iterator: of train.data.batches.

    Raises:
      SaveFailed: this save could not begin, or one before it has failed.
    """
    self.wait()
    items = {
      'params': ocp.args.StandardSave(state.params),
      'optimizer': ocp.args.StandardSave(_optimizer(state)),
      'data': ocp.args.JsonSave(copy.deepcopy(iterator.get_state())),  # written after the iterator has gone on
    }
    if state.ema:
      items['ema'] = ocp.args.StandardSave(state.ema)
    try:
      processes.first_only(lambda: self._shelf.begin(step), 'begin')
      self._orbax.save(self._shelf.folder(step), args=ocp.args.Composite(**items))
    except (OSError, ValueError, processes.Elsewhere) as error:
      self._failed = self._failure(step, error)
      raise self._failed from error
    self._thread = threading.Thread(target=self._finish, args=(step,), name=f'checkpoint {step}')
    self._thread.start()

  def check(self):
    """SaveFailed if a save has failed, or jax's error if another process is gone; waits for nothing."""
    if self._failed:
      raise self._failed

  def wait(self):
    """Waits until what is being saved is on the disk, with its manifest; SaveFailed if it cannot be."""
    self._join()
    self.check()

  def restore(self, abstract, placed, iterator, say=print):
    """The newest whole checkpoint, straight into its placements; sets the iterator.

    Args:
      abstract: State of shapes.
      placed: State of placements.
      iterator: of train.data.batches.
      say: called with a line about each checkpoint that is not whole; it is moved to bad_checkpoints/, or deleted if
        its save was never finished.

    Returns:
      (steps done, State), or (0, None) if no save was ever finished.

    Raises:
      UserError: no checkpoint is whole, or the newest one is of another model.
    """
    step = processes.first_only(lambda: self._shelf.newest_whole(say), 'restore')
    if not step:
      return 0, None
    shapes = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract, placed)
    items = {
      'params': ocp.args.StandardRestore(shapes.params),
      'optimizer': ocp.args.StandardRestore(_optimizer(shapes)),
      'data': ocp.args.JsonRestore(),
    }
    if shapes.ema:
      items['ema'] = ocp.args.StandardRestore(shapes.ema)
    found = _restored(self._orbax, self._shelf.folder(step), items)
    iterator.set_state(found.data)
    rest = found.optimizer
    ema = found.ema if shapes.ema else {}
    return step, states.State(rest['step'], found.params, rest['opt_state'], ema, rest['skipped'])

  def _finish(self, step):
    """In the background, after the arrays were copied: waits for Orbax, writes the manifest, deletes old ones."""
    try:
      self._orbax.wait_until_finished()
      processes.first_only(lambda: self._shelf.finish(step, self._keep), 'finish')
    except BaseException as error:
      self._failed = error if processes.is_lost(error) else self._failure(step, error)

  def _join(self):
    if self._thread:
      self._thread.join()
      self._thread = None

  def _failure(self, step, error):
    """The SaveFailed of an error; what was written is removed, since a full disk may be the reason."""
    if jax.process_index() == 0:
      self._shelf.give_up(step)
    newest = max((at for at in self._shelf.steps() if at != step), default=0)
    is_full = getattr(error, 'errno', 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or _FULL.search(str(error))
    reason = 'the disk is full, or a limit of it is reached' if is_full else 'it cannot be written'
    left = f'The checkpoint of step {newest} is untouched' if newest else 'There is no older checkpoint'
    detail = ' '.join(str(error).split()) or type(error).__name__
    detail = detail if len(detail) < 2 * DETAIL else f'{detail[:DETAIL]} ... {detail[-DETAIL:]}'
    count = sum(not name.endswith('.json') for name in self._shelf.bad())
    bad = f' ({workdirs.BAD_CHECKPOINTS} has {count} that nothing deletes)' if count else ''
    return SaveFailed(
      f'checkpoint of step {step}: {reason} ({detail}). {left}. Free some space{bad} or repair the disk; then the '
      'same command continues'
    )


def load_params(workdir, step=None, *, mesh=None, placed=None, weights=''):
  """The parameters of a run.

  Args:
    workdir: path of the run.
    step: of the checkpoint; None means the newest.
    mesh: to place the parameters on by the rules of training; None means on the first device.
    placed: {path: placement} of all parameters, instead of the mesh's.
    weights: 'ema' for the averages of the trained ones, 'raw' for the parameters themselves, '' for averages if the run
      kept them.

  Returns:
    (train.config.Config, {path: array}, step). Averages have the dtype of the parameters.

  Raises:
    UserError: no run or no checkpoint there, it is not as it was written, or the run kept no averages.
  """
  if weights not in WEIGHTS:
    raise ValueError(f'weights={weights!r}: expected one of {WEIGHTS}')
  workdir = workdirs.expand(workdir)
  config, shelf = read_config(workdir), shelves.Shelf(workdir)
  has_ema = bool(config.train.ema_decay)
  if weights == 'ema' and not has_ema:
    raise UserError(f"weights='ema': expected a run with train.ema_decay, {workdir} has train.ema_decay=0")
  is_averaged = has_ema and weights != 'raw'
  for tried in range(TRIES):
    chosen = _chosen(shelf, step)
    try:
      return config, _load(config, shelf, chosen, mesh, placed, is_averaged), chosen
    except UserError:
      if tried == TRIES - 1 or chosen in shelf.steps():  # else a run that goes on has deleted it meanwhile
        raise
  raise AssertionError


def _load(config, shelf, step, mesh, placed, is_averaged):
  """{path: array} of a checkpoint; UserError if it is not as it was written."""
  wanted = ('params', 'ema') if is_averaged else ('params',)
  if found := shelf.problems(step, wanted):
    others = ', '.join(str(at) for at in shelf.steps() if at != step) or 'none'
    raise UserError(f'{shelf.folder(step)}: expected a whole checkpoint; {manifest.summary(found)}; others: {others}')
  shapes = model_state.abstract_params(config.model)
  is_local = mesh is None and placed is None
  if placed is None:
    mesh = mesh or sharding.make_mesh(configs.MeshConfig(data=1), jax.local_devices()[:1])
    placed = sharding.params_sharding(shapes, mesh)
  shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[path]) for path, x in shapes.items()}
  items = {'params': ocp.args.StandardRestore(shapes)}
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
    if is_averaged:
      trained = optimizer.trainable(config.optimizer, config.model, list(shapes))
      averages = {path: jax.ShapeDtypeStruct(shapes[path].shape, np.float32, sharding=placed[path]) for path in trained}
      items['ema'] = ocp.args.StandardRestore(averages)
    found = _restored(orbax, shelf.folder(step), items)
  params = found.params
  if is_averaged:
    params = {**params, **{path: x.astype(params[path].dtype) for path, x in found.ema.items()}}
  if is_local:  # without the mesh, so that the arrays mix with any others
    params = {path: jax.device_put(np.asarray(x), jax.local_devices()[0]) for path, x in params.items()}
  return params


def load_model(workdir, step=None, weights=''):
  """The model of a run, with the parameters of a checkpoint, on the first device.

  Args:
    workdir: path of the run.
    step: of the checkpoint; None means the newest.
    weights: see `load_params`.

  Returns:
    (train.config.Config, models.decoder.Decoder, step).

  Raises:
    UserError: see `load_params`.
  """
  config, params, step = load_params(workdir, step, weights=weights)
  return config, model_state.merge(model_state.graph(config.model), params), step


def read_config(workdir):
  """The Config of the run in a workdir; UserError if there is none, or one with values of other types."""
  if not (workdir / workdirs.CONFIG).exists():
    raise UserError(f'workdir {workdir}: expected a run, found no {workdirs.CONFIG}')
  found = workdirs.read_json(workdir / workdirs.CONFIG)
  if not isinstance(found, dict) or not isinstance(found.get('config'), dict):
    is_model = isinstance(found, dict) and 'architectures' in found
    what = 'it is a checkpoint, not a run' if is_model else f'its {workdirs.CONFIG} is of something else'
    raise UserError(f'workdir {workdir}: expected a run; {what}')
  config = configs.from_dict(configs.Config, found['config'])
  checks.check_types(config)
  return config


def quiet():
  """For a program: keeps Orbax from printing what it raises, and TensorStore what follows from an error raised."""
  logging.set_verbosity(logging.FATAL)
  shown = sys.unraisablehook

  def hook(raised):
    # Writes that go on after one has failed report to an event loop that Orbax has left.
    if str(raised.exc_value) != 'Event loop is closed':
      shown(raised)

  sys.unraisablehook = hook


def leave(status):
  """For a program, as the last thing it does after an error: its exit status.

  After a save that could not begin, Orbax's threads wait for each other for minutes, and Python's end for them; then
  this ends the process at once.
  """
  if any(type(thread).__module__.startswith('orbax.') for thread in threading.enumerate()):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  return status


def _chosen(shelf, step):
  """The step to load: the newest finished one if it is None."""
  steps = shelf.steps()
  if not steps or (step is not None and step not in steps):
    wanted = 'a checkpoint' if step is None else f'a checkpoint of step {step}'
    raise UserError(f'workdir {shelf.workdir}: expected {wanted}, found {steps}')
  return steps[-1] if step is None else step


def _optimizer(state):
  return {'step': state.step, 'opt_state': state.opt_state, 'skipped': state.skipped}


def _restored(orbax, folder, items):
  try:
    return orbax.restore(folder, args=ocp.args.Composite(**items))
  except Exception as error:
    # TensorStore raises Exception itself where files are gone or unreadable.
    if not isinstance(error, (KeyError, ValueError, OSError)) and type(error) is not Exception:
      raise
    raise UserError(f'{folder}: expected a checkpoint of this config and model ({error})') from error
