"""The report of a probe: what each intervention costs by layer, in sets of layers and by kind of token."""

from collections.abc import Mapping, Sequence
import pathlib

import rich.console

from experiments import figures, report, statistics
from gemma4_jax import metrics

_SURE = (statistics.BETTER, statistics.WORSE)
_CAPTION = ('Nats per token above `none`, mean over documents; positive: the intervention hurts. 95 % intervals: bootstrap over documents '
            '(BCa, 10,000 resamples), each document paired with itself; from Student\'s t below 10 documents. ')
_HOLM = ('A star: the interval excludes 0, and so does a paired t-test over documents with p < 0.05, adjusted by Holm among the {} of a '
         'kind.')


def write(found: Sequence[Mapping], workdir: pathlib.Path, console: rich.console.Console) -> None:
  """Writes results.json, report.md and a plot for each of `found`, results of `probe.run`, and prints the tables."""
  console = report.wide(console)
  text, paths = [f'# {workdir.resolve().name}', ''], []
  for i, results in enumerate(found):
    picture = workdir / f'delta_by_layer{i or ""}.png'
    figures.save(draw(results), picture)
    text += [*([f'# {results["name"]}', ''] if len(found) > 1 else []), *preamble(results), '', f'![delta by layer]({picture.name})', '']
    for table in tables(results):
      text += report.section(table)
      report.show(table, console)
    paths.append(picture)
  metrics.write_json(workdir / 'results.json', found)
  metrics.write_text(workdir / 'report.md', '\n'.join(text))
  console.print(*map(str, (workdir / 'report.md', workdir / 'results.json', *paths)), sep='\n', markup=False, highlight=False)


def tables(results: Mapping) -> list[report.Table]:
  arms = {(arm['kind'], arm['where']): arm for arm in results['arms']}
  kinds = list(dict.fromkeys(arm['kind'] for arm in results['arms']))
  places = list(dict.fromkeys(arm['where'] for arm in results['arms']))
  single = [where for where in places if where.startswith('layer ')]
  sets = [where for where in places if where not in single]
  strata = [stratum['name'] for stratum in results['protocol']['strata'][1:]]   # the first is all
  return [
      report.Table('Sets of layers', ['kind', *sets], [[kind, *(_cell(arms[kind, where], True) for where in sets)] for kind in kinds],
                   _CAPTION + _HOLM.format('sets')),
      report.Table('All layers, by kind of text and frequency of the predicted token', ['kind', *strata],
                   [[kind, *(_difference(arms[kind, 'all']['delta'].get(name)) for name in strata)] for kind in kinds],
                   'Quarters of the occurrences in the training split. Description, without tests.'),
      report.Table('Single layers', ['layer', *kinds], [
          [_named(results, arms[kinds[0], where]['layers'][0]), *(_cell(arms[kind, where]) for kind in kinds)] for where in single],
                   _HOLM.format('layers'))]


def preamble(results: Mapping) -> list[str]:
  protocol, env = results['protocol'], results['environment']
  return [f'Checkpoint: {results["checkpoint"]}. {protocol["documents"]} documents of at least {protocol["min_tokens"]} tokens, '
          f'{protocol["tokens"]:,} tokens predicted, {results["baseline"]["nats_per_token"]:.4f} nats per token under `none`.  ',
          f'Windows of {protocol["window"]} tokens from BOS on, stride {protocol["stride"]}; every place is intervened on, BOS included.  ',
          f'Commit: {env["commit"]}{" (dirty)" if env["dirty"] else ""}. {env["started"]}. Machine: {env["devices"]} × {env["device"]}, '
          f'{env["cpus"]} CPU cores. jax {env["versions"]["jax"]}.  ',
          f'Corpus: {env["corpus_hash"]}. Tokenizer: {env["tokenizer_hash"]}.']


def draw(results: Mapping):
  """A panel a kind: nats per token above `none` by layer, a figure of `figures.grid`."""
  kinds = list(dict.fromkeys(arm['kind'] for arm in results['arms']))
  donors = {i for i in results['kv_from'] if i is not None}
  borrowers = [i for i, donor in enumerate(results['kv_from']) if donor is not None]
  columns = min(3, len(kinds))
  rows = -(-len(kinds) // columns)
  figure, axes = figures.grid(4 * columns, 2.9 * rows + 0.6, columns, rows, sharex=True)
  for axis, kind in zip(axes.flat, kinds):
    axis.axhline(0, color='#999999', linewidth=0.8)
    if borrowers:
      axis.axvspan(min(borrowers) - 0.5, max(borrowers) + 0.5, color='#0072B2', alpha=0.08, linewidth=0)
    for arm in results['arms']:
      if arm['kind'] == kind and arm['where'].startswith('layer '):
        found, layer = arm['delta']['all'], arm['layers'][0]
        low, high = (found['mean'] if found[end] is None else found[end] for end in ('low', 'high'))
        axis.plot([layer, layer], [low, high], color='#0072B2', linewidth=1.3)
        axis.plot(layer, found['mean'], 'D' if layer in donors else 'o', color='#0072B2', markersize=5,
                  markerfacecolor='#0072B2' if found['verdict'] in _SURE else 'white')
    axis.set_title(kind, fontsize=10)
    axis.xaxis.get_major_locator().set_params(integer=True)
  for axis in axes.flat[len(kinds):]:
    axis.set_visible(False)
  for axis in axes[:, 0]:
    axis.set_ylabel('nats per token above none')
  for axis in axes[-1]:
    axis.set_xlabel('layer')
  figure.suptitle(f'{results["name"]}: intervention on the per-layer vectors of one layer, 95 % intervals over '
                  f'{results["protocol"]["documents"]} documents.\nFilled: the interval excludes 0, and Holm p < 0.05. Diamonds lend K/V; '
                  'the shaded layers borrow.', fontsize=10)
  return figure


def _named(results, layer):
  donor = results['kv_from'][layer]
  return f'{layer}' + (' (lends K/V)' if layer in results['kv_from'] else '' if donor is None else f' (borrows of {donor})')


def _cell(arm, interval=False):
  found = arm['delta']['all']
  return (_difference(found) if interval else f'{found["mean"]:+.4f}') + ('*' if found['verdict'] in _SURE else '')


def _difference(found):
  if found is None:
    return '–'
  return f'{found["mean"]:+.4f}' + ('' if found['low'] is None else f' [{found["low"]:+.4f}, {found["high"]:+.4f}]')
