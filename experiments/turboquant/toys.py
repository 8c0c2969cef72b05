"""Toys that were trained, and how far a changed one is from its exact self, document by document: what `caches` and `weights` share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import functools
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from configs import base
from experiments import figures, report, statistics
from gemma4_jax import metrics, provenance
from gemma4_jax.evaluation import checkpoint as checkpoint_lib, documents as documents_lib
from gemma4_jax.model import transformer
from gemma4_jax.sampling import text
from gemma4_jax.training import trainer

LENGTH = 1024
_BATCH = 16   # documents, at most: their logits take 17 MB each
SCORES = ('delta', 'kl', 'same')
_KEPT = ('kl', 'right')   # of each document, in the JSON: numbers of a seed on one line
HEADER = ['Δ', 'KL', 'same token']   # of `cells`
CAPTION = ('Δ: nats per token above the same model left exact, mean and 95 % interval over seeds and documents; KL from the exact '
           'model in nats per token; how often the likeliest token is the same.')


def batches(ids: np.ndarray) -> list[np.ndarray]:
  """Documents [n, T] in parts of one size, or nearly: every size is compiled for."""
  return np.array_split(ids, -(-len(ids) // _BATCH))


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, ids_BT) -> jax.Array:
  """float32 [B, T, V], in one pass without a cache."""
  return transformer.Transformer(cfg).apply({'params': params}, ids_BT)[0]


@jax.jit
def answers(logits_BTV, next_BT) -> jax.Array:
  """float32 [2, B, T]: -log p(next) in nats, and whether the next token is the likeliest of all."""
  log_p = jax.nn.log_softmax(logits_BTV)
  return jnp.stack([_nll(log_p, next_BT), (log_p.argmax(-1) == next_BT).astype(jnp.float32)])


@jax.jit
def differences(logits_BTV, next_BT, exact_BTV) -> jax.Array:
  """float32 [3, B, T]: the difference of -log p(next) in nats, KL(exact || this) and whether the likeliest token is the same."""
  log_p, log_r = jax.nn.log_softmax(logits_BTV), jax.nn.log_softmax(exact_BTV)
  return jnp.stack([_nll(log_p, next_BT) - _nll(log_r, next_BT), (jnp.exp(log_r) * (log_r - log_p)).sum(-1),
                    (log_p.argmax(-1) == log_r.argmax(-1)).astype(jnp.float32)])


def _nll(log_p_BTV, next_BT):
  return -jnp.take_along_axis(log_p_BTV, next_BT[..., None], axis=-1)[..., 0]


def by_document(found: Sequence[jax.Array]) -> dict[str, list[float]]:
  """{'delta', 'kl', 'same'}: means over the predicted tokens of each document, of `differences` batch by batch."""
  found = np.concatenate([np.asarray(part, np.float64)[..., :-1] for part in found], axis=1)   # nothing follows the last token
  return {name: one.mean(-1).tolist() for name, one in zip(SCORES, found, strict=True)}


def train(name: str, seed: int, steps: int, workdir: pathlib.Path, fields: Mapping = types.MappingProxyType({})) -> pathlib.Path:
  """The folder of a run, `fields` of whose config are set; one that is done is left as it is."""
  config = base.get_config(name)
  config.update_from_flattened_dict({
      'seed': seed, 'model.head_dim': 64, 'model.global_head_dim': 128,   # rotations need some length to work on
      'model.embedding': 'ple' if name.startswith('e') else 'none', 'data.sequence_length': LENGTH, 'data.batch_size': 2,
      'train.steps': steps, 'train.checkpoint_every': max(1, steps // 4), 'optimizer.warmup_steps': steps // 20, **fields})
  folder = workdir / f'{name}-s{seed}'
  if not (folder / 'DONE').exists():
    trainer.run(config, folder)
  return folder


def read(folder: pathlib.Path, model: text.Model, most: int, length: int = LENGTH) -> np.ndarray:
  """Validation documents [n, length] of a run's corpus, `most` of each domain."""
  corpus = checkpoint_lib.run_corpus(folder, model.tokenizer).validation
  found = documents_lib.from_corpus(corpus, most=most, min_tokens=length, max_tokens=length)
  return np.stack([document.ids for document in found])


def combine(seeds: Sequence[Sequence[Mapping]]) -> list[dict]:
  """Rows with the means over seeds and documents of what they list by document, and its interval (`statistics.crossed`)."""
  out = []
  for same in zip(*seeds, strict=True):
    row = dict(same[0])
    for key in [key for key, value in row.items() if isinstance(value, list)]:
      values = [one[key] for one in same]
      over = statistics.crossed(values)
      row[key] = {'mean': over.mean, 'low': over.low, 'high': over.high, 'seeds': [float(np.mean(one)) for one in values]}
      if key in _KEPT:
        row[key]['documents'] = [' '.join(f'{x:.3g}' for x in one) for one in values]
    out.append(row)
  return out


def cells(row: Mapping) -> list[str]:
  """Of a row of `combine`, for columns HEADER."""
  one, kl = row['delta'], row['kl']['mean']
  between = '' if one['low'] is None else f' [{one["low"]:+.4f}, {one["high"]:+.4f}]'
  return [f'{one["mean"]:+.4f}{between}', f'{kl:.5f}' if kl >= 1e-4 else f'{kl:.1e}', f'{row["same"]["mean"]:.1%}']


def draw(results: Mapping[str, Mapping], plot: Callable, xlabel: str, path: pathlib.Path) -> pathlib.Path:
  """A panel for each model: `plot(axis, rows)`, KL upwards."""
  figure, (axes,) = figures.grid(6.5 * len(results), 4.8, len(results), sharey=True)
  for axis, (name, found) in zip(axes, results.items()):
    plot(axis, found['rows'])
    axis.set(yscale='log', title=name, xlabel=xlabel)
  axes[0].set_ylabel('KL from the exact model, nats per token')
  return figures.save(figure, path)


def run(kind: str, doc: str, examine: Callable[..., dict[str, Any]], tables: Callable[[str, Mapping], list[report.Table]],
        picture: Callable[[Mapping, pathlib.Path], pathlib.Path], argv=None, *, train: Callable[..., pathlib.Path] = train,
        read: Callable[[pathlib.Path, text.Model, int], np.ndarray] = read, steps: int = 1200, models: str = 'e2b-toy,31b-toy') -> None:
  """The command `python -m experiments.turboquant.KIND`: trains, examines, writes KIND.json, KIND.md and KIND.png.

  Args:
    examine: (model, documents [n, T], tick) -> {'rows': [{name: what is of the row, or a list by document}], other things of a seed}.
    tables: (title: the model, its seeds and steps; what the JSON has of it).
    picture: ({name: what the JSON has of it}, path).
    train, read: as those above.
    steps, models: defaults.
  """
  parser = argparse.ArgumentParser(f'python -m experiments.turboquant.{kind}', description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='folder of the trained toys')
  parser.add_argument('--models', default=models, help='of configs/base.py, with commas between (default: %(default)s)')
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--steps', type=int, default=steps, help='of training (default: %(default)s)')
  parser.add_argument('--documents', type=int, default=8, help='of each kind (default: %(default)s)')
  parser.add_argument('--out', type=pathlib.Path,
                      help='folder of the results (default: --workdir); those of other models, of the same commit and documents, stay')
  args = parser.parse_args(argv)
  args.out = args.out or args.workdir
  names = args.models.split(',')
  toys = [name for name in base.models() if name.endswith('-toy')]
  if unknown := [name for name in names if name not in toys]:
    parser.error(f'--models={args.models}: {unknown[0]!r} is none of {", ".join(toys)}')
  if min(args.seeds, args.documents) < 1 or args.steps < 20:
    parser.error('--seeds and --documents are at least 1, --steps at least 20')
  args.out.mkdir(parents=True, exist_ok=True)
  head = provenance.result()
  results = {}
  for name in names:
    found, trained = [], []
    for seed in range(args.seeds):
      folder = train(name, seed, args.steps, args.workdir)
      model = text.load(folder)
      documents = read(folder, model, args.documents)
      with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task(f'{name}, seed {seed}', total=None)
        found.append(examine(model, documents, lambda: progress.advance(task)))
      made = json.loads((folder / 'env.json').read_text())
      trained.append({key: made[key] for key in ('commit', 'dirty')} | json.loads((folder / 'DONE').read_text())['metrics'])
    rest = {key: [one[key] for one in found] for key in found[0] if key != 'rows'}
    results[name] = {'steps': args.steps, 'trained': trained, 'rows': combine([one['rows'] for one in found])} | rest
  path = args.out / f'{kind}.json'
  settings = {'documents': len(documents), 'length': documents.shape[1]}
  results = _others(path, head | settings) | results
  metrics.write_json(path, head | settings | {'models': results})
  shown = [table for name, found in results.items() for table in tables(f'{name}, {len(found["trained"])} x {found["steps"]} steps', found)]
  for table in shown:
    report.show(table, report.wide(rich.console.Console()))
  metrics.write_text(args.out / f'{kind}.md', '\n'.join(line for table in shown for line in report.section(table)) + '\n')
  print(picture(results, args.out / f'{kind}.png'), args.out / f'{kind}.md', path, sep='\n')


def _others(path: pathlib.Path, like: Mapping) -> dict:
  """Results in a file that come of the same commit, packages and documents."""
  had = json.loads(path.read_text()) if path.exists() else {}
  return had['models'] if all(had.get(key) == value for key, value in like.items() if key != 'date') else {}
