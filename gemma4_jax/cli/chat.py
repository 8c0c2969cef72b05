"""A conversation in the terminal.

  python -m gemma4_jax.cli.chat --checkpoint=DIR [--thinking] [--system='Answer in French.']

Ctrl-C stops the answer, and what was said of it stays in the conversation. Ctrl-D or /quit ends. /reset forgets the conversation;
/system TEXT sets the system message (without TEXT: none), /thinking on|off whether the model thinks first.
"""

import contextlib
import sys

from gemma4_jax.cli import sample

_COMMANDS = '/reset, /system TEXT, /thinking on|off, /quit'


def main(argv: list[str] | None = None) -> None:
  parser = sample.make_parser('chat', __doc__)
  parser.add_argument('--system', default='', help='the system message')
  parser.add_argument('--thinking', action='store_true', help='let the model think first')
  parser.add_argument('--context', type=int, help='tokens that the conversation can come to hold (default: 8192, or the model\'s if fewer)')
  sample.add_model_arguments(parser, max_new_tokens=1024)
  args = parser.parse_args(argv)
  sample.guard(lambda: _chat(args))


def _chat(args):
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() then edits lines and remembers them)
  if sys.stdin is None:
    raise ValueError('standard input is closed: there is nobody to talk to')
  model = sample.load_model(args)   # JAX loads with it: it need not for --help
  from gemma4_jax.sampling import text
  context = min(8192, model.cfg.context_length) if args.context is None else args.context
  shortest = len(model.encode_chat([{'role': 'user', 'content': 'a'}]))   # a tokenizer or template that writes no chats is told here
  if context <= shortest:
    raise ValueError(f'--context={context}: a short message takes {shortest} tokens, and an answer needs room, too')
  chat = Chat(text.Conversation(model, context), args.system, args.thinking, max_new_tokens=args.max_new_tokens,
              sampling=sample.sampling(args, model), seed=args.seed, stop_strings=args.stop)
  _say(f'{_COMMANDS}; Ctrl-C stops an answer')
  while True:
    try:
      line = input('> ' if sys.stdin.isatty() else '')
    except EOFError:
      return
    except KeyboardInterrupt:
      _say('\nCtrl-D or /quit ends')
      continue
    except UnicodeDecodeError:
      _say('that was no UTF-8')
      continue
    if line.strip() == '/quit':
      return
    if line.strip():
      chat.take(line.strip(), command=line.startswith('/'))


class Chat:
  """What was said, and how the next answer is made.

  Attributes:
    messages: of user and assistant, in turn.
  """

  def __init__(self, conversation, system: str = '', thinking: bool = False, *, seed: int = 0, **settings):
    self.messages = []
    self._conversation, self._system, self._thinking, self._seed, self._settings = conversation, system, thinking, seed, settings

  def take(self, line: str, command: bool = False) -> None:
    """A message to answer, or a command."""
    if not command:
      self._answer(line)
      return
    name, _, argument = line.partition(' ')
    argument = argument.strip()
    if name == '/reset' and not argument:
      self.messages = []
      _say('the conversation begins anew')
    elif name == '/system':
      self._system = argument
      _say('system message set' if argument else 'no system message')
    elif name == '/thinking' and argument in ('on', 'off'):
      self._thinking = argument == 'on'
      _say(f'thinking {argument}')
    else:
      _say(f'{line}: no such command; there are {_COMMANDS}. A message that begins with / is sent with a space before it')

  def _answer(self, question):
    asked = [*self.messages, {'role': 'user', 'content': question}]
    system = [{'role': 'system', 'content': self._system}] if self._system else []
    thoughts, reply, interrupted = sample.Thoughts(stderr=False), None, False
    try:
      reply = self._conversation.reply(system + asked, thinking=self._thinking, seed=(self._seed + len(self.messages)) % 2**32,
                                       **self._settings)
      for kind, piece in reply:
        if kind == 'reasoning':
          thoughts.write(piece)
        else:
          thoughts.end()
          print(piece, end='', flush=True)
    except KeyboardInterrupt:
      interrupted = True
    except ValueError as error:
      _say(f'error: {error}; your message was not sent. Shorten it, /reset, or give more --context')
      return
    thoughts.end()
    print()
    message = reply.message if reply else {'content': ''}
    said = sample.answer(message)
    if said != message['content']:
      _say(f'the model calls a tool, and there is none: {said}')
    if interrupted and not said and 'reasoning' not in message:
      _say('stopped before anything was said: your message was taken back')
      return
    kept = {'role': 'assistant', 'content': said, **({'reasoning': message['reasoning']} if 'reasoning' in message else {})}
    self.messages = [*asked, kept]
    row = reply.run.rows[0]
    if interrupted:
      _say('stopped; what was said stays in the conversation')
    elif not row.stopped:
      full = len(row.tokens) < self._settings['max_new_tokens']
      _say(f'the context of {self._conversation.context} tokens is full' if full else f'max_new_tokens = {len(row.tokens)} reached')


def _say(line: str) -> None:
  """Of the program, not the model."""
  from rich.console import Console
  Console(stderr=True).out(line, style='dim', highlight=False)


if __name__ == '__main__':
  main()
