import ml_dtypes
import numpy as np
import pytest

from gemma4_jax.turboquant import codebook, rotation
from gemma4_jax.turboquant.quantizer import Quantizer


@pytest.mark.parametrize('kind', rotation.KINDS)
@pytest.mark.parametrize('dim', [1, 2, 96, 128, 512])
def test_matrices_are_orthogonal(kind, dim):
  matrix = rotation.matrix(kind, dim)
  assert matrix.dtype == np.float32 and matrix.shape == (dim, dim)
  product = matrix.astype(np.float64) @ matrix.T
  assert np.abs(product - np.eye(dim)).max() <= 1e-6


@pytest.mark.parametrize('kind', rotation.KINDS)
def test_rotations_come_back_and_keep_inner_products(kind):
  q, k = np.random.default_rng(0).standard_normal((2, 100, 256)).astype(np.float32)
  matrix = rotation.matrix(kind, 256)
  q_turned, k_turned = (np.asarray(rotation.apply(matrix, x)) for x in (q, k))
  back = np.asarray(rotation.apply(matrix.T, q_turned))
  assert (np.linalg.norm(back - q, axis=-1) <= 1e-6 * np.linalg.norm(q, axis=-1)).all()
  error = np.abs((q_turned * k_turned).sum(-1) - (q * k).sum(-1))
  assert (error <= 1e-5 * np.linalg.norm(q, axis=-1) * np.linalg.norm(k, axis=-1)).all()
  np.testing.assert_allclose(q_turned[0], matrix @ q[0], atol=1e-5)      # and it is matrix @ x, not its transpose


@pytest.mark.parametrize('dim', [64, 128, 256, 512, 1024])
def test_two_rounds_are_even_integers_over_dim_and_exact_in_bfloat16(dim):
  matrix = rotation.matrix('hadamard2', dim)
  integers = matrix.astype(np.float64) * dim
  np.testing.assert_array_equal(integers, 2 * np.rint(integers / 2))
  np.testing.assert_array_equal(matrix, matrix.astype(ml_dtypes.bfloat16).astype(np.float32))
  assert len(np.unique(np.abs(integers))) > 4      # not one round's two values


def test_one_round_is_exact_in_bfloat16_at_powers_of_four():
  for dim in (64, 256):
    matrix = rotation.matrix('hadamard1', dim)
    np.testing.assert_array_equal(matrix, matrix.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize('kind', ['hadamard2', 'hadamard1'])
def test_dims_that_are_no_power_of_two_are_uniformly_random(kind):
  np.testing.assert_array_equal(rotation.matrix(kind, 96, 3), rotation.matrix('haar', 96, 3))


def test_a_seed_says_all_and_seeds_differ():
  rotation.matrix.cache_clear()
  first = rotation.matrix('hadamard2', 64, 1)
  rotation.matrix.cache_clear()
  np.testing.assert_array_equal(first, rotation.matrix('hadamard2', 64, 1))
  assert (first != rotation.matrix('hadamard2', 64, 2)).any()
  # As stored files rely on: these numbers must never change.
  np.testing.assert_array_equal(8 * rotation.matrix('hadamard2', 8, 0)[0], [2, -2, 2, -2, 2, -2, 2, -6])


def test_other_generators_of_the_same_seed_draw_other_numbers():
  mine = rotation.normals((1000,), 0)
  for bit_generator in (np.random.PCG64(0), np.random.Philox(0), np.random.MT19937(0)):
    assert abs(np.corrcoef(mine, np.random.Generator(bit_generator).standard_normal(1000))[0, 1]) < 0.15
  assert abs(np.corrcoef(mine, rotation.normals((1000,), 0, stream=1))[0, 1]) < 0.15


@pytest.mark.parametrize('kind', ['hadamard2', 'haar'])
def test_a_fixed_vector_becomes_nearly_normal(kind):
  dim, x = 64, np.arange(64) - 20.0
  x *= np.sqrt(dim) / np.linalg.norm(x)
  y = np.stack([rotation.matrix(kind, dim, seed) @ x for seed in range(2000)])
  np.testing.assert_allclose((y**2).mean(), 1, rtol=0.01)
  np.testing.assert_allclose((y**2).mean(0), 1, atol=0.2)
  np.testing.assert_allclose((y**4).mean(), 3 * dim / (dim + 2), rtol=0.03)


def hard_inputs(dim):
  rng = np.random.default_rng(1)
  outlier = rng.standard_normal(dim)
  outlier[dim // 3] = 50
  return np.stack([np.eye(dim)[7], np.ones(dim), np.arange(dim) + 1.0, 5 + rng.standard_normal(dim), outlier])


def distortions(kind, bits, seeds, dim=256):
  """[seeds, inputs]."""
  x = hard_inputs(dim)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  y = np.stack([x @ rotation.matrix(kind, dim, seed).T for seed in range(seeds)]).astype(np.float32)
  plain = Quantizer(dim, bits, 'none', scale='norm', scale_dtype='float32')
  return np.square(np.asarray(plain.decode(plain.encode(y))) - y).sum(-1)


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_two_rounds_make_hard_inputs_easy(bits):
  best = codebook.gaussian(bits).distortion
  found = distortions('hadamard2', bits, seeds=64)
  assert (found.mean(0) <= 1.25 * best).all(), found.mean(0) / best
  assert (found.max(0) <= 3 * best).all(), found.max(0) / best


def test_one_round_leaves_a_spike_hard_and_no_rotation_most():
  best = codebook.gaussian(2).distortion
  assert distortions('hadamard1', 2, seeds=4)[:, 0].min() > 2 * best
  assert distortions('none', 2, seeds=1)[0, [0, 4]].min() > 5 * best


def test_an_unknown_kind_is_refused_by_name():
  with pytest.raises(ValueError, match="rotation='hadamard': must be one of hadamard2, hadamard1, haar, none"):
    rotation.matrix('hadamard', 64)


def test_vectors_of_another_length_are_refused():
  with pytest.raises(ValueError, match='vectors of 32 numbers where dim=64'):
    rotation.apply(rotation.matrix('none', 64), np.ones((2, 32)))
