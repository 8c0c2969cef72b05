"""The programs that training and sampling run, lowered for devices that are only described: shapes and shardings, no arrays."""

import dataclasses
from functools import partial
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from gemma4_jax import config as model_config, hardware, sharding
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import ple_table, quantized, quantized_cache, transformer
from gemma4_jax.sampling import generate, sampler
from gemma4_jax.training import optimizer, trainer

SLOTS = 64   # tokens that one call of the decode loop can choose


@dataclasses.dataclass(frozen=True)
class Job:
  """What is compiled.

  Attributes:
    mode: 'train', a step of AdamW over `batch` sequences of `context`; 'prefill', a chunk of a prompt that fills a cache of `context`;
      'decode', the loop that chooses tokens, with room for `context`.
    batch: over all devices.
    dtype: of parameters and moments; matmuls are bfloat16.
    weights, kv: formats, of config.WEIGHTS and `kv_format.make`. The rotation of quantized values is not folded into weights.
    ple: of config.PLE_PLACEMENTS.
    remat, loss_chunk: of training, see ModelConfig and configs/base.py.
  """
  mode: str
  batch: int
  context: int
  dtype: str = 'bfloat16'
  weights: str = 'as_is'
  kv: str = 'exact'
  ple: str = 'device'
  remat: str = 'full'
  loss_chunk: int = 1024


MODES = ('train', 'prefill', 'decode')


def lower(cfg: ModelConfig, job: Job, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
  """Raises ValueError: what cannot be, as the room that would run it says."""
  cfg = cfg.replace(dtype='bfloat16', param_dtype=job.dtype)
  # not `set_mesh`, with which what is computed on the way would run on devices that are not here
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = _train(cfg, job, mesh) if job.mode == 'train' else _sample(cfg, job, mesh)
    return traced, traced.lower()


def _train(cfg, job, mesh):
  if (job.weights, job.kv, job.ple) != ('as_is', 'exact', 'device'):
    raise ValueError('--weights, --kv, --ple: are for --mode=prefill and decode')
  cfg = cfg.replace(scan=True, remat=job.remat, context_length=max(cfg.context_length, job.context))
  model_config.check_trainable(cfg)
  c = base.get_config('e2b').optimizer
  tx = optimizer.make(c, 1000)
  state = trainer.abstract_state(cfg, tx, mesh)
  of = lambda dtype: jax.ShapeDtypeStruct((job.batch, job.context), dtype, sharding=sharding.batch(mesh))
  batch = {name: of(jnp.int32) for name in ('tokens', 'targets', 'positions', 'segments')} | {'weights': of(jnp.float32)}
  step = trainer.make_step(cfg, tx, accumulate=1, loss_chunk=job.loss_chunk)
  where = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=where).trace(state, batch)


def _sample(cfg, job, mesh):
  cfg = cfg.replace(context_length=max(cfg.context_length, job.context))
  params = variables(cfg, job, mesh)
  cfg = cfg.replace(ple_placement=job.ple)
  if hardware.platform() == 'cpu':
    cfg = generate.fastest(cfg)
  shaped = lambda tree: _shaped(tree, sharding.rows(mesh, tree))
  state = shaped(jax.eval_shape(partial(generate._empty, cfg, job.batch, job.context, job.kv)))
  row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((job.batch, *shape), dtype)
  if job.mode == 'prefill':
    chunk = min(generate.PREFILL_CHUNK, job.context)
    return generate._prefill.trace(cfg, params, state.cache, state.seen_BV, shaped(row(cfg.vocab_size, dtype=jnp.float32)),
                                   shaped(row(chunk)), shaped(row(chunk)))
  settings = shaped(jax.eval_shape(lambda: sampler.Settings.make([sampler.Sampling()] * job.batch, cfg.vocab_size)))
  keys = shaped(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), job.batch)))
  one = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.replicated(mesh))
  return generate._decode.trace(cfg, params, state, settings, keys, one(8), one(), slots=SLOTS)


def step_bytes(cfg: ModelConfig, job: Job, mesh: jax.sharding.Mesh) -> int:
  """What a decoding step reads on one device, each once: the caches, and all weights but tables that are read by row, and but the
  experts that `batch` tokens of different choices leave out."""
  read = variables(cfg.replace(dtype='bfloat16', param_dtype=job.dtype), job, mesh)
  read['params'].get('arm', {}).pop('lookup', None)
  cache = jax.eval_shape(partial(quantized_cache.make, cfg.replace(dtype='bfloat16'), job.batch, job.context, job.kv))
  share = lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
  chosen = min(1, job.batch * cfg.num_experts_per_token / cfg.num_experts) if cfg.num_experts else 1
  names = lambda path: tuple(key.key for key in path[1:] if isinstance(key, jax.tree_util.DictKey))
  weights = sum(share(x, x.sharding) * (chosen if quantized.group(names(path)) == 'experts' else 1)
                for path, x in jax.tree_util.tree_leaves_with_path(read))
  return round(weights) + sum(jax.tree.leaves(jax.tree.map(share, cache, sharding.rows(mesh, cache))))


def variables(cfg: ModelConfig, job: Job, mesh: jax.sharding.Mesh) -> dict:
  """Shapes of what sampling reads, {'params': .., 'quant': ..}, with shardings."""
  boxes = transformer.abstract(cfg)
  params = nn.meta.unbox(boxes)
  tree = {'params': params}
  if job.weights != 'as_is':
    tree = jax.eval_shape(lambda params: quantized.quantize(cfg, params, job.weights), params)
  if job.ple in ('host', 'folded_host'):
    table = tree['params']['arm']['lookup'].pop('table')
    zeros = np.broadcast_to(np.zeros((), table.dtype), table.shape)   # no memory
    tree['params']['arm']['lookup']['host'] = ple_table.HostTable({'table': zeros})
  return _shaped(tree, sharding.variables(mesh, boxes, tree))


def _shaped(tree, where):
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, where)
