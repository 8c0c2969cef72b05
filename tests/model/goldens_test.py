"""Parity with `transformers` without `transformers`: its logits, loss and gradient norms, stored by tests/goldens/make.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.checkpoint import hf
from tests import hf_models, quick
from tests.goldens import make


@pytest.fixture(scope='module', params=hf_models.TINY)
def results(request):
  """(stored, ours)"""
  cfg = hf.config_from_hf(hf_models.TINY[request.param])
  params = jax.tree.map(jnp.asarray, hf.params_from_hf(cfg, hf_models.random_state(cfg)))
  logits, loss, grads = quick.loss_and_grads(cfg, params, *hf_models.batch(make.LAYOUT))
  return np.load(make.path(request.param)), (np.asarray(logits), float(loss), hf.params_to_hf(cfg, grads))


def test_logits_are_the_stored_ones_at_real_tokens(results):
  stored, (logits, _, _) = results
  real = hf_models.batch(make.LAYOUT)[1] > 0
  assert np.abs(logits - stored['logits'])[real].max() <= 5e-4


def test_loss_and_gradient_norms_are_the_stored_ones(results):
  stored, (_, loss, grads) = results
  assert loss == pytest.approx(float(stored['loss']), rel=1e-5)
  assert sorted(grads) == list(stored['names'])
  for name, norm in zip(stored['names'], stored['gradient_norms'], strict=True):
    if not name.endswith('layer_scalar'):   # one number, which may cancel to rounding
      assert np.linalg.norm(grads[name]) == pytest.approx(norm, rel=1e-3), name
