"""How keys and values are kept between calls: presets, formats of one's own, and what they come to in bytes. No JAX.

  kv_format.make('turboquant')                            # a preset
  kv_format.make('turboquant,unified_v=6,recent=64')      # a preset with fields of its own, as flags take it
  kv_format.make({'preset': 'turboquant', 'unified_v': 6})     # the same as a ConfigDict
"""

from collections.abc import Mapping
import dataclasses

from gemma4_jax.config import VALUE, LayerSpec, ModelConfig, nearest

EXACT = 16                          # bits: not quantized, in the dtype of activations
_BITS = (2, 3, 4, 5, 6, 8, EXACT)
_PAGE = 128                         # slots of codes are a multiple of it, as kernels need


@dataclasses.dataclass(frozen=True)
class KVFormat:
  """Bits of a number, for each kind of layer; 16: as it is.

  Attributes:
    local_k, local_v: of local layers, whose cache is one window and does not grow.
    separate_k, separate_v: of global layers that store keys and values.
    unified_v, unified_k: of K=V layers, which store values, and of the keys the rotated channels alone.
    unify: False stores keys and values of K=V layers apart.
    exact_last: the last global layer that makes K/V stays exact.
    recent: tokens of quantized global layers that are seen exactly, the newest ones; at least 1, the token itself.
    sinks: likewise, the first ones.
    grid: of up to 6 bits, 'uniform' (equal steps, which kernels decode with one subtraction) or 'lloyd_max' (18 % less error at 4
      bits, 39 % less at 6; a table, and plain XLA alone reads it). 8 bits are 'absmax'.
    kernel: what makes codes and runs the attention over them, of `turboquant.ops.IMPLEMENTATIONS`; '': the device's own, where it has
      one.
  """
  local_k: int = EXACT
  local_v: int = EXACT
  separate_k: int = EXACT
  separate_v: int = EXACT
  unified_k: int = EXACT
  unified_v: int = EXACT
  unify: bool = True
  exact_last: bool = True
  recent: int = 128
  sinks: int = 4
  grid: str = 'uniform'
  kernel: str = ''

  def __post_init__(self):
    for f in dataclasses.fields(self):
      value, kind = getattr(self, f.name), type(f.default)
      if type(value) is not kind:
        raise ValueError(f'kv.{f.name}: {value!r} is no {kind.__name__}')
    for kind in ('local', 'separate', 'unified'):
      k, v = getattr(self, f'{kind}_k'), getattr(self, f'{kind}_v')
      for name, bits in ((f'{kind}_k', k), (f'{kind}_v', v)):
        if bits not in _BITS:
          raise ValueError(f'kv.{name}: {bits} bits; it takes {", ".join(map(str, _BITS[:-1]))}, or {EXACT} for exact')
      if (k == EXACT) != (v == EXACT):
        raise ValueError(f'kv.{kind}_k: {k} and kv.{kind}_v: {v}: both in few bits, or both {EXACT}')
    if self.recent < 1 or self.sinks < 0:
      raise ValueError(f'kv.recent: {self.recent}, kv.sinks: {self.sinks}: at least 1 and at least 0')
    if self.grid not in ('uniform', 'lloyd_max'):
      raise ValueError(f"kv.grid: {self.grid!r} is none of uniform, lloyd_max")

  def __str__(self) -> str:
    """What `make` makes it of: a preset, with the fields that differ."""
    preset, changed = min(((name, _changed(self, of)) for name, of in PRESETS.items()), key=lambda pair: len(pair[1]))
    return ','.join([preset, *(f'{name}={value}' for name, value in changed.items())])

  def layers(self, cfg: ModelConfig) -> dict[int, 'LayerKV']:
    """Layer -> what it keeps; layers that borrow K/V are not there."""
    owners = {i: spec for i, spec in enumerate(cfg.layers) if spec.kv_from is None}
    last = max((i for i, spec in owners.items() if spec.window is None), default=None)
    found = {}
    for i, spec in owners.items():
      unified = self.unify and unifies(cfg, spec)
      kind = 'local' if spec.window is not None else 'unified' if unified and _in_blocks(spec) else 'separate'
      k, v = (EXACT, EXACT) if i == last and self.exact_last else (getattr(self, f'{kind}_k'), getattr(self, f'{kind}_v'))
      keeps = (0, 0) if kind == 'local' or k == EXACT else (self.recent, self.sinks)
      found[i] = LayerKV(spec, kind == 'unified' or unified and k == EXACT, k, v, *keeps)
    return found


@dataclasses.dataclass(frozen=True)
class LayerKV:
  """What one layer keeps.

  Attributes:
    unified: values, and the rotated channels of keys; else keys and values.
    k_bits, v_bits: 16 where it is exact.
    recent, sinks: tokens beside the codes, exact.
  """
  spec: LayerSpec
  unified: bool
  k_bits: int
  v_bits: int
  recent: int
  sinks: int

  @property
  def exact(self) -> bool:
    return self.k_bits == EXACT

  @property
  def k_dim(self) -> int:
    """Numbers that are kept of a key."""
    return rotated_dim(self.spec) if self.unified else self.spec.head_dim

  @property
  def blocks(self) -> int:
    """Runs of a value's numbers with a scale each: as wide as the key's rotated channels where K and V are one."""
    return self.spec.head_dim // self.k_dim

  def slots(self, context: int) -> int:
    """That `context` tokens take."""
    slots = context if self.exact else -(-context // _PAGE) * _PAGE
    return slots if self.spec.window is None else min(self.spec.window, slots)

  def slot_bytes(self, width: int) -> int:
    """Of one token; `width` bytes a number that is not quantized."""
    k = self.k_dim * width if self.exact else _code_bytes(self.k_dim, self.k_bits, 1)
    v = self.spec.head_dim * width if self.exact else _code_bytes(self.spec.head_dim, self.v_bits, self.blocks)
    return self.spec.num_kv_heads * (k + v)

  def bytes(self, context: int, width: int) -> int:
    """Of one sequence, as allocated for `context` tokens."""
    beside = (self.recent + self.sinks) * self.spec.num_kv_heads * (self.k_dim + self.spec.head_dim) * width
    return self.slots(context) * self.slot_bytes(width) + beside

  def __str__(self) -> str:
    if self.exact:
      return 'V + rotated K exact' if self.unified else 'K V exact'
    return f'V{self.v_bits} + rotated K{self.k_bits}' if self.unified else f'K{self.k_bits} V{self.v_bits}'


def unifies(cfg: ModelConfig, spec: LayerSpec) -> bool:
  """Whether keys can be rebuilt from values: k = rope(v * key_scale). Not if one of the two alone is normed or changed."""
  return spec.k_eq_v and spec.inject != VALUE and cfg.v_norm == cfg.qk_norm


def rotated_dim(spec: LayerSpec) -> int:
  """Channels of a head that RoPE turns."""
  return 2 * int(spec.rope_fraction * spec.head_dim // 2)


def _in_blocks(spec: LayerSpec) -> bool:
  turned = rotated_dim(spec)
  return turned > 0 and spec.head_dim % turned == 0


def _code_bytes(dim: int, bits: int, scales: int) -> int:
  """Codes, and scales of 2 bytes, or 4 at 8 bits: see `turboquant.quantizer`."""
  return dim * bits // 8 + scales * (4 if bits == 8 else 2)


def _changed(one: KVFormat, other: KVFormat) -> dict:
  return {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)}


# Of the mean error and of bytes, see the table in README.md. Few bits go to K=V layers' values before they go to keys, whose error
# grows with the spread of logits; the layers of models with values of their own are few and sensitive, and get more.
PRESETS = {
    'exact': KVFormat(),
    'separate': KVFormat(unify=False),
    'quality': KVFormat(separate_k=8, separate_v=8, unified_k=8, unified_v=8),
    'turboquant': KVFormat(separate_k=6, separate_v=6, unified_k=8, unified_v=4),
    'extreme': KVFormat(local_k=5, local_v=4, separate_k=4, separate_v=4, unified_k=4, unified_v=4, exact_last=False),
}


KV = str | Mapping | KVFormat


def make(kv: KV) -> KVFormat:
  """A format of a preset's name, which fields may follow ('turboquant,recent=64'), or of a mapping of fields and 'preset'.

  Raises:
    ValueError: no such preset or field, or a value that it cannot have.
  """
  if isinstance(kv, KVFormat):
    return kv
  if isinstance(kv, str):
    preset, *rest = kv.split(',')
    fields = dict(part.partition('=')[::2] for part in rest)
  else:
    fields = dict(kv)
    preset = fields.pop('preset', 'exact')
  if preset not in PRESETS:
    raise ValueError(f'kv: {preset!r} is none of {", ".join(PRESETS)}')
  known = {f.name: type(f.default) for f in dataclasses.fields(KVFormat)}
  for name, value in fields.items():
    if name not in known:
      raise ValueError(f'kv.{name}: no such field; did you mean kv.{nearest(name, list(known))}?')
    if isinstance(kv, str):
      fields[name] = _parsed(name, value, known[name])
  return dataclasses.replace(PRESETS[preset], **fields)


def _parsed(name, text, kind):
  if kind is str:
    return text
  if kind is bool and text in ('True', 'False'):
    return text == 'True'
  if kind is int and text.isdecimal():
    return int(text)
  raise ValueError(f'kv.{name}: {text!r} is no {kind.__name__}' + (': True or False' if kind is bool else ''))
