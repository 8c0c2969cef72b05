"""Keys and values kept between calls: for every kind of layer what it needs, and no more.

  Dense     a slot for every position: global layers
  Ring      exactly one window of slots, position p in slot p mod window: local layers
  Unified   values, and of the keys the rotated channels alone: global layers whose values are their keys (K=V)

A layer that borrows K/V has none: it is handed what its donor read, which has no `append`.

`append(k, v, stream, key_scale)` takes the tokens of one call and returns what they may read: an object with `attend`, as
`attention.FreshKV` has, and `cache`, to keep for the next call. The tokens of a row follow on what the row has: their
positions count up from its length, and padding (segment 0) stands behind them, is not written and not seen.
"""

from flax import struct
import jax
import jax.numpy as jnp

from gemma4_jax import size
from gemma4_jax.config import LayerSpec, ModelConfig
from gemma4_jax.model import attention


@struct.dataclass
class Cache:
  """Of one model and batch.

  Attributes:
    length_B: int32, tokens that each row holds.
    last_B: int32, the last of them: bigram embeddings look one token back.
    layers: layer -> Dense, Ring or Unified; borrowing layers are not there.
  """
  length_B: jax.Array
  last_B: jax.Array
  layers: dict

  @property
  def nbytes(self) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))


def make(cfg: ModelConfig, batch: int, capacity: int, dtype=None, *, unified: bool = True) -> Cache:
  """An empty cache for `capacity` tokens a row, in `dtype` or that of the activations.

  Args:
    unified: False stores keys and values of K=V layers apart.
  """
  dtype = jnp.dtype(dtype or cfg.dtype)

  def layer(spec: LayerSpec):
    shape = lambda slots, dim: jnp.zeros((batch, spec.num_kv_heads, slots, dim), dtype)
    if spec.window is not None and spec.window < capacity:
      return Ring(shape(spec.window, spec.head_dim), shape(spec.window, spec.head_dim))
    if unified and size.unifies(cfg, spec):
      return Unified(shape(capacity, spec.head_dim), shape(capacity, size.rotated_dim(spec)))
    return Dense(shape(capacity, spec.head_dim), shape(capacity, spec.head_dim))

  return Cache(jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32),
               {i: layer(spec) for i, spec in enumerate(cfg.layers) if spec.kv_from is None})


@struct.dataclass
class Dense:
  """Slot s holds position s."""
  k_BKSH: jax.Array
  v_BKSH: jax.Array

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    write = lambda into, x: _write(into, stream.pos_BT, stream.seg_BT > 0, x)
    return _Slots(Dense(write(self.k_BKSH, k_BTKH), write(self.v_BKSH, v_BTKH)), _length(stream))

  def positions(self, length_B):
    return _numbered(self.k_BKSH.shape[2], length_B)

  def read(self, q_BTNH, seen_BTS, scale, key_scale_H):
    return attention.attend(q_BTNH, self.k_BKSH.astype(q_BTNH.dtype), self.v_BKSH.astype(q_BTNH.dtype), seen_BTS, scale)


@struct.dataclass
class Unified:
  """Values [B, K, S, H] and the rotated channels [B, K, S, R] of the keys. The other channels of a key are those of the value
  times the weight of the key norm, which the query takes over: q . k = (q * key_scale) . v + q_rotated . k_rotated."""
  v_BKSH: jax.Array
  k_BKSR: jax.Array

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    write = lambda into, x: _write(into, stream.pos_BT, stream.seg_BT > 0, x)
    after = Unified(write(self.v_BKSH, v_BTKH), write(self.k_BKSR, self._rotated(k_BTKH)))
    return _Slots(after, _length(stream), key_scale_H)

  def positions(self, length_B):
    return _numbered(self.v_BKSH.shape[2], length_B)

  def read(self, q_BTNH, seen_BTS, scale, key_scale_H):
    v_BKSH, k_BKSR = self.v_BKSH.astype(q_BTNH.dtype), self.k_BKSR.astype(q_BTNH.dtype)
    half, turned = q_BTNH.shape[-1] // 2, k_BKSR.shape[-1] // 2
    weight_H = jnp.where(jnp.arange(2 * half) % half < turned, 0, 1.0 if key_scale_H is None else key_scale_H)
    still_BTNH = (q_BTNH * weight_H).astype(q_BTNH.dtype)
    logits = attention.scores(still_BTNH, v_BKSH, scale) + attention.scores(self._rotated(q_BTNH), k_BKSR, scale)
    return attention.mix(logits, v_BKSH, seen_BTS, q_BTNH.shape)

  def _rotated(self, x_BTNH):
    half, turned = x_BTNH.shape[-1] // 2, self.k_BKSR.shape[-1] // 2
    return jnp.concatenate([x_BTNH[..., :turned], x_BTNH[..., half:half + turned]], axis=-1)


@struct.dataclass
class Ring:
  """Slot s holds the last position that is s modulo the window."""
  k_BKWH: jax.Array
  v_BKWH: jax.Array

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    window, length_B = self.k_BKWH.shape[2], _length(stream)
    keep_BT = (stream.seg_BT > 0) & (stream.pos_BT >= length_B[:, None] - window)
    write = lambda into, x: _write(into, stream.pos_BT % window, keep_BT, x)
    after = Ring(write(self.k_BKWH, k_BTKH), write(self.v_BKWH, v_BTKH))
    if k_BTKH.shape[1] == 1:   # the token took the slot of the one that has just left its window
      return _Slots(after, length_B)
    return _RingAndFresh(after, self, stream, k_BTKH, v_BTKH)

  def positions(self, length_B):
    slots, last_B1 = self.k_BKWH.shape[2], length_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(slots)) % slots

  def read(self, q_BTNH, seen_BTS, scale, key_scale_H):
    return attention.attend(q_BTNH, self.k_BKWH.astype(q_BTNH.dtype), self.v_BKWH.astype(q_BTNH.dtype), seen_BTS, scale)


@struct.dataclass
class _Slots:
  """What tokens read that are in the cache already."""
  cache: Dense | Unified | Ring
  length_B: jax.Array
  key_scale_H: jax.Array | None = None

  def attend(self, q_BTNH, stream, window, scale):
    pos_BS = self.cache.positions(self.length_B)
    seen = attention.see(stream, pos_BS, (pos_BS >= 0).astype(jnp.int32), window)
    return self.cache.read(q_BTNH, seen, scale, self.key_scale_H)


@struct.dataclass
class _RingAndFresh:
  """What several tokens read: the window before them, and themselves."""
  cache: Ring
  before: Ring
  stream: attention.Stream   # of the keys; the queries may be some of its tokens only
  k_BTKH: jax.Array
  v_BTKH: jax.Array

  def attend(self, q_BTNH, stream, window, scale):
    slots, start_B = self.before.k_BKWH.shape[2], self.stream.pos_BT[:, 0]
    pos_BW = start_B[:, None] - slots + jnp.arange(slots)
    in_order = lambda x: jnp.take_along_axis(x, (pos_BW % slots)[:, None, :, None], axis=2)
    before = attention.Before(in_order(self.before.k_BKWH).astype(q_BTNH.dtype), in_order(self.before.v_BKWH).astype(q_BTNH.dtype),
                              pos_BW, (pos_BW >= 0).astype(jnp.int32))
    k_BKTH, v_BKTH = self.k_BTKH.swapaxes(1, 2), self.v_BTKH.swapaxes(1, 2)
    if q_BTNH.shape[1] == k_BKTH.shape[2] >= window:
      return attention.attend_blocked(q_BTNH, k_BKTH, v_BKTH, stream, window, scale, before)
    both = lambda one, two, axis: jnp.concatenate([one, two], axis=axis)
    seen = attention.see(stream, both(pos_BW, self.stream.pos_BT, 1), both(before.seg_BW, self.stream.seg_BT, 1), window)
    return attention.attend(q_BTNH, both(before.k_BKWH, k_BKTH, 2), both(before.v_BKWH, v_BKTH, 2), seen, scale)


def _length(stream) -> jax.Array:
  """[B], tokens a row holds after those of the call."""
  return stream.pos_BT[:, 0] + (stream.seg_BT > 0).sum(1, dtype=jnp.int32)


def _numbered(slots, length_B):
  """[B, S]: the position in each slot, where that is the slot's number; -1 where the row has not come that far."""
  slot_S = jnp.arange(slots, dtype=jnp.int32)
  return jnp.where(slot_S < length_B[:, None], slot_S, -1)


def _write(into_BKSH, slot_BT, keep_BT, x_BTKH):
  """Puts token t of row b into slot_BT[b, t] if it is to be kept.

  A single token is written in any case, for a condition would copy the cache: that of a row which has ended lands in the slot
  of its next one, which nobody sees.
  """
  x_BKTH = x_BTKH.swapaxes(1, 2).astype(into_BKSH.dtype)
  if slot_BT.shape[1] == 1:
    put = lambda into_KSH, slot_1, x_K1H: jax.lax.dynamic_update_slice_in_dim(into_KSH, x_K1H, slot_1[0], axis=1)
    if len(into_BKSH) == 1 and jax.default_backend() == 'cpu':
      # XLA:CPU would do the update twice, in a copy for the matmul that reads it, could it see through to it
      return jax.lax.cond(keep_BT[0, 0], lambda into: put(into[0], slot_BT[0], x_BKTH[0])[None], lambda into: into, into_BKSH)
    return jax.vmap(put)(into_BKSH, slot_BT, x_BKTH)
  slot_BT = jnp.where(keep_BT, slot_BT, into_BKSH.shape[2])
  put = lambda into_KSH, slot_T, x_KTH: into_KSH.at[:, slot_T].set(x_KTH, mode='drop')
  return jax.vmap(put)(into_BKSH, slot_BT, x_BKTH)
