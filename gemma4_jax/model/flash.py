"""Attention of several tokens by kernels that never have its scores in memory. The kernels are others'; which runs is one choice.

  'xla'               `attention.attend_causal` and `attend_blocked`: any device, scores in blocks
  'splash'            JAX's for TPUs, jax.experimental.pallas.ops.tpu.splash_attention, forward and backward
  'splash_interpret'  the same in Pallas' interpreter: slow, for tests
  'auto'              what the device has (`hardware.platform`): splash on a TPU, else xla

A kernel takes `LEAST` tokens and more, all of which have keys; fewer are XLA's. One token that reads a quantized cache is
`turboquant.ops`'; of many, what the cache holds comes here decoded, a piece at a time, as `part`.
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
  K = k_BKSH.shape[1]
  q_BKGTH = jnp.moveaxis((q_BTNH * scale).reshape(B, T, K, N // K, H), 1, 3)
  run = functools.partial(_splash, causal=True, window=window, interpret=choose(asked) == 'splash_interpret')
  out_BKGTH = sharding.by_rows(run, q_BKGTH, k_BKSH, v_BKSH, q_seg_BT, k_seg_BS)
  return jnp.moveaxis(out_BKGTH, 3, 1).reshape(q_BTNH.shape)


def part(q_BKRH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, q_seg_BT: jax.Array, k_seg_BS: jax.Array, causal: bool,
         asked: str) -> tuple[jax.Array, jax.Array]:
  """Attention to some of the keys, forward only: (output [B, K, R, H], log of the sum of exp(q k), float32 [B, K, R]), from which the
  attention to all follows. A query that sees none of them has a sum so low that its output counts for nothing.

  Args:
    q_BKRH: query t of head g is t * G + g; the softmax scale multiplied in.
    causal: as `attend`; False: a query sees all keys of its segment.
  """
  B, K, R, H = q_BKRH.shape
  T = q_seg_BT.shape[1]
  run = functools.partial(_splash, causal=causal, window=None, interpret=choose(asked) == 'splash_interpret', sums=True)
  found = run(q_BKRH.reshape(B, K, T, R // T, H).swapaxes(2, 3), k_BKSH, v_BKSH, q_seg_BT, k_seg_BS)
  out, sums = (x.swapaxes(2, 3).reshape(B, K, R, *x.shape[4:]) for x in found)
  return out, sums


def _splash(q_BKGTH, k_BKSH, v_BKSH, q_seg_BT, k_seg_BS, *, causal, window, interpret, sums=False):
  """Output as the queries; with `sums` also the log of the sums, [B, K, G, T]."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash, splash_attention_mask as masks
  B, K, G, T, H = q_BKGTH.shape
  S = k_BKSH.shape[2]
  size = min(_BLOCK, -(-T // LEAST) * LEAST)
  queries = T + -T % size             # padding is of segment 0, as queries and as their keys
  keys = S + queries - T
  keys += -keys % size
  pad = lambda x, axis, to: jnp.pad(x, [(0, to - n if i == axis else 0) for i, n in enumerate(x.shape)])
  shape, offset = (queries, keys), S - T
  if not causal:
    one = masks.FullMask(shape)
  elif window is None or window >= keys:
    one = masks.CausalMask(shape, offset)
  else:
    one = masks.LocalMask(shape, (window - 1, 0), offset)
  kernel = splash.make_splash_mha(
      masks.MultiHeadMask([one] * (K * G)), head_shards=1, q_seq_shards=1, interpret=interpret, save_residuals=sums,
      block_sizes=splash.BlockSizes(size, size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size))
  row = lambda q, k, v, q_seg, k_seg: kernel(q, k, v, segment_ids=splash.SegmentIds(q_seg, k_seg))
  found = jax.vmap(row)(pad(q_BKGTH, 3, queries).reshape(B, K * G, queries, H), pad(k_BKSH, 2, keys), pad(v_BKSH, 2, keys),
                        pad(q_seg_BT, 1, queries), pad(k_seg_BS, 1, keys))
  whole = lambda x: x.reshape(B, K, G, *x.shape[2:])[:, :, :, :T]
  return (whole(found[0]), whole(found[1][0])) if sums else whole(found)
