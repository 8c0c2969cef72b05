"""Matched baselines: a model grown by width, depth or experts until it costs what another embedding arm costs.

"PLE is better" asks: better than what else the same parameters, FLOPs or memory buy? `config.match` names the cost, the arm
to equal and the way to grow; the result is solved from `size`, not guessed, to within TOLERANCE.
"""

from collections.abc import Callable
import copy

import ml_collections

from gemma4_jax import config as model_config, size
from gemma4_jax.config import EMBEDDING_ARMS, ModelConfig

TOLERANCE = 0.01

# Name of a cost -> its value for a model and a sequence length.
COSTS = {
    'total_params': lambda cfg, context: size.total(cfg),
    'flops': size.forward_flops,
    'resident_bytes': lambda cfg, context: size.resident_bytes(cfg),
}


def resolve(config: ml_collections.ConfigDict) -> tuple[ml_collections.ConfigDict, dict]:
  """Grows (or shrinks) `config.model` until its cost is that of the arm `config.match.arm`.

  With `match.metric` '' the config comes back as it is, with an empty report. Otherwise a copy comes back, with other
  model fields and `match.target` filled in. A config that has a target is held to it, so resolving twice changes nothing.

    width    `width` in steps of 8 (of 1 below 64), `mlp_dim` and `expert_dim` in proportion; heads keep number and size.
    depth    whole periods of the pattern; the share of layers that borrow K/V (and have the double-wide MLPs) stays, to the
             nearest period. Less than half a period: layers like the first before it, which leave every other layer its
             place in the pattern and its lender, and the last one last.
    experts  more of them. A dense MLP first becomes experts of half its width, two a token: equal FLOPs but for the router.
             Where some layers have a double-wide MLP, all get experts of half the mean width: equal over the model.

  What is left is trimmed with `expert_dim` and then `mlp_dim`, in steps of 8 (of 1 below 512).

  Returns:
    (config, report); report has 'metric', 'arm', 'by', 'target' and 'reached' (parameters, forward FLOPs a token of a
    document of `data.sequence_length` tokens, or bytes), 'mismatch' (signed, a share of the target) and 'changed'
    {model field: (old, new)}.
  Raises:
    ValueError: a match that cannot be made, or that misses by more than TOLERANCE.
  """
  match = config.match
  if not match.metric:
    return config, {}
  for field, known in ('metric', COSTS), ('arm', EMBEDDING_ARMS), ('by', _GROW):
    if match[field] not in known:
      near = model_config.nearest(match[field], list(known))
      raise ValueError(f'match.{field}: {match[field]!r} is none of {", ".join(known)}; did you mean {near!r}?')
  cfg = model_config.from_dict(config.model)
  cost = lambda c: COSTS[match.metric](c, config.data.sequence_length)
  target = match.target or cost(cfg.replace(embedding=match.arm))
  mismatch = lambda c: cost(c) / target - 1

  new = cfg
  if not match.target or abs(mismatch(cfg)) > TOLERANCE:
    if (match.metric, match.by) == ('flops', 'experts'):
      raise ValueError("match.by: 'experts' leave the FLOPs of a token as they are; for match.metric='flops' set 'width' or 'depth'")
    new = _GROW[match.by](cfg, cost, target)
  if abs(mismatch(new)) > TOLERANCE:
    raise ValueError(f'match.by: by {match.by} the nearest to {target:,.0f} {match.metric} is {cost(new):,.0f} '
                     f'({mismatch(new):+.1%}), beyond {TOLERANCE:.0%}; try {" or ".join(by for by in _GROW if by != match.by)}')

  old_fields, new_fields = cfg.to_dict(), new.to_dict()
  changed = {name: (old, new_fields[name]) for name, old in old_fields.items() if new_fields[name] != old}
  config = copy.deepcopy(config)
  config.model.update({name: new for name, (_, new) in changed.items()})
  config.match.target = float(target)
  return config, dict(metric=match.metric, arm=match.arm, by=match.by, target=target, reached=cost(new),
                      mismatch=mismatch(new), changed=changed)


def tell(report: dict) -> str:
  """A report of `resolve` in words, the mismatch that is left among them."""
  changed = ', '.join(f'{field} {old} -> {new}' for field, (old, new) in report['changed'].items()) or 'nothing to change'
  return (f'{report["metric"]} {report["reached"]:,.0f} against {report["target"]:,.0f}, '
          f'off by {100 * report["mismatch"]:+.2f} % ({changed})')


Cost = Callable[[ModelConfig], float]


def _by_width(cfg: ModelConfig, cost: Cost, target: float) -> ModelConfig:
  step = 8 if cfg.width >= 64 else 1

  def widened(k: int) -> ModelConfig:
    width = cfg.width + k * step
    factor = width / cfg.width
    return cfg.replace(width=width, mlp_dim=_scaled(cfg.mlp_dim, factor), expert_dim=_scaled(cfg.expert_dim, factor))

  k = _nearest(widened, -((cfg.width - 1) // step), cost, target)
  return _trim(widened(k) if k else cfg, cost, target)


def _by_depth(cfg: ModelConfig, cost: Cost, target: float) -> ModelConfig:
  if cfg.ple_layers and cfg.inject_layers:
    raise ValueError("match.by: 'depth' renumbers the layers that model.ple_layers names; set model.ple_every, or 'width'")
  period, first, n = len(cfg.pattern), cfg.pattern[0], cfg.num_layers

  def add_periods(k: int) -> ModelConfig:
    layers = n + k * period
    shared = cfg.num_kv_shared_layers + period * round(k * cfg.num_kv_shared_layers / n)
    return cfg.replace(num_layers=layers, num_kv_shared_layers=max(0, min(shared, layers - period)))

  def add_first_layers(k: int) -> ModelConfig:
    kinds = ''.join(cfg.pattern[i % period] for i in range(n))
    return cfg.replace(num_layers=n + k, pattern=(first * k + kinds)[max(0, -k):]) if k else cfg

  k = _nearest(add_periods, min(0, 1 - n // period), cost, target)
  if k:
    return _trim(add_periods(k), cost, target)
  spare = period - len(cfg.pattern.lstrip(first)) - 1   # first layers that can go while the first period keeps its kinds
  return _trim(add_first_layers(_nearest(add_first_layers, -min(spare, n - 1), cost, target)), cost, target)


def _by_experts(cfg: ModelConfig, cost: Cost, target: float) -> ModelConfig:
  base = cfg
  if not cfg.num_experts:
    if not cfg.gated_mlp or cfg.embedding == 'stem':
      field = 'embedding' if cfg.gated_mlp else 'gated_mlp'
      raise ValueError(f"match.by: 'experts' are whole gated MLPs, which contradicts model.{field} = {getattr(cfg, field)!r}")
    wide = sum(spec.mlp_dim for spec in cfg.layers) / (cfg.num_layers * cfg.mlp_dim)
    base = cfg.replace(num_experts=2, num_experts_per_token=2, expert_dim=_scaled(cfg.mlp_dim, wide / 2),
                       moe_dense_branch=False, double_wide_mlp=False)

  more = lambda k: base.replace(num_experts=base.num_experts + k)
  k = _nearest(more, base.num_experts_per_token - base.num_experts, cost, target)
  if not cfg.num_experts and not k:
    raise ValueError(f"match.by: 'experts' are too coarse: one costs {cost(more(1)) - cost(base):,.0f}, and the target of "
                     f"{target:,.0f} is but {target - cost(cfg):+,.0f} from the dense model; set 'width' or 'depth'")
  return _trim(more(k), cost, target)


_GROW = {'width': _by_width, 'depth': _by_depth, 'experts': _by_experts}


def _nearest(grown: Callable[[int], ModelConfig], least: int, cost: Cost, target: float) -> int:
  """The k >= least whose model costs nearest to the target; the cost must rise with k."""
  low, high = least, 1
  while cost(grown(high)) < target:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if cost(grown(middle)) <= target else (low, middle)
  return min(low, high, key=lambda k: abs(cost(grown(k)) - target))


def _trim(cfg: ModelConfig, cost: Cost, target: float) -> ModelConfig:
  """Moves the widths of experts and dense MLP to where the target is met.

  Experts first: beside them the dense MLP is small, and to make up for much would bend it out of shape.
  """
  for field in ('expert_dim', 'mlp_dim'):
    cfg = _trim_field(cfg, field, cost, target)
  return cfg


def _trim_field(cfg: ModelConfig, field: str, cost: Cost, target: float) -> ModelConfig:
  """Solves for one width, in which every cost is linear."""
  dim, step = getattr(cfg, field), _step(cfg, field)
  resized = lambda steps: cfg.replace(**{field: dim + steps * step})
  slope = cost(resized(1)) - cost(cfg) if dim else 0
  if not slope:   # a part that is not there, or a dense MLP without a branch to sit in
    return cfg
  return resized(max(-((dim - 1) // step), round((target - cost(cfg)) / slope)))


def _step(cfg: ModelConfig, field: str) -> int:
  return 8 if getattr(cfg, field) >= 512 else 1


def _scaled(dim: int, factor: float) -> int:
  """`dim * factor` on the grid of `_step`: at least 1, but 0 for a part that is not there."""
  scaled = dim * factor
  return max(min(dim, 1), 8 * round(scaled / 8) if scaled >= 512 else round(scaled))
