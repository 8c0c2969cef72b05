"""Weights out: what `transformers` makes of them, bit for bit the same coming back, and nothing left of a failure."""

import errno
import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gemma4_jax import config
from gemma4_jax.checkpoint import hf, load, save, shards
from gemma4_jax.model import transformer
from tests import hf_models, quick

CONFIGS = hf_models.configs()
CFG = CONFIGS['moe']


def params_of(cfg, dtype=np.float32):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), hf.params_from_hf(cfg, hf_models.random_state(cfg)))


@pytest.mark.parametrize('max_shard_bytes', [10**9, 10**5])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
def test_out_and_in_is_bit_exact(tmp_path, dtype, max_shard_bytes):
  params = params_of(CFG, dtype)
  save.save_hf(CFG, params, tmp_path / 'out', max_shard_bytes=max_shard_bytes)
  _, again = load.load(tmp_path / 'out')
  assert save.digest(load.flatten(again).items()) == save.digest(load.flatten(params).items())
  files = sorted((tmp_path / 'out').glob('*.safetensors'))
  assert len(files) == 1 if max_shard_bytes == 10**9 else len(files) > 5
  assert (tmp_path / 'out' / shards.INDEX).exists() == (len(files) > 1)


@pytest.mark.parametrize('name', ['mqa_ple_kvshare', 'moe'])
def test_the_safetensors_library_reads_the_same_bytes(tmp_path, name):
  cfg, state = CONFIGS[name], hf_models.random_state(CONFIGS[name])
  mixed = hf.params_from_hf(cfg, state)
  mixed['layer_0']['scalar'] = mixed['layer_0']['scalar'].astype(jnp.bfloat16)   # an odd number of bytes before the others
  save.save_hf(cfg, mixed, tmp_path / 'out')
  read = safetensors.numpy.load_file(tmp_path / 'out/model.safetensors')
  assert read.keys() == state.keys()
  stored = shards.find(tmp_path / 'out')
  assert all(tensor.begin % tensor.float_dtype(key).itemsize == 0 for key, tensor in stored.items())
  for key, array in state.items():
    expected = array.astype(jnp.bfloat16) if key == 'model.layers.0.layer_scalar' else array
    np.testing.assert_array_equal(read[key], expected, err_msg=key)


def test_dtype_casts_and_stacked_parameters_are_taken(tmp_path):
  cfg = CONFIGS['large_kv']
  params = params_of(cfg)
  save.save_hf(cfg.replace(scan=True), transformer.stack(cfg, params), tmp_path / 'out', dtype='bfloat16')
  back, again = load.load(tmp_path / 'out')
  assert back.param_dtype == 'bfloat16'
  jax.tree.map(lambda got, want: np.testing.assert_array_equal(got, want.astype(jnp.bfloat16)), again, params)
  assert json.loads((tmp_path / 'out/config.json').read_text())['dtype'] == 'bfloat16'


def test_digest_tells_names_shapes_dtypes_and_bits_apart_and_not_the_order():
  a, b = np.arange(6, dtype=np.float32), np.zeros(2, np.float32)
  same = save.digest([('a', a), ('b', b)])
  assert same == save.digest([('b', b), ('a', a)])
  others = [[('a', a), ('c', b)], [('a', a.reshape(2, 3)), ('b', b)], [('a', a.view(np.int32)), ('b', b)], [('a', a), ('b', -b)]]
  assert len({same, *map(save.digest, others)}) == 5


@pytest.mark.parametrize('name', hf_models.TINY)
def test_transformers_loads_it_without_missing_or_unexpected_keys_and_computes_the_same(tmp_path, name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  cfg, params = CONFIGS[name], params_of(CONFIGS[name])
  save.save_hf(cfg, params, tmp_path / 'out', max_shard_bytes=3 * 10**5)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'out', output_loading_info=True, attn_implementation='eager', experts_implementation='eager')
  assert not any(info.values()), info
  ids, mask, pos = hf_models.batch()
  with torch.no_grad():
    theirs = model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
  ours, _ = quick.apply(transformer.Transformer(cfg), params, ids, pos, mask)
  assert np.abs(ours - theirs).max() <= 5e-4


def test_tokenizer_and_generation_files_come_along_and_nothing_else(tmp_path):
  (tmp_path / 'in').mkdir()
  for name in (*save.COPIED, 'model.bin', 'modeling.py'):
    (tmp_path / 'in' / name).write_text(name)
  save.save_hf(CONFIGS['large_kv'], params_of(CONFIGS['large_kv']), tmp_path / 'out', source=tmp_path / 'in')
  assert {file.name for file in (tmp_path / 'out').iterdir()} == {*save.COPIED, 'config.json', 'model.safetensors'}
  assert all((tmp_path / 'out' / name).read_text() == name for name in save.COPIED)


def test_a_link_to_a_file_elsewhere_is_not_copied_along(tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'secret').write_text('secret')
  (tmp_path / 'in/tokenizer.json').symlink_to(tmp_path / 'secret')
  with pytest.raises(ValueError, match="'tokenizer.json' lies outside of this directory"):
    save.save_hf(CONFIGS['large_kv'], params_of(CONFIGS['large_kv']), tmp_path / 'out', source=tmp_path / 'in')
  assert {file.name for file in tmp_path.iterdir()} == {'in', 'secret'}


@pytest.mark.parametrize('write', [save.save_hf, save.save_orbax])
def test_an_existing_destination_is_refused_and_untouched(tmp_path, write):
  (tmp_path / 'out').mkdir()
  with pytest.raises(ValueError, match='out: exists already'):
    write(CFG, params_of(CFG), tmp_path / 'out')
  assert not any((tmp_path / 'out').iterdir()) and len(list(tmp_path.iterdir())) == 1


def test_what_transformers_reads_and_cannot_generate_with_is_told(tmp_path, caplog):
  cfg = config.shrink(config.E2B, embedding='none')
  with caplog.at_level('WARNING', 'absl'):
    save.save_hf(cfg, transformer.init(cfg, 0), tmp_path / 'told')
    assert 'told: transformers runs a model that shares K/V and has no PLE only when' in caplog.text
    caplog.clear()
    save.save_hf(CFG, params_of(CFG), tmp_path / 'not')
  assert not caplog.text
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'told')
  with pytest.raises(TypeError):   # or it is mended there, and the warning can go
    model(torch.ones((1, 4), dtype=torch.int64))
  assert model(torch.ones((1, 4), dtype=torch.int64), logits_to_keep=torch.arange(4)).logits.shape == (1, 4, cfg.vocab_size)


def test_a_model_that_hugging_face_has_not_is_refused_by_field(tmp_path):
  cfg = config.shrink(config.E2B, embedding='stem')
  with pytest.raises(ValueError, match='model.embedding'):
    save.save_hf(cfg, transformer.init(cfg, 0), tmp_path / 'out')
  assert not any(tmp_path.iterdir())


def test_parameters_of_another_config_are_refused(tmp_path):
  with pytest.raises(ValueError, match='checkpoint does not fit the model: .* missing: layer_0/moe'):
    save.save_hf(CFG, params_of(CONFIGS['large_kv']), tmp_path / 'out')


@pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('write', [save.save_hf, save.save_orbax])
def test_a_disk_that_is_full_midway_leaves_nothing_and_no_thread_says_more(tmp_path, write):
  params = jax.tree.map(np.asarray, params_of(CFG))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))   # a write past this size fails, as past the end of a disk
  try:
    with pytest.raises(ValueError, match='out: cannot be written') as error:
      write(CFG, params, tmp_path / 'out')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert '\n' not in str(error.value) and not any(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_one_is_writing_is_not(tmp_path):
  code = ('import os, sys; from gemma4_jax.checkpoint import save\n'
          'with save.beside(sys.argv[1]) as folder:\n'
          '  folder.mkdir(); print(folder.parent.name, flush=True); sys.stdin.read()')
  def start(name):
    writer = subprocess.Popen([sys.executable, '-c', code, tmp_path / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return writer, writer.stdout.readline().strip()
  (killed, left), (live, writing), (other, others) = start('out'), start('out'), start('out2')
  for writer in (killed, other):
    writer.kill()
    writer.wait()
  assert {entry.name for entry in tmp_path.iterdir()} == {left, writing, others}
  with pytest.raises(KeyboardInterrupt), save.beside(tmp_path / 'out'):
    raise KeyboardInterrupt
  assert {entry.name for entry in tmp_path.iterdir()} == {writing, others}
  live.communicate('')
  assert live.returncode == 0 and {entry.name for entry in tmp_path.iterdir()} == {'out', others}


def test_what_a_thread_writes_while_a_part_is_removed_is_removed_by_the_next(tmp_path, monkeypatch):
  def remove(path, **flags):
    rmtree(path, **flags)
    path.mkdir()
  rmtree = save.shutil.rmtree
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), save.beside(tmp_path / 'out') as folder:
    patch.setattr(save.shutil, 'rmtree', remove)
    folder.mkdir()
    raise KeyboardInterrupt
  assert [entry.name.startswith('.out.part-') for entry in tmp_path.iterdir()] == [True]
  with save.beside(tmp_path / 'out') as folder:
    folder.mkdir()
  assert [entry.name for entry in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=['full', 'stopped'])
def test_a_write_that_ends_early_leaves_nothing(tmp_path, error):
  with pytest.raises((ValueError, KeyboardInterrupt)) as raised:
    with save.beside(tmp_path / 'out') as folder:
      folder.mkdir()
      (folder / 'half').write_text('half')
      raise error
  assert raised.type is KeyboardInterrupt or 'No space left on device' in str(raised.value)
  assert not any(tmp_path.iterdir())
