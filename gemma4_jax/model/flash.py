"""Attention of several tokens by kernels that never have its scores in memory. The kernels are others'; which runs is one choice.

  'xla'               `attention.attend_causal` and `attend_blocked`: any device, scores in blocks
  'splash'            JAX's for TPUs, jax.experimental.pallas.ops.tpu.splash_attention, forward and backward
  'splash_interpret'  the same in Pallas' interpreter: slow, for tests
  'auto'              what the device has (`hardware.platform`): splash on a TPU, else xla

A kernel takes `LEAST` tokens and more, all of which have keys; fewer are XLA's. Attention to quantized caches is `turboquant.ops`'.
"""

import functools

import jax
import jax.numpy as jnp

from gemma4_jax import hardware, sharding

LEAST = 128    # tokens: a tile of the kernel's
_BLOCK = 512   # queries and keys of one step, at most


def choose(asked: str) -> str:
  """What runs of many tokens, 'xla', 'splash' or 'splash_interpret'.

  Raises:
    ValueError: a kernel that this device has not.
  """
  device = hardware.platform()
  if asked == 'splash' and device != 'tpu':
    raise ValueError(f"model.attention_implementation: 'splash' needs a TPU, and this is a {device.upper()}: take 'auto' or 'xla'")
  return asked if asked != 'auto' else 'splash' if device == 'tpu' else 'xla'


def runs(asked: str, tokens: int) -> bool:
  """Whether a kernel takes so many tokens: `attend`."""
  return tokens >= LEAST and choose(asked) != 'xla'


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, q_seg_BT: jax.Array, k_seg_BS: jax.Array, window: int | None,
           scale: float, asked: str) -> jax.Array:
  """softmax(scale q k) v, [B, T, N, H]: query t is the token of key t + S - T, and sees keys of its segment, not after it, and if there
  is a window no more than so many keys back, itself counted. By the order of keys: positions within a segment count up by one.

  Rows and K/V heads are split over the mesh in use; a single K/V head is on every device, with all its queries.
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  size = min(_BLOCK, -(-T // LEAST) * LEAST)
  more = -T % size                    # padding is of segment 0, as queries and as their keys
  keys = S + more + -(S + more) % size
  q_BKGTH = jnp.moveaxis((q_BTNH * scale).reshape(B, T, K, N // K, H), 1, 3)
  pad = lambda x, axis, to: jnp.pad(x, [(0, to - n if i == axis else 0) for i, n in enumerate(x.shape)])
  run = functools.partial(_splash, offset=S - T, window=window, size=size, interpret=choose(asked) == 'splash_interpret')
  out_BKGTH = sharding.by_rows(run, pad(q_BKGTH, 3, T + more), pad(k_BKSH, 2, keys), pad(v_BKSH, 2, keys), pad(q_seg_BT, 1, T + more),
                               pad(k_seg_BS, 1, keys))
  return jnp.moveaxis(out_BKGTH[:, :, :, :T], 3, 1).reshape(q_BTNH.shape)


def _splash(q_BKGTH, k_BKSH, v_BKSH, q_seg_BT, k_seg_BS, *, offset, window, size, interpret):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash, splash_attention_mask as masks
  B, K, G, T, H = q_BKGTH.shape
  S = k_BKSH.shape[2]
  one = masks.CausalMask((T, S), offset) if window is None or window >= S else masks.LocalMask((T, S), (window - 1, 0), offset)
  kernel = splash.make_splash_mha(
      masks.MultiHeadMask([one] * (K * G)), head_shards=1, q_seq_shards=1, interpret=interpret,
      block_sizes=splash.BlockSizes(size, size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size))
  row = lambda q, k, v, q_seg, k_seg: kernel(q, k, v, segment_ids=splash.SegmentIds(q_seg, k_seg))
  out = jax.vmap(row)(q_BKGTH.reshape(B, K * G, T, H), k_BKSH, v_BKSH, q_seg_BT, k_seg_BS)
  return out.reshape(q_BKGTH.shape)
