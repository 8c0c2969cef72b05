"""AdamW with a learning rate of its own for token tables, decay on matrices only, warmup, and cosine or WSD."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gemma4_jax.config import nearest

_MATRICES = ('w', 'gate', 'up', 'down')    # leaf names of matmul weights (`layers.Einsum`, experts)
SCHEDULES = ('cosine', 'wsd')


def label(path) -> str:
  """'frozen', 'table' (read by row), 'matrix' or 'vector' (norms, scalars) of a parameter, from its path."""
  names = [key.key for key in path]
  if any(name.startswith('frozen') for name in names):
    return 'frozen'
  return 'table' if names[-1] == 'table' else 'matrix' if names[-1] in _MATRICES else 'vector'


def labels(params) -> dict:
  return jax.tree_util.tree_map_with_path(lambda path, _: label(path), params)


def schedule(config: ml_collections.ConfigDict, peak: float, steps: int) -> optax.Schedule:
  """Linear warmup to `peak`; then cosine, or constant and a linear decay over the last `decay_fraction` of the steps (WSD,
  arXiv 2404.06395); both end at peak * end_scale."""
  c = config
  if c.schedule not in SCHEDULES:
    raise ValueError(f'optimizer.schedule: {c.schedule!r} is none of {", ".join(SCHEDULES)}; '
                     f'did you mean {nearest(c.schedule, SCHEDULES)!r}?')
  if not 0 <= c.warmup_steps < steps:
    raise ValueError(f'optimizer.warmup_steps: {c.warmup_steps} is not below train.steps = {steps}')
  warmup = optax.linear_schedule(peak / (c.warmup_steps + 1), peak, c.warmup_steps)
  rest = steps - c.warmup_steps
  if c.schedule == 'cosine':
    return optax.join_schedules([warmup, optax.cosine_decay_schedule(peak, rest, alpha=c.end_scale)], [c.warmup_steps])
  decay = max(1, round(steps * c.decay_fraction))
  if decay > rest:
    raise ValueError(f'optimizer.decay_fraction: {c.decay_fraction} and optimizer.warmup_steps = {c.warmup_steps} overlap')
  return optax.join_schedules(
      [warmup, optax.constant_schedule(peak), optax.linear_schedule(peak, peak * c.end_scale, decay)],
      [c.warmup_steps, steps - decay])


def make(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
  """The optimizer of `config.optimizer` for a run of `steps`; frozen tables have no state and do not move."""
  c = config
  for name in ('learning_rate', 'embedding_learning_rate', 'eps'):
    if not c[name] > 0:
      raise ValueError(f'optimizer.{name}: {c[name]} is not positive')
  for name in ('weight_decay', 'clip_norm'):
    if not c[name] >= 0:
      raise ValueError(f'optimizer.{name}: {c[name]} is negative')
  for name in ('b1', 'b2'):
    if not 0 <= c[name] < 1:
      raise ValueError(f'optimizer.{name}: {c[name]} is not from 0 up to, not including, 1')
  for name in ('end_scale', 'decay_fraction'):
    if not 0 <= c[name] <= 1:
      raise ValueError(f'optimizer.{name}: {c[name]} is not between 0 and 1')
  rate = lambda peak: optax.scale_by_learning_rate(_once(schedule(c, peak, steps)))
  trained = optax.chain(
      _clip(c.clip_norm) if c.clip_norm else optax.identity(),
      optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps),
      optax.add_decayed_weights(c.weight_decay, mask=lambda params: _where(params, {'matrix'})),
      optax.partition({'table': rate(c.embedding_learning_rate), 'matrix': rate(c.learning_rate), 'vector': rate(c.learning_rate)},
                      labels))
  return optax.partition(
      {True: trained, False: optax.set_to_zero()}, lambda params: _where(params, {'table', 'matrix', 'vector'}))


def _once(schedule):
  """Computed apart: XLA would put the cosine into the update of every weight, which takes a tenth of compiling."""
  return lambda step: jax.lax.optimization_barrier(schedule(step))


def _clip(max_norm):
  """As `optax.clip_by_global_norm`, with one factor for all in place of a division of every number, which XLA would not fuse into
  what follows: a pass less over the gradients."""
  def clip(grads, _):
    norm = optax.tree.norm(grads)
    return jax.tree.map(lambda g: g * (max_norm / jnp.maximum(norm, max_norm)).astype(g.dtype), grads)
  return optax.stateless(clip)


def _where(params, wanted):
  return jax.tree_util.tree_map_with_path(lambda path, _: label(path) in wanted, params)
