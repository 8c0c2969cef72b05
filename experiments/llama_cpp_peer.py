r"""llama.cpp as a peer: our random weights as a GGUF file by its own script, then its logits, decoding and prefill.

  python -m experiments.llama_cpp_peer --sizes=e2b-toy,31b-toy --convert=llama.cpp/convert_hf_to_gguf.py   # logits beside ours, as JSON

Needs the extra `llama_cpp`, and `torch` and `transformers` for the script, which is in llama.cpp's sources and in the source
distribution of llama-cpp-python, in vendor/llama.cpp. LLAMA_CPP_LIB_PATH names a folder with another build of the library.
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time

from configs import base
from gemma4_jax import hardware

OUTTYPES = {('float32', 'as_is'): 'f32', ('bfloat16', 'as_is'): 'bf16', ('float32', 'int8'): 'q8_0', ('bfloat16', 'int8'): 'q8_0'}
_UBATCH = 512   # tokens that llama.cpp runs at once, its default


def library():
  """The module `llama_cpp`, told to keep quiet; ends the program where it is not installed."""
  try:
    import llama_cpp
  except ImportError as error:
    sys.exit(f"error: llama.cpp: {error}: pip install 'gemma4_jax[llama_cpp]'")
  silent = llama_cpp.llama_log_callback(lambda level, text, user: sys.stderr.buffer.write(text) if level == 4 else None)   # errors
  library.kept = silent   # C calls it as long as the process lives
  llama_cpp.llama_log_set(silent, None)
  llama_cpp.llama_backend_init()
  return llama_cpp


def check(script: str, outtype: str | None) -> None:
  """Ends the program, in one line, if `script` is no file or llama.cpp has no such weights."""
  if outtype is None:
    sys.exit(f'error: --weights: llama.cpp\'s script writes {", ".join(sorted(set(OUTTYPES.values())))} only')
  if not script or not Path(script).is_file():
    sys.exit(f'error: --convert: {script or "not given"}: name the convert_hf_to_gguf.py of llama.cpp\'s sources')


def write_gguf(name: str, dtype: str, outtype: str, script: str, file: str) -> None:
  """Weights of seed 0 of a model of configs/base.py, through `save_hf` and llama.cpp's script."""
  from experiments import speed_sampling
  with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder:
    speed_sampling.write_random(name, dtype, os.path.join(folder, 'hf'))
    done = subprocess.run([sys.executable, script, os.path.join(folder, 'hf'), '--outfile', file, '--outtype', outtype],
                          capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f'{script} failed:\n{done.stderr[-2000:]}')


class Model:
  """A GGUF file and one batch of sequences of at most `length` tokens.

  Attributes:
    what: library, build and number formats, for the record.
  """

  def __init__(self, file: str, batch: int, length: int, cache: str = 'F16'):
    """Args: cache: dtype of keys and values, 'F16' (llama.cpp's default) or 'F32', then without flash attention."""
    self._lib = lib = library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 999 if lib.llama_supports_gpu_offload() else 0
    self._model = lib.llama_model_load_from_file(os.fsencode(file), params)
    if not self._model:
      raise RuntimeError(f'{file}: llama.cpp cannot load it')
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max = batch * length, batch
    params.n_batch, params.n_ubatch = batch * length, _UBATCH
    params.n_threads = params.n_threads_batch = hardware.cores()
    params.swa_full, params.no_perf = False, True
    if cache == 'F32':
      params.type_k = params.type_v = lib.GGML_TYPE_F32
      params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    self._context = lib.llama_init_from_model(self._model, params)
    if not self._context:
      raise RuntimeError(f'{file}: llama.cpp has no context of {batch} x {length} tokens')
    self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
    self.what = {'library': f'llama-cpp-python {lib.__version__}', 'device': 'gpu' if lib.llama_supports_gpu_offload() else 'cpu',
                 'path': f'{Path(file).name}, {hardware.cores()} threads, cache {cache}', 'file_bytes': os.path.getsize(file)}

  def clear(self) -> None:
    self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

  def logits(self, ids_BT, start: int, last_only: bool = True):
    """Adds tokens at positions `start` and on; float32 [B, V] after the last ones, or [B, T, V]."""
    import numpy as np
    (rows, length), lib = ids_BT.shape, self._lib
    n = rows * length
    batch = lib.llama_batch_init(n, 0, 1)
    try:
      batch.n_tokens = n
      array = lambda pointer: np.ctypeslib.as_array(pointer, (n,))
      array(batch.token)[:] = ids_BT.reshape(-1)
      array(batch.pos)[:] = np.tile(np.arange(start, start + length), rows)
      array(batch.n_seq_id)[:] = 1
      wanted = np.tile(np.arange(length) == length - 1, rows) if last_only else np.ones(n, bool)
      array(batch.logits)[:] = wanted
      for i in range(n):
        batch.seq_id[i][0] = i // length
      if lib.llama_decode(self._context, batch):
        raise RuntimeError('llama_decode failed')
      rows_of = [np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, int(i)), (self._vocab,)) for i in np.flatnonzero(wanted)]
      found = np.stack(rows_of)
    finally:
      lib.llama_batch_free(batch)
    return found if last_only else found.reshape(rows, length, -1)


def measure(name: str, what: str, batch: int, repeats: int, file: str) -> dict:
  """As `speed_sampling.ours`, of the GGUF file."""
  from experiments import speed_sampling
  ids, new = speed_sampling.ids(base.models()[name], batch), speed_sampling.NEW
  model = Model(file, batch, speed_sampling.PROMPT + new)
  prefill, decode = [], []
  for _ in range(repeats + 1):   # the first reads the file
    model.clear()
    begin = time.perf_counter()
    logits_BV = model.logits(ids, 0)
    prefill.append(time.perf_counter() - begin)
    if what == 'prefill':
      continue
    begin = time.perf_counter()
    for i in range(new - 1):
      logits_BV = model.logits(logits_BV.argmax(-1)[:, None], speed_sampling.PROMPT + i)
    decode.append(time.perf_counter() - begin)
  tokens, seconds = (batch * (new - 1), decode) if what == 'decode' else (ids.size, prefill)
  return model.what | {'tokens_per_s': tokens / statistics.median(seconds[1:]), 'peak_memory_bytes': hardware.peak_process_bytes()}


def compare(name: str, script: str, length: int) -> dict:
  """Float32 logits of a prompt of random tokens, ours and llama.cpp's on equal weights: the largest absolute difference at each token,
  its median and maximum over tokens, and the share of tokens with the same argmax.

  On a CPU llama.cpp looks its GELU up in a table of float16: `float16_gelu` is ours with such a GELU, too. Where experts are chosen
  among near equals either may choose others, so that the maximum of such a model says nothing.
  """
  from unittest import mock

  import jax
  import numpy as np

  from gemma4_jax.model import transformer
  cfg = base.models()[name].replace(dtype='float32', param_dtype='float32')
  ids_BT = np.random.default_rng(0).integers(3, cfg.vocab_size, (1, length)).astype(np.int32)
  with tempfile.TemporaryDirectory() as folder:
    file = str(Path(folder) / f'{name}.gguf')
    write_gguf(name, 'float32', 'f32', script, file)
    theirs_BTV = Model(file, 1, length, 'F32').logits(ids_BT, 0, last_only=False)
  params = transformer.init(cfg, 0)

  def beside(ours_BTV):
    difference_BT = np.abs(ours_BTV - theirs_BTV).max(-1)
    return {'median_difference': float(np.median(difference_BT)), 'largest_difference': float(difference_BT.max()),
            'same_argmax': float((ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)).mean())}

  ours = lambda: np.asarray(jax.jit(lambda params: transformer.Transformer(cfg).apply({'params': params}, ids_BT)[0])(params))
  found = {'size': name, 'tokens': length, 'window': cfg.window, 'largest_logit': float(np.abs(theirs_BTV).max()), **beside(ours())}
  with mock.patch.object(jax.nn, 'gelu', _float16_gelu):
    return {**found, 'float16_gelu': beside(ours())}


def _float16_gelu(x, approximate):
  """Source: llama.cpp `ggml/src/ggml-cpu/vec.h`, ggml_vec_gelu_f32."""
  import jax.numpy as jnp
  inside = x.astype(jnp.float16).astype(jnp.float32)
  inside = 0.5 * inside * (1 + jnp.tanh((2 / jnp.pi)**0.5 * inside * (1 + 0.044715 * inside**2)))
  return jnp.where(x <= -10, 0, jnp.where(x >= 10, x, inside.astype(jnp.float16).astype(jnp.float32)))


def main(argv=None) -> None:
  parser = argparse.ArgumentParser('python -m experiments.llama_cpp_peer', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--sizes', default='e2b-toy', help='models of configs/base.py, with commas between (default: %(default)s)')
  parser.add_argument('--convert', default='', metavar='FILE', help="llama.cpp's convert_hf_to_gguf.py")
  parser.add_argument('--tokens', type=int, default=192, help='length of the prompt')
  args = parser.parse_args(argv)
  check(args.convert, 'f32')
  sizes = args.sizes.split(',')
  if unknown := set(sizes) - set(base.models()):
    parser.error(f'--sizes: {", ".join(sorted(unknown))}: there are {", ".join(base.models())}')
  library()
  print(json.dumps([compare(name, args.convert, args.tokens) for name in sizes], indent=2))


if __name__ == '__main__':
  main()
