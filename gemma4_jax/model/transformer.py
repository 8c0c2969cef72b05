"""The text decoder: embed, blocks one by one or scanned over periods, head."""

from functools import lru_cache, partial
from typing import Any

from flax import linen as nn, traverse_util
import jax
import jax.numpy as jnp

from gemma4_jax import sharding
from gemma4_jax.config import GATE, UNGATED, UP, VALUE, Group, LayerSpec, ModelConfig
from gemma4_jax.model import attention, embeddings, kv_cache, layers, moe
from gemma4_jax.model.intervention import LEFT_OUT, Intervention, kinds


class Block(nn.Module):
  """Attention, feed-forward, per-layer vector; each added to the stream behind its own norms, then one scalar for all."""
  cfg: ModelConfig
  spec: LayerSpec

  @nn.compact
  def __call__(self, x_BTD: jax.Array, stream: attention.Stream, kv: Any, vector: jax.Array | None,
               open_gate: jax.Array | None = None) -> tuple[jax.Array, Any]:
    """Returns (x, the K/V this layer read).

    Args:
      kv: as `attention.Attention` takes it.
      vector: [B, T, inject_dim] of the embedding arm, where the spec says so.
      open_gate: bool [], whether its gate is 1; None: it is not.
    """
    cfg, spec = self.cfg, self.spec
    norm = partial(layers.RMSNorm, cfg)
    post = norm if cfg.post_norms else lambda name: lambda y: y
    up = vector if spec.inject == UP else None

    h_BTD, kv = attention.Attention(cfg, spec, name='attention')(
        norm(name='pre_attention_norm')(x_BTD), stream, kv, vector if spec.inject == VALUE else None)
    x_BTD = x_BTD + post(name='post_attention_norm')(h_BTD)

    if cfg.num_experts == 0:
      h_BTD = layers.MLP(cfg, spec.mlp_dim, name='mlp')(norm(name='pre_mlp_norm')(x_BTD), up)
    else:
      h_BTD, _ = moe.MoE(cfg, name='moe')(x_BTD, norm(name='pre_moe_norm')(x_BTD))
      if cfg.moe_dense_branch:
        dense_BTD = layers.MLP(cfg, spec.mlp_dim, name='mlp')(norm(name='pre_mlp_norm')(x_BTD), up)
        h_BTD = post(name='post_dense_norm')(dense_BTD) + post(name='post_moe_norm')(h_BTD)
    x_BTD = x_BTD + post(name='post_mlp_norm')(h_BTD)

    if spec.inject not in (None, GATE, UNGATED, VALUE, UP):
      raise NotImplementedError(f'a per-layer vector that enters a block by {spec.inject!r}: Block does not know how')
    if spec.inject in (GATE, UNGATED):
      D, P = x_BTD.shape[-1], spec.inject_dim
      u_BTP = vector
      if spec.inject == GATE:   # the gate reads the raw stream: this sub-block has no pre-norm
        gate = layers.Einsum(cfg, 'BTD,PD->BTP', (P, D), ('ple', 'embed'), D, name='ple_gate')
        gate_BTP = layers.activation(cfg, gate(x_BTD))
        u_BTP = (gate_BTP if open_gate is None else jnp.where(open_gate, jnp.ones_like(gate_BTP), gate_BTP)) * vector
      h_BTD = layers.Einsum(cfg, 'BTP,DP->BTD', (D, P), ('embed', 'ple'), P, name='ple_project')(u_BTP)
      x_BTD = x_BTD + post(name='post_ple_norm')(h_BTD)

    if cfg.layer_scalar:
      x_BTD = x_BTD * layers.declare(self, 'scalar', layers.constant(1.0), (1,), ('norm',)).astype(x_BTD.dtype)
    return sharding.constrain(x_BTD, 'batch'), kv   # the partitioner, left alone, splits the stream another way in every layer


class Period(nn.Module):
  """The body of a scan: one period of blocks, each run of like blocks again a scan. Carries the stream and the last K/V made,
  which later groups borrow."""
  cfg: ModelConfig
  group: Group
  kept: tuple[tuple[int, int], ...]   # (run, layer) of K/V to carry

  @nn.compact
  def __call__(self, carry, vectors, stream, lent):
    x_BTD, kept = carry
    for run, (place, count) in enumerate(self.group.runs):
      spec, layer = self.group.period[place], dict(self.kept).get(run)

      def step(block, carry, vector, stream, kv, keep=layer is not None):
        x_BTD, made = block(carry[0], stream, kv, vector)
        return (x_BTD, made if keep else None), None

      block = _remat(self.cfg, in_scan=True)(self.cfg, spec, name=f'run_{run}')
      (x_BTD, made), _ = _scan(step, count)(block, (x_BTD, kept.get(layer)), vectors[run], stream, lent.get(spec.kv_from))
      kept = kept | ({} if layer is None else {layer: made})
    return (x_BTD, kept), None


def _scan(body, length):
  """Over weights and the first argument after the carry; the other two are the same for all."""
  return nn.scan(body, variable_axes={'params': 0}, split_rngs={'params': True}, length=length, in_axes=(0, nn.broadcast, nn.broadcast),
                 check_constancy_invariants=False)


class Transformer(nn.Module):
  """Gemma 4's text decoder.

  Weights are canonical per layer, `layer_0` .. `layer_{L-1}`. With `cfg.scan` the like blocks of a group share one compiled
  body and their weights are stacked, `group_0/run_0` ..: [repeats of the period, blocks of the run, ...]; `stack` and `unstack`
  convert.
  """
  cfg: ModelConfig

  def setup(self):
    cfg, D = self.cfg, self.cfg.width
    self.embedder = layers.Embed(cfg, (cfg.vocab_size, D), ('vocab', 'embed'), D**-0.5)
    self.arm = embeddings.make(cfg, name='arm')
    if cfg.scan:
      self.group = [self._scanned(group, f'group_{g}') for g, group in enumerate(cfg.groups)]
    else:
      self.layer = [_remat(cfg)(cfg, spec) for spec in cfg.layers]
    self.final_norm = layers.RMSNorm(cfg)
    if not cfg.tied_embeddings:
      self.unembedder = layers.Einsum(cfg, '...D,VD->...V', (cfg.vocab_size, D), ('vocab', 'embed'), D)

  def __call__(self, ids_BT: jax.Array, pos_BT: jax.Array | None = None, seg_BT: jax.Array | None = None, *, head: bool = True,
               cache: kv_cache.Cache | None = None, last_only: bool = False, intervention: Intervention | None = None,
               ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns (logits [B, T, V] float32, out).

    Args:
      ids_BT: int32 token ids.
      pos_BT: int32 positions within the document; None: 0..T-1.
      seg_BT: int32 document of each token, 0 for padding; None: one document.
      head: False returns the normed last stream [B, T, D] in place of the logits, for a loss that chunks the head.
      cache: what the rows hold already; the tokens follow on it, so `pos_BT` is not given, and `seg_BT` is 1, or 0 for padding
        behind them. The caller sees to it that they fit.
      last_only: logits [B, 1, V] of each row's last token alone. Layers that borrow K/V, which no later token reads, then run
        for that token alone.
      intervention: on the per-layer vectors and their gates.
    `out` holds named intermediates: 'embedded' and 'final', each [B, T, D]; 'vectors', the per-layer vectors that enter the blocks,
    [B, T, inject_dim] or None each; and with a cache 'cache', the one to go on with.
    """
    cfg = self.cfg
    seg_BT = jnp.ones_like(ids_BT) if seg_BT is None else seg_BT
    if pos_BT is None:
      start_B = jnp.zeros(ids_BT.shape[:1], jnp.int32) if cache is None else cache.length_B
      pos_BT = start_B[:, None] + jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
    known_BT = jnp.where((ids_BT >= 0) & (ids_BT < cfg.vocab_size), ids_BT, 0)
    first_B = jnp.zeros_like(known_BT[:, 0]) if cache is None else cache.last_B
    prev_BT = jnp.where(pos_BT > 0, jnp.concatenate([first_B[:, None], known_BT[:, :-1]], axis=1), 0)
    stream = attention.Stream.make(cfg, pos_BT, seg_BT)
    last_B = jnp.maximum((seg_BT > 0).sum(1) - 1, 0) if last_only else None

    x_BTD, vectors = self.embed(known_BT, prev_BT)
    if intervention is not None:
      vectors = self._intervene(intervention, known_BT, prev_BT, x_BTD, vectors)
    out = {'embedded': x_BTD, 'vectors': vectors}
    if cfg.scan:
      if cache is not None or last_only or intervention is not None:
        raise ValueError('model.scan: caches and interventions are for layers one by one: use cfg.replace(scan=False) and `unstack`')
      x_BTD = self._scan_groups(x_BTD, stream, vectors)
    else:
      x_BTD, made = self._run_layers(x_BTD, stream, vectors, cache, last_B, intervention)
    if cache is not None:
      count_B = (seg_BT > 0).sum(1, dtype=jnp.int32)
      out['cache'] = kv_cache.Cache(
          cache.length_B + count_B, jnp.where(count_B > 0, _at(known_BT, jnp.maximum(count_B - 1, 0))[:, 0], cache.last_B),
          {i: made[i].cache for i in cache.layers})
    x_BTD = self.final_norm(x_BTD)
    out['final'] = x_BTD
    return (self.head(x_BTD) if head else x_BTD), out

  def embed(self, ids_BT: jax.Array, prev_BT: jax.Array) -> tuple[jax.Array, embeddings.PerLayer]:
    """Of ids in [0, V) and the ids before them: what the embedding arm returns."""
    scale = jnp.asarray(self.cfg.width**0.5, self.cfg.dtype)   # rounded to the compute dtype first, as released
    x_BTD = sharding.constrain(self.embedder(ids_BT) * scale, 'gathered', None, 'embed')   # as the table is split; then as the stream
    x_BTD = sharding.constrain(x_BTD, 'batch')
    x_BTD, vectors = self.arm(ids_BT, prev_BT, x_BTD)
    return x_BTD, tuple(None if vector is None else sharding.constrain(vector, 'batch') for vector in vectors)

  def head(self, x_BTD: jax.Array) -> jax.Array:
    """Logits [..., V] float32, soft-capped, of the normed last stream."""
    if self.cfg.tied_embeddings:
      logits = layers.contract(x_BTD, self.embedder.table, axes=1, dtype=jnp.float32, rows=self.cfg.matvec)
    else:
      logits = self.unembedder(x_BTD)
    return softcap(logits.astype(jnp.float32), self.cfg.final_softcap)

  def _intervene(self, intervention, ids_BT, prev_BT, x_BTD, vectors):
    _, resampled = self.embed(intervention.ids_BT, prev_BT)
    terms = {kind: self.arm(ids_BT, prev_BT, x_BTD, without)[1] for kind, without in LEFT_OUT.items() if kind in kinds(self.cfg)}
    return intervention.vectors(vectors, resampled, terms)

  def _run_layers(self, x_BTD, stream, vectors, cache=None, last_B=None, intervention=None):
    cfg, made = self.cfg, []
    owners = cfg.num_layers - cfg.num_kv_shared_layers
    for i, (block, spec, vector) in enumerate(zip(self.layer, cfg.layers, vectors, strict=True)):
      if last_B is not None and i == owners:
        x_BTD, stream = _at(x_BTD, last_B), jax.tree.map(lambda x: _at(x, last_B), stream)
      if last_B is not None and i >= owners and vector is not None:
        vector = _at(vector, last_B)
      kv = made[spec.kv_from] if spec.kv_from is not None else None if cache is None else cache.layers[i]
      x_BTD, kv = block(x_BTD, stream, kv, vector, None if intervention is None else intervention.opens_gate(i))
      made.append(kv)
    return (_at(x_BTD, last_B) if last_B is not None and owners == cfg.num_layers else x_BTD), made

  def _scanned(self, group, name):
    """One body for all repeats; K/V that a later group borrows leave with the carry of the last repeat."""
    donors = {spec.kv_from for spec in self.cfg.layers} - {None}   # the last owner of its kind: it ends its run
    kept = tuple((run, layer) for run in range(len(group.runs)) if (layer := group.layers(run)[-1][-1]) in donors)
    return _scan(Period, group.repeats)(self.cfg, group, kept, name=name)

  def _scan_groups(self, x_BTD, stream, vectors):
    lent = {}
    for body, group in zip(self.group, self.cfg.groups, strict=True):
      stacked = {run: None if group.period[place].inject is None else _stack_rows(group.layers(run), vectors, lambda *vs: jnp.stack(vs))
                 for run, (place, _) in enumerate(group.runs)}
      empty = {layer: self._empty_kv(x_BTD, group.period[group.runs[run][0]]) for run, layer in body.kept}
      (x_BTD, kept), _ = body((x_BTD, empty), stacked, stream, lent)
      lent = lent | kept
    return x_BTD

  def _empty_kv(self, x_BTD, spec):
    zeros = jnp.zeros((*x_BTD.shape[:2], spec.num_kv_heads, spec.head_dim), x_BTD.dtype)
    return attention.FreshKV(zeros, zeros)


def _stack_rows(layers_RC, of, join):
  """`of[layer]` of a run's layers, joined for each repeat and then over the repeats."""
  return join(*(join(*(of[layer] for layer in row)) for row in layers_RC))


def _at(x_BT: jax.Array, t_B: jax.Array) -> jax.Array:
  """Row b's token t_B[b]: [B, 1, ...] of [B, T, ...]."""
  return jnp.take_along_axis(x_BT, t_B.reshape(-1, *[1] * (x_BT.ndim - 1)), axis=1)


def softcap(logits: jax.Array, cap: float) -> jax.Array:
  return cap * jnp.tanh(logits / cap) if cap else logits


def _remat(cfg: ModelConfig, in_scan: bool = False):
  if cfg.remat == 'none':
    return Block
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == 'dots' else None
  return nn.remat(Block, policy=policy, prevent_cse=not in_scan)


def variables(params: dict) -> dict:
  """What `apply` takes, of a tree of parameters or of variables that are that already (`model.quantized`)."""
  return params if 'params' in params else {'params': params}


def init(cfg: ModelConfig, seed: int, mesh: jax.sharding.Mesh | None = None) -> dict:
  """Parameters of `Transformer(cfg)` from a seed, leaf by leaf (`layers.init_params`); stacked if `cfg.scan`. On a mesh every device
  draws its own share."""
  where = None if mesh is None else sharding.params(mesh, abstract(cfg))
  params = layers.init_params(Transformer(cfg.replace(scan=False)), seed, jnp.zeros((1, 1), jnp.int32), shardings=where)
  return stack(cfg, params) if cfg.scan else params


def abstract(cfg: ModelConfig) -> dict:
  """The canonical tree of `layers.Param` boxes around shapes, nothing allocated."""
  return layers.abstract_params(Transformer(cfg.replace(scan=False)), jnp.zeros((1, 1), jnp.int32))


@lru_cache
def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Path, joined by '/' -> shape of every weight of the canonical tree."""
  return {name: box.value.shape for name, box in traverse_util.flatten_dict(abstract(cfg), sep='/').items()}


def stack(cfg: ModelConfig, params: dict, join=lambda *ws: jnp.stack(ws)) -> dict:
  """Canonical per-layer weights -> one stack a group, run and weight, [repeats, blocks of the run, ...]: what `cfg.scan` reads.

  Args:
    join: makes one leaf of several, with a leading axis more, for trees of other things than arrays.
  """
  rest = {name: value for name, value in params.items() if not name.startswith('layer_')}
  layers_of = {i: params[f'layer_{i}'] for i in range(cfg.num_layers)}
  joined = lambda *trees: jax.tree.map(join, *trees)
  return rest | {f'group_{g}': {f'run_{run}': _stack_rows(group.layers(run), layers_of, joined) for run in range(len(group.runs))}
                 for g, group in enumerate(cfg.groups)}


def unstack(cfg: ModelConfig, params: dict) -> dict:
  """The inverse of `stack`."""
  rest = {name: value for name, value in params.items() if not name.startswith('group_')}
  return rest | {f'layer_{layer}': jax.tree.map(lambda w: w[r, c], params[f'group_{g}'][f'run_{run}'])
                 for g, group in enumerate(cfg.groups) for run in range(len(group.runs))
                 for r, row in enumerate(group.layers(run)) for c, layer in enumerate(row)}
