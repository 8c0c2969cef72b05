"""The plots of a report: loss curves, the final metric by arm, paired differences, and quality against each cost."""

from collections.abc import Mapping, Sequence
import pathlib

from matplotlib.lines import Line2D
import matplotlib.ticker
import numpy as np

from experiments import analysis, figures, report, statistics

# Okabe and Ito's palette, which colour-blind readers can tell apart, then Tol's; grey: the first arm, usually the baseline.
_COLOURS = (
    '#555555', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#882255', '#44AA99', '#999933', '#332288', '#AA4499',
    '#117733', '#DDCC77', '#661100', '#6699CC', '#CC6677', '#88CCEE', '#000000', '#BBBBBB')
_MARKERS = 'osD^vPX*<>hp'
_WINDOW = 0.04            # share of a run that a point of its smoothed loss averages over
_SKIP = 0.15              # share of a run that is left out of view: the first steps hide the rest


def draw(results: Mapping, curves: Mapping, workdir: pathlib.Path) -> list[pathlib.Path]:
  """Writes PNG files into `workdir` and returns their paths.

  Args:
    results: of `analysis.analyse`.
    curves: of `analysis.curves`.
  """
  arms = list(dict.fromkeys(arm for group in results['groups'] for arm in group['arms']))
  colours = {arm: _COLOURS[i % len(_COLOURS)] for i, arm in enumerate(arms)}
  drawn = {}
  for group in results['groups']:
    suffix = f'_{group["group"].replace("/", "-").replace(" ", "-")}' if group['group'] else ''
    mine = {arm: curves[group['group'], arm] for arm in group['arms'] if (group['group'], arm) in curves}
    drawn[f'loss_curves{suffix}'] = _loss_curves(mine, group, colours)
    drawn[f'final_metric{suffix}'] = _final_metric(results, group, colours)
    if any(c['metrics'][results['primary_metric']]['interval'] for c in (*group['comparisons'], *group['matched'])):
      drawn[f'differences{suffix}'] = _differences(results, group, colours)
  drawn['quality_against_cost'] = _quality_against_cost(results, colours)
  return [figures.save(figure, workdir / f'{name}.png') for name, figure in drawn.items()]


def _smoothed(curve: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
  """Steps and the mean loss of the window that ends there."""
  steps, loss = (np.array(column, float) for column in zip(*curve))
  window = max(1, round(_WINDOW * len(steps)))
  return steps[window - 1:], np.convolve(loss, np.ones(window) / window, mode='valid')


def _loss_curves(curves: Mapping, group: Mapping, colours: Mapping):
  """Left: loss of every arm. Right: difference to the baseline's run of the same seed, where small effects show."""
  figure, axes = figures.grid(11, 4.2, columns=2)
  left, right = axes[0]
  smooth = {arm: {seed: _smoothed(curve) for seed, curve in seeds.items() if curve} for arm, seeds in curves.items()}
  base = smooth.get(group['baseline'], {})
  for arm, seeds in smooth.items():
    _band(left, list(seeds.values()), colours[arm], arm)
    gaps = []
    for seed, (steps, loss) in seeds.items():
      if seed in base and arm != group['baseline']:
        shared, here, there = np.intersect1d(steps, base[seed][0], return_indices=True)
        gaps.append((shared, loss[here] - base[seed][1][there]))
    _band(right, gaps, colours[arm], arm)
  right.axhline(0, color=colours[group['baseline']], linewidth=1.2)
  _view(left)
  _view(right)
  left.set(xlabel='step', ylabel='training loss (nats/token)', title=_title('Training loss: mean and range over seeds', group))
  right.set(xlabel='step', ylabel=f'loss − loss of {group["baseline"]} (nats/token)', title='Difference to the baseline, same seed')
  handles = [Line2D([], [], color=colours[arm], label=arm) for arm in smooth]
  figure.legend(handles=handles, loc='outside lower center', ncols=min(5, len(handles)), frameon=False)
  return figure


def _band(axis, runs: Sequence[tuple[np.ndarray, np.ndarray]], colour: str, arm: str) -> None:
  runs = [(steps, y) for steps, y in runs if len(steps)]
  if not runs:
    return
  shared = runs[0][0]
  for steps, _ in runs[1:]:
    shared = np.intersect1d(shared, steps)
  y = np.array([values[np.isin(steps, shared)] for steps, values in runs])
  axis.plot(shared, y.mean(0), color=colour, linewidth=1.4, label=arm)
  if len(runs) > 1:
    axis.fill_between(shared, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def _view(axis) -> None:
  """Limits y to what happens after the first steps."""
  lines = [line.get_xydata() for line in axis.get_lines()]
  late = [xy[xy[:, 0] >= _SKIP * xy[-1, 0], 1] for xy in lines if len(xy)]
  if late and (values := np.concatenate(late)).size:
    low, high = values.min(), values.max()
    margin = 0.08 * ((high - low) or 1.0)
    axis.set_ylim(low - margin, high + margin)


def _final_metric(results: Mapping, group: Mapping, colours: Mapping):
  metric = results['primary_metric']
  arms = [arm for arm, a in group['arms'].items() if metric in a['metrics']]
  figure, axes = figures.grid(7.5, 1.3 + 0.42 * len(arms))
  axis = axes[0, 0]
  for row, arm in enumerate(arms):
    a = group['arms'][arm]['metrics'][metric]
    values, interval = list(a['values'].values()), a['interval']
    axis.scatter(values, [row + 0.18] * len(values), s=14, color=colours[arm], alpha=0.5, linewidths=0)
    _interval(axis, interval, row, colours[arm])
  _arm_axis(axis, [f'{arm}  (n={group["arms"][arm]["done"]})' for arm in arms])
  axis.set(xlabel=_axis_label(results), title=_title('Final value by arm: mean and 95 % interval; small dots: seeds', group))
  return figure


def _differences(results: Mapping, group: Mapping, colours: Mapping):
  """A forest plot: every arm against the baseline, then every treatment against the controls matched to it."""
  metric = results['primary_metric']
  rows = [(c, f'{c["arm"]}  −  {c["against"]}') for c in (*group['comparisons'], *group['matched']) if c['metrics'][metric]['interval']]
  figure, axes = figures.grid(8.5, 1.4 + 0.42 * len(rows))
  axis = axes[0, 0]
  split = sum(bool(c['metrics'][metric]['interval']) for c in group['comparisons'])
  if 0 < split < len(rows):
    axis.axhline(split - 0.5, color='#999999', linewidth=0.8, linestyle=':')
  for row, (c, _) in enumerate(rows):
    found = c['metrics'][metric]
    decided = c['verdict'] in (statistics.BETTER, statistics.WORSE)
    _interval(axis, found['interval'], row, colours[c['arm']], hollow=not decided)
    axis.annotate(c['verdict'], (1.01, row), xycoords=('axes fraction', 'data'), va='center', fontsize=9,
                  color='black' if decided else '#777777')
  axis.axvline(0, color='black', linewidth=0.8)
  _arm_axis(axis, [label for _, label in rows])
  axis.set(xlabel=f'difference in {_axis_label(results)}', title=_title('Paired difference and 95 % interval', group))
  return figure


def _interval(axis, interval: Mapping, row: int, colour: str, hollow: bool = False) -> None:
  if interval['low'] is not None:
    axis.plot([interval['low'], interval['high']], [row, row], color=colour, linewidth=2, solid_capstyle='butt')
  axis.plot(interval['mean'], row, 'o', markersize=6, markeredgecolor=colour, markerfacecolor='white' if hollow else colour)


def _arm_axis(axis, labels: Sequence[str]) -> None:
  axis.set_yticks(range(len(labels)), labels)
  axis.set_ylim(len(labels) - 0.5, -0.5)
  axis.grid(axis='y', visible=False)
  axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))


def _quality_against_cost(results: Mapping, colours: Mapping):
  """One panel a cost; groups (backbone sizes, say) differ in their marker, and an arm's groups are joined."""
  metric = results['primary_metric']
  figure, axes = figures.grid(11, 6.6, columns=3, rows=2, sharey=True)
  markers = {group['group']: _MARKERS[i % len(_MARKERS)] for i, group in enumerate(results['groups'])}
  for axis, cost in zip(axes.flat, analysis.COSTS):
    xs = []
    for arm, colour in colours.items():
      points = []
      for group in results['groups']:
        a = group['arms'].get(arm)
        if a and metric in a['metrics'] and a['costs'][cost.name]:
          points.append((a['costs'][cost.name], a['metrics'][metric]['interval'], group['group']))
      for x, interval, name in points:
        if interval['low'] is not None:
          axis.plot([x, x], [interval['low'], interval['high']], color=colour, linewidth=1.2, alpha=0.7)
        axis.plot(x, interval['mean'], markers[name], color=colour, markersize=6)
      points.sort(key=lambda point: point[0])
      axis.plot([p[0] for p in points], [p[1]['mean'] for p in points], color=colour, linewidth=0.8, alpha=0.5)
      xs += [p[0] for p in points]
    _cost_axis(axis, xs, cost)
  for axis in axes[:, 0]:
    axis.set_ylabel(_axis_label(results))
  handles = [Line2D([], [], color=colour, marker='o', linestyle='', label=arm) for arm, colour in colours.items()]
  if len(markers) > 1:
    handles += [Line2D([], [], color='black', marker=marker, linestyle='', label=name) for name, marker in markers.items()]
  figure.legend(handles=handles, loc='outside lower center', ncols=min(6, len(handles)), frameon=False)
  figure.suptitle('Quality against cost: mean over seeds and 95 % interval', fontsize=12)
  return figure


def _cost_axis(axis, xs: Sequence[float], cost: analysis.Cost) -> None:
  axis.set_xlabel(cost.label)
  if not xs:
    axis.text(0.5, 0.5, 'not measured', transform=axis.transAxes, ha='center', color='#777777')
    axis.set_xticks([])
    return
  low, high = min(xs), max(xs)
  unit = report.scale((low + high) / 2, cost.unit)
  if high > 8 * low > 0:
    axis.set_xscale('log')
    low, high = low / (high / low)**0.06, high * (high / low)**0.06
    unit = 0.0      # as fits each tick
    ticks = [digit * report.scale(power, cost.unit) * tens for power in (low, high) for tens in (0.1, 1, 10, 100) for digit in (1, 2, 5)]
  else:
    pad = max(0.08 * (high - low), 0.1 * high - 0.5 * (high - low))    # costs that hardly differ should look so
    low, high = low - pad, high + pad
    ticks = unit * matplotlib.ticker.MaxNLocator(4).tick_values(low / unit, high / unit)
  axis.set_xlim(low, high)
  axis.set_xticks([tick for tick in ticks if low <= tick <= high])
  axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  axis.xaxis.set_major_formatter(lambda value, _: report.quantity(value, cost.unit, at=unit))


def _axis_label(results: Mapping) -> str:
  name = results['primary_metric'].removeprefix('eval/').replace('_', ' ').replace('/', ' ')
  return f'{name} ({"lower" if results["lower_is_better"] else "higher"} is better)'


def _title(text: str, group: Mapping) -> str:
  return f'{text} ({group["group"]})' if group['group'] else text
