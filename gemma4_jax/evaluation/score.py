"""What a model says of every token of a document: its log-probability, and how far it is from another model's."""

from collections.abc import Iterable, Sequence
from functools import partial
import math

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.model import kv_cache, transformer
from gemma4_jax.model.intervention import Intervention

_CHUNK = 128     # tokens whose logits exist at once
_PREFILL = 1024  # tokens of a context that run at once


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
  return transformer.Transformer(cfg).apply(transformer.variables(params), ids_BT, None, seg_BT, intervention=intervention)[0]


def continuations(cfg: ModelConfig, params: dict, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_tokens: int = 8192,
                  ) -> list[tuple[np.ndarray, bool]]:
  """Of every (context, continuation) of token ids: log p of the continuation's tokens, float32 [n], and whether they are, one after
  the other, the likeliest.

  A context that several requests share runs once: its cache is copied for each of their continuations. Lengths are rounded up to
  powers of two, one program each; a row's numbers do not depend on its batch.

  Args:
    params: the canonical tree, or variables of `model.quantized`.
    requests: BOS is the caller's.
    batch_tokens: about so many tokens of contexts and continuations are in a batch.
  Raises:
    ValueError: an empty context or continuation, more tokens than the model's context, or log-probabilities that are not finite.
  """
  by_context = {}
  for i, (context, continuation) in enumerate(requests):
    if not len(context) or not len(continuation):
      raise ValueError(f'request {i}: {len(context)} tokens of context, {len(continuation)} of continuation; give at least one of each')
    if (needed := len(context) + len(continuation) - 1) > cfg.context_length:   # the last is predicted, and predicts nothing
      raise ValueError(f'request {i}: {needed} tokens are more than model.context_length = {cfg.context_length}')
    by_context.setdefault(tuple(context), []).append(i)
  buckets = {}   # (length of contexts, of continuations) -> contexts
  for context, mine in by_context.items():
    shape = _power_of_two(len(context)), _power_of_two(1 + max(len(requests[i][1]) for i in mine))
    buckets.setdefault(shape, []).append(context)
  found = [None] * len(requests)
  for (S, T), contexts in sorted(buckets.items(), reverse=True):   # the largest first: what does not fit fails at once
    rows = max(1, batch_tokens // (S + T))
    for batch in _batches(contexts, [len(by_context[context]) for context in contexts], rows):
      _score_batch(cfg, params, requests, {context: by_context[context] for context in batch}, S, T, found)
  check_finite(scores for scores, _ in found)
  return found


def check_finite(scores: Iterable[np.ndarray]) -> None:
  """Raises ValueError: numbers that say nothing."""
  if not all(np.isfinite(one).all() for one in scores):
    raise ValueError('log-probabilities that are not finite: weights that are not? `cli.convert --check` names them')


def _batches(contexts, counts, rows):
  """Lists of contexts with at most `rows` continuations together, or one context that has more."""
  batch, size = [], 0
  for context, count in zip(contexts, counts):
    if batch and size + count > rows:
      yield batch
      batch, size = [], 0
    batch, size = [*batch, context], size + count
  yield batch


def _score_batch(cfg, params, requests, by_context, S, T, found):
  """Fills in `found` for the requests of some contexts. The cache holds all of a context but its last token, which predicts."""
  B, owners = _power_of_two(len(by_context), 1), [(row, i) for row, mine in enumerate(by_context.values()) for i in mine]
  ids_BS, seg_BS = np.zeros((2, B, S), np.int32)
  for row, context in enumerate(by_context):
    ids_BS[row, :len(context) - 1], seg_BS[row, :len(context) - 1] = context[:-1], 1
  cache = kv_cache.make(cfg, B, S + T)
  for start in range(0, S, _PREFILL):
    cache = _fill(cfg, params, cache, ids_BS[:, start:start + _PREFILL], seg_BS[:, start:start + _PREFILL])
  rows = _power_of_two(len(owners), 1)
  ids_RT, seg_RT = np.zeros((2, rows, T), np.int32)
  for r, (_, i) in enumerate(owners):
    context, continuation = requests[i]
    ids_RT[r, :1 + len(continuation)], seg_RT[r, :1 + len(continuation)] = [context[-1], *continuation], 1
  row_R = np.array([row for row, _ in owners] + [0] * (rows - len(owners)), np.int32)
  nll_RT, best_RT = np.asarray(_continue(cfg, params, cache, row_R, ids_RT, seg_RT))
  for r, (_, i) in enumerate(owners):
    n = len(requests[i][1])
    found[i] = -nll_RT[r, :n], bool(best_RT[r, :n].all())


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _fill(cfg, params, cache, ids_BT, seg_BT):
  return transformer.Transformer(cfg).apply(transformer.variables(params), ids_BT, None, seg_BT, cache=cache, head=False)[1]['cache']


@partial(jax.jit, static_argnums=0)
def _continue(cfg, params, cache, row_R, ids_RT, seg_RT):
  """[2, R, T]: -log p of token t + 1 at place t, and whether it is the likeliest; row r goes on from row row_R[r] of the cache."""
  def chunk(logits_CV, next_C):
    nll_C = jax.nn.logsumexp(logits_CV, axis=-1) - _pick(logits_CV, next_C)
    return jnp.stack([nll_C, (logits_CV.argmax(-1) == next_C).astype(jnp.float32)])
  cache = jax.tree.map(lambda x: x[row_R], cache)
  x_RTD, _ = transformer.Transformer(cfg).apply(transformer.variables(params), ids_RT, None, seg_RT, cache=cache, head=False)
  return _by_chunk(chunk, ids_RT, (cfg, params, x_RTD))


def _power_of_two(n: int, least: int = 16) -> int:
  """The least one that is not less than n."""
  return max(least, 1 << (n - 1).bit_length())


def summary(nats: float, tokens: int, size: int) -> dict[str, float]:
  """The three ways to tell a loss. Args: nats: a sum over `tokens`, which stand for `size` bytes of text."""
  found = {'nats_per_token': nats / tokens, 'perplexity': float(np.exp(nats / tokens))}
  return found | ({'bits_per_byte': nats / math.log(2) / size} if size else {})


def _stream(cfg, params, ids_BT, seg_BT, intervention=None):
  return transformer.Transformer(cfg).apply(transformer.variables(params), ids_BT, None, seg_BT, intervention=intervention, head=False)[0]


def _by_chunk(function, ids_BT, *models):
  """`function` of a chunk's logits under each model (config, parameters, last stream) and its next ids; [..., B, T]."""
  size = min(ids_BT.shape[1], _CHUNK)
  split = lambda x: x.reshape(-1, size, *x.shape[2:])
  heads = [partial(transformer.Transformer(cfg).apply, transformer.variables(params), method='head') for cfg, params, _ in models]
  found = jax.lax.map(lambda args: function(*(head(x_CD) for head, x_CD in zip(heads, args[0])), args[1]),
                      ([split(x_BTD) for _, _, x_BTD in models], split(jnp.roll(ids_BT, -1, axis=1))))   # [chunks, ..., C]
  return jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], *ids_BT.shape)


def _pick(values_CV, ids_C):
  return jnp.take_along_axis(values_CV, ids_C[:, None], axis=-1)[:, 0]
