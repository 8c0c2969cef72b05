"""`experiments.speed_device` keeps every row it measured, and every reason why it could not."""

import concurrent.futures.process
import json

import pytest

from experiments import speed, speed_device
from experiments.speed_device import Row
from gemma4_jax import metrics

ROWS = [Row('e2b-toy', 'prefill', 1, 40), Row('e2b-toy', 'decode', 2, 64), Row('e2b-toy', 'decode', 1, 64, kv='nonesuch'),
        Row('31b-toy', 'decode', 1, 64, 'turboquant4', 'turboquant')]


@pytest.fixture(autouse=True)
def here(monkeypatch):
  monkeypatch.setattr(speed, 'alone', lambda function, *args: function(*args))   # in no process of its own


def test_rows_that_follow_share_a_process_once():
  names, processes = [row.name for row in speed_device.rows()], [row.process for row in speed_device.rows()]
  assert len(set(names)) == len(names)
  changes = sum(one != other for one, other in zip(processes, processes[1:]))
  assert changes + 1 == len(set(processes)), 'a model would be made twice'


def test_a_row_has_its_speed_or_its_error_and_is_measured_once(tmp_path, capsys):
  speed_device.run(ROWS[:3], tmp_path, float('inf'), repeats=1)
  found = json.loads((tmp_path / 'results.json').read_text())
  prefill, decode, failed = (found[row.name] for row in ROWS[:3])
  for row in (prefill, decode):
    assert row['tokens_per_s'] > 0 and 0 < row['share_of_limit'] < 1.5 and row['device'] == 'cpu' and row['commit']
  assert decode['tokens_per_s'] == 2 / decode['seconds']
  assert 'nonesuch' in failed['error'] and 'tokens_per_s' not in failed
  assert (tmp_path / 'share_of_limit.png').stat().st_size > 1000
  assert '3 of 3 rows, 1 of them with an error' in capsys.readouterr().out
  speed_device.run(ROWS[:3], tmp_path, float('inf'), repeats=1)
  assert json.loads((tmp_path / 'results.json').read_text()) == found


def test_a_row_whose_process_dies_is_not_the_end_of_the_others(tmp_path, monkeypatch):
  def dies(_, missing, file, *args):
    if missing[0] == ROWS[0]:
      raise concurrent.futures.process.BrokenProcessPool()
    metrics.write_json(file, speed_device.read(file) | {row.name: {'what': row.what, 'error': 'none'} for row in missing})
  monkeypatch.setattr(speed, 'alone', dies)
  speed_device.run(ROWS[:2], tmp_path, float('inf'), repeats=1)
  found = speed_device.read(tmp_path / 'results.json')
  assert 'died' in found[ROWS[0].name]['error'] and found[ROWS[1].name]['error'] == 'none'


def test_nothing_is_begun_after_the_deadline(tmp_path, capsys):
  speed_device.run(ROWS, tmp_path, 0.0, repeats=1)
  assert '0 of 4 rows' in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_packed_weights_and_caches_training_and_the_peer_are_measured_too(tmp_path):
  pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  rows = [ROWS[3], Row('e2b-toy', 'train', 2, 64), Row('e2b-toy', 'train', 2, 64, by='hf'), Row('e2b-toy', 'decode', 1, 40, by='hf'),
          Row('e2b-toy', 'prefill', 1, 40, by='hf')]
  try:
    speed_device.run(rows, tmp_path, float('inf'), repeats=2)
  finally:
    torch.set_default_dtype(torch.float32)
  found = json.loads((tmp_path / 'results.json').read_text())
  assert {name: row.get('error') for name, row in found.items()} == {row.name: None for row in rows}
  assert all(row['share_of_limit'] > 0 for row in found.values())


@pytest.mark.parametrize('flags, said', [
    ([], 'give --out'), (['--out=DIR', '--only=nonesuch'], "no row has 'nonesuch'"), (['--out=DIR', '--only=('], 'no regular expression'),
    (['--out=DIR', '--repeats=0'], '--repeats: at least 1')])
def test_what_cannot_be_measured_is_said_before_anything_runs(flags, said, capsys):
  with pytest.raises(SystemExit):
    speed_device.main(flags)
  assert said in capsys.readouterr().err
