"""The PLE table as inference reads it: in few bits, in the memory of the device or of the host.

  as_is, bfloat16   table [V, L, P]
  int8              codes int8 [V, L, P], scale float32 [V, L]: number = code * scale
  int4              codes int8 [V, L, P / 2], number i in the low and number i + P / 2 in the high half of a byte; scale as above

A row that shares a scale is one token's P numbers for one layer. A scale for all L layers of a token would save 4 bytes in P, but
layers differ in size: were one of 35 layers 8 times as large as the others, its scale would leave them 3 bits fewer.
"""

from collections.abc import Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma4_jax import config
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import layers

_BITS = {'int8': 8, 'int4': 4}


def encode(rows: np.ndarray, storage: str) -> dict[str, np.ndarray]:
  """Rows [..., P] of float32 or bfloat16 as `storage` of config.PLE_TABLES keeps them: arrays by name.

  The largest number of a row becomes -2**(bits - 1), so that all levels are used: of normal numbers and P = 256, the error is
  0.6 % (int8) and 10 % (int4) of their root mean square.

  Raises:
    ValueError: numbers that are not finite and would be stored in int8 or int4.
  """
  if storage not in _BITS:
    return {'table': rows if storage == 'as_is' else rows.astype(ml_dtypes.bfloat16)}
  half = 2 ** (_BITS[storage] - 1)
  rows = rows.astype(np.float32)
  largest = np.take_along_axis(rows, np.abs(rows).argmax(-1, keepdims=True), axis=-1)
  scale = largest / -half
  if not np.isfinite(scale).all():
    raise ValueError(f'model.ple_table: {storage!r} cannot keep a table whose numbers are not finite')
  codes = np.rint(rows / np.where(scale == 0, 1, scale)).clip(-half, half - 1).astype(np.int8)
  if storage == 'int4':
    low, high = np.split(codes, 2, axis=-1)
    codes = low & 15 | high << 4
  return {'codes': codes, 'scale': scale[..., 0]}


def decode(parts: Mapping[str, jax.Array], storage: str, dtype) -> jax.Array:
  """The rows [..., P], of `dtype`, of arrays as `encode` made them; numbers of few bits are multiplied out in float32."""
  if storage not in _BITS:
    return parts['table'].astype(dtype)
  codes = parts['codes']
  if storage == 'int4':   # shifts of int8 keep the sign
    codes = jnp.concatenate([(codes << 4) >> 4, codes >> 4], axis=-1)
  return (codes.astype(jnp.float32) * parts['scale'][..., None]).astype(dtype)


@jax.tree_util.register_pytree_node_class
class HostTable:
  """Arrays [V, ...] in host memory or memory-mapped, read by row from inside compiled programs.

  Stands in a tree of parameters, where it has no leaves: no transformation moves, casts or counts it. To `jax.jit` it is part of
  the tree's structure and equal to itself alone, so that a program belongs to its table and is compiled once for it (and keeps it
  alive: `jax.clear_caches` lets both go). XLA's cache on disk does not take programs that call back.

  On a CPU, other work of the step runs on beside a read. The processes of a mesh would each need the table.
  """

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    for name, array in arrays.items():
      if not isinstance(array, np.ndarray):
        raise ValueError(f'model.ple_placement: a host table is of numpy arrays, and {name!r} is a {type(array).__name__}')
    self.arrays = dict(arrays)

  @property
  def nbytes(self) -> int:
    return sum(array.nbytes for array in self.arrays.values())

  def __repr__(self) -> str:
    return f'HostTable({", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self.arrays.items())})'

  def read(self, ids: jax.Array) -> dict[str, jax.Array]:
    """Row `ids` (int32 in [0, V), any shape) of every array, in its dtype; nothing else of it is touched."""
    shapes = {name: jax.ShapeDtypeStruct((*ids.shape, *array.shape[1:]), array.dtype) for name, array in self.arrays.items()}
    return jax.pure_callback(self._rows, shapes, ids, vmap_method='broadcast_all')

  def _rows(self, ids):
    ids = np.asarray(ids)
    return {name: np.asarray(array[ids]) for name, array in self.arrays.items()}

  def tree_flatten(self):
    return (), self

  @classmethod
  def tree_unflatten(cls, table, leaves):
    return table


class PlacedTable(nn.Module):
  """A table [V, ...] that `ple_placement.place` made, read by row; rows come out in `cfg.dtype`.

  Its parameters are the arrays that `encode` names, or `host`, the HostTable that holds them.
  """
  cfg: ModelConfig
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Args: ids: int32 in [0, V), any shape. Returns: [*ids.shape, *shape[1:]]."""
    cfg = self.cfg
    if self.is_initializing():
      config.check_trainable(cfg)
    found = dict(self.variables.get('params', {}))
    if ('host' in found) != cfg.ple_on_host:
      raise ValueError(f'model.ple_placement: {cfg.ple_placement!r} is not where these parameters have the table: use the config '
                       f'that came with them from ple_placement.place')
    _check_layout(cfg, found['host'].arrays if cfg.ple_on_host else found, self.shape)
    parts = found['host'].read(ids) if cfg.ple_on_host else {name: layers.take(array, ids) for name, array in found.items()}
    return decode(parts, cfg.ple_table, cfg.dtype)


def layout(shape: tuple[int, ...], storage: str, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
  """What `encode` makes of a table of this shape and dtype."""
  if storage not in _BITS:
    return {'table': jax.ShapeDtypeStruct(shape, dtype if storage == 'as_is' else jnp.bfloat16)}
  codes = (*shape[:-1], shape[-1] * _BITS[storage] // 8)
  return {'codes': jax.ShapeDtypeStruct(codes, jnp.int8), 'scale': jax.ShapeDtypeStruct(shape[:-1], jnp.float32)}


def _check_layout(cfg, arrays, shape):
  wanted = layout(shape, cfg.ple_table, 'float32')
  either = ('float32', 'bfloat16') if cfg.ple_table == 'as_is' else ()
  if arrays.keys() == wanted.keys() and all(
      array.dtype.name in (wanted[name].dtype.name, *either) and array.shape == wanted[name].shape for name, array in arrays.items()):
    return
  expected = ', '.join(f'{name} {" or ".join(either) or x.dtype.name}{list(x.shape)}' for name, x in wanted.items())
  found = ', '.join(f'{name} {array.dtype}{list(array.shape)}' for name, array in arrays.items())
  raise ValueError(f'model.ple_table: {cfg.ple_table!r} of this model is {expected}; the parameters have {found or "none"}')
