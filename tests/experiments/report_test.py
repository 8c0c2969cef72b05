import io
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import rich.console

from configs import base
from experiments import analysis, manifest, report

ROOT = pathlib.Path(report.__file__).parents[1]
COSTS = {
    'params/total': 1_000_000, 'params/non_embedding': 600_000, 'params/ple_table': 0, 'flops_per_token': 2_000_000.0,
    'resident_bytes': 2 << 20, 'tokens_per_s': 1000.0, 'peak_memory_bytes': 1 << 30, 'compile_seconds': None, 'wall_seconds': 9.0}
ENV = {
    'commit': 'abc', 'dirty': False, 'device': 'cpu', 'devices': 1, 'cpus': 1, 'versions': {'jax': '0'}, 'corpus_hash': 'c',
    'tokenizer_hash': 't'}
SWEEP = [{'seed': seed, 'arm': arm, 'model.embedding': arm} for seed in range(3) for arm in ('none', 'ple', 'value')]
# bits per byte by seed: ple is better by 0.10, 0.11, 0.12; value by -0.3, 0.2, 0.1
VALUES = {'none': (2.0, 2.1, 1.9), 'ple': (1.9, 1.99, 1.78), 'value': (2.3, 1.9, 1.8)}


def make(workdir, sweep=SWEEP, metrics=('eval/nats_per_token',), **fields):
  """A sweep with all its rows, as finished runs leave them."""
  c = base.get_config('e2b-toy')
  c.train.steps = 30
  c.update_from_flattened_dict(fields)
  points = manifest.expand(c, sweep, metrics)
  workdir.mkdir(exist_ok=True)
  manifest.write(points, workdir)
  for point in points:
    folder = workdir / point.folder
    folder.mkdir(parents=True)
    value = VALUES.get(point.arm, (2.0, 2.0, 2.0))[point.seed]
    done = {'metrics': {'eval/bits_per_byte': value, 'eval/nats_per_token': 2 * value}, 'fingerprint': point.folder,
            'costs': COSTS | ({'params/total': 1_500_000} if point.arm == 'ple' else {})}
    (folder / 'DONE').write_text(json.dumps(done))
    (folder / 'env.json').write_text(json.dumps(ENV))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps({'step': s, 'loss': value + 6 / s}) + '\n' for s in range(1, 31)))
  return points


def folder(workdir, arm, seed):
  return next(workdir / p.folder for p in manifest.read(workdir) if (p.arm, p.seed) == (arm, seed))


def analyse(workdir, baseline=''):
  return analysis.analyse(analysis.collect(workdir), baseline)


def comparison(results, arm, against='none', kind='comparisons'):
  return next(c for c in results['groups'][0][kind] if (c['arm'], c['against']) == (arm, against))


def edit(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def printed(workdir, **kwargs):
  out = io.StringIO()
  valid = report.report(workdir, console=rich.console.Console(file=out), **kwargs)
  return out.getvalue(), valid


def test_differences_are_paired_by_seed_and_their_interval_is_t(tmp_path):
  make(tmp_path)
  found = comparison(analyse(tmp_path), 'ple')
  primary = found['metrics']['eval/bits_per_byte']
  assert primary['differences'] == {seed: pytest.approx(d) for seed, d in enumerate((-0.10, -0.11, -0.12))}
  half = 4.302653 * 0.01 / math.sqrt(3)     # the spread between seeds is ten times that, and drops out
  assert primary['interval'] == {'mean': pytest.approx(-0.11), 'low': pytest.approx(-0.11 - half, abs=1e-6),
                                 'high': pytest.approx(-0.11 + half, abs=1e-6), 'n': 3, 'kind': 't'}
  assert found['verdict'] == 'better' and primary['p_holm'] == pytest.approx(2 * primary['p'])


def test_a_difference_inside_its_interval_is_no_verdict_whatever_its_size(tmp_path):
  make(tmp_path)
  found = comparison(analyse(tmp_path), 'value')
  interval = found['metrics']['eval/bits_per_byte']['interval']
  assert interval['low'] < 0 < interval['high'] and found['verdict'] == 'no difference shown'
  row, = (row for row in report.tables(analyse(tmp_path))[0].rows if row[0] == 'value')
  assert 'no difference shown' in row and not {'better', 'worse'} & set(row)


def test_costs_stand_beside_gains_absolute_and_as_ratios(tmp_path):
  make(tmp_path)
  results = analyse(tmp_path)
  assert comparison(results, 'ple')['cost_ratios'] == {c.name: 1.5 if c.name == 'params/total' else 1.0 for c in analysis.COSTS}
  main, costs = (next(t for t in report.tables(results) if t.title.startswith(title)) for title in ('eval/bits', 'Costs'))
  assert main.rows[1][main.header.index('params ×')] == '1.50'
  assert costs.rows[1][1:5] == ['1.5M (1.50)', '600k (1.00)', '2M (1.00)', '2 MiB (1.00)']
  assert costs.rows[0][-1] == '1 GiB (1.00)'


def test_failed_missing_and_unfinished_runs_are_listed_and_leave_the_pairs(tmp_path):
  make(tmp_path)
  for seed, name in enumerate(('ERROR', 'metrics.jsonl', None)):
    lost = folder(tmp_path, 'value', seed)
    for path in lost.iterdir():
      path.unlink()
    if name:
      (lost / name).write_text('NonFiniteLoss: step 3\nTraceback' if name == 'ERROR' else '')
  (folder(tmp_path, 'ple', 1) / 'DONE').unlink()
  results = analyse(tmp_path)
  assert [(r['name'], r['state'], r['reason']) for r in results['runs'] if r['state'] != 'done'] == [
      ('value s0', 'failed', 'NonFiniteLoss: step 3'), ('ple s1', 'unfinished', ''), ('value s1', 'unfinished', ''),
      ('value s2', 'missing', '')]
  assert comparison(results, 'value')['verdict'] == 'no pairs: no verdict'
  assert comparison(results, 'ple')['metrics']['eval/bits_per_byte']['interval']['n'] == 2
  said, valid = printed(tmp_path)
  assert valid and 'NonFiniteLoss: step 3' in said and '2/3' in said and '0/3' in said


def test_every_run_of_the_results_names_its_data(tmp_path):
  make(tmp_path, SWEEP[:2])
  assert [(r['corpus_hash'], r['tokenizer_hash'], r['metrics']['eval/bits_per_byte']) for r in analyse(tmp_path)['runs']] == [
      ('c', 't', 2.0), ('c', 't', 1.9)]


def test_one_pair_gets_no_verdict(tmp_path):
  make(tmp_path, SWEEP[:2])
  assert comparison(analyse(tmp_path), 'ple')['verdict'] == 'n=1: no verdict'
  assert 'n=1: no verdict' in printed(tmp_path)[0]


def test_a_value_that_is_not_finite_counts_as_failed(tmp_path):
  make(tmp_path)
  edit(folder(tmp_path, 'ple', 0) / 'DONE', metrics={'eval/bits_per_byte': float('nan')}, costs=COSTS | {'tokens_per_s': 1.0})
  results = analyse(tmp_path)
  assert [r['reason'] for r in results['runs'] if r['state'] == 'failed'] == ['eval/bits_per_byte is nan']
  assert results['groups'][0]['arms']['ple']['costs']['tokens_per_s'] == 1000.0


def test_a_secondary_metric_that_is_not_finite_is_left_out(tmp_path):
  make(tmp_path)
  edit(folder(tmp_path, 'ple', 0) / 'DONE', metrics={'eval/bits_per_byte': 1.9, 'eval/nats_per_token': float('nan')})
  found = comparison(analyse(tmp_path), 'ple')['metrics']
  assert [list(found[name]['differences']) for name in ('eval/bits_per_byte', 'eval/nats_per_token')] == [[0, 1, 2], [1, 2]]


def test_runs_on_other_data_are_no_pair_and_the_note_says_why(tmp_path):
  make(tmp_path)
  edit(folder(tmp_path, 'ple', 2) / 'env.json', corpus_hash='other')
  results = analyse(tmp_path)
  found = comparison(results, 'ple')['metrics']['eval/bits_per_byte']
  assert list(found['differences']) == [0, 1] and found['refused'] == {2: "corpus_hash ('other' and 'c')"}
  assert "ple and none are not paired: they differ in corpus_hash ('other' and 'c') (seed 2)." in results['notes']


@pytest.mark.parametrize('field, value', [('data.batch_size', 4), ('train.steps', 31), ('data.sequence_length', 64)])
def test_arms_that_saw_different_data_or_steps_are_not_compared(tmp_path, field, value):
  make(tmp_path, [{**point, field: value} if point['arm'] == 'ple' else point for point in SWEEP])
  found = comparison(analyse(tmp_path), 'ple')
  assert found['verdict'] == 'no pairs: no verdict' and field in found['metrics']['eval/bits_per_byte']['refused'][0]


def test_where_the_cache_lies_does_not_forbid_a_pair(tmp_path):
  make(tmp_path, [{**point, 'data.cache_dir': '/elsewhere'} if point['arm'] == 'ple' else point for point in SWEEP])
  assert comparison(analyse(tmp_path), 'ple')['verdict'] == 'better'


def test_runs_of_several_commits_are_noted(tmp_path):
  make(tmp_path)
  edit(folder(tmp_path, 'ple', 1) / 'env.json', commit='def', dirty=True)
  notes = analyse(tmp_path)['notes']
  assert any(note.startswith('Runs differ in commit: ') and '"def" in ple s1' in note for note in notes)
  assert any('dirty' in note and 'changes' in note for note in notes)


def test_a_run_that_went_on_under_another_commit_is_noted(tmp_path):
  make(tmp_path)
  edit(folder(tmp_path, 'ple', 1) / 'env.json', before=[{**ENV, 'commit': 'older'}])
  notes = analyse(tmp_path)['notes']
  assert any('Runs differ in commit' in note and '"older" in ple s1' in note for note in notes)


def test_a_metric_that_no_run_has_is_told(tmp_path):
  make(tmp_path, metrics=('eval/nats_per_tokn',))
  assert 'No run has eval/nats_per_tokn.' in analyse(tmp_path)['notes']


def test_where_validation_is_cut_short_the_batches_decide_what_is_seen(tmp_path):
  sweep = [{**fields, 'eval.batch_size': 4} if fields['arm'] == 'ple' else fields for fields in SWEEP]
  make(tmp_path / 'whole', sweep)
  make(tmp_path / 'cut', sweep, **{'eval.max_batches': 2})
  assert not comparison(analyse(tmp_path / 'whole'), 'ple')['metrics']['eval/bits_per_byte']['refused']
  refused = comparison(analyse(tmp_path / 'cut'), 'ple')['metrics']['eval/bits_per_byte']['refused']
  assert len(refused) == 3 and all('eval.batch_size (4 and 16)' in why for why in refused.values())


def test_any_arm_can_be_the_baseline(tmp_path):
  make(tmp_path)
  results = analyse(tmp_path, 'ple')
  assert comparison(results, 'none', 'ple')['verdict'] == 'worse' and results['groups'][0]['baseline'] == 'ple'
  with pytest.raises(manifest.Error, match="--baseline=pel: no such arm; did you mean 'ple'"):
    analyse(tmp_path, 'pel')


def test_a_treatment_is_compared_with_every_baseline_matched_to_it(tmp_path):
  matched = [{'seed': s, 'arm': 'none =params', 'model.embedding': 'none', 'match.metric': 'total_params'} for s in range(3)]
  make(tmp_path, SWEEP + matched)
  results = analyse(tmp_path)
  found = comparison(results, 'ple', 'none =params', 'matched')
  assert found['metrics']['eval/bits_per_byte']['differences'] == {0: pytest.approx(-0.1), 1: pytest.approx(-0.01), 2: pytest.approx(-0.22)}
  assert found['verdict'] == 'no difference shown'
  assert any(note.startswith('none =params is matched to ple: total_params') for note in results['notes'])
  assert 'ple − none =params' in printed(tmp_path)[0]


def test_arms_are_compared_within_their_group(tmp_path):
  sweep = [{**point, 'group': group, 'model.width': width} for group, width in (('small', 64), ('large', 96)) for point in SWEEP]
  make(tmp_path, sweep)
  results = analyse(tmp_path)
  assert [(g['group'], g['baseline'], len(g['comparisons'])) for g in results['groups']] == [('small', 'none', 2), ('large', 'none', 2)]
  assert {a['planned'] for g in results['groups'] for a in g['arms'].values()} == {3}
  printed(tmp_path)
  assert {'loss_curves_small.png', 'loss_curves_large.png', 'quality_against_cost.png'} <= {path.name for path in tmp_path.iterdir()}


def test_an_arm_without_effect_is_left_out_and_told(tmp_path):
  make(tmp_path)
  for arm in ('none', 'value'):
    edit(folder(tmp_path, arm, 0) / 'DONE', fingerprint='same')
  said, valid = printed(tmp_path)
  assert not valid and 'INVALID' in said and 'bit-identical' in said
  results = analyse(tmp_path)
  assert [r['name'] for r in results['runs'] if r['state'] == 'invalid'] == ['value s0']
  assert list(comparison(results, 'value')['metrics']['eval/bits_per_byte']['differences']) == [1, 2]


def test_an_arm_that_mixes_configs_is_refused(tmp_path):
  make(tmp_path, **{'model.window': 32})
  path = tmp_path / manifest.FILE
  path.write_text(path.read_text().replace('"window": 32', '"window": 16', 1))
  with pytest.raises(manifest.Error, match="both arm 'none' but differ in model.window"):
    analyse(tmp_path)


def test_the_primary_metric_must_be_there_and_have_a_direction(tmp_path):
  make(tmp_path, primary_metric='eval/bits_per_bite')
  with pytest.raises(manifest.Error, match="no 'eval/bits_per_bite', the primary metric; the nearest there is 'eval/bits_per_byte'"):
    analyse(tmp_path)
  (tmp_path / 'b').mkdir()
  make(tmp_path / 'b', SWEEP[:2], primary_metric='eval/smell')
  for arm in ('none', 'ple'):
    edit(folder(tmp_path / 'b', arm, 0) / 'DONE', metrics={'eval/smell': 1.0})
  with pytest.raises(manifest.Error, match='is less of it better'):
    analyse(tmp_path / 'b')


def test_secondary_metrics_carry_no_verdict(tmp_path):
  make(tmp_path)
  table, = (t for t in report.tables(analyse(tmp_path)) if t.title.startswith('Secondary'))
  assert table.header == ['arm', 'eval/nats_per_token'] and table.rows[0][1].startswith('-0.2200 [')
  assert not {'better', 'worse'} & {word for row in table.rows for cell in row for word in cell.split()}


def test_all_files_are_made_from_rows_alone(tmp_path):
  make(tmp_path)
  said, valid = printed(tmp_path)
  assert valid
  pictures = ['loss_curves.png', 'final_metric.png', 'differences.png', 'quality_against_cost.png']
  for name in pictures:
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG') and name in (tmp_path / 'report.md').read_text() and name in said
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['primary_metric'] == 'eval/bits_per_byte' and results['environment']['corpus_hash'] == 'c'
  text = (tmp_path / 'report.md').read_text()
  assert '| ple | 3/3 | 1.8900 | -0.1100 | [-0.1348, -0.0852] | 3 |' in text and 'Commit: abc.' in text
  assert str(tmp_path.parent) not in text and not list(tmp_path.glob('*.tmp')) + list(tmp_path.glob('.*'))


def test_a_sweep_of_which_nothing_is_done_still_reports(tmp_path):
  make(tmp_path)
  for path in tmp_path.glob('*/DONE'):
    path.unlink()
  said, valid = printed(tmp_path)
  assert valid and said.count('unfinished') == 9 and not list(tmp_path.glob('*.png'))


def test_a_narrow_terminal_loses_no_column(tmp_path):
  make(tmp_path)
  table = report.tables(analyse(tmp_path))[0]
  out = io.StringIO()
  rich.console.Console(file=out, width=60).print(*report._drawn(table, 60), sep='\n')
  assert all(name in out.getvalue() for name in table.header) and max(map(len, out.getvalue().splitlines())) <= 60


@pytest.mark.parametrize('value, unit, said', [
    (0, '', '0'), (999, '', '999'), (999_600, '', '1M'), (1_234_567, '', '1.23M'), (5e18, '', '5E'), (1 << 20, 'B', '1 MiB'),
    (1000, 'B', '1000 B')])
def test_quantities_are_short(value, unit, said):
  assert report.quantity(value, unit) == said


def test_a_users_error_is_one_line(tmp_path):
  found = subprocess.run([sys.executable, '-m', 'experiments.report', str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 2 and found.stderr.count('\n') == 1
  assert found.stderr.startswith('error: ') and 'no manifest.jsonl' in found.stderr


def test_plots_need_no_display_and_no_backend_of_windows(tmp_path):
  make(tmp_path)
  code = ('import pathlib, sys\nfrom experiments import report\nreport.report(pathlib.Path(sys.argv[1]))\n'
          'sys.exit("matplotlib.pyplot" in sys.modules)')   # which chooses a backend
  environment = {name: value for name, value in os.environ.items() if name not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')}
  found = subprocess.run([sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=environment)
  assert found.returncode == 0 and len(list(tmp_path.glob('*.png'))) == 4, found.stderr
