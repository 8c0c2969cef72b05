"""Bits per byte and nats per token of a validation split, also by kind of text and by token frequency."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
import math

import jax
import jax.numpy as jnp
import numpy as np

QUARTERS = 4


def frequency_quarters(token_counts: np.ndarray) -> np.ndarray:
  """int32 [V]: 0 for the most frequent tokens .. 3 for the rarest, cut so that each quarter holds about the same share of the
  occurrences counted. The last quarter has most of the vocabulary: the tokens a table learns least about."""
  order = np.argsort(-token_counts, kind='stable')
  before = np.cumsum(token_counts[order]) - token_counts[order]
  quarters = np.empty(len(token_counts), np.int32)
  quarters[order] = np.minimum(QUARTERS - 1, QUARTERS * before // max(1, token_counts.sum()))
  return quarters


def accumulator(nll: Callable, token_bytes: np.ndarray, token_counts: np.ndarray, num_domains: int) -> Callable:
  """Returns jitted (params, batch) -> [3, domains, quarters]: sums of nats, tokens and bytes.

  Args:
    nll: (params, batch) -> float32 [B, T], -log p(target).
    token_bytes: int [V], bytes of text a token stands for.
    token_counts: int [V], occurrences in the training split.
  """
  bytes_V, quarter_V = jnp.asarray(token_bytes, jnp.float32), jnp.asarray(frequency_quarters(token_counts))

  @jax.jit
  def sums(params, batch):
    cell_BT = batch['domains'] * QUARTERS + quarter_V[batch['targets']]
    weight_BT = batch['weights']
    values = jnp.stack([jnp.where(weight_BT > 0, nll(params, batch), 0), weight_BT, weight_BT * bytes_V[batch['targets']]])
    add = partial(jax.ops.segment_sum, segment_ids=cell_BT.reshape(-1), num_segments=num_domains * QUARTERS)
    return jax.vmap(add)(values.reshape(3, -1)).reshape(3, num_domains, QUARTERS)

  return sums


def names(domains: Sequence[str]) -> list[str]:
  """What `evaluate` can be asked to compare runs by: of all text, of each kind, and of each quarter."""
  parts = ['', *(f'{domain}/' for domain in domains), *(f'frequency_q{q + 1}/' for q in range(QUARTERS))]
  return [f'eval/{part}{unit}' for part in parts for unit in ('bits_per_byte', 'nats_per_token')]


def evaluate(sums: Callable, params, batches: Iterable[dict], domains: Sequence[str]) -> dict[str, float]:
  """Runs an `accumulator` over batches and names what comes out; cells without tokens are left out."""
  total = np.zeros((3, len(domains), QUARTERS), np.float64)
  for batch in batches:
    total += np.asarray(sums(params, batch), np.float64)
  if total[1].sum() == 0:
    raise ValueError('eval: the validation split has no token to predict; raise data.validation_fraction')
  rows = {'eval/': total.sum((1, 2))}
  rows |= {f'eval/{domain}/': total[:, i].sum(-1) for i, domain in enumerate(domains)}
  rows |= {f'eval/frequency_q{q + 1}/': total[:, :, q].sum(-1) for q in range(QUARTERS)}
  out = {}
  for prefix, (nats, tokens, size) in rows.items():
    if tokens:
      out[f'{prefix}nats_per_token'] = nats / tokens
      out[f'{prefix}bits_per_byte'] = nats / math.log(2) / size
  return out | {'eval/tokens': int(total[1].sum()), 'eval/bytes': int(total[2].sum())}
