"""Embedding arms: what a token table can add to a transformer beyond its input embedding.

Every arm is a module with one interface: it is called once before the first block and returns the input of that block and,
for every layer, the vector that enters the block there (`LayerSpec.inject` says how) or None.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax import config
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import layers, ple_table

PerLayer = tuple[jax.Array | None, ...]


class NoArm(nn.Module):
  """The standard transformer: tokens enter once, at the bottom."""
  cfg: ModelConfig

  def __call__(self, ids_BT: jax.Array, prev_BT: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, PerLayer]:
    """Returns (input of the first block, one vector a layer or None).

    Args:
      ids_BT: int32 token ids; ids outside [0, V) (image and audio placeholders) read row 0 of every table.
      prev_BT: int32, the token before each within its document; 0 where there is none.
      x_BTD: input embeddings, already scaled.
    """
    return x_BTD, (None,) * self.cfg.num_layers


class PLE(nn.Module):
  """Per-layer embeddings: for every token and layer a small vector, mixed from a table and a projection of the input.

    ple = (sqrt(P) table[id] + rms(x W / sqrt(D))) / sqrt(2)

  and a block ends with y + rms((gelu(y Wgate) * ple) Wproj). The arms around it each take one part away:
    table_only, projection_only   the sum has one term, and no 1/sqrt(2)
    shared_table                  one table row [P] serves every layer; the projection still tells layers apart
    frozen_table                  random rows that training never changes: is it the learning, or a token-keyed code?
    permuted_table                row pi(id) for a fixed random permutation pi: trained from scratch this only renames rows,
                                  so it is the placebo whose difference from `ple` shows the noise
    ungated                       the gate is forced to 1: u = ple Wproj
  Where the table is and how it is stored, `cfg.ple_placement` and `cfg.ple_table`, is no arm: `ple_placement`.

  Source: transformers `models/gemma4/modeling_gemma4.py`, get_per_layer_inputs and project_per_layer_inputs; first in
  Gemma 3n. The arms are ours.
  """
  cfg: ModelConfig

  @nn.compact
  def __call__(self, ids_BT: jax.Array, prev_BT: jax.Array, x_BTD: jax.Array, without: str | None = None,
               ) -> tuple[jax.Array, PerLayer]:
    """Args: without: 'table' or 'projection', that term of a sum of two is left out, for `intervention`."""
    cfg, arm = self.cfg, self.cfg.embedding
    D, P, which = x_BTD.shape[-1], cfg.ple_dim, cfg.inject_layers
    terms = []
    if arm != 'projection_only':
      ids_BT = _permutation(cfg.vocab_size)[ids_BT] if arm == 'permuted_table' else ids_BT
      shape = (cfg.vocab_size, 1 if arm == 'shared_table' else len(which), P)
      name = 'frozen_lookup' if arm == 'frozen_table' else 'lookup'
      placed = (cfg.ple_placement, cfg.ple_table) != ('device', 'as_is')
      table = ple_table.PlacedTable(cfg, shape, name=name) if placed else layers.Embed(
          cfg, shape, ('rows', 'layers', 'ple'), P**-0.5, name=name)
      row_BTLP = table(ids_BT)
      if cfg.ple_folded:
        return x_BTD, _spread(cfg, jnp.unstack(row_BTLP, axis=2))
      row_BTLP = jax.lax.stop_gradient(row_BTLP) if arm == 'frozen_table' else row_BTLP
      terms.append(jnp.broadcast_to(row_BTLP * P**0.5, (*ids_BT.shape, len(which), P)))
    if arm != 'table_only':
      project = layers.Einsum(cfg, 'BTD,LPD->BTLP', (len(which), P, D), ('layers', 'ple', 'embed'), 1, name='project')
      # float32 as in PyTorch, which rounds the product and not the factor
      projected_BTLP = (project(x_BTD).astype(jnp.float32) * D**-0.5).astype(x_BTD.dtype)
      terms.append(layers.RMSNorm(cfg, name='norm')(projected_BTLP))
    ple_BTLP = terms[0]
    if len(terms) == 2:
      table_BTLP, context_BTLP = terms
      sum_BTLP = {None: table_BTLP + context_BTLP, 'projection': table_BTLP, 'table': context_BTLP}[without]
      ple_BTLP = (sum_BTLP.astype(jnp.float32) * 2**-0.5).astype(x_BTD.dtype)
    return x_BTD, _spread(cfg, jnp.unstack(ple_BTLP, axis=2))


class TokenVectors(nn.Module):
  """One table vector for every token and chosen layer, handed to the block as it is.

  value: [K * H] wide, added to the values of layers that own K/V: v <- a v + b table[id], a and b learned, from 0.5.
    Source: value embeddings of KellerJordan/modded-nanogpt `train_gpt.py`, after value residuals (arXiv 2410.17897).
  stem: [F] wide, in the place of x Wu: MLP(x) = (act(x Wg) * table[id]) Wd, and Wu is gone.
    Source: STEM, arXiv 2601.10639.
  """
  cfg: ModelConfig

  @nn.compact
  def __call__(self, ids_BT: jax.Array, prev_BT: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, PerLayer]:
    cfg = self.cfg
    dims = [cfg.layers[i].inject_dim for i in cfg.inject_layers]
    rows = layers.Embed(cfg, (cfg.vocab_size, sum(dims)), ('rows', 'ple'), 1.0, name='lookup')(ids_BT)
    return x_BTD, _spread(cfg, jnp.split(rows, np.cumsum(dims)[:-1], axis=-1))


class Bigram(nn.Module):
  """Adds a vector for the pair (previous token, token), hashed into `bigram_buckets` rows, to the input embedding.

  Source: the hashed bigram embedding of KellerJordan/modded-nanogpt; the n-gram memory of Engram (arXiv 2601.07372) is its
  larger cousin.
  """
  cfg: ModelConfig

  @nn.compact
  def __call__(self, ids_BT: jax.Array, prev_BT: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, PerLayer]:
    cfg, D = self.cfg, x_BTD.shape[-1]
    # two odd multipliers of 32 bits and a fold of the high half, which mixes better than the low bits
    mixed = prev_BT.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + ids_BT.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    bucket_BT = ((mixed ^ (mixed >> 15)) % jnp.uint32(cfg.bigram_rows)).astype(jnp.int32)
    table = layers.Embed(cfg, (cfg.bigram_rows, D), ('rows', 'embed'), D**-0.5, name='lookup')
    return x_BTD + table(bucket_BT) * D**0.5, (None,) * cfg.num_layers


def make(cfg: ModelConfig, name: str) -> nn.Module:
  """The module of `cfg.embedding`."""
  if cfg.embedding in config.PLE_ARMS:
    return PLE(cfg, name=name)
  return {'none': NoArm, 'bigram': Bigram, 'value': TokenVectors, 'stem': TokenVectors}[cfg.embedding](cfg, name=name)


def _spread(cfg: ModelConfig, vectors: list[jax.Array]) -> PerLayer:
  found = dict(zip(cfg.inject_layers, vectors, strict=True))
  return tuple(found.get(i) for i in range(cfg.num_layers))


def _permutation(n: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).permutation(n), jnp.int32)
