"""Toys that were trained, and how far a changed one is from its exact self, document by document: what `caches` and `weights` share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import functools
import json
import pathlib
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
_SCORES = ('delta', 'kl', 'same')
HEADER = ['Δ', 'KL', 'same token']   # of `cells`
CAPTION = ('Δ: nats per token above the same model left exact, mean over documents and its 95 % interval; KL from the exact '
           'model in nats per token; how often the likeliest token is the same.')


def batches(ids: np.ndarray) -> list[np.ndarray]:
  """Documents [n, T] in parts of one size, or nearly: every size is compiled for."""
  return np.array_split(ids, -(-len(ids) // _BATCH))


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, ids_BT) -> jax.Array:
  """float32 [B, T, V], in one pass without a cache."""
  return transformer.Transformer(cfg).apply({'params': params}, ids_BT)[0]


@jax.jit
def differences(logits_BTV, exact_BTV, next_BT) -> jax.Array:
  """float32 [3, B, T]: the difference of -log p(next) in nats, KL(exact || this) and whether the likeliest token is the same."""
  log_p, log_r = jax.nn.log_softmax(logits_BTV), jax.nn.log_softmax(exact_BTV)
  nll = lambda x: -jnp.take_along_axis(x, next_BT[..., None], axis=-1)[..., 0]
  return jnp.stack([nll(log_p) - nll(log_r), (jnp.exp(log_r) * (log_r - log_p)).sum(-1),
                    (log_p.argmax(-1) == log_r.argmax(-1)).astype(jnp.float32)])


def by_document(found: Sequence[jax.Array]) -> dict[str, list[float]]:
  """{'delta', 'kl', 'same'}: means over the predicted tokens of each document, of `differences` batch by batch."""
  found = np.concatenate([np.asarray(part, np.float64)[..., :-1] for part in found], axis=1)   # nothing follows the last token
  return {name: one.mean(-1).tolist() for name, one in zip(_SCORES, found, strict=True)}


def train(name: str, seed: int, steps: int, workdir: pathlib.Path) -> pathlib.Path:
  """The folder of a run; one that is done is left as it is."""
  config = base.get_config(name)
  config.update_from_flattened_dict({
      'seed': seed, 'model.head_dim': 64, 'model.global_head_dim': 128,   # rotations need some length to work on
      'model.embedding': 'ple' if name.startswith('e') else 'none', 'data.sequence_length': LENGTH, 'data.batch_size': 2,
      'train.steps': steps, 'train.checkpoint_every': max(1, steps // 4), 'optimizer.warmup_steps': steps // 20})
  folder = workdir / f'{name}-s{seed}'
  if not (folder / 'DONE').exists():
    trainer.run(config, folder)
  return folder


def combine(seeds: Sequence[Sequence[Mapping]]) -> list[dict]:
  """Rows with the mean over seeds and documents and its interval: over documents, of means over seeds."""
  out = []
  for same in zip(*seeds, strict=True):
    row = {key: value for key, value in same[0].items() if key not in _SCORES}
    for key in _SCORES:
      over = statistics.interval(np.mean([one[key] for one in same], axis=0))
      row[key] = {'mean': over.mean, 'low': over.low, 'high': over.high, 'seeds': [float(np.mean(one[key])) for one in same]}
    out.append(row)
  return out


def cells(row: Mapping) -> list[str]:
  """Of a row of `combine`, for columns HEADER."""
  one, kl = row['delta'], row['kl']['mean']
  between = '' if one['low'] is None else f' [{one["low"]:+.4f}, {one["high"]:+.4f}]'
  return [f'{one["mean"]:+.4f}{between}', f'{kl:.5f}' if kl >= 1e-4 else f'{kl:.1e}', f'{row["same"]["mean"]:.1%}']


def draw(results: Mapping[str, Mapping], plot: Callable, xlabel: str, path: pathlib.Path) -> pathlib.Path:
  """A panel for each model: `plot(axis, rows)` over bits, KL upwards."""
  figure, (axes,) = figures.grid(6.5 * len(results), 4.8, len(results), sharey=True)
  for axis, (name, found) in zip(axes, results.items()):
    plot(axis, found['rows'])
    axis.set(yscale='log', title=name, xlabel=xlabel)
  axes[0].set_ylabel('KL from the exact model, nats per token')
  return figures.save(figure, path)


def run(kind: str, doc: str, examine: Callable[..., dict[str, Any]], tables: Callable[[str, Mapping], list[report.Table]],
        picture: Callable[[Mapping, pathlib.Path], pathlib.Path], argv=None) -> None:
  """The command `python -m experiments.turboquant.KIND`: trains, examines, writes KIND.json, KIND.md and KIND.png.

  Args:
    examine: (model, documents [n, T], tick) -> {'rows': [{.., 'delta', 'kl', 'same': by document}], other things of a seed}.
    tables: (name of the model, what the JSON has of it).
    picture: ({name: what the JSON has of it}, path).
  """
  parser = argparse.ArgumentParser(f'python -m experiments.turboquant.{kind}', description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='folder of the trained toys')
  parser.add_argument('--models', default='e2b-toy,31b-toy', help='of configs/base.py, with commas between (default: %(default)s)')
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--steps', type=int, default=1200, help='of training, 2048 tokens each (default: %(default)s)')
  parser.add_argument('--documents', type=int, default=8, help='of code and of English each (default: %(default)s)')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(__file__).parent,
                      help='folder of the results; those it has of other models, of the same commit and settings, stay')
  args = parser.parse_args(argv)
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
      documents = documents_lib.from_corpus(checkpoint_lib.run_corpus(folder, model.tokenizer).validation, most=args.documents,
                                            min_tokens=LENGTH, max_tokens=LENGTH)
      with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task(f'{name}, seed {seed}', total=None)
        found.append(examine(model, np.stack([document.ids for document in documents]), lambda: progress.advance(task)))
      made = json.loads((folder / 'env.json').read_text())
      trained.append({key: made[key] for key in ('commit', 'dirty')} | json.loads((folder / 'DONE').read_text())['metrics'])
    rest = {key: [one[key] for one in found] for key in found[0] if key != 'rows'}
    results[name] = {'trained': trained, 'rows': combine([one['rows'] for one in found])} | rest
  path = args.out / f'{kind}.json'
  settings = {'steps': args.steps, 'seeds': args.seeds, 'documents': len(documents), 'length': LENGTH}
  results = _others(path, head | settings) | results
  metrics.write_json(path, head | settings | {'models': results})
  shown = [table for name, found in results.items() for table in tables(name, found)]
  for table in shown:
    report.show(table, report.wide(rich.console.Console()))
  metrics.write_text(args.out / f'{kind}.md', '\n'.join(line for table in shown for line in report.section(table)) + '\n')
  print(picture(results, args.out / f'{kind}.png'), args.out / f'{kind}.md', path, sep='\n')


def _others(path: pathlib.Path, like: Mapping) -> dict:
  """Results in a file that come of the same commit, packages and settings."""
  had = json.loads(path.read_text()) if path.exists() else {}
  return had['models'] if all(had.get(key) == value for key, value in like.items() if key != 'date') else {}
