"""Bits per byte and nats per token against sums by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.evaluation import perplexity

COUNTS = np.array([50, 0, 20, 20, 10])        # by id; quarters of 25 occurrences
BYTES = np.array([1, 0, 2, 3, 4])


def batch(targets, weights, domains):
  return {'targets': np.array(targets, np.int32), 'weights': np.array(weights, np.float32), 'domains': np.array(domains, np.int32)}


def evaluate(batches, nll=lambda params, batch: params * (1.0 + batch['targets'])):
  sums = perplexity.accumulator(nll, BYTES, COUNTS, num_domains=2)
  return perplexity.evaluate(sums, 2.0, batches, ('code', 'english'))


BATCHES = [batch([[0, 2], [3, 4]], [[1, 1], [1, 0]], [[0, 0], [1, 1]]), batch([[4, 0]], [[1, 1]], [[1, 0]])]


def test_totals_are_sums_over_what_has_weight():
  found = evaluate(BATCHES)    # nats 2 (id + 1) of ids 0, 2, 3, 4, 0
  assert (found['eval/tokens'], found['eval/bytes']) == (5, 1 + 2 + 3 + 4 + 1)
  assert found['eval/nats_per_token'] == pytest.approx((2 + 6 + 8 + 10 + 2) / 5)
  assert found['eval/bits_per_byte'] == pytest.approx(28 / math.log(2) / 11)


def test_each_kind_of_text_has_its_own_numbers():
  found = evaluate(BATCHES)
  assert found['eval/code/bits_per_byte'] == pytest.approx((2 + 6 + 2) / math.log(2) / 4)
  assert found['eval/english/nats_per_token'] == pytest.approx((8 + 10) / 2)


def test_quarters_hold_equal_shares_of_the_training_tokens_the_frequent_first():
  assert list(perplexity.frequency_quarters(COUNTS)) == [0, 3, 2, 2, 3]
  even = perplexity.frequency_quarters(np.ones(8, int))
  assert list(even) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tokens_are_split_by_frequency():
  found = evaluate(BATCHES)
  assert found['eval/frequency_q1/nats_per_token'] == pytest.approx(2)
  assert found['eval/frequency_q3/nats_per_token'] == pytest.approx((6 + 8) / 2)
  assert found['eval/frequency_q4/bits_per_byte'] == pytest.approx(10 / math.log(2) / 4)
  assert 'eval/frequency_q2/nats_per_token' not in found      # no token of it


def test_what_has_no_weight_may_be_anything():
  nll = lambda params, batch: jnp.where(batch['weights'] > 0, 1.0, jnp.nan)
  assert evaluate(BATCHES, nll)['eval/nats_per_token'] == 1.0


def test_a_split_without_a_token_to_predict_is_refused():
  with pytest.raises(ValueError, match='data.validation_fraction'):
    evaluate([batch([[0]], [[0]], [[0]])])
