"""Norms, RoPE, the MLP and initialisation, against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.model import layers, transformer
from tests import quick

CFG = config.shrink(config.E2B, pattern='LG', num_layers=4, num_kv_shared_layers=0)


def leaves(tree):
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.parametrize('base, fraction, turning', [(1e4, 1.0, 8), (1e6, 0.25, 2), (1e4, 0.0, 0)])
def test_rope_turns_the_first_pairs_by_their_own_speeds(base, fraction, turning):
  H, pos_BT = 16, np.array([[0, 1, 5, 70_000]], np.int32)
  x_BTNH = np.random.RandomState(0).standard_normal((1, 4, 3, H)).astype(np.float32)
  expected = x_BTNH.astype(np.float64)
  for t in range(4):
    for j in range(turning):
      angle = np.float32(pos_BT[0, t]) * np.float32(base ** (-2 * j / H))
      a, b = x_BTNH[0, t, :, j], x_BTNH[0, t, :, j + H // 2]
      expected[0, t, :, j] = a * np.cos(angle) - b * np.sin(angle)
      expected[0, t, :, j + H // 2] = b * np.cos(angle) + a * np.sin(angle)
  ours = layers.rope(x_BTNH, layers.rope_angles(jnp.asarray(pos_BT), H, base, fraction))
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_rope_tells_neighbouring_positions_apart_in_bfloat16():
  x_BTNH = jnp.ones((1, 2, 1, 16), jnp.bfloat16)
  ours = layers.rope(x_BTNH, layers.rope_angles(jnp.array([[1024, 1025]]), 16, 1e4, 1.0))
  assert ours.dtype == jnp.bfloat16
  assert np.abs(np.float32(ours[:, 0] - ours[:, 1])).max() > 0.1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rms_norm_divides_by_the_root_mean_square_in_float32(dtype):
  x = (300 * np.random.RandomState(0).standard_normal((3, 5))).astype(np.float32)
  scale = np.array([1, 2, -1, 0.5, 0], np.float32)
  x = jnp.asarray(x, dtype)
  ours = layers.RMSNorm(CFG).apply({'params': {'scale': jnp.asarray(scale)}}, x)
  y = np.float32(x)
  expected = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * scale
  assert ours.dtype == x.dtype
  np.testing.assert_allclose(np.float32(ours), expected, rtol=1e-6 if dtype == 'float32' else 2**-8)


@pytest.mark.parametrize('fields', [{}, {'activation': 'silu'}, {'gated_mlp': False}], ids=str)
def test_the_mlp_is_gate_times_up_through_down(fields):
  rng = np.random.RandomState(0)
  x, gate, up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 3, 4), (6, 4), (6, 4), (4, 6)))
  cfg = CFG.replace(**fields)
  params = {'gate': {'w': gate}, 'up': {'w': up}, 'down': {'w': down}}

  def act(z):
    return z / (1 + np.exp(-z)) if cfg.activation == 'silu' else 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
  hidden = act(x @ gate.T) * (x @ up.T) if cfg.gated_mlp else act(x @ up.T)
  np.testing.assert_allclose(layers.MLP(cfg, 6).apply({'params': params}, x), hidden @ down.T, rtol=1e-5, atol=1e-5)


def test_a_weight_starts_from_its_seed_path_and_shape_alone():
  base, other = leaves(transformer.init(CFG, 0)), leaves(transformer.init(CFG.replace(
      num_layers=6, vocab_size=64, window=7, embedding='none', qk_norm=False, tied_embeddings=False), 0))
  common = [path for path in base if path in other and base[path].shape == other[path].shape]
  assert len(common) > 30
  for path in common:
    np.testing.assert_array_equal(base[path], other[path], err_msg=path)


def test_seeds_and_paths_draw_different_numbers():
  first, second = leaves(transformer.init(CFG, 0)), leaves(transformer.init(CFG, 1))
  path, twin = "['layer_0']['attention']['q']['w']", "['layer_2']['attention']['q']['w']"
  assert not np.array_equal(first[path], second[path])
  assert first[path].shape == first[twin].shape and not np.array_equal(first[path], first[twin])


def test_matrices_start_with_the_spread_of_their_fan_in_and_norms_at_one():
  params = transformer.init(CFG, 0)
  layer = params['layer_0']
  for weight, fan_in in ((layer['attention']['q']['w'], 64), (layer['attention']['o']['w'], 4 * 16), (layer['mlp']['down']['w'], 96),
                         (layer['ple_gate']['w'], 64), (params['embedder']['table'], 64), (params['arm']['lookup']['table'], 8)):
    assert np.std(weight) == pytest.approx(fan_in**-0.5, rel=0.1)
  np.testing.assert_array_equal(layer['pre_mlp_norm']['scale'], 1)
  np.testing.assert_array_equal(layer['scalar'], 1)


def test_scanned_models_start_from_the_same_numbers():
  scanned = CFG.replace(scan=True)
  plain, stacked = transformer.init(CFG, 0), transformer.init(scanned, 0)
  assert {name for name in stacked if name.startswith('group_')} == {'group_0'}
  jax.tree.map(np.testing.assert_array_equal, transformer.unstack(scanned, stacked), plain)


@pytest.mark.slow
def test_parameters_and_activations_have_the_dtypes_of_the_config():
  ids = np.arange(6, dtype=np.int32)[None]
  cfg = CFG.replace(param_dtype='bfloat16', dtype='bfloat16')
  params, exact_params = transformer.init(cfg, 0), transformer.init(CFG, 0)
  logits, out = quick.apply(transformer.Transformer(cfg), params, ids)
  exact, _ = quick.apply(transformer.Transformer(CFG), exact_params, ids)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {'bfloat16'}
  assert (out['final'].dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), params, exact_params)
  assert 1e-4 < np.abs(logits - exact).mean() < 0.1 * np.abs(exact).mean()


@pytest.mark.parametrize('dtype', [None, jnp.float32])
def test_many_rows_in_bfloat16_are_summed_in_float32_where_the_matvec_is_native(dtype):
  x_RK, w_NK = (np.random.RandomState(i).standard_normal((n, 8)).astype(jnp.bfloat16) for i, n in enumerate((16, 4)))
  multiply = jax.jit(lambda x, w: layers.contract(x, w, 1, dtype, rows='native'))
  assert '(tensor<16x8xbf16>, tensor<4x8xbf16>) -> tensor<16x4xf32>' in multiply.lower(x_RK, w_NK).as_text()
  y_RN = multiply(x_RK, w_NK)
  assert y_RN.dtype == (dtype or jnp.bfloat16)
  np.testing.assert_allclose(y_RN.astype(np.float32), x_RK.astype(np.float32) @ w_NK.astype(np.float32).T, rtol=2**-8, atol=1e-5)
