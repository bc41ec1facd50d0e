"""Writes what a training run came to as one HTML file: figures, curves, masks, an attention map, samples.

  python -m experiments.report --workdir=runs/quickstart

The file stands alone: no script, nothing is loaded from anywhere. Cost: some seconds, most of them for the samples.
"""

import argparse
import contextlib
import json
import os
import sys
import time

from absl import logging

from experiments import compressors, page, pictures, reading, runs
from models import decoder
from train import checkpoint, config as configs
from train.config import UserError
from train.data import tokenizers

LONGER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results', 'quickstart_long.json')


def build(run, longer_path=LONGER, say=print):
  """The report of a run as HTML text.

  Args:
    run: experiments.runs.Run.
    longer_path: JSON file of experiments.store_result to show beside the run; it need not exist.
    say: called with lines of progress.
  """
  with timed(say, 'reading the text'):
    files, tokenizer = runs.held_out_files(run), tokenizers.load(run.config.data)
  with timed(say, f'compressing {len(files)} held-out files by {", ".join(compressors.COMMANDS)}'):
    packed = compressors.bits_per_byte(files)
  with timed(say, 'loading the checkpoint'):
    _, model, step = checkpoint.load_model(run.workdir)
  longer = read_longer(longer_path)
  parts = [*headline(run, step), *comparison(run, files, packed), *longer_section(run, longer, longer_path)]
  with timed(say, 'drawing the curves and masks'):
    parts += [*curves_section(run, packed), *masks_section(run.config)]
  with timed(say, 'drawing an attention map'):
    parts += attention_section(run.config, model, files, tokenizer)
  with timed(say, 'sampling'):
    parts += samples_section(run.config, model, files, tokenizer)
  parts += facts_section(run, step)
  return page.page(f'{run.workdir.name}: a run of attnloom', parts)


def headline(run, step):
  """Title and the figures that matter most."""
  model, final = run.config.model, run.final
  parts = [page.heading(f'{run.workdir.name}: a decoder of {unit(run.config)}s with {model.depth} layers', 1)]
  if run.result:
    text = f'Finished after {run.steps:,} steps, {run.date}, on {run.device}.'
  else:
    text = (f'Not finished: {run.steps:,} of {run.config.train.steps:,} steps are done. Map and samples are of the '
            f'checkpoint of step {step:,}.')
  parts.append(page.paragraph(text, is_soft=True))
  tiles = []
  if final:
    part = 'all' if final['is_all'] else 'a part'
    text = f'bits per byte on {part} of the held-out text ({final["bytes"]:,} bytes)'
    tiles.append((f'{final["bits_per_byte"]:.3f}', text))
  tiles += [
    (minutes(run.seconds), 'of training steps'),
    (f'{run.tokens_per_second:,.0f}', 'tokens per second'),
    (f'{run.parameters / 1e6:.2f} M', 'parameters'),
  ]
  if run.mfu:
    tiles.append((f'{run.mfu:.0%}', "model FLOPs use, of this device's matrix products"))
  return [*parts, page.tiles(tiles)]


def comparison(run, files, packed):
  """The model's bits per byte beside those of compressors."""
  parts = [page.heading('Beside compressors')]
  count = sum(len(text) for _, text in files)
  rows = [(name, f'{bits:.3f}', f'{bits * count / 8:,.0f}') for name, bits in packed.items()]
  own = []
  if run.final:
    bits = run.final['bits_per_byte']
    rows.append(('this model', f'{bits:.3f}', f'{bits * count / 8:,.0f}'))
    rows.sort(key=lambda row: float(row[1]))
    own = [i for i, row in enumerate(rows) if row[0] == 'this model']
    parts.append(page.paragraph(verdict(bits, packed)))
  parts.append(page.table(('', 'bits per byte', f'bytes for {count:,}'), rows, own=own))
  text = (
    f'All are measured on the same {len(files)} held-out files. The compressors get them joined into one, which is '
    f'their best case, and start from nothing. The model has been trained on {run.train[-1]["tokens_so_far"]:,} '
    f'{unit(run.config)}s of other text (of {run.corpus["train"][f"{unit(run.config)}s"]:,}), and its own size is not '
    f'counted; it sees no more than {run.config.data.seq_len} {unit(run.config)}s back.'
  )
  if run.final and not run.final['is_all']:
    text += f' Its figure is of a part of them, {run.final["bytes"]:,} bytes: the run is not finished.'
  return [*parts, page.paragraph(text, is_soft=True)]


def verdict(bits, packed):
  """One sentence: who needs fewer bits, by the figures."""
  better = [name for name, value in packed.items() if value < bits]
  worse = [name for name, value in packed.items() if value >= bits]
  if not worse:
    return f'The compressors win: each of them ({", ".join(better)}) needs fewer bits than the model.'
  if not better:
    return f'The model wins: it needs fewer bits than {", ".join(worse)}.'
  return f'The model needs fewer bits than {", ".join(worse)}, and more than {", ".join(better)}.'


def read_longer(path):
  """The record of a longer run, or None if there is none.

  Raises:
    UserError: the file is not such a record.
  """
  if not os.path.exists(path):
    return None
  try:
    with open(path, encoding='utf-8') as file:
      record = json.load(file)
    record['held_out']['bits_per_byte'], record['compressors'], record['curve']['held_out'], record['corpus']['hash']
  except (OSError, ValueError, KeyError, TypeError) as error:
    wrong = f'{type(error).__name__}: {error}'
    raise UserError(f'{path}: expected a file of experiments.store_result, got {wrong}') from error
  return record


def longer_section(run, longer, path):
  """What a longer run reaches, as a stored record says."""
  parts = [page.heading('What a longer run reaches')]
  if longer is None:
    return [*parts, page.paragraph(f'No longer run is stored: {os.path.basename(path)} does not exist.')]
  if longer['config']['data']['source'] != run.config.data.source:
    text = f'The stored longer run is on other text ({longer["config"]["data"]["source"]}), so it is not compared.'
    return [*parts, page.paragraph(text)]
  bits = longer['held_out']['bits_per_byte']
  is_same = longer['corpus']['hash'] == run.corpus['hash']
  text = (
    f'{bits:.3f} bits per byte: {longer["parameters"] / 1e6:.1f} M parameters, {longer["steps"]:,} steps, '
    f'{longer["tokens"] / 1e6:,.1f} M tokens, {minutes(longer["seconds"])} of training on {longer.get("device", "?")}, '
    f'{longer.get("date", "?")}. {verdict(bits, longer["compressors"])} '
    + ('The text is the same. ' if is_same else
       f'Its text is of another version ({longer["corpus"]["hash"][:12]}), with compressors measured on that. ')
    + (f'Remark: {longer["remark"]}. ' if longer.get('remark') else '')
    + (f'Command: {longer["command"]}' if longer.get('command') else '')
  )
  own = [(line['tokens_so_far'], line['bits_per_byte']) for line in run.held_out]
  curves = {'this run': own, 'longer run': [(tokens, bits) for _, tokens, bits in longer['curve']['held_out']]}
  picture = pictures.longer_run({name: points for name, points in curves.items() if points}, longer['compressors'])
  what = 'tokens trained on; a token is a byte' if unit(run.config) == 'byte' else 'tokens trained on'
  caption = f'Held-out bits per byte against {what}. Dashed: compressors on the same text.'
  return [*parts, page.paragraph(text), page.figure(picture, caption)]


def curves_section(run, packed):
  """Loss curves with the compressors as lines."""
  points = lambda lines: [(line['step'], line['bits_per_byte']) for line in lines]
  picture = pictures.curves(points(run.train), points(run.held_out), packed)
  caption = ('Bits per byte of training batches and of held-out text (on the way a part of it, at the end all), and '
             'what the compressors need for the held-out files (dashed).')
  return [page.heading('Loss'), page.figure(picture, caption)]


def masks_section(config):
  """The masks of the layers, equal ones drawn once."""
  model, T = config.model, config.data.seq_len
  layers: dict[tuple[int, int], list[int]] = {}
  for i in range(model.depth):
    spec = model.spec(i)
    layers.setdefault((spec.window, spec.chunk), []).append(i)
  masks = decoder.layer_masks(model, T)
  titles = [f'layer{"s" if len(at) > 1 else ""} {listed(at)}: {pattern(*kind)}' for kind, at in layers.items()]
  picture = pictures.layer_masks([masks[at[0]] for at in layers.values()], titles)
  caption = f'What each layer may see in {T} {unit(config)}s: rows look at columns, blue = allowed.'
  return [page.heading('Masks'), page.figure(picture, caption)]


def pattern(window, chunk):
  """The limits of a layer in words."""
  words = ([f'window of {window}'] if window else []) + ([f'chunks of {chunk}'] if chunk else [])
  return ', '.join(words) or 'full'


def listed(layers):
  """'1, 3, 5' of layer numbers from 0; long lists are cut."""
  shown = [str(i + 1) for i in layers]
  return ', '.join(shown if len(shown) <= 6 else [*shown[:5], '...', shown[-1]])


def attention_section(config, model, files, tokenizer):
  """The attention map of one head on a held-out snippet."""
  name, tokens = reading.snippet(files, min(64, config.data.seq_len), tokenizer)
  layer, head, weights, share, count = reading.farthest_head(config.model, model, tokens)
  spec = config.model.spec(layer)
  shown = tokens if unit(config) == 'byte' else [reading.as_text([token], tokenizer) for token in tokens]
  caption = (
    f'Layer {layer + 1} ({pattern(spec.window, spec.chunk)}), head {head + 1}: of {count} heads the one that puts the '
    f'most weight ({share:.0%}) on {unit(config)}s {reading.FAR} or more back, the first excepted. The text is from '
    f'{name}, held out, given alone after a separator (∅). · is a space, ↵ a line end.'
  )
  return [page.heading('An attention map'), page.figure(pictures.attention_map(weights, shown), caption)]


def samples_section(config, model, files, tokenizer):
  """What the model writes after some prompts."""
  parts = [page.heading('Samples')]
  prompts = reading.prompts(config.data, files)
  for temperature in reading.TEMPERATURES:
    parts.append(page.paragraph(f'After the blue prompt, sampled at temperature {temperature}:', is_soft=True))
    continuations = reading.continuations(config, model, prompts, temperature, tokenizer=tokenizer)
    for prompt, continued in zip(prompts, continuations, strict=True):
      parts.append(page.sample(prompt, continued))
  return parts


def facts_section(run, step):
  """All that is needed to place the figures."""
  versions = run.result.get('versions', {})
  corpus = run.corpus
  rows = [
    ('device', run.device or 'not finished'),
    ('date', run.date or 'not finished'),
    ('versions', ', '.join(f'{name} {version}' for name, version in versions.items()) or 'not finished'),
    ('corpus', f'{run.config.data.source}, hash {corpus["hash"][:16]}'),
    ('training text', f'{corpus["train"]["files"]:,} files, {corpus["train"]["bytes"]:,} bytes'),
    ('held-out text', f'{corpus["held_out"]["files"]:,} files, {corpus["held_out"]["bytes"]:,} bytes'),
    ('parameters', f'{run.parameters:,}'),
    ('steps', f'{run.steps:,} of {run.config.train.steps:,}; checkpoint of step {step:,}'),
    ('tokens a step', f'{run.config.data.batch} rows of {run.config.data.seq_len}'),
    ('tokens per second', f'{run.tokens_per_second:,.0f}'),
    ('model FLOPs use', f'{run.mfu:.1%}' if run.mfu else 'unknown for this device'),
    ('training time', minutes(run.seconds)),
  ]
  config = json.dumps(configs.to_dict(run.config), indent=2)
  return [page.heading('The run'), page.facts(rows), page.details('config', config)]


def unit(config):
  """What the model of a run reads: 'byte' or 'token'."""
  return 'byte' if config.data.tokenizer == 'bytes' else 'token'


def minutes(seconds):
  """'4:05 min', '2:03:04 h'."""
  total = round(seconds)
  clock = f'{total // 60 % 60:02d}:{total % 60:02d}'
  return f'{total // 3600}:{clock} h' if total >= 3600 else f'{clock.removeprefix("0")} min'


@contextlib.contextmanager
def timed(say, text):
  """Says what is done, before, and how long it took, after."""
  say(f'report: {text}')
  start = time.perf_counter()
  yield
  took = time.perf_counter() - start
  if took > 3:
    say(f'report: ... {took:.0f} s')


def main(argv=None):
  about = 'Writes the report of a training run.'
  parser = argparse.ArgumentParser(prog='python -m experiments.report', description=about)
  parser.add_argument('--workdir', required=True, help='folder of the run')
  parser.add_argument('--out', default='', help='HTML file to write; default WORKDIR/report.html')
  parser.add_argument('--longer', default=LONGER, help='JSON file of a longer run to show beside it')
  arguments = parser.parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # Orbax says that it only reads
  try:
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(arguments.out)))
    if not os.path.isdir(folder):
      raise UserError(f'--out={arguments.out}: expected a path in a folder that is there, found no {folder}')
    run = runs.read(arguments.workdir)
    text = build(run, arguments.longer, say=lambda line: print(line, flush=True))
  except UserError as error:
    print(f'report: {error}', file=sys.stderr)
    return 2
  out = os.path.expanduser(arguments.out) or os.path.join(run.workdir, 'report.html')
  with open(out, 'w', encoding='utf-8') as file:
    file.write(text)
  print(f'wrote {out} ({len(text) / 1e6:.1f} MB); open it in a browser')
  return 0


if __name__ == '__main__':
  sys.exit(main())
