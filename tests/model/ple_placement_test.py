"""PLE off the device: the same bits from the host, a folded table's logits, few bits and their error, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from gemma4_jax import config, size
from gemma4_jax.model import kv_cache, ple_placement, ple_table, transformer
from gemma4_jax.sampling import generate
from gemma4_jax.sampling.sampler import GREEDY
from gemma4_jax.training import trainer
from tests import quick

CFG = config.shrink(config.E2B, pattern='LG', num_layers=2, num_kv_shared_layers=0, width=32, mlp_dim=48, vocab_size=97)
V, L, P = CFG.vocab_size, CFG.num_layers, CFG.ple_dim
IDS = np.random.RandomState(0).randint(1, V, (2, 9)).astype(np.int32)
SEG = np.array([[1] * 9, [1] * 4 + [0] * 5], np.int32)
HOST = {'device': 'host', 'folded': 'folded_host'}


@functools.cache
def params(dtype='float32', **fields):
  return transformer.init(CFG.replace(dtype=dtype, param_dtype=dtype, **fields), 0)


@functools.cache
def placed(placement, storage='as_is', dtype='float32', **fields):
  cfg = CFG.replace(dtype=dtype, param_dtype=dtype, **fields)
  return ple_placement.place(cfg, params(dtype, **fields), placement=placement, storage=storage)


@functools.partial(quick.jit, static_argnums=0)
def decode(cfg, params, ids_BT, seg_BT):
  """Logits of a prefill [B, T, V] and of 20 greedy steps behind it [20, B, V], in one program."""
  model = transformer.Transformer(cfg)
  logits, out = model.apply({'params': params}, ids_BT, None, seg_BT, cache=kv_cache.make(cfg, len(ids_BT), 32))
  last = jnp.take_along_axis(logits, seg_BT.sum(1)[:, None, None] - 1, axis=1)

  def step(i, carry):
    token_B1, cache, steps = carry
    logits, out = model.apply({'params': params}, token_B1, None, jnp.ones_like(token_B1), cache=cache)
    return logits[:, 0].argmax(-1, keepdims=True), out['cache'], steps.at[i].set(logits[:, 0])

  steps = jnp.zeros((20, len(ids_BT), cfg.vocab_size))
  return logits, jax.lax.fori_loop(0, 20, step, (last[:, 0].argmax(-1, keepdims=True), out['cache'], steps))[2]


@functools.partial(quick.jit, static_argnums=0)
def embed(cfg, params, ids_BT):
  return transformer.Transformer(cfg).apply({'params': params}, ids_BT, ids_BT, method='embed')


@functools.cache
def decoded(*args):
  return jax.device_get(decode(*placed(*args), IDS, SEG))


def resident(params):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('on_device, storage, dtype', quick.only(
    [('device', 'as_is', 'float32')],
    [('folded', 'int8', 'float32'), *(('device', storage, dtype) for storage in config.PLE_TABLES for dtype in ('float32', 'bfloat16'))]))
def test_a_table_on_the_host_gives_the_same_bits_in_prefill_and_decode_loop(on_device, storage, dtype):
  ours, theirs = decoded(HOST[on_device], storage, dtype), decoded(on_device, storage, dtype)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert len({tuple(row) for row in theirs[1].argmax(-1).T}) == 2 and np.ptp(theirs[1]) > 0.1


@pytest.mark.slow
def test_generation_scores_and_streams_take_a_host_table_as_any_other_parameter_and_compile_once_for_it():
  prompts, settings = [IDS[0].tolist(), IDS[1, :4].tolist()], dict(max_new_tokens=6, sampling=GREEDY, stop_ids=())
  small = dict(pattern='G', num_layers=1)
  cfg, host = placed('host', **small)
  expected = generate.generate(*placed('device', **small), prompts, **settings)
  found = generate.generate(cfg, host, prompts, **settings)
  programs = generate._decode._cache_size()
  again = generate.generate(cfg, host, [prompt[::-1] for prompt in prompts], **settings)
  assert generate._decode._cache_size() == programs and len(again) == 2
  streamed = [np.concatenate(parts) for parts in zip(*generate.stream(cfg, host, prompts, every=6, **settings))]
  scores = generate.score(cfg, host, prompts, [out.tokens for out in found])
  for ours, theirs, stream, score in zip(found, expected, streamed, scores):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=2e-6)   # two programs: their sums may round differently
    np.testing.assert_array_equal(stream, ours.tokens)
    np.testing.assert_allclose(score, ours.logprobs, atol=1e-4)


@pytest.mark.parametrize('embedding', ['table_only', 'shared_table', 'frozen_table', 'permuted_table', 'ungated'])
def test_every_arm_with_a_table_reads_it_from_the_host(embedding):
  ours, theirs = (embed(*placed(placement, 'int8', embedding=embedding), IDS)[1] for placement in ('host', 'device'))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert np.abs(ours[0]).max() > 0.1


def test_a_folded_table_gives_the_logits_of_device_and_needs_no_projection(monkeypatch):
  monkeypatch.setattr(ple_placement, '_BLOCK_BYTES', 4 * L * P * 10)   # ten blocks, the last shorter
  cfg, folded = ple_placement.place(CFG, params(), placement='folded')
  assert set(folded['arm']) == {'lookup'} and folded['arm']['lookup']['table'].shape == (V, L, P)
  for ours, theirs in zip(jax.device_get(decode(cfg, folded, IDS, SEG)), decoded('device')):
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_what_soft_tokens_are_made_of_stays_when_asked_for():
  cfg, folded = ple_placement.place(CFG, params(), placement='folded', keep_projection=True)
  arm = params()['arm']
  jax.tree.map(np.testing.assert_array_equal, {'project': folded['arm']['project'], 'norm': folded['arm']['norm']},
               {'project': arm['project'], 'norm': arm['norm']})
  np.testing.assert_array_equal(folded['arm']['row_0'], arm['lookup']['table'][0])
  jax.tree.map(np.testing.assert_array_equal, embed(cfg, folded, IDS), embed(*placed('folded'), IDS))


@pytest.mark.parametrize('storage, largest, typical', [
    ('as_is', 0, 0), ('bfloat16', 2**-8, 0.002), ('int8', 1 / 128, 0.0075), ('int4', 1 / 8, 0.12)])
def test_the_error_of_a_stored_row_is_at_most_one_level_and_on_average_what_its_bits_allow(storage, largest, typical):
  unit = np.random.RandomState(0).standard_normal((64, 3, 256))
  size_of_row = 10.0 ** np.arange(-30, 34)[:, None, None]
  rows = (unit * size_of_row).astype(np.float32)
  error = (np.asarray(ple_table.decode(ple_table.encode(rows, storage), storage, 'float32')) - rows) / size_of_row
  assert (np.abs(error) <= largest * np.abs(unit).max(-1, keepdims=True) * 1.001).all()
  assert typical / 2 <= np.linalg.norm(error) / np.linalg.norm(unit) <= typical


@pytest.mark.parametrize('storage', config.PLE_TABLES)
def test_a_row_of_zeros_stays_one(storage):
  zeros = np.zeros((2, 3, 8), np.float32)
  np.testing.assert_array_equal(ple_table.decode(ple_table.encode(zeros, storage), storage, 'float32'), zeros)


def test_int4_packs_two_signed_numbers_into_a_byte():
  rows = np.array([[-8, 7, 0, -1, 3, -3]], np.float32)
  parts = ple_table.encode(rows, 'int4')
  assert parts['codes'].shape == (1, 3) and parts['codes'].dtype == np.int8
  np.testing.assert_array_equal(ple_table.decode(parts, 'int4', 'float32'), rows)


def test_only_the_rows_asked_for_are_read_of_a_memory_mapped_table(tmp_path):
  class Watched(np.memmap):
    def __getitem__(self, index):
      read.append(np.array(index))
      return super().__getitem__(index)

  read = []
  path = tmp_path / 'table'
  np.asarray(params()['arm']['lookup']['table']).tofile(path)
  mapped = Watched(path, np.float32, 'r', shape=(V, L, P))
  weights = {**params(), 'arm': {**params()['arm'], 'lookup': {'table': mapped}}}
  cfg, host = ple_placement.place(CFG, weights, placement='host')
  assert np.shares_memory(host['arm']['lookup']['host'].arrays['table'], mapped)
  host['arm']['lookup']['host'].arrays['table'] = mapped
  read.clear()
  jax.tree.map(np.testing.assert_array_equal, embed(cfg, host, IDS), embed(CFG, params(), IDS))
  assert len(read) == 1
  np.testing.assert_array_equal(read[0], IDS)


@pytest.mark.parametrize('storage', config.PLE_TABLES)
@pytest.mark.parametrize('placement', config.PLE_PLACEMENTS)
def test_the_weights_on_the_device_are_as_many_bytes_as_size_says(placement, storage):
  cfg, weights = placed(placement, storage, 'bfloat16')
  counted = size.placed_bytes(cfg)
  assert resident(weights) == counted['resident']
  host = weights['arm']['lookup'].get('host')
  assert (host.nbytes if host else 0) == counted['host']
  row = lambda arrays: sum(array[0].nbytes for array in arrays.values())
  assert counted['fetched'] == (row(host.arrays) if host else 0)
  others = resident({name: leaf for name, leaf in weights['arm'].items() if name != 'lookup'})
  assert counted['read'] == others + (0 if host else row(weights['arm']['lookup']))


def test_a_table_on_the_host_needs_the_cpu_backend(monkeypatch):
  weights = params('float32')
  def devices(platform):
    raise RuntimeError(f'Unknown backend: {platform!r}')
  monkeypatch.setattr(jax, 'devices', devices)
  with pytest.raises(ValueError, match="model.ple_placement: 'host' needs JAX's CPU backend, too"):
    ple_placement.place(CFG, weights, placement='host')


def test_e2b_with_its_table_on_the_host_leaves_at_most_4700_mb_on_the_accelerator():
  declared = transformer.abstract(config.E2B.replace(param_dtype='bfloat16', dtype='bfloat16'))
  del declared['arm']['lookup']
  counted = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(declared))
  assert counted == size.placed_bytes(config.E2B.replace(ple_placement='host'))['resident'] <= 4.7e9


@pytest.mark.parametrize('fields, error', [
    ({'ple_placement': 'hosts'}, "model.ple_placement: 'hosts' is none of device, host, folded, folded_host; did you mean 'host'"),
    ({'ple_table': 'int3'}, "model.ple_table: 'int3' is none of as_is, bfloat16, int8, int4; did you mean 'int"),
    ({'ple_placement': 'folded', 'embedding': 'ungated'}, "model.ple_placement: 'folded' needs model.embedding='ple', not 'ungated'"),
    ({'ple_placement': 'host', 'embedding': 'none'}, "model.ple_placement: 'host' needs a PLE table"),
    ({'ple_table': 'int8', 'embedding': 'projection_only'}, "model.ple_table: 'int8' needs a PLE table"),
    ({'ple_table': 'int4', 'ple_dim': 7}, "model.ple_table: 'int4' packs pairs of numbers, and model.ple_dim = 7 is odd")])
def test_a_config_that_cannot_be_placed_so_is_refused(fields, error):
  with pytest.raises(ValueError) as caught:
    CFG.replace(**fields)
  assert str(caught.value).startswith(error)


@pytest.mark.parametrize('fields', [{'ple_placement': 'host'}, {'ple_placement': 'folded'}, {'ple_table': 'int8'}])
def test_training_a_placed_table_is_refused_before_anything_is_written(fields, tmp_path):
  c = base.get_config()
  c.model.update(fields)
  name, = fields
  for begin in (lambda: trainer.run(c, tmp_path / 'run'), lambda: transformer.init(CFG.replace(**fields), 0)):
    with pytest.raises(ValueError, match=f"model.{name}: '{fields[name]}' is for inference"):
      begin()
  assert not (tmp_path / 'run').exists()


def weights_with(table):
  return {**params(), 'arm': {**params()['arm'], 'lookup': {'table': table}}}


@pytest.mark.parametrize('cfg, weights, error', [
    (CFG, lambda: weights_with(np.zeros((V, L, P + 1), np.float32)),
     r'arm/lookup/table: is float32\[97, 2, 9\]; this model has float32 or bfloat16 \[97, 2, 8\]'),
    (CFG, lambda: weights_with(np.zeros((V, L, P), np.int32)), r'arm/lookup/table: is int32\[97, 2, 8\]'),
    (CFG, lambda: weights_with(np.full((V, L, P), np.nan, np.float32)),
     "model.ple_table: 'int8' cannot keep a table whose numbers are not finite"),
    (CFG, lambda: placed('host')[1], 'arm/lookup/table: is not there'),
    (CFG.replace(ple_placement='host'), params, "model.ple_placement: 'host' is for inference"),
    (CFG.replace(embedding='none'), params, "model.ple_placement: 'host' needs a PLE table")])
def test_a_table_that_is_not_this_models_is_not_placed(cfg, weights, error):
  with pytest.raises(ValueError, match=error):
    ple_placement.place(cfg, weights(), placement='host', storage='int8')


@pytest.mark.parametrize('cfg, weights, error', [
    (CFG.replace(ple_placement='host'), params, "model.ple_placement: 'host' is not where these parameters have the table"),
    (CFG.replace(ple_table='int8'), lambda: placed('host')[1],
     "model.ple_placement: 'device' is not where these parameters have the table"),
    (CFG.replace(ple_placement='host', ple_table='int8'), lambda: placed('host')[1],
     r"model.ple_table: 'int8' of this model is codes int8\[97, 2, 8\], scale float32\[97, 2\]; "
     r'the parameters have table float32\[97, 2, 8\]'),
    (CFG.replace(ple_placement='host'), lambda: {**params(), 'arm': {**params()['arm'], 'lookup': {
        'host': ple_table.HostTable({'table': np.zeros((V, L + 1, P), np.float32)})}}},
     r"model.ple_table: 'as_is' of this model is table float32 or bfloat16\[97, 2, 8\]; "
     r'the parameters have table float32\[97, 3, 8\]')])
def test_parameters_that_are_not_placed_as_the_config_says_are_refused(cfg, weights, error):
  with pytest.raises(ValueError, match=error):
    jax.eval_shape(lambda weights: transformer.Transformer(cfg).apply({'params': weights}, IDS), weights())


def test_a_host_table_is_of_numpy_arrays():
  with pytest.raises(ValueError, match="a host table is of numpy arrays, and 'table' is a list"):
    ple_table.HostTable({'table': [[1.0]]})
