"""Scores of tokens against the logits of the whole model."""

import jax
import numpy as np
import pytest

from gemma4_jax.evaluation import score
from gemma4_jax.model import transformer
from tests import tiny

CFG, PARAMS = tiny.CFG, transformer.init(tiny.CFG, 0)
IDS = np.array(jax.random.randint(jax.random.key(0), (2, 256), 3, CFG.vocab_size), np.int32)    # two chunks of the head a row
SEG = np.ones_like(IDS)
SEG[1, 20:] = 0


def log_p(params):
  return np.asarray(jax.nn.log_softmax(score.logits(CFG, params, IDS, SEG)))


def test_token_nll_is_that_of_the_next_token():
  found = np.asarray(score.token_nll(CFG, PARAMS, IDS, SEG))
  expected = -np.take_along_axis(log_p(PARAMS)[:, :-1], IDS[:, 1:, None], axis=-1)[..., 0]
  np.testing.assert_allclose(found[:, :-1], expected, atol=1e-4)


def test_divergence_is_kl_from_the_reference_with_agreement_and_both_losses():
  other = transformer.init(CFG, 1)
  kl, same, nll, reference_nll = np.asarray(score.token_divergence(CFG, PARAMS, CFG, other, IDS, SEG))
  ours, theirs = log_p(PARAMS), log_p(other)
  np.testing.assert_allclose(kl, (np.exp(theirs) * (theirs - ours)).sum(-1), atol=1e-4)
  np.testing.assert_array_equal(same, ours.argmax(-1) == theirs.argmax(-1))
  np.testing.assert_allclose(nll[:, :-1], -np.take_along_axis(ours[:, :-1], IDS[:, 1:, None], axis=-1)[..., 0], atol=1e-4)
  np.testing.assert_allclose(reference_nll[:, :-1], -np.take_along_axis(theirs[:, :-1], IDS[:, 1:, None], axis=-1)[..., 0], atol=1e-4)


def test_a_model_does_not_diverge_from_itself():
  kl, same, _, _ = np.asarray(score.token_divergence(CFG, PARAMS, CFG, PARAMS, IDS, SEG))
  assert np.abs(kl).max() < 1e-6 and same.all()


def test_a_summary_tells_one_loss_three_ways():
  found = score.summary(nats=20.0, tokens=10, size=40)
  assert found == {'nats_per_token': 2.0, 'perplexity': pytest.approx(np.exp(2)), 'bits_per_byte': pytest.approx(0.5 / np.log(2))}
  assert 'bits_per_byte' not in score.summary(1.0, 1, 0)


@pytest.mark.slow
def test_continuations_score_as_the_whole_text_does_whatever_their_batch_and_share_their_context():
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(3, CFG.vocab_size, n).tolist()
  shared, other, bos = [2, *draw(20)], [2, *draw(5)], [2]
  likeliest = int(score.logits(CFG, PARAMS, np.array([other]), np.ones((1, 6), np.int32))[0, -1].argmax())
  requests = [(shared, draw(3)), (other, draw(9)), (shared, draw(1)), (bos, draw(20)), (other, [likeliest]), (shared, draw(40))]
  found = score.continuations(CFG, PARAMS, requests)
  for (context, continuation), (scores, greedy) in zip(requests, found):
    ids = np.array([context + continuation])
    expected = np.asarray(jax.nn.log_softmax(score.logits(CFG, PARAMS, ids, np.ones_like(ids))))[0, len(context) - 1:-1]
    np.testing.assert_allclose(scores, expected[np.arange(len(continuation)), continuation], atol=1e-4)
    assert greedy == bool((expected.argmax(-1) == continuation).all())
  assert found[4][1] and not found[0][1]
  for (scores, greedy), (alone, alone_greedy) in zip(found, score.continuations(CFG, PARAMS, requests, batch_tokens=1)):
    np.testing.assert_allclose(scores, alone, atol=1e-4)
    assert greedy == alone_greedy


def test_a_context_that_requests_share_runs_once(monkeypatch):
  ran = []
  monkeypatch.setattr(score.kv_cache, 'make', lambda cfg, B, S: None)
  monkeypatch.setattr(score, '_fill', lambda cfg, params, cache, ids_BT, seg_BT: ran.append(seg_BT.sum(1).tolist()))
  monkeypatch.setattr(score, '_continue', lambda cfg, params, cache, row_R, ids_RT, seg_RT: np.zeros((2, *ids_RT.shape)))
  shared, other = [2, 7, 8, 9], [2, 5]
  found = score.continuations(CFG, PARAMS, [(shared, [3]), (other, [4, 4]), (shared, [4, 5]), (shared, [6])])
  assert ran == [[3, 1]] and [len(scores) for scores, _ in found] == [1, 2, 2, 1]     # all but the last token, which predicts


@pytest.mark.parametrize('request_, said', [(([], [3]), '0 tokens of context'), (([2], []), '0 of continuation'),
                                            (([2] * 200, [3] * 58), '257 tokens are more than model.context_length = 256')])
def test_continuations_that_cannot_be_are_refused(request_, said):
  with pytest.raises(ValueError, match=said):
    score.continuations(CFG, PARAMS, [request_])
