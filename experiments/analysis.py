"""From the rows that runs left to numbers: means by arm, differences paired by seed, costs, and what forbids a comparison."""

from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np

from experiments import manifest, statistics
from gemma4_jax import config as model_config, config_file, metrics

# Last part of a metric's name -> whether less of it is better. A primary metric must be one of them.
_LOWER_IS_BETTER = {
    'bits_per_byte': True, 'nats_per_token': True, 'loss': True, 'perplexity': True, 'accuracy': False}


class Cost(NamedTuple):
  name: str     # in DONE
  label: str
  short: str
  unit: str     # 'B': bytes


COSTS = (
    Cost('params/total', 'parameters', 'params', ''),
    Cost('params/non_embedding', 'non-embedding parameters', 'non-emb.', ''),
    Cost('flops_per_token', 'FLOPs/token (forward)', 'FLOPs', ''),
    Cost('resident_bytes', 'resident bytes', 'resident', 'B'),
    Cost('tokens_per_s', 'training tokens/s', 'tokens/s', ''),
    Cost('peak_memory_bytes', 'peak memory', 'memory', 'B'))

# Two runs are a pair only if these are equal, beside the seed: else their difference is not the arm's alone.
_PAIRED_ENV = ('corpus_hash', 'tokenizer_hash')
_PAIRED_CONFIG = ('train.steps', 'eval.max_batches')
_UNPAIRED_DATA = ('data.cache_dir',)
# What should be equal in all runs of a report, and is worth a note where it is not.
_NOTED_ENV = ('commit', 'dirty', 'python', 'versions', 'device', 'devices', 'processes', 'cpus')


@dataclasses.dataclass(frozen=True)
class Run:
  """What one point of the manifest left."""
  point: manifest.Point
  state: str              # done, failed, invalid (see manifest.clash), unfinished or missing
  reason: str
  metrics: dict           # those that are finite
  costs: dict
  env: dict


def collect(workdir: pathlib.Path) -> list[Run]:
  """One Run a point of the manifest, in its order.

  Raises:
    manifest.Error: no manifest, an arm that mixes configs, or a file that cannot be read.
  """
  points = manifest.read(workdir)
  manifest.check_arms(points)
  runs, finished = [], []
  for point in points:
    folder = workdir / point.folder
    result = manifest.done(point, workdir)
    if result is not None:
      state, reason = _state_of_finished(point, result, finished, folder)
      finished.append((point, result))
    elif (folder / 'ERROR').exists():
      state, reason = 'failed', manifest.failure(point, workdir)
    else:
      state, reason = 'unfinished' if (folder / 'metrics.jsonl').exists() else 'missing', ''
    result = result or {'metrics': {}, 'costs': {}}
    numbers = {name: value for name, value in result['metrics'].items() if value is not None and math.isfinite(value)}
    env = metrics.read_json(folder / 'env.json', 'remove it to report the run without its environment') or {}
    runs.append(Run(point, state, reason, numbers, result['costs'], env))
  return runs


def _state_of_finished(point, result, finished, folder) -> tuple[str, str]:
  primary = point.metrics[0]
  if primary not in result['metrics']:
    near = f'; the nearest there is {model_config.nearest(primary, list(result["metrics"]))!r}' if result['metrics'] else ''
    raise manifest.Error(f'{folder / "DONE"}: no {primary!r}, the primary metric{near}')
  clashes = [said for other, theirs in finished if (said := manifest.clash(other, theirs, point, result))]
  if clashes:
    return 'invalid', clashes[0]
  if not math.isfinite(result['metrics'][primary]):
    return 'failed', f'{primary} is {result["metrics"][primary]}'
  return 'done', ''


def why_unpaired(a: Run, b: Run) -> list[str]:
  """The fields that forbid a comparison of two runs, with both values."""
  def fields(run):
    flat = config_file.flatten(run.point.config)
    chosen = {k: v for k, v in flat.items() if k in _PAIRED_CONFIG or (k.startswith('data.') and k not in _UNPAIRED_DATA)}
    if flat['eval.max_batches']:   # the validation text they are scored on depends on both
      chosen['eval.batch_size'] = flat['eval.batch_size']
    return chosen | {k: run.env.get(k) for k in _PAIRED_ENV}
  x, y = fields(a), fields(b)
  return [f'{k} ({x.get(k)!r} and {y.get(k)!r})' for k in sorted(x.keys() | y.keys()) if x.get(k) != y.get(k)]


def compare(treatment: Sequence[Run], control: Sequence[Run], metric: str) -> dict:
  """The differences treatment - control of one metric, paired by seed.

  Returns:
    {'differences': {seed: value}, 'interval': fields of statistics.Interval or None, 'p': two-sided or None,
    'refused': {seed: why the two runs are no pair}}.
  """
  done = {run.point.seed: run for run in control if run.state == 'done'}
  differences, refused = {}, {}
  for run in treatment:
    other = done.get(run.point.seed)
    if run.state != 'done' or other is None or metric not in run.metrics or metric not in other.metrics:
      continue
    differs = why_unpaired(run, other)
    if differs:
      refused[run.point.seed] = ', '.join(differs)
    else:
      differences[run.point.seed] = run.metrics[metric] - other.metrics[metric]
  values = list(differences.values())
  return {'differences': differences, 'interval': _interval(values), 'p': statistics.p_value(values), 'refused': refused}


def analyse(runs: Sequence[Run], baseline: str = '') -> dict:
  """Everything the report says, as JSON: what results.json holds.

  Args:
    baseline: the arm the others are compared with; '': the first of the manifest.
  Raises:
    manifest.Error: no such arm, or a primary metric of unknown direction.
  """
  costs = {cost.name for cost in COSTS}
  names = list(dict.fromkeys(name for run in runs for name in run.point.metrics if name not in costs))
  primary = runs[0].point.metrics[0]
  if primary.rpartition('/')[2] not in _LOWER_IS_BETTER:
    raise manifest.Error(
        f'primary_metric={primary!r}: is less of it better? Known are names that end in {", ".join(_LOWER_IS_BETTER)}')
  lower = _LOWER_IS_BETTER[primary.rpartition('/')[2]]
  groups = []
  for group in dict.fromkeys(run.point.group for run in runs):
    arms = {}
    for run in (r for r in runs if r.point.group == group):
      arms.setdefault(run.point.arm, []).append(run)
    first = baseline or next(iter(arms))
    manifest.check_arm(first, list(arms), '--baseline')
    matches = {arm: mine[0].point.match for arm, mine in arms.items() if mine[0].point.match}
    groups.append({
        'group': group, 'baseline': first,
        'arms': {arm: _describe(mine, names) for arm, mine in arms.items()},
        'comparisons': _family(arms, [(arm, first) for arm in arms if arm != first], names, lower),
        'matched': _family(arms, [(m['treatment'], arm) for arm, m in matches.items() if m['treatment'] in arms], names, lower)})
  told = [{'name': r.point.name, 'folder': r.point.folder, 'group': r.point.group, 'arm': r.point.arm, 'seed': r.point.seed,
           'state': r.state, 'reason': r.reason, 'metrics': r.metrics, **{k: r.env.get(k) for k in _PAIRED_ENV}} for r in runs]
  return {'primary_metric': primary, 'lower_is_better': lower, 'metrics': names, 'groups': groups, 'runs': told,
          'environment': _environment(runs), 'notes': _notes(runs, groups, primary)}


def curves(runs: Sequence[Run], workdir: pathlib.Path) -> dict:
  """(group, arm) -> {seed: [(step, training loss)]} of the runs that are done."""
  found = {}
  for point in (run.point for run in runs if run.state == 'done'):
    rows = metrics.read_rows(workdir / point.folder / 'metrics.jsonl')
    found.setdefault((point.group, point.arm), {})[point.seed] = [(row['step'], row['loss']) for row in rows if 'loss' in row]
  return found


def _interval(values: Sequence[float]) -> dict | None:
  return dataclasses.asdict(statistics.interval(values)) if values else None


def _family(arms: dict, pairs: Sequence[tuple[str, str]], names: Sequence[str], lower: bool) -> list[dict]:
  """Compares (treatment, control) pairs; the tests of the primary metric, names[0], are adjusted for their number."""
  family = [{'arm': arm, 'against': against, 'metrics': {name: compare(arms[arm], arms[against], name) for name in names}}
            for arm, against in pairs]
  adjusted = statistics.holm([comparison['metrics'][names[0]]['p'] for comparison in family])
  for comparison, p in zip(family, adjusted):
    found = comparison['metrics'][names[0]]
    found['p_holm'] = p
    comparison['verdict'] = statistics.verdict(found['interval'] and statistics.Interval(**found['interval']), p, lower)
    ours, theirs = (_costs(arms[comparison[side]]) for side in ('arm', 'against'))
    comparison['cost_ratios'] = {name: ours[name] / theirs[name] for name in ours if ours[name] is not None and theirs[name]}
  return family


def _describe(mine: Sequence[Run], names: Sequence[str]) -> dict:
  done = [run for run in mine if run.state == 'done']
  values = {name: {run.point.seed: run.metrics[name] for run in done if name in run.metrics} for name in names}
  return {
      'planned': len(mine), 'done': len(done), 'match': mine[0].point.match, 'costs': _costs(mine),
      'sets': {field: value for field, value in mine[0].point.overrides.items() if field not in manifest.LABELS},
      'metrics': {name: {'values': v, 'interval': _interval(list(v.values()))} for name, v in values.items() if v}}


def _costs(mine: Sequence[Run]) -> dict:
  """Cost -> mean over the runs that are done and know it, or None."""
  known = {cost.name: [run.costs[cost.name] for run in mine if run.state == 'done' and run.costs.get(cost.name) is not None]
           for cost in COSTS}
  return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def _environment(runs: Sequence[Run]) -> dict:
  """What runs say of code, machine and data, where all that got so far agree."""
  envs = [run.env for run in runs if run.env]
  return {k: envs[0][k] for k in (*_NOTED_ENV, *_PAIRED_ENV) if envs and k in envs[0] and all(env.get(k) == envs[0][k] for env in envs)}


def _notes(runs: Sequence[Run], groups: Sequence[dict], primary: str) -> list[str]:
  notes = [f'Arms {a} and {b} have the same config, and so the same runs: no evidence beside each other.'
           for a, b in manifest.twins([run.point for run in runs])]
  notes += [manifest.tell_match(point) for point in {(r.point.group, r.point.arm): r.point for r in runs if r.point.match}.values()]
  for group in groups:
    refused = {}
    for c in (*group['comparisons'], *group['matched']):
      for seed, why in c['metrics'][primary]['refused'].items():
        refused.setdefault(f'{c["arm"]} and {c["against"]} are not paired: they differ in {why}', []).append(str(seed))
    notes += [f'{text} (seed {", ".join(seeds)}).' for text, seeds in refused.items()]
  finished = [run for run in runs if run.state == 'done']
  unknown = [name for name in dict.fromkeys(name for run in runs for name in run.point.metrics)
             if finished and not any(name in run.metrics or name in run.costs for run in finished)]
  if unknown:
    notes.append(f'No run has {", ".join(unknown)}.')
  for key in _NOTED_ENV:
    said = {}
    for run in finished:
      for env in (run.env, *run.env.get('before', ())):   # of one that was killed and went on, each process's
        names = said.setdefault(json.dumps(env.get(key), sort_keys=True), [])
        names += [] if run.point.name in names else [run.point.name]
    if len(said) > 1:
      notes.append(f'Runs differ in {key}: ' + '; '.join(f'{value} in {manifest.some(names)}' for value, names in said.items()) + '.')
  if any(env.get('dirty') for run in finished for env in (run.env, *run.env.get('before', ()))):
    notes.append('The code had changes that its commit does not hold (dirty).')
  return notes

