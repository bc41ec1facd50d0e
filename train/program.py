"""Everything a run computes on devices, jitted and placed: no data, no folder. The loop runs it, and
train.compile_report compiles it for machines that are not there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from models import adapters, state as model_state
from train import distill, loss, optimizer, sharding, state as states, step as steps
from train.config import UserError


class Program(NamedTuple):
  """The functions of a run and where their arrays live.

  Attributes:
    config: train.config.Config.
    mesh: jax.sharding.Mesh.
    graph: of models.state.graph.
    trainable: paths of the trained parameters.
    init: (params={}) -> State, not jitted; see train.state.initializer.
    abstract: State of shapes.
    placed: State of placements.
    by_rows: placement of [B, T] arrays.
    whole: placement of what is on every device.
    train_step: (State, batch) -> (State, sums), jitted; the State is donated. With a teacher its parameters follow.
    eval_step: (params, batch) -> sums, jitted.
    is_finite: params -> bool scalar, jitted.
    also: names of sums of a step that are worth a line in metrics.jsonl.
  """

  config: Any
  mesh: Mesh
  graph: Any
  trainable: list
  init: Any
  abstract: states.State
  placed: states.State
  by_rows: NamedSharding
  whole: NamedSharding
  train_step: Any
  eval_step: Any
  is_finite: Any
  also: tuple

  def first_state(self, given=None):
    """The State before the first step, in its place.

    Args:
      given: {path: array in its place}, parameters that are not to be random; they are donated.
    """
    given = given or {}
    placed = ({path: self.placed.params[path] for path in given},)
    return jax.jit(self.init, in_shardings=placed, out_shardings=self.placed, donate_argnums=0)(given)

  def batch_shapes(self):
    """{name: shape, dtype and placement} of a training batch."""
    data = self.config.data
    kinds = dict.fromkeys(('tokens', 'targets', 'segment_ids'), jnp.int32)
    kinds |= dict.fromkeys(('weights', 'bytes'), jnp.float32)
    if self.mesh.shape['context'] > 1:
      kinds['positions'] = jnp.int32
    shape = (data.batch, data.seq_len)
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=self.by_rows) for name, kind in kinds.items()}


def make(config, mesh, teacher=None):
  """The Program of a config on a mesh.

  Args:
    config: checked train.config.Config.
    mesh: of train.sharding.make_mesh.
    teacher: train.distill.Teacher, or None; its parameters are an argument of the train step.

  Raises:
    UserError: rows, parameters or expressions that do not fit.
  """
  sharding.check_batch(config, mesh)
  train = config.train
  try:
    graph, shapes = model_state.graph(config.model), model_state.abstract_params(config.model)
  except ValueError as error:  # such as model.adapter_match, which needs the paths of what is made
    raise UserError(f'model: {error}') from error
  trainable = _trainable(config, list(shapes))
  tx = optimizer.make(config.optimizer, train.steps, {path: shapes[path] for path in trainable}, config.model)
  init = states.initializer(config.model, tx, config.seed, trainable, has_ema=bool(train.ema_decay))
  abstract = jax.eval_shape(init)
  placed = states.shardings(abstract, mesh)
  by_rows, whole = NamedSharding(mesh, sharding.ROWS), NamedSharding(mesh, P())

  def sums_of(params, batch, *teachers):
    model = model_state.merge(graph, params)
    if teacher is None:
      return loss.of_model(model, batch, train.loss_chunk, z_loss=train.z_loss)
    teaching = model_state.merge(teacher.graph, *teachers)
    return distill.of_models(model, teaching, batch, train.loss_chunk, config.distill, z_loss=train.z_loss)

  step = steps.trainer(
    sums_of,
    tx,
    optimizer.schedule(config.optimizer, train.steps),
    trainable=trainable,
    accumulate=train.accumulate,
    ema_decay=train.ema_decay,
    may_skip=bool(train.skip_nonfinite),
  )
  extra = () if teacher is None else (teacher.placed,)
  train_step = jax.jit(step, donate_argnums=0, in_shardings=(placed, by_rows, *extra), out_shardings=(placed, whole))
  eval_step = jax.jit(
    steps.evaluator(graph, loss_chunk=train.loss_chunk), in_shardings=(placed.params, by_rows), out_shardings=whole
  )
  is_finite = jax.jit(steps.is_finite, in_shardings=(placed.params,), out_shardings=whole)
  also: tuple = ('z',) if train.z_loss else ()
  if teacher is not None:
    also += tuple(f'distill_{name}' for name in ('outputs', 'features', 'attention') if getattr(config.distill, name))
  return Program(
    config, mesh, graph, trainable, init, abstract, placed, by_rows, whole, train_step, eval_step, is_finite, also
  )


def _trainable(config, paths):
  """The paths of the trained parameters; UserError if they are the adapters of a model that knows nothing."""
  found = optimizer.trainable(config.optimizer, config.model, paths)
  if not config.train.init_from and all(path.endswith(adapters.NAMES) for path in found):
    raise UserError(
      f"train.init_from='' with model.adapter_rank={config.model.adapter_rank}: only adapters would be trained, beside "
      'random parameters; expected the folder of a run or of a checkpoint, or an optimizer.trainable of more'
    )
  return found
