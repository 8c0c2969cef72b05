"""What a checkpoint on disk looks like to a loader, whoever wrote it: pieces, each of which is one or more weights of ours."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
from pathlib import Path
import sys

import ml_dtypes
import numpy as np
from rich import progress
from rich.console import Console

from gemma4_jax.config import ModelConfig

DTYPES = {name: np.dtype(kind) for name, kind in (
    ('float64', np.float64), ('float32', np.float32), ('float16', np.float16), ('bfloat16', ml_dtypes.bfloat16))}
_JSON_BYTES = 100 * 2**20
_MOST_LAYERS = 10_000
_BATCH_BYTES = 2**27   # a call of Orbax takes longer than to read most weights


@dataclasses.dataclass(frozen=True)
class Piece:
  """One stored array.

  Attributes:
    name, dtype, shape: as stored.
    split: the stored array -> views of it: our path -> weight.
    fixed: it is part of a quantized weight, and never cast.
  """
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  split: Callable[[np.ndarray], dict[str, np.ndarray]]
  fixed: bool = False

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint whose names and shapes were compared with its config; no weight has been read.

  Attributes:
    kind: who wrote it.
    folder: where the pieces are: below the path given, where that was a run's folder.
    home: where files of tokenizer and settings are: `folder`, or that of the run.
    fetch: names of pieces -> their arrays; where the format allows, memory-mapped.
    skipped: names of the weights of towers, which this model does not have.
    formats: our path -> format of weights that are stored quantized, as pieces 'path/codes' and 'path/scale'.
  """
  kind: str
  folder: Path
  home: Path
  cfg: ModelConfig
  pieces: tuple[Piece, ...]
  fetch: Callable[[list[str]], list[np.ndarray]]
  skipped: tuple[str, ...] = ()
  formats: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def read(self) -> Iterator[tuple[Piece, dict[str, np.ndarray]]]:
    """Every piece and its weights (our path -> weight, as stored), `_BATCH_BYTES` or one larger piece at a time."""
    for batch in batches(self.pieces, [piece.nbytes for piece in self.pieces], _BATCH_BYTES):
      for piece, array in zip(batch, self.fetch([piece.name for piece in batch]), strict=True):
        yield piece, piece.split(array)

  @property
  def nbytes(self) -> int:
    return sum(piece.nbytes for piece in self.pieces)

  @property
  def dtype(self) -> str:
    """The dtype of most of its bytes that are no codes."""
    return max(DTYPES, key=lambda name: sum(piece.nbytes for piece in self.pieces if piece.dtype == DTYPES[name] and not piece.fixed))


def batches(items: Sequence, nbytes: Sequence[int], most: int) -> Iterator[list]:
  """Items in their order, of at most `most` bytes together, or one that is larger."""
  batch, held = [], 0
  for item, size in zip(items, nbytes, strict=True):
    if batch and held + size > most:
      yield batch
      batch, held = [], 0
    batch.append(item)
    held += size
  if batch:
    yield batch


def compare(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], ignored: Collection[str] = ()) -> None:
  """Compares the shapes a model needs with those a checkpoint holds.

  Raises:
    ValueError: arrays are unknown, missing or of another shape; one line with names and shapes.
  """
  faults = {
      'unknown': [f'{name} {list(shape)}' for name, shape in found.items() if name not in wanted and name not in ignored],
      'missing': [f'{name} {list(shape)}' for name, shape in wanted.items() if name not in found],
      'wrong shape': [f'{name} {list(found[name])} instead of {list(shape)}' for name, shape in wanted.items()
                      if name in found and tuple(found[name]) != tuple(shape)]}
  faults = {fault: names for fault, names in faults.items() if names}
  if faults:
    raise ValueError('checkpoint does not fit the model: ' + '; '.join(
        f'{len(names)} {fault}: {_some(names)}' for fault, names in faults.items()))


def float_dtype(name: str, dtype) -> np.dtype:
  """The dtype of a stored array; a ValueError names the array if it is no float of `DTYPES`."""
  if str(dtype) not in DTYPES:
    raise ValueError(f'{name}: stored as {dtype}, and weights are one of {", ".join(DTYPES)}')
  return DTYPES[str(dtype)]


def check_depth(file: Path, layers) -> None:
  """Raises ValueError if a config asks for so many layers that unfolding it would fill the memory."""
  if isinstance(layers, int) and layers > _MOST_LAYERS:
    raise ValueError(f'{file}: {layers} layers are more than {_MOST_LAYERS}')


def check_finite(name: str, weights: Mapping[str, np.ndarray]) -> None:
  """Raises ValueError with the name of a weight that holds NaN or infinity."""
  for path, array in weights.items():
    flat = array.reshape(-1)
    for start in range(0, flat.size, 2**24):   # in steps: a table's worth of booleans would be large, too
      if not np.isfinite(flat[start:start + 2**24]).all():
        raise ValueError(f'{name}: holds NaN or infinity (weight {path})')


def read_json(file: Path) -> dict:
  """A JSON object from a file that nobody vouches for.

  Raises:
    ValueError: it cannot be read, is no JSON object, or names a key twice.
  """
  try:
    if file.stat().st_size > _JSON_BYTES:
      raise ValueError(f'over {_JSON_BYTES} bytes')
    value = parse_json(file.read_bytes())
  except (OSError, ValueError) as error:
    raise ValueError(f'{file}: cannot be read as JSON ({error})') from None
  return value


def read_bytes(file: Path) -> bytes:
  """Raises ValueError: it cannot be read."""
  try:
    return file.read_bytes()
  except OSError as error:
    raise ValueError(f'{file}: cannot be read ({error.strerror})') from None


def parse_json(text: bytes) -> dict:
  """Raises ValueError unless `text` is a JSON object without a key named twice (of which parsers keep one or the other)."""
  def once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
      raise ValueError('a key is there twice')
    return found
  try:
    value = json.loads(text, object_pairs_hook=once)
  except RecursionError:
    raise ValueError('nested too deeply') from None
  if not isinstance(value, dict):
    raise ValueError('no object')
  return value


def inside(folder: Path, name: str) -> Path:
  """The file `name` of `folder`.

  Raises:
    ValueError: it lies elsewhere, by its name or through a symbolic link; the links of Hugging Face's download cache, from
      `snapshots/REVISION` to `blobs` beside it, are no elsewhere.
  """
  try:
    file, root = (folder / name).resolve(), folder.resolve()
  except (OSError, RuntimeError, ValueError) as error:   # a name that none can have, a link to itself
    raise ValueError(f'{folder}: {name!r} cannot be read ({error})') from None
  roots = [root] + ([root.parent.parent / 'blobs'] if root.parent.name == 'snapshots' else [])
  if not any(file.is_relative_to(where) for where in roots):
    raise ValueError(f'{folder}: {name!r} lies outside of this directory, and is not read')
  return folder / name


@contextlib.contextmanager
def bar(title: str, nbytes: int, shown: bool):
  """Yields advance(bytes): a progress bar if `shown` and standard error is a terminal."""
  with progress.Progress(
      progress.TextColumn('{task.description}'), progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn(),
      progress.TimeRemainingColumn(), console=Console(stderr=True), disable=not (shown and sys.stderr.isatty())) as bars:
    task = bars.add_task(title, total=nbytes)
    yield lambda done: bars.advance(task, done)


def _some(names, most=10):
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
