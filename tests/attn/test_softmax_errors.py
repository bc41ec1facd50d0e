"""Bad input to attn.softmax.attend: a ValueError that names the argument, what came and what was expected."""

import jax
import numpy as np
import pytest

from attn import masks, softmax
from tests.attn.softmax_cases import inputs

SHAPE = 'B2T4S5H4K2D3V6'
KEY = jax.random.key(0)


def array(*shape, dtype=np.float32):
  return np.zeros(shape, dtype)


BAD = {
  # shapes and types of q, k, v
  'q of three axes': ({'q': array(4, 4, 3)}, r'q.*\(4, 4, 3\)'),
  'v of five axes': ({'v': array(2, 5, 2, 6, 1)}, r'v.*\(2, 5, 2, 6, 1\)'),
  'key heads': ({'k': array(2, 5, 3, 3), 'v': array(2, 5, 3, 6)}, r'K=3.*divide.*H=4'),
  'more key heads': ({'k': array(2, 5, 8, 3), 'v': array(2, 5, 8, 6)}, r'K=8.*divide.*H=4'),
  'no key heads': ({'k': array(2, 5, 0, 3), 'v': array(2, 5, 0, 6)}, r'K=0'),
  'batch of k': ({'k': array(3, 5, 2, 3), 'v': array(3, 5, 2, 6)}, r'\(2, 4, 4, 3\).*\(3, 5, 2, 3\)'),
  'batch of v': ({'v': array(1, 5, 2, 6)}, r'v.*\(1, 5, 2, 6\)'),
  'length of v': ({'v': array(2, 4, 2, 6)}, r'v.*\(2, 4, 2, 6\)'),
  'heads of v': ({'v': array(2, 5, 4, 6)}, r'v.*\(2, 5, 4, 6\)'),
  'key width': ({'k': array(2, 5, 2, 4)}, r'k.*\(2, 5, 2, 4\)'),
  'no width': ({'q': array(2, 4, 4, 0), 'k': array(2, 5, 2, 0)}, r'D'),
  'integers': ({'q': array(2, 4, 4, 3, dtype=np.int32)}, 'q.*int32.*floating'),
  # masks
  'additive mask': ({'mask': array(4, 5)}, 'mask.*float32.*bool.*bias'),
  'integer mask': ({'mask': array(4, 5, dtype=np.int32)}, 'mask.*int32.*bool'),
  'mask of queries': ({'mask': array(5, 5, dtype=bool)}, r'mask.*5.*T.*4'),
  'mask of keys': ({'mask': array(4, 4, dtype=bool)}, r'mask.*4.*S.*5'),
  'mask of heads': ({'mask': array(2, 4, 5, dtype=bool)}, r'mask.*2.*H.*4'),
  'mask of batch': ({'mask': array(3, 1, 4, 5, dtype=bool)}, r'mask.*3.*B.*2'),
  'mask of five axes': ({'mask': array(1, 1, 1, 4, 5, dtype=bool)}, r'mask.*\(1, 1, 1, 4, 5\)'),
  'mask object': ({'mask': masks.causal() & masks.document(array(2, 5, dtype=int))}, r'q_ids.*\(2, 5\)'),
  # biases and sinks
  'bias of queries': ({'bias': array(5, 5)}, r'bias.*\(5, 5\).*\(2, 4, 4, 5\)'),
  'bias of heads': ({'bias': array(2, 2, 4, 5)}, r'bias.*\(2, 2, 4, 5\).*\(2, 4, 4, 5\)'),
  'bias of five axes': ({'bias': array(1, 1, 1, 1, 1)}, r'bias.*\(1, 1, 1, 1, 1\)'),
  'boolean bias': ({'bias': array(4, 5, dtype=bool)}, 'bias.*bool.*floating'),
  'logit bias': ({'logit_bias': array(5)}, r'logit_bias.*\(5,\).*\(2, 5\).*\(2, 5, 2\)'),
  'logit bias of queries': ({'logit_bias': array(2, 4)}, r'logit_bias.*\(2, 4\)'),
  'logit bias of query heads': ({'logit_bias': array(2, 5, 4)}, r'logit_bias.*\(2, 5, 4\)'),
  'sinks per key head': ({'sinks': array(2)}, r'sinks.*\(2,\).*4'),
  'sinks of integers': ({'sinks': array(4, dtype=int)}, 'sinks.*int'),
  # numbers
  'scale': ({'scale': 'large'}, "scale='large'.*number"),
  'scale as an array': ({'scale': array(4)}, 'scale'),
  'infinite scale': ({'scale': float('inf')}, 'scale=inf'),
  'scale as a statement': ({'scale': True}, 'scale=True'),
  'soft cap of zero': ({'soft_cap': 0.0}, r'soft_cap=0\.0.*positive'),
  'negative soft cap': ({'soft_cap': -5.0}, r'soft_cap=-5\.0.*positive'),
  # lengths, segments, positions
  'query lengths': ({'query_seq_lengths': array(4, dtype=int)}, r'query_seq_lengths.*\(4,\).*\(2,\)'),
  'key lengths': ({'key_value_seq_lengths': array(2, 5, dtype=int)}, r'key_value_seq_lengths.*\(2, 5\).*\(2,\)'),
  'key lengths of floats': ({'key_value_seq_lengths': array(2)}, 'key_value_seq_lengths.*float32.*integers'),
  'segments of floats': ({'segment_ids': array(2, 4), 'kv_segment_ids': array(2, 5)}, 'segment_ids.*float32'),
  'segments without those of keys': ({'segment_ids': array(2, 4, dtype=int)}, 'segment_ids.*kv_segment_ids.*T=4.*S=5'),
  'segments of keys alone': ({'kv_segment_ids': array(2, 5, dtype=int)}, 'kv_segment_ids.*segment_ids'),
  'segments too long': (
    {'segment_ids': array(2, 5, dtype=int), 'kv_segment_ids': array(2, 5, dtype=int)},
    r'segment_ids.*\(2, 5\).*\(2, 4\)',
  ),
  'segments of keys too short': (
    {'segment_ids': array(2, 4, dtype=int), 'kv_segment_ids': array(2, 4, dtype=int)},
    r'kv_segment_ids.*\(2, 4\).*\(2, 5\)',
  ),
  'positions without those of keys': ({'positions': array(4, dtype=int)}, 'positions.*kv_positions.*T=4.*S=5'),
  'positions too long': ({'positions': array(2, 5, dtype=int)}, r'positions.*\(2, 5\).*\(2, 4\)'),
  'positions of floats': ({'kv_positions': array(5)}, 'kv_positions.*float32.*integers'),
  'positions of keys': ({'kv_positions': array(3, 5, dtype=int)}, r'kv_positions.*\(3, 5\).*\(2, 5\)'),
  # dropout and implementation
  'dropout without a key': ({'dropout_rate': 0.1}, r'dropout_rate=0\.1.*dropout_key'),
  'dropout of everything': ({'dropout_rate': 1.0, 'dropout_key': KEY}, r'dropout_rate=1\.0'),
  'negative dropout': ({'dropout_rate': -0.1, 'dropout_key': KEY}, r'dropout_rate=-0\.1'),
  'dropout in percent': ({'dropout_rate': 10, 'dropout_key': KEY}, r'dropout_rate=10'),
  'dropout as a word': ({'dropout_rate': 'some', 'dropout_key': KEY}, "dropout_rate='some'"),
  'dropout key as a number': ({'dropout_rate': 0.1, 'dropout_key': 3}, 'dropout_key.*3'),
}


@pytest.mark.parametrize('name', BAD)
def test_rejects(name):
  """Whatever the implementation: rules are checked before one is chosen."""
  bad, words = BAD[name]
  good = dict(zip('qkv', inputs(SHAPE, np.float32)))
  for implementation in (None, *softmax.IMPLEMENTATIONS):
    with pytest.raises(ValueError, match=words):
      softmax.attend(**good | bad, implementation=implementation)


@pytest.mark.parametrize('implementation', ['flash', 'cudnn', '', 3])
def test_rejects_an_unknown_implementation(implementation):
  with pytest.raises(ValueError, match=r"implementation=.*'reference'.*'xla'"):
    softmax.attend(*inputs(SHAPE, np.float32), implementation=implementation)


@pytest.mark.parametrize('q, kv', [(0, 4), (4, 0), (-1, 4)])
def test_rejects_tiles_of_no_size(q, kv):
  with pytest.raises(ValueError, match='at least 1'):
    softmax.attend(*inputs(SHAPE, np.float32), implementation='xla', blocks=softmax.Blocks(q=q, kv=kv))


def test_errors_come_under_jit_too():
  q, k, v = inputs(SHAPE, np.float32)
  with pytest.raises(ValueError, match=r'mask.*float32.*bool'):
    jax.jit(softmax.attend)(q, k, v, mask=array(4, 5))
  with pytest.raises(ValueError, match=r'K=2.*H=3'):
    jax.jit(softmax.attend)(q[:, :, :3], k, v)


def test_good_input_is_not_refused():
  """The widest of what is allowed, so that the rules above are not simply too narrow. Shapes only: nothing is run."""
  good = dict(zip('qkv', inputs(SHAPE, np.float32)))
  for options in [
    {'mask': array(4, 5, dtype=bool)},
    {'mask': array(1, dtype=bool)},
    {'mask': array(2, 1, 1, 5, dtype=bool)},
    {'bias': array()},
    {'bias': array(2, 4, 1, 5)},
    {'scale': np.float64(0.5)},
    {'scale': np.float32(0.5)},
    {'scale': 1},
    {'segment_ids': array(2, 4, dtype=np.int8), 'kv_segment_ids': array(2, 5, dtype=np.int64)},
    {'kv_positions': array(5, dtype=int)},
    {'positions': array(4, dtype=int), 'kv_positions': array(2, 5, dtype=int)},
    {'query_seq_lengths': array(2, dtype=np.uint32)},
    {'dropout_rate': 0, 'dropout_key': None},
    {'precision': 'highest'},
  ]:
    out = jax.eval_shape(lambda options=options: softmax.attend(**good, **options))
    assert out.shape == (2, 4, 4, 6) and out.dtype == np.float32
