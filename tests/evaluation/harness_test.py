"""The adapter for lm-evaluation-harness: against its own class for Hugging Face models, on tasks from files."""

import json
import os
import re
import types

import numpy as np
import pytest

from tests import tiny

os.environ.update({'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'})   # read when it is imported
pytest.importorskip('lm_eval', reason="lm-evaluation-harness is not here: pip install 'gemma4_jax[lm_eval]'")

from gemma4_jax.evaluation import harness
from gemma4_jax.sampling import text

QUESTIONS = [('The width of', [' a line', ' text', ' it']), ('Return the', [' lines of text', ' next', ' decoder']),
             ('def wrap', ['(self):', '\n', ' = None']), ('If the string is', [' too long', ' JSON', ' '])]
TASKS = {
    'toy_choice': '''output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]''',
    'toy_rolling': '''output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]''',
    'toy_generate': '''output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]''',
}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A checkpoint `model`, and a folder `tasks`."""
  folder = tmp_path_factory.mktemp('harness')
  tiny.write(folder / 'model')
  (folder / 'tasks').mkdir()
  (folder / 'toy.jsonl').write_text(''.join(json.dumps({'question': question, 'choices': choices, 'label': i % 3}) + '\n'
                                            for i, (question, choices) in enumerate(QUESTIONS)))
  for name, fields in TASKS.items():
    (folder / 'tasks' / f'{name}.yaml').write_text(
        f'task: {name}\ndataset_path: json\ntest_split: test\n'
        f'dataset_kwargs: {{data_files: {{test: {folder / "toy.jsonl"}}}, cache_dir: {folder / "cache"}}}\n{fields}\n')
  return folder


@pytest.fixture(scope='module')
def ours(home):
  return harness.Adapter(text.load(home / 'model'))


@pytest.fixture(scope='module')
def theirs(home):
  """(add_bos_token) -> the harness's own class over the same directory."""
  torch, transformers, *_ = [pytest.importorskip(name, reason=f"the harness's own class needs {name}: pip install 'lm_eval[hf]'")
                             for name in ('torch', 'transformers', 'accelerate', 'peft')]
  from lm_eval.models import huggingface
  import tokenizers
  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(home / 'model', dtype=torch.float32, attn_implementation='eager')
  spec = tokenizers.Tokenizer.from_file(str(home / 'model' / 'tokenizer.json'))
  spec.post_processor = tokenizers.processors.TemplateProcessing(single='<bos> $A', special_tokens=[('<bos>', 2)])
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=spec, bos_token='<bos>', eos_token='<eos>', pad_token='<pad>')
  return lambda bos: huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, add_bos_token=bos, device='cpu', max_length=256)


def requests(*args):
  return [types.SimpleNamespace(args=one, task_name='toy') for one in args]


def test_scores_of_choices_are_those_of_the_harness_own_class(ours, theirs):
  asked = requests(*((question, choice) for question, choices in QUESTIONS for choice in choices), ('', 'no context'))
  for (nats, greedy), (expected, expected_greedy) in zip(
      ours.loglikelihood(asked, disable_tqdm=True), theirs(True).loglikelihood(asked, disable_tqdm=True), strict=True):
    assert nats == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy


def test_rolling_scores_are_those_of_the_harness_own_class_in_windows_too(home, ours, theirs):
  asked = requests(*((question + choices[0],) for question, choices in QUESTIONS), ('def width(self): ' * 80,))
  assert len(ours.tok_encode(asked[-1].args[0])) > 256
  expected = theirs(False).loglikelihood_rolling(asked, disable_tqdm=True)   # with True a second BOS would be predicted
  np.testing.assert_allclose(ours.loglikelihood_rolling(asked), expected, rtol=1e-6, atol=1e-4)


def test_generations_are_those_of_the_harness_own_class(ours, theirs):
  settings = {'until': ['\n\n'], 'max_gen_toks': 6, 'do_sample': False}
  asked = requests(*((question, settings) for question, _ in QUESTIONS))
  expected = [re.sub(r'<unused\d+>', '', one) for one in theirs(True).generate_until(asked, disable_tqdm=True)]   # text to them
  assert ours.generate_until(asked) == expected


def test_tasks_from_files_run_by_name_with_their_protocol(home, ours, monkeypatch):
  begun, scored, start = [], harness.score.continuations, text.Model.start
  monkeypatch.setattr(harness.score, 'continuations', lambda cfg, params, pairs, **how: begun.extend(
      [*context, *continuation] for context, continuation in pairs) or scored(cfg, params, pairs, **how))
  monkeypatch.setattr(text.Model, 'start', lambda self, prompts, **how: begun.extend(
      prompt.tolist() for prompt in prompts) or start(self, prompts, **how))
  found = harness.run(home / 'model', list(TASKS), tasks_path=home / 'tasks', limit=3)
  assert len(begun) == 3 * (3 + 1 + 1) and all(ids[0] == 2 and ids.count(2) == 1 for ids in begun)
  asked = [[nats for nats, _ in ours.loglikelihood(requests(*((question, choice) for choice in choices)), disable_tqdm=True)]
           for question, choices in QUESTIONS[:3]]
  assert found['metrics']['toy_choice']['acc'] == np.mean([np.argmax(scores) == i for i, scores in enumerate(asked)])
  nats = sum(ours.loglikelihood_rolling(requests(*((question + choices[0],) for question, choices in QUESTIONS[:3]))))
  size = sum(len((question + choices[0]).encode()) for question, choices in QUESTIONS[:3])
  assert found['metrics']['toy_rolling']['bits_per_byte'] == pytest.approx(-nats / np.log(2) / size, rel=1e-5)
  assert found['metrics']['toy_generate'].keys() >= {'exact_match'}
  assert found['protocol']['chat template'] == 'none' and found['protocol']['documents'] == 3


def test_every_request_begins_with_exactly_one_bos_whatever_it_spells(home):
  ours = harness.Adapter(text.load(home / 'model'))
  for string in ('text', '<bos>text', '<bos><bos>'):
    assert ours.tok_encode(string).count(2) == 1 and ours.tok_encode(string)[0] == 2
    assert 2 not in ours.tok_encode(string, add_special_tokens=False)
  messages = [{'role': 'user', 'content': 'Why <turn|><bos>?'}]
  chat = ours.apply_chat_template(messages)
  ids = ours.tok_encode(chat)
  assert ids == ours._model.encode_chat(messages).tolist() and ids.count(2) == 1 and ids.count(106) == 1
  context, continuation = ours._encode_pair(chat, 'Because.<turn|>')
  assert context == ids and continuation == ours._model.tokenizer.encode('Because.<turn|>').tolist()
  with pytest.raises(ValueError, match='was not rendered here'):
    ours.tok_encode(chat + ' and more')


def test_a_text_that_is_too_long_keeps_its_bos_and_its_end(home):
  short = harness.Adapter(text.load(home / 'model'), max_length=12)
  words = 'the width of a line of text is the width of it and so on'
  ids, end = short.tok_encode(words), short.tok_encode(' so', add_special_tokens=False)
  kept = [2, *ids[-(12 - len(end)):]]
  (cut, _), = short._loglikelihood_tokens([(None, ids, end)])
  (same, _), = short._loglikelihood_tokens([(None, kept, end)])
  assert len(ids) > 13 and cut == same


@pytest.mark.parametrize('settings, said', [({'until': ['x'], 'num_beams': 4}, "'num_beams' is none of until"),
                                            ({'max_gen_toks': 256}, 'leaves no room')])
def test_settings_that_there_are_not_are_refused(ours, settings, said):
  with pytest.raises(ValueError, match=said):
    ours.generate_until(requests(('a', settings)))


def test_an_answer_that_the_task_begins_follows_the_opened_turn(ours):
  question, begun = {'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'Because <bos>'}
  chat = ours.apply_chat_template([question, begun], add_generation_prompt=False)
  ids = ours._model.encode_chat([question]).tolist() + ours._model.tokenizer.encode('Because <bos>').tolist()
  assert ours.tok_encode(chat) == ids and ids.count(2) == 1 and chat.endswith('model\nBecause <bos>')


def test_tasks_that_count_tokens_get_the_tokenizer_and_the_lengths_that_were_asked_for(home, monkeypatch):
  """As RULER's do, which make their own texts."""
  (home / 'long').mkdir()
  (home / 'long/made.py').write_text('''import datasets
def made(max_seq_lengths=(64,), tokenizer=None, **kwargs):
  import transformers
  tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
  rows = [{'question': 'a b ' * (n // 4), 'answer': str(len(tokenizer('a b').input_ids))} for n in max_seq_lengths]
  return {'test': datasets.Dataset.from_list(rows)}
''')
  (home / 'long/toy_long.yaml').write_text(
      'task: toy_long\ncustom_dataset: !function made.made\ntest_split: test\noutput_type: generate_until\ndoc_to_text: "{{question}}"\n'
      'doc_to_target: "{{answer}}"\ngen_prefix: "So"\ngeneration_kwargs: {until: []}\nmetric_list: [{metric: exact_match}]\n')
  asked, tokenizer = [], text.load(home / 'model').tokenizer
  monkeypatch.setattr(harness.Adapter, 'generate_until', lambda self, requests, **_: [
      asked.append(self.tok_encode(r.args[0])) or str(len(tokenizer.encode('a b'))) for r in requests])
  found = harness.run(home / 'model', ['toy_l*'], tasks_path=home / 'long', lengths=[8, 40], chat_template=True)
  assert found['metrics']['toy_long']['exact_match'] == 1 and found['protocol']['lengths'] == '8, 40'
  assert len(asked[1]) > len(asked[0]) and all(tokenizer.decode(ids, control=True).endswith('model\nSo') for ids in asked)


def test_a_task_that_cannot_be_loaded_is_one_error(home):
  (home / 'broken').mkdir()
  (home / 'broken/broken.yaml').write_text('task: broken\ndataset_path: json\ntest_split: test\ndoc_to_text: ""\ndoc_to_target: ""\n'
                                           f'dataset_kwargs: {{data_files: {{test: {home}/none.jsonl}}}}\n')
  with pytest.raises(ValueError, match='lm_eval: cannot load broken .FileNotFoundError: .*none.jsonl'):
    harness.run(home / 'model', ['broken'], tasks_path=home / 'broken')


def test_a_task_that_there_is_not_names_those_near_it(home):
  with pytest.raises(ValueError, match='lm_eval:toy_chioce: no such task; near it are toy_choice'):
    harness.run(home / 'model', ['toy_chioce'], tasks_path=home / 'tasks')
