"""Attention over packed codes, and the making of them, for whoever uses it: `reference` says what the functions mean,
`implementation` how they run.

  'xla'          plain jnp, any device
  'pallas_tpu'   Mosaic
  'pallas_gpu'   Triton
  'interpret'    the kernels in Pallas' interpreter: slow, for tests
"""

import jax

from gemma4_jax import hardware
from gemma4_jax.turboquant import pallas, pallas_encode, reference
from gemma4_jax.turboquant.reference import Part, Partial, Stored, exact, merge, normalize, of_output, over_slots, separate, unified

__all__ = ['IMPLEMENTATIONS', 'Part', 'Partial', 'Stored', 'append', 'attend', 'check', 'choose', 'choose_encode', 'encode', 'exact',
           'merge', 'normalize', 'of_output', 'over_slots', 'separate', 'unified']
IMPLEMENTATIONS = ('xla', 'pallas_tpu', 'pallas_gpu', 'interpret')


def choose(parts: tuple[Part, ...], stored: tuple[Stored, ...], q_BKGD: jax.Array) -> str:
  """What `attend` takes where nobody says: the kernel of the device (`hardware.kernels`), 'xla' where it has none for the shapes."""
  device = hardware.kernels()
  if not device or pallas.unsupported(parts, stored, q_BKGD, device):
    return 'xla'
  return f'pallas_{device}'


def attend(parts: tuple[Part, ...], stored: tuple[Stored, ...], q_BKGD: jax.Array, start_B: jax.Array, end_B: jax.Array,
           implementation: str | None = None) -> Partial:
  """`reference.attend`, by an implementation of IMPLEMENTATIONS; None: `choose`.

  Raises:
    ValueError: no such implementation, or arrays that do not belong together.
    NotImplementedError: the implementation cannot run here, or not with these parts; the message has the reason.
  """
  if implementation is None:
    reference.check(parts, stored, q_BKGD)
    implementation = choose(parts, stored, q_BKGD)
  check(implementation)
  if implementation == 'xla':
    return reference.attend(parts, stored, q_BKGD, start_B, end_B)
  return pallas.attend(parts, stored, q_BKGD, start_B, end_B, backend=implementation.removeprefix('pallas_'))


def choose_encode(parts: tuple[Part, ...], stored: tuple[Stored, ...], dtype) -> str:
  """What makes codes for `stored` of vectors of `dtype` where nobody says: as `choose`."""
  device = hardware.kernels()
  if not device or pallas_encode.unsupported(parts, dtype, stored[0].packed_BKSW.shape[2], device):
    return 'xla'
  return f'pallas_{device}'


def encode(part: Part, x_BKTD: jax.Array, *, rotated: bool = False, implementation: str) -> Stored:
  """`Part.encode`, by an implementation of IMPLEMENTATIONS.

  Raises:
    ValueError, NotImplementedError: as `attend`.
  """
  check(implementation)
  if implementation == 'xla':
    return part.encode(x_BKTD, rotated)
  return pallas_encode.encode(part, x_BKTD, rotated=rotated, backend=implementation.removeprefix('pallas_'))


def append(part: Part, stored: Stored, x_BK1D: jax.Array, slot_B: jax.Array, *, rotated: bool = False, implementation: str) -> Stored:
  """`stored` with the codes of one vector for each row and head in slot_B (int32), in its memory. By a kernel: with 'xla' there is
  `encode`, and whoever keeps the cache writes.

  Raises:
    ValueError, NotImplementedError: as `attend`.
  """
  check(implementation)
  if implementation == 'xla':
    raise NotImplementedError("implementation='xla' makes codes and does not write them: take `encode`")
  return pallas_encode.append(part, stored, x_BK1D, slot_B, rotated=rotated, backend=implementation.removeprefix('pallas_'))


def check(implementation: str | None) -> None:
  """Raises ValueError: no such implementation; NotImplementedError: one that this device has not."""
  if implementation is None:
    return
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'implementation={implementation!r}: must be one of {", ".join(IMPLEMENTATIONS)}')
  backend = implementation.removeprefix('pallas_')
  if backend not in ('xla', 'interpret', hardware.kernels()):
    old = ' older than compute capability 8.0' if backend == hardware.platform() else ''
    raise NotImplementedError(f'implementation={implementation!r} needs a {backend.upper()}; the default device is a '
                              f"{hardware.platform().upper()}{old}: take 'xla', or None")
