"""Every notebook runs, is of the shape they share, and holds the outputs of a real run."""

import fnmatch
import glob
import importlib.util
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from colabs import notebook
from tests import tiny

FOLDER = pathlib.Path(notebook.__file__).parent
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def read(name):
  """(cells, code cells) as JSON; a cell's source is one string."""
  cells = json.loads((FOLDER / f'{name}.ipynb').read_text())['cells']
  cells = [cell | {'source': ''.join(cell['source'])} for cell in cells]
  return cells, [cell for cell in cells if cell['cell_type'] == 'code']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """One folder for all, so that the toy is trained once."""
  return tmp_path_factory.mktemp('runs')


@pytest.mark.slow
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, runs, monkeypatch):
  nbclient = pytest.importorskip('nbclient', reason='notebooks run in nbclient')
  pytest.importorskip('ipykernel', reason='notebooks run in ipykernel')
  import nbformat
  monkeypatch.setenv('SMOKE', '1')
  monkeypatch.setenv('COLABS_RUNS', str(runs))
  found = nbformat.read(FOLDER / f'{name}.ipynb', 4)
  nbclient.NotebookClient(found, timeout=300, resources={'metadata': {'path': str(FOLDER)}}).execute()
  last = found.cells[-1].outputs[0].text
  assert re.fullmatch(r'1 x cpu .*; jax .*; peak [\d,]+ bytes; \d+ s\n', last), last


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_has_the_shape_of_all(name):
  cells, code = read(name)
  assert 10 <= len(cells) <= 20
  badge = 'https://colab.research.google.com/github/gemma4-jax/gemma4_jax/blob/main/colabs/'
  assert cells[0]['source'].startswith('# ') and f'({badge}{name}.ipynb)' in cells[0]['source']
  _, same = read(NOTEBOOKS[0])
  assert [cell['source'] for cell in code[:2]] == [cell['source'] for cell in same[:2]]      # install, form
  assert code[-1]['source'] == 'run.end()' and cells[-1] == code[-1]
  assert not re.search(r'nn\.Module|^\s*class ', '\n'.join(cell['source'] for cell in code), re.MULTILINE)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_holds_the_outputs_of_one_whole_real_run(name):
  _, code = read(name)
  assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
  said = json.dumps([cell['outputs'] for cell in code])
  assert 'SMOKE' not in said and '"error"' not in said and 'Warning' not in said
  assert not re.search(r'/(home|root|tmp|work)/', said)
  assert re.search(r'peak [\d,]+ bytes; \d+ s', said)


@pytest.mark.parametrize('devices, plugin, extra', [
    ([], False, ''), (['/dev/nvidia0'], False, '[cuda]'), (['/dev/nvidia0'], True, '[cuda12]'), (['/dev/vfio/0'], False, '[tpu]')])
def test_on_colab_the_install_cell_takes_what_the_machine_has_and_finds_the_clone_again(devices, plugin, extra, tmp_path, monkeypatch):
  cell = re.sub(r'^( +)[!%](.*)$', r"\1shell(f'\2')", read(NOTEBOOKS[0])[1][0]['source'], flags=re.MULTILINE)
  said = []
  def shell(line):
    said.append(line)
    (tmp_path / 'gemma4_jax/colabs').mkdir(parents=True, exist_ok=True)
    (tmp_path / 'gemma4_jax/colabs/notebook.py').touch()
  monkeypatch.setitem(sys.modules, 'google.colab', None)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.setattr(glob, 'glob', lambda pattern: [path for path in devices if fnmatch.fnmatch(path, pattern)])
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: plugin and name == 'jax_cuda12_plugin' or None)
  for _ in range(2):    # the second time as after a restart, which begins where the first did
    monkeypatch.chdir(tmp_path)
    exec(cell, {'shell': shell})
    assert pathlib.Path.cwd() == tmp_path / 'gemma4_jax' and sys.path[0] == str(tmp_path / 'gemma4_jax')
  assert said[0].startswith('git clone -q') and said[1:] == [f'pip install -q -e gemma4_jax{extra} numpy=={np.__version__}']


def test_what_the_form_cannot_be_is_one_line(monkeypatch):
  for settings, said in (
      (('e2b', 'cpu', 0, True), 'needs CHECKPOINT'), (('toy', 'cpu', 0, True, 'gemma-4-E2B'), 'leave CHECKPOINT empty'),
      (('31b', 'cpu', 0, True), "SIZE='31b': none of toy"), (('toy', 'v5e', 0, True), "RUNTIME='v5e': JAX finds 1 x cpu")):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
      notebook.begin(*settings)
    assert '\n' not in str(refused.value)


def test_a_checkpoint_of_another_model_than_the_form_says_is_refused(tmp_path):
  tiny.write(tmp_path / 'tiny')
  run = notebook.begin('e2b', 'cpu', 0, True, str(tmp_path / 'tiny'))
  with pytest.raises(ValueError, match='holds no released model, SIZE is'):
    run.model()


def test_a_command_that_fails_ends_the_notebook_and_one_that_refuses_its_flags_does_not(capfd):
  with pytest.raises(RuntimeError, match='ended with exit status 1'):
    notebook.command('gemma4_jax.cli.size', '--variants=e3b')
  notebook.command('json.tool', '--no-such-flag')   # argparse: 2
  assert capfd.readouterr().out.count('$ python -m') == 2 and jax.default_backend() == 'cpu'


def test_a_command_leaves_an_accelerator_to_the_notebook(monkeypatch, capfd):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')     # which one process holds
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  notebook.command('json.tool', '--help')
  monkeypatch.setattr(notebook.subprocess, 'Popen', lambda command, env, **how: pytest.fail(env['JAX_PLATFORMS']))
  with pytest.raises(pytest.fail.Exception, match='cpu'):
    notebook.command('json.tool')
  assert '$ JAX_PLATFORMS=cpu python -m json.tool --help' in capfd.readouterr().out
