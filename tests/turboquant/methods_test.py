"""Polar, baselines, compositions: all by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.turboquant import baselines, compose, methods, polar
from gemma4_jax.turboquant.quantizer import Quantizer

DIM = 256
RNG = np.random.default_rng(31)
GAUSS = jnp.float32(RNG.standard_normal((4096, DIM)))
STUDENT = jnp.float32(RNG.standard_t(4, (4096, DIM)))


def error(method, x):
  """Mean over vectors of squared error over squared length."""
  decoded = jax.jit(lambda x: method.decode(method.encode(x)))(x)
  return float((jnp.square(decoded - x).sum(-1) / jnp.square(x).sum(-1)).mean())


@pytest.mark.parametrize(('name', 'bits', 'gauss', 'student'), [
    ('fp8_e4m3', 8, 0.00070, 0.00070), ('fp8_e5m2', 8, 0.0028, 0.0028), ('int8', 8.0625, 0.00005, 0.00015), ('q8_0', 8.5, 0.00003, None),
    ('int4', 4.0625, 0.0159, 0.0475), ('int4_minmax', 4.125, 0.0118, 0.0285), ('int3_minmax', 3.125, 0.054, 0.131),
    ('int4_minmax_group32', 5, 0.0061, 0.0086), ('kivi_values2', 3, 0.154, 0.219), ('q4_0', 4.5, 0.0074, 0.0128),
    ('nf4', 4.25, 0.0084, 0.0119), ('turboquant4_none', 4.0625, 0.0093, 0.0467 * 1.1), ('turboquant2_norm_matched', 2.0625, 0.1198, 0.1198),
    ('turboquant3', 3.0625, 0.0353, 0.0353), ('turboquant4', 4.0625, 0.0094, 0.0094), ('turboquant5', 5.0625, 0.00245, 0.00245),
    ('turboquant6', 6.0625, 0.00063, 0.00063), ('turboquant4_group128', 4.125, 0.0092, 0.0092),
    ('turboquant4_group32', 4.5, 0.0084, 0.0084),
    ('q4_0_rotated', 4.5, 0.0074, 0.0074), ('int4_rotated', 4.125, 0.0119, 0.0119), ('polar4222', 3.875, 0.0321, 0.0321),
    ('polar5322', 4.625, 0.0154, 0.0155), ('turboquant2.5', 2.375, 0.107, 0.107), ('turboquant3.5', 3.375, 0.0285, 0.0285)])
def test_formats_have_the_published_errors_and_sizes(name, bits, gauss, student):
  method = methods.make(name, DIM)
  assert method.bits_per_number == bits
  tolerance = 0.1 if gauss < 1e-4 else 0.025      # one digit printed
  np.testing.assert_allclose(error(method, GAUSS), gauss, rtol=tolerance)
  if student:
    np.testing.assert_allclose(error(method, STUDENT), student, rtol=max(tolerance, 0.04))


def test_rotation_makes_outliers_harmless():
  x = GAUSS[:1000].at[:, jnp.array([3, 77, 130, 200])].multiply(15)
  assert error(methods.make('int4', DIM), x) > 0.13
  assert error(methods.make('turboquant4_none', DIM), x) > 0.25
  assert error(methods.make('turboquant4', DIM), x) < 0.0105
  assert error(methods.make('q4_0_rotated', DIM), x) < 0.0080


def test_polar_pays_for_its_angles():
  np.testing.assert_allclose(error(polar.PolarQuant(DIM, (3, 2, 2, 1)), GAUSS), 0.0772, rtol=0.02)
  assert error(polar.PolarQuant(DIM, (8, 8, 8, 8)), GAUSS) < 1e-4      # all angles fine: what is left is the length's rounding
  assert error(methods.make('turboquant3', DIM), GAUSS) < 1.15 * error(methods.make('polar4222', DIM), GAUSS)


@pytest.mark.parametrize('dim', [64, 256])
@pytest.mark.parametrize('name', methods.METHODS)
def test_bits_per_number_are_those_of_the_arrays(name, dim):
  method = methods.make(name, dim)
  x = jax.ShapeDtypeStruct((2, 64, dim), jnp.bfloat16)
  codes = jax.eval_shape(method.encode, x)
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes)) * 8 == method.bits_per_number * x.size
  decoded = jax.eval_shape(method.decode, codes)
  assert decoded.shape == x.shape and decoded.dtype == jnp.float32 and method.dim == dim


@pytest.mark.parametrize('name', [name for name in methods.METHODS if not name.startswith('turboquant')])
def test_zero_stays_zero(name):
  method = methods.make(name, 64)
  assert not np.asarray(jax.jit(lambda x: method.decode(method.encode(x)))(jnp.zeros((32, 64)))).any()


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_integers_hold_their_own_levels_exactly(bits):
  most = 2**(bits - 1) - 1
  x = np.resize(np.arange(-most, most + 1), (4, 512)) * np.float32([0.25, 1, 2, 16])[:, None]
  symmetric, minmax = baselines.Integer(512, bits), baselines.Integer(512, bits, symmetric=False)
  np.testing.assert_array_equal(symmetric.decode(symmetric.encode(x)), x)
  y = np.resize(np.arange(2**bits), (1, 512)) * np.float32(0.5) + 3
  np.testing.assert_array_equal(minmax.decode(minmax.encode(y)), y)


def test_q4_0_keeps_the_largest_number_whatever_its_sign():
  for sign in (-1, 1):
    x = np.float32([[*range(-7, 8), *range(-7, 8), 8, 0]]) * sign * 0.5
    np.testing.assert_array_equal(baselines.Q4_0().decode(baselines.Q4_0().encode(x)), x)


def test_nf4_levels_are_the_published_ones():
  np.testing.assert_allclose(baselines.NF4().levels, [
      -1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
      0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1], atol=1e-6)


def test_nf4_takes_the_nearest_level():
  method, x = baselines.NF4(), GAUSS[:100, :64]
  largest = np.float32(np.float16(np.abs(x).max(-1, keepdims=True)))
  nearest = np.abs(np.asarray(x / largest)[..., None] - method.levels).argmin(-1)
  np.testing.assert_allclose(method.decode(method.encode(x)), method.levels[nearest] * largest, rtol=1e-6)


def test_kivi_keys_keep_channels_apart_and_values_keep_tokens_apart():
  keys, values = methods.make('kivi_keys2', 64), methods.make('kivi_values2', 64)
  x = GAUSS[:64, :64]
  loud_channel, loud_token = x.at[:, 5].multiply(1000), x.at[7].multiply(1000)
  others = np.arange(64) != 5
  decode = lambda method, x: np.asarray(method.decode(method.encode(x)))
  np.testing.assert_array_equal(decode(keys, loud_channel)[:, others], decode(keys, x)[:, others])
  others = np.arange(64) != 7
  np.testing.assert_array_equal(decode(values, loud_token)[others], decode(values, x)[others])
  assert (decode(values, loud_channel)[:, :5] != decode(values, x)[:, :5]).mean() > 0.5


def test_kivi_keys_refuse_a_group_that_is_not_full():
  with pytest.raises(ValueError, match='dim=33: no multiple of the group, 32'):
    methods.make('kivi_keys2', 64).encode(GAUSS[:33, :64])


def test_split_gives_outliers_their_own_bits():
  channels = (3, 77, 130, 200)
  loud = GAUSS[:500].at[:, jnp.array(channels)].multiply(15)
  rest = Quantizer(252, 2)
  split = compose.Split(channels, Quantizer(4, 6, rotation='haar'), rest)
  decoded = split.decode(split.encode(loud))
  others = [i for i in range(DIM) if i not in channels]
  np.testing.assert_allclose(decoded[:, others], rest.decode(rest.encode(loud[:, others])), atol=1e-5)
  np.testing.assert_allclose(decoded[:, list(channels)], loud[:, list(channels)], atol=6)
  assert error(split, loud) < 0.5 * error(methods.make('turboquant2', DIM), loud)
  with pytest.raises(ValueError, match='channels: must be 4 different ones'):
    compose.Split((1, 1, 2, 3), Quantizer(4, 6), rest)


def test_groups_have_a_scale_each():
  method = compose.Grouped(256, Quantizer(128, 4))
  x = GAUSS[:10].at[:, 128:].multiply(1000)
  codes = method.encode(x)
  assert codes.packed.shape == (10, 2, 64) and codes.scale.shape == (10, 2)
  np.testing.assert_array_equal(method.decode(codes)[:, :128], method.inner.decode(method.inner.encode(x[:, :128])))
  with pytest.raises(ValueError, match='dim=200: no multiple of the group, 128'):
    compose.Grouped(200, Quantizer(128, 4))


def test_an_unknown_name_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match="method 'turboquant9': no such method; did you mean 'turboquant"):
    methods.make('turboquant9', 64)
