"""Every config file and every point of its sweep can run: fields exist, models agree with themselves, matches are met."""

import json
import pathlib

import pytest

from experiments import best_learning_rates, manifest
from gemma4_jax import config as model_config, config_file, size

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / 'configs').glob('[!_]*.py'))


def expand(flag):
  module, arg = config_file.load(str(ROOT / 'configs' / flag))
  return manifest.expand(config_file.get_config(module, arg), manifest.get_sweep(module, arg), manifest.get_metrics(module))


@pytest.mark.parametrize('name', FILES)
def test_every_point_of_every_sweep_is_a_model_and_its_docstring_says_how_to_run_it(name):
  for point in expand(f'{name}.py'):
    assert size.total(model_config.from_dict(point.config['model'])) > 0
  assert f'--config=configs/{name}.py' in (ROOT / 'configs' / f'{name}.py').read_text()


def test_the_default_sweep_has_the_controls_and_three_seeds():
  points = expand('ple.py')
  assert {p.arm for p in points} == {'none', 'ple', 'projection_only', 'none =params', 'none =flops'}
  assert {p.seed for p in points} == {0, 1, 2} and len(points) == 15
  matched = [p for p in points if p.match]
  assert len(matched) == 6 and all(abs(p.match['mismatch']) <= 0.01 for p in matched)


def test_every_arm_has_a_sweep_at_toy_size():
  points = expand('ple.py:arms')
  assert {p.config['model']['embedding'] for p in points} == set(model_config.EMBEDDING_ARMS)
  assert {(p.arm, p.seed) for p in expand('ple.py')} < {(p.arm, p.seed) for p in points}


@pytest.mark.parametrize('arg', ['armz', 'study-rl', 'e3b'])
def test_a_mistyped_preset_answers_with_those_there_are(arg):
  with pytest.raises(ValueError, match=f"no model '{arg}', and no such preset; presets arms, study, study-lr, models e2b, "):
    expand(f'ple.py:{arg}')


def test_full_size_models_have_the_same_sweep():
  assert {p.config['model']['embedding'] for p in expand('ple.py:e2b')} == {'none', 'ple', 'projection_only'}


def test_the_study_takes_the_rates_of_its_trial(tmp_path):
  trial = expand('ple.py:study-lr')
  arms = {(p.group, p.arm.rpartition(' @ ')[0]) for p in trial}
  assert all(sum((p.group, p.arm.rpartition(' @ ')[0]) == arm for p in trial) == 4 for arm in arms)   # of equal size for all
  manifest.write(trial, tmp_path)
  for p in trial:
    (tmp_path / p.folder).mkdir()
    rate = p.config['optimizer']['learning_rate']
    best = 2e-3 if p.config['model']['embedding'] == 'ple' else 4e-3
    (tmp_path / p.folder / 'DONE').write_text(json.dumps({'metrics': {'eval/bits_per_byte': 1 + abs(rate - best)}, 'costs': {}}))
  best_learning_rates.main([str(tmp_path), str(tmp_path / 'best.json')])
  study = expand(f'ple.py:study@{tmp_path}/best.json')
  assert {(p.group, p.arm) for p in study} == arms and {p.seed for p in study} == {0, 1, 2} and len(study) == 3 * len(arms)
  assert {p.config['optimizer']['learning_rate'] for p in study if p.config['model']['embedding'] == 'ple'} == {2e-3}
  assert {p.config['optimizer']['learning_rate'] for p in study if p.arm == 'none'} == {4e-3}
  (tmp_path / 'best.json').write_text('[]')
  with pytest.raises(ValueError, match='best.json: no JSON object .*make it again'):
    expand(f'ple.py:study@{tmp_path}/best.json')


def test_a_rate_at_which_a_run_diverged_is_not_the_best(tmp_path):
  trial = [p for p in expand('ple.py:study-lr') if p.arm.startswith('none @')][:4]
  rates = sorted(p.config['optimizer']['learning_rate'] for p in trial)
  manifest.write(trial, tmp_path)
  for p in trial:
    (tmp_path / p.folder).mkdir()
    rate = p.config['optimizer']['learning_rate']
    if rate == rates[3]:
      (tmp_path / p.folder / 'ERROR').write_text('NonFiniteLoss: step 3: loss not finite\n')
    else:
      value = float('nan') if rate == rates[0] else rate
      (tmp_path / p.folder / 'DONE').write_text(json.dumps({'metrics': {'eval/bits_per_byte': value}, 'costs': {}}))
  found, ends = best_learning_rates.best(tmp_path)
  assert found == {trial[0].group: {'none': rates[1]}} and not ends
  for p in trial:
    (tmp_path / p.folder / 'DONE').unlink(missing_ok=True)
    (tmp_path / p.folder / 'ERROR').write_text('NonFiniteLoss: step 3: loss not finite\n')
  with pytest.raises(manifest.Error, match='none diverged at every rate'):
    best_learning_rates.best(tmp_path)


def test_an_unfinished_trial_and_a_study_without_one_are_one_clear_error(tmp_path):
  manifest.write(expand('ple.py:study-lr'), tmp_path)
  with pytest.raises(manifest.Error, match='is not done; finish the trial'):
    best_learning_rates.best(tmp_path)
  with pytest.raises(ValueError, match='needs the file that experiments.best_learning_rates writes'):
    expand('ple.py:study@nowhere.json')
