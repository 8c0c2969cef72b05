"""Matched baselines cost what they say, whichever way they grow, and what cannot be matched says why."""

import pytest

from configs import base
from gemma4_jax import config as model_config, match, size

GROWING = [('total_params', 'width'), ('total_params', 'depth'), ('total_params', 'experts'), ('flops', 'width'),
           ('flops', 'depth'), ('resident_bytes', 'width'), ('resident_bytes', 'depth')]


def _config(name, metric, by='width', arm='ple', **model):
  c = base.get_config(name)
  c.model.update({'embedding': 'none', **model})
  c.match.update({'metric': metric, 'by': by, 'arm': arm})
  return c.lock()


def _cost(metric, fields, context):
  cfg = model_config.from_dict(fields)
  return {'total_params': size.total, 'resident_bytes': size.resident_bytes,
          'flops': lambda cfg: size.forward_flops(cfg, context)}[metric](cfg)


MODELS = ['e2b', '26b-a4b', '31b', 'mini', *(f'{name}-toy' for name in model_config.VARIANTS)]
CASES = [(name, *case) for name in MODELS for case in GROWING if (name, *case) != ('31b', 'total_params', 'experts')]


@pytest.mark.parametrize('name, metric, by', [
    *CASES, ('26b-a4b', 'resident_bytes', 'experts'), ('26b-a4b-toy', 'resident_bytes', 'experts')])
def test_resolved_model_costs_what_the_arm_costs_within_one_percent(name, metric, by):
  config = _config(name, metric, by)
  context = config.data.sequence_length
  resolved, report = match.resolve(config)
  target = _cost(metric, {**config.model.to_dict(), 'embedding': 'ple'}, context)
  reached = _cost(metric, resolved.model, context)
  assert abs(reached / target - 1) <= 0.01
  assert (report['target'], report['reached'], report['mismatch']) == (target, reached, reached / target - 1)
  assert (report['metric'], report['arm'], report['by']) == (metric, 'ple', by)


@pytest.mark.parametrize('metric, by', GROWING)
def test_only_fields_of_the_way_to_grow_change_and_the_report_lists_them(metric, by):
  may = {'width': {'width', 'mlp_dim'}, 'depth': {'num_layers', 'num_kv_shared_layers', 'pattern', 'mlp_dim'},
         'experts': {'num_experts', 'num_experts_per_token', 'expert_dim', 'moe_dense_branch', 'double_wide_mlp', 'mlp_dim'}}
  config = _config('e2b', metric, by)
  resolved, report = match.resolve(config)
  old, new = config.to_dict(), resolved.to_dict()
  assert report['changed'] == {f: (v, new['model'][f]) for f, v in old['model'].items() if v != new['model'][f]}
  assert set(report['changed']) <= may[by] and set(report['changed']) - {'mlp_dim'}
  new['match'].pop('target'), old['match'].pop('target'), new.pop('model'), old.pop('model')
  assert new == old


@pytest.mark.parametrize('metric, by, arm', [*((*case, 'ple') for case in GROWING), ('total_params', 'depth', 'stem')])
def test_resolving_what_is_resolved_changes_nothing(metric, by, arm):
  once, _ = match.resolve(_config('e2b-toy', metric, by, arm))
  twice, report = match.resolve(once)
  assert twice == once and twice.is_locked and not report['changed']


def test_without_a_metric_the_config_comes_back_as_it_is():
  config = _config('e2b-toy', '')
  assert match.resolve(config) == (config, {})


def test_the_given_config_stays_as_it_was():
  config = _config('e2b-toy', 'total_params')
  match.resolve(config)
  assert config == _config('e2b-toy', 'total_params')


def test_an_arm_of_equal_cost_changes_no_field():
  _, report = match.resolve(_config('e2b', 'total_params', arm='permuted_table', embedding='ple', mlp_dim=6147))
  assert report['changed'] == {} and report['mismatch'] == 0


@pytest.mark.parametrize('name', ['e2b', '26b-a4b'])
def test_width_keeps_the_ratio_of_the_mlps_and_multiples_of_eight(name):
  resolved, _ = match.resolve(_config(name, 'total_params', arm='value'))
  old, new = model_config.VARIANTS[name], model_config.from_dict(resolved.model)
  assert new.width % 8 == new.mlp_dim % 8 == new.expert_dim % 8 == 0
  assert new.mlp_dim / new.width == pytest.approx(old.mlp_dim / old.width, rel=0.1)
  assert new.expert_dim / new.width == pytest.approx(old.expert_dim / old.width, rel=0.01)


def test_a_cheaper_arm_makes_the_model_smaller():
  for by in ('width', 'depth'):
    _, report = match.resolve(_config('31b', 'flops', by, arm='stem'))
    old, new = report['changed'][{'width': 'width', 'depth': 'num_layers'}[by]]
    assert new < old and abs(report['mismatch']) <= 0.01


@pytest.mark.parametrize('name', model_config.VARIANTS)
def test_depth_grows_by_whole_periods_and_keeps_the_share_of_borrowers(name):
  resolved, _ = match.resolve(_config(name, 'total_params', 'depth', arm='value'))
  old, new = model_config.VARIANTS[name], model_config.from_dict(resolved.model)
  period = len(old.pattern)
  assert new.num_layers > old.num_layers and new.pattern == old.pattern
  assert new.num_layers % period == new.num_kv_shared_layers % period == 0
  share = old.num_kv_shared_layers / old.num_layers
  assert abs(new.num_kv_shared_layers - share * new.num_layers) <= period


@pytest.mark.parametrize('arm, extra', [('ple', 1), ('stem', -3)])
def test_depth_of_less_than_half_a_period_comes_or_goes_before_the_first_layer(arm, extra):
  resolved, _ = match.resolve(_config('e2b-toy', 'flops', 'depth', arm=arm))
  old, new = (model_config.from_dict({**_config('e2b-toy', '').model, **fields}) for fields in ({}, resolved.model))
  assert new.num_layers == old.num_layers + extra
  later = lambda cfg, n: [(spec.window, None if spec.kv_from is None else cfg.num_layers - spec.kv_from) for spec in cfg.layers[-n:]]
  n = min(old.num_layers, new.num_layers)
  assert later(old, n) == later(new, n)
  assert all(spec.window and spec.kv_from is None for spec in new.layers[:max(0, extra)])


def test_a_dense_model_gets_experts_of_half_its_mlp_two_a_token():
  config = _config('12b', 'total_params', 'experts')
  old = model_config.from_dict(config.model)
  new = model_config.from_dict(match.resolve(config)[0].model)
  assert new.num_experts > new.num_experts_per_token == 2 and not new.moe_dense_branch
  untrimmed = new.replace(expert_dim=old.mlp_dim // 2)
  router = 2 * old.num_layers * old.width * new.num_experts
  assert size.forward_flops(untrimmed, 64) - router == size.forward_flops(old, 64)


def test_double_wide_mlps_become_experts_of_equal_flops_over_the_whole_model():
  config = _config('e2b-toy', 'total_params', 'experts')
  old = model_config.from_dict(config.model)
  new = model_config.from_dict(match.resolve(config)[0].model)
  untrimmed = new.replace(expert_dim=old.mlp_dim * 3 // 4)   # half the layers are double wide
  router = 2 * old.num_layers * old.width * new.num_experts
  assert size.forward_flops(untrimmed, 64) - router == size.forward_flops(old, 64)


def test_a_given_target_is_what_the_model_is_held_to():
  config = _config('e2b-toy', 'total_params')
  config.match.target = 3e6
  resolved, report = match.resolve(config)
  assert report['target'] == 3e6 and abs(report['mismatch']) <= 0.01 and report['reached'] == _cost('total_params', resolved.model, 0)


@pytest.mark.parametrize('fields, model, error', [
    ({'metric': 'params'}, {}, "match.metric: 'params' is none of total_params, flops, resident_bytes; did you mean 'total_params'?"),
    ({'by': 'widht'}, {}, "match.by: 'widht' is none of width, depth, experts; did you mean 'width'?"),
    ({'arm': 'pel'}, {}, "match.arm: 'pel' is none of .*did you mean 'ple'?"),
    ({'metric': 'flops', 'by': 'experts'}, {}, "match.by: 'experts' leave the FLOPs of a token as they are"),
    ({'metric': 'resident_bytes', 'by': 'experts'}, {}, "match.by: 'experts' are too coarse: one costs"),
    ({'by': 'experts'}, {'gated_mlp': False}, 'match.by: .* contradicts model.gated_mlp = False'),
    ({'by': 'experts'}, {'embedding': 'stem'}, "match.by: .* contradicts model.embedding = 'stem'"),
    ({'by': 'depth'}, {'embedding': 'projection_only', 'ple_layers': (2, 4)}, "match.by: 'depth' renumbers .* model.ple_layers"),
    ({'target': 1e3}, {}, r'match.by: by width the nearest to 1,000 total_params is [\d,]+ \(.*beyond 1%; try depth or experts'),
    ({'by': 'depth', 'target': 1e5}, {}, 'match.by: by depth the nearest to 100,000 total_params'),
    ({'arm': 'stem'}, {'gated_mlp': False}, 'model.embedding'),
])
def test_a_match_that_cannot_be_made_is_one_line_that_names_the_field(fields, model, error):
  config = _config('e2b-toy', 'total_params', **model)
  config.match.update(fields)
  with pytest.raises(ValueError, match=error) as raised:
    match.resolve(config)
  assert '\n' not in str(raised.value)
