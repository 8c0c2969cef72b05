"""Attention: local and global layers, K/V shared between layers, and keys that double as values."""

from functools import partial

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from gemma4_jax.config import VALUE, LayerSpec, ModelConfig
from gemma4_jax.model import layers

MASKED = -2.3819763e38   # a float32 whose exp is 0, yet finite: a row with nothing to see stays free of NaN


@struct.dataclass
class Stream:
  """What all blocks of one forward pass know of its tokens.

  Attributes:
    pos_BT: int32, the position within its document.
    seg_BT: int32, the document; tokens see their own document only. 0 is padding, which nobody sees.
    rope: (base, fraction, head_dim) as text -> (cos, sin) of `layers.rope_angles`, computed once a kind of layer.
  """
  pos_BT: jax.Array
  seg_BT: jax.Array
  rope: dict[str, tuple[jax.Array, jax.Array]]

  @classmethod
  def make(cls, cfg: ModelConfig, pos_BT: jax.Array, seg_BT: jax.Array) -> 'Stream':
    return cls(pos_BT, seg_BT, {
        rope_kind(s): layers.rope_angles(pos_BT, s.head_dim, s.rope_base, s.rope_fraction) for s in cfg.layers})


def rope_kind(spec: LayerSpec) -> str:
  return f'{spec.rope_base}/{spec.rope_fraction}/{spec.head_dim}'


@struct.dataclass
class FreshKV:
  """Keys and values of one forward pass, as made: k normed and rotated, v normed. [B, S, K, H] each."""
  k_BSKH: jax.Array
  v_BSKH: jax.Array

  def attend(self, q_BTNH: jax.Array, stream: Stream, window: int | None, scale: float) -> jax.Array:
    """Returns the attention output [B, T, N, H] of queries that are the same tokens as the keys."""
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], self.k_BSKH.shape[2], -1, q_BTNH.shape[-1])
    pos, seg = stream.pos_BT, stream.seg_BT
    if window is None or q_BTNH.shape[1] <= window:
      out = _attend(q_BTKGH, self.k_BSKH, self.v_BSKH, pos, seg, pos, seg, window, scale)
    else:
      out = _attend_blocked(q_BTKGH, self.k_BSKH, self.v_BSKH, pos, seg, window, scale)
    return out.reshape(q_BTNH.shape)


def _attend(q_BTKGH, k_BSKH, v_BSKH, qpos_BT, qseg_BT, kpos_BS, kseg_BS, window, scale):
  """Two batched matmuls of matrices: the queries of a K/V head are the rows, for `layers.contract`'s reason."""
  B, T, K, G, H = q_BTKGH.shape
  rows = lambda x: x.swapaxes(1, 2).reshape(B * K, -1, H)   # a copy only where K > 1
  logits_BKTGS = jax.lax.dot_general(rows(q_BTKGH * scale), rows(k_BSKH), (((2,), (2,)), ((0,), (0,))),
                                     preferred_element_type=jnp.float32).reshape(B, K, T, G, -1)
  ahead_BTS = qpos_BT[:, :, None] - kpos_BS[:, None, :]
  seen_BTS = (ahead_BTS >= 0) & (qseg_BT[:, :, None] == kseg_BS[:, None, :]) & (kseg_BS[:, None, :] > 0)
  if window is not None:
    seen_BTS &= ahead_BTS < window
  logits_BKTGS = jnp.where(seen_BTS[:, None, :, None], logits_BKTGS, MASKED)
  # Softmax, divided by its sum after the values are summed and not before: one pass less over the scores, each way.
  weights_BKTGS = jnp.exp(logits_BKTGS - jax.lax.stop_gradient(logits_BKTGS.max(-1, keepdims=True)))
  out = jax.lax.dot_general(weights_BKTGS.astype(v_BSKH.dtype).reshape(B * K, T * G, -1), rows(v_BSKH),
                            (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
  out_BKTGH = out.reshape(B, K, T, G, H) / weights_BKTGS.sum(-1, keepdims=True)
  return out_BKTGH.astype(v_BSKH.dtype).swapaxes(1, 2)


def _attend_blocked(q_BTKGH, k_BSKH, v_BSKH, pos_BT, seg_BT, window, scale):
  """A block of `window` queries needs its own keys and those of the block before: T x 2W scores instead of T x T."""
  B, T = pos_BT.shape
  n = -(-T // window)

  def blocks(x):   # [B, T, ...] -> [B * n, W, ...], padded with segment 0
    x = jnp.pad(x, [(0, 0), (0, n * window - T)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(B * n, window, *x.shape[2:])

  def with_previous(x):   # [B, T, ...] -> [B * n, 2W, ...]
    x = blocks(x).reshape(B, n, window, *x.shape[2:])
    before = jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))[:, :-1]
    return jnp.concatenate([before, x], axis=2).reshape(B * n, 2 * window, *x.shape[3:])

  out = _attend(blocks(q_BTKGH), with_previous(k_BSKH), with_previous(v_BSKH), blocks(pos_BT), blocks(seg_BT),
                with_previous(pos_BT), with_previous(seg_BT), window, scale)
  return out.reshape(B, n * window, *out.shape[2:])[:, :T]


class Attention(nn.Module):
  """q = rope(rms(x Wq)), k = rope(rms(x Wk)), v = rms(x Wv); softmax(scale q k) v Wo. No biases; scale 1.

  A layer that borrows K/V has Wq, its norm and Wo only, and attends to its donor's keys and values as the donor made them.
  With K=V the values are the key projection before its norm and rotation.
  Source: transformers `models/gemma4/modeling_gemma4.py`, Gemma4TextAttention.
  """
  cfg: ModelConfig
  spec: LayerSpec

  @nn.compact
  def __call__(self, x_BTD: jax.Array, stream: Stream, kv: FreshKV | None = None, value_BTKH: jax.Array | None = None,
               ) -> tuple[jax.Array, FreshKV]:
    """Returns (attention output [B, T, D], the K/V it read).

    Args:
      kv: the donor's, for a layer that borrows; None for one that makes its own.
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
      k_BTKH = layers.rope(layers.RMSNorm(cfg, name='k_norm')(k_BTKH) if cfg.qk_norm else k_BTKH, angles)
      v_BTKH = layers.RMSNorm(cfg, scale=False)(v_BTKH) if cfg.v_norm else v_BTKH
      if spec.inject == VALUE:
        mix_2 = layers.declare(self, 'value_mix', layers.constant(0.5), (2,), ('norm',)).astype(v_BTKH.dtype)
        v_BTKH = mix_2[0] * v_BTKH + mix_2[1] * value_BTKH.reshape(v_BTKH.shape)
      kv = FreshKV(k_BTKH, v_BTKH)
    out_BTNH = kv.attend(q_BTNH, stream, spec.window, cfg.attention_scale)
    return project('BTNH,DNH->BTD', (D, N, H), ('embed', 'heads', 'head_dim'), N * H, name='o')(out_BTNH), kv
