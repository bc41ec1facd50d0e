"""Contracts on heads: who reads which key head, and what sinks take."""

import numpy as np

from attn.contracts.registry import Broken, contract
from attn.contracts.trial import all_close, close, trial


@contract(lambda method: any('K' in x.axes for x in method.inputs.values()) and method.sizes.get('H', 4) % 2 == 0)
def grouped_heads(method):
  """Query head h reads key head h // (H // K): the same as key heads repeated in place."""
  t = trial(method)
  H = t.sizes['H']
  K = t.sizes['K'] if t.sizes['K'] < H else H // 2
  inputs = t.inputs(seed=12, K=K)
  repeated = t.along('K', lambda x, axis: np.repeat(x, H // K, axis=axis), inputs)
  all_close(t.run(inputs), t.run(repeated), f'with K={K} key heads against K={H} repeated ones')


@contract(lambda method: 'sinks' in method.inputs)
def sinks_take_probability(method):
  """Weights of the values sum to 1 - exp(sink - lse); a sink of -inf takes nothing, a huge one takes all."""
  t = trial(method)
  inputs = t.inputs(seed=13)
  inputs['v'] = np.ones_like(inputs['v'])
  got = t.run(inputs)
  if not (got['out'] < 1).all():
    raise Broken('the weights of the values sum to 1: sinks take nothing')
  left = 1 - np.exp(inputs['sinks'] - got['lse'])
  close(got['out'], np.broadcast_to(left[..., None], got['out'].shape), 'the sum of the weights')
  for sink, rest in ((-np.inf, 1.0), (1e4, 0.0)):
    got = t.run({**inputs, 'sinks': np.full_like(inputs['sinks'], sink)})
    close(got['out'], np.full_like(got['out'], rest), f'the sum of the weights with sinks of {sink}')
