"""A model with weights in few bits: the linen collection `quant` beside `params`.

  variables = quantized.quantize(cfg, params, 'turboquant4')         # {'params': what stays, 'quant': what was quantized}
  out = generate.generate(cfg, variables, [ids], max_new_tokens=64)  # in the place of the parameters

A module that finds its weight under `quant` reads it there (`layers.weight`), and none under `params`: what is trained on top of
such a model, or saved of it, needs no other model.
"""

from collections.abc import Mapping

import jax
from rich import progress as rich_progress
import rich.console

from gemma4_jax import sharding
from gemma4_jax.config import WEIGHTS, ModelConfig, nearest
from gemma4_jax.model import transformer
from gemma4_jax.turboquant import weights

# Kind of weight: experts are the 3-D weights of a mixture, ple the projections and gates of the embedding arm. Norms, scalars and
# routers stay, and tables of the arm are for `ple_placement`.
GROUPS = ('attention', 'mlp', 'experts', 'ple', 'embed')
_EMBED = 'int8'   # of a plan that names one format for all: tables read by row are better off with it, and it is 5 % of 31B


def group(path: tuple[str, ...]) -> str | None:
  """Of GROUPS, or None: the weight at this path of the parameters is never quantized."""
  if path[-1] == 'table':
    return 'embed' if path[0] == 'embedder' else None
  if path[-2:-1] == ('moe',) and path[-1] in ('up', 'gate', 'down'):
    return 'experts'
  if path[-1] != 'w' or 'router' in path:
    return None
  if path[0] == 'unembedder':
    return 'embed'
  for part, name in (('attention', 'attention'), ('mlp', 'mlp'), ('ple_gate', 'ple'), ('ple_project', 'ple'), ('arm', 'ple')):
    if part in path:
      return name
  return None


def plan(formats: str | Mapping[str, str]) -> dict[str, str]:
  """{group: format} of what is asked.

  'turboquant4' is that format for all GROUPS but 'embed', which is int8; 'turboquant4,embed=int4' says otherwise;
  'attention=turboquant4,mlp=int8' leaves other groups as they are, as does 'as_is' for one. A mapping is {group: format} already.

  Raises:
    ValueError: no such group or format, or a group named twice.
  """
  pairs = list(formats.items()) if isinstance(formats, Mapping) else [
      tuple(part.split('=', 1)) if '=' in part else ('', part) for part in formats.split(',')]
  found = {}
  for i, (name, format) in enumerate(pairs):
    if format not in WEIGHTS:
      raise ValueError(f'weights: {format!r} is none of {", ".join(WEIGHTS)}; did you mean {_near(format, WEIGHTS)!r}?')
    if not name and i == 0:
      found = dict.fromkeys(GROUPS, format) | ({} if format == 'as_is' else {'embed': _EMBED})
    elif name not in GROUPS:
      raise ValueError(f'weights: {name!r} is none of {", ".join(GROUPS)}; did you mean {_near(name, GROUPS)!r}?')
    elif name in [before for before, _ in pairs[:i]]:
      raise ValueError(f'weights: {name!r} is named twice')
    else:
      found[name] = format
  return {name: format for name, format in found.items() if format != 'as_is'}


def _near(name, known):
  return nearest(name or known[0], known)


def choose(shapes: Mapping[tuple[str, ...], tuple[int, ...]], formats: str | Mapping[str, str],
           ) -> dict[tuple[str, ...], str]:
  """{path: format} of the weights that a plan is about.

  Args:
    shapes: path -> shape of all weights of the model, one layer at a time.
  Raises:
    ValueError: as `plan`; a group that is named and that this model has not; a weight that its format cannot take.
  """
  given = plan(formats)
  named = set(given) if isinstance(formats, Mapping) else {part.split('=')[0] for part in formats.split(',') if '=' in part}
  missing = named & set(given) - {group(path) for path in shapes}
  if missing:
    raise ValueError(f'weights: this model has no weights of {", ".join(sorted(missing))}')
  chosen = {path: given[group(path)] for path in shapes if group(path) in given}
  for path, format in chosen.items():
    try:
      weights.layout(shapes[path], format, inputs(path))
    except ValueError as error:
      raise ValueError(f'{"/".join(path)}: {error}') from None
  return chosen


def check(cfg: ModelConfig, formats: str | Mapping[str, str]) -> None:
  """Raises ValueError, as `choose`, before there are weights."""
  if plan(formats):
    choose({tuple(name.split('/')): shape for name, shape in transformer.shapes(cfg).items()}, formats)


def quantize(cfg: ModelConfig, params: dict, formats: str | Mapping[str, str], *, consume: bool = False, progress: bool = False) -> dict:
  """The variables of the same model: {'params': ..., 'quant': ...}.

  Args:
    params: the canonical tree.
    formats: as `plan` takes it.
    consume: takes the weights out of `params` one by one, so that both are never there whole.
    progress: a bar, on a terminal.
  Raises:
    ValueError: as `choose`; stacked weights.
  """
  if cfg.scan or any(name.startswith('group_') for name in params):
    raise ValueError('model.scan: weights are quantized one by one: cfg.replace(scan=False) and transformer.unstack(cfg, params)')
  paths = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  chosen = choose(paths, formats)
  kept, quant = {}, {}
  console = rich.console.Console(stderr=True)
  for path in rich_progress.track(list(paths), 'quantizing', console=console, disable=not (progress and console.is_terminal)):
    place = params
    for name in path[:-1]:
      place = place[name]
    leaf = place.pop(path[-1]) if consume else place[path[-1]]
    format = chosen.get(path)
    into = kept if format is None else quant
    for name in path[:-1]:
      into = into.setdefault(name, {})
    into[path[-1]] = leaf if format is None else jax.block_until_ready(weights.encode(leaf, format, inputs(path)))
  return {'params': kept, 'quant': quant}


def inputs(path: tuple[str, ...]) -> int:
  """Axes of the weight at this path that are summed: heads and channels of an output projection, of all others one."""
  return 2 if path[-3:] == ('attention', 'o', 'w') else 1


def described(variables: Mapping) -> str:
  """Formats of what is quantized, as 'turboquant4, embed int8': the most bytes first, groups of other formats by name; '' of nothing."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get('quant', {}), is_leaf=lambda x: isinstance(x, weights.Weight)):
    found.setdefault(leaf.format, {}).setdefault(group(tuple(key.key for key in path)), []).append(leaf.nbytes)
  most = sorted(found, key=lambda format: -sum(map(sum, found[format].values())))
  return ', '.join([*most[:1], *(f'{name} {format}' for format in most[1:] for name in found[format])])


def slow(cfg: ModelConfig, variables: Mapping) -> str:
  """Formats of `variables` that one row decodes with more slowly on a CPU than with bfloat16 weights; '' of none.

  As measured (two cores of an AMD EPYC, a weight of 16384 x 2048): turboquant5 and 6 run at 0.9 and 0.7 of bfloat16's speed, the others
  above it. Without the native matvec all that are packed are slower.
  """
  leaves = jax.tree.leaves(variables.get('quant', {}), is_leaf=lambda x: isinstance(x, weights.Weight))
  slower = ('turboquant5', 'turboquant6') if cfg.matvec == 'native' else set(weights.FORMATS) - {'int8'}
  return ', '.join(sorted({leaf.format for leaf in leaves} & set(slower)))


def matmul(cfg: ModelConfig, variables: Mapping) -> str:
  """What multiplies a few rows by the weights, in a few words, with the reason where packed ones have a kernel that does not run."""
  if cfg.matvec == 'native':
    return 'native matvec'
  leaves = [(tuple(key.key for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(
      variables.get('quant', {}), is_leaf=lambda x: isinstance(x, weights.Weight))]
  mesh = sharding.of(variables)
  with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh):
    leaves = [jax.eval_shape(lambda w: w.part(0), leaf) if group(path) == 'experts' else leaf for path, leaf in leaves]   # run one by one
    found = [leaf.chosen(jax.ShapeDtypeStruct((1, leaf.columns), cfg.dtype)) for leaf in leaves if leaf.format != 'int8']
  if not found:
    return 'xla matvec'
  kernels, reasons = sum(name != 'xla' for name, _ in found), list(dict.fromkeys(why for _, why in found if why))
  by_kernel = f'Pallas kernel for {kernels} of {len(found)} packed weights'
  return by_kernel if not reasons else f'{by_kernel if kernels else "xla for packed weights"} ({"; ".join(reasons[:2])})'


def nbytes(variables: Mapping) -> dict[str, int]:
  """Bytes by group and, of those that no group has, as 'other'."""
  found = {}
  params = variables if 'params' not in variables else {name: variables[name] for name in ('params', 'quant') if name in variables}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, weights.Weight)):
    names = tuple(key.key for key in path)
    names = names[1:] if names[0] in ('params', 'quant') else names
    found[group(names) or 'other'] = found.get(group(names) or 'other', 0) + leaf.nbytes
  return found
