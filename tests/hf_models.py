"""Tiny Gemma 4 text models of `transformers`, and random weights for them that every numpy draws alike."""

import numpy as np

from gemma4_jax import config
from gemma4_jax.checkpoint import hf

_S, _G = 'sliding_attention', 'full_attention'
_COMMON = dict(
    vocab_size=128, vocab_size_per_layer_input=128, hidden_size=64, intermediate_size=96, head_dim=16, global_head_dim=32,
    num_attention_heads=4, rms_norm_eps=1e-6, max_position_embeddings=256, sliding_window=4, final_logit_softcapping=30.0,
    tie_word_embeddings=True,
    rope_parameters={_S: {'rope_type': 'default', 'rope_theta': 1e4},
                     _G: {'rope_type': 'proportional', 'partial_rotary_factor': 0.25, 'rope_theta': 1e6}})

# Hugging Face text configs.
TINY = {
    # shared layers 5, 6, 7 borrow from 4 (local) and 2 (global), which are not simply the last two that own
    'dense_ple_kvshare': dict(
        _COMMON, num_hidden_layers=8, layer_types=[_S, _S, _G, _S, _S, _G, _S, _G], num_key_value_heads=2,
        num_kv_shared_layers=3, use_double_wide_mlp=True, hidden_size_per_layer_input=8),
    'mqa_ple_kvshare': dict(
        _COMMON, num_hidden_layers=10, layer_types=[_S, _S, _S, _S, _G] * 2, num_key_value_heads=1, num_kv_shared_layers=5,
        use_double_wide_mlp=True, hidden_size_per_layer_input=8),
    'large_kv': dict(
        _COMMON, num_hidden_layers=6, layer_types=[_S, _S, _G] * 2, num_key_value_heads=2, num_global_key_value_heads=1,
        attention_k_eq_v=True, hidden_size_per_layer_input=0),
    'moe': dict(
        _COMMON, num_hidden_layers=6, layer_types=[_S, _S, _G] * 2, num_key_value_heads=2, num_global_key_value_heads=1,
        attention_k_eq_v=True, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=8, top_k_experts=2,
        moe_intermediate_size=24),
}


def configs() -> dict[str, config.ModelConfig]:
  """Name -> ModelConfig: the tiny models above and every released variant, shrunk to its fewest layers."""
  models = {name: hf.config_from_hf(fields) for name, fields in TINY.items()}
  for name, variant in config.VARIANTS.items():
    periods = 2 if variant.num_kv_shared_layers else 1
    cfg = config.shrink(variant, num_layers=periods * len(variant.pattern), ple_dim=8 if name == 'e2b' else 32)
    if cfg not in models.values():   # E2B, shrunk, is mqa_ple_kvshare; 31B is 12B
      models[name] = cfg
  return models


def random_state(cfg: config.ModelConfig, seed: int = 4, std: float = 0.2) -> dict[str, np.ndarray]:
  """A Hugging Face state dict, float32; norms and scales away from one, where a missing one would not show.

  Attention at scale 1 and norms of short PLE vectors amplify rounding, for some weights more than for others: over eight
  seeds the float32 logits of `transformers` were off its own float64 logits by up to 1e-3. The default seed is a calm one.
  """
  rng = np.random.RandomState(seed)   # its stream is frozen, unlike that of `default_rng`
  state = {}
  for name, tensor in sorted(hf.tensors(cfg).items()):
    if name.endswith('layer_scalar'):
      array = rng.uniform(0.6, 1.1, tensor.shape)
    else:
      array = rng.standard_normal(tensor.shape)
      array = 1 + 0.3 * array if len(tensor.shape) == 1 else std * array
    state[name] = array.astype(np.float32)
  return state


def batch(layout: str = 'full') -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(ids, mask, positions), int32 [2, 24]: six windows long; the second row 'full', 'right' or 'left' padded."""
  ids = np.random.RandomState(1).randint(1, 128, (2, 24)).astype(np.int32)   # 0 is padding, whose row PyTorch never trains
  mask = np.ones_like(ids)
  mask[1, {'full': slice(0), 'right': slice(17, None), 'left': slice(7)}[layout]] = 0
  return ids * mask, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def build(cfg: config.ModelConfig, state: dict[str, np.ndarray]):
  """`Gemma4ForCausalLM` with these weights, all of them trainable, in plain PyTorch operations."""
  import torch
  import transformers

  torch.set_num_threads(1)   # the work is too small for more
  model = transformers.Gemma4ForCausalLM._from_config(
      transformers.Gemma4TextConfig(**hf.config_to_hf(cfg)), attn_implementation='eager', experts_implementation='eager')
  missing, unexpected = model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=False)
  assert not unexpected and set(missing) <= {'lm_head.weight'}, (missing, unexpected)   # the head is tied
  for name, buffer in model.named_buffers():
    if name.endswith('layer_scalar'):
      buffer.requires_grad_(True)
  return model.eval()


def loss_and_grads(model, ids: np.ndarray, mask: np.ndarray, pos: np.ndarray):
  """Mean cross entropy of the next real token: (logits [B, T, V], loss, gradients by name), all numpy.

  Args:
    ids, mask, pos: [B, T]; mask is 0 at padding.
  """
  import torch

  weights = dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name.endswith('layer_scalar')}
  ids, mask, pos = (torch.from_numpy(x).long() for x in (ids, mask, pos))
  logits = model(ids, attention_mask=mask, position_ids=pos, use_cache=False).logits
  real = (mask[:, 1:] * mask[:, :-1]).bool()
  loss = torch.nn.functional.cross_entropy(logits[:, :-1][real], ids[:, 1:][real])
  grads = torch.autograd.grad(loss, list(weights.values()))
  return logits.detach().numpy(), loss.item(), {name: grad.numpy() for name, grad in zip(weights, grads)}
