"""The conversation in the terminal: history, commands, Ctrl-C, and a context that is full."""

import json
import os
import signal
import subprocess
import sys

import jax
import pytest

from gemma4_jax.cli import chat
from gemma4_jax.data.tokenizer import Tokenizer
from gemma4_jax.sampling import text
from gemma4_jax.sampling.sampler import GREEDY
from tests import tiny

ANSWER = [('content', 'Ho '), ('content', 'ho')]


class Scripted:
  """In place of a text.Conversation: gives pieces, an exception among them is raised."""
  context = 99

  def __init__(self, *answers):
    self.answers, self.asked = list(answers), []

  def reply(self, messages, **settings):
    self.asked.append((messages, settings))
    return ScriptedReply(self.answers.pop(0))


class ScriptedReply:
  def __init__(self, pieces):
    self._pieces, self.message = pieces, {'role': 'assistant', 'content': ''}
    row = type('Row', (), {'tokens': [1], 'stopped': True})
    self.run = type('Run', (), {'rows': [row]})

  def __iter__(self):
    for piece in self._pieces:
      if isinstance(piece, type):
        raise piece
      kind, said = piece
      self.message[kind] = self.message.get(kind, '') + said
      yield piece


def say(talk, *lines, **how):
  told = chat.Chat(talk, max_new_tokens=5, **how)
  for line in lines:
    told.take(line, command=line.startswith('/'))
  return told


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content, **more):
  return {'role': 'assistant', 'content': content, **more}


def test_every_message_is_asked_with_all_that_was_said(capsys):
  talk = Scripted(ANSWER, [('content', 'So.')])
  told = say(talk, 'Hi', 'So?', system='S')
  assert [messages for messages, _ in talk.asked] == [
      [{'role': 'system', 'content': 'S'}, user('Hi')],
      [{'role': 'system', 'content': 'S'}, user('Hi'), assistant('Ho ho'), user('So?')]]
  assert told.messages[-1] == assistant('So.') and capsys.readouterr().out == 'Ho ho\nSo.\n'


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(capsys):
  told = say(Scripted([*ANSWER, KeyboardInterrupt, ('content', 'never')], ANSWER), 'Hi', 'More')
  assert told.messages == [user('Hi'), assistant('Ho ho'), user('More'), assistant('Ho ho')]
  assert 'stopped; what was said stays' in capsys.readouterr().err


def test_ctrl_c_before_anything_was_said_takes_the_message_back_and_says_so(capsys):
  assert say(Scripted([KeyboardInterrupt]), 'Hi').messages == []
  assert 'your message was taken back' in capsys.readouterr().err


def test_thoughts_are_shown_apart_and_kept_as_thoughts(capsys):
  told = say(Scripted([('reasoning', 'Hm.'), ('content', 'Ho')]), 'Hi', thinking=True)
  assert told.messages[-1] == assistant('Ho', reasoning='Hm.') and capsys.readouterr().out == 'Hm.\nHo\n'


def test_commands_change_what_is_asked(capsys):
  talk = Scripted(*[ANSWER] * 4)
  say(talk, 'a', '/system S', '/thinking on', 'b', '/reset', '/thinking off', '/system', 'c')
  (_, first), (second, thinking), (third, last) = talk.asked
  assert [how['thinking'] for how in (first, thinking, last)] == [False, True, False]
  assert second == [{'role': 'system', 'content': 'S'}, user('a'), assistant('Ho ho'), user('b')] and third == [user('c')]


@pytest.mark.parametrize('line', ['/thinking', '/thinking maybe', '/rest', '/reset all', '/'])
def test_a_mistyped_command_is_answered_and_nothing_is_asked(line, capsys):
  told = say(Scripted(), line)
  assert told.messages == [] and f'{line}: no such command' in capsys.readouterr().err


def test_a_call_of_a_tool_stays_in_the_conversation_as_text(capsys):
  call = {'function': {'name': 'f', 'arguments': {'a': 1}}}
  talk = Scripted([('content', 'Ho')])
  talk.reply = lambda messages, run=talk.reply, **how: (reply := run(messages, **how)).message.update(tool_calls=[call]) or reply
  assert say(talk, 'Hi').messages[-1] == assistant('Ho\n' + json.dumps(call['function']))


def test_a_message_over_the_context_is_refused_in_a_line_and_the_conversation_stays(capsys):
  told = say(text.Conversation(tiny.model(), 32), 'Hi', sampling=GREEDY)
  before = list(told.messages)
  told.take('very long ' * 20)
  assert told.messages == before and len(before) == 2
  line, = [line for line in capsys.readouterr().err.splitlines() if 'error' in line]
  assert 'leave no room for an answer in a context of 32; your message was not sent' in line


def test_an_answer_that_was_cut_says_by_what(capsys):
  talk = text.Conversation(tiny.model(), 32)
  ids = tiny.model().encode_chat([user('Hi')])
  say(talk, 'Hi', sampling=GREEDY)
  assert 'max_new_tokens = 5 reached' in capsys.readouterr().err
  chat.Chat(talk, max_new_tokens=500, sampling=GREEDY).take('Hi')
  assert 32 - len(ids) > 5 and 'the context of 32 tokens is full' in capsys.readouterr().err


@pytest.mark.parametrize('lines, told', [
    ([KeyboardInterrupt, '/quit'], 'Ctrl-D or /quit ends'),
    (['', EOFError], 'Ctrl-C stops an answer'),
    (['/nothing', EOFError], 'no such command'),
])
def test_the_program_ends_with_ctrl_d_or_quit_alone(lines, told, monkeypatch, capsys):
  def answer(prompt):
    line = lines.pop(0)
    if isinstance(line, type):
      raise line
    return line
  monkeypatch.setattr('builtins.input', answer)
  monkeypatch.setattr(chat.sample, 'load_model', lambda args: tiny.model())
  chat.main(['--checkpoint=x', '--context=32'])
  assert not lines and told in capsys.readouterr().err


def test_flags_reach_the_model_and_every_answer(tmp_path, monkeypatch, capsys):
  asked, lines = [], ['Hi', '/quit']
  monkeypatch.setattr('builtins.input', lambda prompt: lines.pop(0))
  monkeypatch.setattr(text, 'Conversation', lambda model, context, **how: asked.append((model, how)) or Recorded(asked))
  class Recorded(Scripted):
    def __init__(self, asked):
      super().__init__(ANSWER)
      self.asked = asked
  chat.main([f'--checkpoint={tiny.write(tmp_path / "a")}', '--stop=x', '--stop=y', '--suppress_tokens=5', '--kv=separate',
             '--ple_placement=folded', '--ple_table=int8'])
  (model, how), (_, settings) = asked
  assert (model.cfg.ple_placement, model.cfg.ple_table) == ('folded', 'int8') and str(model.kv) == 'separate' and how == {}
  assert settings['stop_strings'] == ['x', 'y'] and settings['sampling'].suppress_tokens == (5,)
  assert 'PLE table folded int8' in capsys.readouterr().err


@pytest.mark.parametrize('flags, message', [
    ([], '--checkpoint=DIR, or --variant=NAME'),
    (['--checkpoint=/nowhere'], '/nowhere: no such directory'),
    (['--checkpoint=/nowhere', '--max_new_tokens=0'], '--max_new_tokens=0'),
    (['--checkpoint=/nowhere', '--prompt=x'], 'unrecognized argument'),
    (['--checkpoint=HERE', '--context=999'], 'context_length = 256'),
    (['--checkpoint=HERE', '--context=-1'], '--context=-1'),
    (['--checkpoint=HERE', '--tokenizer=HERE/short.json'], 'the tokenizer has no <turn|>'),
    (['--checkpoint=/nowhere', '--kv=turbo'], "kv: 'turbo' is none of exact, separate"),
    (['--checkpoint=/nowhere', '--ple_placement=disk'], "invalid choice: 'disk' (choose from"),
])
def test_what_is_wrong_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('builtins.input', lambda prompt: pytest.fail('it began'))
  if 'HERE' in ''.join(flags):
    toys = Tokenizer.train(['to be or not to be, that is the question'], 280)   # of a model that learnt no chats
    tiny.write(tmp_path / 'a', **{'short.json': toys.serialized})
  with pytest.raises(SystemExit) as stop:
    chat.main([flag.replace('HERE', str(tmp_path / 'a')) for flag in flags])
  assert message in stop.value.code and '\n' not in stop.value.code and stop.value.code.startswith('error: ')


def test_as_a_command_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
  folder = tiny.write(tmp_path / 'a', **{'generation_config.json': '{"eos_token_id": [0]}'})
  config = json.loads((folder / 'config.json').read_text())
  (config.get('text_config') or config)['max_position_embeddings'] = 8192   # an answer of seconds
  (folder / 'config.json').write_text(json.dumps(config))
  # Python takes no interrupts where they were ignored when it started, as in a shell's background jobs
  run = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from gemma4_jax.cli import chat; chat.main()'
  program = subprocess.Popen(
      [sys.executable, '-c', run, f'--checkpoint={folder}', '--max_new_tokens=8000', '--context=8192', '--seed=1'],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir})
  program.stdin.write('Hi\n')
  program.stdin.flush()
  program.stdout.read(1)   # the answer has begun
  program.send_signal(signal.SIGINT)
  out, err = program.communicate('/thinking on\n/quit\n')
  assert program.returncode == 0, err
  assert 'stopped; what was said stays in the conversation' in err and 'thinking on' in err
