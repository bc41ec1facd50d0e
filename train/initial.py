"""Parameters from elsewhere: of another run, or of a checkpoint that models.hf reads, to start with or to learn from.

    given = initial.params('runs/base', config.model, placed)       # {path: array}, those that the folder has

A folder is a run if its config.json is that of train.main, else a checkpoint. Fields of DecoderConfig that only say how
a model is run (RUN) may differ; scanned and unscanned forms are turned into each other.
"""

import dataclasses
import functools
import hashlib
import re

import jax
import jax.numpy as jnp

from models import adapters, hf, sharding, state as model_state
from models.hf import architectures, safetensors
from train import checkpoint, config as configs, manifest, shelf as shelves, workdir as workdirs
from train.config import UserError

RUN = ('dtype', 'param_dtype', 'remat', 'scan', 'implementation')  # how a model is computed and stored
ADAPTERS = ('adapter_rank', 'adapter_alpha', 'adapter_match')
LINES = 20  # fields that an error lists
SAMPLES, PIECE = 256, 1 << 18  # of a file of tensors: pieces that tell it from others, and the bytes of one


def params(folder, config, placed, *, name='train.init_from'):
  """The parameters that a run starts with.

  Args:
    folder: of a run, whose newest checkpoint counts (its averages, if it kept them), or of a checkpoint.
    config: DecoderConfig of the new run.
    placed: {path: NamedSharding} of its parameters, all of them.
    name: of the setting, for errors.

  Returns:
    {path: array in its place and in the dtype of the new run}. Adapters that the folder does not have are left out:
    they start as without it, and change nothing at first.

  Raises:
    UserError: no model there, a damaged one, or one that is not that of `config`: all that differs is named.
  """
  found = check(folder, config, name=name)
  mesh = next(iter(placed.values())).mesh
  wanted = {path: (x.shape, x.dtype, placed[path]) for path, x in model_state.abstract_params(config).items()}
  if not found.adapter_rank:
    wanted = {path: x for path, x in wanted.items() if not _is_adapter(path)}
  shapes = {path: x.shape for path, x in model_state.abstract_params(found).items()}
  is_same = shapes == {path: shape for path, (shape, *_) in wanted.items()}
  how = {'placed': {path: x[2] for path, x in wanted.items()}} if is_same else {'mesh': mesh}
  found, given = _read(folder, mesh, name, how, scan=config.scan, param_dtype=config.param_dtype)
  return _restacked(given, found, wanted, config)


def model(folder, mesh, *, name='distill.teacher'):
  """The model of a folder as it is stored, to learn from.

  Args:
    folder: as of `params`.
    mesh: jax.sharding.Mesh.
    name: of the setting, for errors.

  Returns:
    (DecoderConfig, {path: array placed by models.sharding}); adapters are merged.

  Raises:
    UserError: no model there, or a damaged one.
  """
  config, given = _read(folder, mesh, name, {'mesh': mesh})
  if config.adapter_rank:
    merged, config = adapters.merged(model_state.merge(model_state.graph(config), given), config)
    given = model_state.split(merged)[1]
  try:
    placed = sharding.params_sharding(given, mesh)
  except ValueError as error:
    raise UserError(f'{name}={str(folder)!r}: {error}') from error
  return config, {path: jax.device_put(x, placed[path]) for path, x in given.items()}


def check(folder, config, *, name='train.init_from'):
  """The DecoderConfig of a folder whose parameters a run can start with; they are not read.

  Args:
    folder: as of `params`.
    config: DecoderConfig of the new run.
    name: of the setting, for errors.

  Raises:
    UserError: no model there, or all that makes it another one than that of `config`.
  """
  found = read_config(folder, config, name=name)
  lines = _fields(found, config)
  if found.adapter_rank:
    mine, theirs = ([getattr(x, field) for field in ADAPTERS] for x in (config, found))
    lines += [f'{field}={y!r}, expected {x!r}' for field, x, y in zip(ADAPTERS, mine, theirs) if x != y]
  if not lines:
    return found
  if found.adapter_rank and not config.adapter_rank:
    lines.append('(python -m train.export writes a model with its adapters merged)')
  try:
    ours, theirs = (_apart(x) for x in (config, found))
  except ValueError as error:  # adapters that fit nowhere
    raise UserError(f'{name}={str(folder)!r} is not the model of this run: {error}') from error
  paths = [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]
  if not found.adapter_rank:
    paths = [path for path in paths if not _is_adapter(path)]
  said = [f'{path} {theirs.get(path, "is missing")}, expected {ours.get(path, "none")}' for path in paths]
  said = list(dict.fromkeys(re.sub(r'^blocks\.\d+', 'blocks.I', line) for line in said))  # once for all layers
  more = len(lines) - LINES
  shown = [*lines[:LINES], *([f'... and {more} more fields'] if more > 0 else []), *said]
  raise UserError(f'{name}={str(folder)!r} is not the model of this run:\n  ' + '\n  '.join(shown))


def identity(folder, *, name='train.init_from'):
  """What tells the parameters of a folder from others, for a run that goes on to find that they have changed.

  It is found before anything is computed or written, so a folder is refused here that could not be read later.

  Args:
    folder: as of `params`.
    name: of the setting, for errors.

  Returns:
    Dictionary for JSON. Of a run: the step of its newest checkpoint, the SHA-256 of its manifest, and whether its
    averages count; of a checkpoint: SHA-256 of config.json, and of each file of tensors its size and a SHA-256 of
    SAMPLES pieces of it. Neither says where the folder is.

  Raises:
    UserError: no model there; a run without a checkpoint, or whose newest is not as it was written; files of tensors
      that are cut short or have a bad header.
  """
  path = workdirs.expand(folder)
  try:
    if _is_run(path):
      return _run_identity(path)
    with safetensors.Folder(path):
      pass  # reads all headers
    files = sorted(path.glob('*.safetensors'))
    record = {'config': manifest.digest(path / workdirs.CONFIG)}
    return {**record, 'tensors': {file.name: [file.stat().st_size, _sample(file)] for file in files}}
  except (ValueError, OSError) as error:
    raise UserError(f'{name}={str(folder)!r}: {error}') from error


def _sample(path):
  """SHA-256 of pieces of a file, evenly spread, or of all of a small one. Training changes every tensor."""
  value, size = hashlib.sha256(), path.stat().st_size
  with open(path, 'rb') as file:
    for start in range(0, size, max(PIECE, size // SAMPLES)):
      file.seek(start)
      value.update(file.read(PIECE))
  return value.hexdigest()


def _run_identity(path):
  """See `identity`."""
  config, shelf = checkpoint.read_config(path), shelves.Shelf(path)
  step, has_averages = max(shelf.steps(), default=0), bool(config.train.ema_decay)
  if not step:
    raise UserError(f'{path}: expected a run with a checkpoint, found none')
  if found := shelf.problems(step, ('params', 'ema') if has_averages else ('params',)):
    raise UserError(f'{shelf.folder(step)}: expected a whole checkpoint; {manifest.summary(found)}')
  digest = manifest.digest(path / workdirs.MANIFESTS / f'{step}.json')
  return {'step': step, 'manifest': digest, 'averages': has_averages}


def without_adapters(config):
  """The DecoderConfig of a model after its adapters were merged."""
  return dataclasses.replace(config, adapter_rank=0, adapter_alpha=0.0, adapter_match='')


def read_config(folder, like=None, *, name='train.init_from'):
  """The DecoderConfig of a run or of a checkpoint, without its parameters.

  Args:
    folder: as of `params`.
    like: DecoderConfig; of a model with two sets of rotary frequencies, those of it are taken, if they are there.
    name: of the setting, for errors.

  Raises:
    UserError: no model there.
  """
  path = workdirs.expand(folder)
  try:
    if _is_run(path):
      return checkpoint.read_config(path).model.validate()
    longest, shortest = (hf.read_config(path, length=length)[0] for length in (None, 1))
    return shortest if like is not None and not _fields(shortest, like) else longest
  except (ValueError, OSError) as error:
    raise UserError(f'{name}={str(folder)!r}: {error}') from error


def _is_run(path):
  """Whether a folder holds a run, not a checkpoint; UserError if neither."""
  if not (path / workdirs.CONFIG).is_file():
    raise UserError(f'expected the folder of a run or of a checkpoint, found no {path / workdirs.CONFIG}')
  found = workdirs.read_json(path / workdirs.CONFIG)
  return not (isinstance(found, dict) and 'architectures' in found)


def _fields(found, config):
  """Lines for the fields, except those of RUN and ADAPTERS, in which two DecoderConfigs say different models."""
  same = {field: getattr(config, field) for field in (*RUN, *ADAPTERS)}

  def plain(config):
    config = architectures.normal(dataclasses.replace(config, **same))
    specs = [dataclasses.replace(config.spec(i), remat='') for i in range(config.depth)]
    return configs.flat(dataclasses.asdict(dataclasses.replace(config, layers=specs)))

  theirs, ours = plain(found), plain(config)
  if found.depth != config.depth:  # then layers need no comparison
    theirs, ours = ({key: x for key, x in values.items() if not key.startswith('layers')} for values in (theirs, ours))
  keys = dict.fromkeys([*theirs, *ours])
  absent = lambda values, key: repr(values[key]) if key in values else 'none'
  return [
    f'{key}={absent(theirs, key)}, expected {absent(ours, key)}' for key in keys if theirs.get(key) != ours.get(key)
  ]


def _apart(config):
  """{path in the unscanned model: shape}."""
  shapes = model_state.abstract_params(dataclasses.replace(config.validate(), scan=False))
  return {path: x.shape for path, x in shapes.items()}


def _is_adapter(path):
  return path.rpartition('.')[2] in adapters.NAMES


def _read(folder, mesh, name, how, **options):
  """(DecoderConfig, {path: array}) of a folder; `how` is for a run, `options` are for a checkpoint."""
  path = workdirs.expand(folder)
  try:
    if _is_run(path):
      config, given, _ = checkpoint.load_params(path, **how)
      return config.model, given
    loaded = hf.load(path, mesh=mesh, **options)
  except (ValueError, OSError) as error:
    raise UserError(f'{name}={str(folder)!r}: {error}') from error
  return loaded.config, model_state.split(loaded.model)[1]


def _restacked(given, found, wanted, config):
  """The parameters in the form of `config`; `given` is used up.

  Args:
    given: {path: array} of a model of the DecoderConfig `found`.
    found: DecoderConfig.
    wanted: {path: (shape, dtype, NamedSharding)}.
    config: DecoderConfig.
  """
  sources = {one: (path, slot) for path in given for slot, one in model_state.apart(path, found)}
  left = {path: len(model_state.apart(path, found)) for path in given}
  made = {}
  for path, (shape, dtype, place) in wanted.items():
    parts = [sources[one] for _, one in model_state.apart(path, config)]
    whole = given[parts[0][0]]
    if whole.shape == shape and {source for source, _ in parts} == {parts[0][0]}:
      made[path] = whole if (whole.dtype, whole.sharding) == (dtype, place) else _cast(dtype, place)(whole)
    else:
      is_stack = model_state.apart(path, config)[0][0] is not None
      layers = [given[source] if slot is None else _slot(given[source], slot) for source, slot in parts]
      made[path] = _stack(dtype, place)(*layers) if is_stack else _cast(dtype, place)(layers[0])
    for source, _ in parts:
      left[source] -= 1
      if not left[source]:
        del given[source]
  return made


@functools.cache  # so that all layers share a compilation
def _cast(dtype, place):
  return jax.jit(lambda x: x.astype(dtype), out_shardings=place)


@functools.cache
def _stack(dtype, place):
  return jax.jit(lambda *layers: jnp.stack(layers).astype(dtype), out_shardings=place)


_slot = jax.jit(lambda x, slot: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False))
