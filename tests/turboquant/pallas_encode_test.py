"""The kernels that make codes against what they mean, and lowered for devices that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.turboquant import ops, packing, pallas_encode
from gemma4_jax.turboquant.quantizer import Quantizer
from tests import quick

B, K, S = 2, 3, 96
EVEN = functools.partial(Quantizer, grid='uniform')
PEAK = functools.partial(Quantizer, grid='absmax')
PARTS = {
    '4 bits 64': ops.Part(EVEN(64, 4)),
    '6 bits 64': ops.Part(EVEN(64, 6)),
    '3 bits 256': ops.Part(EVEN(256, 3, scale='norm_matched')),
    '8 bits 256': ops.Part(PEAK(256, 8)),
    '4 bits 512': ops.Part(EVEN(512, 4)),
    '4 bits 4x128': ops.unified(EVEN(128, 4), PEAK(128, 8))[0],
    '8 bits 128': ops.unified(EVEN(128, 4), PEAK(128, 8))[1],
    '6 bits 4x128': ops.Part(EVEN(128, 6), 4),
}


def vectors(part, count, dtype='float32'):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal((B, K, count, part.dim)) * 10.**rng.uniform(-3, 3, (B, K, count, 1)), dtype)


@functools.partial(quick.jit, static_argnums=0, static_argnames='rotated')
def kernel(part, x, rotated=False):
  return ops.encode(part, x, rotated=rotated, implementation='interpret')


@functools.partial(quick.jit, static_argnums=0, static_argnames='rotated')
def meaning(part, x, rotated=False):
  return ops.encode(part, x, rotated=rotated, implementation='xla')


@functools.partial(quick.jit, static_argnums=0, static_argnames='rotated')
def append(part, stored, x, slot, rotated=False):
  return ops.append(part, stored, x, slot, rotated=rotated, implementation='interpret')


def near(part, found, expected):
  """Whether at most one coordinate in 5000 is one level off, by how float32 sums, and no scale by more than its last digits."""
  codes = [np.asarray(packing.unpack(x.packed_BKSW, part.quantizer.bits), np.int32) for x in (found, expected)]
  off = np.abs(codes[0] - codes[1])
  scales = [np.asarray(x.scale_BKNS, np.float64) for x in (found, expected)]
  same = (off == 0).reshape(*off.shape[:-1], part.blocks, -1).all(-1).swapaxes(2, 3)     # another code changes the scale
  apart = np.abs(scales[0] - scales[1]) / np.where(scales[1], scales[1], 1)
  last = 2e-6 if part.quantizer.scale_dtype == 'float32' else 2.0**-7
  return off.max() <= 1 and off.mean() <= 1 / 5000 and same.any() and apart[same].max() <= last and apart.mean() <= 1e-4


@pytest.mark.parametrize('name', quick.only(['4 bits 64', '6 bits 64', '8 bits 256', '4 bits 4x128'], list(PARTS)))
def test_the_kernel_makes_the_codes_of_the_reference(name):
  part = PARTS[name]
  for dtype, rotated in (('float32', False), ('bfloat16', False), ('bfloat16', True)):
    x = vectors(part, 37, dtype)
    assert near(part, kernel(part, x, rotated=rotated), meaning(part, x, rotated=rotated)), (dtype, rotated)


def test_zero_becomes_zero_and_what_is_not_finite_counts_as_zero():
  part = PARTS['4 bits 64']
  x = vectors(part, 37).at[0, 0, 0].set(0).at[0, 0, 1, 5].set(jnp.nan).at[0, 0, 2, 7].set(jnp.inf)
  for rotated in (False, True):
    found = kernel(part, x, rotated=rotated)
    assert found.scale_BKNS[0, 0, 0, 0] == 0 and near(part, found, meaning(part, x, rotated=rotated))


@pytest.mark.parametrize('name', quick.only(['6 bits 64', '4 bits 4x128'], list(PARTS)))
def test_a_token_is_put_into_its_slot_and_no_other_changes(name):
  part = PARTS[name]
  held = meaning(part, vectors(part, S))
  for slots in ((0, 95), (31, 32), (63, 200)):     # the last: as near as there is a slot
    x = vectors(part, 1)[::-1]
    fresh = kernel(part, x)
    slot = jnp.minimum(jnp.int32(slots), S - 1)
    row = jnp.arange(B)
    expected = ops.Stored(held.packed_BKSW.at[row, :, slot].set(fresh.packed_BKSW[:, :, 0]),
                          held.scale_BKNS.at[row, :, :, slot].set(fresh.scale_BKNS[..., 0]))
    found = append(part, held, x, jnp.int32(slots))
    np.testing.assert_array_equal(found.packed_BKSW, expected.packed_BKSW)
    np.testing.assert_allclose(np.float32(found.scale_BKNS), np.float32(expected.scale_BKNS), rtol=1e-6)
    assert (found.packed_BKSW != held.packed_BKSW).any()


def test_what_the_kernels_cannot_take_is_refused_with_the_reason():
  run = functools.partial(ops.encode, implementation='interpret')
  with pytest.raises(NotImplementedError, match="grid='lloyd_max' is a table"):
    run(ops.Part(Quantizer(64, 4)), jnp.zeros((1, 1, 1, 64)))
  with pytest.raises(NotImplementedError, match='blocks of 96: a power of two is needed'):
    run(ops.Part(EVEN(96, 4)), jnp.zeros((1, 1, 1, 96)))
  part = PARTS['4 bits 64']
  with pytest.raises(NotImplementedError, match='vectors of float16: float32 or bfloat16 are needed'):
    run(part, jnp.zeros((1, 1, 1, 64), 'float16'))
  with pytest.raises(ValueError, match='vectors of 32 numbers where the part has 64'):
    run(part, jnp.zeros((1, 1, 1, 32)))
  short = meaning(part, vectors(part, 40))
  with pytest.raises(NotImplementedError, match='40 slots are no multiple of 32'):
    append(part, short, vectors(part, 1), jnp.zeros(B, jnp.int32))
  with pytest.raises(NotImplementedError, match='needs a TPU'):
    ops.encode(part, jnp.zeros((1, 1, 1, 64)), implementation='pallas_tpu')
  with pytest.raises(NotImplementedError, match='take `encode`'):
    ops.append(part, short, vectors(part, 1), jnp.zeros(B, jnp.int32), implementation='xla')


@pytest.mark.filterwarnings('ignore:.*[Tt]riton.*:DeprecationWarning')
@pytest.mark.parametrize(('backend', 'platform', 'kind'), [('tpu', 'tpu', 'TPU v5 lite'), ('gpu', 'cuda', 'NVIDIA H200')])
def test_the_kernels_lower_for_devices_that_are_not_here(backend, platform, kind):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=backend)
  mark = {'tpu': 'tpu_custom_call', 'gpu': '__gpu$xla.gpu.triton'}[backend]
  shape = jax.ShapeDtypeStruct
  for part in PARTS.values():
    stored = ops.Stored(shape((2, 2, 512, packing.bytes_per_row(part.quantizer.bits, part.dim)), jnp.uint8),
                        shape((2, 2, part.blocks, 512), part.quantizer.scale_dtype))
    for dtype, rotated in (('float32', False), ('bfloat16', False), ('bfloat16', True)):
      x = lambda count, part=part, dtype=dtype: shape((2, 2, count, part.dim), dtype)
      how = {'rotated': rotated, 'backend': backend}
      with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert ops.choose_encode((part,), (stored,), x(1).dtype) == f'pallas_{backend}'
        traced = [jax.jit(functools.partial(pallas_encode.encode, part, **how)).trace(x(37)),
                  jax.jit(functools.partial(pallas_encode.append, part, **how)).trace(stored, x(1), shape((2,), jnp.int32))]
        for one in traced:
          assert mark in one.lower(lowering_platforms=(platform,)).as_text()
