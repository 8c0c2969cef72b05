"""The converter: in, out and in again, what it says, and that a refusal leaves nothing."""

import re

import numpy as np
import pytest
import safetensors.numpy

from gemma4_jax import config
from gemma4_jax.checkpoint import hf, load, save
from gemma4_jax.cli import convert
from gemma4_jax.model import transformer
from tests import hf_models

CFG = hf_models.configs()['mqa_ple_kvshare']


def write_source(folder, cfg=CFG):
  save.save_hf(cfg, hf.params_from_hf(cfg, hf_models.random_state(cfg)), folder)
  for name in save.COPIED:
    (folder / name).write_text('{}')


def run(capsys, src, dst, to, *flags):
  convert.main([f'--src={src}', f'--dst={dst}', f'--to={to}', *flags])
  return capsys.readouterr().out


def sha(out):
  return re.search(r'^sha256 ([0-9a-f]{64})$', out, re.M)[1]


def test_from_hugging_face_through_orbax_and_back_every_bit_is_the_same(tmp_path, capsys):
  write_source(tmp_path / 'a')
  ways = (('a', 'b', 'orbax'), ('b', 'c', 'hf'), ('a', 'd', 'hf'))
  hashes = [sha(run(capsys, tmp_path / src, tmp_path / dst, to)) for src, dst, to in ways]
  assert len(set(hashes)) == 1
  first, through, direct = (safetensors.numpy.load_file(tmp_path / name / 'model.safetensors') for name in 'acd')
  assert first.keys() == through.keys() == direct.keys()
  assert all(np.array_equal(first[key], other[key]) for key in first for other in (through, direct))
  assert load.find(tmp_path / 'b').cfg == CFG
  assert all((tmp_path / dst / name).exists() for dst in 'bcd' for name in save.COPIED)


def test_dtype_is_what_is_written(tmp_path, capsys):
  write_source(tmp_path / 'a')
  narrow = sha(run(capsys, tmp_path / 'a', tmp_path / 'b', 'hf', '--dtype=bfloat16'))
  assert load.find(tmp_path / 'b').cfg.param_dtype == 'bfloat16'
  assert sha(run(capsys, tmp_path / 'b', tmp_path / 'c', 'orbax')) == narrow


def test_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, capsys):
  write_source(tmp_path / 'a')
  out = run(capsys, tmp_path / 'a', tmp_path / 'b', 'orbax', '--dry_run', '--dtype=bfloat16')
  found = load.find(tmp_path / 'a')
  for text in ('a Hugging Face checkpoint', 'no released variant', '10 layers of width 64', f'{len(found.pieces)} tensors',
               f'{found.nbytes:,} bytes', 'mostly float32', f'{tmp_path / "b"}: orbax, {found.nbytes // 2:,} bytes, bfloat16',
               'nothing was written'):
    assert text in out, text
  assert [entry.name for entry in tmp_path.iterdir()] == ['a']


def refused(argv):
  with pytest.raises(SystemExit) as stop:
    convert.main(argv)
  assert isinstance(stop.value.code, str) and '\n' not in stop.value.code
  return stop.value.code


@pytest.mark.parametrize('flags', [[], ['--dry_run']])
def test_an_existing_destination_is_refused(tmp_path, flags):
  write_source(tmp_path / 'a')
  (tmp_path / 'b').mkdir()
  assert 'b: exists already' in refused([f'--src={tmp_path / "a"}', f'--dst={tmp_path / "b"}', '--to=hf', *flags])


def test_this_very_folder_is_no_destination(tmp_path, monkeypatch):
  write_source(tmp_path / 'a')
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  assert 'exists already' in refused([f'--src={tmp_path / "a"}', '--dst=', '--to=hf'])
  assert {entry.name for entry in tmp_path.iterdir()} == {'a', 'here'}


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
  def stop(*_, **__):
    raise KeyboardInterrupt
  write_source(tmp_path / 'a', hf_models.configs()['large_kv'])
  monkeypatch.setattr(save, 'write_hf', stop)
  with pytest.raises(SystemExit) as stopped:
    convert.main([f'--src={tmp_path / "a"}', f'--dst={tmp_path / "b"}', '--to=hf'])
  assert stopped.value.code == 130 and capsys.readouterr().err.strip() == 'stopped'
  assert [entry.name for entry in tmp_path.iterdir()] == ['a']


@pytest.mark.parametrize('name', ['tokenizer.json', 'chat_template.jinja'])
@pytest.mark.parametrize('damage', [
    lambda file: file.symlink_to(file.name), lambda file: file.symlink_to('blob'), lambda file: file.mkdir()],
    ids=['a link to itself', 'a link to nothing', 'a folder'])
def test_a_file_beside_the_weights_that_cannot_be_read_is_named_and_not_left_out(tmp_path, name, damage):
  write_source(tmp_path / 'a', hf_models.configs()['large_kv'])
  (tmp_path / 'a' / name).unlink()
  damage(tmp_path / 'a' / name)
  said = refused([f'--src={tmp_path / "a"}', f'--dst={tmp_path / "b"}', '--to=hf'])
  assert name in said and 'cannot be read' in said
  assert [entry.name for entry in tmp_path.iterdir()] == ['a']


def damage_nan(folder):
  state = safetensors.numpy.load_file(folder / 'model.safetensors')
  state['model.norm.weight'][3] = np.nan
  safetensors.numpy.save_file(state, folder / 'model.safetensors')


def cut(folder):
  blob = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(blob[:-1])


@pytest.mark.parametrize('damage, message', [
    (damage_nan, 'model.norm.weight: holds NaN or infinity'),
    (cut, 'not a whole safetensors file'),
    (lambda folder: (folder / 'config.json').write_text('{'), 'config.json: cannot be read as JSON'),
    (lambda folder: (folder / 'x.incomplete').write_text(''), 'half downloaded'),
], ids=['nan', 'cut', 'config', 'incomplete'])
@pytest.mark.parametrize('to', ['hf', 'orbax'])
def test_a_source_that_is_not_sound_is_one_line_and_leaves_nothing(tmp_path, capsys, damage, message, to):
  write_source(tmp_path / 'a', hf_models.configs()['large_kv'])
  damage(tmp_path / 'a')
  assert message in refused([f'--src={tmp_path / "a"}', f'--dst={tmp_path / "b"}', f'--to={to}', '--check'])
  assert [entry.name for entry in tmp_path.iterdir()] == ['a']


def test_an_arm_that_hugging_face_has_not_is_refused_before_anything_is_read(tmp_path):
  cfg = config.shrink(config.E2B, pattern='LG', embedding='stem')
  save.save_orbax(cfg, transformer.init(cfg, 0), tmp_path / 'a')
  assert "model.embedding: 'stem'" in refused([f'--src={tmp_path / "a"}', f'--dst={tmp_path / "b"}', '--to=hf'])


def test_a_disk_that_does_not_keep_what_it_is_given_is_noticed(tmp_path, monkeypatch):
  write_source(tmp_path / 'a', hf_models.configs()['large_kv'])
  monkeypatch.setattr(save, '_to_host', lambda weight: np.zeros_like(weight))
  assert 'what was written is not what was read' in refused([f'--src={tmp_path / "a"}', f'--dst={tmp_path / "b"}', '--to=hf'])
  assert [entry.name for entry in tmp_path.iterdir()] == ['a']


@pytest.mark.parametrize('argv, message', [
    (['--src=a', '--dst=b'], 'the following arguments are required: --to'),
    (['--src=a', '--dst=b', '--to=gguf'], "invalid choice: 'gguf'"),
    (['--src=/nowhere', '--dst=b', '--to=hf'], '/nowhere: no such directory')])
def test_wrong_flags_are_answered_with_one_line(argv, message):
  assert message in refused(argv)
