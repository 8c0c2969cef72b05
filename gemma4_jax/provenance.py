"""Which code and which packages a number comes from; every result that is kept carries it."""

import importlib.metadata
from pathlib import Path
import platform
import subprocess
import time

_CODE = ('.py', '.cc')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'grain', 'tokenizers')


def code(results: Path | None = None) -> dict:
  """{'commit': of the checkout this package lies in, or None, 'dirty': whether files differ from it, 'python', 'versions'}.

  New files count if they are code: what a run writes into the checkout does not make its code another.

  Args:
    results: a file of the checkout that holds results, row by row: it may differ.
  """
  def git(*args):
    try:
      done = subprocess.run(['git', '-C', str(Path(__file__).parent), *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:   # a machine without git
      return ''
    return done.stdout.rstrip() if done.returncode == 0 else ''
  but = [] if results is None else ['--', ':/', f':(exclude){results.resolve()}']
  changed = git('status', '--porcelain', '--untracked-files=all', *but).splitlines()
  return {'commit': git('rev-parse', 'HEAD') or None,
          'dirty': any(not line.startswith('??') or line.rstrip('"').endswith(_CODE) for line in changed),
          'python': platform.python_version(), 'versions': {name: importlib.metadata.version(name) for name in _PACKAGES}}


def result() -> dict:
  """The date, `code` and the device of JAX: the head of a result's JSON. Ask before the result's files change the checkout."""
  import jax
  return {'date': time.strftime('%Y-%m-%d'), **code(), 'device': jax.devices()[0].device_kind}
