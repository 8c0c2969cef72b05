import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types

import pytest
import rich.console

from configs import base
from experiments import launch, manifest, progress, report
from gemma4_jax import config as model_config, hardware, metrics, size

ROOT = pathlib.Path(launch.__file__).parents[1]
SWEEP = [{'seed': seed, 'arm': arm, 'model.embedding': arm} for seed in range(2) for arm in ('none', 'ple')]

# Stands for the trainer: leaves rows and DONE like one, in milliseconds. {name} is the point's, {folder} its folder.
CHILD = '''
import json, os, pathlib, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
(folder / 'starts').open('a').write('x')
def done(fingerprint=name):
  (folder / 'metrics.jsonl').write_text(json.dumps({'step': 1, 'loss': 1.0}) + chr(10))
  (folder / 'DONE').write_text(json.dumps({'metrics': {'eval/bits_per_byte': 1.0}, 'costs': {}, 'fingerprint': fingerprint}))
'''


def config(steps=300):
  c = base.get_config('e2b-toy')
  c.train.steps = steps
  return c


@pytest.fixture
def sweep(tmp_path):
  points = manifest.expand(config(), SWEEP)
  manifest.write(points, tmp_path)

  def run(script, jobs=2, points=points, starting=lambda point: None):
    out = io.StringIO()
    def command(point):
      starting(point)
      return [sys.executable, '-c', CHILD + script, point.name, str(tmp_path / point.folder)]
    failures = launch.run_sweep(points, tmp_path, jobs=jobs, command=command, console=rich.console.Console(file=out))
    return failures, out.getvalue()

  run.points, run.folders = points, [tmp_path / p.folder for p in points]
  return run


def cli(*args, **kwargs):
  return subprocess.run([sys.executable, '-m', 'experiments.launch', *args], cwd=ROOT, capture_output=True, text=True, **kwargs)


def starts(folders):
  return [len((folder / 'starts').read_text()) if (folder / 'starts').exists() else 0 for folder in folders]


def test_every_point_runs_once_and_a_second_launch_runs_none(sweep):
  assert sweep('done()')[0] == {} and starts(sweep.folders) == [1, 1, 1, 1]
  assert sweep('done()')[0] == {} and starts(sweep.folders) == [1, 1, 1, 1]


def test_a_second_launch_takes_up_what_is_not_done(sweep):
  failures, _ = sweep('done() if name.startswith("ple") else sys.exit("out of luck")')
  assert list(failures) == ['none s0', 'none s1']
  assert sweep('done()')[0] == {} and starts(sweep.folders) == [2, 1, 2, 1]


def test_a_failed_point_is_named_with_its_last_line_and_the_rest_goes_on(sweep):
  failures, said = sweep('print("first"); done() if name != "ple s0" else sys.exit("ValueError: no luck")')
  assert list(failures) == ['ple s0'] and failures['ple s0'].startswith('ValueError: no luck')
  assert 'FAILED ple s0  ValueError: no luck' in said and said.count('done   ') == 3


def test_a_killed_point_is_told_by_its_signal(sweep):
  failures, _ = sweep('os.kill(os.getpid(), 9) if name == "none s0" else done()')
  assert failures == {'none s0': 'killed by SIGKILL (out of memory?)'}


def test_an_arm_with_the_logits_of_another_fails_loudly_also_the_next_time(sweep):
  for _ in range(2):
    failures, said = sweep('done(name[-1])', jobs=1)
    assert list(failures) == ['ple s0', 'ple s1']
    assert 'none s0' in failures['ple s0'] and 'ple s0' in failures['ple s0'] and 'bit-identical' in said


def test_each_job_has_cores_of_its_own(sweep):
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
    pytest.skip('one core')
  sweep('time.sleep(0.3); (folder / "cores").write_text(json.dumps(sorted(os.sched_getaffinity(0)))); done()')
  shares = {tuple(json.loads((folder / 'cores').read_text())) for folder in sweep.folders}
  assert sorted(core for share in shares for core in share) == cores and len(shares) == 2


def test_a_point_that_another_process_runs_is_left_to_it(sweep):
  first = sweep.folders[0]
  first.mkdir()
  with contextlib.ExitStack() as other:
    assert other.enter_context(metrics.lock(first))
    started = []
    def starting(point):   # the other process is done when all the rest has started
      started.append(point.name)
      if len(started) == 3:
        (first / 'DONE').write_text(json.dumps({'metrics': {}, 'costs': {}}))
        other.close()
    failures, _ = sweep('done()', starting=starting)
  assert failures == {} and starts(sweep.folders) == [0, 1, 1, 1] and len(started) == 3


def test_an_interrupt_stops_the_children(sweep):
  def interrupt():
    while not all((folder / 'pid').exists() for folder in sweep.folders[:2]):
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
  thread = threading.Thread(target=interrupt)
  thread.start()
  with pytest.raises(KeyboardInterrupt):
    sweep('(folder / "pid").write_text(str(os.getpid())); time.sleep(600)')
  thread.join()
  for folder in sweep.folders[:2]:
    with pytest.raises(ProcessLookupError):
      os.kill(int((folder / 'pid').read_text()), 0)


def test_children_start_with_the_environment_that_is_fast_on_a_cpu_but_for_what_the_user_set(sweep, monkeypatch):
  script = '(folder / "tunables").write_text(os.environ.get("GLIBC_TUNABLES", "")); done()'
  said = lambda: {(folder / 'tunables').read_text() for folder in sweep.folders}
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  sweep(script)
  assert said() == {hardware.cpu_environment().get('GLIBC_TUNABLES', '')}
  for folder in sweep.folders:
    (folder / 'DONE').unlink()
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.check=1')
  sweep(script)
  assert said() == {'glibc.malloc.check=1'}


def test_a_run_that_raises_leaves_one_line_and_the_traceback(sweep, tmp_path, capsys):
  def run(config, folder):
    raise ValueError('data.path: no file\nmatches')
  assert launch.run_point(sweep.points[0], tmp_path, run) == 1
  lines = (sweep.folders[0] / 'ERROR').read_text().splitlines()
  assert lines[0] == 'ValueError: data.path: no file matches' and any('Traceback' in line for line in lines[1:])
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and 'none s0 failed: ValueError: data.path: no file matches' in said


def test_a_run_gets_its_config_and_folder_and_clears_an_old_error(sweep, tmp_path):
  (sweep.folders[1]).mkdir()
  (sweep.folders[1] / 'ERROR').write_text('old')
  def run(config, folder):
    assert config.model.embedding == 'ple' and config.seed == 0 and folder == sweep.folders[1]
    (folder / 'DONE').write_text(json.dumps({'metrics': {}, 'costs': {}}))
  assert launch.run_point(sweep.points[1], tmp_path, run) == 0
  assert not (sweep.folders[1] / 'ERROR').exists()
  assert launch.run_point(sweep.points[1], tmp_path, None) == 0    # done: nothing is imported or run


def test_a_run_that_ends_without_done_has_failed(sweep, tmp_path):
  assert launch.run_point(sweep.points[0], tmp_path, lambda config, folder: None) == 1
  assert 'without a DONE' in (sweep.folders[0] / 'ERROR').read_text()


def test_a_point_is_not_run_twice_at_once(sweep, tmp_path, capsys):
  sweep.folders[0].mkdir()
  with metrics.lock(sweep.folders[0]):
    assert launch.run_point(sweep.points[0], tmp_path, lambda config, folder: 1 / 0) == launch._BUSY
  assert 'by another process' in capsys.readouterr().err


def test_another_sweep_in_a_folder_with_rows_is_refused_and_nothing_changes(sweep, tmp_path):
  sweep('done()')
  before = (tmp_path / manifest.FILE).read_text()
  launch.settle(manifest.expand(config(), SWEEP), tmp_path, check=None)         # the same: no word
  with pytest.raises(manifest.Error, match=r'holds another sweep: train.steps \(300 there, 7 now\). Choose another --workdir'):
    launch.settle(manifest.expand(config(steps=7), SWEEP), tmp_path, check=None)
  assert (tmp_path / manifest.FILE).read_text() == before


def test_a_sweep_of_which_nothing_ran_gives_way(sweep, tmp_path):
  launch.settle(manifest.expand(config(steps=7), SWEEP), tmp_path, check=lambda points: None)
  assert manifest.read(tmp_path)[0].config['train']['steps'] == 7


def test_a_sweep_gives_way_to_no_other_while_a_launch_works_on_it(sweep, tmp_path):
  """It may be preparing its data: no point has a folder yet."""
  with launch._at_work(sweep.points, tmp_path):
    launch.settle(manifest.expand(config(), SWEEP), tmp_path, check=None)   # a second launch of the same
    with launch._at_work(sweep.points, tmp_path):
      with pytest.raises(manifest.Error, match='holds another sweep'):
        launch.settle(manifest.expand(config(steps=7), SWEEP), tmp_path, check=None)
  manifest.write(manifest.expand(config(steps=7), SWEEP), tmp_path)
  with pytest.raises(manifest.Error, match='another launch'), launch._at_work(sweep.points, tmp_path):
    pass


def test_a_sweep_of_another_runner_has_begun_too_when_it_left_anything(sweep, tmp_path):
  folder = sweep.folders[0]
  folder.mkdir()
  for name in ('lock', 'log.txt', 'ERROR'):
    (folder / name).write_text('')
  launch.settle(manifest.expand(config(steps=7), SWEEP), tmp_path, check=lambda points: None)
  manifest.write(sweep.points, tmp_path)
  (folder / 'DONE').write_text(json.dumps({'metrics': {}, 'costs': {}}))
  with pytest.raises(manifest.Error, match='holds another sweep'):
    launch.settle(manifest.expand(config(steps=7), SWEEP), tmp_path, check=lambda points: None)


def test_what_the_check_refuses_writes_no_manifest(sweep, tmp_path):
  def check(points):
    raise manifest.Error('no')
  with pytest.raises(manifest.Error):
    launch.settle(sweep.points, tmp_path / 'new', check)
  assert not (tmp_path / 'new' / manifest.FILE).exists()


@pytest.mark.parametrize('fields, said', [
    ({'train.steps': 5}, 'optimizer.warmup_steps'),
    ({'primary_metric': 'eval/bits_per_bite'}, "primary_metric: a run has no 'eval/bits_per_bite'; did you mean 'eval/bits_per_byte'?"),
    ({'optimizer.accumulate': 3}, 'data.batch_size: 8 does not divide into optimizer.accumulate = 3'),
    ({'optimizer.clip_norm': -1.0}, 'optimizer.clip_norm: -1.0 is negative'),
    ({'optimizer.b1': 1.5}, 'optimizer.b1: 1.5 is not from 0'),
    ({'eval.max_batches': -1}, 'eval.max_batches: -1 is negative'),
    ({'seed': -1}, 'seed: -1 is negative'),
    ({'model.vocab_size': 64}, 'data.vocab_size: 4096 is not model.vocab_size = 64'),
    ({'data.sequence_length': 4096}, 'data.sequence_length: 4096 is over model.context_length')], ids=str)
def test_the_trainer_is_asked_about_every_arm_before_anything_runs(fields, said):
  points = manifest.expand(config(), [{'arm': 'good'}, {'arm': 'bad', **fields}])
  assert launch._refused(points).startswith(f'point 1 (bad): {said}')


def test_what_the_trainer_refuses_is_refused_from_a_process_of_its_own():
  with pytest.raises(manifest.Error, match=r'point 0 \(default\): optimizer.warmup_steps'):
    launch.check_runs(manifest.expand(config(steps=5), [{}]))


def test_a_folder_that_cannot_be_written_is_refused(sweep, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(manifest.Error, match='file: cannot be written .*choose another'):
    launch.settle(sweep.points, tmp_path / 'file', check=None)


def test_a_workdir_that_another_user_may_only_read_is_one_line():
  """Root may write anywhere, so that it becomes nobody, once all is imported that nobody may not read."""
  code = ('import os, sys\nfrom absl import app\nfrom configs import base\nfrom experiments import launch\n'
          'from gemma4_jax import config_file\nlaunch.plan("configs/ple.py", base.get_config("e2b-toy"))\n'
          'if os.geteuid() == 0:\n  os.setgroups([])\n  os.setgid(65534)\n  os.setuid(65534)\n'
          'launch._define_flags()\napp.run(launch.main, flags_parser=config_file.parse)')
  with tempfile.TemporaryDirectory() as workdir:
    os.chmod(workdir, 0o555)
    found = subprocess.run([sys.executable, '-c', code, '--config=configs/ple.py', f'--workdir={workdir}'], cwd=ROOT,
                           capture_output=True, text=True)
    assert not os.listdir(workdir)
  assert found.returncode == 2
  assert found.stderr == f'error: --workdir={workdir}: cannot be written (Permission denied); choose another folder\n'


@pytest.mark.parametrize('args, said', [
    (['--config=configs/ple.py', '--config.model.windw=64'], '--config.model.windw: no such field; did you mean --config.model.window?'),
    (['--config=configs/ple.py', '--config.modle.window=64'], 'did you mean --config.model.window?'),
    (['--config=configs/ple.py', '--config.model.window=wide'], "--config.model.window=wide: invalid literal for int()"),
    (['--config=configs/ple.py', '--config.model.window=0'], 'point 0 (none): model.window: 0 is not positive'),
    (['--config=configs/ple.py', '--config.seed=1'], '--config.seed: the sweep sets this field itself'),
    (['--config=configs/pel.py'], 'no such file; did you mean configs/ple.py?'),
    (['--config=configs/ple.py:e2b-toi'], "no model 'e2b-toi'"),
    (['--config.model.window=64'], 'needs --config=FILE before it'),
    (['--config=configs/ple.py', '--jbos=2'], "Did you mean: jobs"),
    (['--workdir={tmp}/empty'], 'no manifest.jsonl there'),
    (['--config=configs/ple.py', '--workdir={tmp}/file'], 'cannot be written'),
    (['--workdir={tmp}', '--index=4'], 'has points 0 to 3'),
    (['--workdir={tmp}', '--index=0', '--plan'], 'with neither --plan nor --only'),
    (['--workdir={tmp}', '--only=pel'], "--only=pel: no such arm; did you mean 'ple'?"),
    (['--workdir={tmp}', 'typo'], 'typo: unexpected'),
])
def test_a_users_error_is_one_line(sweep, tmp_path, args, said):
  (tmp_path / 'file').write_text('')
  found = cli(f'--workdir={tmp_path}/new', *(arg.format(tmp=tmp_path) for arg in args))
  assert found.returncode == 2 and found.stderr.count('\n') == 1, found.stderr
  assert found.stderr.startswith('error: ') and said in found.stderr


def test_the_plan_shows_arms_and_matches_and_overrides_reach_every_point(tmp_path):
  found = cli('--config=configs/ple.py', f'--workdir={tmp_path}', '--plan', '--config.model.window=64', '--config.train.steps=50')
  assert found.returncode == 0, found.stderr
  points = manifest.read(tmp_path)
  assert f'{len(points)} points, 0 done' in found.stdout and 'none =params is matched to ple' in found.stdout
  assert {(p.config['model']['window'], p.config['train']['steps']) for p in points} == {(64, 50)}
  ple = size.costs(model_config.from_dict(points[1].config['model']), 128)
  assert points[1].arm == 'ple' and all(report.quantity(ple[name]) in found.stdout for name in ('params/total', 'flops_per_token'))


def test_the_parent_does_not_import_jax():
  code = 'import experiments.launch, gemma4_jax.data.corpus, sys; sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_the_tail_of_the_rows_is_the_last_whole_one(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert progress.last_row(path) == {}
  path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n{"step": 2, "eval/x": 1}\n{"step": 3, "lo')
  assert progress.last_row(path) == {'step': 2, 'loss': 2.0}


def test_the_live_view_shows_each_running_point(sweep, tmp_path):
  out = io.StringIO()
  console = rich.console.Console(file=out, force_terminal=True, width=120)
  sweep.folders[1].mkdir()
  (sweep.folders[1] / 'metrics.jsonl').write_text('{"step": 40, "loss": 3.25, "tokens_per_s": 12345.6}\n')
  with progress.View(console, total=4) as view:
    view.finished(None, failed=False)
    view.update([progress.Track(sweep.points[1], sweep.folders[1])], jobs=1)
  assert '1 of 4 done, 0 failed, 1 running, 2 waiting' in out.getvalue()
  assert all(text in out.getvalue() for text in ('ple s0', '40/300', '3.250', '12,346'))


def test_a_config_that_names_a_runner_is_checked_and_run_by_it(tmp_path, monkeypatch):
  ran = []
  def check(config):
    raise ValueError(f'no {config.arm}')
  def run(config, folder):
    ran.append(config.arm)
    (folder / 'DONE').write_text(json.dumps({'metrics': {}, 'costs': {}}))
  monkeypatch.setitem(sys.modules, 'a_runner', types.SimpleNamespace(check=check, run=run))
  c = config()
  c.runner = 'a_runner'
  point, = manifest.expand(c, [{'arm': 'mine'}])
  assert launch._refused([point]) == 'point 0 (mine): no mine'
  assert launch.run_point(point, tmp_path) == 0 and ran == ['mine']


def test_a_runner_that_is_not_there_is_refused():
  c = config()
  c.runner = 'experiments.prob'
  assert launch._refused(manifest.expand(c, [{}])).startswith("point 0 (default): No module named 'experiments.prob'")
