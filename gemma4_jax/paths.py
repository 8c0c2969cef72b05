"""Where what can be made again is kept."""

import os
import pathlib


def cache() -> pathlib.Path:
  """$GEMMA4_JAX_CACHE, or ~/.cache/gemma4_jax."""
  return pathlib.Path(os.environ.get('GEMMA4_JAX_CACHE') or '~/.cache/gemma4_jax').expanduser()
