"""The command that samples: what it prints where, and that what is wrong is one line."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import jax
import pytest

from gemma4_jax.cli import sample
from gemma4_jax.model import ple_placement
from tests import tiny

PROMPT = 'def width(self'
LAST = re.compile(r'^(\d+) prompt tokens at [\d.]+/s, (\d+) new at [\d.]+/s \(compiling: [\d.]+ s, not counted\), '
                  r'peak memory [\d.]+ GB \([\d.]+ after the prompt\), cache [\d,]+ bytes, kv (\S+), attention of prompts xla, '
                  r'(?:native|xla) matvec$')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return tiny.write(tmp_path_factory.mktemp('sample') / 'checkpoint')


def run(capsys, checkpoint, *flags):
  sample.main([f'--checkpoint={checkpoint}', f'--prompt={PROMPT}', '--max_new_tokens=12', '--seed=3', *flags])
  return capsys.readouterr()


def expected(**fields):
  model = tiny.model()
  settings = sample.sampling(sample_args(), model)
  return model.generate(PROMPT, max_new_tokens=12, seed=3, sampling=settings, **fields)


def sample_args():
  parser = sample.make_parser('sample', '')
  sample.add_model_arguments(parser, 1)
  return parser.parse_args([f'--{name}={tiny.SETTINGS[name]}' for name in ('temperature', 'top_k', 'top_p')])


def test_text_goes_to_standard_output_and_the_numbers_to_one_line_of_standard_error(checkpoint, capsys):
  out = run(capsys, checkpoint)
  assert out.out == expected().text + '\n'
  ids = tiny.model().encode(PROMPT)
  first, kept, last = out.err.splitlines()
  assert first == f'{checkpoint}: 10 layers of width 32, float32, {nbytes():,} bytes of float32 weights on the cpu, PLE table device as_is'
  assert kept == 'kv exact: 5 global: K V exact, 256 bytes a token, xla'
  assert LAST.match(last).groups() == (str(len(ids)), '12', 'exact')


def nbytes():
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.model().params))


@pytest.mark.slow
def test_the_table_goes_where_the_flags_say_and_the_first_line_tells(checkpoint, capsys):
  out = run(capsys, checkpoint, '--ple_placement=host', '--ple_table=int8')
  table = tiny.model().params['arm']['lookup']['table']
  host = table.size + 4 * table.size // table.shape[-1]
  assert out.err.splitlines()[0].endswith(
      f'{nbytes() - table.nbytes:,} bytes of float32 weights on the cpu, PLE table host int8, {host:,} bytes in host memory')
  cfg, params = ple_placement.place(tiny.model().cfg, tiny.model().params, placement='host', storage='int8')
  model = dataclasses.replace(tiny.model(), cfg=cfg, params=params)
  assert out.out == model.generate(PROMPT, max_new_tokens=12, seed=3, sampling=sample.sampling(sample_args(), model)).text + '\n'


@pytest.mark.slow
def test_stop_strings_suppressed_tokens_and_the_best_of_several(checkpoint, capsys):
  whole = expected()
  stops = [whole.text[4:7], whole.text[2:5]]
  cut = whole.text[:min(whole.text.index(stop) for stop in stops)]
  assert run(capsys, checkpoint, *(f'--stop={stop}' for stop in stops)).out == cut + '\n'
  first = int(whole.tokens[0])
  without = json.loads(run(capsys, checkpoint, '--json', f'--suppress_tokens={first},5').out)['completions'][0]['tokens']
  assert first not in without and len(without) == 12
  best = json.loads(run(capsys, checkpoint, '--json', '--samples=2', '--best_of=4').out)['completions']
  assert [row['text'] for row in best] == [row.text for row in expected(samples=2, best_of=4)]


def test_a_stop_string_ends_an_answer(checkpoint, capsys):
  whole = json.loads(run(capsys, checkpoint, '--chat', '--json').out)['completions'][0]['message']['content']
  stop = whole[len(whole) // 2:][:2]
  for flag in ('--stream', '--best_of=1'):
    assert run(capsys, checkpoint, '--chat', f'--stop={stop}', flag).out == whole[:whole.index(stop)] + '\n'


def test_a_stream_and_standard_input_give_the_same_text(checkpoint, capsys, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.StringIO(PROMPT + '\n'))
  out = run(capsys, checkpoint, '--stream', '--prompt=-')
  assert out.out == expected().text + '\n'


@pytest.mark.slow
def test_a_quantized_cache_with_a_window_over_all_tokens_gives_the_text_of_the_exact_one(checkpoint, capsys):
  out = run(capsys, checkpoint, '--kv=turboquant,recent=64')
  assert out.out == expected().text + '\n' and LAST.match(out.err.splitlines()[-1])[3] == 'turboquant,recent=64'
  assert out.err.splitlines()[1] == (
      'kv turboquant,recent=64: 4 global: K6 V6, newest 64 and first 4 exact, 52 bytes a token, xla; '
      '1 global: K V exact, 256 bytes a token, xla')


def test_json_has_all_samples_with_tokens_and_logprobs(checkpoint, capsys):
  found = json.loads(run(capsys, checkpoint, '--json', '--samples=2').out)
  rows = expected(samples=2)
  assert [row['text'] for row in found['completions']] == [row.text for row in rows]
  assert [row['tokens'] for row in found['completions']] == [row.tokens.tolist() for row in rows]
  assert found['stats']['new_tokens'] == sum(len(row.tokens) for row in rows) and len(found['completions'][0]['logprobs']) == 12


@pytest.mark.slow
def test_chat_answers_a_message_the_same_in_a_stream(checkpoint, capsys):
  found = json.loads(run(capsys, checkpoint, '--chat', '--system=S', '--thinking', '--json').out)
  asked = [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': PROMPT}]
  assert found['prompt_ids'] == tiny.model().encode_chat(asked, thinking=True).tolist()
  content = found['completions'][0]['message']['content']
  assert content and run(capsys, checkpoint, '--chat', '--system=S', '--thinking', '--stream').out == content + '\n'


def test_random_weights_need_no_checkpoint(capsys, monkeypatch):
  shapes = []
  monkeypatch.setattr(sample, 'print', lambda *_, **__: None, raising=False)
  from gemma4_jax.sampling import text
  monkeypatch.setattr(text, 'random', lambda cfg, **how: shapes.append((cfg, how)) or tiny.model())
  sample.main(['--variant=e4b', '--random_weights', '--shrink', '--dtype=bfloat16', f'--prompt={PROMPT}', '--max_new_tokens=12'])
  (cfg, how), = shapes
  assert cfg.pattern == 'LLLLLG' and cfg.width < 100 and how['param_dtype'] == 'bfloat16'


@pytest.mark.parametrize('flags, message', [
    ([], '--prompt'),
    (['--prompt=x'], '--checkpoint=DIR, or --variant=NAME'),
    (['--prompt=x', '--variant=e2b'], '--variant and --random_weights'),
    (['--prompt=x', '--variant=e3b', '--random_weights'], "did you mean 'e"),
    (['--prompt=x', '--checkpoint=/nowhere'], '/nowhere: no such directory'),
    (['--prompt=x', '--checkpoint=/nowhere', '--shrink'], '--shrink'),
    (['--prompt=x', '--checkpoint=/nowhere', '--temperature=-1'], 'temperature: -1.0 is negative'),
    (['--prompt=x', '--checkpoint=/nowhere', '--temperature=warm'], "invalid float value: 'warm'"),
    (['--prompt=x', '--checkpoint=/nowhere', '--max_new_tokens=0'], '--max_new_tokens=0'),
    (['--prompt=x', '--checkpoint=/nowhere', '--seed=-3'], '--seed=-3'),
    (['--prompt=x', '--checkpoint=/nowhere', '--samples=0'], '--samples=0'),
    (['--prompt=x', '--checkpoint=/nowhere', '--samples=2', '--stream'], '--samples=2'),
    (['--prompt=x', '--checkpoint=/nowhere', '--stream', '--json'], 'not allowed with'),
    (['--prompt=x', '--checkpoint=/nowhere', '--thinking'], 'need --chat'),
    (['--prompt=', '--checkpoint=/nowhere'], '--prompt: empty'),
    (['--prompt= ', '--checkpoint=/nowhere', '--chat'], '--prompt: empty'),
    (['--prompt=x', '--checkpoint=/nowhere', '--dtype=int8'], "invalid choice: 'int8'"),
    (['--prompt=x', '--checkpoint=/nowhere', '--ple_placement=disk'], "invalid choice: 'disk' (choose from"),
    (['--prompt=x', '--checkpoint=/nowhere', '--ple_table=int2'], "invalid choice: 'int2' (choose from"),
    (['--prompt=x', '--checkpoint=/nowhere', '--kv=turbo'], "kv: 'turbo' is none of exact, separate"),
    (['--prompt=x', '--checkpoint=/nowhere', '--kv=quality,kernel=pallas_tpu'], "kv.kernel: implementation='pallas_tpu' needs a TPU"),
    (['--prompt=x', '--checkpoint=/nowhere', '--stop='], 'stop_strings'),
    (['--prompt=x', '--checkpoint=/nowhere', '--suppress_tokens=a,b'], "'a,b' is no list of token ids"),
    (['--prompt=x', '--checkpoint=/nowhere', '--samples=3', '--best_of=2'], '--best_of=2: at least --samples=3'),
    (['--prompt=x', '--checkpoint=/nowhere', '--best_of=2', '--stream'], 'not with --stream'),
    (['--prompt=x', '--checkpoint=/nowhere', '--temprature=1'],
     'unrecognized argument: --temprature; did you mean --temperature?'),
    (['--promt=x', '--checkpoint=/nowhere'], 'unrecognized argument: --promt; did you mean --prompt?'),
    (['--prompt=', '--checkpoint=HERE'], 'prompt: empty'),
    (['--prompt=' + 'a b ' * 300, '--checkpoint=HERE'], 'context_length = 256'),
    (['--prompt=x', '--checkpoint=HERE', '--top_k=2000'], 'top_k: 2000'),
    (['--prompt=x', '--checkpoint=HERE', '--suppress_tokens=2000'], 'suppress_tokens: (2000,)'),
    (['--prompt=x', '--checkpoint=HERE', '--tokenizer=/nowhere.json'], 'cannot use /nowhere.json'),
], ids=lambda value: str(value)[-60:])
def test_what_is_wrong_is_one_line(checkpoint, flags, message):
  with pytest.raises(SystemExit) as stop:
    sample.main([flag.replace('HERE', str(checkpoint)) for flag in flags])
  assert message in stop.value.code and '\n' not in stop.value.code and stop.value.code.startswith('error: ')


def test_a_closed_standard_input_is_one_line(monkeypatch):
  monkeypatch.setattr(sys, 'stdin', None)
  with pytest.raises(SystemExit, match='error: --prompt=-: standard input is closed'):
    sample.main(['--checkpoint=/nowhere', '--prompt=-'])


@pytest.mark.parametrize('told', ['RESOURCE_EXHAUSTED: too much.\nmore', 'INTERNAL: Out of memory allocating 1 bytes.'])
def test_memory_that_runs_out_is_one_line(told):
  def fail():
    raise RuntimeError(told)
  with pytest.raises(SystemExit, match='error: out of memory; --dtype') as stop:
    sample.guard(fail)
  assert '\n' not in stop.value.code


def test_a_letter_that_the_terminal_has_not_is_written_as_its_code(monkeypatch):
  written = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, 'ascii'))
  sample.guard(lambda: print('caf\u00e9', flush=True))
  assert written.getvalue().strip() == rb'caf\xe9'


@pytest.mark.slow
def test_as_a_command_it_keeps_compiled_programs_where_it_is_told(checkpoint, tmp_path):
  environment = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
  command = [sys.executable, '-m', 'gemma4_jax.cli.sample', f'--checkpoint={checkpoint}', f'--prompt={PROMPT}', '--max_new_tokens=12',
             '--seed=3']
  done = subprocess.run(command, capture_output=True, text=True,
                        env={**environment, 'GEMMA4_JAX_CACHE': str(tmp_path), 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0 and done.stdout == expected().text + '\n' and LAST.match(done.stderr.splitlines()[-1])
  assert any((tmp_path / 'xla').iterdir())
  refused = subprocess.run([*command, '--top_p=3'], capture_output=True, text=True,
                           env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir})
  assert refused.returncode == 1 and refused.stderr.strip() == 'error: top_p: 3.0 is not above 0 and at most 1'
