"""The probe as an experiment: statistics by hand, a run of it on a checkpoint through the launcher, and what it refuses."""

import csv
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from configs import ple_probe
from experiments import probe
from gemma4_jax import config as model_config
from gemma4_jax.checkpoint import save
from gemma4_jax.data.tokenizer import Tokenizer
from gemma4_jax.evaluation.probe import Arm
from gemma4_jax.model import transformer

ROOT = pathlib.Path(probe.__file__).parents[1]
CFG = model_config.shrink(model_config.E2B, pattern='LG', width=32, num_layers=4, num_kv_shared_layers=2, vocab_size=600)
BASE = Arm('none', '', (), [np.array([1, 2, 3.0]), np.array([4.0]), np.array([1, 1.0])])
STRATA = {'all': [np.ones(3, bool), np.ones(1, bool), np.ones(2, bool)],
          'rare': [np.array([True, False, True]), np.zeros(1, bool), np.array([False, True])]}


def arm(shift, kind='zero', where='layer 0', layers=(0,)):
  return Arm(kind, where, layers, [nll + np.asarray(d) for nll, d in zip(BASE.nll, shift, strict=True)])


def test_a_difference_is_the_mean_over_documents_of_their_tokens_means_paired_with_none():
  found = probe.compare(arm([[0, 3, 0], [1], [0, 1]]), BASE, STRATA)
  means = [1, 1, 0.5]
  got = found['delta']['all']
  half = scipy.stats.t.ppf(0.975, 2) * np.std(means, ddof=1) / math.sqrt(3)
  assert (got['mean'], got['n']) == (pytest.approx(2.5 / 3), 3)
  assert (got['low'], got['high']) == pytest.approx((2.5 / 3 - half, 2.5 / 3 + half))
  assert got['p'] == pytest.approx(scipy.stats.ttest_1samp(means, 0).pvalue)


def test_a_stratum_has_the_documents_with_tokens_in_it():
  got = probe.compare(arm([[0, 3, 1], [7], [0, 1]]), BASE, STRATA)['delta']['rare']
  assert (got['mean'], got['n']) == ((0.5 + 1) / 2, 2) and 'p' not in got


def test_holm_adjusts_among_the_layers_of_a_kind_and_apart_from_sets():
  def told(kind, where, p):
    low = -0.1 if where == 'layer 1' else 0.1
    found = {'mean': 1, 'low': low, 'high': 2, 'n': 20, 'kind': 'bootstrap', 'p': p}
    return {'kind': kind, 'where': where, 'layers': [0], 'delta': {'all': found}}
  arms = [told('zero', 'layer 0', 0.01), told('zero', 'layer 1', 0.04), told('zero', 'all', 0.04), told('mean', 'layer 0', 0.04)]
  probe.adjust(arms)
  found = [one['delta']['all'] for one in arms]
  assert [one['p_holm'] for one in found] == pytest.approx([0.02, 0.04, 0.04, 0.04])
  assert [one['verdict'] for one in found] == ['worse', 'no difference shown', 'worse', 'worse']    # the second's interval holds 0


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A checkpoint, and text to probe it on."""
  folder = tmp_path_factory.mktemp('probe')
  save.save_hf(CFG, transformer.init(CFG, 0), folder / 'checkpoint')
  (folder / 'checkpoint/tokenizer.json').write_text(Tokenizer.stand_in(vocab_size=600).serialized, encoding='utf-8')
  (folder / 'text').mkdir()
  for i in range(40):
    (folder / f'text/{i}.txt').write_text(' '.join(f'word {i * j % 97} of text number {i + j}' for j in range(9)))
  return folder


def fields(home, **probe_fields):
  data = {'data.source': 'text', 'data.path': f'{home}/text/*.txt', 'data.validation_fraction': 0.4, 'data.cache_dir': f'{home}/cache'}
  chosen = {'checkpoint': f'{home}/checkpoint', 'documents': 4, 'min_tokens': 2, 'tokens': 30, 'window': 32, 'stride': 31}
  return data | {f'probe.{name}': value for name, value in (chosen | probe_fields).items()}


@pytest.mark.slow
def test_the_launcher_probes_a_checkpoint_and_reports(home):
  workdir = home / 'work'
  command = [sys.executable, '-m', 'experiments.launch', '--config=configs/ple_probe.py', f'--workdir={workdir}']
  command += [f'--config.{name}={value}' for name, value in fields(home).items()]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  found, = json.loads((workdir / 'results.json').read_text())
  assert len(found['arms']) == 6 * 7 and found['protocol']['documents'] == 4
  everywhere = next(one for one in found['arms'] if (one['kind'], one['where']) == ('zero', 'all'))
  path, = workdir.glob('*/documents.csv')
  rows = list(csv.DictReader(path.open()))
  deltas = [(float(row['zero all']) - float(row['none'])) / int(row['tokens']) for row in rows]
  assert len(rows) == 4 and len(rows[0]) == 3 + 1 + 6 * 7
  assert everywhere['delta']['all']['mean'] == pytest.approx(np.mean(deltas), abs=1e-4) and everywhere['layers'] == [0, 1, 2, 3]
  assert sum(stratum['tokens'] for stratum in found['protocol']['strata'] if stratum['name'][0] == 'q') == found['protocol']['tokens']
  text = (workdir / 'report.md').read_text()
  assert '| zero |' in text and '| 3 (borrows of 1) |' in text and '(delta_by_layer.png)' in text
  assert (workdir / 'delta_by_layer.png').stat().st_size > 10_000 and 'Single layers' in done.stdout


@pytest.mark.parametrize('changes, said', [
    ({'probe.checkpoint': '/nowhere'}, '/nowhere: no such directory'),
    ({'probe.checkpoint': '', 'model.embedding': 'none'}, "model.embedding: a probe needs per-layer vectors, and .* has none"),
    ({'probe.checkpoint': '', 'train.steps': 3}, 'optimizer.warmup_steps'),
    ({'probe.window': 300}, 'probe.window: 300 is over model.context_length = 256'),
    ({'probe.stride': 32}, 'stride=32'), ({'probe.documents': -1}, 'probe.documents: -1 is less than 0'),
    ({'probe.param_dtype': 'int8'}, "probe.param_dtype: 'int8'")], ids=str)
def test_what_cannot_be_probed_is_said_before_anything_runs(home, changes, said):
  config = ple_probe.get_config()
  config.update_from_flattened_dict(fields(home) | changes)
  with pytest.raises(ValueError, match=said):
    probe.check(config)
