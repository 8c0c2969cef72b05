"""Matrices in few bits: what a format keeps of one, and what multiplying with it means.

  int8    a float32 scale for each output: number = code * scale; absolute maximum, symmetric

Weights are [out, in]: a row is what one output reads, and its numbers share a scale.
"""

import dataclasses
from functools import partial
import math

import jax
import jax.numpy as jnp

FORMATS = ('int8',)
_ROWS_BYTES = 2**28    # of a matrix that are converted at once, in float32


@partial(jax.tree_util.register_dataclass, data_fields=['codes', 'scale'], meta_fields=['format', 'shape'])
@dataclasses.dataclass(frozen=True)
class Weight:
  """A weight of `shape` [*out, *in] in the place of an array.

  Attributes:
    codes: int8 [rows, columns].
    scale: float32 [rows].
  """
  codes: jax.Array
  scale: jax.Array
  format: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return self.codes.nbytes + self.scale.nbytes

  def decode(self, dtype=jnp.float32) -> jax.Array:
    """The whole weight, of `shape`."""
    return _decode(self.codes, self.scale, dtype).reshape(self.shape)

  def take(self, ids: jax.Array, dtype) -> jax.Array:
    """Rows of a table [V, ...]: [*ids.shape, *shape[1:]]."""
    rows = _decode(jnp.take(self.codes, ids, axis=0), jnp.take(self.scale, ids, axis=0), dtype)
    return rows.reshape(*ids.shape, *self.shape[1:])

  def dot(self, x_RK: jax.Array) -> jax.Array:
    """x w^T, float32 [R, N]; the scales multiply the sums."""
    y_RN = jax.lax.dot_general(x_RK, self.codes.astype(x_RK.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y_RN * self.scale


def encode(w: jax.Array, format: str, inputs: int = 1) -> Weight:
  """A weight of float32 or bfloat16, [*out, *in], in a format of FORMATS.

  Args:
    inputs: how many of the last axes are summed when it is multiplied.
  Raises:
    ValueError: no such format.
  """
  if format not in FORMATS:
    raise ValueError(f'weights: {format!r} is none of {", ".join(FORMATS)}')
  columns = math.prod(w.shape[w.ndim - inputs:])
  rows = w.reshape(-1, columns)
  step = max(1, _ROWS_BYTES // (4 * columns))
  parts = [_encode(rows[start:start + step]) for start in range(0, len(rows), step)]
  codes, scale = parts[0] if len(parts) == 1 else (jnp.concatenate(part) for part in zip(*parts))
  return Weight(codes, scale, format, tuple(w.shape))


@jax.jit
def _encode(rows_NK):
  rows_NK = rows_NK.astype(jnp.float32)
  scale_N = jnp.abs(rows_NK).max(-1) / 127
  codes_NK = jnp.rint(rows_NK / jnp.where(scale_N == 0, 1, scale_N)[:, None]).clip(-127, 127).astype(jnp.int8)
  return codes_NK, scale_N


def _decode(codes, scale, dtype):
  return (codes.astype(jnp.float32) * scale[..., None]).astype(dtype)
