"""Keys and values in few bits, under the interface of `kv_cache`.

  Quantized        global layers: codes of every token, and beside them the first and the newest ones as they are
  QuantizedRing    local layers: codes of one window

A token is encoded when it is appended, so of a prompt no more than the tokens of one call exist unquantized. Those see each other, the
sinks and the recent window exactly, and what is older as codes: softmax over the two is merged by log-sum-exp. So logits of a long
prompt depend a little on how it is cut into calls, and those of tokens that come one by one on `recent` alone. Where `flash` runs it
takes the parts of a prompt's chunk too, what is exact as it is and the codes decoded, some slots at a time.

Codes are of rotated keys and values: a query is rotated once and an output turned back once, not every token of the cache. Where the
values are a projection of their own, `fold` has their rotation in the weights.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

from gemma4_jax import kv_format, sharding
from gemma4_jax.config import VALUE, ModelConfig
from gemma4_jax.kv_format import KVFormat, LayerKV
from gemma4_jax.model import attention, flash, kv_cache
from gemma4_jax.turboquant import ops, rotation
from gemma4_jax.turboquant.quantizer import Quantizer

_DECODED = 4096   # slots that are decoded at once for a kernel of `flash`


def make(cfg: ModelConfig, batch: int, capacity: int, kv: kv_format.KV = 'exact', dtype=None) -> kv_cache.Cache:
  """An empty cache for `capacity` tokens a row; what is exact is in `dtype` or that of the activations.

  Args:
    kv: what `kv_format.make` takes.
  Raises:
    ValueError: no such format, heads that cannot be stored in it, or a kernel that cannot run here.
  """
  kv, dtype = kv_format.make(kv), jnp.dtype(dtype or cfg.dtype)
  check(kv)
  layers = {i: kv_cache.empty(layer.spec, batch, capacity, dtype, unified=layer.unified) if layer.exact else
            _empty(kv, layer, i in cfg.rotated_values, batch, capacity, dtype) for i, layer in kv.layers(cfg).items()}
  return kv_cache.start(batch, layers)


def check(kv: KVFormat) -> None:
  """Raises ValueError: the format names a kernel that this device has not."""
  try:
    ops.check(kv.kernel or None)
  except (NotImplementedError, ValueError) as error:
    raise ValueError(f'kv.kernel: {error}') from None


@struct.dataclass
class Codes:
  """Of one layer, and how to use them.

  Attributes:
    stored: of `parts`: keys and values, or of K=V layers values and the keys' rotated channels.
    rotated: whether values come rotated, by weights of `fold`.
  """
  stored: tuple[ops.Stored, ...]
  layer: LayerKV = struct.field(pytree_node=False)
  kv: KVFormat = struct.field(pytree_node=False)
  rotated: bool = struct.field(pytree_node=False)

  @property
  def parts(self) -> tuple[ops.Part, ...]:
    return _parts(self.layer, self.kv.grid)

  @property
  def slots(self) -> int:
    return self.stored[0].packed_BKSW.shape[2]

  def append(self, k_BTKH, v_BTKH, slot_BT, keep_BT) -> 'Codes':
    vectors = self._vectors(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
    kernel = self.kv.kernel or ops.choose_encode(self.parts, self.stored, k_BTKH.dtype)
    in_place = slot_BT.shape[1] == 1 and kernel != 'xla'     # a single token in any case, as by `kv_cache.write`

    def run(stored, vectors, slot_BT):
      found = []
      for part, old, x_BKTD, rotated in zip(self.parts, stored, vectors, (False, self.rotated)):
        how = {'rotated': rotated, 'implementation': kernel}
        found.append(ops.append(part, old, x_BKTD, slot_BT[:, 0], **how) if in_place else ops.encode(part, x_BKTD, **how))
      return tuple(found)

    new = sharding.by_rows(run, self.stored, vectors, slot_BT)
    if in_place:
      return self.replace(stored=new)
    put = lambda old, new: ops.Stored(kv_cache.write(old.packed_BKSW, new.packed_BKSW, slot_BT, keep_BT),
                                      kv_cache.write(old.scale_BKNS, new.scale_BKNS, slot_BT, keep_BT, axis=3))
    return self.replace(stored=tuple(map(put, self.stored, new)))

  def attend(self, q_BTNH, start_B, end_B, scale, key_scale_H, asked: str = 'xla') -> ops.Partial:
    """Of slots start <= s < end, for queries in the order of `attention.scores`; the output is turned back. Several tokens are
    taken by what is `asked` of `flash`, where it runs."""
    T = q_BTNH.shape[1]
    q_BKRD = self._rotated_queries(q_BTNH, scale, key_scale_H)
    if flash.runs(asked, T):
      attend = functools.partial(_attend_decoded, self.parts, tokens=T, asked=asked)
    else:   # several tokens share what is decoded of a slot, which kernels for one token would do again for each few of them
      attend = functools.partial(ops.attend, self.parts, implementation=(self.kv.kernel or None) if T == 1 else 'xla')
    partial = sharding.by_rows(attend, self.stored, q_BKRD, start_B, end_B)
    return partial._replace(o_BKGD=self._turn_back(partial.o_BKGD))

  def decode(self, dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, K, S, H]; not of K=V layers."""
    k, v = (part.decode_rotated(stored) for part, stored in zip(self.parts, self.stored))
    return self.parts[0].quantizer.unrotate(k).astype(dtype), self._turn_back(v).astype(dtype)

  def _vectors(self, k, v):
    """What the two parts hold, before they rotate it, of keys and values [..., H]."""
    return (_still_first(v, self.layer), _turning(k, self.layer)) if self.layer.unified else (k, v)

  def _turn_back(self, o):
    """Values, or sums of values, [..., H] as the layer made them."""
    if self.rotated:
      return o
    if not self.layer.unified:
      return self.parts[1].quantizer.unrotate(o)
    return _still_first_back(_by_block(self.parts[0].quantizer.unrotate, o, self.layer.k_dim), self.layer)

  def _rotated_queries(self, q_BTNH, scale, key_scale_H):
    q = (q_BTNH * scale).astype(jnp.float32)
    first, second = (part.quantizer for part in self.parts)
    if self.layer.unified:    # a still channel of a key is that of the value times the weight of the key norm
      still = q if key_scale_H is None else q * key_scale_H.astype(jnp.float32)
      still = _still_first(still, self.layer)[..., :-self.layer.k_dim]
      q = jnp.concatenate([_by_block(first.rotate, still, self.layer.k_dim), second.rotate(_turning(q, self.layer))], axis=-1)
    else:
      q = first.rotate(q)
    return _by_kv_head(q.astype(q_BTNH.dtype), self.layer.spec.num_kv_heads)


@struct.dataclass
class Quantized:
  """Slot s of the codes holds position s.

  Attributes:
    exact: `recent` + `sinks` slots: the first positions, and then those after them, each modulo `recent`.
  """
  codes: Codes
  exact: kv_cache.Dense | kv_cache.Unified

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    sinks, recent, pos_BT = self.codes.layer.sinks, self.codes.layer.recent, stream.pos_BT
    fresh = self.exact.of(k_BTKH, v_BTKH)
    slot_BT = jnp.where(pos_BT < sinks, pos_BT, sinks + (pos_BT - sinks) % recent)
    keep_BT = kv_cache.newest(stream, recent) | (stream.seg_BT > 0) & (pos_BT < sinks)
    after = Quantized(self.codes.append(k_BTKH, v_BTKH, pos_BT, stream.seg_BT > 0),
                      kv_cache.write(self.exact, fresh, slot_BT, keep_BT))
    first_B = jnp.maximum(pos_BT[:, 0] + 1 - recent, sinks)   # of what is seen exactly; an ended row may have lost the one before it
    if k_BTKH.shape[1] == 1:
      return _Seen(after, after.exact, self._positions(kv_cache.length(stream), first_B), first_B, key_scale_H)
    both = jax.tree.map(lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=2), self.exact, fresh)
    pos_BS = jnp.concatenate([self._positions(pos_BT[:, 0], first_B), jnp.where(stream.seg_BT > 0, pos_BT, -1)], axis=1)
    return _Seen(after, both, pos_BS, first_B, key_scale_H)

  def _positions(self, length_B, first_B):
    """[B, sinks + recent], -1 where there is none to be seen."""
    sinks, recent = self.codes.layer.sinks, self.codes.layer.recent
    sink_S = jnp.arange(sinks)
    sinks_BS = jnp.where(sink_S < length_B[:, None], sink_S, -1)
    recent_BS = sinks + kv_cache.last_with(length_B - sinks, recent)
    return jnp.concatenate([sinks_BS, jnp.where(recent_BS >= first_B[:, None], recent_BS, -1)], axis=1)


@struct.dataclass
class _Seen:
  """What tokens read: codes from the sinks up to `first_B`, and the rest exactly."""
  cache: Quantized
  exact: kv_cache.Dense | kv_cache.Unified
  pos_BS: jax.Array
  first_B: jax.Array
  key_scale_H: jax.Array | None

  def attend(self, q_BTNH, stream, window, scale):
    codes, asked = self.cache.codes, stream.implementation
    old = codes.attend(q_BTNH, jnp.full_like(self.first_B, codes.layer.sinks), self.first_B, scale, self.key_scale_H, asked)
    seg_BS, v_BKSH = (self.pos_BS >= 0).astype(jnp.int32), self.exact.v_BKSH.astype(q_BTNH.dtype)
    if flash.runs(asked, q_BTNH.shape[1]):   # the tokens that were appended, and before them what they all see, in any order
      attend = lambda *x: ops.of_output(*flash.part(*x, causal=True, asked=asked))
      new = sharding.by_rows(attend, _by_kv_head(q_BTNH * scale, v_BKSH.shape[1]),
                             self.exact.keys(self.key_scale_H).astype(q_BTNH.dtype), v_BKSH, stream.seg_BT, seg_BS)
    else:
      seen_BTS = attention.see(stream, self.pos_BS, seg_BS, window)
      scores_BKRS = self.exact.scores(q_BTNH, scale, self.key_scale_H)
      seen = jnp.repeat(seen_BTS, scores_BKRS.shape[2] // seen_BTS.shape[1], axis=1)[:, None]     # query t of head g is t * G + g
      new = ops.exact(scores_BKRS, v_BKSH, seen)
    return _heads(ops.normalize(ops.merge(old, new)), q_BTNH)


@struct.dataclass
class QuantizedRing:
  """Slot s holds the last position that is s modulo the slots."""
  codes: Codes

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    slots = self.codes.slots
    after = QuantizedRing(self.codes.append(k_BTKH, v_BTKH, stream.pos_BT % slots, kv_cache.newest(stream, slots)))
    if k_BTKH.shape[1] == 1:   # the token took the slot of the one that has just left its window
      return _SeenRing(after, jnp.minimum(kv_cache.length(stream), slots))
    fresh = kv_cache.Ring(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
    return kv_cache.RingAndFresh(after, kv_cache.Ring(*self.codes.decode(k_BTKH.dtype)), fresh, stream)


@struct.dataclass
class _SeenRing:
  """What a single token reads: all slots, whose order is no matter."""
  cache: QuantizedRing
  end_B: jax.Array

  def attend(self, q_BTNH, stream, window, scale):
    return _heads(ops.normalize(self.cache.codes.attend(q_BTNH, jnp.zeros_like(self.end_B), self.end_B, scale, None)), q_BTNH)


def fold(cfg: ModelConfig, params: dict, kv: kv_format.KV) -> tuple[ModelConfig, dict]:
  """The same function, in weights whose values come rotated: W_V <- R W_V, and W_O <- W_O R^T in all layers that read them.

  Of every layer that `kv` quantizes and that has values of its own; the others' are rotated and turned back beside the weights. Exact,
  as the norm of values has no weight: rms(R v) = R rms(v). Computed in float32 and rounded to the dtype of the weights.

  Args:
    params: the canonical tree; other leaves are the same arrays.
  Returns:
    cfg with `rotated_values`, and the parameters. They work with any cache.
  Raises:
    ValueError: weights that are folded or quantized already, or stacked.
  """
  held = kv_format.make(kv).layers(cfg)
  folded = tuple(i for i, layer in held.items() if not layer.exact and not layer.spec.k_eq_v and layer.spec.inject != VALUE)
  if not folded:
    return cfg, params
  if cfg.rotated_values or 'params' in params or 'layer_0' not in params:
    raise ValueError('params: values are rotated in weights that are per layer, in floating point, and not rotated yet')
  params = dict(params)
  for i, spec in enumerate(cfg.layers):
    donor = i if spec.kv_from is None else spec.kv_from
    if donor in folded:
      layer = dict(params[f'layer_{i}'])
      attended = dict(layer['attention'])
      R = _parts(held[donor], 'uniform')[1].quantizer.matrix
      if donor == i:
        attended['v'] = {'w': _fold_v(attended['v']['w'], R)}
      attended['o'] = {'w': _fold_o(attended['o']['w'], R)}
      params[f'layer_{i}'] = layer | {'attention': attended}
  return cfg.replace(rotated_values=folded), params


@jax.jit
def _fold_v(w_KHD, R):
  return jnp.einsum('GH,KHD->KGD', R, w_KHD.astype(jnp.float32), precision='highest').astype(w_KHD.dtype)


@jax.jit
def _fold_o(w_DNH, R):
  return rotation.apply(R, w_DNH).astype(w_DNH.dtype)


def describe(cfg: ModelConfig, kv: kv_format.KV, capacity: int = 4096) -> str:
  """One line: for every kind of layer what it keeps, bytes a token, and what runs its attention at a batch of 1, and makes its codes
  if that is another."""
  kv = kv_format.make(kv)
  layers, width, found = kv.layers(cfg), jnp.dtype(cfg.dtype).itemsize, {}
  cache = jax.eval_shape(lambda: make(cfg, 1, capacity, kv))
  for i, layer in layers.items():
    held = cache.layers[i]
    kernel = 'xla' if layer.exact else kv.kernel or ops.choose(
        held.codes.parts, held.codes.stored, jax.eval_shape(held.codes._rotated_queries, jax.ShapeDtypeStruct(
            (1, 1, cfg.num_heads, layer.spec.head_dim), cfg.dtype), 1.0, None))
    kind = f'local, window {layer.spec.window}' if layer.spec.window else 'global'
    beside = f', newest {layer.recent} and first {layer.sinks} exact' if layer.recent else ''
    encoder = kernel if layer.exact else kv.kernel or ops.choose_encode(held.codes.parts, held.codes.stored, jnp.dtype(cfg.dtype))
    kernel += '' if encoder == kernel else f', codes made by {encoder}'
    what = f'{kind}: {layer}{beside}, {layer.slot_bytes(width):,} bytes a token, {kernel}'
    found[what] = found.get(what, 0) + 1
  said = f'kv {kv}: ' + '; '.join(f'{count} {what}' for what, count in found.items())
  asked = any(getattr(kv, f'{kind}_k') != kv_format.EXACT for kind in ('local', 'separate', 'unified'))
  if asked and all(layer.exact for layer in layers.values()):
    said += '; nothing is quantized' + (': the last global layer that makes K/V is kept exact (exact_last)' if kv.exact_last else '')
  return said


def _empty(kv, layer, rotated, batch, capacity, dtype):
  K, slots = layer.spec.num_kv_heads, layer.slots(capacity)

  def stored(part):
    found = jax.eval_shape(part.encode_rotated, jax.ShapeDtypeStruct((batch, K, slots, part.dim), jnp.float32))
    return ops.Stored(*(jnp.zeros(x.shape, x.dtype) for x in found))

  codes = Codes(tuple(map(stored, _parts(layer, kv.grid))), layer, kv, rotated)
  if layer.spec.window is not None:
    return QuantizedRing(codes)
  beside = lambda dim: jnp.zeros((batch, K, layer.recent + layer.sinks, dim), dtype)
  k, v = beside(layer.k_dim), beside(layer.spec.head_dim)
  return Quantized(codes, kv_cache.Unified(v, k) if layer.unified else kv_cache.Dense(k, v))


@functools.lru_cache
def _parts(layer: LayerKV, grid: str) -> tuple[ops.Part, ...]:
  def quantizer(dim, bits):   # at 2 and 3 bits an unbiased scale would cost too much noise
    return Quantizer(dim, bits, grid='absmax' if bits == 8 else grid, scale='unbiased' if bits >= 4 else 'norm_matched')
  if layer.unified:
    return ops.unified(quantizer(layer.k_dim, layer.v_bits), quantizer(layer.k_dim, layer.k_bits), layer.blocks)
  return ops.separate(quantizer(layer.k_dim, layer.k_bits), quantizer(layer.spec.head_dim, layer.v_bits))


def _attend_decoded(parts, stored, q_BKRD, start_B, end_B, *, tokens, asked) -> ops.Partial:
  """As `ops.attend`, by `flash.part`: a piece of the slots is decoded in the queries' dtype, and read by all of them."""
  seg_BT = jnp.ones((q_BKRD.shape[0], tokens), jnp.int32)

  def attend(cut, seen_BC):
    decoded = [part.decode_rotated(x) for part, x in zip(parts, cut)]
    decoded = [jnp.where(seen_BC[:, None, :, None], x, 0).astype(q_BKRD.dtype) for x in decoded]   # a slot never written may hold anything
    of = lambda role: jnp.concatenate([x[..., :getattr(part, role) * part.quantizer.dim] for part, x in zip(parts, decoded)], axis=-1)
    return ops.of_output(*flash.part(q_BKRD, of('keys'), of('values'), seg_BT, seen_BC.astype(jnp.int32), causal=False, asked=asked))

  return ops.over_slots(parts, stored, q_BKRD, start_B, end_B, attend, most=_DECODED)


def _by_kv_head(x_BTNH, heads: int):
  """[B, K, T * G, H]: query t of head g is t * G + g."""
  B, T, N, H = x_BTNH.shape
  return x_BTNH.reshape(B, T, heads, N // heads, H).swapaxes(1, 2).reshape(B, heads, -1, H)


def _heads(o_BKRH, q_BTNH):
  B, T, N, H = q_BTNH.shape
  K = o_BKRH.shape[1]
  return o_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _turning(x, layer: LayerKV):
  half, turned = x.shape[-1] // 2, layer.k_dim // 2
  return jnp.concatenate([x[..., :turned], x[..., half:half + turned]], axis=-1)


def _still_first(x, layer: LayerKV):
  """Channels [..., H] in the order of the blocks: those that RoPE leaves, then those that it turns."""
  half, turned = x.shape[-1] // 2, layer.k_dim // 2
  return jnp.concatenate([x[..., turned:half], x[..., half + turned:], _turning(x, layer)], axis=-1)


def _still_first_back(x, layer: LayerKV):
  half, turned = x.shape[-1] // 2, layer.k_dim // 2
  still = half - turned
  one, two, a, b = jnp.split(x, [still, 2 * still, 2 * still + turned], axis=-1)
  return jnp.concatenate([a, one, b, two], axis=-1)


def _by_block(function, x, size: int):
  """`function` of every run of `size` channels."""
  return function(x.reshape(*x.shape[:-1], -1, size)).reshape(x.shape)
