"""Weights in few bits stand in for weights, in every place that reads one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.model import layers, quantized, transformer
from gemma4_jax.native import matvec
from gemma4_jax.sampling import generate
from gemma4_jax.turboquant import weights
from tests import quick

CFG = config.shrink(config.E2B, pattern='LG', num_layers=4, num_kv_shared_layers=2)
IDS = np.arange(1, 20, dtype=np.int32)[None]


def decoded(variables):
  """The parameters that quantized variables stand for."""
  whole = jax.tree.map(lambda w: w.decode() if isinstance(w, weights.Weight) else w, variables['quant'],
                       is_leaf=lambda w: isinstance(w, weights.Weight))
  merge = lambda a, b: {k: merge(a.get(k, {}), b.get(k, {})) if isinstance(a.get(k, b.get(k)), dict) else a.get(k, b.get(k))
                        for k in {*a, *b}}
  return merge(variables['params'], whole)


B12 = config.shrink(config.B12, pattern='LG', num_layers=2)
MOE = config.shrink(config.B26_A4, pattern='LG', num_layers=2, moe_implementation='scan')


@pytest.mark.parametrize('cfg, formats', [
    pytest.param(CFG, 'int8', id='e2b'), *(pytest.param(cfg, formats, id=id, marks=pytest.mark.slow) for cfg, formats, id in (
        (B12, 'turboquant4,embed=int4', '12b'), (CFG.replace(tied_embeddings=False), 'int4', 'untied'), (MOE, 'turboquant5', 'experts'),
        (MOE.replace(moe_implementation='gather'), 'nf4', 'gather')))])
def test_the_model_of_quantized_weights_is_that_of_the_weights_they_decode_to(cfg, formats):
  params = transformer.init(cfg, 0)
  variables = quantized.quantize(cfg, params, formats)
  model = transformer.Transformer(cfg)
  got = quick.jit(lambda v: model.apply(v, IDS)[0])(variables)
  wanted = quick.apply(model, decoded(variables), IDS)[0]
  np.testing.assert_allclose(got, wanted, atol=5e-4)
  assert np.abs(wanted - quick.apply(model, params, IDS)[0]).max() > 1e-2   # they are other weights


@pytest.mark.slow
def test_more_bits_are_nearer_to_the_model_itself():
  cfg = B12.replace(width=128, vocab_size=512)
  params, model = transformer.init(cfg, 0), transformer.Transformer(cfg)
  exact = jax.nn.log_softmax(quick.apply(model, params, IDS)[0])
  variables = lambda bits: quantized.quantize(cfg, params, f'turboquant{bits},embed=as_is')
  run = lambda bits: jax.nn.log_softmax(quick.apply(model, decoded(variables(bits)), IDS)[0])
  kl = [float((jnp.exp(exact) * (exact - run(bits))).sum(-1).mean()) for bits in (2, 4, 8)]
  assert kl[0] > 3 * kl[1] > 3 * 50 * kl[2] > 0


def test_a_row_of_int8_is_off_by_half_a_step_at_most_and_zeros_stay_zero():
  w = np.random.default_rng(0).normal(size=(6, 3, 32)).astype(np.float32) * np.logspace(-6, 6, 6, dtype=np.float32)[:, None, None]
  w[2] = 0
  q = weights.encode(jnp.asarray(w), 'int8', inputs=2)
  assert q.codes.shape == (6, 96) and q.codes.dtype == jnp.int8 and q.nbytes == 6 * 96 + 6 * 4
  step = np.abs(w).max((1, 2), keepdims=True) / 127
  assert (np.abs(np.asarray(q.decode()) - w) <= step * (0.5 + 1e-3)).all() and not np.asarray(q.decode())[2].any()
  np.testing.assert_array_equal(q.take(jnp.array([4, 0]), jnp.float32), np.asarray(q.decode())[[4, 0]])


def test_large_weights_are_encoded_in_parts_that_join(monkeypatch):
  w = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32))
  whole = weights.encode(w, 'int8')
  monkeypatch.setattr(weights, '_ROWS_BYTES', 2 * 4 * 5)
  jax.tree.map(np.testing.assert_array_equal, weights.encode(w, 'int8'), whole)


def test_every_matrix_is_quantized_and_nothing_else():
  params = transformer.init(CFG, 0)
  variables = quantized.quantize(CFG, params, 'int8')
  found = quantized.nbytes(variables)
  before = quantized.nbytes(params)
  for name in set(quantized.GROUPS) - {'experts'}:
    assert found[name] < 0.35 * before[name]   # a scale beside the codes
  assert found['other'] == before['other']
  names = {jax.tree_util.keystr(path[-1:]) for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']) if leaf.ndim > 1}
  assert names == {"['table']"}    # that of PLE, which `ple_placement` stores
  assert variables['params']['arm']['lookup']['table'] is params['arm']['lookup']['table']


@pytest.mark.slow
def test_routers_and_norms_of_a_mixture_stay():
  variables = quantized.quantize(MOE, transformer.init(MOE, 0), 'turboquant3')
  assert set(variables['params']['layer_0']['moe']) == {'router', 'router_scale', 'per_expert_scale'}
  assert set(variables['quant']['layer_0']['moe']) == {'up', 'gate', 'down'}
  assert quantized.described(variables) == 'turboquant3, embed int8'
  assert quantized.slow(MOE, variables) == 'turboquant3' and quantized.slow(MOE.replace(matvec='native'), variables) == ''
  with pytest.raises(ValueError, match="'ragged' would decode all experts"):
    transformer.Transformer(MOE.replace(moe_implementation='ragged')).apply(variables, IDS)


def test_a_plan_is_a_format_for_all_and_exceptions():
  assert quantized.plan('turboquant4') == dict.fromkeys(('attention', 'mlp', 'experts', 'ple'), 'turboquant4') | {'embed': 'int8'}
  assert quantized.plan('nf4,mlp=as_is,embed=int4') == dict(attention='nf4', experts='nf4', ple='nf4', embed='int4')
  assert quantized.plan('mlp=int8') == {'mlp': 'int8'} and quantized.plan('as_is') == {}


def test_groups_that_are_not_named_stay_and_consuming_leaves_none_behind():
  params = transformer.init(CFG, 0)
  kept = params['layer_0']['attention']['q']['w']
  variables = quantized.quantize(CFG, params, {'mlp': 'int8'}, consume=True)
  assert variables['params']['layer_0']['attention']['q']['w'] is kept
  assert set(variables['quant']['layer_0']) == {'mlp'} and 'mlp' not in variables['params']['layer_0']
  assert not jax.tree.leaves(params)


@pytest.mark.skipif(matvec.why_not() is not None, reason=f'no native matvec here: {matvec.why_not()}')
@pytest.mark.slow
def test_decoding_reads_the_codes_themselves():
  variables = quantized.quantize(CFG, transformer.init(CFG, 0), 'int8')
  both = [generate.generate(cfg, variables, [[5, 6, 7]], max_new_tokens=8, stop_ids=())[0] for cfg in (CFG, CFG.replace(matvec='native'))]
  np.testing.assert_array_equal(both[0].tokens, both[1].tokens)
  np.testing.assert_allclose(both[0].logprobs, both[1].logprobs, atol=1e-4)


@pytest.mark.parametrize('formats, message', [
    ('int7', "weights: 'int7' is none of as_is, int8"), ({'attn': 'int8'}, "'attn' is none of attention, .* did you mean 'attention'"),
    ('mlp=turboquant7', "weights: 'turboquant7' is none of"), ('int8,ple=nf4', 'this model has no weights of ple'),
    ('mlp=int8,mlp=int4', "'mlp' is named twice"), ('int8,', "'' is none of")])
def test_what_cannot_be_quantized_is_one_clear_error(formats, message):
  cfg = B12
  with pytest.raises(ValueError, match=message):
    quantized.quantize(cfg, transformer.init(cfg, 0), formats)


def test_stacked_weights_and_those_of_another_shape_are_refused():
  cfg = CFG.replace(scan=True)
  with pytest.raises(ValueError, match='one by one'):
    quantized.quantize(cfg, transformer.init(cfg, 0), 'int8')
  variables = quantized.quantize(CFG, transformer.init(CFG, 0), 'int8')
  with pytest.raises(ValueError, match=r'up.w: quantized weights of shape \(96, 64\); this model has \(32, 64\)'):
    transformer.Transformer(CFG.replace(mlp_dim=32)).apply(variables, IDS)


def test_rows_of_a_bfloat16_table_are_read_without_a_copy_of_it():
  table = jnp.asarray(np.random.default_rng(0).normal(size=(64, 5)), jnp.bfloat16)
  ids = jnp.array([[3, 63], [0, 3]])
  np.testing.assert_array_equal(jax.jit(layers.take)(table, ids), np.asarray(table)[np.asarray(ids)])
  total = lambda table: jnp.sum(layers.take(table, ids).astype(jnp.float32) * 2)
  np.testing.assert_array_equal(jax.jit(jax.grad(total))(table)[jnp.array([0, 1, 3, 63])].astype(jnp.float32)[:, 0], [2, 0, 4, 2])

  def loop(table):
    step = lambda i, sum_: sum_ + layers.take(table, jnp.array([i])).astype(jnp.float32)[0]
    return jax.lax.fori_loop(0, jnp.argmax(table[0]) + 3, step, jnp.zeros(5))
  big = jax.ShapeDtypeStruct((2**16, 5), jnp.bfloat16)
  assert jax.jit(loop).lower(big).compile().memory_analysis().temp_size_in_bytes < big.size
