"""What a person reads before and after a run, and result.json."""

import datetime
import importlib.metadata
import math
import platform

import jax

from models import size
from train import machine, metrics
from train.data import corpus as corpora

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def header(config, workdir, corpus, rows, program, step):
  """A few lines: text, model, devices, length, where results go."""
  model, train, mesh = config.model, config.train, program.mesh
  record = corpus.record()
  sides = []
  for split, what in ((corpora.TRAIN, 'to train on'), (corpora.HELD_OUT, 'held out')):
    side = record[split]
    packages = f' of {side["packages"]:,} packages' if side['packages'] else ''
    sides.append(f'{side["bytes"]:,} {corpus.unit}s in {side["documents"]:,} documents{packages} {what}')
  left_out = f'{record["skipped_count"]} bad ones and {record["duplicate_count"]} duplicates left out'
  shape = ', '.join(f'{axis} {count}' for axis, count in mesh.shape.items() if count > 1)
  device = mesh.devices.flat[0]
  source = 'a mixture' if config.data.mixture else config.data.source
  lines = [
    ('text', f'{source}: {sides[0]}'),
    ('', f'{sides[1]}; {left_out}'),
    ('hash', corpus.hash),
    ('model', f'{size.parameters(model):,} parameters, {model.depth} layers, width {model.width}, {layers(model)}'),
    *_recipe(config, program),
    ('devices', f'{mesh.size} of {jax.device_count()} {device.device_kind}' + (f': {shape}' if shape else '')),
    (
      'run',
      f'{train.steps:,} steps of {config.data.batch} rows of {config.data.seq_len} tokens: {_passes(config, rows)}'
      + (f'; going on after step {step:,}' if step else ''),
    ),
    ('workdir', str(workdir)),
  ]
  return metrics.table(lines)


def _recipe(config, program):
  """Lines for what is not plain training of all parameters from random ones."""
  shapes, lines = program.abstract.params, []
  if len(program.trainable) < len(shapes):
    count = sum(shapes[path].size for path in program.trainable)
    lines.append(('trained', f'{count:,} of the parameters, in {len(program.trainable)} of {len(shapes)} arrays'))
  for name, folder in (('begins as', config.train.init_from), ('teacher', config.distill.teacher)):
    lines += [(name, folder)] * bool(folder)
  optimizer, decay = config.optimizer, config.train.ema_decay
  if optimizer.method != 'adamw' or optimizer.groups or decay:
    groups = f', {len(optimizer.groups)} groups' if optimizer.groups else ''
    lines.append(('optimizer', f'{optimizer.method}{groups}' + (f', averages at {decay:g}' if decay else '')))
  return lines


def _passes(config, rows):
  """How often the run goes over the text, over each part of a mixture."""
  total, weights = config.train.steps * config.data.batch, sum(rows.weights)
  passes = [total * weight / weights / len(part) for part, weight in zip(rows.parts, rows.weights)]
  if len(passes) == 1:
    found = f'{passes[0]:.2f} passes over the text'
  else:
    found = 'passes ' + ', '.join(f'{count:.2f} over {name}' for name, count in zip(rows.names, passes))
  return found + (f', {rows.padding:.1%} of the places empty' if rows.padding >= 0.001 else '')


def rows_of(size, corpus, held_rows):
  """Rows that hold about `size` bytes of held-out text."""
  ids = sum(len(tokens.stream) - len(tokens) for tokens in corpus.side(corpora.HELD_OUT))
  return -(-int(size * ids / max(1, corpus.size(corpora.HELD_OUT))) // held_rows.stride)


def layers(model):
  """'window 64, full' for a pattern of layers."""
  names = []
  for spec in model.layers:
    parts = [f'{name} {getattr(spec, name)}' for name in ('window', 'chunk') if getattr(spec, name)]
    name = ' '.join([spec.mixer] * (spec.mixer != 'attention') + (parts or ['full']))
    names.append(name)
  return 'layers: ' + ', '.join(names)


def result(config, corpus, mesh, evaluation, **figures):
  """The contents of result.json. Figures are those that the loop has measured."""
  return {
    **{f'held_out_{name}': evaluation[name] for name in (f'bits_per_{corpus.unit}', f'{corpus.unit}s')},
    'held_out_documents': sum(len(part.held_out) for part in corpus.parts),
    'eval_stride': config.eval.stride,
    'steps': config.train.steps,
    'tokens': (config.train.steps - figures['skipped']) * config.data.batch * config.data.seq_len,
    **figures,
    'eval_seconds': evaluation['seconds'],
    'parameters': size.parameters(config.model),
    'corpus_hash': corpus.hash,
    'device': machine.device_name(mesh.devices.flat[0], mesh.size),
    'platform': mesh.devices.flat[0].platform,
    'devices': mesh.size,
    'mesh': dict(mesh.shape),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'versions': {'python': platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
  }


def footer(values):
  """The table at the end of a run, from the contents of result.json."""
  unit = 'byte' if 'held_out_bytes' in values else 'token'
  use = f' ({values["mfu"]:.0%} of the peak of {values["peak_flops"]:.3g} FLOP/s, {values["peak_source"]})'
  count = f'{values["steps"]:,} steps' + (f', {values["skipped"]} of them left out' if values.get('skipped') else '')
  bits, size = values[f'held_out_bits_per_{unit}'], values[f'held_out_{unit}s']
  return metrics.table([
    ('held out', f'{bits:.4f} bits per {unit}, all {size:,} {unit}s'),
    ('trained', f'{count}, {values["tokens"]:,} tokens, {metrics.clock(values["seconds"])}'),
    ('speed', f'{values["tokens_per_second"]:,.0f} tokens/s' + (use if values['mfu'] else '')),
  ])


def evaluated(values, unit):
  """What an eval line says, in words."""
  return f'{values[f"bits_per_{unit}"]:.3f} bits per {unit} on {values[f"{unit}s"]:,} held-out {unit}s'


def not_finite(step, saved_step, sums, places, may_skip=0):
  """The message for a step whose loss or gradient is not finite, and that ends the run."""
  return (
    f'step {step}: {_figures(sums)}; the batch was {_some(places)}'
    + (f', and {may_skip} steps have been left out before (train.skip_nonfinite={may_skip})' if may_skip else '')
    + f'; {last_checkpoint(saved_step)}; try a lower optimizer.learning_rate or optimizer.clip_norm in a new workdir, '
    + f'or a higher train.skip_nonfinite, which leaves out such steps, {"here" if saved_step else "there"}'
  )


def skipped(step, sums, places, may_skip):
  """The line for a step that was left out."""
  count = f'{int(sums["skipped"])} of at most {may_skip}'
  return f'step {step}: {_figures(sums)}; left out, {count}. The batch was {_some(places)}'


def last_checkpoint(step):
  """What a run that ends without saving can go on from."""
  return f'the last checkpoint is of step {step}' if step else 'no checkpoint was written'


def figures(sums):
  """{name: float} of a step: loss, gradient norm, and what else is not finite."""
  found = {'loss': float(sums['nll'] / max(sums['tokens'], 1.0)), 'grad_norm': float(sums['grad_norm'])}
  others = {name: float(x) for name, x in sums.items() if name not in ('nll', 'byte_nll')}
  return found | {name: x for name, x in others.items() if not math.isfinite(x)}


def _figures(sums):
  found = figures(sums)
  is_update = all(map(math.isfinite, found.values()))
  shown = ', '.join(f'{name.replace("grad_norm", "gradient norm")} {value:g}' for name, value in found.items())
  return shown + ', but the update is not finite' * is_update


def _some(places):
  more = f' and {len(places) - 3} more rows (metrics.jsonl)' if len(places) > 3 else ''
  return f'{", ".join(places[:3])}{more}'
