"""Converts a checkpoint directory: Hugging Face's, Google's Orbax tree, our export or a run's folder, to the first or the third.

  python -m gemma4_jax.cli.convert --src=DIR --dst=DIR --to=hf|orbax [--dtype=bfloat16] [--check] [--dry_run]

Prints a sha256 over path, dtype, shape and bytes of all weights, which is the same in every format, as read back from what was
written. From Hugging Face's files, weights are memory-mapped; of Orbax trees, the model is held in host memory.
"""

import argparse
import sys


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog='python -m gemma4_jax.cli.convert', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.error = sys.exit   # one line, without the usage
  parser.add_argument('--src', required=True, help='a directory; of a run, the newest checkpoint is taken')
  parser.add_argument('--dst', required=True, help='a directory that does not exist; written beside and renamed when whole')
  parser.add_argument('--to', required=True, choices=('hf', 'orbax'), help='hf: what transformers reads; orbax: ours')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of all weights (default: as stored)')
  parser.add_argument('--check', action='store_true', help='refuse weights that are not finite')
  parser.add_argument('--dry_run', action='store_true', help='say what would be done')
  args = parser.parse_args(argv)
  try:
    _convert(args)
  except ValueError as error:
    sys.exit(f'error: {error}')


def _convert(args):
  from absl import logging
  import jax  # late: it need not load for --help

  from gemma4_jax import config
  from gemma4_jax.checkpoint import hf, load, save, source
  logging.set_verbosity(logging.FATAL)   # Orbax logs tracebacks of errors that are told below
  jax.config.update('jax_platforms', 'cpu')   # nothing is computed, and an accelerator may be busy

  found = load.find(args.src)
  if args.to == 'hf':
    hf.tensors(found.cfg)   # or there is no such model there
  count = sum(piece.size for piece in found.pieces)
  dtype = args.dtype or found.dtype
  nbytes = count * source.DTYPES[args.dtype].itemsize if args.dtype else found.nbytes
  print(f'from  {found.folder}: {found.kind}, {config.released(found.cfg) or "no released variant"}, {found.cfg.num_layers} layers of '
        f'width {found.cfg.width}, {len(found.pieces)} tensors, '
        f'{count / 1e9:.2f} B parameters, {found.nbytes:,} bytes, mostly {found.dtype}')
  if found.skipped:
    print(f'      {len(found.skipped)} weights of towers are left out')
  print(f'to    {args.dst}: {args.to}, {nbytes:,} bytes, {dtype if args.dtype else "dtypes as they are"}')
  save.check_free(args.dst)
  if args.dry_run:
    print('dry run: nothing was written')
    return
  with save.beside(args.dst) as folder:
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
    written = save.digest(item for _, weights in load.find(folder).read() for item in weights.items())
    if written != read:
      raise ValueError(f'{args.dst}: what was written is not what was read (sha256 {written} for {read}); is the disk sound?')
  print(f'sha256 {written}')


if __name__ == '__main__':
  main()
