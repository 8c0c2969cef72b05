"""Every method of this room by name, so that tables and experiments walk them all."""

from collections.abc import Callable
import difflib
from typing import Any, Protocol

import jax

from gemma4_jax.turboquant.baselines import NF4, Q4_0, Float8, Integer
from gemma4_jax.turboquant.compose import Grouped, PerChannel, Rotated, Split
from gemma4_jax.turboquant.polar import PolarQuant
from gemma4_jax.turboquant.quantizer import Quantizer
from gemma4_jax.turboquant.residual import Residual


class Method(Protocol):
  """Vectors [..., dim] in few bits. Codes are a pytree of arrays."""
  dim: int

  @property
  def bits_per_number(self) -> float:
    """Bits stored over numbers kept, scales counted."""

  def encode(self, x: jax.Array) -> Any:
    """[..., dim] of any float dtype -> codes. 'kivi_keys2' wants [..., tokens, dim], tokens a multiple of 32."""

  def decode(self, codes: Any) -> jax.Array:
    """-> float32 of the shape that was encoded."""


def make(name: str, dim: int) -> Method:
  """The method for vectors of `dim` numbers.

  Raises:
    ValueError: no such name, or the method cannot take this `dim`.
  """
  if name not in METHODS:
    nearest = difflib.get_close_matches(name, METHODS, 1, 0)
    raise ValueError(f'method {name!r}: no such method; did you mean {nearest[0]!r}? There are {", ".join(METHODS)}')
  return METHODS[name](dim)


def _fractional(bits: int) -> Callable[[int], Method]:
  # Which channels are outliers is for data to say; here the first, as tables of distortion need any.
  return lambda dim: Split(tuple(range(dim // 4)), Quantizer(dim // 4, bits + 1), Quantizer(dim - dim // 4, bits))


def _methods() -> dict[str, Callable[[int], Method]]:
  out = {}
  for b in range(1, 9):
    out[f'turboquant{b}'] = lambda dim, b=b: Quantizer(dim, b)
    out[f'turboquant{b}_norm'] = lambda dim, b=b: Quantizer(dim, b, scale='norm')
  for b in range(1, 5):
    for scale in ('norm_matched', 'least_squares'):
      out[f'turboquant{b}_{scale}'] = lambda dim, b=b, scale=scale: Quantizer(dim, b, scale=scale)
  for b in range(3, 9):
    out[f'turboquant{b}_uniform'] = lambda dim, b=b: Quantizer(dim, b, grid='uniform')
  for b in range(3, 7):
    out[f'turboquant{b}_int8'] = lambda dim, b=b: Quantizer(dim, b, grid='int8')
  for b in (4, 8):
    out[f'turboquant{b}_absmax'] = lambda dim, b=b: Quantizer(dim, b, grid='absmax')
  for b in (4, 5, 6):
    out[f'turboquant{b}_float16'] = lambda dim, b=b: Quantizer(dim, b, scale_dtype='float16')
  for kind in ('hadamard1', 'haar', 'none'):
    out[f'turboquant4_{kind}'] = lambda dim, kind=kind: Quantizer(dim, 4, rotation=kind)
  out['turboquant2.5'], out['turboquant3.5'] = _fractional(2), _fractional(3)
  for group in (32, 128):
    out[f'turboquant4_group{group}'] = lambda dim, group=group: Rotated(Grouped(dim, Quantizer(min(group, dim), 4, rotation='none')))
  out['qjl'] = lambda dim: Residual(dim, 1, sketch='gaussian')
  out['qjl_orthogonal'] = lambda dim: Residual(dim, 1)
  for b in range(2, 6):
    out[f'prod{b}'] = lambda dim, b=b: Residual(dim, b, sketch='gaussian')
    out[f'prod{b}_orthogonal'] = lambda dim, b=b: Residual(dim, b)
  for bits in ((4, 2, 2, 2), (5, 3, 2, 2)):
    out[f'polar{"".join(map(str, bits))}'] = lambda dim, bits=bits: PolarQuant(dim, bits)
  for b in (2, 3, 4, 8):
    out[f'int{b}'] = lambda dim, b=b: Integer(dim, b)
    out[f'int{b}_minmax'] = lambda dim, b=b: Integer(dim, b, symmetric=False)
    out[f'int{b}_group32'] = lambda dim, b=b: Grouped(dim, Integer(32, b))
    out[f'int{b}_minmax_group32'] = lambda dim, b=b: Grouped(dim, Integer(32, b, symmetric=False))
  out['int4_rotated'] = lambda dim: Rotated(Integer(dim, 4, symmetric=False))
  out['int8_rotated'] = lambda dim: Rotated(Integer(dim, 8))
  out['kivi_keys2'] = lambda dim: PerChannel(dim, Integer(32, 2, symmetric=False))
  out['kivi_values2'] = lambda dim: Grouped(dim, Integer(32, 2, symmetric=False))
  out['q8_0'] = lambda dim: Grouped(dim, Integer(32, 8))
  out['q4_0'] = lambda dim: Grouped(dim, Q4_0())
  out['q4_0_rotated'] = lambda dim: Rotated(Grouped(dim, Q4_0()))
  out['nf4'] = lambda dim: Grouped(dim, NF4())
  out['fp8_e4m3'] = lambda dim: Float8(dim)
  out['fp8_e5m2'] = lambda dim: Float8(dim, 'float8_e5m2')
  return out


METHODS = _methods()
