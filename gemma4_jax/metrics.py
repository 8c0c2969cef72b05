"""Rows of numbers: one JSON object a line, and the same numbers to TensorBoard or W&B if asked."""

import json
from pathlib import Path

import ml_collections


def write_json(path: Path, value) -> None:
  """Writes beside, then renames: readers see the old file or the whole new one."""
  beside = path.with_name(f'.{path.name}.part')
  beside.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')
  beside.replace(path)


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
    path = workdir / 'metrics.jsonl'
    kept = [row for row in read_rows(path) if row['step'] <= step]
    beside = path.with_name('.metrics.jsonl.part')
    beside.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    beside.replace(path)
    self.first = kept[0] if kept else None
    self._file = path.open('a')
    self._sinks = []
    if config.train.tensorboard:
      self._sinks.append(_tensorboard(workdir))
    if config.train.wandb:
      self._sinks.append(_wandb(workdir, config))

  def write(self, row: dict) -> None:
    """Args: row: 'step' and flat names -> numbers or strings."""
    self.first = self.first or row
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for write, _ in self._sinks:
      write({name: value for name, value in row.items() if isinstance(value, (int, float))}, row['step'])

  def close(self) -> None:
    self._file.close()
    for _, close in self._sinks:
      close()


def _tensorboard(workdir):
  try:
    import tensorboardX
  except ImportError:
    raise ValueError("train.tensorboard needs tensorboardX: pip install 'gemma4_jax[tensorboard]'") from None
  writer = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))
  def write(row, step):
    for name, value in row.items():
      writer.add_scalar(name, value, step)
  return write, writer.close


def _wandb(workdir, config):
  try:
    import wandb
  except ImportError:
    raise ValueError("train.wandb needs wandb: pip install 'gemma4_jax[wandb]'") from None
  run = wandb.init(project=config.train.wandb, name=workdir.name, dir=str(workdir), id=workdir.name, resume='allow', config=config.to_dict())
  return lambda row, step: run.log(row, step=step), run.finish
