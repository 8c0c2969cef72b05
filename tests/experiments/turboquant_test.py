"""Quantized caches and weights in a language model, as experiments: what is compared, and both through on a tiny model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import statistics
from experiments.turboquant import caches, contexts, recall, toys, weights
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
  delta, kl, same = toys.differences(jnp.log(q)[None, None], jnp.array([[next_id]]), jnp.log(p)[None, None])[:, 0, 0]
  assert float(delta) == pytest.approx(np.log(0.2) - np.log(0.6), abs=1e-6)
  assert float(kl) == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6) and float(same) == 0


def test_a_document_counts_its_predicted_tokens_alone_and_batches_follow_each_other():
  found = toys.by_document([np.array([[[1, 3, 99]]] * 3), np.array([[[5, 7, 99]]] * 3)])
  assert found == {'delta': [2, 6], 'kl': [2, 6], 'same': [2, 6]}


def test_the_interval_is_over_seeds_and_documents():
  seed = lambda shift: [{'name': 'x', 'kl': [1.0 + shift, 2 + shift, 3 + shift]}]
  row, = toys.combine([seed(0)])
  assert row['kl']['high'] - row['kl']['mean'] == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)    # Student's t of three documents
  row, = toys.combine([seed(0), seed(2)])
  assert (row['name'], row['kl']['mean'], row['kl']['seeds'], row['kl']['documents']) == ('x', 3, [2, 4], ['1 2 3', '3 4 5'])
  crossed = statistics.crossed([[1, 2, 3], [3, 4, 5]])
  assert (row['kl']['low'], row['kl']['high']) == (crossed.low, crossed.high)


def test_results_of_other_models_stay_only_if_all_that_made_them_is_the_same(tmp_path):
  like = {'commit': 'a', 'documents': 8, 'date': '2000-01-01'}
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


@pytest.fixture(scope='module')
def words():
  rng = np.random.default_rng(0)
  text = [tuple(rng.integers(200, 400, int(rng.integers(1, 4))).tolist()) for _ in range(900)]
  return recall.Words({'train': text, 'validation': text[::-1]}, fill=[401, 402], keys=np.arange(10, 14), values=np.arange(20, 84), line=5,
                      bos=2)


@pytest.mark.parametrize('facts', recall.FACTS)
def test_a_document_asks_at_its_end_what_it_told_well_before(words, facts):
  ids = recall.document(words, 'train', facts, np.random.default_rng(facts))
  assert ids.shape == (recall.LENGTH,) and ids[0] == words.bos and (ids == words.bos).sum() == 1
  asked, told = ids[-3 * facts:].reshape(facts, 3), ids[:-3 * facts]
  at = np.flatnonzero(np.isin(told, words.keys))
  facts_of = lambda keys, values: dict(zip(keys.tolist(), values.tolist()))
  assert facts_of(told[at], told[at + 1]) == facts_of(asked[:, 1], asked[:, 2]) and len(at) == facts
  assert (told[at - 1] == words.line).all() and (asked[:, 0] == words.line).all() and len(told) - (at[-1] + 2) >= recall.GAP
  np.testing.assert_array_equal(ids[recall.answered(facts)], asked[:, 1])          # the key predicts the value
  np.testing.assert_array_equal(ids[recall.answered(facts) + 1], asked[:, 2])


def test_a_lesson_asks_what_it_told_and_never_within_the_window(words):
  asked = 0
  for seed in range(8):
    ids, told = recall.lesson(words, 4, np.random.default_rng(seed)), {}
    at = np.flatnonzero(np.isin(ids, words.keys))
    for key, value in zip(ids[at].tolist(), ids[at + 1].tolist()):
      asked += key in told
      assert told.setdefault(key, value) == value
    assert ids.shape == (recall.LENGTH,) and (np.diff(at) > recall.WINDOW).all()
  assert asked > 16


def test_answers_are_counted_where_they_are_asked_and_nowhere_else():
  nats = np.ones((2 * len(recall.FACTS), recall.LENGTH))
  nats[2:4, recall.LENGTH - 2] = 5                       # the last answer of the two documents of four facts
  first, second = np.split(np.stack([nats, nats == 1]), 2, axis=1)
  one, four = recall.by_document([first, second])
  assert one == {'nats': [1, 1], 'right': [1, 1]} and four == {'nats': [2, 2], 'right': [0.75, 0.75]}


def test_the_likeliest_token_is_right_or_it_is_not():
  nats, right = toys.answers(jnp.log(jnp.array([[[0.7, 0.3], [0.7, 0.3]]])), jnp.array([[0, 1]]))
  np.testing.assert_allclose(nats, [[-np.log(0.7), -np.log(0.3)]], rtol=1e-6)
  assert right.tolist() == [[1, 0]]


@pytest.mark.slow
def test_recall_and_contexts_go_through(model, ids, words, tmp_path, monkeypatch):
  monkeypatch.setattr(recall, 'METHODS', ('turboquant2', 'int8'))
  monkeypatch.setattr(caches, 'PRESETS', ('extreme,recent=1,sinks=0',))
  monkeypatch.setattr(contexts, 'METHODS', {'turboquant2': 'k', 'int8': 'k'})
  monkeypatch.setattr(contexts, 'PRESETS', {'extreme,recent=1,sinks=0': 'k'})
  monkeypatch.setattr(contexts, 'EDGES', (0, 16, 32))
  asked = np.stack([recall.document(words, 'train', facts, np.random.default_rng(0)) for facts in recall.FACTS])
  for experiment, given, key in ((recall, asked, 'more'), (contexts, ids, 'kl')):
    made = experiment.examine(model, given)
    results = {'toy': {'rows': toys.combine([made['rows']])} | {name: [value] for name, value in made.items() if name != 'rows'}}
    mean = lambda name: np.mean([abs(row[key]['mean']) for row in results['toy']['rows'] if row['name'] == name])
    assert 0 < mean('int8') < mean('turboquant2')
    for table in experiment.tables('toy', results['toy']):
      assert table.rows and all(len(row) == len(table.header) for row in table.rows)
    assert experiment.draw(results, tmp_path / 'picture.png').stat().st_size > 1000
