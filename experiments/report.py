r"""The table a sweep was run for: arms against a baseline, paired by seed, with intervals and costs.

  python -m experiments.report runs/ple
  python -m experiments.report runs/ple --baseline='none =params'

Reads what the runs left (manifest.jsonl, and of every run env.json, metrics.jsonl, DONE, ERROR), never logs. Writes results.json,
report.md and plots into the workdir. Exit status 1: an arm without effect was found, and got no verdict.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import NamedTuple

from absl import app, flags
import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from experiments import analysis, manifest
from gemma4_jax import config_file, metrics

_COSTS = analysis.COSTS
_COMPARED = ['difference', '95 % interval', 'pairs', 'p (Holm)', 'verdict', *(f'{cost.short} ×' for cost in _COSTS)]
_LOG_WIDTH = 200          # where stdout is no terminal, and has no edge to wrap at
_PREFIXES = {'': (1000, ('', 'k', 'M', 'G', 'T', 'P', 'E')), 'B': (1024, (' B', ' KiB', ' MiB', ' GiB', ' TiB'))}


class Table(NamedTuple):
  """What terminal and Markdown show; the first column names the row."""
  title: str
  header: list[str]
  rows: list[list[str]]
  caption: str


def report(workdir: pathlib.Path, *, baseline: str = '', console: rich.console.Console | None = None) -> bool:
  """Writes results.json, report.md and the plots, and prints the tables. Returns False if an arm had no effect.

  Args:
    baseline: the arm the others are compared with; '': the first of the manifest.
  Raises:
    ValueError: nothing to report on, or files that cannot be read or written.
  """
  console = wide(console or rich.console.Console())
  runs = analysis.collect(workdir)
  results = analysis.analyse(runs, baseline)
  pictures = []
  try:
    if any(run.state == 'done' for run in runs):
      from experiments import plots  # matplotlib is slow to import
      pictures = plots.draw(results, analysis.curves(runs, workdir), workdir)
    metrics.write_json(workdir / 'results.json', results)
    metrics.write_text(workdir / 'report.md', markdown(results, pictures, workdir.resolve().name))
  except OSError as e:
    raise manifest.Error(f'{workdir}: the report cannot be written ({e.strerror})') from e
  say = lambda text, style='': console.print(text, style=style, markup=False, highlight=False)
  for table in tables(results):
    show(table, console)
  for note in results['notes']:
    say(f'- {note}')
  invalid = [run.reason for run in runs if run.state == 'invalid']
  for reason in invalid:
    say(f'INVALID: {reason}', 'bold red')
  say('\n'.join(str(path) for path in (workdir / 'report.md', workdir / 'results.json', *pictures)))
  return not invalid


def tables(results: dict) -> list[Table]:
  """The tables of every group with a finished run, and the runs that are in none of them."""
  found = []
  for group in (g for g in results['groups'] if any(a['done'] for a in g['arms'].values())):
    label = f' ({group["group"]})' if group['group'] else ''
    found.append(_main_table(results, group, label))
    if group['matched']:
      found.append(_matched_table(results, group, label))
    found.append(_cost_table(group, label))
    if len(results['metrics']) > 1 and group['comparisons']:
      found.append(_secondary_table(results, group, label))
  lost = [[r['name'], r['folder'], r['state'], r['reason']] for r in results['runs'] if r['state'] != 'done']
  if lost:
    found.append(Table('Runs that are not in the tables', ['run', 'folder', 'state', 'reason'], lost, ''))
  return found


def markdown(results: dict, pictures: Sequence[pathlib.Path], name: str) -> str:
  """The text of report.md; pictures lie beside it."""
  text = [f'# {name}', '', *(f'{line}  ' for line in _preamble(results)), '']
  for table in tables(results):
    text += section(table)
  if results['notes']:
    text += ['## Notes', '', *(f'- {note}' for note in results['notes']), '']
  if pictures:
    text += ['## Plots', '', *(f'![{path.stem.replace("_", " ")}]({path.name})\n' for path in pictures)]
  return '\n'.join(text)


def section(table: Table) -> list[str]:
  """Its lines of Markdown."""
  row = lambda cells: '| ' + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in cells) + ' |'
  lines = [f'## {table.title}', '', row(table.header), row(['---'] * len(table.header)), *map(row, table.rows), '']
  return lines + ([table.caption, ''] if table.caption else [])


def wide(console: rich.console.Console) -> rich.console.Console:
  """The console, with room for tables where it is no terminal."""
  return console if console.is_terminal else rich.console.Console(file=console.file, width=_LOG_WIDTH)


def show(table: Table, console: rich.console.Console) -> None:
  say = lambda text, style: console.print(text, style=style, markup=False, highlight=False)
  say(f'\n{table.title}', 'bold')
  console.print(*_drawn(table, console.width), sep='\n')
  if table.caption:
    say(table.caption, 'dim')


def scale(value: float, unit: str = '') -> float:
  """The power of 1000, or of 1024 for bytes, that a value is told in."""
  base, names = _PREFIXES[unit]
  return next((base**i for i in range(len(names)) if abs(value) < base**(i + 1) * 0.9995), base**(len(names) - 1))


def quantity(value: float, unit: str = '', at: float = 0.0) -> str:
  """1234567 -> '1.23M', bytes by 1024; `at` fixes the power, as on an axis."""
  base, names = _PREFIXES[unit]
  power = at or scale(value, unit)
  number = value / power
  return (f'{number:.3g}' if abs(number) < 999.5 else f'{number:.0f}') + names[round(np.log(power) / np.log(base))]


def _main_table(results: dict, group: dict, label: str) -> Table:
  metric, baseline = results['primary_metric'], group['baseline']
  def head(arm):
    a = group['arms'][arm]
    mean = f'{a["metrics"][metric]["interval"]["mean"]:.4f}' if metric in a['metrics'] else '–'
    return [arm, f'{a["done"]}/{a["planned"]}', mean]
  body = [[*head(baseline), '', '', '', '', 'baseline', *('1' for _ in _COSTS)]]
  body += [[*head(c['arm']), *_compared(c, metric)] for c in group['comparisons']]
  return Table(f'{metric}{label}: arms against {baseline}', ['arm', 'runs', 'mean', *_COMPARED], body,
               f'{_caption(results, group["comparisons"])} Costs ×: ratio to the baseline.')


def _matched_table(results: dict, group: dict, label: str) -> Table:
  metric = results['primary_metric']
  body = [[f'{c["arm"]} − {c["against"]}', *_compared(c, metric)] for c in group['matched']]
  return Table(f'{metric}{label}: each treatment against the baselines matched to it', ['treatment − control', *_COMPARED], body,
               f'{_caption(results, group["matched"])} The verdict is on the treatment. Costs ×: ratio of the treatment to its control.')


def _cost_table(group: dict, label: str) -> Table:
  base = group['arms'][group['baseline']]['costs']
  def cell(value, cost):
    if value is None:
      return '–'
    return quantity(value, cost.unit) + (f' ({value / base[cost.name]:.2f})' if base[cost.name] else '')
  body = [[arm, *(cell(a['costs'][cost.name], cost) for cost in _COSTS)] for arm, a in group['arms'].items()]
  return Table(f'Costs{label}', ['arm', *(cost.label for cost in _COSTS)], body,
               f'In brackets: ratio to {group["baseline"]}. Tokens/s and peak memory are as measured, with whatever else the machine did.')


def _secondary_table(results: dict, group: dict, label: str) -> Table:
  names = results['metrics'][1:]
  body = [[c['arm'], *(' '.join(_difference(c['metrics'][name])) for name in names)] for c in group['comparisons']]
  return Table(f'Secondary metrics{label}: difference to {group["baseline"]}', ['arm', *names], body,
               'Not declared as the question of this sweep: read them as description, without verdicts.')


def _compared(comparison: dict, metric: str) -> list[str]:
  """The cells under _COMPARED."""
  found, ratios = comparison['metrics'][metric], comparison['cost_ratios']
  p = found['p_holm']
  p = '–' if p is None else '<0.001' if p < 0.001 else f'{p:.3f}'
  return [*_difference(found), str(len(found['differences'])), p, comparison['verdict'],
          *(f'{ratios[cost.name]:.2f}' if cost.name in ratios else '–' for cost in _COSTS)]


def _difference(found: dict) -> tuple[str, str]:
  interval = found['interval'] or {'mean': None, 'low': None}
  return ('–' if interval['mean'] is None else f'{interval["mean"]:+.4f}',
          '–' if interval['low'] is None else f'[{interval["low"]:+.4f}, {interval["high"]:+.4f}]')


def _caption(results: dict, comparisons: Sequence[dict]) -> str:
  intervals = [c['metrics'][results['primary_metric']]['interval'] for c in comparisons]
  kinds = sorted({interval['kind'] for interval in intervals if interval and interval['kind']})
  how = {'t': "Student's t (fewer than 10 pairs)", 'bootstrap': 'a BCa bootstrap of 10,000 resamples (10 pairs or more)'}
  return (
      f'{"Lower" if results["lower_is_better"] else "Higher"} is better. Difference: mean over pairs of runs with one seed and data '
      f'order; its 95 % interval is {" or ".join(how[kind] for kind in kinds) or "unknown: it takes two pairs"}. A verdict needs an '
      "interval that excludes 0 and a paired t-test with p < 0.05 after Holm's adjustment for the rows of this table.")


def _preamble(results: dict) -> list[str]:
  states = [r['state'] for r in results['runs']]
  counts = ', '.join(f'{states.count(state)} {state}' for state in dict.fromkeys(states))
  said = [f'Primary metric, declared before the runs: {results["primary_metric"]}. Runs: {counts}.']
  env = results['environment']
  if env:
    commit = env.get('commit') or 'not known, or several (see notes)'
    machine = f'{env["devices"]} × {env["device"]}' if {'devices', 'device'} <= env.keys() else 'several devices (see notes)'
    cores = f', {env["cpus"]} CPU cores a run' if 'cpus' in env else ''
    versions = ', '.join(f'{name} {version}' for name, version in env.get('versions', {}).items())
    said.append(f'Commit: {commit}{" (dirty)" if env.get("dirty") else ""}. Machine: {machine}{cores}. Versions: {versions or "several"}.')
    said.append(f'Corpus: {env.get("corpus_hash", "several")}. Tokenizer: {env.get("tokenizer_hash", "several")}.')
  return said


def _drawn(table: Table, width: int) -> list[rich.table.Table]:
  """As many tables below each other as it takes to fit the width; each starts with the first column."""
  sizes = [max(map(len, column)) + 2 for column in zip(table.header, *table.rows)]
  pieces = [[0]]
  for column in range(1, len(sizes)):
    if len(pieces[-1]) > 1 and sum(sizes[i] for i in pieces[-1]) + sizes[column] > width:
      pieces.append([0])
    pieces[-1].append(column)
  drawn = []
  for piece in pieces:
    drawn.append(rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False))
    for i in piece:
      drawn[-1].add_column(table.header[i], justify='right' if i else 'left', overflow='fold')
    for row in table.rows:
      drawn[-1].add_row(*(rich.text.Text(row[i]) for i in piece))
  return drawn


def main(argv: Sequence[str]) -> int:
  try:
    if len(argv) != 2:
      raise manifest.Error('give one folder: python -m experiments.report runs/ple')
    return 0 if report(pathlib.Path(argv[1]), baseline=flags.FLAGS.baseline) else 1
  except ValueError as e:     # rows that cannot be read are one, too
    print(f'error: {config_file.one_line(e)}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  flags.DEFINE_string('baseline', '', 'Arm that the others are compared with; by default the first of the manifest.')
  app.run(main, flags_parser=config_file.parse)
