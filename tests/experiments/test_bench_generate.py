"""The benchmark of decoding and import runs, with sizes at which its figures mean nothing, and stores what it says."""

import json
import sys

import pytest

from experiments import bench_generate, readme
from models import hf, size


def test_import_stores_what_it_says(tmp_path, capsys):
  out = tmp_path / readme.RESULTS / 'bench_generate.json'
  assert bench_generate.main(['--tiny', '--only=import', f'--out={out}']) == 0
  stored, said = json.loads(out.read_text()), capsys.readouterr().out
  part = stored['import']
  assert part['is_tiny'] and part['device'] and part['date'] and part['versions']['jax']
  assert [(row['cache'], row['at_least'], len(row['pairs'])) for row in part['times']] == [
    ('cold', 0.5, 2),
    ('warm', None, 2),
  ]
  assert all(row['first_s'] > 0 and row['second_s'] > 0 and row['ratio'] > 0 for row in part['times'])
  assert part['bytes'] > 2 * size.parameters(bench_generate.tiny().file)
  assert part['memory']['peak_bytes'] >= part['memory']['before_bytes'] > 1e7
  assert said.count('speed of a plain read') == 2 and said.count('(goal') == 1
  text = readme.figures(tmp_path)
  assert 'from the disk: speed over a plain read' in text and 'bench_generate' in text


def test_full_sizes_are_what_they_are_said_to_be():
  sizes = bench_generate.Sizes()
  assert size.parameters(sizes.decoder) == pytest.approx(110e6, rel=0.01)
  assert 2 * size.parameters(sizes.file) == pytest.approx(1e9, rel=0.01)


def test_decode_without_transformers_is_left_out_with_a_message(monkeypatch, capsys, tmp_path):
  for name in ('torch', 'transformers'):
    monkeypatch.setitem(sys.modules, name, None)
  assert bench_generate.main(['--tiny', '--only=decode', f'--out={tmp_path / "out.json"}']) == 1
  said = capsys.readouterr().out
  assert 'transformers and PyTorch are needed' in said and 'pip install -e .[bench]' in said
  assert not (tmp_path / 'out.json').exists()


def test_figures_of_decoding_reach_the_readme(tmp_path):
  path = tmp_path / readme.RESULTS / 'bench_generate.json'
  path.parent.mkdir(parents=True)
  row = {'B': 8, 'ratio': 1.234, 'second_tokens_per_second': 99.6, 'at_least': 1.0}
  part = {'device': 'a chip', 'date': '2026-01-01', 'versions': {'jax': '0'}, 'shape': 'Llama, float32', 'times': [row]}
  path.write_text(json.dumps({'decode': part}))
  assert "greedy decoding, float32, B = 8: speed over transformers' | 1.23, 100 tokens/s | 1.0 |" in readme.figures(
    tmp_path
  )


def test_random_model_is_one_that_llama_can_express(tmp_path):
  sizes = bench_generate.tiny()
  hf.save(tmp_path / 'llama', bench_generate.random_model(sizes.file), sizes.file, architecture='LlamaForCausalLM')
  loaded = hf.load(tmp_path / 'llama')
  assert loaded.config.param_dtype == loaded.config.dtype == 'bfloat16'
  assert loaded.config.width == sizes.file.width


@pytest.mark.long
def test_decode_gives_the_tokens_of_transformers(tmp_path):
  pytest.importorskip('torch', exc_type=ImportError)
  pytest.importorskip('transformers', exc_type=ImportError)
  out = tmp_path / readme.RESULTS / 'bench_generate.json'
  assert bench_generate.main(['--tiny', '--only=decode', f'--out={out}']) == 0
  part = json.loads(out.read_text())['decode']
  assert [row['B'] for row in part['times']] == [1, 2]
  assert all(row['first_tokens_per_second'] > 0 and row['second_tokens_per_second'] > 0 for row in part['times'])
