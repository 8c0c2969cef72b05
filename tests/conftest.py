"""Tests run on the CPU, and keep XLA's compiled programs between runs: compiling is most of their time."""

import os
import signal

from gemma4_jax import paths

# Started in the background of a script, pytest and all that it starts would ignore Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# In the environment, so that the processes that tests start share the cache and its rules.
for name, value in {'PLATFORMS': 'cpu', 'COMPILATION_CACHE_DIR': paths.cache() / 'xla_tests', 'COMPILATION_CACHE_MAX_SIZE': 2**30,
                    'PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': 0.1, 'PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': -1}.items():
  os.environ.setdefault(f'JAX_{name}', str(value))
# Code that is soon compiled rather than fast. Flags of whoever runs the tests come after these, and hold.
os.environ['XLA_FLAGS'] = ' '.join((
    '--xla_backend_optimization_level=1',
    '--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer,xla_cpu_optimize_for_size',
    os.environ.get('XLA_FLAGS', '')))

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Compiled programs of all tests together would take 8 GB."""
  yield
  jax.clear_caches()
