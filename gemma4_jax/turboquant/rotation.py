"""Fixed random orthogonal matrices, reproducible from a seed alone.

'hadamard2'  H D2 H D1: the default. Spreads any fixed vector, spikes and constants too, like a dense random rotation. Its entries are
             even integers over dim, which float32 and, up to dim 1024 at least, bfloat16 hold exactly.
'hadamard1'  H D1: one round sends a spike to a vector of only two values.
'haar'       uniformly random: QR of a Gaussian matrix.
'none'       the identity.

H is the orthonormal Hadamard matrix, D1 and D2 are random signs. Where dim is no power of two there is no such H, and both Hadamard
kinds are 'haar' of that dim: unlike blocks of a smaller H, it mixes all coordinates, which one scale a vector needs.

Sources: arXiv 2504.19874 (QR); 2404.00456 (QuaRot) and 2402.04396 (QuIP#) for randomized Hadamard transforms.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.special

KINDS = ('hadamard2', 'hadamard1', 'haar', 'none')
_KEY = 0x7475726271756e74   # this room's own key: no other generator, whatever its seed, draws the same numbers


@functools.lru_cache
def matrix(kind: str, dim: int, seed: int = 0) -> np.ndarray:
  """Orthogonal float32 [dim, dim], read-only: y = matrix @ x.

  The Hadamard kinds are bit for bit the same on every machine; 'haar' up to the rounding of its QR.
  Raises:
    ValueError: no such kind.
  """
  if kind not in KINDS:
    raise ValueError(f'rotation={kind!r}: must be one of {", ".join(KINDS)}')
  if kind == 'none':
    out = np.eye(dim)
  elif kind == 'haar' or dim & (dim - 1):
    out = haar(dim, seed)
  else:
    signs = np.where(uniforms((2, dim), seed) < 0.5, -1, 1)
    hadamard = scipy.linalg.hadamard(dim, dtype=np.float64)
    out = hadamard * signs[0] / np.sqrt(dim) if kind == 'hadamard1' else hadamard * signs[1] @ hadamard * signs[0] / dim
  out = out.astype(np.float32)
  out.setflags(write=False)
  return out


def apply(matrix: np.ndarray, x: jax.Array) -> jax.Array:
  """matrix @ x for vectors [..., dim], float32 and not in the bfloat16 or TF32 that accelerators take by default."""
  if x.shape[-1] != len(matrix):
    raise ValueError(f'vectors of {x.shape[-1]} numbers where dim={len(matrix)} is expected')
  return jnp.matmul(x.astype(jnp.float32), matrix.T, precision='highest')


def haar(dim: int, seed: int, stream: int = 0) -> np.ndarray:
  """Uniformly random orthogonal float64 [dim, dim]."""
  q, r = np.linalg.qr(normals((dim, dim), seed, stream))
  return q * np.sign(np.diag(r))     # QR's own signs are not random


def normals(shape: tuple[int, ...], seed: int, stream: int = 0) -> np.ndarray:
  """Standard normal float64; another `stream` is independent of this one."""
  return scipy.special.ndtri(uniforms(shape, seed, stream))


def uniforms(shape: tuple[int, ...], seed: int, stream: int = 0) -> np.ndarray:
  """Uniform float64 inside (0, 1), made of raw bits, which numpy keeps the same from version to version."""
  raw = np.random.Philox(key=[_KEY, seed], counter=[0, 0, 0, stream]).random_raw(int(np.prod(shape)))
  return ((raw >> np.uint64(11)).astype(np.float64) + 0.5).reshape(shape) * 2.0**-53
