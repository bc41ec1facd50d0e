"""The benchmark of plans runs, with sizes at which its times mean nothing, and stores what it says."""

import json

from experiments import bench_sparse, readme


def test_stores_what_it_says(tmp_path, capsys):
  out = tmp_path / readme.RESULTS / 'bench_sparse.json'
  assert bench_sparse.main(['--tiny', f'--out={out}']) == 0
  stored, said = json.loads(out.read_text()), capsys.readouterr().out
  assert stored['is_tiny'] and stored['device'] and stored['date'] and stored['versions']['jax']
  assert len(stored['times']) == 2 * len(bench_sparse.patterns(True))
  assert all(row['ratio'] > 0 and row['counted'] >= 1 for row in stored['times'])
  assert all(difference < 1e-5 for difference in stored['relative_difference'].values())
  assert stored['planning']['seconds'] > 0
  assert said.count('counted') == len(stored['times'])
  text = readme.figures(tmp_path)
  assert text.count('counted in tiles') == len(stored['times']) and 'plan of a causal window' in text
