"""What a run leaves in its folder: rows of numbers, one JSON object a line (to TensorBoard or W&B, too, if asked), and JSON files."""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
from pathlib import Path

import ml_collections

from gemma4_jax import config_file

_EXTRAS = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}   # field of config.train, and extra -> the package it needs

GOES_ON = 'once it can, the same command goes on from the last checkpoint'


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError naming the extra if the config asks for a package that is not installed."""
  for field, package in _EXTRAS.items():
    if config.train[field] and importlib.util.find_spec(package) is None:
      raise ValueError(f"train.{field} needs {package}: pip install 'gemma4_jax[{field}]'")


def write_bytes(path: Path, content: bytes) -> None:
  """Writes beside, then renames: readers see the old file or the whole new one."""
  beside = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    beside.write_bytes(content)
    beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
  write_bytes(path, text.encode())


def write_json(path: Path, value) -> None:
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + '\n')


def read_json(path: Path, fix: str) -> dict | None:
  """The object in a JSON file; None if there is no such file. Raises config_file.Error, which ends in `fix`: it holds none."""
  try:
    return _object(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, RecursionError) as error:
    raise config_file.Error(f'{path}: no JSON object ({config_file.one_line(error)}); {fix}') from None


def read_rows(path: Path) -> list[dict]:
  """The rows of a metrics file. A last line cut short by a kill is left out; any other broken line is a config_file.Error."""
  if not path.exists():
    return []
  rows = []
  for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], 1):   # what follows the last newline was cut short, or is empty
    try:
      rows.append(_object(line))
      if not isinstance(rows[-1].get('step'), int):
        raise ValueError("without a whole number 'step'")
    except (ValueError, RecursionError) as error:
      raise config_file.Error(f'{path}, line {number}: no JSON row ({error}); '
                              f'move {path.parent} away to start its run afresh') from None
  return rows


def _object(text: bytes) -> dict:
  value = json.loads(text)
  if not isinstance(value, dict):
    raise ValueError(f'{type(value).__name__} where an object is expected')
  return value


@contextlib.contextmanager
def lock(folder: Path, shared: bool = False) -> Iterator[bool]:
  """Yields whether this process now holds `folder`, alone or beside others that share it; the system lets go of it when the process
  ends, however it ends."""
  with (folder / 'lock').open('a') as f:
    yield _hold(f, shared)


def _hold(file, shared: bool = False) -> bool:
  try:
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:   # a file system without locks: who shares a folder there has to know
    pass
  return True


class Writer:
  """Appends rows to `workdir/metrics.jsonl`. Opened at step s, it first drops the rows after s, which will come again.

  Raises config_file.Error: the rows up to s are not all there, or another process writes rows here.
  """

  def __init__(self, workdir: Path, step: int, config: ml_collections.ConfigDict):
    self._path = workdir / 'metrics.jsonl'
    there = self._path.open('ab')
    if not _hold(there):
      raise config_file.Error(f'{workdir}: another process trains this run; wait until it ends, or choose another workdir')
    kept = [row for row in read_rows(self._path) if row['step'] <= step]
    if step and [kept[i]['step'] for i in (0, -1) if kept] != [1, step]:   # both are always written
      raise config_file.Error(f'{self._path}: rows before step {step}, where the checkpoint goes on, are missing; '
                              f'put the file back, or move {workdir} away to start its run afresh')
    write_text(self._path, ''.join(json.dumps(row) + '\n' for row in kept))
    self._file = self._path.open('ab', buffering=0)   # a row that cannot be written is an error at once, and not again at the end
    _hold(self._file)
    there.close()
    self._sinks = []
    if config.train.tensorboard:
      self._sinks.append(_tensorboard(workdir, step))
    if config.train.wandb:
      self._sinks.append(_wandb(workdir, config))

  def write(self, row: dict) -> None:
    """Args: row: 'step' and flat names -> numbers or strings. Raises OSError: it is not on disk, or not whole."""
    line = json.dumps(row).encode() + b'\n'
    try:
      while line:   # a disk that fills up takes a part first
        line = line[self._file.write(line):]
    except OSError as error:
      raise OSError(f'{self._path}: the row of step {row["step"]} cannot be written ({error.strerror}); {GOES_ON}') from error
    for write, _ in self._sinks:
      write({name: value for name, value in row.items() if isinstance(value, (int, float))}, row['step'])

  def close(self) -> None:
    self._file.close()
    for _, close in self._sinks:
      close()


def _tensorboard(workdir, step):
  import tensorboardX
  writer = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1)   # what comes again is drawn once
  def write(row, step):
    for name, value in row.items():
      writer.add_scalar(name, value, step)
  return write, writer.close


def _wandb(workdir, config):
  import wandb
  ours = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]   # the name alone is that of the same point in other sweeps
  run = wandb.init(project=config.train.wandb, name=workdir.name, id=ours, resume='allow', dir=str(workdir), config=config.to_dict())
  return lambda row, step: run.log(row, step=step), run.finish
