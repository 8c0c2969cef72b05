"""Checkpoints of quantized models: one Orbax tree for every module of the model, written when its last weight has been quantized.

  config/metadata         {'model': the config, 'weights': {group: format}}
  quantized/layer_0, ..   arrays by path: 'codes' and 'scale' in the place of a weight that a format has, others as they are

So neither the model nor its codes need ever be in memory whole.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from gemma4_jax.checkpoint import orbax, source
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import ple_placement, ple_table, quantized, transformer
from gemma4_jax.turboquant import weights

FOLDER = 'quantized'


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a checkpoint of a model holds whose weights are quantized by a plan.

  Attributes:
    cfg: with `ple_table` as the table is stored.
    plan: group -> format, of the groups that the model has.
    formats: path -> format of the weights that are quantized.
    arrays: path -> shape and dtype of what is stored; other weights are of `cfg.param_dtype` here, and may be of others.
    sizes: path -> numbers in the weights of the model.
  """
  cfg: ModelConfig
  plan: dict[str, str]
  formats: dict[str, str]
  arrays: dict[str, jax.ShapeDtypeStruct]
  sizes: dict[str, int]

  @classmethod
  def make(cls, cfg: ModelConfig, plan: str | Mapping[str, str]) -> 'Contents':
    """Raises ValueError, as `quantized.choose`."""
    shapes = transformer.shapes(cfg.replace(ple_table='as_is'))
    if cfg.ple_table != 'as_is' and ple_placement.TABLE not in shapes:
      raise ValueError(f'model.ple_table: {cfg.ple_table!r} is for a table {ple_placement.TABLE}, which this model has not')
    chosen = quantized.choose({tuple(name.split('/')): shape for name, shape in shapes.items()}, plan)
    formats = {'/'.join(path): format for path, format in chosen.items()}
    arrays = {}
    for name, shape in shapes.items():
      if name in formats:
        made = weights.layout(shape, formats[name], quantized.inputs(tuple(name.split('/'))))
        arrays |= {f'{name}/{part}': x for part, x in made.items()}
      elif name == ple_placement.TABLE and cfg.ple_table != 'as_is':
        made = ple_table.layout(shape, cfg.ple_table, cfg.param_dtype)
        arrays |= {f'{name.removesuffix("/table")}/{part}': x for part, x in made.items()}
      else:
        arrays[name] = jax.ShapeDtypeStruct(shape, cfg.param_dtype)
    used = {quantized.group(path): format for path, format in chosen.items()}
    return cls(cfg, used, formats, arrays, {name: int(np.prod(shape)) for name, shape in shapes.items()})

  @property
  def nbytes(self) -> int:
    return sum(x.size * x.dtype.itemsize for x in self.arrays.values())

  def names(self, name: str) -> list[str]:
    """Of the arrays that stand for a weight of the model."""
    stem = name.removesuffix('/table') if name == ple_placement.TABLE and name not in self.arrays else name
    return [name] if name in self.arrays else [f'{stem}/{part}' for part in ('codes', 'scale')]

  def encode(self, name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that stand for a weight; numpy arrays are read some rows at a time, and may be memory-mapped."""
    if name in self.formats:
      made = weights.encode(weight, self.formats[name], quantized.inputs(tuple(name.split('/'))))
      parts = [made.codes, made.scale]
    elif name not in self.arrays:
      parts = ple_placement.store(weight, self.cfg).values()
    else:
      parts = [weight]
    return {part: np.asarray(x) for part, x in zip(self.names(name), parts, strict=True)}

  def coverage(self) -> tuple[list[str], list[str]]:
    """Paths of the weights that the plan is about, and of those that are quantized."""
    table = [ple_placement.TABLE] if self.cfg.ple_table != 'as_is' else []
    asked = table + [name for name in self.sizes if quantized.group(tuple(name.split('/'))) in self.plan]
    return asked, [name for name in asked if name not in self.arrays]

  def report(self, itemsize: int) -> Iterator[tuple[str, str, int, int, int, int]]:
    """(group, format, weights, numbers, bytes before at `itemsize` a number, bytes after), 'other' being what nobody quantizes."""
    rows = {}
    for name, size in self.sizes.items():
      group = 'ple_table' if name == ple_placement.TABLE else quantized.group(tuple(name.split('/'))) or 'other'
      count, numbers, after = rows.get(group, (0, 0, 0))
      after += sum(self.arrays[part].size * self.arrays[part].dtype.itemsize for part in self.names(name))
      rows[group] = count + 1, numbers + size, after
    for group, (count, numbers, after) in rows.items():
      format = self.cfg.ple_table if group == 'ple_table' else self.plan.get(group, 'as_is')
      yield group, format, count, numbers, numbers * itemsize, after


class Writer:
  """Takes arrays by path in any order, and writes a module when it has all of them."""

  def __init__(self, folder: Path, contents: Contents):
    self._folder, self._contents = folder.absolute(), contents
    self._left = {}
    for name in contents.arrays:
      self._left.setdefault(_module(name), set()).add(name)
    self._held = {}
    folder.mkdir()

  def add(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises OSError: they cannot be written."""
    for name, array in arrays.items():
      module = _module(name)
      self._left[module].remove(name)
      self._held.setdefault(module, {})[name.split('/', 1)[-1]] = np.asarray(array)
      if not self._left[module]:
        del self._left[module]
        orbax.write(self._folder / FOLDER / module, orbax.writer(), ocp.args.PyTreeSave(self._held.pop(module)))

  def close(self) -> None:
    """Writes the config, when every array has come."""
    assert not self._left, sorted(self._left)
    fields = {'model': self._contents.cfg.to_dict(), 'weights': self._contents.plan}
    orbax.write(self._folder / orbax.CONFIG, ocp.JsonCheckpointHandler(), ocp.args.JsonSave(fields))


def _module(name):
  return name.split('/')[0]


def find(folder: Path) -> source.Source:
  """A checkpoint that `Writer` made, compared with its config; no array has been read.

  Raises:
    ValueError: it is not whole, or of no model or format that there is.
  """
  file = folder / orbax.CONFIG / orbax.JSON
  cfg, plan = orbax.read_config(folder), source.read_json(file).get('weights')
  if not isinstance(plan, dict) or not all(isinstance(item, str) for pair in plan.items() for item in pair):
    raise ValueError(f'{file}: holds no formats of weights')
  try:
    contents = Contents.make(cfg, plan)
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from None
  stored, keys = {}, {}
  modules = sorted(entry for entry in (folder / FOLDER).iterdir() if entry.is_dir())
  for module in modules:
    for key, (shape, dtype) in orbax.leaves(module).items():
      name = '/'.join([module.name, *key])
      stored[name], keys[name] = (shape, dtype), (module, key)
  source.compare({name: x.shape for name, x in contents.arrays.items()}, {name: shape for name, (shape, _) in stored.items()})
  fixed = {part for name in contents.sizes for part in contents.names(name) if part != name}
  for name in fixed:
    if stored[name][1] != contents.arrays[name].dtype.name:
      raise ValueError(f'{folder}: {name} is stored as {stored[name][1]}, and its format has {contents.arrays[name].dtype.name}')
  pieces = tuple(source.Piece(name, contents.arrays[name].dtype if name in fixed else source.float_dtype(name, stored[name][1]), x.shape,
                              lambda array, name=name: {name: array}, fixed=name in fixed) for name, x in contents.arrays.items())

  def fetch(names):
    found = {}
    for module in dict.fromkeys(keys[name][0] for name in names):
      inside = [name for name in names if keys[name][0] == module]
      found |= zip(inside, orbax.read(module, [keys[name][1] for name in inside]))
    return [found[name] for name in names]

  return source.Source('our quantized Orbax export', folder, folder, cfg, pieces, fetch, formats=contents.formats)


def variables(cfg: ModelConfig, arrays: Mapping[str, jax.Array], formats: Mapping[str, str]) -> dict[str, dict[str, jax.Array]]:
  """{'params': .., 'quant': ..}, each path -> weight, of the arrays of `find`."""
  shapes = transformer.shapes(cfg.replace(ple_table='as_is'))
  quant = {name: weights.Weight(arrays[f'{name}/codes'], arrays[f'{name}/scale'], format, shapes[name]) for name, format in formats.items()}
  parts = {f'{name}/{part}' for name in formats for part in ('codes', 'scale')}
  return {'params': {name: array for name, array in arrays.items() if name not in parts}, 'quant': quant}
