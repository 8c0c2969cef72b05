import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.turboquant import codebook, packing, quantizer, rotation
from gemma4_jax.turboquant.quantizer import Quantizer
from tests import quick


def directions(n, dim, seed=11):
  x = np.random.default_rng(seed).standard_normal((n, dim))
  return jnp.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def error(method, x):
  """Mean squared error over the mean square of vectors of length 1."""
  decoded = jax.jit(lambda x: method.decode(method.encode(x)))(x)
  return float(jnp.square(decoded - x).sum(-1).mean())


@pytest.mark.parametrize(('dim', 'n'), quick.only([(64, 12_000)], [(64, 12_000), (128, 8000), (256, 5000), (512, 3000)]))
def test_distortion_is_what_theory_says(dim, n):
  x = directions(n, dim)
  for bits in range(1, 9):
    found = error(Quantizer(dim, bits, grid='exact', scale='norm', scale_dtype='float32'), x)
    np.testing.assert_allclose(found, codebook.exact(bits, dim).distortion, rtol=0.01 if bits <= 5 else 0.025, err_msg=f'{bits} bits')


SCALED = {     # bits -> norm, norm_matched, least_squares, unbiased
    1: (0.362, 0.402, 0.362, 0.568), 2: (0.1167, 0.1200, 0.1163, 0.1318), 3: (0.03427, 0.03434, 0.03404, 0.03526),
    4: (0.009423, 0.009362, 0.009339, 0.009430), 6: (0.000635, 0.000628, 0.000628, 0.000629)}


@pytest.mark.parametrize('bits', quick.only([1, 4], list(SCALED)))
def test_scales_have_the_errors_of_theory(bits):
  x = directions(5000, 256)
  found = [error(Quantizer(256, bits, scale=scale, scale_dtype='float32'), x)
           for scale in ('norm', 'norm_matched', 'least_squares', 'unbiased')]
  # at 6 bits with the normal's table, whose tail is rare
  np.testing.assert_allclose(found, SCALED[bits], rtol=0.01 if bits < 6 else 0.02)


@pytest.mark.parametrize(('grid', 'bits', 'distortion', 'tolerance'), [
    ('uniform', 4, codebook.uniform(4).distortion, 0.02), ('uniform', 6, codebook.uniform(6).distortion, 0.03),
    ('int8', 4, codebook.int8_grid(4).distortion, 0.02), ('absmax', 8, 4.8e-5, 0.03), ('absmax', 4, 0.0138, 0.03)])
def test_grids_have_their_own_distortion(grid, bits, distortion, tolerance):
  found = error(Quantizer(256, bits, grid=grid, scale='norm', scale_dtype='float32'), directions(5000, 256))
  np.testing.assert_allclose(found, distortion, rtol=tolerance)


@pytest.mark.parametrize('bits', quick.only([3], [1, 2, 3, 4]))
def test_inner_products_shrink_by_what_the_scale_says(bits):
  dim, rng = 128, np.random.default_rng(3)
  x, noise = directions(10_000, dim), directions(200_000, dim, seed=12).reshape(10_000, 20, dim)
  noise -= (noise * x[:, None]).sum(-1, keepdims=True) * x[:, None]
  cosine = rng.uniform(-0.9, 0.9, (10_000, 20, 1))
  q = cosine * x[:, None] + np.sqrt(1 - cosine**2) * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
  distortion = codebook.gaussian(bits).distortion
  for scale, expected in (('norm', 1 - distortion), ('norm_matched', np.sqrt(1 - distortion)), ('unbiased', 1)):
    method = Quantizer(dim, bits, grid='exact', scale=scale)
    estimate = np.einsum('nd,nmd->nm', method.decode(method.encode(x)), q)
    slope = (estimate * cosine[..., 0]).sum() / np.square(cosine).sum()
    expected = expected if scale == 'unbiased' else expected + (distortion - codebook.exact(bits, dim).distortion) / (1 + (scale != 'norm'))
    np.testing.assert_allclose(slope, expected, atol=0.002, err_msg=scale)


def test_inner_products_of_random_pairs_have_the_variance_of_theory():
  dim, x, q = 256, directions(10_000, 256), directions(10_000, 256, seed=13)
  q -= (q * x).sum(-1, keepdims=True) * x       # the formula for 'norm' is that of orthogonal pairs: elsewhere its bias adds
  q /= jnp.linalg.norm(q, axis=-1, keepdims=True)
  for bits in (1, 2, 4):
    distortion = codebook.exact(bits, dim).distortion
    for scale, expected in (('norm', distortion * (1 - distortion)), ('unbiased', distortion / (1 - distortion))):
      method = Quantizer(dim, bits, scale=scale)
      wrong = ((method.decode(method.encode(x)) - x) * q).sum(-1)
      np.testing.assert_allclose(dim * np.square(wrong).mean(), expected, rtol=0.05, err_msg=f'{bits} bits, {scale}')


@pytest.mark.parametrize('dim', [256, 512])
@pytest.mark.parametrize('bits', quick.only([3, 4], [2, 3, 4, 5]))
def test_encoding_what_was_decoded_changes_no_code(bits, dim):
  method = Quantizer(dim, bits)
  codes = method.encode(directions(4000, dim))
  np.testing.assert_array_equal(method.encode(method.decode(codes)).packed, codes.packed)


@pytest.mark.parametrize('grid', quantizer.GRIDS)
@pytest.mark.parametrize('scale', quantizer.SCALES)
def test_zero_stays_zero_and_is_no_division(grid, scale):
  method = Quantizer(64, 4, grid=grid, scale=scale)
  codes = method.encode(jnp.zeros((3, 64)))
  assert np.isfinite(np.float32(codes.scale)).all() and not np.asarray(method.decode(codes)).any()


@pytest.mark.parametrize('grid', quantizer.GRIDS)
def test_codes_do_not_depend_on_powers_of_two_and_scales_follow(grid):
  method, x = Quantizer(128, 4, grid=grid), directions(200, 128)
  codes = method.encode(x)
  for factor in (2.0**-100, 2.0**-20, 2.0**13, 2.0**100):     # also where a square leaves float32
    scaled = method.encode(factor * x)
    np.testing.assert_array_equal(scaled.packed, codes.packed)
    np.testing.assert_array_equal(np.float32(scaled.scale), np.float32(codes.scale) * np.float32(factor))


@pytest.mark.parametrize('length', [1e-6, 1e4])
def test_long_and_short_vectors_are_as_good_as_others(length):
  method, x = Quantizer(128, 4), directions(2000, 128)
  np.testing.assert_allclose(jnp.square(method.decode(method.encode(length * x)) / length - x).sum(-1).mean(), error(method, x), rtol=1e-2)


def test_what_is_not_finite_counts_as_zero():
  method, x = Quantizer(64, 4), np.array(directions(3, 64))
  spoilt, mended = x.copy(), x.copy()
  spoilt[0, 3], spoilt[1, 5], spoilt[2, 7:9] = np.nan, np.inf, -np.inf
  mended[0, 3], mended[1, 5], mended[2, 7:9] = 0, 0, 0
  for got, expected in zip(method.encode(spoilt), method.encode(mended)):
    np.testing.assert_array_equal(got, expected)
  assert np.isfinite(method.decode(method.encode(np.full((1, 64), np.nan, np.float32)))).all()


def test_bfloat16_input_is_computed_in_float32():
  method, x = Quantizer(64, 6), directions(50, 64).astype(jnp.bfloat16)
  assert method.decode(method.encode(x)).dtype == jnp.float32
  np.testing.assert_array_equal(method.encode(x).packed, method.encode(x.astype(jnp.float32)).packed)


@pytest.mark.parametrize('grid', quantizer.GRIDS)
@pytest.mark.parametrize('bits', [1, 4, 6])
def test_codes_are_thresholds_passed_and_values_are_levels_times_scale(grid, bits):
  method = Quantizer(64, bits, grid=grid, scale='norm', scale_dtype='float32')
  x = directions(100, 64)
  y = np.asarray(method.rotate(x))
  codes = method.encode(x)
  unit = y / np.asarray(codes.scale)[:, None]
  found = np.asarray(packing.unpack(codes.packed, bits))
  expected = (unit[..., None] > method.thresholds).sum(-1)
  near = np.abs(unit[..., None] - method.thresholds).min(-1) < 1e-5
  np.testing.assert_array_equal(found[~near], expected[~near])
  np.testing.assert_allclose(method.decode_rotated(codes), method.levels[found] * np.asarray(codes.scale)[:, None], rtol=1e-6, atol=1e-7)


def test_absmax_reaches_its_outermost_level_in_every_vector():
  method = Quantizer(64, 8, grid='absmax')
  codes = packing.unpack(method.encode(directions(50, 64)).packed, 8)
  assert (np.maximum(codes, 255 - codes).max(-1) == 255).all()


def test_rotated_space_gives_the_same_inner_products():
  method, x, q = Quantizer(128, 4, seed=5), directions(50, 128), directions(50, 128, seed=1)
  codes = method.encode(x)
  here = method.rotate(q) @ method.decode_rotated(codes).T
  np.testing.assert_allclose(here, q @ method.decode(codes).T, atol=1e-5)
  np.testing.assert_array_equal(method.encode_rotated(method.rotate(x)).packed, codes.packed)
  np.testing.assert_allclose(method.rotate(x), x @ rotation.matrix('hadamard2', 128, 5).T, atol=1e-6)


def test_leading_axes_are_free_and_codes_may_be_sliced():
  method, x = Quantizer(64, 3), directions(24, 64).reshape(2, 3, 4, 64)
  codes = method.encode(x)
  assert codes.packed.shape == (2, 3, 4, 24) and codes.scale.shape == (2, 3, 4)
  part = jax.tree.map(lambda leaf: leaf[1, :2], codes)
  np.testing.assert_array_equal(method.decode(part), method.decode(codes)[1, :2])
  assert method.decode(method.encode(x[:, :0])).shape == (2, 0, 4, 64)


@pytest.mark.parametrize(('bits', 'scale_dtype', 'expected'), [(4, '', 66), (3, '', 50), (8, '', 132), (8, 'float16', 130), (7, '', 132)])
def test_bytes_are_those_of_the_arrays(bits, scale_dtype, expected):
  method = Quantizer(128, bits, scale_dtype=scale_dtype)
  codes = method.encode(directions(10, 128))
  assert method.bytes_per_vector == expected == sum(leaf.nbytes for leaf in codes) // 10
  assert method.bits_per_number == 8 * expected / 128


def test_rounding_of_the_scale_is_along_the_vector_and_less_in_float16():
  x = directions(2000, 256)
  along = lambda method: float(jnp.square((method.decode(method.encode(x)) * x).sum(-1) - 1).mean())
  assert along(Quantizer(256, 6)) == pytest.approx(2.8e-6, rel=0.2)
  assert along(Quantizer(256, 6, scale_dtype='float16')) < 1e-7


@pytest.mark.parametrize(('fields', 'message'), [
    ({'rotation': 'fwht'}, "rotation='fwht': must be one of 'hadamard2'"), ({'scale': 'l2'}, "scale='l2'"), ({'grid': 'nf4'}, "grid='nf4'"),
    ({'scale_dtype': 'int8'}, "scale_dtype='int8'"), ({'bits': 9}, 'bits=9'), ({'bits': 8, 'grid': 'int8'}, 'take grid="uniform"'),
    ({'dim': 12, 'bits': 3}, 'dim=12')])
def test_wrong_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    Quantizer(**({'dim': 64, 'bits': 4} | fields))


def test_vectors_of_another_length_are_refused():
  with pytest.raises(ValueError, match='vectors of 32 numbers where dim=64'):
    Quantizer(64, 4, 'none').encode(jnp.ones((2, 32)))
  with pytest.raises(ValueError, match='vectors of 32 numbers where dim=64'):
    Quantizer(64, 4).encode_rotated(jnp.ones((2, 32)))
