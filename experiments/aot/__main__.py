r"""Compiles training and sampling for machines that are not here, and says what they would need.

  python -m experiments.aot --variant=31b --target=h200x1 --mode=decode --context=131072 --weights=int8
  python -m experiments.aot --variant=31b --target=v5p-8 --mode=train --context=2048 --mesh=fsdp=4
  python -m experiments.aot --all           # every row of TABLE that results.json has not; --table prints them as markdown

Targets are v5e-N, v5p-N, v6e-N (slices as named by their vendor), h100xN, h200xN, rtx4090xN, cpux1. A row is kept in results.json beside
this file and read from there the next time (--again compiles it anew). Needs the extra `aot`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
import sys
import time

from experiments.aot import targets
from gemma4_jax import kv_format
from gemma4_jax.config import PLE_PLACEMENTS, WEIGHTS

RESULTS = Path(__file__).parent / 'results.json'
RESERVE = 10**9    # bytes of a GPU that CUDA's context and libraries take; a TPU's compiler itself knows what is left

# What --all compiles, as flags: what the README says of single programs, and then every variant on machines of both kinds.
_VARIANTS = ('e2b', 'e4b', '12b', '26b-a4b', '31b')
TABLE = (
    '--variant=31b --target=h100x4 --mode=train --context=2048 --mesh=fsdp=4',
    '--variant=31b --target=v5p-8 --mode=train --context=2048 --mesh=fsdp=4',
    '--variant=31b --target=v6e-16 --mode=train --context=2048 --mesh=fsdp=16',
    '--variant=31b --target=v6e-8 --mode=train --context=2048 --mesh=fsdp=8',
    '--variant=31b --target=h100x8 --mode=train --context=2048 --mesh=fsdp=4,tensor=2',
    '--variant=26b-a4b --target=h100x8 --mode=train --context=2048 --mesh=fsdp=4,expert=2',
    '--variant=31b --target=h200x1 --mode=decode --context=131072',
    '--variant=31b --target=h100x1 --mode=decode --context=131072 --weights=int8 --kv=turboquant',
    '--variant=31b --target=h200x1 --mode=decode --context=131072 --weights=turboquant4 --kv=turboquant',
    '--variant=31b --target=rtx4090x1 --mode=decode --context=32768 --weights=turboquant4 --kv=turboquant',
    '--variant=e2b --target=v5e-1 --mode=decode --context=32768 --ple=host',
    '--variant=e4b --target=v5e-1 --mode=decode --context=32768 --ple=host',
    '--variant=e2b --target=cpux1 --mode=prefill --context=32768',
    '--variant=e2b --target=v5e-1 --mode=prefill --context=32768 --ple=host',
    '--variant=e2b --target=v5e-1 --mode=prefill --context=32768 --ple=host --kv=turboquant',
    '--variant=31b --target=v6e-8 --mode=prefill --context=32768 --kv=turboquant',
    *(f'--variant={name} --target=h200x1 --mode=decode --context=32768' for name in _VARIANTS),
    *(f'--variant={name} --target=h100x8 --mode=train --context=2048 --mesh=fsdp=8' for name in _VARIANTS),
    *(f'--variant={name} --target=v6e-8 --mode=prefill --context=32768' for name in _VARIANTS),
    *(f'--variant={name} --target=v5p-16 --mode=train --context=2048 --mesh=fsdp=8' for name in _VARIANTS[:-1]),   # 31b: v5p-8
)


def main(argv: list[str] | None = None) -> None:
  parser = _parser()
  args = parser.parse_args(argv)
  os.environ['JAX_PLATFORMS'] = 'cpu'   # what is compiled for is described, not here
  rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  if args.table:
    print(table(rows))
    return
  if not args.all and not (args.variant and args.target and args.mode):
    parser.error('give --variant, --target and --mode, or --all, or --table')
  for flags in TABLE if args.all else [None]:
    one = args if flags is None else parser.parse_args(flags.split())
    try:
      name = describe(one)
      if args.again or name not in rows:
        rows[name] = measure(one)
        rows = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | {name: rows[name]}
        _write(rows)
      print(json.dumps({name: rows[name]}, indent=2), flush=True)
    except (ValueError, ImportError, NotImplementedError) as error:
      sys.exit(f'error: {str(error).splitlines()[0]}')


def _parser():
  parser = argparse.ArgumentParser('python -m experiments.aot', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--variant', help='e2b, e4b, 12b, 26b-a4b or 31b')
  parser.add_argument('--target', help='v5e-N, v5p-N, v6e-N, h100xN, h200xN, rtx4090xN or cpux1')
  parser.add_argument('--mode', choices=('train', 'prefill', 'decode'))
  parser.add_argument('--context', type=int, default=2048, help='tokens of a sequence, or that a cache holds (default: %(default)s)')
  parser.add_argument('--batch', type=int, help='sequences over all devices (default: one for each part that the mesh splits a batch in)')
  parser.add_argument('--mesh', default='', help='AXIS=SIZE, with commas between (default: training fsdp, else tensor, over all devices)')
  parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float32'), help='of parameters, moments (default: %(default)s)')
  parser.add_argument('--weights', default='as_is', help=f'as {", ".join(WEIGHTS)}, or by group (default: %(default)s)')
  parser.add_argument('--kv', default='exact', help=f'{", ".join(kv_format.PRESETS)}, or one with fields behind it (default: %(default)s)')
  parser.add_argument('--ple', default='device', help=f'where the table is: {", ".join(PLE_PLACEMENTS)} (default: %(default)s)')
  parser.add_argument('--remat', default='full', help='training: none, dots or full (default: %(default)s)')
  parser.add_argument('--loss_chunk', type=int, default=1024, help='training: tokens whose logits exist at once on a device')
  parser.add_argument('--all', action='store_true', help='every row of TABLE')
  parser.add_argument('--table', action='store_true', help='print the rows that are there as markdown')
  parser.add_argument('--again', action='store_true', help='compile rows that are there anew')
  return parser


def describe(args: argparse.Namespace) -> str:
  """The row's name: all that decides what is compiled."""
  from gemma4_jax import sharding
  mesh = _mesh(args)
  batch = _batch(args, mesh)
  parts = [args.variant, args.target, args.mode, f'context={args.context}', f'batch={batch}',
           'mesh=' + '*'.join(f'{axis}={mesh[axis]}' for axis in sharding.AXES if mesh[axis] > 1)]
  others = [f'{name}={getattr(args, name)}' for name in ('dtype', 'weights', 'kv', 'ple', 'remat', 'loss_chunk')
            if getattr(args, name) != _parser().get_default(name)]
  return ' '.join(part for part in parts + others if part != 'mesh=')


def _mesh(args):
  from gemma4_jax import sharding
  count = targets.find(args.target).count
  mesh = sharding.parse(args.mesh) if args.mesh else {'fsdp' if args.mode == 'train' else 'tensor': count}
  return dict(zip(sharding.AXES, sharding.sizes(mesh, count)))


def _batch(args, mesh):
  batch = mesh['data'] * mesh['fsdp'] if args.batch is None else args.batch
  for name, value in (('batch', batch), ('context', args.context)):
    if value < 1:
      raise ValueError(f'--{name}={value}: is not positive')
  return batch


def measure(args: argparse.Namespace) -> dict:
  """Compiles and reads off what the row holds."""
  from experiments.aot import flops, hlo, program
  from gemma4_jax import config, provenance, sharding, size
  target = targets.find(args.target)
  cfg = config.variant(args.variant)
  sizes = _mesh(args)
  mesh = sharding.make_mesh(sizes, targets.devices(target))
  fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(program.Job)}
  job = program.Job(**fields | {'batch': _batch(args, sizes)})
  began = time.perf_counter()
  traced, lowered = program.lower(cfg, job, mesh)
  row = {'lower_seconds': time.perf_counter() - began, 'program_flops_per_device': flops.count(traced.jaxpr) / target.count,
         'memory': target.chip.memory, 'date': time.strftime('%Y-%m-%d'), **provenance.code(RESULTS)}
  for plugin in {'tpu': ['libtpu'], 'gpu': ['jax-cuda13-pjrt'], 'cpu': []}[target.platform]:
    row['versions'][plugin] = importlib.metadata.version(plugin)
  if job.mode == 'train':
    row['model_flops_per_device'] = size.training_flops(cfg, job.context) * job.batch * job.context / target.count
  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except Exception as error:   # XLA's, of no public type
    if 'RESOURCE_EXHAUSTED' not in str(error) and 'Ran out of memory' not in str(error):
      raise
    reason = next(line for line in str(error).splitlines() if 'memory' in line)
    return row | {'compile_seconds': time.perf_counter() - began, 'fits': False, 'refused': reason.strip()[:300]}
  row['compile_seconds'] = time.perf_counter() - began
  found = compiled.memory_analysis()
  row |= {'arguments': found.argument_size_in_bytes, 'temporaries': found.temp_size_in_bytes, 'output': found.output_size_in_bytes,
          'aliased': found.alias_size_in_bytes}
  row['total'] = row['arguments'] + row['temporaries'] + row['output'] - row['aliased']
  row['fits'] = target.platform == 'tpu' or row['total'] + RESERVE <= target.chip.memory
  text = compiled.as_text()
  row |= {'collectives': hlo.collectives(text), 'kernels': hlo.kernels(text)}
  if job.mode == 'decode':   # at best: what a step must read, once; of experts, those of tokens that choose different ones
    row['bound_tokens_per_s'] = job.batch * target.chip.bandwidth / program.step_bytes(cfg, job, mesh)
  return row


def _write(rows):
  partial = RESULTS.with_suffix('.partial')
  partial.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + '\n')
  partial.replace(RESULTS)


def table(rows: dict) -> str:
  """The rows as markdown."""
  gb = lambda row, name: f'{row[name] / 1e9:.2f}' if name in row else '-'
  lines = ['| program | fits | of GB | arguments | temporaries | total | TFLOPs | bound | collectives | kernels | compile s |',
           '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- | ---: |']
  for name, row in sorted(rows.items()):
    kinds = ', '.join(f'{kind} {c["count"]} ({c["bytes"] / 1e9:.2f} GB)' for kind, c in sorted(row.get('collectives', {}).items()))
    cells = [name, 'yes' if row['fits'] else 'no', *(gb(row, part) for part in ('memory', 'arguments', 'temporaries', 'total')),
             f'{row["program_flops_per_device"] / 1e12:.3g}', f'{row["bound_tokens_per_s"]:.0f}' if 'bound_tokens_per_s' in row else '-',
             kinds or '-', ', '.join(row.get('kernels', ())) or '-',
             f'{row["compile_seconds"]:.0f}']
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
