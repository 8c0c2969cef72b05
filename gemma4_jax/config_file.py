"""Config files and the flags that set their fields: loaded, and whatever is mistyped answered in one line."""

from collections.abc import Callable, Mapping, Sequence
import importlib.util
import os
import pathlib
import re
import sys
import traceback

from absl import flags
import ml_collections

from gemma4_jax import config as model_config


class Error(ValueError):
  """The user's to mend: its text is one line that names the field or file, and the fix."""


def load(config_flag: str):
  """Loads `path/to/file.py:arg` and returns its module and arg (None without a colon)."""
  path, colon, arg = config_flag.partition(':')
  if not pathlib.Path(path).is_file():
    folders = dict.fromkeys([pathlib.Path(path).parent, pathlib.Path('configs')])
    near = sorted(str(p) for folder in folders for p in folder.glob('[!_]*.py'))
    raise Error(f'--config={config_flag}: no such file' + (f'; did you mean {model_config.nearest(path, near)}?' if near else ''))
  spec = importlib.util.spec_from_file_location('launched_config', path)
  module = importlib.util.module_from_spec(spec)
  call(path, lambda: spec.loader.exec_module(module))
  if not hasattr(module, 'get_config'):
    raise Error(f'--config={config_flag}: {path} defines no get_config()')
  return module, (arg if colon else None)


def get_config(module, arg: str | None) -> ml_collections.ConfigDict:
  return call(module.__file__, lambda: module.get_config() if arg is None else module.get_config(arg))


def call(path: str, function: Callable):
  """Calls into a config file; whatever it raises names the file and line in one line."""
  try:
    return function()
  except Exception as e:
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if os.path.abspath(frame.filename) == os.path.abspath(path)]
    kind = '' if isinstance(e, ValueError) else f'{type(e).__name__}: '
    raise Error(f'{os.path.relpath(path)}{f", line {lines[-1]}" if lines else ""}: {kind}{one_line(e)}') from e


def check_field(config: ml_collections.ConfigDict, path: str, where: str = '', prefix: str = '') -> None:
  """Raises Error with the nearest name if `config` has no field `path`; names are told with `prefix`."""
  fields = flatten(config.to_dict())
  if path not in fields and not any(name.startswith(path + '.') for name in fields):
    raise Error(f'{where}{prefix}{path}: no such field; did you mean {prefix}{model_config.nearest(path, list(fields))}?')


def parse(argv: list[str]) -> list[str]:
  """A `flags_parser` for `app.run`: what cannot be parsed, or loaded of a flag --config, ends the program with one line and exit
  status 2, and --help with 0."""
  try:
    rest = flags.FLAGS(argv)
    if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
      flags.FLAGS.config.keys()   # a file that could not be loaded says so only when it is used
    return rest
  except SystemExit as e:
    sys.exit(0 if e.code == 1 else e.code)   # absl's --help ends with 1
  except Exception as e:  # a mistyped field, path, value or flag: ml_collections raises many kinds
    try:
      _explain(argv)
      raise Error(one_line(e)) from e
    except Error as explained:
      print(f'error: {explained}', file=sys.stderr)
      sys.exit(2)


def _explain(argv: Sequence[str]) -> None:
  """Raises Error if the config file, or a field set on the command line, is what cannot be read."""
  given = [(m.group(2), i) for i, arg in enumerate(argv) if (m := re.fullmatch(r'--?config(=(.*))?', arg))]
  fields = [m.group(1) for arg in argv if (m := re.match(r'--?(?:no)?config\.([^=]+)', arg))]
  if not given:
    if fields:
      raise Error(f'--config.{fields[0]}: needs --config=FILE before it')
    return
  value, i = given[-1]
  config = get_config(*load(argv[i + 1] if value is None and i + 1 < len(argv) else value or ''))
  for field in fields:
    check_field(config, field, prefix='--config.')


def flatten(tree: Mapping, prefix: str = '') -> dict:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for name, value in tree.items():
    flat |= flatten(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {f'{prefix}{name}': value}
  return flat


def one_line(error: BaseException | str) -> str:
  return ' '.join(str(error).split()) or type(error).__name__
