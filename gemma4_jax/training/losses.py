"""Next-token cross entropy through a soft-capped head whose logits never exist whole."""

from functools import partial

import jax
import jax.numpy as jnp

from gemma4_jax import sharding


def token_nll(x_RD: jax.Array, table_VD: jax.Array, target_R: jax.Array, *, cap: float, chunk: int) -> jax.Array:
  """Returns -log p(target) in nats, float32 [R], of logits cap * tanh(x table^T / cap), a chunk of rows at a time.

  Args:
    x_RD: the normed last stream, any float dtype; the logits and all that follows are float32.
    target_R: int32 in [0, V).
    cap: of the logits; 0 for none.
    chunk: rows whose logits exist at once, on every part of a mesh that splits the batch.
  """
  def nll(args):
    x_CD, target_C = args
    logits_CV = _capped(_logits(x_CD, table_VD), cap)
    return jax.nn.logsumexp(logits_CV, axis=-1) - _pick(logits_CV, target_C)
  return _joined(jax.lax.map(nll, _chunks(chunk, x_RD, target_R)), len(target_R))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def nll_sum(x_RD: jax.Array, table_VD: jax.Array, target_R: jax.Array, weight_R: jax.Array, cap: float, chunk: int) -> jax.Array:
  """Returns sum(weight * token_nll), float32. Its gradient in x and table is computed along with it, chunk by chunk, so the
  backward pass neither keeps nor recomputes logits: three head-sized matmuls a step, as with whole logits. `weight_R`
  (float32, 0 masks) gets no gradient."""
  return (token_nll(x_RD, table_VD, target_R, cap=cap, chunk=chunk) * weight_R).sum()


def _nll_sum_fwd(x_RD, table_VD, target_R, weight_R, cap, chunk):
  def body(carry, args):
    total, dtable_DV = carry
    x_CD, target_C, weight_C = args
    logits_CV = _capped(_logits(x_CD, table_VD), cap)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    total += ((lse_C - _pick(logits_CV, target_C)) * weight_C).sum()
    hit_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == target_C[:, None]
    d_CV = (jnp.exp(logits_CV - lse_C[:, None]) - hit_CV) * weight_C[:, None]
    if cap:
      d_CV *= 1 - jnp.square(logits_CV / cap)
    d_CV = d_CV.astype(x_CD.dtype)
    # transposed for good, or XLA folds that into the matmul, and its fast library for CPUs takes no transposed left side
    dtable_DV += jnp.dot(jax.lax.optimization_barrier(x_CD.T), d_CV, preferred_element_type=jnp.float32)
    return (total, sharding.constrain(dtable_DV, 'embed', 'vocab')), d_CV @ table_VD.astype(x_CD.dtype)

  start = jnp.zeros(()), sharding.constrain(jnp.zeros(table_VD.shape[::-1], jnp.float32), 'embed', 'vocab')
  (total, dtable_DV), dx = jax.lax.scan(body, start, _chunks(chunk, x_RD, target_R, weight_R))
  return total, (_joined(dx, len(x_RD)), dtable_DV.T.astype(table_VD.dtype))


def _nll_sum_bwd(cap, chunk, grads, g):
  dx_RD, dtable_VD = grads
  return (g * dx_RD).astype(dx_RD.dtype), (g * dtable_VD).astype(dtable_VD.dtype), None, None


nll_sum.defvjp(_nll_sum_fwd, _nll_sum_bwd)


def _logits(x_CD, table_VD):
  logits_CV = jnp.einsum('CD,VD->CV', x_CD, table_VD.astype(x_CD.dtype), preferred_element_type=jnp.float32)
  return sharding.constrain(logits_CV, 'batch', 'vocab')


def _capped(logits, cap):
  return cap * jnp.tanh(logits / cap) if cap else logits


def _pick(logits_CV, target_C):
  return jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]


def _parts(n):
  """Into which a mesh splits the rows: each is chunked by itself, so that no row leaves its device."""
  shards = sharding.batch_shards()
  return 1 if n % shards else shards


def _chunks(chunk, *rows):
  """[R, ...] -> [chunks, rows of a chunk, ...], padded with zeros; fewer rows than a chunk are one chunk of their own size."""
  parts = _parts(len(rows[0]))
  n = len(rows[0]) // parts
  chunk = min(chunk, n)
  count = -(-n // chunk)

  def split(x):
    rest = x.shape[1:]
    x = jnp.pad(x.reshape(parts, n, *rest), [(0, 0), (0, count * chunk - n)] + [(0, 0)] * len(rest))
    x = x.reshape(parts, count, chunk, *rest).swapaxes(0, 1).reshape(count, parts * chunk, *rest)
    return sharding.constrain(x, None, 'batch')
  return tuple(map(split, rows))


def _joined(chunks, total):
  """The inverse, for an array."""
  parts, rest = _parts(total), chunks.shape[2:]
  x = chunks.reshape(len(chunks), parts, -1, *rest).swapaxes(0, 1).reshape(parts, -1, *rest)
  return x[:, :total // parts].reshape(total, *rest)
