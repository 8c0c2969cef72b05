"""What the compilers of machines that are not here say, and how it is read."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from experiments.aot import __main__ as aot, flops, hlo, program, targets
from gemma4_jax import config, sharding
from gemma4_jax.turboquant import ops, packing, pallas, pallas_encode, reference, weights
from gemma4_jax.turboquant.quantizer import Quantizer
from tests import quick

CFG = config.shrink(config.E2B, pattern='G', num_layers=1, num_kv_shared_layers=0, double_wide_mlp=False, num_heads=8, mlp_dim=128,
                    global_head_dim=64)


@pytest.fixture(scope='module', autouse=True)
def not_kept():
  """Programs for devices that are not here cannot be read back."""
  was = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', was)


def devices(name):
  try:
    return targets.devices(targets.find(name))
  except ImportError as error:
    pytest.skip(str(error))


@pytest.mark.parametrize(('target', 'kernels'), [
    ('v6e-8', ['splash_mha_dkv_segmented_no_residuals', 'splash_mha_dq_segmented_no_residuals', 'splash_mha_fwd_segmented_residuals']),
    ('h100x8', [])])
def test_a_sharded_training_step_compiles_for_machines_that_are_not_here(target, kernels):
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2}, devices(target))
  traced, lowered = program.lower(CFG.replace(mlp_dim=1024, vocab_size=2048), program.Job('train', batch=4, context=128), mesh)
  compiled = lowered.compile()
  state = sum(x.size * x.dtype.itemsize for x in traced.jaxpr.in_avals)
  assert state / 8 < compiled.memory_analysis().argument_size_in_bytes < state / 4   # TPUs fill small arrays up to a tile
  assert hlo.collectives(compiled.as_text())['all-gather']['count'] > 0
  assert hlo.kernels(compiled.as_text()) == kernels


@pytest.mark.filterwarnings('ignore:.*[Tt]riton.*:DeprecationWarning')
@pytest.mark.parametrize(('target', 'kv', 'kernels'), [
    ('v6e-4', 'turboquant,exact_last=False', ['turboquant_append', 'turboquant_attention']), ('h100x4', 'exact', [])])
def test_a_sharded_decode_loop_compiles_for_machines_that_are_not_here(target, kv, kernels):
  mesh = sharding.make_mesh({'tensor': 4}, devices(target))
  cfg = CFG.replace(global_num_kv_heads=4)
  traced, lowered = program.lower(cfg, program.Job('decode', batch=2, context=128, weights='int8', kv=kv), mesh)
  text = lowered.compile().as_text()
  assert hlo.collectives(text)['all-reduce']['count'] >= 2   # after the heads, and after the MLP
  assert hlo.kernels(text) == kernels
  assert flops.count(traced.jaxpr) > 2 * 2 * CFG.vocab_size * CFG.width


@pytest.mark.filterwarnings('ignore:.*[Tt]riton.*:DeprecationWarning')
@pytest.mark.parametrize(('target', 'backend'), [('v5e-1', 'tpu'), ('h100x1', 'gpu')])
def test_the_kernel_over_packed_codes_compiles_for_devices_that_are_not_here(target, backend):
  mesh = sharding.make_mesh({}, devices(target))
  where = NamedSharding(mesh, PartitionSpec())
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=where)
  parts = ops.unified(Quantizer(128, 4, grid='uniform'), Quantizer(128, 8, grid='absmax'))
  stored = tuple(reference.Stored(shape((2, 2, 2048, packing.bytes_per_row(part.quantizer.bits, part.dim)), jnp.uint8),
                                  shape((2, 2, part.blocks, 2048), part.quantizer.scale_dtype)) for part in parts)
  q, edge = shape((2, 2, 3, reference.width(parts, 'keys')), 'bfloat16'), shape((2,), jnp.int32)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    assert ops.choose(parts, stored, q) == f'pallas_{backend}'   # of the mesh in use, not of the machine that compiles
    lowered = jax.jit(functools.partial(pallas.attend, parts, backend=backend)).lower(stored, q, edge, edge)
  assert hlo.kernels(lowered.compile().as_text()) == ['turboquant_attention']


@pytest.mark.filterwarnings('ignore:.*[Tt]riton.*:DeprecationWarning')
@pytest.mark.parametrize(('target', 'backend'), [('v5e-1', 'tpu'), ('h100x1', 'gpu')])
def test_the_kernels_that_make_codes_compile_for_devices_that_are_not_here(target, backend):
  mesh = sharding.make_mesh({}, devices(target))
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
  part = ops.Part(Quantizer(128, 6, grid='uniform'), blocks=4)
  stored = ops.Stored(shape((2, 2, 2048, packing.bytes_per_row(6, part.dim)), jnp.uint8), shape((2, 2, 4, 2048), jnp.bfloat16))
  for dtype in ('bfloat16', 'float32'):
    x = lambda count, dtype=dtype: shape((2, 2, count, part.dim), dtype)
    how = {'rotated': False, 'backend': backend}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      encode = jax.jit(functools.partial(pallas_encode.encode, part, **how)).lower(x(37)).compile()
      append = jax.jit(functools.partial(pallas_encode.append, part, **how), donate_argnums=0).lower(
          stored, x(1), shape((2,), jnp.int32)).compile()
    assert hlo.kernels(encode.as_text()) == ['turboquant_encode'] and hlo.kernels(append.as_text()) == ['turboquant_append']
    size = sum(x.size * x.dtype.itemsize for x in stored)
    memory = append.memory_analysis()
    assert memory.alias_size_in_bytes == size and memory.temp_size_in_bytes < 1024     # the cache is not copied


@pytest.mark.filterwarnings('ignore:.*[Tt]riton.*:DeprecationWarning')
@pytest.mark.parametrize(('target', 'format', 'dtype', 'rows'), [
    ('v5e-1', 'turboquant4', 'bfloat16', 1), ('v5e-1', 'turboquant3', 'float32', 64),
    ('h100x1', 'turboquant4', 'bfloat16', 1), ('h100x1', 'nf4', 'bfloat16', 64)])
def test_the_matmul_of_packed_weights_compiles_for_devices_that_are_not_here(target, format, dtype, rows):
  mesh = sharding.make_mesh({}, devices(target))
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
  w = jax.eval_shape(functools.partial(weights.encode, format=format), jax.ShapeDtypeStruct((1536, 4096), jnp.bfloat16))
  w = jax.tree.map(lambda x: shape(x.shape, x.dtype), w)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(lambda w, x_RK: w.dot(x_RK)).lower(w, shape((rows, 4096), dtype)).compile()
  assert hlo.kernels(compiled.as_text()) == ['packed_matmul']      # by its own choice, of the mesh in use
  assert compiled.memory_analysis().temp_size_in_bytes < 2**20     # the weight's numbers, 12 or 25 MB, never are there


@pytest.mark.parametrize(('format', 'dtype', 'inputs'), quick.only(
    [('turboquant5', 'bfloat16', 21504)],
    [('turboquant5', 'bfloat16', 21504), ('turboquant4', 'float32', 15360), ('turboquant4', 'float32', 21504)]))
def test_many_rows_of_the_widest_models_fit_the_memory_of_a_v5es_programs(format, dtype, inputs):
  mesh = sharding.make_mesh({}, devices('v5e-1'))
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
  w = jax.eval_shape(functools.partial(weights.encode, format=format), jax.ShapeDtypeStruct((1024, inputs), jnp.bfloat16))
  w = jax.tree.map(lambda x: shape(x.shape, x.dtype), w)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(lambda w, x_RK: w.dot(x_RK)).lower(w, shape((8192, inputs), dtype)).compile()
  assert hlo.kernels(compiled.as_text()) == ['packed_matmul']


TEXT = '''HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8] get-tuple-element(%p), index=1
  %all-reduce-start.1 = f32[8] all-reduce-start(%x), to_apply=%add
}

%cond (p.1: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[4,2]) -> f32[8] {
  %all-gather-start = ((bf16[4,2], bf16[2]), (bf16[8,2], bf16[4])) all-gather-start(%a, %b), dimensions={0}
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
}
'''


def test_collectives_in_a_loop_count_as_often_as_it_runs():
  assert hlo.collectives(TEXT) == {'all-gather': {'count': 1, 'bytes': 8 * 2 * 2 + 4 * 2}, 'all-reduce': {'count': 5, 'bytes': 5 * 32}}
  known = TEXT.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
  assert hlo.collectives(known)['all-reduce']['count'] == 7


def test_flops_are_those_of_matmuls_with_loops_and_recomputation():
  def f(x):
    y, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)
    return jnp.sum(jax.checkpoint(lambda y: y @ y @ y)(y))
  one = 2 * 4**3
  assert flops.count(jax.jit(f).trace(jnp.ones((4, 4))).jaxpr) == (3 + 2) * one
  with jax.set_mesh(sharding.make_mesh({})):   # a device's part counts for each
    shared = jax.jit(lambda x: jax.shard_map(f, in_specs=PartitionSpec(), out_specs=PartitionSpec())(x)).trace(jnp.ones((4, 4))).jaxpr
  assert flops.count(shared) == (3 + 2) * one
  assert flops.count(jax.jit(jax.grad(f)).trace(jnp.ones((4, 4))).jaxpr) >= (3 + 2 + 6 + 4 + 1) * one   # backward twice, and once more


def test_slices_have_their_vendors_names_and_others_are_refused():
  assert targets.find('v5p-16').count == 8 and targets.find('v5e-64').count == 64 and targets.find('h200x1').platform == 'gpu'
  for name, match in [('v5e-3', 'slices of v5e are v5e-1, v5e-4'), ('h100-8', 'give one of'), ('v5p-4', 'slices of v5p are v5p-8'),
                      ('h100x0', 'at least')]:
    with pytest.raises(ValueError, match=match):
      targets.find(name)


def test_an_axis_that_takes_what_is_left_is_named_by_its_size():
  named = lambda *flags: aot.describe(aot._parser().parse_args(['--variant=31b', '--target=h100x8', '--mode=train', *flags]))
  assert named('--mesh=fsdp=-1') == named() == named('--mesh=fsdp=8') == '31b h100x8 train context=2048 batch=8 mesh=fsdp=8'
  assert 'batch=4 mesh=fsdp=4*tensor=2' in named('--mesh=fsdp=-1,tensor=2')
  for flag, match in (('--batch=0', '--batch=0: is not positive'), ('--context=0', '--context=0'), ('--mesh=fsdp=3', 'asks for 3 devices')):
    with pytest.raises(ValueError, match=match):
      named(flag)


def test_a_step_reads_the_experts_that_its_tokens_choose():
  cfg = config.shrink(config.VARIANTS['26b-a4b'])
  mesh = sharding.make_mesh({})
  read = lambda batch: program.step_bytes(cfg, program.Job('decode', batch, 64), mesh)
  per_layer = 2 * 3 * cfg.width * cfg.expert_dim * cfg.num_layers    # bfloat16 gate, up and down of one expert
  cache = read(cfg.num_experts) - read(cfg.num_experts - 1)          # of one more row, all experts read by both
  assert read(2) - read(1) == cfg.num_experts_per_token * per_layer + cache


def test_every_row_of_the_table_has_a_name_of_its_own():
  parser = aot._parser()
  names = [aot.describe(parser.parse_args(flags.split())) for flags in aot.TABLE]
  assert len(set(names)) == len(names) and all('context=' in name for name in names)
