"""`Part.encode_rotated` as a Pallas kernel, and a token's codes put into a cache in place: one body, lowered by Mosaic and by Triton.

A program rotates some vectors by matrix products, chooses their scales, rounds, and joins the codes to bytes, all in registers: what
travels is the vectors, the matrix and the bytes. The rounding is `Quantizer.round`, the very function, on the pieces that `pallas`
reads: a piece is shifted to its place in each plane of bits and or-ed with those that share its bytes.

`append` does so for one token a row, in as many copies as a block of the cache has slots, and takes that of the token's own slot: the
block is read and written back, and of the rest of the cache, whose memory the result takes over, nothing travels.
"""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from gemma4_jax.turboquant import packing
from gemma4_jax.turboquant.pallas import Piece, options, pieces, unreadable
from gemma4_jax.turboquant.quantizer import finite
from gemma4_jax.turboquant.reference import Part, Stored

_ROWS = {'tpu': 256, 'gpu': 16, 'interpret': 64}       # vectors of a program, at most
_SLOTS = {'tpu': 32, 'gpu': 16, 'interpret': 32}       # of a block of codes; also the fewest vectors that a matrix product takes
_LANES = {'tpu': 128, 'gpu': 16, 'interpret': 32}      # slots of a block of scales
_CHUNK = {'tpu': 128, 'gpu': 32, 'interpret': 128}     # coordinates summed over at once: Triton writes out float32 products, for minutes


def unsupported(parts: tuple[Part, ...], dtype, slots: int, backend: str) -> str:
  """Why the kernels cannot take vectors of `dtype` for a cache of `slots`; '' where they can."""
  for part in parts:
    if reason := unreadable(part):
      return reason
    if part.quantizer.dim & (part.quantizer.dim - 1):
      return f'blocks of {part.quantizer.dim}: a power of two is needed'
  if slots % _LANES[backend]:
    return f'{slots} slots are no multiple of {_LANES[backend]}'
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f'vectors of {dtype}: float32 or bfloat16 are needed'
  return ''


def encode(part: Part, x_BKTD: jax.Array, *, rotated: bool, backend: str) -> Stored:
  """`Part.encode` of any number of vectors.

  Args:
    x_BKTD: float32 or bfloat16.
    rotated: whether they come rotated.
    backend: of `pallas.BACKENDS`.
  Raises:
    NotImplementedError: the kernel does not take such parts or vectors; the message has the reason.
  """
  _check(part, x_BKTD, 0, backend)
  B, K, T, D = x_BKTD.shape
  N, W, count = part.blocks, packing.bytes_per_row(part.quantizer.bits, D), B * K * T
  rows = min(_ROWS[backend], max(_SLOTS[backend], 1 << (count - 1).bit_length()))
  x_RD = jnp.pad(x_BKTD.reshape(count, D), ((0, -count % rows), (0, 0)))
  matrix = _matrix(part, x_BKTD.dtype, rotated)
  at = lambda n: pl.BlockSpec((rows, n), lambda r: (r, 0))
  grids = dict(grid=(len(x_RD) // rows,), in_specs=[at(D), *_whole(matrix)], out_specs=[at(W), at(N)])
  packed, scale = pl.pallas_call(
      functools.partial(_encode, part=part, chunk=_CHUNK[backend]), name='turboquant_encode',
      out_shape=[jax.ShapeDtypeStruct((len(x_RD), W), jnp.uint8), jax.ShapeDtypeStruct((len(x_RD), N), part.quantizer.scale_dtype)],
      **options(backend, grids, scalars=0))(x_RD, *matrix)
  return Stored(packed[:count].reshape(B, K, T, W), scale[:count].reshape(B, K, T, N).swapaxes(2, 3))


def append(part: Part, stored: Stored, x_BK1D: jax.Array, slot_B: jax.Array, *, rotated: bool, backend: str) -> Stored:
  """`stored` with the codes of one vector for each row and head in slot_B (int32; the nearest that there is), in its memory.

  Args, Raises: as `encode`; and a number of slots that is not whole blocks is none that the kernel takes.
  """
  B, K, S, W = stored.packed_BKSW.shape
  _check(part, x_BK1D, S, backend)
  N, slots, lanes, gpu = part.blocks, _SLOTS[backend], _LANES[backend], backend == 'gpu'
  matrix = _matrix(part, x_BK1D.dtype, rotated)
  arrays = [stored.packed_BKSW.reshape(B * K, S, W), stored.scale_BKNS.reshape(B * K, N, S)]
  blocks = [pl.BlockSpec((None, slots, W), lambda i, slot: (i, slot[i // K] // slots, 0)),
            pl.BlockSpec((None, N, lanes), lambda i, slot: (i, 0, slot[i // K] // lanes))]
  blocks = [pl.BlockSpec()] * 2 if gpu else blocks     # there blocks cannot follow an array, but programs address all memory
  grids = dict(grid=(B * K,), in_specs=[pl.BlockSpec((None, 1, part.dim), lambda i, *_: (i, 0, 0)), *_whole(matrix), *blocks],
               out_specs=blocks)
  packed, scale = pl.pallas_call(
      functools.partial(_append, part=part, heads=K, slots=slots, lanes=lanes, chunk=_CHUNK[backend], gpu=gpu),
      name='turboquant_append',
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
      input_output_aliases={2 + len(matrix): 0, 3 + len(matrix): 1}, **options(backend, grids, scalars=1))(
          jnp.clip(slot_B, 0, S - 1).astype(jnp.int32), x_BK1D.reshape(B * K, 1, -1), *matrix, *arrays)
  return Stored(packed.reshape(stored.packed_BKSW.shape), scale.reshape(stored.scale_BKNS.shape))


def _check(part, x, slots, backend):
  if x.shape[-1] != part.dim:
    raise ValueError(f'vectors of {x.shape[-1]} numbers where the part has {part.dim}')
  if reason := unsupported((part,), x.dtype, slots, backend):
    raise NotImplementedError(f'turboquant codes by Pallas: {reason}')


def _matrix(part, dtype, rotated) -> list[jax.Array]:
  """What the kernel multiplies by: in the dtype of the vectors where that holds it exactly, as bfloat16 does Hadamard's."""
  if rotated:
    return []
  matrix = part.quantizer.matrix
  rounded = matrix.astype(dtype)
  return [jnp.asarray(rounded if (rounded == matrix).all() else matrix)]


def _whole(matrix):
  return [pl.BlockSpec(m.shape, lambda *_: (0, 0)) for m in matrix]


def _encode(x_ref, *refs, part: Part, chunk: int):
  *matrix, packed_ref, scale_ref = refs
  planes, scales = _round(x_ref, matrix, part, x_ref.shape[0], chunk)
  for first, value in planes.items():
    packed_ref[:, first:first + value.shape[1]] = value.astype(jnp.uint8)
  for n, scale in enumerate(scales):
    scale_ref[:, n:n + 1] = scale.astype(scale_ref.dtype)


def _append(slot_ref, x_ref, *refs, part: Part, heads: int, slots: int, lanes: int, chunk: int, gpu: bool):
  *matrix, packed_ref, scale_ref, packed_out, scale_out = refs
  i = pl.program_id(0)
  slot = slot_ref[i // heads]
  planes, scales = _round(x_ref, matrix, part, slots, chunk)
  block = lambda size: pl.ds(pl.multiple_of(slot // size * size, size), size) if gpu else slice(None)
  row = (i,) if gpu else ()
  for first, value in planes.items():
    at = *row, block(slots), slice(first, first + value.shape[1])
    here = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0) == slot % slots
    packed_out[at] = jnp.where(here, value, packed_ref[at].astype(jnp.int32)).astype(jnp.uint8)
  for n, scale in enumerate(scales):
    at = *row, slice(n, n + 1), block(lanes)
    here = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1) == slot % lanes
    one = jnp.max(scale, axis=0, keepdims=True)     # all are the same
    scale_out[at] = jnp.where(here, one, scale_ref[at].astype(jnp.float32)).astype(scale_out.dtype)


def _round(x_ref, matrix, part: Part, rows: int, chunk: int) -> tuple[dict[int, jax.Array], list[jax.Array]]:
  """First byte -> int32 [rows, size of a piece], and of every block the scale [rows, 1]; a single vector is taken `rows` times."""
  size = part.quantizer.dim
  planes, scales = {}, []
  for n in range(part.blocks):
    mine = [p for p in pieces(part) if p.block == n]
    coordinates = [_coordinates(x_ref, matrix, p, size, rows, chunk) for p in mine]
    codes, scale = part.quantizer.round([finite(y) for y in coordinates])
    scales.append(scale)
    for p, code in zip(mine, codes):
      for first, right, bits, left in p.planes:
        planes[first] = planes.get(first, 0) | ((code >> left) & (2**bits - 1)) << right
  return planes, scales


def _coordinates(x_ref, matrix, piece: Piece, size: int, rows: int, chunk: int) -> jax.Array:
  """Those of a piece, rotated, float32 [rows, piece.size]."""
  load = lambda at, n: jnp.broadcast_to(x_ref[:, at].astype(jnp.float32), (rows, n))
  if not matrix:
    return load(slice(piece.first, piece.first + piece.size), piece.size)
  matrix_ref, row = matrix[0], piece.first - piece.block * size
  chunk = min(size, chunk)

  def step(c, total):
    columns = pl.multiple_of(c * chunk, chunk)
    x = finite(load(pl.ds(piece.block * size + columns, chunk), chunk)).astype(matrix_ref.dtype)
    return total + jax.lax.dot_general(x, matrix_ref[row:row + piece.size, pl.ds(columns, chunk)], (((1,), (1,)), ((), ())),
                                       preferred_element_type=jnp.float32,
                                       precision=jax.lax.Precision.HIGHEST if matrix_ref.dtype == jnp.float32 else None)

  return jax.lax.fori_loop(0, size // chunk, step, jnp.zeros((rows, piece.size), jnp.float32))
