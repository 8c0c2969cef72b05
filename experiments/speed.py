r"""Speed against the machine's limit and against a peer, as JSON.

  python -m experiments.speed train --size=mini --peer=hf     # a training step: float32, AdamW, ours and transformers
  python -m experiments.speed decode --size=mini --dtype=bfloat16 --batch=8 --peer=hf
  python -m experiments.speed prefill --size=mini --peer=hf   # greedy, random weights, prompts of 512 tokens
  python -m experiments.speed decode --size=mini --peer=llama_cpp --convert=llama.cpp/convert_hf_to_gguf.py
  python -m experiments.speed load --size=e2b --dtype=bfloat16   # a process, from its start to the first token
  python -m experiments.speed kv --size=e2b --dtype=bfloat16 --kv=quality --contexts=1024,8192    # a step after a long context
  python -m experiments.speed scan --size=mini   # a token, blocks one by one and scanned: why decoding is not
  python -m experiments.speed compile            # a step of E2B's 35 layers at width 128: one by one, scanned, and in plain jax.numpy

Ours and the peer run as processes of their own, in turn, `--rounds` times; each round measures the matmul peak of its own
library around the steps, since machines drift. `share_of_peak` is model FLOPs (matmuls, causal attention, no recomputation)
over that peak: medians over rounds of medians over steps. Of decoding, `share_of_limit` says of what in `limit`.

llama.cpp reads the same random weights from a GGUF file: f32, bf16 or, beside --weights=int8, q8_0. `load` reads a checkpoint
(--checkpoint, or one of random weights that it writes first) and gives every round, as the first may compile.
`kv` compares a quantized cache with the exact one in the same dtype: of attention in one global layer (append, rotations and
attention over all) and of the model's whole step, how many times as fast, beside the ceiling that the bytes set.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time

from configs import base
from experiments import llama_cpp_peer, speed_kv, speed_sampling
from gemma4_jax import config as model_config, hardware, kv_format, provenance, size
from gemma4_jax.config import WEIGHTS

BATCH, LENGTH = 4, 512
# E2B's layers, all of them, at a width whose numbers cost nothing: what `compile` compiles.
NARROW = model_config.E2B.replace(
    width=128, vocab_size=4096, mlp_dim=512, num_heads=4, head_dim=32, global_head_dim=64, window=128, ple_dim=16, context_length=LENGTH,
    remat='full')


def _ours(name: str, steps: int, scan: bool) -> dict:
  import jax
  import jax.numpy as jnp

  from gemma4_jax import compilation
  from gemma4_jax.model import flash, transformer
  from gemma4_jax.training import optimizer, trainer
  hardware.keep_memory()
  c = base.get_config(name)
  cfg = base.models()[name].replace(scan=scan)
  tx = optimizer.make(c.optimizer, c.train.steps)
  params = transformer.init(cfg, 0)
  state = trainer.State(jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(params))
  batch = _batch(cfg)
  step = jax.jit(trainer.make_step(cfg, tx, accumulate=1, loss_chunk=c.train.loss_chunk), donate_argnums=0)
  begin = time.perf_counter()
  step = step.lower(state, batch).compile(compilation.train_options())
  compile_seconds = time.perf_counter() - begin
  def run():
    nonlocal state
    state, row = step(state, batch)
    return float(row['loss'])
  return _measure(run, hardware.measure_matmul, steps, cfg) | {
      'library': f'jax {jax.__version__}', 'device': jax.devices()[0].device_kind, 'compile_seconds': compile_seconds,
      'peak_memory_bytes': hardware.peak_memory_bytes(),
      'path': f'{"scanned" if scan else "one layer after another"}, attention {flash.choose(cfg.attention_implementation)}'}


def _compile(form: str) -> dict:
  """Seconds in which a training step of `NARROW` is traced and compiled, nothing kept from before; 'plain': the peer's."""
  import jax

  from experiments import speed_plain
  from gemma4_jax import compilation, sharding
  from gemma4_jax.training import optimizer, trainer
  c, cfg = base.get_config('e2b-toy'), NARROW.replace(scan=form != 'one_by_one')
  if form == 'plain':
    tx, step = speed_plain.make_step(cfg)
  else:
    tx = optimizer.make(c.optimizer, c.train.steps)
    step = trainer.make_step(cfg, tx, accumulate=1, loss_chunk=c.train.loss_chunk)
  state, batch = trainer.abstract_state(cfg, tx, sharding.make_mesh({})), _batch(cfg)
  begin = time.perf_counter()
  lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
  traced = time.perf_counter()
  lowered.compile(compilation.train_options())
  return {'trace_seconds': traced - begin, 'compile_seconds': time.perf_counter() - traced}


def _compiles(rounds: int) -> dict:
  found = {form: [] for form in ('one_by_one', 'scanned', 'plain')}
  for _ in range(rounds):
    for form, times in found.items():
      times.append(alone(_compile, form))
  ratios = lambda form: {key: statistics.median(b[key] / a[key] for a, b in zip(found[form], found['scanned'], strict=True))
                         for key in ('trace_seconds', 'compile_seconds')}
  return {'what': 'compile', 'layers': NARROW.num_layers, 'width': NARROW.width, 'remat': NARROW.remat,
          'environment': hardware.environment(), **alone(provenance.result),
          **{f'scanned_to_{form}': ratios(form) for form in ('one_by_one', 'plain')}, 'rounds': found}


def _hf(name: str, steps: int, scan: bool) -> dict:
  del scan
  try:
    import torch
    import transformers
  except ImportError as error:
    sys.exit(f"error: --peer=hf: {error}: pip install 'gemma4_jax[peer]'")
  from gemma4_jax.checkpoint import hf
  hardware.keep_memory()
  cfg = base.models()[name]
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.set_float32_matmul_precision('high')   # TensorFloat-32 on a GPU, as JAX multiplies float32 there
  fields = {**hf.config_to_hf(cfg), 'attn_implementation': 'sdpa'}
  model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**fields)).to(device).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
  ids = torch.tensor(_ids(cfg), dtype=torch.long, device=device)

  def run():
    optimizer.zero_grad(set_to_none=True)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss)

  def peak(n=2048):
    a = torch.ones(n, n, device=device)
    times = []
    for _ in range(4):
      begin = time.perf_counter()
      float((a @ a)[0, 0])
      times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)

  memory = lambda: torch.cuda.max_memory_allocated() if device == 'cuda' else hardware.peak_process_bytes()
  return _measure(run, peak, steps, cfg) | {
      'library': f'torch {torch.__version__}, transformers {transformers.__version__}', 'device': device, 'compile_seconds': 0.0,
      'peak_memory_bytes': memory(), 'path': model.config._attn_implementation}


def _batch(cfg) -> dict:
  import numpy as np
  ids = _ids(cfg)
  return {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'positions': np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
          'segments': np.ones((BATCH, LENGTH), np.int32), 'weights': np.ones((BATCH, LENGTH), np.float32)}


def _ids(cfg):
  import numpy as np
  return np.random.default_rng(0).integers(0, cfg.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)


def _measure(run, peak, steps, cfg) -> dict:
  before, losses, times = peak(), [run()], []
  for _ in range(steps):
    begin = time.perf_counter()
    losses.append(run())
    times.append(time.perf_counter() - begin)
  best = max(before, peak())
  seconds, flops = statistics.median(times), size.training_flops(cfg, LENGTH) * BATCH * LENGTH
  check_losses(losses)
  return {'step_seconds': seconds, 'tokens_per_s': BATCH * LENGTH / seconds, 'matmul_peak_flops': best,
          'share_of_peak': flops / seconds / best}


def check_losses(losses: list[float]) -> None:
  """Raises RuntimeError where steps on one batch did not lower its loss."""
  if not losses[-1] < losses[0]:
    raise RuntimeError(f'the loss did not fall ({losses}): this is no training step')


def _kv(args, contexts: tuple[int, ...]) -> dict:
  head, kinds, rounds = alone(provenance.result), (args.kv, 'exact'), []
  for _ in range(args.rounds):
    rounds.append([alone(speed_kv.measure, args.size, kind, other, args.dtype, args.batch, contexts, args.steps, args.weights)
                   for kind, other in zip(kinds, reversed(kinds))])
  compared = [speed_kv.compare(*pair) for pair in rounds]
  median = lambda rows: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
  prefill = {kind: alone(speed_kv.prefill_memory, args.size, kind, args.dtype, args.batch, max(contexts)) for kind in kinds}
  return {'what': 'kv', 'size': args.size, 'kv': args.kv, 'batch': args.batch, 'dtype': args.dtype, 'weights': args.weights,
          **head, 'environment': hardware.environment(),
          'ratios': [median(rows) for rows in zip(*compared)], 'prefill': prefill,
          'rounds': [dict(zip(('ours', 'exact'), pair)) for pair in rounds]}


def alone(function, *args) -> dict:
  """Runs in a process of its own, so that peaks of memory do not mix."""
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    return pool.submit(function, *args).result()


def main(argv=None) -> None:
  parser = argparse.ArgumentParser('python -m experiments.speed', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('what', choices=['train', 'decode', 'prefill', 'load', 'kv', 'scan', 'compile'])
  parser.add_argument('--size', default='mini', choices=list(base.models()), metavar='MODEL', help='a model of configs/base.py')
  parser.add_argument('--peer', choices=['hf', 'llama_cpp'], help='measure transformers or llama.cpp beside us')
  parser.add_argument('--convert', default='', metavar='FILE', help="--peer=llama_cpp: llama.cpp's convert_hf_to_gguf.py")
  parser.add_argument('--gguf', default='', metavar='FILE', help='--peer=llama_cpp: written if it is not there, and kept')
  parser.add_argument('--checkpoint', default='', metavar='DIR', help='load: any with a tokenizer.json')
  parser.add_argument('--kv', default='turboquant', help='kv: a format of gemma4_jax.kv_format')
  parser.add_argument('--contexts', default='1024,8192', help='kv: tokens that the cache holds, with commas between')
  parser.add_argument('--steps', type=int, default=3, help='timed steps a round, after one that is not')
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--scan', action='store_true', help='train: blocks as a scan over periods')
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'], help='but for train and load: of weights, activations')
  parser.add_argument('--weights', default='as_is', choices=WEIGHTS, help='decode, prefill, kv: ours, in few bits')
  parser.add_argument('--batch', type=int, default=1, help='decode, prefill, kv: rows')
  args = parser.parse_args(argv)
  if min(args.steps, args.rounds) < 1:
    parser.error('--steps and --rounds are at least 1')
  if args.peer and (args.what in ('load', 'scan', 'compile') or (args.what, args.peer) == ('train', 'llama_cpp')):
    parser.error(f'--peer={args.peer}: does not {args.what} here')
  os.environ.update(hardware.cpu_environment())   # of the processes to come: ours and the peer's
  if args.what == 'kv':
    try:
      kv_format.make(args.kv)
      contexts = tuple(int(n) for n in args.contexts.split(','))
    except ValueError as error:
      parser.error(str(error))
    print(json.dumps(_kv(args, contexts), indent=2))
    return
  if args.what == 'compile':
    print(json.dumps(_compiles(args.rounds), indent=2))
    return
  if args.what == 'scan':
    rounds = [alone(speed_sampling.scanned, args.size, args.dtype, args.steps) for _ in range(args.rounds)]
    print(json.dumps({'what': 'scan', 'size': args.size, 'dtype': args.dtype, **alone(provenance.result),
                      'environment': hardware.environment(), 'rounds': rounds}, indent=2))
    return
  with tempfile.TemporaryDirectory() as scratch:
    print(json.dumps(_loads(args, Path(scratch)) if args.what == 'load' else _beside(args, Path(scratch)), indent=2))


def _beside(args, scratch: Path) -> dict:
  """Ours and the peer's, in turn."""
  if args.what == 'train':
    call, shape = (args.size, args.steps, args.scan), {'batch': BATCH, 'length': LENGTH}
    runs = {'ours': (_ours, *call), 'hf': (_hf, *call)}
    shape['training_flops_per_step'] = size.training_flops(base.models()[args.size], LENGTH) * BATCH * LENGTH
  else:
    call = (args.size, args.what, args.dtype, args.batch, args.steps, args.weights)
    runs = {'ours': (speed_sampling.ours, *call), 'hf': (speed_sampling.hf, *call)}
    if args.peer == 'llama_cpp':
      runs['llama_cpp'] = (llama_cpp_peer.measure, args.size, args.what, args.batch, args.steps, _gguf(args, scratch))
    shape = {'batch': args.batch, 'prompt': speed_sampling.PROMPT, 'new': speed_sampling.NEW, 'dtype': args.dtype, 'weights': args.weights}
  head = alone(provenance.result)
  found = {name: [] for name in runs if name in ('ours', args.peer)}
  for _ in range(args.rounds):
    for name, rounds in found.items():
      rounds.append(alone(*runs[name]))
  out = {'what': args.what, 'size': args.size, **shape, 'parameters': size.total(base.models()[args.size]),
         **head, 'environment': hardware.environment(),
         **{name: {key: statistics.median(r[key] for r in rounds) if isinstance(value, (int, float)) else value
                   for key, value in rounds[0].items()} for name, rounds in found.items()}}
  if args.peer:
    ratios = [ours['tokens_per_s'] / peer['tokens_per_s'] for ours, peer in zip(found['ours'], found[args.peer])]
    out[f'times_as_fast_as_{args.peer}'] = statistics.median(ratios)
  return out


def _gguf(args, scratch: Path) -> str:
  """The file that llama.cpp is to read."""
  outtype = llama_cpp_peer.OUTTYPES.get((args.dtype, args.weights))
  file = args.gguf or str(scratch / f'{args.size}-{outtype}.gguf')
  llama_cpp_peer.library()
  if not os.path.exists(file):
    llama_cpp_peer.check(args.convert, outtype)
    alone(llama_cpp_peer.write_gguf, args.size, args.dtype, outtype, args.convert, file)
  return file


def _loads(args, scratch: Path) -> dict:
  """Of each round: seconds from the start of a process to its first token, and what they went into."""
  folder = args.checkpoint or str(scratch / 'checkpoint')
  if not args.checkpoint:
    alone(speed_sampling.write_random, args.size, args.dtype, folder)
  head, rounds = alone(provenance.result), []
  for _ in range(args.rounds):
    begin = time.perf_counter()
    found = alone(speed_sampling.first_token, folder, args.weights)
    rounds.append({'seconds': time.perf_counter() - begin, **found})
  return {'what': 'load', 'size': None if args.checkpoint else args.size,
          'checkpoint_bytes': sum(file.stat().st_size for file in Path(folder).glob('*')), 'weights': args.weights,
          **head, 'environment': hardware.environment(), 'rounds': rounds}


if __name__ == '__main__':
  main()
