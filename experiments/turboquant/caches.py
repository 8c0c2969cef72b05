r"""What quantized keys and values do to a language model: loss, divergence and top token, by method and by preset.

  python -m experiments.turboquant.caches --workdir=runs/caches [--models=e2b-toy,31b-toy] [--seeds=2] [--steps=1200] [--out=DIR]

Trains a toy of each shape (E2B: keys and values apart; 31B: K=V) on contexts of 1024 tokens, and reads validation documents of 1024:
  methods   every layer's keys and values are quantized and decoded, in one pass: all tokens, also the newest. Keys alone and values alone.
  presets   the caches that `kv=` names, fed 16 tokens at a time, with what they keep exact.
  greedy    tokens that a greedy continuation of half a document shares with that of the exact cache, of 128.
  spread    the standard deviation of attention logits over the keys that a query sees, by layer: what errors of keys are multiplied by.
Everything is paired with the same model's exact numbers, document by document. A training that was killed goes on where it stopped.
Writes caches.json, caches.md and caches.png to DIR, by default beside this file.
"""

from collections.abc import Mapping, Sequence
import functools
import pathlib
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.turboquant import toys
from gemma4_jax.model import attention, kv_cache, quantized_cache, transformer
from gemma4_jax.sampling import generate, text
from gemma4_jax.sampling.sampler import GREEDY
from gemma4_jax.turboquant import methods

CHUNK, NEW = 16, 128
# Of `turboquant.methods`, and what they are beside: the same bits otherwise spent.
METHODS = ('turboquant2', 'turboquant3', 'turboquant4', 'turboquant6', 'turboquant8_absmax', 'turboquant4_norm', 'turboquant4_uniform',
           'turboquant4_none', 'turboquant2.5', 'turboquant3.5', 'prod3', 'prod4', 'prod4_orthogonal', 'polar4222', 'int4', 'int8',
           'int4_minmax', 'int3_minmax', 'int4_rotated', 'kivi_values2', 'q4_0', 'q8_0', 'nf4', 'fp8_e4m3')
SIDES = ('both', 'keys', 'values')
ONE_SIDED = ('turboquant2', 'turboquant3', 'turboquant4')          # also with keys alone, values alone
# As they are, and with nothing kept exact: of E2B's toy the last global layer that makes K/V is the only one.
PRESETS = ('quality', 'turboquant', 'extreme', 'quality,recent=1,sinks=0,exact_last=False', 'turboquant,recent=1,sinks=0,exact_last=False',
           'turboquant,recent=1,sinks=0,exact_last=False,grid=lloyd_max', 'extreme,recent=1,sinks=0')


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


def bits(cfg, method: str) -> float:
  """Of a number of the keys and values that a cache holds, scales counted: a mean over layers, whose dims differ."""
  held = [spec for spec in cfg.layers if spec.kv_from is None]
  return float(np.average([methods.make(method, spec.head_dim).bits_per_number for spec in held],
                          weights=[spec.num_kv_heads * spec.head_dim for spec in held]))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def score(cfg, params, cache, ids_BT, chunk: int, measure, *beside):
  """`measure(logits_BCV, next_BC, *beside)` [k, B, C] of tokens fed `chunk` at a time, [k, B, T]; `beside` are [B, T, ..] here."""
  B, T = ids_BT.shape

  def step(cache, xs):
    ids_BC, *rest = xs
    logits, out = transformer.Transformer(cfg).apply({'params': params}, ids_BC, None, jnp.ones_like(ids_BC), cache=cache)
    return out['cache'], measure(logits, *rest)

  split = lambda x: jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)
  _, found = jax.lax.scan(step, cache, tuple(map(split, (ids_BT, jnp.roll(ids_BT, -1, axis=1), *beside))))   # [n, k, B, C]
  return jnp.moveaxis(found, 0, 2).reshape(found.shape[1], B, T)


@struct.dataclass
class _Watched:
  """As `Decoded`, of exact keys and values: notes the spread of the logits of every layer that reads them."""
  noted: list = struct.field(pytree_node=False)

  def append(self, k_BTKH, v_BTKH, stream, key_scale_H=None):
    return _WatchedRead(self, attention.FreshKV(k_BTKH, v_BTKH))


@struct.dataclass
class _WatchedRead:
  cache: _Watched
  kv: attention.FreshKV

  def attend(self, q_BTNH, stream, window, scale):
    B, T, N, _ = q_BTNH.shape
    logits = attention.scores(q_BTNH, self.kv.k_BSKH.swapaxes(1, 2), scale)   # [B, K, T * G, S]
    logits = logits.reshape(B, -1, T, N // logits.shape[1], T)
    seen = attention.see(stream, stream.pos_BT, stream.seg_BT, window)[:, None, :, None]   # of causal queries, the later half
    variance = jnp.var(logits, axis=-1, where=seen)[:, :, T // 2:]
    self.cache.noted.append(jnp.sqrt(variance.mean()))
    return self.kv.attend(q_BTNH, stream, window, scale)


@functools.partial(jax.jit, static_argnums=0)
def spread(cfg, params, ids_BT) -> jax.Array:
  """float32 [layers]: the root mean square, over heads and the later half of the queries, of the standard deviation of a query's logits."""
  noted = []
  held = {i: _Watched(noted) for i, spec in enumerate(cfg.layers) if spec.kv_from is None}
  transformer.Transformer(cfg).apply({'params': params}, ids_BT, None, jnp.ones_like(ids_BT), cache=kv_cache.start(len(ids_BT), held))
  return jnp.stack(noted)


def examine(model: text.Model, ids: np.ndarray, tick=lambda: None) -> dict[str, Any]:
  """Of documents [n, T]: {'rows': [{kind, name, bits or bytes, and by document: delta, kl, same}], 'greedy', 'spread', ..}."""
  cfg, params, T = model.cfg.replace(matvec='xla'), model.params, ids.shape[1]
  batches = toys.batches(ids)
  exact = [toys.logits(cfg, params, part) for part in batches]

  def measured(make, chunk):
    found = toys.by_document([score(cfg, params, make(len(part)), part, chunk, toys.differences, truth)
                              for part, truth in zip(batches, exact)])
    tick()
    return found

  rows = []
  unchanged = measured(lambda B: quantized_cache.make(cfg, B, T), CHUNK)
  if max(unchanged['kl']) > 1e-4:
    raise RuntimeError(f'the exact cache is {max(unchanged["kl"]):.1e} nats from no cache: nothing can be measured by it')
  for name in METHODS:
    for side in SIDES if name in ONE_SIDED else SIDES[:1]:
      rows.append({'kind': 'method', 'name': name, 'side': side, 'bits': bits(cfg, name)}
                  | measured(lambda B: decoded(cfg, B, name, side), T))
  for name in PRESETS:
    held = jax.eval_shape(lambda: quantized_cache.make(cfg, 1, 32 * 1024, name))
    rows.append({'kind': 'preset', 'name': name, 'bytes_32k': held.nbytes}
                | measured(lambda B: quantized_cache.make(cfg, B, T, name), CHUNK))
  prompts = [one.tolist() for one in batches[0][:, :T // 2]]
  settings = dict(max_new_tokens=NEW, sampling=GREEDY, stop_ids=())
  said = [out.tokens for out in generate.generate(cfg, params, prompts, **settings)]
  greedy = {}
  for name in PRESETS[:3]:
    other = [out.tokens for out in generate.generate(cfg, params, prompts, kv=name, **settings)]
    greedy[name] = [int(np.argmin(np.append(a == b, False))) for a, b in zip(said, other)]
    tick()
  return {'rows': rows, 'greedy': greedy, 'exact_cache_kl': max(unchanged['kl']), 'spread': spread(cfg, params, batches[0]).tolist(),
          'windows': [spec.window for spec in cfg.layers]}


def tables(name: str, found: Mapping) -> list[report.Table]:
  rows, greedy = found['rows'], found['greedy']
  shared = lambda preset: [x for one in greedy for x in one[preset]]
  spreads = np.mean(found['spread'], axis=0)
  return [
      report.Table(f'{name}: methods', ['method', 'quantized', 'bits a number', *toys.HEADER], [
          [row['name'], row['side'], f'{row["bits"]:.3g}', *toys.cells(row)] for row in rows if row['kind'] == 'method'], toys.CAPTION),
      report.Table(f'{name}: presets', ['kv', 'MB at 32k', *toys.HEADER, 'greedy tokens alike'], [
          [row['name'], f'{row["bytes_32k"] / 1e6:.2f}', *toys.cells(row),
           f'{np.median(shared(row["name"])):.0f} of {NEW}' if row['name'] in greedy[0] else '']
          for row in rows if row['kind'] == 'preset'],
                   toys.CAPTION + ' Greedy: median over prompts of the tokens before the first that differs.'),
      report.Table(f'{name}: spread of attention logits', ['layer', 'sees', 'σ'], [
          [str(i), 'all before it' if window is None else f'{window} tokens', f'{sigma:.2f}']
          for i, (window, sigma) in enumerate(zip(found['windows'][0], spreads))],
                   'σ: standard deviation of a query\'s logits over the keys it sees, root mean square over heads and later queries.')]


def _plot(axis, rows: Sequence[Mapping]) -> None:
  styles = {'turboquant': ('#0072B2', 'o'), 'prod': ('#D55E00', 's'), 'polar': ('#009E73', 'D'), 'int': ('#E69F00', 'P'),
            '': ('#555555', 'v')}
  columns = {}
  for row in rows:
    if row['kind'] == 'method' and row['side'] == 'both':
      columns.setdefault(round(row['bits']), []).append((max(row['kl']['mean'], 1e-7), row['bits'], row['name']))
  for column in columns.values():
    free, right = 0, max(at for _, at, _ in column) + 0.12
    for kl, at, name in sorted(column):     # names one above the other, each at its point or above it
      colour, marker = next(style for start, style in styles.items() if name.startswith(start))
      axis.plot(at, kl, marker, color=colour, markersize=5)
      free = max(kl, 1.2 * free)
      axis.annotate(name, (at, kl), (right, free), fontsize=6, va='center', color=colour,
                    arrowprops={'arrowstyle': '-', 'lw': 0.3, 'color': colour, 'relpos': (0, 0.5)})


def draw(results: Mapping[str, Mapping], path: pathlib.Path) -> pathlib.Path:
  return toys.draw(results, _plot, 'bits a number of keys and values, scales counted', path)


def main(argv=None) -> None:
  toys.run('caches', __doc__, examine, tables, draw, argv)


if __name__ == '__main__':
  main()
