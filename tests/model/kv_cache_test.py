"""What is cached equals what is recomputed, for every kind of layer, however the tokens arrive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config, size
from gemma4_jax.model import attention, kv_cache, transformer
from tests import quick

VARIANTS = {name: config.shrink(variant, width=32, mlp_dim=48) for name, variant in config.VARIANTS.items() if name != '31b'}
LENGTHS = np.array([19, 11])   # several windows of 4, ragged
T = LENGTHS.max()
IDS = np.random.RandomState(0).randint(1, 128, (2, T)).astype(np.int32)


@functools.cache
def weights(name):
  return jax.tree.map(lambda w: w * np.random.RandomState(1).uniform(0.7, 1.3, w.shape).astype(np.float32),
                      transformer.init(VARIANTS[name], 0))


@functools.cache
def uncached(name):
  return np.asarray(quick.apply(transformer.Transformer(VARIANTS[name]), weights(name), IDS)[0])


@functools.partial(quick.jit, static_argnums=(0, 5))
def extend(cfg, params, cache, ids, seg, last_only=False):
  logits, out = transformer.Transformer(cfg).apply({'params': params}, ids, None, seg, cache=cache, last_only=last_only)
  return logits, out['cache']


def feed(name, cuts, unified=True):
  """Logits [2, T, V] of the rows of IDS, fed in chunks that end at `cuts`; NaN where a row has ended."""
  cfg, params = VARIANTS[name], weights(name)
  cache = kv_cache.make(cfg, 2, int(T), unified=unified)
  found = np.full((2, T, cfg.vocab_size), np.nan, np.float32)
  for start, stop in zip([0, *cuts], [*cuts, T]):
    seg = (np.arange(start, stop) < LENGTHS[:, None]).astype(np.int32)
    logits, cache = extend(cfg, params, cache, np.where(seg > 0, IDS[:, start:stop], 77), seg)
    found[:, start:stop] = np.where(seg[:, :, None] > 0, logits, np.nan)
  np.testing.assert_array_equal(cache.length_B, LENGTHS)
  return found


@pytest.mark.parametrize('cuts', [[8, *range(9, T)], [3, 6, 9, 12, 15, 18], [9], []],
                         ids=['prefill_and_decode', 'chunks_of_3', 'chunks_of_9', 'at_once'])
@pytest.mark.parametrize('name', quick.only(['e2b'], list(VARIANTS)))
def test_tokens_in_any_chunks_give_the_logits_of_one_forward_pass(name, cuts):
  found = feed(name, cuts)
  real = np.arange(T) < LENGTHS[:, None]
  np.testing.assert_allclose(found[real], uncached(name)[real], rtol=0, atol=5e-4)


@functools.partial(quick.jit, static_argnums=(0, 1))
def call(cfg, spec, params, x_BTD, pos_BT, seg_BT, kv=None):
  stream = attention.Stream.make(cfg, pos_BT, seg_BT)
  out, kv = attention.Attention(cfg, spec).apply({'params': params}, x_BTD, stream, kv)
  return out, getattr(kv, 'cache', None)


@pytest.mark.parametrize('local', [True, False], ids=['local', 'global'])
@pytest.mark.parametrize('name', ['e2b', '12b'])
def test_a_layers_attention_over_a_cache_is_that_over_all_tokens_at_once(name, local):
  cfg = VARIANTS[name]
  i, spec = next((i, spec) for i, spec in enumerate(cfg.layers) if (spec.window is not None) == local)
  params, x_BTD = weights(name)[f'layer_{i}']['attention'], np.random.RandomState(2).standard_normal((2, T, cfg.width)).astype(np.float32)
  real_BT = np.arange(T) < LENGTHS[:, None]
  pos_BT = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  whole, _ = call(cfg, spec, params, x_BTD, pos_BT, real_BT.astype(np.int32))
  held, found = kv_cache.make(cfg, 2, int(T)).layers[i], []
  for start, stop in ((0, 8), (8, 9), (9, 10), (10, T)):
    pos = np.minimum(LENGTHS[:, None], start) + np.arange(stop - start)
    out, held = call(cfg, spec, params, x_BTD[:, start:stop], pos.astype(np.int32), real_BT[:, start:stop].astype(np.int32), held)
    found.append(out)
  error = np.abs(np.concatenate(found, axis=1) - whole)[real_BT].max() / np.abs(whole[real_BT]).max()
  assert error <= 1e-5


def test_unified_caches_give_what_separate_ones_give():
  one, two = feed('12b', [8]), feed('12b', [8], unified=False)
  np.testing.assert_allclose(one, two, rtol=0, atol=2e-4)
  kinds = lambda unified: {type(layer).__name__ for layer in kv_cache.make(VARIANTS['12b'], 2, 19, unified=unified).layers.values()}
  assert (kinds(True), kinds(False)) == ({'Ring', 'Unified'}, {'Ring', 'Dense'})


def test_a_unified_cache_of_keys_that_rope_does_not_turn_is_the_values_alone(monkeypatch):
  monkeypatch.setitem(VARIANTS, 'unturned', VARIANTS['12b'].replace(global_rope_fraction=0.0))
  one, two = feed('unturned', [8]), feed('unturned', [8], unified=False)
  np.testing.assert_allclose(one, two, rtol=0, atol=2e-4)


@pytest.mark.parametrize('name', quick.only(['e2b'], list(VARIANTS)))
def test_the_last_token_alone_gives_its_logits(name):
  cfg, params = VARIANTS[name], weights(name)
  seg = (np.arange(T) < LENGTHS[:, None]).astype(np.int32)
  logits, cache = extend(cfg, params, kv_cache.make(cfg, 2, T + 1), IDS, seg, True)
  np.testing.assert_allclose(logits[:, 0], uncached(name)[[0, 1], LENGTHS - 1], rtol=0, atol=5e-4)
  np.testing.assert_array_equal(cache.last_B, IDS[[0, 1], LENGTHS - 1])
  step = np.array([[5], [6]], np.int32)   # and leaves a cache to go on with
  after, _ = extend(cfg, params, cache, step, np.ones((2, 1), np.int32))
  for row in range(2):
    whole = np.concatenate([IDS[row, :LENGTHS[row]], step[row]])[None]
    again, _ = quick.apply(transformer.Transformer(cfg), params, whole)
    np.testing.assert_allclose(after[row, 0], again[0, -1], rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize('embedding', ['bigram', 'value', 'stem'])
def test_other_arms_are_cached_too(embedding):
  cfg = config.shrink(config.E2B, width=32, mlp_dim=48, embedding=embedding, pattern='LG')
  params = transformer.init(cfg, 0)
  whole, _ = quick.apply(transformer.Transformer(cfg), params, IDS[:1])
  cache, found = kv_cache.make(cfg, 1, T), []
  for start, stop in ((0, 8), (8, 9), (9, T)):
    logits, cache = extend(cfg, params, cache, IDS[:1, start:stop], np.ones((1, stop - start), np.int32))
    found.append(logits)
  np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=0, atol=5e-4)


def test_layers_that_borrow_have_no_cache_and_are_handed_nothing_to_write_to():
  cfg = VARIANTS['e2b']
  cache = kv_cache.make(cfg, 2, 64)
  assert set(cache.layers) == {i for i, spec in enumerate(cfg.layers) if spec.kv_from is None}
  for view in (kv_cache._Slots, kv_cache.RingAndFresh):
    assert not hasattr(view, 'append')


@pytest.mark.parametrize('fields', quick.only(
    [{'qk_norm': False}], [{'qk_norm': False, 'v_norm': False}, {'qk_norm': False}, {'v_norm': False}]), ids=str)
def test_keys_are_rebuilt_from_values_only_where_that_is_exact(fields):
  cfg = VARIANTS['12b'].replace(**fields)
  kinds = {type(layer).__name__ for layer in kv_cache.make(cfg, 1, T).layers.values()}
  assert kinds == ({'Ring', 'Unified'} if len(fields) == 2 else {'Ring', 'Dense'})
  params = transformer.init(cfg, 0)
  whole, _ = quick.apply(transformer.Transformer(cfg), params, IDS[:1])
  cached, _ = extend(cfg, params, kv_cache.make(cfg, 1, T), IDS[:1], np.ones((1, T), np.int32))
  np.testing.assert_allclose(cached, whole, rtol=0, atol=5e-4)


@pytest.mark.parametrize('unified', [False, True])
@pytest.mark.parametrize('context', [3, 19])
@pytest.mark.parametrize('name', VARIANTS)
def test_bytes_are_those_that_size_counts(name, context, unified):
  cache = kv_cache.make(VARIANTS[name], 3, context, jnp.bfloat16, unified=unified)
  assert cache.nbytes == 3 * size.kv_bytes(VARIANTS[name], context, 'exact' if unified else 'separate')


def test_31b_holds_32k_tokens_in_2_6_gigabytes():
  cache = jax.eval_shape(lambda: kv_cache.make(config.B31, 1, 32_768, jnp.bfloat16))
  assert cache.nbytes == size.kv_bytes(config.B31, 32_768) <= 2.6e9
  everything = 2 * 2 * 32_768 * sum(spec.num_kv_heads * spec.head_dim for spec in config.B31.layers)
  assert everything == pytest.approx(29.5e9, rel=0.01)
