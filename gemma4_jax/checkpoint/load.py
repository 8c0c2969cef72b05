"""Weights from a directory, whichever kind it is, straight to where they are used."""

from collections.abc import Iterable
import dataclasses
import os
from pathlib import Path

from absl import logging
from flax import traverse_util
import jax
import numpy as np

from gemma4_jax import config as model_config, sharding
from gemma4_jax.checkpoint import google, hf, orbax, packed, shards, source
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import transformer

_ALIGNMENT = 64   # bytes, of buffers that XLA takes on a CPU
_MODEL_TYPES = ('gemma4', 'gemma4_text', 'gemma4_unified', 'gemma4_unified_text')


def load(path: str | Path, *, config: ModelConfig | None = None, param_dtype: str | None = None, mesh: jax.sharding.Mesh | None = None,
         host: Iterable[str] = (), check_nan: bool = False, progress: bool = False) -> tuple[ModelConfig, dict]:
  """(config, parameters) of a checkpoint: Hugging Face's directory, Google's Orbax tree, our exports, or a run's folder.

  One weight at a time is read from its memory-mapped file, cast and placed: host memory holds what is kept there and the largest
  weight. Arrays of Orbax are read whole, 128 MB or one larger array (which may stack layers) at a time.

  Args:
    path: of a run's folder, the newest checkpoint is taken.
    config: in place of the one in the directory.
    param_dtype: 'float32' or 'bfloat16', then also the compute dtype; None: every weight as stored.
    mesh: None: the default device.
    host: paths such as 'arm/lookup/table' of weights that stay numpy arrays in host memory; those of safetensors files that
      need no cast are not copied but memory-mapped.
    check_nan: refuses weights that are not finite.
    progress: a bar, on a terminal.
  Returns:
    the config, with the dtypes of what was loaded and `scan` off, and the canonical per-layer tree; of a quantized checkpoint the
    variables {'params': .., 'quant': ..} of `model.quantized`, which takes the place of the tree wherever it is only applied.
  Raises:
    ValueError: the directory is not whole, not safe or not a model that this package has; one line.
  """
  found = find(path, config)
  cfg, stored = found.cfg, {piece.dtype.name for piece in found.pieces if not piece.fixed}
  if param_dtype is not None:
    cfg = cfg.replace(param_dtype=param_dtype, dtype=param_dtype)
  elif not stored <= {'float32', 'bfloat16'}:
    raise ValueError(f"{found.folder}: weights are stored as {', '.join(sorted(stored))}; give param_dtype='float32' or 'bfloat16'")
  boxes = transformer.abstract(cfg.replace(ple_table='as_is'))
  known = flatten(boxes)
  host = set(host)
  for name in sorted(host - known.keys()):
    raise ValueError(f'host: no weight {name!r}; did you mean {model_config.nearest(name, list(known))!r}?')
  on_host = lambda name: name in host or f'{name.rpartition("/")[0]}/table' in host   # also codes and scale of a table in few bits
  shardings = {} if mesh is None else _shardings(mesh, boxes, found, on_host)

  params = {}
  with source.bar(f'loading {found.folder.name}', found.nbytes, progress) as advance:
    for piece, weights in found.read():
      if check_nan:
        source.check_finite(piece.name, weights)
      dtype = np.dtype(piece.dtype if param_dtype is None or piece.fixed else source.DTYPES[param_dtype])
      for name, weight in weights.items():
        params[name] = weight.astype(dtype, copy=False) if on_host(name) else _place(weight, dtype, shardings.get(name))
      jax.block_until_ready([params[name] for name in weights if not on_host(name)])   # else copies on their way add up
      advance(piece.nbytes)
  tree = _variables(found, params)
  return cfg, tree if found.formats else tree['params']


def _variables(found, arrays):
  flat = packed.variables(found.cfg, arrays, found.formats) if found.formats else {'params': arrays}
  return {kind: unflatten(part) for kind, part in flat.items()}


def _shardings(mesh, boxes, found, on_host):
  """Path -> NamedSharding of every weight that goes to devices, and of every part of a quantized one."""
  if not any(piece.fixed for piece in found.pieces):
    return flatten(sharding.params(mesh, unflatten({name: box for name, box in flatten(boxes).items() if not on_host(name)})))
  shapes = {piece.name: jax.ShapeDtypeStruct(piece.shape, piece.dtype) for piece in found.pieces}
  where = sharding.variables(mesh, boxes, _variables(found, shapes))
  return {'/'.join(getattr(key, 'name', None) or key.key for key in path[1:]): one   # a part of a packed weight is an attribute
          for path, one in jax.tree_util.tree_leaves_with_path(where)}


def find(path: str | Path, config: ModelConfig | None = None) -> source.Source:
  """Recognises a directory and compares its names and shapes with its config, without reading a weight.

  Raises:
    ValueError: as `load`.
  """
  path = Path(path)
  try:
    found = _find(path, config)
  except (OSError, OverflowError) as error:   # the latter of JAX, for sizes beyond any machine
    raise ValueError(f'{path}: cannot be read ({error})') from error
  except ValueError as error:
    raise error if str(path) in str(error) else ValueError(f'{path}: {error}') from error
  if config is None:   # what the weights were trained or sampled with may be another device's
    found = dataclasses.replace(found, cfg=found.cfg.replace(attention_implementation='auto', moe_implementation='auto', matvec='xla'))
  if found.skipped:
    logging.info('%s: %d weights of towers that this model does not have were skipped', path, len(found.skipped))
  return found


def _find(path, config):
  if not path.is_dir():
    raise ValueError(f'{path}: no such directory')
  steps = _steps(path) or _steps(path / orbax.RUN)
  if any(path.glob('*.safetensors*')):
    found = _hugging_face(path, config)
  elif steps:
    found = _ours('a checkpoint of a run', steps[-1], orbax.STATE, config)
  elif (path / orbax.STATE).is_dir():
    found = _ours('a checkpoint of a run', path, orbax.STATE, config)
  elif (path / packed.FOLDER).is_dir():
    if config is not None:
      raise ValueError(f'{path}: holds quantized weights, whose config is part of them: give none')
    found = packed.find(path)
  elif (path / orbax.PARAMS).is_dir():
    found = _ours('our Orbax export', path, orbax.PARAMS, config)
  elif (path / '_METADATA').is_file():
    found = _google(path, config)
  else:
    shards.find(path)   # names a half download or a pickle, if that is what is there
    raise AssertionError
  return found


def flatten(tree: dict) -> dict:
  """Path, joined by '/' -> leaf."""
  return traverse_util.flatten_dict(tree, sep='/')


def unflatten(flat: dict) -> dict:
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def _place(weight, dtype, where):
  if where is None:
    return jax.device_put(_copied(weight, dtype))
  return jax.make_array_from_callback(weight.shape, where, lambda index: _copied(weight[index], dtype))


def _copied(weight, dtype):
  """In C order, and at an address that lets JAX keep the buffer on a CPU instead of copying it once more. Never the weight itself: a
  memory-mapped one changes when its file does."""
  room = np.empty(weight.size * dtype.itemsize + _ALIGNMENT, np.uint8)
  begin = -room.ctypes.data % _ALIGNMENT
  copy = room[begin:begin + weight.size * dtype.itemsize].view(dtype).reshape(weight.shape)
  copy[...] = weight
  return copy


def _stored_dtypes(found: source.Source) -> source.Source:
  """With the stored dtype in the config, where a config can say it."""
  dtype = found.dtype if found.dtype in ('float32', 'bfloat16') else 'float32'
  return dataclasses.replace(found, cfg=found.cfg.replace(param_dtype=dtype, dtype=dtype))


# Hugging Face.


def _hugging_face(folder, cfg):
  stored = shards.find(folder)
  cfg = cfg or _read_hf_config(folder)
  towers = tuple(name for name in stored if name.startswith(hf.TOWERS))
  text = {name: tensor for name, tensor in stored.items() if not name.startswith(hf.TOWERS)}
  prefix = hf.find_prefix(text)
  try:
    hf.check(cfg, {name: tensor.shape for name, tensor in text.items()}, prefix)
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from None

  pieces = tuple(source.Piece(name, text[name].float_dtype(name), tensor.shape, tensor.split)
                 for name, tensor in hf.tensors(cfg, prefix).items())
  fetch = lambda names: [text[name].map(name) for name in names]
  return _stored_dtypes(source.Source('a Hugging Face checkpoint', folder, folder, cfg, pieces, fetch, towers))


def _read_hf_config(folder):
  file = source.inside(folder, 'config.json')
  fields = source.read_json(file)
  kind = fields.get('model_type', 'gemma4')
  if kind not in _MODEL_TYPES:
    raise ValueError(f'{file}: model_type = {kind!r} is no Gemma 4 ({", ".join(_MODEL_TYPES)})')
  try:
    source.check_depth(file, fields.get('text_config', fields).get('num_hidden_layers'))
    return hf.config_from_hf(fields)
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from None
  except (TypeError, AttributeError, KeyError, IndexError) as error:   # a field of another kind than any release has
    raise ValueError(f'{file}: no config of a Gemma 4 ({type(error).__name__}: {error})') from None


# Orbax.


def _ours(kind, folder, item, cfg):
  cfg = cfg or orbax.read_config(folder)
  root = ('params',) if item == orbax.STATE else ()
  stored = {'/'.join(key[len(root):]): (key, shape, dtype) for key, (shape, dtype) in orbax.leaves(folder / item).items()
            if key[:len(root)] == root}
  wanted = {name: box.value.shape for name, box in flatten(transformer.abstract(cfg)).items()}
  users, lead = _stacks(cfg, wanted) if cfg.scan else ({name: (name,) for name in wanted}, {})
  source.compare({name: (*lead.get(name, ()), *wanted[names[0]]) for name, names in users.items()},
                 {name: shape for name, (_, shape, _) in stored.items()})

  def split(name):
    names = users[name]
    return lambda array: dict(zip(names, array.reshape(-1, *array.shape[2:]) if name in lead else [array]))

  pieces = tuple(source.Piece(name, source.float_dtype(name, stored[name][2]), stored[name][1], split(name)) for name in users)
  fetch = lambda names: orbax.read(folder / item, [stored[name][0] for name in names])
  home = folder.parent.parent if item == orbax.STATE and folder.parent.name == orbax.RUN else folder
  found = source.Source(kind, folder, home, cfg.replace(scan=False), pieces, fetch)
  return found if found.dtype == cfg.param_dtype else _stored_dtypes(found)


def _stacks(cfg, wanted):
  """({name of a stacked weight: the names of its rows; other weights: themselves}, {stacked weight: its two leading sizes})."""
  users = {name: (name,) for name in wanted if not name.startswith('layer_')}
  lead = {}
  for g, group in enumerate(cfg.groups):
    for run, (_, count) in enumerate(group.runs):
      layers = [layer for row in group.layers(run) for layer in row]
      first = f'layer_{layers[0]}/'
      for rest in (name[len(first):] for name in wanted if name.startswith(first)):
        name = f'group_{g}/run_{run}/{rest}'
        users[name], lead[name] = tuple(f'layer_{layer}/{rest}' for layer in layers), (group.repeats, count)
  return users, lead


def _google(folder, cfg):
  stored = orbax.leaves(folder)
  places, towers = google.places({key: shape for key, (shape, _) in stored.items()})
  cfg = cfg or _config_beside(folder) or google.infer(places)
  dtypes = {key: source.float_dtype('/'.join(key), dtype) for key, (_, dtype) in stored.items()}
  keys = {'/'.join(key): key for key in stored}
  fetch = lambda names: orbax.read(folder, [keys[name] for name in names])
  return _stored_dtypes(source.Source("Google's Orbax tree", folder, folder, cfg, tuple(google.pieces(cfg, places, dtypes)), fetch, towers))


def _config_beside(folder):
  """Of a config.json, theirs or ours (the model, or a run's config)."""
  if not os.path.lexists(folder / 'config.json'):
    return None
  fields = source.read_json(source.inside(folder, 'config.json'))
  if 'text_config' in fields or 'hidden_size' in fields:
    return _read_hf_config(folder)
  fields = fields.get('model', fields)
  source.check_depth(folder / 'config.json', fields.get('num_layers'))
  return model_config.from_dict(fields).replace(scan=False)


def _steps(folder):
  """Finished checkpoints of a run, oldest first; unfinished ones have longer names."""
  return sorted((entry for entry in folder.glob('[0-9]*') if entry.name.isdigit() and (entry / orbax.STATE).is_dir()),
                key=lambda entry: int(entry.name))
