r"""Do the errors of quantized keys and values grow with the context? Loss and divergence by position, from 0 to 8192.

  python -m experiments.turboquant.contexts --workdir=runs/caches [--models=e2b-toy,31b-toy] [--seeds=2] [--steps=1200] [--out=DIR]

The toys of `caches`, trained on contexts of 1024 tokens, read validation text of 8192, documents of both domains one after the other: what
lies behind 1024 they have never been trained on, so what the exact model loses there is printed beside what quantization adds.
  methods   every layer's keys and values are quantized and decoded, in one pass: all tokens, also the newest
  presets   the caches that `kv=` names, fed 16 tokens at a time, with what they keep exact
Everything is paired with the same model's exact numbers, text by text. Writes contexts.json, contexts.md and contexts.png to DIR, by
default beside this file.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.turboquant import caches, toys
from gemma4_jax.evaluation import checkpoint as checkpoint_lib, documents as documents_lib
from gemma4_jax.model import quantized_cache
from gemma4_jax.sampling import text

LENGTH = 8192
EDGES = (0, 512, 1024, 2048, 4096, LENGTH)
METHODS = {'turboquant2': '#56B4E9', 'turboquant3': '#0072B2', 'turboquant4': '#003B5C', 'prod4': '#D55E00',
           'int4': '#E69F00'}   # and colours
PRESETS = {'quality,recent=1,sinks=0,exact_last=False': '#117733', 'turboquant,recent=1,sinks=0,exact_last=False': '#44AA77',
           'extreme,recent=1,sinks=0': '#882255'}


def read(folder: pathlib.Path, model: text.Model, most: int) -> np.ndarray:
  """Texts [most, LENGTH] of the validation split, BOS first and no other: its documents in a fixed random order."""
  found = documents_lib.from_corpus(checkpoint_lib.run_corpus(folder, model.tokenizer).validation)
  ids = np.concatenate([document.ids[1:] for document in found])[:most * (LENGTH - 1)].reshape(most, LENGTH - 1)
  return np.concatenate([np.full((most, 1), model.tokenizer.bos_id, np.int32), ids], axis=1)


def examine(model: text.Model, ids: np.ndarray, tick=lambda: None) -> dict[str, Any]:
  """Of texts [n, LENGTH]: {'rows': [{kind, name, first and last position, and by text: nats, or delta, kl, same}]}."""
  cfg, params = model.cfg.replace(matvec='xla'), model.params
  edges = [edge for edge in EDGES if edge < ids.shape[1]] + [ids.shape[1]]
  found = {}

  def note(kind, name, measured):     # [k, 1, T] of one text
    found.setdefault((kind, name), []).append(np.asarray(measured, np.float64)[:, 0, :-1])   # nothing follows the last token
    tick()

  for one in ids[:, None]:
    exact, following = toys.logits(cfg, params, one), jnp.roll(one, -1, axis=1)
    note('exact', 'exact', toys.answers(exact, following)[:1])
    for name in METHODS:
      note('method', name, caches.score(cfg, params, caches.decoded(cfg, 1, name, 'both'), one, one.shape[1], toys.differences, exact))
    for name in PRESETS:
      cache = quantized_cache.make(cfg, 1, one.shape[1], name)
      note('preset', name, caches.score(cfg, params, cache, one, caches.CHUNK, toys.differences, exact))
  return {'rows': [
      {'kind': kind, 'name': name, 'first': first, 'last': last}
      | dict(zip(('nats',) if kind == 'exact' else toys.SCORES, np.mean(np.stack(texts)[:, :, first:last], axis=-1).T.tolist()))
      for (kind, name), texts in found.items() for first, last in zip(edges, edges[1:])]}


def tables(name: str, results: Mapping) -> list[report.Table]:
  by_name = {}
  for row in results['rows']:
    by_name.setdefault(row['name'], []).append(row)
  exact = by_name.pop('exact')
  spans = [f'{row["first"]}-{row["last"]}' for row in exact]
  between = lambda one, digits: '' if one['low'] is None else f' [{one["low"]:{digits}}, {one["high"]:{digits}}]'
  ranged = lambda one, digits: f'{one["mean"]:{digits}}' + between(one, digits)
  loss = ['exact: nats a token', *(f'{row["nats"]["mean"]:.2f}' for row in exact)]
  return [
      report.Table(f'{name}: KL by position', ['', *spans],
                   [[key, *(ranged(row['kl'], '.2g') for row in rows)] for key, rows in by_name.items()],
                   'From the exact model in nats per token, mean and 95 % interval over seeds and texts.'),
      report.Table(f'{name}: loss by position', ['', *spans], [loss, *([key, *(ranged(row['delta'], '+.4f') for row in rows)]
                                                                     for key, rows in by_name.items())],
                   'Nats per token above the exact model, mean and 95 % interval over seeds and texts.')]


def _plot(axis, rows: Sequence[Mapping]) -> None:
  for name, colour in (METHODS | PRESETS).items():
    mine = [row for row in rows if row['name'] == name]
    middle = [(max(row['first'], 128) * row['last'])**0.5 for row in mine]
    kl = [max(row['kl']['mean'], 1e-8) for row in mine]
    axis.plot(middle, kl, 'o-' if name in METHODS else 's--', color=colour, markersize=3, linewidth=1, label=name)
  axis.set_xscale('log', base=2)
  axis.axvline(toys.LENGTH, color='#bbbbbb', linewidth=0.8)
  axis.legend(fontsize=6)


def draw(results: Mapping[str, Mapping], path: pathlib.Path) -> pathlib.Path:
  return toys.draw(results, _plot, f'position (trained up to {toys.LENGTH})', path)


def main(argv=None) -> None:
  toys.run('contexts', __doc__, examine, tables, draw, argv, read=read)


if __name__ == '__main__':
  main()
