r"""Runs every point of a sweep as a process of its own, and reports what came out.

  python -m experiments.launch --config=configs/ple.py:e2b-toy --workdir=runs/ple
  python -m experiments.launch --config=configs/ple.py --workdir=runs/short --config.train.steps=50   # any field of configs/base.py
  python -m experiments.launch --workdir=runs/ple             # go on with a sweep: what is done is passed over
  python -m experiments.launch --workdir=runs/ple --index=3   # one point, here and now (a Slurm array: --index=$SLURM_ARRAY_TASK_ID)

The workdir gets manifest.jsonl (a line a point) and a folder a point: config.json, env.json, metrics.jsonl, checkpoints/,
log.txt, and at last DONE, or ERROR. Several launches may share a workdir: a point is run by one of them at a time.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags
import rich.console
import rich.table
import rich.text

from experiments import manifest, progress
from gemma4_jax import config as model_config, config_file, hardware, metrics, size

_BUSY = 75                # exit status of a child whose point another process is running (EX_TEMPFAIL)
_GRACE = 20.0             # seconds between SIGTERM and SIGKILL
_PATIENCE = 60            # seconds that a launch waits for another to write the manifest


def plan(config_flag: str, config: ml_collections.ConfigDict, fixed: Sequence[str] = ()) -> list[manifest.Point]:
  """Expands the sweep of the config file `path.py:arg` over `config`; `fixed`: fields that the command line set."""
  module, arg = config_file.load(config_flag)
  return manifest.expand(config, manifest.get_sweep(module, arg), manifest.get_metrics(module), fixed)


def settle(points: Sequence[manifest.Point], workdir: pathlib.Path, check: Callable[[Sequence[manifest.Point]], None]) -> None:
  """Writes the manifest of a new sweep, after `check`; a sweep that is there already stays.

  Raises:
    manifest.Error: the workdir cannot be written, or another sweep has begun there.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=workdir).close()
  except OSError as e:
    raise manifest.Error(f'--workdir={workdir}: cannot be written ({e.strerror}); choose another folder') from e
  for patience in range(_PATIENCE, -1, -1):
    there = manifest.read(workdir) if (workdir / manifest.FILE).exists() else []
    differs = manifest.difference(there, points)
    if not differs:
      return
    refused = f'--workdir={workdir} holds another sweep: {differs}. Choose another --workdir, or leave out --config to go on with that one'
    if any(_has_begun(workdir / point.folder) for point in there):
      raise manifest.Error(refused)
    with metrics.lock(workdir) as held:
      if held:
        check(points)
        manifest.write(points, workdir)
        return
    if there or not patience:   # a launch is at work; of one that has no manifest yet, this may be a twin
      raise manifest.Error(refused if there else _taken(workdir))
    time.sleep(1)


def _has_begun(folder: pathlib.Path) -> bool:
  """A point that failed before it left anything to keep has not."""
  return folder.is_dir() and any(path.name not in ('lock', 'log.txt', 'ERROR') for path in folder.iterdir())


def check_runs(points: Sequence[manifest.Point]) -> None:
  """Raises manifest.Error if its runner would refuse a point. In a process of its own: runners import jax."""
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
    refused = process.submit(_refused, list(points)).result()
  if refused:
    raise manifest.Error(refused)


def runner(point: manifest.Point):
  """The module that checks and runs a point: the trainer, or what the config names in a field `runner`.

  It has check(config), which raises ValueError, and run(config, folder), which leaves DONE there. One that is named has
  report(workdir, console=) -> bool, too, in the place of `report.report`.
  """
  return importlib.import_module(point.config.get('runner', 'gemma4_jax.training.trainer'))


def _refused(points: Sequence[manifest.Point]) -> str:
  for point in {p.label: p for p in reversed(points)}.values():
    try:
      runner(point).check(ml_collections.ConfigDict(point.config))
    except (ValueError, ImportError) as e:
      return f'point {point.index} ({point.label}): {config_file.one_line(e)}'
  return ''


def run_point(point: manifest.Point, workdir: pathlib.Path, run: Callable | None = None) -> int:
  """Runs one point in this process and returns its exit status; `run` stands in for that of its runner in tests."""
  folder = workdir / point.folder
  folder.mkdir(parents=True, exist_ok=True)
  with metrics.lock(folder) as held:
    if not held:
      print(f'{point.name} ({folder}) is being run by another process', file=sys.stderr)
      return _BUSY
    if manifest.done(point, workdir) is not None:
      print(f'{point.name} ({folder}) is done')
      return 0
    (folder / 'ERROR').unlink(missing_ok=True)
    cache = os.environ.get('GEMMA4_JAX_CACHE') or '~/.cache/gemma4_jax'
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(os.path.expanduser(cache), 'xla'))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
    try:
      if run is None:
        from gemma4_jax.training import trainer  # imports jax, which reads the environment
        hardware.keep_memory()
        hardware.take_gpu_memory()
        run = runner(point).run
        logging.set_verbosity(logging.INFO)
        trainer.quiet_orbax()
      run(ml_collections.ConfigDict(point.config), folder)
      if manifest.done(point, workdir) is None:
        raise RuntimeError('the run ended without a DONE file')
    except Exception as e:
      said = f'{type(e).__name__}: {config_file.one_line(e)}'
      with contextlib.suppress(OSError):   # where the disk is full
        metrics.write_text(folder / 'ERROR', f'{said}\n\n{traceback.format_exc()}')
      print(f'{point.name} failed: {said} (traceback in {folder / "ERROR"})', file=sys.stderr)
      return 1
  return 0


def run_sweep(points: Sequence[manifest.Point], workdir: pathlib.Path, *, jobs: int, command: Callable[[manifest.Point], list[str]],
              console: rich.console.Console) -> dict[str, str]:
  """Runs the points that are not done, `jobs` at a time, each on its own share of the cores.

  A point that ends with the logits of another arm (see manifest.clash) has failed, loudly; the others go on.

  Args:
    points: those to run; what is done of them is passed over.
    command: the command line that runs one point.
  Returns:
    Why each point that failed did: name -> one line.
  Raises:
    KeyboardInterrupt: after the children were stopped.
  """
  finished, failures, running = [], {}, {}       # running: slot -> (process, track)
  pending = [p for p in points if manifest.done(p, workdir) is None]
  with progress.View(console, total=len(points)) as view:

    def judge(point: manifest.Point, returncode: int, track: progress.Track | None = None) -> None:
      result = manifest.done(point, workdir)
      if result is None:
        failures[point.name] = manifest.failure(point, workdir, returncode)
      else:
        clashes = [said for other, theirs in finished if (said := manifest.clash(other, theirs, point, result))]
        finished.append((point, result))
        if clashes:
          failures[point.name] = clashes[0]
      failed = point.name in failures
      view.finished(track, failed)
      if failed:
        view.say(f'FAILED {point.name}  {failures[point.name]}', style='bold red')
      elif track:
        view.say(f'done   {point.name}')

    for point in (p for p in points if p not in pending):
      judge(point, 0)
    try:
      while pending or running:
        for slot in (s for s in range(jobs) if s not in running):
          point = next((p for p in pending if not _is_locked(workdir / p.folder)), None)
          if point is None:      # the others are being run by another launch
            break
          pending.remove(point)
          if manifest.done(point, workdir) is not None:
            judge(point, 0)      # by that launch
            continue
          running[slot] = _start(point, workdir, slot, jobs, command), progress.Track(point, workdir / point.folder)
          view.say(f'start  {point.name}  {point.folder}')
        time.sleep(0.2)
        for slot, (process, track) in list(running.items()):
          if process.poll() is None:
            continue
          del running[slot]
          if process.returncode == _BUSY:
            pending.append(track.point)
          else:
            judge(track.point, process.returncode, track)
        view.update([track for _, track in running.values()], jobs)
    except KeyboardInterrupt:
      view.say(f'stopping {len(running)} running points')
      _stop([process for process, _ in running.values()])
      raise
  return failures


def _start(point: manifest.Point, workdir: pathlib.Path, slot: int, jobs: int, command: Callable) -> subprocess.Popen:
  folder = workdir / point.folder
  folder.mkdir(parents=True, exist_ok=True)
  environment = {**os.environ, **hardware.cpu_environment()}
  if jobs > 1:
    environment.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')   # else the first child takes most of an accelerator
  with (folder / 'log.txt').open('ab') as log:
    # In a session of its own, so that Ctrl-C reaches this process alone, which then stops the children in order.
    process = subprocess.Popen(
        command(point), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)
  if jobs > 1 and hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    share = cores[slot * len(cores) // jobs:(slot + 1) * len(cores) // jobs] or [cores[slot % len(cores)]]
    with contextlib.suppress(ProcessLookupError):    # it has ended already
      os.sched_setaffinity(process.pid, share)       # long before XLA counts the cores and starts its threads
  return process


def _stop(processes: Sequence[subprocess.Popen]) -> None:
  for process in processes:
    process.terminate()
  deadline = time.monotonic() + _GRACE
  for process in processes:
    try:
      process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def _is_locked(folder: pathlib.Path) -> bool:
  if not (folder / 'lock').exists():
    return False
  with metrics.lock(folder) as held:
    return not held


def _auto_jobs() -> int:
  """One on a machine with an accelerator; else two, a half of the cores each, if there are two cores."""
  return 1 if hardware.has_accelerator() else min(2, hardware.cores())


def _prepare_data(points: Sequence[manifest.Point], console: rich.console.Console) -> None:
  """Builds every corpus and tokenizer once, so that the children find them made."""
  from gemma4_jax.data import corpus
  for data in {manifest.canonical(p.config['data']): p.config['data'] for p in points}.values():
    console.print(f'data: {data["source"]} {data["path"]}'.rstrip(), markup=False, highlight=False, soft_wrap=True)
    try:
      made = corpus.prepare(ml_collections.ConfigDict(data))
    except (ImportError, OSError, ValueError) as e:
      raise manifest.Error(config_file.one_line(e)) from e
    for split, domains in made.statistics.items():
      said = ', '.join(f'{domain} {n["bytes"] / 1e6:.1f} MB' for domain, n in domains.items())
      console.print(f'  {split}: {said}', markup=False, highlight=False)


def _show_plan(points: Sequence[manifest.Point], workdir: pathlib.Path, console: rich.console.Console) -> None:
  from experiments import report  # late: scipy
  done = {p.folder for p in points if manifest.done(p, workdir) is not None}
  console.print(f'{workdir}: {len(points)} points, {len(done)} done', markup=False, highlight=False, soft_wrap=True)
  table = rich.table.Table(box=None)
  for column in ('arm', 'seeds', 'done', 'params', 'FLOPs', 'folder-s*', 'sets'):
    table.add_column(column, overflow='fold', no_wrap=column not in ('arm', 'sets'))
  for group, arm in dict.fromkeys((p.group, p.arm) for p in points):
    mine = [p for p in points if (p.group, p.arm) == (group, arm)]
    sets = ', '.join(f'{field}={value}' for field, value in mine[0].overrides.items() if field not in manifest.LABELS)
    costs = size.costs(model_config.from_dict(mine[0].config['model']), mine[0].config['data']['sequence_length'])
    cells = (mine[0].label, ' '.join(str(p.seed) for p in mine), str(sum(p.folder in done for p in mine)),
             report.quantity(costs['params/total']), report.quantity(costs['flops_per_token']),
             mine[0].folder.rpartition('-s')[0], sets)
    table.add_row(*map(rich.text.Text, cells))
  console.print(table)
  for point in {(p.group, p.arm): p for p in points if p.match}.values():
    console.print(manifest.tell_match(point), markup=False, highlight=False, soft_wrap=True)
  for a, b in manifest.twins(points):
    console.print(f'{a} and {b} have the same config, and so the same runs.', markup=False, highlight=False)


def _define_flags() -> None:
  """Not at import, so that this module and others with a --workdir can live in one process."""
  config_flags.DEFINE_config_file(
      'config', None, 'Config file, path/to/file.py:arg; --config.section.field=value sets a field in every point of the sweep. '
      'Not needed to go on with the sweep of a workdir.', lock_config=True)
  flags.DEFINE_string('workdir', None, 'Folder of the sweep; the report lands there too.')
  flags.DEFINE_integer('jobs', 0, 'Points at a time, each on its share of the cores; 0: one on an accelerator, else two.', lower_bound=0)
  flags.DEFINE_integer('index', None, 'Run this point of the manifest alone, in this process.', lower_bound=0)
  flags.DEFINE_multi_string('only', [], 'Run this arm alone, now; repeat it for more. The others stay in the manifest.')
  flags.DEFINE_boolean('plan', False, 'Write the manifest, show the points and stop.')
  flags.DEFINE_boolean('report', True, 'Report at the end.')


def _launch(argv: Sequence[str]) -> int:
  console = rich.console.Console()
  args = flags.FLAGS
  if len(argv) > 1:
    raise manifest.Error(f'{argv[1]}: unexpected; flags are written --name=value')
  if not args.workdir:
    raise manifest.Error('--workdir=FOLDER is missing: where the sweep and its report go')
  workdir = pathlib.Path(args.workdir)
  if args.index is not None and (args.plan or args.only):
    raise manifest.Error('--index runs one point of the manifest: it goes with neither --plan nor --only')
  if args.config is None:
    points = manifest.read(workdir)
  else:
    flag = args['config']
    points = plan(flag.config_filename, args.config, list(flag.override_values))
    settle(points, workdir, check_runs)
  with _at_work(points, workdir):
    return _work(points, workdir, args, console)


@contextlib.contextmanager
def _at_work(points: Sequence[manifest.Point], workdir: pathlib.Path):
  """Nobody replaces the manifest meanwhile; other launches of the same sweep may work beside."""
  with metrics.lock(workdir, shared=True) as held:
    if not held or manifest.difference(manifest.read(workdir), points):
      raise manifest.Error(_taken(workdir))
    yield


def _taken(workdir: pathlib.Path) -> str:
  return f'--workdir={workdir}: another launch is beginning a sweep there; choose another --workdir'


def _work(points: Sequence[manifest.Point], workdir: pathlib.Path, args, console: rich.console.Console) -> int:
  if args.index is not None:
    if args.index >= len(points):
      raise manifest.Error(f'--index={args.index}: {workdir / manifest.FILE} has points 0 to {len(points) - 1}')
    return run_point(points[args.index], workdir)

  for arm in args.only:
    manifest.check_arm(arm, list(dict.fromkeys(p.arm for p in points)), '--only')
  chosen = [p for p in points if not args.only or p.arm in args.only]
  _show_plan(chosen, workdir, console)
  if args.plan:
    return 0
  own_runner = 'runner' in points[0].config
  if not own_runner:
    _prepare_data([p for p in chosen if manifest.done(p, workdir) is None], console)
  command = lambda point: [sys.executable, '-m', 'experiments.launch', f'--workdir={workdir}', f'--index={point.index}']
  jobs = min(args.jobs or _auto_jobs(), len(chosen))
  failures = run_sweep(chosen, workdir, jobs=jobs, command=command, console=console)
  console.print(f'{len(chosen) - len(failures)} of {len(chosen)} points done')
  for name, reason in failures.items():
    console.print(f'FAILED {name}: {reason}', style='bold red', markup=False, highlight=False, soft_wrap=True)
  if any(manifest.done(p, workdir) is None for p in chosen):
    console.print('The same command again goes on with the points that are not done.')
  valid = True
  if args.report:
    from experiments import report
    reporter = runner(points[0]) if own_runner else report
    valid = reporter.report(workdir, console=console)
  return 1 if failures or not valid else 0


def _interrupt(*_) -> None:
  raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
  for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:    # as nohup leaves SIGHUP
      signal.signal(number, _interrupt)
  try:
    return _launch(argv)
  except (manifest.Error, OSError) as e:
    print(f'error: {config_file.one_line(e)}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f'stopped; to go on: python -m experiments.launch --workdir={flags.FLAGS.workdir}', file=sys.stderr)
    return 130


if __name__ == '__main__':
  _define_flags()
  app.run(main, flags_parser=config_file.parse)
