"""Rows that are being continued, and their text as far as it is certain."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np

from gemma4_jax import compilation, hardware, kv_format
from gemma4_jax.data import chat as chat_format
from gemma4_jax.sampling import generate, pieces
from gemma4_jax.sampling.sampler import Sampling

if TYPE_CHECKING:
  from gemma4_jax.sampling.text import Model

_STEPS = 16   # between two looks for stop strings, where nobody waits for the text


@dataclasses.dataclass(frozen=True)
class Completion:
  """What followed a prompt.

  Attributes:
    text: without control tokens, up to the stop string if one came; in a chat, the answer without its thoughts.
    tokens: int32 [n], what was chosen: with the stop id that ended it, or all that a stop string came with.
    logprobs: float32 [n], of each token under the model, without temperature or cuts.
    stopped: whether a stop id or a stop string ended it, not `max_new_tokens`.
    message: in a chat, what `chat.parse` makes of the tokens, its content up to the stop string; else None.
  """
  text: str
  tokens: np.ndarray
  logprobs: np.ndarray
  stopped: bool
  message: dict | None = None


def likeliest(rows: Sequence[Completion]) -> list[Completion]:
  """Those with the highest mean log-probability a token first. The mean is under the model alone, so that a longer one is not the
  worse for it; a stop id counts."""
  return sorted(rows, key=lambda row: -row.logprobs.mean())


@dataclasses.dataclass
class Stats:
  """Attributes: tokens run and chosen in all rows; seconds without compiling, which `compile_seconds` has; bytes of the cache; its kind;
  most bytes ever in use (`hardware.peak_memory_bytes`) when the prompt had run."""
  prompt_tokens: int = 0
  new_tokens: int = 0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  compile_seconds: float = 0.0
  cache_bytes: int = 0
  kv: str = 'exact'
  prefill_peak_bytes: int = 0


class Run:
  """Rows that are being continued; nothing runs before the first is asked for.

  Yields, after each `every` steps, every row's new text: pieces (kind, text), kind being 'content', or 'reasoning' in a chat.

  Attributes:
    rows: as far as they are, `samples` for every prompt.
    stats: likewise.
    finished: whether every row has ended.
  """

  def __init__(self, model: 'Model', new: Sequence[np.ndarray], open_session: Callable[[], generate.Session], *, kv: kv_format.KV,
               max_new_tokens: int, sampling: Sampling | None = None, seed: int | Sequence[int] = 0, stop_strings: Sequence[str] = (),
               samples: int = 1, every: int | None = None, chat: bool = False):
    """
    Args:
      open_session: gives that to which the ids `new` are added, once all settings are found sound.
      every: None: as seldom as stop strings allow.
      chat: the rows are messages of the assistant.
    """
    sampling = model.sampling if sampling is None else sampling
    sampling.check(model.cfg.vocab_size)
    if not all(isinstance(n, int | np.integer) and n >= 1 for n in (max_new_tokens, samples)):
      raise ValueError(f'max_new_tokens: {max_new_tokens!r}, samples: {samples!r}: whole numbers from 1 on')
    one = not isinstance(seed, Sequence | np.ndarray)
    generate.check_seeds([seed] if one else seed)
    if not one and len(seed) != len(new) * samples:
      raise ValueError(f'seed: {len(seed)} for {len(new) * samples} rows')
    self.rows = [_Row(model, stop_strings, chat) for _ in range(len(new) * samples)]
    self.stats, self.finished = Stats(kv=str(kv_format.make(kv))), False
    every = every or (_STEPS if stop_strings else max_new_tokens)
    settings = dict(max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_ids=model.stop_ids, every=every)
    self._steps = self._run(open_session(), new, samples, settings)

  def __iter__(self) -> Iterator[list[list[tuple[str, str]]]]:
    return self._steps

  def _run(self, session, new, samples, settings):
    stats, clock = self.stats, _Clock()
    with generate.uninterrupted():
      session.append(new)
      if samples != 1:
        session.fork(samples)
      session.wait()
    stats.prompt_tokens, stats.cache_bytes = sum(map(len, new)), session.cache_bytes
    stats.prefill_seconds, prefill_compiled = clock.read()
    stats.prefill_peak_bytes = hardware.peak_memory_bytes()
    clock = _Clock()
    for part in session.generate(**settings):
      if any(np.isnan(logprobs).any() for _, logprobs in part):
        raise ValueError('log-probabilities are no numbers: weights that are none? `cli.convert --check` names them')
      new = [row.push(tokens, logprobs) for row, (tokens, logprobs) in zip(self.rows, part, strict=True)]
      stats.new_tokens = sum(len(row.tokens) for row in self.rows)
      stats.decode_seconds, compiled = clock.read()
      stats.compile_seconds = prefill_compiled + compiled
      yield new
      if all(row.stopped for row in self.rows):
        break
    self.finished = True
    yield [row.end() for row in self.rows]

  def finish(self) -> list[Completion]:
    """Runs to the end."""
    for _ in self:
      pass
    return self.completions

  @property
  def completions(self) -> list[Completion]:
    return [Completion(row.text, np.array(row.tokens, np.int32), np.array(row.logprobs, np.float32), row.stopped, row.message)
            for row in self.rows]


class Reply:
  """An assistant's message that is being generated: yields (kind, text), kind being 'reasoning' or 'content'.

  The pieces of a kind, joined, are that field of the message. Calls of tools come with the message alone, and so does text
  behind a call that is not well formed.

  Attributes:
    run: the run behind it.
  """

  def __init__(self, run: Run):
    """Args: run: of one row, with `chat`."""
    self.run = run
    self._pieces = (piece for new, in run for piece in new)

  @property
  def message(self) -> dict:
    """As far as it is."""
    return self.run.rows[0].message

  def __iter__(self) -> Iterator[tuple[str, str]]:
    return self._pieces

  def finish(self) -> dict:
    """Runs to the end; the message."""
    for _ in self:
      pass
    return self.message


class _Clock:
  """Time since it was made, and the part of it that compiling took."""

  def __init__(self):
    self._compiled, self._start = compilation.seconds(), time.perf_counter()

  def read(self) -> tuple[float, float]:
    """(seconds without compiling, seconds of it)."""
    compiled = compilation.seconds() - self._compiled
    return time.perf_counter() - self._start - compiled, compiled


class _Row:
  """Tokens of one row, and their text as far as it is certain; in a chat, that of the answer."""

  def __init__(self, model: 'Model', stop_strings: str | Sequence[str], chat: bool):
    self.text, self.tokens, self.logprobs, self.stopped = '', [], [], False
    self._tokenizer, self._stop_ids, self._stop_strings = model.tokenizer, frozenset(model.stop_ids), stop_strings
    self._chat, self._parts = chat, (pieces.Sections if chat else pieces.Plain)(model.tokenizer)
    self._cut = pieces.StopStrings(stop_strings)

  @property
  def message(self) -> dict | None:
    """As far as it is; None if this is no chat."""
    if not self._chat:
      return None
    message = chat_format.parse([i for i in self.tokens if i < self._tokenizer.vocab_size], self._tokenizer)
    cut = pieces.StopStrings(self._stop_strings)
    return {**message, 'content': cut.push(message['content']) + cut.flush()}

  def push(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[tuple[str, str]]:
    """The pieces that these tokens make certain; what follows a stop is dropped."""
    new = []
    for token, logprob in zip(tokens, logprobs):
      if self.stopped:
        break
      self.tokens.append(int(token))
      self.logprobs.append(float(logprob))
      new += self._let(self._parts.push(int(token)))
      if token in self._stop_ids:
        new += self.end()
        self.stopped = True
    return new

  def end(self) -> list[tuple[str, str]]:
    """What was held back."""
    if self.stopped:
      return []
    new = self._let(self._parts.end())
    if not self.stopped:
      new += self._keep('content', self._cut.flush())
    if self._chat and (content := self.message['content']).startswith(self.text):   # calls that are not well formed are text
      new += self._keep('content', content[len(self.text):])
    return new

  def _let(self, parts):
    """Up to a stop string."""
    new = []
    for kind, piece in parts:
      if not self.stopped:
        new += self._keep(kind, self._cut.push(piece) if kind == 'content' else piece)
        self.stopped = self._cut.found
    return new

  def _keep(self, kind, piece):
    self.text += piece if kind == 'content' else ''
    return [(kind, piece)] if piece else []
