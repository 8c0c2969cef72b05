"""What is scored: documents of token ids, from files, from a corpus, or the replies of conversations."""

from collections.abc import Iterator
import itertools
import json
import types
from typing import NamedTuple

import numpy as np

from gemma4_jax.data import chat, corpus as corpus_lib, sources
from gemma4_jax.data.tokenizer import GEMMA4_TOKENS, Tokenizer
from gemma4_jax.sampling import text

_SOURCES = {'.jsonl': 'jsonl', '.parquet': 'parquet'}   # other files are text, a document each
_TURN = next(i for i, token in GEMMA4_TOKENS.items() if token == '<|turn>')


class Document(NamedTuple):
  """Attributes:
    ids: int32 [T], from BOS on.
    origin: where it is from.
    domain: kind of text.
    first: the first id that is predicted; those before it are context.
  """
  ids: np.ndarray
  origin: str
  domain: str = 'text'
  first: int = 1

  @property
  def targets(self) -> np.ndarray:
    """int32 [T - first], the ids that are predicted."""
    return self.ids[self.first:]


def from_files(tokenizer: Tokenizer, data: str, *, text_field: str = 'text', most: int = 0) -> list[Document]:
  """The documents that have a token.

  Args:
    data: a glob of text, JSON lines or parquet files, or 'stdlib'.
    most: the first so many documents; 0: all.
  Raises:
    ValueError: as `sources.documents`, or nothing to score.
  """
  where = types.SimpleNamespace(source=_source(data), path='' if data == 'stdlib' else data, text_field=text_field)
  found = itertools.islice(sources.documents(where), most or None)
  documents = [Document(_with_bos(tokenizer, ids), one.origin, one.domain)
               for part in _parts(found, 256) for one, ids in zip(part, tokenizer.encode_batch([one.text for one in part])) if len(ids)]
  if not documents:
    raise ValueError(f'--data={data}: no text in any document')
  return documents


def from_corpus(corpus: corpus_lib.Corpus, *, most: int = 0, min_tokens: int = 1, max_tokens: int = 0) -> list[Document]:
  """Documents of a split, in a fixed random order.

  Args:
    most: the first so many of each domain; 0: all.
    min_tokens: documents of fewer, without BOS, are left out.
    max_tokens: of each the first so many, BOS included; 0: all.
  """
  documents, taken = [], {}
  for i in np.random.default_rng(0).permutation(len(corpus.document_domains)):
    begin, end = corpus.offsets[i:i + 2]
    domain = corpus.domains[corpus.document_domains[i]]
    if end - begin > min_tokens and not (most and taken.get(domain, 0) >= most):
      taken[domain] = taken.get(domain, 0) + 1
      ids = np.asarray(corpus.tokens[begin:min(end, begin + max_tokens) if max_tokens else end], np.int32)
      documents.append(Document(ids, f'document {i}', domain))
  return documents


def from_conversations(model: text.Model, data: str, *, most: int = 0) -> list[Document]:
  """A document for every reply of the assistant: the prompt that it answers, in the chat frame, and the reply to its stop token.

  Args:
    data: a glob of JSON lines, {'messages': [..], 'tools': [..]} each, messages and tools as `chat.encode` takes them; a line may
      be the list of messages alone.
    most: the first so many conversations; 0: all.
  Raises:
    ValueError: naming file and line.
  """
  documents = []
  for path, number, line in itertools.islice(_lines(data), most or None):
    where = f'{path}, line {number}'
    try:
      row = json.loads(line)
      messages, tools = (row.get('messages'), row.get('tools')) if isinstance(row, dict) else (row, None)
      if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        messages = []
      replies = [n for n, message in enumerate(messages) if message.get('role') in ('assistant', 'model')]
      if not replies:
        raise ValueError("no reply of the assistant; a line is {'messages': [{'role': .., 'content': ..}, ..]}")
      for n in replies:
        prompt, reply = _reply(model, messages[:n], messages[n], tools)
        documents.append(Document(np.concatenate([prompt, reply]), f'{where}, messages[{n}]', 'reply', len(prompt)))
    except (ValueError, TypeError, AttributeError) as e:
      raise ValueError(f'--data: {where}: {e}') from e
  if not documents:
    raise ValueError(f'--data={data}: no conversation')
  return documents


def _reply(model, before, message, tools):
  """(ids of the prompt, ids of the reply): what the model was given, and what it had to say."""
  if not before:
    raise ValueError('messages[0]: a reply needs a message before it')
  encode = lambda messages, opened: chat.encode(model.tokenizer, messages, tools, template=model.template, add_generation_prompt=opened,
                                                empty_thought_channel=model.empty_thought_channel)
  prompt, closed, whole = encode(before, True), encode(before, False), encode([*before, message], False)
  head = np.concatenate([closed, [_TURN], model.tokenizer.encode('model\n')])   # where prompts have an empty thought channel, but no reply
  start = next((part for part in (prompt, head) if np.array_equal(whole[:len(part)], part)), None)
  if start is None:
    raise ValueError('the chat template does not put a reply after its prompt')
  reply = whole[len(start):]
  stops = np.flatnonzero(np.isin(reply, chat.STOP_IDS))
  if not len(stops):
    raise ValueError('the chat template does not end a reply with a stop token')
  return prompt, reply[:stops[-1] + 1]


def _lines(data) -> Iterator[tuple]:
  for path in sources.files(types.SimpleNamespace(source='jsonl', path=data)):
    try:
      with open(path, encoding='utf-8') as f:
        yield from ((path, number, line) for number, line in enumerate(f, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as e:
      raise ValueError(f'--data: cannot read {path}: {e}') from e


def _source(data):
  if data == 'stdlib':
    return data
  found = {_SOURCES.get(path.suffix, 'text') for path in sources.files(types.SimpleNamespace(source='text', path=data))}
  if len(found) > 1:
    raise ValueError(f'--data={data}: files of several kinds ({", ".join(sorted(found))}); give those of one')
  return found.pop()


def _with_bos(tokenizer, ids):
  return np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32)


def _parts(items, size):
  while part := list(itertools.islice(items, size)):
    yield part
