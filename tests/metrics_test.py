"""Rows on disk and to TensorBoard and W&B, and files that are whole or not there."""

import sys
import types

import pytest

from configs import base
from gemma4_jax import config_file, metrics
from gemma4_jax.training import trainer


def test_rows_after_a_torn_line_come_again(tmp_path):
  c = base.get_config()
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
  writer = metrics.Writer(tmp_path, 1, c)
  writer.write({'step': 2, 'loss': 1.25})
  writer.close()
  assert metrics.read_rows(tmp_path / 'metrics.jsonl') == [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.25}]


def test_tensorboard_gets_the_rows(tmp_path):
  pytest.importorskip('tensorboardX')
  c = base.get_config()
  c.train.tensorboard = True
  writer = metrics.Writer(tmp_path, 0, c)
  writer.write({'step': 1, 'loss': 2.0})
  writer.close()
  assert b'loss' in next((tmp_path / 'tensorboard').glob('events*')).read_bytes()


def test_weights_and_biases_gets_the_rows_under_the_runs_name(tmp_path, monkeypatch):
  told, logged = {}, []
  run = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append('finish'))
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **kwargs: told.update(kwargs) or run))
  c = base.get_config()
  c.train.wandb = 'ablations'
  writer = metrics.Writer(tmp_path, 0, c)
  writer.write({'step': 1, 'loss': 2.0, 'fingerprint': 'text is left out'})
  writer.close()
  assert logged == [(1, {'step': 1, 'loss': 2.0}), 'finish']
  assert (told['project'], told['name'], told['resume']) == ('ablations', tmp_path.name, 'allow')
  first = told['id']
  (tmp_path / tmp_path.name).mkdir()   # the same point of another sweep
  for folder, same in ((tmp_path, True), (tmp_path / tmp_path.name, False)):
    metrics.Writer(folder, 0, c).close()
    assert told['name'] == tmp_path.name and (told['id'] == first) == same


@pytest.mark.parametrize('field, value, package', [('tensorboard', True, 'tensorboardX'), ('wandb', 'project', 'wandb')])
def test_a_missing_extra_is_named_before_anything_runs(field, value, package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  c = base.get_config()
  c.train[field] = value
  with pytest.raises(ValueError, match=rf"train.{field} needs {package}: pip install 'gemma4_jax\[{field}\]'"):
    trainer.check(c)


def test_a_row_that_is_no_json_is_named_with_its_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  for line in (b'{"step": oops}', b'5', b'null', b'{"loss": 1}', b'\xff', b'[' * 100_000):
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(config_file.Error, match='metrics.jsonl, line 2: no JSON row .*; move .* away to start its run afresh'):
      metrics.read_rows(path)


def test_rows_that_a_checkpoint_goes_on_from_must_be_there(tmp_path):
  c = base.get_config()
  for text in ('', '{"step": 1}\n{"step": 2}\n', '{"step": 3}\n{"step": 4}\n'):
    (tmp_path / 'metrics.jsonl').write_text(text)
    with pytest.raises(config_file.Error, match='rows before step 4.*are missing; put the file back, or move'):
      metrics.Writer(tmp_path, 4, c)
    assert (tmp_path / 'metrics.jsonl').read_text() == text


def test_two_processes_do_not_write_the_rows_of_one_run(tmp_path):
  c = base.get_config()
  writer = metrics.Writer(tmp_path, 0, c)
  writer.write({'step': 1})
  with pytest.raises(config_file.Error, match='another process trains this run'):
    metrics.Writer(tmp_path, 0, c)
  writer.write({'step': 2})
  writer.close()
  assert [row['step'] for row in metrics.read_rows(tmp_path / 'metrics.jsonl')] == [1, 2]
  metrics.Writer(tmp_path, 2, c).close()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
  path = tmp_path / 'DONE'
  metrics.write_json(path, {'a': 1})
  before = path.read_text()
  def replace(self, target):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(type(path), 'replace', replace)
  with pytest.raises(OSError):
    metrics.write_json(path, {'a': 2})
  assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
