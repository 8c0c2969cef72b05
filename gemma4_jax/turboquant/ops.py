"""Attention over packed codes for whoever uses it: `reference` says what the functions mean, `implementation` how they run.

  'xla'          plain jnp, any device
  'pallas_tpu'   Mosaic
  'pallas_gpu'   Triton
  'interpret'    the kernel in Pallas' interpreter: slow, for tests
"""

import jax

from gemma4_jax import hardware
from gemma4_jax.turboquant import pallas, reference
from gemma4_jax.turboquant.reference import Part, Partial, Stored, exact, merge, normalize, separate, unified

__all__ = ['IMPLEMENTATIONS', 'Part', 'Partial', 'Stored', 'attend', 'check', 'choose', 'exact', 'merge', 'normalize', 'separate',
           'unified']
IMPLEMENTATIONS = ('xla', 'pallas_tpu', 'pallas_gpu', 'interpret')


def choose(parts: tuple[Part, ...], stored: tuple[Stored, ...], q_BKGD: jax.Array) -> str:
  """What `attend` takes where nobody says: the kernel of the device (`hardware.platform`), 'xla' where it has none for the shapes."""
  device = hardware.platform()
  if device not in ('tpu', 'gpu') or pallas.unsupported(parts, stored, q_BKGD, device):
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


def check(implementation: str | None) -> None:
  """Raises ValueError: no such implementation; NotImplementedError: one that this device has not."""
  if implementation is None:
    return
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'implementation={implementation!r}: must be one of {", ".join(IMPLEMENTATIONS)}')
  backend = implementation.removeprefix('pallas_')
  if backend not in ('xla', 'interpret', hardware.platform()):
    raise NotImplementedError(f'implementation={implementation!r} needs a {backend.upper()}; the default device is a '
                              f"{hardware.platform().upper()}: take 'xla', or None")
