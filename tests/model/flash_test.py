"""Attention by kernels of others is ours: its outputs and gradients, in a model, and with caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config, hardware
from gemma4_jax.model import attention, flash, kv_cache, transformer
from tests import quick

INTERPRETED = 'splash_interpret'
DENSE = config.shrink(config.E2B, pattern='LG', num_layers=4, num_kv_shared_layers=2, window=24, attention_implementation='xla')
K_EQ_V = config.shrink(config.B31, pattern='LG', num_layers=2, window=24, attention_implementation='xla')


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(('queries', 'window'), quick.only([(150, 24), (300, None)], [(150, 24), (300, None), (150, None), (300, 130)]))
def test_outputs_and_gradients_are_those_of_plain_attention(queries, window):
  T, S = queries, 300
  q, k, v, weight = normal(0, 2, T, 4, 32), normal(1, 2, 2, S, 32), normal(2, 2, 2, S, 32), normal(3, 2, T, 4, 32)
  seg = np.ones((2, S), np.int32)
  seg[0, 200:], seg[1, 290:] = 2, 0     # a second document, and padding
  pos = np.tile(np.arange(S), (2, 1)) - np.where(seg == 2, 200, 0)
  stream = attention.Stream(jnp.asarray(pos[:, S - T:]), jnp.asarray(seg[:, S - T:]), {})
  told = (stream.seg_BT > 0)[..., None, None]

  def plain(q, k, v):
    return told * attention.attend(q, k, v, attention.see(stream, jnp.asarray(pos), jnp.asarray(seg), window), 0.5)

  def ours(q, k, v):
    return told * flash.attend(q, k, v, stream.seg_BT, jnp.asarray(seg), window, 0.5, INTERPRETED)

  both = [quick.jit(lambda *x, f=f: jax.vjp(f, *x)[1](weight) + (f(*x),))(q, k, v) for f in (plain, ours)]
  for expected, found in zip(*both):
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def logits(cfg, params, ids, pos, seg):
  return transformer.Transformer(cfg).apply({'params': params}, ids, pos, seg)[0]


def in_chunks(cfg, params, ids, size):
  cache, found = kv_cache.make(cfg, len(ids), ids.shape[1] + 8), []
  for start in range(0, ids.shape[1], size):
    part = ids[:, start:start + size]
    new, out = transformer.Transformer(cfg).apply({'params': params}, part, None, jnp.ones_like(part), cache=cache)
    cache = out['cache']
    found.append(new)
  last, _ = transformer.Transformer(cfg).apply({'params': params}, part, None, jnp.ones_like(part).at[0, 7:].set(0), cache=kv_cache.make(
      cfg, len(ids), 300), last_only=True)
  return jnp.concatenate(found, axis=1), last


@pytest.mark.parametrize('cfg', [DENSE, K_EQ_V], ids=['dense', 'k_eq_v'])
@pytest.mark.slow
def test_a_model_says_the_same_with_it_whole_and_in_chunks_that_fill_a_cache(cfg):
  params = transformer.init(cfg, 0)
  ids = jax.random.randint(jax.random.key(1), (2, 256), 1, cfg.vocab_size)
  seg = jnp.ones_like(ids).at[0, 100:].set(2).at[1, 250:].set(0)
  pos = jnp.arange(256)[None] - jnp.where(seg == 2, 100, 0)
  kernel = cfg.replace(attention_implementation=INTERPRETED)
  expected, found = (np.asarray(quick.jit(logits, static_argnums=0)(one, params, ids, pos, seg)) for one in (cfg, kernel))
  np.testing.assert_allclose(found[np.asarray(seg) > 0], expected[np.asarray(seg) > 0], atol=2e-4)
  for expected, found in zip(*(quick.jit(in_chunks, static_argnums=(0, 3))(one, params, ids, 128) for one in (cfg, kernel))):
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_what_runs_is_what_the_device_has_and_what_it_has_not_is_refused(monkeypatch):
  assert flash.choose('auto') == 'xla' and not flash.runs('auto', 4096)
  with pytest.raises(ValueError, match="attention_implementation: 'splash' needs a TPU, and this is a CPU: take 'auto' or 'xla'"):
    flash.choose('splash')
  monkeypatch.setattr(hardware, 'platform', lambda: 'tpu')
  assert flash.choose('auto') == 'splash' and flash.choose('xla') == 'xla'
  assert flash.runs('auto', flash.LEAST) and not flash.runs('auto', flash.LEAST - 1)
