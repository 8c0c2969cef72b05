"""Quantizers made of quantizers: in groups, across tokens, after a rotation, and with more bits for some channels.

`inner`, `outliers`, `rest` are anything with `dim`, `encode`, `decode` and `bits_per_number`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.turboquant import rotation


@dataclasses.dataclass(frozen=True)
class Grouped:
  """Every run of `inner.dim` numbers on its own: codes have one axis more, the groups."""
  dim: int
  inner: Any

  def __post_init__(self):
    if self.dim % self.inner.dim:
      raise ValueError(f'dim={self.dim}: no multiple of the group, {self.inner.dim}')

  @property
  def bits_per_number(self) -> float:
    return self.inner.bits_per_number

  def encode(self, x: jax.Array):
    """[..., dim] -> codes of `inner` for [..., dim / inner.dim, inner.dim]."""
    return self.inner.encode(x.reshape(*x.shape[:-1], self.dim // self.inner.dim, self.inner.dim))

  def decode(self, codes) -> jax.Array:
    """-> float32 [..., dim]."""
    x = self.inner.decode(codes)
    return x.reshape(*x.shape[:-2], self.dim)


@dataclasses.dataclass(frozen=True)
class PerChannel:
  """Every run of `inner.dim` tokens of one channel on its own, as KIVI does with keys (arXiv 2402.02750)."""
  dim: int
  inner: Any

  @property
  def bits_per_number(self) -> float:
    return self.inner.bits_per_number

  def encode(self, x: jax.Array):
    """[..., tokens, dim], tokens a multiple of `inner.dim` -> codes of `inner` for [..., dim, tokens / inner.dim, inner.dim].

    Raises:
      ValueError: the last group of tokens is not full; KIVI keeps such tokens as they are.
    """
    return Grouped(x.shape[-2], self.inner).encode(jnp.swapaxes(x, -1, -2))

  def decode(self, codes) -> jax.Array:
    """-> float32 [..., tokens, dim]."""
    x = self.inner.decode(codes)
    return jnp.swapaxes(x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]), -1, -2)


@dataclasses.dataclass(frozen=True)
class Rotated:
  """`inner` in the space of a random rotation over all of its dim."""
  inner: Any
  rotation: str = 'hadamard2'
  seed: int = 0

  @property
  def dim(self) -> int:
    return self.inner.dim

  @property
  def matrix(self) -> np.ndarray:
    return rotation.matrix(self.rotation, self.dim, self.seed)

  @property
  def bits_per_number(self) -> float:
    return self.inner.bits_per_number

  def encode(self, x: jax.Array):
    """[..., dim] -> codes of `inner`."""
    return self.inner.encode(rotation.apply(self.matrix, x))

  def decode(self, codes) -> jax.Array:
    """-> float32 [..., dim]."""
    return rotation.apply(self.matrix.T, self.inner.decode(codes))


class SplitCodes(NamedTuple):
  outliers: Any
  rest: Any


@dataclasses.dataclass(frozen=True)
class Split:
  """Some channels with more bits than the rest, two quantizers independent of each other, for "2.5" and "3.5" bits.

  Better than one quantizer of the average only where these channels hold more than their share of the energy.
  Source: arXiv 2504.19874; there 32 of 128 channels, 3 bits over 2 or 4 over 3, so 2.25 or 3.25 bits and two scales.
  """
  channels: tuple[int, ...]
  outliers: Any
  rest: Any

  def __post_init__(self):
    if len(set(self.channels)) != self.outliers.dim or not set(self.channels) <= set(range(self.dim)):
      raise ValueError(f'channels: must be {self.outliers.dim} different ones (outliers.dim) of 0..{self.dim - 1}')

  @property
  def dim(self) -> int:
    return self.outliers.dim + self.rest.dim

  @property
  def bits_per_number(self) -> float:
    return sum(part.bits_per_number * part.dim for part in (self.outliers, self.rest)) / self.dim

  def encode(self, x: jax.Array) -> SplitCodes:
    """[..., dim] -> SplitCodes."""
    parts = x[..., self._order[:self.outliers.dim]], x[..., self._order[self.outliers.dim:]]
    return SplitCodes(self.outliers.encode(parts[0]), self.rest.encode(parts[1]))

  def decode(self, codes: SplitCodes) -> jax.Array:
    """-> float32 [..., dim]."""
    parts = [self.outliers.decode(codes.outliers), self.rest.decode(codes.rest)]
    return jnp.concatenate(parts, axis=-1)[..., np.argsort(self._order)]

  @property
  def _order(self) -> np.ndarray:
    """Outliers first."""
    rest = [i for i in range(self.dim) if i not in set(self.channels)]
    return np.array([*self.channels, *rest])
