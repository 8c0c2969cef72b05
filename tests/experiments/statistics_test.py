import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from experiments import statistics

# Hours of sleep gained with one drug over another (Student, 1908), the paired test's textbook example.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def test_the_t_interval_is_the_textbooks():
  found = statistics.interval([1.0, 2.0, 3.0])   # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3)
  assert (found.mean, found.n, found.kind) == (2.0, 3, 't')
  assert found.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6)
  assert found.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6)


def test_the_paired_t_test_is_students():
  assert statistics.p_value(SLEEP) == pytest.approx(0.002833, abs=1e-6)


def test_from_ten_values_on_the_interval_is_a_bootstrap_that_repeats():
  found = statistics.interval(SLEEP)
  assert found.kind == 'bootstrap'
  assert 0.7 < found.low < 1.2 and 2.0 < found.high < 3.0    # t: 0.70 to 2.46; the skew pulls it up
  assert found == statistics.interval(SLEEP)


def test_the_bootstrap_agrees_with_t_where_t_is_right():
  x = np.random.default_rng(1).normal(size=200)
  found = statistics.interval(x)
  half = 1.971957 * x.std(ddof=1) / 200**0.5
  assert found.low == pytest.approx(x.mean() - half, abs=0.02) and found.high == pytest.approx(x.mean() + half, abs=0.02)


def test_one_value_has_no_interval_and_no_verdict():
  found = statistics.interval([0.5])
  assert (found.low, found.high, statistics.p_value([0.5])) == (None, None, None)
  assert statistics.verdict(found, None, True) == 'n=1: no verdict'
  assert statistics.verdict(None, None, True) == 'no pairs: no verdict'


@pytest.mark.parametrize('values', [[], [1.0, float('nan')], [float('inf'), 1.0]])
def test_no_interval_of_nothing_or_of_what_is_not_finite(values):
  with pytest.raises(ValueError, match='no interval'):
    statistics.interval(values)


def test_equal_differences_are_certain_and_equal_values_show_nothing():
  shift, none = statistics.interval([-0.5] * 3), statistics.interval([0.0] * 3)
  assert (shift.low, shift.high, statistics.p_value([-0.5] * 3)) == (-0.5, -0.5, 0.0)
  assert statistics.verdict(none, statistics.p_value([0.0] * 3), True) == 'no difference shown'


def test_holm_steps_down_and_never_falls():
  assert statistics.holm([0.01, 0.04, None, 0.03, 0.005]) == [pytest.approx(p) if p else p for p in (0.03, 0.06, None, 0.06, 0.02)]
  assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]


def test_the_direction_of_the_metric_decides_who_is_better():
  fell, p = statistics.interval([-1.0, -1.1, -0.9]), 0.01
  assert statistics.verdict(fell, p, lower_is_better=True) == 'better'
  assert statistics.verdict(fell, p, lower_is_better=False) == 'worse'


def test_an_adjusted_test_that_fails_takes_the_verdict_away():
  assert statistics.verdict(statistics.interval([-1.0, -1.1, -0.9]), 0.051, True) == 'no difference shown'


def test_a_test_that_passes_gives_no_verdict_inside_the_interval():
  assert statistics.verdict(statistics.Interval(-1.0, -2.0, 0.01, 12, 'bootstrap'), 0.001, True) == 'no difference shown'


@hypothesis.given(st.lists(st.floats(-10, 10), min_size=2, max_size=9), st.booleans())
@hypothesis.settings(max_examples=200, deadline=None)
def test_no_win_inside_the_interval(differences, lower_is_better):
  found = statistics.interval(differences)
  word = statistics.verdict(found, statistics.p_value(differences), lower_is_better)
  if found.low <= 0 <= found.high:
    assert word == 'no difference shown'
  elif word != 'no difference shown':
    assert (word == 'better') == ((found.mean < 0) == lower_is_better)


def test_an_interval_over_seeds_and_documents_is_that_of_the_one_that_varies():
  t = statistics.interval([1.0, 2.0, 3.0])
  for values in ([[1, 2, 3]], [[1], [2], [3]], [[1, 2, 3]] * 4, [[1] * 4, [2] * 4, [3] * 4]):
    found = statistics.crossed(values)
    assert (found.low, found.high) == pytest.approx((t.low, t.high))
  assert statistics.crossed([[2.0]]).low is None and statistics.crossed([[2.0, 2.0]]).low == 2.0


def test_an_interval_over_seeds_and_documents_covers_the_mean_of_both():
  rng, trials = np.random.default_rng(0), 400
  covered = 0
  for _ in range(trials):
    found = statistics.crossed(rng.normal(size=(3, 1)) + rng.normal(size=(1, 12)) + rng.normal(size=(3, 12)))
    covered += found.low <= 0 <= found.high
  assert 0.92 < covered / trials < 0.995    # 400 trials: 0.95 +- 0.02, and it is a little wide


def test_wilsons_interval_is_that_of_the_tables():
  assert statistics.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
  assert statistics.wilson(1.0, 64) == pytest.approx((64 / (64 + 1.959964**2), 1.0), abs=1e-6)
