r"""What an accelerator makes of the models at their real sizes: decoding, prompts, training steps, as shares of what it can do at most.

  python -m experiments.speed_device --out=DIR                               # all rows; again: those that are missing
  python -m experiments.speed_device --out=DIR --only='^e2b ' --minutes=9    # of that name, begun within nine minutes
  python -m experiments.speed_device --list

Writes DIR/results.json, a row as soon as it is measured, and DIR/share_of_limit.png. Weights are random, and a cache is as if it held
`length` tokens. The limit of decoding is the bytes that a step reads over the measured bandwidth; of prompts and training the model's
FLOPs over the measured bfloat16 matmul peak, each by its own library. Rows of one model share a process, the small ones first, so that
`peak_memory_bytes` is a row's own where it grows. `hf` is transformers on the same device (extra `peer`). A row that fails, for want of
memory say, holds its error; take it out of the file to try again.
"""

import argparse
import concurrent.futures.process
import dataclasses
import itertools
import json
import os
from pathlib import Path
import re
import statistics
import sys
import time

from configs import base
from experiments import speed, speed_kv, speed_sampling
from gemma4_jax import config as model_config, hardware, metrics, provenance, size


@dataclasses.dataclass(frozen=True)
class Row:
  """What is measured: `length` is the tokens that a cache holds, of a prompt, or of a training sequence."""
  model: str
  what: str
  batch: int
  length: int
  weights: str = 'as_is'
  kv: str = 'exact'
  by: str = 'ours'

  @property
  def name(self) -> str:
    others = [f'{field}={value}' for field, value in (('weights', self.weights), ('kv', self.kv)) if value not in ('as_is', 'exact')]
    return ' '.join([self.model, self.what, f'batch={self.batch}', f'length={self.length}', *others, *(['hf'] if self.by == 'hf' else [])])

  @property
  def process(self) -> tuple:
    return self.by, self.model, self.what == 'train', self.weights


def rows() -> list[Row]:
  """Of the released sizes and the study's; a process's follow on each other, the small ones first."""
  found = [Row(name, 'train', *shape) for name, shape in (('mini', (32, 2048)), ('mid', (16, 2048)), ('e2b', (4, 512)))]
  for model, weights, kv in (('e2b', 'as_is', 'exact'), ('e4b', 'as_is', 'exact'), ('12b', 'as_is', 'exact'), ('31b', 'as_is', 'exact'),
                             ('31b', 'turboquant4', 'turboquant')):
    decode = [(1, 1024), (8, 1024), (32, 1024), (1, 32_768), (8, 32_768), (1, 131_072), (32, 32_768), (8, 131_072), (32, 131_072)]
    found += [Row(model, what, *shape, weights, kv) for what, shapes in (('prefill', [(1, 2048)]), ('decode', decode),
                                                                         ('prefill', [(1, 32_768)])) for shape in shapes]
  found += [Row(model, what, 1, length, by='hf') for model in ('e2b', 'e4b', '12b', '31b')
            for what, length in (('prefill', 2048), ('decode', 1024))]
  return found + [Row('mini', 'train', 32, 2048, by='hf'), Row('mid', 'train', 16, 2048, by='hf')]


def model(row: Row) -> model_config.ModelConfig:
  """In bfloat16; trained with weights and moments in float32, as the study's are."""
  cfg = base.models()[row.model]
  return cfg.replace(dtype='bfloat16', param_dtype='float32' if row.what == 'train' else 'bfloat16', scan=False,
                     context_length=max(row.length, cfg.context_length))


def main(argv=None) -> None:
  parser = argparse.ArgumentParser('python -m experiments.speed_device', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=Path, help='the folder of results.json')
  parser.add_argument('--only', default='', metavar='REGEX', help='rows whose name has it')
  parser.add_argument('--minutes', type=float, default=float('inf'), help='no row is begun after so many')
  parser.add_argument('--repeats', type=int, default=5, help='timings of a row; their median counts (default: %(default)s)')
  parser.add_argument('--list', action='store_true', help='print the names of the rows and stop')
  args = parser.parse_args(argv)
  try:
    wanted = [row for row in rows() if re.search(args.only, row.name)]
  except re.error as error:
    parser.error(f'--only: {args.only!r} is no regular expression ({error})')
  if args.list:
    print('\n'.join(row.name for row in wanted))
    return
  if args.out is None or not wanted or args.repeats < 1:
    parser.error('give --out' if args.out is None else f'--only: no row has {args.only!r}; see --list' if not wanted else
                 '--repeats: at least 1')
  run(wanted, args.out, time.time() + 60 * args.minutes, args.repeats)


def run(wanted: list[Row], out: Path, deadline: float, repeats: int) -> None:
  """Measures those that `out` has not, until the deadline."""
  out.mkdir(parents=True, exist_ok=True)
  hardware.take_gpu_memory()
  file = out / 'results.json'
  for _, together in itertools.groupby(wanted, lambda row: row.process):
    together = list(together)
    while (missing := [row for row in together if row.name not in read(file)]) and time.time() < deadline:
      try:
        speed.alone(measure, missing, file, deadline, repeats)
      except concurrent.futures.process.BrokenProcessPool:   # the row that it was at has an end, too; the others go on without it
        for at in [row for row in missing if row.name not in read(file)][:1]:
          metrics.write_json(file, read(file) | {at.name: {'error': 'the process died, of memory perhaps', **dataclasses.asdict(at)}})
  have = read(file)
  failed = [row.name for row in wanted if 'error' in have.get(row.name, {})]
  print(f'{file}: {sum(row.name in have for row in wanted)} of {len(wanted)} rows, {len(failed)} of them with an error')
  draw(have, out / 'share_of_limit.png')


def read(file: Path) -> dict:
  return json.loads(file.read_text()) if file.exists() else {}


def measure(together: list[Row], file: Path, deadline: float, repeats: int) -> None:
  """Rows of one process, one after another, each into the file when it is there."""
  try:
    kinds = (_Peer if together[0].by == 'hf' else _Ours)(together[0])
  except Exception as error:   # of any library: it goes into the rows
    kinds = error
  for row in together:
    if time.time() > deadline:
      return
    began = time.perf_counter()
    try:
      if isinstance(kinds, Exception):
        raise kinds
      found = getattr(kinds, row.what)(row, repeats)
    except Exception as error:
      found = {'error': f'{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ""}'}
    found |= {'wall_seconds': time.perf_counter() - began, **provenance.result(), **dataclasses.asdict(row)}
    metrics.write_json(file, read(file) | {row.name: found})
    print(f'{row.name}:', found.get('error') or f'{found["tokens_per_s"]:.4g} tokens/s, {found["share_of_limit"]:.0%} of the limit',
          file=sys.stderr)


class _Ours:
  """The model of some rows, on the default device."""

  def __init__(self, row: Row):
    import jax

    from gemma4_jax.model import quantized, quantized_cache, transformer
    from gemma4_jax.sampling import generate
    big = hardware.platform() != 'cpu'
    self.about = {'library': f'jax {jax.__version__}', 'device': jax.devices()[0].device_kind,
                  'bandwidth': hardware.measure_bandwidth(None if big else 2**26),
                  'matmul_peak_flops': hardware.measure_matmul(None if big else 512, dtype='bfloat16')}
    self.cfg, self.params = model(row), None
    if row.what != 'train':
      self.cfg, self.params = quantized_cache.fold(generate.fastest(self.cfg), transformer.init(self.cfg, 0), row.kv)
      if row.weights != 'as_is':
        self.params = quantized.quantize(self.cfg, self.params, row.weights, consume=True)

  def _result(self, seconds, tokens, limit_seconds, **more):
    middle = statistics.median(seconds)
    return {'tokens_per_s': tokens / middle, 'seconds': middle, 'share_of_limit': limit_seconds / middle,
            'peak_memory_bytes': hardware.peak_memory_bytes(), **more, **self.about}

  def decode(self, row: Row, repeats: int) -> dict:

    from gemma4_jax.model import quantized_cache
    count = 16
    cache = quantized_cache.make(self.cfg, row.batch, row.length + count * (repeats + 1), row.kv)
    cache = speed_kv.filled(cache, row.length)
    path = quantized_cache.describe(self.cfg, row.kv, row.length)
    seconds = speed_kv.step_seconds(speed_kv.steps(self.cfg, row.batch), self.params, cache, count, repeats)
    weights = None if row.weights == 'as_is' else speed_sampling.read_bytes(self.params)
    needed = size.decode_bytes(self.cfg, row.length, row.batch, weights, row.kv)
    return self._result(seconds, row.batch, needed / self.about['bandwidth'], bytes_per_step=needed, path=path)

  def prefill(self, row: Row, repeats: int) -> dict:
    import numpy as np

    from gemma4_jax.model import flash
    from gemma4_jax.sampling import generate
    ids_BT = np.random.default_rng(0).integers(3, self.cfg.vocab_size, (row.batch, row.length)).astype(np.int32)
    seconds = []
    for _ in range(repeats + 1):   # the first compiles
      session = generate.Session(self.cfg, self.params, row.batch, row.length + 1, kv=row.kv)
      began = time.perf_counter()
      session.append(ids_BT)
      session.wait()
      seconds.append(time.perf_counter() - began)
    needed = row.batch * size.prefill_flops(self.cfg, row.length)
    return self._result(seconds[1:], row.batch * row.length, needed / self.about['matmul_peak_flops'], flops=needed,
                        path=f'attention {flash.choose(self.cfg.attention_implementation)}')

  def train(self, row: Row, repeats: int) -> dict:
    import jax
    import jax.numpy as jnp

    from gemma4_jax import compilation
    from gemma4_jax.model import flash, transformer
    from gemma4_jax.training import optimizer, trainer
    c, cfg = base.get_config('mini'), self.cfg.replace(scan=True, remat='full')
    c.optimizer.warmup_steps = 10   # so that a few steps on one batch tell whether it learns
    tx = optimizer.make(c.optimizer, c.train.steps)
    params = transformer.init(cfg, 0)
    state = trainer.State(jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(params))
    ids_BT = jax.random.randint(jax.random.key(1), (row.batch, row.length + 1), 3, cfg.vocab_size)
    ones_BT = jnp.ones((row.batch, row.length), jnp.int32)
    batch = {'tokens': ids_BT[:, :-1], 'targets': ids_BT[:, 1:], 'positions': jnp.cumsum(ones_BT, axis=1) - 1, 'segments': ones_BT,
             'weights': ones_BT.astype(jnp.float32)}
    step = jax.jit(trainer.make_step(cfg, tx, accumulate=1, loss_chunk=4096), donate_argnums=0)
    began = time.perf_counter()
    step = step.lower(state, batch).compile(compilation.train_options())
    compile_seconds, seconds, losses = time.perf_counter() - began, [], []
    for _ in range(repeats + 1):
      began = time.perf_counter()
      state, found = step(state, batch)
      losses.append(float(found['loss']))
      seconds.append(time.perf_counter() - began)
    speed.check_losses(losses)
    tokens = row.batch * row.length
    needed = tokens * size.training_flops(cfg, row.length)
    return self._result(seconds[1:], tokens, needed / self.about['matmul_peak_flops'], flops=needed, compile_seconds=compile_seconds,
                        path=f'scanned, recomputed, attention {flash.choose(cfg.attention_implementation)}')


class _Peer:
  """transformers' model of some rows, in bfloat16; trained by autocast on float32 weights."""

  def __init__(self, row: Row):
    import torch
    import transformers

    from gemma4_jax.checkpoint import hf as names
    os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'   # JAX, which says what device this is, leaves the memory to torch
    self.torch, self.device = torch, 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.set_default_dtype(torch.float32 if row.what == 'train' else torch.bfloat16)
    torch.set_default_device(self.device)   # the weights are drawn there
    self.cfg = model(row)
    fields = {**names.config_to_hf(self.cfg), 'attn_implementation': 'sdpa'}
    self.model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**fields))
    self.about = {'library': f'torch {torch.__version__}, transformers {transformers.__version__}', 'device': self.device, 'path': 'sdpa'}
    n = 8192 if self.device == 'cuda' else 512
    square = torch.ones(n, n, dtype=torch.bfloat16)
    long = torch.ones(2**31 if self.device == 'cuda' else 2**24, dtype=torch.bfloat16)
    self.about['matmul_peak_flops'] = 2 * n**3 / min(self._time(lambda: square @ square) for _ in range(5))
    self.about['bandwidth'] = 2 * len(long) / statistics.median(self._time(lambda: long.amax()) for _ in range(5))

  def _time(self, function) -> float:
    began = time.perf_counter()
    function()
    if self.device == 'cuda':
      self.torch.cuda.synchronize()
    return time.perf_counter() - began

  def _result(self, seconds, tokens, limit_seconds):
    memory = self.torch.cuda.max_memory_allocated() if self.device == 'cuda' else hardware.peak_process_bytes()
    return {'tokens_per_s': tokens / seconds, 'seconds': seconds, 'share_of_limit': limit_seconds / seconds, 'peak_memory_bytes': memory,
            **self.about}

  def _generate(self, row: Row, new: int) -> float:
    ids_BT = self.torch.randint(3, self.cfg.vocab_size, (row.batch, row.length))
    with self.torch.inference_mode():
      return self._time(lambda: self.model.eval().generate(
          ids_BT, attention_mask=self.torch.ones_like(ids_BT), do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=new,
          min_new_tokens=new))

  def prefill(self, row: Row, repeats: int) -> dict:
    seconds = statistics.median([self._generate(row, 1) for _ in range(repeats + 1)][1:])
    needed = row.batch * size.prefill_flops(self.cfg, row.length)
    return self._result(seconds, row.batch * row.length, needed / self.about['matmul_peak_flops'])

  def decode(self, row: Row, repeats: int) -> dict:
    new = 17
    one, many = (statistics.median([self._generate(row, count) for _ in range(repeats + 1)][1:]) for count in (1, new))
    return self._result((many - one) / (new - 1), row.batch, size.decode_bytes(self.cfg, row.length, row.batch) / self.about['bandwidth'])

  def train(self, row: Row, repeats: int) -> dict:
    torch, losses = self.torch, []
    self.model.train().gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
    ids_BT = torch.randint(3, self.cfg.vocab_size, (row.batch, row.length + 1))

    def step():
      optimizer.zero_grad(set_to_none=True)
      with torch.autocast(self.device, torch.bfloat16):
        logits = self.model(input_ids=ids_BT[:, :-1], use_cache=False).logits
      loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
      optimizer.step()
      losses.append(float(loss.detach()))

    seconds = [self._time(step) for _ in range(repeats + 1)][1:]
    speed.check_losses(losses)
    tokens = row.batch * row.length
    return self._result(statistics.median(seconds), tokens,
                        tokens * size.training_flops(self.cfg, row.length) / self.about['matmul_peak_flops'])


def draw(have: dict, path: Path) -> None:
  """The share of its limit of every row that has one, by what it does."""
  from experiments import figures
  kinds = {what: [row for row in have.values() if row['what'] == what and 'error' not in row] for what in ('decode', 'prefill', 'train')}
  kinds = {what: found for what, found in kinds.items() if found}
  if not kinds:
    return
  figure, axes = figures.grid(8, 1 + 0.25 * sum(map(len, kinds.values())), rows=len(kinds),
                              height_ratios=[1 + len(found) for found in kinds.values()], sharex=True)
  for axis, (what, found) in zip(axes[:, 0], kinds.items()):
    names = [name for name, row in have.items() if row in found]
    bars = axis.barh(names, [100 * row['share_of_limit'] for row in found],
                     color=['#999999' if row['by'] == 'hf' else '#0072B2' for row in found])
    axis.bar_label(bars, [f'{row["tokens_per_s"]:,.0f} tokens/s' for row in found], padding=3, fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(axis='y', labelsize=7)
    axis.set_title(f'{what}: % of the {"bandwidth" if what == "decode" else "bfloat16 matmul"} measured', loc='left', fontsize=9)
    axis.set_xlim(0, 115)
  figures.save(figure, path)


if __name__ == '__main__':
  main()
