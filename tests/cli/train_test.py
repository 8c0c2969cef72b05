"""The command line of one run: what it answers, and that it can be stopped."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = '--config=configs/base.py:e2b-toy'
TINY = ['--config.model.num_layers=2', '--config.model.num_kv_shared_layers=0', '--config.model.pattern=LG', '--config.model.width=16',
        '--config.model.vocab_size=300', '--config.data.vocab_size=300', '--config.data.sequence_length=16', '--config.data.source=text']


def command(*args):
  return [sys.executable, '-m', 'gemma4_jax.cli.train', *args]


def run(*args):
  return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def text(tmp_path):
  for i in range(40):
    (tmp_path / f'{i}.txt').write_text(f'{i} small vectors that a table gives to every token in every layer, document {i * i}')
  return [f'--config.data.path={tmp_path}/*.txt', f'--config.data.cache_dir={tmp_path}/cache', '--config.data.validation_fraction=0.2']


@pytest.mark.parametrize('args, said', [
    ([CONFIG, '--config.model.windw=64'], '--config.model.windw: no such field; did you mean --config.model.window?'),
    ([CONFIG, '--config.model.window=wide'], '--config.model.window=wide: invalid literal for int()'),
    ([CONFIG, '--wrkdir=x'], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    (['--config=configs/bse.py'], 'no such file; did you mean configs/base.py?'),
    (['--config=configs/base.py:e3b'], "no model 'e3b'"),
    ([CONFIG, 'typo'], 'typo: unexpected'),
    ([], '--config is missing'),
])
def test_a_mistyped_command_is_answered_with_one_line(args, said, tmp_path):
  found = run(f'--workdir={tmp_path / "run"}', *args)
  assert found.returncode == 2 and found.stderr.count('\n') == 1, found.stderr
  assert found.stderr.startswith('error: ') and said in found.stderr and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('args, said', [
    (['--config.model.window=0'], 'model.window: 0 is not positive'),
    (['--config.data.path=nowhere/*.txt'], "data.path='nowhere/*.txt' matches no file"),
    (['--config.model.vocab_size=400'], 'data.vocab_size: 300 is not model.vocab_size = 400'),
    (['--workdir=/dev/null/run'], 'workdir: /dev/null/run cannot be written (Not a directory); choose another'),
])
def test_what_cannot_run_is_one_line_and_leaves_no_folder(args, said, tmp_path, text):
  found = run(f'--workdir={tmp_path / "run"}', CONFIG, *TINY, *text, *args)
  assert found.returncode == 2 and found.stderr.count('\n') == 1, found.stderr
  assert found.stderr.startswith('error: ') and said in found.stderr and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('module, said', [
    ('gemma4_jax.cli.train', 'Trains one model'), ('gemma4_jax.cli.sample', 'Continues a prompt'),
    ('gemma4_jax.cli.chat', 'A conversation in the terminal'), ('gemma4_jax.cli.convert', 'Converts a checkpoint'),
    ('gemma4_jax.cli.size', 'Prints what the released variants cost'), ('experiments.launch', 'Runs every point of a sweep'),
    ('experiments.report', 'The table a sweep was run for'), ('experiments.speed', "Speed against the machine's limit"),
    ('experiments.speed_device', 'What an accelerator makes of the models'),
    ('experiments.ple_placement', 'What it costs to keep the PLE table elsewhere')])
def test_help_of_every_command_tells_what_it_is_for_without_loading_jax_and_ends_well(module, said):
  code = (f'import runpy, sys; sys.argv[1:] = ["--help"]\n'
          f'try: runpy.run_module("{module}", run_name="__main__", alter_sys=True)\n'
          'except SystemExit as end: sys.exit(end.code or "jax" in sys.modules)')
  found = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 0 and said in found.stdout and '--help' in found.stdout, found.stderr


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path, text):
  """Also: a matched baseline says what mismatch is left, and Orbax's own news of every save stays out of the log."""
  folder = tmp_path / 'run'
  args = command(f'--workdir={folder}', CONFIG, *TINY, *text, '--config.train.steps=100000', '--config.train.checkpoint_every=1',
                 '--config.eval.max_batches=1', '--config.model.embedding=none', '--config.match.metric=total_params')
  with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    while process.poll() is None:
      with contextlib.suppress(FileNotFoundError):
        if len((folder / 'metrics.jsonl').read_text().splitlines()) > 5:
          break
      time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
  assert process.returncode == 130, error
  assert error.splitlines()[-1] == f'stopped; the same command goes on from the last checkpoint in {folder}' and 'Traceback' not in error
  assert 'orbax' not in error.lower() and 'checkpoint_manager' not in error
  assert out.startswith('matched to ple: total_params ') and ', off by ' in out
  assert [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()][:3] == [1, 2, 3]
  assert any(path.name.isdigit() for path in (folder / 'checkpoints').iterdir())


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_told_in_the_last_line_and_the_run_goes_on_when_it_does(tmp_path, text):
  args = command(f'--workdir={tmp_path / "run"}', CONFIG, *TINY, *text, '--config.train.steps=4', '--config.train.checkpoint_every=2',
                 '--config.optimizer.warmup_steps=1')
  limited = ['bash', '-c', 'ulimit -f 48; exec "$@"', 'bash', *args]     # KiB a file: enough for all but a checkpoint
  found = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'})
  last = found.stderr.splitlines()[-1]     # after it, nothing; before it, TensorStore's threads may have written to stderr
  assert found.returncode == 1 and last.startswith(f'error: {tmp_path}/run: the checkpoint cannot be written'), found.stderr
  assert last.endswith('the same command goes on from the last checkpoint')
  assert not (tmp_path / 'run' / 'DONE').exists()
  found = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 0 and (tmp_path / 'run' / 'DONE').exists(), found.stderr
