"""Prints what the released variants cost, from their configs alone.

  python -m gemma4_jax.cli.size --variants=e2b,e4b --context=32768 [--markdown | --json]
"""

import argparse
import json
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from gemma4_jax import kv_format, size
from gemma4_jax.config import PLE_PLACEMENTS, PLE_TABLES, VARIANTS, ModelConfig, variant


def costs(cfg: ModelConfig, context: int) -> dict:
  """All numbers of the table, unrounded; bytes in bfloat16, K/V for one sequence of `context` tokens."""
  return {
      'layers': cfg.num_layers,
      'global_layers': sum(spec.window is None for spec in cfg.layers),
      'layers_borrowing_kv': cfg.num_kv_shared_layers,
      'window': cfg.window,
      'width': cfg.width,
      'mlp_dims': sorted({spec.mlp_dim for spec in cfg.layers}),
      'experts': cfg.num_experts,
      'experts_per_token': cfg.num_experts_per_token,
      'expert_dim': cfg.expert_dim,
      'ple_dim': max(spec.inject_dim for spec in cfg.layers),
      'total_params': size.total(cfg),
      'non_embedding_params': size.non_embedding(cfg),
      'ple_table_params': size.parameters(cfg)['arm_table'],
      'active_params': size.active(cfg),
      'forward_flops_per_token': size.forward_flops(cfg, context),
      'bytes': size.BYTES * size.total(cfg),
      'resident_bytes': size.resident_bytes(cfg),
      **{f'kv_bytes_{preset}': size.kv_bytes(cfg, context, preset) for preset in kv_format.PRESETS},
      'ple_placements': ple_costs(cfg),
  }


def ple_costs(cfg: ModelConfig) -> dict:
  """Placement -> storage of the PLE table -> its bytes (`size.placed_bytes`); empty without PLE."""
  return {placement: {storage: size.placed_bytes(cfg.replace(ple_placement=placement, ple_table=storage)) for storage in PLE_TABLES[1:]}
          for placement in PLE_PLACEMENTS} if cfg.embedding == 'ple' else {}


def rows(cfgs: dict[str, ModelConfig], context: int) -> list[list[str]]:
  """The table as text: a header, then a row a quantity; the first column says which."""
  billion = lambda number: f'{number / 1e9:.2f} B'
  gigabytes = lambda number: f'{number / 1e9:.2f} GB'
  kinds = [
      ('layers', 'layers', str),
      ('  global', 'global_layers', str),
      ('  borrow K/V', 'layers_borrowing_kv', str),
      ('window', 'window', str),
      ('width', 'width', str),
      ('MLP width', 'mlp_dims', lambda dims: ', '.join(map(str, dims))),
      ('experts', 'experts', str),
      ('  a token', 'experts_per_token', str),
      ('  width', 'expert_dim', str),
      ('PLE width', 'ple_dim', str),
      ('parameters', 'total_params', billion),
      ('  non-embedding', 'non_embedding_params', billion),
      ('  PLE table', 'ple_table_params', billion),
      ('  active', 'active_params', billion),
      ('fwd GFLOPs/token', 'forward_flops_per_token', lambda flops: f'{flops / 1e9:.2f}'),
      ('weights', 'bytes', gigabytes),
      ('  resident', 'resident_bytes', gigabytes),
      ('K/V cache', 'kv_bytes_separate', gigabytes),
      ('  K=V unified', 'kv_bytes_exact', gigabytes),
      *((f'  {preset}', f'kv_bytes_{preset}', gigabytes) for preset in kv_format.PRESETS if preset not in ('exact', 'separate')),
  ]
  numbers = [costs(cfg, context) for cfg in cfgs.values()]
  return [[f'bf16, {context} tokens', *cfgs],
          *([title, *(text(n[key]) if n[key] else '-' for n in numbers)] for title, key, text in kinds)]


def ple_rows(cfgs: dict[str, ModelConfig]) -> list[list[str]]:
  """The table of PLE placements as text: a header, then a row a placement and storage; empty if none of the models has PLE.

  For each model: weights on the accelerator, what a token reads there to make its PLE vectors, what it fetches from the host.
  """
  found = {name: ple_costs(cfg) for name, cfg in cfgs.items() if cfg.embedding == 'ple'}
  if not found:
    return []
  text = lambda bytes, unit, digits: f'{bytes / unit:.{digits}f}' if bytes else '-'
  cells = lambda bytes: [text(bytes['resident'], 1e9, 2), text(bytes['read'], 1e3, 1), text(bytes['fetched'], 1e3, 1)]
  return [['PLE, kB a token', *(cell for name in found for cell in (f'{name} GB', 'read', 'fetch'))],
          *([f'{placement} {storage}', *(cell for costs in found.values() for cell in cells(costs[placement][storage]))]
            for placement in PLE_PLACEMENTS for storage in PLE_TABLES[1:])]


def markdown(table: list[list[str]]) -> str:
  header, *body = table
  lines = [header, ['---', *['---:'] * (len(header) - 1)], *([title.replace('  ', '&nbsp;&nbsp;'), *cells] for title, *cells in body)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog='python -m gemma4_jax.cli.size', description=__doc__.splitlines()[0])
  parser.error = sys.exit   # one line, without the usage
  parser.add_argument('--variants', default=','.join(VARIANTS), help='names with commas between (default: %(default)s)')
  parser.add_argument('--context', type=int, default=32_768, help='tokens of K/V and of attention (default: %(default)s)')
  how = parser.add_mutually_exclusive_group()
  how.add_argument('--markdown', action='store_true', help='as the README has it')
  how.add_argument('--json', action='store_true', help='all numbers, unrounded')
  args = parser.parse_args(argv)
  try:
    cfgs = {name: variant(name) for name in args.variants.split(',')}
  except ValueError as error:
    sys.exit(f'--variants: {error}')
  if args.context < 1:
    sys.exit(f'--context: {args.context} is not positive')

  if args.json:
    print(json.dumps({name: costs(cfg, args.context) for name, cfg in cfgs.items()}, indent=2))
    return
  tables = [table for table in (rows(cfgs, args.context), ple_rows(cfgs)) if table]
  if args.markdown:
    print('\n\n'.join(map(markdown, tables)))
    return
  for header, *body in tables:
    table = Table(header[0], box=box.SIMPLE)
    for name in header[1:]:
      table.add_column(name, justify='right')
    for row in body:
      table.add_row(*row)
    Console().print(table)


if __name__ == '__main__':
  main()
