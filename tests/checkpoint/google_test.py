"""Google's Orbax tree: every spelling of it, against a mapping to Hugging Face's names written out here by hand."""

import json

from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma4_jax import config
from gemma4_jax.checkpoint import google, hf, load
from tests import hf_models

CONFIGS = hf_models.configs()
MODELS = {name: CONFIGS[name] for name in ('dense_ple_kvshare', 'large_kv', 'moe')}


def tree_of(cfg, state):
  """Hugging Face's state dict -> Google's nested tree; axes and names as Google documents them, tensor by tensor."""
  D, N, L, P = cfg.width, cfg.num_heads, cfg.num_layers, cfg.ple_dim
  get = lambda name: state[f'model.{name}']
  tree = {'embedder/input_embedding': get('embed_tokens.weight'), 'final_norm/scale': get('norm.weight')}
  if cfg.embedding == 'ple':
    tree['embedder/per_layer_embeddings'] = get('embed_tokens_per_layer.weight').reshape(-1, L, P)
    tree['embedder/per_layer_model_projection/w'] = get('per_layer_model_projection.weight').T.reshape(D, L, P)
    tree['embedder/per_layer_projection_norm/scale'] = get('per_layer_projection_norm.weight')
  for i, spec in enumerate(cfg.layers):
    H, K = spec.head_dim, spec.num_kv_heads
    get = lambda name: state[f'model.layers.{i}.{name}']   # noqa: B023
    heads = lambda w, n: w.reshape(n, H, D).transpose(0, 2, 1)   # noqa: B023
    mlp = np.stack([get('mlp.gate_proj.weight'), get('mlp.up_proj.weight')])
    layer = {
        'pre_attention_norm/scale': get('input_layernorm.weight'),
        'post_attention_norm/scale': get('post_attention_layernorm.weight'),
        'post_ffw_norm/scale': get('post_feedforward_layernorm.weight'),
        'skip_scale': get('layer_scalar'),
        'attn/q_einsum/w': heads(get('self_attn.q_proj.weight'), N),
        'attn/query_norm/scale': get('self_attn.q_norm.weight'),
        'attn/attn_vec_einsum/w': get('self_attn.o_proj.weight').T.reshape(N, H, D)}
    if spec.kv_from is not None:   # made by Google's module, read by none
      layer['attn/kv_einsum/w'] = np.full((2, K, D, H), np.nan, np.float32)
      layer['attn/key_norm/scale'] = np.full(H, np.nan, np.float32)
    elif spec.k_eq_v:
      layer['attn/k_einsum/w'] = heads(get('self_attn.k_proj.weight'), K)
    else:
      layer['attn/kv_einsum/w'] = np.stack([heads(get(f'self_attn.{part}_proj.weight'), K) for part in 'kv'])
    if spec.kv_from is None:
      layer['attn/key_norm/scale'] = get('self_attn.k_norm.weight')
    if cfg.num_experts:
      layer |= {
          'pre_ffw2_norm/scale': get('pre_feedforward_layernorm.weight'),
          'mlp2/gating_einsum': mlp, 'mlp2/linear': get('mlp.down_proj.weight').T,
          'post_ffw2_norm/scale': get('post_feedforward_layernorm_1.weight'),
          'pre_ffw_norm/scale': get('pre_feedforward_layernorm_2.weight'),
          'mlp/router_logits/w': get('router.proj.weight').T,
          'mlp/router_scale': get('router.scale'), 'mlp/per_expert_scale': get('router.per_expert_scale'),
          'mlp/gating_einsum/w': get('experts.gate_up_proj').reshape(cfg.num_experts, 2, cfg.expert_dim, D),
          'mlp/linear/w': get('experts.down_proj').transpose(0, 2, 1),
          'post_ffw1_norm/scale': get('post_feedforward_layernorm_2.weight')}
    else:
      layer |= {'pre_ffw_norm/scale': get('pre_feedforward_layernorm.weight'),
                'mlp/gating_einsum': mlp, 'mlp/linear': get('mlp.down_proj.weight').T}
    if cfg.embedding == 'ple':
      layer |= {'per_layer_input_gate/w': get('per_layer_input_gate.weight').T,
                'per_layer_projection/w': get('per_layer_projection.weight').T,
                'post_per_layer_input_norm/scale': get('post_per_layer_input_norm.weight')}
    tree |= {f'layer_{i}/{name}': array for name, array in layer.items()}
  tree |= {'vision_encoder/entry/input_projection/w': np.ones((3, 4), np.float32),
           'embedder/mm_input_projection/w': np.ones((4, D), np.float32)}
  return {name: np.ascontiguousarray(array) for name, array in tree.items()}


def nested(flat):
  return traverse_util.unflatten_dict(flat, sep='/')


def under_transformer(flat):
  return {'transformer': nested(flat)}


def joined(flat):
  """Modules joined, weights apart, with the old names of the norms."""
  tree = {}
  for name, array in flat.items():
    module, leaf = name.replace('query_norm', '_query_norm').replace('key_norm', '_key_norm').rsplit('/', 1)
    if name.endswith('gating_einsum') or name.endswith('linear'):   # modules there
      module, leaf = name, 'w'
    tree.setdefault(f'transformer/{module}', {})[leaf] = array
  return tree


def stacked(flat, period=3):
  """Layers of one place in the attention pattern stacked, layer r * period + k as row r of attention_type_k."""
  tree = {name: array for name, array in flat.items() if not name.startswith('layer_')}
  layers = {name: array for name, array in flat.items() if name.startswith('layer_')}
  count = len({name.split('/')[0] for name in layers})
  for k in range(period):
    for name in (name for name in layers if name.startswith(f'layer_{k}/')):
      rest = name.partition('/')[2]
      tree[f'stacked_layers/attention_type_{k}/{rest}'] = np.stack([layers[f'layer_{i}/{rest}'] for i in range(k, count, period)])
  return nested(tree)


def write(folder, tree, **how):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


CASES = [('dense_ple_kvshare', nested), ('dense_ple_kvshare', joined), ('large_kv', under_transformer), ('large_kv', stacked),
         ('moe', nested), ('moe', stacked)]


@pytest.mark.parametrize('name, spelling', CASES, ids=lambda case: getattr(case, '__name__', case))
def test_every_spelling_of_the_tree_gives_the_same_weights(tmp_path, name, spelling):
  cfg, state = MODELS[name], hf_models.random_state(MODELS[name])
  write(tmp_path / 'in', spelling(tree_of(cfg, state)))
  back, params = load.load(tmp_path / 'in', config=cfg)
  assert back == cfg
  expected = hf.params_from_hf(cfg, state)
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  jax.tree_util.tree_map_with_path(
      lambda path, got, want: np.testing.assert_array_equal(got, want, err_msg=jax.tree_util.keystr(path)), params, expected)
  assert load.find(tmp_path / 'in', cfg).skipped and not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(params))


def test_axes_are_those_of_the_table_element_by_element():   # what is asserted is the documented pairing of axes
  dense, experts = CONFIGS['mqa_ple_kvshare'], CONFIGS['moe']
  dense_tensors, expert_tensors = google.tensors(dense), google.tensors(experts)
  def split(tensors, name):
    array = np.arange(np.prod(tensors[name].shape)).reshape(tensors[name].shape)
    return array, {path.removeprefix('layer_0/'): weight for path, weight in tensors[name].split(array).items()}
  g, ours = split(dense_tensors, 'layer_0/attn/q_einsum/w')
  assert ours['attention/q/w'][3, 5, 7] == g[3, 7, 5]
  g, ours = split(dense_tensors, 'layer_0/attn/kv_einsum/w')
  assert ours['attention/k/w'][0, 5, 7] == g[0, 0, 7, 5] and ours['attention/v/w'][0, 5, 7] == g[1, 0, 7, 5]
  g, ours = split(dense_tensors, 'layer_0/attn/attn_vec_einsum/w')
  assert ours['attention/o/w'][7, 3, 5] == g[3, 5, 7]
  g, ours = split(dense_tensors, 'layer_0/mlp/gating_einsum')
  assert ours['mlp/gate/w'][9, 7] == g[0, 9, 7] and ours['mlp/up/w'][9, 7] == g[1, 9, 7]
  g, ours = split(dense_tensors, 'layer_0/mlp/linear')
  assert ours['mlp/down/w'][7, 9] == g[9, 7]
  g, ours = split(dense_tensors, 'embedder/per_layer_model_projection/w')
  assert ours['arm/project/w'][4, 5, 7] == g[7, 4, 5]
  g, ours = split(dense_tensors, 'embedder/per_layer_embeddings')
  assert ours['arm/lookup/table'][9, 4, 5] == g[9, 4, 5]
  g, ours = split(dense_tensors, 'layer_0/per_layer_input_gate/w')
  assert ours['ple_gate/w'][5, 7] == g[7, 5]
  g, ours = split(dense_tensors, 'layer_0/per_layer_projection/w')
  assert ours['ple_project/w'][7, 5] == g[5, 7]
  g, ours = split(expert_tensors, 'layer_0/mlp/gating_einsum')
  assert ours['moe/gate'][2, 9, 7] == g[2, 0, 9, 7] and ours['moe/up'][2, 9, 7] == g[2, 1, 9, 7]
  g, ours = split(expert_tensors, 'layer_0/mlp/linear')
  assert ours['moe/down'][2, 7, 9] == g[2, 9, 7]
  g, ours = split(expert_tensors, 'layer_0/mlp/router_logits/w')
  assert ours['moe/router/w'][2, 7] == g[7, 2]
  g, ours = split(google.tensors(CONFIGS['large_kv']), 'layer_2/attn/k_einsum/w')
  assert ours['layer_2/attention/k/w'][0, 5, 7] == g[0, 7, 5]


@pytest.mark.parametrize('name', config.VARIANTS)
def test_a_released_tree_is_recognised_by_its_shapes(name):
  cfg = config.VARIANTS[name]
  leaves = {tuple(key.split('/')): tensor.shape for key, tensor in google.tensors(cfg).items()}
  assert google.infer(google.places(leaves)[0]) == cfg


@pytest.mark.parametrize('beside', ['theirs', 'ours', 'of a run'])
def test_the_config_may_lie_beside(tmp_path, beside):
  cfg, state = MODELS['large_kv'], hf_models.random_state(MODELS['large_kv'])
  write(tmp_path / 'in', nested(tree_of(cfg, state)))
  with pytest.raises(ValueError, match=r'embedder/input_embedding \[128, 64\] is that of no released Gemma 4'):
    load.load(tmp_path / 'in')
  fields = {'theirs': hf.config_to_hf(cfg), 'ours': cfg.to_dict(), 'of a run': {'model': cfg.to_dict(), 'seed': 0}}[beside]
  (tmp_path / 'in/config.json').write_text(json.dumps(fields))
  assert load.load(tmp_path / 'in')[0] == cfg


def test_missing_and_unknown_weights_are_one_error_with_names_and_shapes(tmp_path):
  cfg, state = MODELS['moe'], hf_models.random_state(MODELS['moe'])
  tree = tree_of(cfg, state)
  del tree['layer_1/skip_scale']
  tree['layer_1/attn/gate/w'] = np.zeros((2, 3), np.float32)
  write(tmp_path / 'in', nested(tree))
  with pytest.raises(ValueError, match=r'1 unknown: layer_1/attn/gate/w \[2, 3\]; 1 missing: layer_1/skip_scale \[1\]'):
    load.load(tmp_path / 'in', config=cfg)


def test_a_tree_of_one_file_a_weight_with_a_file_missing_or_chunks_beyond_its_array_is_refused(tmp_path):
  cfg, state = MODELS['large_kv'], hf_models.random_state(MODELS['large_kv'])
  write(tmp_path / 'in', nested(tree_of(cfg, state)), use_ocdbt=False)
  load.load(tmp_path / 'in', config=cfg)
  header = tmp_path / 'in/final_norm.scale/.zarray'
  sound = header.read_text()
  header.write_text(json.dumps(json.loads(sound) | {'chunks': [10**10]}))
  with pytest.raises(ValueError, match=r'not a whole Orbax tree \(final_norm/scale: chunks of \[10000000000\] in an array of \[64\]'):
    load.load(tmp_path / 'in', config=cfg)
  header.write_text(sound)
  chunk = next(file for file in (tmp_path / 'in/final_norm.scale').rglob('*') if file.is_file() and not file.name.startswith(('.', 'z')))
  chunk.unlink()
  with pytest.raises(ValueError, match='not a whole Orbax tree'):
    load.load(tmp_path / 'in', config=cfg)
