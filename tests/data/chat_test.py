"""Conversations become the prompts the model was trained on, text never becomes a control token, and answers are read back."""

import builtins
import importlib.util
import math

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
import tokenizers

from gemma4_jax.data import chat
from gemma4_jax.data.tokenizer import GEMMA4_TOKENS, Tokenizer

TOKENIZER = Tokenizer.stand_in()
STOCK = tokenizers.Tokenizer.from_str(TOKENIZER.serialized)
USER = {'role': 'user', 'content': 'Hi'}
JINJA2 = importlib.util.find_spec('jinja2') is not None
needs_jinja2 = pytest.mark.skipif(not JINJA2, reason='jinja2 is not installed')

# The later generation, written from its description.
TEMPLATE = r'''
{%- macro pairs(mapping, quote='') -%}
{%- for key, item in mapping | dictsort %}{{ quote }}{{ key }}{{ quote }}:{{ value(item, quote) }}{{ ',' if not loop.last }}{% endfor -%}
{%- endmacro -%}
{%- macro value(it, quote='') -%}
{%- if it is string -%}<|"|>{{ it }}<|"|>
{%- elif it is boolean -%}{{ 'true' if it else 'false' }}
{%- elif it is mapping -%}{{ '{' }}{{ pairs(it, quote) }}{{ '}' }}
{%- elif it is sequence -%}[{% for item in it %}{{ value(item, quote) }}{{ ',' if not loop.last }}{% endfor %}]
{%- else -%}{{ it }}{%- endif -%}
{%- endmacro -%}
{%- macro schema(of) -%}
{%- set kind = of.type | upper -%}
{%- if of.description %}description:{{ value(of.description) }},{% endif -%}
{%- if of.enum and kind == 'STRING' %}enum:{{ value(of.enum) }},{% endif -%}
{%- if kind == 'ARRAY' and of['items'] %}items:{{ '{' }}
{%- for key, item in of['items'] | dictsort -%}
{%- if key == 'type' %}type:{{ value(item | upper) }}
{%- elif key == 'properties' %}properties:{{ properties(item) }}
{%- else %}{{ key }}:{{ value(item, '<|"|>') }}{% endif -%}
{{ ',' if not loop.last }}
{%- endfor -%}
{{ '},' }}{% endif -%}
{%- if of.nullable %}nullable:true,{% endif -%}
{%- if kind == 'OBJECT' %}properties:{{ properties(of.properties or {}) }},{% endif -%}
{%- if kind == 'OBJECT' and of.required %}required:{{ value(of.required) }},{% endif -%}
type:{{ value(kind) }}
{%- endmacro -%}
{%- macro properties(named) -%}
{{ '{' }}{% for name, of in named | dictsort %}{{ name }}:{{ '{' }}{{ schema(of) }}{{ '}' }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}
{%- endmacro -%}
{{ bos_token }}
{%- set system = messages[0].role in ['system', 'developer'] -%}
{%- if system or tools or enable_thinking %}<|turn>system{{ '\n' }}
{%- if enable_thinking %}<|think|>{{ '\n' }}{% endif -%}
{%- if system %}{{ messages[0].content | trim }}{% endif -%}
{%- for tool in tools or [] %}{% set f = tool.function %}<|tool>declaration:{{ f.name }}{{ '{' }}description:{{ value(f.description) }}
{%- if f.parameters %},parameters:{{ '{' }}
{%- if f.parameters.properties %}properties:{{ properties(f.parameters.properties) }},{% endif -%}
{%- if f.parameters.required %}required:{{ value(f.parameters.required) }},{% endif -%}
type:{{ value(f.parameters.type | upper) }}{{ '}' }}{% endif -%}
{{ '}' }}<tool|>{% endfor -%}
<turn|>{{ '\n' }}{% endif -%}
{%- set at = namespace(user=-1, open=false) -%}
{%- set turns = messages[1:] if system else messages -%}
{%- for message in turns %}{% if message.role == 'user' %}{% set at.user = loop.index0 %}{% endif %}{% endfor -%}
{%- for message in turns -%}
{%- if not at.open %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}{{ '\n' }}{% endif -%}
{%- set at.open = false -%}
{%- if message.tool_calls and message.reasoning and loop.index0 > at.user -%}
<|channel>thought{{ '\n' }}{{ message.reasoning }}{{ '\n' }}<channel|>{% endif -%}
{%- for call in message.tool_calls or [] -%}
<|tool_call>call:{{ call.function.name }}{{ value(call.function.arguments) }}<tool_call|>
{%- set at.open = true -%}
{%- endfor -%}
{%- for result in message.tool_responses or [] -%}
<|tool_response>response:{{ result.name }}
{%- if result.response is mapping %}{{ value(result.response) }}{% else %}{{ value({'value': result.response}) }}{% endif -%}
<tool_response|>
{%- endfor -%}
{{ message.content | trim }}
{%- if message.tool_calls and not message.tool_responses %}<|tool_response>{% endif -%}
{%- if loop.nextitem is defined and loop.nextitem.role != 'assistant' %}{% set at.open = false %}{% endif -%}
{%- if not at.open %}<turn|>{{ '\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not at.open %}<|turn>model{{ '\n' }}{% endif -%}
'''

WEATHER = {'type': 'function', 'function': {
    'name': 'weather', 'description': 'Weather at a place', 'parameters': {
        'type': 'object', 'required': ['place', 'unit'], 'properties': {
            'unit': {'type': 'string', 'description': 'Unit', 'enum': ['c', 'f']},
            'place': {'type': 'object', 'description': 'Where', 'required': ['city'], 'properties': {
                'city': {'type': 'string', 'description': 'City'}, 'zip': {'type': 'integer', 'nullable': True}}},
            'Route': {'type': 'array', 'items': {'type': 'string', 'enum': ['mo', 'tu']}},
            'grid': {'type': 'array', 'items': {'type': 'array', 'items': {'type': 'number'}}},
            'stops': {'type': 'array', 'description': 'Way', 'items': {
                'type': 'object', 'required': ['x'], 'properties': {'x': {'type': 'number'}}}},
        }}}}
NOW = {'name': 'now', 'description': 'Time'}


def call(name, arguments, call_id=None):
  return {'id': call_id, 'type': 'function', 'function': {'name': name, 'arguments': arguments}}


ASKED = [
    {'role': 'developer', 'content': ' Be brief.\n'},
    {'role': 'user', 'content': 'Old question'},
    {'role': 'assistant', 'content': '<|channel>thought\nhm<channel|> Old answer ', 'reasoning': 'old thoughts'},
    {'role': 'user', 'content': [{'type': 'text', 'text': ' Rain? '}]},
    {'role': 'assistant', 'content': None, 'reasoning': 'Two calls.', 'tool_calls': [
        call('weather', '{"unit": "c", "place": {"zip": 8001, "city": "Z\\u00fcrich"}, "sure": true}', 'a'), call('now', {}, 'b')]},
]
RESULTS = [
    {'role': 'tool', 'tool_call_id': 'a', 'content': {'rain': [0.5, 2], 'ok': False, 'note': None}},
    {'role': 'tool', 'tool_call_id': 'b', 'content': ' 12:00'},
]
ANSWER = {'role': 'assistant', 'content': 'Yes.'}
CONVERSATIONS = {
    'plain': [USER], 'system': [{'role': 'system', 'content': 'S'}, USER], 'turns': [USER, ANSWER, {'role': 'user', 'content': 'Why?\n'}],
    'calls': ASKED, 'results': ASKED + RESULTS, 'answered': ASKED + RESULTS + [ANSWER],
    'asked again': ASKED + RESULTS + [ANSWER, USER], 'other role': [USER, {'role': 'critic', 'content': 'no'}],
}

# Typed from the format's description.
DECLARED = (
    '<|tool>declaration:weather{description:<|"|>Weather at a place<|"|>,parameters:{properties:{'
    'grid:{items:{items:{<|"|>type<|"|>:<|"|>number<|"|>},type:<|"|>ARRAY<|"|>},type:<|"|>ARRAY<|"|>},'
    'place:{description:<|"|>Where<|"|>,properties:{city:{description:<|"|>City<|"|>,type:<|"|>STRING<|"|>},'
    'zip:{nullable:true,type:<|"|>INTEGER<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>},'
    'Route:{items:{enum:[<|"|>mo<|"|>,<|"|>tu<|"|>],type:<|"|>STRING<|"|>},type:<|"|>ARRAY<|"|>},'
    'stops:{description:<|"|>Way<|"|>,items:{properties:{x:{type:<|"|>NUMBER<|"|>}},required:[<|"|>x<|"|>],type:<|"|>OBJECT<|"|>},'
    'type:<|"|>ARRAY<|"|>},'
    'unit:{description:<|"|>Unit<|"|>,enum:[<|"|>c<|"|>,<|"|>f<|"|>],type:<|"|>STRING<|"|>}},'
    'required:[<|"|>place<|"|>,<|"|>unit<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
    '<|tool>declaration:now{description:<|"|>Time<|"|>}<tool|>')
CALLED = (
    '<|turn>user\nRain?<turn|>\n<|turn>model\n<|channel>thought\nTwo calls.\n<channel|>'
    '<|tool_call>call:weather{place:{city:<|"|>Zürich<|"|>,zip:8001},sure:true,unit:<|"|>c<|"|>}<tool_call|>'
    '<|tool_call>call:now{}<tool_call|>')
ANSWERED = (
    '<|tool_response>response:weather{note:None,ok:false,rain:[0.5,2]}<tool_response|>'
    '<|tool_response>response:now{value:<|"|> 12:00<|"|>}<tool_response|>')
OLD = '<|turn>user\nOld question<turn|>\n<|turn>model\nOld answer<turn|>\n'


@pytest.mark.parametrize('messages, options, prompt', [
    ([USER], {}, '<bos><|turn>user\nHi<turn|>\n<|turn>model\n'),
    ([USER], {'empty_thought_channel': True}, '<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>'),
    ([USER], {'empty_thought_channel': True, 'thinking': True},
     '<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n'),
    ([USER], {'add_generation_prompt': False, 'empty_thought_channel': True}, '<bos><|turn>user\nHi<turn|>\n'),
    ([{'role': 'system', 'content': ' Be kind. '}, USER, {'role': 'assistant', 'content': '\nHello! '}, USER], {'thinking': True},
     '<bos><|turn>system\n<|think|>\nBe kind.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n'
     '<|turn>user\nHi<turn|>\n<|turn>model\n'),
    ([USER], {'tools': [WEATHER, NOW]}, f'<bos><|turn>system\n{DECLARED}<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n'),
    (ASKED, {}, f'<bos><|turn>system\nBe brief.<turn|>\n{OLD}{CALLED}<|tool_response>'),
    (ASKED + RESULTS, {'tools': [NOW], 'empty_thought_channel': True},
     '<bos><|turn>system\nBe brief.<|tool>declaration:now{description:<|"|>Time<|"|>}<tool|><turn|>\n' + OLD + CALLED + ANSWERED),
    (ASKED + RESULTS + [ANSWER], {'add_generation_prompt': False},
     f'<bos><|turn>system\nBe brief.<turn|>\n{OLD}{CALLED}{ANSWERED}Yes.<turn|>\n'),
    (ASKED + RESULTS + [ANSWER, USER], {},
     '<bos><|turn>system\nBe brief.<turn|>\n' + OLD + CALLED.replace('<|channel>thought\nTwo calls.\n<channel|>', '') + ANSWERED +
     'Yes.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n'),
])
def test_a_prompt_is_what_the_format_says(messages, options, prompt):
  assert chat.render(messages, **options) == prompt
  ids = chat.encode(TOKENIZER, messages, **options)
  assert ids.dtype == np.int32
  assert TOKENIZER.decode(ids, control=True) == prompt
  assert ids.tolist() == STOCK.encode(prompt, add_special_tokens=False).ids


@needs_jinja2
@pytest.mark.parametrize('thinking', [False, True])
@pytest.mark.parametrize('tools', [None, [WEATHER, NOW]])
@pytest.mark.parametrize('name', CONVERSATIONS)
def test_a_carried_template_gives_the_same_ids_as_ours(name, tools, thinking):
  for add_generation_prompt in (True, False):
    options = dict(tools=tools, thinking=thinking, add_generation_prompt=add_generation_prompt)
    theirs = chat.encode(TOKENIZER, CONVERSATIONS[name], template=TEMPLATE, **options)
    np.testing.assert_array_equal(theirs, chat.encode(TOKENIZER, CONVERSATIONS[name], **options))
    assert chat.render(CONVERSATIONS[name], template=TEMPLATE, **options) == chat.render(CONVERSATIONS[name], **options)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.sampled_from('ab <>|{}:,[]"\n\té中\U0001f600\U000f0000\U000f0001')), min_size=1, max_size=3))
def test_ids_are_those_of_the_rendered_prompt_where_no_text_spells_a_control_token(texts):
  messages = [{'role': role, 'content': text} for text in texts for role in ('user', 'assistant')]
  if not any(token in text for token in GEMMA4_TOKENS.values() for text in texts):
    prompt = chat.render(messages)
    assert all(f'user\n{text.strip()}<turn|>' in prompt for text in texts)
    for template in (None, TEMPLATE) if JINJA2 else (None,):
      assert chat.encode(TOKENIZER, messages, template=template).tolist() == STOCK.encode(prompt, add_special_tokens=False).ids


def everywhere(text):
  """A conversation and tools with `text` in every place that holds text, and how many places there are."""
  schema = {'type': 'object', 'required': [text], 'properties': {
      text: {'type': 'string', 'description': text, 'enum': [text]},
      f'a {text}': {'type': 'array', 'items': {'type': 'string', 'description': text, 'enum': [text]}},
      f'b {text}': {'type': 'object', 'required': [text], 'properties': {text: {'type': 'string', 'description': text}}}}}
  messages = [
      {'role': 'system', 'content': text}, {'role': 'user', 'content': f'x{text}y'}, {'role': 'assistant', 'content': f'{text} z'},
      {'role': text, 'content': [{'type': 'text', 'text': text}]}, {'role': 'user', 'content': text},
      {'role': 'assistant', 'reasoning': text, 'tool_calls': [call(text, {text: text, f'a {text}': [{text: text}]})]},
      {'role': 'tool', 'content': {text: text, 'a': [text]}},
      {'role': 'assistant', 'reasoning': text, 'tool_calls': [call(text, {})]}, {'role': 'tool', 'content': text},
      {'role': 'assistant', 'content': text}]
  return messages, [{'name': text, 'description': text, 'parameters': schema}], 35


@pytest.mark.parametrize('template', [None, pytest.param(TEMPLATE, marks=needs_jinja2)], ids=['ours', 'carried'])
def test_text_that_spells_a_control_token_stays_text_in_every_place(template):
  def encode(text):
    messages, tools, _ = everywhere(text)
    return chat.encode(TOKENIZER, messages, tools, thinking=True, template=template)

  controls = list(TOKENIZER.special_ids.values())
  plain = encode('plain')
  places = everywhere('plain')[-1]
  assert TOKENIZER.decode(plain).count('plain') == places
  for token in [*TOKENIZER.special_ids, *GEMMA4_TOKENS.values()]:
    ids = encode(token)
    assert ids[np.isin(ids, controls)].tolist() == plain[np.isin(plain, controls)].tolist(), token
    assert TOKENIZER.decode(ids).count(token) == places, token


@needs_jinja2
@pytest.mark.parametrize('template', [
    "{{ messages[0].content }}{{ messages[1].content }}", "{{ messages[0].content | upper | lower }}{{ messages[1].content }}",
    "{{ (messages | map(attribute='content') | list | tojson) }}", "{{ messages[0].content | reverse }}",
])
def test_texts_that_a_template_joins_or_changes_do_not_become_control_tokens(template):
  for first, second in (('<|tu', 'rn>'), ('<', '|turn>'), ('[MULTI', 'modal]'), ('>nrut|<', '')):
    messages = [{'role': 'user', 'content': first}, {'role': 'user', 'content': second}]
    ids = chat.encode(TOKENIZER, messages, template=template)
    assert np.isin(ids, list(TOKENIZER.special_ids.values())).tolist() == [True] + [False] * (len(ids) - 1)


@needs_jinja2
@pytest.mark.parametrize('template', ['{{ bos_token }}x', 'x'])
def test_a_prompt_begins_with_one_bos_whether_the_template_writes_it_or_not(template):
  assert chat.encode(TOKENIZER, [USER], template=template).tolist() == [2, *TOKENIZER.encode('x')]


@needs_jinja2
@pytest.mark.parametrize('template, message', [
    ('{{ bos_token }}{{ bos_token }}', 'beginning-of-text token more than once'),
    ('{{ raise_exception("roles\\nmust alternate") }}', 'TemplateError: roles must alternate'),
    ('{% if %}', 'TemplateSyntaxError'),
    ('{{ messages.append(1) }}', 'SecurityError'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
    ('{% for m in messages %}{{ m.content.x.y }}{% endfor %}', 'UndefinedError'),
])
def test_a_template_that_cannot_be_used_is_named(template, message):
  with pytest.raises(ValueError, match=f'chat_template.jinja .*{message}'):
    chat.encode(TOKENIZER, [USER], template=template)


def test_a_template_without_jinja2_names_the_extra(monkeypatch):
  real = builtins.__import__

  def absent(name, *args, **kwargs):
    if name.partition('.')[0] == 'jinja2':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', absent)
  with pytest.raises(ImportError, match=r"gemma4_jax\[chat\]"):
    chat.render([USER], template='x')


@needs_jinja2
def test_a_template_is_read_from_the_checkpoints_directory(tmp_path):
  assert chat.load_template(tmp_path) is None
  (tmp_path / 'chat_template.jinja').write_text('{{ messages[0].content }} é', encoding='utf-8')
  assert chat.render([USER], template=chat.load_template(tmp_path)) == 'Hi é'


def test_results_find_their_calls_by_id_by_name_and_by_order():
  calls = {'role': 'assistant', 'tool_calls': [call('one', {}, 'x'), call('two', {}, 'y')]}
  by_id = [{'role': 'tool', 'tool_call_id': 'y', 'content': '2'}, {'role': 'tool', 'tool_call_id': 'x', 'content': '1'}]
  assert 'response:two{value:<|"|>2<|"|>}<tool_response|><|tool_response>response:one' in chat.render([USER, calls, *by_id])
  by_order = [{'role': 'tool', 'content': '1'}, {'role': 'tool', 'content': '2'}]
  by_name = [{'role': 'tool', 'name': 'one', 'content': '1'}, {'role': 'tool', 'name': 'two', 'content': '2'}]
  inside = {**calls, 'tool_responses': [{'name': 'one', 'response': '1'}, {'name': 'two', 'response': '2'}], 'content': 'Done.'}
  assert chat.render([USER, calls, *by_order]) == chat.render([USER, calls, *by_name])
  assert chat.render([USER, inside]) == chat.render([USER, calls, *by_order, {'role': 'assistant', 'content': 'Done.'}])


def test_what_the_model_said_before_a_call_stays_before_it():
  message = {'role': 'assistant', 'content': 'I will look.', 'tool_calls': [call('now', {})]}
  prompt = chat.render([USER, message, {'role': 'tool', 'content': 'x'}])
  assert prompt.endswith(
      '<|turn>model\nI will look.<|tool_call>call:now{}<tool_call|><|tool_response>response:now{value:<|"|>x<|"|>}<tool_response|>')


CALL = {'role': 'assistant', 'tool_calls': [call('now', {}, 'a')]}


@pytest.mark.parametrize('messages, tools, message', [
    ([], None, 'messages: give a list'),
    ('Hi', None, 'messages: give a list'),
    (USER, None, 'messages: give a list'),
    (['Hi'], None, r"messages\[0\]: 'Hi' is no"),
    ([{'content': 'Hi'}], None, r'messages\[0\]: .* is no'),
    ([USER, {'role': 'user'}], None, r'messages\[1\] \(user\): no content'),
    ([{'role': 'assistant'}], None, r'messages\[0\] \(assistant\): neither content nor tool_calls'),
    ([{'role': 'user', 'content': 3}], None, r'messages\[0\] \(user\): content is int; give text'),
    ([{'role': 'user', 'content': [{'type': 'image', 'url': 'x'}]}], None, "content of type 'image'; only text"),
    ([USER, {'role': 'tool', 'content': 'x'}], None, r'messages\[1\] \(tool\): a result must follow'),
    ([CALL, USER], None, r'1 tool calls, but 0 results before messages\[1\] \(user\)'),
    ([{**CALL, 'tool_calls': CALL['tool_calls'] * 2}, {'role': 'tool', 'content': 'x'}], None, '2 tool calls, but 1 results at the end'),
    ([CALL, {'role': 'tool', 'content': 'x'}, {'role': 'tool', 'content': 'x'}], None, 'more results than calls'),
    ([CALL, {'role': 'tool', 'tool_call_id': 'b', 'content': 'x'}], None, "no call has the id 'b'"),
    ([{'role': 'assistant', 'tool_calls': [call('now', '{')]}], None, 'arguments of now are no JSON'),
    ([{'role': 'assistant', 'tool_calls': [call('now', [1])]}], None, 'tool call .* is no'),
    ([{'role': 'assistant', 'tool_calls': [call('now', {'x': math.inf})]}], None, r'inf \(float\) has no form'),
    ([{'role': 'assistant', 'tool_calls': [call('now', {'x': object})]}], None, r'\(type\) has no form'),
    ([{'role': 'assistant', 'content': 'x', 'tool_responses': [{'response': 1}]}], None, 'tool_responses without tool_calls'),
    (3, None, 'messages: give a list'),
    ([{'role': 'assistant', 'tool_calls': 3}], None, r'messages\[0\] \(assistant\): tool_calls must be a list, not 3'),
    ([{'role': 'assistant', 'tool_calls': [{'function': 'now'}]}], None, 'tool call .* is no'),
    ([{'role': 'assistant', 'tool_calls': [call('now', '[' * 100_000)]}], None, 'messages, tools: nested too deeply'),
    ([{**CALL, 'tool_responses': 'x'}], None, "tool_responses must be a list, not 'x'"),
    ([{**CALL, 'tool_responses': ['x']}], None, "tool response 'x' is no"),
    ([USER], 3, 'tools: must be a list, not 3'),
    ([USER], [{'function': 'now'}], r'tools\[0\]: .* is no'),
    ([USER], [{'name': 'f', 'parameters': 'x'}], r"tools\[0\] \(f\): parameters must be a mapping, not 'x'"),
    ([USER], [{'name': 'f', 'parameters': {'properties': ['x']}}], r"tools\[0\] \(f\): properties must be a mapping, not \['x'\]"),
    ([USER], ['now'], r"tools\[0\]: 'now' is no"),
    ([USER], [{'name': 'f', 'parameters': {'properties': {'x': {'properties': {}}}}}], r"tools\[0\] \(f\).x: needs one 'type'"),
    ([USER], [{'name': 'f', 'parameters': {'properties': {'x': {'type': 'array', 'items': {'type': ['string']}}}}}],
     r"tools\[0\] \(f\).x\[\]: needs one 'type'"),
    ([USER], [{'name': 'f', 'parameters': {'required': 'x'}}], r"tools\[0\] \(f\): required must be a list, not 'x'"),
])
def test_what_cannot_be_written_is_named_in_one_line(messages, tools, message):
  with pytest.raises(ValueError, match=message) as e:
    chat.encode(TOKENIZER, messages, tools)
  assert '\n' not in str(e.value)


def test_a_tokenizer_of_another_family_is_refused():
  with pytest.raises(ValueError, match=r'no <turn\|>, <\|tool_response>, <\|turn> at its id in Gemma 4'):
    chat.encode(Tokenizer.train(['the window of a layer ' * 50], 280), [USER])


def test_generation_stops_at_the_released_ids():
  assert [GEMMA4_TOKENS[i] for i in chat.STOP_IDS] == ['<eos>', '<turn|>', '<|tool_response>']


@pytest.mark.parametrize('generated, message', [
    ('Hello.<turn|>\n<|turn>user\nno', {'content': 'Hello.'}),
    (' Hello.<eos>', {'content': 'Hello.'}),
    ('<|channel>thought\nHm.\n<channel|>Hello.<turn|>', {'content': 'Hello.', 'reasoning': 'Hm.'}),
    ('<|channel>thought\n<channel|>Hello.', {'content': 'Hello.'}),
    ('<|channel>thought\nStill at', {'content': '', 'reasoning': 'Still at'}),
    ('Wait.<|tool_call>call:f{a:<|"|>x, {y}:\n<|"|>,b:[1,-2.5e3,[]],c:{d:true,<|"|>e<|"|>:null}}<tool_call|>'
     '<|tool_call>call:g{}<tool_call|><|tool_response>',
     {'content': 'Wait.', 'tool_calls': [
         {'type': 'function', 'function': {'name': 'f', 'arguments': {
             'a': 'x, {y}:\n', 'b': [1, -2500.0, []], 'c': {'d': True, 'e': None}}}},
         {'type': 'function', 'function': {'name': 'g', 'arguments': {}}}]}),
    *[(bad, {'content': bad}) for bad in (
        '<|tool_call>call:f{a:<tool_call|>', '<|tool_call>call:f{a:yes}<tool_call|>', '<|tool_call>call:f{a:1 b:2}<tool_call|>',
        '<|tool_call>f{}<tool_call|>', '<|tool_call>call:f{a:1}', '<|tool_call>call:f{a:<|"|>x}<tool_call|>',
        '<|tool_call>call:f{} and<tool_call|>', '<|tool_call>call:f{:1}<tool_call|>',
        '<|tool_call>call:f{a:' + '[' * 9000 + '}<tool_call|>', '<|channel>final\nx<channel|>')],
])
def test_generated_text_is_read_back_and_malformed_calls_stay_text(generated, message):
  assert chat.parse(generated) == {'role': 'assistant', **message}


def test_ids_are_read_with_their_tokenizer_and_spelled_tokens_stay_text():
  ids = [100, *TOKENIZER.encode('thought\nHm <channel|>'), 101, *TOKENIZER.encode('Write <turn|> \U000f0000'), 48,
         *TOKENIZER.encode('call:f{a:'), 52, *TOKENIZER.encode('<|"|>'), 52, *TOKENIZER.encode('}'), 49, 50]
  assert chat.parse(np.array(ids), TOKENIZER) == {
      'role': 'assistant', 'content': 'Write <turn|> \U000f0000', 'reasoning': 'Hm <channel|>',
      'tool_calls': [{'type': 'function', 'function': {'name': 'f', 'arguments': {'a': '<|"|>'}}}]}
  with pytest.raises(ValueError, match='ids need their tokenizer'):
    chat.parse(ids)


TEXT = st.text(st.sampled_from('ab <>|{}[]:,"\n\\é\U0001f600')) | st.sampled_from(list(GEMMA4_TOKENS.values()))
KEY = st.text(st.sampled_from('abcXYZ_ <|é'), min_size=1)
VALUE = st.recursive(
    TEXT | st.booleans() | st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3), max_leaves=8)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(['f', 'get.it', 'a-b']), st.dictionaries(KEY, VALUE, max_size=3)), min_size=1, max_size=2), TEXT)
def test_calls_are_read_back_as_they_were_written(calls, reasoning):
  message = {'role': 'assistant', 'content': 'x', 'reasoning': reasoning, 'tool_calls': [call(*each) for each in calls]}
  before = chat.encode(TOKENIZER, [USER])
  ids = chat.encode(TOKENIZER, [USER, message])
  assert ids[:len(before)].tolist() == before.tolist()
  parsed = chat.parse(ids[len(before):], TOKENIZER)
  assert [(each['function']['name'], each['function']['arguments']) for each in parsed['tool_calls']] == calls
  assert (parsed['content'], parsed.get('reasoning', '')) == ('x', reasoning.strip())
