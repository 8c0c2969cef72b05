"""Documents from files, from a corpus and from conversations: what is predicted, and what it is told after."""

import dataclasses
import json

import numpy as np
import pytest

from gemma4_jax.data import corpus
from gemma4_jax.evaluation import documents
from tests import tiny

QUESTION, ANSWER = {'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'Because. <turn|>'}
TOKENIZER = tiny.model().tokenizer


def conversations(tmp_path, *lines):
  path = tmp_path / 'chats.jsonl'
  path.write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding='utf-8')
  return documents.from_conversations(tiny.model(), str(path))


def test_files_become_documents_after_bos_and_empty_ones_are_left_out(tmp_path):
  (tmp_path / 'a.txt').write_text('One <bos>.')
  (tmp_path / 'b.txt').write_text('')
  (tmp_path / 'c.txt').write_text('Three.')
  found = documents.from_files(TOKENIZER, str(tmp_path / '*.txt'))
  assert [TOKENIZER.decode(d.targets) for d in found] == ['One <bos>.', 'Three.'] and found[1].origin.endswith('c.txt')
  assert all(d.ids[0] == TOKENIZER.bos_id and TOKENIZER.bos_id not in d.targets for d in found)
  assert len(documents.from_files(TOKENIZER, str(tmp_path / '*.txt'), most=1)) == 1


def test_the_suffix_tells_the_kind_of_file(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"body": "x y"}\n{"body": "z"}\n')
  found = documents.from_files(TOKENIZER, str(tmp_path / '*.jsonl'), text_field='body')
  assert [TOKENIZER.decode(d.targets) for d in found] == ['x y', 'z']
  (tmp_path / 'b.txt').write_text('t')
  with pytest.raises(ValueError, match='files of several kinds'):
    documents.from_files(TOKENIZER, str(tmp_path / '*'))


def test_of_a_corpus_come_the_first_of_each_domain_cut_to_length():
  tokens = np.array([2, 5, 6, 7, 2, 8, 2, 2, 9, 9, 2, 3], np.uint16)
  split = corpus.Corpus(tokens, np.array([0, 4, 6, 7, 10, 12]), np.array([0, 0, 1, 1, 1], np.uint8))
  found = documents.from_corpus(split, max_tokens=3)
  assert {(d.domain, *d.ids) for d in found} == {('code', 2, 5, 6), ('code', 2, 8), ('english', 2, 9, 9), ('english', 2, 3)}
  assert sorted(d.domain for d in documents.from_corpus(split, most=1)) == ['code', 'english']
  assert {len(d.targets) for d in documents.from_corpus(split, min_tokens=2)} == {2, 3}


def test_a_reply_is_predicted_from_its_opened_turn_to_its_stop_token(tmp_path):
  found, = conversations(tmp_path, {'messages': [QUESTION, ANSWER]})
  assert TOKENIZER.decode(found.ids[:found.first], control=True) == '<bos><|turn>user\nWhy?<turn|>\n<|turn>model\n'
  assert TOKENIZER.decode(found.targets, control=True) == 'Because. <turn|><turn|>'      # the first is text, the last the stop token
  assert found.targets[-1] == 106 and 106 not in found.targets[:-1] and found.origin.endswith('line 1, messages[1]')


def test_every_reply_of_a_conversation_has_what_came_before_as_context(tmp_path):
  first, second = conversations(tmp_path, [QUESTION, ANSWER, QUESTION, ANSWER])
  np.testing.assert_array_equal(first.targets, second.targets)
  assert second.ids[:len(first.ids)].tolist() == first.ids.tolist() and second.first > len(first.ids)


def test_an_empty_thought_channel_belongs_to_the_prompt(tmp_path):
  path = tmp_path / 'chats.jsonl'
  path.write_text(json.dumps([QUESTION, ANSWER]))
  found, = documents.from_conversations(dataclasses.replace(tiny.model(), empty_thought_channel=True), str(path))
  assert TOKENIZER.decode(found.ids[:found.first], control=True).endswith('<|turn>model\n<|channel>thought\n<channel|>')
  assert TOKENIZER.decode(found.targets, control=True) == 'Because. <turn|><turn|>'


def test_a_call_of_a_tool_and_the_answer_after_its_result_are_replies(tmp_path):
  call = {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': {'x': 1}}}]}
  first, second = conversations(tmp_path, [QUESTION, call, {'role': 'tool', 'content': '2'}, ANSWER])
  assert TOKENIZER.decode(first.targets, control=True) == '<|tool_call>call:f{x:1}<tool_call|><|tool_response>'
  assert TOKENIZER.decode(second.ids[:second.first], control=True).endswith('response:f{value:<|"|>2<|"|>}<tool_response|>')
  assert TOKENIZER.decode(second.targets, control=True) == 'Because. <turn|><turn|>'


@pytest.mark.parametrize('line, said', [
    ('{', 'line 2: '), ({'messages': [QUESTION]}, 'line 2: no reply of the assistant'), ({'messages': 3}, 'line 2: no reply'),
    (['x', ANSWER], 'line 2: no reply of the assistant'),
    ([ANSWER], r'line 2: messages\[0\]: a reply needs a message before it'), ([{'role': 'robot'}, ANSWER], 'line 2: '),
    ({'text': 'x'}, "line 2: no reply of the assistant; a line is {'messages'")], ids=str)
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, said):
  with pytest.raises(ValueError, match=f'chats.jsonl, {said}'):
    conversations(tmp_path, [QUESTION, ANSWER], line)
