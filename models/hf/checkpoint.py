"""Loads checkpoints into models, on one device or many, and saves models, one tensor at a time."""

import collections
import contextlib
import dataclasses
import math
import re
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from models import sharding, state
from models.config import DTYPES, DecoderConfig
from models.decoder import Decoder
from models.hf import architectures, arrays, safetensors, settings as beside, writer


@dataclasses.dataclass
class Loaded:
  """A model, its DecoderConfig, and the entries of config.json that this does not have."""

  model: Decoder
  config: DecoderConfig
  settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """A parameter of one layer: where it lies in the file and, as path and slot of a stack (or None), in the model."""

  source: architectures.Source
  is_packed: bool
  path: str
  slot: int | None
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self):
    """Size in the model, in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def load(
  folder, *, mesh=None, dtype=None, param_dtype=None, rules=sharding.RULES, scan=False, length=None, progress=None
):
  """A model with the tensors of a checkpoint.

  Each tensor goes straight to its place: every device gets its part of the file, and host memory holds no more than
  one tensor. Where the devices compute on host memory, it also holds the model, and a layer's tensor twice while it is
  put into a stack. The headers are compared with the model before a tensor is read.
  Tensors in MXFP4 become bfloat16. Pickled files are never opened, and no code of the folder is run.

  Args:
    folder: path of config.json with model.safetensors, or with its index and parts.
    mesh: jax.sharding.Mesh for the parameters; None means the default device.
    dtype: of activations; None means that of config.json, float32 where it names none.
    param_dtype: of parameters; None means as stored, tensor by tensor.
    rules: placements on the mesh, see models/sharding.py.
    scan: stack the layers for a scanned model, see DecoderConfig.
    length: see `read_config`.
    progress: function of (bytes done, bytes of all, name of the tensor); None means a bar on the terminal, if there is
      one and it takes more than two seconds.

  Returns:
    Loaded. config.param_dtype is the dtype of most of the parameters' bytes.

  Raises:
    ValueError: as `read_config`; damaged files; tensors that are missing, too many, of another shape or not floating
      point, all of them named; a parameter that the mesh cannot cut.
  """
  architecture, config, settings = beside.read(folder, length)
  named = {'dtype': _name('dtype', dtype) or config.dtype, 'param_dtype': _name('param_dtype', param_dtype)}
  config = dataclasses.replace(config, scan=scan, dtype=named['dtype'], param_dtype='float32').validate()
  with safetensors.Folder(folder) as tensors:
    for name in list(tensors.tensors)[:1]:
      tensors.expect(name)
    # Paths and shapes come with the graph, as making either takes a while for a deep model.
    graph, ours = state.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    parameters = _parameters(architecture, config, tensors, ours, named['param_dtype'])
    targets = _targets(parameters, config, mesh, rules)
    _compare_tied(architecture, config, tensors)
    params = _read(tensors, parameters, targets, progress)
  sizes: collections.Counter = collections.Counter()
  for parameter in parameters:
    sizes[parameter.dtype.name] += parameter.nbytes
  config = dataclasses.replace(config, param_dtype=sizes.most_common(1)[0][0])
  return Loaded(state.merge(graph, params), config, settings)


def save(
  folder,
  model,
  config,
  *,
  architecture=None,
  settings=None,
  max_shard_bytes=5e9,
  tokenizer=None,
  overwrite=False,
):
  """Writes a model as a checkpoint that `load` and, in a published architecture, transformers read.

  Tensors are written as they are, bit by bit, one at a time on the host. The folder opens when all is written, not
  before; see writer.write.

  Args:
    folder: path; made if it is missing.
    model: Decoder, its parameters anywhere on the devices of this process.
    config: its DecoderConfig.
    architecture: 'LlamaForCausalLM', ...; None means our own form, which takes any DecoderConfig.
    settings: entries of config.json that DecoderConfig does not have, as `load` returns them.
    max_shard_bytes: bytes of tensors in one file.
    tokenizer: folder to copy the tokenizer's files from; 'bytes' for the byte tokenizer; None for neither.
    overwrite: replace a checkpoint that is there. Files of a tokenizer are only replaced by others.

  Raises:
    ValueError: a checkpoint is there and overwrite is False; the architecture cannot express the config; the model is
      not that of the config, or has adapters that are not merged.
    OSError: the disk is full, or another fault of the system; a checkpoint that was there is as it was, unless the
      fault came at the very end, while files were renamed: then the folder may not open.
  """
  form = architectures.find(architecture or architectures.NATIVE.name)
  if config.adapter_rank:
    raise ValueError(
      f'config.adapter_rank={config.adapter_rank}: a checkpoint holds no adapters, expected models.adapters.merged(...)'
    )
  writer.check(folder, overwrite)
  files = beside.files(form, config, settings, tokenizer)
  obsolete = beside.other_tokenizer(folder, settings, tokenizer, overwrite)
  params = state.split(model)[1]
  _check_model(params, config)
  unscanned = dataclasses.replace(config, scan=False)
  parts: dict[str, list] = {}
  for path, source in form.sources(unscanned).items():
    parts.setdefault(source.tensor, []).append((source, *_stacked(path, config)))
  shapes = {}
  for tensor, shape in architectures.shapes(form, unscanned).items():
    dtypes = {params[path].dtype for _, path, _ in parts[tensor]}
    if len(dtypes) > 1:
      raise ValueError(f'model: parameters of {tensor} are {" and ".join(map(str, dtypes))}, expected one dtype')
    shapes[tensor] = jax.ShapeDtypeStruct(shape, dtypes.pop())

  def get(tensor):
    whole = lambda source, path, slot: arrays.published(params[path], slot, source.transpose)
    if len(parts[tensor]) == 1:
      return whole(*parts[tensor][0])
    array = np.empty(shapes[tensor].shape, shapes[tensor].dtype)
    for part in parts[tensor]:
      array[part[0].index] = whole(*part)
    return array

  writer.write(
    folder, shapes, get, max_shard_bytes=max_shard_bytes, files=files, overwrite=overwrite, obsolete=obsolete
  )


def _name(field, dtype):
  """The name of a dtype, also of jnp.bfloat16 and the like; None stays."""
  name = dtype if dtype is None or isinstance(dtype, str) else np.dtype(dtype).name
  if name is not None and name not in DTYPES:
    raise ValueError(f'{field}={name!r}: expected one of {", ".join(DTYPES)}')
  return name


def _check_model(params, config):
  """ValueError unless the parameters are those of the config, on devices of this process."""
  expected = {path: leaf.shape for path, leaf in state.abstract_params(config).items()}
  found = {path: array.shape for path, array in params.items()}
  wrong = [path for path in {**expected, **found} if expected.get(path) != found.get(path)]
  if wrong:
    lines = [f'{path} {found.get(path, "missing")}, expected {expected.get(path, "none")}' for path in wrong]
    raise ValueError('model: parameters are not those of config:\n  ' + '\n  '.join(lines))
  far = [path for path, array in params.items() if not array.is_fully_addressable]
  if far:
    raise ValueError(f'model: {far[0]} lies on devices of several processes, expected all on those of this one')


def _stacked(path, config):
  """(path, slot) in the model of a parameter's path in the unscanned model; slot None where layers are apart."""
  match = re.fullmatch(r'blocks\.(\d+)\.(.*)', path)
  if not (config.scan and match):
    return path, None
  slot, block = divmod(int(match[1]), len(config.layers))
  return f'blocks.{block}.{match[2]}', slot


def _stored(tensor, packed):
  """Names in the file of a tensor."""
  return [tensor + end for end in (arrays.BLOCKS, arrays.SCALES)] if tensor in packed else [tensor]


def _parameters(architecture, config, tensors, ours, param_dtype):
  """[_Parameter]; ValueError with everything in the file that does not fit."""
  unscanned = dataclasses.replace(config, scan=False)
  found, sources = tensors.tensors, architecture.sources(unscanned)
  expected = architectures.shapes(architecture, unscanned)
  packed = {s.tensor for s in sources.values() if s.packed and s.tensor not in found}
  packed = {tensor for tensor in packed if any(name in found for name in _stored(tensor, packed))}
  problems = [text for tensor, shape in expected.items() for text in _problems(tensor, shape, packed, found)]
  known = {name for tensor in expected for name in _stored(tensor, packed)}
  known |= {architecture.tied} if config.tied_embeddings else set()
  extra = [name for name in found if name not in known and not architecture.ignored(name, config)]
  problems += [f'{name} {list(found[name].shape)} is not in the model' for name in extra]
  if problems:
    lines = '\n  '.join(problems)
    raise ValueError(f'{tensors.path}: {len(problems)} tensors are not those of {architecture.name}:\n  {lines}')
  parameters = []
  for path, source in sources.items():
    path, slot = _stacked(path, config)
    stored = 'bfloat16' if source.tensor in packed else found[source.tensor].dtype
    shape = ours[path].shape if slot is None else ours[path].shape[1:]
    parameters.append(_Parameter(source, source.tensor in packed, path, slot, shape, np.dtype(param_dtype or stored)))
  return parameters


def _problems(tensor, shape, packed, found):
  """What is wrong with a tensor in the file, as sentences."""
  shapes: dict[str, tuple] = {tensor: tuple(shape)}
  dtypes: tuple[str, ...] = DTYPES
  if tensor in packed:
    blocks = (shape[0], shape[2], shape[1] / arrays.GROUP, arrays.GROUP // 2)
    shapes, dtypes = dict(zip(_stored(tensor, packed), (blocks, blocks[:-1]))), ('uint8',)
  for name, expected in shapes.items():
    if name not in found:
      yield f'{name} is missing, expected {list(expected)}'
    elif found[name].shape != expected:
      yield f'{name} has shape {list(found[name].shape)}, expected {list(expected)}'
    elif found[name].dtype.name not in dtypes:
      yield f'{name} is {found[name].dtype.name}, expected {" or ".join(dtypes)}'
    elif found[name].dtype == np.float64 and not jax.config.read('jax_enable_x64'):
      yield f'{name} is float64, which needs JAX_ENABLE_X64=1'


def _targets(parameters, config, mesh, rules):
  """{path: (shape, dtype, NamedSharding or None)} of the model's arrays."""
  repeats = config.depth // len(config.layers)
  targets: dict[str, Any] = {}
  for p in parameters:
    shape = p.shape if p.slot is None else (repeats, *p.shape)
    known = targets.setdefault(p.path, jax.ShapeDtypeStruct(shape, p.dtype))
    if known.dtype != p.dtype:
      raise ValueError(f'{p.source.tensor} is {p.dtype}, other layers {known.dtype}: with scan, give a param_dtype')
  places = dict.fromkeys(targets) if mesh is None else sharding.params_sharding(targets, mesh, rules)
  return {path: (target.shape, target.dtype, places[path]) for path, target in targets.items()}


def _compare_tied(architecture, config, tensors):
  """ValueError if the file has an output projection that is not the embedding table, as the config says it is."""
  name = architecture.tied
  if not config.tied_embeddings or name not in tensors.tensors:
    return
  table = architecture.sources(dataclasses.replace(config, scan=False))['embed.table'].tensor
  one, other = tensors.tensors[table], tensors.tensors[name]
  is_same = one[:2] == other[:2]
  rows = max(1, (16 << 20) * one.shape[0] // max(one.nbytes, 1))
  for start in range(0, one.shape[0] if is_same else 0, rows):
    part = (slice(start, start + rows),)
    is_same = is_same and tensors.read(table, part).tobytes() == tensors.read(name, part).tobytes()
  if not is_same:
    raise ValueError(f'{tensors.path}: config.json ties the embeddings, but {name} differs from {table}')


def _read(tensors, parameters, targets, progress):
  """{path: array} of the model, one tensor of the file after the other."""
  groups: dict[tuple, list[_Parameter]] = {}
  for p in parameters:
    groups.setdefault(tuple(_stored(p.source.tensor, {p.source.tensor} if p.is_packed else ())), []).append(p)
  order = {name: i for i, name in enumerate(tensors.tensors)}
  sizes = {names: sum(tensors.tensors[name].nbytes for name in names) for names in groups}
  params: dict[str, jax.Array] = {}
  done, total = 0, sum(sizes.values())
  with _progress(total, progress) as report:
    for names in sorted(groups, key=lambda names: order[names[0]]):
      group = groups[names]
      wants = [(p.source, p.shape, _of_layer(p, targets), p.is_packed) for p in group]
      fetched = arrays.fetch(tensors, wants)
      tensors.expect(names[-1])
      for p, raw in zip(group, fetched):
        array = arrays.finish(raw, p.source, _of_layer(p, targets), p.dtype)
        if p.slot is None:
          params[p.path] = array
        else:
          stack = params.pop(p.path) if p.path in params else arrays.zeros(*targets[p.path])
          params[p.path] = arrays.store(stack, p.slot, array)
      done += sizes[names]
      report(done, total, group[0].source.tensor)
  return params


def _of_layer(parameter, targets):
  """The placement of one slot of a stack, or of an array that is none."""
  placement = targets[parameter.path][2]
  if placement is None or parameter.slot is None:
    return placement
  return NamedSharding(placement.mesh, P(*placement.spec[1:]))


@contextlib.contextmanager
def _progress(total, progress):
  """A function to report to: the caller's, or one that draws a bar."""
  if progress is not None:
    yield progress
    return
  from tqdm import tqdm

  size = {'total': total, 'unit': 'B', 'unit_scale': True}
  with tqdm(desc='loading', delay=2.0, leave=False, disable=not sys.stderr.isatty(), **size) as bar:
    yield lambda done, total, name: bar.update(done - bar.n)
