"""TurboQuant_prod: one bit of each number goes to a sketch of the error, which makes inner products unbiased, and noisy.

Kept to show why it is off: at equal bits its inner products have several times the variance of the plain quantizer with the 'unbiased'
scale, which is unbiased too.

Sources: arXiv 2504.19874, algorithm 2; arXiv 2406.03482 (QJL), which is its case of 1 bit.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.turboquant import packing, rotation
from gemma4_jax.turboquant.quantizer import Codes, Quantizer

_STREAM = 1     # the sketch must not depend on the rotation, which is stream 0 of the seed


class ResidualCodes(NamedTuple):
  """Vectors [..., dim]; leading axes as of `Codes`."""
  base: Codes | None     # None at 1 bit, where all there is is the sketch of the vector itself
  signs: jax.Array       # uint8 [..., dim / 8]: signs of S r, r the error of `base`
  length: jax.Array      # scale_dtype [...]: |r|


@dataclasses.dataclass(frozen=True)
class Residual:
  """`bits` bits a number: bits - 1 by a Quantizer, and the sign of a random projection of its error.

  `sketch`: 'gaussian' (S of independent normals, as in the paper) or 'orthogonal' (random orthogonal S: 2.75 times less variance).
  """
  dim: int
  bits: int
  sketch: str = 'orthogonal'
  rotation: str = 'hadamard2'
  seed: int = 0
  scale_dtype: str = 'bfloat16'

  def __post_init__(self):
    if self.sketch not in ('orthogonal', 'gaussian'):
      raise ValueError(f"sketch={self.sketch!r}: must be 'orthogonal' or 'gaussian'")
    packing.bytes_per_row(self.bits, self.dim)
    packing.bytes_per_row(1, self.dim)
    _ = self.base

  @property
  def base(self) -> Quantizer | None:
    """What the first bits - 1 bits are; 'norm' is the paper's scale."""
    if self.bits == 1:
      return None
    return Quantizer(self.dim, self.bits - 1, self.rotation, self.seed, scale='norm', scale_dtype=self.scale_dtype)

  @property
  def matrix(self) -> np.ndarray:
    """S, float32 [dim, dim]."""
    return _sketch(self.sketch, self.dim, self.seed)

  @property
  def bits_per_number(self) -> float:
    base = self.base.bytes_per_vector if self.base else 0
    return 8 * (base + packing.bytes_per_row(1, self.dim) + jnp.dtype(self.scale_dtype).itemsize) / self.dim

  def encode(self, x: jax.Array) -> ResidualCodes:
    """[..., dim] of any float dtype -> ResidualCodes."""
    x = x.astype(jnp.float32)
    base = self.base.encode(x) if self.base else None
    rest = x - self.base.decode(base) if self.base else x
    signs = packing.pack(rotation.apply(self.matrix, rest) > 0, 1)
    return ResidualCodes(base, signs, jnp.linalg.norm(rest, axis=-1).astype(self.scale_dtype))

  def decode(self, codes: ResidualCodes) -> jax.Array:
    """ResidualCodes -> float32 [..., dim]."""
    sketched = rotation.apply(self.matrix.T, self._signs(codes))
    return sketched if self.base is None else sketched + self.base.decode(codes.base)

  def inner(self, q: jax.Array, codes: ResidualCodes) -> jax.Array:
    """q [..., M, dim], codes of vectors [..., N, dim] -> float32 inner products [..., M, N]; no vector is rotated back."""
    dot = lambda a, b: jnp.einsum('...md,...nd->...mn', a, b, precision='highest')
    sketched = dot(rotation.apply(self.matrix, q), self._signs(codes))
    return sketched if self.base is None else sketched + dot(self.base.rotate(q), self.base.decode_rotated(codes.base))

  def _signs(self, codes: ResidualCodes) -> jax.Array:
    # E S^T sign(S r) = dim E|s . r/|r|| r/|r| over rows s of S, so this factor makes it r.
    mean = math.sqrt(2 / math.pi) if self.sketch == 'gaussian' else math.exp(
        math.lgamma(self.dim / 2) - math.lgamma((self.dim + 1) / 2)) / math.sqrt(math.pi)
    signs = 2 * packing.unpack(codes.signs, 1).astype(jnp.float32) - 1
    return signs * (codes.length.astype(jnp.float32) / (self.dim * mean))[..., None]


@functools.lru_cache
def _sketch(kind: str, dim: int, seed: int) -> np.ndarray:
  make = {'orthogonal': lambda: rotation.haar(dim, seed, _STREAM), 'gaussian': lambda: rotation.normals((dim, dim), seed, _STREAM)}
  out = make[kind]().astype(np.float32)
  out.setflags(write=False)
  return out
