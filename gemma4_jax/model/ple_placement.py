"""Puts the PLE table of a loaded model where `model.ple_placement` and `model.ple_table` say: off the accelerator, or in fewer bits.

  cfg, params = load.load(directory, host=[ple_placement.TABLE])                            # memory-mapped, never on the device
  cfg, params = ple_placement.place(cfg, params, placement='host', storage='int8')
  out = generate.generate(cfg, params, [ids], max_new_tokens=64)                            # as with any other model

  device         as released: rows and projection are read on the device
  host           rows are fetched as they are needed: the same bits as `device`
  folded         one row holds all of PLE, which of text depends on the token alone: the projection of the input embedding, the norm
                 and the scales are in the table, and nothing is projected
  folded_host    a folded table, fetched
"""

from collections.abc import Callable
from functools import partial
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from rich import console as rich_console, progress as rich_progress

from gemma4_jax import config
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import ple_table, transformer

TABLE = 'arm/lookup/table'   # its path among the parameters
_BLOCK_BYTES = 32 * 2**20    # of the rows that are converted at once, in float32


def place(cfg: ModelConfig, params: dict, *, placement: str = 'device', storage: str = 'as_is', keep_projection: bool = False,
          progress: bool = False) -> tuple[ModelConfig, dict]:
  """(config, parameters) of the same model with its table placed and stored so; what was given stays as it was.

  A table that needs no conversion is not copied: a memory-mapped one stays on disk. Another is converted block by block, and takes
  its own size in host memory.

  Args:
    params: as `checkpoint.load` and `transformer.init` give them. The table may be a numpy array (`load`'s `host=[TABLE]`); one that its
      checkpoint has as int8 or int4 can be moved to the host.
    placement: of config.PLE_PLACEMENTS.
    storage: of config.PLE_TABLES; as_is: a folded table is of the dtype of the activations.
    keep_projection: a folded model keeps, under 'arm', the weights 'project' and 'norm' and 'row_0', row 0 of the table [L, P], which
      are what PLE of soft tokens (of images and sound) is made of.
    progress: a bar, on a terminal.
  Raises:
    ValueError: no such placement or storage, no CPU backend for a table on the host, a model without such a table, parameters placed
      already or not of this model.
  """
  if placement in ('host', 'folded_host'):
    try:
      jax.devices('cpu')
    except RuntimeError:
      raise ValueError(f"model.ple_placement: {placement!r} needs JAX's CPU backend, too, which JAX_PLATFORMS leaves out: add ,cpu to it"
                       ) from None
  if cfg.ple_table in ('int8', 'int4') and cfg.ple_placement == 'device':
    return _move(cfg, params, placement, storage)
  config.check_trainable(cfg)
  cfg = cfg.replace(ple_placement=placement, ple_table=storage)
  if not cfg.has_ple_table:
    raise ValueError(f'model.embedding: {cfg.embedding!r} has no PLE table to place')
  arm, name = dict(params.get('arm', {})), 'frozen_lookup' if cfg.embedding == 'frozen_table' else 'lookup'
  table = dict(arm.get(name, {})).get('table')
  shape = (cfg.vocab_size, 1 if cfg.embedding == 'shared_table' else len(cfg.inject_layers), cfg.ple_dim)
  if table is None or table.shape != shape or table.dtype.name not in ('float32', 'bfloat16'):
    found = 'is not there' if table is None else f'is {table.dtype}{list(table.shape)}'
    raise ValueError(f'arm/{name}/table: {found}; this model has float32 or bfloat16 {list(shape)}')

  if cfg.ple_folded:
    arrays = _convert(fold_rows(cfg, params), shape, cfg, progress)
    arm = {'project': arm['project'], 'norm': arm['norm'], 'row_0': jnp.asarray(table[0])} if keep_projection else {}
  elif storage == 'as_is' or storage == table.dtype.name:
    arrays = {'table': table}
  else:
    arrays = store(table, cfg, progress)
  return cfg, {**params, 'arm': {**arm, name: _put(cfg, params, arrays)}}


def _put(cfg, params, arrays):
  if cfg.ple_on_host:
    return {'host': ple_table.HostTable({part: np.asarray(array) for part, array in arrays.items()})}
  where = _rows_like(params.get('embedder', {}).get('table'))
  return {part: array if isinstance(array, jax.Array) else jax.device_put(np.array(array), where) for part, array in arrays.items()}


def _move(cfg, params, placement, storage):
  """`place` of a table that its checkpoint has in few bits."""
  if placement not in ('device', 'host') or storage not in ('as_is', cfg.ple_table):
    raise ValueError(f'model.ple_placement: {placement!r} of a table as {storage!r}: this one is stored as {cfg.ple_table!r}, and can be '
                     'on the device or the host as it is; for others begin with the weights it was made of')
  cfg, arm = cfg.replace(ple_placement=placement), params['arm']
  name = next(name for name in ('lookup', 'frozen_lookup') if name in arm)
  return cfg, {**params, 'arm': {**arm, name: _put(cfg, params, arm[name])}}


def store(table: np.ndarray, cfg: ModelConfig, progress: bool = False) -> dict[str, np.ndarray]:
  """A table, also a memory-mapped one, as `cfg.ple_table` keeps it: arrays by name, converted block by block."""
  return _convert(lambda start, stop: np.asarray(table[start:stop]), table.shape, cfg, progress)


def fold_rows(cfg: ModelConfig, params: dict) -> Callable[[int, int], np.ndarray]:
  """A function (start, stop) -> [stop - start, L, P] in `cfg.dtype`: what `embeddings.PLE` returns for these token ids.

  It runs that very module on a model whose vocabulary is the block.
  """
  plain = cfg.replace(ple_placement='device', ple_table='as_is', scan=False)
  arm = params['arm']

  def rows(start, stop):
    block = {'embedder': {'table': jnp.asarray(params['embedder']['table'][start:stop])},
             'arm': {**arm, 'lookup': {'table': jnp.asarray(arm['lookup']['table'][start:stop])}}}
    return np.asarray(_vectors(plain.replace(vocab_size=stop - start), block))

  return rows


@partial(jax.jit, static_argnums=0)
def _vectors(cfg, params):
  ids_1V = jnp.arange(cfg.vocab_size, dtype=jnp.int32)[None]
  _, vectors = transformer.Transformer(cfg).apply({'params': params}, ids_1V, jnp.zeros_like(ids_1V), method='embed')
  return jnp.stack([vector[0] for vector in vectors if vector is not None], axis=1)


def _convert(rows, shape, cfg, progress):
  """The whole table as `ple_table.encode` stores its rows, block by block."""
  step = max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
  whole, console = None, rich_console.Console(stderr=True)
  for start in rich_progress.track(range(0, shape[0], step), f'PLE table: {cfg.ple_placement}, {cfg.ple_table}', console=console,
                                   disable=not (progress and console.is_terminal)):
    stop = min(start + step, shape[0])
    parts = ple_table.encode(rows(start, stop), cfg.ple_table)
    whole = whole or {name: np.empty((shape[0], *part.shape[1:]), part.dtype) for name, part in parts.items()}
    for name, part in parts.items():
      whole[name][start:stop] = part
  return whole


def _rows_like(embedder):
  """The sharding of a table whose rows are split as those of the input embedding; None: the default device."""
  where = getattr(embedder, 'sharding', None)
  return NamedSharding(where.mesh, PartitionSpec(*where.spec[:1])) if isinstance(where, NamedSharding) else None
