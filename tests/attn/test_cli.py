"""`python -m attn`: in this process, and once each way as a command."""

import json
import re
import subprocess
import sys

import pytest

from attn import catalog, contracts, plan
from attn.__main__ import AXES, main
from attn.cost import hardware, visits
from attn.masks import text as mask_text


def run(capsys, *args):
  code = main(list(args))
  got = capsys.readouterr()
  return code, got.out, got.err


def test_list(capsys):
  code, out, err = run(capsys)
  assert (code, err) == (0, '')
  lines = out.splitlines()
  column = lines[0].index('family')
  for method in catalog.methods():
    line = next(x for x in lines if x.startswith(f'{method.name} '))
    assert line[column:].startswith(method.family) and method.paper in line and line.endswith(method.idea)


def test_list_of_a_family(capsys):
  code, out, _ = run(capsys, '--family', 'positions')
  assert code == 0 and 'yarn' in out and 'sliding_window' not in out


@pytest.mark.parametrize('method', catalog.methods(), ids=lambda x: x.name)
def test_describe(capsys, method):
  code, out, err = run(capsys, method.name)
  assert (code, err) == (0, '')
  flat = ' '.join(out.split())
  texts = [method.title, method.idea, method.url, method.authors, method.usage, method.path, method.cost]
  for text in [*texts, *method.formula.splitlines(), *method.limits, *contracts.applicable(method)]:
    assert ' '.join(text.split()) in flat, text
  assert max(len(x) for x in out.splitlines()) <= 130


def test_json(capsys):
  code, out, _ = run(capsys, '--json')
  assert code == 0
  assert [x['name'] for x in json.loads(out)] == [x.name for x in catalog.methods()]
  code, out, _ = run(capsys, 'sliding_window', '--json')
  got = json.loads(out)
  assert code == 0
  assert got['paper'] == 'arXiv:2310.06825' and got['url'] == 'https://arxiv.org/abs/2310.06825'
  assert got['inputs']['q'] == ['B', 'T', 'H', 'D']
  assert 'ring of 4' in got['state'] and 'window_reach' in got['contracts'] and got['waived'] == {}


def test_waivers_are_shown(capsys, monkeypatch):
  monkeypatch.setitem(catalog.get('causal').waived, 'vmap', 'for the sake of this test')
  _, out, _ = run(capsys, 'causal')
  assert 'waived       vmap: for the sake of this test' in out
  _, out, _ = run(capsys, 'causal', '--json')
  got = json.loads(out)
  assert got['waived'] == {'vmap': 'for the sake of this test'} and 'vmap' not in got['contracts']


@pytest.mark.parametrize(
  'args, words',
  [
    (['sliding_windw'], 'did you mean sliding_window'),
    (['--family', 'spars'], 'must be one of exact, positions'),
    (['yarn', '--family', 'exact'], 'exclude each other'),
  ],
)
def test_errors_help_and_give_code_2(capsys, args, words):
  code, out, err = run(capsys, *args)
  assert (code, out) == (2, '') and words in err and 'Traceback' not in err


SHAPE = ['--shape', 'B=2,T=1024,H=8,K=2,D=128']


def test_cost(capsys):
  code, out, err = run(capsys, 'causal', *SHAPE, '--hardware', 'v5e')
  assert (code, err) == (0, '')
  assert 'cost of the forward' in out and 'B=2 T=1024 S=1024 H=8 K=2 D=128 V=128   (by default: S, V)' in out
  assert 'mask    causal()' in out and 'bfloat16' in out and 'left out for want of a figure: launch (v5e)' in out
  assert [x.split()[0] for x in out.splitlines() if x.startswith(('v5e', 'H100'))] == ['v5e']
  assert max(len(x) for x in out.splitlines()) <= 130
  every = run(capsys, 'causal', *SHAPE)[1]
  assert all(any(x.startswith(f'{name} ') for x in every.splitlines()) for name in hardware.HARDWARE)


def test_cost_as_json(capsys):
  code, out, _ = run(capsys, 'softmax', *SHAPE, '--hardware', 'H100', '--json', '--dtype', 'float16')
  got = json.loads(out)
  (row,) = got['hardware']
  assert code == 0 and got['shape'] == {'B': 2, 'T': 1024, 'S': 1024, 'H': 8, 'K': 2, 'D': 128, 'V': 128}
  assert row['matmul_flops'] == {'float16': 2 * 2 * 8 * 1024**2 * 256} and row['visited_share'] == 1
  assert row['passes'] == 1 and row['fast_bytes'] <= row['fast_bytes_there']
  assert row['seconds'] == max(row['parts'].values()) == row['parts'][row['bound']]
  assert row['least_bytes'] == 2 * 2 * 1024 * (8 + 2) * 256 < row['read_bytes'] + row['write_bytes']
  assert row['parts']['memory'] == row['least_bytes'] / 3.35e12
  assert row['uncached_parts']['memory'] == (row['read_bytes'] + row['write_bytes']) / 3.35e12
  assert row['uncached_seconds'] == max(row['uncached_parts'].values()) >= row['seconds']
  assert row['uncached_serial_seconds'] == sum(row['uncached_parts'].values())
  assert row['estimates'] == [] and row['fits_memory'] and row['array_bytes'] == row['least_bytes']
  back = json.loads(run(capsys, 'softmax', *SHAPE, '--hardware', 'H100', '--json', '--backward')[1])
  assert back['direction'] == 'backward'
  assert back['hardware'][0]['array_bytes'] == 2 * row['array_bytes'] + 4 * 2 * 1024 * 8
  assert back['hardware'][0]['io_bound_bytes'] >= back['hardware'][0]['least_bytes'] > row['least_bytes']
  assert sum(back['hardware'][0]['matmul_flops'].values()) == 2.5 * 2 * 2 * 8 * 1024**2 * 256


def read(capsys, *args):
  code, out, err = run(capsys, *args, '--json', '--hardware', 'v5e')
  assert (code, err) == (0, '')
  report = json.loads(out)
  return report, report['hardware'][0]


def test_queries_of_another_length_are_placed_and_it_is_said(capsys):
  shape = ['--shape', 'T=1,S=4096,H=8']
  every_key = 2 * 8 * (4096 + 1) * 256
  for name in ('causal', 'cached', 'split_kv', 'alibi'):  # they decode: the query is the last
    report, row = read(capsys, name, *shape)
    assert row['visited_share'] == 1 and row['least_bytes'] == every_key, name
    assert 'the T=1 queries stand at the end of the S=4096 keys, at position 4095' in report['notes'][0]
  for name in ('local_window', 'packed'):
    report, row = read(capsys, name, *shape)
    assert 'query 0 stands beside key 0 (top-left)' in report['notes'][0] and row['visited_share'] == 1 / 16, name
    assert row['io_bound_bytes'] <= row['read_bytes'] + row['write_bytes'] < every_key / 10
  assert read(capsys, 'softmax', *shape)[0]['notes'] == []  # without a mask the place does not matter
  report, row = read(capsys, 'causal', *shape, '--mask', 'causal() & window(99)')
  assert 'at position 4095' in report['notes'][0] and row['least_bytes'] == 2 * 8 * (256 + 1) * 256
  assert '(top-left)' in read(capsys, 'causal', '--shape', 'T=512,S=256')[0]['notes'][0]
  out = run(capsys, 'causal', *shape)[1]
  assert 'the T=1 queries stand at the end of the S=4096 keys' in out


def test_what_is_made_of_a_bound_is_marked(capsys, monkeypatch):
  monkeypatch.setattr(visits, '_AT_ONCE', 1)
  monkeypatch.setattr(visits, '_BEARABLE', 0)
  row = read(capsys, 'causal', *SHAPE)[1]
  assert row['visited_is_bound'] and {'seconds', 'matmul_flops', 'read_bytes'} < set(row['estimates']) < set(row)
  out = run(capsys, 'causal', *SHAPE, '--hardware', 'v5e')[1]
  head, cells = (re.split('  +', next(x for x in out.splitlines() if x.startswith(start))) for start in ('chip', 'v5e'))
  exact = {'chip', 'tile', 'fast memory', 'busy', 'bound by'}
  assert {name for name, cell in zip(head, cells, strict=True) if cell[0] not in '<~'} == exact
  assert 'no bound from below' in out


def test_the_plan_of_a_mask_is_costed(capsys):
  text = 'causal() & window(100)'
  report, row = read(capsys, 'block_sparse', *SHAPE, '--mask', text)
  made = plan.of(mask_text.parse(text), 1024, block_q=row['tile'][0], block_kv=row['tile'][1])
  assert row['visited_share'] == made.density and row['tile'][0] % 8 == 0
  assert row['matmul_flops']['bfloat16'] == 2 * 2 * 8 * 1024**2 * 256 * made.density
  assert 'the plan of the mask' in report['notes'][0]
  many = ['--shape', 'T=1024,H=64,K=1,D=16', '--mask', text, '--hardware', 'B200', '--json']  # 256 rows are 4 queries
  assert json.loads(run(capsys, 'block_sparse', *many)[1])['hardware'][0]['tile'][0] == 8
  code, _, err = run(capsys, 'block_sparse', *SHAPE)
  assert code == 2 and 'no cost model for block_sparse without --mask' in err


def test_zeros_before_a_length(capsys):
  assert read(capsys, 'causal', '--shape', f'T={"0" * 5000}64,H=8')[0]['shape']['T'] == 64


def test_what_does_not_fit_is_said(capsys):
  shape = ['--shape', 'T=1000000,H=32,K=8,D=128', '--hardware', 'v5e']  # 20.5 GB; 41 GB with gradients
  assert 'q, k, v and out (20.5 GB) do not fit the main memory of v5e' in run(capsys, 'causal', *shape)[1]
  back = run(capsys, 'causal', *shape, '--backward')[1]
  assert 'q, k, v, out, their gradients and the log-sum-exp (41.1 GB) do not fit' in ' '.join(back.split())
  half = ['--shape', 'T=500000,H=32,K=8,D=128']  # 10 GB fit in 16 GiB, but not with gradients
  assert read(capsys, 'causal', *half)[1]['fits_memory']
  assert not read(capsys, 'causal', *half, '--backward')[1]['fits_memory']


def test_letters_of_all_inputs_are_explained(capsys):
  used = {a for method in catalog.methods() for x in method.inputs.values() for a in x.axes}
  assert used <= set(AXES)
  for name, words in (('t5_relative', 'N entries of a table'), ('flash_bias', 'R rank')):
    assert words in ' '.join(run(capsys, name)[1].split())


def test_the_mask_that_is_costed_is_said(capsys):
  own = run(capsys, 'sliding_window', *SHAPE, '--hardware', 'v5e')[1]
  assert "causal() & window(3)   (the catalog's, sized for 12 tokens: --mask costs another)" in own
  other = run(capsys, 'sliding_window', *SHAPE, '--hardware', 'v5e', '--mask', 'causal() & window(511)')[1]
  assert 'causal() & window(511)   (--mask)' in other and 'window(3)' not in other
  shares = [
    json.loads(run(capsys, 'causal', *SHAPE, '--hardware', 'v5e', '--json', '--mask', text)[1])['hardware'][0]
    for text in ('causal() & window(100)', 'causal() & window(500)', 'causal()')
  ]
  shares = [x['visited_share'] for x in shares]
  assert shares == sorted(shares) and shares[0] < shares[2]


@pytest.mark.parametrize('method', catalog.methods(), ids=lambda x: x.name)
def test_every_method_has_a_cost_or_says_why_not(capsys, method):
  code, out, err = run(capsys, method.name, '--shape', 'T=256,H=8', '--hardware', 'v5e')
  if code == 0:
    assert method.title in out and 'v5e' in out and err == ''
  else:
    assert code == 2 and out == '' and f'no cost model for {method.name}' in err
  assert method.family != 'exact' or code == 0 or method.path == 'attn.block_sparse.attend'


def test_cost_of_shared_heads_and_caches(capsys):
  assert read(capsys, 'multi_query', '--shape', 'T=256')[0]['shape']['K'] == 1
  step, row = read(capsys, 'cached', '--shape', 'T=1,S=4096,K=8')
  assert step['mask'] == 'causal()' and row['visited_share'] == 1
  assert row['read_bytes'] == 2 * (4096 * 8 * 256 + 32 * 128)
  assert 'D is 131' in read(capsys, 'flash_bias', '--shape', 'T=256,H=8')[0]['notes'][0]


@pytest.mark.parametrize(
  'args, words',
  [
    (['causal', '--shape', 'T=8,X=2'], "--shape has the unknown axis 'X': expected one of B, T, S, H, K, D, V"),
    (['causal', '--shape', 't=8'], 'did you mean T?'),
    (['causal', '--shape', 'T=many'], "--shape has T='many', expected an integer"),
    (['causal', '--shape', 'T=1e3'], "T='1e3'"),
    (['causal', '--shape', 'T=0'], "T='0'"),
    (['causal', '--shape', 'T=-4'], "T='-4'"),
    (['causal', '--shape', 'T=99999999999999999999999999'], 'expected an integer from 1 to'),
    (['causal', '--shape', 'T=000000000000000000010000000000'], "T='000000000000000000010000000000', expected an"),
    (['causal', '--shape', f'T={"9" * 5000}'], 'expected an integer from 1 to'),
    (['causal', '--shape', 'T=8,T=9'], 'T twice'),
    (['causal', '--shape', 'T'], 'expected LETTER=LENGTH'),
    (['causal', '--shape', ''], 'expected LETTER=LENGTH'),
    (['causal', '--shape', 'H=6,K=4'], 'K=4 key heads must divide H=6'),
    (['multi_query', '--shape', 'H=6,K=2'], 'multi_query has one key head'),
    (['causal', '--shape', 'T=8', '--hardware', 'H10'], 'did you mean H100'),
    (['causal', '--shape', 'T=8', '--dtype', 'bfloat'], 'did you mean bfloat16'),
    (['causal', '--shape', 'T=8', '--hardware', ''], "hardware='' is unknown"),
    (['causal', '--shape', 'T=8', '--dtype', ''], "dtype='' is unknown"),
    (['causal', '--shape', 'T=8', '--mask', ''], "mask=''"),
    (['causal', '--hardware', ''], '--hardware needs --shape'),
    (['causal', '--mask', ''], '--mask needs --shape'),
    (['--mask', ''], '--mask needs --draw'),
    (['causal', '--draw', 'x.png', '--dtype', ''], '--draw and --dtype exclude each other'),
    (['causal', '--shape', 'T=8', '--mask', 'casual()'], 'causal'),
    (['causal', '--shape', 'T=8', '--mask', 'causal('], 'causal('),
    (['causl', '--shape', 'T=8'], 'did you mean causal'),
    (['--shape', 'T=8'], 'needs the name of a method'),
    (['causal', '--backward'], '--backward needs --shape'),
    (['yarn', '--shape', 'T=8'], 'no cost model for yarn (family positions): its function is attn.positions.rotate'),
  ],
)
def test_bad_shapes_help_and_give_code_2(capsys, args, words):
  code, out, err = run(capsys, *args)
  assert (code, out) == (2, '') and words in err and 'Traceback' not in err


def test_help(capsys):
  with pytest.raises(SystemExit) as exit_:
    main(['--help'])
  assert exit_.value.code == 0 and '--json' in capsys.readouterr().out


def test_as_a_command():
  got = subprocess.run([sys.executable, '-m', 'attn', 'yarn'], capture_output=True, text=True, timeout=120)
  assert got.returncode == 0 and got.stdout.startswith('YaRN'), got.stderr
  got = subprocess.run([sys.executable, '-m', 'attn', 'yarm'], capture_output=True, text=True, timeout=120)
  assert got.returncode == 2 and 'did you mean yarn' in got.stderr and 'Traceback' not in got.stderr
