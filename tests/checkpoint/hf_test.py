"""Names, shapes and configs of Hugging Face checkpoints, both ways."""

import jax
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.checkpoint import hf
from gemma4_jax.model import transformer
from tests import hf_models

CONFIGS = hf_models.configs()
FULL_SIZE = {f'{name} full size': cfg for name, cfg in config.VARIANTS.items()}


def paths(tree):
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, 'names'))[0]
  return {'/'.join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize('cfg', [*(CONFIGS | FULL_SIZE).values(), CONFIGS['moe'].replace(tied_embeddings=False)], ids=lambda c: None)
def test_the_table_names_every_weight_of_the_model_once_with_its_shape(cfg):
  ours = [part for tensor in hf.tensors(cfg).values() for part in tensor.parts.items()]
  assert len(dict(ours)) == len(ours)
  assert dict(ours) == {path: box.value.shape for path, box in paths(transformer.abstract(cfg)).items()}


# Of the listings of full-size models, section by section: E2B, E4B, 12B, 26B-A4B, 31B.
@pytest.mark.parametrize('name, expected', [
    ('self_attn.q_proj', [(2048, 1536), (2048, 2560), (4096, 3840), (4096, 2816), (8192, 5376)]),
    ('self_attn.k_proj', [(256, 1536), (512, 2560), (2048, 3840), (2048, 2816), (4096, 5376)]),
    ('self_attn.v_proj', [(256, 1536), (512, 2560), (2048, 3840), (2048, 2816), (4096, 5376)]),
    ('mlp.gate_proj', [(6144, 1536), (10240, 2560), (15360, 3840), (2112, 2816), (21504, 5376)]),
])
def test_first_layers_of_released_sizes_have_the_shapes_of_the_release(name, expected):
  assert [hf.tensors(cfg)[f'model.layers.0.{name}.weight'].shape for cfg in config.VARIANTS.values()] == expected


def test_global_and_per_layer_tensors_have_the_shapes_of_the_release():
  e2b, moe = hf.tensors(config.E2B), hf.tensors(config.B26_A4, hf.MULTIMODAL_PREFIX)
  assert e2b['model.layers.4.self_attn.q_proj.weight'].shape == (4096, 1536)
  assert e2b['model.layers.4.self_attn.k_proj.weight'].shape == (512, 1536)
  assert e2b['model.layers.34.mlp.gate_proj.weight'].shape == (12288, 1536)
  assert e2b['model.embed_tokens_per_layer.weight'].shape == (262144, 8960)
  assert e2b['model.per_layer_model_projection.weight'].shape == (8960, 1536)
  assert moe['model.language_model.layers.5.self_attn.k_proj.weight'].shape == (1024, 2816)
  assert 'model.language_model.layers.5.self_attn.v_proj.weight' not in moe
  assert moe['model.language_model.layers.0.experts.gate_up_proj'].shape == (128, 1408, 2816)


@pytest.mark.parametrize('prefix', [hf.TEXT_PREFIX, hf.MULTIMODAL_PREFIX])
@pytest.mark.parametrize('name', CONFIGS)
def test_in_and_out_again_is_bit_exact(name, prefix):
  cfg = CONFIGS[name]
  state = {prefix + key.removeprefix(hf.TEXT_PREFIX): array for key, array in hf_models.random_state(cfg).items()}
  back = hf.params_to_hf(cfg, hf.params_from_hf(cfg, state), prefix)
  assert back.keys() == state.keys()
  for key, array in state.items():
    np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_dtypes_are_kept():
  cfg = CONFIGS['moe']
  state = {name: array.astype(np.float16) for name, array in hf_models.random_state(cfg).items()}
  assert {array.dtype for array in paths(hf.params_from_hf(cfg, state)).values()} == {np.dtype(np.float16)}


def test_fused_experts_hold_the_gate_first():
  cfg = CONFIGS['moe']
  state = hf_models.random_state(cfg)
  moe = hf.params_from_hf(cfg, state)['layer_0']['moe']
  fused = state['model.layers.0.experts.gate_up_proj']
  np.testing.assert_array_equal(moe['gate'], fused[:, :cfg.expert_dim])
  np.testing.assert_array_equal(moe['up'], fused[:, cfg.expert_dim:])


def test_untied_heads_travel():
  cfg = CONFIGS['large_kv'].replace(tied_embeddings=False)
  state = hf_models.random_state(cfg)
  assert hf.params_from_hf(cfg, state)['unembedder']['w'] is not None
  assert hf.params_to_hf(cfg, hf.params_from_hf(cfg, state)).keys() == state.keys()


def test_stored_but_unused_tensors_are_dropped():
  cfg = CONFIGS['mqa_ple_kvshare']
  state = hf_models.random_state(cfg)
  unread = {f'model.layers.{cfg.num_layers - 1}.self_attn.{name}.weight': np.zeros(3) for name in ('k_proj', 'v_proj', 'k_norm')}
  params = hf.params_from_hf(cfg, state | unread | {'lm_head.weight': state['model.embed_tokens.weight']})
  assert params[f'layer_{cfg.num_layers - 1}']['attention'].keys() == {'q', 'q_norm', 'o'}


def test_unknown_missing_and_misshapen_tensors_are_one_error_with_names_and_shapes():
  cfg = CONFIGS['large_kv']
  state = hf_models.random_state(cfg)
  del state['model.norm.weight']
  state['model.layers.2.self_attn.v_proj.weight'] = np.zeros((32, 64))   # K=V: there is none
  state['model.layers.0.mlp.up_proj.weight'] = np.zeros((64, 96))
  with pytest.raises(ValueError) as error:
    hf.params_from_hf(cfg, state)
  message = str(error.value)
  assert '\n' not in message
  assert '1 unknown: model.layers.2.self_attn.v_proj.weight [32, 64]' in message
  assert '1 missing: model.norm.weight [64]' in message
  assert '1 wrong shape: model.layers.0.mlp.up_proj.weight [64, 96] instead of [96, 64]' in message


@pytest.mark.parametrize('cfg', (CONFIGS | FULL_SIZE).values(), ids=CONFIGS | FULL_SIZE)
def test_configs_survive_the_way_out_and_in(cfg):
  back = hf.config_from_hf(hf.config_to_hf(cfg))
  assert back == (cfg if cfg.embedding == 'ple' else cfg.replace(ple_dim=256))   # which no file of a model without PLE holds


def test_fields_of_the_first_release_are_read():
  now = dict(hf_models.TINY['moe'], use_bidirectional_attention='vision')
  then = {name: value for name, value in now.items() if name not in ('moe_intermediate_size', 'use_bidirectional_attention')}
  then |= dict(expert_intermediate_size=24, attention_use_bidirectional=True, hidden_size_per_layer_input=None,
               model_type='gemma4_text', top_k_experts=2)
  assert hf.config_from_hf(then) == hf.config_from_hf(now)


def test_the_text_part_of_a_multimodal_config_is_read():
  text = hf_models.TINY['large_kv']
  assert hf.config_from_hf({'model_type': 'gemma4', 'text_config': text, 'vision_config': {}}) == hf.config_from_hf(text)


def test_per_layer_overrides_say_the_same_as_global_fields():
  fields = hf_models.TINY['large_kv']
  new = {name: value for name, value in fields.items() if name not in ('global_head_dim', 'num_global_key_value_heads')}
  override = {'head_dim': 32, 'num_key_value_heads': 1}
  assert hf.config_from_hf(new | {'per_layer_config': {'02': override, '05': override}}) == hf.config_from_hf(fields)


def test_global_kv_heads_count_with_k_eq_v_only():
  fields = hf_models.TINY['large_kv'] | {'attention_k_eq_v': False}
  assert hf.config_from_hf(fields).global_num_kv_heads == fields['num_key_value_heads']


@pytest.mark.parametrize('fields, named', [
    ({'hidden_size': None}, 'no field hidden_size'),
    ({'hidden_size': '64'}, 'width'),
    ({'layer_types': ['sliding_attention'] * 5}, 'layer_types'),
    ({'layer_types': ['linear_attention'] * 6}, 'layer_types'),
    ({'attention_bias': True}, 'attention_bias'),
    ({'use_bidirectional_attention': 'all'}, 'use_bidirectional_attention'),
    ({'hidden_activation': 'relu'}, 'hidden_activation'),
    ({'rope_parameters': {'full_attention': {'rope_type': 'yarn', 'rope_theta': 1e6}}}, 'rope_parameters'),
    ({'hidden_size_per_layer_input': 8, 'vocab_size_per_layer_input': 64}, 'vocab_size_per_layer_input'),
    ({'per_layer_config': {'2': {'head_dim': 32}}}, 'per_layer_config'),
    ({'per_layer_config': {'2': {'intermediate_size': 32}, '5': {'intermediate_size': 32}}}, 'per_layer_config'),
], ids=str)
def test_a_config_that_this_model_cannot_be_is_refused_by_field(fields, named):
  with pytest.raises(ValueError, match=named):
    hf.config_from_hf(hf_models.TINY['large_kv'] | fields)


def test_a_missing_field_is_named():
  with pytest.raises(ValueError, match='config.json: no field hidden_size'):
    hf.config_from_hf({'vocab_size': 128})


@pytest.mark.parametrize('fields', [
    {'qk_norm': False}, {'layer_scalar': False}, {'gated_mlp': False}, {'attention_scale': 0.5}, {'embedding': 'stem'},
    {'pattern': 'GL'}, {'global_num_kv_heads': 1, 'num_kv_heads': 2, 'k_eq_v': False}], ids=str)
def test_an_ablation_that_hugging_face_cannot_hold_is_refused_by_field(fields):
  cfg = CONFIGS['large_kv'].replace(**fields)
  field = next(iter(fields))
  with pytest.raises(ValueError, match=f'model.{field}'):
    hf.config_to_hf(cfg)
  with pytest.raises(ValueError, match=f'model.{field}'):
    hf.tensors(cfg)


@pytest.mark.parametrize('name', hf_models.TINY)
def test_transformers_reads_our_config_as_it_reads_its_own(name):
  Gemma4TextConfig = pytest.importorskip('transformers').Gemma4TextConfig
  ours = Gemma4TextConfig(**hf.config_to_hf(hf.config_from_hf(hf_models.TINY[name]))).to_dict()
  assert {**ours, 'architectures': None} == Gemma4TextConfig(**hf_models.TINY[name]).to_dict()
  assert hf.config_from_hf(ours) == hf.config_from_hf(hf_models.TINY[name])


@pytest.mark.parametrize('name', CONFIGS)
def test_our_names_and_shapes_are_those_of_the_transformers_model(name):
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  cfg = CONFIGS[name]
  theirs = {key: tuple(value.shape) for key, value in hf_models.build(cfg, hf_models.random_state(cfg)).state_dict().items()}
  theirs.pop('lm_head.weight')   # tied
  assert {key: tensor.shape for key, tensor in hf.tensors(cfg).items()} == theirs
