"""Where text comes from: one iterator of documents for every source a config can name.

`stdlib` needs no download: the Python standard library of the running interpreter. The others read local files or
a Hugging Face dataset. Sources only read; `corpus.py` deduplicates, splits and tokenises.
"""

import ast
from collections.abc import Iterator
import glob
import hashlib
import json
import os
import pathlib
import sys
import sysconfig
from typing import NamedTuple
import warnings

DOMAINS = ('code', 'english', 'text')

# Test packages are absent from many installations (Debian, container images), so that leaving them out makes the
# corpus depend on the Python version alone. `encodings` is near-identical number tables, which a split by document
# would put on both sides; the English of `pydoc_data` is read as English.
_SKIPPED_PACKAGES = frozenset({'test', 'tests', 'idle_test', 'encodings', 'pydoc_data'})


class Document(NamedTuple):
  text: str
  domain: str  # one of DOMAINS
  origin: str  # file (and line) it was read from, for error messages


def documents(cfg) -> Iterator[Document]:
  """Yields the documents of `cfg.source` in an order that depends on names alone.

  Args:
    cfg: the `data` section: `source`, `path` (a glob, or the name of a Hugging Face dataset), `text_field`.
  Raises:
    ValueError: unknown source, no file matches, or a file cannot be read as text; the message names it.
    ImportError: the source needs an extra that is not installed.
  """
  paths = files(cfg)
  if cfg.source == 'stdlib':
    return _stdlib(paths)
  if cfg.source == 'hf':
    return _hugging_face(cfg.path, cfg.text_field)
  return _FILE_READERS[cfg.source](paths, cfg.text_field)


def files(cfg) -> list[pathlib.Path]:
  """Sorted files that `cfg.source` reads; empty for `hf`, whose files are remote."""
  if cfg.source not in SOURCES:
    raise ValueError(f'data.source={cfg.source!r} is unknown; one of {", ".join(SOURCES)}')
  if cfg.source == 'stdlib':
    return _stdlib_files()
  if not cfg.path:
    raise ValueError(f'data.path is empty; data.source={cfg.source!r} needs '
                     + ("a dataset's name" if cfg.source == 'hf' else "a glob such as 'corpus/**/*.txt'"))
  if cfg.source == 'hf':
    return []
  pattern = os.path.expanduser(cfg.path)
  found = sorted(p for p in map(pathlib.Path, glob.glob(pattern, recursive=True)) if p.is_file())
  if not found:
    raise ValueError(f'data.path={cfg.path!r} matches no file')
  return found


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_bytes().decode('utf-8')  # no newline translation: bits per byte count the bytes of the file
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f'data.path: cannot read {path} as UTF-8 text: {e}') from e


def _stdlib_files() -> list[pathlib.Path]:
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  found = []
  for top in root.iterdir():
    # The interpreter's own list of module names leaves out site-packages and files generated at installation.
    if top.stem in sys.stdlib_module_names:
      found += [top] if top.suffix == '.py' else top.rglob('*.py')
  found = [path for path in found if not _SKIPPED_PACKAGES.intersection(path.relative_to(root).parts)]
  if not found:
    raise ValueError(f"data.source='stdlib': no .py files under {root}; use another data.source")
  return sorted(found)


def _stdlib(paths: list[pathlib.Path]) -> Iterator[Document]:
  """Code without its docstrings, and English: docstrings (one document a module) and `pydoc_data`'s topics.

  Docstrings are cut out of the code, and a paragraph of English is used once (modules and topics quote each other),
  so that no English of one split stands in the other. The order is by hash of the name: a prefix (`max_bytes`) is
  a fair sample of both domains.
  """
  from pydoc_data import topics
  root = sysconfig.get_path('stdlib')
  items = [(os.path.relpath(path, root), path) for path in paths]
  items += [(f'pydoc topic {name}', text) for name, text in topics.topics.items()]
  seen = set()
  for name, item in sorted(items, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
    english = item
    if isinstance(item, pathlib.Path):
      try:
        code, docstrings = split_docstrings(item.read_bytes().decode('utf-8'))
      except (UnicodeDecodeError, SyntaxError):
        continue  # a handful of files, in old encodings or broken on purpose
      yield Document(code, 'code', name)
      english = '\n\n'.join(docstrings)
    yield Document(_unseen_paragraphs(english, seen), 'english', name)


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
  kept = []
  for paragraph in text.split('\n\n'):
    key = ' '.join(paragraph.split())
    if len(key) < 40 or key not in seen:  # headings such as "Arguments:" may repeat
      seen.add(key)
      kept.append(paragraph)
  return '\n\n'.join(kept)


def split_docstrings(source: str) -> tuple[str, list[str]]:
  """Cuts a module into its code (comments stay) and its docstrings (indentation removed), in order of appearance.

  A body that was only a docstring becomes `pass`, so that the code still compiles.
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # invalid escapes in old modules
    tree = ast.parse(source)
  lines = source.encode().splitlines(keepends=True)  # ast counts columns in UTF-8 bytes
  found, nodes = [], [tree]
  while nodes:
    node = nodes.pop()
    nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
      docstring = ast.get_docstring(node)
      if docstring is not None:
        found.append((node.body[0], docstring, len(node.body) == 1 and not isinstance(node, ast.Module)))
  found.sort(key=lambda item: item[0].lineno)
  for node, _, alone in reversed(found):  # from the end, so that earlier positions stay valid
    first, last = node.lineno - 1, node.end_lineno - 1
    head, tail = lines[first][:node.col_offset], lines[last][node.end_col_offset:]
    rest = head + (b'pass' if alone else b'') + tail
    lines[first:last + 1] = [rest] if rest.strip() else []
  return b''.join(lines).decode(), [docstring for _, docstring, _ in found if docstring]


def _text(paths, text_field) -> Iterator[Document]:
  del text_field
  for path in paths:
    yield Document(_read(path), 'text', str(path))


def _field(row, text_field, origin) -> Document:
  text = row.get(text_field) if isinstance(row, dict) else None
  if not isinstance(text, str):
    names = ', '.join(row) if isinstance(row, dict) else type(row).__name__
    hint = '; conversations are scored (cli.evaluate --reply_only), not trained on' if isinstance(row, dict) and 'messages' in row else ''
    raise ValueError(f'data.text_field={text_field!r} is no text in {origin}, which has: {names}{hint}')
  return Document(text, 'text', origin)


def _jsonl(paths, text_field) -> Iterator[Document]:
  for path in paths:
    number = 0
    try:
      with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
          if line.strip():
            yield _field(json.loads(line), text_field, f'{path}:{number}')
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
      raise ValueError(f'data.path: cannot read {path}, line {number}, as JSON lines: {e}') from e


def _parquet(paths, text_field) -> Iterator[Document]:
  try:
    from pyarrow import ArrowException, parquet
  except ImportError as e:
    raise ImportError("data.source='parquet' needs pyarrow: pip install 'gemma4_jax[data]'") from e
  for path in paths:
    try:
      with parquet.ParquetFile(path) as table:
        if text_field not in table.schema_arrow.names:
          _field(dict.fromkeys(table.schema_arrow.names), text_field, path)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
          for text in batch.column(0).to_pylist():
            yield _field({text_field: text}, text_field, f'{path}, row {number}')
            number += 1
    except (OSError, ArrowException) as e:
      raise ValueError(f'data.path: cannot read {path} as parquet: {e}') from e


def _hugging_face(name, text_field) -> Iterator[Document]:
  try:
    import datasets
  except ImportError as e:
    raise ImportError("data.source='hf' needs datasets: pip install 'gemma4_jax[data]'") from e
  def rows():
    dataset, _, configuration = name.partition(':')
    try:
      yield from datasets.load_dataset(dataset, *filter(None, [configuration]), split='train', streaming=True)
    except Exception as e:  # the library raises many kinds: network, unknown name, missing split
      raise ValueError(f'data.path={name!r}: cannot read the train split of this dataset: {e}') from e

  for number, row in enumerate(rows()):
    yield _field(row, text_field, f'{name}, row {number}')


_FILE_READERS = {'text': _text, 'jsonl': _jsonl, 'parquet': _parquet}
SOURCES = ('stdlib', *_FILE_READERS, 'hf')
