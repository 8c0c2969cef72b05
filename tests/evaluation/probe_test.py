"""Probes: which arms there are, what their numbers are, and that a control that fails ends the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.evaluation import probe, score
from gemma4_jax.evaluation.documents import Document
from gemma4_jax.model import intervention, transformer

CFG = config.shrink(config.E2B, pattern='LG', width=32, vocab_size=64, num_layers=4, num_kv_shared_layers=2)
PARAMS = transformer.init(CFG, 0)
RNG = np.random.default_rng(0)
DOCUMENTS = [Document(np.concatenate([[2], RNG.integers(3, 64, n)]).astype(np.int32), f'document {n}') for n in (5, 40)]
HOW = dict(window=32, stride=31, batch_tokens=64)


@pytest.fixture(scope='module')
def arms():
  return list(probe.run(CFG, PARAMS, DOCUMENTS, **HOW))


def test_sets_are_each_layer_those_that_lend_and_borrow_and_all():
  assert probe.layer_sets(CFG) == {
      'layer 0': (0,), 'layer 1': (1,), 'layer 2': (2,), 'layer 3': (3,), 'KV donors': (0, 1), 'KV borrowers': (2, 3), 'all': (0, 1, 2, 3)}
  assert set(probe.layer_sets(CFG.replace(num_kv_shared_layers=0, ple_every=2))) == {'layer 1', 'layer 3', 'all'}


@pytest.mark.slow
def test_every_kind_runs_in_every_set_and_none_once(arms):
  assert [(arm.kind, arm.where, arm.layers) for arm in arms] == probe.arms(CFG)
  assert len(arms) == 1 + (len(intervention.KINDS) - 1) * 7 and arms[0].kind == 'none'


def test_none_has_the_losses_of_the_model(arms):
  ids = DOCUMENTS[0].ids[None]
  expected = score.token_nll(CFG, PARAMS, ids, np.ones_like(ids))[0, :-1]
  np.testing.assert_allclose(arms[0].nll[0], expected, atol=1e-4)
  assert [len(nll) for nll in arms[0].nll] == [5, 40]


def test_mean_is_over_the_tokens_that_run_and_resample_takes_another_token_of_the_documents():
  batches = probe.windows.batches(DOCUMENTS, **HOW)
  others = probe._other_tokens(DOCUMENTS, batches, seed=0)
  pool = np.concatenate([document.ids[1:] for document in DOCUMENTS])
  assert all((other != batch.ids_BT).all() and np.isin(other, pool).all() for other, batch in zip(others, batches))
  arrays = [(batch.ids_BT, batch.seg_BT, None) for batch in batches]
  run = jax.jit(lambda ids: transformer.Transformer(CFG).apply({'params': PARAMS}, ids, head=False)[1]['vectors'][2])
  vectors = [run(ids)[seg > 0] for ids, seg, _ in arrays]
  np.testing.assert_allclose(probe._mean_vectors(CFG, PARAMS, arrays)[2], np.concatenate(vectors).mean(0), atol=1e-5)


def test_an_arm_without_effect_ends_the_probe():
  params = jax.tree.map(lambda x: x, PARAMS)
  params['layer_2']['ple_project']['w'] = jnp.zeros_like(params['layer_2']['ple_project']['w'])
  with pytest.raises(probe.Invalid, match='zero in layer 2 changes no probability'):
    list(probe.run(CFG, params, DOCUMENTS, **HOW))


def test_a_none_that_changes_logits_ends_the_probe(monkeypatch):
  zeroed = lambda self, own, resampled, terms: tuple(v * 1.0001 for v in own)
  monkeypatch.setattr(intervention.Intervention, 'vectors', zeroed)
  mean = tuple(jnp.zeros(CFG.ple_dim) for _ in range(CFG.num_layers))
  with pytest.raises(probe.Invalid, match='intervention none changes logits'):
    probe.check_none(CFG, PARAMS, DOCUMENTS[0].ids[None], mean, DOCUMENTS[0].ids[None])


def test_losses_that_are_no_numbers_end_the_probe():
  params = jax.tree.map(lambda x: x, PARAMS)
  params['final_norm']['scale'] = params['final_norm']['scale'] * jnp.nan
  with pytest.raises(probe.Invalid, match='not finite'):
    next(probe.run(CFG, params, DOCUMENTS, **HOW))


@pytest.mark.parametrize('cfg, documents, said', [
    (CFG.replace(embedding='none'), DOCUMENTS, "model.embedding='none' has none"),
    (CFG, [Document(np.array([2, 5, 5], np.int32), 'x')], 'two different tokens')], ids=['no vectors', 'one token'])
def test_what_cannot_be_probed_is_refused(cfg, documents, said):
  with pytest.raises(ValueError, match=said):
    next(probe.run(cfg, PARAMS, documents, **HOW))
