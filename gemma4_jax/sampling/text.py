"""Text in, text out: a model with its tokenizer, its chat template and its settings.

  model = text.load(directory)                                   # or text.random('e2b', param_dtype='bfloat16')
  print(model.generate('The sea is').text)
  for piece in model.stream('The sea is'): print(piece, end='')
  print(model.chat([{'role': 'user', 'content': 'Hello!'}])['content'])

A prompt begins with BOS once, whatever it spells: text never becomes a control token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import os
from pathlib import Path
import time

import numpy as np

from gemma4_jax import compilation, config as model_config
from gemma4_jax.checkpoint import load as checkpoint, source
from gemma4_jax.config import ModelConfig
from gemma4_jax.data import chat as chat_format
from gemma4_jax.data.tokenizer import GEMMA4_TOKENS, Tokenizer
from gemma4_jax.model import ple_placement as placing, quantized, transformer
from gemma4_jax.sampling import generate, pieces
from gemma4_jax.sampling.sampler import Sampling

_STEPS = 16   # between two looks for stop strings, where nobody waits for the text


def load(directory: str | os.PathLike, *, param_dtype: str | None = None, tokenizer: str | os.PathLike | None = None,
         ple_placement: str = 'device', ple_table: str = 'as_is', weights: str = 'as_is', progress: bool = False) -> 'Model':
  """A model from a checkpoint directory of any kind that `checkpoint.load` reads.

  Beside the weights (a run's are in its folder) are read: tokenizer.json; chat_template.jinja, if there; generation_config.json,
  if there: its eos_token_id are the stop ids (else <eos>, <turn|> and <|tool_response>) and its settings the default ones.

  Args:
    param_dtype: 'float32' or 'bfloat16'; None: as stored.
    tokenizer: a tokenizer.json in place of the directory's.
    ple_placement: where the PLE table goes, of config.PLE_PLACEMENTS: see `model.ple_placement`. A table for the host is
      memory-mapped where its file allows, and never on the device.
    ple_table: how it is stored, of config.PLE_TABLES.
    weights: how the matrices are stored, of config.WEIGHTS: see `model.quantized`.
    progress: a bar, on a terminal.
  Raises:
    ValueError: one line, before a weight is read: what is wrong with the directory, a tokenizer that is not this model's, or a
      table that the model has not.
  """
  directory = Path(directory).expanduser()
  found = checkpoint.find(directory)
  found.cfg.replace(ple_placement=ple_placement, ple_table=ple_table)   # or there is no such table
  quantized.check(weights)
  folder = found.home
  if tokenizer is None and not (folder / 'tokenizer.json').exists():
    raise ValueError(f'{folder}: no tokenizer.json; copy the one the model was trained with there, or name one (tokenizer)')
  tokens = Tokenizer.load(source.inside(folder, 'tokenizer.json') if tokenizer is None else tokenizer)
  if tokens.vocab_size > found.cfg.vocab_size:
    raise ValueError(f'{tokenizer or folder / "tokenizer.json"}: its {tokens.vocab_size} entries are more than the model\'s '
                     f'vocabulary of {found.cfg.vocab_size}: another model\'s tokenizer')
  template = chat_format.load_template(folder) if source.inside(folder, 'chat_template.jinja').exists() else None
  stop_ids, sampling = _generation_config(folder, found.cfg, tokens)
  moved = (ple_placement, ple_table) != ('device', 'as_is') and found.cfg.embedding != 'frozen_table'   # a toy's, of another name
  cfg, params = checkpoint.load(directory, param_dtype=param_dtype, progress=progress, host=[placing.TABLE] if moved else [])
  cfg, params = _placed(cfg, params, ple_placement, ple_table, weights, progress)
  return Model(generate.fastest(cfg), params, tokens, stop_ids, sampling, template, _empty_thought_channel(cfg))


def random(variant: str | ModelConfig, *, seed: int = 0, param_dtype: str | None = None, ple_placement: str = 'device',
           ple_table: str = 'as_is', weights: str = 'as_is', progress: bool = False) -> 'Model':
  """Random weights and a stand-in for the tokenizer, as large as the model's vocabulary: for tests, and for speed at full size.

  Args: as those of `load`.
  Raises:
    ValueError: no such variant, a vocabulary that has no room for a tokenizer, or a table that the model has not.
  """
  cfg = model_config.variant(variant) if isinstance(variant, str) else variant
  cfg = cfg.replace(scan=False, **(dict(param_dtype=param_dtype, dtype=param_dtype) if param_dtype else {}))
  cfg.replace(ple_placement=ple_placement, ple_table=ple_table)   # or there is no such table
  quantized.check(weights)
  tokenizer = Tokenizer.stand_in(vocab_size=cfg.vocab_size)
  cfg, params = _placed(cfg, transformer.init(cfg, seed), ple_placement, ple_table, weights, progress)
  return Model(generate.fastest(cfg), params, tokenizer, _named_stops(tokenizer), Sampling(), None, _empty_thought_channel(cfg))


def _placed(cfg, params, placement, storage, weights, progress):
  if (placement, storage) != ('device', 'as_is'):   # a model without such a table has it there, too
    cfg, params = placing.place(cfg, params, placement=placement, storage=storage, progress=progress)
  return cfg, params if weights == 'as_is' else quantized.quantize(cfg, params, weights, consume=True, progress=progress)


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


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """Weights, tokenizer and settings; every method raises ValueError, in one line and before anything is compiled, for what cannot be.

  Arguments that methods share:
    prompt: text, not empty.
    max_new_tokens: of every row, at most.
    sampling: None: `self.sampling`.
    seed: row i draws from (seed, i); or one seed a row.
    stop_strings: a row ends where the first of these is complete, and its text before it. In a chat they are looked for in
      the answer, not in thoughts.
    kv: see `generate.make_cache`.

  Attributes:
    stop_ids: tokens that end a row.
    sampling: how to choose, if a call does not say.
    template: source of the chat template that the checkpoint carries; None: ours.
    empty_thought_channel: see `chat.EMPTY_THOUGHT_CHANNEL`.
  """
  cfg: ModelConfig
  params: dict     # or variables of `model.quantized`
  tokenizer: Tokenizer
  stop_ids: tuple[int, ...] = generate.STOP_IDS
  sampling: Sampling = Sampling()
  template: str | None = None
  empty_thought_channel: bool = False

  def generate(self, prompt: str | Sequence[str], *, max_new_tokens: int = 256, sampling: Sampling | None = None,
               seed: int | Sequence[int] = 0, stop_strings: Sequence[str] = (), samples: int = 1, best_of: int | None = None,
               kv: str = 'exact') -> Completion | list:
    """Continues a prompt, or each of several in one batch.

    Args:
      samples: continuations of every prompt.
      best_of: draws so many and keeps the `samples` that are `likeliest`.
    Returns:
      a Completion; with `samples` above 1 a list of them; of several prompts a list of these.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    drawn = samples if best_of is None else best_of
    if samples < 1 or drawn < samples:
      raise ValueError(f'samples: {samples}, best_of: {best_of}: give at least one sample, and draw at least as many as are kept')
    run = self.start([self.encode(p) for p in prompts], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
                     stop_strings=stop_strings, samples=drawn, kv=kv)
    done = run.finish()
    found = []
    for i in range(len(prompts)):
      rows = done[i * drawn:(i + 1) * drawn]
      rows = rows if best_of is None else likeliest(rows)
      found.append(rows[0] if samples == 1 else rows[:samples])
    return found[0] if isinstance(prompt, str) else found

  def stream(self, prompt: str, *, max_new_tokens: int = 256, sampling: Sampling | None = None, seed: int | Sequence[int] = 0,
             stop_strings: Sequence[str] = (), kv: str = 'exact') -> Iterator[str]:
    """Pieces of the text as they are decoded; joined, they are the text of `generate`.

    A character comes whole, and text that could begin a stop string when it is certain that it does not.
    """
    run = self.start([self.encode(prompt)], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_strings=stop_strings, kv=kv,
                     every=1)
    return (piece for new, in run for _, piece in new)

  def chat(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *, thinking: bool = False,
           max_new_tokens: int = 1024, sampling: Sampling | None = None, seed: int = 0, stop_strings: Sequence[str] = (),
           kv: str = 'exact') -> dict:
    """The assistant's next message, as `chat.parse` gives it; messages and tools as `chat.encode` takes them."""
    run = self.start([self.encode_chat(messages, tools, thinking=thinking)], chat=True, max_new_tokens=max_new_tokens, sampling=sampling,
                     seed=seed, stop_strings=stop_strings, kv=kv)
    return Reply(run).finish()

  def chat_stream(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *, thinking: bool = False,
                  max_new_tokens: int = 1024, sampling: Sampling | None = None, seed: int = 0, stop_strings: Sequence[str] = (),
                  kv: str = 'exact') -> 'Reply':
    """As `chat`, in pieces."""
    return Reply(self.start([self.encode_chat(messages, tools, thinking=thinking)], chat=True, max_new_tokens=max_new_tokens,
                            sampling=sampling, seed=seed, stop_strings=stop_strings, kv=kv, every=1))

  def score(self, prompt: str, continuations: Sequence[str]) -> list[np.ndarray]:
    """log p of every token of each continuation after the prompt, float32 [n] each; sum for the text's.

    Prompt and continuation are encoded apart: tokens do not reach across. An empty prompt is BOS alone.
    """
    if isinstance(continuations, str):
      raise ValueError('continuations: give a list of texts')
    ids = self.encode(prompt, empty=True)
    return generate.score(self.cfg, self.params, [ids] * len(continuations), self.tokenizer.encode_batch(list(continuations)))

  def encode(self, prompt: str, *, empty: bool = False) -> np.ndarray:
    """int32 [T]: BOS and the prompt's tokens."""
    if not isinstance(prompt, str) or not (prompt or empty):
      raise ValueError('prompt: empty; give some text' if prompt == '' else f'prompt: {type(prompt).__name__}; give text')
    return np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode(prompt)]).astype(np.int32)

  def encode_chat(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *, thinking: bool = False) -> np.ndarray:
    """int32 [T]: the conversation up to where the model answers."""
    return chat_format.encode(self.tokenizer, messages, tools, thinking=thinking, template=self.template,
                              empty_thought_channel=self.empty_thought_channel)

  def start(self, prompts: Sequence[np.ndarray], *, max_new_tokens: int, samples: int = 1, kv: str = 'exact', **settings) -> 'Run':
    """A run over prompts of `encode` or `encode_chat`; `settings` are those of `Run`."""
    if not prompts:
      raise ValueError('prompt: none given')
    capacity = max(map(len, prompts)) + max_new_tokens
    return Run(self, prompts, lambda: generate.Session(self.cfg, self.params, len(prompts), capacity, kv=kv), kv=kv,
               max_new_tokens=max_new_tokens, samples=samples, **settings)


@dataclasses.dataclass
class Stats:
  """Attributes: tokens run and chosen in all rows; seconds without compiling, which `compile_seconds` has; bytes of the cache; its kind."""
  prompt_tokens: int = 0
  new_tokens: int = 0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  compile_seconds: float = 0.0
  cache_bytes: int = 0
  kv: str = 'exact'


class Run:
  """Rows that are being continued; nothing runs before the first is asked for.

  Yields, after each `every` steps, every row's new text: pieces (kind, text), kind being 'content', or 'reasoning' in a chat.

  Attributes:
    rows: as far as they are, `samples` for every prompt.
    stats: likewise.
    finished: whether every row has ended.
  """

  def __init__(self, model: Model, new: Sequence[np.ndarray], open_session: Callable[[], generate.Session], *, kv: str, max_new_tokens: int,
               sampling: Sampling | None = None, seed: int | Sequence[int] = 0, stop_strings: Sequence[str] = (), samples: int = 1,
               every: int | None = None, chat: bool = False):
    """
    Args:
      open_session: gives that to which the ids `new` are added, once all settings are found sound.
      every: None: as seldom as stop strings allow.
      chat: the rows are messages of the assistant.
    """
    sampling = model.sampling if sampling is None else sampling
    sampling.check(model.cfg.vocab_size)
    if max_new_tokens < 1 or samples < 1:
      raise ValueError(f'max_new_tokens: {max_new_tokens}, samples: {samples}: not positive')
    one = not isinstance(seed, Sequence | np.ndarray)
    if not all(isinstance(s, int | np.integer) and 0 <= s < 2**32 for s in ([seed] if one else seed)):
      raise ValueError(f'seed: {seed!r} is no whole number from 0 to 2**32 - 1')
    if not one and len(seed) != len(new) * samples:
      raise ValueError(f'seed: {len(seed)} for {len(new) * samples} rows')
    self.rows = [_Row(model, stop_strings, chat) for _ in range(len(new) * samples)]
    self.stats, self.finished = Stats(kv=kv), False
    every = every or (_STEPS if stop_strings else max_new_tokens)
    settings = dict(max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_ids=model.stop_ids, every=every)
    self._steps = self._run(open_session(), new, samples, settings)

  def __iter__(self) -> Iterator[list[list[tuple[str, str]]]]:
    return self._steps

  def _run(self, session, new, samples, settings):
    stats, clock = self.stats, _Clock()
    session.append(new)
    if samples != 1:
      session.fork(samples)
    session.wait()
    stats.prompt_tokens, stats.cache_bytes = sum(map(len, new)), session.cache_bytes
    stats.prefill_seconds, prefill_compiled = clock.read()
    clock = _Clock()
    for part in session.generate(**settings):
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


class Conversation:
  """A chat in one cache of `context` tokens: of a prompt, only what the cache does not hold is run, by the same programs each turn.

  A turn that does not go on where the last one ended (its thoughts were taken out, it was left early, messages were changed)
  is run from its start.
  """

  def __init__(self, model: Model, context: int, *, kv: str = 'exact'):
    """Raises ValueError: more than the model's context, or no such cache."""
    self.context = context
    self._model, self._kv = model, kv
    self._session, self._prompt, self._run = self._empty(), [], None

  def reply(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *, thinking: bool = False,
            max_new_tokens: int = 1024, sampling: Sampling | None = None, seed: int = 0, stop_strings: Sequence[str] = ()) -> Reply:
    """The answer, of at most `max_new_tokens` or what the context has room for. Raises ValueError: it has no room at all."""
    ids = self._model.encode_chat(messages, tools, thinking=thinking).tolist()
    if len(ids) >= self.context:
      raise ValueError(f'the conversation: its {len(ids)} tokens leave no room for an answer in a context of {self.context}')
    held = [*self._prompt, *self._run.rows[0].tokens] if self._run is not None and self._run.finished else []
    goes_on = self._run is None or bool(held) and held == ids[:len(held)] != ids

    def open_session():
      if not goes_on:
        self._run = self._session = None   # two caches would not always fit
        self._session = self._empty()
      return self._session

    new = np.array(ids[len(held):] if goes_on else ids, np.int32)
    self._run = Run(self._model, [new], open_session, kv=self._kv, max_new_tokens=min(max_new_tokens, self.context - len(ids)),
                    sampling=sampling, seed=seed, stop_strings=stop_strings, every=1, chat=True)
    self._prompt = ids
    return Reply(self._run)

  def _empty(self):
    return generate.Session(self._model.cfg, self._model.params, 1, self.context, kv=self._kv)


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

  def __init__(self, model: Model, stop_strings: str | Sequence[str], chat: bool):
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


def _generation_config(folder: Path, cfg: ModelConfig, tokenizer: Tokenizer) -> tuple[tuple[int, ...], Sampling]:
  file = source.inside(folder, 'generation_config.json')
  if not file.exists():
    return _named_stops(tokenizer), Sampling()
  fields = {name: value for name, value in source.read_json(file).items() if value is not None}
  stops = fields.get('eos_token_id', _named_stops(tokenizer))
  stops = tuple(stops) if isinstance(stops, list | tuple) else (stops,)
  for i in stops:
    if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < cfg.vocab_size:
      raise ValueError(f'{file}: eos_token_id = {i!r} is no token of the model\'s {cfg.vocab_size}')
  chosen = {field.name: fields[field.name] for field in dataclasses.fields(Sampling) if field.name in fields}
  for name, value in chosen.items():
    kind, said = (list, 'list') if name == 'suppress_tokens' else (int | float, 'number')
    if not isinstance(value, kind) or isinstance(value, bool):
      raise ValueError(f'{file}: {name} = {value!r} is no {said}')
    chosen[name] = tuple(value) if kind is list else value
  if fields.get('do_sample') is False:
    chosen['temperature'] = 0.0
  sampling = Sampling(**chosen)
  try:
    sampling.check(cfg.vocab_size)
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from None
  return stops, sampling


def _named_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
  names = [GEMMA4_TOKENS[i] for i in generate.STOP_IDS]
  return tuple(dict.fromkeys([tokenizer.eos_id, *(tokenizer.special_ids[name] for name in names if name in tokenizer.special_ids)]))


def _empty_thought_channel(cfg: ModelConfig) -> bool:
  return chat_format.EMPTY_THOUGHT_CHANNEL.get(model_config.released(cfg), False)
