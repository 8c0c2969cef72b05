"""The kernel against the reference, and lowered for devices that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.turboquant import ops, packing, pallas, reference
from gemma4_jax.turboquant.quantizer import Quantizer
from tests import quick

B, K, S = 3, 2, 256
EVEN = functools.partial(Quantizer, grid='uniform')
PEAK = functools.partial(Quantizer, grid='absmax')
PARTS = {
    'k4v4 64': ops.separate(EVEN(64, 4), EVEN(64, 4)),
    'k8v4 128': ops.separate(PEAK(128, 8), EVEN(128, 4)),
    'k8v8 256': ops.separate(PEAK(256, 8), PEAK(256, 8)),
    'k4v4 512': ops.separate(EVEN(512, 4), EVEN(512, 4)),
    'k3v2 256': ops.separate(EVEN(256, 3), EVEN(256, 2)),
    'v4kr8': ops.unified(EVEN(128, 4), PEAK(128, 8)),
    'v6kr8': ops.unified(EVEN(128, 6), PEAK(128, 8)),
    'v8kr8': ops.unified(PEAK(128, 8), PEAK(128, 8)),
}


@functools.cache
def setup(parts, queries=4, seed=0):
  rng = np.random.default_rng(seed)
  stored = tuple(part.encode_rotated(jnp.float32(rng.standard_normal((B, K, S, part.dim)))) for part in parts)
  D = reference.width(parts, 'keys')
  return stored, jnp.float32(rng.standard_normal((B, K, queries, D)) * 2 / D**0.5)


def bounds(*pairs):
  start, end = zip(*pairs)
  return jnp.int32(start), jnp.int32(end)


@functools.partial(jax.jit, static_argnums=0, static_argnames=('split', 'tile'))
def kernel(parts, *args, **kwargs):
  return ops.normalize(pallas.attend(parts, *args, backend='interpret', **kwargs))


@functools.partial(jax.jit, static_argnums=0)
def meaning(parts, *args):
  return ops.normalize(reference.attend(parts, *args))


def difference(parts, stored, q, start, end, **kwargs):
  """Of the kernel's output from the reference's, relative to its length."""
  found, expected = kernel(parts, stored, q, start, end, **kwargs), meaning(parts, stored, q, start, end)
  assert bool(jnp.isfinite(found).all())
  return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


RAGGED = bounds((0, 256), (0, 1), (70, 200))


@pytest.mark.parametrize('name', quick.only(['k8v4 128', 'v4kr8'], list(PARTS)))
def test_the_kernel_is_the_reference(name):
  stored, q = setup(PARTS[name])
  assert difference(PARTS[name], stored, q, *RAGGED, split=128) < 1e-5
  assert difference(PARTS[name], stored, q.astype(jnp.bfloat16), *RAGGED, split=128) < 2e-3


@pytest.mark.parametrize('queries', quick.only([3], [1, 3, 16]))
def test_any_number_of_queries_shares_a_head(queries):
  stored, q = setup(PARTS['k4v4 64'], queries)
  assert difference(PARTS['k4v4 64'], stored, q, *RAGGED) < 1e-5


@pytest.mark.parametrize('pairs', [((0, 63), (0, 64), (0, 65)), ((63, 64), (64, 65), (65, 129)), ((-40, 10), (100, 300), (191, 256)),
                                   ((0, 0), (9, 9), (3, 200))])
def test_starts_and_ends_may_be_anywhere(pairs):
  stored, q = setup(PARTS['v4kr8'])
  assert difference(PARTS['v4kr8'], stored, q, *bounds(*pairs), split=128) < 1e-5


@pytest.mark.slow
def test_splits_and_tiles_agree():
  parts = PARTS['v6kr8']
  stored, q = setup(parts)
  one = kernel(parts, stored, q, *RAGGED, split=256)
  for split, tile in ((64, 64), (128, 32), (192, 64)):
    assert float(jnp.abs(kernel(parts, stored, q, *RAGGED, split=split, tile=tile) - one).max()) < 1e-6


def test_slots_that_are_not_seen_may_hold_anything():
  parts = PARTS['k4v4 64']
  stored, q = setup(parts)
  start, end = bounds((0, 5), (0, 5), (2, 5))
  unseen = jnp.arange(S) >= 5
  spoilt = tuple(reference.Stored(jnp.where(unseen[:, None], 255, x.packed_BKSW), jnp.where(unseen, jnp.nan, x.scale_BKNS)) for x in stored)
  for run in (meaning, kernel):
    np.testing.assert_allclose(run(parts, spoilt, q, start, end), meaning(parts, stored, q, start, end), rtol=0, atol=1e-6)


def test_what_the_kernel_cannot_take_is_refused_with_the_reason():
  q = jnp.zeros((B, K, 1, 64))
  table = ops.separate(Quantizer(64, 4), EVEN(64, 4))
  with pytest.raises(NotImplementedError, match="grid='lloyd_max' is a table"):
    pallas.attend(table, setup(table)[0], q, *RAGGED, backend='interpret')
  narrow = ops.separate(EVEN(64, 3), EVEN(64, 3))
  with pytest.raises(NotImplementedError, match='64 at 3 bits make pieces of 8'):
    pallas.attend(narrow, setup(narrow)[0], q, *RAGGED, backend='interpret')
  parts = PARTS['k4v4 64']
  short = tuple(reference.Stored(x.packed_BKSW[:, :, :100], x.scale_BKNS[..., :100]) for x in setup(parts)[0])
  with pytest.raises(NotImplementedError, match='100 slots are no multiple of 32'):
    pallas.attend(parts, short, q, *RAGGED, backend='interpret')
  with pytest.raises(NotImplementedError, match='queries of float16'):
    pallas.attend(parts, setup(parts)[0], q.astype('float16'), *RAGGED, backend='interpret')
  with pytest.raises(ValueError, match='tile=64: must divide the slots, 256, and the split, 96'):
    pallas.attend(parts, setup(parts)[0], q, *RAGGED, backend='interpret', split=96)


@pytest.mark.filterwarnings('ignore:.*[Tt]riton.*:DeprecationWarning')
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize(('backend', 'platform', 'kind'), [('tpu', 'tpu', 'TPU v5 lite'), ('gpu', 'cuda', 'NVIDIA H200')])
def test_the_kernel_lowers_for_devices_that_are_not_here(backend, platform, kind, dtype):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=backend)
  mark = {'tpu': 'tpu_custom_call', 'gpu': '__gpu$xla.gpu.triton'}[backend]
  for parts in PARTS.values():
    shape = jax.ShapeDtypeStruct
    stored = tuple(reference.Stored(shape((2, 2, 4096, packing.bytes_per_row(part.quantizer.bits, part.dim)), jnp.uint8),
                                    shape((2, 2, part.blocks, 4096), part.quantizer.scale_dtype)) for part in parts)
    q, edge = shape((2, 2, 3, reference.width(parts, 'keys')), dtype), shape((2,), jnp.int32)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
      traced = jax.jit(functools.partial(pallas.attend, parts, backend=backend)).trace(stored, q, edge, edge)
      assert mark in traced.lower(lowering_platforms=(platform,)).as_text()
