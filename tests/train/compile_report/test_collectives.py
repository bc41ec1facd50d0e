"""hlo, hlo_cost and collectives of train.compile_report: texts by hand, and programs whose traffic is known."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from train.compile_report import collectives, hlo, hlo_cost

TEXTS = pathlib.Path(__file__).parent / 'texts'
MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}  # device d = 4 data + 2 fsdp + tensor

# A loop of 32 rounds around a loop of 3 (its start and end come from outside), around one whose end is data. Written as
# a TPU's compiler prints it, down to layouts in brackets, comments in tuples and a collective that several fusions
# carry along.
TEXT = (TEXTS / 'loops.hlo.txt').read_text(encoding='utf-8')


def test_known_text():
  found = {(one.kind, one.axes): one for one in collectives.read(hlo.parse(TEXT), MESH)}
  times = {key: (one.times, one.open_loops) for key, one in found.items()}
  assert times == {
    ('all-gather', ('fsdp',)): (32, 0),  # 8, 9, ... 39
    ('reduce-scatter', ('fsdp',)): (32, 0),
    ('collective-permute', ('tensor',)): (32 * 3, 0),  # 0, 2, 4
    ('all-reduce', ('data', 'tensor')): (32 * 3, 1),
    ('all-reduce', ('data', 'fsdp', 'tensor')): (1, 0),
  }
  assert {key: (one.shape, one.bytes, one.group) for key, one in found.items()} == {
    ('all-gather', ('fsdp',)): ('bf16[8,8]', 128, 2),
    ('reduce-scatter', ('fsdp',)): ('f32[64,16]', 4096, 2),
    ('collective-permute', ('tensor',)): ('f32[16]', 64, 2),
    ('all-reduce', ('data', 'tensor')): ('f32[16]', 64, 4),
    ('all-reduce', ('data', 'fsdp', 'tensor')): ('f32[64,16]', 4096 + 64, 8),
  }
  sent = {one.kind: one.sent for one in found.values() if one.group == 2}
  assert sent == {'all-gather': 64, 'reduce-scatter': 2048, 'collective-permute': 64}
  assert found['all-reduce', ('data', 'fsdp', 'tensor')].sent == 2 * 4160 * 7 / 8
  assert found['all-gather', ('fsdp',)].sources == ('jit(step)/layer/convert',)


def test_sums_by_axes():
  found = collectives.read(hlo.parse(TEXT), MESH)
  assert [one.total for one in found] == sorted((one.total for one in found), reverse=True)
  assert collectives.by_axes(found) == {
    ('fsdp',): 32 * (64 + 2048),
    ('data', 'tensor'): 96 * 2 * 64 * 3 / 4,
    ('data', 'fsdp', 'tensor'): 2 * 4160 * 7 / 8,
    ('tensor',): 96 * 64,
  }


@pytest.mark.parametrize(
  'old, new, times',
  [
    ('%v.last = s32[]{:T(128)} constant(40)', '%v.last = s32[]{:T(128)} constant(7)', 0),  # no round at all
    ('body=%outer_body', 'body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}', 5),
    ('compare(%v.i, %v.last), direction=LT', 'compare(%v.i, %v.last), direction=NE', None),
    ('%o.next = s32[]{:T(128)} add(%o.i, %o.one)', '%o.next = s32[]{:T(128)} multiply(%o.i, %o.one)', None),
    ('tuple(%begin, %x,', 'tuple(%count, %x,', None),  # starts at an argument
    ('%o.y, %o.six, %o.count', '%o.y, %o.next, %o.count', None),  # the inner loop's end changes
  ],
)
def test_trip_counts(old, new, times):
  assert TEXT.count(old) == 1
  found = {(one.kind, one.axes): one for one in collectives.read(hlo.parse(TEXT.replace(old, new)), MESH)}
  gather, permute = found['all-gather', ('fsdp',)], found['collective-permute', ('tensor',)]
  if '%o.next, %o.count' in new:
    assert (gather.times, permute.times, permute.open_loops) == (32, 32, 1)
  elif times is None:
    assert (gather.times, gather.open_loops, permute.times, permute.open_loops) == (1, 1, 3, 1)
  else:
    assert (gather.times, gather.open_loops, permute.times) == (times, 0, 3 * times)


@pytest.mark.parametrize(
  'written, groups',
  [
    ('replica_groups={{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('replica_groups={}', [[0, 1, 2, 3]]),
    ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", []),
    ('source_target_pairs={{0,2},{2,0}}', [[0, 2], [2, 0]]),
    ('channel_id=1', []),
  ],
)
def test_groups(written, groups):
  made = hlo.Instruction('x', 'all-reduce', (), (), '', f', channel_id=1, {written}, to_apply=%add')
  assert collectives.groups_of(made, 4) == groups


def test_text_of_something_else():
  with pytest.raises(ValueError, match=r"ENTRY computation, got 'module @jit"):
    hlo.parse('module @jit_f {\n}')


@pytest.mark.parametrize(
  'text, bytes_, memory',
  [
    ('bf16[4,2]{1,0:T(8,128)(2,1)S(1)}', [16], [1]),
    ('(f32[3]{0}, (pred[5], s4[6]), token[])', [12, 5, 3], [0, 0, 0]),
    ('f8e4m3fn[7]', [7], [0]),
    ('f32[<=5]', [20], [0]),
    ('c64[]', [8], [0]),
  ],
)
def test_shapes(text, bytes_, memory):
  found = hlo.shapes_of(text)
  assert [x.bytes for x in found] == bytes_ and [x.memory for x in found] == memory


@functools.cache
def compiled():
  """A scan of 5 rounds over 8 CPU devices, mesh (2, 4), everything by hand: its text."""
  mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)

  def program(x, w):
    def layer(x, w):
      x = jnp.tanh(x @ jax.lax.all_gather(w, 'tensor', axis=0, tiled=True))
      return jax.lax.ppermute(x, 'fsdp', [(0, 1), (1, 0)]), None

    x, _ = jax.lax.scan(layer, x, w)
    return jax.lax.psum(x, 'tensor'), jax.lax.psum_scatter(x, ('fsdp', 'tensor'), tiled=True)

  specs = {'in_specs': (P('fsdp'), P(None, 'tensor')), 'out_specs': (P('fsdp'), P(('fsdp', 'tensor')))}
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 16), (5, 16, 16))]
  mapped = jax.shard_map(program, mesh=mesh, check_vma=False, **specs)
  return hlo.parse(jax.jit(mapped).lower(*shapes).compile().as_text())


def test_traffic_of_a_program():
  found = collectives.read(compiled(), {'fsdp': 2, 'tensor': 4})
  assert {(one.kind, one.axes, one.bytes, one.times, one.open_loops) for one in found} == {
    ('all-gather', ('tensor',), 4 * 16 * 16, 5, 0),
    ('collective-permute', ('fsdp',), 4 * 16 * 16, 5, 0),
    ('all-reduce', ('tensor',), 4 * 16 * 16, 1, 0),
    ('reduce-scatter', ('fsdp', 'tensor'), 4 * 16 * 16, 1, 0),
  }
  assert sum(one.total for one in found) == 1024 * (5 * 3 / 4 + 5 + 2 * 3 / 4 + 7 / 8)


def test_flops_of_a_program():
  assert hlo_cost.count(compiled()).flops == 5 * 2 * 16 * 16 * 16


# Products as a TPU's compiler writes them, as convolutions: a batch of 3, [4, 5] x [5, 6], is a spatial axis whose
# window sees one element each, in either of two ways; a product over two axes has one of them as spatial axis; heads
# that come out beside each other are a window that slides over padding.
PRODUCTS = (TEXTS / 'products.hlo.txt').read_text(encoding='utf-8')


def test_flops_of_convolutions():
  cost = hlo_cost.count(hlo.parse(PRODUCTS))
  assert cost.flops == 2 * (2 * 3 * 4 * 5 * 6) + 2 * 4 * 6 * 15 + 2 * 4 * 8 * 6 * 5
  # Read: a three times, b once (c, e, w are not in main memory); written: all results but one.
  assert cost.bytes == 3 * 2 * 60 + 2 * 90 + 2 * 24 + 2 * 4 * 72


def test_bytes_of_slices():
  """Each of 10 rounds of a loop reads a row of an array and writes one of another, not all ten of both."""

  def f(x):
    def body(total, row):
      return total + jnp.sin(row).sum(), jnp.cos(row)

    return jax.lax.scan(body, jnp.zeros(()), x)

  text = jax.jit(f).lower(jax.ShapeDtypeStruct((10, 8192), jnp.float32)).compile().as_text()
  moved = hlo_cost.count(hlo.parse(text)).bytes
  array = 4 * 10 * 8192
  assert 2 * array <= moved < 8 * array, moved / array  # a few copies of rows are made, too


def test_loops_of_data_are_open():
  """A product in a loop whose end is an argument: counted apart, once."""
  f = lambda n, x: jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ x), x)
  shapes = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
  cost = hlo_cost.count(hlo.parse(jax.jit(f).lower(*shapes).compile().as_text()))
  assert (cost.flops, cost.open_flops) == (0, 2 * 8**3) and cost.open_bytes > 0
