"""Loading from Hugging Face's directories and our own: what arrives, what it costs, and what is refused."""

import asyncio
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy

from gemma4_jax import config
from gemma4_jax.checkpoint import hf, load, orbax, packed, save, shards
from gemma4_jax.model import transformer
from gemma4_jax.training import trainer
from tests import hf_models, quick

CFG = hf_models.configs()['mqa_ple_kvshare']
LARGE = hf_models.configs()['large_kv']
ROOT = pathlib.Path(__file__).parents[2]


def assert_equal(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected)):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=jax.tree_util.keystr(path))


def released(folder, cfg=CFG, *, dtype=np.float32, files=2, fields=(), state=()):
  """A directory as released: multimodal names, sharded by another library; returns our parameters of it."""
  ours = {name: array.astype(dtype) for name, array in hf_models.random_state(cfg).items()}
  theirs = {hf.MULTIMODAL_PREFIX + name.removeprefix(hf.TEXT_PREFIX): array for name, array in ours.items()} | dict(state)
  folder.mkdir()
  names = sorted(theirs)
  index = {}
  for i in range(files):
    file = f'model-{i + 1:05}-of-{files:05}.safetensors' if files > 1 else 'model.safetensors'
    part = {name: theirs[name] for name in names[i::files]}
    safetensors.numpy.save_file(part, folder / file)
    index |= dict.fromkeys(part, file)
  if files > 1:
    write_json(folder / shards.INDEX, {'metadata': {}, 'weight_map': index})
  write_json(folder / 'config.json', {'model_type': 'gemma4', 'text_config': hf.config_to_hf(cfg) | dict(fields)})
  return hf.params_from_hf(cfg, ours)


def write_json(file, value):
  file.write_text(json.dumps(value))


def unused_and_towers(cfg):
  last = f'{hf.MULTIMODAL_PREFIX}layers.{cfg.num_layers - 1}.self_attn'
  return {f'{last}.k_proj.weight': np.zeros((3, 3), np.float32), 'model.vision_tower.std_bias': np.zeros(4, np.int8),
          'model.embed_audio.embedding_projection.weight': np.zeros((2, 2), np.float32)}


@pytest.mark.parametrize('files', [1, 2])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16], ids=['float32', 'bfloat16'])
def test_a_released_directory_arrives_as_stored(tmp_path, dtype, files):
  expected = released(tmp_path / 'in', dtype=dtype, files=files)
  cfg, params = load.load(tmp_path / 'in')
  name = np.dtype(dtype).name
  assert cfg == CFG.replace(dtype=name, param_dtype=name)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
  assert_equal(params, expected)


def test_param_dtype_casts_every_weight_and_the_config(tmp_path):
  expected = released(tmp_path / 'in')
  cfg, params = load.load(tmp_path / 'in', param_dtype='bfloat16')
  assert cfg.dtype == cfg.param_dtype == 'bfloat16'
  assert_equal(params, jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.bfloat16), expected))


def test_float16_asks_for_the_dtype_it_is_to_become(tmp_path):
  expected = released(tmp_path / 'in', dtype=np.float16)
  with pytest.raises(ValueError, match="stored as float16; give param_dtype='float32' or 'bfloat16'"):
    load.load(tmp_path / 'in')
  assert_equal(load.load(tmp_path / 'in', param_dtype='float32')[1], jax.tree.map(lambda x: x.astype(np.float32), expected))


def test_weights_of_towers_and_unused_ones_are_skipped_and_the_towers_counted_in_one_line(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(load.logging, 'info', lambda text, *args: lines.append(text % args))
  expected = released(tmp_path / 'in', state=unused_and_towers(CFG))
  _, params = load.load(tmp_path / 'in')
  assert_equal(params, expected)
  assert lines == [f'{tmp_path / "in"}: 2 weights of towers that this model does not have were skipped']


def test_host_weights_are_views_of_the_file_and_others_survive_its_change(tmp_path):
  expected = released(tmp_path / 'in', files=1, dtype=ml_dtypes.bfloat16)
  _, params = load.load(tmp_path / 'in', host=['arm/lookup/table'])
  table = params['arm']['lookup']['table']
  assert isinstance(table, np.memmap) and table.shape == (CFG.vocab_size, CFG.num_layers, CFG.ple_dim)
  assert_equal(params, expected)
  file = tmp_path / 'in/model.safetensors'
  size, header_size = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], 'little')
  with file.open('r+b') as f:
    f.seek(header_size)
    f.write(bytes(size - header_size))
  arm, rest = params.pop('arm'), expected.pop('arm')
  assert_equal(params, expected)
  assert not np.array_equal(arm['lookup']['table'], rest['lookup']['table'])


def test_host_weights_are_cast_if_asked_and_a_mistyped_name_is_answered(tmp_path):
  expected = released(tmp_path / 'in')
  _, params = load.load(tmp_path / 'in', host=['embedder/table'], param_dtype='bfloat16')
  assert type(params['embedder']['table']) is not jax.Array
  np.testing.assert_array_equal(params['embedder']['table'], expected['embedder']['table'].astype(ml_dtypes.bfloat16))
  with pytest.raises(ValueError, match="host: no weight 'arm/lookup/tabel'; did you mean 'arm/lookup/table'"):
    load.load(tmp_path / 'in', host=['arm/lookup/tabel'])


PEAK = """
import sys, resource
import jax
from gemma4_jax.checkpoint import load
jax.numpy.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cfg, params = load.load(sys.argv[1], host=['arm/lookup/table'])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss is in kilobytes there')
def test_peak_memory_is_what_is_kept_and_the_largest_weight(tmp_path):
  cfg = config.shrink(config.E2B, width=256, vocab_size=24_000, mlp_dim=2048, ple_dim=256)
  table = cfg.vocab_size * cfg.num_layers * cfg.ple_dim * 4
  params = weights(cfg)
  save.save_hf(cfg, params, tmp_path / 'in')
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  done = subprocess.run([sys.executable, '-c', PEAK, str(tmp_path / 'in')], capture_output=True, text=True, check=True, env=env)
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - table
  largest = params['embedder']['table'].nbytes
  assert table > 240e6 and int(done.stdout) < kept + largest + 60e6


# Our own.


def weights(cfg):
  """Random numbers in the tree of `cfg`."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda box: rng.standard_normal(box.value.shape).astype(cfg.param_dtype), transformer.abstract(cfg),
                      is_leaf=lambda leaf: hasattr(leaf, 'names'))


@pytest.mark.parametrize('cfg', [
    config.shrink(config.E2B, pattern='LG'), config.shrink(config.B26_A4, pattern='LG', embedding='bigram', param_dtype='bfloat16')],
    ids=['ple', 'experts and bigrams'])
def test_our_export_comes_back_with_its_config(tmp_path, cfg):
  params = weights(cfg)
  save.save_orbax(cfg, params, tmp_path / 'out')
  back, again = load.load(tmp_path / 'out')
  assert back == cfg
  assert_equal(again, params)


def test_an_export_may_be_of_another_dtype_and_so_may_loading_it(tmp_path):
  params = weights(LARGE)
  save.save_orbax(LARGE, jax.tree.map(jnp.asarray, params), tmp_path / 'out', dtype='bfloat16')
  narrow = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  cfg, again = load.load(tmp_path / 'out')
  assert cfg == LARGE.replace(dtype='bfloat16', param_dtype='bfloat16')
  assert_equal(again, narrow)
  cfg, again = load.load(tmp_path / 'out', param_dtype='float32', host=['embedder/table'])
  assert cfg == LARGE and isinstance(again['embedder']['table'], np.ndarray)
  assert_equal(again, jax.tree.map(lambda x: x.astype(np.float32), narrow))


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.slow
def test_the_newest_checkpoint_of_a_run_is_read(tmp_path, scan):
  cfg = config.shrink(config.E2B, pattern='LG', periods=2, scan=scan)
  canonical = weights(cfg)
  run = ml_collections.ConfigDict({'model': cfg.to_dict(), 'seed': 0})
  checkpoints = orbax.Checkpoints(tmp_path / 'checkpoints', keep=2)
  opt_state = optax.adam(1e-3).init({'w': jnp.zeros(2)})
  for step, scale in ((9, 1), (20, 2)):   # the newest in number, not in letters
    params = jax.tree.map(lambda x: x * np.float32(scale), canonical)   # noqa: B023
    params = transformer.stack(cfg, params, lambda *rows: np.stack(rows)) if scan else params
    params = jax.tree.map(jnp.asarray, params)
    checkpoints.save(step, trainer.State(jnp.asarray(step), params, opt_state), {}, run)
  checkpoints.wait()
  checkpoints.close()
  (tmp_path / 'config.json').write_text(run.to_json())
  for where in ('', 'checkpoints', 'checkpoints/20'):
    back, params = load.load(tmp_path / where)
    assert back == cfg.replace(scan=False) and load.find(tmp_path / where).home == tmp_path
    assert_equal(params, jax.tree.map(lambda x: 2 * x, canonical))


MESH = """
import pathlib
import sys
import jax, numpy as np
from gemma4_jax import sharding
from gemma4_jax.checkpoint import load
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import transformer
import ml_collections
mesh = sharding.make_mesh(ml_collections.ConfigDict(dict(data=1, fsdp=4, tensor=2, expert=1)))
for folder in sys.argv[1:]:
  cfg, whole = load.load(folder)
  _, split = load.load(folder, mesh=mesh)
  for file in pathlib.Path(folder).glob('*.safetensors'):   # which nothing depends on any more
    with file.open('r+b') as f:
      f.write(bytes(file.stat().st_size))
  boxes = transformer.abstract(cfg.replace(ple_table='as_is'))
  packed = 'quant' in split
  shardings = sharding.variables(mesh, boxes, split) if packed else sharding.params(mesh, boxes)
  jax.tree.map(np.testing.assert_array_equal, split, whole)
  assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, split, shardings))
  q = split['quant']['layer_0']['attention']['q']['w'].codes if packed else split['layer_0']['attention']['q']['w']
  assert len({shard.device for shard in q.addressable_shards}) == 8 and q.addressable_shards[0].data.size * 8 == q.size
"""


def test_every_kind_is_placed_onto_a_mesh_that_it_was_not_saved_from(tmp_path):
  cfg = LARGE.replace(num_kv_heads=2, global_num_kv_heads=2)
  params = weights(cfg)
  save.save_orbax(cfg, params, tmp_path / 'orbax')
  save.save_hf(cfg, params, tmp_path / 'hf')
  cfg = config.shrink(config.E2B, pattern='LG', num_layers=4, num_kv_shared_layers=2, ple_table='int8')
  contents = packed.Contents.make(cfg, 'turboquant4')
  writer = packed.Writer(tmp_path / 'packed', contents)
  for name, weight in load.flatten(transformer.init(cfg.replace(ple_table='as_is'), 0)).items():
    writer.add(contents.encode(name, np.asarray(weight)))
  writer.close()
  command = [sys.executable, '-c', MESH, tmp_path / 'orbax', tmp_path / 'hf', tmp_path / 'packed']
  done = subprocess.run(command, env=quick.virtual_devices(8), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_a_kernel_that_this_device_has_not_is_not_asked_for_because_weights_were_trained_with_it(tmp_path):
  save.save_orbax(CFG.replace(attention_implementation='splash', matvec='native'), weights(CFG), tmp_path / 'out')
  assert orbax.read_config(tmp_path / 'out').attention_implementation == 'splash'
  assert load.find(tmp_path / 'out').cfg == CFG


# What is refused.


def rewrite_header(file, change):
  """Edits the JSON in front of the bytes of a safetensors file."""
  blob = file.read_bytes()
  length = int.from_bytes(blob[:8], 'little')
  header = json.loads(blob[8:8 + length])
  change(header)
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, 'little') + text + blob[8 + length:])


def norm(header):
  return header[hf.MULTIMODAL_PREFIX + 'norm.weight']


def overlap(header):
  header[hf.MULTIMODAL_PREFIX + 'layers.0.input_layernorm.weight']['data_offsets'] = norm(header)['data_offsets']


def shift(by):
  def change(header):
    norm(header)['data_offsets'] = [offset + by for offset in norm(header)['data_offsets']]
  return change


def twice(folder):
  file = folder / 'model.safetensors'
  blob = file.read_bytes()
  length = int.from_bytes(blob[:8], 'little')
  key = json.dumps(hf.MULTIMODAL_PREFIX + 'norm.weight').encode() + b':'
  text = blob[8:8 + length].rstrip()
  entry = text[text.index(key):]
  text = text[:-1] + b',' + entry[:entry.index(b'}') + 1] + b'}'
  file.write_bytes(len(text).to_bytes(8, 'little') + text + blob[8 + length:])


def truncate(folder):
  file = folder / 'model.safetensors'
  with file.open('r+b') as f:
    f.truncate(file.stat().st_size - 1)


def claim(nbytes):
  def damage(folder):
    with (folder / 'model.safetensors').open('r+b') as f:
      f.write(nbytes.to_bytes(8, 'little'))
  return damage


def long_header(folder):
  """101 MB of header, in a file that is long enough for it."""
  with (folder / 'model.safetensors').open('wb') as f:
    f.write((101 * 10**6).to_bytes(8, 'little'))
    f.truncate(102 * 10**6)


def header(change):
  return lambda folder: rewrite_header(folder / 'model.safetensors', change)


def text(name, content):
  return lambda folder: (folder / name).write_bytes(content)


def config_field(**fields):
  def damage(folder):
    value = json.loads((folder / 'config.json').read_text())
    value['text_config'] |= fields
    write_json(folder / 'config.json', value)
  return damage


def link_out(name):
  def damage(folder):
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
  return damage


def link_to_itself(name):
  def damage(folder):
    (folder / name).unlink()
    (folder / name).symlink_to(name)
  return damage


def index_of(file):
  return text(shards.INDEX, json.dumps({'weight_map': {hf.MULTIMODAL_PREFIX + 'norm.weight': file}}).encode())


def only_a_pickle(folder):
  (folder / 'model.safetensors').unlink()
  (folder / 'pytorch_model.bin').write_bytes(b'\x80\x04.')


def drop_config(folder):
  (folder / 'config.json').unlink()


DAMAGE = {
    'overlapping tensors': (header(overlap), 'not a whole safetensors file'),
    'a tensor beyond the end': (header(shift(2**40)), 'not a whole safetensors file'),
    'a tensor at a negative place': (header(shift(-2**20)), 'not a whole safetensors file'),
    'a shape of other bytes': (header(lambda h: norm(h).update(shape=[65])), 'not a whole safetensors file'),
    'a shape that overflows': (header(lambda h: norm(h).update(shape=[2**63, 2**63])), 'not a whole safetensors file'),
    'bytes that no tensor owns': (header(lambda h: h.pop(hf.MULTIMODAL_PREFIX + 'norm.weight')), 'not a whole safetensors file'),
    'a name twice': (twice, 'not a whole safetensors file'),
    'a truncated file': (truncate, 'not a whole safetensors file'),
    'a header longer than the file': (claim(2**40), 'not a whole safetensors file'),
    'a header of no length': (claim(0), 'not a whole safetensors file'),
    'a header of 101 MB': (long_header, 'not a whole safetensors file'),
    'a header that is no JSON': (text('model.safetensors', b'\x04' + bytes(7) + b'nope'), 'not a whole safetensors file'),
    'an empty file': (text('model.safetensors', b''), 'not a whole safetensors file'),
    'integers': (header(lambda h: norm(h).update(dtype='I32')), 'norm.weight: stored as I32'),
    'a download that goes on': (text('model-00002.safetensors.incomplete', b''), 'half downloaded'),
    'a pickle': (only_a_pickle, 'pytorch_model.bin is a pickle, which is not read: it can hold code'),
    'a linked file': (link_out('model.safetensors'), 'lies outside of this directory'),
    'a linked config': (link_out('config.json'), 'lies outside of this directory'),
    'weights that link to themselves': (link_to_itself('model.safetensors'), 'cannot be read|half downloaded'),
    'a config that links to itself': (link_to_itself('config.json'), 'cannot be read'),
    'an index of a name that no file has': (index_of('a\0b'), 'cannot be read'),
    'an index of a name too long for one': (index_of('a' * 300), 'cannot be read'),
    'no config': (drop_config, 'config.json: cannot be read'),
    'a config that is no JSON': (text('config.json', b'{"a": '), 'config.json: cannot be read as JSON'),
    'a config that is a list': (text('config.json', b'[]'), 'config.json: cannot be read as JSON'),
    'a config without end': (text('config.json', b'[' * 100_000), 'config.json: cannot be read as JSON'),
    'a config of bytes': (text('config.json', b'\xff\xfe'), 'config.json: cannot be read as JSON'),
    'another model': (text('config.json', b'{"model_type": "llama"}'), "model_type = 'llama' is no Gemma 4"),
    'a field of another kind': (config_field(rope_parameters=[1]), 'no config of a Gemma 4'),
    'a billion layers': (config_field(num_hidden_layers=10**9, layer_types=None), 'layers are more than'),
    'another width': (config_field(hidden_size=72), 'checkpoint does not fit the model: .* wrong shape'),
}


def one_line(error):
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', DAMAGE)
def test_a_directory_is_refused_in_one_line_that_says_why(tmp_path, name):
  damage, message = DAMAGE[name]
  released(tmp_path / 'in', LARGE, files=1)
  damage(tmp_path / 'in')
  with pytest.raises(ValueError, match=message) as error:
    load.load(tmp_path / 'in')
  one_line(error)
  assert str(tmp_path / 'in') in str(error.value)


def test_float8_is_refused_by_name(tmp_path):
  released(tmp_path / 'in', LARGE, files=1)
  name = 'model.language_model.layers.0.mlp.up_proj.weight'
  state = safetensors.numpy.load_file(tmp_path / 'in/model.safetensors')
  state[name] = state[name].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
  safetensors.numpy.save_file(state, tmp_path / 'in/model.safetensors')
  header(lambda h: h[name].update(dtype='F8_E4M3'))(tmp_path / 'in')
  with pytest.raises(ValueError, match='layers.0.mlp.up_proj.weight: stored as F8_E4M3'):
    load.load(tmp_path / 'in')


@pytest.mark.parametrize('file, message', [
    ('../elsewhere.safetensors', 'lies outside of this directory'),
    ('/dev/zero', 'lies outside of this directory'),
    ('linked.safetensors', 'lies outside of this directory'),
    ('model-00003-of-00003.safetensors', '1 of 3 files of the index are missing, model-00003-of-00003.safetensors first'),
    ('model-00001-of-00002.safetensors', 'is not in model-00001-of-00002.safetensors'),
    ('pytorch_model-00001.bin', 'is a pickle, which is not read'),
    (7, 'weight_map is no object'),
])
def test_an_index_that_names_what_is_not_there_is_refused(tmp_path, file, message):
  released(tmp_path / 'in', LARGE)
  (tmp_path / 'elsewhere.safetensors').write_bytes((tmp_path / 'in/model-00001-of-00002.safetensors').read_bytes())
  (tmp_path / 'in/linked.safetensors').symlink_to(tmp_path / 'elsewhere.safetensors')
  index = json.loads((tmp_path / 'in' / shards.INDEX).read_text())
  name = next(name for name, where in index['weight_map'].items() if where == 'model-00002-of-00002.safetensors')
  index['weight_map'][name] = file
  write_json(tmp_path / 'in' / shards.INDEX, index)
  with pytest.raises(ValueError, match=message) as error:
    load.load(tmp_path / 'in')
  one_line(error)


def test_a_tensor_in_two_files_is_refused(tmp_path):
  released(tmp_path / 'in', LARGE, files=1)
  (tmp_path / 'in/other.safetensors').write_bytes((tmp_path / 'in/model.safetensors').read_bytes())
  with pytest.raises(ValueError, match='is also in model.safetensors'):
    load.load(tmp_path / 'in')


def test_links_of_the_download_cache_are_followed(tmp_path):
  cache = tmp_path / 'models--google--gemma'
  (cache / 'snapshots').mkdir(parents=True)
  (cache / 'blobs').mkdir()
  expected = released(cache / 'snapshots/0123', LARGE)
  for file in (cache / 'snapshots/0123').iterdir():
    file.rename(cache / 'blobs' / file.name)
    file.symlink_to(f'../../blobs/{file.name}')
  assert_equal(load.load(cache / 'snapshots/0123')[1], expected)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_on_request_by_name(tmp_path, bad):
  released(tmp_path / 'in', LARGE, files=1)
  state = safetensors.numpy.load_file(tmp_path / 'in/model.safetensors')
  state['model.language_model.layers.1.mlp.up_proj.weight'][-1, -1] = bad
  safetensors.numpy.save_file(state, tmp_path / 'in/model.safetensors')
  load.load(tmp_path / 'in')
  with pytest.raises(ValueError, match='model.language_model.layers.1.mlp.up_proj.weight: holds NaN or infinity'):
    load.load(tmp_path / 'in', check_nan=True)


@pytest.mark.parametrize('make, message', [
    (lambda folder: None, 'no such directory'),
    (lambda folder: folder.mkdir(), r'holds no \*.safetensors files'),
    (lambda folder: folder.write_text(''), 'no such directory'),
], ids=['nothing', 'empty', 'file'])
def test_what_is_no_checkpoint_is_refused(tmp_path, make, message):
  make(tmp_path / 'in')
  with pytest.raises(ValueError, match=message):
    load.load(tmp_path / 'in')


def test_a_path_that_no_system_has_is_refused():
  with pytest.raises(ValueError, match='aaa: cannot be read'):
    load.load('a' * 300)


def model_field(**fields):
  def damage(folder):
    value = json.loads((folder / 'config/metadata').read_text())
    value['model'].update(fields)
    write_json(folder / 'config/metadata', value)
  return damage


@pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage, message', [
    (lambda folder: (folder / 'config/metadata').unlink(), 'metadata: cannot be read'),
    (lambda folder: (folder / 'config/metadata').write_text('{"model": 3}'), 'holds no model'),
    (lambda folder: (folder / 'config/metadata').write_text('{"model": {"num_layers": 1000000000}}'), 'layers are more than'),
    (lambda folder: (folder / 'config/metadata').write_text('{"model": {"with": 3}}'), 'did you mean model.width'),
    (model_field(vocab_size=10**12), 'cannot be read'),
    (model_field(vocab_size=1), 'checkpoint does not fit the model'),
    (lambda folder: (folder / 'params/_METADATA').write_text('{'), 'not a whole Orbax tree'),
    (lambda folder: (folder / 'params/manifest.ocdbt').unlink(), 'not a whole Orbax tree'),
    (lambda folder: (folder / 'params/manifest.ocdbt').write_text('[]'), 'not a whole Orbax tree'),
    (lambda folder: max((folder / 'params').rglob('d/*'), key=lambda file: file.stat().st_size).write_bytes(b''), 'not a whole Orbax'),
], ids=range(10))
def test_a_damaged_export_is_refused_in_one_line_and_no_thread_says_more(tmp_path, damage, message):
  save.save_orbax(LARGE, weights(LARGE), tmp_path / 'in')
  damage(tmp_path / 'in')
  with pytest.raises(ValueError, match=message) as error:
    load.load(tmp_path / 'in')
  one_line(error)
  assert str(tmp_path / 'in') in str(error.value)


def test_orbax_writes_few_bytes_at_once_and_every_array(monkeypatch):
  wrote = []

  async def note(_, values, names):
    wrote.append(list(zip([value.nbytes for value in values], names, strict=True)))

  monkeypatch.setattr(orbax, '_WRITTEN_BYTES', 100)
  monkeypatch.setattr(orbax.ocp.type_handlers.NumpyHandler, '_background_serialize', note)
  with asyncio.Runner() as runner:
    runner.run(orbax._NumpyHandler()._background_serialize([np.zeros(n, np.int8) for n in (40, 60, 40, 200, 8)], list('abcde')))
  assert wrote == [[(40, 'a'), (60, 'b')], [(40, 'c')], [(200, 'd')], [(8, 'e')]]


@pytest.mark.parametrize('work', ['metadata', 'deserialize', '_background_serialize'])
def test_a_failure_of_orbax_is_told_when_nothing_is_at_work_any_more(monkeypatch, work):
  ended = []

  async def wait():
    await asyncio.sleep(0.01)
    ended.append(True)

  async def fail():
    raise ValueError('damaged')

  async def both(*_):
    await asyncio.gather(fail(), wait(), wait())

  monkeypatch.setattr(orbax.ocp.type_handlers.NumpyHandler, work, both)
  with pytest.raises(ValueError, match='damaged'), asyncio.Runner() as runner:
    try:
      runner.run(getattr(orbax._NumpyHandler(), work)([np.zeros(1)]))
    finally:
      assert ended == [True, True]


def test_a_weight_is_copied_once_on_its_way_to_a_cpu():
  copy = load._copied(np.arange(6, dtype=np.float16).reshape(2, 3).T, np.dtype('float32'))
  np.testing.assert_array_equal(copy, [[0, 3], [1, 4], [2, 5]])
  assert copy.flags.c_contiguous and jax.device_put(copy).unsafe_buffer_pointer() == copy.ctypes.data
