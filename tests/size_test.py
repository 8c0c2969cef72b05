"""`size` against what the model declares, what its jaxpr multiplies, and the published tables."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config, size
from gemma4_jax.model import layers, transformer

# a period of two layers: fewer to trace, and still every kind of layer
SHRUNK = {name: config.shrink(cfg.replace(pattern='LG'), moe_implementation='ragged') for name, cfg in config.VARIANTS.items()}
DENSE, MOE = SHRUNK['e2b'], SHRUNK['26b-a4b']
ABLATIONS = {
    'untied': DENSE.replace(tied_embeddings=False),
    'no post norms': DENSE.replace(post_norms=False),
    'no post norms in MoE': MOE.replace(post_norms=False),
    'no qk norm': DENSE.replace(qk_norm=False),
    'no layer scalar': DENSE.replace(layer_scalar=False),
    'ungated MLP': DENSE.replace(gated_mlp=False),
    'MoE without dense branch': MOE.replace(moe_dense_branch=False),
    'MoE without dense branch and post norms': MOE.replace(moe_dense_branch=False, post_norms=False),
    'MoE without router norm': MOE.replace(router_norm=False),
    'MoE without per-expert scale': MOE.replace(per_expert_scale=False),
    'PLE every third layer': DENSE.replace(ple_every=3),
    'PLE in listed layers': DENSE.replace(ple_layers=(0, 3)),
    'PLE without post norms': DENSE.replace(post_norms=False, embedding='ungated'),
    'STEM in listed layers': DENSE.replace(embedding='stem', ple_layers=(0, 3)),
    'STEM beside experts': MOE.replace(embedding='stem'),
    'value every second layer': DENSE.replace(embedding='value', ple_every=2),
    'bigram of few buckets': DENSE.replace(embedding='bigram', bigram_buckets=37),
    'untied with value embeddings and K=V': SHRUNK['12b'].replace(tied_embeddings=False, embedding='value'),
}
ARMS = {f'{name} {arm}': cfg.replace(embedding=arm) for name, cfg in SHRUNK.items()
        for arm in (config.EMBEDDING_ARMS if cfg is DENSE else ('none', 'ple', 'value'))}
CASES = ARMS | ABLATIONS


_abstract = functools.cache(transformer.abstract)


def _declared(cfg):
  """Part -> numbers of weights in the model's own tree."""
  n = collections.Counter()
  for path, leaf in jax.tree_util.tree_flatten_with_path(_abstract(cfg))[0]:
    n[_part([key.key for key in path if hasattr(key, 'key')])] += math.prod(leaf.shape)
  return dict(n)


def _part(names):
  top, *rest = names
  if top in ('embedder', 'unembedder'):
    return {'embedder': 'embedding', 'unembedder': 'unembedding'}[top]
  if top == 'arm':
    return 'arm_table' if rest[-1] == 'table' else 'arm'
  if top == 'final_norm':
    return 'norms'
  if 'ple' in rest[0] or rest[-1] == 'value_mix':
    return 'arm'
  if rest[0] == 'moe':
    return 'experts' if rest[-1] in ('up', 'gate', 'down') else 'router'
  return {'attention': 'attention', 'mlp': 'mlp', 'scalar': 'scalars'}.get(rest[0], 'norms')


@pytest.mark.parametrize('cfg', CASES.values(), ids=CASES)
def test_every_part_has_as_many_parameters_as_the_model_declares(cfg):
  assert {part: n for part, n in size.parameters(cfg).items() if n} == _declared(cfg)


@pytest.mark.parametrize('name', config.VARIANTS)
def test_at_full_size_every_part_has_as_many_parameters_as_the_model_declares(name):
  cfg = config.VARIANTS[name]
  assert {part: n for part, n in size.parameters(cfg).items() if n} == _declared(cfg)


@pytest.mark.parametrize('name, decoder, active', [
    ('e2b', 4_628_569_344, 4_628_569_344), ('e4b', 7_463_013_376, 7_463_013_376), ('12b', 11_907_350_272, 11_907_350_272),
    ('26b-a4b', 25_233_141_760, 3_822_530_560), ('31b', 30_697_345_280, 30_697_345_280)])
def test_totals_of_the_released_decoders_are_the_published_ones(name, decoder, active):
  cfg = config.VARIANTS[name]   # published counts leave the layer scalars out
  assert (size.total(cfg) - cfg.num_layers, size.active(cfg) - cfg.num_layers) == (decoder, active)


def test_what_a_token_looks_up_is_neither_in_non_embedding_parameters_nor_resident():
  published = 2_279_759_104 + 35   # E2B without its PLE table, and its layer scalars
  assert size.resident_bytes(config.E2B) == 2 * published
  assert size.non_embedding(config.E2B) == published - 262_144 * 1536


def test_an_untied_input_embedding_is_not_resident_but_its_head_is():
  tied, untied = DENSE, DENSE.replace(tied_embeddings=False)
  assert size.total(untied) == size.total(tied) + tied.vocab_size * tied.width
  assert size.resident_bytes(untied) == size.resident_bytes(tied)
  assert size.non_embedding(untied) == size.non_embedding(tied) + tied.vocab_size * tied.width


# FLOPs

def _dots(jaxpr):
  """Yields (eqn, FLOPs) of every matmul of a jaxpr without loops, inner ones included."""
  for eqn in jaxpr.eqns:
    inner = [p for p in eqn.params.values() if hasattr(p, 'jaxpr') or hasattr(p, 'eqns')]
    assert not (inner and eqn.primitive.name in ('scan', 'while', 'cond')), 'loops would need their trip count'
    for p in inner:
      yield from _dots(getattr(p, 'jaxpr', p))
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      yield eqn, 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    elif eqn.primitive.name.startswith('ragged_dot'):   # every row meets one group's matrix
      yield eqn, 2 * eqn.invars[0].aval.shape[-1] * math.prod(eqn.outvars[0].aval.shape)


def _traced(cfg, B, T):
  """(FLOPs of matmuls with weights, FLOPs of attention) of a forward pass. Only attention multiplies batch by batch."""
  shapes = jax.tree.map(lambda p: p.value, _abstract(cfg), is_leaf=lambda x: isinstance(x, layers.Param))
  run = lambda params, ids: transformer.Transformer(cfg).apply({'params': params}, ids)[0]
  found = list(_dots(jax.make_jaxpr(run)(shapes, jax.ShapeDtypeStruct((B, T), jnp.int32)).jaxpr))
  batched = lambda eqn: eqn.primitive.name == 'dot_general' and bool(eqn.params['dimension_numbers'][1][0])
  return sum(n for eqn, n in found if not batched(eqn)), sum(n for eqn, n in found if batched(eqn))


def _attention(cfg, T):
  return sum(4 * cfg.num_heads * spec.head_dim * size.mean_keys(spec.window, T) for spec in cfg.layers)


@pytest.mark.parametrize('cfg', CASES.values(), ids=CASES)
def test_flops_of_matmuls_with_weights_are_those_of_the_jaxpr(cfg):
  B, T = 2, 7   # past the window
  weights, _ = _traced(cfg, B, T)
  assert size.forward_flops(cfg, T) - _attention(cfg, T) == pytest.approx(weights / (B * T), rel=1e-12)


@pytest.mark.parametrize('name', SHRUNK)
def test_attention_flops_are_the_share_of_the_jaxprs_that_the_causal_mask_lets_through(name):
  cfg, B, T = SHRUNK[name].replace(window=16), 2, 8   # within the window all layers score T x T
  _, attention = _traced(cfg, B, T)
  assert _attention(cfg, T) == pytest.approx(attention / (B * T) * (T + 1) / (2 * T), rel=1e-12)


@pytest.mark.parametrize('window, context', [(None, 7), (4, 3), (4, 4), (4, 11), (1, 5)])
def test_mean_keys_are_the_mean_row_of_the_mask(window, context):
  ahead = np.arange(context)[:, None] - np.arange(context)
  seen = (ahead >= 0) & (ahead < (window or context))
  assert size.mean_keys(window, context) == pytest.approx(seen.sum() / context)


def test_a_prompt_costs_its_tokens_but_for_layers_that_borrow_and_the_head_which_run_once():
  for cfg in config.VARIANTS.values():
    assert size.prefill_flops(cfg, 1) == size.forward_flops(cfg, 1)
  head = 2 * config.B31.vocab_size * config.B31.width
  assert size.prefill_flops(config.B31, 99) == pytest.approx(99 * size.forward_flops(config.B31, 99) - 98 * head)
  e2b, alone = config.E2B, config.E2B.replace(num_layers=15, num_kv_shared_layers=0)     # its layers that make K/V
  borrowers = size.forward_flops(e2b, 1) - size.forward_flops(alone, 1)
  more = size.prefill_flops(e2b, 500) - size.prefill_flops(alone, 500)
  assert borrowers < more < 1.1 * borrowers      # the last token sees 500


def test_training_takes_three_times_the_flops_of_the_forward_pass():
  assert size.training_flops(DENSE, 32) == 3 * size.forward_flops(DENSE, 32)


def test_look_ups_are_free_and_projections_are_not():
  flops = {arm: size.forward_flops(DENSE.replace(embedding=arm), 32) for arm in config.EMBEDDING_ARMS}
  assert flops['bigram'] == flops['value'] == flops['none']
  assert flops['stem'] < flops['none'] < flops['ungated'] < flops['ple']
  assert flops['table_only'] < flops['shared_table'] == flops['frozen_table'] == flops['projection_only'] == flops['ple']


# K/V

@pytest.mark.parametrize('name, growing, ring, unified', [
    ('e2b', 3072, 6144, 3072), ('e4b', 8192, 20_480, 8192), ('12b', 8192, 163_840, 8 * 640),
    ('26b-a4b', 10_240, 102_400, 10 * 640), ('31b', 40_960, 409_600, 40 * 640)])
def test_kv_of_global_layers_grows_and_of_local_layers_stops_at_the_window(name, growing, ring, unified):
  cfg = config.VARIANTS[name]
  assert size.kv_bytes(cfg, 100, 'separate') == 2 * 100 * (growing + ring)
  assert size.kv_bytes(cfg, 32_768, 'separate') == 2 * (32_768 * growing + cfg.window * ring)
  assert size.kv_bytes(cfg, 32_768) == 2 * (32_768 * unified + cfg.window * ring)


@pytest.mark.parametrize('fields', [{'embedding': 'value'}, {'qk_norm': False}])
def test_keys_that_values_cannot_give_back_are_stored_whole(fields):
  cfg = config.B12.replace(**fields)
  assert size.kv_bytes(cfg, 4096) == size.kv_bytes(cfg, 4096, 'separate') == size.kv_bytes(config.B12, 4096, 'separate')


def test_costs_of_a_run_are_named_as_its_report_reads_them():
  assert size.costs(DENSE, 16) == {
      'params/total': size.total(DENSE), 'params/non_embedding': size.non_embedding(DENSE),
      'params/ple_table': 128 * 4 * 8, 'flops_per_token': size.forward_flops(DENSE, 16),
      'resident_bytes': size.resident_bytes(DENSE)}
