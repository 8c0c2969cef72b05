import jax
import numpy as np
import pytest

from gemma4_jax.turboquant import packing


@pytest.mark.parametrize('bits', range(1, 9))
@pytest.mark.parametrize('shape', [(3, 128), (2, 0, 64), (5, 7, 96), (2, 0)])
def test_codes_come_back(bits, shape):
  codes = np.random.default_rng(0).integers(0, 2**bits, shape, np.uint8)
  packed = packing.pack(codes, bits)
  assert packed.dtype == np.uint8 and packed.shape == (*shape[:-1], packing.bytes_per_row(bits, shape[-1]))
  np.testing.assert_array_equal(packing.unpack(packed, bits), codes)


@pytest.mark.parametrize('bits', range(1, 9))
def test_every_code_at_every_place_comes_back(bits):
  codes = (np.arange(2**bits)[:, None] + np.arange(2**bits * 8)) % 2**bits
  packed = jax.jit(packing.pack, static_argnums=1)(codes, bits)
  np.testing.assert_array_equal(jax.jit(packing.unpack, static_argnums=1)(packed, bits), codes)


@pytest.mark.parametrize(('bits', 'expected'), [(1, 16), (2, 32), (3, 48), (4, 64), (5, 80), (6, 96), (7, 128), (8, 128)])
def test_bytes_are_bits_over_eight_but_of_seven(bits, expected):
  assert packing.bytes_per_row(bits, 128) == expected


def test_nibbles_are_halves_apart():
  codes = np.random.default_rng(1).integers(0, 16, 64, np.uint8)
  np.testing.assert_array_equal(packing.pack(codes, 4), codes[:32] | codes[32:] << 4)


def test_two_bits_are_quarters_apart():
  c = np.random.default_rng(1).integers(0, 4, 64, np.uint8)
  np.testing.assert_array_equal(packing.pack(c, 2), c[:16] | c[16:32] << 2 | c[32:48] << 4 | c[48:] << 6)


@pytest.mark.parametrize(('bits', 'low'), [(3, 2), (5, 4), (6, 4)])
def test_wide_codes_are_planes_of_low_bits_then_high_bits(bits, low):
  codes = np.random.default_rng(1).integers(0, 2**bits, (3, 64), np.uint8)
  planes = [packing.pack(codes % 2**low, low), packing.pack(codes >> low, bits - low)]
  np.testing.assert_array_equal(packing.pack(codes, bits), np.concatenate(planes, -1))


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: packing.pack(np.zeros(12, np.uint8), 1), 'dim=12: at 1 bits it must be a multiple of 8'),
    (lambda: packing.pack(np.zeros(12, np.uint8), 3), 'a multiple of 8'), (lambda: packing.pack(np.zeros(6, np.uint8), 6), 'multiple of 4'),
    (lambda: packing.bytes_per_row(9, 64), 'bits=9: must be 1 to 8'), (lambda: packing.unpack(np.zeros(5, np.uint8), 3), 'dim=13')])
def test_rows_that_do_not_fill_bytes_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
