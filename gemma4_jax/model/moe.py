"""Mixture of experts: a softmax router over all experts, the chosen ones renormalised, three ways to run them."""

from functools import partial

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemma4_jax import hardware, sharding
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import layers
from gemma4_jax.turboquant.weights import Weight


class MoE(nn.Module):
  """Routes every token to `num_experts_per_token` of `num_experts` gated MLPs.

  The router reads its own input (in a block: the residual stream itself, not the experts' normed input). Softmax and
  renormalisation are float32; `per_expert_scale` multiplies afterwards, so the weights of a token need not sum to 1.
  Source: transformers `models/gemma4/modeling_gemma4.py`, Gemma4TextRouter and Gemma4TextExperts.
  """
  cfg: ModelConfig

  @nn.compact
  def __call__(self, router_in_BTD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (mixture [B, T, D] in the dtype of x, probabilities [B, T, E] float32 of the router)."""
    cfg = self.cfg
    B, T, D = x_BTD.shape
    E, X, F = cfg.num_experts, cfg.num_experts_per_token, cfg.expert_dim
    z_BTD = router_in_BTD
    if cfg.router_norm:
      scale_D = layers.declare(self, 'router_scale', layers.constant(1.0), (D,), ('norm',))
      z_BTD = layers.RMSNorm(cfg, scale=False)(z_BTD) * scale_D.astype(z_BTD.dtype) * D**-0.5
    logits_BTE = layers.Einsum(cfg, 'BTD,ED->BTE', (E, D), ('router', 'embed'), 1 if cfg.router_norm else D, name='router')(z_BTD)
    probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    top_BTX, ids_BTX = jax.lax.top_k(probs_BTE, X)
    top_BTX /= top_BTX.sum(-1, keepdims=True)
    if cfg.per_expert_scale:
      top_BTX *= jnp.take(layers.declare(self, 'per_expert_scale', layers.constant(1.0), (E,), ('norm',)), ids_BTX)

    into, out = (E, F, D), (E, D, F)
    up_EFD = layers.weight(self, 'up', layers.normal(D**-0.5), into, ('experts', 'expert_mlp', 'embed'))
    gate_EFD = layers.weight(self, 'gate', layers.normal(D**-0.5), into, ('experts', 'expert_mlp', 'embed'))
    down_EDF = layers.weight(self, 'down', layers.normal(F**-0.5), out, ('experts', 'embed', 'expert_mlp'))
    packed = isinstance(up_EFD, Weight)   # and so the two others: they are one group of `quantized`
    experts = [w if packed else w.astype(x_BTD.dtype) for w in (gate_EFD, up_EFD, down_EDF)]
    y_RD = _mixture(cfg, packed, x_BTD.reshape(B * T, D), ids_BTX.reshape(-1, X), top_BTX.reshape(-1, X).astype(x_BTD.dtype), *experts)
    return y_RD.reshape(B, T, D), probs_BTE


def implementation(cfg: ModelConfig, tokens: int, packed: bool = False) -> str:
  """What runs: as `cfg.moe_implementation` says; 'auto' is ragged on a TPU, whose grouped matmul it is. On CPUs and GPUs XLA lowers
  ragged_dot to a product of all rows with all experts (jax 0.10.2 to 0.12): there 'auto' is a scan over the experts, or for few tokens a
  gather of weights.

  Args:
    packed: the experts are quantized. A grouped matmul would need all of them decoded, so that 'auto' is as on a CPU everywhere.
  Raises:
    ValueError: 'ragged' of quantized experts.
  """
  if packed and cfg.moe_implementation == 'ragged':
    raise ValueError("model.moe_implementation: 'ragged' would decode all experts at once, and these are quantized: take 'auto', 'scan' or "
                     "'gather'")
  if cfg.moe_implementation != 'auto':
    return cfg.moe_implementation
  if hardware.platform() == 'tpu' and not packed:
    return 'ragged'
  return 'gather' if tokens * cfg.num_experts_per_token < cfg.num_experts else 'scan'


def _mixture(cfg, packed, x_RD, ids_RX, weight_RX, *experts):
  """On a mesh that splits the experts every device runs its own on all tokens of its share of the batch, and the parts are summed;
  quantized ones are sent where they are read."""
  run = {'ragged': _ragged, 'scan': _scan_packed if packed else _scan,
         'gather': _gather_packed if packed else _gather}[implementation(cfg, len(x_RD), packed)]
  mesh = sharding.in_use()
  if packed or mesh is None or mesh.shape['expert'] == 1:
    return run(cfg, x_RD, ids_RX, weight_RX, *experts)

  def mine(x_RD, ids_RX, weight_RX, *experts):
    count = len(experts[0])
    ids_RX -= jax.lax.axis_index('expert') * count
    here_RX = (ids_RX >= 0) & (ids_RX < count)
    y_RD = run(cfg, x_RD, jnp.where(here_RX, ids_RX, count), jnp.where(here_RX, weight_RX, 0), *experts)
    return jax.lax.psum(y_RD, 'expert')

  split, whole = PartitionSpec('expert'), PartitionSpec()
  return jax.shard_map(mine, in_specs=(whole, whole, whole, split, split, split), out_specs=whole, axis_names={'expert'},
                       check_vma=False)(x_RD, ids_RX, weight_RX, *experts)


# Three ways to run experts. An id that is no expert's is one of another device: its weight is 0.


def _ragged(cfg, x_RD, ids_RX, weight_RX, gate_EFD, up_EFD, down_EDF):
  X = ids_RX.shape[1]
  order = jnp.argsort(ids_RX.reshape(-1), stable=True)
  sizes_E = jnp.bincount(ids_RX.reshape(-1), length=gate_EFD.shape[0]).astype(jnp.int32)
  rows_RD = x_RD[order // X]
  dot = lambda a, w: jax.lax.ragged_dot(a, w.swapaxes(1, 2), sizes_E)
  y_RD = dot(layers.activation(cfg, dot(rows_RD, gate_EFD)) * dot(rows_RD, up_EFD), down_EDF)
  weight_R1 = weight_RX.reshape(-1)[order][:, None]
  y_RD = jnp.where(weight_R1 == 0, 0, y_RD * weight_R1)   # rows behind the last expert's may hold anything
  return jnp.zeros_like(x_RD).at[order // X].add(y_RD)


def _scan(cfg, x_RD, ids_RX, weight_RX, gate_EFD, up_EFD, down_EDF):
  def expert(sum_RD, ws):
    e, gate_FD, up_FD, down_DF = ws
    share_R = jnp.where(ids_RX == e, weight_RX, 0).sum(-1)
    h_RF = layers.activation(cfg, x_RD @ gate_FD.T) * (x_RD @ up_FD.T)
    return sum_RD + (h_RF * share_R[:, None]) @ down_DF.T, None
  return jax.lax.scan(expert, jnp.zeros_like(x_RD), (jnp.arange(len(gate_EFD)), gate_EFD, up_EFD, down_EDF))[0]


def _gather(cfg, x_RD, ids_RX, weight_RX, gate_EFD, up_EFD, down_EDF):
  h_RXF = layers.activation(cfg, jnp.einsum('RD,RXFD->RXF', x_RD, gate_EFD[ids_RX])) * jnp.einsum('RD,RXFD->RXF', x_RD, up_EFD[ids_RX])
  return jnp.einsum('RXF,RXDF,RX->RD', h_RXF, down_EDF[ids_RX], weight_RX)


# Of quantized experts, the codes of one are read at a time.


def _scan_packed(cfg, x_RD, ids_RX, weight_RX, *experts_EFD):
  def expert(sum_RD, e):
    share_R = jnp.where(ids_RX == e, weight_RX, 0).sum(-1)
    return sum_RD + _expert(cfg, x_RD, e, share_R, *experts_EFD), None
  return jax.lax.scan(expert, jnp.zeros_like(x_RD), jnp.arange(cfg.num_experts))[0]


def _gather_packed(cfg, x_RD, ids_RX, weight_RX, *experts_EFD):
  def visit(visit):
    x_D, e, share = visit
    return _expert(cfg, x_D[None], e, share[None], *experts_EFD)[0]
  R, X = ids_RX.shape
  y_VD = jax.lax.map(visit, (jnp.repeat(x_RD, X, axis=0), ids_RX.reshape(-1), weight_RX.reshape(-1)))
  return y_VD.reshape(R, X, -1).sum(1)


def _expert(cfg, x_RD, e, share_R, gate_EFD, up_EFD, down_EDF):
  dot = partial(layers.contract, axes=1, rows=cfg.matvec)
  h_RF = layers.activation(cfg, dot(x_RD, gate_EFD.part(e))) * dot(x_RD, up_EFD.part(e))
  return dot(h_RF * share_R[:, None], down_EDF.part(e))
