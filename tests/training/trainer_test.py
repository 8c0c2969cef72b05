"""One run: what it leaves, what it refuses, and that a kill at any moment changes nothing."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import base
from gemma4_jax import metrics
from gemma4_jax.training import optimizer, trainer

ROOT = pathlib.Path(__file__).parents[2]
CLOCK = {'tokens_per_s', 'mfu'}
WORDS = 'per layer embeddings are small vectors that a table gives to every token in every layer of the model'.split()


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  rng = np.random.default_rng(0)
  with (folder / 'text.jsonl').open('w') as f:
    for i in range(300):
      f.write(json.dumps({'text': f'{i}: ' + ' '.join(rng.choice(WORDS, 40))}) + '\n')
  return folder


def tiny(corpus, **fields):
  c = base.get_config('e2b-toy')
  c.model.update({'vocab_size': 320, 'width': 32, 'mlp_dim': 48, 'num_layers': 4, 'num_kv_shared_layers': 2, 'pattern': 'LG',
                  'window': 8, 'ple_dim': 8})
  c.data.update({'source': 'jsonl', 'path': str(corpus / 'text.jsonl'), 'vocab_size': 320, 'sequence_length': 32, 'batch_size': 4,
                 'validation_fraction': 0.1, 'cache_dir': str(corpus / 'cache')})
  c.optimizer.warmup_steps = 2
  c.train.update({'steps': 12, 'checkpoint_every': 4})
  c.update_from_flattened_dict(fields)
  return c


def rows(workdir, drop=CLOCK):
  return [{name: value for name, value in row.items() if name not in drop} for row in metrics.read_rows(workdir / 'metrics.jsonl')]


def final_state(workdir, step):
  with ocp.CheckpointManager(workdir / 'checkpoints', item_names=('state', 'data', 'config')) as manager:
    return jax.tree.leaves(manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))['state'])


def test_a_run_leaves_rows_a_summary_and_learns(corpus, tmp_path):
  done = trainer.run(tiny(corpus), tmp_path / 'run')
  found = rows(tmp_path / 'run')
  assert [row['step'] for row in found] == list(range(1, 13))
  assert found[-1]['loss'] < found[0]['loss'] - 0.1
  assert json.loads((tmp_path / 'run' / 'DONE').read_text()) == json.loads(json.dumps(done))
  assert done['metrics']['eval/bits_per_byte'] == found[-1]['eval/bits_per_byte'] > 0
  assert done['fingerprint'] == found[0]['fingerprint']
  assert {'params/total', 'flops_per_token', 'resident_bytes', 'tokens_per_s', 'peak_memory_bytes'} <= set(done['costs'])
  environment = json.loads((tmp_path / 'run' / 'env.json').read_text())
  assert len(environment['corpus_hash']) == 64 and environment['versions']['jax'] == jax.__version__


def test_microbatches_and_scan_and_remat_give_the_step_of_the_whole_batch(corpus):
  c = tiny(corpus, **{'model.num_layers': 4, 'model.num_kv_shared_layers': 0})
  tx = optimizer.make(c.optimizer, 10)
  ids = np.random.default_rng(0).integers(0, 320, (4, 33)).astype(np.int32)
  weights = (np.random.default_rng(1).random((4, 32)) > 0.3).astype(np.float32)   # uneven: means of microbatches would not do
  batch = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'positions': np.tile(np.arange(32, dtype=np.int32), (4, 1)),
           'segments': np.ones((4, 32), np.int32), 'weights': weights}

  def stepped(accumulate=1, **model):
    cfg = trainer.model_config.from_dict({**c.model, **model})
    params = trainer.transformer.init(cfg, 0)
    state = trainer.State(jnp.zeros((), jnp.int32), params, tx.init(params))
    state, row = jax.jit(trainer.make_step(cfg, tx, accumulate=accumulate, loss_chunk=50))(state, batch)
    return trainer.transformer.unstack(cfg, state.params) if cfg.scan else state.params, row

  params, row = stepped()
  for other, other_row in (stepped(accumulate=2), stepped(scan=True), stepped(remat='full'), stepped(accumulate=4, scan=True, remat='dots')):
    np.testing.assert_allclose(other_row['loss'], row['loss'], rtol=1e-6)
    np.testing.assert_allclose(other_row['grad_norm'], row['grad_norm'], rtol=1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), other, params)
    assert max(jax.tree.leaves(moved)) < 1e-3


def _command(c, workdir, corpus):
  flags = [f'--config.{section}.{name}={value}' for section in ('model', 'data', 'optimizer', 'train') for name, value in c[section].items()
           if value != base.get_config('e2b-toy')[section][name]]
  return [sys.executable, '-m', 'gemma4_jax.cli.train', '--config=configs/base.py:e2b-toy', f'--workdir={workdir}', *flags]


def _start(command):
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir})


def _kill_when(command, reached):
  process = _start(command)
  while process.poll() is None and not reached():
    time.sleep(0.001)
  ended = process.poll() is not None
  process.send_signal(signal.SIGKILL)
  out = process.communicate()[0]
  assert not ended, out


def test_killed_while_training_and_while_saving_it_ends_in_the_same_bits(corpus, tmp_path):
  c = tiny(corpus, **{'train.steps': 40, 'train.checkpoint_every': 5})
  whole = trainer.run(c, tmp_path / 'whole')
  command, cut = _command(c, tmp_path / 'cut', corpus), tmp_path / 'cut'
  last = lambda: max([row['step'] for row in metrics.read_rows(cut / 'metrics.jsonl')], default=0)
  _kill_when(command, lambda: last() >= 8)
  _kill_when(command, lambda: last() >= 10 and list((cut / 'checkpoints').glob('*tmp*')))
  _kill_when(command, lambda: last() >= 23)
  process = _start(command)
  out = process.communicate()[0]
  assert process.returncode == 0, out
  assert rows(cut) == rows(tmp_path / 'whole')
  for a, b in zip(final_state(cut, 40), final_state(tmp_path / 'whole', 40), strict=True):
    np.testing.assert_array_equal(a, b)
  assert json.loads((cut / 'DONE').read_text())['metrics'] == whole['metrics']


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_rows_and_checkpoint(corpus, tmp_path):
  c = tiny(corpus, **{'optimizer.learning_rate': 1e30, 'optimizer.embedding_learning_rate': 1e30, 'train.checkpoint_every': 1,
                      'optimizer.clip_norm': 0.0})
  with pytest.raises(trainer.NonFiniteLoss, match=r'step \d+: .*not finite.*rows \[\[0, \d+\].*last good checkpoint: step \d+'):
    trainer.run(c, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'DONE').exists()
  assert all(np.isfinite(row['loss']) for row in rows(tmp_path / 'run'))


def test_a_folder_of_another_config_is_refused_and_left_as_it_was(corpus, tmp_path):
  metrics.write_json(tmp_path / 'config.json', json.loads(tiny(corpus).to_json()))
  before = (tmp_path / 'config.json').read_bytes()
  with pytest.raises(ValueError, match='differs in model.window'):
    trainer.run(tiny(corpus, **{'model.window': 16}), tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('field, value, match', [
    ('model.window', 0, 'model.window: 0'), ('model.num_kv_heads', 3, 'model.num_kv_heads: 3 does not divide'),
    ('model.num_kv_shared_layers', 4, 'model.num_kv_shared_layers'), ('data.vocab_size', 400, 'data.vocab_size: 400 is not model.vocab_size'),
    ('data.sequence_length', 4096, 'data.sequence_length: 4096 is over'), ('data.path', 'nowhere/*.jsonl', 'data.path.*matches no file'),
    ('train.steps', 0, 'train.steps: 0'), ('mesh.fsdp', 3, 'mesh: .*fsdp=3'), ('optimizer.accumulate', 3, 'data.batch_size: 4 does not divide')])
def test_what_cannot_run_is_one_line_that_names_the_field(corpus, tmp_path, field, value, match):
  with pytest.raises(ValueError, match=match) as error:
    trainer.run(tiny(corpus, **{field: value}), tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_workdir_that_cannot_be_written_is_one_line(corpus, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='workdir: .*cannot be written'):
    trainer.run(tiny(corpus), tmp_path / 'file' / 'run')


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
