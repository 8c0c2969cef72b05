"""Recall of what the context holds: what is asked, and what counts as right."""

import numpy as np
import pytest

from gemma4_jax.evaluation import recall, score
from tests import tiny

HAY = np.arange(600, 900, dtype=np.int32)


@pytest.fixture
def asked(monkeypatch):
  """The requests of a task, answered by `asked.answer(context, continuation)` in the place of the model."""
  class Asked(list):
    def answer(self, context, continuation):
      return 0.0

    def score(self, cfg, params, requests, batch_tokens):
      self.extend(requests)
      return [(np.array([self.answer(*request)]), False) for request in requests]
  asked = Asked()
  monkeypatch.setattr(score, 'continuations', asked.score)
  return asked


def test_a_model_that_looks_up_the_key_is_always_right_and_one_that_takes_the_last_value_at_chance(asked):
  asked.answer = lambda context, value: float(context[context.index(context[-1]) + 1] == value[0])
  found = recall.associative(tiny.model(), 8, trials=20)
  assert found == {'accuracy': 1.0, 'stderr': 0.0, 'chance': 1 / 8, 'nats_per_answer': -1.0}
  asked.answer = lambda context, value: float(context[-2] == value[0])
  assert recall.associative(tiny.model(), 8, trials=200)['accuracy'] == pytest.approx(1 / 8, abs=0.08)
  for context, _ in asked:
    assert context[0] == 2 and len(context) == 18 and len(set(context[1:-1])) == 16 and context[-1] in context[1:-1:2]


@pytest.mark.parametrize('depth', [0.0, 0.5, 1.0])
def test_the_needle_is_where_it_should_be_in_text_of_the_length_that_was_asked_for(asked, depth):
  tokenizer = tiny.model().tokenizer
  asked.answer = lambda context, code: float(tokenizer.decode(code).strip() in tokenizer.decode(context))
  assert recall.needle(tiny.model(), HAY, 128, depth, trials=4)['accuracy'] == 1.0
  for context, _ in asked:
    assert len(context) == 128 and context[0] == 2 and tokenizer.decode(context).endswith('\nThe code of the day is')
    told = tokenizer.encode('\nThe code of the day is').tolist()
    at = next(i for i in range(1, 128) if context[i:i + len(told)] == told)
    around = np.isin(context, HAY).sum()   # the sentence has tokens of it, too
    assert abs((at - 1) / around - depth) < 0.15


def test_what_is_right_is_that_of_the_whole_model():
  found = recall.associative(tiny.model(), 4, trials=8)
  assert 0 <= found['accuracy'] <= 1 and found['chance'] == 0.25 and found['nats_per_answer'] > 1


@pytest.mark.parametrize('ask, said', [(lambda: recall.associative(tiny.model(), 600), 'tokens of text, and each is used once'),
                                       (lambda: recall.needle(tiny.model(), HAY, 20, 0.5), '20 tokens: the sentence'),
                                       (lambda: recall.needle(tiny.model(), HAY, 600, 0.5), 'the text has 300')])
def test_what_has_no_room_is_refused(ask, said):
  with pytest.raises(ValueError, match=said):
    ask()


def test_a_length_that_has_no_room_ends_all_before_a_shorter_one_runs(asked, monkeypatch, tmp_path):
  monkeypatch.setattr(recall.text, 'load', lambda directory, **how: tiny.model())
  (tmp_path / 'a.txt').write_text('some text ' * 90)
  with pytest.raises(ValueError, match='600 pairs'):
    recall.run('here', 'associative', lengths=(4, 600))
  with pytest.raises(ValueError, match='5000 tokens'):
    recall.run('here', 'needle', data=str(tmp_path / '*.txt'), lengths=(64, 5000))
  assert not asked
  found = recall.run('here', 'needle', data=str(tmp_path / '*.txt'), trials=1)['metrics']    # as long as text and context allow
  assert list(found) == [f'128 tokens, depth {depth}%' for depth in (0, 25, 50, 75, 100)]    # and the context is 256, answer included


def test_scores_that_are_no_numbers_are_refused():
  with pytest.raises(ValueError, match='not finite'):
    score.check_finite([np.zeros(2), np.array([0, np.nan])])
