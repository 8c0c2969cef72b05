"""Quantized caches and weights in a language model, as experiments: what is compared, and both through on a tiny model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.turboquant import caches, toys, weights
from gemma4_jax import config
from gemma4_jax.model import attention, quantized, transformer
from gemma4_jax.sampling import text
from tests import quick

CFG = config.shrink(config.E2B, pattern='LG', width=64, num_layers=2, num_kv_shared_layers=0, mlp_dim=64, vocab_size=512, ple_dim=8,
                    head_dim=64, global_head_dim=64, window=16)


@pytest.fixture(scope='module')
def model():
  return text.random(CFG)


@pytest.fixture(scope='module')
def ids():
  return np.random.default_rng(0).integers(5, 500, (2, 32)).astype(np.int32)


def test_differences_are_of_loss_kl_and_the_likeliest_token():
  p, q, next_id = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.6, 0.1]), 1
  delta, kl, same = toys.differences(jnp.log(q)[None, None], jnp.log(p)[None, None], jnp.array([[next_id]]))[:, 0, 0]
  assert float(delta) == pytest.approx(np.log(0.2) - np.log(0.6), abs=1e-6)
  assert float(kl) == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6) and float(same) == 0


def test_a_document_counts_its_predicted_tokens_alone_and_batches_follow_each_other():
  found = toys.by_document([np.array([[[1, 3, 99]]] * 3), np.array([[[5, 7, 99]]] * 3)])
  assert found == {'delta': [2, 6], 'kl': [2, 6], 'same': [2, 6]}


def test_the_interval_is_over_documents_of_means_over_seeds():
  seed = lambda shift: [{'name': 'x', **{key: [1.0 + shift, 2 + shift, 3 + shift] for key in ('delta', 'kl', 'same')}}]
  row, = toys.combine([seed(0), seed(2)])
  assert (row['name'], row['kl']['mean'], row['kl']['seeds']) == ('x', 3, [2, 4])
  assert row['kl']['high'] - row['kl']['mean'] == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)    # Student's t of three


def test_results_of_other_models_stay_only_if_all_that_made_them_is_the_same(tmp_path):
  like = {'commit': 'a', 'steps': 20, 'date': '2000-01-01'}
  (tmp_path / 'x.json').write_text(json.dumps(like | {'models': {'e2b-toy': 1}}))
  assert toys._others(tmp_path / 'x.json', like | {'date': '2000-01-02'}) == {'e2b-toy': 1}
  assert toys._others(tmp_path / 'x.json', like | {'commit': 'b'}) == {} == toys._others(tmp_path / 'none.json', like)


@pytest.mark.slow
@pytest.mark.parametrize('format', ['turboquant4', 'int4'])
def test_a_decoded_plan_is_the_quantized_model(model, ids, format):
  back, _, _ = weights.decoded(model.params, 'all', format)
  cfg = CFG.replace(matvec='xla')
  run = quick.jit(lambda variables: transformer.Transformer(cfg).apply(variables, ids)[0])
  np.testing.assert_allclose(run({'params': back}), run(quantized.quantize(cfg, model.params, format)), atol=2e-4)


def test_every_group_of_the_model_is_measured(model):
  assert {group for group, _ in weights.plans(model.params)} == {'attention', 'mlp', 'ple', 'embed', 'ple_table', 'all'}


def test_one_group_changes_and_no_other(model):
  for group, format in (('mlp', 'nf4'), ('ple_table', 'int4')):
    back, bits, error = weights.decoded(model.params, group, format)
    changed = {path[0].key if path[0].key == 'arm' else path[1].key for (path, a), b in
               zip(jax.tree_util.tree_leaves_with_path(model.params), jax.tree.leaves(back)) if (a != b).any()}
    assert changed == {'mlp': {'mlp'}, 'ple_table': {'arm'}}[group]
    assert bits == {'mlp': 4.25, 'ple_table': 4 + 32 / 8}[group] and 0.004 < error < 0.04


def test_the_spread_of_logits_is_that_of_the_queries_and_keys_by_hand():
  """One layer of keys that are one-hot and queries that are multiples of them: a query's logits are 0 but for one."""
  noted, T = [], 8
  k = jnp.eye(T)[None, :, None]
  stream = attention.Stream(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32), {})
  caches._Watched(noted).append(k, k, stream).attend(3 * k, stream, None, 1.0)
  seen = np.arange(T // 2, T) + 1     # keys of the later queries: one logit of 3, the others 0
  assert float(noted[0]) == pytest.approx(np.sqrt(np.mean(9 * (1 / seen - 1 / seen**2))), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('experiment', [caches, weights], ids=['caches', 'weights'])
def test_an_experiment_goes_through(model, ids, tmp_path, monkeypatch, experiment):
  monkeypatch.setattr(caches, 'METHODS', ('turboquant4', 'int8'))
  monkeypatch.setattr(caches, 'PRESETS', ('turboquant,recent=1,sinks=0',))
  monkeypatch.setattr(caches, 'NEW', 4)
  monkeypatch.setattr(weights, 'plans', lambda params: [('mlp', 'turboquant2'), ('mlp', 'turboquant8'), ('ple_table', 'int4')])
  found = experiment.examine(model, ids)
  results = {'toy': {'rows': toys.combine([found['rows']])} | {key: [value] for key, value in found.items() if key != 'rows'}}
  kl = {(row.get('group', row.get('side')), row.get('format', row.get('name'))): row['kl']['mean'] for row in results['toy']['rows']}
  finer, coarser = [('both', 'int8'), ('both', 'turboquant4')] if experiment is caches else [('mlp', 'turboquant8'), ('mlp', 'turboquant2')]
  assert 0 < kl[finer] < kl[coarser]
  for table in experiment.tables('toy', results['toy']):
    assert table.rows and all(len(row) == len(table.header) for row in table.rows)
  assert experiment.draw(results, tmp_path / 'picture.png').stat().st_size > 1000
