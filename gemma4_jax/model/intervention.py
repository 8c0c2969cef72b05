"""Interventions on per-layer vectors: what a trained model does with them, asked without editing a parameter.

  none              the vector stays
  zero              nothing is added to the stream
  mean              one vector for all tokens
  resample          the vector of another token
  projection_only   what the projection of the input embedding gives; the table's term is 0
  table_only        what the table gives; the projection's term is 0
  gate=1            the vector stays, and the gate is open whatever the stream holds

The kind of every layer is an array, so that one compiled program serves all of them, `none` included. What a block adds is
RMS-normed after the vector was projected, so that a vector's length hardly matters, but its direction does.
"""

from collections.abc import Mapping, Sequence

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax import config
from gemma4_jax.config import GATE, ModelConfig

KINDS = ('none', 'zero', 'mean', 'resample', 'projection_only', 'table_only', 'gate=1')
LEFT_OUT = {'projection_only': 'table', 'table_only': 'projection'}   # the term of PLE's sum that a kind leaves out


@struct.dataclass
class Intervention:
  """Attributes:
    kind_L: int32 [L], index into KINDS; see `assign`.
    mean: for every layer its vector [inject_dim] of kind `mean`, or None where the layer has none.
    ids_BT: int32 in [0, V): of every place, the token whose vectors kind `resample` takes.
  """
  kind_L: jax.Array
  mean: tuple[jax.Array | None, ...]
  ids_BT: jax.Array

  def vectors(self, own: Sequence[jax.Array | None], resampled: Sequence[jax.Array | None],
              terms: Mapping[str, Sequence[jax.Array | None]]) -> tuple[jax.Array | None, ...]:
    """The per-layer vectors after the intervention.

    Args:
      own: as the embedding arm made them.
      resampled: those of `ids_BT`.
      terms: kind -> vectors, of the kinds in LEFT_OUT that the model has.
    """
    def chosen(i, vector):
      given = {'zero': jnp.zeros_like(vector), 'mean': jnp.broadcast_to(self.mean[i].astype(vector.dtype), vector.shape),
               'resample': resampled[i]} | {kind: vectors[i] for kind, vectors in terms.items()}
      return jax.lax.select_n(self.kind_L[i], *(given.get(kind, vector) for kind in KINDS))
    return tuple(None if vector is None else chosen(i, vector) for i, vector in enumerate(own))

  def opens_gate(self, layer: int) -> jax.Array:
    return self.kind_L[layer] == KINDS.index('gate=1')


def kinds(cfg: ModelConfig) -> tuple[str, ...]:
  """The KINDS that this model has."""
  found = ['none', 'zero', 'mean', 'resample'] if cfg.inject_layers else ['none']
  if cfg.embedding in config.PLE_ARMS and cfg.embedding not in LEFT_OUT and not cfg.ple_folded:
    found += LEFT_OUT
  if config.EMBEDDING_ARMS[cfg.embedding] == GATE:
    found.append('gate=1')
  return tuple(found)


def assign(cfg: ModelConfig, kind: str, layers: Sequence[int]) -> np.ndarray:
  """kind_L [L] int32: `kind` in these layers, none in the others.

  Raises:
    ValueError: a kind that the model does not have, or a layer without a per-layer vector.
  """
  if kind not in kinds(cfg):
    raise ValueError(f'intervention: {kind!r} is none of those that this model has: {", ".join(kinds(cfg))} '
                     f'(model.embedding={cfg.embedding!r}, model.ple_placement={cfg.ple_placement!r})')
  if missing := [i for i in layers if i not in cfg.inject_layers]:
    raise ValueError(f'intervention: layer {missing[0]} has no per-layer vector; those that have: {list(cfg.inject_layers)}')
  kind_L = np.zeros(cfg.num_layers, np.int32)
  kind_L[list(layers)] = KINDS.index(kind)
  return kind_L
