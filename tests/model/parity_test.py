"""Live parity with `transformers`: the same random weights, each sub-layer given the same input, logits, loss, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from gemma4_jax.checkpoint import hf
from gemma4_jax.model import attention, embeddings, layers, moe, transformer
from tests import hf_models, quick

CONFIGS = hf_models.configs()
TINY = ('dense_ple_kvshare', 'mqa_ple_kvshare', 'large_kv', 'moe')   # every feature; the shrunk variants are slow
SUBLAYER_TOLERANCE = 1e-5   # largest difference over largest value
LOGIT_TOLERANCE = 5e-4      # absolute
GRADIENT_TOLERANCE = 1e-3   # norm of the difference over norm, per weight


def having(feature):
  return pytest.mark.parametrize('case', quick.only(
      [name for name in TINY if feature(CONFIGS[name])], [name for name, cfg in CONFIGS.items() if feature(cfg)]), indirect=True)


class Case:
  """One model in both libraries; what is computed once is kept."""

  def __init__(self, cfg, **state):
    self.cfg = cfg
    state = hf_models.random_state(cfg, **state)
    self.model = hf_models.build(cfg, state)
    self.params = jax.tree.map(jnp.asarray, hf.params_from_hf(cfg, state))

  @functools.cache
  def theirs(self, layout='full'):
    return hf_models.loss_and_grads(self.model, *hf_models.batch(layout))

  @functools.cache
  def ours(self, layout='full', **execution):
    cfg = self.cfg.replace(**execution)
    params = transformer.stack(cfg, self.params) if cfg.scan else self.params
    logits, loss, grads = quick.loss_and_grads(cfg, params, *hf_models.batch(layout))
    grads = transformer.unstack(cfg, grads) if cfg.scan else grads
    return np.asarray(logits), float(loss), hf.params_to_hf(cfg, grads)

  @functools.cached_property
  def calls(self):
    """Module name -> (arguments, output) of one forward pass of theirs; of attention, also the K/V that it read."""
    calls, handles = {}, []

    def record(name, module, args, kwargs, output):
      if type(module).__name__ == 'Gemma4TextAttention':
        lent = kwargs['shared_kv_states'][module.layer_type] if module.is_kv_shared_layer else None
        calls[name] = to_numpy((kwargs['hidden_states'], lent, output[0]))
      else:
        calls[name] = to_numpy((args, output))

    for name, module in self.model.model.named_modules():
      handles.append(module.register_forward_hook(functools.partial(record, name), with_kwargs=True))
    ids, mask, pos = (torch.from_numpy(x).long() for x in hf_models.batch())
    with torch.no_grad():
      self.model(ids, attention_mask=mask, position_ids=pos, use_cache=False)
    for handle in handles:
      handle.remove()
    return calls


def to_numpy(tree):
  if isinstance(tree, torch.Tensor):
    return tree.detach().numpy().copy()
  return tuple(map(to_numpy, tree)) if isinstance(tree, tuple) else tree


@pytest.fixture(scope='module')
def case(request):
  return Case(CONFIGS[request.param])


def assert_close(what, ours, theirs, tolerance=SUBLAYER_TOLERANCE):
  error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
  assert error <= tolerance, f'{what}: {error:.1e}'


def assert_gradients_close(ours, theirs):
  ours, theirs = merge_scalars(ours), merge_scalars(theirs)
  assert ours.keys() == theirs.keys()
  errors = {name: np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]) for name in theirs}
  worst = max(errors, key=errors.get)
  assert errors[worst] <= GRADIENT_TOLERANCE, f'{worst}: {errors[worst]:.1e}'


def merge_scalars(grads):
  """Layer scalars as one weight: a sum of many terms to one number may cancel, and the last is 0 but for rounding."""
  scalars = [name for name in grads if name.endswith('layer_scalar')]
  return {name: grad for name, grad in grads.items() if name not in scalars} | {
      'layer_scalar': np.concatenate([grads[name] for name in scalars])}


def stream(cfg):
  _, mask, pos = hf_models.batch()
  return attention.Stream.make(cfg, jnp.asarray(pos), jnp.asarray(mask))


@having(lambda cfg: True)
def test_attention_of_every_layer_agrees(case):
  for i, spec in enumerate(case.cfg.layers):
    x_BTD, lent, theirs = case.calls[f'layers.{i}.self_attn']
    kv = lent and attention.FreshKV(*(x.swapaxes(1, 2) for x in lent))
    ours, _ = quick.apply(attention.Attention(case.cfg, spec), case.params[f'layer_{i}']['attention'], x_BTD, stream(case.cfg), kv)
    assert_close(f'layer {i} {spec}', ours, theirs)


@having(lambda cfg: True)
def test_mlp_of_every_layer_agrees(case):
  for i, spec in enumerate(case.cfg.layers):
    (x_BTD,), theirs = case.calls[f'layers.{i}.mlp']
    assert_close(f'layer {i}', quick.apply(layers.MLP(case.cfg, spec.mlp_dim), case.params[f'layer_{i}']['mlp'], x_BTD), theirs)


@having(lambda cfg: cfg.num_experts)
def test_moe_of_every_layer_agrees(case):
  for i in range(case.cfg.num_layers):
    (router_in_RD,), (probs_RE, _, _) = case.calls[f'layers.{i}.router']
    (x_RD, _, _), theirs_RD = case.calls[f'layers.{i}.experts']
    ours_BTD, ours_BTE = quick.apply(moe.MoE(case.cfg), case.params[f'layer_{i}']['moe'], router_in_RD[None], x_RD[None])
    assert_close(f'layer {i}', ours_BTD[0], theirs_RD)
    assert_close(f'layer {i}, router', ours_BTE[0], probs_RE)


@having(lambda cfg: cfg.embedding == 'ple')
def test_per_layer_embeddings_agree(case):
  ids_BT = hf_models.batch()[0]
  (x_BTD, _), _ = case.calls['layers.0']
  _, vectors = quick.apply(embeddings.PLE(case.cfg), case.params['arm'], ids_BT, np.zeros_like(ids_BT), x_BTD)
  for i, ours in enumerate(vectors):
    (_, theirs), _ = case.calls[f'layers.{i}']
    assert_close(f'layer {i}', ours, theirs)


@having(lambda cfg: True)
def test_every_block_agrees(case):
  for i, spec in enumerate(case.cfg.layers):
    (x_BTD, vector), theirs = case.calls[f'layers.{i}']
    _, lent, _ = case.calls[f'layers.{i}.self_attn']
    kv = lent and attention.FreshKV(*(x.swapaxes(1, 2) for x in lent))
    ours, _ = quick.apply(transformer.Block(case.cfg, spec), case.params[f'layer_{i}'], x_BTD, stream(case.cfg), kv, vector)
    assert_close(f'layer {i} {spec}', ours, theirs)


@pytest.mark.parametrize('layout', ['full', 'right', 'left'])
@having(lambda cfg: True)
def test_logits_agree_at_real_tokens(case, layout):
  real = hf_models.batch(layout)[1] > 0
  error = np.abs(case.ours(layout)[0] - case.theirs(layout)[0])[real].max()
  assert error <= LOGIT_TOLERANCE


@pytest.mark.parametrize('layout', ['full', 'right', 'left'])
@having(lambda cfg: True)
def test_loss_and_gradients_agree(case, layout):
  _, our_loss, our_grads = case.ours(layout)
  _, their_loss, their_grads = case.theirs(layout)
  assert our_loss == pytest.approx(their_loss, rel=1e-5)
  assert_gradients_close(our_grads, their_grads)


@pytest.mark.parametrize('case', ['dense_ple_kvshare', 'large_kv', 'moe'], indirect=True)
def test_a_single_token_agrees(case):
  ids = np.array([[7]], np.int32)
  with torch.no_grad():
    theirs = case.model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
  ours, _ = quick.apply(transformer.Transformer(case.cfg), case.params, ids)
  assert np.abs(ours - theirs).max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize('case', ['mqa_ple_kvshare'], indirect=True)
def test_scanned_and_rematerialised_agree_too(case):
  logits, loss, grads = case.ours(scan=True, remat='full')
  assert np.abs(logits - case.theirs()[0]).max() <= LOGIT_TOLERANCE
  assert loss == pytest.approx(case.theirs()[1], rel=1e-5)
  assert_gradients_close(grads, case.theirs()[2])


def test_logits_agree_where_the_softcap_bends():
  case = Case(CONFIGS['large_kv'], std=1.0)
  theirs = case.theirs()[0]
  assert np.abs(theirs).max() > 25
  assert np.abs(case.ours()[0] - theirs).max() <= LOGIT_TOLERANCE
