"""Tests run on the CPU, and keep XLA's compiled programs between runs: compiling is most of their time."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

_CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'gemma4_jax' / 'xla_tests'

jax.config.update('jax_compilation_cache_dir', os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(_CACHE))
jax.config.update('jax_compilation_cache_max_size', 2**30)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
