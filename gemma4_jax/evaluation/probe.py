"""What a trained model does with its per-layer vectors: every intervention in every set of layers, over the same tokens.

The arms of a probe share one compiled program, so that their differences from `none` are not those of two compilers' roundings.
Every place is intervened on, BOS included.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.evaluation import score, windows
from gemma4_jax.evaluation.documents import Document
from gemma4_jax.model import transformer
from gemma4_jax.model.intervention import Intervention, assign, kinds

_CHECKED = 48   # tokens whose logits are compared bit for bit


class Invalid(RuntimeError):
  """A control failed: the numbers of this probe would mean nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
  """Attributes:
    kind: of intervention.KINDS.
    where: name of the set of layers; '' of `none`.
    layers: the set.
    nll: -log p of every target of every document, float32 [T - 1] each.
  """
  kind: str
  where: str
  layers: tuple[int, ...]
  nll: list[np.ndarray]


def layer_sets(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Name -> layers with a per-layer vector: each alone, those that lend their K/V, those that borrow, all."""
  donors = {spec.kv_from for spec in cfg.layers}
  sets = {f'layer {i}': (i,) for i in cfg.inject_layers}
  sets['KV donors'] = tuple(i for i in cfg.inject_layers if i in donors)
  sets['KV borrowers'] = tuple(i for i in cfg.inject_layers if cfg.layers[i].kv_from is not None)
  sets['all'] = cfg.inject_layers
  return {name: layers for name, layers in sets.items() if layers}


def arms(cfg: ModelConfig) -> list[tuple[str, str, tuple[int, ...]]]:
  """(kind, name of the set, layers) of every arm, `none` first."""
  return [('none', '', ())] + [(kind, where, layers) for kind in kinds(cfg)[1:] for where, layers in layer_sets(cfg).items()]


def run(cfg: ModelConfig, params: dict, documents: Sequence[Document], *, window: int, stride: int, batch_tokens: int,
        seed: int = 0) -> Iterator[Arm]:
  """Yields every arm of `arms`, as it is done.

  Args:
    window, stride, batch_tokens: as `windows.batches` takes them.
    seed: of the tokens whose vectors are taken by kind `resample`: drawn from those of the documents, never the token itself, and the
      same for all arms.
  Raises:
    ValueError: a model without per-layer vectors, or documents that are none for a probe.
    Invalid: `none` does not give the logits of the model without an argument bit for bit, or another arm gives those of `none`.
  """
  if not cfg.inject_layers:
    raise ValueError(f'a probe needs per-layer vectors, and model.embedding={cfg.embedding!r} has none')
  batches = windows.batches(documents, window=window, stride=stride, batch_tokens=batch_tokens)
  others = _other_tokens(documents, batches, seed)
  on_device = {id(batch): jax.device_put((batch.ids_BT, batch.seg_BT, ids_BT)) for batch, ids_BT in zip(batches, others)}
  mean = _mean_vectors(cfg, params, on_device.values())
  check_none(cfg, params, batches[0].ids_BT[:1, :_CHECKED], mean, others[0][:1, :_CHECKED])
  base = None
  for kind, where, layers in arms(cfg):
    kind_L = jnp.asarray(assign(cfg, kind, layers))

    def nll(batch, kind_L=kind_L):
      ids_BT, seg_BT, other_BT = on_device[id(batch)]
      return score.token_nll(cfg, params, ids_BT, seg_BT, Intervention(kind_L, mean, other_BT))
    arm = Arm(kind, where, layers, windows.collect(documents, batches, nll))
    base = base or arm
    check_effect(arm, base)
    yield arm


def check_none(cfg: ModelConfig, params: dict, ids_BT: np.ndarray, mean: tuple[jax.Array | None, ...], other_BT: np.ndarray) -> None:
  """Raises Invalid unless `none` gives the logits of the model without an argument, bit for bit.

  Operation by operation: compiled whole, XLA fuses the two programs each in its own way, with roundings of its own.
  """
  nothing = Intervention(jnp.asarray(assign(cfg, 'none', ())), mean, jnp.asarray(other_BT))
  apply = partial(transformer.Transformer(cfg).apply, transformer.variables(params), jnp.asarray(ids_BT))
  expected, found = (np.asarray(apply(intervention=one)[0]) for one in (None, nothing))
  if expected.tobytes() != found.tobytes():
    raise Invalid(f'intervention none changes logits, by up to {np.abs(expected - found).max():.3g}: the model does not compute what '
                  'it does without an intervention')


def check_effect(arm: Arm, base: Arm) -> None:
  """Raises Invalid for an arm, other than `base`, in which no probability changes, or for numbers that are none."""
  if not all(np.isfinite(nll).all() for nll in arm.nll):
    raise Invalid(f'{arm.kind}{" in " * bool(arm.where)}{arm.where}: log-probabilities are not finite')
  if arm is not base and all(a.tobytes() == b.tobytes() for a, b in zip(arm.nll, base.nll, strict=True)):
    raise Invalid(f'{arm.kind} in {arm.where} changes no probability of any token, so this is no intervention: are these layers\' '
                  'per-layer weights zero?')


def _other_tokens(documents, batches, seed):
  """For every batch int32 [B, T]: tokens of the documents, drawn as often as they stand there, none the one in its place."""
  rng, pool = np.random.default_rng(seed), np.concatenate([document.ids[1:] for document in documents])
  if (pool == pool[0]).all():
    raise ValueError('a probe needs documents of at least two different tokens')
  found = []
  for batch in batches:
    other_BT = batch.ids_BT.copy()
    while (same_BT := other_BT == batch.ids_BT).any():
      other_BT[same_BT] = rng.choice(pool, same_BT.sum())
    found.append(other_BT)
  return found


def _mean_vectors(cfg, params, arrays):
  """The mean per-layer vectors over all tokens that run."""
  sums, count = None, 0
  for ids_BT, seg_BT, _ in arrays:
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), _summed_vectors(cfg, params, ids_BT, seg_BT))
    sums = new if sums is None else jax.tree.map(np.add, sums, new)
    count += int(seg_BT.sum())
  return jax.tree.map(lambda x: jnp.asarray(x / count, jnp.float32), sums)


@partial(jax.jit, static_argnums=0)
def _summed_vectors(cfg, params, ids_BT, seg_BT):
  _, out = transformer.Transformer(cfg).apply(transformer.variables(params), ids_BT, None, seg_BT, head=False)
  return jax.tree.map(lambda v_BTP: jnp.einsum('BTP,BT->P', v_BTP.astype(jnp.float32), seg_BT.astype(jnp.float32)), out['vectors'])
