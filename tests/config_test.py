"""ModelConfig: what it refuses, how it unfolds, what `shrink` keeps."""

import dataclasses

import ml_collections
import pytest

from gemma4_jax import config

SMALL = config.shrink(config.E2B, periods=1)
MOE = config.shrink(config.B26_A4)


@pytest.mark.parametrize('base, fields, field', [
    # mistyped
    (SMALL, {'width': '64'}, 'width'),
    (SMALL, {'width': 64.0}, 'width'),
    (SMALL, {'width': True}, 'width'),
    (SMALL, {'qk_norm': 1}, 'qk_norm'),
    (SMALL, {'rope_base': '1e4'}, 'rope_base'),
    (SMALL, {'pattern': 5}, 'pattern'),
    (SMALL, {'window': None}, 'window'),
    (SMALL, {'ple_layers': 3}, 'ple_layers'),
    (SMALL, {'ple_layers': ('a',)}, 'ple_layers'),
    # none of the choices
    (SMALL, {'embedding': 'ples'}, 'embedding'),
    (SMALL, {'activation': 'relu'}, 'activation'),
    (SMALL, {'moe_implementation': 'dense'}, 'moe_implementation'),
    (SMALL, {'remat': 'all'}, 'remat'),
    (SMALL, {'dtype': 'float16'}, 'dtype'),
    (SMALL, {'param_dtype': 'int8'}, 'param_dtype'),
    # out of range
    (SMALL, {'vocab_size': 0}, 'vocab_size'),
    (SMALL, {'num_layers': 0, 'num_kv_shared_layers': 0}, 'num_layers'),
    (SMALL, {'window': 0}, 'window'),
    (SMALL, {'mlp_dim': 0}, 'mlp_dim'),
    (SMALL, {'context_length': -1}, 'context_length'),
    (SMALL, {'head_dim': 15}, 'head_dim'),
    (SMALL, {'global_head_dim': 31}, 'global_head_dim'),
    (SMALL, {'rope_fraction': 1.5}, 'rope_fraction'),
    (SMALL, {'global_rope_fraction': -0.1}, 'global_rope_fraction'),
    (SMALL, {'final_softcap': -1.0}, 'final_softcap'),
    (SMALL, {'norm_eps': 0.0}, 'norm_eps'),
    (SMALL, {'attention_scale': 0.0}, 'attention_scale'),
    (SMALL, {'bigram_buckets': -1}, 'bigram_buckets'),
    (SMALL, {'pattern': ''}, 'pattern'),
    (SMALL, {'pattern': 'LLX'}, 'pattern'),
    # contradictory
    (SMALL, {'num_kv_heads': 3}, 'num_kv_heads'),
    (SMALL, {'global_num_kv_heads': 3}, 'global_num_kv_heads'),
    (SMALL, {'num_kv_shared_layers': 10}, 'num_kv_shared_layers'),
    (SMALL, {'num_kv_shared_layers': -1}, 'num_kv_shared_layers'),
    (SMALL, {'num_kv_shared_layers': 6}, 'num_kv_shared_layers'),   # no global layer left to lend
    (SMALL, {'num_experts_per_token': 2}, 'num_experts_per_token'),
    (SMALL, {'expert_dim': 8}, 'expert_dim'),
    (MOE, {'num_experts_per_token': 9}, 'num_experts_per_token'),
    (MOE, {'num_experts_per_token': 0}, 'num_experts_per_token'),
    (MOE, {'expert_dim': 0}, 'expert_dim'),
    (SMALL, {'ple_dim': 0}, 'ple_dim'),
    (SMALL, {'ple_every': 0}, 'ple_every'),
    (SMALL, {'ple_every': 11}, 'ple_every'),
    (SMALL, {'ple_every': 2, 'ple_layers': (1,)}, 'ple_layers'),
    (SMALL, {'ple_layers': (1, 1)}, 'ple_layers'),
    (SMALL, {'ple_layers': (10,)}, 'ple_layers'),
    (SMALL, {'embedding': 'value', 'ple_layers': (9,)}, 'embedding'),   # a layer that borrows its values
    (SMALL, {'embedding': 'stem', 'gated_mlp': False}, 'embedding'),
    (MOE, {'embedding': 'stem', 'moe_dense_branch': False}, 'embedding'),
], ids=lambda x: str(x) if isinstance(x, dict) else '')
def test_what_cannot_be_is_one_line_naming_the_field(base, fields, field):
  with pytest.raises(ValueError, match=rf'^model\.{field}: ') as error:
    base.replace(**fields)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, meant', [('widht', 'width'), ('ple_dims', 'ple_dim'), ('embeding', 'embedding')])
def test_an_unknown_field_is_answered_with_the_nearest_one(name, meant):
  with pytest.raises(ValueError, match=rf'model\.{name}: no such field; did you mean model\.{meant}\?'):
    SMALL.replace(**{name: 1})


def test_an_unknown_choice_is_answered_with_the_nearest_one():
  with pytest.raises(ValueError, match="did you mean 'shared_table'"):
    SMALL.replace(embedding='sharedtable')


def test_an_unknown_variant_is_answered_with_the_nearest_one():
  with pytest.raises(ValueError, match="did you mean 'e2b'"):
    config.variant('e2')


@pytest.mark.parametrize('name', config.VARIANTS)
def test_a_config_survives_a_config_dict(name):
  cfg = config.VARIANTS[name].replace(ple_layers=(1, 3))
  assert config.from_dict(ml_collections.ConfigDict(cfg.to_dict())) == cfg


def test_whole_numbers_are_read_as_floats():
  assert isinstance(SMALL.replace(rope_base=10_000).rope_base, float)


def kinds(cfg):
  return ''.join('L' if spec.window else 'G' for spec in cfg.layers)


@pytest.mark.parametrize('name, local_global', [
    ('e2b', 'LLLLG' * 7), ('e4b', 'LLLLLG' * 7), ('12b', 'LLLLLG' * 8), ('26b-a4b', 'LLLLLG' * 5), ('31b', 'LLLLLG' * 10)])
def test_layers_are_local_and_global_as_released(name, local_global):
  assert kinds(config.VARIANTS[name]) == local_global


@pytest.mark.parametrize('name, owners, donors', [('e2b', 15, {13, 14}), ('e4b', 24, {22, 23}), ('12b', 48, set()), ('31b', 60, set())])
def test_last_layers_borrow_from_the_last_owner_of_their_kind(name, owners, donors):
  layers = config.VARIANTS[name].layers
  assert all(spec.kv_from is None for spec in layers[:owners])
  assert {spec.kv_from for spec in layers[owners:]} == donors
  assert all((spec.window is None) == (layers[spec.kv_from].window is None) for spec in layers[owners:])


def test_a_donor_need_not_be_among_the_last_two_owners():
  cfg = SMALL.replace(pattern='LLGLLGLG', num_layers=8, num_kv_shared_layers=3)
  assert [spec.kv_from for spec in cfg.layers] == [None] * 5 + [2, 4, 2]


def test_mlps_are_double_wide_in_borrowing_layers_of_e2b_only():
  assert [spec.mlp_dim for spec in config.E2B.layers] == [6144] * 15 + [12288] * 20
  assert {spec.mlp_dim for spec in config.E4B.layers} == {10240}


def test_global_layers_differ_from_local_ones_as_released():
  local, everywhere = config.B31.layers[0], config.B31.layers[5]
  assert (local.window, local.head_dim, local.num_kv_heads, local.rope_base, local.rope_fraction, local.k_eq_v) == (
      1024, 256, 16, 1e4, 1.0, False)
  assert (everywhere.window, everywhere.head_dim, everywhere.num_kv_heads, everywhere.rope_base, everywhere.rope_fraction,
          everywhere.k_eq_v) == (None, 512, 4, 1e6, 0.25, True)


@pytest.mark.parametrize('name, groups', [
    ('e2b', [(5, 3), (5, 4)]), ('e4b', [(6, 4), (6, 3)]), ('12b', [(6, 8)]), ('26b-a4b', [(6, 5)]), ('31b', [(6, 10)])])
def test_layers_group_into_repeated_periods(name, groups):
  assert [(len(group.period), group.repeats) for group in config.VARIANTS[name].groups] == groups


@pytest.mark.parametrize('cfg', [SMALL, MOE, SMALL.replace(pattern='LLGLLGLG', num_layers=8, num_kv_shared_layers=3),
                                 config.E4B.replace(ple_every=4)], ids=['e2b', 'moe', 'irregular', 'every fourth'])
def test_groups_hold_every_layer_once_and_in_order(cfg):
  layers = [(group.layer(repeat, place), spec) for group in cfg.groups for repeat in range(group.repeats)
            for place, spec in enumerate(group.period)]
  assert layers == list(enumerate(cfg.layers))


def test_per_layer_vectors_reach_the_chosen_layers_only():
  assert SMALL.inject_layers == tuple(range(10))
  assert SMALL.replace(ple_every=4).inject_layers == (3, 7)
  assert SMALL.replace(ple_layers=[2, 5]).inject_layers == (2, 5)
  assert SMALL.replace(embedding='value').inject_layers == (0, 1, 2, 3, 4)   # those that make their own values
  assert SMALL.replace(embedding='none').inject_layers == SMALL.replace(embedding='bigram').inject_layers == ()


def test_per_layer_vectors_are_as_wide_as_what_they_enter():
  assert {spec.inject_dim for spec in SMALL.layers} == {SMALL.ple_dim}
  assert [spec.inject_dim for spec in SMALL.replace(embedding='stem').layers] == [spec.mlp_dim for spec in SMALL.layers]
  assert [spec.inject_dim for spec in SMALL.replace(embedding='value').layers] == [16] * 4 + [32] + [0] * 5


SHRUNK = {'width', 'vocab_size', 'num_layers', 'num_kv_shared_layers', 'mlp_dim', 'num_heads', 'num_kv_heads', 'global_num_kv_heads',
          'head_dim', 'global_head_dim', 'window', 'context_length', 'ple_dim', 'num_experts', 'num_experts_per_token', 'expert_dim'}


@pytest.mark.parametrize('periods', [1, 2])
@pytest.mark.parametrize('name', config.VARIANTS)
def test_shrink_keeps_pattern_sharing_and_flags(name, periods):
  full = config.VARIANTS[name]
  small = config.shrink(full, periods=periods)
  for field in dataclasses.fields(full):
    if field.name not in SHRUNK:
      assert getattr(small, field.name) == getattr(full, field.name), field.name
  assert kinds(small) == full.pattern * 2 * periods
  assert (small.num_kv_shared_layers > 0) == (full.num_kv_shared_layers > 0)
  assert (small.num_experts > 0) == (full.num_experts > 0)
  assert (small.num_kv_heads == small.global_num_kv_heads) == (full.num_kv_heads == full.global_num_kv_heads)
  assert max(spec.mlp_dim for spec in small.layers) / small.mlp_dim == max(spec.mlp_dim for spec in full.layers) / full.mlp_dim


def test_shrink_takes_any_other_field():
  assert config.shrink(config.B31, qk_norm=False, num_layers=6).num_layers == 6


@pytest.mark.parametrize('name', list(config.VARIANTS))
def test_a_released_variant_is_known_whatever_does_not_shape_its_layers(name):
  cfg = config.VARIANTS[name]
  other = cfg.replace(vocab_size=1000, context_length=64, dtype='bfloat16', scan=True, **({} if cfg.embedding == 'ple' else {'ple_dim': 3}))
  assert config.released(cfg) == config.released(other) == name
  assert config.released(cfg.replace(window=cfg.window + 1)) is None and config.released(config.shrink(cfg)) is None
