"""Weights times few rows on a CPU, compiled on first use by the machine's C++ compiler.

XLA:CPU converts bfloat16, int8 and packed weights to float32 in memory before it multiplies; decoding, where weights are read for one
row each, is then bound by those copies. Here they are read once, as stored. No gradients.
"""

import ctypes
from functools import lru_cache
import hashlib
import os
from pathlib import Path
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from gemma4_jax import paths

MAX_ROWS = 8
_SOURCE = Path(__file__).with_suffix('.cc')
_FLAGS = ('-O3', '-march=native', '-std=c++17', '-fPIC', '-shared', '-ffp-contract=fast')


def dot(x_RK: jax.Array, w_NK: jax.Array, scale_N: jax.Array | None = None) -> jax.Array:
  """x w^T * scale, float32 [R, N], R <= MAX_ROWS; w: float32, bfloat16 or int8.

  Raises:
    RuntimeError: it cannot be built here; says why.
  """
  _register()
  scale_N = jnp.ones(w_NK.shape[:1], jnp.float32) if scale_N is None else scale_N.astype(jnp.float32)
  call = jax.ffi.ffi_call('gemma4_matvec', jax.ShapeDtypeStruct((x_RK.shape[0], w_NK.shape[0]), jnp.float32))
  return call(x_RK.astype(jnp.float32), w_NK, scale_N)


def dot_codes(x_RK: jax.Array, codes_NW: jax.Array, scale_GN: jax.Array, levels: np.ndarray) -> jax.Array:
  """As `dot`, of a weight in packed codes: w[n, k] = scale[k / (K / G), n] * levels[code].

  Args:
    codes_NW: uint8, rows of `turboquant.packing`.
    scale_GN: bfloat16 or float16.
    levels: float32 [4, 8, 16, 32, 64 or 256]; of more than 32, equal steps.
  """
  _register()
  call = jax.ffi.ffi_call('gemma4_matvec_codes', jax.ShapeDtypeStruct((x_RK.shape[0], codes_NW.shape[0]), jnp.float32))
  return call(x_RK.astype(jnp.float32), codes_NW, scale_GN, jnp.asarray(levels))


@lru_cache
def why_not() -> str | None:
  """Why `dot` cannot run here; None: it can."""
  if jax.default_backend() != 'cpu':
    return f'the backend is {jax.default_backend()}, not cpu'
  try:
    _register()
  except RuntimeError as error:
    return str(error)
  return None


@lru_cache
def _register():
  library = ctypes.CDLL(str(_build()))
  for name, function in (('gemma4_matvec', library.Gemma4Matvec), ('gemma4_matvec_codes', library.Gemma4MatvecCodes)):
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform='cpu')


def _build() -> Path:
  compiler = os.environ.get('CXX') or next((name for name in ('g++', 'clang++', 'c++') if shutil.which(name)), None)
  if compiler is None:
    raise RuntimeError('no C++ compiler: none of g++, clang++ and c++ is on PATH')
  # the file is for this machine, this jaxlib and this source alone
  version = '\n'.join([_SOURCE.read_text(), jaxlib.__version__, compiler, *_FLAGS, platform.machine(), _cpu_features()])
  target = paths.cache() / 'native' / f'matvec-{hashlib.sha256(version.encode()).hexdigest()[:16]}.so'
  if target.exists():
    return target
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
      built = Path(folder) / target.name
      command = [*shlex.split(compiler), *_FLAGS,   # CXX may be 'ccache g++'
                 '-I', jax.ffi.include_dir(), str(_SOURCE), '-o', str(built)]
      done = subprocess.run(command, capture_output=True, text=True)
      if done.returncode:
        raise RuntimeError(f'{compiler} could not compile {_SOURCE.name}: {done.stderr.strip()[:500]}')
      os.replace(built, target)
  except OSError as error:
    raise RuntimeError(f'{_SOURCE.name} could not be built in {target.parent}: {error}') from error
  return target


def _cpu_features() -> str:
  try:
    return next((line for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith(('flags', 'Features'))), '')
  except OSError:
    return platform.processor()
