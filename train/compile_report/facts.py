"""Compiles a training step for devices that are not here and gathers what the compiler says of it."""

import contextlib
import glob
import math
import os
import re
import tempfile
import time
from importlib import metadata

import jax

from models import size
from train import program as programs, sharding
from train.compile_report import aot, collectives, hlo, hlo_cost
from train.config import UserError

LARGEST = 5  # pieces of memory that are named
BOTH_WAYS = 2  # a ring over devices sends half of its bytes each way around, a shift all of them one way


class CompilerError(Exception):
  """The compiler ended without a program, for another reason than memory."""


def gather(config, topology):
  """Everything the report is made of.

  Args:
    config: checked train.config.Config.
    topology: as train.compile_report.aot.split takes it.

  Returns:
    Dictionary of plain values: `fits`, `memory`, and, unless the program does not fit, `flops`, `traffic`,
    `collectives`, `times` and `estimate`; bytes, FLOPs and seconds of one device and step.

  Raises:
    UserError: a setting that does not fit, or no such topology.
    CompilerError: the compiler failed.
  """
  if config.distill.teacher:
    raise UserError(
      f'distill.teacher={config.distill.teacher!r}: expected "", the report is of a run without a teacher'
    )
  devices, chip = aot.devices(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  if mesh.size != len(devices):
    shown = ' x '.join(f'{axis}={parts}' for axis, parts in mesh.shape.items())
    raise UserError(f'mesh {shown}: expected a product of all {len(devices)} devices of {topology}, got {mesh.size}')
  program = programs.make(config, mesh)
  facts = {
    'topology': topology,
    'chip': chip.name,
    'devices': len(devices),
    'mesh': dict(mesh.shape),
    'parameters': size.parameters(config.model),
    'tokens': config.data.batch * config.data.seq_len,
    'versions': _versions(),
  }
  state = {
    'parameters': _bytes(program.abstract.params, program.placed.params),
    'optimizer': _bytes(program.abstract.opt_state, program.placed.opt_state),
    'averages': _bytes(program.abstract.ema, program.placed.ema),
  }
  with tempfile.TemporaryDirectory() as folder:
    began = time.monotonic()
    compiled, refusal = _compile(program, folder)
    facts['compile_seconds'] = round(time.monotonic() - began, 1)
    text = '' if compiled is None else _text(compiled, folder)
    state |= {'largest': _largest(folder), 'capacity': int(chip.hbm_bytes / chip.devices)}
  capacity = state['capacity']
  if compiled is None:
    return {**facts, 'fits': False, 'memory': {**state, **_of_refusal(refusal, capacity)}}
  facts['memory'] = {**state, **_of_compiler(compiled)}
  facts['fits'] = facts['memory']['needed'] <= capacity
  return {**facts, **_costs(config, chip, mesh, compiled, text)}


def _compile(program, folder):
  """(compiled train step, '') with a dump of XLA in a folder, or (None, why it does not fit in memory)."""
  with jax.set_mesh(program.mesh):
    lowered = program.train_step.lower(program.abstract, program.batch_shapes())
    try:
      return lowered.compile(compiler_options={'xla_dump_to': folder}), ''
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' in str(error):
        return None, str(error)
      raise CompilerError(str(error).strip().splitlines()[0]) from error


def _text(compiled, folder):
  """The optimized program. `as_text` fails for TPUs with sparse cores, so a dump is read first."""
  found = glob.glob(os.path.join(glob.escape(folder), '*after_optimizations.txt'))
  if found:
    with open(max(found, key=os.path.getsize), encoding='utf-8') as file:
      return file.read()
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    raise CompilerError(f'the compiler shows no text of its program: {str(error).strip().splitlines()[0]}') from error


def _largest(folder):
  """[[bytes, what lies there at different times]] of the largest pieces of temporary memory, by XLA's own report."""
  found = glob.glob(os.path.join(glob.escape(folder), '*memory-usage-report.txt'))
  if not found:
    return []
  with open(max(found, key=os.path.getsize), encoding='utf-8') as file:
    # cumulative size; size; offset; number of values; their shapes
    rows = [line.split(';') for line in file.read().splitlines() if re.match(r'\s*[\d.]+[KMG]?i?B\(', line)]
  return [[_in_bytes(row[1]), row[4].strip()] for row in rows[:LARGEST] if len(row) > 4]


def _in_bytes(text):
  """Bytes of '1.05GiB', '12.5G' or '404B'."""
  number, unit = re.findall(r'([\d.]+)([KMG]?)', text)[0]
  return int(float(number) * {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30}[unit])


def _bytes(abstract, placed):
  """Bytes of a tree on one device, without padding."""
  of = lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(jax.tree.leaves(jax.tree.map(of, abstract, placed)))


def _of_compiler(compiled):
  """Bytes by what they hold, as the compiler laid them out. Results that take the place of arguments count once."""
  stats = compiled.memory_analysis()
  parts = {
    'arguments': stats.argument_size_in_bytes,
    'output': stats.output_size_in_bytes - stats.alias_size_in_bytes,
    'temporary': stats.temp_size_in_bytes,
    'code': stats.generated_code_size_in_bytes,
  }
  return {**parts, 'needed': sum(parts.values())}


def _of_refusal(refusal, capacity):
  """What a compiler says that refuses a program for its size, and the two sizes in it: needed and usable."""
  said = re.sub(r'^.*RESOURCE_EXHAUSTED: (?:E\d+: \w+: )?', '', refusal.strip().splitlines()[0])
  size = r'([\d.]+[KMG])'
  found = re.search(rf'Used {size} of {size} hbm', said) or re.search(
    rf'\({size}\) exceeds available HBM \({size}\)', said
  )
  needed, usable = map(_in_bytes, found.groups()) if found else (0, capacity)
  return {'needed': needed, 'usable': usable, 'refusal': said}


def _costs(config, chip, mesh, compiled, text):
  """What a step computes, moves and sends, and the time that takes at least."""
  module = hlo.parse(text)
  cost, found = hlo_cost.count(module), collectives.read(module, dict(mesh.shape))
  tokens, T = config.data.batch * config.data.seq_len / mesh.size, config.data.seq_len
  attention = 0.0
  if cost.open_flops or cost.kernels:  # attention whose tiles are data, or in a kernel: by formula
    attention = sum(_attention_flops(config.model, i, T) for i in range(config.model.depth)) * tokens
  flops = {
    'model': 3 * size.flops_per_token(config.model, T) * tokens,
    'compiled': cost.flops,
    'attention': attention,
    'open': cost.open_flops,
    'cost_analysis': (compiled.cost_analysis() or {}).get('flops', 0.0),
  }
  link = None if chip.link_bandwidth is None else chip.link_bandwidth / chip.devices
  peak = chip.matmul.get(config.model.dtype) or chip.matmul.get('bfloat16') or chip.matmul['float32']
  times = {
    'compute': (flops['compiled'] + attention) / (peak / chip.devices),
    'memory': cost.bytes / (chip.hbm_bandwidth / chip.devices),
    'links': {} if link is None else {'+'.join(axes) or '?': s for axes, s in _link_seconds(found, link).items()},
  }
  sent = sum(times['links'].values())
  parts = {'compute': times['compute'], 'memory': times['memory'], 'links': sent}
  least = max(parts.values())
  estimate = {
    'seconds': least,
    'serial_seconds': sum(parts.values()),
    'bound': max(parts, key=lambda name: parts[name]),
    'tokens_per_second': config.data.batch * T / least,
    'mfu': flops['model'] / (peak / chip.devices) / least,
    'serial_mfu': flops['model'] / (peak / chip.devices) / sum(parts.values()),
    'left_out': ['links'] * (link is None) + ['memory traffic of attention'] * bool(attention),
  }
  shown = [{**one._asdict(), 'sent': one.sent, 'total': one.total} for one in found]
  traffic = {'bytes': cost.bytes, 'open_bytes': cost.open_bytes}
  return {'flops': flops, 'traffic': traffic, 'collectives': shown, 'times': times, 'estimate': estimate}


def _attention_flops(model, layer, T):
  """FLOPs of a layer's products of attention per token: forward, backward (2.5 times that), and what is done again."""
  spec = model.spec(layer)
  again = (spec.remat or model.remat) == 'full'
  return 4 * model.heads * model.D * size.visible_pairs(spec, T) / T * (3.5 + again)


def _link_seconds(found, link):
  """{axes: seconds} for links of so many bytes/s each way, one collective after the other."""
  seconds: dict = {}
  for one in found:
    ways = 1 if one.kind == 'collective-permute' else BOTH_WAYS
    seconds[one.axes] = seconds.get(one.axes, 0.0) + one.total / (ways * link)
  return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _versions():
  found = {'jax': jax.__version__}
  with contextlib.suppress(metadata.PackageNotFoundError):
    found['libtpu'] = metadata.version('libtpu')
  return found
