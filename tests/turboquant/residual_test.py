import math

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.turboquant import codebook, rotation
from gemma4_jax.turboquant.residual import Residual

DIM = 256


def directions(n, seed=21):
  x = np.random.default_rng(seed).standard_normal((n, DIM))
  return jnp.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


@pytest.mark.parametrize('sketch', ['gaussian', 'orthogonal'])
@pytest.mark.parametrize('bits', [1, 2, 4])
def test_inner_products_are_unbiased(bits, sketch):
  x, noise, estimates = directions(2000), directions(2000, seed=22), []
  noise -= (noise * x).sum(-1, keepdims=True) * x
  noise /= jnp.linalg.norm(noise, axis=-1, keepdims=True)
  for seed in range(8):       # a fixed S is unbiased up to the spread of its rows' lengths
    method = Residual(DIM, bits, sketch, seed=seed)
    for cosine in (-0.9, 0.9):
      q = cosine * x + math.sqrt(1 - cosine**2) * noise
      estimates.append((method.decode(method.encode(x)) * q).sum(-1).mean() / cosine)
  np.testing.assert_allclose(np.mean(estimates), 1, atol=0.003)


@pytest.mark.parametrize(('sketch', 'factor'), [('gaussian', math.pi / 2), ('orthogonal', math.pi / 2 - 1)])
@pytest.mark.parametrize('bits', [1, 2, 3, 4])
def test_inner_products_of_random_pairs_have_the_variance_of_theory(bits, sketch, factor):
  x, q = directions(10_000), directions(10_000, seed=23)
  method = Residual(DIM, bits, sketch)
  wrong = ((method.decode(method.encode(x)) - x) * q).sum(-1)
  before = codebook.exact(bits - 1, DIM).distortion if bits > 1 else 1.0
  np.testing.assert_allclose(DIM * jnp.square(wrong).mean(), factor * before, rtol=0.05)


@pytest.mark.parametrize('bits', [1, 3])
def test_inner_is_the_product_with_the_decoded_vectors(bits):
  method, q, k = Residual(DIM, bits), directions(5), directions(7, seed=24)
  codes = method.encode(k)
  np.testing.assert_allclose(method.inner(q, codes), q @ method.decode(codes).T, atol=1e-5)


def test_the_sketch_does_not_depend_on_the_rotation():
  gaussian = Residual(64, 4, 'gaussian', rotation='haar').matrix
  assert np.abs(np.corrcoef(gaussian.ravel(), rotation.normals((64, 64), 0).ravel())[0, 1]) < 0.05
  orthogonal = Residual(64, 4, rotation='haar').matrix
  np.testing.assert_allclose(orthogonal @ orthogonal.T, np.eye(64), atol=1e-6)
  assert np.abs((orthogonal * rotation.matrix('haar', 64)).sum()) < 5       # 64 if they were one


def test_zero_stays_zero():
  for bits in (1, 3):
    method = Residual(64, bits)
    assert not np.asarray(method.decode(method.encode(jnp.zeros((2, 64))))).any()


def test_bits_count_signs_and_both_scales():
  assert Residual(256, 4).bits_per_number == 4 + 32 / 256
  assert Residual(256, 1).bits_per_number == 1 + 16 / 256


def test_an_unknown_sketch_is_refused_by_name():
  with pytest.raises(ValueError, match="sketch='sparse': must be 'orthogonal' or 'gaussian'"):
    Residual(64, 4, sketch='sparse')
