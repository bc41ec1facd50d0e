"""attn.distributed on eight devices: equal to the oracle and to one device, in the memory and traffic it promises."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from attn import distributed, layouts, masks, softmax
from attn.distributed import zigzag
from tests.attn import oracle
from tests.attn.softmax_cases import QUICK, inputs

WAYS = {'ring': distributed.ring, 'all_to_all': distributed.all_to_all, 'split_kv_decode': distributed.split_kv_decode}
MESHES = {
  'context8': {'context': 8},
  'data2context4': {'data': 2, 'context': 4},
  'data2context2tensor2': {'data': 2, 'context': 2, 'tensor': 2},
  'context2tensor4': {'context': 2, 'tensor': 4},  # more parts than key heads
}
SHAPE = 'B2T24S24H8K2D4V3'
NAMES = ('q', 'k', 'v', 'sinks')


def mesh_of(axes, kind=AxisType.Auto):
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def quadrant(b, h, i, j, step):
  """A mask function that differs between rows and heads; the first key is always seen."""
  return ((i - j) % (2 + b + h // 4) < step) | (j == 0)


# The mask, and the same as the oracle evaluates it: (b, h, i, j, t, s) -> bool.
SEEN = {
  'all': (None, lambda b, h, i, j, t, s: True),
  'causal': (masks.causal(), lambda b, h, i, j, t, s: j <= i),
  'window or sink': (
    masks.causal() & (masks.window(4) | masks.sink(2)), lambda b, h, i, j, t, s: j <= i and (i - j <= 4 or j < 2),
  ),
  'rows': (masks.causal() | masks.prefix(np.array([9, 3])), lambda b, h, i, j, t, s: j <= i or j < (9, 3)[b]),
  'function': (
    masks.function(quadrant, np.int32(1)), lambda b, h, i, j, t, s: (i - j) % (2 + b + h // 4) < 1 or j == 0,
  ),
  'placed': (
    masks.placed(masks.disc(2) & masks.causal(np.array([0, 6])), layouts.grid(4, 6)),
    lambda b, h, i, j, t, s: (i // 6 - j // 6) ** 2 + (i % 6 - j % 6) ** 2 < 4 and j <= i + (0, 6)[b],
  ),
}  # fmt: skip


def tokens(kind):
  """positions and segment_ids [2, 24], for tokens in this order; sentences of 10, 9 and 5 tokens."""
  places, segments = np.arange(24), np.repeat([0, 1, 2], [10, 9, 5])
  if kind.startswith('zigzag'):
    places = zigzag.order(24, int(kind[6:]))
  positions, ids = np.tile(places, (2, 1)), np.tile(segments[places], (2, 1))
  if kind == 'ragged':  # the second row is shorter, and stands at the end of its text
    positions[1] = np.where(places < 7, -1, places - 7)
  return positions.astype(np.int32), ids


@functools.cache
def case(dtype='float64'):
  rng = np.random.default_rng(5)
  arrays = [*inputs(SHAPE), rng.normal(size=8)]
  cotangents = [rng.normal(size=(2, 24, 8, 3)), rng.normal(size=(2, 24, 8))]
  return [x.astype(dtype) for x in arrays], cotangents


@functools.cache
def compiled(way, mesh, has_segments, soft_cap, implementation='xla'):
  """A function of (arrays, positions, segment_ids, mask) that gives out, lse and the gradients of the arrays."""
  attend = functools.partial(WAYS[way], mesh=mesh_of(MESHES[mesh])) if mesh else softmax.attend
  blocks = softmax.Blocks(8, 5)

  def run(arrays, positions, segment_ids, mask, cotangents):
    def f(q, k, v, sinks):
      return attend(
        q, k, v, sinks=sinks, positions=positions, segment_ids=segment_ids if has_segments else None, mask=mask,
        soft_cap=soft_cap, implementation=implementation, blocks=blocks, return_residual=True,
      )  # fmt: skip

    results, vjp = jax.vjp(f, *arrays)
    return *results, *vjp(tuple(c.astype(r.dtype) for c, r in zip(cotangents, results)))

  return jax.jit(run, compiler_options=QUICK)


def results(way, mesh, order, seen, has_segments=False, soft_cap=None, dtype='float64', implementation='xla'):
  """{out, lse and gradients}, brought back in the order of the tokens."""
  arrays, cotangents = case(dtype)
  positions, ids = tokens(order)
  n = int(order[6:]) if order.startswith('zigzag') else 1
  move, back = (functools.partial(f, n=n) for f in (zigzag.permute, zigzag.restore))
  arrays, cotangents = [*map(move, arrays[:3]), arrays[3]], [*map(move, cotangents)]
  with jax.enable_x64(dtype == 'float64'):
    run = compiled(way, mesh, has_segments, soft_cap, implementation)
    got = [np.asarray(x) for x in run(arrays, positions, ids, SEEN[seen][0], cotangents)]
  got = [x if x.shape == (8,) else back(x) for x in got]
  return dict(zip(('out', 'lse', 'dq', 'dk', 'dv', 'dsinks'), got))


@functools.cache
def expected(order, seen, has_segments=False, soft_cap=None):
  """The oracle's out and lse in float64, and the gradients of one device."""
  (q, k, v, sinks), _ = case()
  order = order if order == 'ragged' else 'plain'
  positions, ids = tokens(order)
  may = oracle.dense(SEEN[seen][1], 24, batch=2, heads=8, positions=positions, kv_positions=positions)
  ids = ids if has_segments else None
  want = oracle.attend(q, k, v, sinks=sinks, mask=may, positions=positions, segment_ids=ids, soft_cap=soft_cap)
  one = results('one device', '', order, seen, has_segments, soft_cap, implementation='reference')
  return one | dict(zip(('out', 'lse'), want))


CASES = [  # mesh, order, mask, are there segments, soft cap; those with a new mesh or mask are compiled anew
  ('data2context4', 'zigzag4', 'window or sink', True, 2.0),
  ('data2context4', 'ragged', 'window or sink', True, 2.0),
  ('data2context2tensor2', 'zigzag2', 'function', False, None),
  ('data2context2tensor2', 'plain', 'function', False, None),
  ('data2context2tensor2', 'zigzag2', 'placed', False, None),
]
MORE_CASES = [
  ('context8', 'plain', 'all', False, None),
  ('context8', 'zigzag8', 'causal', False, None),
  ('context8', 'plain', 'causal', False, None),
  ('context8', 'ragged', 'causal', False, None),
  ('data2context2tensor2', 'zigzag2', 'rows', False, None),
  ('context2tensor4', 'zigzag2', 'causal', False, None),
]
CASES += [pytest.param(*x, marks=pytest.mark.long) for x in MORE_CASES]


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('mesh, order, seen, has_segments, soft_cap', CASES)
def test_equals_one_device(way, mesh, order, seen, has_segments, soft_cap):
  got = results(way, mesh, order, seen, has_segments, soft_cap)
  want = expected(order, seen, has_segments, soft_cap)
  for name in want:
    oracle.assert_close(got[name], want[name], name=name)


@pytest.mark.parametrize('way', WAYS)
def test_bfloat16(way):
  got = results(way, 'context2tensor4', 'zigzag2', 'causal', dtype='bfloat16')
  (q, k, v, sinks), cotangents = case('bfloat16')
  exact = [x.astype(np.float64) for x in (q, k, v, sinks)], *tokens('plain'), masks.causal()
  with jax.enable_x64(True):
    want = compiled('one device', '', False, None, 'reference')(*exact, [c.astype(np.float64) for c in cotangents])
  for name, x in zip(got, want):
    assert got[name].dtype == (np.float32 if name == 'lse' else q.dtype)
    oracle.assert_close(got[name], x, 'bfloat16', name=name)


def test_gradients_of_keys_are_rounded_once():
  """Equal weights and whole numbers: all is exact but the last rounding. The parts of the devices nearly cancel."""
  T, rng = 64, np.random.default_rng(6)
  sign = np.where(np.arange(T) // 8 % 2, -1, 1)
  pulled = sign * (100 + rng.integers(0, 10, T))  # eight of them need ten bits, and bfloat16 has eight
  q = 1 + rng.integers(0, 128, T) / 128
  v = np.tile([1, -1], T // 2)  # their mean is zero, so the output is
  wide = lambda x, D: jnp.asarray(np.tile(x[None, :, None, None], (1, 1, 1, D)), jnp.bfloat16)
  attend = functools.partial(distributed.ring, mesh=mesh_of({'context': 8}), implementation='xla')
  out, vjp = jax.vjp(lambda k, v: attend(wide(q, 4), k, v), wide(0 * q, 4), wide(v, 1))
  dk, dv = jax.jit(vjp)(wide(pulled, 1))
  assert not np.asarray(out).any()
  want_dk, want_dv = 0.5 * v / T * (pulled @ q), np.full(T, pulled.sum() / T)
  np.testing.assert_array_equal(dk[0, :, 0], np.tile(want_dk[:, None], 4).astype(jnp.bfloat16))
  np.testing.assert_array_equal(dv[0, :, 0, 0], want_dv.astype(jnp.bfloat16))


def test_reference_has_second_order():
  q, k, v = inputs('B1T4S4H2K1D2V2', np.float32)
  mesh, options = mesh_of({'context': 2}), {'is_causal': True, 'implementation': 'reference'}
  hessian = lambda attend: jax.jit(jax.hessian(lambda q: jnp.sum(attend(q, k, v, **options) ** 2)))(q)
  got, want = hessian(functools.partial(distributed.ring, mesh=mesh)), hessian(softmax.attend)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(want).max() > 0.1


def test_ring_is_first_order():
  q, k, v = inputs('B1T4S4H2K1D2V2', np.float32)
  run = lambda q: distributed.ring(q, k, v, mesh=mesh_of({'context': 2})).sum()
  with pytest.raises(NotImplementedError, match="implementation='reference'"):
    jax.jvp(run, (q,), (q,))
  with pytest.raises(NotImplementedError, match="implementation='reference'"):
    jax.hessian(run)(q)


@pytest.mark.parametrize('way', WAYS)
def test_nothing_comes_from_empty_slots(way):
  q, k, v = inputs('B1T8S8H2K2D2V2', np.float32)
  positions = np.array([-1, 0, 1, 2, 3, -1, -1, -1])  # the last device has nothing at all
  k[:, positions < 0] = v[:, positions < 0] = np.nan
  attend = functools.partial(WAYS[way], mesh=mesh_of({'context': 2}), positions=positions, is_causal=True)
  grads = jax.jit(jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), argnums=(0, 1, 2)))(q, k, v)
  for grad in grads:
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[:, positions < 0].any()
    assert np.asarray(grad)[:, 2:5].all()


def test_decoding():
  """One new token per row, at its own place, against a cache with empty slots."""
  q, _, _ = inputs('B2T1S1H8K8D4V3', np.float32)
  _, k, v, _ = case('float32')[0]
  held = np.where(np.arange(24) < np.array([[20], [9]]), np.arange(24), -1)
  where = {'positions': np.array([[19], [8]]), 'kv_positions': held}
  got = distributed.split_kv_decode(
    q, k, v, **where, mesh=mesh_of({'context': 8}), mask=masks.causal() & masks.window(12), return_residual=True
  )
  seen = oracle.dense(lambda b, h, i, j, t, s: j <= i and i - j <= 12, 1, 24, batch=2, heads=8, **where)
  for name, a, b in zip(('out', 'lse'), got, oracle.attend(q, k, v, mask=seen, **where)):
    oracle.assert_close(a, b, 'float32', name=name)


LONG, HEADS, WIDTH = 4096, 8, 64  # compiled, never run


@functools.cache
def program(way, n, is_backward):
  """A compiled program of eight heads, causal and in zigzag order, on n devices."""
  mesh = mesh_of({'context': n})
  given = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
  of_q = None if way == 'split_kv_decode' else 'context'
  q = given((1, LONG, HEADS, WIDTH), jnp.float32, None, of_q)
  k = v = given((1, LONG, HEADS // 2, WIDTH), jnp.float32, None, 'context')
  positions, kv_positions = (given((LONG,), jnp.int32, axis) for axis in (of_q, 'context'))

  def forward(q, k, v, positions, kv_positions):
    where = {'positions': positions, 'kv_positions': kv_positions, 'mesh': mesh, 'is_causal': True}
    return WAYS[way](q, k, v, **where, implementation='xla', blocks=softmax.Blocks(64, 64))

  backward = jax.grad(lambda *x: jnp.sum(forward(*x) ** 2), argnums=(0, 1, 2))
  return jax.jit(backward if is_backward else forward).lower(q, k, v, positions, kv_positions).compile()


def operations(text):
  """{name: {shapes of arrays}} of the collective operations of a program."""
  found: dict = {}
  for shapes, name in re.findall(r' = (.*) (all-\w+|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(', text):
    arrays = re.findall(r'\[([\d,]*)\]', shapes)
    found.setdefault(name, set()).update(tuple(int(n) for n in shape.split(',') if n) for shape in arrays)
  return found


@pytest.mark.parametrize(
  'way, is_backward, bound',
  [
    ('ring', True, 14),
    *(pytest.param(*x, marks=pytest.mark.long) for x in (('ring', False, 9), ('all_to_all', True, 10))),
  ],
)
def test_memory_per_device_falls_with_their_number(way, is_backward, bound):
  temporary = {}
  for n in (2, 8):
    made = program(way, n, is_backward)
    temporary[n] = made.memory_analysis().temp_size_in_bytes
    queries = LONG // n * HEADS * WIDTH  # elements on a device
    assert temporary[n] < bound * 4 * queries
    for shape in re.findall(r'\w+\[([\d,]+)\]', made.as_text()):
      assert np.prod([int(x) for x in shape.split(',')]) <= queries, shape
  assert temporary[8] < 0.42 * temporary[2]  # not 0.25: a loop of one hop is unrolled and needs no carry


@pytest.mark.parametrize('is_backward', [pytest.param(False, marks=pytest.mark.long), True])
def test_traffic(is_backward):
  ring, swap, split = (operations(program(way, 8, is_backward).as_text()) for way in WAYS)
  part = (1, LONG // 8, HEADS // 2, WIDTH)
  assert ring == {'collective-permute': {part, (1, LONG // 8)}}  # keys, values and their gradients; positions
  assert set(swap) == {'all-to-all', 'all-gather'}
  assert swap['all-gather'] <= {(1, LONG), (LONG,)}, 'no more than positions'
  assert set(split) == {'all-reduce'}


def test_zigzag_balances_the_work_of_every_hop():
  """Tiles that are not empty, of causal attention of 64 tokens on 4 devices, by device (row) and hop."""

  def tiles(order):
    parts = order.reshape(4, 16).astype(np.int32)
    count = np.zeros((4, 4), int)
    for device, source in np.ndindex(4, 4):
      where = {'positions': parts[device], 'kv_positions': parts[source]}
      some, _ = masks.verdicts(masks.causal(), 16, 16, block_q=8, block_kv=8, **where)
      count[device, (device - source) % 4] = some.sum()
    return count.tolist()

  assert tiles(zigzag.order(64, 4)) == [[3, 2, 2, 2]] * 4
  assert tiles(np.arange(64)) == [[3, 0, 0, 0], [3, 4, 0, 0], [3, 4, 4, 0], [3, 4, 4, 4]]


@pytest.mark.parametrize(
  'way, changes, words',
  [
    ('ring', {'axis': 'rows'}, r"axis='rows' is not in the mesh {'data': 2, 'context': 4}"),
    ('ring', {'mesh': None}, r"axis='context' is not in the mesh {}: give mesh="),
    ('ring', {'cut': 22}, 'T=22: expected a multiple of 4, the devices on mesh axis context=4'),
    ('split_kv_decode', {'cut': 22}, 'S=22: expected a multiple of 4, the devices on mesh axis context=4'),
    ('ring', {'mesh': {'a': 2, 'context': 2, 'b': 2}, 'batch_axes': ('a', 'b')}, 'B=2: .* of 4, .* a=2 x b=2'),
    ('ring', {'axis': 'data', 'batch_axes': (), 'head_axes': 'context', 'heads': 2}, 'H=2: .* of 4, .* context=4'),
    ('ring', {'batch_axes': ('data', 'context')}, r"batch_axes=\('data', 'context'\): 'context' is in axis already"),
    ('ring', {'head_axes': 'data'}, r"head_axes=\('data',\): 'data' is in batch_axes already"),
    ('ring', {'head_axes': ('tensor', 'tensor')}, "'tensor' is in head_axes already, expected each mesh axis once"),
    ('ring', {'axis': 'data'}, r"batch_axes=\('data', 'fsdp'\): 'data' is in axis already"),
    ('ring', {'batch_axes': None}, 'batch_axes=None, expected a tuple of names'),
    ('all_to_all', {'heads': 2}, 'H=2 query heads a device: expected a multiple of mesh axis context=4 .`ring` needs'),
    ('ring', {'mask': masks.document(np.zeros(24, int))}, 'a part Document that goes by index'),
    ('ring', {'mask': masks.causal() & ~masks.array(np.ones((24, 24), bool))}, 'a part Array that goes by index'),
    ('ring', {'mask': masks.placed(masks.document(np.zeros(24, int)), layouts.line(24))}, 'Document that goes'),
    ('all_to_all', {'mask': masks.grouped(4, np.arange(8))}, 'groups with a shift for each head'),
    ('ring', {'mask': masks.placed(masks.causal(), layouts.line(25))}, 'layout has 25 tokens for 24'),
    ('ring', {'mask': np.ones((24, 24), bool)}, 'mask is a ndarray, expected a mask of predicates'),
    ('all_to_all', {'bias': np.zeros((24, 24))}, 'bias is not an option of attention over devices, expected one of'),
    ('ring', {'positions': np.arange(23)}, r'positions have shape \(23,\).*expected integers \[24\] or \[2, 24\]'),
    ('ring', {'segment_ids': np.zeros((2, 24))}, 'segment_ids have shape .* float'),
    ('ring', {'kv_segment_ids': np.zeros((2, 24), int)}, 'kv_segment_ids came without segment_ids'),
    ('ring', {'keys': 12, 'positions': np.arange(24)}, 'positions came without kv_positions, and T=24 .* not S=12'),
    ('ring', {'implementation': 'magic'}, "implementation='magic' is unknown"),
    ('ring', {'soft_cap': -1.0}, 'soft_cap=-1.0 must be positive'),
    ('ring', {'sinks': np.zeros(3)}, r'sinks have shape \(3,\), expected \[8\]'),
  ],
)
def test_rejects(way, changes, words):
  q, k, v, _ = case('float32')[0]
  changes = {'mesh': {'data': 2, 'context': 4}, **changes}
  if changes['mesh']:
    changes['mesh'] = mesh_of(changes['mesh'])
  if heads := changes.pop('heads', 0):
    q = q[:, :, :heads]
  if cut := changes.pop('cut', 0):
    q, k, v = (x[:, :cut] for x in (q, k, v))
  if keys := changes.pop('keys', 0):
    k, v = (x[:, :keys] for x in (k, v))
  with pytest.raises(ValueError, match=words):
    WAYS[way](q, k, v, **changes)
