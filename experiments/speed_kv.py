"""What `experiments.speed kv` measures: one token after a long context, on quantized caches and on exact ones, each in a process of
its own. Caches are filled with random codes and numbers: nothing here depends on what they say."""

import functools
import time


def measure(name: str, kv: str, other: str, dtype: str, batch: int, contexts: tuple[int, ...], repeats: int, weights: str) -> list[dict]:
  """A row a context: of a global layer that `kv` or `other` quantizes, and of the whole model's step.

  Args:
    kv: what is measured; `other` is what it will be compared with, so that both take the same layer.
  """
  import jax
  import jax.numpy as jnp

  from configs import base
  from gemma4_jax import hardware, kv_format
  from gemma4_jax.model import attention, quantized, quantized_cache, transformer
  from gemma4_jax.sampling import generate
  cfg = generate.fastest(base.models()[name].replace(dtype=dtype, param_dtype=dtype, scan=False))
  format = kv_format.make(kv)
  found = [format.layers(cfg), kv_format.make(other).layers(cfg)]
  i = next((i for i, layer in found[0].items() if layer.spec.window is None and not (layer.exact and found[1][i].exact)), None)
  if i is None:
    raise ValueError(f'kv: neither {kv} nor {other} quantizes a global layer of {name}')
  cfg, params = quantized_cache.fold(cfg, transformer.init(cfg, 0), format)
  if weights != 'as_is':
    params = quantized.quantize(cfg, params, weights, consume=True)
  spec, layer = cfg.layers[i], found[0][i]
  width = jnp.dtype(dtype).itemsize

  @functools.partial(jax.jit, donate_argnums=0)
  def attend(held, q, k, v, length_B):
    stream = attention.Stream(length_B[:, None], jnp.ones((batch, 1), jnp.int32), {})
    seen = held.append(k, v, stream, jnp.ones(spec.head_dim, dtype))
    return seen.cache, seen.attend(q, stream, None, cfg.attention_scale)

  new, rows = 4, []
  for context in contexts:
    capacity = context + new * (repeats + 2)
    cache = filled(quantized_cache.make(cfg, batch, capacity, format), context)
    held = jax.tree.map(jnp.copy, cache.layers[i])
    draw = lambda heads: jax.random.normal(jax.random.key(heads), (batch, 1, heads, spec.head_dim), dtype)
    q, k, v = draw(cfg.num_heads), draw(spec.num_kv_heads), draw(spec.num_kv_heads)
    alone = []
    for repeat in range(repeats + 1):   # the first compiles
      begin = time.perf_counter()
      for _ in range(new):
        held, out = attend(held, q, k, v, jnp.full((batch,), context + repeat, jnp.int32))
      jax.block_until_ready(out)
      alone.append((time.perf_counter() - begin) / new)
    cache_bytes = cache.nbytes
    whole = step_seconds(steps(cfg, batch), params, cache, new, repeats)
    rows.append({
        'context': context, 'attention_seconds': min(alone[1:]), 'step_seconds': min(whole),
        'attention_bytes': batch * layer.bytes(context, width), 'cache_bytes': cache_bytes})
  about = {'layer': str(layer), 'kv': quantized_cache.describe(cfg, format, max(contexts)), 'library': f'jax {jax.__version__}',
           'device': jax.devices()[0].device_kind, 'bandwidth': hardware.measure_bandwidth()}
  return [row | about for row in rows]


def steps(cfg, batch: int):
  """Returns (params, cache, count) -> (the last token, cache) after `count` greedy steps, jitted; the cache is donated."""
  import jax
  import jax.numpy as jnp

  from gemma4_jax.model import transformer

  @functools.partial(jax.jit, donate_argnums=1, static_argnums=2)
  def run(params, cache, count):
    def step(_, carry):
      token_B1, cache = carry
      logits, out = transformer.Transformer(cfg).apply(transformer.variables(params), token_B1, None, jnp.ones_like(token_B1), cache=cache)
      return logits.argmax(-1).astype(jnp.int32), out['cache']
    return jax.lax.fori_loop(0, count, step, (jnp.ones((batch, 1), jnp.int32), cache))
  return run


def step_seconds(run, params, cache, count: int, repeats: int) -> list[float]:
  """Of one step, by each of `repeats` calls of `steps`, after one that compiles; the cache has room for them all, and is used up."""
  import jax
  seconds = []
  for _ in range(repeats + 1):
    begin = time.perf_counter()
    token, cache = run(params, cache, count)
    jax.block_until_ready(token)
    seconds.append((time.perf_counter() - begin) / count)
  return seconds[1:]


def prefill_memory(name: str, kv: str, dtype: str, batch: int, context: int) -> dict:
  """Bytes of the program that runs a chunk of a prompt, as its compiler has them: caches, and what it needs beside weights and them."""
  import jax
  import numpy as np

  from configs import base
  from gemma4_jax.model import quantized_cache, transformer
  from gemma4_jax.sampling import generate
  cfg = base.models()[name].replace(dtype=dtype, param_dtype=dtype, scan=False)
  params = jax.tree.map(lambda box: box.value, transformer.abstract(cfg), is_leaf=lambda x: hasattr(x, 'names'))
  cache = jax.eval_shape(lambda: quantized_cache.make(cfg, batch, context, kv))
  ids = jax.ShapeDtypeStruct((batch, min(generate.PREFILL_CHUNK, context)), np.int32)
  seen, logits = (jax.ShapeDtypeStruct((batch, cfg.vocab_size), kind) for kind in (bool, np.float32))
  memory = generate._prefill.lower(cfg, params, cache, seen, logits, ids, ids).compile().memory_analysis()
  return {'prefill_cache_bytes': cache.nbytes, 'prefill_temporary_bytes': memory.temp_size_in_bytes}


def compare(ours: list[dict], exact: list[dict]) -> list[dict]:
  """A row a context: how many times as fast, and the share of what the bytes would allow."""
  rows = []
  for one, two in zip(ours, exact, strict=True):
    faster, ceiling = two['attention_seconds'] / one['attention_seconds'], two['attention_bytes'] / one['attention_bytes']
    rows.append({
        'context': one['context'], 'attention_times_as_fast': faster, 'attention_ceiling': ceiling,
        'attention_share_of_ceiling': faster / ceiling,
        'attention_share_of_bandwidth': one['attention_bytes'] / one['attention_seconds'] / one['bandwidth'],
        'step_times_as_fast': two['step_seconds'] / one['step_seconds']})
  return rows


def filled(cache, length: int):
  """The cache as if every row held `length` tokens."""
  import jax
  import jax.numpy as jnp
  key = jax.random.key(0)

  def fill(x):
    if x.dtype == jnp.uint8:
      return jax.random.bits(key, x.shape, x.dtype)
    return (0.05 * jax.random.normal(key, x.shape)).astype(x.dtype)
  return cache.replace(layers=jax.tree.map(fill, cache.layers), length_B=jnp.full_like(cache.length_B, length))
