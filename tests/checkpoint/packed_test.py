"""Quantized checkpoints: written while weights are quantized, loaded as what the model would be if it were quantized in memory."""

import functools
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.checkpoint import load, orbax, packed, save
from gemma4_jax.cli import convert
from gemma4_jax.evaluation import score
from gemma4_jax.model import ple_placement, quantized, transformer
from gemma4_jax.sampling import text
from tests import quick, tiny

CFG = config.shrink(config.E2B, pattern='G', num_layers=2, num_kv_shared_layers=1, width=32, mlp_dim=48, vocab_size=1024)
PLAN = 'turboquant4,ple=as_is,embed=int4'


@functools.cache
def params():
  return transformer.init(CFG, 0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A toy as Hugging Face's files ('hf') and quantized ('packed')."""
  folder = tmp_path_factory.mktemp('packed')
  save.save_hf(CFG, params(), folder / 'hf')
  (folder / 'hf' / 'tokenizer.json').write_text(tiny.model().tokenizer.serialized)
  run(folder / 'hf', folder / 'packed', f'--quantize={PLAN}')
  return folder


def run(src, dst, *flags, to='orbax'):
  convert.main([f'--src={src}', f'--dst={dst}', f'--to={to}', *flags])


def refused(*args, **kwargs):
  with pytest.raises(SystemExit) as stop:
    run(*args, **kwargs)
  assert isinstance(stop.value.code, str) and '\n' not in stop.value.code
  return stop.value.code


def in_memory():
  cfg, placed = ple_placement.place(CFG, params(), storage='int8')
  return cfg, quantized.quantize(cfg, placed, PLAN)


def test_what_is_loaded_is_what_would_be_quantized_in_memory_bit_for_bit(folder):
  cfg, variables = load.load(folder / 'packed')
  expected_cfg, expected = in_memory()
  assert cfg == expected_cfg
  assert jax.tree.structure(variables) == jax.tree.structure(expected)
  for got, want in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.slow
def test_it_samples_and_is_scored_with_its_table_on_either_side(folder):
  models = [text.load(folder / 'packed', ple_placement=placement) for placement in ('device', 'host')]
  cfg, variables = in_memory()
  made = text.Model(models[0].cfg, variables, models[0].tokenizer, models[0].stop_ids)
  said = [model.generate('The sea', max_new_tokens=6, sampling=made.sampling) for model in (*models, made)]
  assert len({row.tokens.tobytes() for row in said}) == 1
  assert models[1].cfg.ple_placement == 'host' and 'host' in models[1].params['params']['arm']['lookup']
  ids = np.arange(1, 9, dtype=np.int32)[None]
  nll = score.token_nll(cfg, models[0].params, ids, np.ones_like(ids))
  assert np.isfinite(nll).all() and np.asarray(nll).any()


MESH = """
import sys
import numpy as np
from gemma4_jax.sampling import text
one, split = (text.load(sys.argv[1], mesh=mesh).generate('The sea', max_new_tokens=6) for mesh in (None, {'fsdp': 2, 'tensor': 2}))
np.testing.assert_array_equal(split.tokens, one.tokens)
np.testing.assert_allclose(split.logprobs, one.logprobs, atol=1e-4)
"""


@pytest.mark.slow
def test_it_says_the_same_on_a_mesh(folder):
  done = subprocess.run([sys.executable, '-c', MESH, folder / 'packed'], env=quick.virtual_devices(4), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_the_report_counts_what_was_asked_and_its_bytes(folder, tmp_path, capsys):
  run(folder / 'hf', tmp_path / 'out', '--quantize=turboquant4', '--dry_run')
  out = capsys.readouterr().out
  contents = packed.Contents.make(CFG.replace(ple_table='int8'), 'turboquant4')
  assert f'{contents.nbytes:,} bytes, turboquant4' in out and '100%' in out and 'nothing was written' in out
  rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith('      ')}
  assert rows['embed'][0] == 'int8' and rows['mlp'][0] == 'turboquant4' and rows['ple_table'][0] == 'int8' and rows['other'][0] == 'as_is'
  assert not (tmp_path / 'out').exists()


def test_31b_in_four_bits_is_16_5_gb():
  cfg = config.B31.replace(param_dtype='bfloat16')
  for plan, expected in (('turboquant4', 16.514e9), ('turboquant4,embed=turboquant4', 15.833e9), ('int4', 17.887e9)):
    contents = packed.Contents.make(cfg, plan)
    asked, done = contents.coverage()
    assert asked == done and sum(contents.sizes[name] for name in done) > 0.9999 * sum(contents.sizes.values())
    assert contents.nbytes == pytest.approx(expected, rel=1e-3)


def test_the_file_is_as_large_as_its_arrays_and_written_while_it_is_quantized(tmp_path, monkeypatch):
  cfg = config.shrink(config.B31, pattern='LG', num_layers=2, width=256, vocab_size=2048, mlp_dim=512)
  save.save_hf(cfg, transformer.init(cfg, 0), tmp_path / 'hf')
  events, write, encode = [], orbax.write, packed.Contents.encode
  monkeypatch.setattr(orbax, 'write', lambda path, *args: (events.append(path.name), write(path, *args)))
  monkeypatch.setattr(packed.Contents, 'encode', lambda self, name, w: (events.append(name), encode(self, name, w))[1])
  run(tmp_path / 'hf', tmp_path / 'out', '--quantize=turboquant4')
  assert events.index('layer_0') < min(i for i, name in enumerate(events) if name.startswith('layer_1/'))
  expected = packed.Contents.make(cfg, 'turboquant4').nbytes
  size = sum(file.stat().st_size for file in (tmp_path / 'out').rglob('*') if file.is_file())
  assert size < expected + 20_000 * (cfg.num_layers + 3)     # metadata of every module's tree


def damaged(folder, tmp_path, damage):
  shutil.copytree(folder / 'packed', tmp_path / 'bad')
  damage(tmp_path / 'bad')
  with pytest.raises(ValueError) as error:
    load.load(tmp_path / 'bad')
  assert '\n' not in str(error.value)
  return str(error.value)


def largest(folder):
  return max((file for file in (folder / packed.FOLDER / 'embedder').rglob('*') if file.is_file()), key=lambda file: file.stat().st_size)


def change(folder, **fields):
  file = folder / 'config' / 'metadata'
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')   # of a thread that read on
@pytest.mark.parametrize('damage, message', [
    (lambda f: shutil.rmtree(f / packed.FOLDER / 'layer_1'), 'missing: layer_1/'),
    (lambda f: largest(f).write_bytes(largest(f).read_bytes()[:100]), 'embedder: not a whole Orbax tree'),
    (lambda f: change(f, weights={'mlp': 'turboquant9'}), "metadata: weights: 'turboquant9' is none of"),
    (lambda f: change(f, weights=['int8']), 'metadata: holds no formats'),
    (lambda f: change(f, weights={'attention': 'turboquant4', 'mlp': 'turboquant3', 'embed': 'int4'}), 'mlp/down/w/codes'),
    (lambda f: change(f, weights={'attention': 'turboquant4', 'mlp': 'turboquant4', 'embed': 'turboquant4'}), 'stored as float16'),
    (lambda f: (f / 'config' / 'metadata').unlink(), 'cannot be read as JSON'),
], ids=['module', 'cut', 'format', 'plan', 'bits', 'group', 'config'])
def test_what_is_cut_or_foreign_is_one_line(folder, tmp_path, damage, message):
  assert message in damaged(folder, tmp_path, damage)


def test_what_cannot_be_is_said_before_anything_is_read(folder, tmp_path):
  assert 'quantized already' in refused(folder / 'packed', tmp_path / 'x')
  assert '--to=orbax' in refused(folder / 'hf', tmp_path / 'x', '--quantize=int8', to='hf')
  assert "did you mean 'int8'" in refused(folder / 'hf', tmp_path / 'x', '--quantize=int9')
  assert 'ple_table' in refused(folder / 'hf', tmp_path / 'x', '--quantize=int8,ple_table=int3')
  assert 'leaves everything as it is' in refused(folder / 'hf', tmp_path / 'x', '--quantize=as_is')
  with pytest.raises(ValueError, match='quantized already'):
    text.load(folder / 'packed', weights='int8')
