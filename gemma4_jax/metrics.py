"""Rows of numbers: one JSON object a line, and the same numbers to TensorBoard or W&B if asked."""

import importlib.util
import json
import os
from pathlib import Path

import ml_collections

_EXTRAS = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}   # field of config.train, and extra -> the package it needs

GOES_ON = 'once it can, the same command goes on from the last checkpoint'


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError naming the extra if the config asks for a package that is not installed."""
  for field, package in _EXTRAS.items():
    if config.train[field] and importlib.util.find_spec(package) is None:
      raise ValueError(f"train.{field} needs {package}: pip install 'gemma4_jax[{field}]'")


def write_text(path: Path, text: str) -> None:
  """Writes beside, then renames: readers see the old file or the whole new one."""
  beside = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    beside.write_text(text, encoding='utf-8')
    beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + '\n')


def read_rows(path: Path) -> list[dict]:
  """The rows of a metrics file. A last line cut short by a kill is left out; any other broken line is a ValueError."""
  if not path.exists():
    return []
  lines = path.read_text().split('\n')
  rows = []
  for number, line in enumerate(lines[:-1], 1):   # what follows the last newline was cut short, or is empty
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}, line {number}: no JSON ({error}); move the file away to start its run afresh') from None
  return rows


class Writer:
  """Appends rows to `workdir/metrics.jsonl`. Opened at step s, it first drops the rows after s, which will come again."""

  def __init__(self, workdir: Path, step: int, config: ml_collections.ConfigDict):
    self._path = workdir / 'metrics.jsonl'
    kept = [row for row in read_rows(self._path) if row['step'] <= step]
    write_text(self._path, ''.join(json.dumps(row) + '\n' for row in kept))
    self._file = self._path.open('ab', buffering=0)   # a row that cannot be written is an error at once, and not again at the end
    self._sinks = []
    if config.train.tensorboard:
      self._sinks.append(_tensorboard(workdir))
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


def _tensorboard(workdir):
  import tensorboardX
  writer = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))
  def write(row, step):
    for name, value in row.items():
      writer.add_scalar(name, value, step)
  return write, writer.close


def _wandb(workdir, config):
  import wandb
  run = wandb.init(
      project=config.train.wandb, name=workdir.name, id=workdir.name, resume='allow', dir=str(workdir), config=config.to_dict())
  return lambda row, step: run.log(row, step=step), run.finish
