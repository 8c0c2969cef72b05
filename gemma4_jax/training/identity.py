"""What tells one run from another: code, hardware and data; and whether two of them train the same model."""

import hashlib
import json
from pathlib import Path
import time

import jax
import numpy as np

from gemma4_jax import config as model_config, hardware, metrics, provenance, sharding
from gemma4_jax.data import corpus
from gemma4_jax.model import transformer

FILE = 'env.json'
_FIX = 'move its folder away to start the run afresh'
_VARIES = ('started', 'attention', 'peak_flops')   # from process to process; the peak of a CPU is timed
_POSITIONS = 64   # logits of a whole sequence can be larger than all else in memory


def fingerprint(cfg: model_config.ModelConfig, params: dict, batch: dict, mesh: jax.sharding.Mesh) -> str:
  """A hash of logits of the first sequence, at up to 64 positions from its first to its last. Two arms of a comparison that share
  it after a step are one model."""
  T = batch['tokens'].shape[1]
  at = np.linspace(0, T - 1, min(T, _POSITIONS)).astype(int)
  def first_logits(params, batch):
    one = {name: value[:1] for name, value in batch.items()}
    model = transformer.Transformer(cfg).bind({'params': params})
    return model.head(model(one['tokens'], one['positions'], one['segments'], head=False)[0][:, at])
  logits = jax.jit(first_logits, out_shardings=sharding.replicated(mesh))(params, batch)
  return hashlib.sha256(np.asarray(logits).tobytes()).hexdigest()[:16]


def environment(data: corpus.Dataset, mesh: jax.sharding.Mesh) -> dict:
  """Code, versions, hardware and data of this process."""
  return {
      **provenance.code(),
      'device': jax.devices()[0].device_kind, 'devices': jax.device_count(), 'processes': jax.process_count(),
      'cpus': hardware.cores(), 'environment': hardware.environment(),
      'mesh': {axis: int(n) for axis, n in mesh.shape.items()}, 'peak_flops': hardware.peak_flops(),
      'started': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
      'corpus_hash': data.corpus_hash, 'tokenizer_hash': data.tokenizer_hash}


def write(environment: dict, workdir: Path) -> None:
  """Writes env.json: `environment`, and in 'before' those of the processes that had the run before this one, where they differed."""
  earlier = metrics.read_json(workdir / FILE, _FIX) or {}
  before = earlier.pop('before', [])
  told = lambda env: {name: value for name, value in json.loads(json.dumps(env)).items() if name not in _VARIES}
  before += [earlier] if earlier and told(earlier) != told(environment) else []
  metrics.write_json(workdir / FILE, environment | {'before': before})


def check_data(data: corpus.Dataset, workdir: Path) -> None:
  """Raises ValueError if the run in `workdir` was begun on other text, or with another tokenizer."""
  there = metrics.read_json(workdir / FILE, _FIX) or {}
  for name, ours in (('corpus_hash', data.corpus_hash), ('tokenizer_hash', data.tokenizer_hash)):
    if there.get(name, ours) != ours:
      raise ValueError(f'{workdir}: holds a run of other data ({name} {str(there[name])[:12]} there, {ours[:12]} now); '
                       'bring the text back as it was, or choose another workdir')
