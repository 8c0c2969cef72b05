"""What a checkpoint's directory says beside its weights: whether it was taught to chat, and the corpus that its run kept text of."""

import os
from pathlib import Path
import re

import ml_collections

from gemma4_jax.checkpoint import load, source
from gemma4_jax.data import chat, corpus
from gemma4_jax.data.tokenizer import Tokenizer

_TURN_END = chat.STOP_IDS[1]   # <turn|>


def why_instruct(directory: str | os.PathLike) -> str:
  """The sign by which a checkpoint was taught to chat, or ''.

  Signs, as releases have them: a chat template (chat_template.jinja or .json, or in tokenizer_config.json), an eos_token_id in
  generation_config.json that is <turn|>, or a directory's name such as gemma-4-E2B-it. Our exports carry those files where their source had
  them; a run's folder and weights alone have no sign, and count as a base model.
  """
  folder = Path(directory).expanduser()
  for name in ('chat_template.jinja', 'chat_template.json'):
    if (folder / name).exists():
      return name
  if 'chat_template' in _json(folder, 'tokenizer_config.json'):
    return 'chat_template in tokenizer_config.json'
  stops = _json(folder, 'generation_config.json').get('eos_token_id')
  if _TURN_END in (stops if isinstance(stops, list) else [stops]):
    return f'eos_token_id {_TURN_END} (<turn|>) in generation_config.json'
  return 'its name' if re.search(r'gemma.*[-_]it($|[-_])', folder.resolve().name, re.IGNORECASE) else ''


def run_corpus(directory: str | os.PathLike, tokenizer: Tokenizer, progress: bool = False) -> corpus.Dataset | None:
  """The corpus of a run, as its config says and prepared again where it is not kept; None of a directory that is no run's.

  Raises:
    ValueError: the corpus cannot be read, or comes out with another tokenizer than the model's.
  """
  home = load.find(directory).home
  fields = _json(home, 'config.json')
  if not (isinstance(fields.get('data'), dict) and isinstance(fields.get('train'), dict)):
    return None
  data = corpus.prepare(ml_collections.ConfigDict(fields['data']), progress)
  if data.tokenizer_hash != tokenizer.hash:
    raise ValueError(f'{home}: its tokenizer (sha256 {tokenizer.hash[:12]}) is not what data.source={fields["data"]["source"]!r} gives '
                     f'here ({data.tokenizer_hash[:12]}): another version of Python or of the files than the run had; name files instead')
  return data


def _json(folder, name):
  file = source.inside(folder, name)
  return source.read_json(file) if file.exists() else {}
