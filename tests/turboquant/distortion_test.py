import json

import pytest

from experiments.turboquant import distortion


def test_measured_errors_are_those_of_theory_where_there_is_one():
  rows = distortion.measure(['turboquant3', 'turboquant3_norm', 'turboquant4_uniform', 'prod3_orthogonal', 'int4'], [128], 1024)
  assert [row['bits'] for row in rows] == [3.125, 3.125, 4.125, 3.25, 4.125]
  for row in rows[:-1]:
    assert row['error'] == pytest.approx(row['theory'], rel=0.05)
    assert row['noise'] == pytest.approx(row['theory_noise'], rel=0.2)
    assert row['gain'] == pytest.approx(row['theory_gain'], abs=0.005)
    assert row['bound'] < row['error'] and row['error_outliers'] < 2 * row['error']      # by how few signs fall together
  assert 'theory' not in rows[-1] and rows[-1]['error_outliers'] > 5 * rows[-1]['error']


def test_the_command_writes_rows_and_plots(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(distortion, 'DIMS', (64,))
  monkeypatch.setattr(distortion.methods, 'METHODS', {name: distortion.methods.METHODS[name] for name in (
      'turboquant2', 'turboquant2_norm', 'prod2', 'q4_0')})
  distortion.main([f'--out={tmp_path / "new"}', '--vectors=64'])
  results = json.loads((tmp_path / 'new/results.json').read_text())
  assert results['vectors'] == 64 and results['date'] and results['device'] == 'cpu'
  assert [row['method'] for row in results['rows']] == ['turboquant2', 'turboquant2_norm', 'prod2', 'q4_0']
  assert 'q4_0' in capsys.readouterr().out
  for name in ('distortion', 'inner_products', 'theory'):
    assert (tmp_path / f'new/{name}.png').stat().st_size > 10_000


def test_a_count_that_fills_no_group_is_refused(capsys):
  with pytest.raises(SystemExit):
    distortion.main(['--vectors=100'])
  assert '--vectors=100: must be a multiple of 32' in capsys.readouterr().err
