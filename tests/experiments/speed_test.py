"""What `experiments.speed` refuses, and the parts of it that no clock is needed for."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments import llama_cpp_peer, speed, speed_plain, speed_sampling
from gemma4_jax import config as model_config
from gemma4_jax.checkpoint import load
from gemma4_jax.model import transformer
from gemma4_jax.training import trainer
from tests import quick, tiny

CONVERT = os.environ.get('LLAMA_CPP_CONVERT', '')   # the path of llama.cpp's convert_hf_to_gguf.py


@pytest.mark.parametrize('flags, said', [
    (['train', '--peer=llama_cpp'], '--peer=llama_cpp: does not train here'),
    (['load', '--peer=hf'], '--peer=hf: does not load here'),
    (['decode', '--rounds=0'], '--steps and --rounds are at least 1')])
def test_what_cannot_be_measured_is_said_before_anything_runs(flags, said, capsys):
  with pytest.raises(SystemExit):
    speed.main(flags)
  assert said in capsys.readouterr().err


def test_a_missing_peer_names_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'llama_cpp', None)
  with pytest.raises(SystemExit, match=r"gemma4_jax\[llama_cpp\]"):
    speed.main(['decode', '--size=e2b-toy', '--peer=llama_cpp'])


@pytest.mark.parametrize('script, outtype, said', [('', 'f32', '--convert: not given'), ('no/such.py', 'f32', 'no/such.py'),
                                                   (__file__, None, 'writes bf16, f32, q8_0 only')])
def test_the_script_and_the_weights_it_can_write_are_checked(script, outtype, said):
  with pytest.raises(SystemExit, match=said):
    llama_cpp_peer.check(script, outtype)


@pytest.mark.slow
def test_random_checkpoints_are_whole_and_of_the_dtype_asked_for(tmp_path):
  speed_sampling.write_random('e2b-toy', 'bfloat16', str(tmp_path / 'a'))
  found = load.find(tmp_path / 'a')
  assert found.cfg.param_dtype == 'bfloat16' and found.cfg.num_layers == base.models()['e2b-toy'].num_layers
  assert (tmp_path / 'a' / 'tokenizer.json').exists()


def test_the_first_token_of_a_checkpoint_comes_with_what_it_took(tmp_path):
  found = speed_sampling.first_token(str(tiny.write(tmp_path / 'a')), 'as_is')
  assert found['load_seconds'] > 0 and found['first_token_seconds'] > found['compile_seconds'] >= 0


@pytest.mark.skipif(not CONVERT, reason="LLAMA_CPP_CONVERT does not name llama.cpp's convert_hf_to_gguf.py")
@pytest.mark.parametrize('name, over_tokens', [('e2b-toy', 'largest_difference'), ('26b-a4b-toy', 'median_difference')])
def test_llama_cpp_gives_the_logits_of_the_same_weights(name, over_tokens):
  pytest.importorskip('llama_cpp')
  found = llama_cpp_peer.compare(name, CONVERT, 96)
  assert found['tokens'] > found['window']
  assert np.isfinite(found['largest_logit']) and found['float16_gelu'][over_tokens] < 0.02   # beside values of up to 5


def test_what_is_compiled_has_all_layers_of_e2b():
  alike = lambda cfg: [(spec.window is None, spec.kv_from, spec.mlp_dim // cfg.mlp_dim, spec.inject) for spec in cfg.layers]
  assert alike(speed.NARROW) == alike(model_config.E2B)


@pytest.mark.slow
def test_the_plain_step_is_of_the_same_model():
  cfg = model_config.shrink(model_config.E2B, periods=2, scan=True)
  params = jax.tree.map(lambda w: 1.1 * w + 0.01, transformer.init(cfg, 0))   # norms that are not 1
  ids = jax.random.randint(jax.random.key(1), (2, 24), 1, cfg.vocab_size)
  seg = jnp.ones_like(ids).at[0, 15:].set(2).at[1, 20:].set(0)
  pos = jnp.arange(24)[None] - jnp.where(seg == 2, 15, 0)
  weight = (seg > 0).astype(jnp.float32)
  batch = {'tokens': ids, 'targets': ids, 'positions': pos, 'segments': seg, 'weights': weight}
  tx, step = speed_plain.make_step(cfg)
  ours = trainer.make_step(cfg, tx, accumulate=1, loss_chunk=16)
  state = trainer.State(jnp.int32(0), params, tx.init(params))
  (expected, row), (found, loss) = (quick.jit(one)(state, batch) for one in (ours, step))
  np.testing.assert_allclose(loss, row['loss'], rtol=2e-6)
  for a, b in zip(jax.tree.leaves(found.opt_state[0].mu), jax.tree.leaves(expected.opt_state[0].mu), strict=True):   # of the gradients
    np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_a_compile_is_timed_in_each_form(monkeypatch):
  forms, compiles = [], speed._compile
  monkeypatch.setattr(speed, 'NARROW', model_config.shrink(model_config.E2B, periods=2, remat='full'))
  monkeypatch.setattr(speed, '_compile', lambda form: forms.append(form) or compiles(form))
  monkeypatch.setattr(speed, 'alone', lambda function, *args: function(*args))
  found = speed._compiles(1)
  each = {form: times[0] for form, times in found['rounds'].items()}
  assert forms == ['one_by_one', 'scanned', 'plain'] and min(min(times.values()) for times in each.values()) > 0
  for form in ('one_by_one', 'plain'):
    assert found[f'scanned_to_{form}'] == {key: each['scanned'][key] / each[form][key] for key in each[form]}


@pytest.mark.slow
def test_a_scan_keeps_what_it_cuts_out_of_a_stack_and_blocks_one_by_one_need_not():
  found = speed_sampling.scanned('e2b-toy', 'float32', steps=1)
  assert found['scanned']['temporary_bytes'] > 2 * found['one_by_one']['temporary_bytes'] > 0
  assert found['times_as_long'] == found['scanned']['seconds'] / found['one_by_one']['seconds']
