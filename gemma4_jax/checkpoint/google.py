"""Google's own Gemma 4 checkpoints (an Orbax tree), text decoder: names and axes, one way.

Source of the names: google-deepmind/gemma `gemma/gm/nn/gemma4/_modules.py` and google/tunix `tunix/models/gemma4/params.py`.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import re

import numpy as np

from gemma4_jax import config
from gemma4_jax.checkpoint import hf, source
from gemma4_jax.config import ModelConfig

# Google's name and axes, our path(s) and axes, what a model or layer must have. Letters as in `gemma4_jax/__init__.py`, M for
# the width of an expert; along 2 lie our two paths.
_MODEL = (
    ('embedder/input_embedding', 'VD', 'embedder/table', 'VD', ''),
    ('embedder/per_layer_embeddings', 'VLP', 'arm/lookup/table', 'VLP', 'ple'),
    ('embedder/per_layer_model_projection/w', 'DLP', 'arm/project/w', 'LPD', 'ple'),
    ('embedder/per_layer_projection_norm/scale', 'P', 'arm/norm/scale', 'P', 'ple'),
    ('final_norm/scale', 'D', 'final_norm/scale', 'D', ''),
)
_LAYER = (
    ('pre_attention_norm/scale', 'D', 'pre_attention_norm/scale', 'D', ''),
    ('attn/q_einsum/w', 'NDH', 'attention/q/w', 'NHD', ''),
    ('attn/query_norm/scale', 'H', 'attention/q_norm/scale', 'H', ''),
    ('attn/kv_einsum/w', '2KDH', 'attention/k/w attention/v/w', 'KHD', 'own_v'),
    ('attn/k_einsum/w', 'KDH', 'attention/k/w', 'KHD', 'k_eq_v'),
    ('attn/key_norm/scale', 'H', 'attention/k_norm/scale', 'H', 'own_k'),
    ('attn/attn_vec_einsum/w', 'NHD', 'attention/o/w', 'DNH', ''),
    ('post_attention_norm/scale', 'D', 'post_attention_norm/scale', 'D', ''),
    ('pre_ffw_norm/scale', 'D', 'pre_mlp_norm/scale', 'D', 'dense'),
    ('mlp/gating_einsum', '2FD', 'mlp/gate/w mlp/up/w', 'FD', 'dense'),
    ('mlp/linear', 'FD', 'mlp/down/w', 'DF', 'dense'),
    # With experts, `mlp` and the norms around it are the experts'; the dense branch has the 2.
    ('pre_ffw2_norm/scale', 'D', 'pre_mlp_norm/scale', 'D', 'moe'),
    ('mlp2/gating_einsum', '2FD', 'mlp/gate/w mlp/up/w', 'FD', 'moe'),
    ('mlp2/linear', 'FD', 'mlp/down/w', 'DF', 'moe'),
    ('post_ffw2_norm/scale', 'D', 'post_dense_norm/scale', 'D', 'moe'),
    ('pre_ffw_norm/scale', 'D', 'pre_moe_norm/scale', 'D', 'moe'),
    ('mlp/router_logits/w', 'DE', 'moe/router/w', 'ED', 'moe'),
    ('mlp/router_scale', 'D', 'moe/router_scale', 'D', 'moe'),
    ('mlp/per_expert_scale', 'E', 'moe/per_expert_scale', 'E', 'moe'),
    ('mlp/gating_einsum', 'E2MD', 'moe/gate moe/up', 'EMD', 'moe'),
    ('mlp/linear', 'EMD', 'moe/down', 'EDM', 'moe'),
    ('post_ffw1_norm/scale', 'D', 'post_moe_norm/scale', 'D', 'moe'),
    ('post_ffw_norm/scale', 'D', 'post_mlp_norm/scale', 'D', ''),
    ('per_layer_input_gate/w', 'DP', 'ple_gate/w', 'PD', 'ple'),
    ('per_layer_projection/w', 'PD', 'ple_project/w', 'DP', 'ple'),
    ('post_per_layer_input_norm/scale', 'D', 'post_ple_norm/scale', 'D', 'ple'),
    ('skip_scale', '1', 'scalar', '1', ''),
)
_TOWERS = re.compile(r'(vision|audio)_[a-z]+/|(feature|conformer|output_projection)/|embedder/(mm|audio)_')
_STACK = re.compile(r'stacked_layers/attention_type_(\d+)/(.+)')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One weight of Google's, of one layer: shape and axes as stored, and what it is of ours."""
  shape: tuple[int, ...]
  axes: str
  paths: tuple[str, ...]
  our_axes: str

  def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
    """Our path -> weight: views of `array`."""
    pieces = np.moveaxis(array, self.axes.index('2'), 0) if '2' in self.axes else [array]
    axes = self.axes.replace('2', '')
    return {path: piece.transpose([axes.index(letter) for letter in self.our_axes])
            for path, piece in zip(self.paths, pieces, strict=True)}


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a weight is stored: the array's key in the tree, and for one stacked over layers, the row."""
  key: tuple[str, ...]
  row: int | None
  shape: tuple[int, ...]


def tensors(cfg: ModelConfig) -> dict[str, Tensor]:
  """Every weight that a checkpoint of `cfg` must hold, by its name in the per-layer tree, joined by '/'.

  Raises:
    ValueError: Google has no such model.
  """
  hf.check_expressible(cfg)   # the same models
  if not cfg.tied_embeddings:
    raise ValueError("model.tied_embeddings: False has no counterpart in Google's checkpoints")
  has = {'': True, 'ple': cfg.embedding == 'ple', 'moe': cfg.num_experts > 0, 'dense': cfg.num_experts == 0}
  sizes = {'V': cfg.vocab_size, 'D': cfg.width, 'L': cfg.num_layers, 'P': cfg.ple_dim, 'N': cfg.num_heads,
           'E': cfg.num_experts, 'M': cfg.expert_dim, '1': 1, '2': 2}

  def rows(table, root):
    return {root + name: Tensor(tuple(sizes[letter] for letter in axes), axes, tuple(root + path for path in paths.split()), ours)
            for name, axes, paths, ours, needs in table if has[needs]}

  found = rows(_MODEL, '')
  for i, spec in enumerate(cfg.layers):
    own_k = spec.kv_from is None
    has |= {'own_k': own_k, 'own_v': own_k and not spec.k_eq_v, 'k_eq_v': own_k and spec.k_eq_v}
    sizes |= {'K': spec.num_kv_heads, 'H': spec.head_dim, 'F': spec.mlp_dim}
    found |= rows(_LAYER, f'layer_{i}/')
  return found


def unused(cfg: ModelConfig) -> set[str]:
  """Names that a checkpoint may hold though nothing reads them: keys and values of layers that borrow theirs."""
  return {f'layer_{i}/attn/{name}' for i, spec in enumerate(cfg.layers) if spec.kv_from is not None
          for name in ('kv_einsum/w', 'k_einsum/w', 'key_norm/scale')}


def places(leaves: Mapping[tuple[str, ...], tuple[int, ...]]) -> tuple[dict[str, Place], tuple[str, ...]]:
  """Reads the several spellings of the tree: (per-layer name -> place, names of the towers' weights).

  Keys may be nested or joined by '/', with `transformer` in front or not; layers may lie one by one or, as repeats of the
  attention pattern, stacked (`stacked_layers/attention_type_K`: row r is layer r * period + K).

  Args:
    leaves: key -> shape.
  """
  found, towers = {}, []
  names = {key: _plain('/'.join(key)) for key in leaves}
  kinds = {int(match[1]) for name in names.values() if (match := _STACK.match(name))}
  for key, name in names.items():
    shape, stack = leaves[key], _STACK.match(name)
    if _TOWERS.match(name):
      towers.append(name)
    elif stack and shape:
      found |= {f'layer_{row * len(kinds) + int(stack[1])}/{stack[2]}': Place(key, row, shape[1:]) for row in range(shape[0])}
    else:
      found[name] = Place(key, None, shape)
  return found, tuple(towers)


def infer(found: Mapping[str, Place]) -> ModelConfig:
  """The released variant with this vocabulary and width, which no two share.

  Raises:
    ValueError: none has.
  """
  table = found.get('embedder/input_embedding')
  for cfg in config.VARIANTS.values():
    if table and table.shape == (cfg.vocab_size, cfg.width):
      return cfg
  raise ValueError(f'embedder/input_embedding {list(table.shape) if table else "(missing)"} is that of no released Gemma 4; '
                   'put a config.json beside the tree, or give config=')


def pieces(cfg: ModelConfig, found: Mapping[str, Place], dtypes: Mapping[tuple[str, ...], np.dtype]) -> Iterable[source.Piece]:
  """One piece a stored array that `cfg` reads; its name is the key, joined by '/'.

  Args:
    dtypes: key -> dtype.
  Raises:
    ValueError: as `source.compare`.
  """
  wanted = tensors(cfg)
  source.compare({name: tensor.shape for name, tensor in wanted.items()}, {name: place.shape for name, place in found.items()},
                 unused(cfg))
  uses = {}
  for name, tensor in wanted.items():
    uses.setdefault(found[name].key, []).append((found[name].row, tensor))

  for key, users in uses.items():
    rows = () if users[0][0] is None else (max(row for row, _ in users) + 1,)
    yield source.Piece('/'.join(key), dtypes[key], (*rows, *users[0][1].shape), functools.partial(_split, users))


def _split(users, array):
  return {path: weight for row, tensor in users for path, weight in tensor.split(array if row is None else array[row]).items()}


def _plain(name: str) -> str:
  name = name.removeprefix('transformer/').replace('/_query_norm/', '/query_norm/').replace('/_key_norm/', '/key_norm/')
  return re.sub(r'(/mlp2?/(?:gating_einsum|linear))/w$', r'\1', name)
