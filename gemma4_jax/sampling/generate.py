"""Tokens in, tokens out: prompts in chunks, then a decode loop that is one compiled program.

  cfg, params = load.load(directory)                        # or transformer.init(cfg, 0)
  out = generate.generate(cfg, params, [ids], max_new_tokens=64)
  for new in generate.stream(cfg, params, [ids], max_new_tokens=64): ...

Lengths are rounded up to a few buckets; another prompt, seed, temperature or stop set is no other program. Prompts are ragged;
a row's tokens do not depend on its batch. Where the parameters are on a mesh, so is all that is kept of a conversation, split as
`sharding.rows` says.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
from functools import partial
import math
import signal
import threading

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax import compilation, kv_format, sharding
from gemma4_jax.config import ModelConfig
from gemma4_jax.data.chat import STOP_IDS
from gemma4_jax.model import kv_cache, quantized_cache, transformer
from gemma4_jax.native import matvec
from gemma4_jax.sampling import sampler
from gemma4_jax.sampling.sampler import Sampling

PREFILL_CHUNK = 1024      # tokens of a prompt that run at once


def fastest(cfg: ModelConfig) -> ModelConfig:
  """`cfg` with the matvec that is fastest where it can run: native on a CPU that has a C++ compiler."""
  return cfg.replace(matvec='xla' if matvec.why_not() else 'native')


@struct.dataclass
class _State:
  """What the decode loop carries. `token_B` is chosen and not yet in the cache."""
  cache: kv_cache.Cache
  token_B: jax.Array
  logprob_B: jax.Array
  seen_BV: jax.Array
  done_B: jax.Array
  count: jax.Array      # int32, tokens chosen since the prompt


@dataclasses.dataclass(frozen=True)
class Generation:
  """Of one row.

  Attributes:
    tokens: int32 [n], the stop id that ended it included.
    logprobs: float32 [n], of each token under the model, without temperature or cuts.
    stopped: whether a stop id ended it, not `max_new_tokens`.
  """
  tokens: np.ndarray
  logprobs: np.ndarray
  stopped: bool


def generate(cfg: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
             sampling: Sampling | Sequence[Sampling] = Sampling(), seed: int | Sequence[int] = 0,
             stop_ids: Sequence[int] = STOP_IDS, samples: int = 1, kv: kv_format.KV = 'exact') -> list[Generation]:
  """Continues every prompt.

  Args:
    params: the canonical tree, as `checkpoint.load` and `transformer.init` give it, or variables of `model.quantized`.
    prompts: token ids, one sequence a row; BOS is the caller's.
    max_new_tokens: of every row, at most.
    sampling: for all rows, or one a row.
    seed: for all rows (row i then draws from (seed, i)), or one a row.
    stop_ids: a row ends with the first of these that it chooses.
    samples: continuations of every prompt, which runs once; row i's are results i * samples and on.
    kv: how keys and values are kept: what `kv_format.make` takes.
  Raises:
    ValueError: before anything is compiled, naming what cannot be.
  """
  session = Session(cfg, params, len(prompts), _needed(cfg, prompts, max_new_tokens), kv=kv)
  if samples < 1:
    raise ValueError(f'samples: {samples} is not positive')
  _choices(cfg, len(prompts) * samples, sampling, seed, stop_ids)   # before anything is compiled
  session.append(prompts)
  if samples != 1:
    session.fork(samples)
  parts = list(session.generate(max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids, every=max_new_tokens))
  return [Generation(np.concatenate([part[row][0] for part in parts]), np.concatenate([part[row][1] for part in parts]), stopped)
          for row, stopped in enumerate(session.stopped)]


def stream(cfg: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, every: int = 1,
           sampling: Sampling | Sequence[Sampling] = Sampling(), seed: int | Sequence[int] = 0,
           stop_ids: Sequence[int] = STOP_IDS, kv: kv_format.KV = 'exact') -> Iterator[list[np.ndarray]]:
  """As `generate`, but yields every row's new tokens (int32) after each `every` steps: the same tokens in all."""
  session = Session(cfg, params, len(prompts), _needed(cfg, prompts, max_new_tokens), kv=kv)
  _choices(cfg, len(prompts), sampling, seed, stop_ids)   # before anything is compiled
  session.append(prompts)
  for part in session.generate(max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids, every=every):
    yield [tokens for tokens, _ in part]


def score(cfg: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]],
          ) -> list[np.ndarray]:
  """log p of every token of a continuation after its prompt, float32 [n], one array a row.

  Raises:
    ValueError: as `generate`.
  """
  _check_unstacked(cfg)
  if len(prompts) != len(continuations):
    raise ValueError(f'{len(prompts)} prompts for {len(continuations)} continuations')
  rows = [np.concatenate([_row(cfg, p, 'prompt'), _row(cfg, c, 'continuation')]) for p, c in zip(prompts, continuations)]
  if not rows:
    raise ValueError('no prompts')
  longest = max(map(len, rows))
  if longest > cfg.context_length:
    raise ValueError(f'prompt and continuation: {longest} tokens are more than model.context_length = {cfg.context_length}')
  T = _bucket(longest)
  ids, seg = _padded(rows, T)
  with uninterrupted(), sharding.use(sharding.of(params)):
    logprobs = np.asarray(_logprobs(cfg, params, ids, seg))
  return [logprobs[i, len(p) - 1:len(row) - 1] for i, (p, row) in enumerate(zip(prompts, rows))]


def _check_unstacked(cfg):
  if cfg.scan:
    raise ValueError('model.scan: sampling takes layers one by one: cfg.replace(scan=False) and transformer.unstack(cfg, params)')


@contextlib.contextmanager
def uninterrupted():
  """Ctrl-C comes at the end of the block. XLA goes on with a program that Python has left: one whose buffers are let go crashes."""
  if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    yield
    return
  pressed = []
  signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  if pressed:
    raise KeyboardInterrupt


class Session:
  """A batch of conversations and what the model keeps of them: `append` tokens, `generate`, and so on in turn.

  Attributes:
    length: int array [B], tokens in the cache; a chosen token enters with the next one.
    stopped: bool array [B], rows that the last `generate` ended with a stop id.
  """

  def __init__(self, cfg: ModelConfig, params: dict, batch: int, capacity: int, *, kv: kv_format.KV = 'exact'):
    """Args: capacity: tokens that a row can come to hold. Raises ValueError."""
    if batch < 1:
      raise ValueError('no prompts: a batch has at least one')
    if capacity > cfg.context_length:
      raise ValueError(f'prompt and max_new_tokens: {capacity} tokens are more than model.context_length = {cfg.context_length}')
    _check_unstacked(cfg)
    self._cfg, self._params, self._mesh = cfg, params, sharding.of(params)
    self.capacity = capacity
    empty = partial(_empty, cfg, batch, _bucket(capacity), kv)
    if self._mesh is not None:
      empty = jax.jit(empty, out_shardings=sharding.rows(self._mesh, jax.eval_shape(empty)))
    self._state = empty()
    self._logits = None        # [B, V] of the token that comes next, until it is chosen
    self._pending = False      # whether `token_B` waits for its place in the cache
    self.length = np.zeros(batch, np.int64)
    self.stopped = np.zeros(batch, bool)

  @property
  def cache_bytes(self) -> int:
    return self._state.cache.nbytes

  def append(self, ids: Sequence[Sequence[int]]) -> None:
    """Adds tokens to every row, after the token it chose last. Raises ValueError: nothing has changed then."""
    rows = [_row(self._cfg, row, f'prompt {i}') for i, row in enumerate(ids)]
    if len(rows) != len(self.length):
      raise ValueError(f'{len(rows)} prompts for a batch of {len(self.length)}')
    if self._pending:
      rows = [np.concatenate([[token], row]) for token, row in zip(np.asarray(self._state.token_B), rows)]
    longest = max(map(len, rows))
    self._check_room(max(self.length + [len(row) for row in rows]))
    chunk = min(PREFILL_CHUNK, _bucket(longest))
    tokens, seg = _padded(rows, -(-longest // chunk) * chunk)
    logits = self._logits
    if logits is None:
      logits = self._placed(jnp.zeros((len(rows), self._cfg.vocab_size), jnp.float32))
    cache, seen = self._state.cache, self._state.seen_BV
    for start in range(0, tokens.shape[1], chunk):
      part = slice(start, start + chunk)
      with sharding.use(self._mesh):
        cache, seen, logits = _prefill(self._cfg, self._params, cache, seen, logits, tokens[:, part], seg[:, part])
    self._state = self._state.replace(cache=cache, seen_BV=seen)
    self._logits, self._pending = logits, False
    self.length += [len(row) for row in rows]

  def wait(self) -> None:
    """Returns when what was appended has run."""
    jax.block_until_ready(self._logits)

  def fork(self, samples: int) -> None:
    """Repeats every row: row i becomes rows i * samples and on."""
    if samples < 1:
      raise ValueError(f'samples: {samples} is not positive')
    again = lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x
    self._state, self._logits = self._placed(jax.tree.map(again, (self._state, self._logits)))
    self.length, self.stopped = (np.repeat(x, samples) for x in (self.length, self.stopped))

  def generate(self, max_new_tokens: int, *, sampling: Sampling | Sequence[Sampling] = Sampling(), seed: int | Sequence[int] = 0,
               stop_ids: Sequence[int] = STOP_IDS, every: int = 1) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yields after each `every` steps, for every row, its (new tokens int32, their logprobs float32); ends when all rows have.

    A consumer that stops early leaves the session where it stopped.
    """
    cfg, B = self._cfg, len(self.length)
    if max_new_tokens < 1 or every < 1:
      raise ValueError(f'max_new_tokens: {max_new_tokens}, every: {every}: not positive')
    if self._logits is None:
      raise ValueError('nothing to continue: append a prompt first')
    self._check_room(max(self.length) + max_new_tokens)
    choices = _choices(cfg, B, sampling, seed, stop_ids)
    return self._generate(max_new_tokens, *choices, every)

  def _generate(self, max_new_tokens, settings, keys, stops, every):
    settings, keys = self._placed((settings, keys))
    with uninterrupted(), sharding.use(self._mesh):
      self._state = _first(self._cfg, self._state, self._logits, settings, keys, stops)
      self._logits, self._pending = None, True
      first = jax.device_get((self._state.token_B, self._state.logprob_B, self._state.done_B))
    B, slots = len(self.length), _bucket(min(every, max_new_tokens), 1)
    count, alive = 1, np.ones(B, bool)
    new = [([token], [logprob]) for token, logprob, _ in zip(*first)]
    done = first[2]
    while True:
      limit = min(every - len(new[0][0]) if count == 1 else every, max_new_tokens - count)
      if limit > 0 and not done.all():
        alive = ~done
        before = np.asarray(self._state.cache.length_B)
        with uninterrupted(), sharding.use(self._mesh):
          self._state, tokens, logprobs = _decode(
              self._cfg, self._params, self._state, settings, keys, stops, jnp.int32(count + limit), slots=slots)
          tokens, logprobs, done, after = jax.device_get((tokens, logprobs, self._state.done_B, self._state.cache.length_B))
          self.length = after.astype(np.int64)
        for row, steps in enumerate(after - before):
          new[row] = ([*new[row][0], *tokens[row, :steps]], [*new[row][1], *logprobs[row, :steps]]) if alive[row] else new[row]
        count += limit
      self.stopped = np.array(done)
      yield [(np.array(tokens, np.int32), np.array(logprobs, np.float32)) for tokens, logprobs in new]
      new = [([], []) for _ in range(B)]
      if done.all() or count >= max_new_tokens:
        return

  def _placed(self, tree):
    return tree if self._mesh is None else jax.device_put(tree, sharding.rows(self._mesh, tree))

  def _check_room(self, needed):
    if needed > self.capacity:
      raise ValueError(f'prompt and max_new_tokens: {needed} tokens are more than the {self.capacity} of this session')


def _empty(cfg, batch, capacity, kv):
  return _State(quantized_cache.make(cfg, batch, capacity, kv), jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,)),
                jnp.zeros((batch, cfg.vocab_size), bool), jnp.ones((batch,), bool), jnp.zeros((), jnp.int32))


@partial(compilation.Jitted, options=compilation.lean_options, static_argnums=0, donate_argnums=(2, 3, 4))
def _prefill(cfg, params, cache, seen_BV, logits_BV, ids_BT, seg_BT):
  """Adds a chunk; rows that have tokens in it get the logits after their last."""
  new_BV, out = transformer.Transformer(cfg).apply(transformer.variables(params), ids_BT, None, seg_BT, cache=cache, last_only=True)
  known_BT = jnp.where(seg_BT > 0, ids_BT, cfg.vocab_size)
  seen_BV = jax.vmap(lambda seen_V, ids_T: seen_V.at[ids_T].set(True, mode='drop'))(seen_BV, known_BT)
  logits_BV = jnp.where((seg_BT > 0).any(1)[:, None], new_BV[:, 0], logits_BV)
  return sharding.constrain_rows((out['cache'], seen_BV, logits_BV))


@partial(jax.jit, static_argnums=0, donate_argnums=(1,))
def _first(cfg, state, logits_BV, settings, keys_B, stops):
  return _choose(state.replace(count=jnp.zeros((), jnp.int32), done_B=jnp.zeros_like(state.done_B)), logits_BV, settings, keys_B, stops)


@partial(jax.jit, static_argnums=0, static_argnames='slots', donate_argnums=(2,))
def _decode(cfg, params, state, settings, keys_B, stops, limit, *, slots):
  """Steps until `limit` tokens are chosen or all rows are done: (state, tokens [B, slots], logprobs [B, slots])."""
  B, start = state.token_B.shape[0], state.count

  def step(carry):
    state, tokens, logprobs = carry
    seg_B1 = (~state.done_B).astype(jnp.int32)[:, None]
    logits, out = transformer.Transformer(cfg).apply(transformer.variables(params), state.token_B[:, None], None, seg_B1, cache=state.cache)
    at = state.count - start
    state = _choose(state.replace(cache=sharding.constrain_rows(out['cache'])), logits[:, 0], settings, keys_B, stops)
    return state, tokens.at[:, at].set(state.token_B), logprobs.at[:, at].set(state.logprob_B)

  more = lambda carry: (carry[0].count < limit) & ~carry[0].done_B.all()
  return jax.lax.while_loop(more, step, (state, jnp.zeros((B, slots), jnp.int32), jnp.zeros((B, slots), jnp.float32)))


def _choose(state, logits_BV, settings, keys_B, stops):
  """One more token for every row that is not done."""
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.count)
  token_B, logprob_B = sampler.choose(logits_BV, settings, state.seen_BV, keys_B)
  token_B, logprob_B = jnp.where(state.done_B, state.token_B, token_B), jnp.where(state.done_B, state.logprob_B, logprob_B)
  return state.replace(
      token_B=token_B, logprob_B=logprob_B, seen_BV=jax.vmap(lambda seen_V, i: seen_V.at[i].set(True))(state.seen_BV, token_B),
      done_B=state.done_B | (token_B[:, None] == stops).any(-1), count=state.count + 1)


@partial(jax.jit, static_argnums=0)
def _logprobs(cfg, params, ids_BT, seg_BT):
  """log p of token t + 1 at place t, [B, T]; a row at a time through the head, whose logits never exist whole."""
  model = transformer.Transformer(cfg)
  x_BTD, _ = model.apply(transformer.variables(params), ids_BT, None, seg_BT, head=False)

  def row(args):
    x_TD, next_T = args
    logits_TV = model.apply(transformer.variables(params), x_TD, method='head')
    return jnp.take_along_axis(logits_TV, next_T[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits_TV, axis=-1)

  chunk = min(ids_BT.shape[1], 128)
  split = lambda x: x.reshape(-1, chunk, *x.shape[2:])
  return jax.lax.map(row, (split(x_BTD), split(jnp.roll(ids_BT, -1, axis=1)))).reshape(ids_BT.shape)


def _row(cfg, ids, what) -> np.ndarray:
  ids = np.asarray(ids)
  if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f'{what}: no tokens: a sequence of at least one id')
  if ids.min() < 0 or ids.max() >= cfg.vocab_size:
    wrong = int(ids[(ids < 0) | (ids >= cfg.vocab_size)][0])
    raise ValueError(f'{what}: id {wrong} is outside the vocabulary of {cfg.vocab_size}: another model\'s tokenizer?')
  return ids.astype(np.int32)


def check_seeds(seeds: Sequence[int]) -> None:
  """Raises ValueError: one is no seed."""
  if wrong := [s for s in seeds if not (isinstance(s, int | np.integer) and 0 <= s < 2**32)]:
    raise ValueError(f'seed: {wrong[0]!r} is no whole number from 0 to 2**32 - 1')


def _choices(cfg, batch, sampling, seed, stop_ids):
  """(settings, a key a row, stop ids padded with -1), or a ValueError."""
  rows = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
  seeds = [(s, 0) for s in seed] if isinstance(seed, Sequence | np.ndarray) else [(seed, i) for i in range(batch)]
  if len(rows) != batch or len(seeds) != batch:
    raise ValueError(f'sampling: {len(rows)}, seeds: {len(seeds)} for a batch of {batch}')
  check_seeds([s for s, _ in seeds])
  if stop_ids is not STOP_IDS and not all(isinstance(i, int | np.integer) and 0 <= i < cfg.vocab_size for i in stop_ids):
    raise ValueError(f'stop_ids: {list(stop_ids)!r} holds what is no id of the vocabulary, 0 to {cfg.vocab_size - 1}')
  stops = np.full(_bucket(len(stop_ids), 8), -1, np.int32)
  stops[:len(stop_ids)] = list(stop_ids)   # of a set, too
  keys = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(*jnp.asarray(np.array(seeds, np.uint32).T))
  return sampler.Settings.make(rows, cfg.vocab_size), keys, jnp.asarray(stops)


def _needed(cfg, prompts, max_new_tokens) -> int:
  if len(prompts) == 0:
    raise ValueError('no prompts: a batch has at least one')
  if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
    raise ValueError(f'max_new_tokens: {max_new_tokens!r} is no whole number from 1 on')
  return max(len(_row(cfg, prompt, f'prompt {i}')) for i, prompt in enumerate(prompts)) + max_new_tokens


def _padded(rows, length) -> tuple[np.ndarray, np.ndarray]:
  ids, seg = np.zeros((2, len(rows), length), np.int32)
  for i, row in enumerate(rows):
    ids[i, :len(row)], seg[i, :len(row)] = row, 1
  return ids, seg


def _bucket(n: int, least: int = 16) -> int:
  """n rounded up: to a power of two, from 1024 on to an eighth of one."""
  n = max(n, least)
  step = 1 << max(math.ceil(math.log2(n)) - (3 if n > 1024 else 0), 0)
  return -(-n // step) * step
