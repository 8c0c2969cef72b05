"""The mixture of experts against a loop over tokens, and its three implementations against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.model import moe
from tests import quick

CFG = config.shrink(config.B26_A4)
D, E, F = CFG.width, CFG.num_experts, CFG.expert_dim


def weights():
  rng = np.random.RandomState(0)
  normal = lambda *shape: (rng.standard_normal(shape) * shape[-1]**-0.5).astype(np.float32)
  return {'router': {'w': 8 * normal(E, D)}, 'router_scale': 1 + normal(D), 'per_expert_scale': 1 + normal(E),
          'gate': normal(E, F, D), 'up': normal(E, F, D), 'down': normal(E, D, F)}


def inputs():
  return np.random.RandomState(1).standard_normal((2, 2, 5, D)).astype(np.float32)   # of the router, of the experts


def gelu(z):
  return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def by_hand(cfg, w, router_in_BTD, x_BTD):
  z_BTD = router_in_BTD.astype(np.float64)
  if cfg.router_norm:
    z_BTD = z_BTD / np.sqrt((z_BTD**2).mean(-1, keepdims=True) + 1e-6) * w['router_scale'] * D**-0.5
  y_BTD = np.zeros_like(x_BTD, np.float64)
  for b, t in np.ndindex(x_BTD.shape[:2]):
    scores = np.exp(w['router']['w'] @ z_BTD[b, t])
    chosen = np.argsort(-scores)[:cfg.num_experts_per_token]
    for e in chosen:
      share = scores[e] / scores[chosen].sum() * (w['per_expert_scale'][e] if cfg.per_expert_scale else 1)
      y_BTD[b, t] += share * w['down'][e] @ (gelu(w['gate'][e] @ x_BTD[b, t]) * (w['up'][e] @ x_BTD[b, t]))
  return y_BTD


@pytest.mark.parametrize('fields', [{}, {'router_norm': False}, {'per_expert_scale': False}, {'num_experts_per_token': 3}], ids=str)
@pytest.mark.parametrize('implementation', ['ragged', 'scan', 'gather'])
def test_tokens_go_to_their_best_experts_renormalised_then_scaled(implementation, fields):
  cfg = CFG.replace(moe_implementation=implementation, **fields)
  ours, probs_BTE = quick.apply(moe.MoE(cfg), weights(), *inputs())
  expected = by_hand(cfg, weights(), *inputs())
  assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(probs_BTE.sum(-1), 1, rtol=1e-5)


def test_the_router_reads_its_own_input():
  router_in, x = inputs()
  first, _ = quick.apply(moe.MoE(CFG), weights(), router_in, x)
  second, _ = quick.apply(moe.MoE(CFG), weights(), 3 * router_in, x)   # its norm takes the factor out
  third, _ = quick.apply(moe.MoE(CFG), weights(), -router_in, x)
  np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-5)
  assert np.abs(third - first).max() > 0.1


def test_implementations_agree_in_value_and_gradient():
  def run(implementation):
    @quick.jit
    def loss_and_grads(params, router_in, x):
      def loss(params, router_in, x):
        y = moe.MoE(CFG.replace(moe_implementation=implementation)).apply({'params': params}, router_in, x)[0]
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y
      return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, router_in, x)
    (_, y), grads = loss_and_grads(weights(), *inputs())
    return y, grads

  expected = run('ragged')
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
  for implementation in ('scan', 'gather'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), run(implementation), expected)


def test_experts_that_nobody_chose_get_no_gradient():
  params = weights()
  params['router']['w'][:] = 0
  params['router_scale'][:] = 1
  router_in = np.ones((1, 2, D), np.float32)
  params['router']['w'][[2, 5]] = 1   # these two win for every token
  model = moe.MoE(CFG.replace(moe_implementation='ragged'))
  grads = jax.grad(lambda p: model.apply({'params': p}, router_in, inputs()[1][:1, :2])[0].sum())(params)
  used = [bool(np.abs(grads['down'][e]).max() > 0) for e in range(E)]
  assert used == [e in (2, 5) for e in range(E)]


def test_auto_gathers_weights_for_few_tokens_and_scans_for_many_but_on_a_tpu(monkeypatch):
  for platform in ('cpu', 'gpu', 'tpu'):   # a grouped matmul on the last alone
    monkeypatch.setattr(moe.hardware, 'platform', lambda platform=platform: platform)
    assert [moe.implementation(CFG, tokens) for tokens in (1, E)] == (['ragged'] * 2 if platform == 'tpu' else ['gather', 'scan'])
    assert [moe.implementation(CFG, tokens, packed=True) for tokens in (1, E)] == ['gather', 'scan']
  assert moe.implementation(CFG.replace(moe_implementation='ragged'), E) == 'ragged'
