"""Matrices in few bits: what a format keeps of one, and what multiplying with it means.

  int8                a float32 scale for each output: number = code * scale; absolute maximum, symmetric
  int4                a float16 scale for each 32 inputs, codes -8..7: ggml's q4_0, 4.5 bits
  nf4                 a float16 scale for each 64 inputs, 16 quantiles of a normal: QLoRA's, 4.25 bits
  turboquant2 .. 8    (2, 3, 4, 5, 6, 8) each 128 inputs rotated by one fixed matrix and rounded to one table, a 16-bit scale for them:
                      4.125 bits at 4. Lloyd-Max up to 5 bits, equal steps above (`quantizer`)

Weights are [out, in]: a row is what one output reads, packed as a whole (`packing`). Where the number of inputs is no multiple of a
group, groups are the largest power of two that divides it: 64 of 704. Inputs are rotated, not weights turned back: <w, x> = <Rw, Rx>.

Source of the recipe: arXiv 2504.19874 (TurboQuant) in groups, as HIGGS (arXiv 2411.17525) has it for weights.
"""

import dataclasses
from functools import lru_cache, partial
import math

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax import hardware
from gemma4_jax.turboquant import baselines, packing, rotation
from gemma4_jax.turboquant.quantizer import Quantizer

TURBOQUANT = {f'turboquant{bits}': bits for bits in (2, 3, 4, 5, 6, 8)}
FORMATS = ('int8', 'int4', 'nf4', *TURBOQUANT)
_GROUP = {'int4': 32, 'nf4': 64}       # numbers that share a scale, at most; 128 of the others
_ROWS_BYTES = 2**28     # of a matrix that are converted at once, in float32
_TILE = 2**20           # numbers of a matrix that are decoded at once where it is multiplied


@partial(jax.tree_util.register_dataclass, data_fields=['codes', 'scale'], meta_fields=['format', 'shape'])
@dataclasses.dataclass(frozen=True)
class Weight:
  """A weight of `shape` [*out, *in] in the place of an array.

  Attributes:
    codes: uint8 [rows, bytes of a row]; of 'int8': int8 [rows, columns].
    scale: bfloat16 or float16 [groups, rows]; of 'int8': float32 [rows].
  """
  codes: jax.Array
  scale: jax.Array
  format: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return self.codes.nbytes + self.scale.nbytes

  @property
  def columns(self) -> int:
    return math.prod(self.shape) // self.codes.shape[0]

  @property
  def group(self) -> int:
    """Inputs that share a scale."""
    return self.columns if self.format == 'int8' else self.columns // self.scale.shape[0]

  def decode(self, dtype=jnp.float32) -> jax.Array:
    """The whole weight, of `shape`."""
    return self._numbers(self.codes, self.scale, dtype).reshape(self.shape)

  def take(self, ids: jax.Array, dtype) -> jax.Array:
    """Rows of a table [V, ...]: [*ids.shape, *shape[1:]]."""
    scale = jnp.take(self.scale, ids.reshape(-1), axis=-1)
    rows = self._numbers(jnp.take(self.codes, ids.reshape(-1), axis=0), scale, dtype)
    return rows.reshape(*ids.shape, *self.shape[1:])

  def part(self, i: jax.Array) -> 'Weight':
    """Of a stack [E, *out, *in]: its i-th weight."""
    rows = self.codes.shape[0] // self.shape[0]
    cut = partial(jax.lax.dynamic_slice_in_dim, start_index=i * rows, slice_size=rows)
    return Weight(cut(self.codes, axis=0), cut(self.scale, axis=self.scale.ndim - 1), self.format, self.shape[1:])

  def rotate(self, x_RK: jax.Array) -> jax.Array:
    """Inputs as the codes want them, of the same dtype. It is the same for all weights that read x, and XLA computes it once."""
    if self.format not in TURBOQUANT:
      return x_RK
    return _in_groups(_rotation(self.group), x_RK).astype(x_RK.dtype)

  def dot(self, x_RK: jax.Array, implementation: str | None = None) -> jax.Array:
    """x w^T, float32 [R, N]; products are of the dtype of x.

    Args:
      implementation: 'xla': of packed formats `_TILE` numbers are decoded at a time, also for gradients of x. 'pallas_tpu', 'pallas_gpu',
        'interpret': the kernel. None: the kernel of the device (`hardware.kernels`); 'xla' where it has none for them, and on meshes.
    Raises:
      NotImplementedError: the kernel cannot take the shapes; the message has the reason.
    """
    if implementation is None:
      implementation, _ = self.chosen(x_RK)
    if implementation not in (None, 'xla'):
      return _kernels().dot(self, x_RK, implementation.removeprefix('pallas_'))
    if self.format == 'int8':
      return _dot(x_RK, self.codes.astype(x_RK.dtype)) * self.scale
    x_RK, N = self.rotate(x_RK), self.codes.shape[0]
    rows = next(n for n in range(max(1, min(N, _TILE // self.columns)), 0, -1) if N % n == 0)

    @jax.checkpoint     # or the backward pass would keep every decoded tile
    def tile(x_RK, start):
      codes = jax.lax.dynamic_slice_in_dim(self.codes, start, rows, 0)
      scale = jax.lax.dynamic_slice_in_dim(self.scale, start, rows, 1)
      return _dot(x_RK, self._rotated(codes, scale).astype(x_RK.dtype))

    if rows == N:
      return tile(x_RK, 0)
    _, y = jax.lax.scan(lambda _, start: (None, tile(x_RK, start)), None, jnp.arange(0, N, rows))
    return jnp.moveaxis(y, 0, 1).reshape(len(x_RK), N)

  def chosen(self, x_RK: jax.Array | jax.ShapeDtypeStruct) -> tuple[str, str]:
    """(what runs `dot` of these inputs, why it is not a kernel or '')."""
    device = hardware.kernels()
    if not device:
      return 'xla', 'there is none for this device'
    if jax.sharding.get_abstract_mesh().size > 1:   # 0 without a mesh
      return 'xla', 'a kernel is not split over a mesh'
    why_not = _kernels().unsupported(self, x_RK, device)
    return ('xla' if why_not else device), why_not

  def _rotated(self, codes, scale):
    """Numbers float32 [rows, columns] of some rows, as they are stored."""
    values = lookup(packing.unpack(codes, bits(self.format)), levels(self.format))
    return (values.reshape(len(codes), -1, self.group) * scale.T.astype(jnp.float32)[..., None]).reshape(len(codes), -1)

  def _numbers(self, codes, scale, dtype):
    if self.format == 'int8':
      return (codes.astype(jnp.float32) * scale[:, None]).astype(dtype)
    numbers = self._rotated(codes, scale)
    return (_in_groups(_rotation(self.group).T, numbers) if self.format in TURBOQUANT else numbers).astype(dtype)


def bits(format: str) -> int:
  """Of a code."""
  return 8 if format == 'int8' else TURBOQUANT.get(format, 4)


@lru_cache
def levels(format: str) -> np.ndarray:
  """What codes of a packed format mean in units of their scale, float32 [2**bits] ascending."""
  if format == 'int4':
    return np.arange(-8, 8, dtype=np.float32)
  return _quantizer(format, 64).levels    # of groups of any size


def lookup(codes: jax.Array, levels: np.ndarray) -> jax.Array:
  """levels[codes], float32, without a gather: those lower on few devices and are slow on the others.

  Equal steps are a product and a sum; symmetric levels are looked up by size, half as many selects as levels.
  """
  codes, top = codes.astype(jnp.int32), len(levels) - 1
  if np.ptp(np.diff(levels)) < 1e-4 * np.ptp(levels) / top:
    step = float((levels[-1] - levels[0]) / top)
    return (codes.astype(jnp.float32) + float(levels[0]) / step) * step
  if not np.array_equal(levels, -levels[::-1]):
    return _select(codes, levels)
  half = len(levels) // 2
  upper = codes >= half
  size = _select(jnp.where(upper, codes - half, top - half - codes), levels[half:])
  return jnp.where(upper, size, -size)


def _select(codes, levels):
  found = [jnp.full_like(codes, float(level), jnp.float32) for level in levels]
  for bit in range(len(levels).bit_length() - 1):
    odd = (codes >> bit) & 1 != 0
    found = [jnp.where(odd, high, low) for low, high in zip(found[::2], found[1::2])]
  return found[0]


def layout(shape: tuple[int, ...], format: str, inputs: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
  """What `encode` makes of a weight [*out, *in]: 'codes' and 'scale'.

  Raises:
    ValueError: no such format, or it cannot take so many inputs.
  """
  if format not in FORMATS:
    raise ValueError(f'weights: {format!r} is none of {", ".join(FORMATS)}')
  columns = math.prod(shape[len(shape) - inputs:])
  rows = math.prod(shape) // columns
  if format == 'int8':
    return {'codes': jax.ShapeDtypeStruct((rows, columns), jnp.int8), 'scale': jax.ShapeDtypeStruct((rows,), jnp.float32)}
  if columns % 8:
    raise ValueError(f'weights: {format!r} takes multiples of 8 inputs, and a weight {list(shape)} has {columns}: leave its group as_is, '
                     "or take 'int8'")
  scale = (columns // _group(format, columns), rows)
  return {'codes': jax.ShapeDtypeStruct((rows, packing.bytes_per_row(bits(format), columns)), jnp.uint8),
          'scale': jax.ShapeDtypeStruct(scale, _SCALE.get(format, jnp.float16))}


def encode(w: jax.Array | np.ndarray, format: str, inputs: int = 1) -> Weight:
  """A weight of float32 or bfloat16, [*out, *in], in a format of FORMATS.

  Args:
    w: of numpy arrays, also memory-mapped ones, some rows at a time are read.
    inputs: how many of the last axes are summed when it is multiplied.
  Raises:
    ValueError: as `layout`.
  """
  made = layout(w.shape, format, inputs)
  columns = math.prod(w.shape[w.ndim - inputs:])
  rows = w.reshape(-1, columns)
  step = max(1, _ROWS_BYTES // (4 * columns))
  parts = [_encode(rows[start:start + step], format) for start in range(0, len(rows), step)]
  codes, scale = (part[0] if len(part) == 1 else jnp.concatenate(part, axis) for part, axis in zip(zip(*parts), (0, -1)))
  assert (codes.shape, scale.shape) == (made['codes'].shape, made['scale'].shape)
  return Weight(codes, scale, format, tuple(w.shape))


@partial(jax.jit, static_argnums=1)
def _encode(rows_NK, format):
  rows_NK = rows_NK.astype(jnp.float32)
  N, K = rows_NK.shape
  if format == 'int8':
    scale_N = jnp.abs(rows_NK).max(-1) / 127
    return jnp.rint(rows_NK / jnp.where(scale_N == 0, 1, scale_N)[:, None]).clip(-127, 127).astype(jnp.int8), scale_N
  group = _group(format, K)
  packed, scale_NG = _quantizer(format, group).encode(rows_NK.reshape(N, K // group, group))[:2]
  # repacked as one row: runs of codes at one shift then reach over whole groups, as kernels like them
  return packing.pack(packing.unpack(packed, bits(format)).reshape(N, K), bits(format)), scale_NG.T


_SCALE = {**dict.fromkeys(TURBOQUANT, jnp.bfloat16), 'turboquant8': jnp.float16}   # bfloat16 would be 7 % of the error of 8 bits


@lru_cache
def _quantizer(format: str, group: int):
  """Of one group."""
  if format == 'int4':
    return baselines.Q4_0(group)
  if format == 'nf4':
    return baselines.NF4(group)
  bits = TURBOQUANT[format]
  return Quantizer(group, bits, scale='unbiased' if bits >= 4 else 'norm_matched', scale_dtype=jnp.dtype(_SCALE[format]).name,
                   grid='lloyd_max' if bits <= 5 else 'uniform' if bits == 6 else 'absmax')


def _group(format: str, columns: int) -> int:
  return math.gcd(columns, _GROUP.get(format, 128))


def _rotation(group: int) -> np.ndarray:
  return rotation.matrix('hadamard2', group)


def _in_groups(matrix, x):
  return rotation.apply(matrix, x.reshape(*x.shape[:-1], -1, len(matrix))).reshape(x.shape)


def _kernels():
  from gemma4_jax.turboquant import pallas_weights  # late: it imports this file, and Pallas takes its time to load

  return pallas_weights


def _dot(x_RK, w_NK):
  return jax.lax.dot_general(x_RK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
