r"""What quantized keys and values do to a language model: loss, divergence and top token, by method and by preset.

  python -m experiments.turboquant.caches --workdir=runs/caches [--models=e2b-toy,31b-toy] [--seeds=2] [--steps=1200] [--out=DIR]

Trains a toy of each shape (E2B: keys and values apart; 31B: K=V) on contexts of 1024 tokens, and reads validation documents of 1024:
  methods   every layer's keys and values are quantized and decoded, in one pass: all tokens, also the newest. Keys alone and values alone.
  presets   the caches that `kv=` names, fed 16 tokens at a time, with what they keep exact.
  greedy    tokens that a greedy continuation of half a document shares with that of the exact cache, of 128.
Everything is paired with the same model's exact numbers, document by document. A training that was killed goes on where it stopped.
Writes results.json, caches.md and PNG files to DIR, by default beside this file.
"""

import argparse
from collections.abc import Mapping, Sequence
import functools
import json
import pathlib
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from configs import base
from experiments import figures, report, statistics
from gemma4_jax import metrics, provenance
from gemma4_jax.evaluation import checkpoint as checkpoint_lib, documents as documents_lib
from gemma4_jax.model import attention, kv_cache, quantized_cache, transformer
from gemma4_jax.sampling import generate, text
from gemma4_jax.sampling.sampler import GREEDY
from gemma4_jax.training import trainer
from gemma4_jax.turboquant import methods

LENGTH, CHUNK, NEW = 1024, 16, 128
# Of `turboquant.methods`, and what they are beside: the same bits otherwise spent.
METHODS = ('turboquant2', 'turboquant3', 'turboquant4', 'turboquant6', 'turboquant8_absmax', 'turboquant4_norm', 'turboquant4_uniform',
           'turboquant4_none', 'turboquant2.5', 'turboquant3.5', 'prod3', 'prod4', 'prod4_orthogonal', 'polar4222', 'int4', 'int8',
           'int4_minmax', 'int3_minmax', 'int4_rotated', 'kivi_values2', 'q4_0', 'q8_0', 'nf4', 'fp8_e4m3')
SIDES = ('both', 'keys', 'values')
ONE_SIDED = ('turboquant2', 'turboquant3', 'turboquant4')          # also with keys alone, values alone
PRESETS = ('quality', 'turboquant', 'extreme', 'turboquant,recent=1,sinks=0', 'turboquant,recent=1,sinks=0,grid=lloyd_max',
           'extreme,recent=1,sinks=0')


@struct.dataclass
class Decoded:
  """A cache without memory, for one pass over whole documents: what is read are the keys and values as a method has them."""
  method: str = struct.field(pytree_node=False)
  side: str = struct.field(pytree_node=False)
  dim: int = struct.field(pytree_node=False)

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    quantizer = methods.make(self.method, self.dim)
    back = lambda x: quantizer.decode(quantizer.encode(x.swapaxes(1, 2))).swapaxes(1, 2).astype(x.dtype)   # [.., tokens, dim]
    k_BTKH, v_BTKH = back(k_BTKH) if self.side != 'values' else k_BTKH, back(v_BTKH) if self.side != 'keys' else v_BTKH
    return _Read(self, attention.FreshKV(k_BTKH, v_BTKH))


@struct.dataclass
class _Read:
  cache: Decoded
  kv: attention.FreshKV

  def attend(self, q_BTNH, stream, window, scale):
    return self.kv.attend(q_BTNH, stream, window, scale)


def decoded(cfg, batch: int, method: str, side: str) -> kv_cache.Cache:
  """For `score`: every layer that makes K/V has a `Decoded`."""
  return kv_cache.start(batch, {i: Decoded(method, side, spec.head_dim) for i, spec in enumerate(cfg.layers) if spec.kv_from is None})


@functools.partial(jax.jit, static_argnums=(0, 4))
def score(cfg, params, cache, ids_BT, chunk: int):
  """Of tokens fed `chunk` at a time, beside the same fed at once without a cache: float32 [3, B, T - 1], the difference of
  -log p(next) in nats, KL(exact || this) and whether the likeliest token is the same."""
  B, T = ids_BT.shape
  model = transformer.Transformer(cfg)
  exact_BTD, _ = model.apply({'params': params}, ids_BT, head=False)

  def step(cache, xs):
    ids_BC, next_BC, exact_BCD = xs
    logits, out = model.apply({'params': params}, ids_BC, None, jnp.ones_like(ids_BC), cache=cache)
    log_p, log_r = jax.nn.log_softmax(logits), jax.nn.log_softmax(model.apply({'params': params}, exact_BCD, method='head'))
    nll = lambda x: -jnp.take_along_axis(x, next_BC[..., None], axis=-1)[..., 0]
    return out['cache'], jnp.stack([nll(log_p) - nll(log_r), (jnp.exp(log_r) * (log_r - log_p)).sum(-1),
                                    (log_p.argmax(-1) == log_r.argmax(-1)).astype(jnp.float32)])

  split = lambda x: jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)
  _, found = jax.lax.scan(step, cache, (split(ids_BT), split(jnp.roll(ids_BT, -1, axis=1)), split(exact_BTD)))   # [n, 3, B, C]
  return jnp.moveaxis(found, 0, 2).reshape(3, B, T)[..., :-1]


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


def examine(model: text.Model, documents: Sequence[documents_lib.Document], batch: int, tick=lambda: None) -> dict[str, Any]:
  """{'nats': of the exact model, 'rows': [{kind, name, bits or bytes, and by document: delta, kl, same}], 'greedy': ..}."""
  cfg, params = model.cfg.replace(matvec='xla'), model.params
  ids = np.stack([document.ids for document in documents])
  batches = [ids[i:i + batch] for i in range(0, len(ids), batch)]

  def measured(make, chunk, cfg=cfg, params=params):
    found = np.concatenate([np.asarray(score(cfg, params, make(len(part)), part, chunk)) for part in batches], axis=1)
    tick()
    return {name: [float(x) for x in one.astype(np.float64).mean(-1)] for name, one in zip(('delta', 'kl', 'same'), found)}

  rows = []
  exact = measured(lambda B: quantized_cache.make(cfg, B, LENGTH), CHUNK)
  if max(exact['kl']) > 1e-4:
    raise RuntimeError(f'the exact cache is {max(exact["kl"]):.1e} nats from no cache: nothing can be measured by it')
  for name in METHODS:
    bits = methods.make(name, cfg.layers[-1].head_dim).bits_per_number
    for side in SIDES if name in ONE_SIDED else SIDES[:1]:
      rows.append({'kind': 'method', 'name': name, 'side': side, 'bits': bits} | measured(lambda B: decoded(cfg, B, name, side), LENGTH))
  for name in PRESETS:
    held = jax.eval_shape(lambda: quantized_cache.make(cfg, 1, 32 * LENGTH, name))
    rows.append({'kind': 'preset', 'name': name, 'bytes_32k': held.nbytes}
                | measured(lambda B: quantized_cache.make(cfg, B, LENGTH, name), CHUNK))
  prompts = [one.tolist() for one in ids[:batch, :LENGTH // 2]]
  settings = dict(max_new_tokens=NEW, sampling=GREEDY, stop_ids=())
  said = [out.tokens for out in generate.generate(cfg, params, prompts, **settings)]
  greedy = {}
  for name in PRESETS[:3]:
    other = [out.tokens for out in generate.generate(cfg, params, prompts, kv=name, **settings)]
    greedy[name] = [int(np.argmin(np.append(a == b, False))) for a, b in zip(said, other)]
    tick()
  return {'rows': rows, 'greedy': greedy, 'exact_cache_kl': max(exact['kl'])}


def combine(found: Mapping[str, Sequence[Mapping]]) -> dict[str, list[dict]]:
  """Model -> rows with the mean over seeds and documents and its interval: over documents, of means over seeds."""
  out = {}
  for name, seeds in found.items():
    out[name] = []
    for same in zip(*(one['rows'] for one in seeds), strict=True):
      row = {key: value for key, value in same[0].items() if key not in ('delta', 'kl', 'same')}
      for key in ('delta', 'kl', 'same'):
        over = statistics.interval(np.mean([one[key] for one in same], axis=0))
        row[key] = {'mean': over.mean, 'low': over.low, 'high': over.high, 'seeds': [float(np.mean(one[key])) for one in same]}
      out[name].append(row)
  return out


def tables(name: str, rows: Sequence[Mapping], greedy: Sequence[Mapping]) -> list[report.Table]:
  number = lambda one: f'{one["mean"]:+.4f} [{one["low"]:+.4f}, {one["high"]:+.4f}]'
  cells = lambda row: [number(row['delta']), f'{row["kl"]["mean"]:.5f}', f'{row["same"]["mean"]:.1%}']
  caption = ('Δ: nats per token above the same model with exact keys and values, mean over documents and its 95 % bootstrap interval; KL '
             'from the exact model in nats per token; how often the likeliest token is the same.')
  shared = lambda preset: [x for one in greedy for x in one[preset]]
  return [
      report.Table(f'{name}: methods', ['method', 'quantized', 'bits a number', 'Δ', 'KL', 'same token'], [
          [row['name'], row['side'], f'{row["bits"]:.3g}', *cells(row)] for row in rows if row['kind'] == 'method'], caption),
      report.Table(f'{name}: presets', ['kv', 'MB at 32k', 'Δ', 'KL', 'same token', 'greedy tokens alike'], [
          [row['name'], f'{row["bytes_32k"] / 1e6:.2f}', *cells(row),
           f'{np.median(shared(row["name"])):.0f} of {NEW}' if row['name'] in greedy[0] else '']
          for row in rows if row['kind'] == 'preset'],
                   caption + ' Greedy: median over prompts of the tokens before the first that differs.')]


def draw(combined: Mapping[str, Sequence[Mapping]], path: pathlib.Path) -> pathlib.Path:
  figure, (axes,) = figures.grid(6.5 * len(combined), 4.8, len(combined), sharey=True)
  styles = {'turboquant': ('#0072B2', 'o'), 'prod': ('#D55E00', 's'), 'polar': ('#009E73', 'D'), 'int': ('#E69F00', 'P'),
            '': ('#555555', 'v')}
  for axis, (name, rows) in zip(axes, combined.items()):
    for row in rows:
      if row['kind'] == 'method' and row['side'] == 'both':
        colour, marker = next(style for start, style in styles.items() if row['name'].startswith(start))
        axis.plot(row['bits'], max(row['kl']['mean'], 1e-7), marker, color=colour, markersize=5)
        axis.annotate(row['name'], (row['bits'], max(row['kl']['mean'], 1e-7)), fontsize=6, xytext=(4, 2), textcoords='offset points')
    axis.set(yscale='log', title=name, xlabel='bits a number of keys and values, scales counted')
  axes[0].set_ylabel('KL from the exact model, nats per token')
  return figures.save(figure, path)


def main(argv=None) -> None:
  parser = argparse.ArgumentParser('python -m experiments.turboquant.caches', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='folder of the trained toys')
  parser.add_argument('--models', default='e2b-toy,31b-toy', help='of configs/base.py, with commas between (default: %(default)s)')
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--steps', type=int, default=1200, help='of training, 2048 tokens each (default: %(default)s)')
  parser.add_argument('--documents', type=int, default=8, help='of code and of English each (default: %(default)s)')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(__file__).parent, help='folder of the results')
  args = parser.parse_args(argv)
  names = args.models.split(',')
  if unknown := [name for name in names if not name.endswith('-toy') or name not in base.models()]:
    parser.error(f'--models={args.models}: {unknown[0]!r} is none of {", ".join(n for n in base.models() if n.endswith("-toy"))}')
  if min(args.seeds, args.documents) < 1 or args.steps < 20:
    parser.error('--seeds and --documents are at least 1, --steps at least 20')
  args.out.mkdir(parents=True, exist_ok=True)
  head = provenance.result()
  found, trained, console = {}, {}, rich.console.Console(stderr=True)
  for name in names:
    for seed in range(args.seeds):
      folder = train(name, seed, args.steps, args.workdir)
      model = text.load(folder)
      documents = documents_lib.from_corpus(checkpoint_lib.run_corpus(folder, model.tokenizer).validation, most=args.documents,
                                            min_tokens=LENGTH, max_tokens=LENGTH)
      with rich.progress.Progress(console=console) as progress:
        total = 1 + len(METHODS) + 2 * len(ONE_SIDED) + len(PRESETS) + 3
        task = progress.add_task(f'{name}, seed {seed}', total=total)
        found.setdefault(name, []).append(examine(model, documents, 8, lambda: progress.advance(task)))
      trained.setdefault(name, []).append(json.loads((folder / 'DONE').read_text())['metrics'])
  combined = combine(found)
  shown = [table for name in names for table in tables(name, combined[name], [one['greedy'] for one in found[name]])]
  metrics.write_json(args.out / 'caches.json', head | {
      'steps': args.steps, 'seeds': args.seeds, 'documents': len(documents), 'length': LENGTH, 'chunk': CHUNK, 'trained': trained,
      'rows': combined,
      'greedy': {name: [one['greedy'] for one in seeds] for name, seeds in found.items()}})
  out = rich.console.Console()
  for table in shown:
    report.show(table, report.wide(out))
  metrics.write_text(args.out / 'caches.md', '\n'.join(line for table in shown for line in report.section(table)) + '\n')
  print(draw(combined, args.out / 'caches.png'), args.out / 'caches.md', args.out / 'caches.json', sep='\n')


if __name__ == '__main__':
  main()
