"""Means, 95 % intervals and tests of differences that are paired by seed."""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np
import scipy.stats

BETTER, WORSE, UNDECIDED = 'better', 'worse', 'no difference shown'
LEVEL = 0.95
_BOOTSTRAP_FROM = 10          # values; below, resampling a handful of them gives intervals that are too narrow
_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and the 95 % interval around it; low and high are None for a single value."""
  mean: float
  low: float | None
  high: float | None
  n: int
  kind: str                   # 't' or 'bootstrap' (bias-corrected and accelerated); '' for a single value

  def excludes(self, value: float) -> bool:
    return self.low is not None and not self.low <= value <= self.high


def interval(values: Sequence[float]) -> Interval:
  """Student's t for fewer than 10 values, else bootstrap with a fixed seed.

  Raises:
    ValueError: no values, or one that is not finite.
  """
  x = np.asarray(values, float)
  if not x.size or not np.isfinite(x).all():
    raise ValueError(f'no interval of {values}')
  mean = float(x.mean())
  if x.size == 1:
    return Interval(mean, None, None, 1, '')
  kind = 't' if x.size < _BOOTSTRAP_FROM else 'bootstrap'
  if np.ptp(x) == 0:
    return Interval(mean, mean, mean, x.size, kind)
  if kind == 't':
    half = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean, mean - half, mean + half, x.size, kind)
  found = scipy.stats.bootstrap(
      (x,), np.mean, confidence_level=LEVEL, n_resamples=_RESAMPLES, method='BCa', rng=np.random.default_rng(0)).confidence_interval
  return Interval(mean, float(found.low), float(found.high), x.size, kind)


def crossed(values: Sequence[Sequence[float]]) -> Interval:
  """Of the mean of [seeds, documents] where every seed has the same documents, and both are samples: Student's t.

  The variances of the mean over either are added (what is of neither counts twice, so it is a little wide), with Satterthwaite's
  degrees of freedom. Of a single seed the interval is over documents, and says nothing of other seeds.

  Raises:
    ValueError: no values, or one that is not finite.
  """
  x = np.asarray(values, float)
  if x.ndim != 2 or not x.size or not np.isfinite(x).all():
    raise ValueError(f'no interval of {values}')
  parts = [(means.var(ddof=1) / means.size, means.size - 1) for means in (x.mean(1), x.mean(0)) if means.size > 1]
  mean, variance = float(x.mean()), float(sum(part for part, _ in parts))
  if not variance:
    return Interval(mean, *((mean, mean) if parts else (None, None)), x.size, 't' if parts else '')
  freedom = variance**2 / sum(part**2 / n for part, n in parts)
  half = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(variance)
  return Interval(mean, mean - half, mean + half, x.size, 't')


def wilson(share: float, trials: int) -> tuple[float, float]:
  """The 95 % interval of a share of successes. Source: Wilson, "Probable inference", 1927."""
  z2 = float(scipy.stats.norm.ppf(0.5 + LEVEL / 2))**2
  middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
  half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
  return middle - half, middle + half


def p_value(differences: Sequence[float]) -> float | None:
  """Two-sided paired t-test of a mean difference of 0; None for a single pair."""
  x = np.asarray(differences, float)
  if x.size < 2:
    return None
  if np.ptp(x) == 0:
    return 1.0 if x[0] == 0 else 0.0
  return float(scipy.stats.ttest_1samp(x, 0.0).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Holm's step-down adjustment for as many tests as there are p-values; None stays None and counts as no test.

  Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
  """
  order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
  adjusted, highest = [None] * len(p_values), 0.0
  for rank, i in enumerate(order):
    highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
    adjusted[i] = highest
  return adjusted


def verdict(difference: Interval | None, p_adjusted: float | None, lower_is_better: bool) -> str:
  """A word on a difference: won or lost only if the interval excludes 0 and so does the adjusted test at 5 %."""
  if difference is None:
    return 'no pairs: no verdict'
  if difference.n == 1:
    return 'n=1: no verdict'
  if not difference.excludes(0.0) or p_adjusted is None or p_adjusted >= 1 - LEVEL:
    return UNDECIDED
  return BETTER if (difference.mean < 0) == lower_is_better else WORSE
