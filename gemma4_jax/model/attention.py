"""Attention: local and global layers, K/V shared between layers, and keys that double as values."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import linen as nn, struct
import jax
import jax.numpy as jnp

from gemma4_jax import sharding
from gemma4_jax.config import VALUE, LayerSpec, ModelConfig
from gemma4_jax.model import flash, layers

_BLOCK = 128   # queries of one block of scores, at least
_SCORES = 2**27   # bytes of float32 scores that a device holds at once, where they can be had in blocks of so many queries
MASKED = -2.3819763e38   # a float32 whose exp is 0, yet finite: a row with nothing to see stays free of NaN


@struct.dataclass
class Stream:
  """What all blocks of one forward pass know of its tokens.

  Attributes:
    pos_BT: int32, the position within its document.
    seg_BT: int32, the document; tokens see their own document only. 0 is padding, which nobody sees.
    rope: (base, fraction, head_dim) as text -> (cos, sin) of `layers.rope_angles`, computed once a kind of layer.
    implementation: `cfg.attention_implementation`.
  """
  pos_BT: jax.Array
  seg_BT: jax.Array
  rope: dict[str, tuple[jax.Array, jax.Array]]
  implementation: str = struct.field(pytree_node=False, default='auto')

  @classmethod
  def make(cls, cfg: ModelConfig, pos_BT: jax.Array, seg_BT: jax.Array) -> 'Stream':
    kinds = {rope_kind(spec): spec for spec in cfg.layers}
    return cls(pos_BT, seg_BT, {
        kind: layers.rope_angles(pos_BT, s.head_dim, s.rope_base, s.rope_fraction) for kind, s in kinds.items()},
               cfg.attention_implementation)


def rope_kind(spec: LayerSpec) -> str:
  return f'{spec.rope_base}/{spec.rope_fraction}/{spec.head_dim}'


@struct.dataclass
class FreshKV:
  """Keys and values of one forward pass, as made: k normed and rotated, v normed. [B, S, K, H] each."""
  k_BSKH: jax.Array
  v_BSKH: jax.Array

  def attend(self, q_BTNH: jax.Array, stream: Stream, window: int | None, scale: float) -> jax.Array:
    """Returns the attention output [B, T, N, H] of queries that are the same tokens as the keys."""
    k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (self.k_BSKH, self.v_BSKH))
    if flash.runs(stream.implementation, q_BTNH.shape[1]):
      return flash.attend(q_BTNH, k_BKSH, v_BKSH, stream.seg_BT, stream.seg_BT, window, scale, stream.implementation)
    if window is None or q_BTNH.shape[1] <= window:
      return attend_causal(q_BTNH, k_BKSH, v_BKSH, stream, window, scale)
    return attend_blocked(q_BTNH, k_BKSH, v_BKSH, stream, window, scale)


def see(stream: Stream, kpos_BS: jax.Array, kseg_BS: jax.Array, window: int | None) -> jax.Array:
  """bool [B, T, S]: whether a query of `stream` sees a key: of its document, not after it, within the window."""
  ahead_BTS = stream.pos_BT[:, :, None] - kpos_BS[:, None, :]
  seen_BTS = (ahead_BTS >= 0) & (stream.seg_BT[:, :, None] == kseg_BS[:, None, :]) & (kseg_BS[:, None, :] > 0)
  return seen_BTS if window is None else seen_BTS & (ahead_BTS < window)


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen_BTS: jax.Array, scale: float) -> jax.Array:
  """softmax(scale q k) v, [B, T, N, H]; the softmax is float32."""
  return mix(scores(q_BTNH, k_BKSH, scale), v_BKSH, seen_BTS, q_BTNH.shape)


def scores(q_BTNH: jax.Array, k_BKSH: jax.Array, scale: float) -> jax.Array:
  """scale q k, float32 [B, K, T * G, S]: the queries of a K/V head are the rows of one matmul, for `layers.contract`'s reason."""
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BKRH = (q_BTNH * scale).reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)   # a copy only where K > 1
  return jax.lax.dot_general(q_BKRH, k_BKSH, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def mix(logits_BKRS: jax.Array, v_BKSH: jax.Array, seen_BTS: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The softmax over what is seen, times the values; `shape` is that of the queries and the result, [B, T, N, H]."""
  B, T, N, H = shape
  K = v_BKSH.shape[1]
  logits_BKTGS = jnp.where(seen_BTS[:, None, :, None], logits_BKRS.reshape(B, K, T, N // K, -1), MASKED)
  # Softmax, divided by its sum after the values are summed and not before: one pass less over the scores, each way.
  weights_BKTGS = jnp.exp(logits_BKTGS - jax.lax.stop_gradient(logits_BKTGS.max(-1, keepdims=True)))
  out_BKRH = jax.lax.dot_general(weights_BKTGS.astype(v_BKSH.dtype).reshape(logits_BKRS.shape), v_BKSH,
                                 (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
  out_BKTGH = out_BKRH.reshape(B, K, T, N // K, H) / weights_BKTGS.sum(-1, keepdims=True)
  return out_BKTGH.astype(v_BKSH.dtype).swapaxes(1, 2).reshape(shape)


def in_blocks(attend: Callable[[jax.Array, Stream], jax.Array], q_BTNH: jax.Array, stream: Stream, keys: int) -> jax.Array:
  """attend(q_BTNH, stream), but of so many queries at a time that scores against `keys` keys stay below `_SCORES` bytes, whatever T
  is. The backward pass computes them again."""
  B, T, N, _ = q_BTNH.shape
  most = max(_BLOCK, _SCORES // max(1, 4 * B * N * keys // sharding.batch_shards()))
  if T <= most:
    return attend(q_BTNH, stream)
  n = -(-T // most)
  size = -(-T // n)

  def split(x):   # [B, T, ...] -> [n, B, size, ...], padded with segment 0
    x = jnp.pad(x, [(0, 0), (0, n * size - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, n, size, *x.shape[2:]), 1, 0)

  outs = jax.lax.map(jax.checkpoint(lambda block: attend(*block)), jax.tree.map(split, (q_BTNH, stream)))
  return jnp.moveaxis(outs, 0, 1).reshape(B, n * size, *outs.shape[3:])[:, :T]


def attend_causal(q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, stream: Stream, window: int | None,
                  scale: float) -> jax.Array:
  """As `attend` of queries and keys that are the same tokens. In blocks, each with the keys up to its end: of four, 5/8 of the
  T x T scores; the rest nobody sees. Of those of a long sequence each is again `in_blocks`."""
  T = q_BTNH.shape[1]
  size = max(_BLOCK, -(-T // 4))
  outs = []
  for start in range(0, T, size):
    end = min(start + size, T)
    queries = jax.tree.map(lambda x: x[:, start:end], stream)

    def block(q_BTNH, queries, end=end):
      seen = see(queries, stream.pos_BT[:, :end], stream.seg_BT[:, :end], window)
      return attend(q_BTNH, k_BKTH[:, :, :end], v_BKTH[:, :, :end], seen, scale)
    outs.append(in_blocks(block, q_BTNH[:, start:end], queries, end))
  return jnp.concatenate(outs, axis=1)


@struct.dataclass
class Before:
  """The last window of tokens before those of a stream, in their order; segment 0 where there were none."""
  k_BKWH: jax.Array
  v_BKWH: jax.Array
  pos_BW: jax.Array
  seg_BW: jax.Array


def attend_blocked(q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, stream: Stream, window: int, scale: float,
                   before: Before | None = None) -> jax.Array:
  """As `attend` of queries and keys that are the same tokens. A block of half a window of queries needs its own keys and those of
  the window before it: T x 1.5 W scores instead of T x T."""
  B, T = stream.pos_BT.shape
  size = window // 2 if window % 2 == 0 and window // 2 >= _BLOCK // 2 else window
  n = -(-T // size)

  def queries(x):   # [B, T, ...] -> [B * n, size, ...], padded with segment 0
    return jnp.pad(x, [(0, 0), (0, n * size - T)] + [(0, 0)] * (x.ndim - 2)).reshape(B * n, size, *x.shape[2:])

  def keys(x, axis, name):   # T -> [n, window + size] at the front
    x = jnp.moveaxis(x, axis, 1)
    first = jnp.zeros_like(x, shape=(B, window, *x.shape[2:])) if before is None else jnp.moveaxis(getattr(before, name), axis, 1)
    x = jnp.pad(jnp.concatenate([first, x], axis=1), [(0, 0), (0, n * size - T)] + [(0, 0)] * (x.ndim - 2))
    parts = [x[:, start:start + n * size].reshape(B, n, size, *x.shape[2:]) for start in range(0, window + 1, size)]
    return jnp.moveaxis(jnp.concatenate(parts, axis=2).reshape(B * n, window + size, *x.shape[2:]), 1, axis)

  local = stream.replace(pos_BT=queries(stream.pos_BT), seg_BT=queries(stream.seg_BT))
  seen = see(local, keys(stream.pos_BT, 1, 'pos_BW'), keys(stream.seg_BT, 1, 'seg_BW'), window)
  out = attend(queries(q_BTNH), keys(k_BKTH, 2, 'k_BKWH'), keys(v_BKTH, 2, 'v_BKWH'), seen, scale)
  return out.reshape(B, n * size, *out.shape[2:])[:, :T]


class Attention(nn.Module):
  """q = rope(rms(x Wq)), k = rope(rms(x Wk)), v = rms(x Wv); softmax(scale q k) v Wo. No biases; scale 1.

  A layer that borrows K/V has Wq, its norm and Wo only, and attends to its donor's keys and values as the donor made them.
  With K=V the values are the key projection before its norm and rotation.
  Source: transformers `models/gemma4/modeling_gemma4.py`, Gemma4TextAttention.
  """
  cfg: ModelConfig
  spec: LayerSpec

  @nn.compact
  def __call__(self, x_BTD: jax.Array, stream: Stream, kv=None, value_BTKH: jax.Array | None = None) -> tuple[jax.Array, Any]:
    """Returns (attention output [B, T, D], the K/V it read: something with `attend`).

    Args:
      kv: what the donor read, for a layer that borrows; for one that makes its own, its cache (`kv_cache`), something with
        `append`, or None, to read the fresh ones alone.
      value_BTKH: [B, T, K * H] added to the values, each side with a learned weight (the value-embedding arm).
    """
    cfg, spec = self.cfg, self.spec
    D, N, K, H = x_BTD.shape[-1], cfg.num_heads, spec.num_kv_heads, spec.head_dim
    project = partial(layers.Einsum, cfg)
    angles = stream.rope[rope_kind(spec)]

    q_BTNH = project('BTD,NHD->BTNH', (N, H, D), ('heads', 'head_dim', 'embed'), D, name='q')(x_BTD)
    q_BTNH = layers.rope(layers.RMSNorm(cfg, name='q_norm')(q_BTNH) if cfg.qk_norm else q_BTNH, angles)
    if spec.kv_from is None:
      into_kv = partial(project, 'BTD,KHD->BTKH', (K, H, D), ('kv_heads', 'head_dim', 'embed'), D)
      k_BTKH = into_kv(name='k')(x_BTD)
      v_BTKH = k_BTKH if spec.k_eq_v else into_kv(name='v')(x_BTD)
      k_norm = layers.RMSNorm(cfg, name='k_norm') if cfg.qk_norm else None
      k_BTKH = layers.rope(k_norm(k_BTKH) if k_norm else k_BTKH, angles)
      v_BTKH = layers.RMSNorm(cfg, scale=False)(v_BTKH) if cfg.v_norm else v_BTKH
      if spec.inject == VALUE:
        mix_2 = layers.declare(self, 'value_mix', layers.constant(0.5), (2,), ('norm',)).astype(v_BTKH.dtype)
        v_BTKH = mix_2[0] * v_BTKH + mix_2[1] * value_BTKH.reshape(v_BTKH.shape)
      if kv is None:
        kv = FreshKV(k_BTKH, v_BTKH)
      else:
        kv = kv.append(k_BTKH, v_BTKH, stream, k_norm.variables['params']['scale'] if k_norm else None)
    out_BTNH = kv.attend(q_BTNH, stream, spec.window, cfg.attention_scale)
    return project('BTNH,DNH->BTD', (D, N, H), ('embed', 'heads', 'head_dim'), N * H, name='o')(out_BTNH), kv
