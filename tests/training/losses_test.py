"""The chunked loss against whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.training import losses

R, D, V = 37, 16, 50


def _inputs(scale=1.0):
  keys = jax.random.split(jax.random.key(0), 4)
  x_RD = scale * jax.random.normal(keys[0], (R, D))
  return (x_RD, jax.random.normal(keys[1], (V, D)), jax.random.randint(keys[2], (R,), 0, V),
          (jax.random.uniform(keys[3], (R,)) > 0.3).astype(jnp.float32))


def _whole(x_RD, table_VD, target_R, cap):
  logits = x_RD @ table_VD.T
  logits = cap * jnp.tanh(logits / cap) if cap else logits
  return jax.nn.logsumexp(logits, -1) - logits[jnp.arange(R), target_R]


@pytest.mark.parametrize('cap', [0.0, 5.0])
@pytest.mark.parametrize('chunk', [1, 8, R, 1000])
def test_chunked_loss_and_gradient_equal_whole_logits(cap, chunk):
  x, table, target, weight = _inputs()
  want, want_grads = jax.value_and_grad(lambda x, t: (_whole(x, t, target, cap) * weight).sum(), (0, 1))(x, table)
  got, got_grads = jax.value_and_grad(lambda x, t: losses.nll_sum(x, t, target, weight, cap, chunk), (0, 1))(x, table)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  for a, b in zip(got_grads, want_grads):
    np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_per_token_nll_equals_whole_logits():
  x, table, target, _ = _inputs()
  np.testing.assert_allclose(losses.token_nll(x, table, target, cap=30.0, chunk=8), _whole(x, table, target, 30.0), rtol=1e-5, atol=1e-5)


def test_gradient_scales_with_what_comes_from_above():
  x, table, target, weight = _inputs()
  once, thrice = (jax.grad(lambda x: k * losses.nll_sum(x, table, target, weight, 30.0, 8))(x) for k in (1, 3))
  np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_loss_of_bfloat16_inputs_is_float32_and_stays_finite_at_the_cap():
  x, table, target, weight = _inputs(scale=1000.0)
  loss, grad = jax.value_and_grad(lambda x: losses.nll_sum(x, table, target, weight, 30.0, 8))(x.astype(jnp.bfloat16))
  assert loss.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
  assert np.isfinite(loss) and np.isfinite(np.asarray(grad, np.float32)).all()
