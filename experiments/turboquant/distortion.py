r"""Measured error of every quantizer against theory and against the bound that none can pass.

  python -m experiments.turboquant.distortion [--out=DIR] [--vectors=N]

For every method of gemma4_jax.turboquant.methods and dim 64, 128, 256, 512: bits a number with scales counted, squared error over
squared length on independent normals and on the same with four channels times 15, and of inner products the gain (1: unbiased) and
the noise, dim * E(error^2) / (|x|^2 |q|^2), for q orthogonal to x and for q at a cosine of 0.9. Theory where there is one; `bound` is
4**-bits, the rate-distortion function of a direction in many dimensions. Writes results.json and PNG files to DIR, by default beside
this file: 4 minutes of a CPU core.
"""

import argparse
from collections.abc import Sequence
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table

from experiments import figures
from gemma4_jax import metrics, provenance
from gemma4_jax.turboquant import codebook, methods
from gemma4_jax.turboquant.quantizer import Quantizer
from gemma4_jax.turboquant.residual import Residual

DIMS = (64, 128, 256, 512)
SHOWN = 256               # the dim of plots and of the table's single columns
SEED = 2026               # of the data; rotations have their own generator
_OUTLIERS, _LOUDNESS = 4, 15
_COSINE = 0.9             # of queries that are near the vector
_FAMILIES = {             # what plots tell apart: first match of a name's start
    'turboquant': ('TurboQuant', '#0072B2', 'o'), 'prod': ('with QJL residual', '#D55E00', 's'), 'qjl': ('QJL', '#D55E00', '<'),
    'polar': ('PolarQuant', '#009E73', 'D'), 'kivi': ('KIVI', '#CC79A7', '^'), 'fp8': ('fp8', '#56B4E9', 'v'),
    'int': ('integers', '#E69F00', 'P'), 'q': ('ggml q8_0, q4_0', '#882255', 'X'), 'nf4': ('NF4', '#555555', '*')}


def measure(names: Sequence[str], dims: Sequence[int], vectors: int, tick=lambda: None) -> list[dict]:
  """A row for every method and dim; `tick` is called after each."""
  rows = []
  for dim in dims:
    rng = np.random.default_rng([SEED, dim])
    x = jnp.float32(rng.standard_normal((vectors, dim)))
    q = jnp.float32(rng.standard_normal((vectors, dim)))
    q -= x * (q * x).sum(-1, keepdims=True) / jnp.square(x).sum(-1, keepdims=True)
    loud = x.at[:, rng.choice(dim, _OUTLIERS, replace=False)].multiply(_LOUDNESS)
    for name in names:
      method = methods.make(name, dim)
      row = {key: float(value) for key, value in jax.jit(_statistics, static_argnums=0)(method, x, loud, q).items()}
      rows.append({'method': name, 'dim': dim, 'bits': method.bits_per_number, 'bound': 4**-method.bits_per_number} | row | theory(method))
      tick()
  return rows


def theory(method: methods.Method) -> dict:
  """Expected error, gain and noise of a rotated method of this room; {} of others."""
  if isinstance(method, Quantizer) and method.grid != 'absmax' and method.rotation != 'none':
    d = {'lloyd_max': lambda b: codebook.exact(b, method.dim), 'uniform': codebook.uniform, 'int8': codebook.int8_grid}[
        method.grid](method.bits).distortion
    gain = {'norm': 1 - d, 'least_squares': 1 - d, 'norm_matched': math.sqrt(1 - d), 'unbiased': 1.0}[method.scale]
    scale = gain / (1 - d)    # of the decoded vector, against that of scale 'norm'
    return {'theory': 1 - 2 * gain + scale * gain, 'theory_gain': gain, 'theory_noise': scale**2 * d * (1 - d)}
  if isinstance(method, Residual):
    before = codebook.exact(method.bits - 1, method.dim).distortion if method.bits > 1 else 1.0
    noise = before * (math.pi / 2 - (method.sketch == 'orthogonal'))
    return {'theory': noise, 'theory_gain': 1.0, 'theory_noise': noise}
  return {}


def _statistics(method: methods.Method, x: jax.Array, loud: jax.Array, q: jax.Array) -> dict:
  square = lambda a: jnp.square(a).sum(-1)
  decoded = method.decode(method.encode(x))
  error = square(decoded - x) / square(x)
  outliers = square(method.decode(method.encode(loud)) - loud) / square(loud)
  gain = (decoded * x).sum(-1) / square(x)
  across = (decoded * q).sum(-1) / jnp.sqrt(square(x) * square(q))
  near = _COSINE * (gain - 1) + math.sqrt(1 - _COSINE**2) * across
  return {'error': error.mean(), 'standard_error': error.std() / math.sqrt(len(x)), 'error_outliers': outliers.mean(),
          'gain': gain.mean(), 'noise': x.shape[-1] * jnp.square(across).mean(), 'noise_near': x.shape[-1] * jnp.square(near).mean()}


def show(rows: Sequence[dict]) -> None:
  dims = list(dict.fromkeys(row['dim'] for row in rows))
  shown = SHOWN if SHOWN in dims else dims[-1]
  table = rich.table.Table(title=f'Squared error over squared length; single columns at dim {shown}', box=None, title_justify='left')
  columns = ('bits', *(f'error {dim}' for dim in dims), 'theory', 'bound', 'outliers', 'gain', 'noise', 'theory', 'noise near')
  table.add_column('method', no_wrap=True)
  for column in columns:
    table.add_column(column, justify='right')
  number = lambda value: '' if value is None else f'{value:.3g}'
  for name in dict.fromkeys(row['method'] for row in rows):
    mine = {row['dim']: row for row in rows if row['method'] == name}
    row = mine[shown]
    errors = [number(mine[dim]['error']) for dim in dims]
    table.add_row(name, f'{row["bits"]:.4g}', *errors, number(row.get('theory')), number(row['bound']), number(row['error_outliers']),
                  f'{row["gain"]:.4f}', number(row['noise']), number(row.get('theory_noise')), number(row['noise_near']))
  console = rich.console.Console()
  console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
  console.print(table)


def draw(rows: Sequence[dict], folder: pathlib.Path) -> list[pathlib.Path]:
  """distortion.png (error against bits, plain and with outliers), inner_products.png and theory.png."""
  dims = list(dict.fromkeys(row['dim'] for row in rows))
  shown = SHOWN if SHOWN in dims else dims[-1]
  here = [row for row in rows if row['dim'] == shown]
  drawn = {
      'distortion': _against_bits(here, [('error', 'normal numbers'), ('error_outliers', f'{_OUTLIERS} channels × {_LOUDNESS}')],
                                  f'squared error / squared length (dim {shown})', shown),
      'inner_products': _inner_products(here, shown), 'theory': _ratios(rows)}
  return [figures.save(figure, folder / f'{name}.png') for name, figure in drawn.items()]


def _family(name):
  return next(style for start, style in _FAMILIES.items() if name.startswith(start))


def _against_bits(rows, panels, label, dim):
  figure, (axes,) = figures.grid(13, 6, len(panels), sharey=True)
  bits = np.arange(1, 9)
  for axis, (key, title) in zip(axes, panels):
    axis.plot([1, 9], [4.0**-1, 4.0**-9], color='black', linewidth=1, label='bound 4^-bits')
    axis.plot(bits + 16 / dim, [codebook.exact(int(b), dim).distortion for b in bits], color='#0072B2', linewidth=1, alpha=0.5,
              label='theory: Lloyd-Max and 16 bits of scale')
    seen = set()
    for row in rows:
      family, colour, marker = _family(row['method'])
      axis.plot(row['bits'], row[key], marker, color=colour, markersize=5, alpha=0.8, label=None if family in seen else family)
      seen.add(family)
    axis.set(yscale='log', xlabel='bits a number, scales counted', title=title)
  axes[0].set_ylabel(label)
  axes[-1].legend(frameon=False, fontsize=9)
  return figure


def _inner_products(rows, dim):
  """The same bits as levels, or as a sketch of the error."""
  figure, (axes,) = figures.grid(12, 5, 2, sharey=True)
  series = {'unbiased scale': 'turboquant{}', 'scale of the paper (biased)': 'turboquant{}_norm', 'QJL residual, Gaussian S': 'prod{}',
            'QJL residual, orthogonal S': 'prod{}_orthogonal'}
  alone = {'prod1': 'qjl', 'prod1_orthogonal': 'qjl_orthogonal'}     # one bit of prod is QJL alone
  found = {row['method']: row for row in rows}
  for (label, form), colour in zip(series.items(), ('#0072B2', '#56B4E9', '#D55E00', '#E69F00')):
    names = [alone.get(form.format(b), form.format(b)) for b in range(1, 6)]
    mine = [found[name] for name in names if name in found]
    for axis, key in zip(axes, ('noise', 'noise_near')):
      axis.plot([row['bits'] for row in mine], [row[key] for row in mine], 'o-', color=colour, label=label)
    axes[0].plot([row['bits'] for row in mine], [row['theory_noise'] for row in mine], '+', color='black', markersize=9)
  axes[0].plot([], [], '+', color='black', label='theory')
  for axis, title in zip(axes, ('queries orthogonal to the vector', f'queries at a cosine of {_COSINE}')):
    axis.set(yscale='log', xlabel='bits a number, scales counted', title=f'{title} (dim {dim})')
  axes[0].set_ylabel('error of inner products: dim · E(error²) / (|x|² |q|²)')
  axes[0].legend(frameon=False)
  return figure


def _ratios(rows):
  figure, ((axis,),) = figures.grid(8, 4.5)
  for dim, colour in zip(dict.fromkeys(row['dim'] for row in rows), ('#0072B2', '#D55E00', '#009E73', '#CC79A7')):
    mine = [row for row in rows if row['dim'] == dim and row['method'] in {f'turboquant{b}_norm' for b in range(1, 9)}]
    axis.errorbar([int(row['method'][10]) + (math.log2(dim) - 7.5) / 20 for row in mine], [row['error'] / row['theory'] for row in mine],
                  [2 * row['standard_error'] / row['theory'] for row in mine], fmt='o', color=colour, markersize=4, label=f'dim {dim}')
  axis.axhline(1, color='black', linewidth=1)
  axis.set(xlabel='bits', ylabel='measured error / theory', title="TurboQuant as in the paper (scale 'norm'), ± 2 SE")
  axis.legend(frameon=False)
  return figure


def main(argv=None) -> None:
  parser = argparse.ArgumentParser('python -m experiments.turboquant.distortion', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(__file__).parent, help='folder of results.json and plots')
  parser.add_argument('--vectors', type=int, default=8192, help='of each dim, a multiple of 32 (default: %(default)s)')
  args = parser.parse_args(argv)
  if args.vectors < 32 or args.vectors % 32:
    parser.error(f'--vectors={args.vectors}: must be a multiple of 32, the tokens of a group of KIVI')
  args.out.mkdir(parents=True, exist_ok=True)
  head = provenance.result()      # before the outputs change the tree
  with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
    task = progress.add_task('methods', total=len(methods.METHODS) * len(DIMS))
    rows = measure(list(methods.METHODS), DIMS, args.vectors, lambda: progress.advance(task))
  metrics.write_json(args.out / 'results.json', head | {'vectors': args.vectors, 'seed': SEED, 'rows': rows})
  show(rows)
  for path in draw(rows, args.out):
    print(path)


if __name__ == '__main__':
  main()
