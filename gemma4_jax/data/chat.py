"""Conversations to token ids, and generated ids back to messages: turns, thinking, tools.

Messages are dicts as in the OpenAI API and `transformers`:

  {'role': 'system' | 'developer' | 'user' | 'assistant' | 'tool', 'content': text or [{'type': 'text', 'text': text}, ..]}
  assistant, too: 'reasoning' (or 'reasoning_content'): text, 'tool_calls': [{'id': .., 'function': {'name', 'arguments'}}]
  tool, too: 'tool_call_id' or 'name'; without either, results answer the calls in order; 'content' may be a mapping

Text never becomes a control token, whatever it spells: while a prompt is put together, every character of the messages that
could begin a control token is replaced by one that is in no message, so what the prompt spells is the template's own.

Two generations of Google's template are in circulation; this is the later one (`<|think|>` ends its line, one model turn
holds calls, results and the answer, reasoning is kept for calls after the last user message). `encode(template=)` renders the
template a checkpoint carries.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import math
import os
import pathlib
import re

import numpy as np

from gemma4_jax.data import tokenizer as tokenizer_lib

STOP_IDS = (1, 106, 50)  # <eos>, <turn|>, <|tool_response>: a call waits for its result
# Whether a prompt with thinking off ends in an empty thought channel. (12B: its template was not seen.)
EMPTY_THOUGHT_CHANNEL = {'e2b': False, 'e4b': False, '26b-a4b': True, '31b': True}

_QUOTE = '<|"|>'
_THOUGHTS = re.compile(r'<\|channel>.*?<channel\|>', re.DOTALL)


def encode(tokenizer: tokenizer_lib.Tokenizer, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *,
           thinking: bool = False, empty_thought_channel: bool = False, add_generation_prompt: bool = True,
           template: str | None = None) -> np.ndarray:
  """Token ids of a conversation: int32 [T], with BOS once, at the start.

  Args:
    messages: see the module; contents are trimmed, thoughts of earlier turns are removed. Results of tools follow the
      message that called; after them generation goes on in the same model turn.
    tools: functions the model may call, as JSON schemas: {'type': 'function', 'function': {'name', 'description', 'parameters'}}
      or the inner mapping alone. Of a parameter the format has room for description, enum (of strings), items, nullable,
      properties, required and type; other keywords are left out.
    thinking: lets the model think before it answers.
    empty_thought_channel: see EMPTY_THOUGHT_CHANNEL; a carried `template` decides for itself.
    add_generation_prompt: whether the model's turn is opened at the end.
    template: source of a chat_template.jinja (see `load_template`), rendered in place of ours, in a sandbox.
  Raises:
    ValueError: a message, tool or template that cannot be written, naming it; a tokenizer without Gemma 4's tokens.
    ImportError: `template` without jinja2.
  """
  known = tokenizer_lib.GEMMA4_TOKENS
  if foreign := [known[i] for i in (2, *STOP_IDS, 105) if tokenizer.special_ids.get(known[i]) != i]:
    raise ValueError(f'the tokenizer has no {", ".join(foreign)} at its id in Gemma 4; released tokenizers can '
                     'write a chat, none that a run has trained')
  ours = {token: i for token, i in tokenizer.special_ids.items() if not token.startswith('<unused')}
  marked, restore = _marked(messages, tools, ours, thinking, empty_thought_channel, add_generation_prompt, template)
  pieces = re.split(f'({"|".join(map(re.escape, sorted(ours, key=len, reverse=True)))})', marked)
  texts = tokenizer.encode_batch([restore(text) for text in pieces[::2]])
  ids = [*texts[0]]
  for token, text in zip(pieces[1::2], texts[1:]):
    ids += [ours[token], *text]
  if ids[:1] != [tokenizer.bos_id]:
    ids.insert(0, tokenizer.bos_id)
  if ids.count(tokenizer.bos_id) > 1:
    raise ValueError('chat_template.jinja writes the beginning-of-text token more than once')
  return np.array(ids, np.int32)


def render(messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *, thinking: bool = False,
           empty_thought_channel: bool = False, add_generation_prompt: bool = True, template: str | None = None) -> str:
  """The prompt as text, to look at: in it, text that spells a control token looks like one. Arguments as in `encode`."""
  controls = tokenizer_lib.GEMMA4_TOKENS.values()
  marked, restore = _marked(messages, tools, controls, thinking, empty_thought_channel, add_generation_prompt, template)
  return restore(marked)


def load_template(directory: str | os.PathLike) -> str | None:
  """Source of the chat template a checkpoint carries; None if it carries none. Raises ValueError: it cannot be read."""
  path = pathlib.Path(directory).expanduser() / 'chat_template.jinja'
  try:
    return path.read_text(encoding='utf-8') if os.path.lexists(path) else None   # a link that leads nowhere is half a download
  except (OSError, ValueError) as error:
    raise ValueError(f'{path}: cannot be read ({error})') from None


def _marked(messages, tools, controls, thinking, empty_thought_channel, add_generation_prompt, template):
  """The prompt with marks in its texts, and the function that takes them out."""
  written = set(template or '')
  try:
    messages, tools = _messages(messages), _tools(tools)
    _map_text([messages, tools], written.update)
  except RecursionError:
    raise ValueError('messages, tools: nested too deeply') from None
  marks = dict(zip(sorted({token[0] for token in controls}), _unwritten(written)))
  mark, restore = str.maketrans(marks), str.maketrans({mark: first for first, mark in marks.items()})
  messages, tools = (_map_text(part, lambda text: text.translate(mark)) for part in (messages, tools))
  if template is None:
    prompt = ''.join(_prompt(messages, tools, thinking, empty_thought_channel, add_generation_prompt))
  else:
    prompt = _render_template(template, messages=messages, tools=tools or None, enable_thinking=thinking,
                              add_generation_prompt=add_generation_prompt, bos_token='<bos>', eos_token='<eos>')
  return prompt, lambda text: text.translate(restore)


def _unwritten(written: set[str]) -> Iterator[str]:
  """Characters of the private use area that are not in `written`."""
  return (chr(c) for c in range(0xF0000, 0xFFFFE) if chr(c) not in written)


def _map_text(value, change):
  """`value` with `change` applied to every string in it, keys included."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {_map_text(k, change): _map_text(v, change) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_map_text(v, change) for v in value]
  return value


# Messages and tools, checked and brought to one form.


def _messages(messages) -> list[dict]:
  """Results of tools go into `tool_responses` of the message that called: both generations of the template read them there."""
  if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
    raise ValueError("messages: give a list of {'role': .., 'content': ..}, at least one")
  out = []
  for n, message in enumerate(messages):
    if not isinstance(message, Mapping) or not isinstance(message.get('role'), str) or not message['role'].strip():
      raise ValueError(f"messages[{n}]: {message!r} is no {{'role': .., 'content': ..}}")
    role = message['role']
    where = f'messages[{n}] ({role})'
    if role == 'tool':
      if not (out and out[-1].get('tool_calls')):
        raise ValueError(f'{where}: a result must follow the assistant message that called the tool')
      _add_result(out[-1], message, where)
      continue
    _check_results(out, f'before {where}')
    own = {'role': role, 'content': _content(message.get('content'), where)}
    results = []
    if role in ('assistant', 'model'):
      own = {'role': 'assistant', 'content': _THOUGHTS.sub('', own['content'] or '').strip()}
      reasoning = message.get('reasoning') or message.get('reasoning_content')
      if reasoning:
        own |= {'reasoning': reasoning, 'reasoning_content': reasoning}
      for field in ('tool_calls', 'tool_responses'):
        if not isinstance(message.get(field) or [], list | tuple):
          raise ValueError(f'{where}: {field} must be a list, not {message[field]!r}')
      if message.get('tool_calls'):
        own |= {'tool_calls': [_call(call, where) for call in message['tool_calls']], 'tool_responses': []}
      results = message.get('tool_responses') or []
      if not own['content'] and message.get('content') is None and not message.get('tool_calls'):
        raise ValueError(f'{where}: neither content nor tool_calls')
    elif own['content'] is None:
      raise ValueError(f'{where}: no content')
    out.append(own)
    if results:  # a message that holds calls, their results and the answer after them
      if not message.get('tool_calls'):
        raise ValueError(f'{where}: tool_responses without tool_calls')
      answer, own['content'] = own['content'], ''
      for result in results:
        if not isinstance(result, Mapping):
          raise ValueError(f"{where}: tool response {result!r} is no {{'name': .., 'response': ..}}")
        _add_result(own, {'name': result.get('name'), 'content': result.get('response')}, where)
      _check_results(out, f'in {where}')
      if answer:
        out.append({'role': 'assistant', 'content': answer})
  if out[-1].get('tool_responses'):
    _check_results(out, 'at the end')
  return out


def _content(content, where: str) -> str | None:
  if content is None or isinstance(content, str):
    return content and content.strip()
  if isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content):
    for part in content:
      if part.get('type') != 'text' or not isinstance(part.get('text'), str):
        raise ValueError(f'{where}: content of type {part.get("type")!r}; only text can be encoded')
    return ''.join(part['text'].strip() for part in content)
  raise ValueError(f'{where}: content is {type(content).__name__}; give text')


def _call(call, where: str) -> dict:
  function = call.get('function', call) if isinstance(call, Mapping) else {}
  function = function if isinstance(function, Mapping) else {}
  name, arguments = function.get('name'), function.get('arguments', {})
  if isinstance(arguments, str):  # as the OpenAI API sends them
    try:
      arguments = json.loads(arguments)
    except json.JSONDecodeError as e:
      raise ValueError(f'{where}: arguments of {name} are no JSON: {e}') from e
  if not isinstance(name, str) or not isinstance(arguments, Mapping):
    raise ValueError(f"{where}: tool call {call!r} is no {{'function': {{'name': .., 'arguments': {{..}}}}}}")
  return {'id': call.get('id'), 'type': 'function', 'function': {'name': name, 'arguments': arguments}}


def _add_result(called: dict, result: Mapping, where: str) -> None:
  """Puts a tool's result into the message that called it, under the name of the call it answers."""
  calls, results = called['tool_calls'], called['tool_responses']
  if len(results) == len(calls):
    raise ValueError(f'{where}: more results than calls')
  name, call_id, content = result.get('name'), result.get('tool_call_id'), result.get('content')
  if call_id is not None and any(call['id'] is not None for call in calls):
    names = [call['function']['name'] for call in calls if call['id'] == call_id]
    if not names:
      raise ValueError(f'{where}: no call has the id {call_id!r}')
    name = names[0]
  if name is None:
    name = calls[len(results)]['function']['name']
  if isinstance(content, list | tuple) and content and all(isinstance(p, Mapping) and 'type' in p for p in content):
    content = _content(content, where)
  results.append({'name': name, 'response': content})


def _check_results(messages: list[dict], where: str) -> None:
  if messages and 'tool_calls' in messages[-1]:
    calls, results = len(messages[-1]['tool_calls']), len(messages[-1]['tool_responses'])
    if calls != results:
      raise ValueError(f'messages: {calls} tool calls, but {results} results {where}')


def _tools(tools) -> list[dict]:
  out = []
  if not isinstance(tools or [], list | tuple):
    raise ValueError(f'tools: must be a list, not {tools!r}')
  for n, tool in enumerate(tools or ()):
    function = tool.get('function', tool) if isinstance(tool, Mapping) else {}
    if not isinstance(function, Mapping) or not isinstance(function.get('name'), str):
      raise ValueError(f"tools[{n}]: {tool!r} is no {{'name': .., 'description': .., 'parameters': ..}}")
    parameters = function.get('parameters') or {}
    if not isinstance(parameters, Mapping):
      raise ValueError(f'tools[{n}] ({function["name"]}): parameters must be a mapping, not {parameters!r}')
    if parameters:
      parameters = {'type': 'object', **parameters}
      _check_schema(parameters, f'tools[{n}] ({function["name"]})')
    out.append({'type': 'function', 'function': {
        **function, 'description': function.get('description') or '', 'parameters': parameters}})
  return out


def _check_schema(schema, where: str) -> None:
  if not isinstance(schema, Mapping) or not isinstance(schema.get('type'), str):
    raise ValueError(f"{where}: needs one 'type' by name, as 'string' (and 'nullable': True where it may be null)")
  for field in ('required', 'enum'):
    if not isinstance(schema.get(field) or [], list | tuple):
      raise ValueError(f'{where}: {field} must be a list, not {schema[field]!r}')
  if not isinstance(schema.get('properties', {}), Mapping | None):
    raise ValueError(f'{where}: properties must be a mapping, not {schema["properties"]!r}')
  for name, inner in (schema.get('properties') or {}).items():
    _check_schema(inner, f'{where}.{name}')
  if schema.get('items'):
    _check_schema(schema['items'], f'{where}[]')


# The prompt.


def _prompt(messages, tools, thinking, empty_thought_channel, add_generation_prompt):
  """Yields the pieces of our prompt. Source: Google's chat template for Gemma 4, later generation."""
  yield '<bos>'
  has_system = messages[0]['role'] in ('system', 'developer')
  if has_system or tools or thinking:
    yield '<|turn>system\n' + ('<|think|>\n' if thinking else '')
    yield messages[0]['content'] if has_system else ''
    for tool in tools:
      yield f'<|tool>{_declaration(tool["function"])}<tool|>'
    yield '<turn|>\n'
  messages = messages[1:] if has_system else messages

  last_user = max((n for n, message in enumerate(messages) if message['role'] == 'user'), default=-1)
  in_model_turn = False  # one turn holds calls, results and the answer
  for n, message in enumerate(messages):
    model = message['role'] == 'assistant'
    if not in_model_turn:
      yield f'<|turn>{"model" if model else message["role"]}\n'
    calls, results = message.get('tool_calls', ()), message.get('tool_responses', ())
    if calls and message.get('reasoning') and n > last_user:
      yield f'<|channel>thought\n{message["reasoning"]}\n<channel|>'
    yield message['content']
    for call in calls:
      yield f'<|tool_call>call:{call["function"]["name"]}{_value(call["function"]["arguments"])}<tool_call|>'
    for result in results:
      response = result['response']
      response = response if isinstance(response, Mapping) else {'value': response}
      yield f'<|tool_response>response:{result["name"]}{_value(response)}<tool_response|>'
    following = messages[n + 1]['role'] if n + 1 < len(messages) else None
    in_model_turn = model and (following == 'assistant' or (following is None and bool(calls)))
    if in_model_turn and calls and not results:
      yield '<|tool_response>'  # where the model stopped
    if not in_model_turn:
      yield '<turn|>\n'
  if add_generation_prompt and not in_model_turn:
    yield '<|turn>model\n'
    if empty_thought_channel and not thinking:
      yield '<|channel>thought\n<channel|>'


def _sorted(mapping: Mapping) -> list[tuple]:
  return sorted(mapping.items(), key=lambda item: str(item[0]).lower())  # as jinja2's dictsort


def _value(value, quote_keys: bool = False) -> str:
  """A Python value in the tools' syntax."""
  if isinstance(value, str):
    return _QUOTE + value + _QUOTE
  if isinstance(value, bool):
    return 'true' if value else 'false'
  if isinstance(value, Mapping):
    keys = _QUOTE if quote_keys else ''
    return '{' + ','.join(f'{keys}{k}{keys}:{_value(v, quote_keys)}' for k, v in _sorted(value)) + '}'
  if isinstance(value, list | tuple):
    return '[' + ','.join(_value(v, quote_keys) for v in value) + ']'
  if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
    return str(value)
  raise ValueError(f'tools: {value!r} ({type(value).__name__}) has no form in the tool syntax')


def _declaration(function: Mapping) -> str:
  parts = [f'description:{_value(function["description"])}']
  if schema := function['parameters']:
    inner = [f'properties:{{{_properties(schema["properties"])}}}'] if schema.get('properties') else []
    inner += [f'required:{_value(schema["required"])}'] if schema.get('required') else []
    parts.append(f'parameters:{{{",".join([*inner, _type(schema)])}}}')
  return f'declaration:{function["name"]}{{{",".join(parts)}}}'


def _properties(properties: Mapping) -> str:
  return ','.join(f'{name}:{{{_property(schema)}}}' for name, schema in _sorted(properties))


def _property(schema: Mapping) -> str:
  kind = schema['type'].upper()
  parts = [f'description:{_value(schema["description"])}'] if schema.get('description') else []
  if kind == 'STRING' and schema.get('enum'):
    parts.append(f'enum:{_value(schema["enum"])}')
  if kind == 'ARRAY' and schema.get('items'):
    parts.append(f'items:{{{_items(schema["items"])}}}')
  if schema.get('nullable'):
    parts.append('nullable:true')
  if kind == 'OBJECT':
    parts.append(f'properties:{{{_properties(schema.get("properties") or {})}}}')
    parts += [f'required:{_value(schema["required"])}'] if schema.get('required') else []
  return ','.join([*parts, _type(schema)])


def _items(schema: Mapping) -> str:
  """The template writes a list's items in the order of their names and quotes the keys of what is nested deeper."""
  parts = []
  for key, value in _sorted(schema):
    if key == 'properties' and value is not None:
      parts.append(f'properties:{{{_properties(value)}}}')
    elif key == 'type':
      parts.append(_type(schema))
    elif value is not None:
      parts.append(f'{key}:{_value(value, quote_keys=True)}')
  return ','.join(parts)


def _type(schema: Mapping) -> str:
  return f'type:{_value(schema["type"].upper())}'


def _render_template(source: str, **variables) -> str:
  """Renders untrusted jinja as `transformers` does: sandboxed, with its two block options, filter and function."""
  try:
    import jinja2
    from jinja2 import sandbox
  except ImportError as e:
    raise ImportError("chat_template.jinja needs jinja2: pip install 'gemma4_jax[chat]'") from e

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
  environment.filters['tojson'] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
  environment.globals['raise_exception'] = raise_exception
  try:
    return environment.from_string(source).render(**variables)
  except Exception as e:  # a template may fail in any way Python can
    raise ValueError(f'chat_template.jinja cannot be rendered: {type(e).__name__}: {" ".join(str(e).split())}') from e


# Generated tokens back to a message.

_MARKS = ('<|channel>', '<channel|>', '<|tool_call>', '<tool_call|>', '<|tool_response>', _QUOTE, '<turn|>', '<eos>')
_NUMBER = re.compile(r'-?\d+(\.\d+)?([eE][+-]?\d+)?')
_WORDS = {'true': True, 'false': False, 'null': None, 'None': None}


def parse(generated: str | Sequence[int], tokenizer: tokenizer_lib.Tokenizer | None = None) -> dict:
  """The assistant's message in what a model generated after the prompt, up to the first stop token.

  Args:
    generated: ids (then `tokenizer` is needed, and text that spells a control token stays text), or text in which control
      tokens are spelled.
  Returns:
    {'role': 'assistant', 'content': text}, with 'reasoning' if there were thoughts (also unfinished ones) and 'tool_calls' if
    there were calls, arguments as Python values; what is no well-formed call stays in the content.
  Raises:
    ValueError: ids without a tokenizer.
  """
  if isinstance(generated, str):
    pieces = re.split(f'({"|".join(map(re.escape, _MARKS))})', generated)
    pieces = [(piece, n % 2 == 1) for n, piece in enumerate(pieces)]
  else:
    if tokenizer is None:
      raise ValueError('chat.parse: ids need their tokenizer')
    pieces = _pieces(generated, tokenizer)
  written = {character for piece, control in pieces if not control for character in piece}
  marks = dict(zip(_MARKS, _unwritten(written)))  # each control token one character that no text holds
  restore = str.maketrans({mark: token for token, mark in marks.items()})
  text = ''.join(marks.get(piece, piece) if control else piece for piece, control in pieces)
  thought, end_thought, call, end_call, result, quote, *stops = marks.values()
  text = re.split('|'.join([*stops, result]), text, maxsplit=1)[0]

  reasoning, calls = [], []

  def take_thought(match):
    reasoning.append(match[1].strip())
    return ''

  def take_call(match):
    try:
      name, arguments = _parse_call(match[1], quote)
    except (ValueError, RecursionError):
      return match[0]
    calls.append({'type': 'function', 'function': {'name': name, 'arguments': arguments}})
    return ''

  text = re.sub(rf'{thought}thought\n?(.*?)(?:{end_thought}|\Z)', take_thought, text, flags=re.DOTALL)
  text = re.sub(f'{call}(.*?){end_call}', take_call, text, flags=re.DOTALL)
  message = {'role': 'assistant', 'content': text.translate(restore).strip()}
  if thoughts := '\n'.join(filter(None, reasoning)).translate(restore):
    message['reasoning'] = thoughts
  if calls:
    message['tool_calls'] = _map_text(calls, lambda text: text.translate(restore))
  return message


def _pieces(ids, tokenizer) -> list[tuple[str, bool]]:
  names = {i: token for token, i in tokenizer.special_ids.items()}
  pieces, run = [], []
  for i in map(int, ids):
    if i in names:
      pieces += [(tokenizer.decode(run), False), (names[i], True)]
      run = []
    else:
      run.append(i)
  return [*pieces, (tokenizer.decode(run), False)]


def _parse_call(text: str, quote: str) -> tuple[str, dict]:
  match = re.match(r'call:([^{]+)(?={)', text)
  if match is None:
    raise ValueError('no call:NAME{')
  value, end = _parse_value(text, match.end(), quote)
  if text[end:].strip():
    raise ValueError('text after the arguments')
  return match[1].strip(), value


def _parse_value(text: str, at: int, quote: str):
  """Reads the value that starts at `at`: (value, where it ends). Raises ValueError."""
  if text[at:at + 1] == quote:
    end = text.index(quote, at + 1)
    return text[at + 1:end], end + 1
  if text[at:at + 1] in ('{', '['):
    mapping = text[at] == '{'
    close, items = ('}', {}) if mapping else (']', [])
    at += 1
    while text[at:at + 1] != close:
      if items:
        if text[at:at + 1] != ',':
          raise ValueError(f'no comma at {at}')
        at += 1
      if mapping:
        key = re.compile(f'{quote}([^{quote}]*){quote}:|([^:{quote}]*):').match(text, at)
        if key is None or key.end() == at + 1:
          raise ValueError(f'no key at {at}')
        name = key[2] if key[1] is None else key[1]
        items[name], at = _parse_value(text, key.end(), quote)
      else:
        value, at = _parse_value(text, at, quote)
        items.append(value)
    return items, at + 1
  word = re.compile(r'[^,\]}]*').match(text, at)
  if word[0] in _WORDS:
    return _WORDS[word[0]], word.end()
  if not (number := _NUMBER.fullmatch(word[0])):
    raise ValueError(f'no value at {at}')
  return (float if number[1] or number[2] else int)(word[0]), word.end()
