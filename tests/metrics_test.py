"""Rows on disk and to TensorBoard and W&B, and files that are whole or not there."""

import sys
import types

import pytest

from configs import base
from gemma4_jax import metrics
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
  assert (told['project'], told['name'], told['id'], told['resume']) == ('ablations', tmp_path.name, tmp_path.name, 'allow')


@pytest.mark.parametrize('field, value, package', [('tensorboard', True, 'tensorboardX'), ('wandb', 'project', 'wandb')])
def test_a_missing_extra_is_named_before_anything_runs(field, value, package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  c = base.get_config()
  c.train[field] = value
  with pytest.raises(ValueError, match=rf"train.{field} needs {package}: pip install 'gemma4_jax\[{field}\]'"):
    trainer.check(c)


def test_a_row_that_is_no_json_is_named_with_its_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": oops}\n{"step": 3}\n')
  with pytest.raises(ValueError, match='metrics.jsonl, line 2: no JSON'):
    metrics.read_rows(path)


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
