"""One run: what it leaves, what it refuses, and that a kill at any moment changes nothing."""

import json
import os
import pathlib
import signal
import socket
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
from gemma4_jax.checkpoint import load, save
from gemma4_jax.evaluation import perplexity_task
from gemma4_jax.sampling import text
from gemma4_jax.training import optimizer, trainer
from tests import quick

ROOT = pathlib.Path(__file__).parents[2]
CLOCK = {'tokens_per_s', 'mfu', 'peak_memory_bytes'}
SMALLER = {'model.num_layers': 2, 'model.num_kv_shared_layers': 0}
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


def test_a_kernel_that_the_device_has_not_is_refused_before_anything_is_written(corpus, tmp_path):
  with pytest.raises(ValueError, match="model.attention_implementation: 'splash' needs a TPU"):
    trainer.run(tiny(corpus, **{'model.attention_implementation': 'splash'}), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


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
  assert environment['attention'] == 'xla' and len(environment['corpus_hash']) == 64 and environment['versions']['jax'] == jax.__version__
  assert environment['before'] == []
  whole = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
  assert trainer.run(tiny(corpus), tmp_path / 'run') == json.loads(json.dumps(done))   # what is done stays as it is, costs and commit too
  assert {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()} == whole


@pytest.mark.parametrize('scan', quick.only([False], [False, True]))
def test_a_run_may_begin_with_the_weights_of_a_checkpoint(corpus, tmp_path, scan):
  fields = {**SMALLER, 'train.steps': 3, 'optimizer.warmup_steps': 0, 'eval.max_batches': 1, 'train.checkpoint_every': 3}
  first = trainer.run(tiny(corpus, **fields), tmp_path / 'first')
  still = {'optimizer.learning_rate': 1e-30, 'optimizer.embedding_learning_rate': 1e-30}    # so that what is evaluated is what was read
  tuned = {**fields, **still, 'train.steps': 1, 'model.scan': scan, 'seed': 5}
  again = trainer.run(tiny(corpus, **tuned, **{'train.init': str(tmp_path / 'first')}), tmp_path / 'again')
  assert again['metrics']['eval/nats_per_token'] == pytest.approx(first['metrics']['eval/nats_per_token'], rel=1e-6)
  assert rows(tmp_path / 'again')[0]['loss'] < rows(tmp_path / 'first')[0]['loss'] - 0.1

  (tmp_path / 'again' / 'DONE').unlink()
  other = json.loads((tmp_path / 'first' / 'tokenizer.json').read_text())
  other['model']['merges'].pop()
  (tmp_path / 'first' / 'tokenizer.json').write_text(json.dumps(other))
  with pytest.raises(ValueError, match='train.init: .* has another tokenizer than the data; set data.tokenizer=.*tokenizer.json'):
    trainer.run(tiny(corpus, **tuned, **{'train.init': str(tmp_path / 'first')}), tmp_path / 'other')
  with pytest.raises(ValueError, match='train.init: .* is another model: model.window is 8 there and 4 here'):
    trainer.run(tiny(corpus, **tuned, **{'model.window': 4, 'train.init': str(tmp_path / 'first')}), tmp_path / 'other')
  with pytest.raises(ValueError, match='nowhere: no such directory'):
    trainer.run(tiny(corpus, **{'train.init': str(tmp_path / 'nowhere')}), tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_a_run_that_goes_on_keeps_what_was_true_of_it_before_and_refuses_other_text(corpus, tmp_path):
  c, run = tiny(corpus, **SMALLER, **{'train.steps': 4, 'train.checkpoint_every': 2, 'eval.max_batches': 1}), tmp_path / 'run'
  trainer.run(c, run)
  (run / 'DONE').unlink()
  first = json.loads((run / 'env.json').read_text())
  metrics.write_json(run / 'env.json', {**first, 'commit': 'another'})
  found = metrics.read_rows(run / 'metrics.jsonl')
  found[0]['peak_memory_bytes'] = 1 << 50
  (run / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in found))
  assert trainer.run(c, run)['costs']['peak_memory_bytes'] == 1 << 50
  environment = json.loads((run / 'env.json').read_text())
  assert environment['commit'] == first['commit'] and [env['commit'] for env in environment['before']] == ['another']

  (run / 'DONE').unlink()
  before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
  text = (corpus / 'text.jsonl').read_text()
  try:
    (corpus / 'text.jsonl').write_text(text.replace('small', 'laaaaarge', 7))
    with pytest.raises(ValueError, match='holds a run of other data .corpus_hash .* there, .* now.; bring the text back'):
      trainer.run(c, run)
  finally:
    (corpus / 'text.jsonl').write_text(text)
  assert {path: path.read_bytes() for path in run.rglob('*') if path.is_file()} == before


@pytest.mark.slow
def test_a_runs_folder_is_sampled_from_without_naming_its_tokenizer(corpus, tmp_path):
  trainer.run(tiny(corpus, **{'train.steps': 3}), tmp_path / 'run')
  environment = json.loads((tmp_path / 'run' / 'env.json').read_text())
  model = text.load(tmp_path / 'run')
  assert model.tokenizer.hash == environment['tokenizer_hash'] and model.stop_ids == (model.tokenizer.eos_id,)
  assert len(model.generate('per layer', max_new_tokens=4, seed=1).tokens) <= 4


@pytest.mark.slow
def test_a_copy_of_a_runs_weights_is_scored_on_what_the_run_kept_back(corpus, tmp_path):
  trainer.run(tiny(corpus, **SMALLER, **{'train.steps': 3}), tmp_path / 'run')
  cfg, params = load.load(tmp_path / 'run')
  save.save_orbax(cfg, params, tmp_path / 'copy', source=tmp_path / 'run')
  score = lambda folder, data: perplexity_task.run(str(tmp_path / folder), data)['metrics']
  assert score('copy', f'validation:{tmp_path / "run"}') == score('run', 'validation')
  with pytest.raises(ValueError, match='copy is no folder of a run; name one, --data=validation:RUN, or files'):
    score('copy', 'validation')


@pytest.mark.slow
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
    state, row = quick.jit(trainer.make_step(cfg, tx, accumulate=accumulate, loss_chunk=50))(state, batch)
    return trainer.transformer.unstack(cfg, state.params) if cfg.scan else state.params, row

  params, row = stepped()
  for other, other_row in (stepped(accumulate=2), stepped(scan=True), stepped(remat='full'),
                           stepped(accumulate=4, scan=True, remat='dots')):
    np.testing.assert_allclose(other_row['loss'], row['loss'], rtol=1e-6)
    np.testing.assert_allclose(other_row['grad_norm'], row['grad_norm'], rtol=1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), other, params)
    assert max(jax.tree.leaves(moved)) < 1e-3


def _command(c, workdir, corpus):
  flags = [f'--config.{section}.{name}={value}' for section in ('model', 'data', 'optimizer', 'train') for name, value in c[section].items()
           if value != base.get_config('e2b-toy')[section][name]]
  return [sys.executable, '-m', 'gemma4_jax.cli.train', '--config=configs/base.py:e2b-toy', f'--workdir={workdir}', *flags]


def _start(command, **environment):
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, **environment})


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


DIVERGING = {'optimizer.learning_rate': 1e30, 'optimizer.embedding_learning_rate': 1e30, 'optimizer.clip_norm': 0.0}


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_rows_and_checkpoint(corpus, tmp_path):
  c = tiny(corpus, **DIVERGING, **{'train.checkpoint_every': 1})
  with pytest.raises(trainer.NonFiniteLoss, match=r'step \d+: .*not finite.*rows \[\[0, \d+\].*last good checkpoint: step \d+'):
    trainer.run(c, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'DONE').exists()
  assert all(np.isfinite(row['loss']) for row in rows(tmp_path / 'run'))


@pytest.mark.slow
def test_the_first_step_that_went_wrong_is_named_also_between_logged_ones(corpus, tmp_path):
  said = []
  for every in (1, 12):
    with pytest.raises(trainer.NonFiniteLoss) as error:
      trainer.run(tiny(corpus, **DIVERGING, **{'train.log_every': every, 'train.checkpoint_every': 12}), tmp_path / str(every))
    said.append(str(error.value))
  assert said[0] == said[1] and 'last good checkpoint: none' in said[0]


@pytest.mark.slow
def test_bfloat16_computes_and_float32_is_what_is_trained_and_saved(corpus, tmp_path):
  whole, half = (trainer.run(tiny(corpus, **SMALLER, **{'model.dtype': dtype}), tmp_path / dtype) for dtype in ('float32', 'bfloat16'))
  assert whole['fingerprint'] != half['fingerprint']
  assert half['metrics']['train/loss'] == pytest.approx(whole['metrics']['train/loss'], rel=0.02)
  leaves = final_state(tmp_path / 'bfloat16', 12)
  assert {leaf.dtype for leaf in leaves} == {np.dtype('float32'), np.dtype('int32')}
  assert any(np.any(leaf.view(np.uint32) & 0xFFFF) for leaf in leaves if leaf.dtype == np.float32)   # not rounded on the way


@pytest.mark.slow
def test_a_field_without_effect_leaves_the_fingerprint_and_an_arm_with_one_does_not(corpus, tmp_path):
  prints = {}
  arms = {'none': {}, 'more buckets of no bigrams': {'model.bigram_buckets': 7}, 'bigram': {'model.embedding': 'bigram'}}
  for name, fields in arms.items():
    c = tiny(corpus, **{**SMALLER, 'model.embedding': 'none', 'train.steps': 1, 'optimizer.warmup_steps': 0, 'eval.max_batches': 1,
                        **fields})
    prints[name] = trainer.run(c, tmp_path / name)['fingerprint']
  assert prints['none'] == prints['more buckets of no bigrams'] != prints['bigram']


@pytest.mark.slow
def test_a_full_disk_names_the_row_and_the_way_on_and_the_run_then_goes_on(corpus, tmp_path, monkeypatch):
  c = tiny(corpus)
  trainer.run(c, tmp_path / 'whole')
  class Full(metrics.Writer):
    def write(self, row):
      if row['step'] == 6:
        self._file = open('/dev/full', 'ab', buffering=0)
      super().write(row)
  with monkeypatch.context() as patch:
    patch.setattr(metrics, 'Writer', Full)
    with pytest.raises(OSError, match='metrics.jsonl: the row of step 6 cannot be written .No space left on device.; once it can'):
      trainer.run(c, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'DONE').exists()
  trainer.run(c, tmp_path / 'run')
  assert rows(tmp_path / 'run') == rows(tmp_path / 'whole')


def test_a_checkpoint_that_cannot_be_saved_is_one_error_that_names_the_folder(corpus, tmp_path, monkeypatch):
  def save(self, *args):
    raise ValueError('RESOURCE_EXHAUSTED: no space\nof TensorStore')
  monkeypatch.setattr(trainer.orbax.Checkpoints, 'save', save)
  with pytest.raises(OSError, match='run: the checkpoint cannot be written .RESOURCE_EXHAUSTED: no space.; once it can') as error:
    trainer.run(tiny(corpus), tmp_path / 'run')
  assert '\n' not in str(error.value)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_error_that_names_the_way_back(corpus, tmp_path, capfd):
  c, run = tiny(corpus, **SMALLER, **{'eval.max_batches': 1}), tmp_path / 'run'
  trainer.run(c, run)
  (run / 'DONE').unlink()
  for file in (run / 'checkpoints' / '12' / 'state').glob('ocdbt.process_0/d/*'):
    os.truncate(file, min(file.stat().st_size, 5000))
  with pytest.raises(ValueError, match='12/state: not a whole Orbax tree .*; remove .*/checkpoints/12 to go back') as e:
    trainer.run(c, run)
  with pytest.raises(ValueError, match='12/state: not a whole Orbax tree') as other:
    text.load(run)
  assert '\n' not in f'{e.value}{other.value}'
  time.sleep(0.2)   # reads that failed beside the first one would be told meanwhile, by threads of TensorStore
  assert 'Traceback' not in capfd.readouterr().err


PROCESS = '''
import json, pathlib, sys
import jax, ml_collections
from gemma4_jax import hardware
from gemma4_jax.training import trainer
port, count, index, config, workdir = sys.argv[1:]
hardware.keep_memory()   # as the command does
jax.distributed.initialize(f'localhost:{port}', int(count), int(index))
trainer.run(ml_collections.ConfigDict(json.loads(config)), pathlib.Path(workdir))
'''


@pytest.mark.slow
def test_two_processes_on_a_mesh_train_and_evaluate_as_one_does(corpus, tmp_path):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]

  fields = {**SMALLER, 'train.steps': 3, 'model.num_kv_heads': 2, 'model.global_num_kv_heads': 2, 'eval.batch_size': 8}
  c = tiny(corpus, **fields, **{'mesh.fsdp': 2, 'mesh.tensor': 2})
  both = [_start([sys.executable, '-c', PROCESS, str(port), '2', str(index), c.to_json(), str(tmp_path / 'two')],
                 **quick.virtual_devices(2, '--xla_backend_optimization_level=0')) for index in range(2)]
  outs = [process.communicate()[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], outs
  trainer.run(tiny(corpus, **fields), tmp_path / 'one')
  one, two = (rows(tmp_path / name, CLOCK | {'fingerprint'}) for name in ('one', 'two'))
  assert len(one) == len(two) == 3 and one[-1]['eval/tokens'] == two[-1]['eval/tokens'] > 0
  for a, b in zip(one, two):
    assert a.keys() == b.keys()
    np.testing.assert_allclose([*b.values()], [*a.values()], rtol=2e-4)
  assert json.loads((tmp_path / 'two' / 'env.json').read_text())['processes'] == 2


def test_a_folder_of_another_config_is_refused_and_left_as_it_was(corpus, tmp_path):
  metrics.write_json(tmp_path / 'config.json', json.loads(tiny(corpus).to_json()))
  before = (tmp_path / 'config.json').read_bytes()
  with pytest.raises(ValueError, match='differs in model.window'):
    trainer.run(tiny(corpus, **{'model.window': 16}), tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('field, value, match', [
    ('model.window', 0, 'model.window: 0'),
    ('model.num_kv_heads', 3, 'model.num_kv_heads: 3 does not divide'),
    ('model.num_kv_shared_layers', 4, 'model.num_kv_shared_layers'),
    ('data.vocab_size', 400, 'data.vocab_size: 400 is not model.vocab_size'),
    ('data.sequence_length', 4096, 'data.sequence_length: 4096 is over'),
    ('data.path', 'nowhere/*.jsonl', 'data.path.*matches no file'),
    ('train.steps', 0, 'train.steps: 0'),
    ('mesh.fsdp', 3, 'mesh: .*fsdp=3'),
    ('optimizer.accumulate', 3, 'data.batch_size: 4 does not divide')])
def test_what_cannot_run_is_one_line_that_names_the_field(corpus, tmp_path, field, value, match):
  with pytest.raises(ValueError, match=match) as error:
    trainer.run(tiny(corpus, **{field: value}), tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_workdir_that_cannot_be_written_is_one_line(corpus, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='workdir: .*cannot be written'):
    trainer.run(tiny(corpus), tmp_path / 'file' / 'run')
