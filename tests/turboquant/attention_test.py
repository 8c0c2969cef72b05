"""What quantized keys and values do to attention, in simulation: random keys, logits of standard deviation sigma."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.turboquant import codebook
from gemma4_jax.turboquant.quantizer import Quantizer
from gemma4_jax.turboquant.residual import Residual

DIM, TOKENS, QUERIES = 256, 4096, 64


@functools.cache
def data():
  rng = np.random.default_rng(41)
  keys, values = rng.standard_normal((2, TOKENS, DIM))
  queries = rng.standard_normal((QUERIES, DIM))
  return jnp.float32(keys), jnp.float32(values), jnp.float32(queries / np.linalg.norm(queries, axis=-1, keepdims=True))


def divergence(method, sigma):
  """Mean KL of attention over quantized keys from exact attention, and the mean of sum p^2."""
  keys, _, queries = data()
  p = jax.nn.log_softmax(sigma * queries @ keys.T)
  quantized = jax.nn.log_softmax(sigma * queries @ method.decode(method.encode(keys)).T)
  return float((jnp.exp(p) * (p - quantized)).sum(-1).mean()), float(jnp.exp(2 * p).sum(-1).mean())


@pytest.mark.parametrize('sigma', [1, 2])
@pytest.mark.parametrize('bits', [3, 4, 5])
def test_keys_cost_half_of_the_logits_noise(bits, sigma):
  kl, peak = divergence(Quantizer(DIM, bits), sigma)
  expected = sigma**2 * codebook.exact(bits, DIM).distortion / 2
  assert 0.85 * expected * (1 - peak) < kl < 1.15 * expected


def test_prod_costs_several_times_as_much_at_equal_bits():
  for bits, plain, prod in ((4, 0.0188, 0.107), (3, 0.070, 0.367)):
    np.testing.assert_allclose(divergence(Quantizer(DIM, bits), 2)[0], plain, rtol=0.12)
    np.testing.assert_allclose(divergence(Residual(DIM, bits, 'gaussian'), 2)[0], prod, rtol=0.12)


@pytest.mark.parametrize('sigma', [0.5, 2])
@pytest.mark.parametrize(('bits', 'expected'), [(2, 0.34), (3, 0.185), (4, 0.097), (5, 0.049)])
def test_values_cost_the_root_of_their_distortion(bits, expected, sigma):
  keys, values, queries = data()
  p = jax.nn.softmax(sigma * queries @ keys.T)
  method = Quantizer(DIM, bits, scale='norm_matched')
  exact, found = p @ values, p @ method.decode(method.encode(values))
  wrong = float((jnp.linalg.norm(found - exact, axis=-1) / jnp.linalg.norm(exact, axis=-1)).mean())
  np.testing.assert_allclose(wrong, expected, rtol=0.05)
