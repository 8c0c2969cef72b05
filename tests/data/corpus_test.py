"""A corpus is built once, whole or not at all, and is what its hash says."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers

from gemma4_jax.data import batching, corpus, sources
from gemma4_jax.data.tokenizer import CONTROL_TOKENS, Tokenizer

ROOT = pathlib.Path(__file__).parents[2]
WORDS = 'the window of a layer attends to tokens before it while global layers see all naïve'.split()


def write_texts(folder, count=60):
  """Documents that all differ; returns their texts."""
  folder.mkdir(parents=True, exist_ok=True)
  texts = [f'{i}\n ' + ' '.join(random.Random(i).choices(WORDS, k=20 + i)) for i in range(count)]
  for i, text in enumerate(texts):
    (folder / f'{i:03}.txt').write_text(text, encoding='utf-8')
  return texts


def config(folder, **overrides):
  return ml_collections.ConfigDict({
      'source': 'text', 'path': str(folder / 'texts/*.txt'), 'text_field': 'text', 'tokenizer': 'train', 'vocab_size': 300,
      'validation_fraction': 0.25, 'max_bytes': 0, 'cache_dir': str(folder / 'cache'), **overrides})


def texts_of(dataset, split):
  c = getattr(dataset, split)
  assert all(c.tokens[begin] == dataset.tokenizer.bos_id for begin in c.offsets[:-1])
  return [dataset.tokenizer.decode(c.tokens[a + 1:b]) for a, b in zip(c.offsets, c.offsets[1:])]


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """A folder with texts, its config, the texts, and the dataset."""
  folder = tmp_path_factory.mktemp('corpus')
  texts = write_texts(folder / 'texts')
  return folder, texts, corpus.prepare(config(folder))


def test_every_document_is_in_one_split_and_decodes_to_its_text(built):
  _, texts, dataset = built
  train, validation = texts_of(dataset, 'train'), texts_of(dataset, 'validation')
  assert sorted(train + validation) == sorted(texts)
  assert 5 <= len(validation) <= 25  # a quarter of 60


def test_counts_and_statistics_are_those_of_the_arrays(built):
  _, _, dataset = built
  np.testing.assert_array_equal(dataset.token_counts, np.bincount(dataset.train.tokens, minlength=300))
  for split in corpus.SPLITS:
    texts = texts_of(dataset, split)
    assert dataset.statistics[split] == {'text': {
        'documents': len(texts), 'bytes': sum(len(t.encode()) for t in texts), 'tokens': len(getattr(dataset, split).tokens)}}


def test_evaluation_weighs_every_byte_of_the_validation_split_once(built):
  _, _, dataset = built
  batches = batching.eval_batches(dataset.validation, sequence_length=16, batch_size=4)
  size = sum((dataset.tokenizer.token_bytes[b['targets']] * b['weights']).sum() for b in batches)
  assert size == dataset.statistics['validation']['text']['bytes']


def test_the_tokenizer_is_trained_on_the_train_split_alone(built):
  _, _, dataset = built
  assert Tokenizer.train(texts_of(dataset, 'train'), 300).hash == dataset.tokenizer_hash == dataset.tokenizer.hash


def test_a_second_call_reads_the_cache_and_no_document(built, monkeypatch):
  folder, _, dataset = built
  monkeypatch.setattr(sources, 'documents', lambda cfg: pytest.fail('read again'))
  again = corpus.prepare(config(folder))
  assert (again.corpus_hash, again.tokenizer_hash) == (dataset.corpus_hash, dataset.tokenizer_hash)
  np.testing.assert_array_equal(again.train.tokens, dataset.train.tokens)
  assert isinstance(again.train.tokens, np.memmap) and again.train.tokens.dtype == np.uint16


def test_documents_equal_but_for_white_space_are_used_once(built, tmp_path):
  _, texts, dataset = built
  write_texts(tmp_path / 'texts')
  for i, text in enumerate(texts):
    (tmp_path / f'texts/z{i}.txt').write_text(f'\n {text.replace(" ", "  ")}\n', encoding='utf-8')
  (tmp_path / 'texts/empty.txt').write_text(' \n')
  again = corpus.prepare(config(tmp_path))
  assert again.corpus_hash == dataset.corpus_hash


def test_a_document_stays_in_its_split_whatever_else_is_read(built, tmp_path):
  _, texts, dataset = built
  (tmp_path / 'texts').mkdir()
  for i, text in enumerate(reversed(texts[:40])):
    (tmp_path / f'texts/{i:03}.txt').write_text(text, encoding='utf-8')
  fewer = corpus.prepare(config(tmp_path, vocab_size=280))
  assert set(texts_of(fewer, 'validation')) == set(texts_of(dataset, 'validation')) & set(texts[:40])


def test_the_corpus_hash_covers_texts_and_splits_and_nothing_of_where_they_lie(built, tmp_path):
  _, _, dataset = built
  write_texts(tmp_path / 'texts')
  same = corpus.prepare(config(tmp_path))
  other_split = corpus.prepare(config(tmp_path, validation_fraction=0.24))
  other_vocabulary = corpus.prepare(config(tmp_path, vocab_size=290))
  (tmp_path / 'texts/000.txt').write_text('another text')
  other_text = corpus.prepare(config(tmp_path))
  assert same.corpus_hash == other_vocabulary.corpus_hash == dataset.corpus_hash
  assert len({dataset.corpus_hash, other_split.corpus_hash, other_text.corpus_hash}) == 3
  assert other_vocabulary.tokenizer_hash != dataset.tokenizer_hash


def test_the_corpus_hash_covers_domains(tmp_path, monkeypatch):
  hashes = set()
  for domain in sources.DOMAINS:
    documents = [sources.Document(text, domain, '') for text in write_texts(tmp_path / 'texts')]
    monkeypatch.setattr(sources, 'documents', lambda cfg, documents=documents: documents)
    hashes.add(corpus.prepare(config(tmp_path, cache_dir=str(tmp_path / domain))).corpus_hash)
  assert len(hashes) == len(sources.DOMAINS)


def test_max_bytes_stops_after_the_document_that_reaches_it(tmp_path):
  texts = write_texts(tmp_path / 'texts')
  dataset = corpus.prepare(config(tmp_path, max_bytes=sum(len(t.encode()) for t in texts[:29]) + 1, vocab_size=280))
  assert sum(dataset.statistics[s]['text']['documents'] for s in corpus.SPLITS) == 30


@pytest.mark.parametrize('name', ['train.tokens', 'validation.offsets.npy', 'meta.json', 'tokenizer.json'])
@pytest.mark.parametrize('damage', ['truncated', 'missing'])
def test_a_damaged_cache_is_noticed_and_built_again(name, damage, tmp_path, built):
  write_texts(tmp_path / 'texts')
  corpus.prepare(config(tmp_path))
  path, = (tmp_path / 'cache').glob(f'corpus-*/{name}')
  whole = path.stat().st_size
  if damage == 'truncated':
    os.truncate(path, whole // 2)
  else:
    path.unlink()
  again = corpus.prepare(config(tmp_path))
  assert again.corpus_hash == built[2].corpus_hash
  assert path.stat().st_size == whole
  assert len(list((tmp_path / 'cache').iterdir())) == 1


def script(folder, before=''):
  """A child process that prepares the config of `folder` and prints both hashes."""
  code = (f'import sys, os; sys.path[:0] = [{str(ROOT)!r}, {str(pathlib.Path(__file__).parent)!r}]\n'
          'import pathlib, corpus_test\nfrom gemma4_jax.data import corpus, tokenizer\n'
          f'{before}\nd = corpus.prepare(corpus_test.config(pathlib.Path({str(folder)!r})))\nprint(d.corpus_hash, d.tokenizer_hash)')
  return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_corpus(tmp_path, built):
  write_texts(tmp_path / 'texts')
  kill = script(tmp_path, 'tokenizer.Tokenizer.encode_batch = lambda *a: os.kill(os.getpid(), 9)')
  kill.communicate(timeout=60)
  assert kill.returncode == -signal.SIGKILL
  left, = (tmp_path / 'cache').iterdir()
  assert (left / 'train.text').exists()
  os.utime(left, (0, 0))  # a week ago
  assert corpus.prepare(config(tmp_path)).corpus_hash == built[2].corpus_hash
  assert [path.name[:7] for path in (tmp_path / 'cache').iterdir()] == ['corpus-']


def test_a_failed_build_removes_what_it_wrote(tmp_path, monkeypatch):
  write_texts(tmp_path / 'texts')

  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(Tokenizer, 'encode_batch', interrupt)
  with pytest.raises(KeyboardInterrupt):
    corpus.prepare(config(tmp_path))
  assert not list((tmp_path / 'cache').iterdir())


def test_two_processes_that_build_at_once_agree(tmp_path, built):
  write_texts(tmp_path / 'texts')
  # Each waits, when it has built, until the other has.
  wait = ('import time\nrename = os.rename\n'
          'def late(a, b):\n'
          '  (pathlib.Path(a).parent.parent / f"ready{os.getpid()}").touch()\n'
          '  while len(list(pathlib.Path(a).parent.parent.glob("ready*"))) < 2: time.sleep(0.01)\n'
          '  rename(a, b)\n'
          'os.rename = late')
  children = [script(tmp_path, wait) for _ in range(2)]
  outputs = [child.communicate(timeout=60) for child in children]
  expected = f'{built[2].corpus_hash} {built[2].tokenizer_hash}'
  assert [out.strip() for out, _ in outputs] == [expected] * 2, outputs
  assert len(list((tmp_path / 'cache').iterdir())) == 1 and len(list(tmp_path.glob('ready*'))) == 2


def test_a_given_tokenizer_is_used_and_large_vocabularies_take_four_bytes_an_id(tmp_path):
  write_texts(tmp_path / 'texts')
  vocab = {t: i for i, t in enumerate([*CONTROL_TOKENS, *(f'<0x{b:02X}>' for b in range(256)), *(f'x{i}' for i in range(70000))])}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token='<unk>'))
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  cfg = config(tmp_path, tokenizer=str(tmp_path / 'tokenizer.json'), vocab_size=len(vocab))
  dataset = corpus.prepare(cfg)
  assert dataset.train.tokens.dtype == np.uint32
  assert dataset.tokenizer.vocab_size == len(dataset.token_counts) == len(vocab)
  with pytest.raises(ValueError, match='data.vocab_size=300, but .*tokenizer.json has 70261 entries'):
    corpus.prepare(config(tmp_path, tokenizer=cfg.tokenizer))


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path, built):
  write_texts(tmp_path / 'texts')
  tokenizer = tokenizers.Tokenizer.from_str(built[2].tokenizer.serialized)
  tokenizer.normalizer = normalizers.Sequence([normalizers.Replace('o', 'oo'), normalizers.Replace(' ', '\u2581')])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ValueError, match='bits per byte would be wrong'):
    corpus.prepare(config(tmp_path, tokenizer=str(tmp_path / 'tokenizer.json')))


@pytest.mark.parametrize('overrides, message', [
    ({'validation_fraction': 0.0}, 'data.validation_fraction=0.0 must lie between 0 and 1'),
    ({'validation_fraction': 1e-9}, 'the validation split is empty: data.validation_fraction=1e-09 of 60 different documents'),
    ({'path': '/nowhere/*'}, "data.path='/nowhere/[*]' matches no file"),
    ({'tokenizer': '/nowhere/tokenizer.json'}, 'data.tokenizer: cannot use /nowhere/tokenizer.json'),
    ({'vocab_size': 100}, 'data.vocab_size=100 is too small'),
])
def test_what_cannot_become_a_corpus_is_said_in_one_line(overrides, message, tmp_path):
  write_texts(tmp_path / 'texts')
  with pytest.raises(ValueError, match=message) as e:
    corpus.prepare(config(tmp_path, **overrides))
  assert '\n' not in str(e.value)


def test_files_without_text_are_named(tmp_path):
  (tmp_path / 'a.txt').write_text(' \n')
  (tmp_path / 'b.txt').write_text('')
  with pytest.raises(ValueError, match=r"data.path='.*/\*.txt': no text in any of its documents"):
    corpus.prepare(config(tmp_path, source='text', path=f'{tmp_path}/*.txt'))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
  write_texts(tmp_path / 'texts')
  def read_bytes(self):
    raise PermissionError(13, 'Permission denied', str(self))
  monkeypatch.setattr(pathlib.Path, 'read_bytes', read_bytes)   # the superuser may read anything
  with pytest.raises(ValueError, match='data.path: cannot read .*Permission denied') as e:
    corpus.prepare(config(tmp_path))
  assert '\n' not in str(e.value)


def test_half_a_surrogate_pair_is_named_with_its_place(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
  with pytest.raises(ValueError, match='a.jsonl:2 holds half a surrogate pair'):
    corpus.prepare(config(tmp_path, source='jsonl', path=str(path)))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
  write_texts(tmp_path / 'texts')
  (tmp_path / 'cache').write_text('a file, no folder')
  with pytest.raises(ValueError, match='data.cache_dir: cannot write .*cache: .*GEMMA4_JAX_CACHE'):
    corpus.prepare(config(tmp_path))


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
  write_texts(tmp_path / 'texts')
  monkeypatch.setenv('GEMMA4_JAX_CACHE', str(tmp_path / 'elsewhere'))
  corpus.prepare(config(tmp_path, cache_dir=''))
  meta, = (tmp_path / 'elsewhere').glob('corpus-*/meta.json')
  assert json.loads(meta.read_text())['statistics']


def test_nothing_is_printed_when_nobody_watches(tmp_path, capfd):
  write_texts(tmp_path / 'texts')
  corpus.prepare(config(tmp_path))
  assert capfd.readouterr() == ('', '')
