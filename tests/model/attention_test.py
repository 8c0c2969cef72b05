"""Windows, blocks, documents and borrowed K/V."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.model import attention, transformer
from tests import quick

LOCAL = config.shrink(config.B31, pattern='L', num_layers=1, window=4)
SHARING = config.shrink(config.E2B, pattern='LG', num_layers=6, num_kv_shared_layers=2)   # 4 borrows from 2, 5 from 3


def influence(cfg, params, ids_BT, at):
  """For each position of row 0 with a token of its own, how much its embedding moves the last stream at position `at`."""
  @quick.jit
  def grads(params):
    def out(params):
      final_BTD = transformer.Transformer(cfg).apply({'params': params}, ids_BT, head=False)[0]
      return (final_BTD[0, at] * jnp.arange(1.0, 1 + cfg.width)).sum()
    return jax.grad(out)(params)['embedder']['table']
  return np.abs(np.asarray(grads(params)))[ids_BT[0]].max(-1)


@pytest.mark.parametrize('T', [4, 9, 12])   # within one window, past it, and whole blocks
def test_a_local_layer_sees_exactly_one_window_itself_included(T):
  ids_BT = np.arange(1, T + 1, dtype=np.int32)[None]
  seen = influence(LOCAL, transformer.init(LOCAL, 0), ids_BT, T - 1) > 0
  assert list(seen) == [t > T - 1 - LOCAL.window for t in range(T)]


def brute_force(q_BTNH, k_BSKH, v_BSKH, pos_BT, seg_BT, window, scale):
  B, T, N, H = q_BTNH.shape
  out_BTNH = np.zeros((B, T, N, H))
  for b in range(B):
    for t in range(T):
      seen = [s for s in range(T) if seg_BT[b, s] == seg_BT[b, t] > 0 and 0 <= pos_BT[b, t] - pos_BT[b, s] < (window or T)]
      for n in range(N if seen else 0):
        k = n // (N // k_BSKH.shape[2])
        weights = np.exp(scale * q_BTNH[b, t, n] @ k_BSKH[b, seen, k].T.astype(np.float64))
        out_BTNH[b, t, n] = weights @ v_BSKH[b, seen, k] / weights.sum()
  return out_BTNH


@pytest.mark.parametrize('T, window', [(3, 4), (8, 4), (11, 4), (13, 1), (11, None)])
def test_attention_equals_a_loop_over_queries_with_documents_and_padding(T, window):
  rng = np.random.RandomState(0)
  q, k, v = (rng.standard_normal((2, T, heads, 6)).astype(np.float32) for heads in (4, 2, 2))
  first = T // 3   # row 0: two documents that split inside a block; row 1: padding on the left
  seg = np.array([[1] * first + [2] * (T - first), [0] * first + [1] * (T - first)], np.int32)
  pos = np.tile([*range(first), *range(T - first)], (2, 1)).astype(np.int32)
  stream = attention.Stream(jnp.asarray(pos), jnp.asarray(seg), {})
  ours = attention.FreshKV(jnp.asarray(k), jnp.asarray(v)).attend(jnp.asarray(q), stream, window, 0.7)
  real = seg > 0
  np.testing.assert_allclose(np.asarray(ours)[real], brute_force(q, k, v, pos, seg, window, 0.7)[real], atol=2e-6)
  assert np.isfinite(ours).all()


@pytest.mark.parametrize('T', [5, 8, 11])
def test_blocked_attention_equals_the_plain_one(T):
  rng = np.random.RandomState(0)
  q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, T, 6, 8), (2, 2, T, 8), (2, 2, T, 8)))
  stream = attention.Stream(jnp.tile(jnp.arange(T), (2, 1)), jnp.ones((2, T), jnp.int32), {})
  plain = attention.attend(q, k, v, attention.see(stream, stream.pos_BT, stream.seg_BT, 4), 1.0)
  np.testing.assert_allclose(attention.attend_blocked(q, k, v, stream, 4, 1.0), plain, atol=1e-6)


def test_borrowing_layers_have_no_weights_for_keys_and_values():
  params = transformer.abstract(SHARING)
  for i, spec in enumerate(SHARING.layers):
    expected = {'q', 'q_norm', 'o'} if spec.kv_from is not None else {'q', 'q_norm', 'o', 'k', 'k_norm', 'v'}
    assert params[f'layer_{i}']['attention'].keys() == expected


@pytest.mark.parametrize('scan', quick.only([False], [False, True]))
def test_borrowing_layers_train_keys_and_values_of_their_donors_alone(scan):
  cfg = SHARING.replace(scan=scan)
  ids, mask, pos = np.arange(1, 10, dtype=np.int32)[None], np.ones((1, 9), np.int32), np.arange(9, dtype=np.int32)[None]

  def kv_gradients(silenced):
    """Largest gradient of k and v by owning layer, when the attention of the layers in `silenced` adds nothing."""
    params = transformer.init(SHARING, 0)
    for i in silenced:
      params[f'layer_{i}']['attention']['o']['w'] *= 0
    params = transformer.stack(cfg, params) if scan else params
    grads = quick.loss_and_grads(cfg, params, ids, mask, pos)[2]
    grads = transformer.unstack(cfg, grads) if scan else grads
    return [min(float(jnp.abs(grads[f'layer_{i}']['attention'][name]['w']).max()) for name in 'kv') for i in range(4)]

  assert [g > 0 for g in kv_gradients([])] == [True] * 4
  assert [g > 0 for g in kv_gradients([0, 1, 2, 3])] == [False, False, True, True]   # through layers 4 and 5 only
  assert [g > 0 for g in kv_gradients([0, 1, 2, 3, 4])] == [False, False, False, True]
  assert [g > 0 for g in kv_gradients([0, 1, 2, 3, 5])] == [False, False, True, False]


def test_a_borrowing_layer_attends_to_the_keys_it_is_handed():
  spec = SHARING.layers[5]
  params = transformer.init(SHARING, 0)['layer_5']['attention']
  rng = np.random.RandomState(0)
  x = rng.standard_normal((1, 5, SHARING.width)).astype(np.float32)
  k, v = rng.standard_normal((2, 1, 5, spec.num_kv_heads, spec.head_dim)).astype(np.float32)
  stream = attention.Stream.make(SHARING, jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))
  module = attention.Attention(SHARING, spec)
  out, kv = quick.apply(module, params, x, stream, attention.FreshKV(k, v))
  doubled, _ = quick.apply(module, params, x, stream, attention.FreshKV(k, 2 * v))
  np.testing.assert_array_equal(kv.k_BSKH, k)
  np.testing.assert_allclose(doubled, 2 * np.asarray(out), rtol=1e-5)


def test_values_of_a_k_eq_v_layer_are_its_keys_before_norm_and_rotation():
  cfg = config.shrink(config.B31)
  spec = cfg.layers[5]
  params = transformer.init(cfg, 0)['layer_5']['attention']
  assert 'v' not in params
  x = np.random.RandomState(0).standard_normal((1, 5, cfg.width)).astype(np.float32)
  stream = attention.Stream.make(cfg, jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))
  kv = quick.apply(attention.Attention(cfg, spec), params, x, stream)[1]
  p = np.einsum('btd,khd->btkh', x, params['k']['w'])
  expected = p / np.sqrt((p * p).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(kv.v_BSKH, expected, atol=1e-5)
  params['v'] = params['k']   # the same weights twice: an ordinary layer
  ordinary = attention.Attention(cfg, dataclasses.replace(spec, k_eq_v=False))
  np.testing.assert_allclose(quick.apply(ordinary, params, x, stream)[1].v_BSKH, expected, atol=1e-5)


def test_scores_of_many_queries_are_made_in_blocks_that_change_no_number_and_bound_the_memory(monkeypatch):
  B, T, N, K, H = 1, 512, 4, 2, 8
  rng = np.random.default_rng(0)
  q, k, v = (jnp.float32(rng.standard_normal((B, T, n, H))) for n in (N, K, K))
  pos = jnp.arange(T, dtype=jnp.int32)[None]
  stream = attention.Stream(pos, jnp.ones_like(pos).at[:, 300:].set(2).at[:, 505:].set(0), {})

  def run():
    def loss(q, k, v):
      out = attention.FreshKV(k, v).attend(q, stream, None, 0.3)
      return (out * jnp.cos(out)).sum(), out
    made = quick.jit(lambda *qkv: jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)).lower(q, k, v).compile()
    return made(q, k, v), made.memory_analysis().temp_size_in_bytes

  whole, memory = run()
  monkeypatch.setattr(attention, '_SCORES', 4 * N * T * 24)
  monkeypatch.setattr(attention, '_BLOCK', 24)   # five blocks and a bit of each quarter
  parts, less = run()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts, whole)
  assert less < memory / 2
