"""Checkpoints of the state and of the place in the data. The only module that knows Orbax.

A checkpoint has three items: `params` {path: array}, `optimizer` (its state and the step), `data` (the iterator).
"""

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from models import state as model_state
from train import config as configs, sharding, state as states, workdir as workdirs
from train.config import UserError


def manager(workdir, config):
  """An Orbax manager of WORKDIR/checkpoints that keeps the newest and saves in the background.

  Args:
    workdir: absolute path of the run.
    config: CheckpointConfig.
  """
  options = ocp.CheckpointManagerOptions(
    max_to_keep=config.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
  )
  return ocp.CheckpointManager(epath.Path(workdir) / workdirs.CHECKPOINTS, options=options)


def save(manager, step, state, iterator):
  """Starts to save; returns as soon as the arrays may change. A checkpoint exists whole or not at all."""
  args = ocp.args.Composite(
    params=ocp.args.StandardSave(state.params),
    optimizer=ocp.args.StandardSave({'step': state.step, 'opt_state': state.opt_state}),
    data=grain.checkpoint.CheckpointSave(iterator),
  )
  manager.save(step, args=args, force=True)


def restore(manager, abstract, shardings, iterator):
  """The newest checkpoint, straight into its placements; sets the iterator.

  Args:
    manager: of `manager`.
    abstract: State of shapes.
    shardings: State of placements.
    iterator: of train.data.batches.

  Returns:
    (steps done, State), or (0, None) if there is no checkpoint.

  Raises:
    UserError: it is damaged.
  """
  step = manager.latest_step()
  if step is None:
    return 0, None
  placed = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
  )
  args = ocp.args.Composite(
    params=ocp.args.StandardRestore(placed.params),
    optimizer=ocp.args.StandardRestore({'step': placed.step, 'opt_state': placed.opt_state}),
    data=grain.checkpoint.CheckpointRestore(iterator),
  )
  found = _restored(manager, step, args)
  return step, states.State(found.optimizer['step'], found.params, found.optimizer['opt_state'])


def load_model(workdir, step=None):
  """The model of a run, with the parameters of a checkpoint, on the first device.

  Args:
    workdir: path of the run.
    step: of the checkpoint; None means the newest.

  Returns:
    (train.config.Config, models.decoder.Decoder, step).

  Raises:
    UserError: no run or no checkpoint there, or it is damaged.
  """
  workdir = workdirs.expand(workdir)
  config = read_config(workdir)
  options = ocp.CheckpointManagerOptions(read_only=True)
  with ocp.CheckpointManager(epath.Path(workdir) / workdirs.CHECKPOINTS, options=options) as found:
    steps = sorted(found.all_steps())
    if not steps or (step is not None and step not in steps):
      wanted = 'a checkpoint' if step is None else f'a checkpoint of step {step}'
      raise UserError(f'workdir {workdir}: expected {wanted}, found {steps}')
    step = steps[-1] if step is None else step
    mesh = sharding.make_mesh(configs.MeshConfig(data=1), jax.local_devices()[:1])
    params = model_state.abstract_params(config.model)
    whole = sharding.params_sharding(params, mesh)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole[path]) for path, x in params.items()}
    params = _restored(found, step, ocp.args.Composite(params=ocp.args.StandardRestore(shapes))).params
  # Without the mesh, so that the arrays mix with any others.
  params = {path: jax.device_put(np.asarray(x), jax.local_devices()[0]) for path, x in params.items()}
  return config, model_state.merge(model_state.graph(config.model), params), step


def _restored(manager, step, args):
  try:
    return manager.restore(step, args=args)
  except (KeyError, ValueError, OSError) as error:
    wrong = f'{manager.directory / str(step)}: expected a whole checkpoint ({error})'
    raise UserError(f'{wrong}; without this folder, an older one counts') from error


def read_config(workdir):
  """The Config of the run in a workdir."""
  if not (workdir / workdirs.CONFIG).exists():
    raise UserError(f'workdir {workdir}: expected a run, found no {workdirs.CONFIG}')
  found = workdirs.read_json(workdir / workdirs.CONFIG)
  if not isinstance(found, dict) or not isinstance(found.get('config'), dict):
    is_model = isinstance(found, dict) and 'architectures' in found
    what = 'it is a checkpoint, not a run' if is_model else f'its {workdirs.CONFIG} is of something else'
    raise UserError(f'workdir {workdir}: expected a run; {what}')
  return configs.from_dict(configs.Config, found['config'])
