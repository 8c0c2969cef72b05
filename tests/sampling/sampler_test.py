"""Choosing a token: each cut against a sort in numpy, and draws against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.sampling import sampler
from gemma4_jax.sampling.sampler import GREEDY, Sampling

V = 50
LOGITS = np.random.RandomState(0).standard_normal((3, V)).astype(np.float32) * 3
UNSEEN = np.zeros((3, V), bool)
ALL = dict(top_k=0, top_p=1.0)


def by_sorting(logits, s):
  """The kept tokens of one row, after transformers' order of cuts."""
  logits = logits.astype(np.float64) / s.temperature
  order = np.argsort(-logits)
  kept = order[:s.top_k or V]
  p = np.exp(logits - logits.max())
  p = np.where(np.isin(np.arange(V), kept), p, 0)
  p /= p.sum()
  count = np.searchsorted(np.cumsum(p[kept]), s.top_p) + 1
  kept = kept[:count]
  return {int(i) for i in kept if p[i] >= s.min_p * p.max()}


@pytest.mark.parametrize('s', [
    Sampling(1.0, **ALL), Sampling(1.0, top_k=1, top_p=1.0), Sampling(1.0, top_k=7, top_p=1.0), Sampling(1.0, top_k=V, top_p=1.0),
    Sampling(1.0, top_k=0, top_p=0.5), Sampling(0.4, top_k=0, top_p=0.9), Sampling(2.5, top_k=10, top_p=0.7),
    Sampling(1.0, top_k=0, top_p=1.0, min_p=0.1), Sampling(1.5, top_k=20, top_p=0.95, min_p=0.05), Sampling(1.0, 0, 1e-6)], ids=str)
def test_cuts_keep_what_a_sort_keeps(s):
  kept = sampler.keep(jnp.asarray(LOGITS), sampler.Settings.make([s] * 3, V))
  for row, logits in zip(kept, LOGITS):
    assert set(np.flatnonzero(row).tolist()) == by_sorting(logits, s)


def test_all_is_all_also_where_a_rounded_sum_reaches_1_before_the_end():
  logits = np.zeros((1, 50), np.float32)
  logits[0, 0] = 40.0   # all but e-17 of the probability
  assert np.asarray(sampler.keep(jnp.asarray(logits), sampler.Settings.make([Sampling(1.0, **ALL)], 50))).all()


def test_rows_have_settings_of_their_own():
  rows = [Sampling(1.0, top_k=3, top_p=1.0), Sampling(1.0, **ALL), Sampling(1.0, top_k=0, top_p=0.3)]
  kept = sampler.keep(jnp.asarray(LOGITS), sampler.Settings.make(rows, V))
  assert [set(np.flatnonzero(row).tolist()) for row in kept] == [by_sorting(logits, s) for logits, s in zip(LOGITS, rows)]


def draws(s, n=20_000, logits=LOGITS[0], seen=UNSEEN[0]):
  settings = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), sampler.Settings.make([s], V))
  keys = jax.random.split(jax.random.key(0), n)
  return np.asarray(jax.jit(sampler.choose)(jnp.tile(logits, (n, 1)), settings, jnp.tile(seen, (n, 1)), keys)[0])


def test_draws_follow_the_tempered_distribution():
  p = np.exp(LOGITS[0] / 1.5 - (LOGITS[0] / 1.5).max())
  p /= p.sum()
  found = np.bincount(draws(Sampling(1.5, **ALL)), minlength=V) / 20_000
  np.testing.assert_allclose(found, p, atol=4 * np.sqrt(p.max() / 20_000))


def test_draws_stay_among_the_kept():
  s = Sampling(1.0, top_k=4, top_p=1.0)
  assert set(draws(s, 2000).tolist()) == by_sorting(LOGITS[0], s)


def test_temperature_0_takes_the_likeliest_and_the_logprob_is_the_models():
  settings = sampler.Settings.make([GREEDY, Sampling(1.0, top_k=1), Sampling(1.0, **ALL)], V)
  tokens, logprobs = sampler.choose(jnp.asarray(LOGITS), settings, UNSEEN, jax.random.split(jax.random.key(0), 3))
  assert tokens[:2].tolist() == LOGITS[:2].argmax(-1).tolist()
  np.testing.assert_allclose(logprobs, jax.nn.log_softmax(LOGITS)[np.arange(3), np.asarray(tokens)], atol=1e-5)


def test_seen_tokens_are_penalised_on_both_sides_of_zero():
  logits, seen = np.full(V, -9.0, np.float32), UNSEEN[0].copy()
  logits[[3, 4]], seen[3] = [2.0, 1.5], True
  choose = lambda penalty, logits: int(sampler.choose(jnp.asarray(logits)[None], sampler.Settings.make(
      [Sampling(0.0, 0, repetition_penalty=penalty)], V), seen[None], jax.random.split(jax.random.key(0), 1))[0][0])
  assert (choose(1.0, logits), choose(1.2, logits), choose(1.5, logits)) == (3, 3, 4)
  logits = np.where(logits > 0, logits - 3, logits)   # -1 and -1.5: multiplied, the seen one falls behind
  assert (choose(1.0, logits), choose(2.0, logits)) == (3, 4)


def test_suppressed_tokens_are_never_chosen_greedily_or_drawn_and_the_others_keep_their_odds():
  best = np.argsort(-LOGITS[0])[:9].tolist()   # more than the least room for them
  settings = sampler.Settings.make([Sampling(0.0, 0, suppress_tokens=(best[0],)), GREEDY], V)
  tokens, logprobs = sampler.choose(jnp.tile(LOGITS[0], (2, 1)), settings, UNSEEN[:2], jax.random.split(jax.random.key(0), 2))
  assert tokens.tolist() == [best[1], best[0]]
  np.testing.assert_allclose(logprobs, jax.nn.log_softmax(LOGITS[0])[np.asarray(tokens)], atol=1e-5)
  p = np.exp(LOGITS[0] - LOGITS[0].max())
  p[best] = 0
  found = np.bincount(draws(Sampling(1.0, **ALL, suppress_tokens=tuple(best))), minlength=V) / 20_000
  assert not found[best].any()
  np.testing.assert_allclose(found, p / p.sum(), atol=4 * np.sqrt((p / p.sum()).max() / 20_000))
  assert set(draws(Sampling(1.0, top_k=2, top_p=1.0, suppress_tokens=tuple(best[1:3])), 2000).tolist()) == {best[0], best[3]}


@pytest.mark.parametrize('wrong', [(V,), (-1,), (1.0,), tuple(range(V))], ids=str)
def test_what_cannot_be_suppressed_is_named(wrong):
  with pytest.raises(ValueError, match='suppress_tokens: '):
    sampler.Settings.make([Sampling(0.0, 0, suppress_tokens=wrong)], V)
