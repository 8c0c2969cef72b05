"""What `experiments.speed` measures of sampling: greedy decoding, prefill and loading, ours and a peer's, each in a process of its own."""

from statistics import median
import sys
import time

PROMPT, NEW = 512, 64   # tokens of a prompt; tokens decoded after it


def ours(name: str, what: str, dtype: str, batch: int, repeats: int, weights: str) -> dict:
  import jax

  from configs import base
  from gemma4_jax import hardware, size
  from gemma4_jax.model import flash, quantized, transformer
  from gemma4_jax.sampling import generate
  from gemma4_jax.sampling.sampler import GREEDY
  begin = time.perf_counter()
  cfg = generate.fastest(base.models()[name].replace(dtype=dtype, param_dtype=dtype))
  params = transformer.init(cfg, 0)
  if weights != 'as_is':
    params = quantized.quantize(cfg, params, weights, consume=True)
  jax.block_until_ready(params)
  init_seconds = time.perf_counter() - begin
  prompt_BT = ids(cfg, batch)
  prefill, decode = [], []
  for _ in range(repeats + 1):   # the first compiles
    session = generate.Session(cfg, params, batch, PROMPT + NEW)
    begin = time.perf_counter()
    session.append(prompt_BT)
    session.wait()
    prefill.append(time.perf_counter() - begin)
    if what == 'prefill' and len(prefill) > 1:
      continue
    session_steps = session.generate(NEW, sampling=GREEDY, stop_ids=(), every=NEW)
    begin = time.perf_counter()
    next(session_steps)
    decode.append(time.perf_counter() - begin)
  read = None if weights == 'as_is' else read_bytes(params)
  step_bytes = size.decode_bytes(cfg, PROMPT + NEW // 2, batch, read)
  result = {'library': f'jax {jax.__version__}', 'device': jax.devices()[0].device_kind,
            'path': f'{quantized.matmul(cfg, params)}, attention of prompts {flash.choose(cfg.attention_implementation)}, '
                    f'weights {dtype if weights == "as_is" else weights}',
            'init_seconds': init_seconds, 'first_seconds': prefill[0] + decode[0], 'cache_bytes': session.cache_bytes,
            'peak_memory_bytes': hardware.peak_memory_bytes()}
  bandwidth, peak = hardware.measure_bandwidth(), hardware.measure_matmul(dtype=dtype)
  result |= {'bandwidth': bandwidth, 'matmul_peak_flops': peak}
  if what == 'prefill':
    seconds = median(prefill[1:])
    return result | {'tokens_per_s': batch * PROMPT / seconds, 'share_of_limit': batch * size.prefill_flops(cfg, PROMPT) / seconds / peak,
                     'limit': 'FLOPs that the prompt needs over the measured matmul peak'}
  seconds = median(decode[1:]) / (NEW - 1)
  return result | {'tokens_per_s': batch / seconds, 'bytes_per_step': step_bytes,
                   'share_of_limit': step_bytes / seconds / bandwidth,
                   'limit': 'bytes of weights and cache that a step reads over the measured read bandwidth'}


def read_bytes(params) -> int:
  """Of the weights, without the tables that are read by row: what a step of decoding reads."""
  import jax
  return sum(leaf.nbytes for path, leaf in jax.tree_util.tree_leaves_with_path(params) if 'lookup' not in jax.tree_util.keystr(path))


def scanned(name: str, dtype: str, steps: int) -> dict:
  """Of one token through a model without a cache, which reads all its weights: seconds and temporaries with its blocks one after another,
  as decoding has them, and as a scan over stacked weights, by XLA alone."""
  import jax
  import jax.numpy as jnp

  from configs import base
  from gemma4_jax.model import transformer
  cfg = base.models()[name].replace(dtype=dtype, param_dtype=dtype)
  params, token = transformer.init(cfg, 0), jnp.ones((1, 1), jnp.int32)
  programs, out = {}, {'device': jax.devices()[0].device_kind}
  for path, fields in (('one_by_one', {}), ('scanned', {'scan': True})):
    one = cfg.replace(**fields)
    weights = transformer.stack(one, params) if one.scan else params
    run = jax.jit(lambda weights, token, one=one: transformer.Transformer(one).apply({'params': weights}, token)[0])
    compiled = run.lower(weights, token).compile()
    compiled(weights, token).block_until_ready()
    programs[path] = compiled, weights
    out[path] = {'temporary_bytes': compiled.memory_analysis().temp_size_in_bytes}
  times = {path: [] for path in programs}
  for _ in range(8 * steps):   # in turn: machines drift
    for path, (run, weights) in programs.items():
      begin = time.perf_counter()
      run(weights, token).block_until_ready()
      times[path].append(time.perf_counter() - begin)
  for path, found in times.items():
    out[path]['seconds'] = median(found)
  return out | {'times_as_long': out['scanned']['seconds'] / out['one_by_one']['seconds']}


def hf(name: str, what: str, dtype: str, batch: int, repeats: int, weights: str) -> dict:
  del weights   # as they are: transformers alone has no others
  try:
    import torch
    import transformers
  except ImportError as error:
    sys.exit(f"error: --peer=hf: {error}: pip install 'gemma4_jax[peer]'")
  from configs import base
  from gemma4_jax import hardware
  from gemma4_jax.checkpoint import hf as names
  cfg = base.models()[name]
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.set_float32_matmul_precision('high')   # TensorFloat-32 on a GPU, as JAX multiplies float32 there
  torch.set_default_dtype(getattr(torch, dtype))
  fields = {**names.config_to_hf(cfg), 'attn_implementation': 'sdpa'}
  model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**fields)).to(device).eval()
  prompt_BT = torch.tensor(ids(cfg, batch), dtype=torch.long, device=device)
  settings = dict(attention_mask=torch.ones_like(prompt_BT), do_sample=False, eos_token_id=None, pad_token_id=0)

  def run(new):
    begin = time.perf_counter()
    with torch.inference_mode():
      out = model.generate(prompt_BT, max_new_tokens=new, min_new_tokens=new, **settings)
    assert out.shape == (batch, PROMPT + new)
    return time.perf_counter() - begin

  run(2)
  prefill = median([run(1) for _ in range(repeats)])
  result = {'library': f'torch {torch.__version__}, transformers {transformers.__version__}', 'device': device,
            'path': model.config._attn_implementation, 'peak_memory_bytes':
            torch.cuda.max_memory_allocated() if device == 'cuda' else hardware.peak_process_bytes()}
  if what == 'prefill':
    return result | {'tokens_per_s': batch * PROMPT / prefill}
  seconds = (median([run(NEW) for _ in range(repeats)]) - prefill) / (NEW - 1)
  return result | {'tokens_per_s': batch / seconds}


def ids(cfg, batch: int):
  """The prompts, int32 [B, T]."""
  import numpy as np
  return np.random.default_rng(0).integers(3, cfg.vocab_size, (batch, PROMPT)).astype(np.int32)


def write_random(name: str, dtype: str, folder: str) -> None:
  """A checkpoint as transformers reads it: random weights of a model of configs/base.py and a stand-in for its tokenizer."""
  from pathlib import Path

  from configs import base
  from gemma4_jax.checkpoint import save
  from gemma4_jax.data.tokenizer import Tokenizer
  from gemma4_jax.model import transformer
  cfg = base.models()[name].replace(dtype=dtype, param_dtype=dtype)
  save.save_hf(cfg, transformer.init(cfg, 0), folder)
  (Path(folder) / 'tokenizer.json').write_text(Tokenizer.stand_in(vocab_size=cfg.vocab_size).serialized, encoding='utf-8')


def first_token(folder: str, weights: str) -> dict:
  """Loads a checkpoint and answers a short prompt with one token."""
  from gemma4_jax import compilation, hardware
  from gemma4_jax.sampling import text
  compilation.keep()
  begin = time.perf_counter()
  model = text.load(folder, weights=weights)
  loaded = time.perf_counter()
  run = model.start([model.encode('The sea is')], max_new_tokens=1)
  run.finish()
  return {'load_seconds': loaded - begin, 'first_token_seconds': time.perf_counter() - loaded, 'compile_seconds': run.stats.compile_seconds,
          'peak_memory_bytes': hardware.peak_memory_bytes()}
