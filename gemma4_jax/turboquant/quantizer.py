"""TurboQuant_mse: rotate, round every coordinate to one fixed table, keep one scale a vector.

Source: arXiv 2504.19874, algorithm 1. The scales other than 'norm' are EDEN's (ICML 2022; DRIVE, arXiv 2105.08339), of which
TurboQuant_mse is the case S = 1; the table on Hadamard-rotated vectors is HIGGS's (arXiv 2411.17525) at p = 1.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.turboquant import codebook, packing, rotation

SCALES = ('unbiased', 'norm_matched', 'least_squares', 'norm')
GRIDS = ('lloyd_max', 'exact', 'uniform', 'int8', 'absmax')
_AFFINE = ('uniform', 'absmax')


class Codes(NamedTuple):
  """Vectors [..., dim] in few bits; any leading axes, which both arrays share and may be sliced by."""
  packed: jax.Array    # uint8 [..., packing.bytes_per_row(bits, dim)]
  scale: jax.Array     # scale_dtype [...]: coordinate i of the rotated vector is scale * levels[code_i]


@dataclasses.dataclass(frozen=True)
class Quantizer:
  """Vectors of `dim` numbers as codes of `bits` bits and a scale.

  With y the rotated vector at mean square 1 and c its rounding, the vector is decoded as rms(x) * f * c, where f is, by `scale`:
    'unbiased'       dim / <y, c>: inner products with the decoded vector are right on average; for 4 bits and more
    'norm_matched'   sqrt(dim) / |c|: the decoded vector has the length of x; the compromise at 2 and 3 bits
    'least_squares'  <y, c> / |c|^2: the smallest error there is, and inner products too small by the distortion D
    'norm'           1: as in the paper; also too small by D
  `grid`: 'lloyd_max' (the best table for a normal coordinate), 'exact' (for one of `dim`), 'uniform' (equal steps, no table to read;
  for 6 bits and more), 'int8' (Lloyd-Max on integers), 'absmax' (equal steps up to the largest coordinate of each rotated vector: what
  int8 caches do; its error at 8 bits is half of 'uniform').
  `scale_dtype`: '' is bfloat16 up to 6 bits, and float32 above, where bfloat16 would add 7 % to the error. A bfloat16 scale is off by
  0.17 % (root mean square), which adds 2.8e-6 to the squared error, but all of it along x: from 5 bits on it is most of the error of
  inner products with a query near x. 'float16' has none of that in the same bytes; it wants vectors of root mean square 1e-4 to 65504.
  """
  dim: int
  bits: int
  rotation: str = 'hadamard2'
  seed: int = 0
  scale: str = 'unbiased'
  grid: str = 'lloyd_max'
  scale_dtype: str = ''

  def __post_init__(self):
    packing.bytes_per_row(self.bits, self.dim)
    for field, choices in (('rotation', rotation.KINDS), ('scale', SCALES), ('grid', GRIDS),
                           ('scale_dtype', ('', 'bfloat16', 'float16', 'float32'))):
      if getattr(self, field) not in choices:
        raise ValueError(f'{field}={getattr(self, field)!r}: must be one of {", ".join(map(repr, choices))}')
    if not self.scale_dtype:
      object.__setattr__(self, 'scale_dtype', 'bfloat16' if self.bits <= 6 else 'float32')
    _ = self.levels     # raises now if there is no such grid

  @property
  def matrix(self) -> np.ndarray:
    """The rotation, float32 [dim, dim]: rotated = matrix @ x."""
    return rotation.matrix(self.rotation, self.dim, self.seed)

  @property
  def levels(self) -> np.ndarray:
    """What codes mean, float32 [2**bits] ascending; those of 'uniform' and 'absmax' are equally spaced around 0."""
    return self._codebook.levels.astype(np.float32)

  @property
  def thresholds(self) -> np.ndarray:
    """Midpoints of the levels, float32 [2**bits - 1]: code = number of thresholds below the coordinate."""
    return self._codebook.thresholds.astype(np.float32)

  @property
  def bytes_per_vector(self) -> int:
    """Codes and scale."""
    return packing.bytes_per_row(self.bits, self.dim) + jnp.dtype(self.scale_dtype).itemsize

  @property
  def bits_per_number(self) -> float:
    return 8 * self.bytes_per_vector / self.dim

  def encode(self, x: jax.Array) -> Codes:
    """[..., dim] of any float dtype -> Codes. Computed in float32.

    Codes do not depend on the length of x. Zero becomes zero; coordinates that are not finite count as zero.
    """
    return self.encode_rotated(self.rotate(x))

  @functools.partial(jax.jit, static_argnums=0)
  def encode_rotated(self, y: jax.Array) -> Codes:
    """`encode` of vectors [..., dim] that are rotated already."""
    if y.shape[-1] != self.dim:
      raise ValueError(f'vectors of {y.shape[-1]} numbers where dim={self.dim} is expected')
    (codes,), scale = self.round([finite(y)])
    return Codes(packing.pack(codes, self.bits), scale[..., 0].astype(self.scale_dtype))

  def round(self, pieces: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Codes of each piece, int32 [..., n], and the scale, float32 [..., 1], of rotated vectors that come in pieces, float32 [..., n].

    The coordinates of a vector are those of all its pieces, as kernels hold them, and finite.
    """
    over = lambda reduce, combine, pieces: functools.reduce(combine, [reduce(y, axis=-1, keepdims=True) for y in pieces])
    total = functools.partial(over, jnp.sum, jnp.add)
    peak = over(jnp.max, jnp.maximum, [jnp.abs(y) for y in pieces])
    pieces = [_divide(y, peak) for y in pieces]                # so that no square over- or underflows
    rms = jnp.sqrt(total([jnp.square(y) for y in pieces]) / self.dim)
    pieces = [_divide(y, rms) for y in pieces]
    stretch = _divide(jnp.float32(1), rms) if self.grid == 'absmax' else jnp.ones_like(rms)   # the peak of y
    codes = [self._codes(_divide(y, stretch)) for y in pieces]
    found = [self.values(code) * stretch for code in codes]
    y_c = lambda: total([y * c for y, c in zip(pieces, found)])
    c_c = lambda: total([jnp.square(c) for c in found])
    factor = {'unbiased': lambda: _divide(self.dim, y_c()), 'norm_matched': lambda: jnp.sqrt(_divide(self.dim, c_c())),
              'least_squares': lambda: _divide(y_c(), c_c()), 'norm': lambda: 1.0}[self.scale]()
    return codes, peak * rms * factor * stretch

  def decode(self, codes: Codes) -> jax.Array:
    """Codes -> float32 [..., dim]."""
    return self.unrotate(self.decode_rotated(codes))

  @functools.partial(jax.jit, static_argnums=0)
  def decode_rotated(self, codes: Codes) -> jax.Array:
    """Codes -> float32 [..., dim] in the rotated space, where <rotate(q), decode_rotated(k)> = <q, decode(k)>."""
    return self.values(packing.unpack(codes.packed, self.bits)) * codes.scale.astype(jnp.float32)[..., None]

  def values(self, codes: jax.Array) -> jax.Array:
    """What unpacked codes [...] mean before the scale, float32 [...]."""
    if self.step is not None:
      return (codes.astype(jnp.float32) - (2**self.bits - 1) / 2) * self.step
    return jnp.asarray(self.levels)[codes]

  @property
  def step(self) -> np.float32 | None:
    """The distance between levels, where all are equally far apart: level i is (i - (2**bits - 1) / 2) * step; else None."""
    return np.float32(self._codebook.levels[-1] / ((2**self.bits - 1) / 2)) if self.grid in _AFFINE else None

  def rotate(self, x: jax.Array) -> jax.Array:
    """[..., dim] -> float32 [..., dim]; coordinates that are not finite count as zero."""
    return rotation.apply(self.matrix, finite(x))

  def unrotate(self, y: jax.Array) -> jax.Array:
    """The inverse of `rotate`."""
    return rotation.apply(self.matrix.T, y)

  @property
  def _codebook(self) -> codebook.Codebook:
    return _codebook(self.grid, self.bits, self.dim)

  def _codes(self, y: jax.Array) -> jax.Array:
    if self.step is not None:
      return jnp.clip(jnp.ceil(y / self.step) + (2**(self.bits - 1) - 1), 0, 2**self.bits - 1).astype(jnp.int32)
    # By comparing with every threshold: XLA fuses it, and 15 compares are 50 times as fast on a CPU as the loop of searchsorted.
    return sum(((y > float(t)).astype(jnp.uint8) for t in self.thresholds), jnp.zeros(y.shape, jnp.uint8)).astype(jnp.int32)


@functools.lru_cache
def _codebook(grid: str, bits: int, dim: int) -> codebook.Codebook:
  if grid == 'exact':
    return codebook.exact(bits, dim)
  if grid == 'absmax':
    levels = np.linspace(-1, 1, 2**bits)
    return codebook.Codebook(levels, (levels[1:] + levels[:-1]) / 2, float('nan'))
  return {'lloyd_max': codebook.gaussian, 'uniform': codebook.uniform, 'int8': codebook.int8_grid}[grid](bits)


def finite(x: jax.Array) -> jax.Array:
  """float32, with 0 for what is not finite."""
  return jnp.nan_to_num(x.astype(jnp.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _divide(a, b: jax.Array) -> jax.Array:
  """a / b, and 0 where b is 0."""
  return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
