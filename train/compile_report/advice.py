"""What the figures of a report suggest to change. Each rule looks at figures and settings and says one sentence."""

import re

LITTLE = 0.5  # of memory: below, there is room to compute less again
MUCH = 0.25  # of a step's links: above, a part is worth a remark


def advise(facts, config):
  """Suggestions as sentences, the most useful first.

  Args:
    facts: of train.compile_report.facts.gather.
    config: checked train.config.Config.
  """
  if not facts['fits']:
    return _smaller(facts, config)
  found = [*_odd(facts, config), *_bound(facts, config)]
  memory = facts['memory']
  if memory['needed'] < LITTLE * memory['capacity']:
    found += _larger(facts, config)
  return found or ['Nothing stands out.']


def _smaller(facts, config):
  """Of a program that does not fit."""
  memory, mesh, train = facts['memory'], facts['mesh'], config.train
  rows = config.data.batch // (mesh['data'] * mesh['fsdp'] * train.accumulate)
  state = memory['parameters'] + memory['optimizer'] + memory['averages']
  found = []
  if state > memory['capacity'] / 3:
    share = f'parameters and optimizer alone take {state / memory["capacity"]:.0%} of the memory'
    how = 'mesh.fsdp up, mesh.data down' if mesh['data'] > 1 else 'more devices for mesh.fsdp or mesh.tensor'
    found.append(f'{share}: cut them into more parts ({how}).')
  kept = {spec.remat or config.model.remat for spec in config.model.layers}
  if kept & {'none', 'dots'}:
    found.append("Keep less of each layer for the backward pass: model.remat='attention', or 'full'.")
  elif 'attention' in kept:
    found.append("model.remat='full' keeps nothing of a layer, and computes attention once more.")
  logits = _logits(facts, config)
  if logits > memory['capacity'] / 20:
    found.append(f'A part of the logits takes {logits / 1e9:.2f} GB: a smaller train.loss_chunk.')
  if rows > 1:
    found.append(f'A device computes {rows} rows at a time: train.accumulate={train.accumulate * 2} halves them.')
  found.append(f'More parts of each row: mesh.context={mesh["context"] * 2}.')
  return found


def _logits(facts, config):
  """Bytes of the logits that a device holds at a time, in float32."""
  mesh, chunk = facts['mesh'], config.train.loss_chunk or config.data.seq_len
  rows = config.data.batch / (mesh['data'] * mesh['fsdp'] * config.train.accumulate)
  return 4 * rows * chunk / mesh['context'] * config.model.vocab / mesh['tensor']


def _bound(facts, config):
  """Of what the step would wait for."""
  bound, links = facts['estimate']['bound'], facts['times']['links']
  if bound == 'memory':
    return ['Main memory bounds the step: more tokens a device (data.batch), or less that is computed again.']
  if bound == 'compute':
    total = sum(links.values())
    if not total or total < facts['times']['compute'] / 2:
      return []
  axis = max(links, key=lambda name: links[name])
  share = f'{links[axis]:.3f} s of the {sum(links.values()):.3f} s that links are busy go over {axis}'
  return [f'{share}: {_less_of(axis, facts, config)}']


def _less_of(axis, facts, config):
  """How less is sent over a mesh axis."""
  mesh, model = facts['mesh'], config.model
  others = {
    'tensor': 'activations are summed in every layer; a smaller mesh.tensor and a larger mesh.fsdp.',
    'fsdp': 'weights are gathered in every layer; more tokens a device (data.batch), or a larger mesh.tensor.',
    'data': 'gradients are summed over copies; mesh.fsdp in place of mesh.data keeps one copy.',
    'context': 'keys and values travel around; a smaller mesh.context and a larger mesh.fsdp or mesh.tensor.',
  }
  if axis == 'context' and model.heads == model.K:
    return others[axis] + ' With fewer model.kv_heads less travels.'
  if axis == 'context' and 'full' in {spec.remat or model.remat for spec in model.layers}:
    return others[axis] + " With model.remat='attention' they travel once less."
  if axis == 'fsdp' and mesh['data'] == 1 and config.train.accumulate > 1:
    return others[axis] + f' With train.accumulate={config.train.accumulate} they are gathered as often more.'
  return others.get(axis, 'an exchange over several axes at once: see the table of collectives.')


def _odd(facts, config):
  """Of collectives that should not be as they are."""
  total, found = sum(one['total'] for one in facts['collectives']), []
  for one in facts['collectives']:
    if one['total'] < MUCH / 10 * total:
      continue
    if one['kind'] == 'all-gather' and one['shape'].startswith('f32') and config.model.dtype != 'float32':
      found.append(f'{one["shape"]} is gathered in float32, while the products are in {config.model.dtype}.')
    if one['kind'] == 'all-gather' and 'context' in one['axes']:
      found.append(f'{one["shape"]} is gathered over context: rows should stay cut.')
    if one['kind'] == 'all-reduce' and set(one['axes']) & {'data', 'fsdp'} and _is_activation(one, facts, config):
      found.append(f'{one["shape"]} is summed over {"+".join(one["axes"])}: activations, as if rows were not cut.')
  parts = config.data.seq_len // (config.train.loss_chunk or config.data.seq_len)
  if parts > 2 and _logits(facts, config) < facts['memory']['capacity'] / 100:
    found.append(
      f'The output projection is gathered for each of the {parts} parts of the loss, and its gradient summed: a larger '
      'train.loss_chunk.'
    )
  return found


def _is_activation(one, facts, config):
  """Whether a collective is of an array that begins with rows and tokens, more of them than a device should hold."""
  dims = [int(n) for n in re.findall(r'\d+', one['shape'].partition('[')[2])]
  lengths = {n // facts['mesh']['context'] for n in (config.data.seq_len, config.train.loss_chunk)}
  held = facts['tokens'] * facts['mesh']['tensor'] / facts['devices'] / config.train.accumulate
  return len(dims) > 2 and dims[1] in lengths and dims[0] * dims[1] > held


def _larger(facts, config):
  """Of a program that leaves memory unused."""
  memory, found = facts['memory'], []
  free = f'{1 - memory["needed"] / memory["capacity"]:.0%} of the memory is free'
  kept = {spec.remat or config.model.remat for spec in config.model.layers}
  less = {'full': 'attention', 'attention': 'dots', 'dots': 'none'}
  if config.train.accumulate > 1:
    found.append(f'{free}: train.accumulate={config.train.accumulate // 2 or 1} sends and gathers less often.')
  elif kept != {'none'}:
    first = next(name for name in less if name in kept)
    found.append(f'{free}: model.remat={less[first]!r} computes less again.')
  else:
    found.append(f'{free}: a larger data.batch, or fewer devices.')
  return found
