"""Which code a number comes from."""

import subprocess

import pytest

from gemma4_jax import provenance


def test_a_file_of_results_alone_does_not_make_the_code_another(tmp_path, monkeypatch):
  def git(*args):
    subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a@b', *args], check=True, capture_output=True)
  package, results = tmp_path / 'package', tmp_path / 'experiments' / 'results.json'
  for file in (package / 'provenance.py', results):
    file.parent.mkdir()
    file.touch()
  try:
    git('init')
  except FileNotFoundError:
    pytest.skip('needs git')
  git('add', '-A')
  git('commit', '-m', 'a')
  monkeypatch.setattr(provenance, '__file__', str(package / 'provenance.py'))
  dirty = lambda: (provenance.code()['dirty'], provenance.code(results)['dirty'])
  assert dirty() == (False, False) and len(provenance.code()['commit']) == 40
  results.write_text('{}')
  assert dirty() == (True, False)
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'config.json').touch()
  assert dirty() == (True, False)
  (package / 'other.py').touch()
  assert dirty() == (True, True)
  monkeypatch.setenv('PATH', str(tmp_path))
  assert provenance.code()['commit'] is None and not provenance.code()['dirty']
