"""The command that evaluates: its numbers, its protocol, and what it refuses."""

import json
import math
import sys

import jax
import numpy as np
import pytest

from gemma4_jax.checkpoint import save
from gemma4_jax.cli import evaluate
from gemma4_jax.model import transformer
from gemma4_jax.sampling import generate
from tests import tiny

TEXTS = ['def width(self):\n  return 3 * 4 + 5 # how wide it is, in letters: 17', 'A short text. ' * 9]
TALK = [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'Because.'}]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """Checkpoints `chat` and `base` (the same weights), `other`, and texts."""
  folder = tmp_path_factory.mktemp('evaluate')
  tiny.write(folder / 'chat')
  tiny.write(folder / 'base', **{'generation_config.json': '{}'})
  tiny.write(folder / 'another_tokenizer', **{'generation_config.json': '{}', 'tokenizer.json': tiny.model().tokenizer.serialized + ' '})
  save.save_hf(tiny.CFG, transformer.init(tiny.CFG, 1), folder / 'other', source=folder / 'base')
  save.save_hf(tiny.CFG, jax.tree.map(lambda x: x * np.nan, tiny.model().params), folder / 'broken', source=folder / 'base')
  for i, text in enumerate(TEXTS):
    (folder / f'{i}.txt').write_text(text)
  (folder / 'chats.jsonl').write_text(json.dumps({'messages': TALK}))
  return folder


def run(home, *flags, checkpoint='base', data='*.txt'):
  out = home / 'out.json'
  evaluate.main([f'--checkpoint={home / checkpoint}', '--task=perplexity', f'--data={home / data}', f'--out={out}', *flags])
  return json.loads(out.read_text())


def expected(texts):
  """(nats, tokens) of each text, run whole."""
  return [(-float(score.sum()), len(score)) for score in (tiny.model().score('', [text])[0] for text in texts)]


def test_perplexity_is_over_all_tokens_after_bos_with_its_protocol(home, capsys):
  result = run(home, '--window=256')
  (a, n), (b, m) = expected(TEXTS)
  found = result['metrics']['all']
  assert (found['tokens'], found['bytes']) == (n + m, sum(len(text) for text in TEXTS))
  assert found['nats_per_token'] == pytest.approx((a + b) / (n + m), rel=1e-5)
  assert found['perplexity'] == pytest.approx(math.exp((a + b) / (n + m)), rel=1e-5)
  assert found['bits_per_byte'] == pytest.approx((a + b) / math.log(2) / found['bytes'], rel=1e-5)
  assert [row['nats'] for row in result['documents']] == pytest.approx([a, b], rel=1e-5)
  protocol = result['protocol']
  assert (protocol['documents'], protocol['tokens'], protocol['window'], protocol['stride']) == (2, n + m, 256, 128)
  said = capsys.readouterr().out
  assert f'{found["bits_per_byte"]:.4f}' in said and 'stride: 128' in said and 'BOS: begins every window, and is never predicted' in said


def test_a_window_has_only_what_is_in_it_as_context(home):
  result = run(home, '--window=16', '--stride=8', '--max_documents=1')
  model, ids = tiny.model(), tiny.model().tokenizer.encode(TEXTS[0])
  bos, end = model.tokenizer.bos_id, 15
  windows = [([bos], ids[:15])]
  while end < len(ids):
    new = min(8, len(ids) - end)
    end += new
    windows.append(([bos, *ids[end - 15:end - new]], ids[end - new:end]))
  nats = -sum(float(score.sum()) for score in generate.score(model.cfg, model.params, *zip(*windows)))
  assert len(windows) > 1 and result['documents'][0]['nats'] == pytest.approx(nats, rel=1e-5)


def test_raw_text_is_not_scored_under_a_checkpoint_that_was_taught_to_chat(home):
  with pytest.raises(SystemExit) as stop:
    run(home, checkpoint='chat')
  assert all(way in stop.value.code for way in ('--reply_only', '--reference', '--raw_text_anyway')) and '\n' not in stop.value.code
  assert run(home, '--raw_text_anyway', checkpoint='chat')['metrics'] == run(home)['metrics']


def test_replies_are_scored_in_the_chat_frame(home):
  result = run(home, '--reply_only', checkpoint='chat', data='chats.jsonl')
  model = tiny.model()
  reply = np.append(model.tokenizer.encode(TALK[1]['content']), 106)
  score, = generate.score(model.cfg, model.params, [model.encode_chat(TALK[:1])], [reply])
  assert result['documents'][0]['nats'] == pytest.approx(-score.sum(), rel=1e-5)
  assert result['metrics']['all']['tokens'] == len(reply) and result['protocol']['scored'].startswith('replies in the chat frame')


def test_a_reference_gives_the_divergence_and_no_perplexity_of_raw_text_to_what_was_taught_to_chat(home):
  same = run(home, f'--reference={home / "base"}', checkpoint='chat')['metrics']['all']
  assert same['kl_nats_per_token'] == pytest.approx(0, abs=1e-5) and same['same_top_token'] == 1 and 'perplexity' not in same
  other = run(home, f'--reference={home / "other"}')
  found = other['metrics']['all']
  assert found['kl_nats_per_token'] > 0.01 and found['same_top_token'] < 1
  assert found['nats_per_token'] == pytest.approx(run(home)['metrics']['all']['nats_per_token'], rel=1e-5)
  assert sum(row['reference_nats'] for row in other['documents']) == pytest.approx(
      sum(row['nats'] for row in run(home, checkpoint='other')['documents']), rel=1e-5)


@pytest.mark.parametrize('flags, said', [
    (['--window=1'], 'window=1'), (['--stride=1024'], 'stride=1024'),
    (['--window=512'], '--window=512 is more than model.context_length = 256'),
    (['--data=HOME/*.none'], 'matches no file'), (['--data=validation'], 'is no folder of a run'), (['--max_documents=-1'], 'is negative'),
    (['--reference=HOME/nowhere'], 'nowhere: no such directory'), (['--reference=HOME/another_tokenizer'], 'has another tokenizer'),
    (['--out=HOME/no/out.json'], 'no such directory'), (['--task=glue'], '--task=glue: give one of perplexity'),
    (['--task=lm_eval'], '--task=lm_eval: give one of'), (['--batch_tokens=0'], '--batch_tokens=0 is not positive'),
    (['--task=associative'], '--data: is not of --task=associative; it is of perplexity, needle'),
    (['--task=needle', '--trials=0'], '--trials=0'), (['--task=lm_eval:x', '--window=8'], '--data: is not of --task=lm_eval'),
    (['--trials=3'], '--trials: is not of --task=perplexity'), (['--out=HOME'], 'is a directory or a device'),
    (['--reply_only', '--window=16'], '--reply_only: takes conversations as --data, and runs each whole'),
    (['--reply_only', '--data=validation'], '--reply_only: takes conversations'),
    (['--widow=3'], 'unrecognized argument'), (['--checkpoint=HOME/broken'], 'log-probabilities that are not finite'),
    (['--reply_only'], 'no conversation'), (['--checkpoint=HOME/nowhere'], 'no such directory')], ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_one_line(home, flags, said):
  (home / 'empty.jsonl').write_text('')
  data = 'empty.jsonl' if flags[0] == '--reply_only' else '*.txt'
  with pytest.raises(SystemExit) as stop:
    run(home, *(flag.replace('HOME', str(home)) for flag in flags), data=data)
  assert said in stop.value.code and '\n' not in stop.value.code and stop.value.code.startswith('error: ')


@pytest.mark.slow
def test_recall_is_measured_against_its_chance(home, capsys):
  evaluate.main([f'--checkpoint={home / "base"}', '--task=associative', '--lengths=4,8', '--trials=3'])
  said = capsys.readouterr().out
  assert '4 pairs' in said and '8 pairs' in said and '0.2500' in said and '0.1250' in said and 'right: the likeliest of the answers' in said


def test_lm_eval_that_is_not_there_is_one_line_with_its_extra(home, monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.delitem(sys.modules, 'gemma4_jax.evaluation.harness', raising=False)
  monkeypatch.delattr('gemma4_jax.evaluation.harness', raising=False)
  with pytest.raises(SystemExit) as stop:
    evaluate.main([f'--checkpoint={home / "base"}', '--task=lm_eval:arc_easy'])
  assert "pip install 'gemma4_jax[lm_eval]'" in stop.value.code and '\n' not in stop.value.code
