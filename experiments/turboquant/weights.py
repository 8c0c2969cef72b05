r"""What quantized weights do to a language model: loss, divergence and top token, by format and by group of weights.

  python -m experiments.turboquant.weights --workdir=runs/caches [--models=e2b-toy,31b-toy] [--seeds=2] [--steps=1200] [--out=DIR]

Of the toys of `caches`, on the same documents, one group of `model.quantized` at a time is in few bits and all else exact:
  attention, mlp, ple, embed   in every format of `turboquant.weights`; embed is the input's and the output's, ple are gates and projections
  ple_table                    as `model.ple_table` stores it: int8 and int4 with a float32 scale for each row
  all                          what `weights=` makes of that format: embed is int8, the table of PLE stays
Weights are encoded and decoded, and one program computes with all of them; error is squared error over squared weights.
Writes weights.json, weights.md and weights.png to DIR, by default beside this file.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.turboquant import toys
from gemma4_jax.model import ple_placement, ple_table, quantized
from gemma4_jax.sampling import text
from gemma4_jax.turboquant import weights

TABLE, ALL = 'ple_table', 'all'
_TABLE = tuple(ple_placement.TABLE.split('/'))
_COLOURS = {'attention': '#0072B2', 'mlp': '#D55E00', 'ple': '#009E73', 'embed': '#E69F00', TABLE: '#CC79A7', ALL: '#555555'}


def plans(params: Mapping) -> list[tuple[str, str]]:
  """(group, format) of all that is measured."""
  paths = {_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  had = {quantized.group(path) for path in paths}
  tables = [(TABLE, storage) for storage in ('int8', 'int4')] if _TABLE in paths else []
  return [(name, format) for name in (*quantized.GROUPS, ALL) if name in had or name == ALL for format in weights.FORMATS] + tables


def decoded(params: Mapping, group: str, format: str) -> tuple[dict, float, float]:
  """(parameters with the group as its format has it, bits a number of the group, its squared error over its squares)."""
  shapes = {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  chosen = {_TABLE: format} if group == TABLE else quantized.choose(shapes, format if group == ALL else {group: format})
  numbers = held = error = square = 0

  def leaf(path, w):
    nonlocal numbers, held, error, square
    if (path := _path(path)) not in chosen:
      return w
    if path == _TABLE:
      parts = ple_table.encode(np.asarray(w), format)
      back, nbytes = ple_table.decode(parts, format, jnp.float32), sum(part.nbytes for part in parts.values())
    else:
      made = weights.encode(w, chosen[path], quantized.inputs(path))
      back, nbytes = made.decode(), made.nbytes
    numbers, held = numbers + w.size, held + nbytes
    error, square = error + float(jnp.sum((back - w)**2)), square + float(jnp.sum(w**2))
    return back.astype(w.dtype)

  back = jax.tree_util.tree_map_with_path(leaf, params)
  return back, 8 * held / numbers, error / square


def _path(path) -> tuple[str, ...]:
  return tuple(key.key for key in path)


def examine(model: text.Model, ids: np.ndarray, tick=lambda: None) -> dict[str, Any]:
  """Of documents [n, T]: {'rows': [{group, format, bits, error, and by document: delta, kl, same}]}."""
  cfg, rows = model.cfg.replace(matvec='xla'), []
  batches = toys.batches(ids)
  exact = [toys.logits(cfg, model.params, part) for part in batches]
  for group, format in plans(model.params):
    params, bits, error = decoded(model.params, group, format)
    found = [toys.differences(toys.logits(cfg, params, part), jnp.roll(part, -1, axis=1), truth) for part, truth in zip(batches, exact)]
    rows.append({'group': group, 'format': format, 'bits': bits, 'error': error} | toys.by_document(found))
    tick()
  return {'rows': rows}


def tables(name: str, found: Mapping) -> list[report.Table]:
  return [report.Table(f'{name}: weights', ['group', 'format', 'bits a weight', 'error', *toys.HEADER], [
      [row['group'], row['format'], f'{row["bits"]:.3g}', f'{row["error"]:.2g}', *toys.cells(row)] for row in found['rows']], toys.CAPTION)]


def _plot(axis, rows: Sequence[Mapping]) -> None:
  for group, colour in _COLOURS.items():
    points = lambda own: [(row['bits'], max(row['kl']['mean'], 1e-7)) for row in rows
                          if row['group'] == group and own == row['format'].startswith('turboquant')]
    if line := points(True):
      axis.plot(*zip(*sorted(line)), 'o-', color=colour, markersize=4, linewidth=1, label=group)
    if others := points(False):
      axis.plot(*zip(*others), 'x', color=colour, markersize=5, label=None if line else group)
  axis.legend(title='turboquant; x: int4, nf4, int8', fontsize=7, title_fontsize=7)


def draw(results: Mapping[str, Mapping], path: pathlib.Path) -> pathlib.Path:
  return toys.draw(results, _plot, 'bits a weight of the group, scales counted', path)


def main(argv=None) -> None:
  toys.run('weights', __doc__, examine, tables, draw, argv)


if __name__ == '__main__':
  main()
