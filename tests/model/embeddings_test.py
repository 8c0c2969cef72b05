"""Embedding arms: each one's own arithmetic, its weights, what it trains, and that it changes the model at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.model import embeddings, transformer
from tests import quick

BASE = config.shrink(config.E2B, pattern='LG', num_layers=4, num_kv_shared_layers=0, window=8)
SHARING = config.shrink(config.E2B, pattern='LG', num_layers=4, num_kv_shared_layers=2)
V, D, P, L = BASE.vocab_size, BASE.width, BASE.ple_dim, BASE.num_layers
IDS = np.array([[5, 9, 77, 9, 3, 5]], np.int32)
BATCH = IDS, np.ones_like(IDS), np.arange(6, dtype=np.int32)[None]


@functools.cache
def run(scan=False, **fields):
  """(logits, gradients by layer, initial weights) of the base model with these fields."""
  cfg = BASE.replace(scan=scan, **fields)
  params = transformer.init(cfg, 0)
  logits, _, grads = quick.loss_and_grads(cfg, params, *BATCH)
  if scan:
    grads, params = transformer.unstack(cfg, grads), transformer.unstack(cfg, params)
  return np.asarray(logits), grads, params


def named(tree):
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def rms(x, scale=1.0):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def test_ple_is_the_scaled_row_plus_the_normed_projection():
  rng = np.random.RandomState(0)
  table, project, scale, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((V, L, P), (L, P, D), (P,), (1, 6, D)))
  params = {'lookup': {'table': table}, 'project': {'w': project}, 'norm': {'scale': scale}}
  _, vectors = quick.apply(embeddings.PLE(BASE), params, IDS, IDS, x)
  for t, token in enumerate(IDS[0]):
    for layer in range(L):
      context = rms(project[layer] @ x[0, t] / np.sqrt(D), scale)
      expected = (np.sqrt(P) * table[token, layer] + context) / np.sqrt(2)
      np.testing.assert_allclose(vectors[layer][0, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('embedding', ['table_only', 'projection_only'])
def test_one_term_alone_is_not_rescaled(embedding):
  cfg = BASE.replace(embedding=embedding)
  params = transformer.init(cfg, 0)['arm']
  x = np.random.RandomState(0).standard_normal((1, 6, D)).astype(np.float32)
  _, vectors = quick.apply(embeddings.PLE(cfg), params, IDS, IDS, x)
  for layer in range(L):
    if embedding == 'table_only':
      expected = np.sqrt(P) * np.asarray(params['lookup']['table'])[IDS, layer]
    else:
      expected = rms(x @ np.asarray(params['project']['w'][layer]).T / np.sqrt(D))
    np.testing.assert_allclose(vectors[layer], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('gated', [True, False])
def test_a_block_ends_with_the_gated_vector_through_its_projection_and_norm(gated):
  cfg = BASE.replace(embedding='ple' if gated else 'ungated')
  params = transformer.init(cfg, 0)
  without = {**params, 'layer_0': {**params['layer_0'], 'post_ple_norm': {'scale': jnp.zeros(D)}}}
  stream = transformer.attention.Stream.make(cfg, jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32))
  rng = np.random.RandomState(0)
  x, vector = rng.standard_normal((1, 6, D)).astype(np.float32), rng.standard_normal((1, 6, P)).astype(np.float32)
  block = transformer.Block(cfg, cfg.layers[0])
  y = np.asarray(quick.apply(block, without['layer_0'], x, stream, None, vector)[0])
  ours = quick.apply(block, params['layer_0'], x, stream, None, vector)[0]
  u = vector
  if gated:
    z = y @ np.asarray(params['layer_0']['ple_gate']['w']).T
    u = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) * vector
  np.testing.assert_allclose(ours, y + rms(u @ np.asarray(params['layer_0']['ple_project']['w']).T), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('embedding', [arm for arm in config.EMBEDDING_ARMS if arm != 'none'])
def test_every_arm_changes_the_logits_of_the_standard_model_and_of_ple(embedding):
  for other in {'none', 'ple'} - {embedding}:
    assert np.abs(run(embedding=embedding)[0] - run(embedding=other)[0]).max() > 1e-2


@pytest.mark.parametrize('embedding', config.EMBEDDING_ARMS)
def test_every_weight_gets_a_gradient_but_a_frozen_table(embedding):
  for path, grad in named(run(embedding=embedding)[1]).items():
    if 'frozen_lookup' in path:
      np.testing.assert_array_equal(grad, 0)
    elif path != f"['layer_{L - 1}']['scalar']":   # the final norm takes out the last layer's scale
      assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize('embedding', quick.only([], config.EMBEDDING_ARMS))   # what blocks see
def test_every_arm_is_the_same_when_scanned(embedding):
  logits, grads, params = run(embedding=embedding)
  scanned_logits, scanned_grads, scanned_params = run(embedding=embedding, scan=True)
  jax.tree.map(np.testing.assert_array_equal, scanned_params, params)
  np.testing.assert_allclose(scanned_logits, logits, atol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max() + 1e-6), scanned_grads, grads)


@pytest.mark.parametrize('embedding', config.EMBEDDING_ARMS)
def test_arms_start_from_the_same_numbers_where_they_share_a_weight(embedding):
  base, arm = named(run(embedding='none')[2]), named(run(embedding=embedding)[2])
  absent = {path for path in base if path not in arm}
  assert absent == ({f"['layer_{i}']['mlp']['up']['w']" for i in range(L)} if embedding == 'stem' else set())
  for path in base.keys() - absent:
    np.testing.assert_array_equal(arm[path], base[path], err_msg=path)


@pytest.mark.parametrize('embedding, expected', [
    ('none', {}),
    ('ple', {'lookup': (V, L, P), 'project': (L, P, D), 'norm': (P,)}),
    ('table_only', {'lookup': (V, L, P)}),
    ('projection_only', {'project': (L, P, D), 'norm': (P,)}),
    ('shared_table', {'lookup': (V, 1, P), 'project': (L, P, D), 'norm': (P,)}),
    ('frozen_table', {'frozen_lookup': (V, L, P), 'project': (L, P, D), 'norm': (P,)}),
    ('permuted_table', {'lookup': (V, L, P), 'project': (L, P, D), 'norm': (P,)}),
    ('ungated', {'lookup': (V, L, P), 'project': (L, P, D), 'norm': (P,)}),
    ('value', {'lookup': (V, 16 + 32)}),                      # K * H of the two layers that own keys and values
    ('bigram', {'lookup': (V, D)}),
    ('stem', {'lookup': (V, sum(spec.mlp_dim for spec in SHARING.layers))}),
])
def test_arms_have_their_own_weights_and_no_others(embedding, expected):
  params = jax.tree.map(lambda box: box.value, transformer.abstract(SHARING.replace(embedding=embedding)),
                        is_leaf=lambda x: hasattr(x, 'names'))
  found = {name: next(iter(weights.values())).shape for name, weights in params.get('arm', {}).items()}
  assert found == expected
  in_layers = {name for i in range(L) for name in params[f'layer_{i}'] if 'ple' in name}
  gate = {'ple_gate'} if embedding in config.PLE_ARMS and embedding != 'ungated' else set()
  assert in_layers == (gate | {'ple_project', 'post_ple_norm'} if embedding in config.PLE_ARMS else set())


def test_a_permuted_table_is_ple_with_its_rows_permuted():
  cfg = BASE.replace(embedding='permuted_table')
  params = transformer.init(cfg, 0)
  permutation = np.asarray(embeddings._permutation(V))
  assert sorted(permutation) == list(range(V)) and (permutation != np.arange(V)).mean() > 0.9
  renamed = {**params, 'arm': {**params['arm'], 'lookup': {'table': params['arm']['lookup']['table'][permutation]}}}
  np.testing.assert_allclose(run(embedding='permuted_table')[0], quick.loss_and_grads(BASE, renamed, *BATCH)[0], atol=1e-5)


def test_a_shared_table_gives_every_layer_the_same_row():
  cfg = BASE.replace(embedding='shared_table')
  params = transformer.init(cfg, 0)['arm']
  as_ple = {**params, 'lookup': {'table': jnp.tile(params['lookup']['table'], (1, L, 1))}}
  x = np.random.RandomState(0).standard_normal((1, 6, D)).astype(np.float32)
  shared, ple = quick.apply(embeddings.PLE(cfg), params, IDS, IDS, x), quick.apply(embeddings.PLE(BASE), as_ple, IDS, IDS, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), shared, ple)


@pytest.mark.parametrize('fields, chosen', [({'ple_every': 2}, (1, 3)), ({'ple_layers': (0, 2, 3)}, (0, 2, 3))], ids=str)
def test_layers_that_are_not_chosen_are_left_alone(fields, chosen):
  params = transformer.init(BASE.replace(**fields), 0)
  standard = transformer.init(BASE.replace(embedding='none'), 0)
  assert params['arm']['lookup']['table'].shape == (V, len(chosen), P)
  for i in range(L):
    assert ('ple_gate' in params[f'layer_{i}']) == (i in chosen)
    assert i in chosen or params[f'layer_{i}'].keys() == standard[f'layer_{i}'].keys()
  _, vectors = quick.apply(embeddings.PLE(BASE.replace(**fields)), params['arm'], IDS, IDS, np.ones((1, 6, D), np.float32))
  assert tuple(i for i in range(L) if vectors[i] is not None) == chosen


def test_a_list_of_all_layers_is_the_released_arm():
  np.testing.assert_array_equal(run(embedding='ple', ple_layers=(0, 1, 2, 3))[0], run(embedding='ple')[0])


def test_value_vectors_are_mixed_into_the_values():
  cfg = BASE.replace(embedding='value')
  spec, params = cfg.layers[1], transformer.init(cfg, 0)['layer_1']['attention']
  rng = np.random.RandomState(0)
  x, value = rng.standard_normal((1, 6, D)).astype(np.float32), rng.standard_normal((1, 6, spec.inject_dim)).astype(np.float32)
  stream = transformer.attention.Stream.make(cfg, jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32))
  mixed = lambda a, b: np.asarray(quick.apply(transformer.attention.Attention(cfg, spec), {**params, 'value_mix': jnp.array([a, b])},
                                              x, stream, None, value)[1].v_BSKH)
  np.testing.assert_allclose(mixed(0.0, 2.0).reshape(value.shape), 2 * value, rtol=1e-6)
  np.testing.assert_allclose(mixed(0.25, 0.5), 0.25 * mixed(1.0, 0.0) + 0.5 * mixed(0.0, 1.0), rtol=1e-4, atol=1e-5)


def test_stem_rows_stand_in_for_the_up_projection():
  cfg = BASE.replace(embedding='stem')
  params = transformer.init(cfg, 0)
  rows = np.asarray(quick.apply(embeddings.TokenVectors(cfg), params['arm'], IDS, IDS, np.ones((1, 6, D), np.float32))[1][2])
  np.testing.assert_array_equal(rows, np.asarray(params['arm']['lookup']['table'])[IDS][..., 2 * BASE.mlp_dim:3 * BASE.mlp_dim])
  x = np.random.RandomState(0).standard_normal((1, 6, D)).astype(np.float32)
  gate, down = (np.asarray(params['layer_2']['mlp'][name]['w']) for name in ('gate', 'down'))
  z = x @ gate.T
  expected = (0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) * rows) @ down.T
  ours = quick.apply(transformer.layers.MLP(cfg, cfg.mlp_dim), params['layer_2']['mlp'], x, rows)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def embedded(cfg, params, ids, pos=None, seg=None):
  return np.asarray(quick.apply(transformer.Transformer(cfg), params, ids, pos, seg)[1]['embedded'])


def test_bigram_vectors_see_the_previous_token_and_never_across_documents():
  cfg = BASE.replace(embedding='bigram', bigram_buckets=1009)
  params = transformer.init(cfg, 0)
  ids = np.array([[5, 9, 7, 9, 7, 9]], np.int32)
  one, two = np.arange(6, dtype=np.int32)[None], np.array([[0, 1, 2, 0, 1, 2]], np.int32)
  segments = np.array([[1, 1, 1, 2, 2, 2]], np.int32)
  whole, packed = embedded(cfg, params, ids, one, np.ones_like(ids))[0], embedded(cfg, params, ids, two, segments)[0]
  np.testing.assert_array_equal(whole[3], whole[5])                  # 9 after 7, twice
  assert np.abs(whole[1] - whole[3]).max() > 1e-3                    # 9 after 5
  assert np.abs(whole[3] - packed[3]).max() > 1e-3                   # 9 first in its document
  np.testing.assert_array_equal(packed[3:], embedded(cfg, params, ids[:, 3:])[0])


def test_bigrams_spread_over_the_buckets():
  cfg = BASE.replace(embedding='bigram', bigram_buckets=V * V)
  table = np.arange(V * V, dtype=np.float32)[:, None] * np.ones(D, np.float32)
  prev, ids = np.meshgrid(np.arange(V, dtype=np.int32), np.arange(V, dtype=np.int32))
  x, _ = quick.apply(embeddings.Bigram(cfg), {'lookup': {'table': table}}, ids, prev, np.zeros((V, V, D), np.float32))
  buckets = np.unique(np.round(np.asarray(x)[..., 0] / np.sqrt(D)))
  assert buckets.min() >= 0 and buckets.max() < V * V
  assert len(buckets) > 0.6 * V * V   # 1 - 1/e = 0.63 of them, were they drawn at random


@pytest.mark.parametrize('embedding', ['none', 'ple', 'value', 'stem', 'bigram'])
def test_ids_outside_the_vocabulary_read_row_0(embedding):
  cfg = BASE.replace(embedding=embedding)
  ids = np.array([[5, V + 3, -1, 9, 3, 5]], np.int32)
  known = np.array([[5, 0, 0, 9, 3, 5]], np.int32)
  params = run(embedding=embedding)[2]
  ones, pos = BATCH[1:]
  apply = lambda ids: quick.apply(transformer.Transformer(cfg), params, ids, pos, ones)[0]
  np.testing.assert_array_equal(apply(ids), apply(known))
