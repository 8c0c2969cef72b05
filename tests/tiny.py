"""A toy model with a tokenizer in the released one's form, in memory and as a checkpoint directory."""

import functools
import json
import pathlib

from gemma4_jax import config
from gemma4_jax.checkpoint import save
from gemma4_jax.sampling import text

CFG = config.shrink(config.E2B, pattern='G', width=32, mlp_dim=48, vocab_size=1024)
SETTINGS = {'eos_token_id': [1, 106], 'temperature': 0.7, 'top_k': 40, 'top_p': 0.9}   # of generation_config.json


@functools.cache
def model() -> text.Model:
  return text.random(CFG)


def write(folder: pathlib.Path, **files: str) -> pathlib.Path:
  """The model as a directory that `text.load` reads; `files` are contents in place of, or beside, the usual ones."""
  save.save_hf(CFG, model().params, folder)
  usual = {'tokenizer.json': model().tokenizer.serialized, 'generation_config.json': json.dumps(SETTINGS)}
  for name, content in (usual | files).items():
    (folder / name).write_text(content, encoding='utf-8')
  return folder
