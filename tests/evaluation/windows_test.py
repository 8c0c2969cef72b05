"""Windows and batches: every target is predicted once, with BOS and as much before it as fits."""

import numpy as np
import pytest

from gemma4_jax.evaluation import windows
from gemma4_jax.evaluation.documents import Document

BOS = 2


def document(n, first=1):
  return Document(np.array([BOS, *range(100, 100 + n)], np.int32), 'here', first=first)


@pytest.mark.parametrize('n', [1, 6, 7, 8, 9, 20, 33])
@pytest.mark.parametrize('stride', [1, 3, 7])
def test_every_target_is_predicted_once_in_a_window_that_begins_with_bos(n, stride):
  one, seen = document(n), []
  rows = list(windows.windows(one, 0, 8, stride))
  for row in rows:
    assert row.ids[0] == BOS and len(row.ids) <= 8
    assert list(row.ids[1:]) == list(range(row.ids[1], row.ids[1] + len(row.ids) - 1))     # what stands there, without a gap
    np.testing.assert_array_equal(row.ids[row.first:], one.targets[row.at:row.at + len(row.ids) - row.first])
    seen += [*range(row.at, row.at + len(row.ids) - row.first)]
  assert seen == list(range(n))
  assert all(len(row.ids) == 8 and len(row.ids) - row.first <= stride for row in rows[1:])


def test_a_reply_is_predicted_alone_and_needs_all_of_its_context():
  row, = windows.windows(document(6, first=4), 0, 8, 3)
  assert (row.first, row.at, len(row.ids)) == (4, 0, 7)
  with pytest.raises(ValueError, match='here: its 10 tokens are more than a window of 8'):
    list(windows.windows(document(9, first=4), 0, 8, 3))


def test_lengths_are_rounded_to_few_shapes_and_numbers_come_back_in_place():
  documents = [document(n) for n in (3, 300, 30, 70, 31, 128, 1000)]
  made = windows.batches(documents, window=256, stride=128, batch_tokens=512)
  assert {batch.ids_BT.shape for batch in made} <= {(n, T) for T in (32, 128, 256) for n in range(1, 17)}
  assert len({batch.ids_BT.shape for batch in made}) == len({batch.ids_BT.shape[1] for batch in made})     # one program a length
  next_id = lambda batch: np.stack([np.roll(batch.ids_BT, -1, axis=1), -np.roll(batch.ids_BT, -1, axis=1)])
  for one, (ids, negative) in zip(documents, windows.collect(documents, made, next_id), strict=True):
    np.testing.assert_array_equal(ids, one.targets)
    np.testing.assert_array_equal(negative, -one.targets)


def test_padding_has_no_segment():
  batch, = windows.batches([document(3), document(20)], window=64, stride=32, batch_tokens=512)
  np.testing.assert_array_equal(batch.seg_BT.sum(1), [4, 21])
  assert not batch.ids_BT[batch.seg_BT == 0].any()


@pytest.mark.parametrize('window, stride, batch_tokens', [(1, 1, 8), (8, 8, 8), (8, 0, 8), (8, 4, 0)])
def test_sizes_that_cannot_be_are_refused(window, stride, batch_tokens):
  with pytest.raises(ValueError, match='stride|batch_tokens'):
    windows.batches([document(3)], window=window, stride=stride, batch_tokens=batch_tokens)


def test_nothing_to_predict_is_refused():
  with pytest.raises(ValueError, match='no document has a token to predict'):
    windows.batches([document(0)], window=8, stride=4, batch_tokens=64)
