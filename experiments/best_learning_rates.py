"""Reads a learning-rate trial (`configs/ple.py:study-lr`) and writes the best rate of every arm: {group: {arm: rate}}.

  python -m experiments.best_learning_rates runs/ple_lr best.json

Best is the lowest primary metric; a rate at which a run diverged is none. An arm whose best rate is the least or the greatest tried is
named: its trial was too narrow.
"""

import argparse
import math
import pathlib
import sys

from experiments import manifest
from gemma4_jax import metrics


def best(workdir: pathlib.Path) -> tuple[dict[str, dict[str, float]], list[str]]:
  """Returns ({group: {arm: rate}}, arms whose best rate lies at an end of those tried).

  Raises:
    manifest.Error: a point is not done, as every arm gets the same number of trials or none counts; or an arm diverged at all rates.
  """
  tried: dict[tuple[str, str], dict[float, float]] = {}
  for point in manifest.read(workdir):
    done = manifest.done(point, workdir)
    diverged = done is None and manifest.failure(point, workdir).startswith('NonFiniteLoss')
    if done is None and not diverged:
      raise manifest.Error(f'{workdir}: {point.name} is not done; finish the trial: python -m experiments.launch --workdir={workdir}')
    arm = point.arm.rpartition(' @ ')[0]
    if not arm:
      raise manifest.Error(f'{workdir}: arm {point.arm!r} is no trial; arms of a trial are named ARM @ RATE')
    found = math.inf if diverged else done['metrics'].get(point.metrics[0], math.nan)
    tried.setdefault((point.group, arm), {})[point.config['optimizer']['learning_rate']] = found if math.isfinite(found) else math.inf
  rates, ends = {}, []
  for (group, arm), found in tried.items():
    rate = min(found, key=found.get)
    if found[rate] == math.inf:
      raise manifest.Error(f'{workdir}: {group}: {arm} diverged at every rate; try lower ones')
    rates.setdefault(group, {})[arm] = rate
    if rate in (min(found), max(found)):
      ends.append(f'{group}: {arm} at {rate:g}')
  return rates, ends


def main(argv=None) -> None:
  parser = argparse.ArgumentParser('python -m experiments.best_learning_rates', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('out', type=pathlib.Path)
  args = parser.parse_args(argv)
  try:
    rates, ends = best(args.workdir)
    metrics.write_json(args.out, rates)
  except (manifest.Error, OSError) as error:
    sys.exit(f'error: {error}')
  for end in ends:
    print(f'best at an end of the rates tried, try further: {end}')
  print(f'{args.out}: the best of {len(rates)} groups')


if __name__ == '__main__':
  main()
