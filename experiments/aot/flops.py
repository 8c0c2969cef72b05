"""FLOPs of the matmuls of a traced program, over all devices: what is recomputed counts again, what is masked counts too."""

import math

from jax.extend import core


def count(jaxpr: core.ClosedJaxpr) -> float:
  """2 per multiply-add. A loop of known length counts as often as it runs, another once; of branches, the largest."""
  return _count(jaxpr.jaxpr)


def _count(jaxpr):
  total = 0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif name.startswith('ragged_dot'):
      total += 2 * eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[-1]
    elif name == 'scan':
      total += params['length'] * _count(params['jaxpr'].jaxpr)
    elif name == 'cond':
      total += max(_count(branch.jaxpr) for branch in params['branches'])
    elif name == 'pallas_call':
      total += math.prod(params['grid_mapping'].grid) * _count(params['jaxpr'])
    else:
      shards = math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes']) if name == 'shard_map' else 1
      for value in params.values():
        inner = getattr(value, 'jaxpr', value)
        total += shards * _count(inner) if hasattr(inner, 'eqns') else 0
  return total
