"""`reference.attend` as a Pallas kernel: one body, lowered by Mosaic for TPUs and by Triton for GPUs.

A program takes one kv head of one row and one run of its slots (a split), for all queries of the head: it walks over tiles with an
online softmax and writes a partial; jnp merges those of a row. Packed bytes are all that travels from memory. A tile is decoded with
shift, mask and one subtraction: levels are equally spaced, so that their distance goes into the scale, and what is left are half
integers up to 127.5, which bfloat16 holds exactly.

What the compilers allow shapes the body: no gathers (TPU: along lanes only; Triton: from pointers only), no slices or concatenations
of values (Triton), runs of a power of two that start at multiples of themselves. So a slot is read in pieces, runs of coordinates at
one shift of each plane of bits, and each piece has dot products of its own.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from gemma4_jax.turboquant import packing
from gemma4_jax.turboquant.reference import MASKED, Part, Partial, Stored, check, merge_splits, width

BACKENDS = ('tpu', 'gpu', 'interpret')
_PIECE = 128                                             # coordinates: the lanes of a TPU, and what a GPU's registers bear
_TILE = {'tpu': 1024, 'gpu': 64, 'interpret': 64}        # slots decoded at once; on a TPU a tile has fixed costs
_LEAST = {'tpu': 128, 'gpu': 32, 'interpret': 32}
_ROWS = {'tpu': 8, 'gpu': 16, 'interpret': 1}            # queries of a matrix product are filled up to at least this
_SPLIT = {'tpu': 4096, 'gpu': 4096, 'interpret': 256}    # slots of a program, at most
_PROGRAMS = 264                                          # that a GPU should have: two for each of 132 multiprocessors


@dataclasses.dataclass(frozen=True)
class Piece:
  """Coordinates first..first + size of a part's slots, all of one block."""
  first: int
  size: int
  block: int
  planes: tuple[tuple[int, int, int, int], ...]   # first byte, shift right, width in bits, then shift left


def unsupported(parts: tuple[Part, ...], stored: tuple[Stored, ...], q_BKGD: jax.Array, backend: str) -> str:
  """Why the kernel cannot take these; '' where it can."""
  if reason := next(filter(None, map(unreadable, parts)), ''):
    return reason
  S = stored[0].packed_BKSW.shape[2]
  if S % _LEAST[backend]:
    return f'{S} slots are no multiple of {_LEAST[backend]}'
  if q_BKGD.dtype not in (jnp.float32, jnp.bfloat16):
    return f'queries of {q_BKGD.dtype}: float32 or bfloat16 are needed'
  return ''


def unreadable(part: Part) -> str:
  """Why no kernel can take codes of this part; '' where one can."""
  quantizer, size = part.quantizer, next(pieces(part)).size
  if quantizer.step is None:
    return f"grid={quantizer.grid!r} is a table, which the kernel cannot look up at speed; it takes grid='uniform' or 'absmax'"
  if size < 16 or size & (size - 1):
    return f'{part.blocks} blocks of {quantizer.dim} at {quantizer.bits} bits make pieces of {size}: 16, 32, 64 or 128 are needed'
  return ''


def attend(parts: tuple[Part, ...], stored: tuple[Stored, ...], q_BKGD: jax.Array, start_B: jax.Array, end_B: jax.Array, *,
           backend: str, split: int | None = None, tile: int | None = None) -> Partial:
  """See `reference.attend`.

  Args:
    q_BKGD: float32, or bfloat16: dot products are then of bfloat16, with sums in float32.
    backend: of BACKENDS.
    split: slots of a program, a multiple of `tile`; None: what suits the backend and the number of heads.
    tile: slots decoded at once, a divisor of S; None: what suits the backend.
  Raises:
    NotImplementedError: the kernel does not take such parts or shapes; the message has the reason.
  """
  check(parts, stored, q_BKGD)
  if reason := unsupported(parts, stored, q_BKGD, backend):
    raise NotImplementedError(f'turboquant attention on Pallas: {reason}')
  B, K, G, D = q_BKGD.shape
  S = stored[0].packed_BKSW.shape[2]
  tile = tile or math.gcd(S, _TILE[backend])
  split = split or _split(backend, B * K, S, tile)
  if S % tile or split % tile:
    raise ValueError(f'tile={tile}: must divide the slots, {S}, and the split, {split}')
  rows, splits = max(_ROWS[backend], 1 << (G - 1).bit_length()), math.ceil(S / split)
  bounds_B2 = jnp.stack([jnp.maximum(start_B, 0), jnp.minimum(end_B, S)], axis=1).astype(jnp.int32)
  q = jnp.pad(q_BKGD, [(0, 0), (0, 0), (0, rows - G), (0, 0)]).reshape(B * K, rows, D)
  arrays = [y for x in stored for y in (x.packed_BKSW.reshape(B * K, S, -1), x.scale_BKNS.reshape(B * K, -1, S))]

  def at(run, i, s, *bounds):     # on a TPU splits that see nothing ask for a block that is there already, and cost no copy
    if bounds:
      low, high = bounds[0][i // K, 0], bounds[0][i // K, 1]
      s = jnp.clip(s, low // split, jnp.maximum(high - 1, 0) // split)
    return (i, s, 0) if run == 'packed' else (i, 0, s)

  in_specs = [pl.BlockSpec((None, rows, D), lambda i, s, *_: (i, 0, 0))]
  for packed, scale in zip(arrays[::2], arrays[1::2]):
    in_specs += [pl.BlockSpec((None, split, packed.shape[-1]), functools.partial(at, 'packed')),
                 pl.BlockSpec((None, scale.shape[1], split), functools.partial(at, 'scale'))]
  wide, narrow = (pl.BlockSpec((None, None, rows, n), lambda i, s, *_: (i, s, 0, 0)) for n in (width(parts, 'values'), 1))
  out_shape = [jax.ShapeDtypeStruct((B * K, splits, rows, n), jnp.float32) for n in (width(parts, 'values'), 1, 1)]
  grids = dict(grid=(B * K, splits), in_specs=in_specs, out_specs=[wide, narrow, narrow])
  body = functools.partial(_kernel, parts=parts, heads=K, split=split, tile=tile)
  o, peak, total = pl.pallas_call(body, out_shape=out_shape, name='turboquant_attention', **options(backend, grids, scalars=1))(
      bounds_B2, q, *arrays)
  cut = lambda x: x[:, :, :G].reshape(B, K, splits, G, -1)
  o, peak, total = cut(o), cut(peak)[..., 0], cut(total)[..., 0]
  return merge_splits(Partial(*(jnp.moveaxis(x, 2, 0) for x in (o, peak, total))))


def _split(backend: str, heads: int, S: int, tile: int) -> int:
  split = min(_SPLIT[backend], S)
  while backend == 'gpu' and heads * S < _PROGRAMS * split and split % (2 * tile) == 0 and split > 256:
    split //= 2
  return split


def options(backend: str, grids: dict, scalars: int) -> dict:
  """What a `pallas_call` takes of a grid and block specs, whose first `scalars` operands are whole arrays of integers."""
  if backend == 'gpu':
    from jax.experimental.pallas import triton
    return {**grids, 'in_specs': [pl.BlockSpec()] * scalars + grids['in_specs'],
            'compiler_params': triton.CompilerParams(num_warps=4, num_stages=2)}
  from jax.experimental.pallas import tpu
  grid_spec = tpu.PrefetchScalarGridSpec(num_scalar_prefetch=scalars, **grids)
  if backend == 'interpret':
    return {'grid_spec': grid_spec, 'interpret': True}
  order = ('parallel', *['arbitrary'] * (len(grids['grid']) - 1))
  return {'grid_spec': grid_spec, 'compiler_params': tpu.CompilerParams(dimension_semantics=order)}


def _kernel(bounds_ref, q_ref, *refs, parts: tuple[Part, ...], heads: int, split: int, tile: int):
  stored, (o_ref, peak_ref, total_ref) = refs[:-3], refs[-3:]
  rows, dtype = q_ref.shape[0], q_ref.dtype
  dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32,
                          precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None)
  row, before = pl.program_id(0) // heads, pl.program_id(1) * split
  start, end = bounds_ref[row, 0] - before, bounds_ref[row, 1] - before     # of this split

  def step(t, carry):
    peak, total, *outputs = carry
    slots = pl.ds(pl.multiple_of(t * tile, tile), tile)
    at = t * tile + jax.lax.broadcasted_iota(jnp.int32, (rows, tile), 1)
    seen = (at >= start) & (at < end)
    score = jnp.zeros((rows, tile), jnp.float32)
    first = 0
    for part, packed_ref, scale_ref in zip(parts, stored[::2], stored[1::2]):
      for n in range(part.keys):
        products = [dot(q_ref[:, first + p.first:first + p.first + p.size], _decode(packed_ref, slots, p, part, dtype),
                        (((1,), (1,)), ((), ())))
                    for p in pieces(part) if p.block == n]
        score += sum(products[1:], products[0]) * (_scale(scale_ref, n, slots) * float(part.quantizer.step))
      first += part.keys * part.quantizer.dim
    score = jnp.where(seen, score, MASKED)
    new_peak = jnp.maximum(peak, score.max(axis=1, keepdims=True))
    decay, weight = jnp.exp(peak - new_peak), jnp.where(seen, jnp.exp(score - new_peak), 0.)
    new, i = [], 0
    for part, packed_ref, scale_ref in zip(parts, stored[::2], stored[1::2]):
      for n in range(part.values):
        scaled = jnp.where(seen, weight * _scale(scale_ref, n, slots), 0.)
        terms = [scaled.astype(dtype)]
        if jnp.finfo(scale_ref.dtype).nmant > jnp.finfo(dtype).nmant:     # what rounding took is a second term, or it would show
          terms.append((scaled - terms[0].astype(jnp.float32)).astype(dtype))
        for p in pieces(part):
          if p.block == n:
            levels = _decode(packed_ref, slots, p, part, dtype)
            new.append(sum((dot(term, levels, (((1,), (0,)), ((), ()))) for term in terms), outputs[i] * decay))
            i += 1
    return new_peak, total * decay + weight.sum(axis=1, keepdims=True), *new

  made = [(p.size, float(part.quantizer.step)) for part in parts for p in pieces(part) if p.block < part.values]
  nothing = (jnp.full((rows, 1), MASKED, jnp.float32), jnp.zeros((rows, 1), jnp.float32),
             *(jnp.zeros((rows, n), jnp.float32) for n, _ in made))
  low, high = jnp.clip(start, 0, split), jnp.clip(end, 0, split)
  peak, total, *outputs = jax.lax.fori_loop(low // tile, (high + tile - 1) // tile, step, nothing)
  peak_ref[...], total_ref[...] = peak, total
  first = 0
  for output, (n, unit) in zip(outputs, made):
    o_ref[:, first:first + n] = output * unit     # not before: a weight times a bfloat16 scale alone rounds less
    first += n


def pieces(part: Part) -> Iterator[Piece]:
  """All of a slot, of one size, in the order of coordinates."""
  bits, total = part.quantizer.bits, part.dim
  size = math.gcd(total * min(packing.PLANES[bits]) // 8, part.quantizer.dim, _PIECE)
  for first in range(0, total, size):
    planes, start, left = [], 0, 0
    for plane in packing.PLANES[bits]:
      run = total * plane // 8     # codes at one shift, and bytes of the plane
      planes.append((start + first % run, plane * (first // run), plane, left))
      start, left = start + run, left + plane
    yield Piece(first, size, first // part.quantizer.dim, tuple(planes))


def _decode(packed_ref, slots, piece: Piece, part: Part, dtype) -> jax.Array:
  """[tile, piece.size]: levels in units of their distance."""
  code = 0
  for first, right, bits, left in piece.planes:
    plane = packed_ref[slots, first:first + piece.size].astype(jnp.int32)
    code |= ((plane >> right) & (2**bits - 1)) << left
  return (code.astype(jnp.float32) - (2**part.quantizer.bits - 1) / 2).astype(dtype)


def _scale(scale_ref, block: int, slots) -> jax.Array:
  """[1, tile]"""
  return scale_ref[block:block + 1, slots].astype(jnp.float32)
