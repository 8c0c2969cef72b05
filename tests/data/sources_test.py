"""Documents of every source, and what is said when they cannot be read."""

import ast
import itertools
import json
import pathlib
import sys
import types

import ml_collections
import pytest

from gemma4_jax.data import sources


def config(source, path='', text_field='text'):
  return ml_collections.ConfigDict({'source': source, 'path': str(path), 'text_field': text_field})


@pytest.fixture(scope='module')
def stdlib():
  """Some two hundred documents of the standard library."""
  return list(itertools.islice(sources.documents(config('stdlib')), 200))


@pytest.mark.parametrize('source, code, docstrings', [
    ('"""Module."""\nx = 1  # stays\n', 'x = 1  # stays\n', ['Module.']),
    ('def f():\n  """Adds.\n\n  More.\n  """\n  return 1\n', 'def f():\n  return 1\n', ['Adds.\n\nMore.']),
    ('class A:\n  "Only."\n', 'class A:\n  pass\n', ['Only.']),
    ('def f(): "Beside."\n', 'def f(): pass\n', ['Beside.']),
    ('async def f(x="é"): "é"\n', 'async def f(x="é"): pass\n', ['é']),
    ('if 1:\n  try:\n    pass\n  except E:\n    def f():\n      "Deep."\n      g()\n',
     'if 1:\n  try:\n    pass\n  except E:\n    def f():\n      g()\n', ['Deep.']),
    ('x = """no docstring"""\n', 'x = """no docstring"""\n', []),
])
def test_docstrings_are_cut_out_of_the_code(source, code, docstrings):
  assert sources.split_docstrings(source) == (code, docstrings)


def test_stdlib_code_has_no_docstrings_and_still_compiles(stdlib):
  code = [d for d in stdlib if d.domain == 'code']
  assert len(code) > 50
  for document in code:
    for node in ast.walk(ast.parse(document.text)):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        assert not ast.get_docstring(node), document.origin


def test_a_paragraph_of_stdlib_english_stands_in_one_document_alone(stdlib):
  places = {}
  for document in stdlib:
    if document.domain == 'english':
      for paragraph in document.text.split('\n\n'):
        if len(paragraph) > 80:
          places.setdefault(' '.join(paragraph.split()), []).append(document.origin)
  assert len(places) > 500
  assert all(len(origins) == 1 for origins in places.values())


def test_stdlib_english_is_not_contained_in_the_code(stdlib):
  code = {line.strip() for d in stdlib if d.domain == 'code' for line in d.text.splitlines()}
  english = [line.strip() for d in stdlib if d.domain == 'english' for line in d.text.splitlines() if len(line) > 50]
  assert len(english) > 1000
  assert sum(line in code for line in english) < 0.005 * len(english)


def test_stdlib_files_are_sorted_without_installed_packages_tests_and_topics():
  paths = sources.files(config('stdlib'))
  parts = [set(path.parts) for path in paths]
  assert paths == sorted(paths)
  assert len(parts) > 300
  assert not set.union(*parts) & {'site-packages', 'test', 'tests', 'pydoc_data'}


def test_text_files_are_documents_in_the_order_of_their_names_byte_for_byte(tmp_path):
  for name, text in {'b.txt': 'two\r\n', 'a.txt': 'one', 'sub/c.txt': 'three'}.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(text.encode())
  got = list(sources.documents(config('text', tmp_path / '**/*.txt')))
  assert [d.text for d in got] == ['one', 'two\r\n', 'three']
  assert {d.domain for d in got} == {'text'}


def test_jsonl_gives_the_text_field_of_every_line(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"body": "one"}\n\n{"body": "two", "n": 1}\n')
  assert [d.text for d in sources.documents(config('jsonl', path, 'body'))] == ['one', 'two']


def test_parquet_gives_the_text_field_of_every_row(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  path = tmp_path / 'a.parquet'
  parquet.write_table(pyarrow.table({'body': ['one', 'two'], 'n': [1, 2]}), path)
  assert [d.text for d in sources.documents(config('parquet', path, 'body'))] == ['one', 'two']
  with pytest.raises(ValueError, match=r"text_field='text'.*a.parquet.*body, n"):
    list(sources.documents(config('parquet', path)))
  path.write_bytes(b'no parquet')
  with pytest.raises(ValueError, match='a.parquet as parquet'):
    list(sources.documents(config('parquet', path)))


def test_hugging_face_datasets_are_streamed(monkeypatch):
  calls = []

  def load_dataset(path, **kwargs):
    calls.append((path, kwargs))
    return iter([{'text': 'one'}, {'text': 'two'}])

  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
  assert [d.text for d in sources.documents(config('hf', 'some/name'))] == ['one', 'two']
  assert calls == [('some/name', {'split': 'train', 'streaming': True})]


def test_a_hugging_face_dataset_may_need_a_configuration_and_may_break_off(monkeypatch):
  def load_dataset(path, configuration, split, streaming):
    assert (path, configuration) == ('wikitext', 'raw')
    yield {'text': 'one'}
    raise RuntimeError('no network')
  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
  found = sources.documents(config('hf', 'wikitext:raw'))
  assert next(found).text == 'one'
  with pytest.raises(ValueError, match="data.path='wikitext:raw': cannot read the train split of this dataset: no network"):
    next(found)


@pytest.mark.parametrize('source, module', [('hf', 'datasets'), ('parquet', 'pyarrow')])
def test_a_missing_extra_is_named(source, module, monkeypatch, tmp_path):
  (tmp_path / 'a').write_text('')
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ImportError, match=r"gemma4_jax\[data\]"):
    list(sources.documents(config(source, tmp_path / 'a')))


@pytest.mark.parametrize('source, content, message', [
    ('text', b'\xff\xfe', 'cannot read .*a.x as UTF-8'),
    ('jsonl', b'{"text": "a"}\n{"text": \n', 'cannot read .*a.x, line 2, as JSON'),
    ('jsonl', b'\xff\n', 'cannot read .*a.x, line 1, as JSON'),
    ('jsonl', b'{"body": "a"}\n', "text_field='text' is no text in .*a.x:1, which has: body"),
    ('jsonl', b'["a"]\n', "text_field='text' is no text in .*a.x:1, which has: list"),
    ('jsonl', json.dumps({'text': None}).encode(), "text_field='text' is no text in .*a.x:1"),
])
def test_what_cannot_be_read_is_named_in_one_line(source, content, message, tmp_path):
  path = pathlib.Path(tmp_path / 'a.x')
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as e:
    list(sources.documents(config(source, path)))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('source, path, message', [
    ('txt', 'a', "data.source='txt' is unknown; one of stdlib, text, jsonl, parquet, hf"),
    ('text', '', 'data.path is empty'),
    ('hf', '', 'data.path is empty'),
    ('text', '/nowhere/*.txt', "data.path='/nowhere/[*].txt' matches no file"),
])
def test_a_source_or_path_that_gives_nothing_is_refused(source, path, message):
  with pytest.raises(ValueError, match=message):
    list(sources.documents(config(source, path)))


def test_a_file_of_json_lines_that_cannot_be_opened_is_named(tmp_path):
  with pytest.raises(ValueError, match='gone.jsonl'):
    list(sources._jsonl([tmp_path / 'gone.jsonl'], 'text'))
