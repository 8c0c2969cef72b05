"""What a checkpoint's directory says of it."""

import json

import pytest

from configs import base
from gemma4_jax.checkpoint import source
from gemma4_jax.data import corpus
from gemma4_jax.data.tokenizer import Tokenizer
from gemma4_jax.evaluation import checkpoint


@pytest.mark.parametrize('name, content, sign', [
    ('chat_template.jinja', 'x', 'chat_template.jinja'),
    ('chat_template.json', '{}', 'chat_template.json'),
    ('tokenizer_config.json', '{"chat_template": "x"}', 'chat_template in tokenizer_config.json'),
    ('tokenizer_config.json', '{}', ''),
    ('generation_config.json', '{"eos_token_id": [1, 106]}', 'eos_token_id 106 (<turn|>) in generation_config.json'),
    ('generation_config.json', '{"eos_token_id": 1}', ''),
    ('config.json', '{}', '')], ids=str)
def test_signs_of_a_checkpoint_that_was_taught_to_chat(tmp_path, name, content, sign):
  (tmp_path / name).write_text(content)
  assert checkpoint.why_instruct(tmp_path) == sign


@pytest.mark.parametrize('name, sign', [
    ('gemma-4-E2B-it', 'its name'), ('gemma4_e2b_it_orbax', 'its name'), ('gemma-4-E2B', ''), ('fix_it', '')])
def test_weights_alone_are_known_by_their_name(tmp_path, name, sign):
  (tmp_path / name).mkdir()
  assert checkpoint.why_instruct(tmp_path / name) == sign


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A run's folder on a little text, without its weights."""
  (tmp_path / 'text').mkdir()
  for i in range(40):
    (tmp_path / f'text/{i}.txt').write_text(' '.join(f'word{i * j % 97} of text number {i + j}' for j in range(40)))
  config = base.get_config('e2b-toy')
  config.data.update({'source': 'text', 'path': str(tmp_path / 'text/*.txt'), 'vocab_size': 290, 'validation_fraction': 0.3,
                      'cache_dir': str(tmp_path / 'cache')})
  (tmp_path / 'config.json').write_text(config.to_json())
  monkeypatch.setattr(checkpoint.load, 'find', lambda path: source.Source('a run', tmp_path, tmp_path, None, (), None))
  return tmp_path, corpus.prepare(config.data)


def test_the_corpus_of_a_run_is_prepared_again(run):
  folder, data = run
  again = checkpoint.run_corpus(folder, data.tokenizer)
  assert again.corpus_hash == data.corpus_hash and again.tokenizer_hash == data.tokenizer.hash


def test_a_corpus_that_comes_out_with_another_tokenizer_is_refused(run):
  folder, _ = run
  with pytest.raises(ValueError, match="is not what data.source='text' gives here"):
    checkpoint.run_corpus(folder, Tokenizer.stand_in())


def test_a_directory_that_is_no_runs_has_no_corpus(run):
  folder, data = run
  (folder / 'config.json').write_text(json.dumps({'hidden_size': 3}))
  assert checkpoint.run_corpus(folder, data.tokenizer) is None
