"""What the optimizer moves, how fast, and what it leaves alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from gemma4_jax import config as model_config
from gemma4_jax.model import transformer
from gemma4_jax.training import optimizer
from tests import quick

SMALL = model_config.E2B.replace(pattern='LG')   # of every kind of layer one


def _config(**fields):
  c = base.get_config('e2b-toy').optimizer
  c.update({'warmup_steps': 0, 'clip_norm': 0.0, 'learning_rate': 1e-2, 'embedding_learning_rate': 3e-2, **fields})
  return c


def _updates(cfg, gradient, **fields):
  params = transformer.init(cfg, 0)
  tx = optimizer.make(_config(**fields), steps=10)
  grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
  return params, quick.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])(params, grads)


def test_a_frozen_table_neither_moves_nor_decays_nor_has_adam_state():
  cfg = model_config.shrink(SMALL, embedding='frozen_table')
  params, updates = _updates(cfg, 1.0)
  assert not np.any(updates['arm']['frozen_lookup']['table'])
  assert np.all(np.asarray(updates['embedder']['table']))
  state = jax.eval_shape(optimizer.make(_config(), 10).init, params)
  paths = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim]
  assert any('lookup' not in path for path in paths) and not any('frozen_lookup' in path for path in paths)


@pytest.mark.parametrize('scan', [False, True])
def test_only_matrices_decay(scan):
  cfg = model_config.shrink(model_config.B26_A4.replace(pattern='LG'), periods=2, scan=scan)
  params, updates = _updates(cfg, 0.0, weight_decay=0.5)   # no gradient: only decay moves a weight
  decayed = {optimizer.label(path) for path, u in jax.tree_util.tree_leaves_with_path(updates) if np.any(np.asarray(u))}
  assert decayed == {'matrix'}
  place = 'group_0' if scan else 'layer_0'
  mlp, moved = (tree[place]['run_0'] if scan else tree[place] for tree in (params, updates))
  np.testing.assert_allclose(moved['mlp']['up']['w'], -1e-2 * 0.5 * mlp['mlp']['up']['w'], rtol=1e-5)


def test_tables_have_a_learning_rate_of_their_own():
  cfg = model_config.shrink(SMALL)
  _, updates = _updates(cfg, 1.0, weight_decay=0.0)
  np.testing.assert_allclose(updates['embedder']['table'], -3e-2, rtol=1e-5)
  np.testing.assert_allclose(updates['arm']['lookup']['table'], -3e-2, rtol=1e-5)
  np.testing.assert_allclose(updates['layer_0']['mlp']['up']['w'], -1e-2, rtol=1e-5)
  np.testing.assert_allclose(updates['final_norm']['scale'], -1e-2, rtol=1e-5)


def test_every_parameter_of_every_arm_is_labelled_as_meant():
  for arm in model_config.EMBEDDING_ARMS:
    params = transformer.abstract(model_config.shrink(SMALL, embedding=arm))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      names = [key.key for key in path if hasattr(key, 'key')]
      want = ('frozen' if 'frozen_lookup' in names else 'table' if names[-1] == 'table' else
              'vector' if leaf.ndim == 1 else 'matrix')
      assert optimizer.label([key for key in path if hasattr(key, 'key')]) == want, names


def test_schedules_rise_hold_and_fall_where_they_say():
  c = _config(warmup_steps=10, schedule='cosine', end_scale=0.1)
  rate = optimizer.schedule(c, 1.0, 100)
  assert 0 < float(rate(0)) < 0.2 and float(rate(10)) == 1.0
  np.testing.assert_allclose([rate(55), rate(100)], [0.55, 0.1], rtol=1e-5)
  c.schedule, c.decay_fraction = 'wsd', 0.2
  rate = optimizer.schedule(c, 1.0, 100)
  np.testing.assert_allclose([rate(10), rate(80), rate(90), rate(100)], [1.0, 1.0, 0.55, 0.1], rtol=1e-5)


@pytest.mark.parametrize('fields, name', [
    ({'schedule': 'cosin'}, 'optimizer.schedule'), ({'warmup_steps': 10}, 'optimizer.warmup_steps'),
    ({'learning_rate': 0.0}, 'optimizer.learning_rate'), ({'schedule': 'wsd', 'warmup_steps': 9}, 'optimizer.decay_fraction')])
def test_a_wrong_field_is_named(fields, name):
  with pytest.raises(ValueError, match=name):
    optimizer.make(_config(**fields), steps=10)


def test_gradients_over_the_norm_are_clipped_to_it_and_others_left_as_they_are():
  grads = {'a': {'w': np.full((3, 4), 2.0, np.float32)}, 'b': {'scale': np.full((9,), 4.0, np.float32)}}
  clipped, _ = optimizer._clip(1.0).update(grads, optimizer._clip(1.0).init(grads), grads)
  expected, _ = optax.clip_by_global_norm(1.0).update(grads, None)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), clipped, expected)
  left, _ = optimizer._clip(1e3).update(grads, optimizer._clip(1e3).init(grads), grads)
  jax.tree.map(np.testing.assert_array_equal, left, grads)
