"""Every token is predicted once an epoch, in rows that anyone can compute again."""

import json

import numpy as np
import pytest

from gemma4_jax.data import batching, corpus

T, B = 16, 4


def make_corpus(lengths=None, seed=0):
  """A corpus whose tokens are all different: token i is i."""
  lengths = np.random.default_rng(seed).integers(2, 50, 40) if lengths is None else np.array(lengths)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  return corpus.Corpus(tokens=np.arange(offsets[-1], dtype=np.uint16), offsets=offsets,
                       document_domains=(np.arange(len(lengths)) % 2).astype(np.uint8))


def one_epoch(c, epoch, seed=0):
  rows = batching.PackedRows(c, T, seed)
  return [rows.row(epoch, i) for i in range(len(rows))]


def train(c, **overrides):
  return batching.train_iterator(c, **{'sequence_length': T, 'batch_size': B, 'seed': 3, **overrides})


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_every_token_but_one_is_a_target_once_an_epoch_and_bos_alone_has_no_weight():
  c = make_corpus()
  for epoch in range(3):
    rows = one_epoch(c, epoch)
    targets = np.concatenate([row['targets'][row['segments'] > 0] for row in rows])
    weighted = np.concatenate([row['targets'][row['weights'] > 0] for row in rows])
    assert len(targets) == len(set(targets)) == len(c.tokens) - 1  # the stream's first token follows nothing
    assert sorted(weighted) == sorted(set(c.tokens) - set(c.offsets[:-1]))


def test_epochs_and_seeds_have_orders_of_their_own():
  c = make_corpus()
  streams = [np.concatenate([row['tokens'] for row in one_epoch(c, epoch, seed)]) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
  for i in range(3):
    assert (streams[i] != streams[i - 1]).mean() > 0.9


def test_fields_follow_their_definition_token_by_token():
  c = make_corpus()
  document_of = np.repeat(np.arange(len(c.offsets) - 1), np.diff(c.offsets))
  previous = None  # the token that a row must continue with
  for row in one_epoch(c, epoch=1):
    segment, position = 0, 0
    for t in range(T):
      token, target = row['tokens'][t], row['targets'][t]
      if row['segments'][t] == 0:
        assert [row[name][t] for name in ('tokens', 'targets', 'positions', 'weights')] == [0] * 4
        continue
      assert previous is None or token == previous
      new = t == 0 or token in c.offsets
      segment, position = segment + new, 0 if new else position + 1
      assert (row['segments'][t], row['positions'][t]) == (segment, position)
      assert row['weights'][t] == (document_of[target] == document_of[token])
      assert row['weights'][t] == 0 or target == token + 1
      assert row['domains'][t] == document_of[target] % 2
      previous = target


def test_only_the_end_of_an_epoch_is_padded():
  c = make_corpus()
  rows = one_epoch(c, 0)
  assert all((row['segments'] > 0).all() for row in rows[:-1])
  assert (rows[-1]['segments'] > 0).sum() == (len(c.tokens) - 1) % T > 0


@pytest.mark.parametrize('lengths', [[5], [2, 2], [T + 1], [2 * T, 1 + T], [100]])
def test_corpora_shorter_than_a_row_or_just_filling_one_work(lengths):
  c = make_corpus(lengths)
  rows = one_epoch(c, 0)
  assert all(row['segments'].any() for row in rows)
  targets = np.concatenate([row['targets'][row['weights'] > 0] for row in rows])
  assert sorted(targets) == sorted(set(c.tokens) - set(c.offsets[:-1]))


def test_a_row_is_a_function_of_seed_epoch_and_number():
  c = make_corpus()
  forward, backward = batching.PackedRows(c, T, 5), batching.PackedRows(c, T, 5)
  places = [(epoch, i) for epoch in range(4) for i in range(0, len(forward), 3)]
  rows = {place: forward.row(*place) for place in places}
  for place in reversed(places):
    assert_equal(backward.row(*place), rows[place])


def test_batches_have_the_shapes_and_types_of_the_contract():
  batch = next(train(make_corpus()))
  assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {'rows': ((B, 2), 'int64')} | {
      name: ((B, T), 'float32' if name == 'weights' else 'int32') for name in ('tokens', 'targets', 'positions', 'segments', 'weights')}


def test_training_covers_every_token_once_in_each_epoch_across_batch_borders():
  c = make_corpus()
  rows = len(batching.PackedRows(c, T, 3))
  assert rows % B
  iterator = train(c)
  batches = [next(iterator) for _ in range(rows)]  # B epochs
  stacked = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
  epochs = []
  for epoch in range(B):
    part = {name: x[epoch * rows:(epoch + 1) * rows] for name, x in stacked.items()}
    assert sorted(part['targets'][part['weights'] > 0]) == sorted(set(c.tokens) - set(c.offsets[:-1]))
    epochs.append(part['tokens'])
  assert all((epochs[i] != epochs[i - 1]).mean() > 0.9 for i in range(B))


def test_each_epoch_orders_documents_anew_and_then_rows_anew():
  def two_epochs(c):
    rows = len(batching.PackedRows(c, T, 3))
    iterator = train(c, batch_size=rows)
    return [[tuple(tokens) for tokens in next(iterator)['tokens']] for _ in range(2)]

  first, second = two_epochs(make_corpus())
  assert len(set(first) & set(second)) < len(first) // 2  # other documents share a row
  first, second = two_epochs(make_corpus([1000]))
  assert first != second and sorted(first) == sorted(second)


def test_rows_of_a_long_document_are_spread_over_the_epoch():
  c = make_corpus([T * 100] + [T] * 100)
  iterator = train(c)
  first = np.concatenate([next(iterator)['tokens'][:, 0] for _ in range(25)])  # half the epoch
  assert 30 < (first < T * 100).sum() < 70


@pytest.mark.parametrize('process_count', [2, 4])
def test_process_shards_end_to_end_are_the_global_batch(process_count):
  c = make_corpus()
  whole = train(c)
  shards = [train(c, process_index=i, process_count=process_count) for i in range(process_count)]
  for _ in range(40):
    parts = [next(shard) for shard in shards]
    assert_equal({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, next(whole))


@pytest.mark.parametrize('done', [0, 1, 7, 30])
def test_a_restored_state_goes_on_with_the_exact_batch(done):
  c = make_corpus()
  iterator = train(c)
  for _ in range(done):
    next(iterator)
  state = iterator.get_state()
  assert json.loads(state)['next_batch'] == done
  expected = [next(iterator) for _ in range(12)]
  resumed, rewound = train(c), iterator
  next(resumed)
  for again in (resumed, rewound):
    again.set_state(state)
    for batch in expected:
      assert_equal(next(again), batch)


def test_a_state_is_the_same_in_every_process_and_fits_another_number_of_processes():
  c = make_corpus()
  two = train(c, process_index=1, process_count=2)
  for _ in range(5):
    next(two)
  one = train(c)
  one.set_state(two.get_state())
  assert_equal({name: x[B // 2:] for name, x in next(one).items()}, next(two))


def test_a_state_of_other_data_is_refused_with_what_differs():
  state = train(make_corpus()).get_state()
  with pytest.raises(ValueError, match=r'saved with another seed 3 \(now 4\), batch_size 4 \(now 8\)'):
    train(make_corpus(), seed=4, batch_size=8).set_state(state)
  with pytest.raises(ValueError, match='corpus_tokens'):
    train(make_corpus(seed=1)).set_state(state)


@pytest.mark.parametrize('overrides, message', [
    ({'batch_size': 6, 'process_count': 4}, 'data.batch_size=6 does not divide by the number of processes, 4'),
    ({'batch_size': 0}, 'data.batch_size=0 must be positive'),
    ({'sequence_length': 0}, 'data.sequence_length=0 must be positive'),
])
def test_sizes_that_make_no_batch_are_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    train(make_corpus(), **overrides)


def test_evaluation_takes_every_token_once_in_an_order_that_never_changes():
  c = make_corpus()
  batches = list(batching.eval_batches(c, sequence_length=T, batch_size=B))
  targets = np.concatenate([batch['targets'][batch['weights'] > 0] for batch in batches])
  assert sorted(targets) == sorted(set(c.tokens) - set(c.offsets[:-1]))
  for a, b in zip(batches, batching.eval_batches(c, sequence_length=T, batch_size=B)):
    assert_equal(a, b)


def test_evaluation_names_the_domain_of_every_target():
  c = make_corpus()
  domain_of = np.repeat(c.document_domains, np.diff(c.offsets))
  for batch in batching.eval_batches(c, sequence_length=T, batch_size=B):
    real = batch['weights'] > 0
    np.testing.assert_array_equal(batch['domains'][real], domain_of[batch['targets'][real]])


def test_the_last_evaluation_batch_is_filled_with_padding():
  c = make_corpus([T] * 9 + [2])
  batches = list(batching.eval_batches(c, sequence_length=T, batch_size=B))
  assert {batch[name].shape for batch in batches for name in batch} == {(B, T)}
  padded = batches[-1]['segments'] == 0
  assert padded.any() and not any((batch['segments'] == 0).any() for batch in batches[:-1])
  assert not any(x[padded].any() for x in batches[-1].values())
