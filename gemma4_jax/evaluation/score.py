"""What a model says of every token of a document: its log-probability, and how far it is from another model's."""

from functools import partial
import math

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.model import transformer
from gemma4_jax.model.intervention import Intervention

_CHUNK = 128   # tokens whose logits exist at once


@partial(jax.jit, static_argnums=0)
def token_nll(cfg: ModelConfig, params: dict, ids_BT: jax.Array, seg_BT: jax.Array, intervention: Intervention | None = None) -> jax.Array:
  """-log p of token t + 1 at place t in nats, float32 [B, T]; the last place is without meaning.

  Args:
    ids_BT: int32; T is a multiple of 128 or less than it.
    seg_BT: int32, 1, or 0 for padding behind the tokens.
  """
  def chunk(logits_CV, next_C):
    return jax.nn.logsumexp(logits_CV, axis=-1) - _pick(logits_CV, next_C)
  return _by_chunk(chunk, ids_BT, (cfg, params, _stream(cfg, params, ids_BT, seg_BT, intervention)))


@partial(jax.jit, static_argnums=(0, 2))
def token_divergence(cfg: ModelConfig, params: dict, reference_cfg: ModelConfig, reference_params: dict, ids_BT: jax.Array,
                     seg_BT: jax.Array) -> jax.Array:
  """Of every next token's distribution, float32 [4, B, T]: KL(reference || model) in nats, whether both find the same token
  likeliest, and -log p(token t + 1) of the model and of the reference."""
  def chunk(logits_CV, reference_CV, next_C):
    log_p_CV, log_r_CV = jax.nn.log_softmax(logits_CV), jax.nn.log_softmax(reference_CV)
    kl_C = (jnp.exp(log_r_CV) * (log_r_CV - log_p_CV)).sum(-1)
    same_C = (logits_CV.argmax(-1) == reference_CV.argmax(-1)).astype(jnp.float32)
    return jnp.stack([kl_C, same_C, -_pick(log_p_CV, next_C), -_pick(log_r_CV, next_C)])
  streams = [(c, p, _stream(c, p, ids_BT, seg_BT)) for c, p in ((cfg, params), (reference_cfg, reference_params))]
  return _by_chunk(chunk, ids_BT, *streams)


@partial(jax.jit, static_argnums=0)
def logits(cfg: ModelConfig, params: dict, ids_BT: jax.Array, seg_BT: jax.Array, intervention: Intervention | None = None) -> jax.Array:
  """[B, T, V] float32."""
  return transformer.Transformer(cfg).apply({'params': params}, ids_BT, None, seg_BT, intervention=intervention)[0]


def summary(nats: float, tokens: int, size: int) -> dict[str, float]:
  """The three ways to tell a loss. Args: nats: a sum over `tokens`, which stand for `size` bytes of text."""
  found = {'nats_per_token': nats / tokens, 'perplexity': float(np.exp(nats / tokens))}
  return found | ({'bits_per_byte': nats / math.log(2) / size} if size else {})


def _stream(cfg, params, ids_BT, seg_BT, intervention=None):
  return transformer.Transformer(cfg).apply({'params': params}, ids_BT, None, seg_BT, intervention=intervention, head=False)[0]


def _by_chunk(function, ids_BT, *models):
  """`function` of a chunk's logits under each model (config, parameters, last stream) and its next ids; [..., B, T]."""
  size = min(ids_BT.shape[1], _CHUNK)
  split = lambda x: x.reshape(-1, size, *x.shape[2:])
  heads = [partial(transformer.Transformer(cfg).apply, {'params': params}, method='head') for cfg, params, _ in models]
  found = jax.lax.map(lambda args: function(*(head(x_CD) for head, x_CD in zip(heads, args[0])), args[1]),
                      ([split(x_BTD) for _, _, x_BTD in models], split(jnp.roll(ids_BT, -1, axis=1))))   # [chunks, ..., C]
  return jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], *ids_BT.shape)


def _pick(values_CV, ids_C):
  return jnp.take_along_axis(values_CV, ids_C[:, None], axis=-1)[:, 0]
