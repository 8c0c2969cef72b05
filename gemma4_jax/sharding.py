"""The mesh, and the one table that maps logical axes to it. No model file knows a mesh.

Programs are made for the mesh in use, `jax.set_mesh`: its devices need not be here.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import math

from flax import linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from gemma4_jax.config import nearest

AXES = ('data', 'fsdp', 'tensor', 'expert')

# Logical axis of a weight, of a cache or of activations -> mesh axis. Axes not named here are never split.
BATCH = ('data', 'fsdp')
RULES = (
    ('vocab', 'tensor'),             # of the input embedding and the head
    ('rows', ('fsdp', 'tensor')),    # of tables that are read by row alone
    ('embed', 'fsdp'),
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('mlp', 'tensor'),
    ('expert_mlp', 'tensor'),
    ('experts', 'expert'),
    ('batch', BATCH),
    ('gathered', 'data'),            # a batch, where 'embed' takes fsdp
)
WHOLE = ('kv_heads', 'batch', 'gathered')   # on every device where the mesh does not divide them: one K/V head, one prompt


def make_mesh(config: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of {axis: size}; an axis that is not named has size 1, and one size may be -1 and takes what is left of the devices.

  Args:
    devices: None: all that are here.
  Raises:
    ValueError: as `sizes`.
  """
  found = sizes(config, jax.device_count() if devices is None else len(devices))
  # linen's logical partitioning needs Auto axes; jax.make_mesh defaults to Explicit
  return jax.make_mesh(found, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def sizes(config: Mapping[str, int], count: int) -> tuple[int, ...]:
  """Of the AXES, of `make_mesh(config)` over `count` devices.

  Raises:
    ValueError: an axis that there is not, or sizes that do not multiply to the number of devices, with both numbers.
  """
  for axis in config:
    if axis not in AXES:
      raise ValueError(f'mesh: {axis!r} is none of {", ".join(AXES)}; did you mean {nearest(axis, AXES)!r}?')
  found = [config.get(axis, 1) for axis in AXES]
  known, filled = int(np.prod([size for size in found if size != -1])), -1 in found
  text = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, found))
  if found.count(-1) > 1 or any(size < 1 and size != -1 for size in found):
    raise ValueError(f'mesh: {text}: sizes are positive, and at most one is -1')
  if -1 in found and count % known == 0:
    found[found.index(-1)] = count // known
  if int(np.prod(found)) != count:
    asked = f'a multiple of {known} devices' if filled else f'{known} devices (-1 takes what is left)'
    raise ValueError(f'mesh: {text} asks for {asked}; there are {count}')
  return tuple(found)


def parse(text: str) -> dict[str, int]:
  """'fsdp=8,tensor=4' as `make_mesh` takes it. Raises ValueError."""
  try:
    pairs = [(axis.strip(), int(size)) for axis, size in (part.split('=') for part in text.split(',') if part)]
  except ValueError:
    raise ValueError(f'mesh: {text!r} is no list of AXIS=SIZE with commas between, as fsdp=8,tensor=4') from None
  if len(dict(pairs)) != len(pairs):
    raise ValueError(f'mesh: {text!r} names an axis twice')
  return dict(pairs)


def spec(mesh: Mesh | AbstractMesh, shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
  """How an array of logical `axes` is split; it may have more axes than are named, which stay whole.

  Raises:
    ValueError: a mesh axis that does not divide a dimension, with both numbers.
  """
  rules, used, found = dict(RULES), set(), []
  for size, name in zip(shape, axes):
    over = rules.get(name, ())
    over = tuple(axis for axis in ((over,) if isinstance(over, str) else over) if axis not in used)
    pieces = math.prod(mesh.shape[axis] for axis in over)
    if size % pieces and name not in WHOLE:
      raise ValueError(f'mesh.{"*".join(over)}: {pieces} does not divide {size} of {tuple(shape)} = {tuple(axes)}')
    over = () if size % pieces else over
    used.update(over)
    found.append(over if len(over) > 1 else over[0] if over else None)
  return PartitionSpec(*found)


def params(mesh: Mesh, boxes) -> dict:
  """A NamedSharding for every `layers.Param` box of a tree.

  Raises:
    ValueError: a mesh axis that does not divide a dimension, with both numbers and the weight's path.
  """
  def leaf(path, box):
    try:
      return NamedSharding(mesh, spec(mesh, box.value.shape, box.names))
    except ValueError as error:
      raise ValueError(f'{error} of {jax.tree_util.keystr(path)}') from None
  return jax.tree_util.tree_map_with_path(leaf, boxes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def variables(mesh: Mesh, boxes, tree) -> dict:
  """A NamedSharding for every array of what a model reads, {'params': ..., 'quant': ...}.

  Those of a quantized weight have outputs as rows and, if there are two axes, inputs as the other (`turboquant.weights`: codes [rows,
  inputs], scales [rows] or [groups, rows]); those of a placed PLE table are [V, ...].

  Args:
    boxes: as `params` takes them, of all weights.
    tree: of arrays or shapes.
  """
  declared = {_names(path): box for path, box in jax.tree_util.tree_leaves_with_path(
      boxes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))}

  def leaf(path, x):
    names = _names(path)[1:]
    box = declared.get(names)
    if box is None:
      return NamedSharding(mesh, spec(mesh, x.shape, ('rows',)))
    if x.shape == box.value.shape:
      return NamedSharding(mesh, spec(mesh, x.shape, box.names))
    scales = getattr(path[-1], 'name', None) == 'scale'
    rows = x.shape[-1] if scales else x.shape[0]
    outputs = next(n for n in range(1, len(box.names)) if math.prod(box.value.shape[:n]) == rows)
    over = spec(mesh, box.value.shape, box.names)
    if scales:
      return NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), over[0]))
    inputs = over[outputs] if x.ndim == 2 else None
    divides = inputs is not None and x.shape[1] % math.prod(mesh.shape[axis] for axis in np.ravel(inputs)) == 0
    return NamedSharding(mesh, PartitionSpec(over[0], *([inputs] if divides else [])))
  return jax.tree_util.tree_map_with_path(leaf, tree)


def _names(path) -> tuple[str, ...]:
  return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def stacked(one: NamedSharding) -> NamedSharding:
  """Of a stack of weights that are sharded like `one`: the leading axis stays whole."""
  return NamedSharding(one.mesh, PartitionSpec(None, *one.spec))


def batch(mesh: Mesh) -> NamedSharding:
  """Sequences are split over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh | AbstractMesh, tree) -> dict:
  """A NamedSharding for every array [B, ...] of what is kept of a batch of conversations. Those of more than two axes are keys and
  values, [B, K, ...]."""
  axes = lambda x: ('batch', 'kv_heads') if x.ndim > 2 else ('batch',)
  return jax.tree.map(lambda x: NamedSharding(mesh, spec(mesh, x.shape, axes(x))), tree)


def of(tree) -> Mesh | None:
  """The mesh that the arrays of a tree are on; None: on one device."""
  found = {leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if isinstance(getattr(leaf, 'sharding', None), NamedSharding)}
  return found.pop() if found else None


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """What is traced or run in it is for this mesh."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def in_use() -> AbstractMesh | None:
  """Of the context (`jax.set_mesh`), if it is one of `make_mesh` and has several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x`, split over the mesh in use as its logical axes say. Without a mesh, `x`."""
  mesh = in_use()
  return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, x.shape, axes)))


def constrain_rows(tree):
  """A tree as `rows` takes it, split so over the mesh in use. Without a mesh, the tree."""
  mesh = in_use()
  return tree if mesh is None else jax.lax.with_sharding_constraint(tree, rows(mesh, tree))


def by_rows(function: Callable, *args):
  """function(*args), by every device of the mesh in use for its own rows and K/V heads: for kernels, which the partitioner cannot split.

  Args:
    function: of arrays as `rows` takes them, to such arrays, each row and K/V head by itself.
  """
  mesh = in_use()
  if mesh is None:
    return function(*args)
  specs = lambda tree: jax.tree.map(lambda where: where.spec, rows(mesh, tree))
  return jax.shard_map(function, in_specs=specs(args), out_specs=specs(jax.eval_shape(function, *args)), check_vma=False)(*args)


def batch_shards() -> int:
  """Into how many parts the mesh in use splits a batch."""
  mesh = in_use()
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)
