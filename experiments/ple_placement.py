r"""What it costs to keep the PLE table elsewhere or in fewer bits: greedy decoding of one row, random weights, as JSON.

  python -m experiments.ple_placement --size=mini        # or e2b

For every placement and storage of the table: tokens/s (median of `--rounds`), bytes of the weights on the accelerator and of the
table in host memory, bytes that a token moves for PLE (read on the accelerator, fetched from the host), and the path: `take` on the
device or `callback` into the host. Each kind is measured beside `device as_is`, in turn, since machines drift: `times_device` is
the ratio of the two.
"""

import argparse
from collections.abc import Iterator
import itertools
import json
import os
import statistics
import sys
import time

from configs import base
from gemma4_jax import config as model_config, hardware, provenance

PROMPT = 32


def measure(name: str, dtype: str, kinds: list[tuple[str, str]], tokens: int, rounds: int) -> Iterator[dict]:
  """A row for every (placement, storage) of the model `name` of configs/base.py."""
  import jax
  import numpy as np

  from gemma4_jax import compilation
  from gemma4_jax.model import ple_placement, transformer
  from gemma4_jax.sampling import generate
  from gemma4_jax.sampling.sampler import GREEDY
  compilation.keep()   # all but programs that call back
  base_cfg = base.models()[name].replace(dtype=dtype, param_dtype=dtype)
  base_params = transformer.init(base_cfg, 0)
  prompt = np.random.default_rng(0).integers(0, base_cfg.vocab_size, PROMPT).tolist()

  def tokens_per_s(cfg, params):
    session = generate.Session(cfg, params, 1, PROMPT + 2 * tokens)
    session.append([prompt])
    parts = session.generate(2 * tokens, sampling=GREEDY, stop_ids=(), every=tokens)
    next(parts)      # compiles; the second part is timed
    begin = time.perf_counter()
    next(parts)
    return tokens / (time.perf_counter() - begin)

  def row(placement, storage):
    cfg, params = ple_placement.place(base_cfg, base_params, placement=placement, storage=storage)
    speeds, ratios = [], []
    for _ in range(rounds):
      speeds.append(tokens_per_s(cfg, params))
      ratios.append(speeds[-1] / tokens_per_s(base_cfg, base_params))
    nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    table = params['arm']['lookup'].get('host')
    row_bytes = sum(array[0].nbytes for array in (table.arrays if table else params['arm']['lookup']).values())
    others = nbytes({part: leaf for part, leaf in params['arm'].items() if part != 'lookup'})
    jax.clear_caches()   # they would keep the table alive
    return {'placement': placement, 'storage': storage, 'path': 'callback' if table else 'take',
            'tokens_per_s': statistics.median(speeds), 'times_device': statistics.median(ratios), 'resident_bytes': nbytes(params),
            'host_bytes': table.nbytes if table else 0, 'read_bytes_per_token': others + (0 if table else row_bytes),
            'fetched_bytes_per_token': row_bytes if table else 0}

  for placement, storage in kinds:
    yield row(placement, storage)


def main(argv=None) -> None:
  parser = argparse.ArgumentParser('python -m experiments.ple_placement', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='mini', choices=[name for name, cfg in base.models().items() if cfg.embedding == 'ple'],
                      metavar='MODEL', help='a model of configs/base.py that has PLE')
  parser.add_argument('--dtype', default='bfloat16', choices=['bfloat16', 'float32'])
  parser.add_argument('--tokens', type=int, default=64, help='timed, of each')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--placements', default=','.join(model_config.PLE_PLACEMENTS), help='with commas between (default: %(default)s)')
  parser.add_argument('--storages', default=','.join(model_config.PLE_TABLES), help='with commas between (default: %(default)s)')
  args = parser.parse_args(argv)
  kinds = list(itertools.product(args.placements.split(','), args.storages.split(',')))
  if min(args.tokens, args.rounds) < 1:
    parser.error('--tokens and --rounds are at least 1')
  try:
    for placement, storage in kinds:
      base.models()[args.size].replace(ple_placement=placement, ple_table=storage)
  except ValueError as error:
    sys.exit(f'error: {error}')
  os.environ.update(hardware.cpu_environment())   # before JAX is imported
  head = provenance.result()
  rows = []
  for row in measure(args.size, args.dtype, kinds, args.tokens, args.rounds):
    print(json.dumps(row), file=sys.stderr, flush=True)
    rows.append(row)
  print(json.dumps({'size': args.size, 'dtype': args.dtype, 'batch': 1, 'prompt': PROMPT, 'tokens': args.tokens, 'rounds': args.rounds,
                    **head, 'environment': hardware.environment(), 'rows': rows}, indent=2))


if __name__ == '__main__':
  main()
