"""The parts every room of the model shares: where weights are declared and read, norms, RoPE, the gated MLP."""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
import math
import re
import zlib

from flax import linen as nn, struct
import jax
import jax.numpy as jnp

from gemma4_jax.config import ModelConfig
from gemma4_jax.native import matvec
from gemma4_jax.turboquant.weights import Weight, levels


class Param(nn.LogicallyPartitioned):
  """A declared weight: its value (or shape), the logical axes that `sharding` maps to a mesh, and its initialiser."""
  init: Callable | None = struct.field(default=None, pytree_node=False)


@lru_cache
def normal(std: float) -> Callable:
  return nn.initializers.normal(std)


@lru_cache
def constant(value: float) -> Callable:
  return nn.initializers.constant(value)


def declare(module: nn.Module, name: str, init: Callable, shape: Sequence[int], axes: Sequence[str]) -> jax.Array:
  """The weight `name` of `module` (which has a `cfg`), in `cfg.param_dtype`."""
  def boxed(key, shape, dtype):
    return Param(init(key, shape, dtype), names=tuple(axes), init=init)
  return module.param(name, boxed, tuple(shape), jnp.dtype(module.cfg.param_dtype))


def weight(module: nn.Module, name: str, init: Callable, shape: Sequence[int], axes: Sequence[str]) -> jax.Array | Weight:
  """As `declare`, but of the collection `quant`, if the weight is there: see `model.quantized`."""
  if module.has_variable('quant', name):
    found = module.get_variable('quant', name)
    if found.shape != tuple(shape):
      raise ValueError(f'{"/".join((*module.path, name))}: quantized weights of shape {found.shape}; this model has {tuple(shape)}')
    return found
  return declare(module, name, init, shape, axes)


def init_params(module: nn.Module, seed: int, *args, shardings: dict | None = None, **kwargs) -> dict:
  """Initialises leaf by leaf: a weight's value depends on the seed, its path and its shape alone.

  So two models that share a weight's name and shape start from the same numbers (paired ablations), nothing is compiled
  but one small program a shape, and the tree can be larger than one program should be.

  Args:
    *args, **kwargs: what `module.__call__` takes; shapes only.
    shardings: of every weight; None: the default device.
  Returns:
    the tree of plain arrays under 'params'.
  """
  root = jax.random.key(seed)

  def leaf(path, box, where=None):
    key = jax.random.fold_in(root, zlib.crc32(jax.tree_util.keystr(path).encode()))
    return _draw(box.init, box.value.shape, box.value.dtype, where)(key)

  boxes = abstract_params(module, *args, **kwargs)
  rest = () if shardings is None else (shardings,)
  return jax.tree_util.tree_map_with_path(leaf, boxes, *rest, is_leaf=lambda x: isinstance(x, Param))


def abstract_params(module: nn.Module, *args, **kwargs) -> dict:
  """The tree of `Param` boxes around shapes: nothing is allocated or compiled."""
  init = partial(module.init, **kwargs)
  return jax.eval_shape(init, jax.random.key(0), *args)['params']


@cache
def _draw(init, shape, dtype, where):
  # in float32 whatever the dtype: jax draws a bfloat16 normal from 7 random bits, and models of two dtypes should start alike
  draw = lambda key, shape: init(key, shape, jnp.float32).astype(dtype)
  if math.prod(shape) <= 2**28:
    return jax.jit(lambda key: draw(key, shape), out_shardings=where)
  # the random bits of a PLE table would take ten times its own memory
  rows = next(n for n in range(min(shape[0], max(1, 2**24 // math.prod(shape[1:]))), 0, -1) if shape[0] % n == 0)

  def in_parts(key):
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(shape[0] // rows))
    return jax.lax.map(lambda key: draw(key, (rows, *shape[1:])), keys).reshape(shape)
  return jax.jit(in_parts, out_shardings=where)


def contract(x: jax.Array, w: jax.Array | Weight, axes: int, dtype=None, rows: str = 'xla') -> jax.Array:
  """Sums over the last `axes` axes of both: x [..., in], w [out, in] -> [..., out]; `dtype` of the result, default x's.

  As one matmul of two matrices: XLA would bring an einsum of more axes into that form with a transposed copy of each
  activation in the backward pass, which on a CPU took a quarter of a training step.

  Args:
    rows: how few rows run, `cfg.matvec`; 'native' says that this is a CPU, and that nobody asks for gradients.
  """
  dim = math.prod(x.shape[-axes:])
  x_RK = x.reshape(-1, dim)
  native = rows == 'native' and len(x_RK) <= matvec.MAX_ROWS
  if isinstance(w, Weight):
    y = (_native(x_RK, w) if native else w.dot(x_RK)).astype(dtype or x.dtype)
    return y.reshape(*x.shape[:-axes], *w.shape[:-axes])
  w_NK = w.reshape(-1, dim)
  if native:
    y = matvec.dot(x_RK, w_NK).astype(dtype or x.dtype)
  else:
    # on a CPU XLA multiplies in bfloat16 only where the sums are float32; else it converts the weights, and takes three times as long
    sums = jnp.float32 if rows == 'native' else dtype
    y = jax.lax.dot_general(x_RK, w_NK.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=sums).astype(dtype or x.dtype)
  return y.reshape(*x.shape[:-axes], *w.shape[:-axes])


def _native(x_RK, w):
  if w.format == 'int8':
    return matvec.dot(x_RK, w.codes, w.scale)
  return matvec.dot_codes(w.rotate(x_RK.astype(jnp.float32)), w.codes, w.scale, levels(w.format))


class Einsum(nn.Module):
  """`einsum(eqn, x, w)` with a weight of `shape`, cast to the dtype of x; every matmul of the model passes here.

  The axes that are summed are the last of both. `fan_in` is the number of summed products: the initial standard deviation
  is fan_in**-0.5.
  """
  cfg: ModelConfig
  eqn: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  fan_in: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    w = weight(self, 'w', normal(self.fan_in**-0.5), self.shape, self.axes)
    x_letters, w_letters, _ = re.split(',|->', self.eqn)
    return contract(x, w, axes=len(set(x_letters) & set(w_letters)), rows=self.cfg.matvec)


class Embed(nn.Module):
  """A table [V, ...] read by row; rows come out in `cfg.dtype`. Initial standard deviation `std`."""
  cfg: ModelConfig
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  std: float

  def setup(self):
    self.table = weight(self, 'table', normal(self.std), self.shape, self.axes)

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Args: ids: int32 in [0, V), any shape. Returns: [*ids.shape, *shape[1:]]."""
    if isinstance(self.table, Weight):
      return self.table.take(ids, self.cfg.dtype)
    return take(self.table, ids).astype(self.cfg.dtype)


def take(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Rows of a table: jnp.take(table, ids, axis=0)."""
  rows = partial(jnp.take, axis=0)

  def inside(table, ids):   # a branch, out of which XLA:CPU cannot move its float32 copy of a whole bfloat16 table (E2B's: 9.4 GB)
    return jax.lax.cond(ids.max() < 0, lambda table, ids: jnp.zeros((*ids.shape, *table.shape[1:]), table.dtype), rows, table, ids)

  return jax.lax.platform_dependent(table, ids, cpu=inside if table.dtype == jnp.bfloat16 else rows, default=rows)


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis, in float32 inside; `scale=False` leaves the weight out."""
  cfg: ModelConfig
  scale: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = _unit_rms(x.astype(jnp.float32), self.cfg.norm_eps)
    if self.scale:
      y = y * declare(self, 'scale', constant(1.0), x.shape[-1:], ('norm',)).astype(jnp.float32)
    return y.astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _unit_rms(x, eps):
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


@_unit_rms.defjvp
def _unit_rms_jvp(eps, primals, tangents):
  """In two passes over the activations instead of the four of a derivative step by step."""
  (x,), (dx,) = primals, tangents
  r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  y = x * r
  return y, r * (dx - y * jnp.mean(y * dx, axis=-1, keepdims=True))


def activation(cfg: ModelConfig, x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=True) if cfg.activation == 'gelu' else jax.nn.silu(x)


class MLP(nn.Module):
  """(act(x Wg) * (x Wu)) Wd, without biases; `up_BTF` given, it stands in for x Wu (the STEM arm)."""
  cfg: ModelConfig
  dim: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array, up_BTF: jax.Array | None = None) -> jax.Array:
    cfg, D, F = self.cfg, x_BTD.shape[-1], self.dim
    into = partial(Einsum, cfg, 'BTD,FD->BTF', (F, D), ('mlp', 'embed'), D)
    up_BTF = into(name='up')(x_BTD) if up_BTF is None else up_BTF
    h_BTF = activation(cfg, into(name='gate')(x_BTD)) * up_BTF if cfg.gated_mlp else activation(cfg, up_BTF)
    return Einsum(cfg, 'BTF,DF->BTD', (D, F), ('embed', 'mlp'), F, name='down')(h_BTF)


def rope_angles(pos_BT: jax.Array, head_dim: int, base: float, fraction: float) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), each float32 [B, T, H/2]; bfloat16 could not tell position 257 from 256.

  Channel i is paired with i + H/2. The first int(fraction * H // 2) pairs turn by pos * base**(-2j/H), the others not:
  the denominator is the whole head ("proportional" RoPE; transformers `_compute_proportional_rope_parameters`).
  """
  half, turning = head_dim // 2, int(fraction * head_dim // 2)
  j = jnp.arange(half, dtype=jnp.float32)
  freq_H = jnp.where(j < turning, base ** (-2 * j / head_dim), 0.0)

  def angles(pos_BT):
    angle_BTH = pos_BT.astype(jnp.float32)[..., None] * freq_H
    return jnp.cos(angle_BTH), jnp.sin(angle_BTH)

  def once(pos_BT):   # XLA:CPU, could it see through to them, would compute them again for every head of every layer, each way
    zeros = jnp.zeros((*pos_BT.shape, half))
    return jax.lax.cond(pos_BT.max() < 0, lambda _: (zeros, zeros), angles, pos_BT)

  return jax.lax.platform_dependent(pos_BT, cpu=once, default=angles)



def rope(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the heads by `rope_angles`, in float32 inside."""
  cos, sin = (a[:, :, None, :] for a in angles)
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
