"""What this machine is and can do at most: accelerators, cores, peak matmul rate, memory in use.

JAX is imported where it is used: a process that only starts others asks what environment to give them.
"""

import ctypes
import functools
import glob
import os
import resource
import statistics
import sys
import time

# bfloat16 FLOP/s of one device, dense, from the vendors' data sheets
_PEAK_BF16 = {
    'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12, 'NVIDIA B200': 2250e12, 'Tesla T4': 65e12, 'NVIDIA L4': 121e12,
    'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5p': 459e12, 'TPU v5': 459e12,
    'TPU v6 lite': 918e12, 'TPU v6e': 918e12,
}

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4   # of glibc's malloc.h


def has_accelerator() -> bool:
  """Whether JAX would find one here, as far as device nodes and JAX_PLATFORMS tell."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  nodes = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
  return platforms.split(',')[0] != 'cpu' if platforms else any(glob.glob(node) for node in nodes)


def environment() -> dict[str, str]:
  """The variables of this process that change how fast it is, for the record."""
  return {name: os.environ[name] for name in ('GLIBC_TUNABLES', 'JAX_PLATFORMS', 'XLA_FLAGS') if name in os.environ}


def cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def cpu_environment() -> dict[str, str]:
  """Environment variables that make a process faster on a CPU if they are there before it starts; the user's own stay.

  glibc's huge pages, as a step of decoding reads all weights and a program writes hundreds of MB of temporaries. An array under
  32 MiB has them if it is of the heap, and that grows by many pages at once. What is freed a process keeps by `keep_memory`.
  """
  if has_accelerator() or not sys.platform.startswith('linux') or 'GLIBC_TUNABLES' in os.environ:
    return {}
  settings = {'hugetlb': 1, 'mmap_threshold': 32 << 20, 'top_pad': 64 << 20}
  return {'GLIBC_TUNABLES': ':'.join(f'glibc.malloc.{name}={value}' for name, value in settings.items())}


def take_gpu_memory() -> None:
  """Lets JAX take most of a GPU's memory, where it takes 75 % by itself; the user's own setting stays. To be called before JAX is used."""
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.92')


def keep_memory() -> None:
  """Lets this process keep the memory that it frees, on a CPU under Linux's glibc; to be called before JAX is first used.

  A training step writes gigabytes of temporaries. Arrays so large glibc asks of the system and gives back each time, and the system
  fills them with zeros: a fifth of a step. It keeps those of the main thread alone, so programs then run on the thread that calls them.
  """
  if has_accelerator() or not sys.platform.startswith('linux'):
    return
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'mallopt'):   # no glibc
    return
  import jax
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  libc.mallopt(_M_MMAP_MAX, 0)
  libc.mallopt(_M_TRIM_THRESHOLD, -1)


def platform() -> str:
  """Of the devices that what is traced now is for, 'cpu', 'gpu' or 'tpu': those of the mesh in use (`jax.set_mesh`), which may not be
  here, else the default ones."""
  import jax
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = jax.default_backend() if device is None else device.platform
  return 'gpu' if name in ('cuda', 'rocm') else name


def kernels() -> str:
  """Whose Pallas kernels run on the device that is traced for: 'tpu', 'gpu', or '' for none: on a CPU, and on GPUs older than compute
  capability 8.0 (a T4), which Triton does not know."""
  import jax
  here, device = jax.devices()[0], jax.sharding.get_abstract_mesh().abstract_device
  device = here if device is None or device.device_kind == here.device_kind else device   # one that is only described counts as new
  old = str(getattr(device, 'compute_capability', '')).startswith(('5.', '6.', '7.'))
  return platform() if platform() in ('tpu', 'gpu') and not old else ''


@functools.lru_cache
def peak_flops() -> tuple[float, str]:
  """(FLOP/s of all devices of this job, where the number is from): bfloat16 of a data sheet, else a float32 matmul timed here."""
  import jax
  kind = jax.devices()[0].device_kind
  for name in sorted(_PEAK_BF16, key=len, reverse=True):
    if kind.startswith(name):
      return _PEAK_BF16[name] * jax.device_count(), f'data sheet of {name}, bfloat16'
  return measure_matmul() * jax.process_count(), 'float32 matmul, measured'


def measure_matmul(size: int | None = None, repeats: int = 3, dtype='float32') -> float:
  """FLOP/s of the best of `repeats` square matmuls on one device; size None: 2048, or 8192 on an accelerator, for which 2048 is no
  work."""
  import jax
  import jax.numpy as jnp
  size = size or (2048 if platform() == 'cpu' else 8192)
  a = jnp.ones((size, size), dtype)
  dot = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))   # as accelerators sum, and as a CPU is fastest
  dot(a, a).block_until_ready()
  best = float('inf')
  for _ in range(repeats):
    start = time.perf_counter()
    dot(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def measure_bandwidth(size: int | None = None, repeats: int = 8) -> float:
  """Bytes/s at which one device reads: the median of `repeats` matrix-vector products of `size` bytes, ours or XLA's if faster, or on
  an accelerator of sums; size None: 2**28, or 2**32 on an accelerator."""
  import jax
  import jax.numpy as jnp
  size = size or (2**28 if platform() == 'cpu' else 2**32)

  from gemma4_jax.native import matvec
  w, x = jnp.ones((size // 4096, 1024)), jnp.ones((1, 1024))
  ways = [jax.jit(lambda x, w: x @ w.T)]
  if platform() != 'cpu':
    ways.append(jax.jit(lambda x, w: w.sum()))
  elif not matvec.why_not():
    ways.append(jax.jit(matvec.dot))
  best = float('inf')
  for way in ways:
    way(x, w).block_until_ready()
    times = []
    for _ in range(repeats):
      start = time.perf_counter()
      way(x, w).block_until_ready()
      times.append(time.perf_counter() - start)
    best = min(best, statistics.median(times))
  return size / best


def is_out_of_memory(error: RuntimeError) -> bool:
  """Whether XLA's error, which has no public type, says so."""
  return 'RESOURCE_EXHAUSTED' in str(error) or 'Out of memory' in str(error)


def peak_memory_bytes() -> int:
  """Most bytes ever in use: of the first device where it keeps count, else of this process."""
  import jax
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use') or peak_process_bytes()


def peak_process_bytes() -> int:
  """Most memory that this process ever had; Linux's own count, as getrusage's begins with that of the process that forked it."""
  try:
    with open('/proc/self/status') as status:
      return 1024 * next(int(line.split()[1]) for line in status if line.startswith('VmHWM'))
  except (OSError, StopIteration):
    pass
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
