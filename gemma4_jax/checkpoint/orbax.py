"""Our checkpoints: of a run, with optimizer state and the data iterator's place, in the background; or parameters alone."""

import asyncio
from collections.abc import Mapping, Sequence
import contextlib
from pathlib import Path

from etils import epath
from flax import traverse_util
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from gemma4_jax import config
from gemma4_jax.checkpoint import source
from gemma4_jax.config import ModelConfig

RUN = 'checkpoints'   # in a run's folder, that of its checkpoints
STATE, DATA, PARAMS, CONFIG = 'state', 'data', 'params', 'config'   # items: two of a training checkpoint, one of an export, one of both
JSON = 'metadata'    # in an item of JSON, its file
_WRITTEN_BYTES = 2**26


class Checkpoints:
  """Numbered checkpoints under one folder; a step that was not finished does not exist."""

  def __init__(self, folder: Path, *, keep: int):
    self._manager = ocp.CheckpointManager(
        folder.absolute(), item_names=(STATE, DATA, CONFIG),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True))

  @property
  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state, data: dict, config: ml_collections.ConfigDict) -> None:
    """Args: state: a tree of arrays; data: JSON values, the data iterator's state."""
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), config=ocp.args.JsonSave(config.to_dict())))

  def restore(self, step: int, abstract) -> tuple:
    """(state, data) of a step; `abstract` gives shapes, dtypes and the shardings to restore onto.

    Raises:
      ValueError: a checkpoint of other shapes or names, or one that cannot be read, naming its folder.
    """
    folder = Path(self._manager.directory / str(step))
    try:
      with _reading(folder / STATE) as (handler, where):
        state = handler.restore(where, args=ocp.args.PyTreeRestore(
            item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)))
      data = source.read_json(folder / DATA / JSON)
    except ValueError as error:
      raise ValueError(f'{error}; remove {folder} to go back to the checkpoint before it') from error
    wrong = [f'{jax.tree_util.keystr(path)}: {got.shape} for {want.shape}' for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(abstract), strict=True) if got.shape != want.shape]
    if wrong:
      raise ValueError(f'{folder}: shapes differ from the config: {"; ".join(wrong[:5])}')
    return state, data

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


# Parameters alone: written for use elsewhere, read array by array.


def save_params(folder: Path, cfg: ModelConfig, params: Mapping, dtype: np.dtype | None = None) -> None:
  """Writes the canonical tree and its config. `params` may be memory-mapped.

  Args:
    dtype: what all weights are stored as; None: as they are.
  Raises:
    OSError: they cannot be written.
  """
  params = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), params)   # np.memmap has no handler
  cast = jax.tree.map(lambda _: ocp.SaveArgs(dtype=dtype), params)
  items = {PARAMS: ocp.args.PyTreeSave(params, save_args=cast), CONFIG: ocp.args.JsonSave({'model': cfg.to_dict()})}
  handlers = {PARAMS: writer(), CONFIG: ocp.JsonCheckpointHandler()}
  write(folder.absolute(), ocp.CompositeCheckpointHandler(**handlers), ocp.args.Composite(**items))


def write(folder: Path, handler: ocp.CheckpointHandler, args: ocp.args.CheckpointArgs) -> None:
  """Raises OSError: it cannot be written."""
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(folder, args=args)
  except ValueError as error:   # of TensorStore, also for what the operating system refuses
    raise OSError(_first_line(error)) from error


def read_config(folder: Path) -> ModelConfig:
  """The model in the config beside saved parameters or training state.

  Raises:
    ValueError: it cannot be read, or is no config of a model.
  """
  file = folder / CONFIG / JSON
  fields = source.read_json(file).get('model')
  if not isinstance(fields, dict):
    raise ValueError(f'{file}: holds no model')
  source.check_depth(file, fields.get('num_layers'))
  return config.from_dict(fields)


def leaves(folder: Path) -> dict[tuple[str, ...], tuple[tuple[int, ...], str]]:
  """Key -> (shape, dtype) of the arrays in a tree of dicts; nothing is read but its metadata.

  Raises:
    ValueError: it is no whole tree of arrays.
  """
  with _reading(folder) as (handler, where):
    tree = handler.metadata(where).tree
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = {tuple(str(part.key) for part in path): leaf for path, leaf in flat
             if all(isinstance(part, jax.tree_util.DictKey) for part in path) and hasattr(leaf, 'shape')}   # a string has none
    for key, leaf in found.items():
      chunk = leaf.storage and leaf.storage.chunk_shape
      if chunk and any(inside > max(size, 1) for inside, size in zip(chunk, leaf.shape)):   # TensorStore makes room for all of it
        raise ValueError(f'{"/".join(key)}: chunks of {list(chunk)} in an array of {list(leaf.shape)}')
    return {key: (tuple(leaf.shape), str(leaf.dtype)) for key, leaf in found.items()}


def read(folder: Path, keys: Sequence[tuple[str, ...]]) -> list[np.ndarray]:
  """Arrays of the tree, in host memory."""
  def nest(leaf):
    return traverse_util.unflatten_dict(dict.fromkeys(keys, leaf))
  with _reading(folder) as (handler, where):
    tree = handler.restore(where, args=ocp.args.PyTreeRestore(
        item=nest(0), restore_args=nest(ocp.RestoreArgs(restore_type=np.ndarray)), partial_restore=True))
    flat = traverse_util.flatten_dict(tree)
    return [flat[key] for key in keys]


async def _together(work):
  """Awaits `work`; its failure is told after what it began has ended: TensorStore would report that to an event loop that is closed by
  then, and write on where nothing is to be left."""
  others = asyncio.all_tasks()
  try:
    return await work
  except BaseException:
    if begun := asyncio.all_tasks() - others:
      await asyncio.wait(begun)
    raise


class _EndTogether:

  async def metadata(self, infos):
    return await _together(super().metadata(infos))

  async def deserialize(self, infos, args=None):
    return await _together(super().deserialize(infos, args))


class _ArrayHandler(_EndTogether, ocp.type_handlers.ArrayHandler):   # writes in one transaction, which fails as one
  pass


class _NumpyHandler(_EndTogether, ocp.type_handlers.NumpyHandler):
  """Arrays are not copied before they are written, and so many at once as `_WRITTEN_BYTES` hold: they may be files mapped to memory."""

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)

  async def _background_serialize(self, values, *of_each):
    for batch in source.batches(list(zip(values, *of_each)), [value.nbytes for value in values], _WRITTEN_BYTES):
      await _together(super()._background_serialize(*map(list, zip(*batch))))


def writer() -> ocp.PyTreeCheckpointHandler:
  """Writes a tree of arrays; when it has failed, nothing is being written any more."""
  jax_arrays = ocp.type_handlers.get_type_handler(jax.Array)
  return ocp.PyTreeCheckpointHandler(type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (np.ndarray, _NumpyHandler()), (jax.Array, jax_arrays)))


@contextlib.contextmanager
def _reading(folder: Path):
  others = [(int, ocp.type_handlers.ScalarHandler()), (float, ocp.type_handlers.ScalarHandler()), (str, ocp.type_handlers.StringHandler())]
  handlers = ocp.type_handlers.create_type_handler_registry((np.ndarray, _NumpyHandler()), (jax.Array, _ArrayHandler()), *others)
  try:
    with contextlib.closing(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)) as handler:
      yield handler, epath.Path(folder.absolute())
  except Exception as error:   # Orbax raises all kinds, Exception itself among them
    raise ValueError(f'{folder}: not a whole Orbax tree ({_first_line(error)})') from error


def _first_line(error: BaseException) -> str:
  while error.__cause__ is not None:   # what TensorStore says of a file is below what Orbax says of its arrays
    error = error.__cause__
  return str(error).strip().split('\n')[0][:300]
