"""Text in, text out: what is encoded, streams, stop strings, chats, checkpoints, and what is refused."""

import dataclasses
import functools
import json
import random

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from gemma4_jax import size
from gemma4_jax.checkpoint import save
from gemma4_jax.data import chat
from gemma4_jax.data.tokenizer import Tokenizer
from gemma4_jax.model import transformer
from gemma4_jax.sampling import generate, pieces, run, text
from gemma4_jax.sampling.sampler import GREEDY, Sampling
from tests import quick, tiny

MODEL = tiny.model()
HOT = Sampling(temperature=1.5, top_k=0, top_p=1.0)
PROMPTS = ['def width(self', 'the end of a']
ASKED = [{'role': 'user', 'content': 'Hi?'}]
WRITTEN = [*ASKED, {'role': 'assistant', 'content': 'Ho.'}, {'role': 'user', 'content': 'So?'}]
twelve = functools.partial(MODEL.generate, max_new_tokens=12, sampling=HOT, seed=3)


@functools.cache
def both():
  return twelve(PROMPTS)


def endless(**fields):
  return dataclasses.replace(MODEL, stop_ids=(), **fields)


def test_a_prompt_begins_with_bos_once_and_is_text_whatever_it_spells():
  prompt = '<bos>a<turn|>\n<|channel>thought <unused3>'
  ids = MODEL.encode(prompt)
  assert ids[0] == 2 and not set(ids[1:].tolist()) & set(MODEL.tokenizer.special_ids.values())
  assert MODEL.tokenizer.decode(ids[1:]) == prompt


def test_text_is_that_of_the_tokens_of_generate_with_their_logprobs():
  rows = generate.generate(MODEL.cfg, MODEL.params, [MODEL.encode(p) for p in PROMPTS], max_new_tokens=12, sampling=HOT, seed=3)
  for found, row in zip(both(), rows, strict=True):
    np.testing.assert_array_equal(found.tokens, row.tokens)
    np.testing.assert_array_equal(found.logprobs, row.logprobs)
    assert found.text == MODEL.tokenizer.decode(row.tokens) and found.stopped == row.stopped


def test_weights_that_are_no_numbers_are_told_and_not_sampled_from():
  broken = {**MODEL.params, 'final_norm': {'scale': MODEL.params['final_norm']['scale'] * np.nan}}
  with pytest.raises(ValueError, match='log-probabilities are no numbers'):
    dataclasses.replace(MODEL, params=broken).generate('def', max_new_tokens=2)


def test_pieces_of_a_stream_are_the_text():
  for seed in range(6):   # hot enough for bytes of many a broken character
    found = list(MODEL.stream(PROMPTS[0], max_new_tokens=12, sampling=HOT, seed=seed))
    assert ''.join(found) == twelve(PROMPTS[0], seed=seed).text and len(found) > 3


@pytest.mark.parametrize('last', [[], [1]], ids=['limit', 'stop id'])
def test_an_unfinished_character_at_the_end_is_there_as_in_the_whole(last):
  tokens = [*MODEL.tokenizer.encode('a\u4e2d')[:-1].tolist(), *last]
  row = run._Row(MODEL, (), chat=False)
  found = row.push(tokens, [0.0] * len(tokens)) + row.end()
  assert ''.join(piece for _, piece in found) == row.text == MODEL.tokenizer.decode(tokens) == 'a\ufffd' and row.stopped == bool(last)


@pytest.mark.parametrize('where', [slice(4, 9), slice(0, 1), slice(-3, None)], ids=['middle', 'first', 'last'])
def test_a_stop_string_cuts_exactly_before_it_and_the_other_row_goes_on(where):
  whole = both()[0].text
  stop = whole[where]
  first, other = twelve(PROMPTS, stop_strings=[stop])
  assert first.text == whole[:whole.index(stop)] and first.stopped
  assert MODEL.tokenizer.decode(first.tokens).find(stop) >= 0 and MODEL.tokenizer.decode(first.tokens[:-1]).find(stop) < 0
  assert len(first.logprobs) == len(first.tokens)
  assert stop in both()[1].text or other.text == both()[1].text
  streamed = MODEL.stream(PROMPTS[0], max_new_tokens=12, sampling=HOT, seed=3, stop_strings=stop)
  assert ''.join(streamed) == first.text


def test_generation_stops_with_the_last_row(monkeypatch):
  steps = []
  monkeypatch.setattr(generate, '_decode', lambda *args, run=generate._decode, **slots: steps.append(1) or run(*args, **slots))
  whole = both()[0].text
  list(MODEL.stream(PROMPTS[0], max_new_tokens=12, sampling=HOT, seed=3, stop_strings=[whole[2:5]]))
  assert len(steps) < 11


@settings(max_examples=300, deadline=None)
@given(st.text('ab', max_size=12), st.lists(st.text('ab', min_size=1, max_size=4), min_size=1, max_size=3), st.randoms())
def test_stop_strings_do_not_depend_on_how_the_text_comes(whole, stops, rng):
  ends = [i for i in range(len(whole) + 1) if any(whole[:i].endswith(stop) for stop in stops)]
  expected = whole if not ends else whole[:ends[0] - max(len(stop) for stop in stops if whole[:ends[0]].endswith(stop))]
  cut, out, at = pieces.StopStrings(tuple(stops)), '', 0
  while at < len(whole) and not cut.found:
    to = rng.randint(at + 1, len(whole))
    out, at = out + cut.push(whole[at:to]), to
    assert expected.startswith(out)
  assert out + cut.flush() == expected and cut.found == bool(ends)


def test_best_of_keeps_the_likeliest_per_token():
  drawn = twelve(PROMPTS[0], samples=4)
  ranked = sorted(drawn, key=lambda found: -found.logprobs.mean())
  assert len({found.text for found in drawn}) == 4
  assert twelve(PROMPTS[0], best_of=4).text == ranked[0].text
  assert [found.text for found in twelve(PROMPTS[0], best_of=4, samples=2)] == [found.text for found in ranked[:2]]


@pytest.mark.slow
def test_several_prompts_with_samples_give_a_list_each():
  found = twelve(PROMPTS, samples=2)
  assert [len(rows) for rows in found] == [2, 2] and len({row.text for rows in found for row in rows}) == 4


def test_scores_are_those_of_the_tokens():
  found, = twelve([PROMPTS[0]])
  expected = generate.score(MODEL.cfg, MODEL.params, [MODEL.encode(PROMPTS[0])] * 2, [MODEL.tokenizer.encode(c) for c in ('(self)', ' a')])
  for got, wanted in zip(MODEL.score(PROMPTS[0], ['(self)', ' a']), expected, strict=True):
    np.testing.assert_array_equal(got, wanted)
  assert len(MODEL.score('', ['the'])[0]) == len(MODEL.tokenizer.encode('the'))
  clean = found.text if MODEL.tokenizer.encode(found.text).tolist() == found.tokens.tolist() else None
  assert clean is None or np.allclose(MODEL.score(PROMPTS[0], [clean])[0], found.logprobs, atol=1e-4)


def test_a_chat_is_the_message_in_its_tokens():
  ids = MODEL.encode_chat(ASKED)
  np.testing.assert_array_equal(ids, chat.encode(MODEL.tokenizer, ASKED))
  row, = generate.generate(MODEL.cfg, MODEL.params, [ids], max_new_tokens=12, sampling=HOT, seed=1)
  asked = dict(max_new_tokens=12, sampling=HOT, seed=1)
  message = MODEL.chat(ASKED, **asked)
  assert message == chat.parse(row.tokens, MODEL.tokenizer) and message['content']
  reply = MODEL.chat_stream(ASKED, **asked)
  assert ''.join(piece for kind, piece in reply if kind == 'content') == message['content']
  assert reply.message == message


def test_thoughts_and_answer_are_streamed_as_they_are_parsed():
  rng, tok = random.Random(0), MODEL.tokenizer
  thought = [tok.special_ids['<|channel>'], *tok.encode('thought\n')]
  call = [tok.special_ids['<|tool_call>'], *tok.encode('call:f{a:1}'), tok.special_ids['<tool_call|>']]
  parts = [thought, thought[:1], call, *([tok.special_ids[token]] for token in ('<channel|>', '<mask>'))]
  parts += [[i] for i in tok.encode('thought \n a\u4e2d b\n\n')]
  both_kinds = 0
  for _ in range(3000):
    ids = [int(i) for _ in range(rng.randint(1, 10)) for i in rng.choice(parts)]
    ids += [106, *tok.encode('over')] if rng.random() < 0.3 else []
    sections, found = pieces.Sections(tok), {'content': '', 'reasoning': ''}
    for kind, piece in [piece for i in ids for piece in sections.push(i)] + sections.end():
      found[kind] += piece
    message = chat.parse(ids, tok)
    assert found['reasoning'] == message.get('reasoning', ''), ids
    assert found['content'] == message['content'], ids
    both_kinds += bool(found['content'] and found['reasoning'])
  assert both_kinds > 100


def test_a_stop_string_ends_an_answer_before_it_and_is_not_looked_for_in_thoughts():
  tok = MODEL.tokenizer
  control = lambda name: tok.special_ids[name]
  thought = [control('<|channel>'), *tok.encode('thought\nSTOP it'), control('<channel|>')]
  tokens = [*thought, *tok.encode('So be it. STOP, I said'), control('<turn|>')]
  whole = run._Row(MODEL, ['STOP'], chat=True)
  found = whole.push(tokens, [0.0] * len(tokens))
  assert whole.message == {'role': 'assistant', 'content': 'So be it. ', 'reasoning': 'STOP it'} and whole.stopped
  assert whole.text == 'So be it. ' == ''.join(piece for kind, piece in found if kind == 'content')
  assert len(whole.tokens) == len(whole.logprobs) < len(tokens)
  piecewise = run._Row(MODEL, 'STOP', chat=True)
  assert [piece for token in tokens for piece in piecewise.push([token], [0.0])] == found


@pytest.mark.slow
def test_a_chat_ends_with_a_stop_string_in_every_way_it_can_be_had():
  asked = dict(max_new_tokens=12, sampling=HOT, seed=1)
  whole = MODEL.chat(ASKED, **asked)['content']
  stop = whole[len(whole) // 2:][:2]
  expected, asked = whole[:whole.index(stop)], asked | {'stop_strings': [stop]}
  reply, talked = MODEL.chat_stream(ASKED, **asked), text.Conversation(MODEL, 64).reply(ASKED, **asked)
  for content in (MODEL.chat(ASKED, **asked)['content'], ''.join(piece for _, piece in reply), reply.message['content'],
                  talked.finish()['content']):
    assert content == expected
  assert talked.run.rows[0].stopped and len(talked.run.rows[0].tokens) < 12


def test_a_conversation_runs_only_what_is_new_and_answers_as_if_it_had_run_all():
  model = endless()
  talk = text.Conversation(model, 64)
  reused = 0
  for seed in range(12):   # an answer of a token that is that token again when read as text goes on
    asked = dict(max_new_tokens=1, sampling=HOT, seed=seed)
    message = talk.reply(ASKED, **asked).finish()
    messages = [*ASKED, message, {'role': 'user', 'content': 'So?'}]
    reply = talk.reply(messages, max_new_tokens=12, sampling=GREEDY)
    found = reply.finish()
    reused += reply.run.stats.prompt_tokens < len(model.encode_chat(messages))
    assert found == model.chat(messages, max_new_tokens=12, sampling=GREEDY)
  assert reused


def test_an_answer_left_early_is_run_again_from_the_start():
  talk = text.Conversation(endless(), 64)
  asked = dict(max_new_tokens=12, sampling=GREEDY)
  for _ in talk.reply(ASKED, **asked):
    break
  reply = talk.reply(WRITTEN, **asked)
  assert reply.finish() == endless().chat(WRITTEN, **asked)
  assert reply.run.stats.prompt_tokens == len(MODEL.encode_chat(WRITTEN))


def test_a_conversation_whose_new_cache_was_interrupted_goes_on(monkeypatch):
  talk = text.Conversation(endless(), 64)
  asked = dict(max_new_tokens=4, sampling=GREEDY)
  talk.reply(ASKED, **asked).finish()

  def pressed(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(generate, 'Session', pressed)
  with pytest.raises(KeyboardInterrupt):
    talk.reply(WRITTEN, **asked)
  monkeypatch.undo()
  assert talk.reply(ASKED, **asked).finish() == endless().chat(ASKED, **asked)


def test_an_answer_ends_where_the_context_does_and_a_prompt_over_it_is_refused():
  ids = MODEL.encode_chat(ASKED)
  talk = text.Conversation(endless(), len(ids) + 5)
  reply = talk.reply(ASKED, sampling=GREEDY)
  reply.finish()
  assert len(reply.run.rows[0].tokens) == 5
  with pytest.raises(ValueError, match=f'{len(MODEL.encode_chat(WRITTEN))} tokens leave no room .* {len(ids) + 5}'):
    talk.reply(WRITTEN)


def test_numbers_of_a_run_are_counted():
  run = MODEL.start([MODEL.encode(p) for p in PROMPTS], max_new_tokens=12, sampling=HOT, seed=3, every=12)
  rows = run.finish()
  assert run.stats.prompt_tokens == sum(len(MODEL.encode(p)) for p in PROMPTS)
  assert run.stats.new_tokens == sum(len(row.tokens) for row in rows)
  assert run.stats.cache_bytes == size.kv_bytes(MODEL.cfg, 32, width=4) * 2
  assert run.stats.prefill_seconds > 0 and run.stats.decode_seconds > 0


# Checkpoints.


def test_a_checkpoint_brings_tokenizer_stop_ids_settings_and_template(tmp_path):
  pytest.importorskip('jinja2')
  tiny.write(tmp_path / 'a', **{'chat_template.jinja': "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"})
  model = text.load(tmp_path / 'a')
  assert model.stop_ids == (1, 106) and model.sampling == Sampling(temperature=0.7, top_k=40, top_p=0.9)
  assert MODEL.tokenizer.decode(model.encode_chat(ASKED)) == '[Hi?]'
  assert model.generate(PROMPTS[0], max_new_tokens=12, sampling=GREEDY).text == twelve(PROMPTS[0], sampling=GREEDY).text


def test_without_files_of_settings_the_tokenizers_own_stops_count(tmp_path):
  folder = tiny.write(tmp_path / 'a')
  (folder / 'generation_config.json').unlink()
  assert text.load(folder, param_dtype='bfloat16').stop_ids == (1, 106, 50)
  (folder / 'tokenizer.json').unlink()
  corpus = Tokenizer.train(['some text for a tokenizer of its own'], 275)
  (tmp_path / 'own.json').write_text(corpus.serialized)
  model = text.load(folder, tokenizer=tmp_path / 'own.json')
  assert model.stop_ids == (1,)    # id 106 is a byte there
  assert MODEL.tokenizer.vocab_size > corpus.vocab_size and isinstance(model.generate('a', max_new_tokens=12, sampling=HOT).text, str)


def test_tokens_that_the_settings_suppress_are_never_chosen(tmp_path):
  first = int(twelve(PROMPTS[0], sampling=GREEDY).tokens[0])
  folder = tiny.write(tmp_path / 'a', **{'generation_config.json': f'{{"do_sample": false, "suppress_tokens": [{first}]}}'})
  model = text.load(folder)
  assert model.sampling.suppress_tokens == (first,)
  assert first not in model.generate(PROMPTS[0], max_new_tokens=12).tokens


@pytest.mark.parametrize('placement, storage', quick.only(
    [], [('host', 'as_is'), ('host', 'int8'), ('folded_host', 'as_is'), ('device', 'int4')]))
def test_a_placed_table_is_that_of_place_and_never_on_the_device_if_it_is_for_the_host(tmp_path, monkeypatch, placement, storage):
  folder = tiny.write(tmp_path / 'a')
  loaded, place = {}, text.placing.place
  monkeypatch.setattr(text.placing, 'place', lambda cfg, params, **how: loaded.update(params) or place(cfg, params, **how))
  model = text.load(folder, ple_placement=placement, ple_table=storage)
  assert isinstance(loaded['arm']['lookup']['table'], np.memmap)
  assert (model.cfg.ple_placement, model.cfg.ple_table) == (placement, storage)
  placed = text.placing.place(MODEL.cfg, MODEL.params, placement=placement, storage=storage)
  asked = dict(max_new_tokens=4, sampling=GREEDY)
  assert model.generate('def', **asked).text == dataclasses.replace(MODEL, cfg=placed[0], params=placed[1]).generate('def', **asked).text


@pytest.mark.slow
def test_weights_that_were_folded_for_a_cache_go_out_and_come_in_again(tmp_path):
  folder = tiny.write(tmp_path / 'a')
  model = text.load(folder, kv='turboquant,exact_last=False')
  assert model.cfg.rotated_values
  save.save_orbax(model.cfg, model.params, tmp_path / 'b')
  again = text.load(tmp_path / 'b', kv=model.kv, tokenizer=folder / 'tokenizer.json', mesh={})
  assert again.cfg.rotated_values == model.cfg.rotated_values and again.cfg.matvec == 'xla'   # of a mesh
  asked = dict(max_new_tokens=8, sampling=GREEDY)
  assert again.generate('def', **asked).text == model.generate('def', **asked).text


def test_do_sample_false_is_greedy(tmp_path):
  folder = tiny.write(tmp_path / 'a', **{'generation_config.json': '{"do_sample": false, "eos_token_id": 1}'})
  model = text.load(folder)
  assert model.sampling.temperature == 0 and model.stop_ids == (1,)


@pytest.mark.parametrize('files, message', [
    ({'tokenizer.json': Tokenizer.stand_in(vocab_size=1025).serialized},
     "tokenizer.json: its 1025 entries are more than the model's vocabulary of 1024"),
    ({'env.json': '{"tokenizer_hash": "0123456789abcdef"}'}, 'was trained with (0123456789ab)'),
    ({'tokenizer.json': '{'}, 'tokenizer.json: not a tokenizer.json'),
    ({'generation_config.json': '{'}, 'generation_config.json: cannot be read as JSON'),
    ({'generation_config.json': '{"eos_token_id": [1, 4000]}'}, 'generation_config.json: eos_token_id = 4000 is no token'),
    ({'generation_config.json': '{"eos_token_id": "x"}'}, "eos_token_id = 'x' is no token"),
    ({'generation_config.json': '{"temperature": "hot"}'}, "generation_config.json: temperature = 'hot' is no number"),
    ({'generation_config.json': '{"top_p": 7}'}, 'generation_config.json: top_p: 7'),
    ({'generation_config.json': '{"suppress_tokens": 7}'}, 'suppress_tokens = 7 is no list'),
    ({'generation_config.json': '{"suppress_tokens": [4000]}'}, 'generation_config.json: suppress_tokens: (4000,) holds what is no id'),
], ids=['vocabulary', 'of another run', 'tokenizer', 'json', 'stop', 'stop kind', 'kind', 'range', 'no list', 'suppressed'])
def test_a_checkpoint_that_does_not_fit_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, files, message):
  folder = tiny.write(tmp_path / 'a', **files)
  monkeypatch.setattr(text.checkpoint, 'load', lambda *_, **__: pytest.fail('weights were read'))
  with pytest.raises(ValueError) as error:
    text.load(folder)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_a_config_that_names_another_first_token_than_the_tokenizer_has_is_refused(tmp_path):
  file = tiny.write(tmp_path / 'a') / 'config.json'
  fields = json.loads(file.read_text())
  for where in (fields, fields.get('text_config', fields)):
    where['bos_token_id'] = 2      # as the tokenizer
    file.write_text(json.dumps(fields))
    text.load(file.parent)
    where['bos_token_id'] = 5
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match='tokenizer.json: it begins a text with id 2 where .*config.json says bos_token_id = 5'):
      text.load(file.parent)
    del where['bos_token_id']


@pytest.mark.parametrize('name, damage', [
    ('chat_template.jinja', lambda file: file.symlink_to('blob')), ('chat_template.jinja', lambda file: file.write_bytes(b'\xff')),
    ('generation_config.json', lambda file: file.symlink_to('blob'))], ids=['template', 'template of bytes', 'settings'])
def test_a_file_that_is_there_and_cannot_be_read_is_not_left_out(tmp_path, name, damage):
  folder = tiny.write(tmp_path / 'a')
  (folder / name).unlink(missing_ok=True)
  damage(folder / name)
  with pytest.raises(ValueError, match=f'{name}: cannot be read'):
    text.load(folder)


@pytest.mark.parametrize('embedding', ['none', 'projection_only'])
def test_a_checkpoint_without_a_table_has_none_to_place_and_no_weight_is_read(tmp_path, monkeypatch, embedding):
  cfg = tiny.CFG.replace(embedding=embedding)
  save.save_orbax(cfg, transformer.init(cfg, 0), tmp_path / 'a')
  (tmp_path / 'a' / 'tokenizer.json').write_text(MODEL.tokenizer.serialized)
  monkeypatch.setattr(text.checkpoint, 'load', lambda *_, **__: pytest.fail('weights were read'))
  with pytest.raises(ValueError, match=f"model.ple_table: 'int8' needs a PLE table, which model.embedding='{embedding}' has not"):
    text.load(tmp_path / 'a', ple_table='int8')


def test_a_frozen_table_is_placed_too(tmp_path):
  cfg = tiny.CFG.replace(embedding='frozen_table')
  save.save_orbax(cfg, transformer.init(cfg, 0), tmp_path / 'a')
  (tmp_path / 'a' / 'tokenizer.json').write_text(MODEL.tokenizer.serialized)
  assert 'host' in text.load(tmp_path / 'a', ple_placement='host').params['arm']['frozen_lookup']


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path):
  (tiny.write(tmp_path / 'a') / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='no tokenizer.json'):
    text.load(tmp_path / 'a')


# What cannot be.


@pytest.mark.parametrize('change, message', [
    ({'prompt': ''}, 'prompt: empty'),
    ({'prompt': []}, 'prompt: none given'),
    ({'prompt': ['a', '']}, 'prompt: empty'),
    ({'prompt': [3]}, 'prompt: int; give text'),
    ({'prompt': 'a\udc80'}, 'half a surrogate pair'),
    ({'prompt': 'a b ' * 300}, 'context_length = 256'),
    ({'max_new_tokens': 0}, 'max_new_tokens: 0'),
    ({'max_new_tokens': 4.5}, 'max_new_tokens: 4.5'),
    ({'max_new_tokens': None}, 'max_new_tokens: None'),
    ({'max_new_tokens': 255}, 'context_length = 256'),
    ({'sampling': Sampling(temperature=-1)}, 'temperature: -1 is negative'),
    ({'sampling': Sampling(top_k=2000)}, 'top_k: 2000'),
    ({'seed': -1}, 'seed: -1'),
    ({'seed': 2**32}, 'seed: 4294967296'),
    ({'seed': [1, 2]}, 'seed: 2 for 1 rows'),
    ({'stop_strings': ['a', '']}, 'stop_strings'),
    ({'samples': 0}, 'samples: 0'),
    ({'samples': 3, 'best_of': 2}, 'best_of: 2'),
    ({'kv': 'turbo'}, "kv: 'turbo'"),
], ids=lambda value: str(value)[:40].encode('ascii', 'replace').decode())
def test_what_cannot_be_is_refused_before_anything_is_compiled(monkeypatch, change, message):
  for program in ('_prefill', '_first', '_decode'):
    monkeypatch.setattr(generate, program, lambda *_, **__: pytest.fail('something ran'))
  with pytest.raises(ValueError) as error:
    MODEL.generate(**{'prompt': 'a', 'max_new_tokens': 4, **change})
  assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('call, message', [
    (lambda: MODEL.stream('', max_new_tokens=4), 'prompt: empty'),   # at once, not with the first piece
    (lambda: MODEL.stream('a', sampling=Sampling(min_p=2.0)), 'min_p'),
    (lambda: MODEL.chat([]), 'messages'),
    (lambda: MODEL.chat(ASKED, stop_strings=['']), 'stop_strings'),
    (lambda: text.random(tiny.CFG.replace(embedding='none'), ple_placement='host'), "ple_placement: 'host' needs a PLE table"),
    (lambda: MODEL.chat_stream(ASKED, max_new_tokens=400), 'context_length = 256'),
    (lambda: MODEL.score('a', []), 'no prompts'),
    (lambda: MODEL.score('a', 'b'), 'give a list'),
    (lambda: MODEL.score('a', ['']), 'continuation: no tokens'),
    (lambda: text.Conversation(MODEL, 1000), 'context_length = 256'),
    (lambda: text.random('e3b'), "did you mean 'e"),
    (lambda: text.random(tiny.CFG.replace(vocab_size=128)), 'too small for a stand-in'),
], ids=range(12))
def test_other_calls_refuse_likewise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
