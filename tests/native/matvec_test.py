"""The native matvec against numpy in float64, and a model that decodes with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.model import transformer
from gemma4_jax.native import matvec
from gemma4_jax.sampling import generate
from gemma4_jax.sampling.sampler import GREEDY
from gemma4_jax.turboquant import weights
from tests import quick

needs_compiler = pytest.mark.skipif(matvec.why_not() is not None, reason=f'cannot be built here: {matvec.why_not()}')


@needs_compiler
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('shape', [(1, 1), (7, 15), (33, 16), (500, 130), (1001, 257), (64, 5000)], ids=str)
def test_rows_times_weights(shape, dtype):
  rng = np.random.RandomState(0)
  w = jnp.asarray(rng.uniform(-100, 100, shape), dtype)
  scale = jnp.asarray(rng.uniform(0.5, 2, shape[0]), jnp.float32)
  for rows in range(1, matvec.MAX_ROWS + 1):
    x = rng.standard_normal((rows, shape[1])).astype(np.float32)
    exact = x.astype(np.float64) @ np.asarray(w, np.float64).T
    bound = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(np.asarray(w, np.float64)).T) + 1e-6
    assert (np.abs(matvec.dot(x, w) - exact) <= bound).all()
    assert (np.abs(matvec.dot(x, w, scale) - exact * np.asarray(scale)) <= 2 * bound).all()


@needs_compiler
@pytest.mark.parametrize('format', quick.only(['turboquant2', 'turboquant4', 'int4'], [name for name in weights.FORMATS if name != 'int8']))
def test_rows_times_codes(format):
  rng = np.random.RandomState(0)
  for N, K in ((1, 8), (7, 24), (37, 704), (20, 1536)):      # groups of 8, of 64 that halves of a row cut, whole ones
    w = weights.encode(rng.standard_normal((N, K)).astype(np.float32), format)
    numbers = np.asarray(w._rotated(w.codes, w.scale), np.float64)
    for rows in (1, 2, 3, 8):
      x = rng.standard_normal((rows, K)).astype(np.float32)
      got = matvec.dot_codes(x, w.codes, w.scale, weights.levels(format))
      np.testing.assert_allclose(got, x.astype(np.float64) @ numbers.T, rtol=0, atol=2e-6 * K**0.5 * np.abs(numbers).max())


@needs_compiler
def test_calls_at_once_do_not_disturb_each_other():
  rng = np.random.RandomState(0)
  ws = [jnp.asarray(rng.standard_normal((700, 300)), jnp.float32) for _ in range(12)]
  x = rng.standard_normal((2, 300)).astype(np.float32)
  many = jax.jit(lambda x: [matvec.dot(x, w) for w in ws])
  for _ in range(20):
    for y, w in zip(many(x), ws):
      np.testing.assert_allclose(y, x @ np.asarray(w).T, rtol=0, atol=1e-4)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize('name', ['e2b', '26b-a4b'])
def test_a_model_decodes_the_same_tokens_with_it(name):
  cfg = config.shrink(config.VARIANTS[name], pattern='LG', width=32, mlp_dim=48)
  params = transformer.init(cfg, 0)
  prompts = [[5, 6, 7, 8, 9, 10, 11], [3]]
  native = generate.fastest(cfg)
  assert (cfg.matvec, native.matvec) == ('xla', 'native')
  one, two = (generate.generate(c, params, prompts, max_new_tokens=10, sampling=GREEDY, stop_ids=()) for c in (cfg, native))
  for a, b in zip(one, two):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize('compiler, named', [('no-such-compiler', 'no-such-compiler'), ('false', 'could not compile matvec.cc')])
def test_a_missing_compiler_is_named(compiler, named, monkeypatch, tmp_path):
  monkeypatch.setenv('CXX', compiler)
  monkeypatch.setenv('GEMMA4_JAX_CACHE', str(tmp_path))
  with pytest.raises(RuntimeError, match=named):
    matvec._build()
  assert not list((tmp_path / 'native').iterdir())


def test_without_a_compiler_models_run_through_xla(monkeypatch):
  monkeypatch.setattr(matvec, 'why_not', lambda: 'no C++ compiler')
  assert generate.fastest(config.E2B).matvec == 'xla'
