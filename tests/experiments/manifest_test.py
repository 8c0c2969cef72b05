import dataclasses
import json
import pathlib

import pytest

from configs import base
from experiments import manifest
from gemma4_jax import config as model_config, config_file, match

CONFIGS = sorted(path for path in (pathlib.Path(manifest.__file__).parents[1] / 'configs').glob('*.py') if path.stem != '__init__')
ARMS = [{'seed': seed, 'arm': arm, 'model.embedding': arm} for seed in range(2) for arm in ('none', 'ple')]


def config(**fields):
  c = base.get_config('e2b-toy')
  c.train.steps = 300
  c.update_from_flattened_dict(fields)
  return c


def points(sweep=ARMS, metrics=(), **fields):
  return manifest.expand(config(**fields), sweep, metrics)


def test_the_folder_names_config_and_seed_and_the_hash_leaves_out_the_seed():
  none0, ple0, none1, ple1 = (point.folder for point in points())
  assert none0.endswith('-s0') and none1.endswith('-s1')
  assert none0[:-1] == none1[:-1] and ple0[:-1] == ple1[:-1] and none0 != ple0


def test_the_same_sweep_expands_to_the_same_manifest(tmp_path):
  manifest.write(points(), tmp_path)
  assert manifest.read(tmp_path) == points()
  assert manifest.difference(manifest.read(tmp_path), points()) == ''


def test_a_point_holds_the_whole_config_with_its_overrides():
  point = points([{'seed': 7, 'model': {'width': 96}, 'model.ple_layers': [1, 2]}])[0]
  assert point.config['model']['width'] == 96 and point.config['model']['ple_layers'] == [1, 2] and point.config['seed'] == 7
  assert point.config['train'] == config().train.to_dict()


def test_a_config_without_a_sweep_is_one_point(tmp_path):
  (tmp_path / 'one.py').write_text('from configs import base\ndef get_config(arg="e2b-toy"):\n  return base.get_config(arg)\n')
  module, arg = config_file.load(str(tmp_path / 'one.py'))
  assert (manifest.get_sweep(module, arg), manifest.get_metrics(module)) == ([{}], [])
  only, = manifest.expand(config_file.get_config(module, arg), [{}])
  assert (only.arm, only.seed, only.metrics) == ('default', 0, ['eval/bits_per_byte'])


def test_an_arm_without_a_label_is_named_after_what_it_sets():
  unnamed, named = points([{'seed': 1}, {'seed': 1, 'model.window': 16, 'model.qk_norm': False}])
  assert (unnamed.arm, named.arm) == ('default', 'window=16, qk_norm=False')


def test_a_group_is_no_part_of_an_arms_name():
  points = manifest.expand(config(), [{'group': 'small', 'seed': seed, 'model.window': 16} for seed in range(2)])
  assert {p.label for p in points} == {'small/window=16'}


@pytest.mark.parametrize('text, said', [
    ('{', 'no JSON object'), ('[]', 'no JSON object .list where'), ('{}', "without 'metrics' and 'costs'"), ('\udcff', 'no JSON object')])
def test_a_damaged_summary_is_one_error_that_names_the_way_on(tmp_path, text, said):
  point, = manifest.expand(config(), [{}])
  (tmp_path / point.folder).mkdir()
  (tmp_path / point.folder / 'DONE').write_bytes(text.encode(errors='surrogateescape'))
  with pytest.raises(manifest.Error, match=f'DONE: {said}.*; remove it to run default s0 again'):
    manifest.done(point, tmp_path)


def test_a_sweep_may_ask_for_the_configs_argument(tmp_path):
  (tmp_path / 'c.py').write_text('def get_config(arg="a"):\n  pass\ndef sweep(add, arg):\n  add({"arm": arg})\n')
  assert manifest.get_sweep(*config_file.load(f'{tmp_path / "c.py"}:big')) == [{'arm': 'big'}]


def test_the_primary_metric_comes_first():
  assert points(metrics=['eval/nats_per_token', 'eval/bits_per_byte'])[0].metrics == ['eval/bits_per_byte', 'eval/nats_per_token']


@pytest.mark.parametrize('overrides, said', [
    ({'model.widht': 3}, 'point 0 of the sweep: model.widht: no such field; did you mean .*model.width'),
    ({'windw': 3}, 'did you mean .*model.window'),
    ({'seed.x': 3}, 'seed.x: no such field'),
    ({'model.width': 'wide'}, "model.width: 'wide' is no int"),
    ({'model': 3}, 'it is a section'),
    ({'model.window': 0}, 'model.window: 0 is not positive'),
    ({'model.num_kv_shared_layers': 10}, 'model.num_kv_shared_layers: 10 leaves none'),
    ({'model.num_kv_heads': 3}, 'model.num_kv_heads: 3 does not divide'),
    ({'match.metric': 'parms'}, "match.metric: 'parms' .*did you mean"),
])
def test_a_point_that_cannot_run_is_refused_in_one_line(overrides, said):
  with pytest.raises(manifest.Error, match=said) as e:
    points([{'arm': 'odd', **overrides}])
  assert '\n' not in str(e.value)


def test_a_field_the_sweep_sets_cannot_be_set_on_the_command_line():
  with pytest.raises(manifest.Error, match='--config.model.embedding: the sweep sets this field'):
    manifest.expand(config(), ARMS, fixed=['model.embedding'])


def test_a_point_given_twice_is_refused():
  with pytest.raises(manifest.Error, match=r'points 0 and 2 .* are the same'):
    points([ARMS[0], ARMS[1], ARMS[0]])


def test_an_arm_that_mixes_configs_is_refused():
  with pytest.raises(manifest.Error, match="both arm 'a' but differ in model.window"):
    points([{'seed': 0, 'arm': 'a'}, {'seed': 1, 'arm': 'a', 'model.window': 16}])


def test_a_matched_baseline_is_solved_and_knows_what_it_is_matched_to():
  sweep = [*ARMS, {'seed': 0, 'arm': 'none =params', 'model.embedding': 'none', 'match.metric': 'total_params'}]
  matched = points(sweep)[-1]
  assert matched.match['treatment'] == 'ple' and abs(matched.match['mismatch']) < 0.01
  assert matched.config['model'] != points()[0].config['model'] and matched.config['model']['embedding'] == 'none'
  assert points(sweep)[1].match is None
  assert 'off by' in manifest.tell_match(matched)


def test_without_its_treatment_in_the_sweep_a_matched_baseline_says_so(monkeypatch):
  monkeypatch.setattr(match, 'resolve', lambda c: (c, dict(metric='flops', target=2, reached=2, mismatch=0.0, changed={})))
  only, = points([{'arm': 'none =flops', 'model.embedding': 'none', 'match.metric': 'flops'}])
  assert only.match['treatment'] == '' and 'this sweep lacks' in manifest.tell_match(only)


def test_differences_of_sweeps_are_named():
  assert manifest.difference(points(), points(**{'train.steps': 7})) == 'train.steps (300 there, 7 now)'
  assert manifest.difference(points(), points(ARMS[:3])) == 'no longer in the sweep: ple s1'
  assert manifest.difference(points(ARMS[:3]), points()) == 'new in the sweep: ple s1'
  assert manifest.difference(points(), points(metrics=['eval/nats_per_token'])) == 'metrics()'


def test_a_manifest_of_another_kind_is_refused(tmp_path):
  (tmp_path / manifest.FILE).write_text('{"index": 0}\n')
  with pytest.raises(manifest.Error, match='no manifest of this version'):
    manifest.read(tmp_path)


def test_equal_logits_of_different_models_are_a_clash():
  none, ple, _, other_seed = points()
  said = manifest.clash(none, {'fingerprint': 'f'}, ple, {'fingerprint': 'f'})
  assert 'none s0' in said and 'ple s0' in said and 'model.embedding' in said
  assert not manifest.clash(none, {'fingerprint': 'f'}, ple, {'fingerprint': 'g'})
  assert not manifest.clash(none, {'fingerprint': 'f'}, other_seed, {'fingerprint': 'f'})
  assert not manifest.clash(none, {}, ple, {})


@pytest.mark.parametrize('field, value', [('optimizer.b2', 0.99), ('train.steps', 10), ('model.remat', 'full'), ('arm', 'again')])
def test_equal_logits_are_no_clash_where_the_first_step_need_not_differ(field, value):
  a, b = points([{'arm': 'a'}, {'arm': 'b', field: value}])
  assert not manifest.clash(a, {'fingerprint': 'f'}, b, {'fingerprint': 'f'})


def test_arms_with_one_config_are_told():
  assert manifest.twins(points([{'arm': 'a'}, {'arm': 'b'}, {'arm': 'c', 'model.window': 16}])) == [('a', 'b')]


def test_a_missing_config_file_answers_with_the_nearest():
  with pytest.raises(manifest.Error, match=r'no such file; did you mean .*configs/ple.py'):
    config_file.load(f'{CONFIGS[0].parent}/plee.py')


@pytest.mark.parametrize('text, said', [
    ('def get_config(:\n', 'SyntaxError'),
    ('import nothing_of_that_name\ndef get_config():\n  pass\n', 'line 1: ModuleNotFoundError'),
    ('x = 1\n', r'defines no get_config'),
    ('def get_config():\n\n  return 1 / 0\n', 'line 3: ZeroDivisionError'),
])
def test_an_error_in_a_config_file_names_file_and_line(tmp_path, text, said):
  (tmp_path / 'broken.py').write_text(text)
  with pytest.raises(manifest.Error, match=rf'broken.py.*{said}') as e:
    config_file.get_config(*config_file.load(str(tmp_path / 'broken.py')))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_point_of_every_config_file_builds(path):
  module, arg = config_file.load(str(path))
  found = manifest.expand(config_file.get_config(module, arg), manifest.get_sweep(module, arg), manifest.get_metrics(module))
  for point in found:
    assert model_config.from_dict(point.config['model']).layers
    assert point.match is None or abs(point.match['mismatch']) <= 0.01
  assert json.loads(json.dumps(dataclasses.asdict(found[0])))['folder'] == found[0].folder
