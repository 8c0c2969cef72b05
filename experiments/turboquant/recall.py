r"""Does a model that finds in its context what it was told still find it in quantized keys and values?

  python -m experiments.turboquant.recall --workdir=runs/recall [--models=e2b-toy,31b-toy] [--seeds=2] [--steps=2500] [--out=DIR]

Trains a toy of each shape on documents of 256 tokens that this file writes: English of the standard library in which facts are told, lines
of a key and a value, and asked again, always further back than the window of 8 tokens that local layers see:

  .. is raised if the argument
  bado kime
  is not a file or a directory ..

There are 4 keys, each with 16 values of its own; all are invented words, one token each. In new documents, of English that was not
trained on, one fact (a needle) or four are told, and asked once, at the end, 64 tokens after the last was told or more. An answer is right
if the value is the likeliest token of all; who knows which values a key may have, and no more, is right once in 16 times.
  methods   every layer's keys and values are quantized and decoded, in one pass: all tokens, also the newest
  presets   the caches that `kv=` names, fed 16 tokens at a time, with what they keep exact
Everything is paired with the same model's exact numbers, document by document. A training that was killed goes on where it stopped.
Writes recall.json, recall.md and recall.png to DIR, by default beside this file.
"""

from collections.abc import Mapping, Sequence
import functools
import itertools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from experiments import figures, report, statistics
from experiments.turboquant import caches, toys
from gemma4_jax import metrics
from gemma4_jax.data import sources, tokenizer as tokenizer_lib
from gemma4_jax.model import quantized_cache
from gemma4_jax.sampling import text

LENGTH, FACTS, GAP = 256, (1, 4), 64             # tokens of a document; facts told in it; tokens between the last and the first question
WINDOW = 8                                       # of local layers
_BATCH, _VOCAB = 4, 1024                         # documents a step; entries of the tokenizer
_KEYS, _VALUES = FACTS[-1], 16                   # there are; and values that each may have
_SCALE = 1 / 8                                   # of attention logits; with 1, as released, attention starts on single tokens by chance
METHODS = ('turboquant2', 'turboquant3', 'turboquant4', 'turboquant6', 'prod2', 'prod3', 'prod4', 'int2_minmax', 'int3_minmax',
           'int4_minmax', 'int4', 'q4_0', 'int8')


class Words(NamedTuple):
  """Token ids that documents are put together from.

  Attributes:
    english: of every word with the space before it, in the order of the text; those that are trained on, and the others.
    fill: words of one token.
    keys, values: int, one token each; a key begins a line, a value follows its key.
    line: the line break.
    bos: begins every document.
  """
  english: dict[str, list[tuple[int, ...]]]
  fill: list[int]
  keys: np.ndarray
  values: np.ndarray
  line: int
  bos: int


@functools.cache
def english() -> dict[str, list[str]]:
  """{'train', 'validation'}: the words of the standard library's English; every twentieth text is for validation."""
  texts = [document.text for document in sources.documents(base.get_config().data) if document.domain == 'english']
  words = lambda which: list(itertools.chain.from_iterable(one.split() for i, one in enumerate(texts) if (i % 20 == 0) == which))
  return {'train': words(False), 'validation': words(True)}


@functools.cache
def names() -> tuple[list[str], list[str]]:
  """Keys and values: words of four letters that the English has not."""
  syllables = [a + b for a in 'bdfgklmnprstvz' for b in 'aeiou']
  had = {word for words in english().values() for word in words}
  free = [a + b for a in syllables for b in syllables if a + b not in had]
  chosen = np.random.default_rng(0).choice(free, _KEYS * (1 + _VALUES), replace=False).tolist()
  return chosen[:_KEYS], chosen[_KEYS:]


def train_tokenizer() -> tokenizer_lib.Tokenizer:
  keys, values = names()
  rng, told = np.random.default_rng(0), 1000 * len(values)    # each name often enough to become a token of its own
  lines = [f'{key} {value}' for key, value in zip(rng.choice(keys, told), rng.choice(values, told))]
  return tokenizer_lib.Tokenizer.train([' '.join(english()['train']), '\n'.join(lines)], _VOCAB)


def words(tokenizer: tokenizer_lib.Tokenizer) -> Words:
  """Raises ValueError: a key, a value or a line break is more than one token."""
  keys, values = names()
  ids = {}

  def of(texts: Sequence[str]) -> list[tuple[int, ...]]:
    new = sorted(set(texts) - ids.keys())
    ids.update(zip(new, (tuple(found.tolist()) for found in tokenizer.encode_batch(new))))
    return [ids[one] for one in texts]

  single = lambda texts: np.concatenate(of(texts))
  found = Words({split: [one for one in of([f' {word}' for word in all_of]) if len(one) <= WINDOW] for split, all_of in english().items()},
                [], single(keys),
                single([f' {value}' for value in values]), int(single(['\n'])[0]), tokenizer.bos_id)
  if len(found.keys) != len(keys) or len(found.values) != len(values) or len(of(['\n'])[0]) != 1:
    raise ValueError('the tokenizer cuts a key, a value or a line break in two')
  return found._replace(fill=sorted({one[0] for one in found.english['train'] if len(one) == 1}))


def _told(made_of: Words, facts: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
  keys, values = rng.permutation(_KEYS)[:facts], rng.integers(_VALUES, size=facts)
  return [(made_of.line, int(made_of.keys[key]), int(made_of.values[_VALUES * key + value])) for key, value in zip(keys, values)]


class _Supply:
  """English from a random place on."""

  def __init__(self, words: Sequence[tuple[int, ...]], rng: np.random.Generator):
    self._words = itertools.islice(itertools.cycle(words), int(rng.integers(len(words))), None)
    self._after = next(self._words)

  def next(self, room: int) -> list[tuple[int, ...]]:
    """The next words that fit into so many tokens."""
    taken = []
    while (room := room - len(self._after)) >= 0:
      taken.append(self._after)
      self._after = next(self._words)
    return taken

  def take(self, room: int) -> list[int]:
    """Their tokens."""
    return list(itertools.chain.from_iterable(self.next(room)))


def document(made_of: Words, split: str, facts: int, rng: np.random.Generator) -> np.ndarray:
  """int32 [LENGTH], BOS included, of `split`'s English. The questions are its last 3 * facts tokens: line break, key, value."""
  lines = _told(made_of, facts, rng)
  words = _Supply(made_of.english[split], rng)
  head = words.next(LENGTH - 1 - GAP - 7 * facts)      # of a fact: three tokens told, a line break after it, three tokens asked
  told, ids = sorted(rng.integers(0, len(head) + 1, facts).tolist()), [made_of.bos]
  for place, word in enumerate([*head, None]):
    here = [line for line, where in zip(lines, told) if where == place]
    ids += [*itertools.chain.from_iterable(here), *([made_of.line] if here else []), *(word or ())]
  end = LENGTH - 3 * facts
  ids += words.take(end - len(ids))
  ids += rng.choice(made_of.fill, end - len(ids)).tolist()
  return np.array([*ids, *itertools.chain.from_iterable(lines[i] for i in rng.permutation(facts))], np.int32)


def lesson(made_of: Words, facts: int, rng: np.random.Generator) -> np.ndarray:
  """int32 [LENGTH]: as `document`, for training: asked again and again, with English of a window or more before every line."""
  lines, words, ids = _told(made_of, facts, rng), _Supply(made_of.english['train'], rng), [made_of.bos]
  most = rng.choice([2, 16])                      # windows between two lines
  for i in itertools.chain.from_iterable(rng.permutation(facts) for _ in itertools.count()):
    part = [*words.take(int(WINDOW * most**rng.random()) + WINDOW), *lines[i], made_of.line]     # a word of up to 8 tokens may be left out
    if len(ids) + len(part) > LENGTH:
      ids += words.take(LENGTH - len(ids))
      return np.array([*ids, *rng.choice(made_of.fill, LENGTH - len(ids))], np.int32)
    ids += part


def answered(facts: int) -> np.ndarray:
  """The places [facts] that predict the answers."""
  return LENGTH - 2 - 3 * np.arange(facts)[::-1]


def train(name: str, seed: int, steps: int, workdir: pathlib.Path) -> pathlib.Path:
  """As `toys.train`, on documents that are all different, written to the workdir."""
  corpus, tokenizer_file = workdir / f'documents-s{seed}-{steps}.jsonl', workdir / 'tokenizer.json'
  if not corpus.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    made_of, rng = words(tokenizer), np.random.default_rng([seed, 0])
    lines = []
    for i in range(round(1.05 * steps * _BATCH)):       # some are validation documents
      ids = lesson(made_of, FACTS[i % len(FACTS)], rng)
      written = tokenizer.decode(ids[1:])
      if not np.array_equal(tokenizer.encode(written), ids[1:]):
        raise RuntimeError(f'document {i} is read as other tokens than it was written in')
      lines.append(json.dumps({'text': written}))
    metrics.write_text(tokenizer_file, tokenizer.serialized)
    metrics.write_text(corpus, '\n'.join(lines) + '\n')
  return toys.train(name, seed, steps, workdir, {      # rows of a batch are documents, as all are of one length
      'data.source': 'jsonl', 'data.path': str(corpus), 'data.tokenizer': str(tokenizer_file), 'data.vocab_size': _VOCAB,
      'model.vocab_size': _VOCAB, 'model.window': WINDOW, 'model.attention_scale': _SCALE, 'data.validation_fraction': 0.02,
      'data.sequence_length': LENGTH, 'data.batch_size': _BATCH})


def read(folder: pathlib.Path, model: text.Model, most: int) -> np.ndarray:
  """Documents [n, LENGTH] for the examination, `most` of each number of facts, one kind after the other; the same for all seeds."""
  made_of, rng = words(model.tokenizer), np.random.default_rng(1)
  return np.stack([document(made_of, 'validation', facts, rng) for facts in FACTS for _ in range(most)])


def by_document(parts: Sequence[jax.Array]) -> list[dict[str, list[float]]]:
  """For each of FACTS: {'nats', 'right'}, means over the answers of each document, of `toys.answers` batch by batch."""
  nats, right = np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)
  mean = lambda all_of, facts: all_of[:, answered(facts)].mean(-1).tolist()
  return [{'nats': mean(one, facts), 'right': mean(other, facts)}
          for facts, one, other in zip(FACTS, np.split(nats, len(FACTS)), np.split(right, len(FACTS)))]


def examine(model: text.Model, ids: np.ndarray, tick=lambda: None) -> dict[str, Any]:
  """Of documents as `read` gives them: {'rows': [{kind, name, bits or bytes, facts, and by document: nats, right, more, lost}]}."""
  cfg, params = model.cfg.replace(matvec='xla'), model.params
  batches = toys.batches(ids)
  exact = by_document([toys.answers(toys.logits(cfg, params, part), jnp.roll(part, -1, axis=1)) for part in batches])
  rows = []

  def add(kind: str, make, chunk: int, **what):
    parts = [caches.score(cfg, params, make(len(part)), part, chunk, toys.answers) for part in batches]
    for facts, one, truth in zip(FACTS, by_document(parts), exact):
      paired = {'more': np.subtract(one['nats'], truth['nats']).tolist(), 'lost': np.subtract(truth['right'], one['right']).tolist()}
      rows.append({'kind': kind, **what, 'facts': facts} | one | paired)
    tick()

  add('exact', lambda B: quantized_cache.make(cfg, B, LENGTH), caches.CHUNK, name='exact')
  for name in METHODS:
    add('method', lambda B: caches.decoded(cfg, B, name, 'both'), LENGTH, name=name, bits=caches.bits(cfg, name))
  for name in caches.PRESETS:
    add('preset', lambda B: quantized_cache.make(cfg, B, LENGTH, name), caches.CHUNK, name=name)
  return {'rows': rows, 'documents': len(ids) // len(FACTS)}


def tables(name: str, results: Mapping) -> list[report.Table]:
  by_name = {}
  for row in results['rows']:
    by_name.setdefault(row['name'], []).append(row)
  trials = sum(results['documents'])     # documents of all seeds

  def right(row):
    low, high = statistics.wilson(row['right']['mean'], trials)
    return f'{row["right"]["mean"]:.1%} [{low:.0%}, {high:.0%}]'

  def more(row):
    one = row['more']
    return f'{one["mean"]:+.4f}' + ('' if one['low'] is None else f' [{one["low"]:+.4f}, {one["high"]:+.4f}]')

  header = ['', 'bits', *(f'{facts} told' for facts in FACTS)]
  bits = lambda rows: f'{rows[0]["bits"]:.3g}' if 'bits' in rows[0] else ''
  exact = [f'{row["nats"]["mean"]:.4f} in all' for row in by_name['exact']]
  return [
      report.Table(f'{name}: right answers', header, [[key, bits(rows), *map(right, rows)] for key, rows in by_name.items()],
                   f"Of those asked in {trials} documents of each kind; Wilson's 95 % interval counts a document as one trial."),
      report.Table(f'{name}: nats an answer above the exact cache', header,
                   [[key, bits(rows), *(exact if key == 'exact' else map(more, rows))] for key, rows in by_name.items()],
                   'Paired by document, 95 % interval over seeds and documents.')]


def draw(results: Mapping[str, Mapping], path: pathlib.Path) -> pathlib.Path:
  """A panel for each model: right answers over bits, a colour for each number of facts."""
  figure, (axes,) = figures.grid(5.5 * len(results), 4.2, len(results), sharey=True)
  kind = lambda row: next(start for start in ('turboquant', 'prod', '') if row['name'].startswith(start))
  for axis, (name, one) in zip(axes, results.items()):
    for facts, colour in zip(FACTS, ('#0072B2', '#D55E00')):
      points = lambda mark: sorted((row['bits'], row['right']['mean']) for row in one['rows']
                                   if row['kind'] == 'method' and row['facts'] == facts and kind(row) == mark)
      axis.plot(*zip(*points('turboquant')), 'o-', color=colour, markersize=4, linewidth=1, label=f'{facts} told')
      axis.plot(*zip(*points('prod')), 's--', color=colour, markersize=4, linewidth=0.7)
      axis.plot(*zip(*points('')), 'x', color=colour, markersize=5)
    axis.set(title=name, xlabel='bits a number of keys and values, scales counted')
  axes[0].set_ylabel('right answers')
  axes[0].legend(title='o: turboquant, s: prod, x: others', fontsize=7, title_fontsize=7)
  return figures.save(figure, path)


def main(argv=None) -> None:
  toys.run('recall', __doc__, examine, tables, draw, argv, train=train, read=read, steps=2500)


if __name__ == '__main__':
  main()
