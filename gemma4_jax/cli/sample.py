"""Continues a prompt, or answers it.

  python -m gemma4_jax.cli.sample --checkpoint=DIR --prompt='The sea is' --stream
  python -m gemma4_jax.cli.sample --checkpoint=DIR --prompt='Why is the sea salty?' --chat --thinking
  python -m gemma4_jax.cli.sample --variant=e2b --random_weights --dtype=bfloat16 --prompt=x     (speed at full size)

The text goes to standard output. To standard error go lines that say which model runs, where its weights are and what its cache keeps,
thoughts, and at the end a line of tokens, speed (without compiling), memory and cache.
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
import sys

from gemma4_jax import config_file, hardware, kv_format
from gemma4_jax.config import PLE_PLACEMENTS, PLE_TABLES, VARIANTS, WEIGHTS, nearest


def _ids(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(i) for i in text.split(',') if i)
  except ValueError:
    raise argparse.ArgumentTypeError(f'{text!r} is no list of token ids with commas between') from None


_SAMPLING = {
    'temperature': (float, '0 is greedy'), 'top_k': (int, 'the k likeliest tokens; 0 for all'),
    'top_p': (float, 'the fewest tokens that hold this much probability'),
    'min_p': (float, 'tokens at least this share as likely as the likeliest'),
    'repetition_penalty': (float, 'of tokens that are there already; 1 for none'),
    'suppress_tokens': (_ids, 'ids, with commas between, that are never chosen')}


def main(argv: list[str] | None = None) -> None:
  parser = make_parser('sample', __doc__)
  parser.add_argument('--prompt', required=True, help="text; '-' reads standard input")
  parser.add_argument('--chat', action='store_true', help="the prompt is a user's message, and the model answers it")
  parser.add_argument('--system', help='a system message before it (with --chat)')
  parser.add_argument('--thinking', action='store_true', help='let the model think first (with --chat)')
  parser.add_argument('--samples', type=int, default=1, help='so many continuations (default: %(default)s)')
  parser.add_argument('--best_of', type=int, help='draw so many and print those --samples that are likeliest a token')
  how = parser.add_mutually_exclusive_group()
  how.add_argument('--stream', action='store_true', help='print the text as it is decoded')
  how.add_argument('--json', action='store_true', help='one JSON object: texts, tokens, log-probabilities and the numbers of the last line')
  add_model_arguments(parser, max_new_tokens=256)
  args = parser.parse_args(argv)
  guard(lambda: _sample(args))


def _sample(args):
  if not args.chat and (args.system or args.thinking):
    raise ValueError('--system and --thinking: need --chat')
  if args.samples < 1 or (args.stream and args.samples > 1):
    raise ValueError(f'--samples={args.samples}: at least one, and just one with --stream')
  if args.best_of is not None and (args.best_of < args.samples or args.stream):
    raise ValueError(f'--best_of={args.best_of}: at least --samples={args.samples}, and not with --stream: the best is known at the end')
  if args.prompt == '-' and sys.stdin is None:
    raise ValueError('--prompt=-: standard input is closed')
  prompt = sys.stdin.read().removesuffix('\n') if args.prompt == '-' else args.prompt
  if not (prompt.strip() if args.chat else prompt):   # a message is trimmed
    raise ValueError('--prompt: empty; give some text')
  model = load_model(args)   # JAX loads with it: it need not for --help

  from gemma4_jax.sampling import text
  if args.chat:
    system = [{'role': 'system', 'content': args.system}] if args.system else []
    ids = model.encode_chat([*system, {'role': 'user', 'content': prompt}], thinking=args.thinking)
  else:
    ids = model.encode(prompt)
  run = model.start([ids], max_new_tokens=args.max_new_tokens, sampling=sampling(args, model), seed=args.seed, stop_strings=args.stop,
                    samples=args.best_of or args.samples, every=1 if args.stream else None, chat=args.chat)
  if args.stream:
    thoughts = Thoughts()
    for kind, piece in (piece for new, in run for piece in new):
      if kind == 'reasoning':
        thoughts.write(piece)
      else:
        thoughts.end()
        print(piece, end='', flush=True)
    thoughts.end()
    print()
  done = run.finish()
  done = done if args.best_of is None else text.likeliest(done)[:args.samples]
  if args.json:
    print(json.dumps({'prompt_ids': ids.tolist(), 'completions': [
        {'text': row.text, 'tokens': row.tokens.tolist(), 'logprobs': row.logprobs.tolist(), 'stopped': row.stopped,
         **({'message': row.message} if args.chat else {})} for row in done],
        'stats': dataclasses.asdict(run.stats), 'peak_memory_bytes': _peak_memory()}, ensure_ascii=False))
  elif not args.stream:
    for i, row in enumerate(done):
      if args.samples > 1:
        print(f'--- {i + 1} of {args.samples}, mean log p {row.logprobs.mean():.3f}')
      if args.chat and 'reasoning' in row.message:
        thoughts = Thoughts()
        thoughts.write(row.message['reasoning'])
        thoughts.end()
      print(answer(row.message) if args.chat else row.text, flush=True)
  print(_told(run.stats, model), file=sys.stderr)


class _Parser(argparse.ArgumentParser):

  def parse_known_args(self, args=None, namespace=None):
    """First says what is no flag at all, which argparse does after it has missed those that are required."""
    args = sys.argv[1:] if args is None else args
    flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith('--')]
    for name in (arg.split('=')[0] for arg in args):
      if name.startswith('--') and name not in flags:
        self.error(f'unrecognized argument: {name}; did you mean {nearest(name, flags)}?')
    return super().parse_known_args(args, namespace)

  def error(self, message):
    sys.exit(f'error: {config_file.one_line(message)}')   # without the usage


def make_parser(name: str, doc: str) -> argparse.ArgumentParser:
  return _Parser(prog=f'python -m gemma4_jax.cli.{name}', description=doc, allow_abbrev=False,
                 formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
  model = parser.add_argument_group('model')
  model.add_argument('--checkpoint', help="a directory: Hugging Face's, Google's Orbax tree, our export or a run's folder")
  model.add_argument('--tokenizer', help="a tokenizer.json (default: the checkpoint's)")
  model.add_argument('--variant', help=f'of {", ".join(VARIANTS)}; with --random_weights in place of a checkpoint')
  model.add_argument('--random_weights', action='store_true', help="random weights and a stand-in for the tokenizer")
  model.add_argument('--shrink', action='store_true', help='the variant at toy size')
  model.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of weights and activations (default: as stored)')
  model.add_argument('--ple_placement', choices=PLE_PLACEMENTS, default='device',
                     help='where the PLE table is, and whether the rest of PLE is folded into it (default: %(default)s)')
  model.add_argument('--ple_table', choices=PLE_TABLES, default='as_is', help='how it is stored (default: %(default)s)')
  model.add_argument('--weights', default='as_is', metavar='FORMAT', help=f'how the other matrices are stored: of {", ".join(WEIGHTS)}, '
                     "or by group, as in 'turboquant4,embed=int4' and 'attention=int8,mlp=nf4' (default: %(default)s)")
  model.add_argument('--mesh', metavar='AXIS=SIZE,..', help='devices over which weights and caches are split, as fsdp=8,tensor=4 '
                     '(axes data, fsdp, tensor, expert; -1: what is left; default: one device)')
  model.add_argument('--kv', default='exact',
                     help=f'how keys and values are kept: {", ".join(kv_format.PRESETS)}, or one of these with fields of '
                          'kv_format.KVFormat behind it, as in turboquant,recent=64 (default: %(default)s)')
  how = parser.add_argument_group('sampling', 'Defaults are those of the checkpoint\'s generation_config.json.')
  for name, (kind, meaning) in _SAMPLING.items():
    how.add_argument(f'--{name}', type=kind, help=meaning)
  how.add_argument('--stop', action='append', default=[], metavar='TEXT', help='end before this text; repeat it for more')
  how.add_argument('--seed', type=int, default=0, help='of the draws (default: %(default)s)')
  how.add_argument('--max_new_tokens', type=int, default=max_new_tokens, help='default: %(default)s')


def load_model(args: argparse.Namespace):
  """The model that the flags name; what is wrong with them is said before it is read."""
  if bool(args.checkpoint) == bool(args.variant):
    raise ValueError('--checkpoint=DIR, or --variant=NAME with --random_weights: give one of them')
  if bool(args.variant) != args.random_weights:
    raise ValueError('--variant and --random_weights: need each other; weights come from a checkpoint otherwise')
  if args.variant and args.tokenizer or args.checkpoint and args.shrink:
    raise ValueError('--tokenizer: is for a checkpoint' if args.tokenizer else '--shrink: is for --random_weights')
  from gemma4_jax import compilation, config, sharding
  from gemma4_jax.model import quantized_cache
  from gemma4_jax.sampling import pieces, text
  from gemma4_jax.sampling.sampler import Sampling
  Sampling(**_given(args)).check()
  if args.max_new_tokens < 1 or not 0 <= args.seed < 2**32:
    raise ValueError(f'--max_new_tokens={args.max_new_tokens}, --seed={args.seed}: at least 1, and from 0 to 2**32 - 1')
  pieces.StopStrings(args.stop)
  quantized_cache.check(kv_format.make(args.kv))
  hardware.take_gpu_memory()
  compilation.keep()
  how = dict(param_dtype=args.dtype, ple_placement=args.ple_placement, ple_table=args.ple_table, weights=args.weights, kv=args.kv,
             mesh=None if args.mesh is None else sharding.parse(args.mesh), progress=True)
  if args.checkpoint:
    model = text.load(args.checkpoint, tokenizer=args.tokenizer, **how)
  else:
    cfg = config.variant(args.variant)
    model = text.random(config.shrink(cfg, vocab_size=1024, context_length=4096) if args.shrink else cfg, **how)
  print(_described(args.checkpoint or args.variant, model), file=sys.stderr)
  print(quantized_cache.describe(model.cfg, model.kv), file=sys.stderr)
  return model


def sampling(args: argparse.Namespace, model):
  return dataclasses.replace(model.sampling, **_given(args))


def _given(args):
  return {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}


def answer(message: dict) -> str:
  """The content, and what tools it calls: there are none here."""
  calls = [json.dumps(call['function'], ensure_ascii=False) for call in message.get('tool_calls', ())]
  return '\n'.join(filter(None, [message['content'], *calls]))


def guard(function: Callable[[], None]) -> None:
  """Runs it; the user's errors end the program with one line. A letter that the terminal has not is written as its code."""
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')
  try:
    function()
  except (ValueError, ImportError, OSError) as error:
    sys.exit(f'error: {config_file.one_line(error)}')
  except KeyboardInterrupt:
    print('\nstopped', file=sys.stderr)
    sys.exit(130)
  except RuntimeError as error:   # XLA's
    if not hardware.is_out_of_memory(error):
      raise
    sys.exit('error: out of memory; --dtype=bfloat16, fewer samples or tokens, weights of cli.convert --quantize take less '
             f'({config_file.one_line(error)[:200]})')


class Thoughts:
  """Dimmed, in lines of their own."""

  def __init__(self, stderr: bool = True):
    from rich.console import Console
    self._console, self._begun = Console(stderr=stderr), False

  def write(self, piece: str) -> None:
    self._console.out(piece, end='', style='dim', highlight=False)
    self._begun = True

  def end(self) -> None:
    if self._begun:
      self._console.out('')
    self._begun = False


def _described(name, model):
  import jax

  from gemma4_jax import sharding
  from gemma4_jax.model import quantized
  mesh = sharding.of(model.params)
  split = '' if mesh is None else f' over {", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)}'
  cfg, nbytes = model.cfg, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
  params = model.params.get('params', model.params)
  host = [part['host'].nbytes for part in params.get('arm', {}).values() if 'host' in part]
  weights = quantized.described(model.params) or cfg.param_dtype
  slow = quantized.slow(cfg, model.params) if jax.default_backend() == 'cpu' else ''
  slower = f' ({slow}: slower than bfloat16 here)' if slow else ''
  ple = f', PLE table {cfg.ple_placement} {cfg.ple_table}' if cfg.has_ple_table else ''
  return (f'{name}: {cfg.num_layers} layers of width {cfg.width}, {cfg.dtype}, {nbytes:,} bytes of {weights} weights '
          f'on the {jax.default_backend()}{split}{slower}{ple}{f", {host[0]:,} bytes in host memory" if host else ""}')


def _told(stats, model) -> str:
  from gemma4_jax.model import flash, quantized
  cfg = model.cfg
  rate = lambda tokens, seconds: f'{tokens / seconds:.1f}/s' if seconds > 0 else '-'
  return (f'{stats.prompt_tokens} prompt tokens at {rate(stats.prompt_tokens, stats.prefill_seconds)}, {stats.new_tokens} new at '
          f'{rate(stats.new_tokens, stats.decode_seconds)} (compiling: {stats.compile_seconds:.1f} s, not counted), peak memory '
          f'{_peak_memory() / 1e9:.2f} GB ({stats.prefill_peak_bytes / 1e9:.2f} after the prompt), cache {stats.cache_bytes:,} bytes, '
          f'kv {stats.kv}, attention of prompts {flash.choose(cfg.attention_implementation)}, '
          f'{quantized.matmul(cfg, model.params)}')


def _peak_memory():
  return hardware.peak_memory_bytes()


if __name__ == '__main__':
  main()
