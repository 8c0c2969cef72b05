"""A corpus on disk: deduplicated, split, tokenised once into memory-mapped arrays, and known by its hash.

A cache folder is named by what it was made from (settings, and names, sizes and times of the files read) and holds
`tokenizer.json`, per split `tokens` (every document after a BOS, end to end), `offsets.npy` and `domains.npy`, and
`token_counts.npy` and `meta.json`. It is written under another name and renamed, so that what exists is whole: a
build that was killed leaves nothing, and of two builds at once one wins.
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
import uuid

from absl import logging
import numpy as np
from rich import progress as rich_progress
import rich.console

from gemma4_jax import paths
from gemma4_jax.data import sources, tokenizer as tokenizer_lib

SPLITS = ('train', 'validation')
_FORMAT = 1  # raise it when documents, splitting or the files change: old folders are then left alone
_TRAINING_BYTES = 50_000_000  # text that a tokenizer is trained on: the first documents of the train split
_CHUNK_BYTES = 2_000_000  # text that is tokenised at once


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One split. Document i is tokens[offsets[i]:offsets[i + 1]] and starts with BOS.

  Attributes:
    tokens: uint16 or uint32 [N], memory-mapped.
    offsets: int64 [documents + 1].
    document_domains: uint8 [documents], index into `domains`.
    domains: names of domains.
  """
  tokens: np.ndarray
  offsets: np.ndarray
  document_domains: np.ndarray
  domains: tuple[str, ...] = sources.DOMAINS


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Both splits with the tokenizer that made them.

  Attributes:
    corpus_hash: sha256 over the texts in order, their domains and the split settings.
    tokenizer_hash: sha256 of the tokenizer.json.
    token_counts: int64 [V], how often each id stands in the train split.
    statistics: {split: {domain: {'documents', 'bytes', 'tokens'}}}; bytes of UTF-8 text, tokens with BOS.
  """
  train: Corpus
  validation: Corpus
  tokenizer: tokenizer_lib.Tokenizer
  corpus_hash: str
  tokenizer_hash: str
  token_counts: np.ndarray
  statistics: dict


def prepare(cfg, progress: bool = True) -> Dataset:
  """Returns the dataset of a config, from the cache or built into it.

  Documents that are equal but for white space are used once. A document's own hash decides its split, so that a
  document stays in its split whatever else is read.

  Args:
    cfg: the `data` section: `source`, `path`, `text_field` (see `sources.documents`), `tokenizer` ('train' or a
      tokenizer.json), `vocab_size`, `validation_fraction`, `max_bytes` (reading stops after the document that reaches
      it; 0: all) and `cache_dir` ('': $GEMMA4_JAX_CACHE, or ~/.cache/gemma4_jax). A Hugging Face dataset is cached by
      its name alone.
    progress: shows a bar, if standard error is a terminal.
  Raises:
    ValueError: one line naming the field, the file and the remedy.
  """
  if not 0 < cfg.validation_fraction < 1:
    raise ValueError(f'data.validation_fraction={cfg.validation_fraction} must lie between 0 and 1')
  fingerprint = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources.files(cfg)]
  tokenizer = None
  if cfg.tokenizer != 'train':
    tokenizer = tokenizer_lib.Tokenizer.load(cfg.tokenizer)
    if tokenizer.vocab_size != cfg.vocab_size:
      raise ValueError(f'data.vocab_size={cfg.vocab_size}, but {cfg.tokenizer} has {tokenizer.vocab_size} entries; '
                       'set data.vocab_size and model.vocab_size to that')
  identity = [_FORMAT, cfg.source, cfg.path, cfg.text_field, tokenizer and tokenizer.hash, cfg.vocab_size,
              cfg.validation_fraction, cfg.max_bytes, cfg.source == 'stdlib' and sys.version, fingerprint]
  key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  root = pathlib.Path(cfg.cache_dir).expanduser() if cfg.cache_dir else paths.cache()
  folder = root / f'corpus-{key}'
  build = root / f'.building-{uuid.uuid4().hex}'
  try:
    if folder.exists():
      try:
        return _load(folder)
      except (OSError, ValueError, KeyError) as e:
        logging.warning('%s is damaged (%s); building it again', folder, e)
      with contextlib.suppress(FileNotFoundError):  # another process saw the damage, too
        os.rename(folder, build)
        shutil.rmtree(build)
    build.mkdir(parents=True)
    _remove_abandoned(root)
  except OSError as e:
    raise ValueError(f'data.cache_dir: cannot write {root}: {e}; set data.cache_dir or $GEMMA4_JAX_CACHE') from e
  try:
    console = rich.console.Console(stderr=True)
    with rich_progress.Progress(
        '{task.description}', rich_progress.BarColumn(), rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(), rich_progress.TimeRemainingColumn(), console=console, transient=True,
        disable=not (progress and console.is_terminal)) as bar:
      _build(cfg, tokenizer, build, bar)
    dataset = _load(build)  # mapped before the rename, so that no other process can come between
    try:
      os.rename(build, folder)
    except OSError:
      if not folder.exists():  # else another process was faster, with the same content
        raise
    return dataset
  finally:
    shutil.rmtree(build, ignore_errors=True)


def _build(cfg, tokenizer, folder: pathlib.Path, bar: rich_progress.Progress) -> None:
  """Fills `folder`. Memory holds the tokenizer's training text or a chunk, and a few numbers a document."""
  corpus_hash, lengths, domains = _read(cfg, folder, bar)
  if tokenizer is None:
    task = bar.add_task('training the tokenizer', total=None)
    texts, size = [], 0
    for _, text in _texts(folder / 'train.text', lengths['train']):
      if size >= _TRAINING_BYTES:
        break
      texts.append(text)
      size += len(text)
    tokenizer = tokenizer_lib.Tokenizer.train(texts, cfg.vocab_size)
    bar.remove_task(task)
  (folder / 'tokenizer.json').write_text(tokenizer.serialized, encoding='utf-8')
  statistics = {}
  for split in SPLITS:
    counts, tokens = _tokenise(tokenizer, folder, split, lengths[split], bar)
    if split == 'train':
      np.save(folder / 'token_counts.npy', counts)
    names = np.frombuffer(domains[split], np.uint8)
    np.save(folder / f'{split}.domains.npy', names)
    np.save(folder / f'{split}.offsets.npy', np.concatenate([[0], np.cumsum(tokens)]))
    statistics[split] = {
        domain: {'documents': int(np.sum(names == i)),
                 'bytes': int(np.sum(np.asarray(lengths[split])[names == i])),
                 'tokens': int(np.sum(tokens[names == i]))}
        for i, domain in enumerate(sources.DOMAINS) if np.any(names == i)}
    (folder / f'{split}.text').unlink()
  meta = {'corpus_hash': corpus_hash, 'tokenizer_hash': tokenizer.hash, 'domains': sources.DOMAINS,
          'statistics': statistics, 'files': {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}
  (folder / 'meta.json').write_text(json.dumps(meta, indent=2), encoding='utf-8')


def _read(cfg, folder: pathlib.Path, bar: rich_progress.Progress):
  """Copies unique documents to `<split>.text`; returns the corpus hash, and lengths and domains of documents."""
  task = bar.add_task('reading the corpus', total=cfg.max_bytes or None)
  corpus_hash = hashlib.sha256(json.dumps([_FORMAT, cfg.validation_fraction]).encode())
  seen = set()
  lengths = {split: array.array('q') for split in SPLITS}
  domains = {split: bytearray() for split in SPLITS}
  total = 0
  with open(folder / 'train.text', 'wb') as train, open(folder / 'validation.text', 'wb') as validation:
    out = {'train': train, 'validation': validation}
    for document in sources.documents(cfg):
      try:
        text = document.text.encode()
      except UnicodeEncodeError as e:
        raise ValueError(f'data.path: {document.origin} holds half a surrogate pair, which is no text: {e}') from e
      words = ' '.join(document.text.split()).encode()
      digest = hashlib.sha256(words).digest()
      if not words or digest in seen:
        continue
      seen.add(digest)
      is_validation = int.from_bytes(digest[:8]) < cfg.validation_fraction * 2**64
      split = 'validation' if is_validation else 'train'
      out[split].write(text)
      lengths[split].append(len(text))
      domains[split].append(sources.DOMAINS.index(document.domain))
      corpus_hash.update(f'{document.domain} '.encode() + hashlib.sha256(text).digest())
      total += len(text)
      bar.update(task, completed=total)
      if cfg.max_bytes and total >= cfg.max_bytes:
        break
  bar.remove_task(task)
  if not seen:
    raise ValueError(f'data.path={cfg.path!r}: no text in any of its documents')
  for split in SPLITS:
    if not lengths[split]:
      raise ValueError(f'the {split} split is empty: data.validation_fraction={cfg.validation_fraction} of {len(seen)} '
                       'different documents; change it, or give more or smaller documents')
  return corpus_hash.hexdigest(), lengths, domains


def _texts(path: pathlib.Path, lengths):
  """Yields (length in bytes, text) of every document in a `<split>.text`."""
  with open(path, 'rb') as f:
    for length in lengths:
      yield length, f.read(length).decode()


def _tokenise(tokenizer, folder: pathlib.Path, split: str, lengths, bar: rich_progress.Progress):
  """Writes `<split>.tokens`; returns how often each id occurs [V] and the tokens of each document."""
  task = bar.add_task(f'tokenising the {split} split', total=sum(lengths))
  counts = np.zeros(tokenizer.vocab_size, np.int64)
  tokens = []
  bos = np.array([tokenizer.bos_id], np.int32)
  with open(folder / f'{split}.tokens', 'wb') as out:

    def write(chunk):
      for (length, text), ids in zip(chunk, tokenizer.encode_batch([text for _, text in chunk])):
        if tokenizer.token_bytes[ids].sum() != length:
          raise ValueError(f'data.tokenizer: {length} bytes of text give tokens of {tokenizer.token_bytes[ids].sum()} '
                           f'bytes, so that bits per byte would be wrong; the text begins {text[:40]!r}')
        ids = np.concatenate([bos, ids])
        tokens.append(len(ids))
        np.add.at(counts, ids, 1)
        out.write(ids.astype(_token_dtype(tokenizer)).tobytes())
        bar.advance(task, length)

    chunk, size = [], 0
    for item in _texts(folder / f'{split}.text', lengths):
      chunk.append(item)
      size += item[0]
      if size >= _CHUNK_BYTES:
        write(chunk)
        chunk, size = [], 0
    write(chunk)
  bar.remove_task(task)
  return counts, np.array(tokens, np.int64)


def _token_dtype(tokenizer) -> type:
  return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _load(folder: pathlib.Path) -> Dataset:
  """Maps a finished folder. Raises OSError, ValueError or KeyError if it is not whole."""
  meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
  for name, size in meta['files'].items():
    if (folder / name).stat().st_size != size:
      raise ValueError(f'{name} has {(folder / name).stat().st_size} bytes instead of {size}')
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer.json')
  if tokenizer.hash != meta['tokenizer_hash']:
    raise ValueError('tokenizer.json has another hash than meta.json says')
  corpora = {
      split: Corpus(tokens=np.memmap(folder / f'{split}.tokens', _token_dtype(tokenizer), mode='r'),
                    offsets=np.load(folder / f'{split}.offsets.npy'),
                    document_domains=np.load(folder / f'{split}.domains.npy'),
                    domains=tuple(meta['domains']))
      for split in SPLITS}
  return Dataset(**corpora, tokenizer=tokenizer, corpus_hash=meta['corpus_hash'], tokenizer_hash=tokenizer.hash,
                 token_counts=np.load(folder / 'token_counts.npy'), statistics=meta['statistics'])


def _remove_abandoned(root: pathlib.Path) -> None:
  """Removes what builds left that were killed; a week lies beyond any build that still runs."""
  for path in root.glob('.building-*'):
    if path.stat().st_mtime < time.time() - 7 * 86400:
      shutil.rmtree(path, ignore_errors=True)
