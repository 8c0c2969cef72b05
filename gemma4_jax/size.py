"""What a model costs, counted from its config alone: parameters, FLOPs, bytes. No JAX, nothing allocated.

Conventions
  FLOPs       2 per multiply-add of every matmul that a token passes, the head included; table look-ups, norms and softmax are
              zero. Attention counts the keys that the mask lets a token see, averaged over one document of `context` tokens:
              the model's FLOPs, as used for utilisation (MFU). Kernels that mask instead of skip compute more.
  bytes       of weights and K/V in bfloat16.
  token table a table that is read by row alone. Such tables can stay in host memory; a tied input embedding cannot, because
              the head reads all of it.
"""

import collections
from collections.abc import Sequence

from gemma4_jax import kv_format
from gemma4_jax.config import GATE, PLE_ARMS, UNGATED, UP, VALUE, LayerSpec, ModelConfig

BYTES = 2   # of a bfloat16


def parameters(cfg: ModelConfig) -> dict[str, int]:
  """Numbers of weights by part; together all that `model.transformer` declares.

  embedding    input table, also the head's if no `unembedding` is there
  attention    projections and query and key norms
  mlp          dense MLPs
  router, experts   all experts
  norms        of the blocks and before the head
  scalars      one a layer
  arm_table    token tables of the embedding arm: PLE, value, bigram, STEM
  arm          its projections, gates, norms and mixing weights
  """
  D, both = cfg.width, bool(cfg.num_experts) and cfg.moe_dense_branch
  n = _matmuls(cfg)
  n['embedding'] = cfg.vocab_size * D
  n['unembedding'] = 0 if cfg.tied_embeddings else cfg.vocab_size * D
  n['norms'] = D * (1 + cfg.num_layers * ((2 + both) + (2 + 2 * both) * cfg.post_norms))
  n['scalars'] = cfg.num_layers * cfg.layer_scalar
  if cfg.num_experts:
    n['router'] += cfg.num_layers * (D * cfg.router_norm + cfg.num_experts * cfg.per_expert_scale)
  if cfg.qk_norm:
    n['attention'] += sum(spec.head_dim * (2 if spec.kv_from is None else 1) for spec in cfg.layers)
  if _projects_context(cfg):
    n['arm'] += cfg.ple_dim
  injects = [spec.inject for spec in cfg.layers]
  n['arm'] += D * cfg.post_norms * (injects.count(GATE) + injects.count(UNGATED)) + 2 * injects.count(VALUE)
  n['arm_table'] = _table(cfg)
  return dict(n)


def total(cfg: ModelConfig) -> int:
  return sum(parameters(cfg).values())


def non_embedding(cfg: ModelConfig) -> int:
  """All but the input embedding and the arm's token tables."""
  n = parameters(cfg)
  return sum(n.values()) - n['embedding'] - n['arm_table']


def active(cfg: ModelConfig) -> int:
  """All but the experts that one token does not visit."""
  experts = parameters(cfg)['experts']
  return total(cfg) - (experts - _visited(cfg, experts))


def resident_bytes(cfg: ModelConfig) -> int:
  """Weights that must be on the accelerator when token tables stay in host memory."""
  n = parameters(cfg)
  return BYTES * (sum(n.values()) - n['arm_table'] - (0 if cfg.tied_embeddings else n['embedding']))


def placed_bytes(cfg: ModelConfig) -> dict[str, int]:
  """Bytes of a model whose PLE table is where `cfg.ple_placement` and in what `cfg.ple_table` says, all else in bfloat16.

  resident     weights on the accelerator
  host         of the table, in host memory or on disk
  read         that a token of text reads on the accelerator to make its PLE vectors: its row, if it is there, and the projection
  fetched      that it fetches from the host: its row
  """
  n, row = parameters(cfg), _row_bytes(cfg)
  context = cfg.ple_dim * (1 + cfg.width * len(cfg.inject_layers)) if _projects_context(cfg) else 0   # projection and norm
  read = 0 if cfg.ple_folded else BYTES * context
  resident = BYTES * (sum(n.values()) - n['arm_table'] - (context if cfg.ple_folded else 0))
  table = cfg.vocab_size * row
  if cfg.ple_on_host:
    return {'resident': resident, 'host': table, 'read': read, 'fetched': row}
  return {'resident': resident + table, 'host': 0, 'read': read + row, 'fetched': 0}


def forward_flops(cfg: ModelConfig, context: int) -> float:
  """FLOPs a token of a document of `context` tokens: matmuls with weights, scores and values."""
  n = _matmuls(cfg)
  n['experts'] = _visited(cfg, n['experts'])
  attention = sum(2 * cfg.num_heads * spec.head_dim * mean_keys(spec.window, context) for spec in cfg.layers)
  return 2 * (sum(n.values()) + cfg.vocab_size * cfg.width + attention)


def training_flops(cfg: ModelConfig, context: int) -> float:
  """Forward and backward, a token: the backward pass has two matmuls for each of the forward pass."""
  return 3 * forward_flops(cfg, context)


def prefill_flops(cfg: ModelConfig, length: int) -> float:
  """FLOPs of a prompt of `length` tokens whose last one's logits are wanted: layers that borrow K/V, and the head, run for it alone."""
  owners = cfg.num_layers - cfg.num_kv_shared_layers
  def run(layers, tokens, keys):
    n = _matmuls(cfg, layers)
    n['experts'] = _visited(cfg, n['experts'])
    return tokens * (sum(n.values()) + sum(2 * cfg.num_heads * spec.head_dim * keys(spec.window) for spec in layers))
  return 2 * (run(cfg.layers[:owners], length, lambda window: mean_keys(window, length))
              + run(cfg.layers[owners:], 1, lambda window: min(window or length, length)) + cfg.vocab_size * cfg.width)


def mean_keys(window: int | None, context: int) -> float:
  """Keys that a token sees, itself included, averaged over the tokens of a document."""
  w = context if window is None else min(window, context)
  return (w * (w + 1) / 2 + (context - w) * w) / context


def kv_bytes(cfg: ModelConfig, context: int, kv: kv_format.KV = 'exact', width: int = BYTES) -> int:
  """K/V of one sequence after `context` tokens: local layers keep one window, layers that borrow K/V keep nothing.

  Args:
    kv: what `kv_format.make` takes. 'exact' stores of a K=V layer its values and the rotated channels of its keys.
    width: bytes of a number that is not quantized.
  """
  return sum(layer.bytes(context, width) for layer in kv_format.make(kv).layers(cfg).values())


def decode_bytes(cfg: ModelConfig, context: int, batch: int, weights: int | None = None,
                 kv: kv_format.KV = 'exact') -> int:
  """Bytes that a decoding step of `batch` rows with `context` tokens each must read, in the model's own dtypes: all weights but
  the tables that are read by row, and the caches. Of experts all, as many rows visit many.

  Args:
    weights: bytes of these weights, if they are quantized.
    kv: as `kv_bytes` takes it.
  """
  width = {'float32': 4, 'bfloat16': 2}
  n = parameters(cfg)
  if weights is None:
    weights = width[cfg.param_dtype] * (sum(n.values()) - n['arm_table'] - (0 if cfg.tied_embeddings else n['embedding']))
  return weights + batch * kv_bytes(cfg, context, kv, width[cfg.dtype])


def costs(cfg: ModelConfig, context: int) -> dict[str, float]:
  """What a run records of its model; FLOPs are those of the forward pass."""
  return {
      'params/total': total(cfg), 'params/non_embedding': non_embedding(cfg), 'params/ple_table': _table(cfg),
      'flops_per_token': forward_flops(cfg, context), 'resident_bytes': resident_bytes(cfg)}


def _row_bytes(cfg: ModelConfig) -> int:
  """Of one token in the table as it is stored; a number of few bits has a share in a float32 scale for `ple_dim` of them."""
  numbers = _table(cfg) // cfg.vocab_size
  bits = {'int8': 8, 'int4': 4}.get(cfg.ple_table)
  return numbers * BYTES if bits is None else numbers * bits // 8 + numbers // cfg.ple_dim * 4


def _matmuls(cfg: ModelConfig, layers: Sequence[LayerSpec] | None = None) -> collections.Counter:
  """Weights that activations are multiplied with in `layers` (None: all), by part; without the head, with all experts."""
  D, F, E = cfg.width, cfg.expert_dim, cfg.num_experts
  n = collections.Counter(attention=0, mlp=0, router=0, experts=0, arm=0)
  for spec in cfg.layers if layers is None else layers:
    made = 0 if spec.kv_from is not None else 1 if spec.k_eq_v else 2
    n['attention'] += D * spec.head_dim * (2 * cfg.num_heads + made * spec.num_kv_heads)
    if not E or cfg.moe_dense_branch:
      n['mlp'] += D * spec.mlp_dim * (1 + cfg.gated_mlp + (spec.inject != UP))
    n['router'] += D * E
    n['experts'] += 3 * D * F * E
    n['arm'] += D * spec.inject_dim * ({GATE: 2, UNGATED: 1}.get(spec.inject, 0) + _projects_context(cfg))
  return n


def _projects_context(cfg: ModelConfig) -> bool:
  return cfg.embedding in PLE_ARMS and cfg.embedding != 'table_only'


def _visited(cfg: ModelConfig, experts: int) -> int:
  """Of the weights of all experts, those of the ones that a token visits."""
  return experts // cfg.num_experts * cfg.num_experts_per_token if cfg.num_experts else 0


def _table(cfg: ModelConfig) -> int:
  """Numbers in the token tables of the embedding arm."""
  if cfg.embedding == 'bigram':
    return cfg.bigram_rows * cfg.width
  if cfg.embedding in ('none', 'projection_only'):
    return 0
  return cfg.vocab_size * (cfg.ple_dim if cfg.embedding == 'shared_table' else sum(spec.inject_dim for spec in cfg.layers))
