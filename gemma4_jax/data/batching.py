"""Packing documents into rows of equal length, shuffled, sharded by process and resumable to the exact batch."""

from collections.abc import Iterator
import functools
import json

import numpy as np

from gemma4_jax.data import corpus as corpus_lib

Batch = dict[str, np.ndarray]


class PackedRows:
  """The rows of any epoch, by random access: a row is a pure function of (seed, epoch, row).

  An epoch puts the documents in an order of its own, end to end, and cuts the stream into rows of T + 1 tokens that
  overlap by one, so that every token of the corpus is predicted exactly once an epoch (the targets that are the BOS of
  a next document have weight 0). Nothing is padded but the end of an epoch's last row.
  """

  def __init__(self, corpus: corpus_lib.Corpus, sequence_length: int, seed: int):
    self._corpus = corpus
    self._sequence_length = sequence_length
    self._seed = seed
    self._lengths = np.diff(corpus.offsets)
    # Two, because a batch and what is prefetched may lie on both sides of an epoch's end.
    self._stream = functools.lru_cache(maxsize=2)(self._make_stream)

  def __len__(self) -> int:
    """Rows an epoch."""
    return -(-(len(self._corpus.tokens) - 1) // self._sequence_length)

  def _make_stream(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of documents in an epoch and where each begins in its stream, with the end of the stream last."""
    order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))
    return order, np.concatenate([[0], np.cumsum(self._lengths[order])])

  def row(self, epoch: int, row: int) -> Batch:
    """One row of a batch, arrays [T]; see `train_iterator`, and `eval_batches` for `domains`."""
    order, starts = self._stream(epoch)
    begin = row * self._sequence_length
    end = min(begin + self._sequence_length + 1, len(self._corpus.tokens))
    first, last = np.searchsorted(starts, begin, 'right') - 1, np.searchsorted(starts, end, 'left')
    documents = order[first:last]
    begins = np.maximum(starts[first:last], begin)  # of the part of each document that is in this row
    counts = np.minimum(starts[first + 1:last + 1], end) - begins
    place = np.arange(begin, end)
    tokens = self._corpus.tokens[place + np.repeat(self._corpus.offsets[documents] - starts[first:last], counts)]
    segments = np.repeat(np.arange(1, len(documents) + 1), counts)
    positions = place - np.repeat(begins, counts)
    domains = np.repeat(self._corpus.document_domains[documents], counts)
    return {
        'tokens': self._fill(tokens[:-1], np.int32),
        'targets': self._fill(tokens[1:], np.int32),
        'positions': self._fill(positions[:-1], np.int32),
        'segments': self._fill(segments[:-1], np.int32),
        'weights': self._fill(segments[1:] == segments[:-1], np.float32),
        'domains': self._fill(domains[1:], np.int32),
    }

  def _fill(self, x: np.ndarray, dtype: type) -> np.ndarray:
    filled = np.zeros(self._sequence_length, dtype)
    filled[:len(x)] = x
    return filled


class TrainIterator(Iterator[Batch]):
  """Endless batches whose place is a few bytes; made by `train_iterator`."""

  def __init__(self, batches, identity: dict[str, int]):
    self._batches = batches
    self._identity = identity

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> bytes:
    """JSON: the number of the next batch and what it depends on; the same in every process, for any process count."""
    return json.dumps({'next_batch': self._batches.get_state()['next_index'], **self._identity}).encode()

  def set_state(self, state: bytes) -> None:
    """Goes on at the batch where `state` was taken. Raises ValueError: the state is of other data."""
    state = json.loads(state)
    next_batch = state.pop('next_batch')
    if state != self._identity:
      differing = ', '.join(f'{k} {state.get(k)} (now {v})' for k, v in self._identity.items() if state.get(k) != v)
      raise ValueError(f'the data state to resume from was saved with another {differing}')
    self._batches.set_state({'next_index': next_batch})

  def close(self) -> None:
    """Stops the prefetching thread."""
    self._batches.close()


def train_iterator(corpus: corpus_lib.Corpus, *, sequence_length: int, batch_size: int, seed: int,
                   process_index: int = 0, process_count: int = 1) -> TrainIterator:
  """Yields batches for ever, in an order given by `seed`; each epoch has another.

  Args:
    sequence_length: T.
    batch_size: rows of the global batch; this process gets the rows of its index, batch_size / process_count of them.
  Returns:
    An iterator of dicts of arrays [B, T]:
      tokens, targets: int32; targets are the next tokens.
      positions: int32, from 0 in each document and at the beginning of a row.
      segments: int32, 1 for the row's first document, 2 for the next; 0 for padding.
      weights: float32, 1 where the target belongs to the document of its token, 0 elsewhere.
      rows: int64 [B, 2], the (epoch, row) of `PackedRows` that each is.
  Raises:
    ValueError: `batch_size` cannot be divided among the processes, or a size is not positive.
  """
  import grain  # takes over a second
  _check_sizes(sequence_length, batch_size)
  if batch_size % process_count:
    raise ValueError(f'data.batch_size={batch_size} does not divide by the number of processes, {process_count}')
  rows = PackedRows(corpus, sequence_length, seed)

  def row(index: int, shuffled: int) -> Batch:
    batch = rows.row(index // len(rows), shuffled)
    del batch['domains']
    return batch | {'rows': np.array([index // len(rows), shuffled])}

  # A global batch is the next process_count local ones, end to end. A million epochs, because grain's endless length
  # overflows in `batch`. One thread builds batches many times faster than an accelerator takes them; more would fight
  # for the interpreter.
  dataset = grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat(1_000_000).map_with_index(row)
  dataset = dataset.batch(batch_size // process_count)[process_index::process_count]
  batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
  return TrainIterator(batches, {'seed': seed, 'sequence_length': sequence_length, 'batch_size': batch_size,
                                 'corpus_tokens': len(corpus.tokens)})


def eval_batches(corpus: corpus_lib.Corpus, *, sequence_length: int, batch_size: int) -> Iterator[Batch]:
  """Yields every token of `corpus` once as a target, always in the same order.

  Documents are in a fixed random order, so that the first batches are a fair sample of all. Rows missing in the last
  batch are padding. Batches are as from `train_iterator`, with domains, int32 [B, T]: index into `corpus.domains` of
  the document that the target belongs to.
  """
  _check_sizes(sequence_length, batch_size)
  rows = PackedRows(corpus, sequence_length, seed=0)
  for first in range(0, len(rows), batch_size):
    batch = [rows.row(0, i) for i in range(first, min(first + batch_size, len(rows)))]
    missing = batch_size - len(batch)
    yield {name: np.pad(np.stack([row[name] for row in batch]), ((0, missing), (0, 0))) for name in batch[0]}


def _check_sizes(sequence_length: int, batch_size: int) -> None:
  for name, value in (('sequence_length', sequence_length), ('batch_size', batch_size)):
    if value < 1:
      raise ValueError(f'data.{name}={value} must be positive')
