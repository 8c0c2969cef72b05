"""XLA's compiled programs: kept on disk between processes, and the seconds they take to make."""

from collections.abc import Callable
import functools
import time

import jax

from gemma4_jax import hardware, paths

_spans: list[tuple[float, float]] = []   # (start, end) of what was traced or compiled, apart from each other


def keep() -> None:
  """Turns JAX's persistent compilation cache on: in its own $JAX_COMPILATION_CACHE_DIR, or in `xla` of this package's cache."""
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(paths.cache() / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)   # small programs are many


def train_options() -> dict:
  """For compiling a training step. On a CPU LLVM's first level: the matmuls are a library's, the step is not slower than at its
  third, and compiling takes three quarters of the time. (`xla_cpu_use_multi_output_fusion` would take another fifth off; with it the
  compiler of jaxlib 0.10.2 aborts on sharded steps.)"""
  return {'xla_backend_optimization_level': 1} if hardware.platform() == 'cpu' else {}


def lean_options() -> dict:
  """For compiling what reads many weights. On a CPU in an order that spares memory: by default XLA brings all bfloat16 weights to
  float32 before the first is multiplied, 1.9 GB more in E2B's prefill."""
  return {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'} if hardware.platform() == 'cpu' else {}


class Jitted:
  """`jax.jit(function, compiler_options=options(), **kwargs)`, made when it is first used: the options ask for the platform."""

  def __init__(self, function: Callable, options: Callable[[], dict], **kwargs):
    functools.update_wrapper(self, function)
    self._made = functools.cache(lambda platform: jax.jit(function, compiler_options=options(), **kwargs))

  def __call__(self, *args, **kwargs):
    return self._made(hardware.platform())(*args, **kwargs)

  def __getattr__(self, name):   # lower, ...
    return getattr(self._made(hardware.platform()), name)


def seconds() -> float:
  """Time that this process spent tracing and compiling (or reading what was kept) since the first call."""
  _listen()
  return sum(end - start for start, end in _spans)


@functools.cache
def _listen():
  jax.monitoring.register_event_duration_secs_listener(_add)


def _add(event: str, duration: float, **_) -> None:
  if event.startswith('/jax/core/compile/'):
    end = time.perf_counter()
    start = end - duration
    while _spans and _spans[-1][1] > start:   # a function's time holds that of the functions it calls
      start = min(start, _spans.pop()[0])
    _spans.append((start, end))
