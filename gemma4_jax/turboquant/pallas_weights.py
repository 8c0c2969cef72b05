"""`weights.Weight.dot` as a Pallas kernel: one body, lowered by Mosaic for TPUs and by Triton for GPUs.

A program makes the outputs of some rows of the weight for some rows of x. It walks over the row's codes, decodes a piece, multiplies it
and applies the piece's scale to the sums: packed bytes are all of the weight that travels from memory. A piece is at one shift of each
plane and of one group, so that, as in `pallas`, values are never sliced or joined. Levels are looked up by selects (`weights.lookup`):
8 for the 16 of Lloyd-Max, none where steps are equal. For few rows those selects, not memory, bound it: that is what a table costs.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from gemma4_jax.turboquant import packing, weights

BACKENDS = ('tpu', 'gpu', 'interpret')
_ROWS = {'tpu': 256, 'gpu': 64, 'interpret': 64}          # of x that a program takes, at most
_LEAST = {'tpu': 8, 'gpu': 16, 'interpret': 8}            # and at least: matrix products are filled up to it
_OUTPUTS = {'tpu': 256, 'gpu': 64, 'interpret': 64}       # rows of the weight that a program takes
_PIECE = 128
_VMEM = 12 * 2**20   # of a v5e's 16 MiB; what is decoded needs some, too


def unsupported(w: weights.Weight, x_RK: jax.Array, backend: str) -> str:
  """Why the kernel cannot take these; '' where it can."""
  if w.format == 'int8':
    return 'int8 needs none: XLA multiplies with its codes'
  if x_RK.dtype not in (jnp.float32, jnp.bfloat16):
    return f'inputs of {x_RK.dtype}: float32 or bfloat16 are needed'
  least = 128 if backend == 'tpu' else 16       # Mosaic cuts at multiples of its lanes alone
  if _piece(w) < least:
    return f'{w.columns} inputs of {w.format!r} make pieces of {_piece(w)}: at least {least} are needed'
  if w.codes.shape[0] % least:
    return f'{w.codes.shape[0]} outputs are no multiple of {least}'
  return ''


def dot(w: weights.Weight, x_RK: jax.Array, backend: str) -> jax.Array:
  """See `weights.Weight.dot`; gradients of x are those of the plain product.

  Args:
    x_RK: float32, or bfloat16: products are then of bfloat16, with sums in float32.
    backend: of BACKENDS.
  Raises:
    NotImplementedError: the kernel does not take these; the message has the reason.
  """
  if reason := unsupported(w, x_RK, backend):
    raise NotImplementedError(f'a matmul of packed weights on Pallas: {reason}')
  return _jitted(backend, w, x_RK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(backend, w, x_RK):
  R, N = len(x_RK), w.codes.shape[0]
  outputs = math.gcd(N, _OUTPUTS[backend])
  rows = min(_ROWS[backend], max(_LEAST[backend], 1 << (R - 1).bit_length()))
  while backend == 'tpu' and rows > _LEAST[backend] and _vmem(w, x_RK, rows, outputs) > _VMEM:
    rows //= 2
  x_RK = jnp.pad(w.rotate(x_RK), ((0, -R % rows), (0, 0)))
  scale_GN = w.scale.astype(jnp.float32) if backend == 'tpu' else w.scale    # rows of 16 bits cannot be indexed there
  table, group = weights.levels(w.format), w.group
  y = pl.pallas_call(
      functools.partial(_kernel, bits=weights.bits(w.format), table=table, group=group, piece=_piece(w)),
      out_shape=jax.ShapeDtypeStruct((len(x_RK), N), jnp.float32), name='packed_matmul',
      grid=(N // outputs, len(x_RK) // rows),       # the codes of a program's rows stay where they are while x goes by
      in_specs=[pl.BlockSpec((rows, w.columns), lambda n, r: (r, 0)),
                pl.BlockSpec((outputs, w.codes.shape[1]), lambda n, r: (n, 0)),
                pl.BlockSpec((len(scale_GN), outputs), lambda n, r: (0, n))],
      out_specs=pl.BlockSpec((rows, outputs), lambda n, r: (r, n)), **_options(backend))(x_RK, w.codes, scale_GN)
  return y[:R]


def _forward(backend, w, x_RK):
  return _dot(backend, w, x_RK), (w, x_RK)


def _backward(_, saved, dy_RN):
  w, x_RK = saved
  return None, *jax.vjp(lambda x_RK: w.dot(x_RK, 'xla'), x_RK)[1](dy_RN)


_dot.defvjp(_forward, _backward)
_jitted = jax.jit(_dot, static_argnums=0)    # so that weights of one shape are traced and lowered once


def _vmem(w, x_RK, rows, outputs):
  """Bytes that a program has at once on a TPU, twice each for the copies on their way."""
  scales = w.scale.shape[0] * outputs * 4
  return 2 * (rows * w.columns * x_RK.dtype.itemsize + outputs * w.codes.shape[1] + scales + rows * outputs * 4)


def _options(backend):
  if backend == 'gpu':
    from jax.experimental.pallas import triton
    return {'compiler_params': triton.CompilerParams(num_warps=4, num_stages=2)}
  if backend == 'interpret':
    return {'interpret': True}
  from jax.experimental.pallas import tpu
  return {'compiler_params': tpu.CompilerParams(dimension_semantics=('parallel', 'parallel'))}


def _piece(w):
  return math.gcd(w.columns * min(packing.PLANES[weights.bits(w.format)]) // 8, w.group, _PIECE)


def _kernel(x_ref, codes_ref, scale_ref, y_ref, *, bits, table, group, piece):
  columns, dtype = x_ref.shape[1], x_ref.dtype
  planes = packing.PLANES[bits]
  run = columns * min(planes) // 8     # numbers at one shift of the narrowest plane: what one step takes a piece of, at every shift
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

  def step(c, y):
    at = pl.multiple_of(c * piece, piece)
    read = {}      # bytes that several pieces share are loaded once
    for first in range(0, columns, run):
      code, start, left = 0, 0, 0
      for width in planes:
        wide = columns * width // 8
        byte = start + first % wide
        if byte not in read:
          read[byte] = codes_ref[:, pl.ds(byte + at, piece)].astype(jnp.int32)
        code |= ((read[byte] >> (width * (first // wide))) & (2**width - 1)) << left
        start, left = start + wide, left + width
      numbers = weights.lookup(code, table).astype(dtype)
      scale = scale_ref[pl.ds((first + at) // group, 1), :].astype(jnp.float32)
      y += scale * jax.lax.dot_general(x_ref[:, pl.ds(first + at, piece)], numbers, (((1,), (1,)), ((), ())),
                                       preferred_element_type=jnp.float32, precision=precision)
    return y

  y_ref[...] = jax.lax.fori_loop(0, run // piece, step, jnp.zeros(y_ref.shape, jnp.float32))
