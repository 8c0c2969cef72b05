"""Gemma 4 as numbers: the released variants, every ablation a field, unfolded once into one spec per layer.

Plain Python, no JAX: sizes, matched baselines and error messages need no device. Sources of the numbers: the Hugging Face
configs of the released checkpoints and google-deepmind/gemma `gemma/gm/nn/gemma4/_gemma4.py`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import functools
import itertools
import typing

# How the vector that an embedding arm makes for every token and layer enters a block (`LayerSpec.inject`).
GATE, UNGATED, VALUE, UP = 'gate', 'ungated', 'value', 'up'

# Embedding arm -> how its per-layer vector enters a block; None: nothing enters the blocks.
EMBEDDING_ARMS = {
    'none': None,
    'ple': GATE,                # as released in E2B and E4B
    'table_only': GATE,         # no context projection
    'projection_only': GATE,    # no token table
    'shared_table': GATE,       # one table row serves all layers
    'frozen_table': GATE,       # the table keeps its random initial values
    'permuted_table': GATE,     # the table is read through a fixed random permutation of the token ids
    'ungated': UNGATED,         # the gate is forced to 1
    'value': VALUE,             # value embeddings
    'bigram': None,             # hashed bigram vectors, added to the input embedding
    'stem': UP,                 # a token table in place of the up-projection
}
PLE_ARMS = tuple(arm for arm, inject in EMBEDDING_ARMS.items() if inject in (GATE, UNGATED))
PLE_PLACEMENTS = ('device', 'host', 'folded', 'folded_host')
PLE_TABLES = ('as_is', 'bfloat16', 'int8', 'int4')
WEIGHTS = ('as_is', 'int8', 'int4', 'nf4', *(f'turboquant{bits}' for bits in (2, 3, 4, 5, 6, 8)))   # of matrices: `model.quantized`

_CHOICES = {
    'embedding': tuple(EMBEDDING_ARMS),
    'activation': ('gelu', 'silu'),
    'ple_placement': PLE_PLACEMENTS,
    'ple_table': PLE_TABLES,
    'moe_implementation': ('auto', 'ragged', 'scan', 'gather'),
    'attention_implementation': ('auto', 'xla', 'splash', 'splash_interpret'),
    'remat': ('none', 'dots', 'full'),
    'matvec': ('xla', 'native'),
    'dtype': ('float32', 'bfloat16'),
    'param_dtype': ('float32', 'bfloat16'),
}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """All that tells one block from another. Two layers with equal specs compute the same function of their weights."""
  window: int | None      # keys a query sees, itself included; None: all before it (global layer)
  head_dim: int
  num_kv_heads: int
  rope_base: float
  rope_fraction: float    # share of head_dim that rotates
  k_eq_v: bool            # values reuse the key projection
  kv_from: int | None     # the layer whose K/V this one reads; None: it makes its own
  mlp_dim: int
  inject: str | None      # GATE, UNGATED, VALUE or UP; None: no per-layer vector
  inject_dim: int         # width of that vector; 0 without one


@dataclasses.dataclass(frozen=True)
class Group:
  """`repeats` times the same period of layers: what `jax.lax.scan` can run as one body."""
  start: int
  period: tuple[LayerSpec, ...]
  repeats: int

  @property
  def runs(self) -> tuple[tuple[int, int], ...]:
    """(first place, number of layers) of neighbours in the period that are alike: again one body, a scan within the scan."""
    alike = [len(list(run)) for _, run in itertools.groupby(self.period)]
    return tuple(zip(itertools.accumulate(alike, initial=0), alike))

  def layer(self, repeat: int, place: int) -> int:
    return self.start + repeat * len(self.period) + place

  def layers(self, run: int) -> tuple[tuple[int, ...], ...]:
    """The layers of a run, repeat by repeat."""
    place, count = self.runs[run]
    return tuple(tuple(self.layer(repeat, place + i) for i in range(count)) for repeat in range(self.repeats))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The text decoder of one Gemma 4 model. `from_dict` builds it from a ConfigDict; every contradiction is a ValueError."""
  vocab_size: int = 262_144
  width: int = 1536
  num_layers: int = 35
  mlp_dim: int = 6144
  double_wide_mlp: bool = False        # layers that borrow K/V get 2 * mlp_dim
  gated_mlp: bool = True               # act(x Wg) * (x Wu); False: act(x Wu)
  activation: str = 'gelu'             # gelu is the tanh approximation

  num_heads: int = 8
  num_kv_heads: int = 1
  global_num_kv_heads: int = 1
  head_dim: int = 256
  global_head_dim: int = 512
  pattern: str = 'LLLLG'               # L local, G global; repeated over the layers
  window: int = 512
  num_kv_shared_layers: int = 0        # the last so many layers borrow K/V
  k_eq_v: bool = False                 # in global layers
  attention_scale: float = 1.0
  qk_norm: bool = True
  v_norm: bool = True
  rope_base: float = 1e4
  rope_fraction: float = 1.0
  global_rope_base: float = 1e6
  global_rope_fraction: float = 0.25
  context_length: int = 131_072

  num_experts: int = 0                 # 0: dense
  num_experts_per_token: int = 0
  expert_dim: int = 0
  moe_dense_branch: bool = True        # a dense MLP beside the experts
  router_norm: bool = True             # weightless RMSNorm and learned scale before the router
  per_expert_scale: bool = True
  moe_implementation: str = 'auto'     # ragged: lax.ragged_dot; scan: over experts; gather: of expert weights

  post_norms: bool = True
  layer_scalar: bool = True
  final_softcap: float = 30.0          # 0: none
  tied_embeddings: bool = True
  norm_eps: float = 1e-6

  embedding: str = 'none'              # an arm of EMBEDDING_ARMS
  ple_dim: int = 256
  ple_every: int = 1                   # per-layer vectors in every k-th layer only ...
  ple_layers: tuple[int, ...] = ()     # ... or in these layers
  bigram_buckets: int = 0              # rows of the bigram table; 0: vocab_size
  ple_placement: str = 'device'        # of the PLE table: device or host memory; folded, folded_host: there, with all of PLE in it
  ple_table: str = 'as_is'             # stored as_is, bfloat16, int8 or int4; both as `model.ple_placement.place` makes it

  rotated_values: tuple[int, ...] = () # layers whose weights make values rotated, as `model.quantized_cache.fold` has them
  dtype: str = 'float32'               # of activations and matmuls
  param_dtype: str = 'float32'
  attention_implementation: str = 'auto'   # of many tokens: `model.flash`
  matvec: str = 'xla'                  # of at most 8 rows; native: our own on a CPU, without gradients (`native.matvec`)
  scan: bool = False                   # blocks run as a scan over periods and their runs of like layers, weights stacked
  remat: str = 'none'                  # none; dots: keep matmul outputs; full: keep block inputs

  def __post_init__(self):
    _check_types(self)
    _check(self)

  @functools.cached_property
  def layers(self) -> tuple[LayerSpec, ...]:
    first_shared = self.num_layers - self.num_kv_shared_layers
    kinds = [self.pattern[i % len(self.pattern)] for i in range(self.num_layers)]
    donor = {kind: i for i, kind in enumerate(kinds[:first_shared])}   # the last layer of each kind that owns K/V
    inject = EMBEDDING_ARMS[self.embedding]
    specs = []
    for i, kind in enumerate(kinds):
      local, shared = kind == 'L', i >= first_shared
      head_dim, kv_heads = (self.head_dim, self.num_kv_heads) if local else (self.global_head_dim, self.global_num_kv_heads)
      mlp_dim = self.mlp_dim * (2 if shared and self.double_wide_mlp else 1)
      chosen = i in self.ple_layers if self.ple_layers else (i + 1) % self.ple_every == 0
      dim = {GATE: self.ple_dim, UNGATED: self.ple_dim, UP: mlp_dim, VALUE: 0 if shared else kv_heads * head_dim, None: 0}[inject]
      dim = dim if chosen else 0
      specs.append(LayerSpec(
          window=self.window if local else None, head_dim=head_dim, num_kv_heads=kv_heads,
          rope_base=self.rope_base if local else self.global_rope_base,
          rope_fraction=self.rope_fraction if local else self.global_rope_fraction,
          k_eq_v=self.k_eq_v and not local, kv_from=donor[kind] if shared else None, mlp_dim=mlp_dim,
          inject=inject if dim else None, inject_dim=dim))
    return tuple(specs)

  @functools.cached_property
  def groups(self) -> tuple[Group, ...]:
    """The layers as few repeated periods as possible: E2B 3 + 4 of five layers, E4B 4 + 3 of six, 31B 10 of six."""
    specs, groups, start, n = self.layers, [], 0, self.num_layers
    while start < n:
      best, covered = (1, 1), 1
      for period in range(1, (n - start) // 2 + 1):
        repeats = 1
        while specs[start + repeats * period:start + (repeats + 1) * period] == specs[start:start + period]:
          repeats += 1
        if repeats > 1 and period * repeats > covered:
          best, covered = (period, repeats), period * repeats
      period, repeats = best
      groups.append(Group(start, specs[start:start + period], repeats))
      start += period * repeats
    return tuple(groups)

  @property
  def inject_layers(self) -> tuple[int, ...]:
    """The layers that get a per-layer vector from the embedding arm."""
    return tuple(i for i, spec in enumerate(self.layers) if spec.inject)

  @property
  def bigram_rows(self) -> int:
    """Rows of the bigram table."""
    return self.bigram_buckets or self.vocab_size

  @property
  def has_ple_table(self) -> bool:
    """Whether per-layer vectors of tokens come out of a table that `ple_placement` and `ple_table` are about."""
    return self.embedding in PLE_ARMS and self.embedding != 'projection_only'

  @property
  def ple_on_host(self) -> bool:
    return self.ple_placement in ('host', 'folded_host')

  @property
  def ple_folded(self) -> bool:
    return self.ple_placement in ('folded', 'folded_host')

  def replace(self, **fields) -> 'ModelConfig':
    return from_dict({**self.to_dict(), **fields})

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)


def from_dict(fields: Mapping) -> ModelConfig:
  """Builds a ModelConfig from a mapping or ConfigDict; an unknown name answers with the nearest known one."""
  known = [f.name for f in dataclasses.fields(ModelConfig)]
  given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
  for name in given:
    if name not in known:
      raise ValueError(f'model.{name}: no such field; did you mean model.{nearest(name, known)}?')
  return ModelConfig(**given)


def nearest(name: str, known: Sequence[str]) -> str:
  return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def check_trainable(cfg: ModelConfig) -> None:
  """Raises ValueError for a model whose PLE table is placed for inference: such a table is neither made, trained nor saved."""
  for field in ('ple_placement', 'ple_table'):
    default = getattr(ModelConfig, field)
    if getattr(cfg, field) != default:
      raise ValueError(f'model.{field}: {getattr(cfg, field)!r} is for inference; make, train, load and save the model with {default!r}, '
                       f'then model.ple_placement.place puts the table there')


def _check_types(cfg: ModelConfig) -> None:
  hints = typing.get_type_hints(ModelConfig)
  for f in dataclasses.fields(cfg):
    value, hint = getattr(cfg, f.name), hints[f.name]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
      object.__setattr__(cfg, f.name, float(value))
      continue
    kind = typing.get_origin(hint) or hint
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise ValueError(f'model.{f.name}: {value!r} is no {kind.__name__}')
    if kind is tuple and not all(isinstance(item, int) for item in value):
      raise ValueError(f'model.{f.name}: {value!r} is no list of integers')
    if f.name in _CHOICES and value not in _CHOICES[f.name]:
      near = nearest(value, _CHOICES[f.name])
      raise ValueError(f'model.{f.name}: {value!r} is none of {", ".join(_CHOICES[f.name])}; did you mean {near!r}?')


def _check(cfg: ModelConfig) -> None:
  def require(holds: bool, field: str, why: str):
    if not holds:
      raise ValueError(f'model.{field}: {getattr(cfg, field)!r} {why}')

  for field in ('vocab_size', 'width', 'num_layers', 'num_heads', 'num_kv_heads', 'global_num_kv_heads', 'head_dim',
                'global_head_dim', 'window', 'context_length', 'ple_every'):
    require(getattr(cfg, field) >= 1, field, 'is not positive')
  for field in ('num_kv_shared_layers', 'num_experts', 'num_experts_per_token', 'expert_dim', 'bigram_buckets', 'final_softcap'):
    require(getattr(cfg, field) >= 0, field, 'is negative')
  for field in ('norm_eps', 'attention_scale', 'rope_base', 'global_rope_base'):
    require(getattr(cfg, field) > 0, field, 'is not positive')
  for field in ('head_dim', 'global_head_dim'):
    require(getattr(cfg, field) % 2 == 0, field, 'is odd, and RoPE turns pairs of channels')
  for field in ('rope_fraction', 'global_rope_fraction'):
    require(0 <= getattr(cfg, field) <= 1, field, 'is no share between 0 and 1')
  for field in ('num_kv_heads', 'global_num_kv_heads'):
    require(cfg.num_heads % getattr(cfg, field) == 0, field, f'does not divide model.num_heads = {cfg.num_heads}')

  require(cfg.pattern != '' and set(cfg.pattern) <= set('LG'), 'pattern', 'is no string of L (local) and G (global)')
  kinds = [cfg.pattern[i % len(cfg.pattern)] for i in range(cfg.num_layers)]
  require(cfg.num_kv_shared_layers < cfg.num_layers, 'num_kv_shared_layers',
          f'leaves none of the {cfg.num_layers} layers of model.num_layers to own K/V')
  own, shared = kinds[:cfg.num_layers - cfg.num_kv_shared_layers], kinds[cfg.num_layers - cfg.num_kv_shared_layers:]
  require(set(shared) <= set(own), 'num_kv_shared_layers',
          f'leaves no layer of a kind to lend its K/V: owners {"".join(own)}, borrowers {"".join(shared)}')

  moe = cfg.num_experts > 0
  require(moe or cfg.num_experts_per_token == 0, 'num_experts_per_token', 'needs model.num_experts > 0')
  require(moe or cfg.expert_dim == 0, 'expert_dim', 'needs model.num_experts > 0')
  if moe:
    require(1 <= cfg.num_experts_per_token <= cfg.num_experts, 'num_experts_per_token',
            f'is not between 1 and model.num_experts = {cfg.num_experts}')
    require(cfg.expert_dim >= 1, 'expert_dim', 'is not positive')
  require(cfg.mlp_dim >= 1, 'mlp_dim', 'is not positive')

  require(not (cfg.ple_layers and cfg.ple_every != 1), 'ple_layers', f'contradicts model.ple_every = {cfg.ple_every}: give one of them')
  require(len(set(cfg.ple_layers)) == len(cfg.ple_layers) and all(0 <= i < cfg.num_layers for i in cfg.ple_layers),
          'ple_layers', f'names layers twice or outside 0..{cfg.num_layers - 1}')
  if EMBEDDING_ARMS[cfg.embedding] is not None:
    require(cfg.embedding not in PLE_ARMS or cfg.ple_dim >= 1, 'ple_dim', "is not positive; for no PLE set model.embedding='none'")
    require(cfg.ple_every <= cfg.num_layers, 'ple_every', f'is more than the {cfg.num_layers} layers of model.num_layers')
    require(bool(cfg.inject_layers), 'embedding', 'reaches no layer: see model.ple_layers, model.ple_every and model.num_kv_shared_layers')
  missing = f'needs a PLE table, which model.embedding={cfg.embedding!r} has not'
  require(cfg.has_ple_table or cfg.ple_placement == 'device', 'ple_placement', missing)
  require(cfg.has_ple_table or cfg.ple_table == 'as_is', 'ple_table', missing)
  require(cfg.embedding == 'ple' or not cfg.ple_folded, 'ple_placement', f"needs model.embedding='ple', not {cfg.embedding!r}")
  require(cfg.ple_dim % 2 == 0 or cfg.ple_table != 'int4', 'ple_table', f'packs pairs of numbers, and model.ple_dim = {cfg.ple_dim} is odd')
  if cfg.embedding == 'stem':
    require(cfg.gated_mlp, 'embedding', 'replaces the up-projection of a gated MLP: set model.gated_mlp')
    require(not moe or cfg.moe_dense_branch, 'embedding', 'replaces the up-projection of the dense MLP: set model.moe_dense_branch')


E2B = ModelConfig(
    num_kv_shared_layers=20, double_wide_mlp=True, embedding='ple')
E4B = ModelConfig(
    width=2560, num_layers=42, mlp_dim=10_240, num_kv_heads=2, global_num_kv_heads=2, pattern='LLLLLG',
    num_kv_shared_layers=18, embedding='ple')
_LARGE = ModelConfig(
    width=3840, num_layers=48, mlp_dim=15_360, num_heads=16, num_kv_heads=8, pattern='LLLLLG', window=1024, k_eq_v=True,
    context_length=262_144)
B12 = _LARGE
B26_A4 = _LARGE.replace(
    width=2816, num_layers=30, mlp_dim=2112, global_num_kv_heads=2, num_experts=128, num_experts_per_token=8, expert_dim=704)
B31 = _LARGE.replace(
    width=5376, num_layers=60, mlp_dim=21_504, num_heads=32, num_kv_heads=16, global_num_kv_heads=4)
VARIANTS = {'e2b': E2B, 'e4b': E4B, '12b': B12, '26b-a4b': B26_A4, '31b': B31}


def variant(name: str) -> ModelConfig:
  if name not in VARIANTS:
    raise ValueError(f'variant {name!r}: none of {", ".join(VARIANTS)}; did you mean {nearest(name, list(VARIANTS))!r}?')
  return VARIANTS[name]


# Fields that say how a model is stored and computed, and for how many tokens: the others say what it is.
WAYS = ('context_length', 'moe_implementation', 'ple_placement', 'ple_table', 'rotated_values', 'dtype', 'param_dtype',
        'attention_implementation', 'matvec', 'scan', 'remat')


def released(cfg: ModelConfig) -> str | None:
  """Name of the released variant that a model is, whatever its vocabulary and `WAYS`."""
  free = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in (*WAYS, 'vocab_size')}
  plain = lambda cfg: cfg.replace(**free, ple_dim=cfg.ple_dim if cfg.embedding == 'ple' else ModelConfig.ple_dim)
  return next((name for name, variant in VARIANTS.items() if plain(variant) == plain(cfg)), None)


def shrink(cfg: ModelConfig, *, periods: int = 1, width: int = 64, vocab_size: int = 128, **fields) -> ModelConfig:
  """The same pattern, sharing and flags at toy width.

  Args:
    periods: how often the pattern repeats among the layers that own K/V, and again among those that borrow; where none
      borrow, among each half.
    **fields: anything else to set; the defaults suit tests.
  """
  half = periods * len(cfg.pattern)
  kv_heads = min(cfg.num_kv_heads, 2)
  small = dict(
      width=width, vocab_size=vocab_size, num_layers=2 * half, num_kv_shared_layers=half if cfg.num_kv_shared_layers else 0,
      mlp_dim=width * 3 // 2, num_heads=4, num_kv_heads=kv_heads,
      global_num_kv_heads=kv_heads if cfg.num_kv_heads == cfg.global_num_kv_heads else 1,
      head_dim=16, global_head_dim=32, window=4, context_length=256, ple_dim=8)
  if cfg.num_experts:
    small |= dict(num_experts=8, num_experts_per_token=2, expert_dim=24)
  return cfg.replace(**(small | fields))
