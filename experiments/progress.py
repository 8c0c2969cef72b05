"""One live view of a running sweep, read from the tails of the points' metrics.jsonl."""

from collections.abc import Sequence
import json
import pathlib
import time

import rich.console
import rich.live
import rich.progress_bar
import rich.table

from experiments import manifest

_TAIL = 1 << 15           # bytes of metrics.jsonl looked at
_LINES_EVERY = 30.0       # seconds between lines when stdout is no terminal


def last_row(path: pathlib.Path, field: str = 'loss') -> dict:
  """The last whole row of a metrics.jsonl that has `field`; {} if there is none yet."""
  try:
    with path.open('rb') as f:
      f.seek(max(0, f.seek(0, 2) - _TAIL))
      lines = f.read().splitlines()
  except OSError:
    return {}
  for line in reversed(lines):
    try:
      row = json.loads(line)
    except ValueError:      # still being written
      continue
    if isinstance(row, dict) and field in row:
      return row
  return {}


class Track:
  """One running point: its last row, and the time left by the pace since it was first seen."""

  def __init__(self, point: manifest.Point, folder: pathlib.Path):
    self.point, self.folder, self.steps = point, folder, point.config['train']['steps']
    self.started, self.row, self._first = time.monotonic(), {}, None

  @property
  def step(self) -> int:
    return self.row.get('step', 0)

  @property
  def seconds_left(self) -> float | None:
    if self._first is None or self.step <= self._first[0]:
      return None
    pace = (self._seen - self._first[1]) / (self.step - self._first[0])
    return max(0.0, pace * (self.steps - self.step) - (time.monotonic() - self._seen))

  def look(self) -> None:
    row = last_row(self.folder / 'metrics.jsonl')
    if row.get('step', 0) > self.step:
      self.row, self._seen = row, time.monotonic()
      self._first = self._first or (self.step, self._seen)


class View:
  """Totals and a row a running point on a terminal; a line now and then elsewhere. Use as a context."""

  def __init__(self, console: rich.console.Console, total: int):
    self.console, self.total, self.done, self.failed = console, total, 0, 0
    self._seconds = []                        # that finished points took
    self._live = rich.live.Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    self._last_line = time.monotonic()

  def __enter__(self):
    if self._live:
      self._live.start(refresh=True)
    return self

  def __exit__(self, *exception):
    if self._live:
      self._live.stop()

  def say(self, text: str, style: str = '') -> None:
    self.console.print(f'{time.strftime("%H:%M:%S")} {text}', style=style, markup=False, highlight=False, soft_wrap=True)

  def finished(self, track: Track | None, failed: bool) -> None:
    """Counts a point; `track` is None if it was not run here."""
    self.failed, self.done = self.failed + failed, self.done + (not failed)
    if track and not failed:
      self._seconds.append(time.monotonic() - track.started)

  def update(self, tracks: Sequence[Track], jobs: int) -> None:
    for track in tracks:
      track.look()
    left = self.total - self.done - self.failed - len(tracks)
    totals = (f'{self.done} of {self.total} done, {self.failed} failed, {len(tracks)} running, {left} waiting'
              + self._whole_eta(tracks, left, jobs))
    if self._live:
      self._live.update(self._table(tracks, totals), refresh=True)
    elif time.monotonic() - self._last_line > _LINES_EVERY:
      self._last_line = time.monotonic()
      self.say('; '.join([totals, *(f'{t.point.name} {t.step}/{t.steps}{_number(t.row, "loss", " loss {:.3f}")}' for t in tracks)]))

  def _whole_eta(self, tracks: Sequence[Track], left: int, jobs: int) -> str:
    remaining = [t.seconds_left for t in tracks]
    if not tracks or None in remaining:
      return ''
    seconds = self._seconds or [time.monotonic() - t.started + t.seconds_left for t in tracks]
    whole = max(max(remaining), (sum(remaining) + left * sum(seconds) / len(seconds)) / jobs)
    return f', about {_duration(whole)} left'

  def _table(self, tracks: Sequence[Track], totals: str) -> rich.table.Table:
    table = rich.table.Table(title=totals, title_justify='left', title_style='bold', box=None, pad_edge=False)
    for name, justify in (('point', 'left'), ('', 'left'), ('step', 'right'), ('loss', 'right'), ('tokens/s', 'right'), ('left', 'right')):
      table.add_column(name, justify=justify, no_wrap=True)
    for t in tracks:
      bar = rich.progress_bar.ProgressBar(total=t.steps, completed=t.step, width=20)
      table.add_row(
          t.point.name, bar, f'{t.step}/{t.steps}', _number(t.row, 'loss', '{:.3f}'), _number(t.row, 'tokens_per_s', '{:,.0f}'),
          'starting' if not t.row else '' if t.seconds_left is None else _duration(t.seconds_left))
    return table


def _number(row: dict, field: str, form: str) -> str:
  return form.format(row[field]) if isinstance(row.get(field), (int, float)) else ''


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
