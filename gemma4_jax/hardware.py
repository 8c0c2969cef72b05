"""What this machine can do at most: peak matmul rate and memory in use."""

import functools
import resource
import sys
import time

import jax
import jax.numpy as jnp

# bfloat16 FLOP/s of one device, dense, from the vendors' data sheets
_PEAK_BF16 = {
    'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12, 'NVIDIA B200': 2250e12, 'Tesla T4': 65e12, 'NVIDIA L4': 121e12,
    'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5p': 459e12, 'TPU v5': 459e12, 'TPU v6 lite': 918e12, 'TPU v6e': 918e12,
}


@functools.lru_cache
def peak_flops() -> tuple[float, str]:
  """(FLOP/s of all devices of this job, where the number is from): bfloat16 of a data sheet, else a float32 matmul timed here."""
  kind = jax.devices()[0].device_kind
  for name in sorted(_PEAK_BF16, key=len, reverse=True):
    if kind.startswith(name):
      return _PEAK_BF16[name] * jax.device_count(), f'data sheet of {name}, bfloat16'
  return measure_matmul(), 'float32 matmul of 2048^3, measured'


def measure_matmul(size: int = 2048, repeats: int = 3, dtype=jnp.float32) -> float:
  """FLOP/s of the best of `repeats` square matmuls on one device."""
  a = jnp.ones((size, size), dtype)
  dot = jax.jit(jnp.dot)
  dot(a, a).block_until_ready()
  best = float('inf')
  for _ in range(repeats):
    start = time.perf_counter()
    dot(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def peak_memory_bytes() -> int:
  """Most bytes ever in use: of the first device where it keeps count, else of this process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use') or peak_process_bytes()


def peak_process_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
