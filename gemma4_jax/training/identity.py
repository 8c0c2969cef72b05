"""What tells one run from another: code, hardware and data; and whether two of them train the same model."""

import hashlib
import time

import jax
import numpy as np

from gemma4_jax import config as model_config, hardware, provenance, sharding
from gemma4_jax.data import corpus
from gemma4_jax.model import transformer


def fingerprint(cfg: model_config.ModelConfig, params: dict, batch: dict, mesh: jax.sharding.Mesh) -> str:
  """A hash of the logits of the first sequence. Two arms of a comparison that share it after a step are one model."""
  def first_logits(params, batch):
    one = {name: value[:1] for name, value in batch.items()}
    return transformer.Transformer(cfg).apply({'params': params}, one['tokens'], one['positions'], one['segments'])[0]
  logits = jax.jit(first_logits, out_shardings=sharding.replicated(mesh))(params, batch)
  return hashlib.sha256(np.asarray(logits).tobytes()).hexdigest()[:16]


def environment(data: corpus.Dataset, mesh: jax.sharding.Mesh) -> dict:
  """What env.json holds: code, versions, hardware, data."""
  return {
      **provenance.code(),
      'device': jax.devices()[0].device_kind, 'devices': jax.device_count(), 'processes': jax.process_count(),
      'cpus': hardware.cores(), 'environment': hardware.environment(),
      'mesh': {axis: int(n) for axis, n in mesh.shape.items()}, 'peak_flops': hardware.peak_flops(),
      'started': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
      'corpus_hash': data.corpus_hash, 'tokenizer_hash': data.tokenizer_hash}
