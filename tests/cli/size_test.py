"""The variant table: printed, kept in the README, and quick because nothing heavy is imported."""

import json
import pathlib
import subprocess
import sys

import pytest

from gemma4_jax import config, kv_format, size
from gemma4_jax.cli import size as cli

ROOT = pathlib.Path(__file__).parents[2]
CONTEXT = 32_768


def test_readme_holds_the_table_that_the_command_prints(capsys):
  cli.main(['--markdown'])
  readme = (ROOT / 'README.md').read_text()
  _, _, rest = readme.partition('<!-- variant-table -->')
  table, end, _ = rest.partition('<!-- /variant-table -->')
  assert end and table.strip() == capsys.readouterr().out.strip(), (
      'renew the table of README.md: python -m gemma4_jax.cli.size --markdown')


def test_table_shows_every_variant_with_its_numbers_and_fits_a_terminal(capsys):
  cli.main([])
  out = capsys.readouterr().out
  assert '…' not in out and all(name in out.splitlines()[1] for name in config.VARIANTS)
  line = {row.strip().split('  ')[0]: row.split() for row in out.splitlines() if row.strip()}
  assert line['parameters'][1::2] == ['4.63', '7.46', '11.91', '25.23', '30.70']
  assert line['PLE table'][2:] == ['2.35', 'B', '2.82', 'B', '-', '-', '-']
  assert line['active'][7:9] == ['3.82', 'B']
  assert line['host int8'][2:] == ['4.56', '27525.6', '9.1', '9.29', '55050.8', '10.9']
  assert line['folded_host bfloat16'][2:] == ['4.53', '-', '17.9', '9.23', '-', '21.5']


def test_models_without_ple_have_no_table_of_placements(capsys):
  cli.main(['--variants=31b'])
  assert 'folded' not in capsys.readouterr().out
  assert cli.costs(config.B31, CONTEXT)['ple_placements'] == {}


def test_json_holds_the_unrounded_numbers_of_the_variants_asked_for(capsys):
  cli.main(['--json', '--variants=31b,e2b', '--context=4096'])
  found = json.loads(capsys.readouterr().out)
  assert list(found) == ['31b', 'e2b']
  assert found['e2b']['total_params'] == size.total(config.E2B)
  assert found['e2b']['ple_placements']['host']['int4'] == size.placed_bytes(config.E2B.replace(ple_placement='host', ple_table='int4'))
  assert found['e2b']['mlp_dims'] == [6144, 12_288]
  assert found['31b']['forward_flops_per_token'] == size.forward_flops(config.B31, 4096)
  assert found['31b']['kv_bytes_exact'] == size.kv_bytes(config.B31, 4096) < found['31b']['kv_bytes_separate']


def test_context_moves_the_flops_and_the_cache_and_nothing_else():
  short, long = (cli.costs(config.E2B, context) for context in (512, CONTEXT))
  assert {name for name in short if short[name] != long[name]} == {
      'forward_flops_per_token', *(f'kv_bytes_{preset}' for preset in kv_format.PRESETS)}


@pytest.mark.parametrize('flags, error', [
    (['--variants=e3b'], "--variants: variant 'e3b': none of e2b, e4b, 12b, 26b-a4b, 31b; did you mean 'e4b'?"),
    (['--context=0'], '--context: 0 is not positive'),
    (['--context=long'], "argument --context: invalid int value: 'long'")])
def test_a_wrong_flag_is_answered_with_one_line(flags, error):
  with pytest.raises(SystemExit) as stop:
    cli.main(flags)
  assert stop.value.code == error


def test_neither_the_table_nor_matching_imports_jax():
  code = "import sys, gemma4_jax.cli.size, gemma4_jax.match; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
