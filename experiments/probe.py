"""Runs the probe of a config: trains the model if it names no checkpoint, intervenes, and compares document by document.

A runner of `experiments.launch` (configs/ple_probe.py). The core is `gemma4_jax.evaluation.probe`; the report, `experiments.probe_report`.
"""

import csv
import dataclasses
import io
import json
import pathlib

import ml_collections
import numpy as np
from rich import progress as rich_progress
import rich.console

from experiments import manifest, probe_report, statistics

_QUARTERS = ('q1 (frequent)', 'q2', 'q3', 'q4 (rare)')   # of `perplexity.frequency_quarters`


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError: a checkpoint or model that cannot be probed, or a field that cannot be."""
  from gemma4_jax.checkpoint import load
  from gemma4_jax.evaluation import windows
  from gemma4_jax.training import trainer
  p = config.probe
  for field, least in (('documents', 0), ('min_tokens', 1), ('tokens', 0)):
    if p[field] < least:
      raise ValueError(f'probe.{field}: {p[field]} is less than {least}')
  if p.param_dtype not in ('', 'float32', 'bfloat16'):
    raise ValueError(f"probe.param_dtype: {p.param_dtype!r} is none of '', 'float32', 'bfloat16'")
  cfg = load.find(p.checkpoint).cfg if p.checkpoint else trainer.check(config)
  if not cfg.inject_layers:
    raise ValueError(f'{"probe.checkpoint" if p.checkpoint else "model.embedding"}: a probe needs per-layer vectors, and '
                     f'model.embedding={cfg.embedding!r} has none')
  windows.check_sizes(p.window, p.stride, p.batch_tokens)
  if p.window > cfg.context_length:
    raise ValueError(f'probe.window: {p.window} is over model.context_length = {cfg.context_length}')


def run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """Leaves results.json, documents.csv (nats of every document in every arm) and DONE in `folder`, and in folder/train the run of a
  model that it trained.

  Raises:
    ValueError: as `check`, or a checkpoint whose tokenizer or text cannot be had.
    probe.Invalid: a control failed.
  """
  from gemma4_jax import metrics, sharding
  from gemma4_jax.evaluation import documents as documents_lib, perplexity, probe
  from gemma4_jax.sampling import text
  from gemma4_jax.training import identity, trainer
  check(config)
  p, checkpoint = config.probe, config.probe.checkpoint
  if not checkpoint:
    checkpoint = folder / 'train'
    trainer.run(config, checkpoint)
  model = text.load(checkpoint, param_dtype=p.param_dtype or None, progress=True)
  data = _corpus(config, checkpoint, model.tokenizer)
  documents = documents_lib.from_corpus(data.validation, most=p.documents, min_tokens=p.min_tokens, max_tokens=p.tokens)
  if not documents:
    raise ValueError(f'probe.min_tokens: no document that was kept back has {p.min_tokens} tokens')
  quarter_V = perplexity.frequency_quarters(data.token_counts)
  strata = _strata(documents, quarter_V)
  plan = probe.arms(model.cfg)
  arms, base, nats = [], None, {}
  done = probe.run(model.cfg, model.params, documents, window=p.window, stride=p.stride, batch_tokens=p.batch_tokens, seed=config.seed)
  for arm in rich_progress.track(done, 'probing', total=len(plan), console=rich.console.Console(stderr=True)):
    base = base or arm
    arms.append(compare(arm, base, strata))
    nats[f'{arm.kind} {arm.where}'.strip()] = [f'{nll.sum(dtype=np.float64):.4f}' for nll in arm.nll]
  adjust(arms[1:])
  results = {
      'name': config.arm, 'checkpoint': p.checkpoint or 'trained here', 'model': model.cfg.to_dict(),
      'protocol': {'documents': len(documents), 'min_tokens': p.min_tokens, 'tokens': int(sum(len(d.targets) for d in documents)),
                   'window': p.window, 'stride': p.stride, 'seed': config.seed, 'text': 'validation split of the corpus in environment',
                   'strata': [{'name': name, 'tokens': int(sum(mask.sum() for mask in masks))} for name, masks in strata.items()]},
      'kv_from': [spec.kv_from for spec in model.cfg.layers],
      'baseline': {'nats_per_token': float(np.concatenate(base.nll).mean(dtype=np.float64))},
      'arms': arms[1:], 'environment': identity.environment(data, sharding.make_mesh(config.mesh))}
  metrics.write_json(folder / 'results.json', results)
  about = {'document': [d.origin for d in documents], 'domain': [d.domain for d in documents],
           'tokens': [len(d.targets) for d in documents]}
  metrics.write_text(folder / 'documents.csv', table(about | nats))
  told = {f'probe/{arm["kind"]} {arm["where"]}': arm['delta']['all']['mean'] for arm in arms[1:]}
  metrics.write_json(folder / 'DONE', {'metrics': told, 'costs': {}})


def report(workdir: pathlib.Path, *, console: rich.console.Console) -> bool:
  """Tables, report.md, results.json and plots of the points that are done. Returns True: what is no probe has failed before."""
  found = [json.loads((workdir / point.folder / 'results.json').read_text(encoding='utf-8'))
           for point in manifest.read(workdir) if manifest.done(point, workdir) is not None]
  if found:
    probe_report.write(found, workdir, console)
  return True


def compare(arm, base, strata: dict[str, list[np.ndarray]]) -> dict:
  """What results.json says of an arm: over documents, the mean of a document's nats per token above `base`, all in all and by stratum.

  Args:
    arm, base: of `probe.run`.
    strata: name -> of every document a mask of its targets; a document without any is left out of the stratum.
  """
  deltas = [a.astype(np.float64) - b for a, b in zip(arm.nll, base.nll, strict=True)]
  found = {}
  for name, masks in strata.items():
    means = [delta[mask].mean() for delta, mask in zip(deltas, masks, strict=True) if mask.any()]
    if arm is not base and means:
      found[name] = dataclasses.asdict(statistics.interval(means))
      if name == 'all':
        found[name]['p'] = statistics.p_value(means)
  return {'kind': arm.kind, 'where': arm.where, 'layers': list(arm.layers), 'delta': found}


def adjust(arms: list[dict]) -> None:
  """Adds 'p_holm' and 'verdict' to the differences over all tokens, adjusted among the single layers of a kind, and among its
  larger sets."""
  families = {}
  for arm in arms:
    families.setdefault((arm['kind'], len(arm['layers']) == 1 and arm['where'].startswith('layer ')), []).append(arm['delta']['all'])
  for family in families.values():
    for found, p in zip(family, statistics.holm([found['p'] for found in family])):
      interval = statistics.Interval(*(found[field.name] for field in dataclasses.fields(statistics.Interval)))
      found |= {'p_holm': p, 'verdict': statistics.verdict(interval, p, lower_is_better=True)}


def table(columns: dict[str, list]) -> str:
  """As CSV."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows([columns, *zip(*columns.values(), strict=True)])
  return text.getvalue()


def _strata(documents, quarter_V) -> dict[str, list[np.ndarray]]:
  whole = [np.ones(len(d.targets), bool) for d in documents]
  strata = {'all': whole}
  for domain in dict.fromkeys(d.domain for d in documents):
    strata[domain] = [mask & (d.domain == domain) for d, mask in zip(documents, whole)]
  for quarter, name in enumerate(_QUARTERS):
    strata[name] = [quarter_V[d.targets] == quarter for d in documents]
  return {name: masks for name, masks in strata.items() if any(mask.any() for mask in masks)}


def _corpus(config, checkpoint, tokenizer):
  """Of a run, its own; else the text of `config.data` in the checkpoint's tokens."""
  from gemma4_jax.checkpoint import load
  from gemma4_jax.data import corpus
  from gemma4_jax.evaluation import checkpoint as checkpoint_lib
  data = config.data.copy_and_resolve_references()
  data.update({'tokenizer': str(load.find(checkpoint).home / 'tokenizer.json'), 'vocab_size': tokenizer.vocab_size})
  return checkpoint_lib.run_corpus(checkpoint, tokenizer) or corpus.prepare(data)
