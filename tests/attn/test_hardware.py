"""attn.cost.hardware: every figure has a source, and figures agree with each other."""

import dataclasses

import pytest

from attn.cost import hardware
from attn.cost.hardware import FIGURES, HARDWARE

CHIPS = ['v4', 'v5e', 'v5p', 'v6e', 'tpu7x', 'A100', 'H100', 'H200', 'B200', 'cpu']


def test_table():
  assert list(HARDWARE) == CHIPS


@pytest.mark.parametrize('chip', HARDWARE.values(), ids=lambda x: x.name)
def test_every_figure_has_a_source_or_a_reason(chip):
  assert set(chip.sources) == set(FIGURES) == {x.name for x in dataclasses.fields(chip)} - {'name', 'kind', 'sources'}
  for name in FIGURES:
    source, figure = chip.sources[name], getattr(chip, name)
    words = ('https://', 'JAX', 'whitepaper', 'assumed', 'a call of a function', 'libtpu')
    says_where = any(x in source for x in words)
    assert says_where if figure is not None else 'not published' in source or 'no links' in source, (name, source)
  assert chip.matmul and all(x > 0 for x in chip.matmul.values())
  assert chip.kind == 'cpu' or all('assumed' not in x for x in chip.sources.values())


def test_published_figures():
  """A few, copied once more from the data sheets."""
  assert HARDWARE['v5e'].matmul['bfloat16'] == 197e12 and HARDWARE['v5e'].hbm_bandwidth == 819e9
  assert HARDWARE['tpu7x'].matmul['bfloat16'] == 2307e12 and HARDWARE['tpu7x'].hbm_bandwidth == 7380e9
  assert HARDWARE['H100'].matmul['bfloat16'] == pytest.approx(1979e12 / 2, rel=1e-3)
  assert HARDWARE['H100'].exp_rate == pytest.approx(3.9e12, rel=0.02)  # arXiv:2407.08608 section 3.2
  assert HARDWARE['H200'].hbm_bandwidth == 4.8e12
  assert HARDWARE['A100'].vector_rate == pytest.approx(19.5e12 / 2, rel=1e-3)  # half: a multiply-add is one here


def test_memories_are_whole_gibibytes():
  """Those of TPUs: 95 printed for the v5p, the others powers of two or three of them."""
  got = {name: HARDWARE[name].hbm_bytes / 2**30 for name in ('v4', 'v5e', 'v5p', 'v6e', 'tpu7x')}
  assert got == {'v4': 32, 'v5e': 16, 'v5p': 95, 'v6e': 32, 'tpu7x': 192}


def test_devices_of_a_chip():
  """As JAX has it: two TensorCores that are not one megacore are two devices."""
  from jax._src.pallas.mosaic.tpu_info import ChipVersion

  versions = {'v4': 'TPU_V4', 'v5e': 'TPU_V5E', 'v5p': 'TPU_V5P', 'v6e': 'TPU_V6E', 'tpu7x': 'TPU_7X'}
  for name, version in versions.items():
    there, chip = ChipVersion[version], HARDWARE[name]
    assert chip.cores == there.num_physical_tensor_cores_per_chip
    assert chip.devices == (1 if there.supports_megacore else chip.cores), name
  assert all(x.devices == 1 for x in HARDWARE.values() if x.kind != 'tpu')


def test_derived_clocks():
  """Clocks that follow from peaks are those that are known: 1.05, 1.5, 1.75, 1.75, 2.2 GHz."""
  for name, ghz in (('v4', 1.05), ('v5e', 1.5), ('v5p', 1.75), ('v6e', 1.75), ('tpu7x', 2.2)):
    chip = HARDWARE[name]
    assert chip.exp_rate / chip.cores / 1024 == pytest.approx(ghz * 1e9, rel=0.01), name


def test_tables_cannot_be_changed():
  with pytest.raises(TypeError):
    HARDWARE['v5e'].matmul['bfloat16'] = 1.0
  with pytest.raises(TypeError):
    HARDWARE['v9'] = HARDWARE['v5e']


def test_a_figure_without_a_source_is_refused():
  chip = HARDWARE['v5e']
  with pytest.raises(ValueError, match='sources'):
    dataclasses.replace(chip, sources={k: v for k, v in chip.sources.items() if k != 'exp_rate'})


@pytest.mark.parametrize(
  'name, words', [('v5', 'did you mean'), ('h10', 'H100'), ('V6', 'v6e'), ('abacus', 'expected one of v4')]
)
def test_get_suggests(name, words):
  with pytest.raises(ValueError, match=words):
    hardware.get(name)


def test_get_ignores_case():
  assert hardware.get('h100') is HARDWARE['H100'] and hardware.get('V5E') is HARDWARE['v5e']
