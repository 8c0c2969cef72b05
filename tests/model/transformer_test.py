"""One model, several ways to run it: plain, rematerialised, scanned; and what a token may depend on."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.model import transformer
from tests import quick

SEEN = np.ones((2, 14), np.int32)
IDS = np.random.RandomState(0).randint(1, 128, (2, 14)).astype(np.int32)
POS = np.tile(np.arange(14, dtype=np.int32), (2, 1))
# Two periods of owners of K/V and two of borrowers, so that both are scanned; of three layers, which compile in half the time.
SHRUNK = {name: config.shrink(variant, periods=2 if variant.num_kv_shared_layers else 1, width=32, mlp_dim=48, pattern='LLG')
          for name, variant in config.VARIANTS.items() if name != '31b'}   # shrunk, it is 12B


@functools.cache
def weights(name):
  """Not as initialised: norms and scalars away from one, so that one that is applied twice or not at all shows."""
  return jax.tree.map(lambda w: w * np.random.RandomState(1).uniform(0.7, 1.3, w.shape).astype(np.float32),
                      transformer.init(SHRUNK[name], 0))


@functools.cache
def run(name, scan=False, remat='none'):
  cfg = SHRUNK[name].replace(scan=scan, remat=remat)
  params = transformer.stack(cfg, weights(name)) if scan else weights(name)
  logits, _, grads = quick.loss_and_grads(cfg, params, IDS, SEEN, POS)
  return np.asarray(logits), transformer.unstack(cfg, grads) if scan else grads


@pytest.mark.parametrize('name, fields', quick.only(
    [],
    [*(('e2b', {'scan': scan, 'remat': remat}) for scan in (False, True) for remat in ('none', 'dots', 'full') if scan or remat != 'none'),
     *((name, fields) for name in ('e4b', '12b', '26b-a4b') for fields in ({'remat': 'full'}, {'scan': True}))]), ids=str)
def test_every_way_to_run_a_variant_gives_its_logits_and_gradients(name, fields):
  logits, grads = run(name, **fields)
  plain_logits, plain_grads = run(name)
  np.testing.assert_allclose(logits, plain_logits, rtol=0, atol=5e-4)
  ours, plain = by_kind(grads), by_kind(plain_grads)
  assert ours.keys() == plain.keys()
  for kind in ours:
    assert np.linalg.norm(ours[kind] - plain[kind]) <= 1e-3 * np.linalg.norm(plain[kind]), kind


def by_kind(grads):
  """The same weight of all layers as one array: a single layer's scalar is a sum that cancels almost to nothing."""
  kinds = collections.defaultdict(list)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    kinds[re.sub(r'layer_\d+', 'layer', jax.tree_util.keystr(path))].append(np.ravel(leaf))
  return {kind: np.concatenate(leaves) for kind, leaves in kinds.items()}


@pytest.mark.parametrize('fields', [{}, {'scan': True}], ids=str)
def test_rematerialised_programs_keep_less_for_the_backward_pass(fields):
  def residuals(remat):
    cfg = SHRUNK['12b'].replace(remat=remat, **fields)
    params = transformer.stack(cfg, weights('12b')) if cfg.scan else weights('12b')
    _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: transformer.Transformer(cfg).apply({'params': p}, IDS)[0], p), params)
    return sum(leaf.size for leaf in jax.tree.leaves(pullback))
  assert residuals('full') < residuals('dots') < residuals('none')


@pytest.mark.parametrize('name', quick.only(['e2b'], ['e2b', '12b', '26b-a4b']))
def test_a_token_depends_on_itself_and_all_before_it_and_on_nothing_after(name):
  cfg = config.shrink(config.VARIANTS[name], embedding='none', tied_embeddings=False)
  ids, seen = np.arange(1, 15, dtype=np.int32)[None], 9   # every token has a row of its own in the table
  loss = lambda params: transformer.Transformer(cfg).apply({'params': params}, ids)[0][0, seen, 0]
  grad = np.abs(quick.jit(jax.grad(loss))(transformer.init(cfg, 0))['embedder']['table'][ids[0]]).max(-1)
  assert (grad[:seen + 1] > 0).all() and (grad[seen + 1:] == 0).all()


@pytest.mark.parametrize('name', quick.only(['e2b'], list(SHRUNK)))
def test_packed_documents_are_as_if_alone(name):
  cfg = SHRUNK[name]
  model, params = transformer.Transformer(cfg), weights(name)
  cut = 8
  seg = np.where(np.arange(14) < cut, 1, 2).astype(np.int32)[None]
  pos = np.where(np.arange(14) < cut, np.arange(14), np.arange(14) - cut).astype(np.int32)[None]
  packed, _ = quick.apply(model, params, IDS[:1], pos, seg)
  for part in (slice(0, cut), slice(cut, 14)):
    alone, _ = quick.apply(model, params, IDS[:1, part])
    np.testing.assert_allclose(packed[:, part], alone, rtol=0, atol=1e-4)
  merged, _ = quick.apply(model, params, IDS[:1], pos, np.ones_like(seg))
  assert np.abs(merged[:, cut:] - packed[:, cut:]).max() > 1e-2


def test_padding_leaves_no_trace():
  cfg = SHRUNK['26b-a4b']
  model, params = transformer.Transformer(cfg), weights('26b-a4b')
  seg = np.array([[0] * 3 + [1] * 11], np.int32)
  pos = np.maximum(np.arange(14) - 3, 0).astype(np.int32)[None]
  padded, _ = quick.apply(model, params, IDS[:1], pos, seg)
  other, _ = quick.apply(model, params, np.where(seg > 0, IDS[:1], 77).astype(np.int32), pos, seg)
  alone, _ = quick.apply(model, params, IDS[:1, 3:])
  np.testing.assert_array_equal(padded[:, 3:], other[:, 3:])
  np.testing.assert_allclose(padded[:, 3:], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', config.VARIANTS)
def test_released_sizes_run_in_shapes(name):
  cfg = config.VARIANTS[name]
  shapes = jax.eval_shape(lambda: transformer.Transformer(cfg).apply(
      {'params': jax.tree.map(lambda box: jnp.zeros(box.value.shape, box.value.dtype), transformer.abstract(cfg),
                              is_leaf=lambda x: hasattr(x, 'names'))}, jnp.zeros((1, 9), jnp.int32)))
  assert shapes[0].shape == (1, 9, 262_144) and shapes[0].dtype == jnp.float32
