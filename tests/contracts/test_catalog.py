"""Every method of the catalog keeps every contract that applies to it; and the catalog itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import bias, block_sparse, catalog, contracts, low_rank, masks, plan, positions, softmax, split_kv
from attn.cache import storage
from attn.catalog import Method
from attn.contracts.trial import Trial, compiled

METHODS = catalog.methods()
PAIRS = [(method, name) for method in METHODS for name in contracts.applicable(method)]


def _check(method, contract):
  if contract not in method.waived:
    contracts.run(method, contract)
    return
  with pytest.raises(contracts.ContractBroken):  # a waiver that is not needed fails here
    contracts.run(method, contract)


@pytest.mark.parametrize('method, contract', PAIRS, ids=[f'{m.name}-{c}' for m, c in PAIRS])
def test_contract(method, contract):
  _check(method, contract)


VARIANTS = [dataclasses.replace(x, forms={form: x.forms[form]}) for x in METHODS for form in list(x.forms)[1:]]
OTHER_FORMS = [(x, name) for x in VARIANTS for name in contracts.applicable(x) if name != 'oracle']


@pytest.mark.long
@pytest.mark.parametrize(
  'method, contract', OTHER_FORMS, ids=[f'{m.name}-{next(iter(m.forms))}-{c}'.replace(' ', '_') for m, c in OTHER_FORMS]
)
def test_contract_of_other_forms(method, contract):
  """The contracts look at the first form of a method; here at all others."""
  _check(method, contract)


@pytest.mark.parametrize('method', METHODS, ids=lambda x: x.name)
def test_usage_runs_and_is_what_the_record_says(method):
  trial = Trial(method)
  inputs = trial.inputs(dtype=np.float32)
  names = {**vars(positions), 'softmax': softmax, 'masks': masks, 'split_kv': split_kv, 'storage': storage}
  names |= {'bias': bias, 'low_rank': low_rank, 'block_sparse': block_sparse, 'plan': plan, 'np': np}
  names['positions'] = jnp.broadcast_to(jnp.arange(12), (2, 12))
  got = compiled(lambda inputs: eval(method.usage, {**names, **inputs}))(inputs)
  got = got[0] if isinstance(got, tuple) else got
  np.testing.assert_allclose(got, trial.run(inputs)['out'], rtol=1e-5, atol=1e-5)


def test_records_are_complete():
  for method in METHODS:
    assert len(method.idea) < 120 and '\n' not in method.idea, method.name
    assert method.url.startswith('https://'), method.name
    assert callable(method.function()), method.name
    assert method.path.startswith('attn.'), method.name
  titles = [x.title for x in METHODS]
  assert len(set(titles)) == len(titles)
  assert {x.family for x in METHODS} == set(catalog.FAMILIES)


@pytest.mark.parametrize(
  'name, near',
  [('sliding_windw', 'sliding_window'), ('Flash-Attention', 'flash'), ('yarm', 'yarn'), ('GQA', 'lists the methods')],
)
def test_unknown_names_get_a_hint(name, near):
  with pytest.raises(ValueError, match=near):
    catalog.get(name)


def test_methods_by_family():
  assert catalog.methods('positions')[0].name == 'rotary'
  assert sum(len(catalog.methods(family)) for family in catalog.FAMILIES) == len(METHODS)
  with pytest.raises(ValueError, match="family='spars'"):
    catalog.methods('spars')


def test_table_has_a_row_for_each_method():
  lines = catalog.table().splitlines()
  assert len(lines) == 2 + len(METHODS)
  assert all(line.count('|') == 5 for line in lines)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'name': 'Sliding Window'}, 'name='),
    ({'family': 'spars'}, 'family='),
    ({'idea': ' '}, 'idea is empty'),
    ({'paper': 'arXiv:170603762'}, 'paper='),
    ({'waived': {'jit': ''}}, 'without a reason'),
    ({'forms': {}}, 'forms='),
  ],
)
def test_incomplete_records_are_refused(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(catalog.get('causal'), **change)


@pytest.mark.parametrize(
  'change, words',
  [
    ({}, 'in the catalog already'),
    ({'name': 'other', 'waived': {'causalty': 'because'}}, "waives 'causalty', which is not a contract"),
    ({'name': 'other', 'waived': {'sinks_take_probability': 'because'}}, 'does not apply'),
  ],
)
def test_register_refuses(change, words):
  record = dataclasses.replace(catalog.get('causal'), **change)
  with pytest.raises(ValueError, match=words):
    catalog.register(record)
  assert catalog.methods() == METHODS


def test_waivers_are_reported():
  good, bad = catalog.get('rotary'), dataclasses.replace(catalog.get('rotary'), waived={'jit': 'it is not for jit'})
  assert contracts.check(good).needless_waivers == ()
  report = contracts.check(bad)
  assert report.needless_waivers == ('jit',) and report.broken == (), report
  assert 'jit                  waived but held' in str(report)

  def unstable(x, positions, rotary):
    return catalog.get('rotary').function()(x, positions, rotary) * (1 if isinstance(x, jax.core.Tracer) else 2)

  waived = dataclasses.replace(bad, entry=unstable)
  assert [x.outcome for x in contracts.check(waived).results if x.contract == 'jit'] == ['waived']
  broken = dataclasses.replace(waived, waived={})
  assert contracts.check(broken).broken == ('jit',)
  with pytest.raises(ValueError, match="contract='jitt'"):
    contracts.run(good, 'jitt')
  with pytest.raises(ValueError, match='which is not a contract'):
    contracts.check(dataclasses.replace(good, waived={'jitt': 'because'}))


def test_a_method_is_compared_by_identity():
  assert isinstance(METHODS[0], Method) and METHODS[0] != dataclasses.replace(METHODS[0])
