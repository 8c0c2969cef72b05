"""Attention of one query token over keys and values that stay packed: what it means, in plain jnp, and the way it runs on a CPU.

Everything happens in rotated space: queries come rotated, outputs leave rotated, and the caller turns both once a step, not once a
slot. Scales multiply after the dot products (of keys) or the weights before them (of values), so that a slot's numbers are read as
codes alone. Results are partials: those over packed slots, a recent window and sinks are merged by log-sum-exp.

Letters: B batch, K kv heads, G queries per kv head, S slots, C slots of a chunk, D coordinates, N blocks of a part.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma4_jax.turboquant import packing
from gemma4_jax.turboquant.quantizer import Codes, Quantizer

MASKED = -1e30     # finite, so that rows that see nothing stay numbers
_CHUNK = 512       # slots decoded at once: their numbers stay in a CPU's cache


class Stored(NamedTuple):
  """A part of the cache."""
  packed_BKSW: jax.Array    # uint8: `packing.pack` of the codes of all blocks of a slot, side by side
  scale_BKNS: jax.Array     # bfloat16, float16 or float32


@dataclasses.dataclass(frozen=True)
class Part:
  """What one array of codes holds for every slot: `blocks` runs of quantizer.dim coordinates, each with a scale of its own.

  The first `keys` blocks meet the query, the first `values` blocks make output; a block may do both, or one of them.
  """
  quantizer: Quantizer
  blocks: int = 1
  keys: int = 0
  values: int = 0

  def __post_init__(self):
    for field in ('keys', 'values'):
      if not 0 <= getattr(self, field) <= self.blocks:
        raise ValueError(f'{field}={getattr(self, field)}: a part of {self.blocks} blocks has 0 to {self.blocks}')

  @property
  def dim(self) -> int:
    """Coordinates of a slot."""
    return self.blocks * self.quantizer.dim

  def encode(self, x_BKSD: jax.Array, rotated: bool = False) -> Stored:
    """Vectors [B, K, S, blocks * quantizer.dim] of any float dtype -> Stored; each block is rotated, unless they come `rotated`."""
    return self.encode_rotated(x_BKSD if rotated else self.rotate(x_BKSD))

  def rotate(self, x: jax.Array) -> jax.Array:
    """Each block of [..., blocks * quantizer.dim], float32."""
    return self.quantizer.rotate(x.reshape(*x.shape[:-1], self.blocks, self.quantizer.dim)).reshape(x.shape)

  def encode_rotated(self, y_BKSD: jax.Array) -> Stored:
    """Rotated coordinates [B, K, S, blocks * quantizer.dim] of any float dtype -> Stored."""
    codes = self.quantizer.encode_rotated(y_BKSD.reshape(*y_BKSD.shape[:-1], self.blocks, self.quantizer.dim))
    packed, scale_BKNS = codes.packed, jnp.swapaxes(codes.scale, -1, -2)
    if self.blocks > 1:      # repacked as one row: runs of codes at one shift then reach over whole blocks, as kernels like them
      packed = packing.pack(packing.unpack(packed, self.quantizer.bits).reshape(y_BKSD.shape), self.quantizer.bits)
    return Stored(packed.reshape(*y_BKSD.shape[:-1], -1), scale_BKNS)

  def decode_rotated(self, stored: Stored) -> jax.Array:
    """Stored -> float32 [B, K, S, blocks * quantizer.dim]."""
    codes = packing.unpack(stored.packed_BKSW, self.quantizer.bits)
    codes = Codes(packing.pack(codes.reshape(*codes.shape[:-1], self.blocks, -1), self.quantizer.bits),
                  jnp.swapaxes(stored.scale_BKNS, -1, -2))
    return self.quantizer.decode_rotated(codes).reshape(*stored.packed_BKSW.shape[:-1], self.dim)


def separate(key: Quantizer, value: Quantizer) -> tuple[Part, Part]:
  """Keys and values, one scale each; queries are rotated by `key`, outputs turned back by `value`."""
  return Part(key, keys=1), Part(value, values=1)


def unified(value: Quantizer, rotary: Quantizer, blocks: int = 4) -> tuple[Part, Part]:
  """For layers whose keys are their values but for rotary coordinates: V once, in blocks, and the rotated coordinates of the key.

  All but the last block of V are key and value; the last is the value of the coordinates whose key is the second part. A query is
  its blocks that see V, then its rotary block.
  """
  return Part(value, blocks, keys=blocks - 1, values=blocks), Part(rotary, keys=1)


class Partial(NamedTuple):
  """Softmax attention over some of the slots: sums of exp(score - peak) times value, the peak, and sums of exp(score - peak)."""
  o_BKGD: jax.Array     # float32, rotated; value blocks side by side
  peak_BKG: jax.Array   # float32; MASKED where no slot is seen
  sum_BKG: jax.Array    # float32


def merge(*partials: Partial) -> Partial:
  """The partial over the slots of all."""
  return merge_splits(jax.tree.map(lambda *x: jnp.stack(x), *partials))


def merge_splits(partials: Partial) -> Partial:
  """Partials along an axis before the others -> the partial over the slots of all."""
  peak_BKG = partials.peak_BKG.max(0)
  weight = jnp.exp(partials.peak_BKG - peak_BKG)
  return Partial((partials.o_BKGD * weight[..., None]).sum(0), peak_BKG, (partials.sum_BKG * weight).sum(0))


def normalize(partial: Partial) -> jax.Array:
  """The attention output, float32 [B, K, G, D], still rotated; 0 where nothing is seen."""
  total = partial.sum_BKG[..., None]
  return jnp.where(total > 0, partial.o_BKGD / jnp.where(total > 0, total, 1), 0)


def of_output(o_BKGD: jax.Array, log_sum_BKG: jax.Array) -> Partial:
  """The partial of which the output is known, and the log of the sum of exp(score); as low as `MASKED`: no slot is seen."""
  return Partial(o_BKGD.astype(jnp.float32), jnp.maximum(log_sum_BKG, MASKED), (log_sum_BKG > MASKED).astype(jnp.float32))


def exact(score_BKRS: jax.Array, v_BKSD: jax.Array, seen: jax.Array) -> Partial:
  """The partial over slots that are not quantized, as a recent window.

  Args:
    score_BKRS: float32, the softmax scale multiplied in.
    v_BKSD: in the space of the other partials' outputs; weights are rounded to its dtype, sums are float32.
    seen: bool, as `score_BKRS` or of a shape that is broadcast to it.
  """
  score = jnp.where(seen, score_BKRS, MASKED)
  peak = score.max(-1, initial=MASKED)
  weight = jnp.where(seen, jnp.exp(score - peak[..., None]), 0)
  o = jax.lax.dot_general(weight.astype(v_BKSD.dtype), v_BKSD, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
  return Partial(o, peak, weight.sum(-1))


def attend(parts: tuple[Part, ...], stored: tuple[Stored, ...], q_BKGD: jax.Array, start_B: jax.Array, end_B: jax.Array) -> Partial:
  """Attention of the queries over slots start <= s < end of each row.

  Args:
    q_BKGD: rotated queries, the softmax scale multiplied in: for every key block of the parts, in order, its coordinates. Any float
      dtype; computed in float32.
    start_B, end_B: int32; a window's start (below 0 counts as 0) and a row's length (above S as S).
  """
  check(parts, stored, q_BKGD)
  q_BKGD = q_BKGD.astype(jnp.float32)
  return over_slots(parts, stored, q_BKGD, start_B, end_B, lambda cut, seen_BC: _attend(parts, cut, q_BKGD, seen_BC[:, None, None, :]))


def over_slots(parts: tuple[Part, ...], stored: tuple[Stored, ...], q_BKGD: jax.Array, start_B: jax.Array, end_B: jax.Array,
               attend: Callable[[list[Stored], jax.Array], Partial], most: int = _CHUNK) -> Partial:
  """`attend(part of stored, bool [B, C] of which slots are seen)` over all chunks of at most so many slots that hold a seen one."""
  S = stored[0].packed_BKSW.shape[2]
  C = min(most, S)
  start_B, end_B = jnp.maximum(start_B, 0), jnp.minimum(end_B, S)

  def chunk(c, partial):
    first = jnp.minimum(c * C, S - C)
    slots_C = first + jnp.arange(C)
    cut = [Stored(jax.lax.dynamic_slice_in_dim(x.packed_BKSW, first, C, 2), jax.lax.dynamic_slice_in_dim(x.scale_BKNS, first, C, 3))
           for x in stored]
    return merge(partial, attend(cut, (slots_C >= jnp.maximum(start_B[:, None], c * C)) & (slots_C < end_B[:, None])))

  nothing = of_output(jnp.zeros((*q_BKGD.shape[:-1], width(parts, 'values'))), jnp.full(q_BKGD.shape[:-1], MASKED))
  return jax.lax.fori_loop(start_B.min() // C, -(-end_B.max() // C), chunk, nothing)


def _attend(parts, stored, q_BKGD, seen) -> Partial:
  numbers = [part.quantizer.values(packing.unpack(x.packed_BKSW, part.quantizer.bits)) for part, x in zip(parts, stored)]
  score, first = 0, 0
  for part, x, number in zip(parts, stored, numbers):
    for n in range(part.keys):
      D = part.quantizer.dim
      dot = jnp.einsum('BKGD,BKCD->BKGC', q_BKGD[..., first:first + D], number[..., n * D:n * D + D], precision='highest')
      score, first = score + dot * x.scale_BKNS[:, :, None, n], first + D
  score = jnp.where(seen, score, MASKED)
  peak = score.max(-1)
  weight = jnp.where(seen, jnp.exp(score - peak[..., None]), 0)
  outputs = []
  for part, x, number in zip(parts, stored, numbers):
    for n in range(part.values):
      D = part.quantizer.dim
      scaled = weight * jnp.where(seen, x.scale_BKNS[:, :, None, n], 0)     # a slot never written may hold anything
      outputs.append(jnp.einsum('BKGC,BKCD->BKGD', scaled, number[..., n * D:n * D + D], precision='highest'))
  return Partial(jnp.concatenate(outputs, axis=-1), peak, weight.sum(-1))


def width(parts: tuple[Part, ...], role: str) -> int:
  """Coordinates of a query (role 'keys') or an output ('values')."""
  return sum(getattr(part, role) * part.quantizer.dim for part in parts)


def check(parts: tuple[Part, ...], stored: tuple[Stored, ...], q_BKGD: jax.Array) -> None:
  """Raises ValueError where arrays and parts do not belong together."""
  B, K, _, D = q_BKGD.shape
  S = stored[0].packed_BKSW.shape[2] if stored else 0
  if len(parts) != len(stored):
    raise ValueError(f'{len(parts)} parts, and arrays of {len(stored)}')
  if D != width(parts, 'keys') or not width(parts, 'values'):
    raise ValueError(f'queries of {D} numbers where the parts have {width(parts, "keys")} for keys and '
                     f'{width(parts, "values")} for values')
  for part, x in zip(parts, stored):
    expected = (B, K, S, packing.bytes_per_row(part.quantizer.bits, part.dim)), (B, K, part.blocks, S)
    if (x.packed_BKSW.shape, x.scale_BKNS.shape) != expected:
      raise ValueError(f'codes {x.packed_BKSW.shape} and scales {x.scale_BKNS.shape} where {expected[0]} and {expected[1]} are expected')
