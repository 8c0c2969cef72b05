"""Codes of 1 to 8 bits as bytes, along the last axis, without a byte that straddles codes.

A code is cut into planes of 4, 2 or 1 bits, low bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2. A plane of w bits puts 8/w codes into a
byte that are dim*w/8 apart: byte j of a nibble plane holds code j in its low half and code j + dim/2 in its high half. So shift and
mask give runs of neighbouring codes, and no kernel has to interleave. The planes of a row stand one after another. 7 bits take a byte
each, as 8 do.
"""

import jax
import jax.numpy as jnp

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (8,), 8: (8,)}   # widths, low bits first


def bytes_per_row(bits: int, dim: int) -> int:
  """dim * bits / 8; dim for 7 bits.

  Raises:
    ValueError: no such `bits`, or `dim` codes do not fill whole bytes of every plane.
  """
  if bits not in PLANES:
    raise ValueError(f'bits={bits}: must be 1 to 8')
  per_byte = 8 // min(PLANES[bits])
  if dim % per_byte:
    raise ValueError(f'dim={dim}: at {bits} bits it must be a multiple of {per_byte}, to fill whole bytes')
  return dim * sum(PLANES[bits]) // 8


def pack(codes: jax.Array, bits: int) -> jax.Array:
  """Integers [..., dim] in 0..2**bits - 1 -> uint8 [..., bytes_per_row(bits, dim)]."""
  bytes_per_row(bits, codes.shape[-1])
  codes, planes = codes.astype(jnp.uint8), []
  for width in PLANES[bits]:
    parts = jnp.split(codes & (2**width - 1), 8 // width, axis=-1)
    planes.append(sum((part << (width * k) for k, part in enumerate(parts)), jnp.zeros_like(parts[0])))
    codes = codes >> min(width, 7)     # 8-bit codes are one plane: what is left is not read
  return jnp.concatenate(planes, axis=-1)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
  """The inverse of `pack`: uint8 [..., dim]."""
  dim, start, shift = packed.shape[-1] * 8 // sum(PLANES[bits]), 0, 0
  if bytes_per_row(bits, dim) != packed.shape[-1]:
    raise ValueError(f'rows of {packed.shape[-1]} bytes hold no whole number of codes of {bits} bits')
  codes = jnp.zeros((*packed.shape[:-1], dim), jnp.uint8)
  for width in PLANES[bits]:
    plane = packed[..., start:start + dim * width // 8]
    parts = [(plane >> (width * k)) & (2**width - 1) for k in range(8 // width)]
    codes = codes | (jnp.concatenate(parts, axis=-1) << shift)
    start, shift = start + dim * width // 8, shift + width
  return codes
