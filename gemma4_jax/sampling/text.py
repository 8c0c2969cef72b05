"""Text in, text out: a model with its tokenizer, its chat template and its settings.

  model = text.load(directory)                                   # or text.random('e2b', param_dtype='bfloat16')
  print(model.generate('The sea is').text)
  for piece in model.stream('The sea is'): print(piece, end='')
  print(model.chat([{'role': 'user', 'content': 'Hello!'}])['content'])

A prompt begins with BOS once, whatever it spells: text never becomes a control token.
"""


from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
from pathlib import Path

import jax
import numpy as np

from gemma4_jax import config as model_config, kv_format, sharding
from gemma4_jax.checkpoint import load as checkpoint, source
from gemma4_jax.config import ModelConfig
from gemma4_jax.data import chat as chat_format
from gemma4_jax.data.tokenizer import GEMMA4_TOKENS, Tokenizer
from gemma4_jax.model import ple_placement as placing, quantized, quantized_cache, transformer
from gemma4_jax.sampling import generate
from gemma4_jax.sampling.conversation import Conversation
from gemma4_jax.sampling.run import Completion, Reply, Run, Stats, likeliest
from gemma4_jax.sampling.sampler import Sampling

__all__ = ['Completion', 'Conversation', 'Model', 'Reply', 'Run', 'Stats', 'likeliest', 'load', 'random']


def load(directory: str | os.PathLike, *, param_dtype: str | None = None, tokenizer: str | os.PathLike | None = None,
         ple_placement: str = 'device', ple_table: str = 'as_is', weights: str = 'as_is', kv: kv_format.KV = 'exact',
         mesh: Mapping[str, int] | None = None, progress: bool = False) -> 'Model':
  """A model from a checkpoint directory of any kind that `checkpoint.load` reads.

  Beside the weights (a run's are in its folder) are read: tokenizer.json; chat_template.jinja, if there; generation_config.json,
  if there: its eos_token_id are the stop ids (else <eos>, <turn|> and <|tool_response>) and its settings the default ones.

  Args:
    param_dtype: 'float32' or 'bfloat16'; None: as stored.
    tokenizer: a tokenizer.json in place of the directory's.
    ple_placement: where the PLE table goes, of config.PLE_PLACEMENTS: see `model.ple_placement`. A table for the host is
      memory-mapped where its file allows, and never on the device.
    ple_table: how it is stored, of config.PLE_TABLES.
    weights: how the matrices are stored: as_is, or what `model.quantized.plan` takes.
    kv: how keys and values are kept where a call does not say: what `kv_format.make` takes. The rotation of quantized values goes
      into the weights here (`quantized_cache.fold`); a cache that a call names works with either.
    mesh: {'fsdp': 8, 'tensor': 4}, as `sharding.make_mesh` takes it: weights and caches are split over these devices. None: the
      default device alone.
    progress: a bar, on a terminal.
  Raises:
    ValueError: one line, before a weight is read: what is wrong with the directory, a tokenizer that is not this model's, or a
      table that the model has not.
  """
  directory = Path(directory).expanduser()
  found = checkpoint.find(directory)
  ple_table = found.cfg.ple_table if ple_table == 'as_is' else ple_table   # a quantized checkpoint has its own
  found.cfg.replace(ple_placement=ple_placement, ple_table=ple_table)   # or there is no such table
  if quantized.plan(weights) and any(piece.fixed for piece in found.pieces):
    raise ValueError(f"weights: {weights!r}: those of {directory} are quantized already: take 'as_is', or the weights they were made of")
  quantized.check(found.cfg.replace(ple_table='as_is'), weights)
  kv = kv_format.make(kv)
  quantized_cache.check(kv)
  devices = None if mesh is None else sharding.make_mesh(mesh)
  folder = found.home
  if tokenizer is None and not (folder / 'tokenizer.json').exists():
    raise ValueError(f'{folder}: no tokenizer.json; copy the one the model was trained with there, or name one (tokenizer)')
  tokens = Tokenizer.load(source.inside(folder, 'tokenizer.json') if tokenizer is None else tokenizer)
  _check_tokenizer(tokens, found, tokenizer or folder / 'tokenizer.json')
  template = chat_format.load_template(source.inside(folder, 'chat_template.jinja').parent)
  stop_ids, sampling = _generation_config(folder, found.cfg, tokens)
  moved = (ple_placement, ple_table) != ('device', found.cfg.ple_table) and found.cfg.embedding != 'frozen_table'   # of another name
  cfg, params = checkpoint.load(directory, param_dtype=param_dtype, mesh=devices, progress=progress, host=[placing.TABLE] if moved else [])
  cfg, params = _placed(cfg, params, devices, ple_placement, ple_table, kv, weights, progress)
  return Model(cfg, params, tokens, stop_ids, sampling, template, _empty_thought_channel(cfg), kv)


def random(variant: str | ModelConfig, *, seed: int = 0, param_dtype: str | None = None, ple_placement: str = 'device',
           ple_table: str = 'as_is', weights: str = 'as_is', kv: kv_format.KV = 'exact', mesh: Mapping[str, int] | None = None,
           progress: bool = False) -> 'Model':
  """Random weights and a stand-in for the tokenizer, as large as the model's vocabulary: for tests, and for speed at full size.

  Args: as those of `load`.
  Raises:
    ValueError: no such variant, a vocabulary that has no room for a tokenizer, or a table that the model has not.
  """
  cfg = model_config.variant(variant) if isinstance(variant, str) else variant
  cfg = cfg.replace(scan=False, **(dict(param_dtype=param_dtype, dtype=param_dtype) if param_dtype else {}))
  cfg.replace(ple_placement=ple_placement, ple_table=ple_table)   # or there is no such table
  quantized.check(cfg, weights)
  kv = kv_format.make(kv)
  quantized_cache.check(kv)
  tokenizer = Tokenizer.stand_in(vocab_size=cfg.vocab_size)
  devices = None if mesh is None else sharding.make_mesh(mesh)
  cfg, params = _placed(cfg, transformer.init(cfg, seed, devices), devices, ple_placement, ple_table, kv, weights, progress)
  return Model(cfg, params, tokenizer, _named_stops(tokenizer), Sampling(), None, _empty_thought_channel(cfg), kv)


def _placed(cfg, params, mesh, placement, storage, kv, weights, progress):
  boxes = None if mesh is None else transformer.abstract(cfg.replace(ple_table='as_is'))
  if (placement, storage) != ('device', cfg.ple_table):   # a model without such a table has it there, too
    inner = params.get('params', params)
    cfg, inner = placing.place(cfg, inner, placement=placement, storage=storage, progress=progress)
    params = inner if 'params' not in params else {**params, 'params': inner}
  if 'quant' not in params and not cfg.rotated_values:   # values of weights that came quantized are rotated beside them
    cfg, params = quantized_cache.fold(cfg, params, kv)
  if quantized.plan(weights):
    params = quantized.quantize(cfg, params, weights, consume=True, progress=progress)
  if mesh is None:
    return generate.fastest(cfg), params
  tree = transformer.variables(params)
  cfg = cfg.replace(matvec='xla')   # the native one is of one device
  return cfg, jax.device_put(tree, sharding.variables(mesh, boxes, tree))


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
    kv: as `load` takes it; None: `self.kv`.

  Attributes:
    stop_ids: tokens that end a row.
    sampling: how to choose, if a call does not say.
    template: source of the chat template that the checkpoint carries; None: ours.
    empty_thought_channel: see `chat.EMPTY_THOUGHT_CHANNEL`.
    kv: how keys and values are kept, if a call does not say.
  """
  cfg: ModelConfig
  params: dict     # or variables of `model.quantized`
  tokenizer: Tokenizer
  stop_ids: tuple[int, ...] = generate.STOP_IDS
  sampling: Sampling = Sampling()
  template: str | None = None
  empty_thought_channel: bool = False
  kv: kv_format.KV = 'exact'

  def generate(self, prompt: str | Sequence[str], *, max_new_tokens: int = 256, sampling: Sampling | None = None,
               seed: int | Sequence[int] = 0, stop_strings: Sequence[str] = (), samples: int = 1, best_of: int | None = None,
               kv: kv_format.KV | None = None) -> Completion | list:
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
             stop_strings: Sequence[str] = (), kv: kv_format.KV | None = None) -> Iterator[str]:
    """Pieces of the text as they are decoded; joined, they are the text of `generate`.

    A character comes whole, and text that could begin a stop string when it is certain that it does not.
    """
    run = self.start([self.encode(prompt)], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_strings=stop_strings, kv=kv,
                     every=1)
    return (piece for new, in run for _, piece in new)

  def chat(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *, thinking: bool = False,
           max_new_tokens: int = 1024, sampling: Sampling | None = None, seed: int = 0, stop_strings: Sequence[str] = (),
           kv: kv_format.KV | None = None) -> dict:
    """The assistant's next message, as `chat.parse` gives it; messages and tools as `chat.encode` takes them."""
    run = self.start([self.encode_chat(messages, tools, thinking=thinking)], chat=True, max_new_tokens=max_new_tokens, sampling=sampling,
                     seed=seed, stop_strings=stop_strings, kv=kv)
    return Reply(run).finish()

  def chat_stream(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *, thinking: bool = False,
                  max_new_tokens: int = 1024, sampling: Sampling | None = None, seed: int = 0, stop_strings: Sequence[str] = (),
                  kv: kv_format.KV | None = None) -> Reply:
    """As `chat`, in pieces."""
    return Reply(self.start([self.encode_chat(messages, tools, thinking=thinking)], chat=True, max_new_tokens=max_new_tokens,
                            sampling=sampling, seed=seed, stop_strings=stop_strings, kv=kv, every=1))

  def score(self, prompt: str, continuations: Sequence[str]) -> list[np.ndarray]:
    """log p of every token of each continuation after the prompt, float32 [n] each; sum for the text's.

    Prompt and continuation are encoded apart: tokens do not reach across. An empty prompt is BOS alone. All run at once, without a
    cache: `kv` has no part in it.
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

  def start(self, prompts: Sequence[np.ndarray], *, max_new_tokens: int, samples: int = 1, kv: kv_format.KV | None = None,
            **settings) -> Run:
    """A run over prompts of `encode` or `encode_chat`; `settings` are those of `Run`."""
    if not prompts:
      raise ValueError('prompt: none given')
    longest, kv = max(map(len, prompts)), self.kv if kv is None else kv
    return Run(self, prompts, lambda: generate.Session(self.cfg, self.params, len(prompts), longest + max_new_tokens, kv=kv), kv=kv,
               max_new_tokens=max_new_tokens, samples=samples, **settings)


def _check_tokenizer(tokens: Tokenizer, found: source.Source, name) -> None:
  """Raises ValueError where the model, or what lies beside its weights, is of another tokenizer."""
  if tokens.vocab_size > found.cfg.vocab_size:
    raise ValueError(f'{name}: its {tokens.vocab_size} entries are more than the model\'s vocabulary of {found.cfg.vocab_size}: '
                     'another model\'s tokenizer')
  read = lambda file: source.read_json(source.inside(found.home, file)) if os.path.lexists(found.home / file) else {}
  trained = read('env.json').get('tokenizer_hash', tokens.hash)
  if trained != tokens.hash:
    raise ValueError(f'{name}: another tokenizer (hash {tokens.hash[:12]}) than the run in {found.home} was trained with ({trained[:12]})')
  fields = read('config.json')
  bos_id = fields.get('bos_token_id') or (fields.get('text_config') or {}).get('bos_token_id') or tokens.bos_id
  if bos_id != tokens.bos_id:
    raise ValueError(f'{name}: it begins a text with id {tokens.bos_id} where {found.home / "config.json"} says bos_token_id = {bos_id}: '
                     'another model\'s tokenizer')


def _generation_config(folder: Path, cfg: ModelConfig, tokenizer: Tokenizer) -> tuple[tuple[int, ...], Sampling]:
  file = source.inside(folder, 'generation_config.json')
  if not os.path.lexists(file):
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
