"""Logits to a token: temperature, top-k, top-p, min-p, repetition penalty and tokens left out, each row with its own settings and seed.

In the order of `transformers`: penalty, suppressed tokens, temperature, top-k, top-p among what top-k left, min-p among what top-p left.
"""

from collections.abc import Sequence
import dataclasses
import math

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to choose; the defaults are those of the released generation configs.

  Attributes:
    temperature: 0 is greedy.
    top_k: the k likeliest; 0 for all.
    top_p: the fewest tokens that hold this much probability; 1 for all.
    min_p: tokens at least this share as likely as the likeliest.
    repetition_penalty: logits of tokens that the row holds already are divided by it where positive, else multiplied.
    suppress_tokens: ids that are never chosen, such as the placeholders of images.
  """
  temperature: float = 1.0
  top_k: int = 64
  top_p: float = 0.95
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  suppress_tokens: tuple[int, ...] = ()

  def check(self, vocab_size: int | None = None) -> None:
    """Raises ValueError naming the setting. Args: vocab_size: None: not known yet, and what it limits is for later."""
    last = 'the last' if vocab_size is None else vocab_size - 1
    size = math.inf if vocab_size is None else vocab_size
    def require(holds: bool, name: str, why: str):
      if not holds:
        raise ValueError(f'{name}: {getattr(self, name)!r} {why}')
    for name in ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty'):
      require(math.isfinite(getattr(self, name)), name, 'is no number')
    for name in ('temperature', 'top_p', 'repetition_penalty'):
      value = getattr(self, name)
      require(value <= 0 or 1e-30 <= value <= 1e30, name, 'is not between 1e-30 and 1e30, within which float32 can divide logits')
    require(self.temperature >= 0, 'temperature', 'is negative; 0 is greedy')
    require(0 <= self.top_k <= size and self.top_k == int(self.top_k), 'top_k',
            f"is no whole number from 0 (all) to the vocabulary's size{'' if vocab_size is None else f', {vocab_size}'}")
    require(0 < self.top_p <= 1, 'top_p', 'is not above 0 and at most 1')
    require(0 <= self.min_p <= 1, 'min_p', 'is not between 0 and 1')
    require(self.repetition_penalty > 0, 'repetition_penalty', 'is not positive')
    require(all(isinstance(i, int | np.integer) and 0 <= i < size for i in self.suppress_tokens), 'suppress_tokens',
            f'holds what is no id of the vocabulary, 0 to {last}')
    require(len(set(self.suppress_tokens)) < size, 'suppress_tokens', 'leaves no token to choose')


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)


@struct.dataclass
class Settings:
  """`Sampling` as arrays [B], so that other settings are no other program.

  Suppressed tokens are [B, S], S a power of two from 8 on, filled up with ids beyond the vocabulary.
  """
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  repetition_penalty: jax.Array
  suppress_tokens: jax.Array

  @classmethod
  def make(cls, rows: Sequence[Sampling], vocab_size: int) -> 'Settings':
    for row in rows:
      row.check(vocab_size)
    column = lambda name, dtype=np.float32: jnp.asarray(np.array([getattr(row, name) for row in rows], dtype))
    most = max((len(row.suppress_tokens) for row in rows), default=0)
    suppressed = np.full((len(rows), max(8, 1 << (most - 1).bit_length())), vocab_size, np.int32)
    for i, row in enumerate(rows):
      suppressed[i, :len(row.suppress_tokens)] = row.suppress_tokens
    return cls(column('temperature'), column('top_k', np.int32), column('top_p'), column('min_p'), column('repetition_penalty'),
               jnp.asarray(suppressed))


def choose(logits_BV: jax.Array, settings: Settings, seen_BV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (token int32 [B], its log-probability float32 [B] under the model alone: no settings).

  Args:
    logits_BV: float32.
    seen_BV: bool, tokens that the row holds.
    keys_B: a PRNG key a row.
  """
  scale_B1 = settings.repetition_penalty[:, None]
  penalised_BV = jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / scale_B1, logits_BV * scale_B1), logits_BV)
  leave_out = jax.vmap(lambda logits_V, ids_S: logits_V.at[ids_S].set(-jnp.inf, mode='drop'))
  penalised_BV = leave_out(penalised_BV, settings.suppress_tokens)
  greedy_B = jnp.argmax(penalised_BV, axis=-1).astype(jnp.int32)
  sampled_B = jax.lax.cond((settings.temperature > 0).any(), lambda: _draw(penalised_BV, settings, keys_B), lambda: greedy_B)
  token_B = jnp.where(settings.temperature > 0, sampled_B, greedy_B)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
  return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _draw(logits_BV, settings, keys_B):
  kept_BV = keep(logits_BV, settings)
  noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
  tempered_BV = logits_BV / jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]
  return jnp.argmax(jnp.where(kept_BV, tempered_BV + noise_BV, -jnp.inf), axis=-1).astype(jnp.int32)


def keep(logits_BV: jax.Array, settings: Settings) -> jax.Array:
  """bool [B, V]: the tokens that temperature, top-k, top-p and min-p leave. Of equals at an edge all stay.

  Without a sort, which for 262,144 tokens takes longer than many a model's step: the edge is found bit by bit.
  """
  logits_BV = logits_BV / jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]
  key_BV = _sortable(logits_BV)
  top_k = jnp.where(settings.top_k > 0, settings.top_k, logits_BV.shape[-1])
  kept_BV = key_BV >= _edge(key_BV, lambda above_BV: above_BV.sum(-1) >= top_k)[:, None]
  p_BV = jax.nn.softmax(jnp.where(kept_BV, logits_BV, -jnp.inf), axis=-1)
  most_likely_BV = key_BV >= _edge(key_BV, lambda above_BV: jnp.where(above_BV, p_BV, 0).sum(-1) >= settings.top_p)[:, None]
  kept_BV &= most_likely_BV | (settings.top_p[:, None] >= 1)   # a float32 sum reaches 1 before the last token
  return kept_BV & (p_BV >= settings.min_p[:, None] * p_BV.max(-1, keepdims=True))


def _sortable(x: jax.Array) -> jax.Array:
  """uint32 in the order of the floats."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _edge(key_BV, enough):
  """The largest uint32 [B] such that the keys from it on are enough; 0 where even all are not."""
  def bit(i, edge_B):
    tried_B = edge_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    return jnp.where(enough(key_BV >= tried_B[:, None]), tried_B, edge_B)
  return jax.lax.fori_loop(0, 32, bit, jnp.zeros(key_BV.shape[0], jnp.uint32))
