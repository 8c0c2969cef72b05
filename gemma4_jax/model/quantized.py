"""A model with weights in few bits: the linen collection `quant` beside `params`.

  variables = quantized.quantize(cfg, params, 'int8')                # {'params': what stays, 'quant': what was quantized}
  out = generate.generate(cfg, variables, [ids], max_new_tokens=64)  # in the place of the parameters

A module that finds its weight under `quant` reads it there (`layers.weight`), and none under `params`: what is trained on top of
such a model, or saved of it, needs no other model.
"""

from collections.abc import Mapping

import jax
from rich import progress as rich_progress
import rich.console

from gemma4_jax.config import WEIGHTS, ModelConfig, nearest
from gemma4_jax.turboquant import weights

# Kind of weight -> (the module that holds it, is one of these; how many axes are summed). Norms, scalars and routers stay.
GROUPS = ('attention', 'mlp', 'ple', 'embed')


def group(path: tuple[str, ...]) -> str | None:
  """Of GROUPS, or None: the weight at this path of the parameters is never quantized."""
  if path[-1] == 'table':
    return 'embed' if path[0] == 'embedder' else None
  if path[-1] != 'w' or 'router' in path:
    return None
  if path[0] == 'unembedder':
    return 'embed'
  for part, name in (('attention', 'attention'), ('mlp', 'mlp'), ('ple_gate', 'ple'), ('ple_project', 'ple'), ('arm', 'ple')):
    if part in path:
      return name
  return None


def check(format: str) -> None:
  """Raises ValueError: not of config.WEIGHTS."""
  if format not in WEIGHTS:
    raise ValueError(f'weights: {format!r} is none of {", ".join(WEIGHTS)}; did you mean {nearest(format, WEIGHTS)!r}?')


def quantize(cfg: ModelConfig, params: dict, formats: str | Mapping[str, str], *, consume: bool = False, progress: bool = False) -> dict:
  """The variables of the same model: {'params': ..., 'quant': ...}.

  Args:
    params: the canonical tree.
    formats: of `weights.FORMATS` for all GROUPS, or {group: format}; groups that are not named stay as they are.
    consume: takes the weights out of `params` one by one, so that both are never there whole.
    progress: a bar, on a terminal.
  Raises:
    ValueError: no such group or format, a group that this model has not, stacked weights.
  """
  if cfg.scan or any(name.startswith('group_') for name in params):
    raise ValueError('model.scan: weights are quantized one by one: cfg.replace(scan=False) and transformer.unstack(cfg, params)')
  given = dict.fromkeys(GROUPS, formats) if isinstance(formats, str) else dict(formats)
  for name, format in given.items():
    if name not in GROUPS:
      raise ValueError(f'weights: {name!r} is none of {", ".join(GROUPS)}')
    if format not in weights.FORMATS:
      raise ValueError(f'weights: {format!r} is none of {", ".join(weights.FORMATS)}')
  leaves = [(tuple(key.key for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
  missing = set(formats) - {group(path) for path, _ in leaves} if not isinstance(formats, str) else ()
  if missing:
    raise ValueError(f'weights: this model has no weights of {", ".join(sorted(missing))}')
  kept, quant = {}, {}
  console = rich.console.Console(stderr=True)
  bar = rich_progress.track([path for path, _ in leaves], 'quantizing', console=console, disable=not (progress and console.is_terminal))
  del leaves
  for path in bar:
    place = params
    for name in path[:-1]:
      place = place[name]
    leaf = place.pop(path[-1]) if consume else place[path[-1]]
    format = given.get(group(path))
    into = kept if format is None else quant
    for name in path[:-1]:
      into = into.setdefault(name, {})
    into[path[-1]] = leaf if format is None else jax.block_until_ready(weights.encode(leaf, format, _inputs(path, leaf)))
  return {'params': kept, 'quant': quant}


def _inputs(path, leaf):
  """Axes that are summed: heads and channels of an output projection, all others one."""
  return 2 if path[-2] == 'o' and path[-3] == 'attention' else 1


def nbytes(variables: Mapping) -> dict[str, int]:
  """Bytes by group and, of those that no group has, as 'other'."""
  found = {}
  params = variables if 'params' not in variables else {name: variables[name] for name in ('params', 'quant') if name in variables}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, weights.Weight)):
    names = tuple(key.key for key in path)
    names = names[1:] if names[0] in ('params', 'quant') else names
    found[group(names) or 'other'] = found.get(group(names) or 'other', 0) + leaf.nbytes
  return found
