"""Formats that others use, under the interface of the quantizers here: `encode`, `decode`, `bits_per_number` with scales counted.

They see the numbers as they are: what a rotation before them brings is `compose.Rotated`, what groups bring `compose.Grouped`.
EDEN and HIGGS are no baselines of their own: they are `Quantizer`, with scale 'unbiased' or 'least_squares', and with 'norm'.
Scales are float16, as in the originals, and codes are rounded against the scale that is stored.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from gemma4_jax.turboquant import packing


class Scaled(NamedTuple):
  """Vectors [..., dim] of one step each."""
  packed: jax.Array         # uint8 [..., bytes]
  step: jax.Array           # float16 [...]
  low: jax.Array | None     # float16 [...]: the least value; None where 0 is a level


@dataclasses.dataclass(frozen=True)
class Integer:
  """Equal steps, one pair of constants a vector.

  Symmetric: -(2**(bits-1) - 1)..2**(bits-1) - 1 times largest/(2**(bits-1) - 1). Else min-max: 2**bits levels from the least value to
  the largest (KIVI's, arXiv 2402.02750, and vLLM's 4-bit values). 8 bits symmetric in groups of 32 is ggml's q8_0.
  """
  dim: int
  bits: int
  symmetric: bool = True

  def __post_init__(self):
    packing.bytes_per_row(self.bits, self.dim)
    if self.symmetric and self.bits < 2:
      raise ValueError(f'bits={self.bits}: symmetric integers take 2 bits or more')

  @property
  def bits_per_number(self) -> float:
    return (8 * packing.bytes_per_row(self.bits, self.dim) + (16 if self.symmetric else 32)) / self.dim

  def encode(self, x: jax.Array) -> Scaled:
    """[..., dim] of any float dtype -> Scaled."""
    x, most = x.astype(jnp.float32), 2**(self.bits - 1) - 1
    if self.symmetric:
      step = (jnp.abs(x).max(-1) / most).astype(jnp.float16)
      return Scaled(packing.pack(jnp.clip(_steps(x, step), -most, most) + most, self.bits), step, None)
    low = x.min(-1).astype(jnp.float16)
    step = ((x.max(-1) - low) / (2**self.bits - 1)).astype(jnp.float16)
    return Scaled(packing.pack(jnp.clip(_steps(x - low[..., None], step), 0, 2**self.bits - 1), self.bits), step, low)

  def decode(self, codes: Scaled) -> jax.Array:
    """Scaled -> float32 [..., dim]."""
    values = packing.unpack(codes.packed, self.bits).astype(jnp.float32)
    step = codes.step.astype(jnp.float32)[..., None]
    return (values - (2**(self.bits - 1) - 1)) * step if self.symmetric else values * step + codes.low.astype(jnp.float32)[..., None]


@dataclasses.dataclass(frozen=True)
class Q4_0:
  """-8..7 times a step whose sign is chosen such that the number of largest size is -8.

  Source: ggml-org/llama.cpp, quantize_row_q4_0_ref; there in groups of 32.
  """
  dim: int = 32

  @property
  def bits_per_number(self) -> float:
    return 4 + 16 / self.dim

  def encode(self, x: jax.Array) -> Scaled:
    """[..., dim] of any float dtype -> Scaled."""
    x = x.astype(jnp.float32)
    largest = jnp.take_along_axis(x, jnp.abs(x).argmax(-1, keepdims=True), axis=-1)[..., 0]
    step = (largest / -8).astype(jnp.float16)
    return Scaled(packing.pack(jnp.clip(_steps(x, step), -8, 7) + 8, 4), step, None)

  def decode(self, codes: Scaled) -> jax.Array:
    """Scaled -> float32 [..., dim]."""
    return (packing.unpack(codes.packed, 4).astype(jnp.float32) - 8) * codes.step.astype(jnp.float32)[..., None]


@dataclasses.dataclass(frozen=True)
class NF4:
  """16 levels in -1..1 times the largest size: quantiles of a normal, 0 among them. Source: QLoRA, arXiv 2305.14314, groups of 64."""
  dim: int = 64

  @property
  def levels(self) -> np.ndarray:
    """float32 [16] ascending."""
    return _nf4()

  @property
  def bits_per_number(self) -> float:
    return 4 + 16 / self.dim

  def encode(self, x: jax.Array) -> Scaled:
    """[..., dim] of any float dtype -> Scaled."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1).astype(jnp.float16)
    stored = largest.astype(jnp.float32)[..., None]
    units = jnp.where(stored > 0, x / jnp.where(stored > 0, stored, 1), 0)
    return Scaled(packing.pack(jnp.searchsorted((self.levels[1:] + self.levels[:-1]) / 2, units, method='compare_all'), 4), largest, None)

  def decode(self, codes: Scaled) -> jax.Array:
    """Scaled -> float32 [..., dim]."""
    return jnp.asarray(self.levels)[packing.unpack(codes.packed, 4)] * codes.step.astype(jnp.float32)[..., None]


@dataclasses.dataclass(frozen=True)
class Float8:
  """A cast, saturating, without a scale: 'float8_e4m3fn' (up to 448) or 'float8_e5m2'."""
  dim: int
  dtype: str = 'float8_e4m3fn'
  bits_per_number = 8.0

  def encode(self, x: jax.Array) -> jax.Array:
    """[..., dim] of any float dtype -> the same shape in `dtype`."""
    most = float(jnp.finfo(self.dtype).max)
    return jnp.clip(x.astype(jnp.float32), -most, most).astype(self.dtype)

  def decode(self, codes: jax.Array) -> jax.Array:
    """-> float32 [..., dim]."""
    return codes.astype(jnp.float32)


def _steps(x: jax.Array, step: jax.Array) -> jax.Array:
  """Whole steps in x, int32; 0 where the step is 0. x [..., dim], step [...]."""
  step = step.astype(jnp.float32)[..., None]
  return jnp.where(step != 0, jnp.round(x / jnp.where(step != 0, step, 1)), 0).astype(jnp.int32)


@functools.lru_cache
def _nf4() -> np.ndarray:
  top = 0.9677083     # where quantiles end, of the authors' code (create_normal_map of bitsandbytes)
  positive = scipy.special.ndtri(np.linspace(0.5, top, 9))
  negative = -scipy.special.ndtri(np.linspace(top, 0.5, 8)[:-1])
  return (np.concatenate([negative, positive]) / positive[-1]).astype(np.float32)
