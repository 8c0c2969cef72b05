"""A mesh changes where numbers are and not what they are: eight devices against one, for every axis."""

import functools
import json
import subprocess
import sys

from jax.sharding import AbstractMesh, AxisType, PartitionSpec
import pytest

from gemma4_jax import sharding
from tests import quick

MESHES = {'fsdp=4,tensor=2': 8, 'data=2,tensor=2,expert=2': 4, 'fsdp=8': 8, 'data=2,tensor=4': 4}   # into how many a weight is split
FEW, MORE = list(MESHES)[:2], list(MESHES)[2:]
SAMPLED = ('', 'data=2,tensor=2,expert=2')
REMATERIALIZATION = 'nvoluntary full rematerialization'

# Four query heads on one K/V head, experts, PLE; more rows than devices that split them.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from configs import base
from gemma4_jax import config, sharding
from gemma4_jax.model import transformer
from gemma4_jax.sampling import generate
from gemma4_jax.training import optimizer, trainer

cfg = config.shrink(config.E2B, pattern='G', num_layers=1, num_kv_shared_layers=0, double_wide_mlp=False, width=32, mlp_dim=48,
                    num_experts=4, num_experts_per_token=2, expert_dim=16, remat='full')
ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (8, 17)).astype(np.int32)
batch = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'positions': np.tile(np.arange(16, dtype=np.int32), (8, 1)),
         'segments': np.ones((8, 16), np.int32), 'weights': np.random.default_rng(1).random((8, 16)).astype(np.float32)}
tx = optimizer.make(base.get_config('e2b-toy').optimizer, 100)
for text in json.loads(sys.argv[1]):
  mesh = sharding.make_mesh(sharding.parse(text)) if text else sharding.make_mesh({}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    state = trainer.init_state(cfg, tx, 0, mesh)
    where = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)
    step = jax.jit(trainer.make_step(cfg, tx, accumulate=1, loss_chunk=5), out_shardings=where)
    after, row = step(state, jax.device_put(batch, sharding.batch(mesh)))
  out = {name: float(value) for name, value in row.items()}
  out['moments'] = [float(np.linalg.norm(x)) for x in jax.tree.leaves(after.opt_state) if x.ndim]   # of one step: the gradients
  out['shares'] = sorted({x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(state.params)})
  if text in json.loads(sys.argv[2]):
    session = generate.Session(cfg, state.params, 4, 40)
    session.append([row[:n] for row, n in zip(ids, (15, 3, 7, 9))])
    out['logits'] = np.asarray(session._logits).tolist()
    steps = list(session.generate(8, seed=3, stop_ids=(), every=8))
    out['tokens'] = [tokens.tolist() for tokens, _ in steps[0]]
    out['cache'] = [x.addressable_shards[0].data.shape[:2] for x in jax.tree.leaves(session._state.cache.layers)]
  print(json.dumps({text: out}), flush=True)
"""


@functools.cache
def run(*meshes):
  """Mesh -> what came out on it; of none, on one device. All in one process."""
  env = quick.virtual_devices(8, '--xla_backend_optimization_level=0')
  command = [sys.executable, '-c', SCRIPT, json.dumps(['', *meshes]), json.dumps(SAMPLED)]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  found = {}
  for line in done.stdout.splitlines():
    found |= json.loads(line)
  return found | {'stderr': done.stderr}


@pytest.mark.parametrize('mesh', quick.only(FEW, [*FEW, *MORE]))
def test_a_training_step_on_a_mesh_has_the_loss_and_gradients_of_one_device(mesh):
  runs = run(*(FEW if mesh in FEW else MORE))
  one, many = runs[''], runs[mesh]
  assert many['loss'] == pytest.approx(one['loss'], rel=1e-6)
  assert many['grad_norm'] == pytest.approx(one['grad_norm'], rel=1e-5)
  assert many['moments'] == pytest.approx(one['moments'], rel=1e-4, abs=1e-8)   # the last layer's scalar has no gradient but rounding
  assert one['shares'] == [1] and max(many['shares']) == MESHES[mesh]


def test_a_conversation_on_a_mesh_has_the_logits_and_tokens_of_one_device():
  runs, mesh = run(*FEW), SAMPLED[1]
  for one, many in zip(runs['']['logits'], runs[mesh]['logits'], strict=True):
    assert many == pytest.approx(one, abs=2e-5)
  assert runs[mesh]['tokens'] == runs['']['tokens']
  assert runs['']['cache'] == [[4, 1]] * 2 and runs[mesh]['cache'] == [[2, 1]] * 2   # rows are split, the one K/V head is whole


# K=V as in 31B, which keeps values once, and K and V apart; two K/V heads over `tensor`, rows over `data`.
QUANTIZED = """
import json
import jax, numpy as np
from gemma4_jax import config, sharding
from gemma4_jax.model import transformer
from gemma4_jax.sampling import generate

kwargs = dict(pattern='LG', num_layers=2, num_kv_shared_layers=0, width=32, mlp_dim=48, window=8, num_heads=4, num_kv_heads=2,
              global_num_kv_heads=2, head_dim=32, global_head_dim=64, vocab_size=64)
ids = np.random.default_rng(0).integers(0, 64, (4, 17)).astype(np.int32)
for text in ('', 'data=2,tensor=2'):
  mesh = sharding.make_mesh(sharding.parse(text)) if text else sharding.make_mesh({}, jax.devices()[:1])
  for variant, kv in ((config.E4B, 'turboquant'), (config.B31, 'quality,kernel=interpret')):
    cfg = config.shrink(variant, **kwargs)
    params = transformer.init(cfg, 0, mesh)
    session = generate.Session(cfg, params, 4, 40, kv=kv + ',exact_last=False,recent=4,sinks=2')
    session.append([row[:n] for row, n in zip(ids, (15, 3, 7, 17))])
    out = {'logits': np.asarray(session._logits).tolist()}
    tokens, out['logprobs'] = zip(*[(t.tolist(), p.tolist()) for t, p in list(session.generate(12, seed=3, stop_ids=(), every=12))[0]])
    codes = [x for x in jax.tree.leaves(session._state.cache.layers) if x.dtype == np.uint8]
    out |= {'tokens': tokens, 'split': [[n // m for n, m in zip(x.shape[:2], x.addressable_shards[0].data.shape)] for x in codes]}
    print(json.dumps(out), flush=True)
"""


@pytest.mark.slow
def test_quantized_caches_on_a_mesh_give_the_logits_of_one_device():
  done = subprocess.run([sys.executable, '-c', QUANTIZED], env=quick.virtual_devices(4, '--xla_backend_optimization_level=0'),
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  found = [json.loads(line) for line in done.stdout.splitlines()]
  one, many = found[:2], found[2:]
  assert len(one) == len(many) == 2
  for a, b in zip(one, many, strict=True):
    assert a['tokens'] == b['tokens']
    for name in ('logits', 'logprobs'):
      for row, other in zip(a[name], b[name], strict=True):
        assert other == pytest.approx(row, abs=2e-5)
    assert a['split'] == [[1, 1]] * len(a['split']) and b['split'] == [[2, 2]] * len(a['split']) != []   # rows, K/V heads


def test_the_partitioner_never_gathers_a_whole_array_for_want_of_a_plan():
  said = [line for line in run(*FEW)['stderr'].splitlines() if REMATERIALIZATION in line]
  assert [line for line in said if '%fake_parameter' not in line] == []   # those are plans it weighs, and drops


def mesh(**sizes):
  return AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.AXES), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def test_axes_map_to_the_mesh_and_what_it_cannot_divide_is_whole_or_refused():
  assert sharding.spec(mesh(fsdp=4, tensor=2), (8, 16, 32), ('heads', 'head_dim', 'embed')) == PartitionSpec('tensor', None, 'fsdp')
  assert sharding.spec(mesh(fsdp=4, tensor=2), (64, 2, 8), ('rows', 'layers', 'ple')) == PartitionSpec(('fsdp', 'tensor'), None, None)
  assert sharding.spec(mesh(tensor=4), (1, 16, 32), ('kv_heads', 'head_dim', 'embed')) == PartitionSpec(None, None, 'fsdp')
  assert sharding.spec(mesh(data=2, tensor=4), (3, 8, 5, 5), ('batch', 'kv_heads')) == PartitionSpec(None, 'tensor')
  with pytest.raises(ValueError, match=r"mesh.tensor: 3 does not divide 8 of \(8, 16, 32\) = \('heads', 'head_dim', 'embed'\)"):
    sharding.spec(mesh(tensor=3), (8, 16, 32), ('heads', 'head_dim', 'embed'))


@pytest.mark.parametrize(('text', 'match'), [('fsdp', 'is no list of AXIS=SIZE'), ('fsdp=x', 'is no list of AXIS=SIZE'),
                                             ('fsdp=2,fsdp=1', 'names an axis twice')])
def test_a_mesh_on_the_command_line_is_a_list_of_sizes(text, match):
  assert sharding.parse('fsdp=8, tensor=4') == {'fsdp': 8, 'tensor': 4}
  with pytest.raises(ValueError, match=match):
    sharding.parse(text)


def test_a_mesh_that_does_not_fit_the_devices_says_both_numbers():
  with pytest.raises(ValueError, match="mesh: 'tensors' is none of .* did you mean 'tensor'"):
    sharding.make_mesh({'tensors': 2})
  with pytest.raises(ValueError, match='fsdp=3, tensor=1, expert=1 asks for 3 devices .-1 takes what is left.; there are 1'):
    sharding.make_mesh({'fsdp': 3})
  with pytest.raises(ValueError, match='fsdp=-1, tensor=3, expert=1 asks for a multiple of 3 devices; there are 8'):
    sharding.sizes({'fsdp': -1, 'tensor': 3}, 8)
  assert sharding.sizes({'fsdp': -1, 'tensor': 4}, 8) == (1, 2, 4, 1)
