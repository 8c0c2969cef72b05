"""Measures a checkpoint on text, and says how.

  python -m gemma4_jax.cli.evaluate --checkpoint=DIR --task=perplexity --data='books/*.txt'
  python -m gemma4_jax.cli.evaluate --checkpoint=runs/one --task=perplexity --data=validation     (of the run's own corpus)
  python -m gemma4_jax.cli.evaluate --checkpoint=DIR --task=perplexity --data=chats.jsonl --reply_only
  python -m gemma4_jax.cli.evaluate --checkpoint=DIR --task=perplexity --data=stdlib --reference=OTHER
  python -m gemma4_jax.cli.evaluate --checkpoint=DIR --task=lm_eval:arc_easy,wikitext      (--num_fewshot, --chat_template, --tasks_path)
  python -m gemma4_jax.cli.evaluate --checkpoint=DIR --task=needle --data='books/*.txt'    (or --task=associative; --lengths, --trials)

A checkpoint that was taught to chat is not scored on raw text without --raw_text_anyway: its perplexity there says how far it went
from raw text, not how good it is. Its replies in the chat frame (--reply_only) and its divergence from another checkpoint, such as
its bfloat16 original (--reference), mean something. The table goes to standard output, all numbers with --out to a file.
"""

import argparse
from pathlib import Path
import sys

from gemma4_jax.cli.sample import guard, make_parser

TASKS = ('perplexity', 'associative', 'needle')   # and lm_eval:NAME,..
_OF = {   # flags that only some tasks have -> these
    'data': ('perplexity', 'needle'), 'text_field': ('perplexity', 'needle'), 'max_documents': ('perplexity', 'lm_eval'),
    **dict.fromkeys(('window', 'stride', 'reply_only', 'raw_text_anyway', 'reference'), ('perplexity',)),
    **dict.fromkeys(('tasks_path', 'num_fewshot', 'chat_template'), ('lm_eval',)),
    'lengths': ('associative', 'needle', 'lm_eval'), 'trials': ('associative', 'needle')}


def main(argv: list[str] | None = None) -> None:
  parser = make_parser('evaluate', __doc__)
  parser.add_argument('--checkpoint', required=True, help="a directory: Hugging Face's, Google's Orbax tree, our export or a run's folder")
  parser.add_argument('--task', required=True, help=f'{", ".join(TASKS)}, or lm_eval:NAME,.. of lm-evaluation-harness')
  parser.add_argument('--data', help="a glob of text, .jsonl or .parquet files; 'stdlib': Python's modules; 'validation': what a run kept "
                      "back; 'validation:RUN': of another run's folder")
  parser.add_argument('--text_field', default='text', help='of .jsonl and .parquet rows (default: %(default)s)')
  parser.add_argument('--max_documents', type=int, default=0,
                      help='the first so many (validation: of each kind of text; conversations: lines; lm_eval: of each task); 0 for all')
  parser.add_argument('--window', type=int, default=0, help='tokens that run at once, BOS included; 0 for 1024, or the context if shorter')
  parser.add_argument('--stride', type=int, default=0, help='tokens that a window after the first predicts; 0 for half a window')
  parser.add_argument('--batch_tokens', type=int, default=8192, help='about so many tokens run as a batch (default: %(default)s)')
  parser.add_argument('--reply_only', action='store_true', help="--data is .jsonl of conversations, {'messages': [{'role': .., 'content': "
                      "..}, ..]} a line; score replies in the chat frame")
  parser.add_argument('--raw_text_anyway', action='store_true', help='score raw text under a checkpoint that was taught to chat')
  parser.add_argument('--reference', help='another checkpoint, with the same tokens: how far this one is from it')
  parser.add_argument('--tasks_path', type=Path, help="a folder of lm_eval's task files, in the place of its own")
  parser.add_argument('--num_fewshot', type=int, help='examples before each question of lm_eval (default: as the task says)')
  parser.add_argument('--chat_template', action='store_true', help="questions of lm_eval as a user's messages")
  parser.add_argument('--lengths', type=_numbers, default=(), help='numbers of pairs (associative), or of tokens (needle, RULER)')
  parser.add_argument('--trials', type=int, default=32, help='of each length and depth (default: %(default)s)')
  parser.add_argument('--tokenizer', help="a tokenizer.json (default: the checkpoint's)")
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of weights and activations (default: as stored)')
  parser.add_argument('--out', type=Path, help='a JSON file that gets protocol, metrics and every document')
  args = parser.parse_args(argv)
  guard(lambda: _evaluate(args, [name for name in _OF if getattr(args, name) != parser.get_default(name)]))


def _numbers(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(n) for n in text.split(','))
  except ValueError:
    raise argparse.ArgumentTypeError(f'{text!r} is no list of whole numbers with commas between') from None


def _evaluate(args: argparse.Namespace, given: list[str]) -> None:
  task, _, names = args.task.partition(':')
  if task == 'lm_eval' and not names or task not in ('lm_eval', *TASKS) or names and task != 'lm_eval':
    raise ValueError(f'--task={args.task}: give one of {", ".join(TASKS)}, or lm_eval:NAME,..')
  if foreign := [name for name in given if task not in _OF[name]]:
    raise ValueError(f'--{foreign[0]}: is not of --task={task}; it is of {", ".join(_OF[foreign[0]])}')
  if task == 'perplexity' and not args.data:
    raise ValueError('--data: --task=perplexity needs text; name files, stdlib, or validation')
  if args.max_documents < 0:
    raise ValueError(f'--max_documents={args.max_documents} is negative')
  if args.batch_tokens < 1:
    raise ValueError(f'--batch_tokens={args.batch_tokens} is not positive')
  if args.out and not args.out.absolute().parent.is_dir():
    raise ValueError(f'--out={args.out}: no such directory')
  if args.out and args.out.exists() and not args.out.is_file():
    raise ValueError(f'--out={args.out}: is a directory or a device; name a file')
  from gemma4_jax import compilation, hardware, metrics  # JAX loads with them: it need not for --help
  hardware.take_gpu_memory()
  compilation.keep()
  how = dict(batch_tokens=args.batch_tokens, param_dtype=args.dtype, tokenizer=args.tokenizer, progress=sys.stderr.isatty())
  if task == 'lm_eval':
    from gemma4_jax.evaluation import harness
    result = harness.run(args.checkpoint, names.split(','), tasks_path=args.tasks_path, num_fewshot=args.num_fewshot,
                         limit=args.max_documents, chat_template=args.chat_template, lengths=args.lengths, **how)
  elif task == 'perplexity':
    from gemma4_jax.evaluation import perplexity_task
    result = perplexity_task.run(
        args.checkpoint, args.data, reply_only=args.reply_only, raw_text_anyway=args.raw_text_anyway, reference=args.reference,
        text_field=args.text_field, max_documents=args.max_documents, window=args.window, stride=args.stride, **how)
  else:
    from gemma4_jax.evaluation import recall
    result = recall.run(args.checkpoint, task, data=args.data, text_field=args.text_field, lengths=args.lengths, trials=args.trials, **how)
  _show(result)   # first: a file that cannot be written loses nothing
  if args.out:
    metrics.write_json(args.out.resolve(), result)


def _show(result: dict) -> None:
  import rich.box
  from rich.console import Console
  from rich.table import Table
  console = Console(width=None if sys.stdout.isatty() else 200)   # a file has no edge at which numbers would break
  names = list(dict.fromkeys(name for row in result['metrics'].values() for name in row))
  table = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
  for i, name in enumerate(['', *names]):
    table.add_column(name.replace('_', ' '), justify='right' if i else 'left', overflow='fold')
  for what, row in result['metrics'].items():
    table.add_row(what, *(_number(row.get(name)) for name in names))
  console.print(table)
  for name, value in result['protocol'].items():
    console.print(f'{name}: {value}', markup=False, highlight=False, style='dim', soft_wrap=True)


def _number(value) -> str:
  return '' if value is None else f'{value:,}' if isinstance(value, int) else f'{value:.4g}' if abs(value) >= 1000 else f'{value:.4f}'


if __name__ == '__main__':
  main()
