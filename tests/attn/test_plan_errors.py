"""attn.plan refuses what does not fit, and says which argument."""

import dataclasses

import jax
import numpy as np
import pytest

from attn import masks, plan

GOOD = plan.of(masks.causal(), 16, block_q=8, block_kv=4)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'q_id': GOOD.q_id[0]}, 'shape'),
    ({'kv_id': GOOD.kv_id + 4}, r'plan.kv_id\[0, 0, 0\] is 4, expected 0 to 3'),
    ({'q_id': GOOD.q_id[..., ::-1].copy()}, 'plan.q_id and kv_id: out of order, a block left out, or a tile twice'),
    ({'q_id': GOOD.q_id * 0}, 'out of order'),
    ({'kv_id': GOOD.kv_id[..., [1, 0, 2, 3, 4, 5]]}, 'out of order'),
    ({'kv_id': GOOD.kv_id[..., [0, 0, 2, 3, 4, 5]]}, 'a tile twice'),
    ({'nnz': GOOD.nnz * 0}, r'plan.nnz\[0, 0\] is 0, expected 2 to 6'),
    ({'nnz': GOOD.nnz + 1}, r'plan.nnz\[0, 0\] is 7, expected 2 to 6'),
    ({'nnz': GOOD.nnz - 1}, 'LAST is not where a block ends'),
    ({'flags': GOOD.flags * 0}, 'FIRST is not where a block begins'),
    ({'flags': GOOD.flags & ~plan.LAST}, 'LAST is not where a block ends'),
    ({'flags': GOOD.flags & ~plan.VALID}, 'are not the tiles of'),
    ({'flags': GOOD.flags & ~plan.PARTIAL}, 'are not the tiles of'),
    ({'t_q_id': GOOD.t_q_id * 0}, 'plan.t_q_id and t_kv_id: out of order'),
    ({'t_flags': GOOD.t_flags & ~plan.PARTIAL}, 'are not the tiles of'),
    ({'flags': GOOD.flags[..., :-1]}, r'plan.flags has shape'),
    ({'nnz': GOOD.nnz.astype(np.int64)}, r'plan.nnz has shape \(1, 1\) and dtype int64'),
    ({'row_bits': np.zeros((1, 1, 16, 2), np.uint32)}, 'plan.row_bits has shape'),
    ({'T': 17}, 'of T=17, S=16'),
  ],
)
def test_check_refuses(change, words):
  plan.check(GOOD, 3, 4, 2, 16, 16)
  with pytest.raises(ValueError, match=words):
    plan.check(dataclasses.replace(GOOD, **change), 3, 4, 2, 16, 16)


def test_tiles_beyond_the_arrays_must_be_partial():
  ragged = plan.of(masks.everything(), 20, block_q=8, block_kv=8)
  changed = dataclasses.replace(ragged, flags=ragged.flags & ~plan.PARTIAL, t_flags=ragged.t_flags & ~plan.PARTIAL)
  with pytest.raises(ValueError, match='ends beyond the arrays is not PARTIAL'):
    plan.check(changed, 1, 1, 1, 20, 20)


@pytest.mark.parametrize('where', [{'batch': 0}, {'batch': slice(5, 6)}, {'heads': np.array([3])}])
def test_select_refuses(where):
  with pytest.raises(ValueError, match=next(iter(where))):
    plan.select(GOOD, **where)


def test_plans_of_other_shapes_can_be_shown():
  assert 'Plan(16x16' in repr(GOOD)
  assert 'Plan(16x16' in repr(jax.tree.map(lambda x: x[None], GOOD))
  assert 'Plan(16x16' in repr(jax.tree.map(lambda x: None, GOOD))


def test_check_of_batch_and_heads():
  made = plan.from_blocks(np.ones((2, 4, 2, 2), bool), T=8, S=8, block_q=4, block_kv=4)
  plan.check(made, 2, 8, 4, 8, 8)
  plan.check(made, 2, 4, 1, 8, 8)
  for B, H, K, T, S in ((3, 8, 4, 8, 8), (2, 8, 2, 8, 8), (2, 8, 4, 9, 8), (2, 8, 4, 8, 4)):
    with pytest.raises(ValueError, match='the plan'):
      plan.check(made, B, H, K, T, S)
  with pytest.raises(ValueError, match='plan is ndarray, expected a Plan'):
    plan.check(np.ones((2, 2)), 2, 8, 4, 8, 8)


FORM = {'T': 38, 'S': 27, 'block_q': 8, 'block_kv': 4}
NQ, NK = 5, 7
IDS = np.arange(38) // 20
CHOSEN, LISTS, COUNT = np.ones((1, 1, NQ, NK), bool), np.zeros((1, 1, NQ, 3), int), np.full((1, 1, NQ), 3)
ROWS = np.ones((1, 1, 38, NK), bool)


@pytest.mark.parametrize(
  'make, change, words',
  [
    (lambda **o: plan.from_blocks(CHOSEN[:, :, :-1], **o), {}, r'chosen has shape \(1, 1, 4, 7\).*\(5, 7\)'),
    (lambda **o: plan.from_blocks(CHOSEN[0], **o), {}, 'chosen has shape'),
    (lambda **o: plan.from_blocks(CHOSEN * 1, **o), {}, 'dtype int64, expected bool'),
    (lambda **o: plan.from_blocks(CHOSEN, partial=CHOSEN[..., :3], **o), {}, 'partial has shape'),
    (lambda **o: plan.from_blocks(CHOSEN, partial=1, **o), {}, 'partial has shape .* dtype int64, expected bool'),
    (lambda **o: plan.from_blocks(CHOSEN, **o), {'block_q': 0}, 'block_q=0 must be at least 1'),
    (lambda **o: plan.from_blocks(CHOSEN, **o), {'block_kv': 2.5}, 'block_kv=2.5 is not an integer'),
    (lambda **o: plan.from_blocks(CHOSEN, **o), {'S': 0}, 'S=0 must be at least 1'),
    (lambda **o: plan.from_blocks(CHOSEN, **o), {'T': 41}, 'chosen has shape'),
    (lambda **o: plan.from_blocks(CHOSEN, **o), {'capacity': 34}, 'capacity=34 is too small'),
    (lambda **o: plan.from_lists(LISTS + 0.5, COUNT, **o), {}, 'kv_id has dtype float64'),
    (lambda **o: plan.from_lists(LISTS[:, :, 1:], COUNT, **o), {}, 'kv_id has shape'),
    (lambda **o: plan.from_lists(LISTS, COUNT[..., 1:], **o), {}, 'and count'),
    (lambda **o: plan.from_lists(LISTS - 1, COUNT, **o), {}, r'kv_id\[0, 0, 0, 0\] is -1, .* block, 0 to 6'),
    (lambda **o: plan.from_lists(LISTS + 7 * (np.arange(3) > 1), COUNT, **o), {}, r'kv_id\[0, 0, 0, 2\] is 7'),
    (lambda **o: plan.from_lists(LISTS, COUNT + np.arange(NQ) // 4, **o), {}, r'count\[0, 0, 4\] is 4, .*C=3'),
    (lambda **o: plan.from_lists(LISTS, COUNT - 4, **o), {}, r'count\[0, 0, 0\] is -1'),
    (lambda **o: plan.from_rows(ROWS[:, :, 1:], **o), {}, r'choice has shape \(1, 1, 37, 7\)'),
    (lambda **o: plan.of(masks.causal(), **o), {'kv_heads': 2, 'heads': 3}, 'kv_heads=2 must divide heads=3'),
    (lambda **o: plan.of(np.ones((38, 27), bool), **o), {}, 'mask is ndarray, expected a Mask'),
    (lambda **o: plan.of(masks.document(IDS), **o), {}, 'kv_ids have shape'),
    (lambda **o: plan.of(masks.causal(), **o), {'block_kv': 0}, 'block_kv=0 must be at least 1'),
    (lambda **o: plan.of(masks.causal(), positions=np.arange(5), **o), {}, 'positions have shape'),
  ],
)  # fmt: skip
def test_refuses(make, change, words):
  with pytest.raises(ValueError, match=words):
    make(**(FORM | change))
