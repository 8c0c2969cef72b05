"""Our checkpoints: parameters, optimizer state and the data iterator's place, written in the background, renamed when whole."""

from pathlib import Path

import jax
import ml_collections
import orbax.checkpoint as ocp


class Checkpoints:
  """Numbered checkpoints under one folder; a step that was not finished does not exist."""

  def __init__(self, folder: Path, *, keep: int):
    self._manager = ocp.CheckpointManager(
        folder.absolute(), item_names=('state', 'data', 'config'),
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
    folder = self._manager.directory / str(step)
    try:
      saved = self._manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()))
    except (ValueError, KeyError, OSError, TypeError) as error:
      first = str(error).strip().split('\n')[0][:300]
      raise ValueError(f'{folder}: cannot be restored into this run ({first}); remove that folder to go back to the checkpoint before it') from error
    wrong = [f'{jax.tree_util.keystr(path)}: {got.shape} for {want.shape}' for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(saved.state), jax.tree.leaves(abstract), strict=True) if got.shape != want.shape]
    if wrong:
      raise ValueError(f'{folder}: shapes differ from the config: {"; ".join(wrong[:5])}')
    return saved.state, saved.data

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()
