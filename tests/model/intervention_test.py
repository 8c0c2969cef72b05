"""Interventions on per-layer vectors: each against the same change made by hand, on the parameters or the vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.model import intervention, ple_placement, transformer
from gemma4_jax.model.intervention import Intervention
from tests import quick

CFG = config.shrink(config.E2B, pattern='LG', width=32, vocab_size=64, num_layers=4, num_kv_shared_layers=2)
P, L = CFG.ple_dim, CFG.num_layers
IDS = jax.random.randint(jax.random.key(1), (2, 12), 0, CFG.vocab_size)
OTHER = (IDS + 7) % CFG.vocab_size
MEAN = tuple(jax.random.normal(jax.random.key(i), (P,)) for i in range(L))
PARAMS = transformer.init(CFG, 0)


def run(kind, layers, params=PARAMS, cfg=CFG):
  one = None if kind is None else Intervention(jnp.asarray(intervention.assign(cfg, kind, layers)), MEAN, OTHER)
  return program(cfg, params, IDS, one)


@quick.functools.partial(quick.jit, static_argnums=0)
def program(cfg, params, ids, one):
  logits, out = transformer.Transformer(cfg).apply({'params': params}, ids, intervention=one)
  return logits, out['vectors']


def edited(change):
  """The parameters after `change`, which gets a copy of the tree."""
  params = jax.tree.map(lambda x: x, PARAMS)
  change(params)
  return params


def test_none_gives_the_logits_of_the_model_without_an_argument_bit_for_bit():
  one = Intervention(jnp.asarray(intervention.assign(CFG, 'none', ())), MEAN, OTHER)
  apply = lambda **how: np.asarray(transformer.Transformer(CFG).apply({'params': PARAMS}, IDS, **how)[0])
  assert apply().tobytes() == apply(intervention=one).tobytes()


@pytest.mark.parametrize('kind', intervention.kinds(CFG)[1:])
def test_every_kind_changes_the_logits_in_every_layer(kind):
  plain = run('none', ())[0]
  for layer in range(L):
    assert np.abs(run(kind, (layer,))[0] - plain).max() > 1e-4


def test_only_the_vectors_of_the_chosen_layers_change():
  plain, changed = run('none', ())[1], run('zero', (1, 2))[1]
  assert [bool((a == b).all()) for a, b in zip(plain, changed)] == [i not in (1, 2) for i in range(L)]
  assert not np.any(changed[1]) and not np.any(changed[2])


def test_zero_is_a_projection_of_zeros():
  def no_projection(params):
    params['layer_1']['ple_project']['w'] = jnp.zeros_like(params['layer_1']['ple_project']['w'])
  np.testing.assert_allclose(run('zero', (1,))[0], run(None, (), edited(no_projection))[0], atol=1e-4)


def test_mean_is_the_given_vector_of_the_layer_everywhere():
  for i, vector in enumerate(run('mean', range(L))[1]):
    np.testing.assert_array_equal(vector, jnp.broadcast_to(MEAN[i], vector.shape))


def test_resample_takes_the_vectors_of_the_other_tokens():
  expected = program(CFG, PARAMS, OTHER, None)[1]
  for vector, theirs in zip(run('resample', range(L))[1], expected):
    np.testing.assert_allclose(vector, theirs, rtol=1e-6)


def test_projection_only_is_a_table_of_zeros_and_table_only_a_projection_of_zeros():
  def no_table(params):
    params['arm']['lookup']['table'] = jnp.zeros_like(params['arm']['lookup']['table'])
  def no_projection(params):
    params['arm']['project']['w'] = jnp.zeros_like(params['arm']['project']['w'])
  for kind, change in (('projection_only', no_table), ('table_only', no_projection)):
    np.testing.assert_allclose(run(kind, range(L))[0], run(None, (), edited(change))[0], atol=1e-4)


def test_an_open_gate_is_the_arm_whose_gate_is_1():
  np.testing.assert_allclose(run('gate=1', range(L))[0], run(None, (), cfg=CFG.replace(embedding='ungated'), params=edited(
      lambda params: [params[f'layer_{i}'].pop('ple_gate') for i in range(L)]))[0], atol=1e-4)


@pytest.mark.parametrize('fields, missing', [
    ({'embedding': 'table_only'}, ('projection_only', 'table_only')), ({'embedding': 'ungated'}, ('gate=1',)),
    ({'embedding': 'stem'}, ('projection_only', 'table_only', 'gate=1')), ({'ple_placement': 'folded'}, ('projection_only', 'table_only')),
    ({'embedding': 'none'}, intervention.KINDS[1:])], ids=str)
def test_a_model_has_the_kinds_that_it_has_the_parts_for(fields, missing):
  assert set(intervention.kinds(CFG.replace(**fields))) == set(intervention.KINDS) - set(missing)


def test_a_folded_table_is_resampled_like_any_other():
  cfg, params = ple_placement.place(CFG, PARAMS, placement='folded')
  np.testing.assert_allclose(run('resample', (0, 3), params, cfg)[0], run('resample', (0, 3))[0], atol=1e-4)


def test_what_a_model_has_not_is_one_clear_error():
  with pytest.raises(ValueError, match="'gate=1' is none of those that this model has: none, zero, mean"):
    intervention.assign(CFG.replace(embedding='ungated'), 'gate=1', (0,))
  with pytest.raises(ValueError, match=r'layer 0 has no per-layer vector; those that have: \[1, 3\]'):
    intervention.assign(CFG.replace(ple_every=2), 'zero', (0,))
  with pytest.raises(ValueError, match='model.scan: caches and interventions'):
    cfg = CFG.replace(scan=True)
    run('zero', (0,), transformer.stack(cfg, PARAMS), cfg)
