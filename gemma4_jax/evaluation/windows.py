"""Documents cut into windows, and these into batches of a few lengths."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses

import numpy as np

from gemma4_jax.evaluation.documents import Document

_SHORTEST = 32   # tokens of the shortest rows that are run


@dataclasses.dataclass(frozen=True)
class _Row:
  """ids [t] of one window, of which those from `first` on are predicted: numbers `at` and on of its document's targets."""
  document: int
  ids: np.ndarray
  first: int
  at: int


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
  """Windows of about one length.

  Attributes:
    ids_BT: int32, 0 where there is nothing.
    seg_BT: int32, 1, and 0 where there is nothing.
  """
  ids_BT: np.ndarray
  seg_BT: np.ndarray
  rows: tuple[_Row, ...]

  @property
  def predicted_BT(self) -> np.ndarray:
    """bool, where t + 1 holds an id that is predicted (every one of a document in one window)."""
    mask_BT = np.zeros(self.ids_BT.shape, bool)
    for mask_T, row in zip(mask_BT, self.rows):
      mask_T[row.first - 1:len(row.ids) - 1] = True
    return mask_BT


def windows(document: Document, index: int, window: int, stride: int) -> Iterator[_Row]:
  """Rows of at most `window` ids, each from BOS on, that predict every target of the document once.

  The first predicts all it holds. Each further one predicts the next `stride` ids, after BOS and the ids that end where they do.
  """
  ids, end = document.ids, min(window, len(document.ids))
  if document.first > 1 and len(ids) > window:
    raise ValueError(f'{document.origin}: its {len(ids)} tokens are more than a window of {window}, and a reply needs all of its context')
  yield _Row(index, ids[:end], document.first, 0)
  while end < len(ids):
    new = min(stride, len(ids) - end)
    end += new
    yield _Row(index, np.concatenate([ids[:1], ids[end - window + 1:end]]), window - new, end - new - 1)


def batches(documents: Sequence[Document], *, window: int, stride: int, batch_tokens: int) -> list[Batch]:
  """All windows of all documents, those of like length together; lengths are rounded up to powers of two, one program each.

  Args:
    window: tokens that run at once, BOS included.
    stride: of them, those that a window after the first of a document predicts; less than `window`.
    batch_tokens: about so many tokens are a batch.
  Raises:
    ValueError: sizes that cannot be, or nothing to predict.
  """
  check_sizes(window, stride, batch_tokens)
  buckets = {}
  for index, document in enumerate(documents):
    for row in windows(document, index, window, stride) if len(document.targets) else ():
      buckets.setdefault(max(_SHORTEST, 1 << (len(row.ids) - 1).bit_length()), []).append(row)
  if not buckets:
    raise ValueError('no document has a token to predict')
  return [_batch(rows[i:i + size], size, T) for T, rows in sorted(buckets.items())
          for size in [min(len(rows), max(1, batch_tokens // T))] for i in range(0, len(rows), size)]


def check_sizes(window: int, stride: int, batch_tokens: int) -> None:
  """Raises ValueError: sizes that cannot be."""
  if window < 2 or not 1 <= stride < window:
    raise ValueError(f'window={window}, stride={stride}: a window has BOS and at least a token more, a stride 1 to window - 1 tokens')
  if batch_tokens < 1:
    raise ValueError(f'batch_tokens={batch_tokens} is not positive')


def _batch(rows, size, T) -> Batch:
  ids_BT, seg_BT = np.zeros((2, size, T), np.int32)
  for i, row in enumerate(rows):
    ids_BT[i, :len(row.ids)], seg_BT[i, :len(row.ids)] = row.ids, 1
  return Batch(ids_BT, seg_BT, tuple(rows))


def collect(documents: Sequence[Document], made: Sequence[Batch], run: Callable[[Batch], np.ndarray]) -> list[np.ndarray]:
  """Runs every batch and puts what comes out back into documents.

  Args:
    made: of `batches`.
    run: Batch -> [..., B, T], at place t a number on id t + 1.
  Returns:
    [..., T - first] of every document: numbers on its targets.
  """
  found = [None] * len(documents)
  for batch in made:
    values = np.asarray(run(batch))
    for i, row in enumerate(batch.rows):
      if found[row.document] is None:
        found[row.document] = np.zeros((*values.shape[:-2], len(documents[row.document].targets)), values.dtype)
      predicted = len(row.ids) - row.first
      found[row.document][..., row.at:row.at + predicted] = values[..., i, row.first - 1:len(row.ids) - 1]
  return found
