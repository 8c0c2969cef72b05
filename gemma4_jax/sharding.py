"""The mesh, and the one table that maps the logical axes of weights to it. No model file knows a mesh."""

from flax import linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import ml_collections
import numpy as np

AXES = ('data', 'fsdp', 'tensor', 'expert')

# Logical axis of a weight -> mesh axis. Axes not named here are never split.
RULES = (
    ('vocab', 'fsdp'),
    ('embed', 'fsdp'),
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('mlp', 'tensor'),
    ('expert_mlp', 'tensor'),
    ('experts', 'expert'),
)
BATCH = ('data', 'fsdp')


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
  """The mesh of `config.mesh` = {axis: size}; one size may be -1 and takes what is left of the devices.

  Raises:
    ValueError: sizes that do not multiply to the number of devices, with both numbers.
  """
  sizes = [config[axis] for axis in AXES]
  count = jax.device_count()
  known = int(np.prod([size for size in sizes if size != -1]))
  text = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f'mesh: {text}: sizes are positive, and at most one is -1')
  if -1 in sizes and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if int(np.prod(sizes)) != count:
    raise ValueError(f'mesh: {text} asks for a multiple of {known} devices; there are {count}')
  # linen's logical partitioning needs Auto axes; jax.make_mesh defaults to Explicit
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def params(mesh: Mesh, boxes) -> dict:
  """A NamedSharding for every `layers.Param` box of a tree.

  Raises:
    ValueError: a mesh axis that does not divide a dimension, with both numbers and the weight's path.
  """
  def leaf(path, box):
    spec = nn.logical_to_mesh_axes(box.names, RULES)
    sharding = NamedSharding(mesh, spec)
    for size, axis in zip(box.value.shape, spec):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(f'mesh.{axis}: {mesh.shape[axis]} does not divide {size} of {jax.tree_util.keystr(path)}, '
                         f'{box.value.shape} = {box.names}')
    return sharding
  return jax.tree_util.tree_map_with_path(leaf, boxes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def stacked(one: NamedSharding) -> NamedSharding:
  """Of a stack of weights that are sharded like `one`: the leading axis stays whole."""
  return NamedSharding(one.mesh, PartitionSpec(None, *one.spec))


def batch(mesh: Mesh) -> NamedSharding:
  """Sequences are split over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())
