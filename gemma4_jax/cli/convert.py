"""Converts a checkpoint directory: Hugging Face's, Google's Orbax tree, our export or a run's folder, to the first or the third.

  python -m gemma4_jax.cli.convert --src=DIR --dst=DIR --to=hf|orbax [--dtype=bfloat16] [--check] [--dry_run]
  python -m gemma4_jax.cli.convert --src=DIR --dst=DIR --to=orbax --quantize=turboquant4[,embed=int4,ple_table=int4]

Prints a sha256 over path, dtype, shape and bytes of all weights, which is the same in every format, as read back from what was
written. From Hugging Face's files, weights are memory-mapped; of Orbax trees, the model is held in host memory. With --quantize
weights are read, quantized and written one by one: memory holds the largest of them, and what one layer is stored as.
"""

from gemma4_jax.cli.sample import guard, make_parser
from gemma4_jax.config import PLE_TABLES, WEIGHTS


def main(argv: list[str] | None = None) -> None:
  parser = make_parser('convert', __doc__)
  parser.add_argument('--src', required=True, help='a directory; of a run, the newest checkpoint is taken')
  parser.add_argument('--dst', required=True, help='a directory that does not exist; written beside and renamed when whole')
  parser.add_argument('--to', required=True, choices=('hf', 'orbax'), help='hf: what transformers reads; orbax: ours')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of all weights (default: as stored)')
  parser.add_argument('--quantize', metavar='FORMAT', help=f'store matrices in few bits: of {", ".join(WEIGHTS[1:])}, with embed and '
                      'ple_table as int8; or by group, as in attention=turboquant4,mlp=int8 (of attention, mlp, experts, ple, embed, and '
                      'ple_table: int8, int4)')
  parser.add_argument('--check', action='store_true', help='refuse weights that are not finite')
  parser.add_argument('--dry_run', action='store_true', help='say what would be done')
  args = parser.parse_args(argv)
  guard(lambda: _convert(args))


def _convert(args):
  from absl import logging
  import jax  # late: it need not load for --help

  from gemma4_jax import config
  from gemma4_jax.checkpoint import hf, load, packed, save, source
  logging.set_verbosity(logging.FATAL)   # Orbax logs tracebacks of errors that are told below
  jax.config.update('jax_platforms', 'cpu')   # nothing is computed, and an accelerator may be busy

  found = load.find(args.src)
  if any(piece.fixed for piece in found.pieces):
    raise ValueError(f'{found.folder}: its weights are quantized already; convert those that they were made of')
  if args.quantize and args.to == 'hf':
    raise ValueError('--quantize: quantized weights are written as --to=orbax; transformers has no such formats')
  if args.to == 'hf':
    hf.tensors(found.cfg)   # or there is no such model there
  count = sum(piece.size for piece in found.pieces)
  dtype = args.dtype or found.dtype
  nbytes = count * source.DTYPES[args.dtype].itemsize if args.dtype else found.nbytes
  contents = _contents(args.quantize, found.cfg, args.dtype) if args.quantize else None
  print(f'from  {found.folder}: {found.kind}, {config.released(found.cfg) or "no released variant"}, {found.cfg.num_layers} layers of '
        f'width {found.cfg.width}, {len(found.pieces)} tensors, '
        f'{count:,} parameters, {found.nbytes:,} bytes, mostly {found.dtype}')
  if found.skipped:
    print(f'      {len(found.skipped)} weights of towers are left out')
  if contents:
    print(f'to    {args.dst}: {args.to}, {contents.nbytes:,} bytes, {args.quantize}')
    _report(contents, found.nbytes / count)
  else:
    print(f'to    {args.dst}: {args.to}, {nbytes:,} bytes, {dtype if args.dtype else "dtypes as they are"}')
    if args.to == 'hf' and hf.caveat(found.cfg):
      print(f'      {hf.caveat(found.cfg)}')
  save.check_free(args.dst)
  if args.dry_run:
    print('dry run: nothing was written')
    return
  with save.beside(args.dst) as folder:
    if contents:
      read = save.digest(_quantized(found, contents, packed.Writer(folder, contents), args))
      save.copy_tokenizer(found.home, folder)
      _verify(args.dst, folder, read)
      return
    flat = {}
    with source.bar('reading', found.nbytes, True) as advance:
      for piece, weights in found.read():
        if args.check:
          source.check_finite(piece.name, weights)
        flat |= weights
        advance(piece.nbytes)
    read = save.digest(flat.items(), args.dtype)
    if args.to == 'hf':
      with source.bar('writing', nbytes, True) as advance:
        save.write_hf(folder, found.cfg, flat, dtype=args.dtype, tokenizer=found.home, wrote=advance)
    else:
      save.write_orbax(folder, found.cfg, flat, dtype=args.dtype, tokenizer=found.home)
    _verify(args.dst, folder, read)


def _verify(dst, folder, read):
  from gemma4_jax.checkpoint import load, save
  written = save.digest(item for _, weights in load.find(folder).read() for item in weights.items())
  if written != read:
    raise ValueError(f'{dst}: what was written is not what was read (sha256 {written} for {read}); is the disk sound?')
  print(f'sha256 {written}')


def _contents(quantize, cfg, dtype):
  """What --quantize asks for; a ValueError says where it cannot be."""
  from gemma4_jax.checkpoint import packed
  parts = quantize.split(',')
  tables = [part.removeprefix('ple_table=') for part in parts if part.startswith('ple_table=')]
  rest = ','.join(part for part in parts if not part.startswith('ple_table='))
  table = tables[0] if tables else 'int8' if cfg.has_ple_table and parts[0] in WEIGHTS[1:] else 'as_is'
  if len(tables) > 1 or table not in PLE_TABLES:
    raise ValueError(f'--quantize: ple_table={table!r}: once, and of {", ".join(PLE_TABLES)}')
  cfg = cfg.replace(ple_table=table, **dict(param_dtype=dtype, dtype=dtype) if dtype else {})
  contents = packed.Contents.make(cfg, rest or 'as_is')
  if not contents.formats and table == 'as_is':
    raise ValueError(f'--quantize={quantize}: leaves everything as it is')
  return contents


def _report(contents, itemsize):
  rows = list(contents.report(itemsize))
  rows.append(('all', '', *(sum(row[i] for row in rows) for i in range(2, 6))))
  print(f'      {"group":9} {"format":11} {"weights":>7} {"numbers":>15} {"bytes before":>15} {"after":>15} {"bits":>6}')
  for group, format, count, numbers, before, after in rows:
    print(f'      {group:9} {format:11} {count:7} {numbers:15,} {before:15,.0f} {after:15,} {8 * after / numbers:6.3f}')
  asked, done = contents.coverage()
  print(f'      quantized: {len(done)} of the {len(asked)} weights that were asked for, {len(done) / len(asked):.0%}, and '
        f'{sum(contents.sizes[name] for name in done) / sum(contents.sizes.values()):.3%} of all numbers')


def _quantized(found, contents, writer, args):
  """Yields what is written, for its hash."""
  from gemma4_jax.checkpoint import source
  with source.bar('quantizing', found.nbytes, True) as advance:
    for piece, weights in found.read():
      if args.check:
        source.check_finite(piece.name, weights)
      for name, weight in weights.items():
        cast = args.dtype and name in contents.arrays     # what is quantized is quantized as it comes
        arrays = contents.encode(name, weight.astype(source.DTYPES[args.dtype], copy=False) if cast else weight)
        writer.add(arrays)
        yield from arrays.items()
      advance(piece.nbytes)
  writer.close()


if __name__ == '__main__':
  main()
