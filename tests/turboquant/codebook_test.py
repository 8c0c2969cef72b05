import math
import pathlib

import numpy as np
import pytest

from gemma4_jax.turboquant import codebook

TABLE = np.loadtxt(pathlib.Path(__file__).with_name('codebooks.txt'))
DIMS = (None, 64, 128, 256, 512)     # None: the normal
DISTORTIONS = {
    1: (0.36338, 0.358387, 0.360889, 0.362136, 0.362758), 2: (0.117482, 0.114526, 0.116, 0.11674, 0.117111),
    3: (0.0345478, 0.0333908, 0.0339659, 0.034256, 0.0344017), 4: (0.00950101, 0.00913152, 0.00931479, 0.00940753, 0.00945418),
    5: (0.00250467, 0.00239923, 0.00245146, 0.00247794, 0.00249127),
    6: (0.00064424, 0.000615963, 0.000629961, 0.000637065, 0.000640644),
    7: (0.000163478, 0.000156145, 0.000159774, 0.000161617, 0.000162545),
    8: (4.11851e-05, 3.93168e-05, 4.02412e-05, 4.07107e-05, 4.09473e-05)}


def lloyd_max(bits, dim):
  return codebook.exact(bits, dim) if dim else codebook.gaussian(bits)


@pytest.mark.parametrize('dim', DIMS)
@pytest.mark.parametrize('bits', range(1, 9))
def test_levels_thresholds_and_distortion_are_the_tabulated_ones(bits, dim):
  table = TABLE[TABLE[:, 0] == bits][:, 2 + 2 * DIMS.index(dim):][:, :2]
  found, half = lloyd_max(bits, dim), 2**(bits - 1)
  np.testing.assert_allclose(found.levels[half:], table[:, 0], atol=1e-6)
  np.testing.assert_allclose(found.thresholds[half - 1:], table[:, 1], atol=1e-6)
  np.testing.assert_allclose(found.distortion, DISTORTIONS[bits][DIMS.index(dim)], rtol=1e-4)


@pytest.mark.parametrize('make', [codebook.gaussian, lambda b: codebook.exact(b, 96), codebook.uniform, codebook.int8_grid])
@pytest.mark.parametrize('bits', [1, 3, 6])
def test_codebooks_are_odd_and_their_thresholds_are_midpoints(make, bits):
  found = make(bits)
  np.testing.assert_array_equal(found.levels, -found.levels[::-1])
  np.testing.assert_array_equal(found.thresholds, (found.levels[1:] + found.levels[:-1]) / 2)
  assert len(found.levels) == 2**bits and (np.diff(found.levels) > 0).all()


def test_one_and_two_bits_are_what_one_finds_by_hand():
  one, two = codebook.gaussian(1), codebook.gaussian(2)
  np.testing.assert_allclose(one.levels, [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)], atol=1e-12)
  np.testing.assert_allclose(one.distortion, 1 - 2 / math.pi, atol=1e-12)
  np.testing.assert_allclose(two.levels[2:], [0.452780, 1.510418], atol=1e-6)
  np.testing.assert_allclose(two.thresholds[2], 0.981599, atol=1e-6)


def test_three_dimensions_have_a_flat_density_and_equal_steps():
  found = codebook.exact(4, 3)      # Archimedes: a coordinate of a sphere is uniform
  np.testing.assert_allclose(np.diff(found.levels), math.sqrt(3) / 8, rtol=1e-12)
  np.testing.assert_allclose(found.distortion, 4.0**-4, rtol=1e-12)


@pytest.mark.parametrize(('bits', 'step', 'ratio'), [
    (2, 0.995687, 1.012), (3, 0.586019, 1.084), (4, 0.335201, 1.215), (5, 0.188139, 1.396), (6, None, 1.61), (8, None, 2.13)])
def test_uniform_has_the_best_step(bits, step, ratio):
  found = codebook.uniform(bits)
  np.testing.assert_allclose(found.levels, (np.arange(2**bits) - (2**bits - 1) / 2) * (found.levels[1] - found.levels[0]), atol=1e-12)
  if step:
    np.testing.assert_allclose(found.levels[1] - found.levels[0], step, atol=1e-6)
  np.testing.assert_allclose(found.distortion / codebook.gaussian(bits).distortion, ratio, rtol=4e-3)


@pytest.mark.parametrize(('bits', 'integers', 'ratio'), [
    (3, [14, 45, 79, 127], 1.0012), (4, [6, 18, 31, 44, 58, 75, 96, 127], 1.0014)])
def test_int8_grid_costs_a_thousandth(bits, integers, ratio):
  found = codebook.int8_grid(bits)
  np.testing.assert_allclose(127 * found.levels[2**(bits - 1):] / found.levels[-1], integers, rtol=1e-12)
  np.testing.assert_allclose(found.distortion / codebook.gaussian(bits).distortion, ratio, atol=1e-4)


def test_distortion_is_that_of_samples():
  y = np.random.default_rng(0).standard_normal(400_000)
  for found in (codebook.gaussian(4), codebook.uniform(4), codebook.int8_grid(4)):
    rounded = found.levels[np.searchsorted(found.thresholds, y)]
    np.testing.assert_allclose(np.mean((y - rounded)**2), found.distortion, rtol=0.01)


@pytest.mark.parametrize(('level', 'centroids', 'distortion'), [
    (2, [0.309788, 0.634033, 0.936866, 1.261068], 0.009909), (3, [0.426294, 0.674442, 0.896462, 1.144581], 0.006162),
    (4, [0.524258, 0.705964, 0.864939, 1.046622], 0.003393)])
def test_polar_angles_are_the_tabulated_ones(level, centroids, distortion):
  found = codebook.polar_angle(2, level)     # the table was made on a grid of angles, a little off symmetry
  np.testing.assert_allclose(found.levels + np.pi / 4, centroids, atol=1e-4)
  np.testing.assert_allclose(found.distortion, distortion, rtol=1e-3)


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: codebook.gaussian(0), 'bits=0: must be 1 to 8'), (lambda: codebook.uniform(9), 'bits=9'),
    (lambda: codebook.int8_grid(7), 'bits=7: the int8 grid'), (lambda: codebook.exact(4, 1), 'dim=1')])
def test_what_there_is_not_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
