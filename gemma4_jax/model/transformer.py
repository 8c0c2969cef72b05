"""The text decoder: embed, blocks one by one or scanned over periods, head."""

from functools import partial

from flax import linen as nn
import jax
import jax.numpy as jnp

from gemma4_jax.config import GATE, UNGATED, UP, VALUE, LayerSpec, ModelConfig
from gemma4_jax.model import attention, embeddings, layers, moe

KV = tuple[attention.FreshKV, ...]


class Block(nn.Module):
  """Attention, feed-forward, per-layer vector; each added to the stream behind its own norms, then one scalar for all."""
  cfg: ModelConfig
  spec: LayerSpec

  @nn.compact
  def __call__(self, x_BTD: jax.Array, stream: attention.Stream, kv: attention.FreshKV | None, vector: jax.Array | None,
               ) -> tuple[jax.Array, attention.FreshKV]:
    """Returns (x, the K/V this layer read).

    Args:
      kv: the donor's, where the spec says so.
      vector: [B, T, inject_dim] of the embedding arm, where the spec says so.
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

    if spec.inject in (GATE, UNGATED):
      D, P = x_BTD.shape[-1], spec.inject_dim
      u_BTP = vector
      if spec.inject == GATE:   # the gate reads the raw stream: this sub-block has no pre-norm
        gate = layers.Einsum(cfg, 'BTD,PD->BTP', (P, D), ('ple', 'embed'), D, name='ple_gate')
        u_BTP = layers.activation(cfg, gate(x_BTD)) * vector
      h_BTD = layers.Einsum(cfg, 'BTP,DP->BTD', (D, P), ('embed', 'ple'), P, name='ple_project')(u_BTP)
      x_BTD = x_BTD + post(name='post_ple_norm')(h_BTD)

    if cfg.layer_scalar:
      x_BTD = x_BTD * layers.declare(self, 'scalar', layers.constant(1.0), (1,), ('norm',)).astype(x_BTD.dtype)
    return x_BTD, kv


class Period(nn.Module):
  """The body of a scan: one period of blocks. Carries the stream and the last K/V made, which later groups borrow."""
  cfg: ModelConfig
  specs: tuple[LayerSpec, ...]
  kept: tuple[tuple[int, int], ...]   # (place in the period, layer) of K/V to carry

  @nn.compact
  def __call__(self, carry, vectors, stream, lent):
    x_BTD, kept = carry
    made = {}
    for place, spec in enumerate(self.specs):
      block = _remat(self.cfg, in_scan=True)(self.cfg, spec, name=f'block_{place}')
      x_BTD, made[place] = block(x_BTD, stream, lent.get(spec.kv_from), vectors[place])
    return (x_BTD, kept | {layer: made[place] for place, layer in self.kept}), None


class Transformer(nn.Module):
  """Gemma 4's text decoder.

  Weights are canonical per layer, `layer_0` .. `layer_{L-1}`. With `cfg.scan` the blocks of a group share one compiled body
  and their weights are stacked: `group_0/block_0` ..; `stack` and `unstack` convert.
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
               ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (logits [B, T, V] float32, out).

    Args:
      ids_BT: int32 token ids.
      pos_BT: int32 positions within the document; None: 0..T-1.
      seg_BT: int32 document of each token, 0 for padding; None: one document.
      head: False returns the normed last stream [B, T, D] in place of the logits, for a loss that chunks the head.
    `out` holds named intermediates: 'embedded' and 'final', each [B, T, D].
    """
    cfg = self.cfg
    pos_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape) if pos_BT is None else pos_BT
    seg_BT = jnp.ones_like(ids_BT) if seg_BT is None else seg_BT
    known_BT = jnp.where((ids_BT >= 0) & (ids_BT < cfg.vocab_size), ids_BT, 0)
    prev_BT = jnp.where(pos_BT > 0, jnp.pad(known_BT, ((0, 0), (1, 0)))[:, :-1], 0)
    stream = attention.Stream.make(cfg, pos_BT, seg_BT)

    scale = jnp.asarray(cfg.width**0.5, cfg.dtype)   # rounded to the compute dtype first, as released
    x_BTD, vectors = self.arm(known_BT, prev_BT, self.embedder(known_BT) * scale)
    out = {'embedded': x_BTD}
    x_BTD = (self._scan_groups if cfg.scan else self._run_layers)(x_BTD, stream, vectors)
    x_BTD = self.final_norm(x_BTD)
    out['final'] = x_BTD
    return (self.head(x_BTD) if head else x_BTD), out

  def head(self, x_BTD: jax.Array) -> jax.Array:
    """Logits [..., V] float32, soft-capped, of the normed last stream."""
    if self.cfg.tied_embeddings:
      logits = layers.contract(x_BTD, self.embedder.table, axes=1, dtype=jnp.float32)
    else:
      logits = self.unembedder(x_BTD)
    return softcap(logits.astype(jnp.float32), self.cfg.final_softcap)

  def _run_layers(self, x_BTD, stream, vectors):
    made: list[attention.FreshKV] = []
    for block, spec, vector in zip(self.layer, self.cfg.layers, vectors, strict=True):
      lent = None if spec.kv_from is None else made[spec.kv_from]
      x_BTD, kv = block(x_BTD, stream, lent, vector)
      made.append(kv)
    return x_BTD

  def _scanned(self, group, name):
    """One body for all repeats; K/V that a later group borrows leave with the carry of the last repeat."""
    donors = {spec.kv_from for spec in self.cfg.layers} - {None}
    last = group.repeats - 1
    kept = tuple((place, layer) for place in range(len(group.period)) if (layer := group.layer(last, place)) in donors)
    body = nn.scan(Period, variable_axes={'params': 0}, split_rngs={'params': True}, length=group.repeats,
                   in_axes=(0, nn.broadcast, nn.broadcast))
    return body(self.cfg, group.period, kept, name=name)

  def _scan_groups(self, x_BTD, stream, vectors):
    lent = {}
    for body, group in zip(self.group, self.cfg.groups, strict=True):
      stacked = {place: None if group.period[place].inject is None else jnp.stack(
          [vectors[group.layer(repeat, place)] for repeat in range(group.repeats)]) for place in range(len(group.period))}
      empty = {layer: self._empty_kv(x_BTD, group.period[place]) for place, layer in body.kept}
      (x_BTD, kept), _ = body((x_BTD, empty), stacked, stream, lent)
      lent = lent | kept
    return x_BTD

  def _empty_kv(self, x_BTD, spec):
    zeros = jnp.zeros((*x_BTD.shape[:2], spec.num_kv_heads, spec.head_dim), x_BTD.dtype)
    return attention.FreshKV(zeros, zeros)


def softcap(logits: jax.Array, cap: float) -> jax.Array:
  return cap * jnp.tanh(logits / cap) if cap else logits


def _remat(cfg: ModelConfig, in_scan: bool = False):
  if cfg.remat == 'none':
    return Block
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == 'dots' else None
  return nn.remat(Block, policy=policy, prevent_cse=not in_scan)


def init(cfg: ModelConfig, seed: int) -> dict:
  """Parameters of `Transformer(cfg)` from a seed, leaf by leaf (`layers.init_params`); stacked if `cfg.scan`."""
  params = layers.init_params(Transformer(cfg.replace(scan=False)), seed, jnp.zeros((1, 1), jnp.int32))
  return stack(cfg, params) if cfg.scan else params


def abstract(cfg: ModelConfig) -> dict:
  """The canonical tree of `layers.Param` boxes around shapes, nothing allocated."""
  return layers.abstract_params(Transformer(cfg.replace(scan=False)), jnp.zeros((1, 1), jnp.int32))


def stack(cfg: ModelConfig, params: dict, join=lambda *ws: jnp.stack(ws)) -> dict:
  """Canonical per-layer weights -> one stack a group, place and weight, [repeats, ...]: what `cfg.scan` reads.

  Args:
    join: makes one leaf of the `repeats` leaves of a stack, for trees of other things than arrays.
  """
  rest = {name: value for name, value in params.items() if not name.startswith('layer_')}
  return rest | {f'group_{g}': {f'block_{place}': jax.tree.map(
      join, *(params[f'layer_{group.layer(r, place)}'] for r in range(group.repeats)))
      for place in range(len(group.period))} for g, group in enumerate(cfg.groups)}


def unstack(cfg: ModelConfig, params: dict) -> dict:
  """The inverse of `stack`."""
  rest = {name: value for name, value in params.items() if not name.startswith('group_')}
  return rest | {f'layer_{group.layer(r, place)}': jax.tree.map(lambda w: w[r], params[f'group_{g}'][f'block_{place}'])
                 for g, group in enumerate(cfg.groups) for r in range(group.repeats) for place in range(len(group.period))}
