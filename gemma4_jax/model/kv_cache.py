"""Keys and values kept between calls: for every kind of layer what it needs, and no more.

  Dense     a slot for every position: global layers
  Ring      exactly one window of slots, position p in slot p mod window: local layers
  Unified   values, and of the keys the rotated channels alone: global layers whose values are their keys (K=V)

A layer that borrows K/V has none: it is handed what its donor read, which has no `append`.

`append(k, v, stream, key_scale)` takes the tokens of one call and returns what they may read: an object with `attend`, as
`attention.FreshKV` has, and `cache`, to keep for the next call. The tokens of a row follow on what the row has: their
positions count up from its length, and padding (segment 0) stands behind them, is not written and not seen.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from gemma4_jax import kv_format
from gemma4_jax.config import LayerSpec, ModelConfig
from gemma4_jax.model import attention, flash


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
  return start(batch, {i: empty(spec, batch, capacity, dtype, unified=unified and kv_format.unifies(cfg, spec))
                       for i, spec in enumerate(cfg.layers) if spec.kv_from is None})


def start(batch: int, layers: dict) -> Cache:
  """Of layers without a token."""
  return Cache(jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32), layers)


def empty(spec: LayerSpec, batch: int, capacity: int, dtype, *, unified: bool) -> 'Dense | Ring | Unified':
  """A layer's."""
  shape = lambda slots, dim: jnp.zeros((batch, spec.num_kv_heads, slots, dim), dtype)
  if spec.window is not None and spec.window < capacity:
    return Ring(shape(spec.window, spec.head_dim), shape(spec.window, spec.head_dim))
  if unified:
    return Unified(shape(capacity, spec.head_dim), shape(capacity, kv_format.rotated_dim(spec)))
  return Dense(shape(capacity, spec.head_dim), shape(capacity, spec.head_dim))


@struct.dataclass
class Dense:
  """Slot s holds position s."""
  k_BKSH: jax.Array
  v_BKSH: jax.Array

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    return _read(write(self, self.of(k_BTKH, v_BTKH), stream.pos_BT, stream.seg_BT > 0), k_BTKH, v_BTKH, stream)

  def positions(self, length_B):
    return _numbered(self.k_BKSH.shape[2], length_B)

  def of(self, k_BTKH, v_BTKH):
    """The same of other tokens."""
    return Dense(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))

  def keys(self, key_scale_H):
    return self.k_BKSH

  def scores(self, q_BTNH, scale, key_scale_H):
    """As `attention.scores`."""
    return attention.scores(q_BTNH, self.k_BKSH.astype(q_BTNH.dtype), scale)


@struct.dataclass
class Unified:
  """Values [B, K, S, H] and the rotated channels [B, K, S, R] of the keys. The other channels of a key are those of the value
  times the weight of the key norm, which the query takes over: q . k = (q * key_scale) . v + q_rotated . k_rotated."""
  v_BKSH: jax.Array
  k_BKSR: jax.Array

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    return _read(write(self, self.of(k_BTKH, v_BTKH), stream.pos_BT, stream.seg_BT > 0), k_BTKH, v_BTKH, stream, key_scale_H)

  def positions(self, length_B):
    return _numbered(self.v_BKSH.shape[2], length_B)

  def of(self, k_BTKH, v_BTKH):
    """The same of other tokens."""
    return Unified(v_BTKH.swapaxes(1, 2), self.rotated(k_BTKH).swapaxes(1, 2))

  def keys(self, key_scale_H):
    """Whole, [B, K, S, H]."""
    half, turned = self.v_BKSH.shape[-1] // 2, self.k_BKSR.shape[-1] // 2
    still = self.v_BKSH if key_scale_H is None else self.v_BKSH * key_scale_H.astype(self.v_BKSH.dtype)
    return jnp.concatenate([self.k_BKSR[..., :turned], still[..., turned:half], self.k_BKSR[..., turned:], still[..., half + turned:]], -1)

  def scores(self, q_BTNH, scale, key_scale_H):
    """As `attention.scores`."""
    v_BKSH, k_BKSR = self.v_BKSH.astype(q_BTNH.dtype), self.k_BKSR.astype(q_BTNH.dtype)
    half, turned = q_BTNH.shape[-1] // 2, k_BKSR.shape[-1] // 2
    weight_H = jnp.where(jnp.arange(2 * half) % half < turned, 0, 1.0 if key_scale_H is None else key_scale_H)
    still = attention.scores((q_BTNH * weight_H).astype(q_BTNH.dtype), v_BKSH, scale)
    return still + attention.scores(self.rotated(q_BTNH), k_BKSR, scale) if turned else still

  def rotated(self, x_BTNH):
    """The channels that RoPE turns, [..., R]."""
    half, turned = x_BTNH.shape[-1] // 2, self.k_BKSR.shape[-1] // 2
    return jnp.concatenate([x_BTNH[..., :turned], x_BTNH[..., half:half + turned]], axis=-1)


@struct.dataclass
class Ring:
  """Slot s holds the last position that is s modulo the window."""
  k_BKSH: jax.Array
  v_BKSH: jax.Array

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    window, length_B = self.k_BKSH.shape[2], length(stream)
    fresh = Ring(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
    after = write(self, fresh, stream.pos_BT % window, newest(stream, window))
    if k_BTKH.shape[1] == 1:   # the token took the slot of the one that has just left its window
      return _Slots(after, length_B)
    return RingAndFresh(after, self, fresh, stream)

  def positions(self, length_B):
    return last_with(length_B, self.k_BKSH.shape[2])

  def scores(self, q_BTNH, scale, key_scale_H):
    """As `attention.scores`."""
    return attention.scores(q_BTNH, self.k_BKSH.astype(q_BTNH.dtype), scale)


@struct.dataclass
class _Slots:
  """What tokens read that are in the cache already."""
  cache: Dense | Unified | Ring
  length_B: jax.Array
  key_scale_H: jax.Array | None = None

  def attend(self, q_BTNH, stream, window, scale):
    pos_BS = self.cache.positions(self.length_B)

    def block(q_BTNH, stream):
      seen = attention.see(stream, pos_BS, (pos_BS >= 0).astype(jnp.int32), window)
      logits = self.cache.scores(q_BTNH, scale, self.key_scale_H)
      return attention.mix(logits, self.cache.v_BKSH.astype(q_BTNH.dtype), seen, q_BTNH.shape)
    return attention.in_blocks(block, q_BTNH, stream, pos_BS.shape[1])


def _read(after: Dense | Unified, k_BTKH, v_BTKH, stream, key_scale_H=None) -> '_Slots | _SlotsAndFresh':
  slots = _Slots(after, length(stream), key_scale_H)
  if not flash.runs(stream.implementation, k_BTKH.shape[1]):
    return slots
  return _SlotsAndFresh(slots, Dense(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)), stream)


@struct.dataclass
class _SlotsAndFresh:
  """What many tokens read by a kernel, which knows no positions: the slots of those before them, and themselves in their order."""
  slots: _Slots
  fresh: Dense
  stream: attention.Stream   # of the fresh

  @property
  def cache(self):
    return self.slots.cache

  def attend(self, q_BTNH, stream, window, scale):
    if q_BTNH.shape[1] != self.fresh.k_BKSH.shape[2]:   # the last token alone
      return self.slots.attend(q_BTNH, stream, window, scale)
    held, fresh = self.cache, self.fresh
    before_BS = jnp.arange(held.v_BKSH.shape[2]) < self.stream.pos_BT[:, :1]
    both = lambda old, new, axis=2: jnp.concatenate([old.astype(new.dtype), new], axis)
    # a cache with a slot for every position is no longer than the window, if there is one
    return flash.attend(q_BTNH, both(held.keys(self.slots.key_scale_H), fresh.k_BKSH), both(held.v_BKSH, fresh.v_BKSH),
                        stream.seg_BT, both(before_BS, self.stream.seg_BT, 1), None, scale, stream.implementation)


@struct.dataclass
class RingAndFresh:
  """What several tokens read: the window before them, and themselves."""
  cache: Any   # what is kept
  before: Ring
  fresh: Ring   # in the order of the tokens
  stream: attention.Stream   # of the keys; the queries may be some of its tokens only

  def attend(self, q_BTNH, stream, window, scale):
    slots, start_B = self.before.k_BKSH.shape[2], self.stream.pos_BT[:, 0]
    pos_BW = start_B[:, None] - slots + jnp.arange(slots)
    in_order = lambda x: jnp.take_along_axis(x, (pos_BW % slots)[:, None, :, None], axis=2)
    before = attention.Before(in_order(self.before.k_BKSH).astype(q_BTNH.dtype), in_order(self.before.v_BKSH).astype(q_BTNH.dtype),
                              pos_BW, (pos_BW >= 0).astype(jnp.int32))
    k_BKTH, v_BKTH = self.fresh.k_BKSH, self.fresh.v_BKSH
    both = lambda one, two, axis: jnp.concatenate([one, two], axis=axis)
    if q_BTNH.shape[1] == k_BKTH.shape[2] and flash.runs(stream.implementation, q_BTNH.shape[1]):
      return flash.attend(q_BTNH, both(before.k_BKWH, k_BKTH, 2), both(before.v_BKWH, v_BKTH, 2), stream.seg_BT,
                          both(before.seg_BW, self.stream.seg_BT, 1), window, scale, stream.implementation)
    if q_BTNH.shape[1] == k_BKTH.shape[2] >= window:
      return attention.attend_blocked(q_BTNH, k_BKTH, v_BKTH, stream, window, scale, before)
    seen = attention.see(stream, both(pos_BW, self.stream.pos_BT, 1), both(before.seg_BW, self.stream.seg_BT, 1), window)
    return attention.attend(q_BTNH, both(before.k_BKWH, k_BKTH, 2), both(before.v_BKWH, v_BKTH, 2), seen, scale)


def length(stream) -> jax.Array:
  """[B], tokens a row holds after those of the call."""
  return stream.pos_BT[:, 0] + (stream.seg_BT > 0).sum(1, dtype=jnp.int32)


def newest(stream, count: int) -> jax.Array:
  """bool [B, T]: whether a token of the call is among the last `count` of its row after it."""
  return (stream.seg_BT > 0) & (stream.pos_BT >= length(stream)[:, None] - count)


def last_with(length_B, slots: int) -> jax.Array:
  """[B, slots]: the last position that is s modulo `slots` among those below the length; negative where there is none."""
  last_B1 = length_B[:, None] - 1
  return last_B1 - (last_B1 - jnp.arange(slots)) % slots


def _numbered(slots, length_B):
  """[B, S]: the position in each slot, where that is the slot's number; -1 where the row has not come that far."""
  slot_S = jnp.arange(slots, dtype=jnp.int32)
  return jnp.where(slot_S < length_B[:, None], slot_S, -1)


def write(into, fresh, slot_BT, keep_BT, axis: int = 2):
  """Puts token t of row b into slot_BT[b, t] if it is to be kept.

  A single token is written in any case, for a condition would copy the cache: that of a row which has ended lands in the slot
  of its next one, which nobody sees.

  Args:
    into: a tree of arrays [B, ...] with slots along `axis`.
    fresh: the same tree of the tokens.
  """
  return jax.tree.map(lambda into, x: _write(into, x.astype(into.dtype), slot_BT, keep_BT, axis - 1), into, fresh)


def _write(into, x, slot_BT, keep_BT, axis):
  if slot_BT.shape[1] > 1:
    slot_BT = jnp.where(keep_BT, slot_BT, into.shape[axis + 1])
    put = lambda row, slot_T, x: row.at[(slice(None),) * axis + (slot_T,)].set(x, mode='drop')
    return jax.vmap(put)(into, slot_BT, x)
  put = lambda row, slot_1, x: jax.lax.dynamic_update_slice_in_dim(row, x, slot_1[0], axis=axis)
  rows = lambda into, x, slot_BT, keep_BT: jax.vmap(put)(into, slot_BT, x)

  def hidden(into, x, slot_BT, keep_BT):   # could XLA:CPU see through to it, it would do it twice, in a copy for the matmul that reads it
    return jax.lax.cond(keep_BT[0, 0], lambda into: put(into[0], slot_BT[0], x[0])[None], lambda into: into, into)

  if len(into) > 1:
    return rows(into, x, slot_BT, keep_BT)
  return jax.lax.platform_dependent(into, x, slot_BT, keep_BT, cpu=hidden, default=rows)
