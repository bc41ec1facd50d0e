"""Deliberately wrong methods: each is rejected by the contract meant for it, and passes others that are not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attn import catalog, contracts, masks, softmax
from attn.cache import storage
from attn.positions import rotate

REFERENCE = {'reference': {'implementation': 'reference'}}


def right(name, **changes):
  """A record of the catalog, in its plainest form."""
  forms = REFERENCE if catalog.get(name).family == 'exact' else catalog.get(name).forms
  return dataclasses.replace(catalog.get(name), forms=forms, **changes)


def window_off_by_one():
  return right('sliding_window', settings={'mask': masks.causal() & masks.window(4)})


def window_short_by_one():
  return right('sliding_window', settings={'mask': masks.causal() & masks.window(2)})


def future_leak():
  return right('causal', settings={'mask': masks.causal(1)})


def future_in_the_scale():
  """Looks causal, but the logits are divided by the largest key of the whole text."""
  divide = lambda k: k / jnp.max(jnp.abs(k), axis=(1, 3), keepdims=True)
  return right('causal', entry=lambda q, k, v, **options: softmax.attend(q, divide(k), v, **options))


def sink_dropped():
  return right('sinks', entry=lambda q, k, v, sinks, **options: softmax.attend(q, k, v, **options))


def group_order_swapped():
  def attend(q, k, v, **options):
    G = q.shape[2] // k.shape[2]
    return softmax.attend(q, jnp.tile(k, (1, 1, G, 1)), jnp.tile(v, (1, 1, G, 1)), **options)

  return right('grouped_query', entry=attend)


def _extending(extend):
  return right('causal', state=dataclasses.replace(catalog.get('causal').state, extend=extend))


def state_not_handed_over():
  def extend(q, k, v, state, positions, **options):
    return storage.attend(q, k, v, state, positions, **options)[0], state

  return _extending(extend)


def positions_restart():
  """Every piece begins at position 0 again."""
  return _extending(
    lambda q, k, v, state, positions, **options: storage.attend(q, k, v, state, positions - positions[:, :1], **options)
  )


def state_without_the_last_token():
  def extend(q, k, v, state, positions, **options):
    out, state = storage.attend(q, k, v, state, positions, **options)
    return out, storage.rollback(state, positions[:, -1])

  return _extending(extend)


def ring_too_small():
  kind = catalog.get('sliding_window').state
  return right('sliding_window', state=dataclasses.replace(kind, capacities={'ring of 2': 2}))


def mean_over_padding():
  """Keys of the padding are zero, and still counted in the sum."""

  def attend(q, k, v, *, query_seq_lengths=None, key_value_seq_lengths=None, **options):
    if key_value_seq_lengths is not None:
      there = (jnp.arange(k.shape[1]) < key_value_seq_lengths[:, None])[..., None, None]
      k, v = jnp.where(there, k, 0), jnp.where(there, v, 0)
    return softmax.attend(q, k, v, query_seq_lengths=query_seq_lengths, **options)

  return right('softmax', entry=attend)


def nan_from_padding():
  """The padding is hidden by a factor of zero: right for numbers, not for NaN."""

  def attend(q, k, v, *, query_seq_lengths=None, key_value_seq_lengths=None, **options):
    if key_value_seq_lengths is None:
      return softmax.attend(q, k, v, **options)
    q_there, k_there = (jnp.arange(12) < n[:, None] for n in (query_seq_lengths, key_value_seq_lengths))
    return softmax.attend(q, k, v, mask=(q_there[:, :, None] & k_there[:, None, :])[:, None], **options)

  return right('softmax', entry=attend)


def no_gradient_of_the_log_sum_exp():
  def attend(q, k, v, **options):
    out, lse = softmax.attend(q, k, v, **options)
    return out, jax.lax.stop_gradient(lse)

  return right('causal', entry=attend)


def no_gradient_through_the_weights():
  def attend(q, k, v, **options):
    return softmax.attend(jax.lax.stop_gradient(q), k, v, **options)

  return right('causal', entry=attend)


def scale_forgotten():
  return right('causal', entry=lambda q, k, v, **options: softmax.attend(q, k, v, scale=1.0, **options))


def forms_differ():
  forms = {**REFERENCE, 'sharper': {'implementation': 'reference', 'scale': 1.0}}
  return dataclasses.replace(catalog.get('causal'), forms=forms)


def rows_mixed():
  """Keys are centred on the mean of the batch."""
  return right('softmax', entry=lambda q, k, v, **options: softmax.attend(q, k, v - v.mean(0), **options))


def wrong_limit():
  limit = catalog.Limit('causal', settings={'mask': masks.causal() & masks.window(10)})
  return right('sliding_window', limits={'w >= T: causal attention': limit})


def not_for_jit():
  """The output depends on whether it is traced."""

  def attend(q, k, v, **options):
    return softmax.attend(q if isinstance(q, jax.core.Tracer) else 2 * q, k, v, **options)

  return right('causal', entry=attend)


def not_for_vmap():
  """A rule for vmap that returns the slices in reverse."""
  shuffled = jax.custom_batching.custom_vmap(lambda v: v)
  shuffled.def_vmap(lambda axis_size, in_batched, v: (v[::-1], True))

  def attend(q, k, v, **options):
    fixed = jax.lax.stop_gradient(v)
    return softmax.attend(q, k, v - fixed + shuffled(fixed), **options)

  return right('causal', entry=attend)


def float32_in_all_cases():
  def attend(q, k, v, **options):
    out, lse = softmax.attend(q, k, v, **options)
    return out.astype(jnp.promote_types(out.dtype, jnp.float32)), lse

  return right('causal', entry=attend)


def no_check_of_input():
  return right('packed', entry=lambda q, k, v, segment_ids, **options: softmax.attend(q, k, v, **options))


def rotated_by_the_square():
  return right('rotary', entry=lambda x, positions, rotary: rotate(x, positions * positions % 97, rotary))


def rotation_that_grows():
  grow = lambda positions: 1 + 0.01 * positions[..., None, None]
  return right('rotary', entry=lambda x, positions, rotary: rotate(x, positions, rotary) * grow(positions))


WRONG = [
  # the wrong method, the contract meant for it, contracts that it keeps all the same
  (window_off_by_one, 'window_reach', ['causality', 'gradients', 'rows_alone']),
  (window_short_by_one, 'window_reach', ['causality', 'gradients', 'rows_alone']),
  (future_leak, 'causality', ['gradients', 'rows_alone']),
  (future_in_the_scale, 'causality', ['gradients', 'rows_alone']),
  (sink_dropped, 'sinks_take_probability', ['causality', 'gradients', 'rows_alone']),
  (group_order_swapped, 'grouped_heads', ['causality', 'window_reach', 'gradients']),
  (state_not_handed_over, 'prefill_then_decode', ['oracle', 'causality']),
  (positions_restart, 'prefill_then_decode', ['oracle', 'causality']),
  (state_without_the_last_token, 'prefill_then_decode', ['oracle', 'causality']),
  (ring_too_small, 'prefill_then_decode', ['oracle', 'window_reach']),
  (mean_over_padding, 'padding', ['oracle', 'gradients']),
  (nan_from_padding, 'padding', ['oracle', 'gradients']),
  (no_gradient_of_the_log_sum_exp, 'log_sum_exp', ['oracle', 'gradients', 'causality']),
  (no_gradient_through_the_weights, 'gradients', ['oracle', 'causality', 'window_reach']),
  (scale_forgotten, 'oracle', ['gradients', 'causality', 'window_reach']),
  (forms_differ, 'forms_agree', ['gradients', 'causality']),
  (rows_mixed, 'rows_alone', ['gradients']),
  (wrong_limit, 'limits', ['oracle', 'window_reach']),
  (not_for_jit, 'jit', ['oracle', 'causality']),
  (not_for_vmap, 'vmap', ['rows_alone']),
  (float32_in_all_cases, 'bfloat16', ['oracle', 'gradients']),
  (no_check_of_input, 'bad_input', ['gradients']),
  (rotated_by_the_square, 'relative', ['isometry', 'gradients']),
  (rotation_that_grows, 'isometry', ['gradients', 'rows_alone']),
]


@pytest.mark.parametrize('make, contract, kept', WRONG, ids=[x[0].__name__ for x in WRONG])
def test_wrong_method_is_rejected(make, contract, kept):
  method = make()
  with pytest.raises(contracts.ContractBroken) as caught:
    contracts.run(method, contract)
  assert (caught.value.contract, caught.value.method) == (contract, method.name)
  assert f'{method.name} breaks the contract {contract!r}: ' in str(caught.value)
  assert 'raised' not in caught.value.seen, 'it is to be rejected by what it computes'
  for other in kept:
    contracts.run(method, other)


def test_every_contract_rejects_something():
  """`remat` and `sharded` guard against what the compiler does, which no method here can bring about."""
  assert {contract for _, contract, _ in WRONG} | {'remat', 'sharded'} == set(contracts.CONTRACTS)


RIGHT = sorted({(make().name, contract) for make, contract, _ in WRONG})


@pytest.mark.parametrize('name, contract', RIGHT, ids=['-'.join(x) for x in RIGHT])
def test_right_method_passes_the_same_contract(name, contract):
  contracts.run(catalog.get(name), contract)


def test_an_exception_counts_as_broken():
  def attend(q, k, v, **options):
    raise TypeError('no')

  with pytest.raises(contracts.ContractBroken, match='raised TypeError: no'):
    contracts.run(right('causal', entry=attend), 'oracle')


def test_messages_say_where():
  with pytest.raises(contracts.ContractBroken, match=r'query 4 sees key 0, its reach is 3 back, 0 ahead'):
    contracts.run(window_off_by_one(), 'window_reach')
  words = r"out of form 'reference'\[\d, \d+, \d, \d\] is \S+, expected \S+$"
  with pytest.raises(contracts.ContractBroken, match=words):
    contracts.run(scale_forgotten(), 'oracle')
